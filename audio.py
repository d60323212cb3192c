"""Recordings in and out: reading, log-mel spectrograms, gains back to audio, frozen models.

Spectrograms are those of every Whisper and of Qwen2-Audio: 16 kHz, 80 or 128 mel bins,
``(log10(power) + 4) / 4``. ``T`` frames, ``D`` bins or feature width, ``S`` streams.
"""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

SAMPLING_RATE = 16000  # what every Whisper and Qwen2-Audio reads
N_FFT, HOP_LENGTH = 400, 160  # samples: 25 ms every 10 ms
FRAME_RATE = SAMPLING_RATE // HOP_LENGTH  # spectrogram frames per second
READ_BLOCK = 1 << 18  # samples read at a time: 16 s at 16 kHz
CANCELLED = 0.3  # power of the sum / that of the loudest channel: channels in opposite phase
LEAD, QUIET = 10, 1e-4  # in power: 10 dB above every other channel, 40 dB below the loudest part
RATES, LOUDEST = (1000, 768_000), 1e9  # Hz; largest sample: float32 can sum its squares
# Bytes of the header that hold a file's size, and their order: WAV, AIFF, AU, RF64 and W64.
SIZED = {b"RIFF": (4, 8, "little"), b"RIFX": (4, 8, "big"), b"FORM": (4, 8, "big"),
         b".snd": (8, 12, "big"), b"RF64": (20, 28, "little"), b"riff": (16, 24, "little")}
UNKNOWN_SIZES, NEAR = (1 << 31, 1 << 32, 1 << 63, 1 << 64), 1 << 16  # of a pipe, give or take
HEADER_SLACK = 1024  # bytes by which a header may be wrong
MP3_REST = 1 << 14  # bytes past an MP3's end by its header, which may leave out a frame, and tags
UNREADABLE_SUFFIXES = {".m4a", ".mp4", ".aac", ".wma", ".webm", ".amr", ".mkv", ".mov"}
OGG_PAGE = 1 << 16  # bytes that hold the last page's header
LARGEST_NUMBER = 1e7  # in the configuration of a model: sizes, token ids, rotary base
LARGEST = {"chunk_length": 300, "feature_size": 1000, "num_beams": 100, "num_return_sequences": 100}
FIXED = {"n_fft": N_FFT, "hop_length": HOP_LENGTH, "sampling_rate": SAMPLING_RATE}
PIECE, SPAN = 60 * FRAME_RATE, 4  # frames resynthesised at a time, and those shared at an edge
ENVELOPE = 48  # samples of the cepstrum: 3 ms, shorter than a period of most voices
SHORTEST = 640  # samples: one output frame of Qwen2-Audio's encoder
LOG_MEL_RANGE = 2.0  # Whisper's floor below the loudest bin: 80 dB
DIGITAL_SILENCE = -1.5  # log-mel value of zero samples: (log10(1e-10) + 4) / 4


