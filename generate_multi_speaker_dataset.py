"""Make multi_speaker_data/: mixtures of talkers as encoder features, with each talker alone.

    python generate_multi_speaker_dataset.py --train_samples=100 --val_samples=30
    python generate_multi_speaker_dataset.py --speech_dir LibriSpeech/dev-clean \
        --encoder openai/whisper-large-v3 --train_samples=1000

Simulated (the default; nothing is downloaded). A voice is a set of feature bands and a rate of
modulation, drawn once for all datasets, so that a separator trained on one knows the voices of the
next. An utterance is its voice's bands, swelling and fading in phrases with gaps between, each
feature modulated by a sine of its own phase; the mixture is the sum. No utterance occurs twice.

What makes it solvable: features are energies, so at each frame the bands tell which voices speak;
bands of two voices overlap only in part, and a mask takes them apart. An oracle that knows the
voices of a mixture and fits their bands to each frame by least squares is far below every trivial
output. What keeps those from it: sources have unit power (zeros score 1) and are equally loud (the
mixture scores the power of the others, more than 1), and the mixture divided by the count only
splits the difference. The test suite measures all four.

Speech (``--speech_dir``). Random utterances of different speakers are mixed as waveforms and
encoded by a frozen Whisper or Qwen2-Audio tower; targets are the encoded single talkers, aligned.
The plan of all mixtures is drawn first from the seed; rendering it draws nothing more, so that any
number of ``--workers`` writes the same bytes. No word is cut: the longest talker ends the mixture,
and who would outlast the encoder's window says fewer utterances, or shorter ones.

Overlap ratio: the share of the time from the first talker's start to the last talker's end in which
two or more talkers are speaking, each from the start of its first utterance to the end of its last,
pauses between them included. One talker alone has 0; so do talkers who take turns.

With ``--reverb`` the targets are the reverberated talkers, not the dry ones: the mixture stays the
sum of the targets, and a separator is asked to tell talkers apart, not to dereverberate for a model
that reads reverberant speech anyway. The direct sound keeps its planned onset.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from functools import cache, lru_cache
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

NUM_VOICES = 12
NUM_BANDS = 32
BANDS_PER_VOICE = 6
VOICE_SEED = 1280  # one inventory for all datasets; --seed draws utterances and mixtures
MODULATION = 0.6
SPEECH_RMS = 0.05  # level of a talker before level differences, full scale 1
AUDIO_SUFFIXES = {".wav", ".flac", ".ogg", ".mp3"}
CACHED_SECONDS = 4.0  # longer recordings are decoded every time: 4096 of these take 1 GB
OVERLAP_STEPS = 1000  # placements tried between turn-taking and the most overlap
OVERLAP_TOLERANCE = 0.01
OVERLAP_DRAWS = 30  # of what talkers say, until a ratio that they are asked for is in reach
ROOM_METRES = ((4.0, 3.5, 2.5), (7.0, 6.0, 3.2))  # smallest and largest; all can have these RT60
ROOM_RT60 = (0.15, 0.4)  # seconds
WALL_DISTANCE, TABLE_HEIGHT, MOUTH_HEIGHT = 0.5, 0.8, (1.2, 1.8)  # metres; no mouth at the mic
MAX_REFLECTIONS = 30  # per path: the first 20 dB decay as planned; all would take 0.5 s a room


class MixingOptions(NamedTuple):
    """How mixtures of recordings are drawn; the flags of the same names explain themselves."""

    min_speakers: int = 2
    max_speakers: int = 3
    join: tuple[int, int] = (1, 1)
    max_gap: float = 0.15
    max_onset: float = 0.4
    level_difference: float = 3.0
    overlap: tuple[float, float] | None = None
    speed: tuple[float, float] = (1.0, 1.0)
    noise_dir: str | None = None
    snr_db: tuple[float, float] = (10.0, 20.0)
    reverb: bool = False
    max_seconds: float | None = None  # window of the encoder; None: any length


# --------------------------------------------------------------------------------------------------
# Command line: stands before numpy and torch are imported, so that --help answers at once


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the example as written and shows every default that is a value."""

    def _get_help_string(self, action):
        default = action.default
        if default in (None, False, argparse.SUPPRESS):
            return action.help
        words = default if isinstance(default, tuple) else (default,)
        return f"{action.help} (default: {' '.join(map(str, words))})"


class _Parser(argparse.ArgumentParser):
    """Complains in one line."""

    def error(self, message):
        self.exit(2, f"error: {message} (see {self.prog} --help)\n")


