"""Mixtures of recordings: a seeded random plan first, then deterministic rendering.

Overlap ratio: the share of the time from the first start to the last end in which two or more
talkers are active, each from its first utterance to its last, pauses included. It is 0 for talkers
who take turns. In a room (``reverb``) the targets are the reverberant talkers, so that a mixture is
still the sum of its targets.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from audio import (
    SAMPLING_RATE,
    UNREADABLE_SUFFIXES,
    audio_info,
    change_voices,
    istft,
    read_audio,
    stft,
)

AUDIO_SUFFIXES = {".wav", ".flac", ".ogg", ".opus", ".mp3", ".aif", ".aiff", ".wave", ".aifc",
                  ".au", ".caf", ".oga", ".rf64", ".sph", ".w64"}  # what libsndfile reads
SPEECH_RMS = 0.05  # level of a talker before level differences, full scale 1
CACHED_RECORDINGS, CACHED_SECONDS = 8192, 20.0  # 16-bit recordings kept in memory; their longest
EQUALIZER = np.tile([1.5, 3.0, 4.5, 6.0], 2)  # divides the coefficients: finer detail is weaker
OVERLAP_STEPS = 200  # placements tried between turn-taking and the most overlap
OVERLAP_TOLERANCE, OVERLAP_DRAWS = 0.01, 30  # draws of talkers until the ratio is met
ROOMS, MOUTHS = 200, 7  # rooms per split, and talker positions in each room
ROOM_METRES = ((4.0, 3.5, 2.5), (7.0, 6.0, 3.2))  # smallest, largest; each can have any ROOM_RT60
ROOM_RT60 = (0.15, 0.4)  # seconds
WALL_DISTANCE, TABLE_HEIGHT, MOUTH_HEIGHT = 0.5, 0.8, (1.2, 1.8)  # metres; mouths above the mic
TELEPHONE_RATE = 8000  # samples a second
TELEPHONE_HZ = ((150.0, 350.0), (3200.0, 3900.0))  # where the band begins, and where it ends
MAX_REFLECTIONS = 30  # per path: the first 20 dB of decay; all of them would take 0.5 s a room


class Utterance(NamedTuple):
    """A recording of one speaker; ``split`` is "train", "val" or "" (not given)."""

    audio: Path
    speaker: str
    text: str
    split: str = ""
    corpus: str = ""


class MixingOptions(NamedTuple):
    """How mixtures of recordings are drawn; the generator's ``--help`` explains each."""

    min_speakers: int = 2
    max_speakers: int = 3
    join: tuple[int, int] = (1, 1)
    min_seconds: float = 0.0
    max_gap: float = 0.15
    max_onset: float = 0.4
    level_difference: float = 3.0
    overlap: tuple[float, float] | None = None
    speed: tuple[float, float] = (1.0, 1.0)
    formants: tuple[float, float] = (1.0, 1.0)
    equalizer: float = 0.0
    noise_dir: str | None = None
    snr_db: tuple[float, float] = (10.0, 20.0)
    reverb: float = 0.0
    max_seconds: float | None = None
    same_corpus: float = 0.0
    turns: float = 0.0
    as_recorded: tuple[str, ...] = ()
    telephone: float = 0.0


@dataclass(frozen=True)
class SpeechSource:
    """What mixtures of one split are drawn from."""

    options: MixingOptions
    by_speaker: dict[str, list[Utterance]]
    noises: list[str]
    split: str

    @cached_property
    def speakers(self) -> tuple[list[str], np.ndarray, np.ndarray]:
        """Names, corpora (of each speaker's first utterance) and shares of all utterances."""
        names = sorted(self.by_speaker)
        corpora = np.array([self.by_speaker[name][0].corpus for name in names])
        counts = np.array([len(self.by_speaker[name]) for name in names], float)
        return names, corpora, counts / counts.sum()


