"""Recordings in and out: reading, log-mel spectrograms, gains back to audio, frozen encoders.

The spectrogram is the one that every Whisper and Qwen2-Audio reads: 16 kHz, windows of 25 ms every
10 ms, 80 or 128 mel bins, ``(log10(power) + 4) / 4``. Shapes: ``T`` frames, ``D`` bins or feature
width, ``S`` talkers (streams).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
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
SHORTEST = 640  # samples: one output frame of Qwen2-Audio's encoder


def first_line(error: Exception) -> str:
    """Return the first line of an error's message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


# --------------------------------------------------------------------------------------------------
# Reading


def _open_audio(audio) -> tuple[str, int | None, Iterator[np.ndarray]]:
    """Return the name of some audio, its sampling rate if it has one, and its blocks in mono."""
    if isinstance(audio, (str, os.PathLike)):
        return str(audio), audio_info(audio).samplerate, _file_blocks(audio)
    samples = np.asarray(audio.detach().float().cpu() if isinstance(audio, Tensor) else audio)
    if samples.ndim != 1:
        raise ValueError(f"audio in memory must be mono [samples], not {list(samples.shape)}")
    starts = range(0, len(samples), READ_BLOCK)
    return "the audio", None, (samples[i : i + READ_BLOCK].astype(np.float32) for i in starts)


def _file_blocks(path) -> Iterator[np.ndarray]:
    """Yield a file's samples block by block, the channels averaged."""
    import soundfile

    try:
        with soundfile.SoundFile(path) as file:
            for block in file.blocks(READ_BLOCK, dtype="float32", always_2d=True):
                yield block.mean(axis=1)
    except soundfile.LibsndfileError as error:  # also where a file breaks off in the middle
        raise ValueError(f"cannot read audio from {path}: {error.error_string}") from None


def audio_info(path):
    """Return soundfile's header information (``frames``, ``samplerate``) of an audio file.

    Raises
    ------
    FileNotFoundError, ValueError
        If the file is missing, cannot be read or has no samples.
    """
    import soundfile

    if not Path(path).is_file():
        raise FileNotFoundError(f"no such audio file: {path}")
    try:
        info = soundfile.info(str(path))
    except soundfile.LibsndfileError as error:
        raise ValueError(f"cannot read audio from {path}: {error.error_string}") from None
    if not info.frames:
        raise ValueError(f"{path} has no samples")
    return info


def audio_blocks(audio, given_rate: int | None = None) -> Iterator[np.ndarray]:
    """Yield what ``read_audio`` returns block by block, so that memory stays flat."""
    import soxr

    name, rate, blocks = _open_audio(audio)
    rate, length = rate or given_rate or SAMPLING_RATE, 0
    stream = soxr.ResampleStream(rate, SAMPLING_RATE, 1) if rate != SAMPLING_RATE else None
    for block in blocks:
        if not np.isfinite(block).all():
            raise ValueError(f"{name} holds NaN or infinite samples")
        length += len(block)
        yield stream.resample_chunk(block) if stream else block
    if not length:
        raise ValueError(f"{name} has no samples")
    if stream:
        yield stream.resample_chunk(np.zeros(0, np.float32), last=True)


def read_audio(audio, given_rate: int | None = None) -> np.ndarray:
    """Return mono float32 samples at 16 kHz.

    Parameters
    ----------
    audio : path, or array, tensor or list [samples]
    given_rate : int, optional
        Sampling rate of samples in memory; default: 16 kHz.

    Raises
    ------
    FileNotFoundError, ValueError
        If the file is missing or unreadable, or there is no sample or a NaN in it.
    """
    return np.concatenate(list(audio_blocks(audio, given_rate)))


def recording_length(audio, given_rate: int | None = None) -> int:
    """Return the samples at 16 kHz of a recording, all of it read once.

    Raises
    ------
    FileNotFoundError, ValueError
        As ``read_audio``, and if the recording is shorter than one frame of the coarsest encoder.
    """
    length = sum(map(len, audio_blocks(audio, given_rate)))
    if length < SHORTEST:
        name = audio if isinstance(audio, (str, os.PathLike)) else "the recording"
        raise ValueError(f"{name} lasts {1000 * length / SAMPLING_RATE:.0f} ms; "
                         f"the shortest that can be separated is "
                         f"{1000 * SHORTEST // SAMPLING_RATE} ms")
    return length


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
        N_FFT // 2 + 1, num_bins, 0.0, SAMPLING_RATE / 2, SAMPLING_RATE,
        norm="slaney", mel_scale="slaney")
    return torch.from_numpy(filters.astype(np.float32)).to(device)


