"""Recordings of any length: windows, which talker is which, and one stream per talker.

A recording is read once, in windows that share a quarter with the next. Each window is separated on
its own; ``TalkerTracker`` gives its streams the numbers of talkers, and the windows of each talker
are put together. Shapes: ``S`` streams, ``T`` frames, ``D`` mel bins or feature width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from audio import (
    FRAME_RATE,
    HOP_LENGTH,
    SAMPLING_RATE,
    AudioEncoder,
    audio_blocks,
    floor_log_mel,
    log_mel,
    recording_length,
)

WINDOW_SECONDS = 30
ABSENT = -2.0  # gain of a talker in windows without it: 80 dB down
DEFAULT_PROMPT = "What does the person say?"


def window_sizes(window: int) -> tuple[int, int]:
    """Return a window's samples and those from its start to the next one's, a quarter shared.

    The step is whole frames of the coarsest encoder, four spectrogram frames each.
    """
    frame = 4 * HOP_LENGTH
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


def has_sound(part: np.ndarray, whole: np.ndarray) -> bool:
    """Say whether a part of a window is louder than 20 dB below the whole."""
    return bool(np.square(part).mean() > 0.01 * np.square(whole).mean())


# --------------------------------------------------------------------------------------------------
# Which talker is which


class TalkerTracker:
    """Numbers the talkers in the windows of one recording by first appearance.

    Every pair of a stream and a known talker gets a score: the correlation over the frames shared
    with the window before, minus the distance between the voices, plus a bonus for talkers seen in
    many windows. A new talker has a fixed score. The assignment with the highest sum wins. A voice
    is the mean and spread of a stream's frames, changing frames weighted most; the distance up to
    which two voices can be one talker's is estimated from the windows so far.

    Adjacent windows share ``shared`` frames; at most ``most`` talkers are numbered.
    """

    # Measured in 15 recordings of two talkers, on the streams of two separators of digits:
    ALIKE = 0.8  # correlation of shared frames above which they speak for the same talker
    SHARED, OFTEN = 2.0, 0.5  # weights of the shared frames and of the number of windows

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
        streams = streams.float()
        present = active.nonzero().flatten().tolist()
        voices = {s: self._voice(streams[s]) for s in present}
        alike = self._compare(streams[:, : self.shared], present) if sound else {}
        named, known = self._assign(voices, alike), len(self.voices)
        for s, talker in named.items():
            if alike.get((s, talker), 0.0) > self.ALIKE:
                self.same.append(self._distance(voices[s], talker))
            others = [t for t in named.values() if t != talker and t < known]
            self.different += [self._distance(voices[s], t) for t in others]
        for s in sorted(present, key=named.get):
            self._remember(named[s], voices[s])
        self.talker_of = named or self.talker_of
        self.tail = streams[:, -self.shared :].clone() if present else None
        return named

    def _voice(self, stream: Tensor) -> Tensor:
        """Return mean and spread [2 D] of a stream [T, D], in units of the features' spread."""
        if self.scale is None:
            self.scale = stream.std(0, correction=0).clamp(min=1e-6)
        change = stream.diff(dim=0, prepend=stream[:1]).norm(dim=1, keepdim=True) + 1e-9
        weight = change / change.sum()
        mean = (weight * stream).sum(0)
        spread = (weight * (stream - mean).square()).sum(0).sqrt()
        return torch.cat([mean / self.scale, spread / self.scale])

    def _distance(self, voice: Tensor, talker: int) -> float:
        return float((voice - self.voices[talker][0]).square().mean().sqrt())

    def _remember(self, talker: int, voice: Tensor) -> None:
        mean, count = self.voices[talker] if talker < len(self.voices) else (voice, 0)
        self.voices[talker : talker + 1] = [((mean * count + voice) / (count + 1), count + 1)]

    def _compare(self, head: Tensor, present: list[int]) -> dict[tuple[int, int], float]:
        """Correlate the shared frames [S, T, D] with the window before: {(stream, talker): r}."""
        if self.tail is None or self.tail.shape != head.shape:
            return {}
        now, before = (x - x.mean(1, keepdim=True) for x in (head, self.tail))
        now, before = (F.normalize(x.flatten(1), dim=1) for x in (now, before))
        alike = (now @ before.T).tolist()
        return {(s, t): alike[s][b] for s in present for b, t in self.talker_of.items()}

    def _limit(self) -> float:
        """Return the distance up to which two voices are taken for one talker's."""
        # Measured: with a factor above 2 the second of two talkers is missed more often.
        if self.same and self.different:
            return 2 * math.sqrt(np.mean(self.same) * np.mean(self.different))
        known = self.same or self.different
        return 2 * np.mean(known) if known else math.inf

    def _assign(self, voices: dict[int, Tensor], alike: dict) -> dict[int, int]:
        """Return a talker for every stream, known or new, with the highest summed score."""
        from scipy.optimize import linear_sum_assignment

        known, limit = len(self.voices), min(self._limit(), 1e6)
        unit = np.mean(self.same) if self.same else limit / 4
        new = len(voices) if self.most is None else min(len(voices), self.most - known)
        # After silence the talkers seen last are a little nearer.
        nearer = {} if alike else dict.fromkeys(self.talker_of.values(), 0.9)
        score = np.full((len(voices), known + new), -limit / unit)
        for row, (s, voice) in enumerate(voices.items()):
            for t in range(known):
                shared = alike.get((s, t), self.ALIKE) - self.ALIKE
                distance = nearer.get(t, 1.0) * self._distance(voice, t) / unit
                score[row, t] = (self.SHARED * shared - distance
                                 + self.OFTEN * math.log(self.voices[t][1]))
        if alike and len(set(self.talker_of.values())) == known:
            score[:, known:] -= self.SHARED * self.ALIKE  # all talkers were in the window before
        score[:, known:] -= 1e-9 * np.arange(new)  # the next number first
        _, talkers = linear_sum_assignment(score, maximize=True)
        return dict(zip(voices, talkers.tolist(), strict=True))


