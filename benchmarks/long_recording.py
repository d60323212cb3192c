"""Measure whether talkers keep their numbers through a long recording.

Builds recordings of two talkers who alternate and overlap out of single spoken digits (the Free
Spoken Digit Dataset), separates them in windows, and counts the windows in which every talker has
the number that it has in the whole recording, judged by the talkers' own tracks. Without a
checkpoint the streams are the talkers' own spectrograms in random order: only matching is measured.

    python benchmarks/long_recording.py --recordings FSDD --checkpoint pretrained
"""

import argparse
import math
import sys
from itertools import count, islice
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import long_recordings  # noqa: E402
import speaker_separator_module as ssm  # noqa: E402
from audio import HOP_LENGTH, SAMPLING_RATE, log_mel, read_audio  # noqa: E402


def speak(folder: Path, speaker: str, seconds: float, rng) -> np.ndarray:
    """Return digits of one speaker, recordings 5 to 9, one after the other, at an RMS of 0.05."""
    pieces, length = [], 0
    while length < seconds * SAMPLING_RATE:
        samples = read_audio(folder / f"{rng.integers(10)}_{speaker}_{rng.integers(5, 10)}.wav")
        gap = np.zeros(int(rng.uniform(0.02, 0.15) * SAMPLING_RATE), np.float32)
        pieces += [samples * (0.05 / np.sqrt(np.mean(samples**2))), gap]
        length += len(samples) + len(gap)
    return np.concatenate(pieces)[: int(seconds * SAMPLING_RATE)]


def two_tracks(folder: Path, seconds: float, seed: int) -> np.ndarray:
    """Return the tracks [2, samples] of two talkers who take turns of 3 to 8 s.

    A turn starts between 2 s before the end of the previous turn and 1 s after it.
    """
    rng = np.random.default_rng(seed)
    speakers = {path.stem.split("_")[1] for path in folder.glob("[0-9]_*_*.wav")}
    speakers = rng.choice(sorted(speakers), 2, False)
    tracks = np.zeros((2, int(seconds * SAMPLING_RATE)), np.float32)
    start, turn = 0.0, 0
    while start < seconds:
        length = min(rng.uniform(3, 8), seconds - start)
        samples = speak(folder, speakers[turn % 2], length, rng)
        first = int(start * SAMPLING_RATE)
        room = tracks[turn % 2, first : first + len(samples)]
        room += samples[: len(room)]
        start, turn = start + max(length + rng.uniform(-2, 1), 1), turn + 1
    return tracks


def oracle(tracks: np.ndarray, step: int, seed: int):
    """Return a separator of windows whose streams are the talkers', in random order per window."""
    rng, firsts = np.random.default_rng(seed), count(0, step)

    def separate(features, alone):
        length = features.shape[1] * HOP_LENGTH
        own = np.stack([tracks[rng.permutation(2), first : first + length]
                        for first in islice(firsts, len(features))])
        spectra = log_mel(torch.from_numpy(own).flatten(0, 1)).unflatten(0, (-1, 2))
        gains = spectra[:, :, : features.shape[1]] - features[:, None]
        active = torch.from_numpy(np.square(own).mean(2) > 1e-5)
        return gains.clamp(long_recordings.ABSENT, 0), active.float(), active

    return separate


def measure(folder: Path, checkpoint, seconds: float, seed: int, num_speakers=None) -> dict:
    """Return the number of windows, the share with the right numbers, and the talkers found."""
    tracks = two_tracks(folder, seconds, seed)
    step = long_recordings.window_step(long_recordings.WINDOW_SECONDS * SAMPLING_RATE)
    separate = oracle(tracks, step, seed)
    if checkpoint:
        separate = ssm.window_separator(ssm.load_separator(checkpoint), None, num_speakers)
    recording = long_recordings.separate_recording(
        separate, tracks.sum(0), num_speakers=num_speakers)
    frames = len(recording.mixture)
    alone = log_mel(torch.from_numpy(tracks))[:, :frames]
    wanted = alone - recording.mixture  # the gains that leave each talker alone
    present = wanted > -0.5
    spans = [(start, start + step // HOP_LENGTH) for start in
             range(0, frames, step // HOP_LENGTH)]
    votes = np.zeros((len(spans), len(recording.talkers), 2))  # how alike, window by window
    for w, (start, end) in enumerate(spans):
        for n, talker in enumerate(recording.talkers):
            error = (talker.values[start:end] - wanted[:, start:end].clamp(-2, 0)).square()
            votes[w, n] = -(error * present[:, start:end]).mean((1, 2)).numpy()
    if len(recording.talkers) < 2:
        return {"windows": len(spans), "kept": 0.0, "talkers": len(recording.talkers)}
    # Pairs of numbers for the two talkers, [windows, n, m]: all of them, because a number that
    # nobody has in a window is as unlike one talker as the other.
    pairs = votes[:, :, None, 0] + votes[:, None, :, 1]
    pairs[:, range(len(recording.talkers)), range(len(recording.talkers))] = -np.inf
    one, other = np.unravel_index(pairs.sum(0).argmax(), pairs.shape[1:])
    kept = pairs[:, one, other] == pairs.max((1, 2))
    return {"windows": len(spans), "kept": float(np.mean(kept)), "talkers": len(recording.talkers)}


def main(argv: list[str] | None = None) -> int:
    """Print a row per recording."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--recordings", type=Path, required=True, help="the Free Spoken Digit Dataset")
    add("--checkpoint", help="separator; without it the talkers' own spectrograms")
    add("--seconds", type=float, default=240, help="length of each recording")
    add("--seeds", type=int, default=5, help="number of recordings")
    add("--num_speakers", type=int, help="give the number of talkers")
    add("--window", type=int, default=long_recordings.WINDOW_SECONDS, help="seconds of a window")
    args = parser.parse_args(argv)
    if not (args.window >= 1 and 1 <= args.seconds < math.inf):
        print("error: --window and --seconds must be 1 or more", file=sys.stderr)
        return 2
    if not any(args.recordings.glob("[0-9]_*_*.wav")):
        print(f"error: no recordings named like 7_theo_3.wav in {args.recordings}", file=sys.stderr)
        return 2
    long_recordings.WINDOW_SECONDS = args.window
    print("| recording | windows | right numbers | talkers |\n|---|---|---|---|")
    try:
        for seed in range(args.seeds):
            row = measure(args.recordings, args.checkpoint, args.seconds, seed, args.num_speakers)
            print(f"| {seed} | {row['windows']} | {row['kept']:.0%} | {row['talkers']} |",
                  flush=True)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
