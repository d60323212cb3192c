"""Recordings of any length: windows, which talker is which, and one stream per talker.

A recording is read in windows that share a quarter with the next and are separated one by one.
``TalkerTracker`` numbers their streams; the windows of each talker are put together. Shapes: ``S``
streams, ``T`` frames, ``D`` mel bins or feature width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain, product
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from audio import (
    DIGITAL_SILENCE,
    FRAME_RATE,
    HOP_LENGTH,
    SAMPLING_RATE,
    AudioEncoder,
    audio_blocks,
    check_length,
    floor_log_mel,
    log_mel,
)

WINDOW_SECONDS = 30
ABSENT = -2.0  # gain of a talker in windows without it: 80 dB down
DEFAULT_PROMPT = "What does the person say?"


def window_sizes(window: int) -> tuple[int, int]:
    """Return the samples of a window and of the step to the next, in whole frames of encoders."""
    frame = 4 * HOP_LENGTH  # of the coarsest encoder
    return window, window * 3 // 4 // frame * frame


def audio_windows(
    blocks: Iterator[np.ndarray], window: int, step: int
) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (first sample, samples) of overlapping windows; the last one may be shorter."""
    held, start = np.zeros(0, np.float32), 0
    for block in blocks:
        held = np.concatenate([held, block])
        while len(held) > window:
            yield start, held[:window]
            held, start = held[step:], start + step
    yield start, held


def read_windows(audio, window: int, sampling_rate: int | None):
    """Yield first sample, samples and whether it is the only one of each window.

    The recording is read once; ValueError if it is too short.
    """
    from tqdm import tqdm

    windows = audio_windows(audio_blocks(audio, sampling_rate), window, window_sizes(window)[1])
    first = next(windows)
    check_length(audio, len(first[1]))
    second = next(windows, None)
    if second is None:
        yield *first, True
        return
    for start, samples in tqdm(chain([first, second], windows), "windows", leave=False,
                               disable=None):
        yield start, samples, False


def has_sound(part: np.ndarray, whole: np.ndarray) -> bool:
    """Say whether a part of a window is louder than 20 dB below the whole."""
    return bool(np.square(part).mean() > 0.01 * np.square(whole).mean())


# --------------------------------------------------------------------------------------------------
# Which talker is which


