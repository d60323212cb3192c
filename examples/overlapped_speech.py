"""Word errors of a Whisper in overlapped read speech, with a separator and without.

    python examples/overlapped_speech.py --speech SPEECH --model MODEL

Mixes the validation speakers of ``--speech`` (whatever the generator's ``--speech_dir`` takes):
one, two and three talkers who overlap by 80% or more, at levels within 3 dB. Counts the words that
the frozen model gets wrong as it is, with the separator, and for each talker alone. Every step is a
command of this project, printed as it would be typed; mixtures are kept for the next run.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]

from overlapped_digits import (  # noqa: E402
    fail,
    failing_in_one_line,
    make_dataset,
    read_manifest,
    run,
    write_manifest,
)

import speaker_separator_module as ssm  # noqa: E402
from scoring import markdown_table, word_table  # noqa: E402


def copy_manifest(args, source: Path) -> Path:
    """Copy a manifest, or one corpus of it, with absolute paths; return the new manifest."""
    name = args.corpus or "speech"
    rows = [row for row in read_manifest(source)
            if str(row.get("corpus") or "").startswith(args.corpus or "")]
    if not rows:
        fail(f"no line of {source} has a corpus that starts with {args.corpus}")
    return write_manifest(args.work_dir / f"{name.replace('/', '_')}.jsonl", rows)


def make_test_set(args, talkers: int) -> Path:
    """Make the mixtures of ``talkers`` talkers."""
    folder = args.work_dir / f"{talkers}_talkers{'_by_telephone' * args.telephone}"
    return make_dataset(
        folder, f"--speech_dir={args.speech}", "--train_samples=1",
        f"--val_samples={args.samples}", f"--min_speakers={talkers}", f"--max_speakers={talkers}",
        "--overlap", 0.81, 1, "--max_seconds=17", "--seed=5", *["--telephone=1"] * args.telephone)


def evaluate(args, talkers: int, data: Path) -> dict:
    """Return the scores of the test set of ``talkers`` talkers."""
    scores = data / "scores.json"
    known = ["--num_speakers", talkers] if args.known_count else []
    run(ssm, "evaluate", f"--checkpoint={args.checkpoint}", f"--data_dir={data}",
        f"--model={args.model}", "--batch_size=1", f"--json={scores}", f"--picture={data}.png",
        *known)
    return json.loads(scores.read_text(encoding="utf-8"))


def build_parser() -> argparse.ArgumentParser:
    """Return the parser."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--speech", required=True, help="recordings of speakers, with transcripts")
    add("--corpus", help="use the lines of manifest.jsonl whose corpus starts with this; both "
        "splits are needed")
    add("--model", required=True, help="Whisper: folder or hub id")
    add("--checkpoint", default=ssm.SHIPPED_SEPARATOR, help="separator")
    add("--work_dir", type=Path, default=Path("overlapped_speech"), help="where everything goes")
    add("--samples", type=int, default=200, help="mixtures of each number of talkers")
    add("--talkers", type=int, nargs="+", default=[1, 2, 3], help="numbers of talkers")
    add("--telephone", action="store_true", help="mixtures that come through a telephone")
    add("--known_count", action="store_true",
        help="give the number of talkers instead of letting the separator find it")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Make the test sets, evaluate on them and print two tables."""
    args = build_parser().parse_args(argv)
    manifest = Path(args.speech)
    if manifest.is_dir():
        manifest /= "manifest.jsonl"
    with failing_in_one_line():
        ssm.prepare_folder(args.work_dir)
        if args.corpus or manifest.is_file():
            args.speech = copy_manifest(args, manifest)
        tests = {n: make_test_set(args, n) for n in args.talkers}
        scores = {f"{n} talker{'s' * (n > 1)}": evaluate(args, n, tests[n]) for n in tests}
    rows = [{**row["words"][0], "of": name} for name, row in scores.items()]
    print("\n" + "\n".join(word_table(rows)) + "\n")
    audio = [[name, f"{row['si_sdr_improvement']:z.1f}"] for name, row in scores.items()
             if not name.startswith("1")]
    print("\n".join(markdown_table(["audio of", "SI-SDR improvement (dB)"], audio)))
    print(f"\npictures: {args.work_dir}/*.png")


if __name__ == "__main__":
    main()
