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


def main(folder: str, manifest: str) -> int:
    """Write the manifest; returns 0, or 2 where there are no recordings."""
    recordings = sorted(path for path in Path(folder).glob("*.wav")
                        if re.fullmatch(r"\d_[^_]+_\d+", path.stem))
    if not recordings:
        print(f"error: no recordings named like 7_theo_3.wav in {folder}", file=sys.stderr)
        return 2
    if not Path(manifest).resolve().parent.is_dir() or Path(manifest).is_dir():
        print(f"error: no folder to write a file {manifest} into", file=sys.stderr)
        return 2
    with open(manifest, "w", encoding="utf-8") as lines:
        for path in recordings:
            digit, speaker, index = path.stem.split("_")
            audio = os.path.relpath(path, Path(manifest).resolve().parent)
            split = "val" if int(index) < 10 else "train"
            row = {"audio": audio, "speaker": speaker, "text": WORDS[int(digit)], "split": split,
                   "corpus": "fsdd"}
            lines.write(json.dumps(row) + "\n")
    print(f"{len(recordings)} recordings -> {manifest}")
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", help="the recordings")
    parser.add_argument("manifest", help="the file to write, .jsonl")
    sys.exit(main(**vars(parser.parse_args())))
