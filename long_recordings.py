"""Recordings of any length: windows, which talker is which, and one stream per talker.

A recording is read in windows that overlap the next by a quarter and are separated independently.
``TalkerTracker`` numbers the streams; then the windows of each talker are joined. Shapes: ``S``
streams, ``T`` frames, ``D`` mel bins or feature width.
"""

from __future__ import annotations

import contextlib
import math
import re
import sys
import threading
from collections.abc import Callable, Iterator
from difflib import SequenceMatcher
from functools import partial
from itertools import groupby, islice, product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from audio import (
    DIGITAL_SILENCE,
    FRAME_RATE,
    HOP_LENGTH,
    LOG_MEL_RANGE,
    SAMPLING_RATE,
    AudioEncoder,
    audio_blocks,
    check_length,
    floor_log_mel,
    log_mel,
    read_audio,
)

WINDOW_SECONDS = 30
WINDOW_BATCH = 4  # windows separated at once: a GPU is kept busy, and memory stays flat
TEMPLATE_SECONDS, TEMPLATE_BYTES = 10.0, 1 << 30  # limits of a model folder's chat template
TWO_TOKENS = 961  # fewest samples that Qwen2-Audio turns into two tokens
ABSENT = -LOG_MEL_RANGE  # gain in windows where the talker is absent: 80 dB down
# Not heard: a talker 50 dB below its loudest bin, or 25 dB below the mixture's at that time.
SILENT, DROWNED = LOG_MEL_RANGE * 50 / 80, LOG_MEL_RANGE * 25 / 80
SPOKEN_WORDS = 5  # a second, at most
UNSPACED = "\u3000-\u30ff\u3400-\u9fff\uff00-\uffef"  # characters of Chinese and Japanese
DEFAULT_PROMPT = "What does the person say?"
MORE_THAN_TEXT = ("num_return_sequences", "return_dict_in_generate", "return_segments",
                  "return_token_timestamps")  # of generate
QWEN_TOKENS, WHISPER_TOKENS = 256, 200  # longest answers; nobody says 200 tokens in 30 s
# Whisper's own fallback where its text repeats itself (arXiv:2212.04356): a higher temperature.
TEMPERATURE_FALLBACK = {"temperature": (0.0, 0.4, 0.8), "compression_ratio_threshold": 1.35}


def window_step(window: int) -> int:
    """Return the samples from one window to the next, in whole frames of the coarsest encoder."""
    frame = 4 * HOP_LENGTH
    return window * 3 // 4 // frame * frame


def read_windows(
    audio, window: int, sampling_rate: int | None = None
) -> Iterator[tuple[int, np.ndarray, bool]]:
    """Yield overlapping windows: first sample, samples and whether there is only this one.

    The recording is read once; its last window may be shorter. Raises as ``check_length`` does.
    """
    held, start, step = np.zeros(0, np.float32), 0, window_step(window)
    for block in audio_blocks(audio, sampling_rate):
        held = np.concatenate([held, block])
        while len(held) > window:
            yield start, held[:window], False
            held, start = held[step:], start + step
    if start == 0:
        check_length(audio, len(held))
    yield start, held, start == 0


def batches_of_windows(windows: Iterator[tuple]) -> Iterator[list[tuple]]:
    """Yield what ``read_windows`` does in lists of up to ``WINDOW_BATCH`` windows of one length."""
    for _, alike in groupby(windows, key=lambda window: len(window[1])):
        while batch := list(islice(alike, WINDOW_BATCH)):
            yield batch


def has_sound(part: np.ndarray, whole: np.ndarray) -> bool:
    """Return whether a part of a window is less than 20 dB quieter than the whole."""
    return bool(np.square(part).mean() > 0.01 * np.square(whole).mean())


# --------------------------------------------------------------------------------------------------
# Which talker is which


