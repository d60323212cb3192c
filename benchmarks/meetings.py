"""What a separator does with real meetings: who talks when, and the words that a Whisper writes.

    python benchmarks/meetings.py --recordings path/to/ami --model openai/whisper-tiny.en

Reads every recording named in ``reference.rttm``. A talker talks in a frame when its stream holds
at least a tenth of the mixture's power over half a second, and the mixture is within 30 dB of its
loudest half second. The number of talkers in every frame is compared with the reference, beside a
system that always says one.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import speaker_separator_module as ssm  # noqa: E402
from audio import FRAME_RATE, SAMPLING_RATE, load_model, read_audio  # noqa: E402
from long_recordings import answer_per_talker, ask  # noqa: E402
from scoring import markdown_table, normalize_words  # noqa: E402

SMOOTH = FRAME_RATE // 2 + 1  # frames


def reference_counts(rttm: Path) -> dict[str, tuple[np.ndarray, int]]:
    """Return {recording: (number of talkers in every frame, number of talkers in all)}."""
    turns: dict[str, list] = {}
    with ssm.reading(rttm, "is no RTTM file"):
        for line in rttm.read_text(encoding="utf-8").splitlines():
            _, name, _, start, seconds, _, _, speaker, *_ = line.split()
            turns.setdefault(name, []).append((float(start), float(seconds), speaker))
    if not turns:
        raise ValueError(f"{rttm} has no turns")
    counts = {}
    for name, rows in turns.items():
        frames = round(max(start + seconds for start, seconds, _ in rows) * FRAME_RATE)
        speakers = sorted({speaker for *_, speaker in rows})
        talks = np.zeros((len(speakers), frames), bool)
        for start, seconds, speaker in rows:
            first = round(start * FRAME_RATE)
            talks[speakers.index(speaker), first : first + round(seconds * FRAME_RATE)] = True
        counts[name] = talks.sum(0), len(speakers)
    return counts


def estimated_counts(mixture: torch.Tensor, talkers: list[torch.Tensor]) -> np.ndarray:
    """Return the number of talkers in every frame of log-mel spectrograms [T, D]."""
    powers = torch.stack([10 ** (4 * (values - mixture.amax())) for values in [mixture, *talkers]])
    powers = F.avg_pool1d(powers.sum(2), SMOOTH, 1, SMOOTH // 2, count_include_pad=False)  # [n, T]
    loud = powers[0] > 1e-3 * powers[0].amax()
    return ((powers[1:] > 0.1 * powers[0]) & loud).sum(0).numpy()


def measure(path: Path, counts: np.ndarray, separator, model, processor) -> list:
    """Return a row of the table for one recording."""
    _, mixture, talkers = ssm.infer_recording(path, separator)
    found = estimated_counts(mixture, [values for _, values, _ in talkers])
    frames = min(len(found), len(counts))
    right, one = (np.mean(c == counts[:frames]) for c in (found[:frames], 1))
    samples = read_audio(path)
    if len(samples) // SAMPLING_RATE > processor.feature_extractor.chunk_length:
        raise ValueError(f"{path} is longer than what {type(model).__name__} reads at a time")
    (alone,) = ask(model, processor, [samples])
    ssm.integrate_speaker_separator(model, separator_checkpoint=separator)
    try:
        rows = answer_per_talker(model, processor, path)
    finally:
        ssm.remove_speaker_separator(model)
    words = [len(normalize_words(row["text"])) for row in rows]
    print(f"{path.name} as it is: {alone}", file=sys.stderr)
    for row in rows:
        print(f"{path.name} talker {row['speaker']}: {row['text']}", file=sys.stderr)
    return [f"{right:.0%}", f"{one:.0%}", len(talkers), len(normalize_words(alone)),
            " + ".join(map(str, words))]


def main(argv: list[str] | None = None) -> int:
    """Print a row per recording."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--recordings", type=Path, required=True, help="folder of wavs with reference.rttm")
    add("--model", default="openai/whisper-tiny.en", help="Whisper: folder or hub id")
    add("--checkpoint", default=ssm.SHIPPED_SEPARATOR, help="separator")
    args = parser.parse_args(argv)
    if not (args.recordings / "reference.rttm").is_file():
        print(f"error: no reference.rttm in {args.recordings}", file=sys.stderr)
        return 2
    rows = []
    try:
        reference = reference_counts(args.recordings / "reference.rttm")
        separator = ssm.load_separator(args.checkpoint)
        model, processor = load_model(args.model)
        for name, (counts, talkers) in reference.items():
            path = args.recordings / f"{name}.wav"
            scores = measure(path, counts, separator, model, processor)
            rows.append([name, talkers, *scores])
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n".join(markdown_table(
        ["recording", "talkers", "right number of talkers", "always one", "talkers found",
         "words without separator", "words by talker"], rows)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