# --------------------------------------------------------------------------------------------------
# One stream per talker


class Talker(NamedTuple):
    """A talker of a recording: ``values [T, D]`` are gains of spectrograms, or features."""

    number: int
    probability: float  # the highest of all windows
    values: Tensor
    windows: list[dict]  # start and end in seconds, and probability, where it was found


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

    Parameters
    ----------
    separate : callable
        ``(features [T, D], alone) -> values [S, T, D], probabilities [S], active [S]`` of a window;
        ``alone`` says whether it is the only one.
    audio : path, or array or tensor [samples]
    encoder : AudioEncoder, optional
        Makes the features of a window; default: log-mel spectrograms of ``num_bins``.
    most : int, optional
        Talkers in the recording, when known.
    sampling_rate : int, optional
        Of samples in memory; default: 16 kHz.

    Raises
    ------
    FileNotFoundError, ValueError
        If the recording cannot be read or is too short.
    """
    length = recording_length(audio, sampling_rate)
    seconds = WINDOW_SECONDS
    if encoder is not None:
        seconds = encoder.feature_extractor.n_samples / SAMPLING_RATE
    rate = FRAME_RATE if encoder is None else encoder.frame_rate
    window, step = window_sizes(round(seconds * SAMPLING_RATE))
    count = 1 + max(0, -(-(length - window) // step))
    tracker = TalkerTracker(round((window - step) / SAMPLING_RATE * rate), most)
    frames = length // HOP_LENGTH if encoder is None else encoder.num_frames(length)
    mixture, talkers, end = None, {}, 0
    windows = audio_windows(audio_blocks(audio, sampling_rate), window, step)
    for first, samples in _progress(windows, count):
        if encoder is None:
            features = log_mel(torch.from_numpy(samples), num_bins)[: frames]
        else:
            features = encoder.encode([samples])[0].cpu()
        values, probs, active = separate(features, count == 1)
        streams = values if encoder is not None else floor_log_mel(features) + values
        sound = has_sound(samples[: window - step], samples)
        numbers = tracker.number(streams, active, sound)
        if mixture is None:
            mixture = features.new_zeros(frames, features.shape[1])
        start = round(first / SAMPLING_RATE * rate)
        skip = max(0, (end - start) // 2)  # of the frames shared, each window gives one half
        end = min(start + len(features), frames)
        part, inside = slice(start + skip, end), slice(skip, end - start)
        mixture[part] = features[inside]
        for s, number in numbers.items():
            if number not in talkers:
                absent = 0.0 if encoder is not None else ABSENT
                talkers[number] = Talker(number + 1, 0.0, torch.full_like(mixture, absent), [])
            talker = talkers[number]
            talker.values[part] = values[s, inside]
            probability = float(probs[s])
            talker.windows.append({
                "start": first / SAMPLING_RATE, "end": (first + len(samples)) / SAMPLING_RATE,
                "probability": round(probability, 4)})
            highest = max(probability, talker.probability)
            talkers[number] = talker._replace(probability=highest)
    return SeparatedRecording(mixture, [talkers[n] for n in sorted(talkers)], rate, count)


def _progress(windows: Iterator, count: int):
    """Show a progress bar where there are several windows."""
    from tqdm import tqdm

    return tqdm(windows, "windows", count, leave=False, disable=count < 2 or None)


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
    algorithm. Qwen2-Audio, and either with a separator of hidden features, answers window by
    window; the texts of windows are joined, words of shared seconds taken once.

    Parameters
    ----------
    audio : path, or array or tensor [samples]
    prompt : str, optional
        What to ask Qwen2-Audio about each talker; default: "What does the person say?".
    sampling_rate : int, optional
        Of samples in memory; default: 16 kHz.
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

    Raises
    ------
    FileNotFoundError, ValueError
        If the recording cannot be read, or model and arguments do not fit.
    """
    integration = vars(getattr(model, "_orig_mod", model)).get("_speaker_integration")
    if integration is None:
        raise ValueError("there is no separator in this model: integrate_speaker_separator first")
    if not integration.is_qwen and (prompt is not None or mode == "joint"):
        raise ValueError("Whisper writes down what is said and takes no prompt and no joint mode")
    if mode == "joint":
        options["tokenizer"] = processor.tokenizer
    call = partial(ask, model, processor, prompt=prompt, num_speakers=num_speakers, mode=mode,
                   **options)
    if integration.separator.is_spectrogram and not integration.is_qwen:
        recording = separate_recording(
            integration.window_separator(num_speakers), audio, None,
            processor.feature_extractor.feature_size, num_speakers, sampling_rate)
        return _transcribe(integration, processor, recording, options)
    window, step = window_sizes(processor.feature_extractor.n_samples)
    answers = _answer_windows(
        call, integration, model, audio, window, step, num_speakers, sampling_rate)
    return _by_talker(answers, mode, 1 - step / window)


