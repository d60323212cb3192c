"""Overlapped spoken digits, understood: data, training, evaluation, a table and a picture.

    python examples/overlapped_digits.py --fsdd path/to/fsdd --model path/to/qwen2-audio-digits

Trains a separator on fresh mixtures of the Free Spoken Digit Dataset (recordings 10 and up) against
features, first of talkers who come in when they like, then of talkers who overlap by a fifth and
more (``--word_epochs`` adds epochs against transcripts), and counts the digits the frozen model
gets wrong in overlapped recordings it never heard (5 to 9): as it is, with the separator, and for
each talker alone. Every step is a command of this project; run again, it goes on where it stopped.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
import soundfile

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]

import digits_manifest  # noqa: E402

import generate_multi_speaker_dataset as generator  # noqa: E402
import speaker_separator_module as ssm  # noqa: E402

SEPARATOR = ["--num_layers=4", "--num_heads=4", "--ff_dim=768", "--dropout=0", "--mask=residual"]


def run(module, *words) -> None:
    """Run one command of the project, shown as it would be typed."""
    words = [str(word) for word in words]
    print(f"$ python {Path(module.__file__).name} {' '.join(words)}", flush=True)
    status = module.main(words)
    if status:
        sys.exit(status)


def generate(args, folder: Path, *flags) -> Path:
    """Make one dataset of digits, unless it is there already."""
    if not (folder / "dataset.json").is_file():
        run(generator, f"--speech_dir={args.work_dir / 'digits.jsonl'}",
            f"--encoder={args.model}", f"--layer={args.layer}", f"--output_dir={folder}", *flags)
    return folder


def make_data(args) -> dict[str, Path]:
    """Make the training data and a test set of every kind; returns test sets by name."""
    manifest = args.work_dir / "digits.jsonl"
    if not manifest.is_file() and digits_manifest.main(args.fsdd, manifest):
        sys.exit(2)
    noises, other_noises = args.work_dir / "noises", args.work_dir / "training_noises"
    make_noises(noises, seed=0)
    make_noises(other_noises, seed=1)
    shared = ["--train_samples=40", "--min_speakers=1", "--speed", 0.8, 1.25,
              "--noise_dir", other_noises, "--snr_db", 10, 60]
    generate(args, args.work_dir / "data", *shared, "--join", 1, 6, "--max_onset=1.0",
             "--val_samples=60")
    generate(args, args.work_dir / "overlapped", *shared, "--join", 2, 6, "--overlap", 0.2, 1,
             f"--val_samples={args.test_samples}")
    tests = {}
    kinds = {"": [], ", noise": ["--noise_dir", noises], ", room": ["--reverb"]}
    for kind, flags in kinds.items():
        for talkers in (1, 2, 3):
            overlap = ["--overlap", 0.81, 1] if talkers > 1 else []
            name = f"{talkers} talker{'s' * (talkers > 1)}{kind}"
            tests[name] = generate(
                args, args.work_dir / name.replace(", ", "_").replace(" ", "_"),
                f"--min_speakers={talkers}", f"--max_speakers={talkers}", "--train_samples=1",
                f"--val_samples={args.test_samples}", "--join", 3, 6, "--seed=5", *overlap, *flags)
    return tests


def make_noises(folder: Path, seed: int) -> None:
    """Write a minute of white and of falling noise."""
    if not folder.is_dir():
        folder.mkdir(parents=True)
        white = np.random.default_rng(seed).standard_normal(60 * 16000)
        falling = np.convolve(white, 0.95 ** np.arange(100), mode="same")
        for name, noise in (("white", white), ("falling", falling)):
            soundfile.write(folder / f"{name}.wav", 0.1 * noise / np.std(noise), 16000)


def train(args) -> Path:
    """Train in two stages against features, then, if asked to, transcripts; returns the best."""
    stages = [  # folder of checkpoints, data, epochs, flags
        ("features", "data", args.epochs, ["--batch_size=8", "--lr=2e-3", "--activity_weight=10"]),
        ("overlap", "overlapped", args.overlap_epochs,
         ["--batch_size=16", "--lr=1e-3", "--activity_weight=40"]),
        ("words", "overlapped", args.word_epochs,
         ["--batch_size=16", "--lr=1e-4", "--activity_weight=40", f"--llm={args.model}",
          "--llm_weight=5"])]
    best = None
    for name, data, epochs, flags in stages:
        folder = args.work_dir / name
        if epochs and not (folder / "training_report.md").is_file():
            start = resume(folder) or ([f"--start_from={best}"] if best else [])
            run(ssm, "train", f"--data_dir={args.work_dir / data}", f"--checkpoint_dir={folder}",
                "--remix", f"--mixtures_per_epoch={args.mixtures_per_epoch}", *SEPARATOR,
                "--optimizer=muon", "--output_weight=3", f"--output_block={args.layer + 1}",
                f"--epochs={epochs}", *flags, *start)
        if epochs:
            best = folder / "best_model.pt"
    return best


def resume(folder: Path) -> list[str]:
    """Return the flag that goes on with an interrupted run, if there is one."""
    return ["--resume"] if any(folder.glob("*.pt")) else []


def evaluate(args, checkpoint: Path, tests: dict[str, Path]) -> list[dict]:
    """Count word errors on every test set; returns a row of the table for each."""
    rows = []
    for name, data in tests.items():
        scores = data / "scores.json"
        run(ssm, "evaluate", f"--checkpoint={checkpoint}",
            f"--data_dir={data}", f"--model={args.model}", "--max_new_tokens=16",
            f"--json={scores}", f"--picture={data}.png")
        words = json.loads(scores.read_text(encoding="utf-8"))["words"]
        rows.append({**words[0], "of": name})
    return rows


def silences_heard(checkpoint: Path, args, count: int = 40) -> float:
    """Share of silent recordings, from digital silence to faint noise, in which nobody is found."""
    separator = ssm.load_separator(checkpoint)
    encoder = ssm.load_audio_encoder(args.model)
    rng, right = np.random.default_rng(0), 0
    for index in range(count):
        level = 0.0 if index % 2 else 10 ** rng.uniform(-5, -3)
        length = int(rng.integers(encoder.max_samples // 4, encoder.max_samples))
        silence = (level * rng.standard_normal(length)).astype(np.float32)
        features = ssm.encode_audio(silence, encoder, args.layer)
        right += not ssm.separate(separator, features).active.any()
    return right / count


def build_parser() -> argparse.ArgumentParser:
    """Return the parser."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--fsdd", required=True, help="folder of the Free Spoken Digit Dataset's recordings")
    add("--model", required=True, help="Qwen2-Audio that transcribes digits: folder or hub id")
    add("--work_dir", type=Path, default=Path("overlapped_digits"), help="where everything goes")
    add("--layer", type=int, default=0, help="encoder block to separate after")
    add("--epochs", type=int, default=26, help="epochs on all kinds of overlap")
    add("--overlap_epochs", type=int, default=76, help="epochs on more overlap after them")
    add("--word_epochs", type=int, default=0,
        help="epochs against transcripts too after those (not measured)")
    add("--mixtures_per_epoch", type=int, default=1600, help="fresh mixtures in each")
    add("--test_samples", type=int, default=200, help="mixtures in each test set")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Run the story."""
    args = build_parser().parse_args(argv)
    args.work_dir.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    tests = make_data(args)
    checkpoint = train(args)
    rows = evaluate(args, checkpoint, tests)
    print("\n" + "\n".join(ssm.word_table(rows)))
    print(f"\nnobody found in {silences_heard(checkpoint, args):.0%} of silent recordings")
    print(f"pictures: {args.work_dir}/*.png; {(time.perf_counter() - started) / 60:.0f} minutes")


if __name__ == "__main__":
    main()