class TalkerTracker:
    """Numbers the talkers in the windows of one recording by first appearance.

    Every pair of a stream and a known talker gets a score: the correlation over the frames that
    adjacent windows share, minus the distance between the voices, plus a bonus for talkers found in
    many windows. A new talker scores like a voice at the largest distance within one talker, as
    estimated from the windows so far. The assignment with the highest sum wins. A voice is the mean
    and spread of a stream's frames, changing frames weighted most.

    Adjacent windows share ``shared`` frames; at most ``num_speakers`` talkers are numbered.
    """

    # Measured on streams of two talkers: benchmarks/ABLATIONS.md.
    ALIKE = 0.8  # correlation of shared frames above which two streams are one talker
    SHARED, OFTEN = 8.0, 2.0  # weights of the shared frames and of the number of windows

    def __init__(self, shared: int, num_speakers: int | None = None):
        self.shared, self.num_speakers = shared, num_speakers
        self.voices, self.windows = [], []  # mean voice [2 D] and number of windows of each talker
        self.same, self.different = [], []  # distances between voices of one talker, and of two
        self.talker_of: dict[int, int] = {}  # {stream: talker} of the last window with a talker
        self.tail = self.scale = None

    def _voice(self, stream: Tensor) -> Tensor:
        """Return mean and spread [2 D] of a stream [T, D], in units of the features' spread."""
        if self.scale is None:
            spread = stream.std(0, correction=0)
            self.scale = spread.clamp(min=spread.mean() + 1e-6)  # some bins are at the floor
        change = stream.diff(dim=0, prepend=stream[:1]).norm(dim=1, keepdim=True) + 1e-9
        weight = change / change.sum()
        mean = (weight * stream).sum(0)
        spread = (weight * (stream - mean).square()).sum(0).sqrt()
        return torch.cat([mean / self.scale, spread / self.scale])

    def _compare(self, head: Tensor | None, present: list[int]) -> np.ndarray:
        """Return correlations of shared frames [S, T, D]: [present, known], NaN if none are shared.

        Each stream is compared after the mean of all streams is subtracted.
        """
        alike = np.full((len(present), len(self.voices)), np.nan)
        if head is None or self.tail is None or self.tail.shape != head.shape or len(head) == 1:
            return alike
        now, before = (F.normalize((x - x.mean(0)).flatten(1), dim=1) for x in (head, self.tail))
        correlation = (now @ before.T).numpy()
        for stream, talker in self.talker_of.items():
            alike[:, talker] = correlation[present, stream]
        return alike

    def _assign(self, distance: np.ndarray, alike: np.ndarray) -> list[int]:
        """Return a talker for every stream, known or new, with the highest summed score."""
        from scipy.optimize import linear_sum_assignment

        # limit: the largest distance between voices of one talker, twice the geometric mean of the
        # mean distances within and between talkers. A factor above 2 misses more second talkers
        # (measured). unit: the distance that costs one point.
        means = [max(np.mean(distances), 0.01)  # a recording that repeats itself has 0
                 for distances in (self.same, self.different) if distances]
        limit = 2 * math.sqrt(means[0] * means[-1]) if means else 1e6
        unit = means[0] if self.same else limit / 4
        agreement = np.nan_to_num(alike - self.ALIKE)
        score = self.SHARED * agreement - distance / unit + self.OFTEN * np.log(self.windows)
        streams, known = alike.shape
        left = math.inf if self.num_speakers is None else self.num_speakers - known
        num_new = min(streams, left)
        # Lowest number first; a new talker scores like a voice at the limit.
        new_scores = np.tile(-limit / unit - 1e-9 * np.arange(num_new), (streams, 1))
        if not np.isnan(alike).any():  # all known were compared; a new one has correlation 0
            new_scores -= self.SHARED * self.ALIKE
        _, talkers = linear_sum_assignment(np.hstack([score, new_scores]), maximize=True)
        return talkers.tolist()

    def number(self, streams: Tensor, present: list[int], sound: bool = True) -> dict[int, int]:
        """Return {stream: talker}, both from 0, for the ``present`` ones of ``streams [S, T, D]``.

        ``sound`` says whether the frames shared with the window before hold any sound.
        """
        streams, known = streams.float(), len(self.voices)
        if not present:
            self.tail = None
            return {}
        voices = [self._voice(streams[s]) for s in present]
        distance = np.array([[float((voice - mean).square().mean().sqrt()) for mean in self.voices]
                             for voice in voices])  # [present, known]
        alike = self._compare(streams[:, : self.shared] if sound else None, present)
        talkers = self._assign(distance, alike)
        for row, talker in enumerate(talkers):
            if talker < known and alike[row, talker] > self.ALIKE:
                self.same.append(distance[row, talker])
            self.different += [distance[row, t] for t in talkers if t != talker and t < known]
        for talker, voice in sorted(zip(talkers, voices, strict=True), key=lambda pair: pair[0]):
            if talker == len(self.voices):
                self.voices.append(voice)
                self.windows.append(0)
            self.windows[talker] += 1
            self.voices[talker] = torch.lerp(self.voices[talker], voice, 1 / self.windows[talker])
        self.talker_of = dict(zip(present, talkers, strict=True))
        self.tail = streams[:, -self.shared :].clone()
        return self.talker_of


