"""Measure whether talkers keep their numbers through a long recording, and its memory.

Builds a recording of two talkers who alternate and overlap out of single spoken digits (the Free
Spoken Digit Dataset), reads it in windows and counts those in which every talker has the number of
the talker that it is, by what each one's own track gives in that window. Without a checkpoint the
streams are the talkers' own features in random order: what is measured then is the matching alone.

    python benchmarks/long_recording.py --recordings $FSDD --encoder $MODEL \
        --checkpoint digits_checkpoints/best_model.pt
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from itertools import permutations
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

RATE = 16000


def talk(folder: Path, speaker: str, seconds: float, rng):
    """Digits of one speaker, recordings 5 to 9, one after the other, at an RMS of 0.05."""
    import numpy as np

    from speaker_separator_module import read_audio

    pieces, length = [], 0
    while length < seconds * RATE:
        file = folder / f"{rng.integers(10)}_{speaker}_{rng.integers(5, 10)}.wav"
        samples = read_audio(file, RATE)
        gap = np.zeros(int(rng.uniform(0.02, 0.15) * RATE), np.float32)
        pieces += [samples * (0.05 / np.sqrt(np.mean(samples**2))), gap]
        length += len(samples) + len(gap)
    return np.concatenate(pieces)[: int(seconds * RATE)]


def two_tracks(folder: Path, seconds: float, seed: int):
    """Return the tracks [2, samples] of two talkers who take turns of 3 to 8 s.

    A turn starts between 2 s before the end of the other's and 1 s after it.
    """
    import numpy as np

    rng = np.random.default_rng(seed)
    speakers = rng.choice(sorted({f.stem.split("_")[1] for f in folder.glob("*.wav")}), 2, False)
    tracks, start, turn = np.zeros((2, int(seconds * RATE)), np.float32), 0.0, 0
    while start < seconds:
        length = min(rng.uniform(3, 8), seconds - start)
        samples = talk(folder, speakers[turn % 2], length, rng)
        first = int(start * RATE)
        room = tracks[turn % 2, first : first + len(samples)]
        room += samples[: len(room)]
        start, turn = start + max(length + rng.uniform(-2, 1), 1), turn + 1
    return tracks, speakers


def oracle_windows(encoder, tracks, layer, num_speakers, seed):
    """Yield windows whose streams are the talkers' own features, in an order drawn anew."""
    import numpy as np
    import torch

    import speaker_separator_module as ssm

    rng, mixture = np.random.default_rng(seed), tracks.sum(0)
    tracker, _, windows = ssm.tracked_windows(mixture, encoder, layer, num_speakers, None)
    for start, samples, sound in windows:
        order = rng.permutation(2)
        alone = tracks[order, start : start + len(samples)]
        features = torch.stack(ssm.encode_waveforms(encoder, list(alone), layer))
        active = torch.from_numpy(np.square(alone).mean(1) > 1e-5)
        talkers = tracker.number(features, active, sound)
        separation = ssm.Separation(features, active.float(), active)
        first = encoder.num_frames(start, layer)
        yield ssm.SeparatedWindow(first, features.sum(0), separation, talkers)


def true_talkers(encoder, tracks, layer, start: int, samples: int, window) -> dict[int, int]:
    """Say which track the stream of each number is: {number: track}, by squared error."""
    import torch

    alone = ssm_encode(encoder, tracks[:, start : start + samples], layer)
    numbers = list(window.talkers)
    cost = torch.stack([(alone - window.separation.streams[s]).square().mean((1, 2))
                        for s in numbers])  # fmt: skip
    if len(numbers) > len(tracks):
        return {window.talkers[s]: int(cost[i].argmin()) for i, s in enumerate(numbers)}
    best = min(permutations(range(len(tracks)), len(numbers)),
               key=lambda order: sum(cost[i, t].item() for i, t in enumerate(order)))  # fmt: skip
    return {window.talkers[s]: best[i] for i, s in enumerate(numbers)}


def ssm_encode(encoder, tracks, layer):
    """Features [tracks, T, D] of every track alone."""
    import torch

    import speaker_separator_module as ssm

    return torch.stack(ssm.encode_waveforms(encoder, list(tracks), layer))