def group_by_speaker(utterances: Iterable[Utterance]) -> dict[str, list[Utterance]]:
    """Return the utterances of each speaker."""
    groups: dict[str, list[Utterance]] = {}
    for utterance in utterances:
        groups.setdefault(utterance.speaker, []).append(utterance)
    return groups


def _files_below(folder: Path) -> Iterator[Path]:
    """Yield the files in a folder and its subfolders, following links; no folder is read twice."""
    seen = set()
    for place, folders, names in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(place)) in seen:
            folders.clear()
            continue
        seen.add(real)
        folders.sort()
        yield from (Path(place, name) for name in names)


def list_recordings(folder: Path, below: bool = True) -> list[Path]:
    """Return the sorted recordings in a folder, by default also below it; print what is left out.

    Hidden files and the talkers that ``infer`` wrote do not count as recordings.
    """
    files = [path for path in (_files_below(folder) if below else folder.iterdir())
             if path.is_file() and not any(p[0] == "." for p in path.relative_to(folder).parts)]
    suffixes = [path.suffix.lower() for path in files]
    if others := UNREADABLE_SUFFIXES.intersection(suffixes):
        print(f"left out the {', '.join(sorted(others))} files in {folder}: convert them to .wav")
    return sorted(
        path for path, suffix in zip(files, suffixes, strict=True) if suffix in AUDIO_SUFFIXES
        and not (path.name.startswith("speaker_") and path.with_name("separation.json").is_file()))


def list_noises(noise_dir: str | None) -> list[str]:
    """Return the recordings in a folder of noise and below it; none without a folder."""
    if noise_dir is None:
        return []
    if not Path(noise_dir).is_dir():
        raise FileNotFoundError(f"no noise folder at {noise_dir}")
    noises = list_recordings(Path(noise_dir))
    if not noises:
        raise ValueError(f"{noise_dir} holds no recordings ({', '.join(sorted(AUDIO_SUFFIXES))})")
    return [str(path) for path in noises]


# --------------------------------------------------------------------------------------------------
# Plans


class PlannedTalker(NamedTuple):
    """What one talker says: utterances in a row, where each starts, how fast and how loud."""

    utterances: tuple[Utterance, ...]
    speed: float
    starts: tuple[float, ...]  # seconds after the onset
    seconds: float  # from the onset to the end of the last utterance
    onset: float  # seconds
    gain_db: float
    voice: tuple[float, ...] = ()  # for ``audio.change_voices``; empty: as recorded

    @property
    def text(self) -> str:
        """Everything said, in order; empty if a transcript is missing."""
        texts = [utterance.text for utterance in self.utterances]
        return " ".join(texts) if all(texts) else ""


class PlannedNoise(NamedTuple):
    """A recording of noise, its start in seconds, and the talkers' level above it in dB."""

    audio: str
    start: float
    snr_db: float


class PlannedMixture(NamedTuple):
    """A mixture before it is rendered: plain numbers and paths. No talkers: noise or silence."""

    talkers: tuple[PlannedTalker, ...]
    seconds: float
    overlap: float
    overlap_target: float | None = None
    noise: PlannedNoise | None = None
    room: int | None = None  # number of the simulated room
    band: tuple[float, ...] = ()  # Hz that a telephone transmits; empty: all


@lru_cache(maxsize=1 << 16)
def recording_seconds(path) -> float:
    """Return a recording's length by its header; raises as ``audio_info`` does."""
    return audio_info(path).duration


def _pick(rng, pool: list[Utterance], longest: float) -> Utterance:
    """Draw an utterance of at most ``longest`` seconds; after 20 draws, take the shortest."""
    for _ in range(20):
        utterance = pool[rng.integers(len(pool))]
        if recording_seconds(utterance.audio) <= longest:
            return utterance
    return min(pool, key=lambda utterance: recording_seconds(utterance.audio))


def _without_last(talker: PlannedTalker) -> PlannedTalker:
    utterances, starts = talker.utterances[:-1], talker.starts[:-1]
    seconds = starts[-1] + recording_seconds(utterances[-1].audio) / talker.speed
    return talker._replace(utterances=utterances, starts=starts, seconds=seconds)