def _transcribe(integration, processor, recording: SeparatedRecording, options: dict) -> list[dict]:
    """Let Whisper decode every talker's spectrogram, all as one batch."""
    if not recording.talkers:
        return []
    streams = torch.stack([recording.stream(t) for t in recording.talkers]).transpose(1, 2)
    frames = streams.shape[-1]
    window = processor.feature_extractor.nb_max_frames
    digital_silence = -1.5  # log10(1e-10) in Whisper's units, before the floor of each stream
    padded = floor_log_mel(F.pad(streams, (0, max(0, window - frames)), value=digital_silence))
    mask = (torch.arange(padded.shape[-1]) < frames).long().expand(len(streams), -1)
    model = integration.model
    inputs = {"input_features": padded.to(model.device, model.dtype),
              "attention_mask": mask.to(model.device)}
    generate, seconds = integration.original_generate(), frames / recording.frame_rate
    if frames <= window:
        texts = decode(processor, generate(**inputs, **options))
        segments = [[{"start": 0.0, "end": seconds, "text": text}] for text in texts]
    else:
        output = generate(**inputs, **{"return_timestamps": True, "return_segments": True,
                                       **options})
        texts = decode(processor, output["sequences"])
        segments = [[{"start": float(part["start"]), "end": float(part["end"]),
                      "text": decode(processor, [part["tokens"]])[0]} for part in row]
                    for row in output["segments"]]
    return [{"speaker": t.number, "probability": round(t.probability, 4), "text": text,
             "windows": [{**part, "probability": round(t.probability, 4)} for part in parts]}
            for t, text, parts in zip(recording.talkers, texts, segments, strict=True)]


def _answer_windows(
    call, integration, model, audio, window: int, step: int, num_speakers: int | None,
    sampling_rate: int | None,
):
    """Yield start and end in seconds, talkers and texts of each window, answered on its own."""
    length = recording_length(audio, sampling_rate)
    count = 1 + max(0, -(-(length - window) // step))
    tracker = TalkerTracker(integration.num_frames(window - step), num_speakers)
    windows = audio_windows(audio_blocks(audio, sampling_rate), window, step)
    for first, samples in _progress(windows, count):
        sound = has_sound(samples[: window - step], samples)

        frames = integration.num_frames(len(samples))

        def choose_rows(features, mel_mask, num_speakers, sound=sound, frames=frames):
            streams, frame_mask, probs = integration.split(features, mel_mask)
            active = integration.active_in_window(probs[0], num_speakers, count == 1)
            numbers = tracker.number(streams[0][:, :frames].cpu(), active.cpu(), sound)
            order = sorted(numbers, key=numbers.get)
            talkers = [(0, s, float(probs[0, s])) for s in order]
            return streams, frame_mask, talkers, [numbers[s] + 1 for s in order]

        texts = call([samples], choose_rows=choose_rows)
        who = [(tracker.talker_of[stream] + 1, p) for _, stream, p in model.speaker_rows]
        yield first / SAMPLING_RATE, (first + len(samples)) / SAMPLING_RATE, who, texts


def _by_talker(windows: Iterator, mode: str, shared: float) -> list[dict]:
    """Collect the answers of windows by talker and join their texts."""
    rows: dict[int, dict] = {}
    texts: dict[int, list] = {}
    for number, (start, end, who, answers) in enumerate(windows):
        if mode == "joint" and who:
            who = [(0, max(p for _, p in who), [n for n, _ in who])]
        for (key, probability, *speakers), text in zip(who, answers, strict=True):
            named = {"speakers": speakers[0]} if speakers else {"speaker": key}
            row = rows.setdefault(key, {**named, "probability": 0.0, "text": "", "windows": []})
            if speakers:
                row["speakers"] = sorted({*row["speakers"], *speakers[0]})
            probability = round(probability, 4)
            row["probability"] = max(row["probability"], probability)
            row["windows"].append({"start": start, "end": end, **named,
                                   "probability": probability, "text": text})
            texts.setdefault(key, []).append((number, text))
    for key, row in rows.items():
        row["text"] = join_texts(texts[key], shared)
    return [rows[key] for key in sorted(rows)]