def _stft(waveforms: Tensor) -> Tensor:
    """Return the complex spectrum [..., frequencies, T + 1] of waveforms [..., samples]."""
    window = torch.hann_window(N_FFT, device=waveforms.device)
    pad_mode = "reflect" if waveforms.shape[-1] > N_FFT // 2 else "constant"
    return torch.stft(waveforms, N_FFT, HOP_LENGTH, window=window, pad_mode=pad_mode,
                      return_complex=True)


def log_mel(waveforms: Tensor, num_bins: int = 80) -> Tensor:
    """Return log-mel spectrograms [..., T, D] of waveforms [..., samples], one frame per 160.

    In Whisper's units but before its floor at 80 dB below the loudest bin (``floor_log_mel``).
    """
    spectrum = torch.view_as_real(_stft(waveforms)[..., :-1])  # the last frame is past the end
    power = spectrum.square().sum(-1).transpose(-1, -2)
    mel = power @ _mel_filters(num_bins, str(power.device))
    return (mel.clamp(min=1e-10).log10() + 4) / 4


def floor_log_mel(spectrograms: Tensor) -> Tensor:
    """Raise what is more than 80 dB below the loudest bin of each spectrogram [..., T, D] to that.

    80 dB are 8 in log10 of power and 2 in Whisper's units.
    """
    return torch.maximum(spectrograms, spectrograms.amax((-2, -1), keepdim=True) - 2)


