"""Write the recordings of a Hugging Face dataset, and a manifest that ``--speech_dir`` reads.

    pip install datasets
    python examples/manifest_of_dataset.py openslr/librispeech_asr --name clean --split train.100
    python generate_multi_speaker_dataset.py --speech_dir speech --output_dir recordings

The dataset is an id on the hub or a folder. Rows are read as a stream, and each recording is
written as it is stored, so that nothing but the recordings takes disk or memory.
"""

import argparse
import json
import sys
from pathlib import Path

from tqdm import tqdm


def write_recordings(rows, folder: Path, audio: str, speaker: str, text: str) -> int:
    """Write a file for every row of undecoded audio and a line of the manifest; return how many.

    ValueError if a row lacks one of the columns ``audio``, ``speaker`` and ``text``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    number = 0
    with open(folder / "manifest.jsonl", "w", encoding="utf-8") as lines:
        for number, row in enumerate(tqdm(rows, "recordings", disable=None), start=1):
            if missing := [name for name in (audio, speaker, text) if name not in row]:
                raise ValueError(f"the dataset has no column {missing[0]!r}, but {sorted(row)}")
            stored, path = row[audio]["bytes"], row[audio]["path"] or "of.wav"
            name = f"{number:08d}{Path(path).suffix}"
            (folder / name).write_bytes(Path(path).read_bytes() if stored is None else stored)
            line = {"audio": name, "speaker": str(row[speaker]), "text": str(row[text] or "")}
            lines.write(json.dumps(line) + "\n")
    return number


def build_parser() -> argparse.ArgumentParser:
    """Return the parser."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("dataset", help="id on the hub, or a folder")
    add("--name", help="configuration of the dataset")
    add("--split", default="train", help="split of the dataset")
    add("--audio", default="audio", help="column of the recordings")
    add("--speaker", default="speaker_id", help="column of the speakers")
    add("--text", default="text", help="column of the transcripts")
    add("--output_dir", type=Path, default=Path("speech"),
        help="where recordings and manifest go")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Write recordings and manifest; return 0, or 2 after one line on standard error."""
    args = build_parser().parse_args(argv)
    try:
        from datasets import Audio, load_dataset

        rows = load_dataset(args.dataset, args.name, split=args.split, streaming=True)
        rows = rows.cast_column(args.audio, Audio(decode=False))
        count = write_recordings(rows, args.output_dir, args.audio, args.speaker, args.text)
    except (ModuleNotFoundError, OSError, ValueError) as error:
        print(f"error: {str(error).splitlines()[0]}", file=sys.stderr)
        return 2
    print(f"{count} recordings and manifest.jsonl in {args.output_dir}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