def build_parser() -> argparse.ArgumentParser:
    """Return the parser; its defaults make the dataset of the README."""
    parser = _Parser(
        description="Make mixtures of talkers with each talker alone, as encoder features.",
        epilog="example:\n  python generate_multi_speaker_dataset.py --train_samples=100",
        formatter_class=_HelpFormatter)
    add, mixing = parser.add_argument, MixingOptions()
    add("--train_samples", type=int, default=30, help="training mixtures")
    add("--val_samples", type=int, default=10, help="validation mixtures")
    add("--max_speakers", type=int, default=mixing.max_speakers, help="most talkers in a mixture")
    add("--min_speakers", type=int, default=mixing.min_speakers, help="fewest talkers in a mixture")
    add("--seed", type=int, default=42, help="draws utterances and mixtures")
    add("--output_dir", default="multi_speaker_data", help="where train/ and val/ go")
    simulated = parser.add_argument_group("simulated talkers").add_argument
    simulated("--seq_len", type=int, default=100, help="frames per mixture")
    simulated("--feature_dim", type=int, default=1280, help="feature width")
    speech = parser.add_argument_group("recorded talkers").add_argument
    speech("--speech_dir", help="a folder per speaker, or a JSON-lines manifest; takes recordings")
    speech("--encoder", help="Whisper or Qwen2-Audio, a local folder or hub id")
    speech("--layer", type=int, help="encoder block whose features to take; none: its output")
    speech("--split_by", choices=("speaker", "utterance"), default="speaker",
           help="what train and val do not share, unless the manifest gives the split")
    speech("--workers", type=int, default=0, help="processes that render; 0, the default: this one")
    speech("--device", default="auto", help="where the encoder runs: auto, cpu, cuda or mps")
    draw = parser.add_argument_group("mixing recorded talkers").add_argument
    range_of = {"nargs": 2, "metavar": ("MIN", "MAX")}
    draw("--join", type=int, default=mixing.join, **range_of,
         help="recordings said in a row by each talker")
    draw("--max_gap", type=float, default=mixing.max_gap,
         help="longest pause between them in seconds")
    draw("--max_onset", type=float, default=mixing.max_onset,
         help="latest start of a talker in seconds; of the first talker with --overlap")
    draw("--overlap", type=float, default=mixing.overlap, **range_of,
         help="share of the speech in which two or more talk, 0 to 1; none: onsets decide")
    draw("--level_difference", type=float, default=mixing.level_difference,
         help="most dB between two talkers")
    draw("--speed", type=float, default=mixing.speed, **range_of,
         help="all that a talker says is played this much faster")
    draw("--noise_dir", help="recordings of noise to add to the mixture alone")
    draw("--snr_db", type=float, default=mixing.snr_db, **range_of,
         help="dB from that noise up to all talkers together")
    draw("--reverb", action="store_true", help="put each mixture into a room of its own")
    return parser


if __name__ == "__main__":
    build_parser().parse_args()

import numpy as np  # noqa: E402

from speaker_separator_module import (  # noqa: E402
    AudioEncoder,
    InputError,
    check_layer,
    encode_waveforms,
    first_line,
    load_audio_encoder,
    pick_device,
    read_audio,
)

# --------------------------------------------------------------------------------------------------
# Simulated talkers


class Voice(NamedTuple):
    """A simulated voice: its spectral envelope [D] and modulation rate in cycles per frame."""

    speaker_id: str
    envelope: np.ndarray
    rate: float


def make_voices(feature_dim: int) -> list[Voice]:
    """Draw the inventory of voices; the same for every seed."""
    rng = np.random.default_rng(VOICE_SEED)
    band_of = np.arange(feature_dim) * NUM_BANDS // feature_dim
    voices = []
    for number in range(NUM_VOICES):
        bands = rng.choice(NUM_BANDS, BANDS_PER_VOICE, replace=False)
        envelope = np.isin(band_of, bands).astype(np.float64)
        voices.append(Voice(f"voice_{number:02d}", envelope, rng.uniform(0.02, 0.2)))
    return voices


def phrase_envelope(seq_len: int, rng: np.random.Generator) -> np.ndarray:
    """Draw phrases that swell and fade, with silence before and between them: [T] in [0, 1]."""
    loudness, start = np.zeros(seq_len), int(rng.integers(0, 15))
    while start < seq_len or not loudness.any():
        length = int(rng.integers(15, 40))
        frames = np.arange(start % seq_len, min(start % seq_len + length, seq_len))
        loudness[frames] = np.sqrt(np.sin(np.pi * (frames - frames[0] + 0.5) / length))
        start += length + int(rng.integers(0, 12))
    return loudness


def simulate_utterance(voice: Voice, seq_len: int, rng: np.random.Generator) -> np.ndarray:
    """Draw a fresh utterance of a voice: [T, D] float32 of unit power."""
    phases = rng.uniform(0, 2 * np.pi, size=len(voice.envelope))
    cycles = voice.rate * rng.uniform(0.9, 1.1) * np.arange(seq_len)[:, None]
    energy = voice.envelope * (1 + MODULATION * np.sin(2 * np.pi * cycles + phases))
    features = energy * phrase_envelope(seq_len, rng)[:, None]
    return (features / np.sqrt(np.mean(features**2))).astype(np.float32)


def simulate_mixture(args, split: str, index: int, voices: list[Voice]) -> list[dict]:
    """Draw mixture ``index`` of a split: speaker_id, text and features [T, D] of each talker."""
    rng = np.random.default_rng([args.seed, split == "val", index])
    count = int(rng.integers(args.min_speakers, args.max_speakers + 1))
    chosen = rng.choice(len(voices), size=count, replace=False)
    return [
        {"speaker_id": voices[v].speaker_id, "text": f"simulated utterance {split} {index}.{i}",
         "features": simulate_utterance(voices[v], args.seq_len, rng)}
        for i, v in enumerate(chosen)
    ]


# --------------------------------------------------------------------------------------------------
# Recorded talkers


class Utterance(NamedTuple):
    """A recording of one speaker; ``split`` is "train", "val" or "" (either)."""

    audio: Path
    speaker: str
    text: str
    split: str = ""


def read_speech(path: Path) -> list[Utterance]:
    """List the utterances of a folder per speaker, or of a JSON-lines manifest.

    A manifest's lines have ``audio`` (relative to the manifest), ``speaker``, ``text`` and, if the
    split is given, ``split``. In a folder, transcripts are read from ``NAME.txt`` beside a
    recording or from LibriSpeech's ``*.trans.txt``.
    """
    manifest = path / "manifest.jsonl" if path.is_dir() else path
    if manifest.is_file():
        utterances = _read_manifest(manifest)
    elif path.is_dir():
        utterances = _read_speaker_folders(path)
    else:
        raise FileNotFoundError(f"no speech at {path}")
    if not utterances:
        raise InputError(f"{path} holds no manifest.jsonl and no recordings in folders per speaker")
    return utterances


