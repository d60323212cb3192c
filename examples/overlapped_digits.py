"""Digit errors in overlapped speech: data, training, evaluation, a table and pictures.

    python examples/overlapped_digits.py --fsdd FSDD --model QWEN2_AUDIO

Trains a spectrogram separator on fresh mixtures of the Free Spoken Digit Dataset (recordings 10 and
up) and counts the digits that the frozen model gets wrong in overlapped recordings that no training
saw (0 to 9): as it is, with the separator, and for each talker alone. Every step is a command of
this project, printed as it would be typed. A second run continues where the first one stopped.
"""

import argparse
import contextlib
import io
import json
import sys
from pathlib import Path
from typing import NoReturn

import numpy as np

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]

import digits_manifest  # noqa: E402

import generate_multi_speaker_dataset as generator  # noqa: E402
import speaker_separator_module as ssm  # noqa: E402
from audio import SAMPLING_RATE, write_wav  # noqa: E402
from scoring import word_table  # noqa: E402

TALKERS = (1, 2, 3)  # in the mixtures of the test sets


def run(module, *words) -> None:
    """Run one command of the project, printed as it would be typed."""
    words = [str(word) for word in words]
    print(f"$ python {Path(module.__file__).name} {' '.join(words)}", flush=True)
    if status := module.main(words):
        sys.exit(status)


def fail(message) -> NoReturn:
    """End with one line and status 2."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def existing(path: Path) -> Path:
    """Return the path of a file; fail if there is none."""
    if not path.is_file():
        fail(f"no {path}")
    return path


@contextlib.contextmanager
def failing_in_one_line():
    """End with one line and status 2 on what the user can mend."""
    try:
        yield
    except (OSError, ValueError) as error:
        fail(ssm.first_line(error))


def read_manifest(manifest: Path) -> list[dict]:
    """Return the rows of a manifest, with absolute paths; fail where a line is no such row."""
    rows, number = [], 0
    try:
        lines = io.StringIO(existing(manifest).read_text(encoding="utf-8-sig"))
        for line in lines:
            number += 1
            if line.strip():
                row = json.loads(line)
                rows.append(row | {"audio": str((manifest.parent / row["audio"]).resolve())})
    except (ValueError, TypeError, KeyError) as error:
        fail(f"{manifest}, line {number}: no JSON with audio ({error})")
    return rows


def write_manifest(manifest: Path, rows: list[dict]) -> Path:
    """Write a manifest; fail if another is there, since data made from that one is there too."""
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if manifest.is_file() and manifest.read_text(encoding="utf-8") != text:
        fail(f"{manifest} lists other recordings: choose another --work_dir")
    manifest.write_text(text, encoding="utf-8")
    return manifest


def list_digits(args) -> list[dict]:
    """Return the digits' manifest rows, with paths relative to the working folder."""
    return digits_manifest.digit_rows(args.fsdd, args.work_dir)


def make_dataset(folder: Path, *words) -> Path:
    """Make a dataset, unless the same command has already made it."""
    words = [f"--output_dir={folder}", *map(str, words)]
    about, command = folder / "dataset.json", " ".join([Path(generator.__file__).name, *words])
    if not about.is_file() or ssm.read_json(about, dict).get("command_line") != command:
        run(generator, *words)
    return folder


def make_data(args) -> tuple[Path, dict[str, Path]]:
    """Make the training data and all test sets; return the data and the test sets by name."""
    manifest = write_manifest(args.work_dir / "digits.jsonl", list_digits(args))
    digits, noises = [f"--speech_dir={manifest}", "--max_seconds=4"], args.work_dir / "noises"
    make_noises(noises / "train", seed=1)
    make_noises(noises / "test", seed=0)
    train = make_dataset(
        args.work_dir / "data", *digits, "--min_speakers=1", "--join", 1, 8, "--min_seconds=2",
        "--max_onset=0.5", "--train_samples=10", "--val_samples=120",
        f"--noise_dir={noises / 'train'}", "--snr_db", 15, 60)
    tests = {}
    kinds = {"": [], ", noise": [f"--noise_dir={noises / 'test'}"], ", room": ["--reverb"]}
    for kind, flags in kinds.items():
        for talkers in TALKERS:
            name = f"{talkers} talker{'s' * (talkers > 1)}{kind}"
            tests[name] = make_dataset(
                args.work_dir / name.replace(", ", "_").replace(" ", "_"), *digits,
                f"--min_speakers={talkers}", f"--max_speakers={talkers}", "--train_samples=1",
                "--join", 3, 6, "--seed=5", f"--val_samples={args.test_samples}", "--overlap", 0.81,
                1, *flags)
    return train, tests