def _plan_talker(rng, options: MixingOptions, pool: list[Utterance]) -> PlannedTalker:
    """Draw utterances with pauses between; drop the last ones while they exceed max_seconds."""
    count, longest = int(rng.integers(*options.join, endpoint=True)), options.max_seconds or np.inf
    speed = rng.uniform(*options.speed)
    if pool[0].corpus in options.as_recorded:
        speed = 1.0
    onset, gap = rng.uniform(0, options.max_onset), 0.0
    picks, starts, end = [], [], 0.0
    while len(picks) < count or end < options.min_seconds:
        picks.append(_pick(rng, pool, longest * speed))
        starts.append(end + gap)
        end = starts[-1] + recording_seconds(picks[-1].audio) / speed
        gap = rng.uniform(0, options.max_gap)
    half = options.level_difference / 2
    gain_db = rng.uniform(-half, half)
    talker = PlannedTalker(tuple(picks), speed, tuple(starts), end, onset, gain_db)
    while talker.seconds > longest and len(talker.utterances) > 1:
        talker = _without_last(talker)
    return talker


def _with_voice(
    rng, options: MixingOptions, talker: PlannedTalker, pool: list[Utterance]
) -> PlannedTalker:
    """Draw how a talker's voice is changed, if any is."""
    if not options.equalizer and options.formants == (1.0, 1.0):
        return talker
    if pool[0].corpus in options.as_recorded:
        return talker._replace(voice=(1.0, *[0.0] * len(EQUALIZER)))
    curve = rng.normal(0, options.equalizer / EQUALIZER).tolist()
    return talker._replace(voice=(rng.uniform(*options.formants), *curve))


# --------------------------------------------------------------------------------------------------
# Plans: overlap