def _read_manifest(manifest: Path) -> list[Utterance]:
    utterances = []
    try:
        lines = manifest.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        raise InputError(f"{manifest} is no manifest of JSON lines, nor a folder") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            audio, speaker = manifest.parent / row["audio"], str(row["speaker"])
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise InputError(
                f"{manifest}, line {number}: needs audio and speaker ({error})"
            ) from None
        if not audio.is_file():
            raise FileNotFoundError(f"{manifest}, line {number}: no such audio file: {audio}")
        text, split = (str(row.get(key) or "") for key in ("text", "split"))
        utterances.append(Utterance(audio, speaker, text, split))
    return utterances


def _read_speaker_folders(path: Path) -> list[Utterance]:
    utterances, transcripts = [], {}
    for listing in sorted(path.rglob("*.trans.txt")):
        for line in listing.read_text(encoding="utf-8").splitlines():
            name, _, text = line.partition(" ")
            transcripts[listing.parent / name] = text
    for audio in sorted(p for p in path.rglob("*") if p.suffix.lower() in AUDIO_SUFFIXES):
        speaker, beside = audio.relative_to(path).parts[0], audio.with_suffix(".txt")
        if audio.parent == path:
            continue  # not in a speaker's folder
        text = transcripts.get(audio.with_suffix(""), "")
        if not text and beside.is_file():
            text = beside.read_text(encoding="utf-8").strip()
        utterances.append(Utterance(audio, speaker, text))
    return utterances


def group_by_speaker(utterances: Iterable[Utterance]) -> dict[str, list[Utterance]]:
    """Sort utterances by who says them."""
    groups: dict[str, list[Utterance]] = {}
    for utterance in utterances:
        groups.setdefault(utterance.speaker, []).append(utterance)
    return groups