class TalkerTracker:
    """Numbers the talkers in the windows of one recording by first appearance.

    Every pair of a stream and a known talker gets a score: the correlation over the frames that
    adjacent windows share, minus the distance between the voices, plus a bonus for talkers found in
    many windows. A new talker has a fixed score. The assignment with the highest sum wins. A voice
    is the mean and spread of a stream's frames, changing frames weighted most; the distance up to
    which two voices can be one talker's is estimated from the windows so far.

    Adjacent windows share ``shared`` frames; at most ``most`` talkers are numbered.
    """

    # Measured on streams of two talkers: benchmarks/ABLATIONS.md.
    ALIKE = 0.8  # correlation of shared frames above which they speak for the same talker
    SHARED, OFTEN = 8.0, 2.0  # weights of the shared frames and of the number of windows

    def __init__(self, shared: int, most: int | None = None):
        self.shared, self.most = shared, most
        self.voices: list[tuple[Tensor, int]] = []  # mean voice and windows of each talker
        self.same: list[float] = []  # distances between voices of one talker,
        self.different: list[float] = []  # and of two
        self.talker_of: dict[int, int] = {}  # {stream: talker} of the last window with any talker
        self.tail = self.scale = None

    def number(self, streams: Tensor, active: Tensor, sound: bool = True) -> dict[int, int]:
        """Return {stream: talker}, from 0, of the next window's ``streams [S, T, D]``.

        ``sound`` says whether the frames shared with the window before hold any.
        """
        streams, known = streams.float(), len(self.voices)
        present = active.nonzero().flatten().tolist()
        voices = [self._voice(streams[s]) for s in present]
        distance = np.array([[float((voice - mean).square().mean().sqrt())
                              for mean, _ in self.voices] for voice in voices])
        distance = distance.reshape(len(present), known)
        alike = self._compare(streams[:, : self.shared] if sound else None, present)
        talkers = self._assign(distance, alike)
        for row, talker in enumerate(talkers):
            if talker < known and alike[row, talker] > self.ALIKE:
                self.same.append(distance[row, talker])
            self.different += [distance[row, t] for t in talkers if t != talker and t < known]
        for talker, row in sorted(zip(talkers, range(len(talkers)), strict=True)):
            self._remember(talker, voices[row])
        named = dict(zip(present, talkers, strict=True))
        self.talker_of = named or self.talker_of
        self.tail = streams[:, -self.shared :].clone() if present else None
        return named

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

    def _remember(self, talker: int, voice: Tensor) -> None:
        mean, count = self.voices[talker] if talker < len(self.voices) else (voice, 0)
        self.voices[talker : talker + 1] = [((mean * count + voice) / (count + 1), count + 1)]

    def _compare(self, head: Tensor | None, present: list[int]) -> np.ndarray:
        """Correlate shared frames [S, T, D]: [present, known talkers], NaN where it cannot be.

        Streams are compared by what sets them apart from the others: less their mean.
        """
        alike = np.full((len(present), len(self.voices)), np.nan)
        if head is None or self.tail is None or self.tail.shape != head.shape or len(head) == 1:
            return alike
        now, before = (F.normalize((x - x.mean(0)).flatten(1), dim=1) for x in (head, self.tail))
        correlation = (now @ before.T).numpy()
        for stream, talker in self.talker_of.items():
            alike[:, talker] = correlation[present, stream]
        return alike

    def _limit(self) -> float:
        """Return the distance up to which two voices are taken for one talker's."""
        # Measured: with a factor above 2 the second of two talkers is missed more often.
        if self.same and self.different:
            return 2 * math.sqrt(np.mean(self.same) * np.mean(self.different))
        known = self.same or self.different
        return 2 * np.mean(known) if known else 1e6

    def _assign(self, distance: np.ndarray, alike: np.ndarray) -> list[int]:
        """Return a talker for every stream, known or new, with the highest summed score."""
        from scipy.optimize import linear_sum_assignment

        (streams, known), limit = distance.shape, self._limit()
        unit = np.mean(self.same) if self.same else limit / 4
        often = np.log([count for _, count in self.voices])
        shared = np.nan_to_num(alike - self.ALIKE)
        score = self.SHARED * shared - distance / unit + self.OFTEN * often
        new = streams if self.most is None else min(streams, self.most - known)
        fresh = np.tile(-limit / unit - 1e-9 * np.arange(new), (streams, 1))  # the next first
        if not np.isnan(alike).any():  # all talkers were in the window before
            fresh -= self.SHARED * self.ALIKE
        _, talkers = linear_sum_assignment(np.hstack([score, fresh]), maximize=True)
        return talkers.tolist()


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


def separate_recording(
    separate: Callable, audio, encoder: AudioEncoder | None = None, num_bins: int = 80,
    most: int | None = None, sampling_rate: int | None = None,
) -> SeparatedRecording:
    """Separate a recording of any length; memory grows with the streams it returns alone.

    ``separate(features [T, D], alone) -> values [S, T, D], probabilities [S], active [S]`` is given
    each window; ``alone`` says whether it is the only one. Features are an ``encoder``'s, or
    log-mel spectrograms of ``num_bins``. ``most`` is the number of talkers in the recording, when
    known. ``audio`` and ``sampling_rate`` are those of ``audio.recording_length``, as are errors.
    """
    window, rate = round(WINDOW_SECONDS * SAMPLING_RATE), FRAME_RATE
    if encoder is not None:
        window, rate = encoder.feature_extractor.n_samples, encoder.frame_rate
    shared = window - window_sizes(window)[1]
    tracker = TalkerTracker(round(shared / SAMPLING_RATE * rate), most)
    parts, found, end = [], {}, 0
    for first, samples, alone in read_windows(audio, window, sampling_rate):
        if encoder is None:
            features = log_mel(torch.from_numpy(samples), num_bins)
        else:
            features = encoder.encode([samples])[0].cpu()
        values, probs, active = separate(features, alone)
        streams = values if encoder else floor_log_mel(features + values)
        numbers = tracker.number(streams, active, has_sound(samples[:shared], samples))
        start = round(first / SAMPLING_RATE * rate)
        skip = max(0, (end - start) // 2)  # of the frames shared, each window gives one half
        end = start + len(features)
        parts.append((slice(start + skip, end), features[skip:],
                      {n: values[s, skip:].clone() for s, n in numbers.items()}))
        for s, n in numbers.items():
            found.setdefault(n, []).append({
                "start": first / SAMPLING_RATE, "end": (first + len(samples)) / SAMPLING_RATE,
                "probability": round(float(probs[s]), 4)})
    mixture = parts[0][1].new_zeros(end, parts[0][1].shape[1])
    talkers = {n: torch.full_like(mixture, 0.0 if encoder else ABSENT) for n in sorted(found)}
    for place, features, values in parts:
        mixture[place] = features
        for n in values:
            talkers[n][place] = values[n]
    talkers = [Talker(n + 1, values, found[n]) for n, values in talkers.items()]
    return SeparatedRecording(mixture, talkers, rate, len(parts))


# --------------------------------------------------------------------------------------------------
# Answers


def build_prompt(processor, prompt: str) -> str:
    """Return the model's chat text for one recording and a question about it."""
    content = [{"type": "audio", "audio_url": "recording"}, {"type": "text", "text": prompt}]
    chat = [{"role": "system", "content": "You are a helpful assistant."},
            {"role": "user", "content": content}]
    return processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)