# --------------------------------------------------------------------------------------------------
# One stream per talker


class Talker(NamedTuple):
    """A talker of a recording: ``values [T, D]`` are gains of spectrograms, or features."""

    number: int
    values: Tensor
    windows: list[dict]  # start and end in seconds, and probability, where it was found

    @property
    def probability(self) -> float:
        """The highest of all windows."""
        return max(window["probability"] for window in self.windows)


class SeparatedRecording(NamedTuple):
    """What ``separate_recording`` returns; ``mixture [T, D]`` at ``frame_rate`` per second."""

    mixture: Tensor
    talkers: list[Talker]
    frame_rate: float
    num_windows: int

    def stream(self, talker: Talker) -> Tensor:
        """Return a talker's spectrogram [T, D] with its floor 80 dB below its loudest bin."""
        return floor_log_mel(self.mixture + talker.values)


def _join_windows(parts: list, frames: int, absent: float) -> tuple[Tensor, dict[int, Tensor]]:
    """Return the mixture [T, D] and each talker's values [T, D]; empties ``parts`` meanwhile."""
    mixture, talkers = parts[0][1].new_zeros(frames, parts[0][1].shape[1]), {}
    while parts:  # popping a part frees its memory
        place, features, values = parts.pop(0)
        mixture[place] = features
        for n in values:
            if n not in talkers:
                talkers[n] = torch.full_like(mixture, absent)
            talkers[n][place] = values[n]
    return mixture, talkers