def first_line(error: Exception) -> str:
    """Return the first line of an error's message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:500]


# --------------------------------------------------------------------------------------------------
# Reading


_STANDARD_ERROR = threading.Lock()  # else a second thread would save and restore devnull


def _conversion(path) -> str:
    files = str(path), str(Path(path).with_suffix(".wav"))
    return f"convert it: {shlex.join(('ffmpeg', '-i', *files))}"


@contextmanager
def _reading(path):
    """Yield soundfile; its errors become ValueErrors that name the file.

    Standard error goes to devnull meanwhile, because the MP3 decoder prints warnings there.
    """
    import soundfile

    with _STANDARD_ERROR, open(os.devnull, "w") as nowhere:  # gets descriptor 2 if that is closed
        kept = os.dup(2)
        os.dup2(nowhere.fileno(), 2)
        try:
            yield soundfile
        except (soundfile.SoundFileError, TypeError, UnicodeError) as error:
            # TypeError: no header; UnicodeError: a name that is not UTF-8
            reason = first_line(error)
            if Path(path).suffix.lower() in UNREADABLE_SUFFIXES:
                reason = _conversion(path)
            raise ValueError(f"cannot read audio from {path}: {reason}") from None
        finally:
            os.dup2(kept, 2)
            os.close(kept)


@np.errstate(all="ignore")  # NaN or infinite samples are refused later
def _mix_channels(block: np.ndarray) -> np.ndarray:
    """Average the channels of ``block [samples, channels]``; if they cancel, take a loud one.

    The loudest would be another one in every block, and so would its sign.
    """
    total, powers = block.sum(axis=1), np.square(block).sum(axis=0)
    if np.square(total).sum() < CANCELLED * powers.max():
        return block[:, np.argmax(powers >= powers.max() / 2)]
    return total / block.shape[1]


def _blocks_of_file(path) -> Iterator[np.ndarray]:
    """Yield a file's samples block by block, the channels averaged."""
    with _reading(path) as soundfile:
        file = soundfile.SoundFile(path)
    # After every read of a seekable file, soundfile seeks to its position: inexact in MP3, and past
    # the damage in Ogg.
    file.seekable = lambda: False
    size, missing = READ_BLOCK // file.channels, file.frames
    spare = 0 if file.format == "OGG" else file.samplerate  # other headers may be inexact
    with file:
        while True:
            with _reading(path):
                block = file.read(size, dtype="float32", always_2d=True)
            if not len(block):
                break
            missing -= len(block)
            yield _mix_channels(block)
        if missing > spare:
            raise ValueError(f"cannot read audio from {path}: it breaks off, {missing} samples are "
                             "missing")


def _claimed_size(header: bytes) -> int:
    """Return the least size of a file in bytes by its header; 0 if the header does not tell."""
    kind = header[:4]
    if kind == b"NIST":  # SPHERE
        counts = re.findall(rb"(?:sample_count|channel_count|sample_n_bytes) -i (\d+)", header)
        return math.prod(map(int, counts)) if len(counts) == 3 else 0
    if kind not in SIZED:
        return 0
    start, end, order = SIZED[kind]
    size = int.from_bytes(header[start:end], order)
    return 0 if any(abs(size - unknown) < NEAR for unknown in UNKNOWN_SIZES) else size


def _mp3_end(file, header: bytes) -> int:
    """Return the end of an MP3 stream in bytes by its first frame; 0 if that does not tell."""
    start = 0
    if header[:3] == b"ID3":  # a tag, whose length has 7 bits in a byte
        start = 10 + sum(byte << 7 * (3 - i) for i, byte in enumerate(header[6:10]))
    file.seek(start)
    frame = file.read(80)
    at = max(frame.find(b"Xing"), frame.find(b"Info"))  # then flags, numbers of frames and bytes
    if at < 0 or len(frame) < at + 16 or not frame[at + 7] & 2:
        return 0
    place = at + 8 + 4 * (frame[at + 7] & 1)
    return start + int.from_bytes(frame[place : place + 4], "big")


def _check_end(path) -> None:
    """Fail if a file ends before it should, or if another stream follows in it.

    libsndfile reads such a file, or its first stream, as if it were complete.
    """
    size = Path(path).stat().st_size
    breaks_off = joined = False
    with open(path, "rb") as file:
        header = file.read(1024)
        if header.startswith(b"OggS"):
            file.seek(max(0, size - OGG_PAGE))
            page = file.read().rpartition(b"OggS")[2]
            sizes = page[23 : 23 + page[22]] if len(page) > 22 else b""  # of the page's segments
            breaks_off = len(page) < 23 + len(sizes) + sum(sizes) or not page[1] & 4  # last page
            joined = page[10:14] != header[14:18]  # serial numbers
        elif header.startswith((b"ID3", b"\xff")) and (end := _mp3_end(file, header)):
            file.seek(end)
            after = file.read(3)
            joined = size - end > MP3_REST and (after == b"ID3" or after[:2] >= b"\xff\xe0")
    if breaks_off or size + HEADER_SLACK < _claimed_size(header):
        raise ValueError(f"cannot read audio from {path}: it breaks off")
    if joined:
        raise ValueError(f"{path} holds several streams in a row, of which only the first would be "
                         f"read: {_conversion(path)}")


