"""Overlapped spoken digits, understood: data, training, evaluation, a table and a picture.

    python examples/overlapped_digits.py --fsdd path/to/fsdd --model path/to/qwen2-audio-digits

Trains a separator on fresh mixtures of the Free Spoken Digit Dataset (recordings 10 and up), first
against features and then against transcripts too, and counts the digits that the frozen model gets
wrong in overlapped recordings it never heard (5 to 9): as it is, with the separator, and for each
talker alone. Every step is a command of this project; run again, it goes on where it stopped.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SIZES = ["--num_layers=4", "--num_heads=4", "--ff_dim=768", "--dropout=0"]


def run(*words) -> None:
    """Run one command of the project, shown as it would be typed."""
    words = [str(word) for word in words]
    print("$ python " + " ".join(words), flush=True)
    done = subprocess.run([sys.executable, str(ROOT / words[0]), *words[1:]], check=False)
    if done.returncode:
        sys.exit(done.returncode)


def generate(args, folder: Path, *flags) -> Path:
    """Make one dataset of digits, unless it is there already."""
    if not (folder / "dataset.json").is_file():
        run("generate_multi_speaker_dataset.py", f"--speech_dir={args.work_dir / 'digits.jsonl'}",
            f"--encoder={args.model}", f"--layer={args.layer}", f"--output_dir={folder}", *flags)
    return folder


def make_data(args) -> dict[str, Path]:
    """Make the training data and a test set of every kind; returns test sets by name."""
    if not (args.work_dir / "digits.jsonl").is_file():
        run("examples/digits_manifest.py", args.fsdd, args.work_dir / "digits.jsonl")
    make_noises(args.work_dir / "noises")
    generate(args, args.work_dir / "data", "--train_samples=40", "--val_samples=60", "--join", 1, 4,
             "--min_speakers=1")
    tests = {}
    kinds = {"": [], ", noise": ["--noise_dir", args.work_dir / "noises"], ", room": ["--reverb"]}
    for kind, flags in kinds.items():
        for talkers in (1, 2, 3):
            overlap = ["--overlap", 0.8, 1] if talkers > 1 else []
            name = f"{talkers} talker{'s' * (talkers > 1)}{kind}"
            tests[name] = generate(
                args, args.work_dir / name.replace(", ", "_").replace(" ", "_"),
                f"--min_speakers={talkers}", f"--max_speakers={talkers}", "--train_samples=1",
                f"--val_samples={args.test_samples}", "--join", 3, 6, "--seed=5", *overlap, *flags)
    return tests


def make_noises(folder: Path) -> None:
    """Write a minute of white and of falling noise."""
    import numpy as np
    import soundfile

    if not folder.is_dir():
        folder.mkdir(parents=True)
        white = np.random.default_rng(0).standard_normal(60 * 16000)
        falling = np.convolve(white, 0.95 ** np.arange(100), mode="same")
        for name, noise in (("white", white), ("falling", falling)):
            soundfile.write(folder / f"{name}.wav", 0.1 * noise / np.std(noise), 16000)


def train(args) -> Path:
    """Train against features, then against transcripts too; returns the best checkpoint."""
    shared = ["--data_dir", args.work_dir / "data", "--remix", "--patience", 1000, *SIZES,
              f"--mixtures_per_epoch={args.mixtures_per_epoch}", "--batch_size=16"]
    features, words = args.work_dir / "features", args.work_dir / "words"
    if not (features / "training_report.md").is_file():
        run("speaker_separator_module.py", "train", *shared, f"--checkpoint_dir={features}",
            f"--epochs={args.epochs}", "--lr=4e-4", *resume(features))
    if args.word_epochs and not (words / "training_report.md").is_file():
        run("speaker_separator_module.py", "train", *shared, f"--checkpoint_dir={words}",
            f"--epochs={args.word_epochs}", "--lr=2e-4", f"--llm={args.model}", "--llm_weight=1",
            *(resume(words) or [f"--start_from={features / 'best_model.pt'}"]))
    return (words if args.word_epochs else features) / "best_model.pt"


def resume(folder: Path) -> list[str]:
    """Return the flag that goes on with an interrupted run, if there is one."""
    return ["--resume"] if any(folder.glob("*.pt")) else []


def evaluate(args, checkpoint: Path, tests: dict[str, Path]) -> list[dict]:
    """Count word errors on every test set; returns a row of the table for each."""
    rows = []
    for name, data in tests.items():
        scores = data / "scores.json"
        run("speaker_separator_module.py", "evaluate", f"--checkpoint={checkpoint}",
            f"--data_dir={data}", f"--model={args.model}", "--max_new_tokens=16",
            f"--json={scores}", f"--picture={data}.png")
        words = json.loads(scores.read_text(encoding="utf-8"))["words"]
        rows.append({**words[0], "of": name})
    return rows


def silences_heard(checkpoint: Path, args, count: int = 40) -> float:
    """Share of silent recordings, from digital silence to faint noise, in which nobody is found."""
    import numpy as np

    sys.path.insert(0, str(ROOT))
    import speaker_separator_module as ssm

    separator = ssm.load_separator(checkpoint)
    encoder = ssm.load_audio_encoder(args.model)
    rng, right = np.random.default_rng(0), 0
    for index in range(count):
        level = 0.0 if index % 2 else 10 ** rng.uniform(-5, -3)
        silence = (level * rng.standard_normal(int(rng.integers(16000, 64000)))).astype(np.float32)
        features = ssm.encode_audio(silence, encoder, args.layer)
        right += not ssm.separate(separator, features).active.any()
    return right / count


def main() -> None:
    """Run the story."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--fsdd", required=True, help="folder of the Free Spoken Digit Dataset's recordings")
    add("--model", required=True, help="Qwen2-Audio that transcribes digits: folder or hub id")
    add("--work_dir", type=Path, default=Path("overlapped_digits"), help="where everything goes")
    add("--layer", type=int, default=2, help="encoder block to separate after")
    add("--epochs", type=int, default=40, help="epochs against features")
    add("--word_epochs", type=int, default=20, help="epochs against transcripts too")
    add("--mixtures_per_epoch", type=int, default=1600, help="fresh mixtures in each")
    add("--test_samples", type=int, default=200, help="mixtures in each test set")
    args = parser.parse_args()
    args.work_dir.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    tests = make_data(args)
    checkpoint = train(args)
    rows = evaluate(args, checkpoint, tests)
    sys.path.insert(0, str(ROOT))
    from speaker_separator_module import word_table

    print("\n" + "\n".join(word_table(rows)))
    print(f"\nnobody found in {silences_heard(checkpoint, args):.0%} of silent recordings")
    print(f"pictures: {args.work_dir}/*.png; {(time.perf_counter() - started) / 60:.0f} minutes")


if __name__ == "__main__":
    main()