def separate_recording(
    separate_windows: Callable, audio, encoder: AudioEncoder | None = None, num_bins: int = 80,
    num_speakers: int | None = None, sampling_rate: int | None = None,
) -> SeparatedRecording:
    """Separate a recording of any length; memory grows only with the streams it returns.

    ``separate_windows(features [B, T, D], alone) -> values [B, S, T, D], probabilities [B, S],
    active [B, S]`` is given batches of windows; ``alone`` says whether there is only one. Features
    are log-mel spectrograms of ``num_bins`` and values gains on them, or both are an ``encoder``'s
    features. ``num_speakers`` is the number of talkers in the recording, if known. ``audio``,
    ``sampling_rate`` and errors are those of ``audio.read_audio``.
    """
    window, rate = WINDOW_SECONDS * SAMPLING_RATE, FRAME_RATE
    if encoder is not None:
        window, rate = encoder.feature_extractor.n_samples, encoder.frame_rate
    shared = window - window_step(window)  # samples
    tracker = TalkerTracker(round(shared / SAMPLING_RATE * rate), num_speakers)
    parts, found, end = [], {}, 0
    windows = tqdm(
        read_windows(audio, window, sampling_rate), "windows", leave=False, disable=None)
    for batch in batches_of_windows(windows):
        waveforms, alone = [samples for _, samples, _ in batch], batch[0][2]
        if encoder is None:
            spectra = log_mel(torch.from_numpy(np.stack(waveforms)), num_bins)
        else:
            spectra = torch.stack(encoder.encode(waveforms)).cpu()
        separated = zip(batch, spectra, *separate_windows(spectra, alone), strict=True)
        for (first, samples, _), features, values, probs, active in separated:
            streams = values if encoder else floor_log_mel(features + values)
            present = active.nonzero().flatten().tolist()
            numbers = tracker.number(streams, present, has_sound(samples[:shared], samples))
            start = round(first / SAMPLING_RATE * rate)
            skip = max(0, (end - start) // 2)  # each window supplies half of the shared frames
            end = start + len(features)
            parts.append((slice(start + skip, end), features[skip:].clone(),
                          {n: values[s, skip:].clone() for s, n in numbers.items()}))
            for s, n in numbers.items():
                found.setdefault(n, []).append({
                    "start": first / SAMPLING_RATE, "end": (first + len(samples)) / SAMPLING_RATE,
                    "probability": round(float(probs[s]), 4)})
    num_windows = len(parts)
    mixture, values = _join_windows(parts, end, 0.0 if encoder else ABSENT)
    talkers = [Talker(n + 1, values[n], found[n]) for n in sorted(found)]
    return SeparatedRecording(mixture, talkers, rate, num_windows)


# --------------------------------------------------------------------------------------------------
# Answers


@contextlib.contextmanager
def bounded():
    """Limit time and memory of a model folder's template: TimeoutError or MemoryError beyond.

    There are no limits outside Linux or outside the main thread.
    """
    if sys.platform != "linux" or threading.current_thread() is not threading.main_thread():
        yield
        return
    import resource
    import signal

    def stop(*_):
        raise TimeoutError

    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limit, hard = resource.getrlimit(resource.RLIMIT_AS)
    most = used + TEMPLATE_BYTES if hard < 0 else min(used + TEMPLATE_BYTES, hard)
    earlier = signal.signal(signal.SIGALRM, stop)
    timer = signal.setitimer(signal.ITIMER_REAL, TEMPLATE_SECONDS)  # returns the caller's
    try:
        resource.setrlimit(resource.RLIMIT_AS, (most, hard))
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, earlier)
        signal.setitimer(signal.ITIMER_REAL, *timer)
        resource.setrlimit(resource.RLIMIT_AS, (limit, hard))


def build_prompt(processor, prompt: str) -> str:
    """Return the model's chat text for one recording and a question about it.

    Raises ValueError if the template takes more than ``TEMPLATE_SECONDS`` or ``TEMPLATE_BYTES``.
    """
    content = [{"type": "audio", "audio_url": "recording"}, {"type": "text", "text": prompt}]
    chat = [{"role": "system", "content": "You are a helpful assistant."},
            {"role": "user", "content": content}]
    try:
        with bounded():
            return processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    except (TimeoutError, MemoryError):
        raise ValueError(f"the chat template of {processor.tokenizer.name_or_path} takes more than "
                         f"{TEMPLATE_SECONDS:g} s or {TEMPLATE_BYTES >> 30} GB") from None


def integration_of(model):
    """Return what ``integrate_speaker_separator`` put into a model, or None."""
    return getattr(model, "_speaker_integration", None)  # also of a compiled or wrapped one


def decode(processor, ids: Tensor) -> list[str]:
    """Return the texts of token rows."""
    # Row by row: batch_decode of transformers 5.17 makes one text of no rows.
    return [processor.decode(row, skip_special_tokens=True).strip() for row in ids]