def overlap_ratio(starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Return the share ``[...]`` of the time from first start to last end when two or more talk.

    ``starts`` and ``ends`` are seconds ``[..., talkers]``.

    >>> float(overlap_ratio(np.array([0.0, 2.0]), np.array([3.0, 4.0])))  # 0 to 3 s, 2 to 4 s
    0.25
    """
    times = np.concatenate([starts, ends], axis=-1)
    order = np.argsort(times, axis=-1)
    talking = np.cumsum(np.where(order < starts.shape[-1], 1, -1), axis=-1)[..., :-1]
    lengths = np.diff(np.take_along_axis(times, order, axis=-1), axis=-1)
    return np.sum(lengths * (talking > 1), axis=-1) / np.sum(lengths, axis=-1)


def _place(rng, talkers: list, target: float, max_seconds: float) -> tuple[list[float], float]:
    """Return onsets in seconds with the overlap ratio nearest to the target, and its error.

    Onsets are interpolated between two placements: one talker after another (no overlap), and all
    others in a row during the longest talker (the most overlap).
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
    rounding = 1e-6  # the most overlap lasts as long as the longest talker and must pass
    miss[ends.max(axis=1) > max(max_seconds, seconds[longest]) + rounding] = np.inf
    best = int(np.argmin(miss))
    return onsets[best].tolist(), float(miss[best])


def _plan_overlap(rng, options: MixingOptions, talkers: list, target: float) -> tuple[float, list]:
    """Set onsets for a target overlap ratio; return the ratio's error and the talkers.

    The mixture keeps the earliest onset drawn. While the ratio is out of reach, the longest talker
    that ``join`` and ``min_seconds`` allow to be shortened loses its last utterance.
    """
    lead, limit = min(t.onset for t in talkers), options.max_seconds or np.inf
    best = (np.inf, [], [])
    while True:
        onsets, miss = _place(rng, talkers, target, limit)
        best = min(best, (miss, talkers, onsets), key=lambda plan: plan[0])
        can_shorten = [t for t in talkers if len(t.utterances) > options.join[0]
                       and _without_last(t).seconds >= options.min_seconds]
        if best[0] <= OVERLAP_TOLERANCE or not can_shorten:
            break
        longest = max(can_shorten, key=lambda talker: talker.seconds)
        talkers = [_without_last(t) if t is longest else t for t in talkers]
    miss, talkers, onsets = best
    end = max(onset + t.seconds for onset, t in zip(onsets, talkers, strict=True))
    lead = max(0.0, min(lead, limit - end))
    return miss, [t._replace(onset=lead + o) for t, o in zip(talkers, onsets, strict=True)]


def _plan_talkers(rng, source: SpeechSource, count: int, target: float | None) -> list:
    """Draw speakers and what each says; redraw while the overlap ratio is far from its target."""
    names, corpora, shares = source.speakers
    if source.options.same_corpus > 0 and rng.random() < source.options.same_corpus:
        alike = corpora == corpora[rng.choice(len(names), p=shares)]
        if alike.sum() >= count:
            shares = shares * alike
    likely = shares / shares.sum()
    miss, best = np.inf, []
    for _ in range(OVERLAP_DRAWS):
        drawn = rng.choice(len(names), count, replace=False, p=likely)
        pools = [source.by_speaker[names[i]] for i in drawn]
        talkers = [_plan_talker(rng, source.options, pool) for pool in pools]
        if source.split == "train":
            talkers = [_with_voice(rng, source.options, talker, pool)
                       for talker, pool in zip(talkers, pools, strict=True)]
        if target is None:
            return talkers
        plan = _plan_overlap(rng, source.options, talkers, target)
        miss, best = min((miss, best), plan, key=lambda plan: plan[0])
        if miss <= OVERLAP_TOLERANCE:
            break
    return best


def plan_mixture(rng, source: SpeechSource, count: int | None = None) -> PlannedMixture:
    """Plan a mixture of ``count`` different speakers; if None, draw the count too.

    With ``count=0`` it is noise or digital silence, as long as one talker would be. Raises
    FileNotFoundError or ValueError if a recording cannot be read or there are too few speakers.
    """
    options, speakers = source.options, len(source.by_speaker)
    if count is None:
        count = int(rng.integers(options.min_speakers, options.max_speakers, endpoint=True))
    if max(count, 1) > speakers:
        raise ValueError(f"{count} talkers were asked for and there are {speakers} speakers")
    target = None if options.overlap is None or count < 2 else rng.uniform(*options.overlap)
    if options.turns > 0 and count > 1 and rng.random() < options.turns:
        target = 0.0
    limit = options.max_seconds or np.inf
    talkers = [t._replace(onset=max(0.0, min(t.onset, limit - t.seconds)))
               for t in _plan_talkers(rng, source, max(count, 1), target)]
    spans = np.array([(t.onset, min(t.onset + t.seconds, limit)) for t in talkers]).T
    seconds, noise, room = float(spans[1].max()), None, None
    if source.noises:
        audio = source.noises[rng.integers(len(source.noises))]
        start = rng.uniform(0, max(0.0, recording_seconds(audio) - seconds))
        noise = PlannedNoise(audio, start, rng.uniform(*options.snr_db))
    if options.reverb > 0 and rng.random() < options.reverb:
        room = int(rng.integers(ROOMS)) + ROOMS * (source.split == "val")
    band = ()
    if options.telephone > 0 and rng.random() < options.telephone:
        band = tuple(rng.uniform(*edges) for edges in TELEPHONE_HZ)
    return PlannedMixture(
        tuple(talkers[:count]), seconds, float(overlap_ratio(*spans)), target, noise, room, band)


# --------------------------------------------------------------------------------------------------
# Rendering


@lru_cache(maxsize=CACHED_RECORDINGS)
def _decoded(path) -> tuple[np.ndarray, np.float32]:
    """Decode a recording once into 16-bit integers, half the size of float32, and their unit.

    The loudest sample becomes the largest integer, so that a recording of any level fits.
    """
    samples = read_audio(path)
    unit = np.float32(max(np.abs(samples).max(), 1e-9) / 32767)
    return np.round(samples / unit).astype(np.int16), unit


def _samples_of(path, speed: float = 1.0) -> np.ndarray:
    """Return a recording's samples at 16 kHz and the given speed; short recordings are cached."""
    import soxr

    kept = recording_seconds(path) <= CACHED_SECONDS
    samples = np.multiply(*_decoded(path), dtype=np.float32) if kept else read_audio(path)
    return samples if speed == 1 else soxr.resample(samples, SAMPLING_RATE * speed, SAMPLING_RATE)


@lru_cache(maxsize=2 * ROOMS)
def room_responses(number: int) -> list[tuple[np.ndarray, int]]:
    """Return (response, sample of its direct sound) from ``MOUTHS`` places to a room's microphone.

    The number is the seed of the room. Responses end RT60 after the direct sound. Simulated by the
    image source method (Allen and Berkley, 1979).
    """
    import pyroomacoustics

    rng = np.random.default_rng([number, 1979])
    sides, rt60 = rng.uniform(*ROOM_METRES), rng.uniform(*ROOM_RT60)
    floor = rng.uniform(WALL_DISTANCE, sides[:2] - WALL_DISTANCE, size=(1 + MOUTHS, 2))
    microphone = np.array([*floor[0], TABLE_HEIGHT])
    mouths = np.column_stack([floor[1:], rng.uniform(*MOUTH_HEIGHT, size=MOUTHS)])
    pyroomacoustics.constants.set("num_threads", 1)  # the order of sums shows in the last bits
    absorption, order = pyroomacoustics.inverse_sabine(rt60, sides)
    room = pyroomacoustics.ShoeBox(
        sides, fs=SAMPLING_RATE, materials=pyroomacoustics.Material(absorption),
        max_order=min(order, MAX_REFLECTIONS))
    room.add_microphone(microphone)
    for mouth in mouths:
        room.add_source(mouth)
    room.compute_rir()
    lead = pyroomacoustics.constants.get("frac_delay_length") // 2
    length = lead + round(rt60 * SAMPLING_RATE)
    direct = np.linalg.norm(mouths - microphone, axis=1) / room.c * SAMPLING_RATE
    return [(response[start : start + length].astype(np.float32), lead)
            for start, response in zip(np.rint(direct).astype(int), room.rir[0], strict=True)]


def _rms(samples: np.ndarray) -> float:
    return math.sqrt(np.dot(samples, samples) / max(len(samples), 1))


def _at_level(samples: np.ndarray, rms: float, level: float, gain_db: float) -> np.ndarray:
    """Scale samples in place so that an RMS of ``rms`` becomes ``level`` plus ``gain_db``."""
    samples *= np.float32(level / max(rms, 1e-5) * 10 ** (gain_db / 20))
    return samples


def _in_voice(samples: np.ndarray, talker: PlannedTalker) -> np.ndarray:
    """Return speech [samples] in the voice that is planned for a talker."""
    spectrum = change_voices(stft(torch.from_numpy(samples)), torch.tensor(talker.voice))
    return istft(spectrum, len(samples)).numpy()


def render_talker(talker: PlannedTalker, response=None) -> np.ndarray:
    """Build the waveform [samples] of one planned talker from the start of the mixture.

    Its RMS while speaking is SPEECH_RMS plus the gain; ``response`` is one of ``room_responses``.
    """
    pieces = [(round((talker.onset + start) * SAMPLING_RATE), _samples_of(u.audio, talker.speed))
              for u, start in zip(talker.utterances, talker.starts, strict=True)]
    if talker.voice:
        pieces = [(begin, _in_voice(samples, talker)) for begin, samples in pieces]
    length = max(begin + len(samples) for begin, samples in pieces)
    waveform = np.zeros(length, np.float32)
    for begin, samples in pieces:
        waveform[begin : begin + len(samples)] += samples
    if response is not None:
        from scipy.signal import oaconvolve

        waveform = oaconvolve(waveform, response[0])[response[1] :]
    spoken = np.concatenate([waveform[begin : begin + len(samples)] for begin, samples in pieces])
    return _at_level(waveform, _rms(spoken), SPEECH_RMS, talker.gain_db)


def render_noise(noise: PlannedNoise, talkers: np.ndarray) -> np.ndarray:
    """Return noise as long as ``talkers`` [samples], looped if shorter, at the planned ratio."""
    samples = np.resize(_samples_of(noise.audio)[int(noise.start * SAMPLING_RATE) :], len(talkers))
    level = _rms(talkers) or SPEECH_RMS  # of one talker if nobody talks
    return _at_level(samples, _rms(samples), level, -noise.snr_db)


def _on_telephone(waveforms: np.ndarray, band: tuple[float, ...]) -> np.ndarray:
    """Return waveforms [n, samples] as a telephone with this band transmits them."""
    import soxr
    from scipy.signal import butter, sosfilt

    narrow = soxr.resample(waveforms.T, SAMPLING_RATE, TELEPHONE_RATE)
    filters = butter(4, band, "bandpass", fs=TELEPHONE_RATE, output="sos")
    wide = soxr.resample(sosfilt(filters, narrow, axis=0), TELEPHONE_RATE, SAMPLING_RATE)
    result, length = np.zeros_like(waveforms), min(len(wide), waveforms.shape[1])
    result[:, :length] = wide[:length].T
    return result


def render_mixture(plan: PlannedMixture, max_seconds: float | None = None):
    """Render a planned mixture: its talkers alone [n, samples] and their sum with noise [samples].

    ``max_seconds`` cuts the tail of reverberation, and an utterance that is longer by itself, but
    nothing else. Raises as ``audio.read_audio`` does.
    """
    responses = [None] * MOUTHS if plan.room is None else room_responses(plan.room)
    waveforms = list(map(render_talker, plan.talkers, responses))  # not more than MOUTHS
    length = max(map(len, waveforms), default=max(1, round(plan.seconds * SAMPLING_RATE)))
    if max_seconds is not None:
        length = min(length, round(max_seconds * SAMPLING_RATE))
    sources = np.zeros((len(waveforms), length), np.float32)
    for source, waveform in zip(sources, waveforms, strict=True):
        source[: len(waveform)] = waveform[:length]
    mixture = sources.sum(axis=0)
    if plan.noise:
        mixture += render_noise(plan.noise, mixture)
    if plan.band:
        narrow = _on_telephone(np.concatenate([sources, mixture[None]]), plan.band)
        sources, mixture = narrow[:-1], narrow[-1]
    peak = max(max(x.max(initial=0), -x.min(initial=0)) for x in (sources, mixture))
    if peak > 1:  # a .wav holds no more than full scale
        sources, mixture = sources / peak, mixture / peak
    return sources, mixture


def _start_worker() -> None:
    """Use one thread, exit when the main process exits, and leave Ctrl-C to the main process."""
    main = multiprocessing.parent_process()
    threading.Thread(target=lambda: (main.join(), os._exit(1)), daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)


def render_mixtures(plans: list, max_seconds: float | None, workers: int) -> Iterator[tuple]:
    """Render plans in ``workers`` processes (0: in this one) and yield the results in order."""
    render = partial(render_mixture, max_seconds=max_seconds)
    if not workers:
        yield from map(render, plans)
        return
    # spawned: neither torch's threads nor a CUDA context survive a fork
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, _start_worker) as pool:
        size = 8 * workers  # most mixtures in memory, however slow the reader is
        try:
            for start in range(0, len(plans), size):
                yield from pool.map(render, plans[start : start + size])
        except BrokenExecutor:
            raise ValueError(
                "a rendering process died, out of memory? Use fewer --workers") from None