def make_noises(folder: Path, seed: int) -> None:
    """Write a minute each of white noise and of noise that falls with frequency."""
    if not folder.is_dir():
        part = folder.with_suffix(".part")  # a folder without .part is whole
        part.mkdir(parents=True, exist_ok=True)
        white = np.random.default_rng(seed).standard_normal(60 * SAMPLING_RATE)
        falling = np.convolve(white, 0.95 ** np.arange(100), mode="same")
        for name, noise in (("white", white), ("falling", falling)):
            write_wav(part / f"{name}.wav", 0.1 * noise / np.std(noise))
        part.rename(folder)


def is_trained(folder: Path, args) -> bool:
    """Return whether the run is done; fail if the folder holds a run of another length."""
    last = folder / f"checkpoint_epoch_{args.epochs}.pt"
    if not last.is_file():
        return False
    options = ssm.load_checkpoint(last)["options"]
    for name in ("epochs", "mixtures_per_epoch"):
        if options[name] != getattr(args, name):
            fail(f"{folder} holds a run of --{name}={options[name]}: choose another --work_dir")
    return True


def train(args, data: Path) -> Path:
    """Train, or go on training; return the best checkpoint."""
    folder = args.work_dir / "checkpoints"
    if not is_trained(folder, args):
        resume = ["--resume"] if any(folder.glob("*.pt")) else []
        run(ssm, "train", f"--data_dir={data}", f"--checkpoint_dir={folder}",
            f"--epochs={args.epochs}", f"--mixtures_per_epoch={args.mixtures_per_epoch}",
            "--crop_seconds", 2, 3, *resume)
    return folder / "best_model.pt"


def evaluate(args, checkpoint: Path, tests: dict[str, Path]) -> list[dict]:
    """Count word errors on every test set; return a row of the table for each."""
    rows = []
    for name, data in tests.items():
        scores = data / "scores.json"
        run(ssm, "evaluate", f"--checkpoint={checkpoint}", f"--data_dir={data}",
            f"--model={args.model}", "--max_new_tokens=16", f"--json={scores}",
            f"--picture={data}.png", *([] if args.find_count else ["--num_speakers", name[0]]))
        words = json.loads(scores.read_text(encoding="utf-8"))["words"]
        rows.append({**words[0], "of": name})
    return rows


def build_parser() -> argparse.ArgumentParser:
    """Return the parser."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--fsdd", required=True, help="folder of the Free Spoken Digit Dataset's recordings")
    add("--model", required=True, help="Qwen2-Audio that transcribes digits: folder or hub id")
    add("--work_dir", type=Path, default=Path("overlapped_digits"), help="where everything goes")
    add("--checkpoint", help="evaluate this separator instead of training one")
    add("--epochs", type=int, default=10, help="training epochs")
    add("--mixtures_per_epoch", type=int, default=4000, help="fresh mixtures in each")
    add("--test_samples", type=int, default=100, help="mixtures in each test set")
    add("--find_count", action="store_true",
        help="let the separator find the number of talkers instead of giving it")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Run every step that is not done yet."""
    args = build_parser().parse_args(argv)
    with failing_in_one_line():
        ssm.prepare_folder(args.work_dir)
        data, tests = make_data(args)
        rows = evaluate(args, args.checkpoint or train(args, data), tests)
    print("\n" + "\n".join(word_table(rows)))
    print(f"\npictures: {args.work_dir}/*.png")


if __name__ == "__main__":
    main()