def ask(model, processor, recordings: list, prompt: str | None = None, **options) -> list[str]:
    """Return the text of every row that ``generate`` gives for recordings of at most one window.

    Whisper takes no prompt.
    """
    read = {"sampling_rate": SAMPLING_RATE, "return_tensors": "pt"}
    if hasattr(processor, "audio_token"):
        text = [build_prompt(processor, prompt or DEFAULT_PROMPT)] * len(recordings)
        inputs = processor(text=text, audio=recordings, padding=True, **read)
    else:
        inputs = processor.feature_extractor(recordings, return_attention_mask=True, **read)
        inputs["input_features"] = inputs["input_features"].to(model.dtype)
    ids = model.generate(**inputs.to(model.device), **options)
    prompted = inputs["input_ids"].shape[1] if "input_ids" in inputs else 0
    return decode(processor, ids[:, prompted:])


def decode(processor, ids: Tensor) -> list[str]:
    """Return the texts of token rows."""
    tokenizer = getattr(processor, "tokenizer", processor)
    return [tokenizer.decode(row, skip_special_tokens=True).strip() for row in ids]


def join_texts(texts: list[tuple[int, str]], shared: float) -> str:
    """Join the texts of windows, (number, text) each, with words of shared seconds once.

    Of the ``shared`` part of two adjacent windows' words, the longest run that ends the one and
    starts the other is taken once; a word beyond it on either side was cut by the window's edge.
    Chinese and Japanese are joined by characters.
    """
    by_character = any("\u3040" <= c <= "\u9fff" for _, text in texts for c in text)
    joined, last, room = [], None, 0
    for number, text in texts:
        words = [c for c in text if not c.isspace()] if by_character else text.split()
        now = math.ceil(1.5 * shared * len(words))
        tail, head = ([word.lower().strip(".,;:!?") for word in side]
                      for side in (joined[-room - 1 :], words[: now + 1]))
        sizes = range(min(room, now), 0, -1) if number - 1 == last else ()
        for size, cut, late in product(sizes, (0, 1), (0, 1)):
            end = len(tail) - cut
            if size <= end and tail[end - size : end] == head[late : late + size]:
                joined, words = joined[: len(joined) - cut], words[late + size :]
                break
        joined, last, room = joined + words, number, now
    return ("" if by_character else " ").join(joined)