def apply_gains(waveform: Tensor, gains: Tensor) -> Tensor:
    """Return the talkers' waveforms [S, samples]: gains on the mixture's spectrum, its phase kept.

    ``gains [S, T, D]`` are differences of log-mel spectrograms in Whisper's units; between the
    centres of the mel filters they are interpolated.
    """
    from transformers.audio_utils import hertz_to_mel

    spectrum, D = _stft(waveform), gains.shape[-1]  # [F, T + 1]
    hertz = np.linspace(0, SAMPLING_RATE / 2, N_FFT // 2 + 1)
    mel = torch.from_numpy(hertz_to_mel(hertz, "slaney").astype(np.float32)).to(gains.device)
    place = (mel / mel[-1] * (D + 1) - 1).clamp(0, D - 1)  # bin i is centred at i
    below = place.floor().long()
    gains = torch.lerp(gains[..., below], gains[..., (below + 1).clamp(max=D - 1)], place - below)
    gains = torch.cat([gains, gains[:, -1:]], 1)[:, : spectrum.shape[1]].transpose(1, 2)
    amplitude = 10 ** (2 * gains)  # gains are quarters of log10 power
    window = torch.hann_window(N_FFT, device=waveform.device)
    return torch.istft(
        spectrum * amplitude, N_FFT, HOP_LENGTH, window=window, length=len(waveform))


# --------------------------------------------------------------------------------------------------
# Frozen models


def load_pretrained(kind, path_or_id: str, what: str = "a model", **options):
    """Load with a class of transformers, or its name, in silence; failures raise ValueError."""
    import transformers
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        loader = getattr(transformers, kind) if isinstance(kind, str) else kind
        return loader.from_pretrained(path_or_id, **options)
    except Exception as error:  # safetensors' and the hub's own kinds among them
        reason = first_line(error)
        raise ValueError(f"cannot load {what} from {path_or_id}: {reason}") from None
    finally:
        logging.set_verbosity(verbosity)
        logging.enable_progress_bar()


def load_config(path_or_id: str, what: str = "a model"):
    """Load the configuration of a Qwen2-Audio or Whisper model; ValueError if it is neither."""
    config = load_pretrained("AutoConfig", path_or_id, what)
    if config.model_type not in ("qwen2_audio", "whisper"):
        raise ValueError(f"{path_or_id} is {config.model_type}, not Qwen2-Audio or Whisper")
    return config


def load_model(path_or_id: str, device: str = "cpu", dtype="auto"):
    """Load a frozen Qwen2-Audio or Whisper model and its processor; ValueError if it is neither."""
    name = {"qwen2_audio": "Qwen2Audio", "whisper": "Whisper"}[load_config(path_or_id).model_type]
    processor = load_pretrained("AutoProcessor", path_or_id)
    model = load_pretrained(f"{name}ForConditionalGeneration", path_or_id, dtype=dtype)
    return model.to(device).eval().requires_grad_(False), processor


class AudioEncoder(NamedTuple):
    """A frozen encoder that ends after block ``layer`` (0: its convolutions, None: its output)."""

    tower: nn.Module
    feature_extractor: object
    name: str
    layer: int | None

    @property
    def halves(self) -> bool:
        """Whether the output has half the frames, as Qwen2-Audio's has."""
        return self.layer is None and hasattr(self.tower, "avg_pooler")

    @property
    def frame_rate(self) -> float:
        """Feature frames per second."""
        return FRAME_RATE / (4 if self.halves else 2)

    def num_frames(self, samples: int) -> int:
        """Feature frames of so many samples at 16 kHz."""
        frames = (-(-samples // HOP_LENGTH) + 1) // 2
        return frames // 2 if self.halves else frames

    @torch.no_grad()
    def encode(self, waveforms: list[np.ndarray]) -> list[Tensor]:
        """Encode recordings of at most one window; returns the valid frames [T, D] of each."""
        window = self.feature_extractor.n_samples
        if (longest := max(map(len, waveforms))) > window:
            raise ValueError(
                f"the recording lasts {longest / SAMPLING_RATE:.1f} s and {self.name} reads "
                f"{window / SAMPLING_RATE:.0f} s at a time")
        inputs = self.feature_extractor(
            waveforms, sampling_rate=SAMPLING_RATE, return_attention_mask=True,
            padding="max_length", return_tensors="pt")
        weight, lengths = self.tower.conv1.weight, inputs["attention_mask"].sum(-1)
        frames = torch.arange(inputs["input_features"].shape[-1] // 2)
        inside = (frames < ((lengths - 1) // 2 + 1)[:, None]).to(weight.device)
        attention_mask = None
        if hasattr(self.tower, "avg_pooler") and not inside.all():  # Whisper reads its padding
            from transformers.masking_utils import create_bidirectional_mask

            attention_mask = create_bidirectional_mask(
                config=self.tower.config, inputs_embeds=weight.new_zeros(*inside.shape, 1),
                attention_mask=inside)
        features = inputs["input_features"].to(weight.device, weight.dtype)
        hidden = self.tower(features, attention_mask=attention_mask).last_hidden_state
        counts = [self.num_frames(len(samples)) for samples in waveforms]
        return [h[:count].float() for h, count in zip(hidden, counts, strict=True)]


def load_audio_encoder(
    path_or_id: str, layer: int | None = None, device: str = "cpu"
) -> AudioEncoder:
    """Load the encoder alone, cut after block ``layer``.

    Raises
    ------
    ValueError
        If there is no such model, it is neither Qwen2-Audio nor Whisper, or has no such block.
    """
    from transformers import Qwen2AudioEncoder
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    config = load_config(path_or_id, "an encoder")
    extractor = load_pretrained("AutoFeatureExtractor", path_or_id, "an encoder")
    kind, prefix = WhisperEncoder, "encoder"
    if config.model_type == "qwen2_audio":
        kind, prefix, config = Qwen2AudioEncoder, "audio_tower", config.audio_config
    tower, loaded = load_pretrained(
        kind, path_or_id, "an encoder", config=config, dtype=torch.float32,
        key_mapping={rf"^(model\.)?{prefix}\.": ""}, output_loading_info=True)
    if loaded["missing_keys"]:
        raise ValueError(f"{path_or_id} lacks the encoder's weight {min(loaded['missing_keys'])}")
    if layer is not None:
        if not 0 <= layer <= len(tower.layers):
            raise ValueError(
                f"layer must be 0 to {len(tower.layers)} for this encoder, not {layer}")
        tower.layers, tower.layer_norm = tower.layers[:layer], nn.Identity()
        if hasattr(tower, "avg_pooler"):
            tower.avg_pooler = nn.Identity()
    tower = tower.to(device).eval().requires_grad_(False)
    return AudioEncoder(tower, extractor, str(path_or_id), layer)
