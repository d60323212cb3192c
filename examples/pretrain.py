"""Train a separator like the shipped one from scratch: manifest, dataset, training, export.

    python examples/pretrain.py --speech SPEECH --fsdd FSDD

``--speech`` is a folder with ``manifest.jsonl`` (audio, speaker, text, split, corpus) and, in
``noise/``, recordings of noise; ``--fsdd`` is the Free Spoken Digit Dataset. Every step is a
command of this project, printed as it would be typed. A second run continues where it stopped.
"""

import argparse
import shutil
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]

import numpy as np  # noqa: E402
import torch  # noqa: E402
from overlapped_digits import (  # noqa: E402
    existing,
    fail,
    failing_in_one_line,
    is_trained,
    list_digits,
    make_dataset,
    read_manifest,
    run,
    write_manifest,
)

import speaker_separator_module as ssm  # noqa: E402
from audio import SAMPLING_RATE, write_wav  # noqa: E402
from mixing import list_noises  # noqa: E402

TIMES = {"librispeech": 12, "fsdd": 3}  # how often each training recording is listed
PARTS = 8  # of a step, except on CUDA: a whole one takes up to 27 GB
SIZES = ["--dim=240", "--num_heads=4", "--ff_dim=640"]  # 5.9 million weights, 12 MB in bfloat16


def list_speech(args) -> Path:
    """Write a manifest of speech and digits; training rows repeat as often as ``TIMES`` says.

    Digits are for training only: their few speakers would make validation look easy.
    """
    speech = read_manifest(Path(args.speech) / "manifest.jsonl")
    if not (Path(args.speech) / "noise").is_dir():
        fail(f"no {Path(args.speech) / 'noise'}")
    digits = [row | {"audio": str((args.work_dir / row["audio"]).resolve())}
              for row in list_digits(args) if row["split"] == "train"]
    rows = []
    for row in speech + digits:
        times = TIMES.get(str(row.get("corpus")), 1) if row.get("split") == "train" else 1
        rows += [row] * times
    return write_manifest(args.work_dir / "speech.jsonl", rows)


def make_noises(args) -> Path:
    """Copy the recordings of noise, and add half as many steady ones, white to brown."""
    folder = args.work_dir / "noise"
    if not folder.is_dir():
        part = folder.with_suffix(".part")  # a folder without .part is whole
        shutil.rmtree(part, ignore_errors=True)
        shutil.copytree(Path(args.speech) / "noise", part)
        rng, samples = np.random.default_rng(0), 6 * SAMPLING_RATE
        frequencies = np.arange(1, samples // 2 + 2)
        for number in range(len(list_noises(part)) // 2):
            spectrum = np.fft.rfft(rng.standard_normal(samples))
            noise = np.fft.irfft(spectrum * frequencies ** -rng.uniform(0, 1))
            write_wav(part / f"steady_{number}.wav", 0.1 * noise / np.std(noise))
        part.rename(folder)
    return folder


def make_data(args) -> Path:
    """Make the dataset, unless it is there; training mixes its recordings anew."""
    return make_dataset(
        args.work_dir / "data", f"--speech_dir={list_speech(args)}", "--train_samples=10",
        "--val_samples=120", "--min_speakers=1", "--join", 1, 3, "--min_seconds=3",
        "--max_onset=1.5", "--max_gap=0.6", "--max_seconds=17", "--level_difference=5",
        "--same_corpus=0.8", "--turns=0.1", f"--noise_dir={make_noises(args)}", "--snr_db", 4, 45,
        "--reverb", 0.3, "--speed", 0.75, 1.35, "--formants", 0.85, 1.18, "--equalizer", 3.5,
        "--telephone", 0.2, "--as_recorded", "fsdd")


def build_parser() -> argparse.ArgumentParser:
    """Return the parser."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--speech", required=True, help="folder with manifest.jsonl and noise/")
    add("--fsdd", required=True, help="folder of the Free Spoken Digit Dataset's recordings")
    add("--output_dir", default="my_separator", help="where the weights go")
    add("--work_dir", type=Path, default=Path("pretraining"), help="data and checkpoints")
    add("--epochs", type=int, default=10, help="training epochs")
    add("--mixtures_per_epoch", type=int, default=54_000, help="fresh mixtures in an epoch")
    add("--batch_size", type=int, default=128, help="mixtures per step, a multiple of 8")
    add("--workers", type=int, default=0, help="processes that mix; 0: this one")
    add("--device", default="auto", help="where to compute: auto, cpu, cuda or mps")
    return parser


def pretrain(args) -> None:
    """Make the data, train and export."""
    ssm.prepare_folder(args.work_dir)
    ssm.prepare_export(Path(args.output_dir), "--output_dir")
    data, checkpoints = make_data(args), args.work_dir / "checkpoints"
    last = checkpoints / f"checkpoint_epoch_{args.epochs}.pt"
    if not is_trained(checkpoints, args):
        parts = 1 if args.device in ("auto", "cuda") and torch.cuda.is_available() else PARTS
        run(ssm, "train", f"--data_dir={data}", f"--checkpoint_dir={checkpoints}", *SIZES,
            "--max_speakers=3", "--crop_seconds", 2, 16, "--lr=3e-3", "--activity_weight=0.04",
            f"--epochs={args.epochs}", f"--mixtures_per_epoch={args.mixtures_per_epoch}",
            f"--batch_size={args.batch_size // parts}", f"--accumulate={parts}",
            f"--workers={args.workers}", f"--device={args.device}",
            *["--resume"] * any(checkpoints.glob("*.pt")))
    ssm.export_separator(ssm.load_separator(existing(last)), Path(args.output_dir), torch.bfloat16)
    print(f"exported the weights of epoch {args.epochs} to {args.output_dir}")


def main(argv: list[str] | None = None) -> None:
    """Run every step that is not done yet."""
    args = build_parser().parse_args(argv)
    if args.batch_size < 1 or args.batch_size % PARTS:
        fail(f"--batch_size must be a multiple of {PARTS}, not {args.batch_size}")
    with failing_in_one_line():
        pretrain(args)


if __name__ == "__main__":
    main()