def check_rate(name, rate: int) -> None:
    """Fail unless a sampling rate is one that audio can have."""
    if not RATES[0] <= rate <= RATES[1]:
        raise ValueError(f"{name} has a sampling rate of {rate} Hz, not {RATES[0]:,} to "
                         f"{RATES[1]:,}")


def audio_info(path):
    """Return the header (``frames``, ``samplerate``) of a file, as soundfile gives it.

    Raises FileNotFoundError, or ValueError if the file cannot be read or has no samples.
    """
    if not Path(path).is_file():
        folder = ", which is a folder: name one file in it" if Path(path).is_dir() else ""
        raise FileNotFoundError(f"no such audio file: {path}{folder}")
    with _reading(path) as soundfile:
        info = soundfile.info(str(path))
    if not info.frames:
        raise ValueError(f"{path} has no samples")
    if info.frames > 1 << 62:  # a FLAC file that was written to a pipe
        raise ValueError(f"{path} does not say how long it is: {_conversion(path)}")
    check_rate(path, info.samplerate)
    _check_end(path)
    if info.frames > 100 * Path(path).stat().st_size:  # implausible: reading all checks it
        for _ in _blocks_of_file(path):
            pass
    return info


def _blocks_in_memory(audio) -> Iterator[np.ndarray]:
    """Yield samples block by block; 16-bit integers are scaled to full scale 1."""
    if isinstance(audio, Tensor):
        audio = audio.detach().cpu()
        audio = audio.float() if audio.is_floating_point() else audio
    try:
        samples = np.asarray(audio)
    except ValueError:  # such as a pair of rate and samples
        samples = np.empty(0, object)
    if samples.dtype.kind not in "fiu":
        raise ValueError(f"audio must be a path or samples, not {type(audio).__name__}")
    if samples.ndim != 1:
        raise ValueError(f"audio in memory must be mono [samples], not {list(samples.shape)}")
    if samples.dtype.kind in "iu" and samples.dtype != np.int16:
        raise ValueError(f"integers in memory must be int16, not {samples.dtype}: divide others by "
                         "their full scale")
    full_scale = 32768 if samples.dtype == np.int16 else 1
    for start in range(0, len(samples), READ_BLOCK):
        yield samples[start : start + READ_BLOCK].astype(np.float32) / full_scale


def audio_blocks(audio, sampling_rate: int | None = None) -> Iterator[np.ndarray]:
    """Yield what ``read_audio`` returns block by block, so that memory stays flat."""
    import soxr

    name, blocks, length = "the audio", _blocks_in_memory, 0
    rate = SAMPLING_RATE if sampling_rate is None else sampling_rate
    if isinstance(audio, (str, os.PathLike)):
        name, rate, blocks = audio, audio_info(audio).samplerate, _blocks_of_file
    else:
        check_rate(name, rate)
    stream = soxr.ResampleStream(rate, SAMPLING_RATE, 1) if rate != SAMPLING_RATE else None
    for block in blocks(audio):
        if not (np.abs(block) <= LOUDEST).all():
            raise ValueError(f"{name} holds NaN or infinite samples, or some beyond {LOUDEST:g}")
        block = stream.resample_chunk(block) if stream else block
        length += len(block)
        yield block
    if stream:
        block = stream.resample_chunk(np.zeros(0, np.float32), last=True)
        length += len(block)
        yield block
    if not length:
        raise ValueError(f"{name} has no samples")


def read_audio(audio, sampling_rate: int | None = None) -> np.ndarray:
    """Return mono float32 samples at 16 kHz of a path, or of an array, tensor or list [samples].

    ``sampling_rate`` is that of samples in memory (default: 16 kHz); 16-bit integers are scaled to
    full scale 1. Raises as ``audio_info`` does, and ValueError for NaN or no samples.
    """
    return np.concatenate(list(audio_blocks(audio, sampling_rate)))