def answer_options(model, processor, options: dict) -> dict:
    """Complete options of ``generate`` with defaults for the model; None counts as not given."""
    if hasattr(processor, "audio_token"):
        suited = {"max_new_tokens": QWEN_TOKENS}
    else:
        suited = {"max_new_tokens": min(WHISPER_TOKENS, model.config.max_target_positions // 2)}
        own, given = (vars(c) if c else {} for c in (
            model.generation_config, options.get("generation_config")))
        multilingual, tasks, task, temperature = (
            own.get(name) if given.get(name) is None else given[name]
            for name in ("is_multilingual", "task_to_id", "task", "temperature"))
        if multilingual and tasks and not task:  # unset by transformers when it detects a language
            suited["task"] = "transcribe"
        integration = integration_of(model)
        may_fall_back = integration is None or integration.separator.is_spectrogram
        if may_fall_back and temperature in (None, 1.0):  # 1.0 is transformers' default
            suited |= TEMPERATURE_FALLBACK
    if any(options.get(name) is not None for name in ("max_length", "generation_config")):
        del suited["max_new_tokens"]  # it would override them
    return suited | {name: value for name, value in options.items() if value is not None}


def ask(model, processor, recordings: list, prompt: str | None = None, **options) -> list[str]:
    """Return the text of every row that ``generate`` gives for recordings.

    ``recordings`` are what ``read_audio`` takes; the model reads the first window of each (30 s).
    Whisper takes no prompt. ``options`` of ``generate`` are completed by ``answer_options``.
    """
    options = answer_options(model, processor, options)
    recordings = [read_audio(recording) for recording in recordings]
    read = {"sampling_rate": SAMPLING_RATE, "return_tensors": "pt"}
    if hasattr(processor, "audio_token"):
        text = [build_prompt(processor, prompt or DEFAULT_PROMPT)] * len(recordings)
        # A prompt with one audio token each looks unexpanded to transformers, which then fails.
        recordings = [np.pad(r, (0, max(0, TWO_TOKENS - len(r)))) for r in recordings]
        inputs = processor(text=text, audio=recordings, padding=True, **read)
    else:
        inputs = processor.feature_extractor(recordings, return_attention_mask=True, **read)
        inputs["input_features"] = inputs["input_features"].to(model.dtype)
    ids = model.generate(**inputs.to(model.device), **options)
    prompted = inputs["input_ids"].shape[1] if "input_ids" in inputs else 0
    return decode(processor, ids[:, prompted:])


def _common_run(tail: list[str], head: list[str], room: int) -> tuple[int, int, int]:
    """Return where a run of words that two texts share begins in each, and its length.

    A run of three counts anywhere, as two windows may hear the words around it differently, if all
    words from there to the end of ``tail``, and before it in ``head``, are at most ``room``. A
    shorter run must end ``tail`` and begin ``head``, except for one word cut at either edge.
    """
    run = SequenceMatcher(None, tail, head, autojunk=False).find_longest_match()
    if run.size >= 3 and len(tail) - run.a + run.b <= room:
        return run
    for size, cut, late in product((2, 1), (0, 1), (0, 1)):
        start = len(tail) - cut - size
        if start >= 0 and tail[start : start + size] == head[late : late + size]:
            return start, late, size
    return len(tail), 0, 0


def join_texts(texts: list[tuple[int, str]], shared: float) -> str:
    """Join the texts of windows, (number, text) each, without repeating the words of an overlap.

    Adjacent windows share ``shared`` seconds, with at most ``SPOKEN_WORDS`` words a second. Texts
    are joined at the longest run of words that the end of one shares with the beginning of the
    next; words after the run in the earlier text, and before it in the later one, are dropped.
    Chinese and Japanese are joined by characters.

    >>> join_texts([(0, "one two three fo"), (1, "three four five")], shared=7.5)
    'one two three four five'
    """
    joined, last, room = [], None, math.ceil(SPOKEN_WORDS * shared) + 1
    for number, text in texts:
        words = re.findall(rf"[{UNSPACED}]|[^\s{UNSPACED}]+", text)
        if number - 1 == last:
            tail, head = ([word.lower().strip(".,;:!?") for word in side]
                          for side in (joined[-room:], words[:room]))
            start, late, size = _common_run(tail, head, room)
            joined, words = joined[: len(joined) - len(tail) + start + size], words[late + size :]
        joined, last = joined + words, number
    return re.sub(rf"(?<=[{UNSPACED}]) | (?=[{UNSPACED}])", "", " ".join(joined))


# --------------------------------------------------------------------------------------------------
# Answers for each talker of a recording of any length


def _heard(stream: Tensor, mixture: Tensor, segments: list[dict]) -> list[dict]:
    """Return the segments in which the talker of a stream [T, D] is heard in the mixture [T, D].

    Other segments hold words that Whisper invents in silence, or traces of other talkers.
    """
    heard = []
    for part in segments:
        frames = slice(int(part["start"] * FRAME_RATE), math.ceil(part["end"] * FRAME_RATE))
        if len(stream[frames]):
            least = max(stream.max() - SILENT, mixture[frames].max() - DROWNED)
            if stream[frames].max() > least:
                heard.append(part)
    return heard


def _show_progress(bar: tqdm, seek: Tensor) -> None:
    """Move a bar of seconds to Whisper's position; ``seek [talkers, 2]``: frames done, total."""
    bar.update(int(seek[:, 0].min()) // FRAME_RATE - bar.n)


def _decode_streams(
    integration, processor, recording: SeparatedRecording, options: dict
) -> list[dict]:
    """Let Whisper decode every talker's spectrogram, all as one batch."""
    if not recording.talkers:
        return []
    streams = torch.stack([recording.stream(t) for t in recording.talkers]).transpose(1, 2)
    frames, most = streams.shape[-1], processor.feature_extractor.nb_max_frames
    padded = floor_log_mel(F.pad(streams, (0, max(0, most - frames)), value=DIGITAL_SILENCE))
    mask = (torch.arange(padded.shape[-1]) < frames).long().expand(len(streams), -1)
    model = integration.model
    is_long, seconds = frames > most, frames // FRAME_RATE
    with tqdm(desc="answers", total=seconds, unit=" s", leave=False, disable=None) as bar:
        if is_long:
            options = {"return_timestamps": True, "monitor_progress": partial(_show_progress, bar),
                       **options, "return_segments": True}
        output = integration.original_generate(
            input_features=padded.to(model.device, model.dtype),
            attention_mask=mask.to(model.device), **options)
    texts = decode(processor, output["sequences"] if is_long else output)
    rows = []
    for i, (talker, text) in enumerate(zip(recording.talkers, texts, strict=True)):
        parts = [(0.0, frames / FRAME_RATE, text)]
        if is_long:
            heard = _heard(streams[i].T, recording.mixture, output["segments"][i])
            parts = [(float(part["start"]), min(float(part["end"]), frames / FRAME_RATE),
                      decode(processor, [part["tokens"]])[0]) for part in heard]
            if len(heard) < len(output["segments"][i]):
                tokens = [token for part in heard for token in part["tokens"].tolist()]
                text = decode(processor, [tokens])[0]
        windows = [{"start": start, "end": end, "probability": talker.probability, "text": words}
                   for start, end, words in parts]
        rows.append({"speaker": talker.number, "probability": talker.probability, "text": text,
                     "windows": windows})
    return rows


def _numbered_rows(
    integration, tracker: TalkerTracker, samples: np.ndarray, sound: bool, alone: bool,
    features: Tensor, mel_mask, num_speakers: int | None,
):
    """Choose the rows of a window as the integration does, ordered by talker number.

    ``sound`` says whether there is any in the seconds that it shares with the window before.
    """
    streams, frame_mask, rows, _ = integration.choose_rows(
        features, mel_mask, num_speakers, reach_threshold=not alone)
    hop, present = HOP_LENGTH * integration.stride, [stream for _, stream, _ in rows]
    numbers = tracker.number(streams[0][:, : len(samples) // hop].cpu(), present, sound)
    rows.sort(key=lambda row: numbers[row[1]])
    return streams, frame_mask, rows, [numbers[stream] + 1 for _, stream, _ in rows]


def _join_answers(found: dict, key: str, shared: float) -> list[dict]:
    """Return one row per talker, in joint mode one about all, with the texts of windows joined."""
    rows = []
    for said_by, numbered in sorted(found.items()):
        parts = [part for _, part in numbered]
        if key == "speakers":
            said_by = sorted({talker for part in parts for talker in part[key]})
        text = join_texts([(number, part["text"]) for number, part in numbered], shared)
        rows.append({key: said_by, "probability": max(part["probability"] for part in parts),
                     "text": text, "windows": parts})
    return rows


def _answer_windows(
    integration, model, processor, audio, sampling_rate: int | None, prompt: str | None,
    options: dict,
) -> list[dict]:
    """Answer window by window, collect the answers by talker and join their texts."""
    joint, found, pauses = options["mode"] == "joint", {}, 0
    key = "speakers" if joint else "speaker"
    window = processor.feature_extractor.n_samples
    step = window_step(window)
    frames = (window - step) // HOP_LENGTH // integration.stride  # shared by two windows
    tracker = TalkerTracker(frames, options["num_speakers"])
    windows = read_windows(audio, window, sampling_rate)
    for first, samples, alone in tqdm(windows, "windows", leave=False, disable=None):
        sound = has_sound(samples[: window - step], samples)
        pauses += not sound  # windows that share silence share no words: let their numbers differ
        choose_rows = partial(_numbered_rows, integration, tracker, samples, sound, alone)
        texts = ask(model, processor, [samples], prompt, choose_rows=choose_rows, **options)
        # Now model.speaker_rows has a row for each text; tracker.talker_of numbers its stream.
        who = [(tracker.talker_of[stream] + 1, round(p, 4)) for _, stream, p in model.speaker_rows]
        if joint and who:
            who = [([talker for talker, _ in who], max(p for _, p in who))]
        for (said_by, probability), text in zip(who, texts, strict=True):
            part = {"start": first / SAMPLING_RATE, "end": (first + len(samples)) / SAMPLING_RATE,
                    key: said_by, "probability": probability, "text": text}
            found.setdefault(0 if joint else said_by, []).append((first // step + pauses, part))
    return _join_answers(found, key, (window - step) / SAMPLING_RATE)


def answer_per_talker(
    model, processor, audio, prompt: str | None = None, sampling_rate: int | None = None,
    num_speakers: int | None = None, mode: str = "separate", **options,
) -> list[dict]:
    """Ask an integrated Qwen2-Audio or Whisper about one recording of any length.

    With a spectrogram separator Whisper decodes each talker's spectrogram with its own long-form
    algorithm. Otherwise each window is answered, and the texts of windows are joined.

    ``audio`` is a path, or an array or tensor [samples] at ``sampling_rate`` (default: 16 kHz);
    ``prompt`` asks Qwen2-Audio about each talker (default: "What does the person say?");
    ``num_speakers`` is the number of talkers in the whole recording, if known; a window may have
    fewer. ``options`` go to ``generate``, with a default length limit; where its answer repeats
    itself, Whisper decodes again at a higher temperature, unless ``temperature`` is given.

    Returns one dict per talker: ``speaker`` (from 1), ``probability`` (the highest), ``text`` and
    ``windows``: dicts of ``start`` and ``end`` (seconds), ``probability`` and ``text``, one per
    window, or one per segment in which the talker is heard if Whisper itself decodes a recording
    longer than its window. With ``mode="joint"`` there is one dict for all talkers, with a list
    ``speakers`` instead of ``speaker``. Raises FileNotFoundError or ValueError if the recording
    cannot be read or arguments do not fit.
    """
    integration = integration_of(model)
    if mode not in ("separate", "joint"):
        raise ValueError(f"mode must be separate or joint, not {mode!r:.40}")
    if integration is None:
        raise ValueError("there is no separator in this model: integrate_speaker_separator first")
    if not integration.is_qwen and (prompt is not None or mode == "joint"):
        raise ValueError("Whisper writes down what is said and takes no prompt and no joint mode")
    asked = integration.settings(options.get("generation_config"), options)
    for name in MORE_THAN_TEXT:
        if (value := asked.get(name)) and (value is True or value > 1):
            raise ValueError(f"{name} is for generate: there is one text for each talker here")
    if integration.separator.is_spectrogram and not integration.is_qwen:
        # The talkers' whole spectrograms go to Whisper's own generate, past the integration's.
        recording = separate_recording(
            integration.window_separator(num_speakers), audio, num_speakers=num_speakers,
            num_bins=processor.feature_extractor.feature_size, sampling_rate=sampling_rate)
        return _decode_streams(
            integration, processor, recording, answer_options(model, processor, options))
    if mode == "joint":
        options["tokenizer"] = processor.tokenizer
    options |= {"num_speakers": num_speakers, "mode": mode}
    return _answer_windows(
        integration, model, processor, audio, sampling_rate, prompt, options)
