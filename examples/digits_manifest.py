"""List the recordings of the Free Spoken Digit Dataset for the dataset generator.

    python examples/digits_manifest.py path/to/fsdd digits.jsonl

Writes one JSON line per ``{digit}_{speaker}_{index}.wav`` with audio, speaker, text, split
and corpus: recordings 0 to 9 of each digit and speaker are for validation, the others for training.
"""

import argparse
import json
import os
import re
import sys
from pathlib import Path

WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


def digit_rows(folder: str, start: Path) -> list[dict]:
    """Return the rows of a manifest in the folder ``start``; ValueError without recordings."""
    recordings = sorted(path for path in Path(folder).glob("*.wav")
                        if re.fullmatch(r"\d_[^_]+_\d+", path.stem))
    if not recordings:
        raise ValueError(f"no recordings named like 7_theo_3.wav in {folder}")
    rows = []
    for path in recordings:
        digit, speaker, index = path.stem.split("_")
        rows.append({"audio": os.path.relpath(path, start.resolve()), "speaker": speaker,
                     "text": WORDS[int(digit)], "split": "val" if int(index) < 10 else "train",
                     "corpus": "fsdd"})
    return rows


def main(folder: str, manifest: str) -> int:
    """Write the manifest; return 0, or 2 after an error."""
    try:
        rows = digit_rows(folder, Path(manifest).parent)
        if not Path(manifest).resolve().parent.is_dir() or Path(manifest).is_dir():
            raise ValueError(f"no folder to write a file {manifest} into")
        text = "".join(json.dumps(row) + "\n" for row in rows)
        Path(manifest).write_text(text, encoding="utf-8")
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{len(rows)} recordings -> {manifest}")
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", help="the recordings")
    parser.add_argument("manifest", help="the file to write, .jsonl")
    sys.exit(main(**vars(parser.parse_args())))