def split_speech(utterances: list[Utterance], split_by: str, seed: int) -> dict[str, list]:
    """Divide utterances into train and val: as the manifest says, else a fifth is held out.

    ``split_by`` "speaker" holds out a fifth of the speakers with all they say, "utterance" a fifth
    of what each speaker says, of two utterances one.
    """
    if any(u.split for u in utterances):
        return {s: [u for u in utterances if u.split in (s, "")] for s in ("train", "val")}
    rng, groups = np.random.default_rng(seed), group_by_speaker(utterances)
    if split_by == "speaker":
        speakers = sorted(groups)
        rng.shuffle(speakers)
        held_out = {u for s in speakers[: max(1, len(speakers) // 5)] for u in groups[s]}
    else:
        held_out = set()
        for _, group in sorted(groups.items()):
            share = max(len(group) // 5, len(group) > 1)
            held_out |= {group[i] for i in rng.permutation(len(group))[:share]}
    return {
        "train": [u for u in utterances if u not in held_out],
        "val": [u for u in utterances if u in held_out],
    }


def list_noises(noise_dir: str | None) -> list[str]:
    """Return the recordings in a folder of noise and below it; none without a folder."""
    if noise_dir is None:
        return []
    if not Path(noise_dir).is_dir():
        raise FileNotFoundError(f"no noise folder at {noise_dir}")
    noises = sorted(p for p in Path(noise_dir).rglob("*") if p.suffix.lower() in AUDIO_SUFFIXES)
    if not noises:
        raise InputError(f"{noise_dir} holds no recordings of noise (.wav, .flac, .ogg, .mp3)")
    return [str(path) for path in noises]


# --------------------------------------------------------------------------------------------------
# Planning: draws everything, decodes nothing


class PlannedTalker(NamedTuple):
    """What one talker says: utterances in a row, where each starts, how fast and how loud."""

    utterances: tuple[Utterance, ...]
    speeds: tuple[float, ...]
    starts: tuple[float, ...]  # seconds after the onset
    seconds: float  # from the onset to the end of the last utterance
    onset: float  # seconds
    gain_db: float
    position: tuple[float, ...] | None = None  # metres from a corner of the room

    @property
    def text(self) -> str:
        """Everything said, in order."""
        return " ".join(u.text for u in self.utterances if u.text)


class PlannedNoise(NamedTuple):
    """A recording of noise, the second it is taken from and dB from it up to the talkers."""

    audio: str
    start: float
    snr_db: float


class PlannedRoom(NamedTuple):
    """A shoebox room: its sides in metres, reverberation time in seconds, microphone in metres."""

    sides: tuple[float, ...]
    rt60: float
    microphone: tuple[float, ...]


class PlannedMixture(NamedTuple):
    """A mixture before it is rendered: plain numbers and paths. Without talkers it is silence."""

    talkers: tuple[PlannedTalker, ...]
    seconds: float
    overlap: float
    overlap_target: float | None = None
    noise: PlannedNoise | None = None
    room: PlannedRoom | None = None


@cache
def recording_seconds(path) -> float:
    """Length of a recording from its header."""
    import soundfile

    if not Path(path).is_file():
        raise FileNotFoundError(f"no such audio file: {path}")
    try:
        info = soundfile.info(str(path))
    except soundfile.LibsndfileError as error:
        raise InputError(f"cannot read audio from {path}: {error.error_string}") from None
    if not info.frames:
        raise InputError(f"{path} has no samples")
    return info.frames / info.samplerate


def plan_mixture(
    rng: np.random.Generator, options: MixingOptions, by_speaker: dict[str, list[Utterance]],
    noises: list[str], count: int | None = None,
) -> PlannedMixture:
    """Draw one mixture of ``count`` different speakers, or of a count that is drawn too.

    With ``count=0`` it has noise alone or digital silence, as long as one talker would be. Raises
    FileNotFoundError or ValueError if a recording is missing, unreadable or empty, or there are
    fewer speakers than talkers.
    """
    if count is None:
        count = int(rng.integers(options.min_speakers, options.max_speakers + 1))
    if max(count, 1) > len(by_speaker):
        raise InputError(f"{count} talkers were asked for and there are {len(by_speaker)} speakers")
    names = sorted(by_speaker)
    chosen = rng.choice(len(names), size=max(count, 1), replace=False)
    talkers = [_plan_talker(rng, options, by_speaker[names[i]]) for i in chosen]
    target = None
    if options.overlap is not None and count > 1:
        target = float(rng.uniform(*options.overlap))
        talkers, miss = _plan_overlap(rng, options, talkers, target)
        for _ in range(OVERLAP_DRAWS):  # where lengths do not fit they say something else
            if miss <= OVERLAP_TOLERANCE:
                break
            others = [_plan_talker(rng, options, by_speaker[names[i]]) for i in chosen]
            others, other_miss = _plan_overlap(rng, options, others, target)
            if other_miss < miss:
                talkers, miss = others, other_miss
    window = _window(options)
    talkers = [t._replace(onset=max(0.0, min(t.onset, window - t.seconds))) for t in talkers]
    spans = np.array([(t.onset, min(t.onset + t.seconds, window)) for t in talkers]).T
    plan = PlannedMixture(
        tuple(talkers[:count]), float(spans[1].max()), float(overlap_ratio(*spans)), target)
    noise = _plan_noise(rng, options, noises, plan.seconds) if noises else None
    plan = plan._replace(noise=noise)
    return _plan_room(rng, plan) if options.reverb else plan


def _window(options: MixingOptions) -> float:
    """Seconds that a mixture may last, less what rounding to samples can add."""
    return float("inf") if options.max_seconds is None else options.max_seconds - 0.001


def _plan_talker(rng, options: MixingOptions, pool: list[Utterance]) -> PlannedTalker:
    longest = _window(options) * options.speed[0]
    pool = [u for u in pool if recording_seconds(u.audio) <= longest] or pool
    words = int(rng.integers(options.join[0], options.join[1] + 1))
    picks = [pool[int(i)] for i in rng.integers(len(pool), size=words)]
    onset, *gaps = rng.uniform(0, [options.max_onset, *[options.max_gap] * (words - 1)]).tolist()
    half = options.level_difference / 2
    gain_db, speeds = float(rng.uniform(-half, half)), [1.0] * words
    if options.speed != (1.0, 1.0):
        speeds = [float(rng.uniform(*options.speed))] * words  # one voice, one pitch
    starts, end = [], 0.0
    for utterance, speed, gap in zip(picks, speeds, [0.0, *gaps], strict=True):
        starts.append(end + gap)
        end = starts[-1] + recording_seconds(utterance.audio) / speed
    talker = PlannedTalker(tuple(picks), tuple(speeds), tuple(starts), end, onset, gain_db)
    while talker.seconds > _window(options) and len(talker.utterances) > 1:
        talker = _without_last(talker)
    return talker


def _without_last(talker: PlannedTalker) -> PlannedTalker:
    utterances, speeds, starts = (x[:-1] for x in talker[:3])
    seconds = starts[-1] + recording_seconds(utterances[-1].audio) / speeds[-1]
    return talker._replace(utterances=utterances, speeds=speeds, starts=starts, seconds=seconds)


def overlap_ratio(starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Share of the time from the first start to the last end in which two or more talk.

    ``starts`` and ``ends`` are seconds ``[..., talkers]``; returns ``[...]``.
    """
    times = np.concatenate([starts, ends], axis=-1)
    order = np.argsort(times, axis=-1)
    talking = np.cumsum(np.where(order < starts.shape[-1], 1, -1), axis=-1)[..., :-1]
    lengths = np.diff(np.take_along_axis(times, order, axis=-1), axis=-1)
    return np.sum(lengths * (talking > 1), axis=-1) / np.sum(lengths, axis=-1)


def _plan_overlap(rng, options, talkers: list[PlannedTalker], target: float) -> tuple[list, float]:
    """Set onsets for a target ratio; returns the talkers and how far off they are.

    The first talker keeps the earliest onset drawn. Lengths too different, or a window too short,
    put some ratios out of reach. Then the longest talkers say less, though never fewer utterances
    than ``join`` asks for, where that helps.
    """
    lead, window = min(t.onset for t in talkers), _window(options)
    onsets, miss = _place(rng, talkers, target, window)
    best, shorter = (miss, talkers, onsets), talkers
    while best[0] > OVERLAP_TOLERANCE:
        can_shorten = [t for t in shorter if len(t.utterances) > options.join[0]]
        if not can_shorten:
            break
        longest = max(can_shorten, key=lambda talker: talker.seconds)
        shorter = [_without_last(t) if t is longest else t for t in shorter]
        onsets, miss = _place(rng, shorter, target, window)
        best = min(best, (miss, shorter, onsets), key=lambda found: found[0])
    miss, talkers, onsets = best
    end = max(onset + t.seconds for onset, t in zip(onsets, talkers, strict=True))
    lead = max(0.0, min(lead, window - end))
    return [t._replace(onset=lead + o) for t, o in zip(talkers, onsets, strict=True)], miss


def _place(rng, talkers: list, target: float, window: float) -> tuple[list[float], float]:
    """Onsets in seconds whose overlap ratio is nearest to the target, and how far off it is.

    Between taking turns (ratio 0) and the others in a row beside the longest, who never stops (no
    placement overlaps more), onsets move in a straight line and the ratio changes steadily.
    """
    seconds, count = np.array([t.seconds for t in talkers]), len(talkers)
    order, longest = rng.permutation(count), int(np.argmax(seconds))
    turns, beside = np.zeros(count), np.zeros(count)
    turns[order[1:]] = np.cumsum(seconds[order])[:-1]
    others = [i for i in order if i != longest]
    time = rng.uniform(0, max(0.0, seconds[longest] - seconds[others].sum()))
    for i in others:
        beside[i] = min(time, seconds[longest] - seconds[i])
        time += seconds[i]
    share = np.linspace(0, 1, OVERLAP_STEPS + 1)[:, None]
    onsets = (1 - share) * turns + share * beside  # [steps, talkers]
    onsets -= onsets.min(axis=1, keepdims=True)
    ends = onsets + seconds
    miss = np.abs(overlap_ratio(onsets, ends) - target)
    miss[ends.max(axis=1) > max(window, seconds[longest])] = np.inf
    best = int(np.argmin(miss))
    return onsets[best].tolist(), float(miss[best])


def _plan_noise(rng, options: MixingOptions, noises: list[str], seconds: float) -> PlannedNoise:
    audio = noises[int(rng.integers(len(noises)))]
    start = rng.uniform(0, max(0.0, recording_seconds(audio) - seconds))
    return PlannedNoise(audio, float(start), float(rng.uniform(*options.snr_db)))


def _plan_room(rng, plan: PlannedMixture) -> PlannedMixture:
    """Draw a room, a microphone on a table and a place for every talker."""
    sides, rt60 = rng.uniform(*ROOM_METRES), float(rng.uniform(*ROOM_RT60))
    lowest = np.full(2, WALL_DISTANCE)
    floor = rng.uniform(lowest, sides[:2] - lowest, size=(1 + len(plan.talkers), 2)).tolist()
    heights = rng.uniform(*MOUTH_HEIGHT, size=len(plan.talkers)).tolist()
    talkers = tuple(
        talker._replace(position=(*place, height))
        for talker, place, height in zip(plan.talkers, floor[1:], heights, strict=True)
    )
    room = PlannedRoom(tuple(sides.tolist()), rt60, (*floor[0], TABLE_HEIGHT))
    return plan._replace(talkers=talkers, room=room)


def plan_speech(
    options: MixingOptions, seed: int, split: str, utterances: list[Utterance], samples: int,
    noises: list[str],
) -> list[PlannedMixture]:
    """Draw all mixtures of a split."""
    from tqdm import tqdm

    rng, by_speaker = np.random.default_rng([seed, split == "val"]), group_by_speaker(utterances)
    steps = tqdm(range(samples), desc=f"plan {split}", leave=False, disable=None)
    return [plan_mixture(rng, options, by_speaker, noises) for _ in steps]


# --------------------------------------------------------------------------------------------------
# Rendering: draws nothing


@lru_cache(maxsize=4096)
def _cached_audio(path, sampling_rate: int) -> np.ndarray:
    samples = read_audio(path, sampling_rate)
    samples.flags.writeable = False
    return samples


def _utterance_audio(path, sampling_rate: int, speed: float) -> np.ndarray:
    import soxr

    reader = _cached_audio if recording_seconds(path) <= CACHED_SECONDS else read_audio
    samples = reader(path, sampling_rate)
    return samples if speed == 1 else soxr.resample(samples, sampling_rate * speed, sampling_rate)


def room_responses(plan: PlannedMixture, sampling_rate: int) -> list[tuple[np.ndarray, int]]:
    """Impulse response from every talker to the microphone, and the sample of its direct sound.

    By the image source method (Allen and Berkley 1979), which is deterministic; one thread, since
    the order of summation would show in the last bits. It ends RT60 after the direct sound.
    """
    import pyroomacoustics

    pyroomacoustics.constants.set("num_threads", 1)
    absorption, order = pyroomacoustics.inverse_sabine(plan.room.rt60, plan.room.sides)
    room = pyroomacoustics.ShoeBox(
        plan.room.sides, fs=sampling_rate, materials=pyroomacoustics.Material(absorption),
        max_order=min(order, MAX_REFLECTIONS))
    room.add_microphone(plan.room.microphone)
    for talker in plan.talkers:
        room.add_source(talker.position)
    room.compute_rir()
    responses, lead = [], pyroomacoustics.constants.get("frac_delay_length") // 2
    for talker, response in zip(plan.talkers, room.rir[0], strict=True):
        metres = np.linalg.norm(np.subtract(talker.position, plan.room.microphone))
        start = round(metres / room.c * sampling_rate)  # earlier, its high-pass filter rings
        end = start + lead + round(plan.room.rt60 * sampling_rate)
        responses.append((response[start:end].astype(np.float32), lead))
    return responses


def render_talker(talker: PlannedTalker, sampling_rate: int, response=None) -> np.ndarray:
    """Build the waveform [samples] of one planned talker from the start of the mixture.

    While speaking it has SPEECH_RMS plus the gain; ``response`` is one of ``room_responses``.
    """
    pieces = [
        (round((talker.onset + start) * sampling_rate),
         _utterance_audio(utterance.audio, sampling_rate, speed))
        for utterance, speed, start in zip(*talker[:3], strict=True)
    ]
    length = max(begin + len(samples) for begin, samples in pieces)
    waveform, speaking = np.zeros(length, np.float32), np.zeros(length, bool)
    for begin, samples in pieces:
        waveform[begin : begin + len(samples)] += samples
        speaking[begin : begin + len(samples)] = True
    if response is not None:
        from scipy.signal import fftconvolve

        waveform = fftconvolve(waveform, response[0])[response[1] :]
    rms = float(np.sqrt(np.mean(waveform[:length][speaking] ** 2)))
    return waveform * np.float32(SPEECH_RMS / max(rms, 1e-5) * 10 ** (talker.gain_db / 20))


def render_noise(noise: PlannedNoise, sampling_rate: int, talkers: np.ndarray) -> np.ndarray:
    """Read as much noise as there are samples of ``talkers``, at the planned ratio of their powers.

    Short recordings are looped. Where nobody talks, the level is as if one talker did.
    """
    import soundfile

    with soundfile.SoundFile(noise.audio) as recording:
        rate = recording.samplerate
        needed = -(-len(talkers) * rate // sampling_rate) + 1
        recording.seek(int(noise.start * rate))
        part = recording.read(needed, dtype="float32", always_2d=True).mean(axis=1)
    if not np.isfinite(part).all():
        raise InputError(f"{noise.audio} holds NaN or infinite samples")
    samples = read_audio(np.resize(part, needed), sampling_rate, rate)[: len(talkers)]
    level = float(np.sqrt(np.mean(talkers**2))) or SPEECH_RMS
    rms = float(np.sqrt(np.mean(samples**2)))
    return samples * np.float32(level / max(rms, 1e-5) * 10 ** (-noise.snr_db / 20))


def render_mixture(
    plan: PlannedMixture, sampling_rate: int, max_samples: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Render a planned mixture: its talkers alone [n, samples] and their sum with noise [samples].

    Talkers are padded to the longest. ``max_samples`` cuts the tail of reverberation, and an
    utterance that is longer by itself, no other word. Short recordings stay in memory, decoded.
    Raises FileNotFoundError or ValueError if one is missing or unreadable or has a NaN in it.
    """
    responses = room_responses(plan, sampling_rate) if plan.room and plan.talkers else []
    responses = responses or [None] * len(plan.talkers)
    waveforms = [
        render_talker(talker, sampling_rate, response)
        for talker, response in zip(plan.talkers, responses, strict=True)
    ]
    lengths = [len(w) for w in waveforms] or [max(1, round(plan.seconds * sampling_rate))]
    length = min(max(lengths), max_samples or max(lengths))
    sources = np.zeros((len(waveforms), length), np.float32)
    for source, waveform in zip(sources, waveforms, strict=True):
        source[: len(waveform)] = waveform[:length]
    mixture = sources.sum(axis=0)
    if plan.noise:
        mixture += render_noise(plan.noise, sampling_rate, mixture)
    peak = max(np.abs(sources).max(initial=1.0), np.abs(mixture).max())
    return sources / peak, mixture / peak  # a .wav holds no more than full scale


def render_mixtures(
    plans: list[PlannedMixture], sampling_rate: int, max_samples: int, workers: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield what ``render_mixture`` returns for every plan, in order, from so many processes."""
    if not workers:
        yield from (render_mixture(plan, sampling_rate, max_samples) for plan in plans)
        return
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor
    from concurrent.futures.process import BrokenProcessPool

    # spawned: neither torch's threads nor a CUDA context survive a fork
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"))
    waiting = deque()
    try:
        for plan in plans:
            waiting.append(pool.submit(render_mixture, plan, sampling_rate, max_samples))
            if len(waiting) > 4 * workers:  # so much is in memory, however slow the encoder is
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        raise InputError("a rendering process died, out of memory? Use fewer --workers") from None
    finally:
        pool.shutdown(cancel_futures=True)


def encode_mixtures(
    plans: list[PlannedMixture], rendered: Iterator, encoder: AudioEncoder, layer: int | None
) -> Iterator[dict]:
    """Encode rendered mixtures with their talkers; yields arguments of ``write_mixture``."""
    for plan in plans:
        sources, mixture = next(rendered)
        waveforms = [mixture, *sources]
        mixed, *features = (f.cpu().numpy() for f in encode_waveforms(encoder, waveforms, layer))
        speakers = [
            {"speaker_id": t.utterances[0].speaker, "text": t.text, "features": f}
            for t, f in zip(plan.talkers, features, strict=True)
        ]
        about = {"overlap": plan.overlap, "overlap_target": plan.overlap_target,
                 "snr_db": plan.noise and plan.noise.snr_db, "rt60": plan.room and plan.room.rt60}
        yield {"speakers": speakers, "mixed": mixed, "waveforms": waveforms,
               "sampling_rate": encoder.sampling_rate,
               **{k: round(v, 4) for k, v in about.items() if v is not None}}


# --------------------------------------------------------------------------------------------------
# Writing


def write_mixture(
    folder: Path, name: str, speakers: list[dict], mixed, waveforms=None, sampling_rate=None, **more
) -> dict:
    """Save the features, and waveforms if any, of a mixture and its talkers; returns its entry."""
    np.save(folder / f"mixed/{name}.npy", mixed)
    entries = []
    for i, speaker in enumerate(speakers):
        entry = {k: v for k, v in speaker.items() if k != "features"}
        entry["feature_file"] = f"separated/{name}_speaker_{i}.npy"
        np.save(folder / entry["feature_file"], speaker["features"])
        entries.append(entry)
    turns = [{"speaker_id": entry["speaker_id"], "text": entry["text"]} for entry in entries]
    if waveforms:
        more["mixed_wav"] = f"mixed/{name}.wav"
        wavs = [f"separated/{name}_speaker_{i}.wav" for i in range(len(entries))]
        _write_wavs(folder, [more["mixed_wav"], *wavs], waveforms, sampling_rate)
        entries = [{**entry, "wav_file": wav} for entry, wav in zip(entries, wavs, strict=True)]
    return {
        "id": name, "mixed_audio": f"mixed/{name}.npy", "num_speakers": len(entries),
        "speakers": entries, "conversation": turns, "seq_len": int(mixed.shape[0]),
        "feature_dim": int(mixed.shape[1]), **more,
    }


def _write_wavs(folder: Path, names: list[str], waveforms: list, sampling_rate: int) -> None:
    import soundfile

    for name, waveform in zip(names, waveforms, strict=True):
        soundfile.write(folder / name, waveform, sampling_rate, subtype="PCM_24")


def write_split(folder: Path, split: str, samples: int, mixtures: Iterator[dict]) -> list[dict]:
    """Write so many mixtures into ``folder`` as they come, and their metadata.json."""
    from tqdm import tqdm

    (folder / "mixed").mkdir(parents=True)
    (folder / "separated").mkdir()
    entries = []
    for index in tqdm(range(samples), desc=split, unit="mixture", leave=False, disable=None):
        entries.append(write_mixture(folder, f"{split}_{index:05d}", **next(mixtures)))
    _write_json(folder / "metadata.json", entries)
    return entries


def _write_json(path: Path, content) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def load_mixing(data_dir, split: str) -> tuple[MixingOptions, dict[str, list[Utterance]], list]:
    """Return the options, utterances and noises with which ``plan_mixture`` draws more of a split.

    Raises FileNotFoundError or ValueError if the dataset was not made from recordings, its files
    are damaged, or a recording is gone.
    """
    listing = Path(data_dir) / split / "utterances.json"
    if not listing.is_file():
        raise FileNotFoundError(f"no {listing}: {data_dir} was not made with --speech_dir")
    try:
        about = json.loads((Path(data_dir) / "dataset.json").read_text(encoding="utf-8"))
        rows = json.loads(listing.read_text(encoding="utf-8"))
        mixing = {k: tuple(v) if isinstance(v, list) else v for k, v in about["mixing"].items()}
        options = MixingOptions(**mixing)
        utterances = [Utterance(Path(row["audio"]), row["speaker"], row["text"]) for row in rows]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"dataset.json or {listing} is damaged ({error})") from None
    gone = next((u.audio for u in utterances if not u.audio.is_file()), None)
    if gone is not None:
        raise FileNotFoundError(f"{data_dir} was made from {gone}, which is gone")
    return options, group_by_speaker(utterances), list_noises(options.noise_dir)


def print_statistics(split: str, entries: list[dict]) -> None:
    """Print how many mixtures and talkers a split has and how the counts are distributed."""
    counts = [entry["num_speakers"] for entry in entries]
    if not counts:
        print(f"{split}: no mixtures")
        return
    talkers = len({s["speaker_id"] for entry in entries for s in entry["speakers"]})
    spread = ", ".join(f"{n} talkers: {c}" for n, c in sorted(Counter(counts).items()))
    overlaps = [e["overlap"] for e in entries if "overlap_target" in e]
    overlap = f", overlap {min(overlaps):.2f} to {max(overlaps):.2f}" if overlaps else ""
    print(f"{split}: {len(counts)} mixtures of {talkers} different talkers, "
          f"{np.mean(counts):.2f} talkers on average ({spread}){overlap}")


def check_replaceable(output_dir: Path) -> None:
    """Fail if the dataset would take the place of something that is none."""
    for split in ("train", "val"):
        old = output_dir / split
        if old.exists() and not (old / "metadata.json").is_file():
            raise InputError(f"{old} exists and is no dataset; choose another --output_dir")


def replace_splits(output_dir: Path, staging: Path) -> None:
    """Put the finished dataset in place of an earlier one; other files in the folder stay."""
    if (output_dir / "train").exists():
        print(f"replacing the earlier dataset in {output_dir}")
    for split in ("train", "val"):
        shutil.rmtree(output_dir / split, ignore_errors=True)
        (staging / split).rename(output_dir / split)
    (staging / "dataset.json").replace(output_dir / "dataset.json")


def simulated_dataset(args) -> tuple[Iterator[dict], dict]:
    """Return the mixtures of train, then of val, and what dataset.json says of them."""
    voices = make_voices(args.feature_dim)

    def mixtures():
        for split, samples in _samples(args).items():
            for index in range(samples):
                speakers = simulate_mixture(args, split, index, voices)
                yield {"speakers": speakers, "mixed": sum(s["features"] for s in speakers)}

    return mixtures(), {"kind": "simulated", "encoder": None, "layer": None, "frame_rate": None}


def speech_dataset(args, splits: dict[str, list[Utterance]]) -> tuple[Iterator[dict], dict]:
    """Plan mixtures of recordings; returns those of train, then of val, and what they are."""
    noise_dir = args.noise_dir and str(Path(args.noise_dir).absolute())
    noises = list_noises(noise_dir)
    encoder = load_audio_encoder(args.encoder, pick_device(args.device))
    check_layer(encoder.tower, args.layer)
    rate, window = encoder.sampling_rate, encoder.max_samples
    options = mixing_options(args)._replace(noise_dir=noise_dir, max_seconds=window / rate)
    plans = []
    for split, samples in _samples(args).items():
        plans += plan_speech(options, args.seed, split, splits[split], samples, noises)
    too_long = {t.utterances for p in plans for t in p.talkers if t.seconds > options.max_seconds}
    if too_long:
        print(f"longer than the encoder's window and cut to {window / rate:.0f} s, their texts "
              f"left whole: {len(too_long)} recordings")
    rendered = render_mixtures(plans, rate, window, args.workers)
    about = {"kind": "speech", "encoder": encoder.name, "layer": args.layer,
             "frame_rate": encoder.frame_rate(args.layer), "mixing": options._asdict()}
    return encode_mixtures(plans, rendered, encoder, args.layer), about


def _samples(args) -> dict[str, int]:
    return {"train": args.train_samples, "val": args.val_samples}


def mixing_options(args) -> MixingOptions:
    """Return the mixing flags as options."""
    flags = {name: getattr(args, name) for name in MixingOptions._fields if hasattr(args, name)}
    return MixingOptions(**{k: tuple(v) if isinstance(v, list) else v for k, v in flags.items()})


def divide_speech(args) -> dict[str, list[Utterance]]:
    """List the utterances of each split; fails where there are too few speakers for a mixture."""
    splits = split_speech(read_speech(Path(args.speech_dir)), args.split_by, args.seed)
    for split, utterances in splits.items():
        speakers = len({u.speaker for u in utterances})
        if speakers < args.max_speakers:
            hint = ", or use --split_by utterance" if args.split_by == "speaker" else ""
            raise InputError(
                f"the {split} split has {speakers} speakers and mixtures of {args.max_speakers} "
                f"were asked for: lower --max_speakers{hint}"
            )
    return splits


def generate_dataset(args, command_line: str) -> None:
    """Make the dataset that the arguments ask for; an earlier one stays until it is whole."""
    output_dir = Path(args.output_dir)
    check_replaceable(output_dir)
    splits = divide_speech(args) if args.speech_dir else {}
    mixtures, about = speech_dataset(args, splits) if splits else simulated_dataset(args)
    about |= {"seed": args.seed, "command_line": command_line}
    staging = output_dir / ".staging"
    try:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        entries = {s: write_split(staging / s, s, n, mixtures) for s, n in _samples(args).items()}
        for split, utterances in splits.items():
            rows = [{"audio": str(Path(u.audio).absolute()), "speaker": u.speaker, "text": u.text}
                    for u in utterances]
            _write_json(staging / split / "utterances.json", rows)
        _write_json(staging / "dataset.json", about)
        replace_splits(output_dir, staging)
    except FileNotFoundError:
        raise
    except OSError as error:
        reason = error.strerror or error
        raise InputError(f"cannot write the dataset to {output_dir}: {reason}") from None
    finally:
        mixtures.close()  # ends rendering processes
        shutil.rmtree(staging, ignore_errors=True)
    for split in entries:
        print_statistics(split, entries[split])
    files = [path for path in output_dir.rglob("*") if path.is_file()]
    print(f"{sum(path.stat().st_size for path in files) / 1e6:.0f} MB in {output_dir}")


# --------------------------------------------------------------------------------------------------
# Main


def check_arguments(args) -> None:
    """Fail with one line if the arguments cannot make a dataset."""
    rules = _rules(args) + _speech_rules(args) + ([] if args.speech_dir else _simulated_rules(args))
    for holds, complaint in rules:
        if not holds:
            raise InputError(complaint)


def _rules(args) -> list[tuple[bool, str]]:
    return [
        (args.train_samples >= 1 and args.val_samples >= 1, "--train_samples and --val_samples "
         "must be 1 or more"),
        (1 <= args.min_speakers <= args.max_speakers, "--min_speakers must be 1 to "
         f"--max_speakers ({args.max_speakers}), not {args.min_speakers}"),
        (args.seed >= 0, f"--seed must be 0 or more, not {args.seed}"),
        (args.workers >= 0, f"--workers must be 0 or more, not {args.workers}"),
    ]


def _simulated_rules(args) -> list[tuple[bool, str]]:
    return [
        (args.max_speakers <= NUM_VOICES, f"--max_speakers can be {NUM_VOICES} at most: there are "
         "no more simulated voices"),
        (args.feature_dim >= NUM_BANDS, f"--feature_dim must be {NUM_BANDS} or more, not "
         f"{args.feature_dim}"),
        (args.seq_len >= 1, f"--seq_len must be 1 or more, not {args.seq_len}"),
        (args.overlap is None and args.noise_dir is None and not args.reverb,
         "--overlap, --noise_dir and --reverb need recordings: give --speech_dir"),
    ]


def _speech_rules(args) -> list[tuple[bool, str]]:
    limits = {"join": (1, 1000), "overlap": (0, 1), "speed": (0.5, 2), "snr_db": (-100, 100)}
    ranges = [(f"--{name} needs two numbers from {low} to {high}, the smaller first",
               [low, *(getattr(args, name) or ()), high]) for name, (low, high) in limits.items()]
    return [
        (bool(args.encoder or not args.speech_dir), "--speech_dir needs --encoder (Whisper or "
         "Qwen2-Audio)"),
        (all(0 <= x < 1000 for x in (args.max_gap, args.max_onset, args.level_difference)),
         "--max_gap, --max_onset and --level_difference must be numbers of 0 or more"),
        *((all(a <= b for a, b in pairwise(values)), words) for words, values in ranges),
        (not args.reverb or find_spec("pyroomacoustics") is not None,
         "--reverb needs pyroomacoustics: pip install -r requirements.txt"),
    ]


def main(argv: list[str] | None = None) -> int:
    """Make a dataset; returns 0, or 2 after one line on standard error for bad input."""
    args = build_parser().parse_args(argv)
    arguments = sys.argv[1:] if argv is None else argv
    try:
        check_arguments(args)
        generate_dataset(args, " ".join(["generate_multi_speaker_dataset.py", *arguments]))
    except (InputError, OSError) as error:
        print(f"error: {first_line(error)}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