def check_length(audio, length: int) -> None:
    """Raise ValueError if a recording's length in samples is below ``SHORTEST``."""
    if length < SHORTEST:
        name = audio if isinstance(audio, (str, os.PathLike)) else "the recording"
        raise ValueError(
            f"{name} lasts {1000 * length / SAMPLING_RATE:.0f} ms; the shortest that can be "
            f"separated is {1000 * SHORTEST // SAMPLING_RATE} ms")


def channels_take_turns(path) -> bool:
    """Return whether channels of a file are loud in turn, as the two sides of a recorded call are.

    They are if two or more exceed all others by ``LEAD``, each in over a tenth of the half seconds
    that hold sound. Only the first minute is read, or less if there are many channels.
    """
    with _reading(path) as soundfile, soundfile.SoundFile(path) as file:
        if file.channels == 1:
            return False
        part = file.samplerate // 2
        size = min(120 * part, 32 * READ_BLOCK // file.channels)
        block = file.read(size, dtype="float32", always_2d=True)
    parts = block[: len(block) // part * part].reshape(-1, part, block.shape[1])
    powers = np.square(parts).mean(axis=1)  # [half seconds, channels]
    second, loudest = np.sort(powers, axis=1)[:, -2:].T
    sounds = loudest > QUIET * loudest.max(initial=0)
    leaders = powers.argmax(axis=1)[sounds & (loudest > LEAD * second)]
    return int((np.bincount(leaders) > sounds.sum() / 10).sum()) > 1


def recording_doubts(path) -> list[str]:
    """Return reasons why a file may separate poorly, as phrases that follow its name."""
    doubts, rate = [], audio_info(path).samplerate
    if channels_take_turns(path):
        doubts.append("seems to have a talker per channel, as a recorded call has; its channels "
                      "are averaged here: better make a file of each")
    if rate <= 8000:
        doubts.append(f"has {rate} samples a second, nothing above {rate / 2000:g} kHz: the number "
                      "of talkers found is less reliable; give it if you know it")
    return doubts


def write_wav(path, samples: np.ndarray) -> None:
    """Write samples at 16 kHz in 24 bits, turned down together if they exceed full scale."""
    import soundfile

    peak = max(1.0, float(np.abs(samples).max(initial=0.0)))
    soundfile.write(path, samples / peak, SAMPLING_RATE, subtype="PCM_24")


# --------------------------------------------------------------------------------------------------
# Spectrograms


@cache
def _mel_filters(num_bins: int, device: str) -> Tensor:
    """Return Whisper's mel filters [frequencies, bins]."""
    from transformers.audio_utils import mel_filter_bank

    filters = mel_filter_bank(
        N_FFT // 2 + 1, num_bins, 0.0, SAMPLING_RATE / 2, SAMPLING_RATE, "slaney", "slaney")
    return torch.from_numpy(filters.astype(np.float32)).to(device)


def mel_bin(hertz: np.ndarray, num_bins: int) -> np.ndarray:
    """Convert frequencies to fractional mel bin numbers; the filter of bin i is centred at i."""
    from transformers.audio_utils import hertz_to_mel

    mel = hertz_to_mel(np.asarray(hertz, float), "slaney")
    return mel / hertz_to_mel(SAMPLING_RATE / 2, "slaney") * (num_bins + 1) - 1


def stft(waveforms: Tensor) -> Tensor:
    """Return the complex spectrum [..., frequencies, T + 1] of waveforms [samples], or several."""
    window = torch.hann_window(N_FFT, device=waveforms.device)
    pad_mode = "reflect" if waveforms.shape[-1] > N_FFT // 2 else "constant"
    return torch.stft(waveforms, N_FFT, HOP_LENGTH, window=window, pad_mode=pad_mode,
                      return_complex=True)


def istft(spectra: Tensor, samples: int) -> Tensor:
    """Return the waveforms [samples] of one or several spectra [frequencies, T + 1]."""
    window = torch.hann_window(N_FFT, device=spectra.device)
    return torch.istft(spectra, N_FFT, HOP_LENGTH, window=window, length=samples)


def log_mel_of(spectra: Tensor, num_bins: int = 80) -> Tensor:
    """Return log-mel spectrograms [..., T, D] of complex spectra [..., frequencies, T + 1].

    They are in Whisper's units, without its floor 80 dB below the loudest bin (``floor_log_mel``).
    """
    parts = torch.view_as_real(spectra[..., :-1])  # the last frame is past the end
    power = parts.square().sum(-1).transpose(-1, -2)
    mel = power @ _mel_filters(num_bins, str(power.device))
    return (mel.clamp(min=1e-10).log10() + 4) / 4


def log_mel(waveforms: Tensor, num_bins: int = 80) -> Tensor:
    """Return log-mel spectrograms of one or several waveforms [samples], one frame per 10 ms."""
    return log_mel_of(stft(waveforms), num_bins)


def floor_log_mel(spectrograms: Tensor) -> Tensor:
    """Clamp spectrograms [..., T, D] at 80 dB (2 in Whisper's units) below their loudest bin."""
    loudest = spectrograms.amax((-2, -1), keepdim=True)
    return torch.maximum(spectrograms, loudest - LOG_MEL_RANGE)


def _apply_gains(waveform: Tensor, gains: Tensor) -> Tensor:
    spectrum, D = stft(waveform), gains.shape[-1]  # [F, T + 1]
    place = mel_bin(np.linspace(0, SAMPLING_RATE / 2, N_FFT // 2 + 1), D).astype(np.float32)
    place = torch.from_numpy(place).to(gains.device).clamp(0, D - 1)
    below, above = place.floor().long(), place.ceil().long()
    gains = torch.lerp(gains[..., below], gains[..., above], place - below)  # [S, T, F]
    gains = torch.cat([gains, gains[:, -1:]], 1)[:, : spectrum.shape[1]].transpose(1, 2)
    amplitude = 10 ** (2 * gains)  # gains are quarters of log10 power
    return istft(spectrum * amplitude, len(waveform))


def apply_gains(waveform: Tensor, gains: Tensor) -> Tensor:
    """Return talkers' waveforms [S, samples]: gains on the mixture's spectrum, phase unchanged.

    ``gains [S, T, D]`` are differences of log-mel spectrograms in Whisper's units, interpolated
    between the centres of the mel filters. A long recording is processed in pieces that extend
    ``SPAN`` frames into the pieces before and after, so that no edge is heard.
    """
    talkers, T = waveform.new_empty(len(gains), len(waveform)), gains.shape[1]
    for start in range(0, T, PIECE):
        first, end = max(start - SPAN, 0), min(start + PIECE + SPAN, T)
        samples = slice(first * HOP_LENGTH, end * HOP_LENGTH if end < T else None)
        piece = _apply_gains(waveform[samples], gains[:, first:end])
        piece = piece[:, (start - first) * HOP_LENGTH :]
        talkers[:, start * HOP_LENGTH :][:, : piece.shape[1]] = piece  # the next overwrites its end
    return talkers


def change_voices(spectra: Tensor, voices: Tensor) -> Tensor:
    """Move the formants in complex spectra [..., F, T] and equalize them; the pitch is kept.

    ``voices [..., 1 + 2 K]`` hold a formant factor, then the equalizer's coefficients in dB: K of
    cosines and K of sines over log frequency. Each frame's envelope, its cepstrum up to 3 ms, is
    moved as in vocal tract length perturbation (Jaitly and Hinton, 2013).
    """
    device, bins = spectra.device, spectra.shape[-2]
    formants, equalizer = voices.split([1, voices.shape[-1] - 1], dim=-1)
    cosines, sines = equalizer.chunk(2, dim=-1)  # [..., K]
    place = torch.arange(bins, device=device)
    octave = torch.log1p(place) / math.log(bins)  # 0 to 1
    angle = torch.pi * torch.arange(1, cosines.shape[-1] + 1, device=device)[:, None] * octave
    gain = (cosines @ angle.cos() + sines @ angle.sin())[..., None] * (math.log(10) / 20)
    cepstrum = torch.fft.irfft(spectra.abs().clamp(min=1e-5).log(), n=N_FFT, dim=-2)
    late = torch.arange(N_FFT, device=device)
    late = torch.minimum(late, N_FFT - late) / ENVELOPE
    taper = 0.5 + 0.5 * torch.cos(torch.pi * late.clamp(max=1))
    envelope = torch.fft.rfft(cepstrum * taper[:, None], dim=-2).real
    source = (place / formants).clamp(max=bins - 1)[..., None]  # [..., F, 1]
    below, above = (envelope.take_along_dim(place.long(), dim=-2)
                    for place in (source.floor(), source.ceil()))
    moved = torch.lerp(below, above, source.frac())
    return spectra * (gain + (moved - envelope).clamp(-3, 3)).exp()


# --------------------------------------------------------------------------------------------------
# Frozen models


def check_numbers(folder: Path) -> None:
    """Raise ValueError if a local model's configuration has sizes that no supported model has."""

    def check(pairs: list[tuple]) -> None:
        for name, value in pairs:
            most = 1000 if name.endswith("layers") else LARGEST.get(name, LARGEST_NUMBER)
            large = isinstance(value, (int, float)) and not abs(value) <= most
            if large or value != FIXED.get(name, value):
                raise ValueError(f"{name} is {value!r:.40}")

    for path in folder.glob("*config.json"):
        if path.name != "tokenizer_config.json":  # its model_max_length is 1e30
            json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=check)


def check_size(kind: type, config, folder: Path) -> None:
    """Raise ValueError if a local model has far more weights than its files hold.

    transformers would draw the rest at random, which takes memory before the error is found.
    """
    with torch.device("meta"):
        count = sum(weight.numel() for weight in kind(config).parameters())
    files = [*folder.glob("*.safetensors"), *folder.glob("*.bin")]
    if folder.is_dir() and count > 1e6 + 4 * sum(file.stat().st_size for file in files):
        raise ValueError(f"its configuration asks for {count:,} weights, more than its files hold")


def load_pretrained(kind, path_or_id: str, **options):
    """Load with a class of transformers, or its name, in silence; failures raise ValueError."""
    import transformers
    from huggingface_hub.utils import enable_progress_bars
    from transformers.utils import logging

    verbosity, progress = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if progress:
                enable_progress_bars()  # of downloads alone, which take long
            check_numbers(Path(path_or_id))
            loader = getattr(transformers, kind) if isinstance(kind, str) else kind
            if "config" in options:
                check_size(loader, options["config"], Path(path_or_id))
            return loader.from_pretrained(path_or_id, trust_remote_code=False, **options)
    except Exception as error:  # safetensors' and the hub's own kinds among them
        where = "" if Path(path_or_id).exists() else "no such folder here; "
        reason = where + first_line(error)
        raise ValueError(f"cannot load a model from {path_or_id}: {reason}") from None
    finally:
        logging.set_verbosity(verbosity)
        if progress:
            logging.enable_progress_bar()


def load_config(path_or_id: str):
    """Load the configuration of a Qwen2-Audio or Whisper model; ValueError if it is neither."""
    config = load_pretrained("AutoConfig", path_or_id)
    if config.model_type not in ("qwen2_audio", "whisper"):
        raise ValueError(f"{path_or_id} is {config.model_type}, not Qwen2-Audio or Whisper")
    return config


def load_model(path_or_id: str, device: str = "cpu", dtype="auto"):
    """Load a frozen Qwen2-Audio or Whisper model and its processor; ValueError if it is neither.

    With ``dtype`` "auto" the model keeps the precision of its file; on a CPU float16 becomes
    float32, because most CPUs only emulate it.
    """
    config = load_config(path_or_id)
    name = {"qwen2_audio": "Qwen2Audio", "whisper": "Whisper"}[config.model_type]
    processor = load_pretrained("AutoProcessor", path_or_id)
    model, loaded = load_pretrained(f"{name}ForConditionalGeneration", path_or_id, config=config,
                                    dtype=dtype, output_loading_info=True)
    if loaded["missing_keys"]:
        raise ValueError(f"{path_or_id} lacks the weight {min(loaded['missing_keys'])}")
    if (device, dtype, model.dtype) == ("cpu", "auto", torch.float16):
        model = model.float()
    return model.to(device).eval().requires_grad_(False), processor


class AudioEncoder(NamedTuple):
    """A frozen encoder, perhaps cut after a block; ``stride`` spectrogram frames make a feature."""

    tower: nn.Module
    feature_extractor: object
    name: str
    stride: int

    @property
    def frame_rate(self) -> float:
        """Feature frames per second."""
        return FRAME_RATE / self.stride

    @torch.no_grad()
    def encode(self, waveforms: list[np.ndarray]) -> list[Tensor]:
        """Return the feature frames [T, D] of each recording; ValueError if one is too long."""
        window = self.feature_extractor.n_samples
        if (longest := max(map(len, waveforms))) > window:
            raise ValueError(
                f"the recording lasts {longest / SAMPLING_RATE:.1f} s and {self.name} reads "
                f"{window / SAMPLING_RATE:.0f} s at a time")
        inputs = self.feature_extractor(
            waveforms, sampling_rate=SAMPLING_RATE, return_attention_mask=True,
            padding="max_length", return_tensors="pt")
        weight, mask = self.tower.conv1.weight, None
        if hasattr(self.tower, "avg_pooler"):  # Qwen2-Audio; Whisper attends to its padding
            outside = inputs["attention_mask"][:, ::2].to(weight.device) == 0  # [B, T]
            mask = weight.new_zeros(outside.shape).masked_fill(
                outside, torch.finfo(weight.dtype).min)[:, None, None]
        features = inputs["input_features"].to(weight.device, weight.dtype)
        hidden = self.tower(features, attention_mask=mask).last_hidden_state
        lengths = [(math.ceil(len(w) / HOP_LENGTH) + 1) // self.stride for w in waveforms]
        return [h[:length].float() for h, length in zip(hidden, lengths, strict=True)]


def load_audio_encoder(path_or_id: str, layer: int | None = None, device="cpu") -> AudioEncoder:
    """Load the encoder alone, cut after block ``layer`` (0: convolutions only, None: not cut).

    Raises ValueError if it does not load, is not of Qwen2-Audio or Whisper, or lacks the block.
    """
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    config = load_config(path_or_id)
    extractor = load_pretrained("AutoFeatureExtractor", path_or_id)
    kind, prefix = WhisperEncoder, "encoder"
    if is_qwen := config.model_type == "qwen2_audio":
        kind, prefix, config = "Qwen2AudioEncoder", "audio_tower", config.audio_config
    tower, loaded = load_pretrained(
        kind, path_or_id, config=config, dtype=torch.float32,
        key_mapping={rf"^(model\.)?{prefix}\.": ""}, output_loading_info=True)
    if loaded["missing_keys"]:
        raise ValueError(f"{path_or_id} lacks the encoder's weight {min(loaded['missing_keys'])}")
    if layer is not None:
        if not 0 <= layer <= len(tower.layers):
            raise ValueError(
                f"layer must be 0 to {len(tower.layers)} for this encoder, not {layer}")
        tower.layers, tower.layer_norm = tower.layers[:layer], nn.Identity()
        if is_qwen:
            tower.avg_pooler = nn.Identity()
    tower = tower.to(device).eval().requires_grad_(False)
    return AudioEncoder(tower, extractor, str(path_or_id), 4 if is_qwen and layer is None else 2)