def answer_per_talker(
    model, processor, audio, prompt: str | None = None, sampling_rate: int | None = None,
    num_speakers: int | None = None, mode: str = "separate", **options,
) -> list[dict]:
    """Ask an integrated Qwen2-Audio or Whisper about one recording of any length.

    With a spectrogram separator Whisper decodes each talker's spectrogram with its own long-form
    algorithm. Otherwise each window is answered, and the texts of windows are joined.

    Parameters
    ----------
    audio : path, or array or tensor [samples] at ``sampling_rate`` (default: 16 kHz)
    prompt : str, optional
        What to ask Qwen2-Audio about each talker; default: "What does the person say?".
    num_speakers : int, optional
        Talkers in the recording, when known; a window of a longer one may have fewer.
    mode : "separate" or "joint"
        An answer per talker, or one about all of them.
    **options
        For ``generate``.

    Returns
    -------
    list of dict
        By talker: ``speaker`` (from 1), ``probability`` (the highest), ``text`` and ``windows``,
        dicts of ``start`` and ``end`` (seconds), ``probability`` and ``text``. With
        ``mode="joint"`` one dict at most, with ``speakers``, a list, for ``speaker``.

    Raises FileNotFoundError or ValueError if the recording cannot be read or arguments do not fit.
    """
    integration = vars(getattr(model, "_orig_mod", model)).get("_speaker_integration")
    if integration is None:
        raise ValueError("there is no separator in this model: integrate_speaker_separator first")
    if not integration.is_qwen and (prompt is not None or mode == "joint"):
        raise ValueError("Whisper writes down what is said and takes no prompt and no joint mode")
    if integration.separator.is_spectrogram and not integration.is_qwen:
        recording = separate_recording(
            integration.window_separator(num_speakers), audio, None,
            processor.feature_extractor.feature_size, num_speakers, sampling_rate)
        return _transcribe(integration, processor, recording, options)
    if mode == "joint":
        options["tokenizer"] = processor.tokenizer
    call = partial(ask, model, processor, prompt=prompt, num_speakers=num_speakers, mode=mode,
                   **options)
    window, step = window_sizes(processor.feature_extractor.n_samples)
    tracker = TalkerTracker((window - step) // HOP_LENGTH // integration.stride, num_speakers)
    answers = (_answer_window(call, integration, model, tracker, window - step, *part)
               for part in read_windows(audio, window, sampling_rate))
    return _by_talker(answers, mode, 1 - step / window)


def _transcribe(integration, processor, recording: SeparatedRecording, options: dict) -> list[dict]:
    """Let Whisper decode every talker's spectrogram, all as one batch."""
    if not recording.talkers:
        return []
    streams = torch.stack([recording.stream(t) for t in recording.talkers]).transpose(1, 2)
    frames, window = streams.shape[-1], processor.feature_extractor.nb_max_frames
    padded = floor_log_mel(F.pad(streams, (0, max(0, window - frames)), value=DIGITAL_SILENCE))
    mask = (torch.arange(padded.shape[-1]) < frames).long().expand(len(streams), -1)
    model = integration.model
    inputs = {"input_features": padded.to(model.device, model.dtype),
              "attention_mask": mask.to(model.device)}
    generate = integration.original_generate()
    if frames <= window:
        texts, seconds = decode(processor, generate(**inputs, **options)), frames / FRAME_RATE
        segments = [[{"start": 0.0, "end": seconds, "text": text}] for text in texts]
    else:
        long_form = {"return_timestamps": True, "return_segments": True}
        output = generate(**inputs, **{**long_form, **options})
        texts = decode(processor, output["sequences"])
        segments = [[{"start": float(part["start"]), "end": float(part["end"]),
                      "text": decode(processor, [part["tokens"]])[0]} for part in row]
                    for row in output["segments"]]
    return [{"speaker": t.number, "probability": t.probability, "text": text,
             "windows": [{**part, "probability": t.probability} for part in parts]}
            for t, text, parts in zip(recording.talkers, texts, segments, strict=True)]


def _answer_window(
    call, integration, model, tracker, shared: int, first: int, samples: np.ndarray, alone: bool
):
    """Return start and end in seconds, (number, probability) of talkers, and a text for each."""
    def choose_rows(features, mel_mask, num_speakers):
        streams, frame_mask, talkers, _ = integration.choose_rows(
            features, mel_mask, num_speakers, at_most=not alone)
        active = torch.zeros(streams.shape[1], dtype=torch.bool)
        active[[stream for _, stream, _ in talkers]] = True
        frames = len(samples) // HOP_LENGTH // integration.stride
        sound = has_sound(samples[:shared], samples)
        numbers = tracker.number(streams[0][:, :frames].cpu(), active, sound)
        talkers.sort(key=lambda talker: numbers[talker[1]])
        return streams, frame_mask, talkers, [numbers[stream] + 1 for _, stream, _ in talkers]

    texts = call([samples], choose_rows=choose_rows)
    who = [(tracker.talker_of[stream] + 1, round(p, 4)) for _, stream, p in model.speaker_rows]
    return first / SAMPLING_RATE, (first + len(samples)) / SAMPLING_RATE, who, texts


def _by_talker(answers: Iterator, mode: str, shared: float) -> list[dict]:
    """Collect the answers of windows by talker and join their texts."""
    found: dict[int, list[tuple[int, dict]]] = {}
    key = "speakers" if mode == "joint" else "speaker"
    for number, (start, end, who, texts) in enumerate(answers):
        if mode == "joint" and who:
            who = [([n for n, _ in who], max(p for _, p in who))]
        for (said_by, probability), text in zip(who, texts, strict=True):
            window = {"start": start, "end": end, key: said_by, "probability": probability,
                      "text": text}
            row = 0 if mode == "joint" else said_by
            found.setdefault(row, []).append((number, window))
    rows = []
    for said_by, parts in sorted(found.items()):
        windows = [window for _, window in parts]
        if mode == "joint":
            said_by = sorted({n for window in windows for n in window[key]})
        text = join_texts([(number, window["text"]) for number, window in parts], shared)
        rows.append({key: said_by, "probability": max(w["probability"] for w in windows),
                     "text": text, "windows": windows})
    return rows