def identity(encoder, tracks, windows, layer) -> dict:
    """Score how well numbers stay with their talkers.

    ``kept`` is the share of windows with any talker in which every number is that of its talker,
    the talker being the one whom the number means most often; ``talkers`` the numbers given.
    """
    import speaker_separator_module as ssm

    size, step = ssm.window_sizes(encoder.feature_extractor)
    seen = []
    for index, window in enumerate(windows):
        if window.talkers:
            start = index * step
            length = min(size, tracks.shape[1] - start)
            seen.append(true_talkers(encoder, tracks, layer, start, length, window))
    means = {}
    for number in {n for row in seen for n in row}:
        meant = [row[number] for row in seen if number in row]
        means[number] = max(set(meant), key=meant.count)
    first = {}  # of several numbers for one talker the commonest is right
    for number in sorted(means, key=lambda n: -sum(n in row for row in seen)):
        first.setdefault(means[number], number)
    right = [all(first.get(track) == number for number, track in row.items()) for row in seen]
    return {"kept": sum(right) / len(right), "windows": len(right), "talkers": len(means)}


def measure(recordings, model, checkpoint=None, layer=None, seconds=95.0, seed=0, known=True):
    """Build a recording, separate it and score it; ``layer`` is only asked without checkpoint."""
    import speaker_separator_module as ssm

    encoder = ssm.load_audio_encoder(str(model))
    tracks, speakers = two_tracks(Path(recordings), seconds, seed)
    count = 2 if known else None
    if checkpoint is None:
        windows = oracle_windows(encoder, tracks, layer, count, seed)
    else:
        separator = ssm.load_separator(checkpoint)
        layer = separator.feature_source.get("layer") if layer is None else layer
        windows = ssm.separate_recording(
            separator, tracks.sum(0), encoder, layer, num_speakers=count)  # fmt: skip
    return {"speakers": list(map(str, speakers)), **identity(encoder, tracks, windows, layer)}


def peak_memory(model: str, seconds: float, checkpoint: str | None, process: bool = True) -> float:
    """Peak memory in MB of a fresh process that transcribes a recording of that length."""
    if process:
        code = [sys.executable, __file__, "--encoder", model, "--memory_of", str(seconds)]
        code += ["--checkpoint", checkpoint] if checkpoint else []
        return json.loads(subprocess.run(code, check=True, stdout=subprocess.PIPE).stdout)
    import numpy as np
    import soundfile
    from transformers import AutoProcessor, Qwen2AudioForConditionalGeneration

    import speaker_separator_module as ssm

    qwen = Qwen2AudioForConditionalGeneration.from_pretrained(model)
    ssm.integrate_speaker_separator(
        qwen, 1, checkpoint, threshold=None if checkpoint else 0.0)  # fmt: skip
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "long.wav"
        with soundfile.SoundFile(path, "w", RATE, 1) as file:
            for _ in range(round(seconds)):
                file.write(0.05 * rng.standard_normal(RATE))
        ssm.answer_per_talker(qwen, AutoProcessor.from_pretrained(model), path, max_new_tokens=16)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> int:
    """Print the share of windows with the right numbers and the peak memory of both lengths."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    add = parser.add_argument
    add("--recordings", help="folder of {digit}_{speaker}_{number}.wav")
    add("--encoder", required=True, help="Qwen2-Audio: a local folder or a hub id")
    add("--checkpoint", help="separator; without it the talkers' own features are the streams")
    add("--layer", type=int, help="encoder block (default: the checkpoint's)")
    add("--seconds", type=float, default=95.0, help="length of the recordings")
    add("--seeds", type=int, default=5, help="recordings, of different talkers")
    add("--memory_of", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory_of:
        print(json.dumps(peak_memory(args.encoder, args.memory_of, args.checkpoint, False)))
        return 0
    for known in (True, False):
        rows = [measure(args.recordings, args.encoder, args.checkpoint, args.layer, args.seconds,
                        seed, known) for seed in range(args.seeds)]  # fmt: skip
        kept = sum(row["kept"] * row["windows"] for row in rows) / sum(r["windows"] for r in rows)
        print(f"count {'known' if known else 'unknown'}: right in {kept:.1%} of windows", rows)
    short, long = (peak_memory(args.encoder, s, args.checkpoint) for s in (30, args.seconds))
    print(f"peak memory {short:.0f} MB for 30 s, {long:.0f} MB for {args.seconds:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
