"""Separate the talkers inside a frozen speech model.

Whisper and Qwen2-Audio hear one talker. This script trains a speaker separator that sits inside the
frozen model: features of a mixture go in, one stream per talker comes out, and the model answers
for each stream. Two separators share the interface
``features [B, T, D] -> streams [B, S, T, D], probabilities [B, S]``:

- ``SpectrogramSeparator`` reads log-mel spectrograms and fits every Whisper and Qwen2-Audio model;
- ``SpeakerSeparatorTransformer`` reads additive feature vectors, such as the simulated ones.

    python speaker_separator_module.py train --epochs=20
    python speaker_separator_module.py evaluate
    python speaker_separator_module.py integrate --model MODEL --audio a.wav
    torchrun --nproc_per_node=8 speaker_separator_module.py train ...

The first command makes a small dataset if none exists and takes some 20 minutes on a CPU core.

Shapes, everywhere: ``B`` batch, ``S`` streams, ``T`` frames, ``D`` feature width or mel bins. A
stream is one output of a separator, a talker is a person who talks; streams with a high enough
probability count as talkers. ``max_speakers`` counts streams, ``num_speakers`` talkers.

Helpers stand above their callers: read upwards from ``cmd_train`` or ``cmd_integrate``. The latter
calls ``long_recordings.answer_per_talker``.

Papers: permutation-invariant training (Yu et al., 2017, arXiv:1607.00325); talker queries that
count and separate (SepTDA, Lee et al., 2024, arXiv:2401.12473); separation inside a frozen
recogniser (Sidecar, Meng et al., 2023, arXiv:2302.09908, and in Whisper 2024, arXiv:2407.09817) and
on its own spectrogram (VoiceFilter-Lite, Wang et al., 2020, arXiv:2009.04323).

Deliberately absent: waveform separation, diarisation beyond "which talker is this stream", training
of the frozen model, configuration files.
"""

from __future__ import annotations

import os
import signal
import sys

if __name__ == "__main__":  # the imports below take seconds, in which Ctrl-C would be a traceback
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda n, _: (os.write(2, b"stopped\n"), os._exit(128 + n)))

import argparse
import contextlib
import hashlib
import importlib.util
import json
import math
import operator
import pickletools
import platform
import re
import shutil
import threading
import time
import traceback
import warnings
import zipfile
from collections import namedtuple
from collections.abc import Callable
from functools import cache, cached_property, partial
from itertools import compress, islice, permutations, product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint as checkpoint_call
from torch.utils.data import BatchSampler, DataLoader, Dataset, Subset
from tqdm import tqdm

# --------------------------------------------------------------------------------------------------
# Options

DEFAULT_DATA_DIR = "multi_speaker_data"
DEFAULT_CHECKPOINT_DIR = "checkpoints"
SHIPPED_SEPARATOR = Path(__file__).resolve().parent / "pretrained"
MAX_FRAMES = 4000  # of one feature file: attention among them takes 0.2 GB a head (measured)
JSON_BYTES = 1 << 29  # a hundred thousand mixtures of long sentences take less
SIBLINGS = ("audio", "mixing", "long_recordings", "scoring")  # files of functions used here
LONGEST_LINE = 500  # characters of an error message
MAX_STREAMS = 7  # the loss scores every assignment of streams to talkers: 7! are 5,040

OPTIONS = {  # of training: default (None: what suits the data), type, least, most and help
    "epochs": (20, int, 1, 1e6, "passes over the training mixtures"),
    "batch_size": (8, int, 1, 1e5, "mixtures per step of each process"),
    "accumulate": (1, int, 1, 1e5, "batches per step, by gradient accumulation"),
    "lr": (
        None, float, 1e-12, 1e30, "initial learning rate (default: 2e-3; features: 0.128 / width; "
        "a quarter of it with --init_from)"),
    "weight_decay": (0.01, float, 0, 1e30, "weight decay of the optimizer"),
    "num_layers": (None, int, 1, 128, "blocks on the mixture (default: 4)"),
    "num_heads": (None, int, 1, 1024, "attention heads (default: 4; features: 8)"),
    "ff_dim": (None, int, 1, 1 << 16, "feed-forward width (default: 768; features: 2048)"),
    "dim": (None, int, 1, 1 << 14, "width of the blocks, recordings only (default: 256)"),
    "dropout": (None, float, 0, 1, "dropout in every block (default: 0.1)"),
    "max_speakers": (
        None, int, 1, MAX_STREAMS, "streams (default: the most talkers in one mixture)"),
    "reconstruction_weight": (
        None, float, 0, 1e30, "weight of that loss part (default: 0.5 if features add up, else 0)"),
    "activity_weight": (
        None, float, 0, 1e30, "weight of that loss part (default: 0.02; features: 0.5)"),
    "mixtures_per_epoch": (
        None, int, 1, 1e6, "fresh mixtures (default: twice the data, at least 120)"),
    "crop_seconds": (None, float, 0.2, 1e6, "shortest and longest training crop; recordings only"),
    "workers": (0, int, 0, 1024, "processes that load or mix data, 0 for the main one"),
    "save_every": (5, int, 1, 1e6, "epochs between periodic checkpoints"),
    "patience": (None, int, 1, 1e6, "stop after this many epochs without a lower validation loss"),
    "seed": (42, int, 0, 1 << 62, "seed of weights, order, mixtures and dropout"),
}
DEFAULTS = {name: default for name, (default, *_) in OPTIONS.items()} | {
    "init_from": None, "remix": True, "recompute": False, "resume": False, "device": "auto",
    "dtype": "auto"}
TrainOptions = namedtuple("TrainOptions", DEFAULTS, defaults=DEFAULTS.values())
LIMITS = {name: limits for name, (_, *limits, _) in OPTIONS.items()}  # type, least and most
LIMITS |= {"feature_dim": (int, 1, 1 << 16), "threshold": (float, 0, 1), "port": (int, 1, 65535),
           "num_speakers": (int, 1, 1e5), "max_new_tokens": (int, 1, 1e5)}
SIZES = ("num_layers", "num_heads", "ff_dim", "dim", "dropout", "max_speakers")  # of a separator
MAX_PARAMETERS = 300_000_000  # three times the largest default; training takes 20 bytes for each


class LossWeights(NamedTuple):
    """Weights of the loss parts beside the separation error (weight 1)."""

    reconstruction: float = 0.5
    activity: float = 0.5

    def total(self, separation, reconstruction, activity):
        """Return the weighted sum of the parts."""
        return separation + self.reconstruction * reconstruction + self.activity * activity


WEIGHTS = tuple(f"{part}_weight" for part in LossWeights._fields)  # their options


def default_weights(log_mel: bool) -> LossWeights:
    """Return the weights for log-mel spectra, whose errors are small numbers, or for features."""
    return LossWeights(0.0, 0.02) if log_mel else LossWeights()


# --------------------------------------------------------------------------------------------------
# Checks of values and files


def first_line(error: Exception) -> str:
    """Return the first line of an error's message; the last if a DataLoader worker raised it."""
    lines = (str(error).strip() or type(error).__name__).splitlines()
    return lines[-1 if " in DataLoader worker" in lines[0] else 0][:LONGEST_LINE]


@contextlib.contextmanager
def reading(path, complaint: str):
    """Turn any error that a library raises about a file into a ValueError that names the file.

    Libraries raise dozens of kinds of errors on damaged files: wrap only calls of a library.
    """
    try:
        yield
    except Exception as error:
        raise ValueError(f"{path} {complaint} ({first_line(error)})") from None


def is_number(value, low: float, high: float, kind: type = float) -> bool:
    """Return whether a value is a finite number in these bounds; True and False are not numbers."""
    kinds = (int, float) if kind is float else kind
    return isinstance(value, kinds) and not isinstance(value, bool) and low <= value <= high


def check_limits(values: dict) -> None:
    """Fail if a number is outside the ``LIMITS`` of its name; None stands for a default."""
    for name, (kind, low, high) in LIMITS.items():
        if (value := values.get(name)) is None:
            continue
        pair = name == "crop_seconds"
        if pair and not (isinstance(value, (list, tuple)) and len(value) == 2):
            raise ValueError(f"crop_seconds must be two lengths, not {value!r:.40}")
        if not all(is_number(v, low, high, kind) for v in (value if pair else [value])):
            bounds = f"{low:g} {'to' if high < 1e6 else 'or more, at most'} {high:g}"
            raise ValueError(f"{name} must be {bounds}, not {value!r:.40}")


def read_json(path: Path, kind: type = object):
    """Return the content of a JSON file; ValueError if it is not JSON or not of ``kind``."""
    if path.stat().st_size > JSON_BYTES:
        raise ValueError(f"{path} is larger than {JSON_BYTES >> 20} MB")

    def refuse(name: str):
        raise ValueError(f"{name} is no number of JSON")

    with reading(path, "is not JSON"):
        content = json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)
    if not isinstance(content, kind):
        raise ValueError(f"{path} must hold an object, not a {type(content).__name__}")
    return content


def is_inside(path, folder) -> bool:
    """Return whether a path is a folder or lies in it, after following links."""
    return Path(path).resolve().is_relative_to(Path(folder).resolve())


def write_json(file, content: dict) -> None:
    """Write a file of JSON, if one is named."""
    if file is not None:
        Path(file).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def import_sibling(name: str):
    """Import a sibling file, or return None where this script stands alone."""
    exists = Path(__file__).resolve().with_name(f"{name}.py").is_file()
    return importlib.import_module(name) if exists else None


# --------------------------------------------------------------------------------------------------
# Separators: what both share


def masked_mean(values: Tensor, mask: Tensor, dim) -> Tensor:
    """Mean of ``values`` over ``dim`` where ``mask`` (broadcastable) is set; 0 where nothing is."""
    weights = mask.to(values.dtype).expand_as(values)
    return (values * weights).sum(dim) / weights.sum(dim).clamp(min=1)


def normalize(values: Tensor) -> Tensor:
    """Layer norm over the last dimension, without weights."""
    return F.layer_norm(values, values.shape[-1:])


def time_first(frames: Tensor) -> Tensor:
    """Store frames [B, T, D] time first, the layout that ``nn.MultiheadAttention`` transposes to.

    Otherwise PyTorch copies the weights for every frame when gradients are off: on a CPU with
    bfloat16, a separator of features took 6 times as long (measured).
    """
    return frames.transpose(0, 1).contiguous().transpose(0, 1)


def check_features(features: Tensor, frame_mask: Tensor | None, width: int | None = None) -> Tensor:
    """Return the frame mask [B, T] of features [B, T, D]; ValueError if a shape does not fit."""
    shape = list(features.shape)
    if len(shape) != 3 or 0 in shape or (width and shape[2] != width):
        raise ValueError(f"features must be [B, T, {width or 'mel bins'}] with B and T of 1 or "
                         f"more, not {shape}")
    if frame_mask is None:
        return features.new_ones(shape[:2], dtype=torch.bool)
    if list(frame_mask.shape) != shape[:2]:
        raise ValueError(f"frame_mask must be {shape[:2]}, not {list(frame_mask.shape)}")
    return frame_mask.bool()


def check_sizes(config: dict, width_name: str) -> None:
    """Fail unless a separator of this configuration can be built."""
    check_limits(config)
    if missing := [name for name in LIMITS if config.get(name, 0) is None]:
        raise ValueError(f"{missing[0]} must be a number, not None")
    width, num_heads = config[width_name], config["num_heads"]
    if num_heads % 2 or width % num_heads:
        raise ValueError(
            f"num_heads must be even and divide {width_name}, not {num_heads} for {width}")
    source = config.get("feature_source", {})
    rate, layer = source.get("frame_rate"), source.get("layer")
    if not ((rate is None or is_number(rate, 1e-3, 1e5))
            and (layer is None or is_number(layer, 0, 1000, int))
            and isinstance(source.get("encoder"), str | None)):
        raise ValueError("its feature_source is damaged")


class StrictHubMixin(PyTorchModelHubMixin):
    """Hub mixin whose ``from_pretrained`` refuses missing, surplus or wrongly shaped weights."""

    calibrated_on = None  # digest of the mixtures that training chose epoch and threshold on

    @classmethod
    def _load_as_safetensor(cls, model, model_file: str, map_location: str, strict: bool):
        return super()._load_as_safetensor(model, model_file, map_location, True)

    def save_pretrained(self, save_directory, *, config=None, **options):
        """Save weights and configuration, with the threshold as it is now."""
        config = config or self.config | {"threshold": self.threshold}
        source = config.get("feature_source", {})
        if Path(source.get("encoder") or "").is_absolute():  # a local path: keep its last name
            config = config | {"feature_source": source | {"encoder": Path(source["encoder"]).name}}
        folder = Path(save_directory)
        saved = super().save_pretrained(folder, config=config, **options)
        # safetensors lets nobody but the owner read what it writes
        shutil.copymode(folder / "config.json", folder / "model.safetensors")
        return saved


# --------------------------------------------------------------------------------------------------
# Separator of feature vectors


def sinusoidal_positions(num_frames: int, dim: int, device=None) -> Tensor:
    """Return the parameter-free positions [T, D] of Vaswani et al. (2017), float32."""
    rates = torch.exp(-math.log(10000.0) * torch.arange(0, dim, 2, device=device) / dim)
    angles = torch.arange(num_frames, device=device)[:, None] * rates
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)[:, :dim]


class SpeakerSeparatorTransformer(nn.Module, StrictHubMixin):
    """Splits additive feature vectors into one stream per talker, each a share of the mixture.

    ``S = max_speakers`` learned talker queries attend to the mixture's frames in ``num_layers``
    decoder blocks. Each stream is then the frames plus its query; a refinement block turns it into
    the logits of a mask, and the masks of all streams sum to 1.

    A stream whose probability reaches ``threshold``, which training calibrates, counts as a talker.
    ``feature_source`` holds ``kind``, ``encoder``, ``layer`` and ``frame_rate`` of the training
    features. Incompatible sizes raise ValueError.
    """

    is_spectrogram = False

    def __init__(
        self, feature_dim: int = 1280, max_speakers: int = 3, num_layers: int = 4,
        num_heads: int = 8, ff_dim: int = 2048, dropout: float = 0.1, threshold: float = 0.5,
        feature_source: dict | None = None,
    ):
        super().__init__()
        self.feature_dim, self.max_speakers, self.threshold = feature_dim, max_speakers, threshold
        self.feature_source = dict(feature_source or {})
        self.config = {  # arguments that build a copy
            "feature_dim": feature_dim, "max_speakers": max_speakers, "num_layers": num_layers,
            "num_heads": num_heads, "ff_dim": ff_dim, "dropout": dropout, "threshold": threshold,
            "feature_source": self.feature_source}
        check_sizes(self.config, "feature_dim")
        options = {"dim_feedforward": ff_dim, "dropout": dropout, "activation": "gelu",
                   "batch_first": True, "norm_first": True}
        self.speaker_queries = nn.Parameter(torch.randn(max_speakers, feature_dim))
        self.decoder = nn.ModuleList(
            nn.TransformerDecoderLayer(feature_dim, num_heads, **options)
            for _ in range(num_layers))
        self.refinement = nn.ModuleList(
            nn.TransformerEncoderLayer(feature_dim, num_heads // 2, **options) for _ in range(2))
        self.activity_head = nn.Sequential(
            nn.Linear(feature_dim, ff_dim), nn.GELU(), nn.Linear(ff_dim, 1))

    def forward(self, mixed_features: Tensor, frame_mask: Tensor | None = None):
        """Separate mixtures [B, T, D] into streams [B, S, T, D] and probabilities [B, S].

        Frames where ``frame_mask [B, T]`` is False do not influence the others and come out as 0.
        """
        frame_mask = check_features(mixed_features, frame_mask, self.feature_dim)
        (B, T, D), S = mixed_features.shape, self.max_speakers
        valid = frame_mask[..., None]
        mixture = torch.where(valid, mixed_features, 0.0)
        # A recording without valid frames has none to attend to: let it attend to its zeros.
        padding = ~frame_mask & frame_mask.any(1, keepdim=True)

        # Loud and soft recordings look alike inside.
        power = masked_mean(mixture.float().square().mean(-1), frame_mask, 1)
        level = (power + 1e-8).sqrt()[:, None, None]  # [B, 1, 1]
        frames = mixture / level + 0.3 * sinusoidal_positions(T, D, mixture.device)
        frames = frames.to(mixture.dtype)
        context = normalize(self.refinement[0](frames, src_key_padding_mask=padding))
        queries = self.speaker_queries.expand(B, -1, D)
        memory = time_first(context)
        for block in self.decoder:
            queries = block(queries, memory, memory_key_padding_mask=padding)

        streams = context[:, None] + normalize(queries)[:, :, None]  # [B, S, T, D]
        streams = self.refinement[1](
            streams.flatten(0, 1), src_key_padding_mask=padding.repeat_interleave(S, dim=0))
        logits = (streams.unflatten(0, (B, S)) - frames[:, None]).float()
        separated = (logits.softmax(dim=1) * mixture[:, None]).to(mixture.dtype)
        # Estimate activity from the separated streams: an empty one is no talker.
        pooled = masked_mean(separated / level[:, None], valid[:, None], 2)  # [B, S, D]
        logit = self.activity_head(pooled.to(mixture.dtype)).squeeze(-1)
        return separated, logit.float().sigmoid()


# --------------------------------------------------------------------------------------------------
# Separator of spectrograms: blocks


class Convolution(nn.Module):
    """Conformer convolution (arXiv:2005.08100) that normalizes every frame on its own."""

    def __init__(self, dim: int, kernel_size: int, dropout: float):
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(dim)
        self.gate = nn.Linear(dim, 2 * dim)
        self.depthwise = nn.Conv1d(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, frames: Tensor, valid: Tensor) -> Tensor:
        """Update ``frames [B, T, D]``; frames not set in ``valid [B, T]`` are read as 0."""
        hidden = F.glu(self.gate(self.norm(frames)), dim=-1).masked_fill(~valid[..., None], 0.0)
        hidden = self.depthwise(hidden.transpose(1, 2)).transpose(1, 2)
        return frames + self.dropout(self.out(F.silu(normalize(hidden))))


class Attention(nn.Module):
    """Self-attention over frames without position encodings: the convolutions convey the order."""

    def __init__(self, dim: int, num_heads: int, dropout: float):
        super().__init__()
        self.num_heads, self.dropout = num_heads, nn.Dropout(dropout)
        self.norm = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, frames: Tensor, bias: Tensor) -> Tensor:
        """Update ``frames [B, T, D]``; ``bias [B, 1, 1, T]`` is -inf at frames not to read."""
        qkv = self.qkv(self.norm(frames)).unflatten(-1, (3, self.num_heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # [B, heads, T, D / heads]
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return frames + self.dropout(self.out(mixed.transpose(1, 2).flatten(2)))


class Block(nn.Module):
    """Convolution, self-attention and feed-forward layers over frames."""

    def __init__(self, dim: int, num_heads: int, ff_dim: int, kernel_size: int, dropout: float):
        super().__init__()
        self.convolution = Convolution(dim, kernel_size, dropout)
        self.attention = Attention(dim, num_heads, dropout)
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(dim), nn.Linear(dim, ff_dim), nn.GELU(), nn.Linear(ff_dim, dim),
            nn.Dropout(dropout))

    def forward(self, frames: Tensor, valid: Tensor, bias: Tensor) -> Tensor:
        """Update ``frames [B, T, D]``; ``Convolution`` and ``Attention`` explain the rest."""
        frames = self.attention(self.convolution(frames, valid), bias)
        return frames + self.feed_forward(frames)


class Exchange(nn.Module):
    """Lets each stream read the mean of all streams, frame by frame (arXiv:1910.14104)."""

    def __init__(self, dim: int):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.own = nn.Linear(dim, dim)
        self.mean = nn.Linear(dim, dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, streams: Tensor) -> Tensor:
        """Update ``streams [B, S, T, D]``."""
        hidden = self.norm(streams)
        mean = hidden.mean(1, keepdim=True)
        return streams + self.out(F.gelu(self.own(hidden) + self.mean(mean)))


# --------------------------------------------------------------------------------------------------
# Separator of spectrograms: mel bins and powers

LOG_MEL_RANGE = 2.0  # Whisper's floor below the loudest bin: 80 dB
AUDIBLE_RANGE = 1.25  # errors more than 50 dB below the loudest bin do not count in training
DIGITAL_SILENCE = -1.5  # (log10(1e-10) + 4) / 4
CUT_DROP = 0.15  # 6 dB from one frame to the next: the end of a recording that is cut


def resample_bins(spectra: Tensor, bins: int) -> Tensor:
    """Resample spectra [..., D] along the mel scale to [..., bins].

    The filter of bin ``i`` of ``n`` is centred at ``(i + 1) / (n + 1)`` of the scale's length.
    Values between two centres are interpolated; past the outermost ones the nearest counts.

    >>> resample_bins(torch.tensor([1.0, 2.0, 3.0]), 7).tolist()
    [1.0, 1.0, 1.5, 2.0, 2.5, 3.0, 3.0]
    """
    D = spectra.shape[-1]
    if bins == D:
        return spectra
    ends = F.pad(spectra.reshape(-1, 1, D), (1, 1), mode="replicate")  # both ends of the scale
    found = F.interpolate(ends, bins + 2, mode="linear", align_corners=True)[..., 1:-1]
    return found.reshape(*spectra.shape[:-1], bins)


LOG_POWER = 4 * math.log(10)  # natural logarithm of the power in one of Whisper's units


def pool_bins(spectra: Tensor, bins: int) -> Tensor:
    """Pool log-mel spectra [..., D] into ``bins`` wider bins [..., bins] by averaging powers.

    The weights are triangles between the centres of the neighbouring bins, like mel filters.
    Interpolation would miss energy between the centres, such as harmonics; it is used if the new
    bins are not wider.
    """
    D = spectra.shape[-1]
    if bins >= D:
        return resample_bins(spectra, bins)
    width, device = (D + 1) / (bins + 1), spectra.device
    centres = torch.arange(1, bins + 1, device=device) * width - 1
    distance = (torch.arange(D, device=device)[:, None] - centres).abs() / width
    weights = (1 - distance).clamp(min=0)
    return (10 ** (4 * spectra) @ (weights / weights.sum(0)).to(spectra)).log10() / 4


def sounding_frames(spectrograms: Tensor, frame_mask: Tensor | None = None) -> Tensor:
    """Return which frames [B, T] of spectrograms [B, T, D] rise above the recording's floor."""
    loudest = spectrograms.amax(-1)
    if frame_mask is not None:
        loudest = loudest.masked_fill(~frame_mask, -math.inf)
    floor = loudest.amax(1, keepdim=True) - LOG_MEL_RANGE
    return loudest > floor.clamp(min=DIGITAL_SILENCE) + 1e-2  # bfloat16 rounds by 8e-3


def heard_frames(spectrograms: Tensor, frame_mask: Tensor) -> Tensor:
    """Return the sounding frames [B, T] without the last two if the recording ends within speech.

    The STFT windows of these two reach past its end, so the last one is softer. They hold a click,
    which would change the streams of the whole recording by 5% of their power (measured).
    """
    sounds = sounding_frames(spectrograms, frame_mask)
    loudest = spectrograms.amax(-1).masked_fill(~frame_mask, -math.inf)
    last = sounds.int().cumsum(1).argmax(1)[:, None]
    after, before = (last + 1).clamp(max=sounds.shape[1] - 1), (last - 1).clamp(min=0)
    drop = loudest.gather(1, before) - loudest.gather(1, last)
    cut = (after > last) & frame_mask.gather(1, after) & (drop > CUT_DROP)
    return sounds & ~(cut & (torch.arange(sounds.shape[1], device=sounds.device) >= before))


def share_mixture(gains: Tensor, probabilities: Tensor) -> Tensor:
    """Raise the gains [B, S, T, D] of all streams equally until talkers add up to the mixture.

    In each bin the power of a stream is weighted by its probability of being a talker,
    ``probabilities [B, S]``. Energy that is in no stream would be lost, and gaps harm a recogniser
    more than traces of another talker do (arXiv:2009.04323). If one stream is certain and the
    others are improbable, it becomes the mixture.

    >>> gains = torch.tensor([-1.0, -1.0]).view(1, 2, 1, 1)  # 40 dB below the mixture
    >>> [round(40 * g.item(), 1) for g in share_mixture(gains, torch.ones(1, 2)).flatten()]
    [-3.0, -3.0]
    """
    likely = probabilities.detach().clamp(min=1e-4).log()[..., None, None]
    total = torch.logsumexp(LOG_POWER * gains + likely, 1, keepdim=True) / LOG_POWER
    return (gains - total.clamp(max=0)).clamp(max=0)


def at_least(probabilities: Tensor) -> Tensor:
    """Return the probabilities [B, S] that at least 1, 2, ... S of S independent events occur.

    >>> at_least(torch.tensor([[0.5, 0.5]])).tolist()
    [[0.75, 0.25]]
    """
    exactly = torch.ones_like(probabilities[:, :1])  # 0, 1, ... events
    for occurs in probabilities.split(1, dim=1):
        exactly = F.pad(exactly * (1 - occurs), (0, 1)) + F.pad(exactly * occurs, (1, 0))
    return exactly[:, 1:].flip(1).cumsum(1).flip(1).clamp(max=1)


# --------------------------------------------------------------------------------------------------
# Separator of spectrograms: the model


class SpectrogramSeparator(nn.Module, StrictHubMixin):
    """Splits log-mel spectrograms into one spectrogram per talker, for any Whisper or Qwen2-Audio.

    It works on a grid of 80 mel bins: other numbers of bins are pooled to 80, and the gains are
    interpolated back. ``num_layers`` blocks of width ``dim`` process stacks of ``STACK`` frames of
    the mixture; after each block ``max_speakers`` talker queries attend to them. Each query then
    scales and shifts the result into its stream. Half as many blocks process the streams, which
    read the mean of all streams after every block. They output a gain of at most 0 dB for each bin.
    Outside training, two passes half a stack apart share the queries; their gains are averaged and
    multiplied by ``SOFTENING``. Finally ``share_mixture`` raises the gains until the talkers add up
    to the mixture. The gains do not depend on the recording's level, on shifts by an even number of
    frames, or on silence around speech that begins and ends in silence (speech that is cut off
    clicks, see ``heard_frames``).

    A stream whose probability reaches ``threshold``, which training calibrates, counts as a talker;
    for the likeliest stream 0.5 is enough if that is lower (``first_threshold``). Incompatible
    sizes raise ValueError.
    """

    is_spectrogram = True
    feature_dim = None  # any number of mel bins
    BINS, STACK, KERNEL_SIZE = 80, 4, 15
    SOFTENING = 0.75  # factor on the gains, which overshoot for unseen voices (measured)

    def __init__(
        self, max_speakers: int = 3, num_layers: int = 4, num_heads: int = 4, ff_dim: int = 768,
        dim: int = 256, dropout: float = 0.1, threshold: float = 0.5,
    ):
        super().__init__()
        self.max_speakers, self.threshold = max_speakers, threshold
        self.feature_source = {"kind": "recordings", "frame_rate": 100}
        self.config = {  # arguments that build a copy
            "max_speakers": max_speakers, "num_layers": num_layers, "num_heads": num_heads,
            "ff_dim": ff_dim, "dim": dim, "dropout": dropout, "threshold": threshold}
        check_sizes(self.config, "dim")
        sizes = (dim, num_heads, ff_dim, self.KERNEL_SIZE, dropout)
        self.input = nn.Linear(self.BINS * self.STACK, dim)
        self.speaker_queries = nn.Parameter(torch.randn(max_speakers, dim))
        self.mixture_blocks = nn.ModuleList(Block(*sizes) for _ in range(num_layers))
        self.query_attention = nn.ModuleList(
            nn.MultiheadAttention(dim, num_heads, batch_first=True) for _ in range(num_layers))
        self.gain = nn.Linear(dim, dim)
        self.stream_blocks = nn.ModuleList(Block(*sizes) for _ in range(max(1, num_layers // 2)))
        self.exchanges = nn.ModuleList(Exchange(dim) for _ in self.stream_blocks)
        self.output = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, self.BINS * self.STACK))
        self.attention_pool = nn.Linear(dim, 1)
        self.activity_head = nn.Sequential(nn.Linear(2 * dim, dim), nn.GELU(), nn.Linear(dim, 1))

    @property
    def _starts(self) -> tuple[int, ...]:
        """Frames of silence put before the recording in each pass."""
        return (0,) if self.training else (0, self.STACK // 2)

    def _stack(self, spectrograms: Tensor, frame_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Return stacks [B, P, T, bins] of frames on the grid, in [-1, 1], and which hold sound."""
        speaks = heard_frames(spectrograms, frame_mask)
        frames = spectrograms.masked_fill(~speaks[..., None], -math.inf)
        level = frames.amax((1, 2), keepdim=True).clamp(min=DIGITAL_SILENCE)  # finite in silence
        frames = (frames - level).clamp(min=-LOG_MEL_RANGE) + LOG_MEL_RANGE / 2
        frames, latest = pool_bins(frames, self.BINS), self._starts[-1]
        missing = -(frames.shape[1] + latest) % self.STACK
        pads = [(start, latest - start + missing) for start in self._starts]
        frames = torch.stack(
            [F.pad(frames, (0, 0, *pad), value=-LOG_MEL_RANGE / 2) for pad in pads], 1)
        valid = torch.stack([F.pad(speaks, pad) for pad in pads], 1)
        return (frames.unflatten(2, (-1, self.STACK)).flatten(3),
                valid.unflatten(2, (-1, self.STACK)).any(-1))

    def _read_mixture(self, frames: Tensor, valid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return context [B, P, T, dim] of T stacks, queries [B, S, dim], bias [B, P, 1, 1, T]."""
        B, P = valid.shape[:2]
        # Attention ignores frames without sound, unless the whole recording has none.
        ignored = ~valid & valid.flatten(1).any(1)[:, None, None]
        frames = self.input(frames.to(self.input.weight.dtype)).flatten(0, 1)
        bias = torch.zeros_like(ignored, dtype=frames.dtype).masked_fill(ignored, -math.inf)
        bias = bias[:, :, None, None]
        queries = self.speaker_queries.to(frames.dtype).expand(B, -1, -1)
        for block, attention in zip(self.mixture_blocks, self.query_attention, strict=True):
            frames = block(frames, valid.flatten(0, 1), bias.flatten(0, 1))
            memory = time_first(frames.unflatten(0, (B, P)).flatten(1, 2))  # all passes
            read, _ = attention(normalize(queries), memory, memory,
                                key_padding_mask=ignored.flatten(1), need_weights=False)
            queries = queries + read
        return normalize(frames).unflatten(0, (B, P)), normalize(queries), bias

    def _activity(self, streams: Tensor, valid: Tensor) -> Tensor:
        """Return probabilities [B, S] from an attention-weighted mean of each stream's frames.

        The k-th likeliest stream gets the probability that at least k streams are talkers, so that
        a talker split between uncertain streams still counts once.
        """
        hidden = normalize(streams)
        weights = self.attention_pool(hidden).float().masked_fill(~valid[:, None, :, None], -1e4)
        pooled = (weights.softmax(2).to(hidden.dtype) * hidden).sum(2)  # [B, S, dim]
        mean = pooled.mean(1, keepdim=True).expand_as(pooled)  # to compare each stream with
        logits = self.activity_head(torch.cat([pooled, mean], dim=-1)).squeeze(-1).float()
        order = logits.argsort(1, descending=True)
        probabilities = torch.zeros_like(logits).scatter(1, order, at_least(logits.sigmoid()))
        return probabilities * valid.any(1, keepdim=True)  # nobody talks in silence

    def gains(self, spectrograms: Tensor, frame_mask: Tensor | None = None):
        """Return the gains [B, S, T, D], 0 or less in Whisper's units, and probabilities [B, S]."""
        frame_mask = check_features(spectrograms, frame_mask)
        T, D = spectrograms.shape[1:]
        frames, valid = self._stack(spectrograms.float(), frame_mask)
        context, queries, bias = self._read_mixture(frames, valid)
        queries = queries[:, :, None, None]
        streams = context[:, None] * (1 + self.gain(queries)) + queries  # [B, S, P, T / STACK, dim]
        valid_rows, bias_rows = (
            x.repeat_interleave(self.max_speakers, 0).flatten(0, 1) for x in (valid, bias))
        for block, exchange in zip(self.stream_blocks, self.exchanges, strict=True):
            rows = block(streams.flatten(0, 2), valid_rows, bias_rows)  # a pass of a stream each
            streams = exchange(rows.view_as(streams))
        # an untrained stream is nearly the mixture: sigmoid(3) is 0.95
        gains = F.logsigmoid(self.output(streams).float() + 3)
        gains = gains.unflatten(-1, (self.STACK, self.BINS)).flatten(3, 4)  # [B, S, P, ..., bins]
        passes = [gains[:, :, i, start : start + T] for i, start in enumerate(self._starts)]
        gains = passes[0]  # the only one in training
        if not self.training:  # in use the softened means of their powers
            gains = self.SOFTENING * (torch.stack(passes).logsumexp(0) - math.log(len(passes)))
        probabilities = self._activity(streams.flatten(2, 3), valid.flatten(1))
        return resample_bins(share_mixture(gains / LOG_POWER, probabilities), D), probabilities

    def forward(self, spectrograms: Tensor, frame_mask: Tensor | None = None):
        """Separate mixtures [B, T, D] into streams [B, S, T, D] and probabilities [B, S].

        Mixtures and streams are log-mel spectrograms in Whisper's units; a stream's floor is 80 dB
        below its loudest bin. Frames where ``frame_mask [B, T]`` is False come out at the floor.
        """
        frame_mask = check_features(spectrograms, frame_mask)
        gains, probabilities = self.gains(spectrograms, frame_mask)
        mixture = spectrograms.float().masked_fill(~frame_mask[..., None], DIGITAL_SILENCE)
        speaks = sounding_frames(mixture)[:, None, :, None]
        streams = torch.where(speaks, mixture[:, None] + gains, -math.inf)
        floor = streams.detach().amax((2, 3), keepdim=True) - LOG_MEL_RANGE
        floor = torch.where(floor.isfinite(), floor, mixture[:, None])  # all silent
        return torch.maximum(streams, floor).to(spectrograms.dtype), probabilities


# --------------------------------------------------------------------------------------------------
# Loss


class SeparatorLoss(NamedTuple):
    """The combined loss, its parts before their weights (all scalars) and the assignment."""

    total: Tensor
    separation: Tensor  # mean squared error per talker
    reconstruction: Tensor  # mean squared error of the talkers' sum against the mixture
    activity: Tensor  # binary cross-entropy of the probabilities
    assignment: Tensor  # [B, S], the stream of each talker


def pairwise_mse(separated: Tensor, targets: Tensor, frame_mask: Tensor) -> Tensor:
    """Mean squared error of every stream against every talker: [B, S, S], streams first."""
    valid = frame_mask[:, None, :, None].to(separated.dtype)
    a, b = (separated * valid).flatten(2), (targets * valid).flatten(2)
    squares = a.square().sum(-1)[:, :, None] + b.square().sum(-1)[:, None, :]
    size = frame_mask.sum(1).clamp(min=1) * separated.shape[-1]
    return (squares - 2 * a @ b.transpose(1, 2)).clamp(min=0) / size[:, None, None]


@cache
def assignments(S: int, device: torch.device) -> Tensor:
    """Return every assignment [S!, S] of streams to talkers, sent to a device once."""
    return torch.tensor(list(permutations(range(S))), device=device)


def best_assignment(cost: Tensor, speaker_mask: Tensor) -> Tensor:
    """Return the stream of each talker, [B, S], with the least total ``cost [B, S, S]``.

    The cost has streams first; talkers outside ``speaker_mask [B, S]`` do not count.
    """
    S = cost.shape[1]
    orders = assignments(S, cost.device)
    talkers = torch.arange(S, device=cost.device)
    scores = (cost[:, orders, talkers] * speaker_mask[:, None].to(cost.dtype)).sum(-1)  # [B, S!]
    return orders[scores.argmin(1)]


def reorder(values: Tensor, assignment: Tensor) -> Tensor:
    """Put streams in the order of the talkers: ``values [B, S, ...]`` by ``assignment [B, S]``."""
    return values.take_along_dim(assignment[(..., *[None] * (values.dim() - 2))], dim=1)


def talker_mse(estimates: Tensor, targets: Tensor, frame_mask: Tensor) -> Tensor:
    """Mean squared error [B, S] of each talker's own estimate over valid frames."""
    return masked_mean((estimates - targets).square().mean(-1), frame_mask[:, None], -1)


def separator_loss(
    separated: Tensor, speaker_probs: Tensor, targets: Tensor, speaker_mask: Tensor,
    mixture: Tensor, frame_mask: Tensor | None = None, reconstruction_weight: float = 0.5,
    activity_weight: float = 0.5, matching_weight: float = 0.0,
) -> SeparatorLoss:
    """Score streams under their best assignment to talkers (PIT, arXiv:1607.00325).

    The assignment minimizes the squared error plus about ``matching_weight`` times the activity
    loss. Without the activity loss, the choice among identical streams would be arbitrary.

    ``separated [B, S, T, D]`` have ``speaker_probs [B, S]``; ``targets [B, S, T, D]`` are talkers
    where ``speaker_mask [B, S]`` is set, zeros elsewhere; ``mixture [B, T, D]`` is valid where
    ``frame_mask [B, T]`` is set. Set ``reconstruction_weight`` to 0 if a mixture is not the sum of
    its talkers, as for log spectra. Wrong shapes raise ValueError.
    """
    if frame_mask is None:
        frame_mask = mixture.new_ones(mixture.shape[:2], dtype=torch.bool)
    B, S, T, D = separated.shape if separated.dim() == 4 else (0, 0, 0, 0)
    for name, tensor, shape in (
            ("separated", separated, [B, S, T, D]), ("targets", targets, [B, S, T, D]),
            ("speaker_probs", speaker_probs, [B, S]), ("speaker_mask", speaker_mask, [B, S]),
            ("mixture", mixture, [B, T, D]), ("frame_mask", frame_mask, [B, T])):
        if list(tensor.shape) != shape:
            raise ValueError(f"{name} must be {shape}, not {list(tensor.shape)}")
    separated, targets, mixture = separated.float(), targets.float(), mixture.float()
    is_talker = speaker_mask.float()
    with torch.no_grad():
        odds = speaker_probs.float().clamp(1e-4, 1 - 1e-4).logit()[..., None]
        cost = pairwise_mse(separated, targets, frame_mask) - matching_weight / 2 * odds
        assignment = best_assignment(cost, is_talker)
    estimates = reorder(separated, assignment)

    separation = masked_mean(talker_mse(estimates, targets, frame_mask), is_talker, (0, 1))
    summed = (estimates * is_talker[..., None, None]).sum(1)
    reconstruction = masked_mean((summed - mixture).square().mean(-1), frame_mask, (0, 1))
    # binary_cross_entropy raises on NaN, fatally on a GPU: give it 0.5, and add the NaN afterwards.
    probs = reorder(speaker_probs.float(), assignment)
    activity = F.binary_cross_entropy(probs.nan_to_num(0.5), is_talker) + 0 * probs.sum()
    parts = separation, reconstruction, activity
    total = LossWeights(reconstruction_weight, activity_weight).total(*parts)
    return SeparatorLoss(total, *parts, assignment)


def loss_of_streams(
    separated: Tensor, probs: Tensor, batch: dict, weights: LossWeights
) -> SeparatorLoss:
    """Return the loss of a batch's streams; for recordings, activity affects the assignment.

    Unused streams of features are empty, which identifies them; those of spectrograms are not.
    """
    return separator_loss(
        separated, probs, batch["targets"], batch["speaker_mask"], batch["mixture"],
        batch["frame_mask"], *weights,
        matching_weight=weights.activity if "waveforms" in batch else 0.0)


def loss_sizes(batch: dict) -> Tensor:
    """Return the numbers [3] of talkers, frames and mixtures that the loss parts average over."""
    talkers, frames = batch["speaker_mask"].sum().float(), batch["frame_mask"].sum().float()
    return torch.stack([talkers, frames, talkers.new_full((), len(batch["mixture"]))])


# --------------------------------------------------------------------------------------------------
# Which streams are talkers


def check_num_speakers(num_speakers: int | None, streams: int) -> None:
    """Fail unless a known number of talkers fits a separator's streams."""
    if num_speakers is not None and num_speakers not in range(streams + 1):
        raise ValueError(f"num_speakers must be 0 to {streams}, not {num_speakers}: the separator "
                         "has no more streams")


def check_threshold(threshold: float | None) -> None:
    """Fail unless a threshold, if given, is in its limits; it may be a number of NumPy."""
    check_limits({"threshold": None if threshold is None else float(threshold)})


def first_threshold(separator) -> float:
    """Return the probability that suffices for the likeliest stream even below the threshold.

    It is lower for recordings, which are rarely silent.
    """
    return 0.5 if separator.is_spectrogram else 1.0


def active_streams(
    speaker_probs: Tensor, threshold: float = 0.5, num_speakers: int | None = None,
    reach_threshold: bool = False, first: float = 1.0,
) -> Tensor:
    """Return which streams are talkers [B, S]: by threshold, or the ``num_speakers`` likeliest.

    The likeliest stream needs only ``min(first, threshold)``, unless the threshold is 1. With
    ``reach_threshold``, the ``num_speakers`` likeliest must also reach the threshold.
    """
    reached = speaker_probs >= threshold
    rank = speaker_probs.argsort(-1, descending=True).argsort(-1)  # 0: the likeliest
    if first < threshold < 1:
        reached |= (rank == 0) & (speaker_probs >= first)
    if num_speakers is None:
        return reached
    check_num_speakers(num_speakers, speaker_probs.shape[-1])
    chosen = rank < num_speakers
    return chosen & reached if reach_threshold else chosen


def choose_talkers(
    separator, values: Tensor, unchanged: Tensor, probs: Tensor, threshold: float | None,
    num_speakers: int | None, reach_threshold: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return streams or gains [B, S, T, D], and which are talkers [B, S] (``active_streams``).

    If exactly one stream of a spectrogram is a talker, ``unchanged [B, T, D]`` (the mixture, or
    gains of 0) replaces it: separation can only harm a single talker. With ``num_speakers`` given,
    nothing is replaced. ``threshold`` defaults to the separator's own. Raises ValueError if the
    separator's output is not finite.
    """
    if not (values.isfinite().all() and probs.isfinite().all()):
        raise ValueError("the separator's output is not finite: its weights are damaged, or the "
                         "input is far too loud")
    check_threshold(threshold)
    threshold = separator.threshold if threshold is None else threshold
    active = active_streams(
        probs, threshold, num_speakers, reach_threshold, first_threshold(separator))
    if separator.is_spectrogram and num_speakers is None:
        single = active & (active.sum(-1, keepdim=True) == 1)
        values = torch.where(single[..., None, None], unchanged[:, None].to(values), values)
    return values, active


def calibrate_threshold(speaker_probs: Tensor, speaker_mask: Tensor, first: float = 1.0) -> float:
    """Return the threshold that gets most counts of [N, S] right; if tied, the nearest to 0.5."""
    candidates = torch.linspace(0.05, 0.95, 37)
    counts = torch.stack([
        active_streams(speaker_probs, float(candidate), first=first).sum(-1)
        for candidate in candidates])  # [candidates, N]
    right = (counts == speaker_mask.sum(-1)).float().mean(-1)
    best = candidates[right == right.max()]
    return round(float(best[(best - 0.5).abs().argmin()]), 3)


def window_separator(separator, threshold: float | None, num_speakers: int | None):
    """Return the function that ``long_recordings.separate_recording`` calls on its windows.

    A window that is not ``alone`` (the only one) may lack some of the recording's ``num_speakers``.
    For spectrograms the function returns gains, as a talker's floor depends on all windows.
    """
    separator.eval()
    weight = separator.speaker_queries  # for device and precision
    method = separator.gains if separator.is_spectrogram else separator

    @torch.inference_mode()
    def separate_windows(features: Tensor, alone: bool):
        values, probs = method(features.to(weight.device, weight.dtype))
        values, active = choose_talkers(
            separator, values, torch.zeros_like(values[:, 0]), probs, threshold, num_speakers,
            reach_threshold=not alone)
        return values.float().cpu(), probs.cpu(), active.cpu()

    return separate_windows


# --------------------------------------------------------------------------------------------------
# Metrics

LOSS_PARTS = ("total", "separation", "reconstruction", "activity")
TRIVIAL_OUTPUTS = ("zeros", "mixture", "mixture / count")
SCORES = (*LOSS_PARTS[1:], "si_sdr_improvement", *TRIVIAL_OUTPUTS)


def si_sdr(estimates: Tensor, targets: Tensor) -> Tensor:
    """Scale-invariant SDR in dB (arXiv:1811.02508) over the last dimension, [..., N] -> [...].

    >>> round(si_sdr(torch.tensor([1.0, 0.1]), torch.tensor([5.0, 0.0])).item(), 3)
    20.0
    """
    power = targets.square().sum(-1, keepdim=True).clamp(min=1e-8)
    signal = (estimates * targets).sum(-1, keepdim=True) / power * targets
    noise = estimates - signal
    return 10 * torch.log10((signal.square().sum(-1) + 1e-8) / (noise.square().sum(-1) + 1e-8))


def trivial_outputs(mixture: Tensor, speaker_mask: Tensor, log_mel: bool = False) -> dict:
    """Return the outputs that need no separator, [B, T, D] each.

    For ``log_mel`` spectrograms, "zeros" is 80 dB below the loudest bin, and "mixture / count"
    divides the amplitude.
    """
    count = speaker_mask.sum(1).clamp(min=1).to(mixture.dtype)[:, None, None]
    zeros, shared = torch.zeros_like(mixture), mixture / count
    if log_mel:
        floor = mixture.amax((1, 2), keepdim=True) - LOG_MEL_RANGE
        zeros, shared = floor.expand_as(mixture), mixture - count.log10() / 2
    return dict(zip(TRIVIAL_OUTPUTS, (zeros, mixture, shared), strict=True))


COUNT_SCORES = ("threshold", "count_accuracy", "majority_count_accuracy", "precision", "recall")


def count_scores(
    probs: Tensor, truth: Tensor, threshold: float, num_speakers=None, first: float = 1.0
) -> dict:
    """Score talker counting and activity from [N, S] probabilities in the order of the talkers.

    ``majority_count_accuracy`` is that of always answering the commonest count.
    """
    active = active_streams(probs, threshold, num_speakers, first=first)
    counts = truth.sum(1)
    hits = (active & truth).sum().item()
    return {
        "threshold": threshold,
        "count_accuracy": (active.sum(1) == counts).float().mean().item(),
        "majority_count_accuracy": (counts == counts.mode().values).float().mean().item(),
        "precision": hits / max(active.sum().item(), 1),
        "recall": hits / max(truth.sum().item(), 1),
    }


# --------------------------------------------------------------------------------------------------
# Data: what the generator wrote


def open_features(path: Path, feature_dim: int | None = None) -> np.memmap:
    """Open float features [T, D] in a .npy file without reading the values.

    FileNotFoundError if it is missing, ValueError if its number of axes, width or type is wrong.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no such feature file: {path}")
    with reading(path, "is not a .npy file of numbers"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        features = np.lib.format.open_memmap(path, mode="r")
    if features.ndim != 2 or not features.size:
        raise ValueError(f"{path} must hold [T, D] features, not {features.shape}")
    if features.dtype.kind != "f":
        raise ValueError(f"{path} must hold floating-point features, not {features.dtype}")
    if feature_dim is not None and features.shape[1] != feature_dim:
        raise ValueError(f"{path} has width {features.shape[1]}, expected {feature_dim}")
    if len(features) > MAX_FRAMES:
        raise ValueError(f"{path} holds {len(features):,} frames; {MAX_FRAMES:,} are the most that "
                         "are separated at once: cut it")
    return features


def read_features(path: Path, feature_dim: int | None = None) -> Tensor:
    """Read features as ``open_features`` does, as float32; ValueError if they are not finite."""
    with np.errstate(over="ignore"):
        features = np.array(open_features(path, feature_dim), dtype=np.float32)
    if not np.isfinite(features).all():
        raise ValueError(f"{path} holds NaN, infinite or too large values")
    return torch.from_numpy(features)


class MultiSpeakerDataset(Dataset):
    """The mixtures of one split, "train" or "val", as ``generate_multi_speaker_dataset.py`` wrote.

    Items are dicts: ``mixture [T, D]``, ``targets [n, T, D]`` of a dataset of features, or
    ``waveforms [1 + n, samples]``, mixture first, of a dataset of recordings. FileNotFoundError or
    ValueError if the dataset is missing or empty, or its metadata or files do not fit each other.
    """

    def __init__(self, data_dir, split: str):
        self.data_dir, self.split = Path(data_dir), split
        self.folder = self.data_dir / split
        path, about = self.folder / "metadata.json", self.data_dir / "dataset.json"
        if not path.is_file():
            raise FileNotFoundError(
                f"no dataset at {path}; make one: python generate_multi_speaker_dataset.py "
                f"--output_dir={data_dir}")
        self.samples = read_json(path)
        if not isinstance(self.samples, list) or not self.samples:
            raise ValueError(f"{path} lists no mixtures; generate the dataset again")
        self.source = read_json(about, dict) if about.is_file() else {}
        try:
            first = self.samples[0]
            self.has_recordings = "mixed_audio" not in first
            self.feature_dim = None if self.has_recordings else operator.index(first["feature_dim"])
            self.max_speakers = max(len(sample["speakers"]) for sample in self.samples)
            for sample in self.samples:
                self._check_facts(sample)
                self._check_lengths(sample)
        except KeyError as error:
            raise ValueError(f"{path} misses an entry: {error}") from None
        except (AttributeError, TypeError) as error:
            raise ValueError(f"{path} is damaged: {error}") from None

    @cached_property
    def digest(self) -> str:
        """Tells datasets apart: SHA-256 of the metadata."""
        return hashlib.sha256(json.dumps(self.samples).encode()).hexdigest()

    @cached_property
    def is_sum(self) -> bool:
        """Whether the features of a mixture are the sum of its talkers' features."""
        if self.has_recordings or self.source.get("kind") == "speech":
            return False
        several = (i for i, s in enumerate(self.samples) if len(s["speakers"]) > 1)
        probe = self[next(several, 0)]  # one talker alone is always a sum
        return torch.allclose(probe["targets"].sum(0), probe["mixture"], atol=1e-4)

    def files(self, sample: dict, recordings: bool | None = None) -> list[Path]:
        """Return the paths of a sample's mixture and of each talker: recordings or features."""
        wavs = self.has_recordings if recordings is None else recordings
        mixed, single = ("mixed_wav", "wav_file") if wavs else ("mixed_audio", "feature_file")
        names = [sample[mixed], *(speaker[single] for speaker in sample["speakers"])]
        paths, folder = [self.folder / name for name in names], self.folder.resolve()
        for path in paths:
            if not path.resolve().is_relative_to(folder):
                raise ValueError(
                    f"{self.folder / 'metadata.json'} names a file outside its folder: {path}")
        return paths

    def _check_facts(self, sample: dict) -> None:
        """Fail unless the id, texts, overlap and number of speakers of a sample make sense."""
        overlap, names, listed = sample.get("overlap"), [sample["id"]], len(sample["speakers"])
        if (count := sample.get("num_speakers", listed)) != listed:
            raise ValueError(f"{self.folder / 'metadata.json'} says that {sample['id']} has "
                             f"{count} speakers and lists {listed}")
        names += [str(speaker["speaker_id"]) for speaker in sample["speakers"]]
        texts = [speaker.get("text") or "" for speaker in sample["speakers"]]
        if not all(isinstance(text, str) for text in names + texts):
            raise TypeError("id and text must be strings")
        if not (overlap is None or is_number(overlap, 0, 1)):
            raise TypeError(f"overlap is {overlap!r:.40}")

    def _check_lengths(self, sample: dict) -> None:
        if self.has_recordings:
            from audio import audio_info

            lengths = {audio_info(path).frames for path in self.files(sample)}
        else:
            lengths = {len(open_features(path, self.feature_dim)) for path in self.files(sample)}
        if len(lengths) > 1:
            raise ValueError(f"sources and mixture of {sample['id']} differ in length "
                             f"({self.folder}): {sorted(lengths)}")

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict:
        paths = self.files(self.samples[index])
        if self.has_recordings:
            from audio import read_audio

            return {"waveforms": torch.from_numpy(np.stack([read_audio(p) for p in paths]))}
        features = torch.stack([read_features(path, self.feature_dim) for path in paths])
        return {"mixture": features[0], "targets": features[1:]}

    def files_by_talker(self) -> dict[str, list[Path]]:
        """Return the single-talker files of every talker."""
        talkers: dict[str, list[Path]] = {}
        for sample in self.samples:
            for speaker, path in zip(sample["speakers"], self.files(sample)[1:], strict=True):
                talkers.setdefault(str(speaker["speaker_id"]), []).append(path)
        return talkers


# --------------------------------------------------------------------------------------------------
# Data: fresh mixtures


class RemixedDataset(Dataset):
    """Fresh mixtures of the training sources, from silence to ``max_speakers`` talkers.

    Item ``number`` depends only on the seed and the number; epoch ``e`` starts at item
    ``e * length``. So no mixture repeats within a run of constant ``length``, and a resumed run
    draws the same mixtures. Subclasses read the sources of each talker (``_read_sources``) and
    draw the number of talkers (``_draw_talkers``).
    """

    SILENCE = 0.04  # share of mixtures without any talker
    LEAST, TIMES = 120, 2  # mixtures per epoch: sources make many more mixtures than the data has

    def __init__(self, base: MultiSpeakerDataset, options: TrainOptions, max_speakers: int):
        self.base, self.seed, self.crop_seconds = base, options.seed, options.crop_seconds
        self.length = options.mixtures_per_epoch or max(self.TIMES * len(base), self.LEAST)
        self.talkers = self._read_sources()
        self.max_speakers = min(max_speakers, len(self.talkers))

    def __len__(self) -> int:
        return self.length

    def draw_count(self, number: int) -> tuple[np.random.Generator, int]:
        """Return the random generator of a mixture and how many talkers it has."""
        rng = np.random.default_rng([self.seed, number])
        if rng.random() < self.SILENCE:
            return rng, 0
        return rng, self._draw_talkers(rng)


class RemixedFeatures(RemixedDataset):
    """Sums of source features of different talkers, each rolled to start at a random frame."""

    def _read_sources(self) -> dict[str, list[Path]]:
        return self.base.files_by_talker()

    def _draw_talkers(self, rng: np.random.Generator) -> int:
        """Draw the number of talkers uniformly from 1 to ``max_speakers``."""
        return int(rng.integers(1, self.max_speakers, endpoint=True))

    def __getitem__(self, number: int) -> dict:
        rng, count = self.draw_count(number)
        talkers = list(self.talkers.values())
        drawn = rng.choice(len(talkers), size=max(count, 1), replace=False)
        files = [talkers[i][rng.integers(len(talkers[i]))] for i in drawn]
        sources = nn.utils.rnn.pad_sequence(
            [read_features(path, self.base.feature_dim) for path in files], batch_first=True)
        T = sources.shape[1]
        targets = torch.stack([source.roll(int(rng.integers(T)), dims=0) for source in sources])
        return {"mixture": targets[:count].sum(0), "targets": targets[:count]}


class RemixedRecordings(RemixedDataset):
    """Fresh mixtures of the recordings in utterances.json; the dataset's own are not read."""

    def _read_sources(self) -> dict:
        from generate_multi_speaker_dataset import load_source

        self.speech = load_source(self.base.data_dir, self.base.split)
        return self.speech.by_speaker

    def _draw_talkers(self, rng: np.random.Generator) -> int:
        """Draw a number with probability proportional to it: hard mixtures are seen more often."""
        numbers = np.arange(1, self.max_speakers + 1)
        return int(rng.choice(numbers, p=numbers / numbers.sum()))

    def draw_length(self, number: int) -> tuple[np.random.Generator, int, float]:
        """Return the generator, the number of talkers and the length of the crop in seconds.

        It needs no plan, so sorting batches by length is cheap.
        """
        rng, count = self.draw_count(number)
        share = rng.random()  # drawn in any case: crop_seconds does not change the mixtures
        if self.crop_seconds is None:
            return rng, count, math.inf
        least, most = self.crop_seconds
        return rng, count, least + (most - least) * share

    def plan(self, number: int):
        """Return the plan of a mixture, and the start and length of its crop in seconds.

        The centre of the crop is a random time between the latest start and the earliest end of a
        talker: where all of them talk, or otherwise between two of them.
        """
        from mixing import plan_mixture

        rng, count, length = self.draw_length(number)
        plan = plan_mixture(rng, self.speech, count)
        last_start = max((talker.onset for talker in plan.talkers), default=0.0)
        first_end = min((t.onset + t.seconds for t in plan.talkers), default=plan.seconds)
        length = min(length, plan.seconds)
        centre = rng.uniform(*sorted((last_start, first_end)))
        return plan, min(max(centre - length / 2, 0.0), plan.seconds - length), length

    def seconds(self, number: int) -> float:
        """Return the length of a mixture without rendering it; of a crop, its upper bound."""
        if self.crop_seconds is None:
            return self.plan(number)[0].seconds
        return self.draw_length(number)[2]

    def __getitem__(self, number: int) -> dict:
        from audio import SAMPLING_RATE
        from mixing import render_mixture

        plan, start, length = self.plan(number)
        voices = [talker.voice for talker in plan.talkers]
        plan = plan._replace(talkers=tuple(t._replace(voice=()) for t in plan.talkers))
        sources, mixture = render_mixture(plan, self.speech.options.max_seconds)
        waveforms = np.concatenate([mixture[None], sources])
        if self.crop_seconds:
            first = round(start * SAMPLING_RATE)
            waveforms = waveforms[:, first : first + round(length * SAMPLING_RATE)]
            audible = np.abs(waveforms) > 1e-5  # reverberation by FFT leaves 1e-8 in pauses
            kept = np.count_nonzero(audible, axis=1) > SAMPLING_RATE // 10
            kept[0] = True  # the mixture
            waveforms, voices = waveforms[kept], list(compress(voices, kept[1:]))
        item = {"waveforms": torch.from_numpy(waveforms)}
        return item | {"voices": torch.tensor(voices)} if any(voices) else item


# --------------------------------------------------------------------------------------------------
# Data: what a batch holds


def collate(items: list[dict], max_speakers: int, compact: bool = False) -> dict:
    """Pad items into a batch with two masks.

    Features: ``mixture [B, T, D]``, ``targets [B, S, T, D]``, ``frame_mask [B, T]``. Recordings:
    ``waveforms [R, samples]`` of mixtures and talkers, ``rows [R]``, their indices into the
    flattened ``[B, 1 + S]`` (``by_mixture``), ``lengths [B]`` in samples, and ``voices [R, ...]``
    if voices are changed. Both: ``speaker_mask [B, S]``.

    ``compact`` batches, for a GPU, take half the memory and have few shapes: waveforms are float16
    and padded to whole seconds, and silent ones fill up their number to a multiple of 32.
    """
    recorded, S = "waveforms" in items[0], max_speakers
    stacks = [item["waveforms"] if recorded else
               torch.cat([item["mixture"][None], item["targets"]]) for item in items]
    counts, lengths = torch.tensor([stack.shape[:2] for stack in stacks]).T
    is_used = torch.arange(1 + S) < counts[:, None]
    if recorded:
        return {"speaker_mask": is_used[:, 1:], "lengths": lengths} | _pack(items, is_used, compact)
    padded = stacks[0].new_zeros(len(items), 1 + S, int(lengths.max()), stacks[0].shape[2])
    for place, stack in zip(padded, stacks, strict=True):
        place[: len(stack), : stack.shape[1]] = stack
    return {"speaker_mask": is_used[:, 1:], "mixture": padded[:, 0], "targets": padded[:, 1:],
            "frame_mask": torch.arange(padded.shape[2]) < lengths[:, None]}


def _pack(items: list[dict], is_used: Tensor, compact: bool) -> dict:
    """Pack recordings, set in ``is_used [B, 1 + S]``, into the tensors that ``collate`` names."""
    from audio import SAMPLING_RATE

    waveforms = [waveform for item in items for waveform in item["waveforms"]]
    longest, silent, dtype = max(map(len, waveforms)), 0, waveforms[0].dtype
    if compact:
        longest += -longest % SAMPLING_RATE
        silent, dtype = -len(waveforms) % 32, torch.float16
    padded = torch.zeros(len(waveforms) + silent, longest, dtype=dtype)
    for place, waveform in zip(padded, waveforms, strict=False):
        place[: len(waveform)] = waveform
    # Row numbers, as indexing by a mask would wait for the GPU; silent waveforms get a spare one.
    rows = F.pad(is_used.flatten().nonzero().flatten(), (0, silent), value=is_used.numel())
    batch = {"waveforms": padded, "rows": rows}
    if changed := [item["voices"] for item in items if "voices" in item]:
        own = F.pad(torch.ones(1, 1), (0, changed[0].shape[1] - 1))  # as it is
        voices = [torch.cat([own, item.get("voices", own[:0])]) for item in items]
        batch["voices"] = torch.cat([*voices, own.expand(silent, -1)])
    return batch


def by_mixture(values: Tensor, batch: dict) -> Tensor:
    """Scatter values [R, ...] to the ``rows`` of a batch, [B, 1 + S, ...]; 0 elsewhere."""
    B, S = batch["speaker_mask"].shape
    spread = values.new_zeros(B * (1 + S) + 1, *values.shape[1:])
    spread[batch["rows"]] = values
    return spread[:-1].unflatten(0, (B, 1 + S))


def change_talkers(spectra: Tensor, batch: dict) -> Tensor:
    """Give the talkers of a batch their ``voices``, each as loud as before.

    ``spectra [R, frequencies, frames]`` are those of the batch's ``rows``; each mixture gets the
    sum of its talkers' changes.
    """
    from audio import change_voices

    (B, S), rows = batch["speaker_mask"].shape, batch["rows"]
    size = 4 if spectra.device.type == "cpu" else len(rows)  # few at a time stay in its cache
    changed = torch.cat([change_voices(*part) for part in zip(
        spectra.split(size), batch["voices"].split(size), strict=True)])
    before, after = (x.abs().square().sum((1, 2), keepdim=True) for x in (spectra, changed))
    change = torch.view_as_real(changed * (before / after.clamp(min=1e-12)).sqrt() - spectra)
    mixture, place = rows // (1 + S), rows % (1 + S)
    together = change.new_zeros(B + 1, *change.shape[1:]).index_add(0, mixture, change)
    change = torch.where((place == 0)[:, None, None, None], together[mixture], change)
    return spectra + torch.view_as_complex(change)


def add_spectrograms(batch: dict, num_bins: int = SpectrogramSeparator.BINS) -> dict:
    """Make mixture, targets and frame mask of a batch of recordings, on the batch's device."""
    if "waveforms" not in batch:
        return batch
    from audio import HOP_LENGTH, N_FFT, floor_log_mel, log_mel_of, stft

    T = max(1, batch["waveforms"].shape[-1] // HOP_LENGTH)
    # Pad the longest recording too, so that no last frame depends on the rest of the batch.
    spectra = stft(F.pad(batch["waveforms"].float(), (0, N_FFT)))
    if "voices" in batch:
        spectra = change_talkers(spectra, batch)
    spectrograms = by_mixture(floor_log_mel(log_mel_of(spectra, num_bins)[:, :T]), batch)
    lengths = (batch["lengths"] // HOP_LENGTH).clamp(min=1)
    return batch | {"mixture": spectrograms[:, 0], "targets": spectrograms[:, 1:],
                    "frame_mask": torch.arange(T, device=lengths.device) < lengths[:, None]}


# --------------------------------------------------------------------------------------------------
# Data: batches of an epoch


def batches_of_like_length(order: list[int], seconds, size: int, random: torch.Generator):
    """Sort every 16 batches' worth of items by length, which saves padding; shuffle the batches."""
    for group in BatchSampler(order, 16 * size, drop_last=False):
        batches = list(BatchSampler(sorted(group, key=seconds), size, drop_last=False))
        yield from (batches[i] for i in torch.randperm(len(batches), generator=random).tolist())


class EpochBatches:
    """Batch sampler: shuffled item numbers of one epoch, ``RemixedRecordings`` grouped by length.

    A step takes ``accumulate`` batches in every process, which form one large batch. The last step
    may be smaller; it is dropped if one of its batches would be empty. ``train_epoch`` sets
    ``epoch`` and ``start``, the first step to take.
    """

    start = 0

    def __init__(
        self, dataset: Dataset, batch_size: int, seed: int, epoch: int, accumulate: int = 1
    ):
        self.dataset, self.seed, self.epoch, self.accumulate = dataset, seed, epoch, accumulate
        self.rank, self.ranks = process_rank()
        self.parts = self.ranks * accumulate
        self.step_size = batch_size * self.parts

    def __len__(self) -> int:
        steps = (len(self.dataset) + self.step_size - self.parts) // self.step_size
        return (steps - self.start) * self.accumulate

    def steps(self):
        """Yield the item numbers of each step, of all processes together."""
        random = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(len(self.dataset), generator=random)
        if isinstance(self.dataset, RemixedDataset):
            order += self.epoch * len(self.dataset)
        steps = BatchSampler(order.tolist(), self.step_size, drop_last=False)
        if isinstance(self.dataset, RemixedRecordings):
            steps = batches_of_like_length(
                order.tolist(), self.dataset.seconds, self.step_size, random)
        return (step for step in steps if len(step) >= self.parts)

    def __iter__(self):
        for step in islice(self.steps(), self.start, None):
            yield from (step[i :: self.parts] for i in range(self.rank, self.parts, self.ranks))


def make_loader(
    dataset: Dataset, batch_size: int, max_speakers: int, device: str = "cpu",
    workers: int = 0, seed: int | None = None, epoch: int = 0, accumulate: int = 1,
) -> DataLoader:
    """Return batches of a dataset: in order, or shuffled by a seed and epoch."""
    batches = {"batch_size": batch_size}
    if seed is not None:
        batches = {"batch_sampler": EpochBatches(dataset, batch_size, seed, epoch, accumulate)}
    on_cuda = device == "cuda"  # page-locked batches copy faster; each new shape takes 1.3 s
    return DataLoader(
        dataset, **batches, num_workers=workers, persistent_workers=workers > 0,
        worker_init_fn=outlast_signals, pin_memory=on_cuda,
        collate_fn=partial(collate, max_speakers=max_speakers, compact=on_cuda))


# --------------------------------------------------------------------------------------------------
# Devices: one small function per decision


def pick_device(name: str = "auto") -> str:
    """Return "cuda", "mps" or "cpu"; "auto" takes the first that is there."""
    mps = torch.backends.mps.is_available()
    available = {"cuda": torch.cuda.is_available(), "mps": mps, "cpu": True}
    if name == "auto":
        return next(device for device, is_there in available.items() if is_there)
    if name not in available:
        raise ValueError(f"unknown device {name!r}; choose from auto, cpu, cuda, mps")
    if not available[name]:
        raise ValueError(f"no {name} device here; use --device=auto")
    return name


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def pick_dtype(name: str, device: str) -> tuple[torch.dtype, str]:
    """Return the precision of matrix products and the reason for it.

    "auto" is bfloat16 if the device multiplies it in hardware: CUDA from Ampere on, CPUs with AMX
    (6 to 10 times the float32 rate, measured) or AVX512_BF16 (2.1 times). Other CPUs emulate
    bfloat16; on MPS it is untested.
    """
    if name != "auto":
        if name not in DTYPES:
            raise ValueError(f"unknown dtype {name!r}; choose from auto, {', '.join(DTYPES)}")
        return DTYPES[name], "as asked"
    if device == "cuda" and torch.cuda.get_device_capability()[0] >= 8:
        return torch.bfloat16, "the GPU has bfloat16 units"
    if device == "cpu" and torch.cpu._is_amx_tile_supported():
        return torch.bfloat16, "the CPU has AMX"
    if device == "cpu" and torch.cpu._is_avx512_bf16_supported():
        return torch.bfloat16, "the CPU has AVX512_BF16"
    return torch.float32, "no bfloat16 units"


def autocast(device: str, dtype: torch.dtype):
    """Return the context for matrix products in ``dtype``; nothing to do for float32."""
    return contextlib.nullcontext() if dtype == torch.float32 else torch.autocast(device, dtype)


def attention_kernel(device: str, dtype: torch.dtype):
    """Return the context for attention in training.

    On CPUs in bfloat16 it selects plain products: a training step of the spectrogram separator
    takes 0.8 to 0.9 times as long as with the fused kernel, whose backward pass is slow (measured).
    """
    plain = device == "cpu" and dtype == torch.bfloat16
    return sdpa_kernel(SDPBackend.MATH) if plain else contextlib.nullcontext()


def fuses_optimizer(device: str) -> bool:
    """Return whether to use fused AdamW, which is 10 times faster on a CPU (measured)."""
    return device in ("cpu", "cuda")


def to_device(batch: dict, device: str) -> dict:
    """Move a batch to a device; copies from page-locked memory are asynchronous."""
    return {key: value.to(device, non_blocking=device == "cuda") for key, value in batch.items()}


# --------------------------------------------------------------------------------------------------
# Processes: under torchrun, several train as one process would on all their batches


def process_rank() -> tuple[int, int]:
    """Return the rank of this process and the number of processes; (0, 1) without torchrun."""
    if not dist.is_available() or not dist.is_initialized():
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def sum_over_processes(values: Tensor) -> Tensor:
    """Sum a tensor over all processes, in place; each process waits for the others."""
    if process_rank()[1] > 1:
        dist.all_reduce(values)
    return values


@torch.no_grad()
def send_shares(tensors: list[Tensor]) -> None:
    """Broadcast tensors in place, number ``i`` from process ``i % ranks``."""
    ranks = process_rank()[1]
    for number, tensor in enumerate(tensors if ranks > 1 else ()):
        dist.broadcast(tensor, number % ranks)


def progress_bar(batches, desc: str):
    """Show a bar over batches, in the first process."""
    return tqdm(batches, desc, unit="batch", leave=False, disable=process_rank()[0] > 0 or None)


@contextlib.contextmanager
def join_processes(device: str):
    """Join the process group if torchrun started this process; only the first process prints.

    Raises ConnectionError if another process ends while this one waits for it.
    """
    count, local = (int(os.environ.get(key, 0)) for key in ("WORLD_SIZE", "LOCAL_RANK"))
    if count < 2:
        yield
        return
    if device == "mps" or device == "cuda" and local >= torch.cuda.device_count():
        raise ValueError(f"there is no {device} device for process {local} of this machine: start "
                         "as many as there are GPUs, or use --device=cpu")
    if device == "cuda":
        torch.cuda.set_device(local)
    with reading("the processes", "cannot be joined"):
        dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo")
    try:
        with (open(os.devnull, "w") as nowhere,
              contextlib.redirect_stdout(nowhere if dist.get_rank() else sys.stdout)):
            yield
    except RuntimeError as error:
        if isinstance(error, dist.DistError) or "gloo" in str(error):
            raise ConnectionError("another process ended, and with it the run; a training goes on "
                                  "from its last checkpoint with --resume") from None
        raise
    dist.destroy_process_group()


def fails_first() -> bool:
    """Return whether this process is the first to fail, so that a fault is reported once."""
    if process_rank()[1] == 1:
        return True
    try:
        return dist.distributed_c10d._get_default_store().add("failures", 1) == 1
    except RuntimeError:  # the process that keeps the count is gone
        return True


def leave(status: int) -> int:
    """Return an exit status after a fault; exit at once if there are several processes.

    Threads that still wait for other processes would abort a normal exit. The first process
    keeps the count of failures, so it waits 2 s for the others to read it.
    """
    if process_rank()[1] > 1:
        sys.stderr.flush()
        if process_rank()[0] == 0:
            time.sleep(2)
        os._exit(status)
    return status


# --------------------------------------------------------------------------------------------------
# Interruptions and locks


class Stopped(KeyboardInterrupt):
    """Raised on Ctrl-C and SIGTERM, with the message to print and the signal's exit status."""

    def __init__(self, number: int, message: str = "stopped"):
        super().__init__(message)
        self.status = 128 + number


def outlast_signals(_=None) -> None:
    """Make a data worker ignore signals; PyTorch ends it with the main process."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


@contextlib.contextmanager
def handling_signals(handler):
    """Call a handler on Ctrl-C and SIGTERM; outside the main thread nothing changes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier or signal.SIG_DFL)


@contextlib.contextmanager
def locked(folder: Path):
    """Lock a folder for this process; ValueError names another process that holds the lock.

    The system releases the lock when the process dies, so no lock is stale. Data workers do not
    inherit it.
    """
    import fcntl

    path = folder / ".lock"
    with path.open("a+") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            minutes = (time.time() - path.stat().st_mtime) / 60
            raise ValueError(f"{folder} is in use by {file.read(200).strip()} for {minutes:.0f} "
                             "minutes: wait, or choose another folder") from None
        if not os.fstat(file.fileno()).st_nlink:  # the one before has just removed it
            raise ValueError(f"{folder} was in use until now: start again")
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}")
        file.flush()
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


# --------------------------------------------------------------------------------------------------
# Checkpoints: files

INTERRUPTED = "interrupted.pt"  # written on Ctrl-C and SIGTERM, in the middle of an epoch
NUMBER, FLOATS = int | float | None, (torch.float32, torch.float64, torch.bfloat16, torch.float16)
CHECKPOINT_KEYS = {
    "epoch": int, "model_state_dict": dict, "optimizer_state_dict": dict,
    "scheduler_state_dict": dict, "train_loss": NUMBER, "val_loss": NUMBER, "train_history": list,
    "model_config": dict,
}
TENSORS = {"model_state_dict", "training_state_dict", "optimizer_state_dict", "progress"}
LATER_KEYS = {  # absent from older checkpoints; only interrupted ones have progress
    "options": dict, "training_state_dict": dict, "steps": int, "progress": dict}
PICKLED = re.compile(  # what tensors and plain values need
    r"collections OrderedDict|torch \w+Storage|torch\._utils _rebuild_(tensor_v2|parameter)")


def save_checkpoint(path: Path, checkpoint: dict) -> None:
    """Write a checkpoint under a temporary name, then rename: a kill leaves the old one whole."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        torch.save(checkpoint, temporary)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
        raise ValueError(f"could not write {path} (is the disk full?); earlier checkpoints are "
                         f"intact ({first_line(error)})") from None
    finally:
        temporary.unlink(missing_ok=True)


def check_archive(path) -> None:
    """Fail unless a checkpoint is complete, uncompressed and free of code; uses little memory.

    A compressed one could expand without limit. The checksums detect single flipped bits.
    """
    with reading(path, "is truncated or not a checkpoint"), zipfile.ZipFile(path) as archive:
        files = archive.infolist()
        if any(file.compress_type or file.flag_bits & 1 for file in files):
            raise ValueError("compressed")
        if sum(file.file_size for file in files) > Path(path).stat().st_size:
            raise ValueError("it claims more than it holds")
        if damaged := archive.testzip():
            raise ValueError(f"{damaged} is damaged")
        pickles = [archive.read(file) for file in files if file.filename.endswith("data.pkl")]
        named = [arg for data in pickles for code, arg, _ in pickletools.genops(data)
                 if code.name in ("GLOBAL", "INST", "STACK_GLOBAL")]
    if foreign := [name for name in named if not PICKLED.fullmatch(str(name))]:
        raise ValueError(f"{path} holds more than tensors and plain values ({foreign[0]!r:.60}); "
                         "not opened")


def load_checkpoint(path) -> dict:
    """Open a training checkpoint without running any code that is in it.

    FileNotFoundError or ValueError if it is missing, truncated, foreign or would run code.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no checkpoint at {path}; train one first")
    check_archive(path)
    with reading(path, "is truncated or not a checkpoint"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(checkpoint, dict):
        raise ValueError(f"{path} is not a separator checkpoint")
    with reading(path, "is not a separator checkpoint: it has tensors where values belong"):
        json.dumps([value for key, value in checkpoint.items() if key not in TENSORS])
    later_keys = {key: kind for key, kind in LATER_KEYS.items() if key in checkpoint}
    for key, kind in {**CHECKPOINT_KEYS, **later_keys}.items():
        if not isinstance(checkpoint.get(key), kind):
            raise ValueError(f"{path} is not a separator checkpoint: {key!r} is missing or damaged")
    return checkpoint


# --------------------------------------------------------------------------------------------------
# Checkpoints: separators


def empty_separator(config: dict):
    """Build a separator without memory for its weights; ValueError if it would be too large."""
    kind = SpeakerSeparatorTransformer if "feature_dim" in config else SpectrogramSeparator
    with torch.device("meta"):
        separator = kind(**config)
    if (count := sum(weight.numel() for weight in separator.parameters())) > MAX_PARAMETERS:
        raise ValueError(f"{count:,} parameters are too many; the limit is {MAX_PARAMETERS:,}")
    return separator


def check_tensors(tensors: dict, shapes: dict) -> None:
    """Fail unless the tensors have these names and shapes and are finite floating-point numbers."""
    if odd := sorted(map(str, tensors.keys() ^ shapes.keys())):
        raise ValueError(f"{odd[0]:.60} is missing or unexpected")
    for name, shape in shapes.items():
        tensor = tensors[name]
        if not isinstance(tensor, Tensor) or tensor.dtype not in FLOATS or tensor.shape != shape:
            raise ValueError(f"{name} is not floating-point {list(shape)}")
        if not tensor.float().isfinite().all():
            raise ValueError(f"{name} is not finite")


def build_separator(config: dict, state: dict, origin):
    """Rebuild a separator from its configuration and weights; errors name ``origin``."""
    with reading(origin, "does not fit this version of the separator"):
        separator = empty_separator(config)
        check_tensors(state, {name: w.shape for name, w in separator.state_dict().items()})
    separator.to_empty(device="cpu").load_state_dict(state)
    return separator


def _load_exported(path_or_id: str):
    """Load what ``export_separator`` wrote, here or on the hub; its weights may be bfloat16."""
    from safetensors.torch import load_file
    from transformers.utils import cached_file

    here = "" if Path(path_or_id).exists() else "is no file or folder here, and "
    with reading(path_or_id, f"{here}cannot be loaded as a separator"):
        files = [cached_file(path_or_id, name) for name in ("config.json", "model.safetensors")]
        config, state = read_json(Path(files[0]), dict), load_file(files[1])
    return build_separator(config, state, path_or_id)


def load_separator(path_or_id=SHIPPED_SEPARATOR, device: str = "cpu"):
    """Load a separator, by default the shipped one, ready for inference.

    ``path_or_id`` is a ``best_model.pt``, a folder that ``save_pretrained`` or ``train --export``
    wrote, or a hub id. FileNotFoundError or ValueError if it is missing or not a separator.
    """
    path = Path(path_or_id)
    if path.name == "model.safetensors":  # config.json is beside it
        path = path.parent
    if path.is_file() or path.suffix == ".pt":
        checkpoint = load_checkpoint(path)
        separator = build_separator(
            checkpoint["model_config"], checkpoint["model_state_dict"], path)
        separator.calibrated_on = checkpoint.get("validation_data")
    elif path.is_absolute() and not path.exists():
        raise FileNotFoundError(f"no separator at {path}; train one and give its "
                                "best_model.pt (--checkpoint)")
    elif path.is_dir() and not (path / "config.json").is_file():
        raise FileNotFoundError(f"{path} has no config.json; give it a best_model.pt instead")
    else:
        separator = _load_exported(str(path))
    return separator.to(device).eval()


def export_separator(separator, folder: Path, dtype: torch.dtype = torch.float32) -> None:
    """Write config.json and model.safetensors, with weights in ``dtype``."""
    config = separator.config | {"threshold": separator.threshold}
    exported = build_separator(config, separator.state_dict(), folder)
    exported.to(dtype).save_pretrained(folder)


# --------------------------------------------------------------------------------------------------
# Checkpoints: the folder of a run

PREVIOUS_RUN = "previous_run"


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints in a folder: best_model.pt, interrupted.pt, then by epoch."""
    periodic = [p for p in folder.glob("checkpoint_epoch_*.pt") if p.stem.split("_")[-1].isdigit()]
    named = [p for p in (folder / "best_model.pt", folder / INTERRUPTED) if p.is_file()]
    return named + sorted(periodic, key=lambda p: int(p.stem.split("_")[-1]))


def newest_checkpoint(folder: Path) -> dict:
    """Load the most advanced checkpoint on the CPU; prints which damaged ones it skips."""
    found, faults = [], []
    for path in reversed(list_checkpoints(folder)):
        if found and path.name.startswith("checkpoint_epoch"):
            continue  # an earlier one
        try:
            found.append(load_checkpoint(path))
        except ValueError as error:
            faults.append(error)
    if not found:
        raise faults[0] if faults else FileNotFoundError(
            f"nothing to resume in {folder}; train without --resume first")
    for fault in faults:
        print(f"passed over a checkpoint: {fault}")
    return max(found, key=lambda c: (c["epoch"], "progress" in c))


def move_earlier_run(folder: Path) -> None:
    """Move the files of an earlier run to ``previous_run/``, in place of what was there."""
    paths = list_checkpoints(folder)
    if not paths:
        return
    previous = folder / PREVIOUS_RUN
    instead = ", in place of the one before it" if previous.exists() else ""
    print(f"moved the earlier run in {folder} to {previous}{instead}")
    shutil.rmtree(previous, ignore_errors=True)
    previous.mkdir()
    for path in [*paths, folder / "training_report.md", folder / "training_curves.png"]:
        if path.exists():
            path.rename(previous / path.name)


# --------------------------------------------------------------------------------------------------
# Train: options, data and folder of a run


def check_data(name: str, config: dict, *datasets: MultiSpeakerDataset) -> None:
    """Fail unless a separator, called ``name`` in the message, fits datasets."""
    for data in datasets:
        widths = config.get("feature_dim"), data.feature_dim
        if widths[0] != widths[1]:
            reads, has = (f"features {width} wide" if width else "spectrograms of recordings"
                          for width in widths)
            raise ValueError(f"{name} reads {reads} and {data.folder} has {has}")
        if config.get("max_speakers", math.inf) < data.max_speakers:
            raise ValueError(f"{name} has {config['max_speakers']} streams and {data.folder} up to "
                             f"{data.max_speakers} talkers")


def check_same_data(*datasets: MultiSpeakerDataset) -> None:
    """Fail unless all processes, on whatever machine, read the same datasets."""
    own = torch.tensor([int(data.digest[:12], 16) for data in datasets])
    if not sum_over_processes(own.clone()).equal(process_rank()[1] * own):
        raise ValueError(f"{datasets[0].folder.parent} is not the same for all processes")


def check_readable(data: MultiSpeakerDataset) -> None:
    """Fail before the first epoch, rather than after it, if a mixture cannot be read."""
    rank, ranks = process_rank()
    for number in progress_bar(range(rank, len(data), ranks), "check"):
        data[number]
    sum_over_processes(torch.zeros(1))  # wait for what the others find


def feature_source(data: MultiSpeakerDataset) -> dict:
    """Return what a separator of features keeps about the data that it was trained on."""
    keys = ("kind", "encoder", "layer", "frame_rate")
    return {key: data.source[key] for key in keys if key in data.source}


def new_separator(options: TrainOptions, train_set, val_set) -> nn.Module:
    """Return a separator with random weights: sizes as asked, the rest from the data."""
    config = {name: value for name in SIZES if (value := getattr(options, name)) is not None}
    config.setdefault("max_speakers", max(train_set.max_speakers, val_set.max_speakers, 1))
    if not train_set.has_recordings:
        if options.dim is not None:
            raise ValueError("--dim is not for a separator of this data")
        config |= {"feature_dim": train_set.feature_dim,
                   "feature_source": feature_source(train_set)}
    name = f"the new separator (--max_speakers={config['max_speakers']})"
    check_data(name, config, train_set, val_set)
    kind = type(empty_separator(config))  # refuses what is too large
    torch.manual_seed(options.seed)
    return kind(**config)


def started_separator(options: TrainOptions, train_set, val_set) -> nn.Module:
    """Return the separator ``init_from`` to train on other data; only its dropout may change."""
    separator, name = load_separator(options.init_from), f"the separator {options.init_from}"
    config = separator.config | {"threshold": 0.5}
    check_data(name, config, train_set, val_set)
    for size in SIZES:
        asked = getattr(options, size)
        if size != "dropout" and asked not in (None, config.get(size)):
            raise ValueError(f"--{size}={asked} contradicts {name}, which has {config.get(size)}: "
                             "leave the flag out")
    if options.dropout is not None:
        config["dropout"] = options.dropout
    if not train_set.has_recordings:
        config["feature_source"] = feature_source(train_set)
    return build_separator(config, separator.state_dict(), options.init_from)


def training_mixtures(options: TrainOptions, train_set, talkers: int) -> Dataset:
    """Return what an epoch draws from: fresh mixtures where the data allows it, else its own.

    Fresh mixtures have up to ``talkers`` talkers.
    """
    if options.crop_seconds and not (options.remix and train_set.has_recordings):
        raise ValueError("--crop_seconds takes parts of fresh mixtures of recordings: it is not "
                         "for features, nor with --no_remix")
    if options.crop_seconds and options.crop_seconds[0] > options.crop_seconds[1]:
        raise ValueError("--crop_seconds takes the shorter length first")
    if not options.remix or not (train_set.is_sum or train_set.has_recordings):
        return train_set
    kind = RemixedRecordings if train_set.has_recordings else RemixedFeatures
    return kind(train_set, options, talkers)


def loss_weights(options: TrainOptions, train_set) -> LossWeights:
    """Return the weights asked for, else those of the data's kind."""
    default = default_weights(train_set.has_recordings)
    if not train_set.is_sum:
        default = default._replace(reconstruction=0.0)
    asked = (getattr(options, name) for name in WEIGHTS)
    return LossWeights(*(d if a is None else a for d, a in zip(default, asked, strict=True)))


def prepare_folder(folder: Path) -> None:
    """Make a folder and fail unless it can be written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".write_test").touch()
        (folder / ".write_test").unlink()
    except OSError as error:
        raise ValueError(f"cannot write to {folder}: {error.strerror}") from None


def prepare_export(folder: Path, flag: str = "--export") -> None:
    """Make a folder for an export; fail if it cannot be written to or holds another model."""
    prepare_folder(folder)
    config, weights = folder / "config.json", folder / "model.safetensors"
    ours = config.is_file() and b'"max_speakers"' in config.read_bytes()
    if not ours and (config.exists() or weights.exists()):
        raise ValueError(f"{flag}={folder} holds another model: name another folder")


def check_disk(folder: Path, parameters: int, options: TrainOptions, done: int) -> None:
    """Fail if the disk cannot hold a run's checkpoints: weights twice, two moments, 4 bytes each.

    After at least one ``done`` epoch the best checkpoint already exists.
    """
    epochs = {*range(options.save_every, options.epochs + 1, options.save_every), options.epochs}
    missing = sum(epoch > done for epoch in epochs) + (done == 0)
    need, free = 16 * parameters * (missing + 1), shutil.disk_usage(folder).free  # one is .tmp
    if need > free:
        raise ValueError(f"{folder} has {free / 1e9:.1f} GB free and {missing} checkpoints need "
                         f"{need / 1e9:.1f} GB; free some, or raise --save_every")


# --------------------------------------------------------------------------------------------------
# Train: optimizer, schedule and average

ADAM_BETAS = (0.9, 0.98)  # with 0.999 the second moment remembers too long for short runs


class StackedMuon(torch.optim.Muon):
    """Muon that steps all matrices of one shape at once, to the same end.

    One by one, those of the shipped separator take 1,600 kernels, 30 of the 76 ms that a training
    step took on an H100 (measured). ``dtype`` is the precision of the products: on a CPU without
    bfloat16 units, float32 takes a quarter of the time that bfloat16 takes (measured).
    """

    def __init__(self, weights, dtype: torch.dtype, **settings):
        super().__init__(weights, **settings)
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure=None):
        """Take one step."""
        for group in self.param_groups:
            weights, gradients, momenta, by_shape = [], [], [], {}
            self._init_group(group, weights, gradients, momenta)
            torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
            updates = torch._foreach_lerp(gradients, momenta, group["momentum"])  # Nesterov's
            torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
            for weight, update in zip(weights, updates, strict=True):
                by_shape.setdefault(weight.shape, []).append((weight, update))
            for shape, pairs in by_shape.items():
                alike, updates = zip(*pairs, strict=True)
                steps = self._orthogonal(torch.stack(updates), group).float().unbind()
                rate = 0.2 * math.sqrt(max(shape)) * group["lr"]  # AdamW's length
                torch._foreach_add_(alike, steps, alpha=-rate)

    def _orthogonal(self, matrices: Tensor, group: dict) -> Tensor:
        """Return matrices [N, rows, columns] with all singular values near 1, in ``dtype``."""
        (a, b, c), tall = group["ns_coefficients"], matrices.shape[1] > matrices.shape[2]
        found = (matrices.mT if tall else matrices).to(self.dtype)
        found = found / found.norm(dim=(1, 2), keepdim=True).clamp(min=group["eps"])
        for _ in range(group["ns_steps"]):  # of Newton and Schulz
            gram = found @ found.mT
            found = torch.baddbmm(
                found, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), found, beta=a)
        return found.mT if tall else found


class MuonAdamW(torch.optim.Optimizer):
    """Muon for the weight matrices of a separator's blocks, AdamW for everything else.

    Muon makes every direction of a matrix's step equally long (Jordan et al., 2024). Its steps are
    scaled to AdamW's (Liu et al., 2025, arXiv:2502.16982), so both use the same learning rate.
    The first and last layers stay with AdamW: under Muon the gains saturate and nothing is learned
    (measured).
    """

    ENDS = ("input", "output", "speaker_queries", "activity_head", "attention_pool")

    def __init__(
        self, separator: nn.Module, lr: float, weight_decay: float, fused: bool = False,
        dtype: torch.dtype = torch.bfloat16,
    ):
        matrices, others = [], []
        for name, weight in separator.named_parameters():
            inside = weight.ndim == 2 and not name.startswith(self.ENDS)
            (matrices if inside else others).append(weight)
        settings = {"lr": lr, "weight_decay": weight_decay}
        self.parts = (
            StackedMuon(matrices, dtype, **settings),
            torch.optim.AdamW(others, betas=ADAM_BETAS, fused=fused, **settings))
        super().__init__([group for part in self.parts for group in part.param_groups], {})

    def step(self, closure=None):
        """Take one step with both optimizers, on the groups and the state of this one.

        Each of several processes updates its share of the matrices and broadcasts it: Muon's matrix
        products take a quarter of a training step on a CPU.
        """
        (muon, adam), (matrices, others) = self.parts, self.param_groups
        (rank, ranks), weights = process_rank(), self._matrices()
        for part, group in ((muon, matrices | {"params": weights[rank::ranks]}), (adam, others)):
            if group["params"]:  # empty if processes outnumber the matrices
                part.param_groups, part.state = [group], self.state
                part.step()
        send_shares(weights)

    def gather(self) -> None:
        """Collect the momenta of all processes, for a checkpoint."""
        send_shares([self.state[weight].setdefault("momentum_buffer", torch.zeros_like(weight))
                     for weight in self._matrices()])

    def _matrices(self) -> list[Tensor]:
        """Return Muon's weights by size: every n-th one makes a share like the others."""
        return sorted(self.param_groups[0]["params"], key=Tensor.numel)


def make_optimizer(separator, options: TrainOptions) -> torch.optim.Optimizer:
    """Return AdamW, with Muon for a spectrogram separator, at the given or measured rate."""
    rate = options.lr
    if rate is None:  # wider separators of features want smaller steps
        rate = 2e-3 if separator.is_spectrogram else 0.128 / separator.feature_dim
        if options.init_from:  # at the whole rate a trained separator gets worse (measured)
            rate /= 4
    device = separator.speaker_queries.device.type
    settings = {"lr": rate, "weight_decay": options.weight_decay, "fused": fuses_optimizer(device)}
    if separator.is_spectrogram:
        return MuonAdamW(separator, **settings, dtype=pick_dtype(options.dtype, device)[0])
    return torch.optim.AdamW(separator.parameters(), betas=ADAM_BETAS, **settings)


def make_scheduler(optimizer, epochs: int, done: int = 0):
    """Per-epoch cosine schedule from the optimizer's rate to a tenth, ``done`` epochs in."""
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda epoch: 0.55 + 0.45 * math.cos(math.pi * epoch / epochs),
        last_epoch=done - 1)


class RunningAverage(torch.optim.swa_utils.AveragedModel):
    """The running average of a separator's weights, which is validated and saved.

    It covers the last tenth of the run; without it, one step more or less changes the validation
    loss by a tenth (measured). Its counter stays on the CPU: the library's own update would copy it
    to the GPU in every step, and wait.
    """

    def __init__(self, separator: nn.Module, steps: int = 0):
        super().__init__(separator)
        self.n_averaged.fill_(steps)
        self.requires_grad_(False)

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Take in the weights after a step."""
        share = 10 / (int(self.n_averaged) + 10)
        torch._foreach_lerp_([*self.parameters()], [*model.parameters()], share)
        self.n_averaged += 1


# --------------------------------------------------------------------------------------------------
# Train: what a resumed run takes over


def resumed_options(given: dict, checkpoint: dict, folder: Path) -> TrainOptions:
    """Return the options of the run that a checkpoint belongs to, updated with those given now.

    Sizes, seed, precision and loss weights cannot change within a run, mixtures not within an
    epoch.
    """
    earlier = {k: v for k, v in checkpoint.get("options", {}).items() if k in TrainOptions._fields}
    fixed = {name: checkpoint["model_config"].get(name) for name in SIZES}
    kept = ["seed", "dtype", "init_from", *WEIGHTS]
    if "progress" in checkpoint:  # the rest of an epoch
        kept += ["mixtures_per_epoch", "crop_seconds", "remix"]
    fixed |= {name: earlier[name] for name in kept if name in earlier}
    for name, before in fixed.items():
        now = given.get(name)
        if now not in (None, "auto", before):
            flag = "--no_remix" if name == "remix" else f"--{name}={now}"
            raise ValueError(f"{flag} contradicts the checkpoint in {folder}, which has "
                             f"{before}: leave the flag out, or train anew in another folder")
    given = {name: value for name, value in given.items() if name not in fixed}
    return TrainOptions(**earlier | {"device": "auto"} | given)


def resumed_separator(checkpoint: dict, train_set, val_set, folder: Path) -> nn.Module:
    """Return the separator of a checkpoint; fail if it was trained for other data."""
    config = checkpoint["model_config"] | {"threshold": 0.5}  # as in a run never stopped
    separator = build_separator(config, checkpoint["model_state_dict"], folder)
    check_data(f"the checkpoint in {folder}", config, train_set, val_set)
    if checkpoint.get("validation_data", val_set.digest) != val_set.digest:
        raise ValueError(f"the run in {folder} was validated on other mixtures than those in "
                         f"{val_set.folder}: give its --data_dir, or train anew elsewhere")
    return separator


def fitting_moments(optimizer, saved: dict) -> dict:
    """Return a state to load: the saved moments, if they fit, and the optimizer's own settings."""
    found = {(number, name): moment for number, moments in saved["state"].items()
             for name, moment in moments.items()}
    own, shapes = optimizer.state_dict()["param_groups"], {}
    for group, numbers in zip(optimizer.param_groups, own, strict=True):
        names = ("momentum_buffer",) if "momentum" in group else ("step", "exp_avg", "exp_avg_sq")
        for number, weight in zip(numbers["params"], group["params"], strict=True):
            shapes |= {(number, n): () if n == "step" else weight.shape for n in names}
    check_tensors(found, shapes)
    if any((found[key] < 0).any() for key in found if key[1] in ("step", "exp_avg_sq")):
        raise ValueError("a step or second moment is negative")
    return {"state": saved["state"], "param_groups": own}


def check_history(history: list, epochs: int) -> None:
    """Fail unless there is a row of finite numbers for each of the epochs."""
    for number, row in enumerate(history, start=1):
        train, val = row["train"], row["val"]
        values = [row["lr"], row["seconds"], *(train[part] for part in LOSS_PARTS),
                  *(val[name] for name in (*LOSS_PARTS, *COUNT_SCORES)),
                  val["si_sdr_improvement"] or 0,
                  *(val["trivial_mse"][name] for name in TRIVIAL_OUTPUTS)]
        if row["epoch"] != number or not all(is_number(v, -1e30, 1e30) for v in values):
            raise ValueError(f"epoch {number} of its history is damaged")
    if len(history) != epochs:
        raise ValueError(f"it has {len(history)} rows of history after {epochs} epochs")


def restore(separator, optimizer, checkpoint: dict, origin) -> list[dict]:
    """Put separator and optimizer back where a checkpoint left them; return its history."""
    state = checkpoint.get("training_state_dict", separator.state_dict())
    with reading(f"cannot resume from {origin}: its state", "does not fit"):
        check_tensors(state, {name: w.shape for name, w in separator.state_dict().items()})
        check_history(checkpoint["train_history"], checkpoint["epoch"])
        moments = fitting_moments(optimizer, checkpoint["optimizer_state_dict"])
        if "progress" in checkpoint:
            rows, step_size = (checkpoint["progress"][name] for name in ("rows", "step_size"))
            check_tensors({"rows": rows}, {"rows": (len(rows), len(LOSS_PARTS) + 2)})
            check_limits({"batch_size": step_size})
    separator.load_state_dict(state)
    optimizer.load_state_dict(moments)
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    return list(checkpoint["train_history"])


def stopped_epoch(checkpoint: dict, train_set, step_size: int) -> dict:
    """Return ``Run.progress`` of a checkpoint's epoch; fail if this run cannot go on with it."""
    if not (progress := dict(checkpoint.get("progress", {}))):
        return progress
    if checkpoint.get("training_data", train_set.digest) != train_set.digest:
        raise ValueError(f"the epoch that was stopped drew from other data than {train_set.folder} "
                         "has now: give its --data_dir, or train anew elsewhere")
    if progress["step_size"] != step_size:
        raise ValueError(f"the epoch that was stopped has steps of {progress['step_size']} "
                         f"mixtures, not {step_size}: keep processes times --accumulate times "
                         "--batch_size")
    if process_rank()[0]:  # the first process holds the losses of all
        progress["rows"] = torch.zeros_like(progress["rows"])
    return progress


# --------------------------------------------------------------------------------------------------
# Train: one epoch


class Run(NamedTuple):
    """What one training run holds; built by ``start_run``."""

    options: TrainOptions
    device: str
    dtype: torch.dtype
    separator: nn.Module  # what is trained
    parallel: nn.Module  # the same, with gradients averaged over processes if there are several
    averaged: nn.Module  # the running average of its weights, validated and saved
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    loader: DataLoader
    train_set: MultiSpeakerDataset  # what the loader's mixtures are drawn from
    val_set: MultiSpeakerDataset
    history: list[dict]
    progress: dict  # of an interrupted epoch: rows of ``backward``, mixtures in a step
    signals: list[int]  # those that asked to stop

    @property
    def weights(self) -> LossWeights:
        """Those of the loss parts."""
        return LossWeights(*(getattr(self.options, name) for name in WEIGHTS))


def recompute_blocks(separator, device: str, dtype: torch.dtype) -> None:
    """Make blocks keep only their input; the backward pass recomputes their activations."""
    for module in separator.modules():
        if isinstance(module, (Block, nn.TransformerDecoderLayer, nn.TransformerEncoderLayer)):
            module.forward = partial(
                checkpoint_call, module.forward, use_reentrant=False,
                context_fn=lambda: (contextlib.nullcontext(), attention_kernel(device, dtype)))


def batch_loss(separator, batch: dict, weights: LossWeights, device: str, dtype) -> SeparatorLoss:
    """Return the loss of a batch on the device; for spectrograms, only of audible bins."""
    with autocast(device, dtype), attention_kernel(device, dtype):
        separated, probs = separator(batch["mixture"], batch["frame_mask"])
    if "waveforms" in batch:
        floor = batch["mixture"].amax((1, 2))[:, None, None, None] - AUDIBLE_RANGE
        separated = torch.maximum(separated, floor)
        batch = batch | {"targets": torch.maximum(batch["targets"], floor)}
    return loss_of_streams(separated, probs, batch, weights)


def backward(run: Run, batches: list[dict]) -> Tensor:
    """Compute the gradients of one step, as if the batches of all processes were one batch.

    Returns a row [6]: this process's share of LOSS_PARTS, its mixtures, and the gradient's norm.
    """
    sizes = torch.stack([loss_sizes(batch) for batch in batches])
    shares = sizes / sum_over_processes(sizes.sum(0)).clamp(min=1)  # in the order of LOSS_PARTS[1:]
    ranks, row = process_rank()[1], 0
    run.optimizer.zero_grad(set_to_none=True)
    for number, (batch, share) in enumerate(zip(batches, shares, strict=True), start=1):
        waits = ranks > 1 and number < len(batches)
        with run.parallel.no_sync() if waits else contextlib.nullcontext():
            loss = batch_loss(run.parallel, batch, run.weights, run.device, run.dtype)
            parts = torch.stack(loss[1:4]) * share
            total = run.weights.total(*parts)
            (total * ranks).backward()  # gradients of the processes are averaged
        row += torch.cat([total[None], parts]).detach()
    norm = nn.utils.clip_grad_norm_(run.separator.parameters(), 1.0)
    return torch.cat([row, sizes[:, 2].sum()[None], norm[None]])


def check_finite(run: Run, epoch: int, rows: Tensor, first: int = 0) -> None:
    """Fail if a loss or gradient in rows of ``backward``, from step ``first`` on, is not finite."""
    broken = (~rows.isfinite().all(1)).nonzero().flatten().tolist()
    if not broken:
        return
    step, data = first + broken[0], run.loader.dataset
    numbers = list(run.loader.batch_sampler.steps())[step]
    names = ([data.samples[number]["id"] for number in numbers] if hasattr(data, "samples")
             else [f"number {number}" for number in numbers])
    raise ValueError(
        f"the loss or its gradient is not finite in epoch {epoch}, batch {step + 1} (mixtures "
        f"{', '.join(names[:8])}{', ...' * (len(names) > 8)}); earlier checkpoints are intact: "
        "lower --lr or look at that data")


def asked_to_stop(run: Run) -> bool:
    """Return whether a signal came to any process; each waits for the others."""
    return bool(sum_over_processes(torch.tensor(len(run.signals))))


def train_step(run: Run, epoch: int, step: int, batches: list[dict]) -> Tensor:
    """Take a step of an epoch, counted from 0; return its row of ``backward``."""
    # Seed dropout by step and process, so that a resumed run repeats an uninterrupted one.
    place = [run.options.seed, epoch, step, process_rank()[0]]
    torch.manual_seed(int(np.random.SeedSequence(place).generate_state(1)[0]))
    row = backward(run, batches)
    if run.device == "cpu":
        check_finite(run, epoch, row[None], step)
    run.optimizer.step()
    run.averaged.update_parameters(run.separator)
    return row


def train_epoch(run: Run, epoch: int) -> dict[str, float] | None:
    """Train for one epoch; return the mean of every loss part, or None if a signal stopped it.

    On a GPU, losses are read once at the end, to avoid waiting; on a CPU, after every step.
    """
    run.separator.train()
    rows, batches, sampler = [*run.progress.get("rows", [])], [], run.loader.batch_sampler
    sampler.epoch, sampler.start = epoch, len(rows)
    stopped = False
    for raw in progress_bar(run.loader, f"epoch {epoch}"):
        batches.append(add_spectrograms(to_device(raw, run.device)))
        if len(batches) < run.options.accumulate:
            continue
        rows.append(train_step(run, epoch, len(rows), batches))
        batches = []
        if stopped := asked_to_stop(run):
            break
    if isinstance(run.optimizer, MuonAdamW):
        run.optimizer.gather()
    rows = sum_over_processes(torch.stack([row.to(run.device) for row in rows])).cpu()
    check_finite(run, epoch, rows)
    if stopped:
        run.progress.update(rows=rows, step_size=sampler.step_size)
        return None
    run.progress.clear()
    losses, sizes = rows[:, : len(LOSS_PARTS)], rows[:, len(LOSS_PARTS), None]
    means = (losses * sizes).sum(0) / sizes.sum()
    return dict(zip(LOSS_PARTS, means.tolist(), strict=True))


# --------------------------------------------------------------------------------------------------
# Train: a run from start or checkpoint


def start_run(
    options: TrainOptions, train_set, val_set, folder: Path, checkpoint: dict | None = None
) -> Run:
    """Build or restore separator and optimizer, and print what will be trained."""
    checkpoint, device = checkpoint or {}, pick_device(options.device)
    if checkpoint:
        separator = resumed_separator(checkpoint, train_set, val_set, folder)
    elif options.init_from:
        separator = started_separator(options, train_set, val_set)
    else:
        separator = new_separator(options, train_set, val_set)
    dtype, reason = pick_dtype(options.dtype, device)
    weights = dict(zip(WEIGHTS, loss_weights(options, train_set), strict=True))
    options = options._replace(dtype=str(dtype).removeprefix("torch."), device=device, **weights)
    # A checkpoint's model_state_dict is the average; ``restore`` puts in the weights in training.
    averaged = RunningAverage(separator.to(device), checkpoint.get("steps", 0))
    if options.recompute:
        recompute_blocks(separator, device, dtype)
    optimizer = make_optimizer(separator, options)
    history = restore(separator, optimizer, checkpoint, folder) if checkpoint else []
    scheduler = make_scheduler(optimizer, options.epochs, len(history))
    streams, parameters = separator.max_speakers, sum(p.numel() for p in separator.parameters())
    talkers = options.max_speakers or max(train_set.max_speakers, val_set.max_speakers, 1)
    mixtures = training_mixtures(options, train_set, talkers)
    loader = make_loader(mixtures, options.batch_size, streams, device, options.workers,
                         options.seed, 1, options.accumulate)
    if not len(loader):
        raise ValueError(f"an epoch has {len(mixtures)} mixtures and a step needs "
                         f"{loader.batch_sampler.parts}: fewer processes or --accumulate")
    progress = stopped_epoch(checkpoint, train_set, loader.batch_sampler.step_size)
    rank, ranks = process_rank()
    if not rank:
        check_disk(folder, parameters, options, len(history))
    remixed = f" (remixed to {len(mixtures)} an epoch)" if mixtures is not train_set else ""
    start = f" of {options.init_from}" if options.init_from and not checkpoint else ""
    reason = "as before" if checkpoint else reason
    print(f"device {device}{f', {ranks} processes' * (ranks > 1)}, {options.dtype} ({reason}), "
          f"{parameters:,} parameters{start}, {len(train_set)} training{remixed} and "
          f"{len(val_set)} validation mixtures, {streams} streams")
    parallel = separator
    if ranks > 1:
        parallel = nn.parallel.DistributedDataParallel(separator, gradient_as_bucket_view=True)
    return Run(options, device, dtype, separator, parallel, averaged, optimizer, scheduler,
               loader, train_set, val_set, history, progress, [])


def validate(run: Run) -> dict:
    """Return ``evaluate_separator``'s scores of the averaged weights, calibrating the threshold."""
    return evaluate_separator(
        run.averaged.module, run.val_set, batch_size=min(8, run.options.batch_size),
        device=run.device, dtype=run.dtype, calibrate=True, weights=run.weights)


def run_epoch(run: Run, epoch: int) -> dict | None:
    """Train and validate once; return the epoch's row of the history, None if it was stopped."""
    started = time.perf_counter()
    rate = run.scheduler.get_last_lr()[0]
    train = train_epoch(run, epoch)
    if train is None:
        return None
    val = validate(run)
    if not math.isfinite(val["total"]):
        raise ValueError(f"the validation loss is not finite in epoch {epoch}; earlier checkpoints "
                         "are intact: lower --lr or look at the validation data")
    with warnings.catch_warnings():  # a resumed epoch may have no step left
        warnings.filterwarnings("ignore", "Detected call")
        run.scheduler.step()
    seconds = time.perf_counter() - started  # reading the losses waited for the device
    return {"epoch": epoch, "lr": rate, "seconds": seconds, "train": train, "val": val}


def format_validation(val: dict) -> str:
    """Return the validation scores in a line of the training log."""
    parts = " ".join(f"{part} {val[part]:.3f}" for part in LOSS_PARTS[1:])
    trivial = ", ".join(f"{name} {mse:.3f}" for name, mse in val["trivial_mse"].items())
    best = min(val["trivial_mse"].values())  # 0 where every mixture is one talker or silence
    relative = f"{val['separation'] / best:.2f}" if best else "-"
    return (f"val {val['total']:.3f} ({parts})  count {val['count_accuracy']:.0%}  "
            f"MSE / best trivial {relative} ({trivial})")


def format_epoch(row: dict, epochs: int) -> str:
    """Return one line of the training log."""
    return (f"epoch {row['epoch']:3d}/{epochs}  train {row['train']['total']:.3f}  "
            f"{format_validation(row['val'])}  lr {row['lr']:.1e}  {row['seconds']:.0f} s")


def checkpoint_of(run: Run) -> dict:
    """Return what a checkpoint holds: plain types and tensors."""
    separator, row = run.averaged.module, run.history[-1] if run.history else None
    threshold = row["val"]["threshold"] if row else separator.threshold
    return {
        "epoch": len(run.history), "model_state_dict": separator.state_dict(),
        "optimizer_state_dict": run.optimizer.state_dict(),
        "scheduler_state_dict": {"last_epoch": run.scheduler.last_epoch},
        "train_loss": row and row["train"]["total"], "val_loss": row and row["val"]["total"],
        "train_history": run.history, "training_state_dict": run.separator.state_dict(),
        "steps": int(run.averaged.n_averaged), "options": run.options._asdict(),
        "model_config": separator.config | {"threshold": threshold},
        "training_data": run.train_set.digest, "validation_data": run.val_set.digest,
        **({"progress": run.progress} if run.progress else {}),
    }


# --------------------------------------------------------------------------------------------------
# Train: all epochs, checkpoints and report


def write_results(run: Run, folder: Path) -> None:
    """Write report and curves."""
    if scoring := import_sibling("scoring"):
        used = run.options._asdict() | run.averaged.module.config | run.separator.feature_source
        drawn_from, rate = run.loader.dataset, run.options.lr or run.history[0]["lr"]
        used |= {"lr": rate, "mixtures_per_epoch": len(drawn_from)}
        used.pop("feature_source", None)
        terms = {"separation": 1.0, **run.weights._asdict()}
        scoring.write_report(folder, used, terms, run.train_set, run.val_set, run.history,
                             len(getattr(drawn_from, "talkers", ())))
        scoring.plot_history(folder / "training_curves.png", run.history)


def stop_run(run: Run, folder: Path):
    """Save a run that a signal stopped; always raises ``Stopped``."""
    if process_rank()[0] == 0:
        save_checkpoint(folder / INTERRUPTED, checkpoint_of(run))
    epoch, steps = len(run.history) + 1, len(run.progress.get("rows", []))
    run.loader.batch_sampler.start = 0
    total = len(run.loader) // run.options.accumulate
    where = (f"in epoch {epoch} after {steps} of {total} steps" if steps
             else f"after epoch {epoch - 1}")
    raise Stopped(max(run.signals, default=signal.SIGTERM),
                  f"stopped {where}; train --resume goes on from there ({folder / INTERRUPTED})")


def best_epoch(history: list[dict]) -> int:
    """Return the epoch with the least validation loss; 0 before the first."""
    return min(history, key=lambda row: row["val"]["total"], default={"epoch": 0})["epoch"]


def patience_is_over(run: Run) -> bool:
    """Return whether the last ``patience`` epochs brought no lower validation loss."""
    patience = run.options.patience
    return patience is not None and len(run.history) - best_epoch(run.history) >= patience


def save_epoch(run: Run, folder: Path, missing: bool = False) -> None:
    """Write the checkpoints that are due after the last epoch; only the ``missing`` ones if set."""
    epoch, options = len(run.history), run.options
    names = ["best_model.pt"] * (epoch == best_epoch(run.history))
    if patience_is_over(run) or epoch == options.epochs or epoch % options.save_every == 0:
        names.append(f"checkpoint_epoch_{epoch}.pt")
    for name in names:
        if not (missing and (folder / name).is_file()):
            save_checkpoint(folder / name, checkpoint_of(run))
            (folder / INTERRUPTED).unlink(missing_ok=True)  # this one is further on


def run_epochs(run: Run, folder: Path) -> None:
    """Train until the last epoch, a signal, or ``patience`` epochs without a better one."""
    history, options, writes = run.history, run.options, process_rank()[0] == 0
    start = None

    def note(number: int, _):
        run.signals.append(number)
        if len(run.signals) > 2:  # the third one stops at once
            raise Stopped(number)

    with handling_signals(note):
        if options.init_from and not (history or run.progress):
            start = validate(run)
            print(f"before training  {format_validation(start)}", flush=True)
        for epoch in range(len(history) + 1, options.epochs + 1):
            row = run_epoch(run, epoch)
            if row is None:
                stop_run(run, folder)
            history.append(row)
            if writes:
                save_epoch(run, folder)
            print(format_epoch(row, options.epochs), flush=True)
            if patience_is_over(run):
                print(f"no better epoch in {options.patience}; stopped, the best was "
                      f"{best_epoch(history)}")
                break
            if epoch < options.epochs and asked_to_stop(run):
                stop_run(run, folder)
    if start and start["total"] <= min(row["val"]["total"] for row in history):
        print(f"no epoch is better than {options.init_from} was: try a lower --lr")


def train_speaker_separator(
    data_dir=DEFAULT_DATA_DIR, checkpoint_dir=DEFAULT_CHECKPOINT_DIR, **options
) -> list[dict]:
    """Train a separator on a dataset; writes checkpoints, report and curves.

    ``options`` are the fields of ``TrainOptions``, explained by ``train --help``. Returns a dict
    per epoch: ``epoch, lr, seconds, train`` (loss parts) and ``val`` (of ``evaluate_separator``).
    Raises FileNotFoundError or ValueError for data, checkpoints or devices that cannot be used.
    Ctrl-C and SIGTERM finish the step, write ``interrupted.pt`` and raise KeyboardInterrupt.
    """
    # Convert NumPy numbers and paths to plain types: a checkpoint that holds one would not load.
    given = {name: str(value) if isinstance(value, Path) else np.asarray(value).tolist()
             for name, value in options.items()}
    options = TrainOptions(**given)
    folder, checkpoint = Path(checkpoint_dir), None
    if options.resume:
        checkpoint = newest_checkpoint(folder)
        options = resumed_options(given, checkpoint, folder)
        if not any(Path(data_dir).glob("*/metadata.json")):
            raise FileNotFoundError(f"no dataset at {data_dir}: --resume needs the --data_dir that "
                                    "the run began with")
    elif options.init_from and is_inside(options.init_from, folder / PREVIOUS_RUN):
        raise ValueError(f"{options.init_from} would be replaced: choose another --checkpoint_dir")
    check_limits(options._asdict())
    train_set, val_set = (MultiSpeakerDataset(data_dir, split) for split in ("train", "val"))
    check_same_data(train_set, val_set)
    writes = process_rank()[0] == 0
    if writes:
        prepare_folder(folder)
    with locked(folder) if writes else contextlib.nullcontext():
        run = start_run(options, train_set, val_set, folder, checkpoint)
        checkpoint = None  # frees as much memory as the run uses
        if writes and run.history and not run.progress:  # a kill came between two checkpoints
            save_epoch(run, folder, missing=True)
        is_over = patience_is_over(run)
        if is_over or len(run.history) >= options.epochs:
            print(f"{len(run.history)} epochs are done already; ask for more with "
                  f"--{'patience' if is_over else 'epochs'}")
        else:
            # After every check, so that a refused command leaves an earlier run where it is.
            check_readable(val_set)
            if writes and not options.resume:
                move_earlier_run(folder)
            run_epochs(run, folder)
        if writes:  # also where a kill after the last checkpoint left them out
            write_results(run, folder)
    return run.history


# --------------------------------------------------------------------------------------------------
# Evaluate


def si_sdr_improvement(estimates: Tensor, batch: dict) -> Tensor:
    """Return the SI-SDR improvement [B, S] of audio, or of features taken as one long vector."""
    mixture, targets = batch["mixture"][:, None], batch["targets"]
    if "waveforms" in batch:
        from audio import apply_gains

        gains = (estimates - mixture).clamp(max=0)
        waveforms = by_mixture(batch["waveforms"].float(), batch)  # audio from here on
        mixture, targets = waveforms.tensor_split([1], dim=1)
        sizes = torch.stack([batch["lengths"], batch["frame_mask"].sum(1)], 1).tolist()
        estimates = torch.zeros_like(targets)  # each made without padding, as in use
        for found, m, g, (n, T) in zip(estimates, mixture, gains, sizes, strict=True):
            found[:, :n] = apply_gains(m[0, :n], g[:, :T])
    else:
        valid = batch["frame_mask"][:, None, :, None]
        estimates, mixture, targets = (
            (values * valid).flatten(2) for values in (estimates, mixture, targets))
    return si_sdr(estimates, targets) - si_sdr(mixture, targets)


def score_batch(
    separated: Tensor, probs: Tensor, batch: dict, weights: LossWeights
) -> tuple[Tensor, Tensor]:
    """Return the sums of all SCORES in row 0, their divisors in row 1, and the assignment."""
    is_talker = batch["speaker_mask"].float()
    loss = loss_of_streams(separated, probs, batch, weights)
    trivial = trivial_outputs(batch["mixture"], batch["speaker_mask"], "waveforms" in batch)
    errors = [(talker_mse(output[:, None], batch["targets"], batch["frame_mask"]) * is_talker).sum()
              for output in trivial.values()]
    least, most = batch["targets"].flatten(2).aminmax(dim=2)
    heard = is_talker * (most > least)  # the SI-SDR of silence is undefined
    several = heard * (heard.sum(1, keepdim=True) > 1)
    improvement = si_sdr_improvement(reorder(separated, loss.assignment), batch) * several
    sizes = loss_sizes(batch)
    sums = torch.stack([*torch.stack(loss[1:4]) * sizes, improvement.sum(), *errors])
    divisors = torch.cat([sizes, several.sum()[None], sizes[:1].expand(3)])
    return torch.stack([sums, divisors]), loss.assignment


@torch.inference_mode()
def evaluate_separator(
    separator, dataset: Dataset, *, batch_size: int = 8, device: str | None = None,
    dtype: torch.dtype = torch.float32, threshold: float | None = None,
    num_speakers: int | None = None, calibrate: bool = False, weights: LossWeights | None = None,
) -> dict:
    """Score a separator and the trivial outputs on a dataset.

    Talkers are counted by ``active_streams`` at ``threshold`` (default: the separator's own), or
    are the ``num_speakers`` likeliest streams of every mixture. With ``calibrate`` the threshold
    that counts best is found on every other mixture, and counting is scored on the rest.

    Returns ``total, separation, reconstruction, activity`` over all mixtures, whatever the batch
    size; ``si_sdr_improvement`` in dB over mixtures of two or more talkers who are not silent (of
    audio for recordings, else of features), None if there are none; what ``count_scores`` returns;
    ``trivial_mse`` by name.
    """
    separator.eval()
    device = device or separator.speaker_queries.device.type
    weights = weights or default_weights(separator.is_spectrogram)
    (rank, ranks), S = process_rank(), separator.max_speakers
    sums = torch.zeros(2, len(SCORES), device=device)  # above what to divide them by
    found = torch.zeros(2, len(dataset), S, device=device)  # probabilities above truths
    own, done = found[:, rank::ranks], 0  # a view; the rest stays 0 for the sum
    loader = make_loader(Subset(dataset, range(rank, len(dataset), ranks)), batch_size, S, device)
    for raw in progress_bar(loader, "evaluate"):
        batch = add_spectrograms(to_device(raw, device))
        with autocast(device, dtype):
            separated, probs = separator(batch["mixture"], batch["frame_mask"])
        batch_sums, assignment = score_batch(separated.float(), probs.float(), batch, weights)
        sums += batch_sums
        own[:, done : done + len(probs)] = torch.stack(
            [reorder(probs.float(), assignment), batch["speaker_mask"].float()])
        done += len(probs)
    sums, (probabilities, truths) = sum_over_processes(sums), sum_over_processes(found).cpu()
    scores = dict(zip(SCORES, (sums[0] / sums[1].clamp(min=1e-9)).tolist(), strict=True))
    if not sums[1, SCORES.index("si_sdr_improvement")]:
        scores["si_sdr_improvement"] = None
    scores["total"] = weights.total(*(scores[part] for part in LOSS_PARTS[1:]))
    scores["trivial_mse"] = {name: scores.pop(name) for name in TRIVIAL_OUTPUTS}
    truths = truths.bool()
    threshold = separator.threshold if threshold is None else threshold
    first = first_threshold(separator)
    if calibrate and len(truths) > 1:
        threshold = calibrate_threshold(probabilities[::2], truths[::2], first)
        probabilities, truths = probabilities[1::2], truths[1::2]
    return scores | count_scores(probabilities, truths, threshold, num_speakers, first)


# --------------------------------------------------------------------------------------------------
# Infer


class Separation(NamedTuple):
    """Streams [S, T, D] of one recording, their probabilities [S] and which are talkers [S]."""

    streams: Tensor
    probabilities: Tensor
    active: Tensor


@torch.inference_mode()
def separate(
    separator, features: Tensor, threshold: float | None = None, num_speakers: int | None = None
) -> Separation:
    """Separate the features [T, D] of one recording.

    A stream is a talker if its probability reaches ``threshold`` (default: the separator's); for a
    spectrogram's likeliest stream 0.5 is enough (``first_threshold``). If given, the
    ``num_speakers`` likeliest streams are the talkers instead.
    """
    if features.dim() != 2:
        raise ValueError(f"features must be [T, D], not {list(features.shape)}")
    weight = separator.speaker_queries
    separated, probs = separator.eval()(features.to(weight.device, weight.dtype)[None])
    separated, active = choose_talkers(
        separator, separated, features[None], probs, threshold, num_speakers)
    return Separation(separated[0].float(), probs[0], active[0])


def infer_features(path: Path, separator, threshold, num_speakers) -> tuple[dict, Tensor, list]:
    """Separate a .npy file; return facts, mixture, and (facts, features, audio) of each talker."""
    features, width = read_features(path), separator.feature_dim
    (T, D), widths = features.shape, [width] if width else [80, 128]  # Whisper's mel bins
    if D not in widths and (width or T in widths):
        hint = f"; save them as [T, {T}], transposed" if T in widths else ""
        raise ValueError(f"{path} holds features {D} wide and the separator reads "
                         f"{' or '.join(map(str, widths))}{hint}")
    if features.abs().max() > 1e15:
        raise ValueError(f"{path} holds values too large to be squared in float32: scale them")
    streams, probs, active = separate(separator, features, threshold, num_speakers)
    probs = [round(p, 4) for p in probs.tolist()]
    talkers = [({"stream": s, "probability": probs[s]}, streams[s].cpu(), None)
               for s in active.nonzero().flatten().tolist()]
    about = {"frame_rate": separator.feature_source.get("frame_rate"), "probabilities": probs}
    return about, features, talkers


def infer_recording(
    audio, separator, encoder=None, threshold: float | None = None,
    num_speakers: int | None = None, sampling_rate: int | None = None, num_bins: int = 80,
) -> tuple[dict, Tensor, list]:
    """Separate a recording of any length: a path, or samples at 16 kHz or ``sampling_rate``.

    Returns facts (``frame_rate``, ``num_windows``), the mixture's spectrogram [T, D] and, for each
    talker, facts (``probability``, ``windows``), spectrogram [T, D] and audio [samples] at 16 kHz.
    Spectrograms have ``num_bins`` mel bins; an uncertain number of talkers may depend on it. If any
    audio exceeds full scale, all talkers are scaled down by the same factor. A separator of hidden
    features needs ``encoder`` and gives no audio. The separator is left in evaluation mode.
    Raises the errors of ``read_audio``.
    """
    from audio import apply_gains, check_length, read_audio
    from long_recordings import separate_recording

    samples = None
    if encoder is None:  # read once, for spectrograms and audio
        samples = torch.from_numpy(read_audio(audio, sampling_rate))
        check_length(audio, len(samples))  # names the file
        audio, sampling_rate = samples, None
    recording = separate_recording(
        window_separator(separator, threshold, num_speakers), audio, encoder,
        num_bins, num_speakers, sampling_rate)
    talkers = []
    for talker in tqdm(recording.talkers, "sound", leave=False, disable=None):
        values, waveform = talker.values, None
        if encoder is None:
            values = recording.stream(talker)
            waveform = apply_gains(samples, talker.values[None])[0]
        facts = {"probability": talker.probability, "windows": talker.windows}
        talkers.append((facts, values, waveform))
    loudest = max((float(w.abs().max()) for *_, w in talkers if w is not None), default=0.0)
    for *_, waveform in talkers if loudest > 1 else ():
        waveform /= loudest
    about = {"frame_rate": recording.frame_rate, "num_windows": recording.num_windows}
    return about, recording.mixture, talkers


def write_separation(folder: Path, about: dict, mixture: Tensor, talkers: list, log_mel: bool):
    """Write the talkers' files, separation.json and separation.png in place of earlier ones."""
    source, panels, files = Path(about["input"]).resolve(), {"mixture": mixture}, {}
    about = about | {"num_frames": len(mixture), "num_speakers": len(talkers), "speakers": []}
    for number, (facts, values, audio) in enumerate(talkers, start=1):
        row = {"file": f"speaker_{number}.npy"}
        files[row["file"]] = values.numpy()
        if audio is not None:
            row["audio"] = f"speaker_{number}.wav"
            files[row["audio"]] = audio.numpy()
        about["speakers"].append(row | facts)
        panels[f"speaker {number}, probability {facts['probability']:.2f}"] = values
    if source in [(folder / name).resolve() for name in files]:
        raise ValueError(f"{source} is the input and would be overwritten: choose another "
                         "--output_dir")
    ours = (folder / "separation.json").is_file()  # files of another origin stay
    if ours:
        print(f"replacing the earlier separation in {folder}")
    elif foreign := [name for name in (*files, "separation.png") if (folder / name).exists()]:
        raise ValueError(f"{folder / foreign[0]} is not of an earlier separation and would be "
                         "overwritten: choose another --output_dir")
    staging = folder / ".separation"  # earlier results stay until these are whole
    try:
        shutil.rmtree(staging, ignore_errors=True)  # of a process that was killed
        staging.mkdir()
        for name, values in tqdm(files.items(), "files", leave=False, disable=None):
            write = np.save if name.endswith(".npy") else import_sibling("audio").write_wav
            write(staging / name, values)
        write_json(staging / "separation.json", about)
        if scoring := import_sibling("scoring"):
            picture = staging / "separation.png"
            scoring.plot_streams(picture, [panels], about["frame_rate"], log_mel)
        for old in folder.glob("speaker_*.*") if ours else ():
            number = old.stem.removeprefix("speaker_")
            if old.suffix in (".npy", ".wav") and number.isdigit() and old.resolve() != source:
                old.unlink()
        for path in staging.iterdir():
            path.replace(folder / path.name)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


# --------------------------------------------------------------------------------------------------
# Integrate: the frozen encoder, cut at a block for separators of its hidden features


def audio_tower_of(model: nn.Module) -> nn.Module:
    """Return the encoder of a Qwen2-Audio or Whisper model; ValueError if it is neither."""
    inner = getattr(model, "model", model)  # older versions keep Qwen2-Audio's parts on the model
    for name in ("audio_tower", "encoder"):
        tower = getattr(inner, name, None)
        if hasattr(tower, "conv1"):
            return getattr(tower, "_orig_mod", tower)  # of a compiled one
    raise ValueError(f"{type(model).__name__} is neither Qwen2-Audio nor Whisper")


def audio_frames(mel_mask: Tensor, hidden: Tensor, stride: int) -> Tensor:
    """Return which frames [B, T] of ``hidden`` are audio; ``stride`` mel frames make one."""
    lengths = (mel_mask.sum(-1).to(hidden.device) + 1) // stride
    return torch.arange(hidden.shape[1], device=hidden.device) < lengths[:, None]


def run_blocks(tower: nn.Module, hidden: Tensor, blocks, frame_mask: Tensor | None) -> Tensor:
    """Run encoder blocks on ``hidden [B, T, D]``; only Qwen2-Audio's mask frames without audio."""
    attention_mask = None
    if hasattr(tower, "avg_pooler") and frame_mask is not None and not frame_mask.all():
        from transformers.masking_utils import create_bidirectional_mask

        attention_mask = create_bidirectional_mask(  # in the form that the model's attention takes
            config=tower.config, inputs_embeds=hidden, attention_mask=frame_mask)
    for block in blocks:
        hidden = block(hidden, attention_mask)
    return hidden


def tower_rest(tower: nn.Module, hidden: Tensor, frame_mask, layer: int | None) -> Tensor:
    """Run what follows block ``layer`` of an encoder on ``hidden [B, T, D]``."""
    if layer is None:  # separated at the encoder's output
        return hidden
    hidden = run_blocks(tower, hidden, tower.layers[layer:], frame_mask)
    if hasattr(tower, "avg_pooler"):
        hidden = tower.avg_pooler(hidden.transpose(1, 2)).transpose(1, 2)
    return tower.layer_norm(hidden)


def tower_front(
    tower: nn.Module, input_features: Tensor, mel_mask: Tensor, layer: int | None
) -> tuple[Tensor, Tensor]:
    """Run an encoder up to and with block ``layer`` (0: the convolutions only; None: all of it).

    ``input_features [B, mel bins, mel frames]``, ``mel_mask [B, mel frames]`` 1 where there is
    audio; returns the hidden states [B, T, D] and which frames are audio [B, T].
    """
    weight = tower.conv1.weight
    hidden = F.gelu(tower.conv1(input_features.to(weight.device, weight.dtype)))
    hidden = F.gelu(tower.conv2(hidden)).transpose(1, 2) + tower.embed_positions.weight
    frame_mask = audio_frames(mel_mask, hidden, 2)
    hidden = run_blocks(tower, hidden, tower.layers[:layer], frame_mask)
    if layer is not None:
        return hidden, frame_mask
    hidden = tower_rest(tower, hidden, None, len(tower.layers))  # no block: pooling and norm
    stride = 4 if hasattr(tower, "avg_pooler") else 2
    return hidden, audio_frames(mel_mask, hidden, stride)


# --------------------------------------------------------------------------------------------------
# Integrate: what a call of generate asks for

# Options that make Whisper read a recording again; temperature only as a list of several.
READ_AGAIN = ("return_timestamps", "temperature", "no_speech_threshold")
SPECULATIVE = ("assistant_model", "prompt_lookup_num_tokens")


def audio_slots(model, ids: Tensor) -> list[list[int]]:
    """Return [start, end] of every run of audio tokens in one prompt [L]."""
    edges = F.pad((ids == model.config.audio_token_id).int(), (1, 1)).diff().nonzero()
    return edges.view(-1, 2).tolist()


def check_call(integration: Integration, ids, features, mode: str, asked: dict) -> None:
    """Fail if a call of ``generate`` does not fit the model, the separator or its prompts."""
    frames = 0 if features is None else features.shape[-1]
    if mode not in ("separate", "joint"):
        raise ValueError(f"mode must be separate or joint, not {mode!r}")
    if frames > integration.mel_frames:
        raise ValueError(f"the recording has {frames} mel frames and the model reads "
                         f"{integration.mel_frames} at a time: answer_per_talker reads longer ones")
    if features is not None and asked.get("encoder_outputs") is not None:
        raise ValueError("encoder_outputs are those of the mixture: give input_features alone")
    if ids is not None:
        check_prompts(integration.model, ids, features, mode, asked)
        embedded = features is not None and (
            mode == "joint" or not integration.separator.is_spectrogram)
        for name in SPECULATIVE:
            if embedded and asked.get(name):
                raise ValueError(f"{name} gives other words with inputs_embeds, which joint mode "
                                 "and separators of hidden features need")
        return
    if mode == "joint":
        raise ValueError("mode='joint' needs a prompt with an audio slot, as in Qwen2-Audio")
    for name in () if integration.separator.is_spectrogram else READ_AGAIN:
        value = asked.get(name)
        if value and not (name == "temperature" and isinstance(value, (int, float))):
            raise ValueError(f"{name} makes Whisper read the recording again, which a separator of "
                             "hidden features cannot serve: use a spectrogram separator")


def check_prompts(model, ids: Tensor, features, mode: str, asked: dict) -> None:
    """Fail unless the audio slots of the prompts [P, L] fit the recordings."""
    slots = [len(audio_slots(model, row)) for row in ids]
    if features is None:
        if any(slots) and asked.get("past_key_values") is None:
            raise ValueError("the prompt has an audio slot but no audio came with it: give the "
                             "processor audio=... (it ignores audios=)")
    elif sum(slots) != len(features):
        raise ValueError(f"{len(slots)} prompts with {sum(slots)} audio slots came with "
                         f"{len(features)} recordings: give one per slot")
    elif mode == "separate" and set(slots) != {1}:
        raise ValueError(f"a prompt has {max(slots)} audio slots: one answer per talker takes one "
                         "slot each; mode='joint' puts the talkers of every slot in its place")
    elif asked.get("feature_attention_mask") is None:
        raise ValueError("the recordings came without the processor's feature_attention_mask")


def repeat_rows(kwargs: dict, recordings: list[int], A: int) -> dict:
    """Repeat what belongs to one of ``A`` recordings for each of its rows."""
    repeated = dict(kwargs)
    for name, value in kwargs.items():
        if isinstance(value, Tensor) and value.dim() > 1 and len(value) == A:
            repeated[name] = value[recordings]
        elif name == "language" and isinstance(value, (list, tuple)):
            if len(value) != A:
                raise ValueError(f"{len(value)} languages came with {A} recordings: give one each")
            repeated[name] = [value[recording] for recording in recordings]
    return repeated


def joint_prompts(model, ids: Tensor, recordings: list[int], labels: list[int], kwargs: dict):
    """Replace each audio slot of a prompt by one labelled audio slot per talker.

    Returns the new prompts and their mask [P, L], padded on the left, and the indices of the
    original prompts; prompts without any talker are left out.
    """
    tokenizer, mask = kwargs.get("tokenizer"), kwargs.get("attention_mask")
    if mask is None:
        mask = torch.ones_like(ids)
    if tokenizer is None:
        raise ValueError("mode='joint' labels the talkers: give tokenizer=processor.tokenizer")
    around = tokenizer.convert_tokens_to_ids(["<|audio_bos|>", "<|audio_eos|>"])
    prompts, recording = {}, 0
    for b, row in enumerate(ids):
        row, pieces, rest, talkers = row[mask[b] != 0], [], 0, 0
        for start, end in audio_slots(model, row):
            start -= start > 0 and int(row[start - 1]) in around
            end += end < len(row) and int(row[end]) in around
            pieces.append(row[rest:start])
            for label in (labels[i] for i, a in enumerate(recordings) if a == recording):
                words = tokenizer(f"Speaker {label}: ", add_special_tokens=False)["input_ids"]
                pieces += [row.new_tensor(words), row[start:end]]
                talkers += 1
            rest, recording = end, recording + 1
        if talkers:
            prompts[b] = torch.cat([*pieces, row[rest:]])
    padded = nn.utils.rnn.pad_sequence(
        list(prompts.values()), batch_first=True, padding_value=-1, padding_side="left")
    filled = padded.where(padded >= 0, model.generation_config.pad_token_id or 0)
    return filled, (padded >= 0).to(mask.dtype), list(prompts)


def no_rows(ids, asked: dict):
    """Return the output of ``generate`` for no rows, in the requested form."""
    from transformers.generation import GenerateDecoderOnlyOutput

    empty, more = torch.zeros(0, 0, dtype=torch.long) if ids is None else ids[:0], {}
    timed = asked.get("return_dict_in_generate") and asked.get("return_timestamps")
    if asked.get("return_segments") or timed:
        more["segments"] = []
    if asked.get("return_token_timestamps"):
        more["token_timestamps"] = empty.float()
    if more:
        return {"sequences": empty, **more}
    if asked.get("return_dict_in_generate"):
        return GenerateDecoderOnlyOutput(sequences=empty)
    return empty


# --------------------------------------------------------------------------------------------------
# Integrate: what generate does with a separator in the model


class Integration:
    """The changed behaviour of an integrated model; stored on the model until removed."""

    def __init__(self, model, separator, layer: int | None, threshold: float | None):
        self.model, self.separator, self.layer = model, separator, layer
        self.threshold = threshold
        config = getattr(model, "config", None)
        self.is_qwen = hasattr(config, "audio_config")
        encoder = getattr(config, "audio_config", config)
        # Mel frames in the model's window, and mel frames to a frame that the separator reads.
        self.mel_frames = 2 * getattr(encoder, "max_source_positions", math.inf)
        self.stride = 4 if self.is_qwen and layer is None else 2  # its output is pooled
        if separator.is_spectrogram:
            self.stride = 1
        # A library (accelerate) may have put its own generate on the object: call and restore it.
        self.own_generate, self.original_generate = vars(model).get("generate"), model.generate

    def settings(self, config, given: dict) -> dict:
        """Return options of ``generate``: the model's, then a configuration's, then those given.

        As in transformers, what is None in a configuration is not set there.
        """
        configs = [getattr(self.model, "generation_config", None), config]
        return {name: value for c in filter(None, configs) for name, value in vars(c).items()
                if value is not None} | given

    @torch.no_grad()
    def separate(self, features: Tensor, mel_mask: Tensor | None):
        """Separate ``features [A, mel bins, mel frames]`` of A recordings.

        Returns streams [A, S, T, D], frame masks [A, T] and probabilities [A, S].
        """
        mixture = features.transpose(1, 2)
        if self.is_qwen and mel_mask is not None:
            inside = mel_mask.bool()
        else:  # Whisper's processor gives a mask only if asked: keep frames up to the last sound
            inside = sounding_frames(mixture.float()).flip(1).cummax(1).values.flip(1)
        if not self.separator.is_spectrogram:
            mixture, inside = tower_front(audio_tower_of(self.model), features, inside, self.layer)
        weight = self.separator.to(mixture.device).speaker_queries
        streams, probs = self.separator(mixture.to(weight.dtype), inside)
        if not self.separator.is_spectrogram:  # past its end a talker is as silent as the mixture
            streams = streams.to(mixture.dtype).where(inside[:, None, :, None], mixture[:, None])
        return streams, inside, probs

    def window_separator(self, num_speakers: int | None):
        """Return the function that ``long_recordings.separate_recording`` calls on its windows."""
        self.separator.to(self.model.device)
        return window_separator(self.separator, self.threshold, num_speakers)

    def choose_rows(
        self, features, mel_mask, num_speakers: int | None, reach_threshold: bool = False
    ):
        """Return streams, masks, a row (recording, stream, probability) per talker, and labels.

        Labels count the talkers of each recording from 1.
        """
        streams, frame_mask, probs = self.separate(features, mel_mask)
        streams, active = choose_talkers(
            self.separator, streams, features.transpose(1, 2), probs, self.threshold, num_speakers,
            reach_threshold)
        rows = [(a, s, float(probs[a, s])) for a, s in active.nonzero().tolist()]
        return streams, frame_mask, rows, active.cumsum(1)[active].tolist()

    def _rows_of_encoder_outputs(self, rows: list, kwargs: dict, asked: dict) -> tuple[list, dict]:
        """Repeat rows for several answers each, since Whisper does not repeat encoder_outputs.

        Timestamp tokens are suppressed: Whisper would seek to the last one and encode again.
        """
        copies = asked.get("num_return_sequences") or 1
        kwargs = kwargs | {"num_return_sequences": 1}
        last = getattr(self.model.generation_config, "no_timestamps_token_id", None)
        if last is not None:
            timestamps = range(last + 1, self.model.config.vocab_size)
            kwargs["suppress_tokens"] = [*timestamps, *(asked.get("suppress_tokens") or [])]
        return [row for row in rows for _ in range(copies)], kwargs

    @torch.no_grad()
    def _model_inputs(self, ids, streams: Tensor, frame_mask, dtype, kwargs: dict, joint: bool):
        """Return the first argument and keywords of ``generate`` for streams [R, T, D].

        Whisper takes spectrograms, or ``encoder_outputs`` of hidden features; Qwen2-Audio takes
        ``input_features``, or ``inputs_embeds`` of hidden features and in joint mode.
        """
        if self.separator.is_spectrogram:
            spectrograms = streams.transpose(1, 2).to(dtype)
            if not self.is_qwen:
                return spectrograms, kwargs
            if not joint:
                return ids, kwargs | {"input_features": spectrograms}
            # generate would repeat the recordings of one prompt for beams in the wrong order.
            hidden, _ = tower_front(audio_tower_of(self.model), spectrograms, frame_mask, None)
        else:
            hidden = tower_rest(audio_tower_of(self.model), streams, frame_mask, self.layer)
        if not self.is_qwen:
            from transformers.modeling_outputs import BaseModelOutput

            kwargs.pop("attention_mask", None)
            return None, kwargs | {"encoder_outputs": BaseModelOutput(hidden)}
        del kwargs["input_features"]
        audio = getattr(self.model, "model", self.model).multi_modal_projector(hidden)
        inside = audio_frames(kwargs.pop("feature_attention_mask"), audio, 4)
        embeds = self.model.get_input_embeddings()(ids)
        slots = (ids == self.model.config.audio_token_id)[..., None].to(embeds.device)
        embeds = embeds.masked_scatter(slots, audio[inside].to(embeds))
        return ids, kwargs | {"inputs_embeds": embeds}

    def generate(
        self, inputs=None, *args, num_speakers=None, mode="separate", choose_rows=None, **kwargs
    ):
        """Replace the model's ``generate``; ``integrate_speaker_separator`` explains it.

        ``choose_rows`` is for ``long_recordings``, which numbers talkers across windows.
        """
        model, ids, joint = self.model, None, mode == "joint"
        model.speaker_rows = None
        asked = self.settings(kwargs.get("generation_config") or (args or [None])[0], kwargs)
        if self.is_qwen:
            ids, features = kwargs.pop("input_ids", inputs), kwargs.get("input_features")
        else:
            features = kwargs.pop("input_features", inputs)
        check_call(self, ids, features, mode, asked)
        if features is None:
            return self.original_generate(ids, *args, **kwargs)
        mask_name = "feature_attention_mask" if self.is_qwen else "attention_mask"
        mel_mask = kwargs.get(mask_name)
        choose_rows = choose_rows or self.choose_rows
        streams, frame_mask, rows, labels = choose_rows(features, mel_mask, num_speakers)
        if not rows:
            model.speaker_rows = []
            return no_rows(ids, asked)
        if not (self.is_qwen or self.separator.is_spectrogram):
            rows, kwargs = self._rows_of_encoder_outputs(rows, kwargs, asked)
        recordings, chosen = [a for a, _, _ in rows], [s for _, s, _ in rows]
        if joint:
            prompts, mask, kept = joint_prompts(model, ids, recordings, labels, kwargs)
            kwargs |= {"attention_mask": mask, mask_name: mel_mask[recordings]}
        else:
            prompts = ids[recordings] if self.is_qwen else None
            kwargs = repeat_rows(kwargs, recordings, len(features))
        main, kwargs = self._model_inputs(
            prompts, streams[recordings, chosen], frame_mask[recordings], features.dtype, kwargs,
            joint)
        if args:
            args = (main, *args)
        elif main is not None:  # by name: PEFT's generate of Whisper takes no position
            kwargs["input_ids" if self.is_qwen else "input_features"] = main
        output = self.original_generate(*args, **kwargs)
        sequences = output if isinstance(output, Tensor) else output["sequences"]
        copies = 1 if joint else len(sequences) // len(rows)
        model.speaker_rows = [row for row in rows for _ in range(copies)]
        if joint:  # the caller cuts off its own prompts by their length
            own = ids[kept].repeat_interleave(len(sequences) // len(kept), dim=0)
            sequences = torch.cat([own, sequences[:, prompts.shape[1] :]], dim=1)
        if isinstance(output, Tensor):
            return sequences
        output["sequences"] = sequences
        return output


# --------------------------------------------------------------------------------------------------
# Integrate: put a separator into a model and take it out


def warn_of_other_features(separator, source: dict) -> None:
    """Warn in one line if a separator gets other features than it was trained on."""
    trained = {} if separator.is_spectrogram else separator.feature_source
    for key, name in (("kind", "{} features"), ("encoder", "features of {}"),
                      ("layer", "features after layer {}")):
        if key not in trained:
            continue
        values = trained[key], source.get(key, trained[key])
        before, now = (Path(str(value)).name for value in values)  # folders by their last name
        if before != now:
            print(f"warning: the separator was trained on {name.format(before)} and gets "
                  f"{name.format(now)}: its streams will mean nothing; for recordings use a "
                  "spectrogram separator", file=sys.stderr)
            return


def check_fit(separator, config, layer: int | None) -> None:
    """Fail unless a separator fits an encoder of this configuration, cut after block ``layer``."""
    if separator.is_spectrogram:
        if layer is not None:
            raise ValueError("--layer is for separators of hidden features; this one reads "
                             "spectrograms")
    elif separator.feature_dim != config.d_model:
        raise ValueError(f"the separator reads features {separator.feature_dim} wide and the model "
                         f"has {config.d_model}: train one on these features, or use a spectrogram "
                         "separator, which fits every model")
    elif layer is not None and not 0 <= layer <= config.encoder_layers:
        raise ValueError(
            f"layer must be 0 to {config.encoder_layers} for this encoder, not {layer}")


def freeze(separator: nn.Module) -> None:
    """Turn off dropout and gradients of a separator inside a model; ``thaw`` restores them."""
    if not hasattr(separator, "_frozen"):
        needed = [weight.requires_grad for weight in separator.parameters()]
        separator._frozen = {"models": 0, "training": separator.training, "needed": needed}
    separator._frozen["models"] += 1
    separator.eval().requires_grad_(False)


def thaw(separator: nn.Module) -> None:
    """Restore what ``freeze`` changed, once the separator is in no model any more."""
    frozen = separator._frozen
    frozen["models"] -= 1
    if frozen["models"] > 0:
        return
    separator.train(frozen["training"])
    for weight, needed in zip(separator.parameters(), frozen["needed"], strict=True):
        weight.requires_grad_(needed)
    del separator._frozen


def remove_speaker_separator(model):
    """Take the separator out again; the model is then what it was, bit for bit."""
    integration = getattr(model, "_speaker_integration", None)  # also of a wrapped model
    if integration is None:
        return model
    attributes = vars(integration.model)
    for name in ("_speaker_integration", "generate", "speaker_separator", "speaker_rows"):
        del attributes[name]
    if integration.own_generate is not None:
        attributes["generate"] = integration.own_generate
    thaw(integration.separator)
    return model


def integrate_speaker_separator(
    model, max_speakers: int | None = None, separator_checkpoint=None, layer: int | None = None,
    threshold: float | None = None,
):
    """Put a separator into a speech model, in place: ``generate`` then answers per talker.

    ``model.generate(**inputs)`` returns one row per active talker, grouped by sample, ``[0, L]`` if
    there is none; ``model.speaker_rows`` lists their (sample, stream, probability), from 0. Two
    more options: ``num_speakers``, when it is known, and ``mode="joint"`` with
    ``tokenizer=processor.tokenizer``: one row per prompt, in which every talker has an audio slot
    after the words "Speaker 1:"; ``speaker_rows`` then lists the slots. A ``pipeline`` of
    transformers expects one row per sample and is of no use here.

    Parameters
    ----------
    model : Qwen2AudioForConditionalGeneration or WhisperForConditionalGeneration
        May be compiled, in half precision or spread over devices. A spectrogram separator fits any
        model whose ``generate`` takes Whisper's ``input_features``. The separator becomes
        ``model.speaker_separator``; it is not in the model's ``state_dict`` and is saved by its own
        ``save_pretrained``.
    max_speakers : int, optional
        Fail if the checkpoint has fewer streams; without a checkpoint, the number of streams.
    separator_checkpoint : path, hub id or separator, optional
        Without it: a separator of hidden features with random weights, good for tests only.
    layer, threshold : int and float, optional
        Default: those of the checkpoint. A separator of hidden features separates after encoder
        block ``layer``.

    Raises FileNotFoundError or ValueError if model or checkpoint cannot be used or differ in size.
    """
    whole = getattr(model, "_orig_mod", model)  # of a compiled one
    separator = separator_checkpoint
    check_threshold(threshold)
    if separator is None:
        width = audio_tower_of(whole).config.d_model
        streams = 3 if max_speakers is None else max_speakers
        separator = SpeakerSeparatorTransformer(width, streams).eval()
        print("warning: this separator has random weights; give separator_checkpoint, for example "
              "that of load_separator()", file=sys.stderr)
    elif isinstance(separator, str | os.PathLike):
        separator = load_separator(separator)
    elif not hasattr(separator, "is_spectrogram"):
        raise ValueError("separator_checkpoint must be a path, a hub id or a separator, not a "
                         f"{type(separator).__name__}")
    if not callable(getattr(whole, "generate", None)):
        raise ValueError(f"{type(whole).__name__} has no generate method, which a separator needs")
    layer = separator.feature_source.get("layer") if layer is None else layer
    check_fit(separator, None if separator.is_spectrogram else audio_tower_of(whole).config, layer)
    warn_of_other_features(separator, {"kind": "speech", "layer": layer})
    if max_speakers is not None and separator.max_speakers < max_speakers:
        raise ValueError(f"the separator has {separator.max_speakers} streams and "
                         f"max_speakers={max_speakers} was asked for")
    remove_speaker_separator(model)
    integration = Integration(whole, separator, layer, threshold)
    freeze(separator)
    # Bypass nn.Module: the separator stays out of the model's weights and keeps its precision.
    vars(whole).update(
        _speaker_integration=integration, speaker_separator=separator, speaker_rows=None,
        generate=integration.generate)
    return model


# --------------------------------------------------------------------------------------------------
# Evaluate words


def transcribe(model, processor, recordings: list, **options) -> list[list[str]]:
    """Return what a model says of each recording: one text, or one per talker if integrated."""
    from long_recordings import ask

    answers: list[list[str]] = [[] for _ in recordings]
    for start in tqdm(range(0, len(recordings), 16), "answers", leave=False, disable=None):
        batch = recordings[start : start + 16]
        texts = ask(model, processor, batch, **options)
        rows = getattr(model, "speaker_rows", None)
        samples = range(len(batch)) if rows is None else [sample for sample, _, _ in rows]
        for sample, text in zip(samples, texts, strict=True):
            answers[start + sample].append(text)
    return answers


def transcribed_samples(dataset: MultiSpeakerDataset) -> list[dict]:
    """Return the mixtures of recordings all of whose talkers have a text; ValueError if none."""
    recorded = all("mixed_wav" in sample and all("wav_file" in s for s in sample["speakers"])
                   for sample in dataset.samples)
    samples = [s for s in dataset.samples if all(speaker.get("text") for speaker in s["speakers"])]
    if not recorded or not any(sample["speakers"] for sample in samples):
        raise ValueError(f"{dataset.folder} has no recordings with transcripts to count words of: "
                         "make it with a --speech_dir that has both, and no --max_seconds that "
                         "cuts them")
    return samples


def evaluate_words(
    separator, dataset: MultiSpeakerDataset, model, processor, *, threshold: float | None = None,
    num_speakers: int | None = None, **options,
) -> list[dict]:
    """Count word errors for the mixtures of a dataset of recordings, with and without separator.

    Returns one dict per mixture whose talkers all have a transcript: ``talkers, overlap, words,
    found`` (talkers) and the word errors of ``mixture`` (the model as it is), ``separated`` and
    ``oracle`` (each talker alone). ``options`` (``prompt`` and those of ``generate``) go to the
    model. Raises ValueError if there are no recordings or transcripts.
    """
    from audio import read_audio
    from long_recordings import integration_of
    from scoring import cp_word_errors

    if integration_of(model) is not None:
        raise ValueError("there is a separator in this model: remove_speaker_separator first")
    samples = transcribed_samples(dataset)
    if left_out := len(dataset) - len(samples):
        print(f"words are counted without {left_out} mixtures that lack a talker's transcript")
    said = [[speaker["text"] for speaker in sample["speakers"]] for sample in samples]
    files = [dataset.files(sample, recordings=True) for sample in samples]
    mixtures = [read_audio(paths[0]) for paths in files]
    if cut := sum(len(mixture) > processor.feature_extractor.n_samples for mixture in mixtures):
        print(f"{cut} mixtures are longer than the model's window: it hears only their start")
    alone = [read_audio(path) for paths in files for path in paths[1:]]
    answers = {"mixture": transcribe(model, processor, mixtures, **options)}
    singles = iter(transcribe(model, processor, alone, **options))
    answers["oracle"] = [[text for _ in talkers for text in next(singles)] for talkers in said]
    integrate_speaker_separator(model, separator_checkpoint=separator, threshold=threshold)
    try:
        answers["separated"] = transcribe(
            model, processor, mixtures, num_speakers=num_speakers, **options)
    finally:
        remove_speaker_separator(model)
    rows = []
    for i, sample in enumerate(samples):
        errors = {name: cp_word_errors(said[i], texts[i]) for name, texts in answers.items()}
        rows.append({
            "id": sample["id"], "talkers": len(said[i]), "overlap": sample.get("overlap"),
            "words": errors["oracle"][1], "found": len(answers["separated"][i]),
            **{name: count for name, (count, _) in errors.items()}})
    return rows


# --------------------------------------------------------------------------------------------------
# Commands: results and inputs


def check_writable(*files: str | None, inputs=()) -> None:
    """Fail, before any work, unless every result file can be written and none is an input."""
    files = [file for file in files if file]
    paths = [Path(file).resolve() for file in files]
    if len(set(paths)) < len(paths):
        raise ValueError("two results would go into the same file: choose another name")
    for file, path in zip(files, paths, strict=True):
        if path.exists() and any(is_inside(path, i) for i in inputs if i):
            raise ValueError(f"{file} is an input and would be overwritten: choose another name")
        if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
            raise ValueError(f"cannot write {file}: no such folder, or no permission to write")


def result_options(args) -> dict:
    """Return the options that a recording's results depend on, for its line of JSON."""
    names = ("checkpoint", "encoder", "layer", "threshold", "num_speakers", "mode",
             "prompt", "language", "max_new_tokens")
    return {name: getattr(args, name) for name in names if hasattr(args, name)}


def resume_results(
    file: str | None, key: str, options: dict, model: str | None = None
) -> dict[str, dict]:
    """Return the results in a file of JSON lines by input; remove a half-written last line.

    ``key`` is in every line that the command at hand writes; ValueError if a line lacks it, or
    names another ``model`` or other ``options``.
    """
    if file is None or not Path(file).is_file():
        return {}
    with reading(file, "is not what --jsonl wrote"):
        content = Path(file).read_bytes()
        with contextlib.suppress(ValueError):  # a whole line that only lacks its end
            json.loads(content.rpartition(b"\n")[2])
            content += b"\n"
        *lines, rest = content.split(b"\n")
        rows = [json.loads(line) for line in lines]
        if not b'{"input": '.startswith(rest[:10]):
            raise ValueError("no line of results at its end")
        if not all({"input", key} <= row.keys() for row in rows):
            raise ValueError("another command's lines")
        if any(row.get("model", model) != model for row in rows):
            raise ValueError("another model's answers")
        for row, name in product(rows, options):
            if row.get("options", options).get(name) != options[name]:
                raise ValueError(f"a line was made with another --{name}")
        done = {row["input"]: row for row in rows}
    if rest:
        os.truncate(file, len(content) - len(rest))
    elif len(content) > Path(file).stat().st_size:
        with open(file, "ab") as end:
            end.write(b"\n")
    return done


def all_done(file: str | None, count: int, pending: int) -> bool:
    """Say how many of ``count`` recordings have results already; return whether all have."""
    if not pending:
        print(f"{file} has every recording already")
    elif pending < count:
        print(f"{file} has {count - pending} of {count} recordings already")
    return not pending


def append_line(file: str | None, row: dict) -> None:
    """Append a line of JSON to a file, if there is one."""
    if file is not None:
        with open(file, "a", encoding="utf-8") as lines:
            lines.write(json.dumps(row) + "\n")


def check_recording(path) -> None:
    """Fail unless a recording can be read; warn of what makes it hard to separate."""
    from audio import audio_blocks, check_length, recording_doubts

    check_length(path, sum(map(len, audio_blocks(path))))
    for doubt in recording_doubts(path):
        tqdm.write(f"warning: {path} {doubt}", file=sys.stderr)


def check_all(check: Callable, paths) -> list:
    """Return what ``check`` says of each path; ValueError names every path that it refuses."""
    results, faults = [], []
    for path in tqdm(paths, "check", leave=False, disable=None):
        try:
            results.append(check(path))
        except (OSError, ValueError) as error:
            faults.append(first_line(error))
    if faults:
        raise ValueError("; ".join(faults))
    return results


# --------------------------------------------------------------------------------------------------
# Commands: models and separators


def question_options(args) -> dict:
    """Return the options of a model's answers, None where not given."""
    return {name: getattr(args, name) for name in ("prompt", "language", "max_new_tokens")}


def check_questions(args) -> None:
    """Fail if options of a model's answers are given without a model."""
    given = [f"--{name}" for name, value in question_options(args).items() if value is not None]
    if given and not args.model:
        raise ValueError(f"{given[0]} is for a model's answers: add --model")


def check_prompt(args, config) -> None:
    """Fail if a model of this configuration does not take the given question options."""
    is_whisper = config.model_type == "whisper"
    if is_whisper and (args.prompt is not None or getattr(args, "mode", "") == "joint"):
        option = "--prompt" if args.prompt is not None else "--mode=joint"
        raise ValueError(f"{option} is for Qwen2-Audio; Whisper takes no prompt")
    if args.language is not None and not is_whisper:
        raise ValueError("--language is for Whisper; tell Qwen2-Audio in the --prompt")
    if "<|AUDIO|>" in (args.prompt or ""):
        raise ValueError("--prompt must not hold <|AUDIO|>: the audio is added to it")


def check_language(model: str, language: str, config) -> None:
    """Fail unless a Whisper of this generation configuration writes a language, by code or name."""
    if getattr(config, "is_multilingual", None) is False:
        raise ValueError(f"{model} writes English alone: leave out --language")
    from transformers.models.whisper.tokenization_whisper import TO_LANGUAGE_CODE

    known = [token.strip("<|>") for token in getattr(config, "lang_to_id", None) or ()]
    if known and TO_LANGUAGE_CODE.get(language, language.strip("<|>")) not in known:
        raise ValueError(f"{model} writes no {language!r}; choose a --language from "
                         f"{', '.join(sorted(known))}")


def open_model(args, device: str):
    """Load the model asked for and its processor; fail if it cannot write the --language."""
    from audio import load_model

    model, processor = load_model(args.model, device, args.dtype)
    if args.language:
        check_language(args.model, args.language.lower(), model.generation_config)
    return model, processor


def open_separator(args, spectrograms: bool, device: str):
    """Load the separator asked for, else the default of this input; return it and its path."""
    default = SHIPPED_SEPARATOR if spectrograms else Path(DEFAULT_CHECKPOINT_DIR) / "best_model.pt"
    checkpoint = str(args.checkpoint or default)
    separator = load_separator(checkpoint, device)
    check_num_speakers(args.num_speakers, separator.max_speakers)
    return separator, checkpoint


def is_out_of_memory(error: Exception) -> bool:
    """Return whether PyTorch ran out of a device's memory, or of the machine's."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


@contextlib.contextmanager
def running(model: str):
    """Turn errors that a model's files cause into a ValueError that names the model.

    Errors in this project's code pass through. The random seed is fixed, so that Whisper samples
    the same tokens in every run when it decodes again at a higher temperature.
    """
    try:
        with warnings.catch_warnings(), torch.random.fork_rng():
            warnings.simplefilter("ignore")
            torch.manual_seed(0)
            yield
    except (ValueError, OSError):
        raise
    except Exception as error:
        *_, (frame, _) = traceback.walk_tb(error.__traceback__)
        ours = Path(frame.f_code.co_filename).resolve().parent == Path(__file__).resolve().parent
        if ours or is_out_of_memory(error):
            raise
        raise ValueError(f"{model} cannot be used: {type(error).__name__}, {first_line(error)}"
                         ) from None


# --------------------------------------------------------------------------------------------------
# Commands: train and evaluate


def cmd_train(args) -> None:
    """Train a separator; writes checkpoints, a report and curves."""
    writes = process_rank()[0] == 0
    start = getattr(args, "init_from", None)
    own = {Path(start, name).resolve() for name in ("", "model.safetensors")} if start else ()
    if args.export and Path(args.export, "model.safetensors").resolve() in own:
        raise ValueError(f"--export={args.export} would replace --init_from: name another folder")
    if writes and args.export:
        prepare_export(Path(args.export))
    made = any(Path(args.data_dir).glob("*/metadata.json"))  # a stopped generator leaves none
    missing = args.data_dir == DEFAULT_DATA_DIR and not (made or start or args.resume)
    if writes and missing and (generator := import_sibling("generate_multi_speaker_dataset")):
        print(f"no {DEFAULT_DATA_DIR}: making the default dataset first")
        generator.generate_dataset(generator.build_parser().parse_args([]), "train")
    sum_over_processes(torch.zeros(1))  # wait for it
    folder = Path(args.checkpoint_dir)
    train_speaker_separator(
        args.data_dir, folder, **{k: v for k, v in vars(args).items() if k in TrainOptions._fields})
    reports = [folder / name for name in ("training_report.md", "training_curves.png")]
    names = [p.name for p in (*reports, *list_checkpoints(folder)) if p.exists()]
    print(f"{folder} holds " + ", ".join(names))
    if writes and args.export:
        with reading(args.export, "could not be written"):
            export_separator(load_separator(folder / "best_model.pt"), Path(args.export))
        print(f"exported the best weights to {args.export}")


@torch.inference_mode()
def sample_panels(separator, dataset, device: str, count: int = 3) -> list[dict]:
    """Return mixture, talkers and the streams assigned to them for the first few mixtures."""
    weights, rows = default_weights(separator.is_spectrogram), []
    for index in range(min(count, len(dataset))):
        batch = collate([dataset[index]], separator.max_speakers)
        batch = add_spectrograms(to_device(batch, device))
        separated, probs = separator(batch["mixture"])
        loss = loss_of_streams(separated, probs, batch, weights)
        streams = reorder(separated, loss.assignment)[0]
        row = {f"mixture {dataset.samples[index]['id']}": batch["mixture"][0]}
        for i in range(int(batch["speaker_mask"].sum())):
            row |= {f"speaker {i + 1} alone": batch["targets"][0, i],
                    f"speaker {i + 1} separated": streams[i]}
        rows.append(row)
    return rows


def cmd_evaluate(args) -> None:
    """Score a separator beside the trivial outputs."""
    import scoring
    from audio import load_config

    device = pick_device(args.device)
    check_questions(args)
    if args.picture and Path(args.picture).suffix.lower() != ".png":
        raise ValueError(f"--picture writes .png, not {args.picture}")
    data, default = Path(args.data_dir), Path(DEFAULT_CHECKPOINT_DIR) / "best_model.pt"
    check_writable(args.json, args.picture, inputs=(
        data / args.split, data / "dataset.json", args.checkpoint or default, SHIPPED_SEPARATOR,
        args.model))
    dataset = MultiSpeakerDataset(args.data_dir, args.split)
    check_same_data(dataset)
    separator, checkpoint = open_separator(args, dataset.has_recordings, device)
    check_data(f"the separator {checkpoint}", separator.config, dataset)
    warn_of_other_features(separator, dataset.source)
    if args.model:
        transcribed_samples(dataset)
        check_prompt(args, load_config(args.model))
    scores = evaluate_separator(
        separator, dataset, batch_size=args.batch_size, device=device,
        dtype=pick_dtype(args.dtype, device)[0], threshold=args.threshold,
        num_speakers=args.num_speakers, weights=loss_weights(TrainOptions(), dataset))
    if process_rank()[0]:
        return
    chosen = (f"talkers from probability {scores['threshold']:.2f} on" if args.num_speakers is None
              else f"{args.num_speakers} talkers taken as known")
    print(f"{len(dataset)} mixtures of {args.data_dir}/{args.split}, separator {checkpoint}, "
          f"{chosen}\n")
    print("\n".join(scoring.score_table(scores)))
    print(f"\nactivity precision {scores['precision']:.1%}, recall {scores['recall']:.1%}")
    if (args.threshold is None and args.num_speakers is None
            and separator.calibrated_on == dataset.digest):
        print("Training chose epoch and threshold on these mixtures: counts are better than on "
              "others.")
    if args.picture:
        scoring.plot_streams(
            args.picture, sample_panels(separator, dataset, device),
            separator.feature_source.get("frame_rate"), separator.is_spectrogram)
    write_json(args.json, scores)  # kept if the model fails
    if args.model:
        model, processor = open_model(args, device)
        with running(args.model):
            rows = evaluate_words(
                separator, dataset, model, processor, threshold=args.threshold,
                num_speakers=args.num_speakers, **question_options(args))
        scores["words"] = scoring.word_scores(rows)
        print("\n" + "\n".join(scoring.word_table(scores["words"])))
        bins = processor.feature_extractor.feature_size
        if separator.is_spectrogram and bins != separator.BINS:
            print(f"\nThe model reads {bins} mel bins, the scores above are of {separator.BINS}: "
                  "the talkers found can differ.")
        write_json(args.json, scores)


# --------------------------------------------------------------------------------------------------
# Commands: infer


def open_encoder(args, separator, device: str):
    """Load the encoder whose features a separator reads, from the flags or its checkpoint."""
    from audio import load_audio_encoder

    name = args.encoder or separator.feature_source.get("encoder")
    if not name:
        raise ValueError("the separator was trained on simulated features; audio needs a "
                         "spectrogram separator, or --encoder with the model of its features")
    layer = separator.feature_source.get("layer") if args.layer is None else args.layer
    encoder = load_audio_encoder(name, layer, device)
    check_fit(separator, encoder.tower.config, layer)
    warn_of_other_features(separator, {"kind": "speech", "layer": layer})
    return encoder


def holds_features(path: Path) -> bool:
    """Return whether an input file holds features, not audio; fail if it holds neither."""
    if path.suffix == ".npz":
        raise ValueError(f"{path} is an archive of arrays: save one, features [T, D], as .npy")
    if path.suffix == ".npy":
        open_features(path)
        return True
    check_recording(path)
    return False


def list_inputs(path: Path) -> list[Path]:
    """Return the recordings in a folder, or the .npy files if it has none; a file as it is."""
    if not path.is_dir():
        return [path]
    mixing = import_sibling("mixing")
    recordings = mixing.list_recordings(path, below=False) if mixing else []
    if paths := recordings or sorted(path.glob("*.npy")):
        return paths
    raise ValueError(f"no such audio file: {path} is a folder without recordings or .npy files; "
                     "name one file, or another folder")


def infer_file(args, path: Path, folder: Path, separator, checkpoint: str, encoder) -> None:
    """Separate one mixture into files in a folder, print what was found and add it to --jsonl."""
    options, is_features = (args.threshold, args.num_speakers), path.suffix == ".npy"
    if is_features:
        about, mixture, talkers = infer_features(path, separator, *options)
    else:
        about, mixture, talkers = infer_recording(path, separator, encoder, *options)
    about = {"input": str(path), "checkpoint": checkpoint, **about}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder):
            write_separation(folder, about, mixture, talkers, separator.is_spectrogram)
    except (OSError, RuntimeError) as error:  # soundfile reports a full disk as RuntimeError
        reason = getattr(error, "strerror", None) or first_line(error)
        raise ValueError(f"cannot write to {folder}: {reason}") from None
    probabilities = about.get("probabilities") or [facts["probability"] for facts, *_ in talkers]
    numbers = ", ".join(f"{p:.2f}" for p in probabilities)
    kind = "stream probabilities" if is_features else "probabilities"
    listed = f" ({kind} {numbers})" if probabilities else ""
    print(f"{len(talkers)} talker{'s' * (len(talkers) != 1)}{listed} -> {folder} "
          f"(separator {checkpoint})")
    append_line(args.jsonl, {
        "input": str(path), "output_dir": str(folder), "num_speakers": len(talkers),
        "probabilities": probabilities, "options": result_options(args)})


def cmd_infer(args) -> None:
    """Separate a mixture, or each in a folder, into a file per talker."""
    device, source = pick_device(args.device), Path(args.input)
    check_writable(args.jsonl)
    done = resume_results(args.jsonl, "output_dir", result_options(args))
    inputs = list_inputs(source)
    folders = {path: Path(args.output_dir, path.name if source.is_dir() else "")
               for path in inputs if str(path) not in done}
    if all_done(args.jsonl, len(inputs), len(folders)):
        return
    results = {row["output_dir"]: name for name, row in done.items()}
    for folder in map(str, folders.values()):
        if Path(folder).is_file():
            raise ValueError(f"cannot write to {folder}, which is a file: choose another "
                             "--output_dir")
        if folder in results:
            raise ValueError(f"{folder} holds results of {results[folder]} ({args.jsonl}): choose "
                             "another --output_dir")
    is_features = check_all(holds_features, folders)[0]
    separator, checkpoint = open_separator(args, not is_features, device)
    reads_hidden = not (is_features or separator.is_spectrogram)
    if (args.encoder or args.layer is not None) and not reads_hidden:
        raise ValueError("--encoder and --layer are for audio and a separator of hidden features")
    encoder = open_encoder(args, separator, device) if reads_hidden else None
    for path, folder in folders.items():
        infer_file(args, path, folder, separator, checkpoint, encoder)


# --------------------------------------------------------------------------------------------------
# Commands: integrate and demo


def load_integrated(args, separator, device: str, layer: int | None = None):
    """Put a separator into a model; return ``answer_per_talker`` of it with the options given."""
    from long_recordings import answer_per_talker

    model, processor = open_model(args, device)
    integrate_speaker_separator(
        model, separator_checkpoint=separator, layer=layer, threshold=args.threshold)
    return partial(answer_per_talker, model, processor, **question_options(args))


def cmd_integrate(args) -> None:
    """Print what each talker of a recording says."""
    from audio import load_config

    device, config = pick_device(args.device), load_config(args.model)
    check_writable(args.json, args.jsonl, inputs=(
        *args.audio, args.checkpoint, SHIPPED_SEPARATOR, args.model))
    done = resume_results(args.jsonl, "answers", result_options(args), args.model)
    answers = {audio: done[audio]["answers"] for audio in args.audio if audio in done}
    inputs = dict.fromkeys(args.audio)
    pending = [audio for audio in inputs if audio not in done]
    if all_done(args.jsonl, len(inputs), len(pending)):
        write_json(args.json, answers)
        return
    check_all(check_recording, pending)  # before the model is loaded
    separator, checkpoint = open_separator(args, spectrograms=True, device="cpu")
    check_fit(separator, getattr(config, "audio_config", config), args.layer)
    check_prompt(args, config)
    answer = load_integrated(args, separator, device, args.layer)
    print(f"separator {checkpoint}")
    for audio in pending:
        with running(args.model):
            answers[audio] = answer(audio, num_speakers=args.num_speakers, mode=args.mode)
        append_line(args.jsonl, {"input": audio, "model": args.model, "answers": answers[audio],
                                 "options": result_options(args)})
        if len(args.audio) > 1:
            print(audio)
        for row in answers[audio]:
            numbers = row.get("speakers") or [row["speaker"]]
            who = f"Speaker{'s' * (len(numbers) > 1)} {', '.join(map(str, numbers))}"
            print(f"{who} ({row['probability']:.2f}): {row['text']}")
        if not answers[audio]:
            print("no talker found")
    write_json(args.json, answers)


def cmd_demo(args) -> None:
    """Serve a page on this machine: see and hear each talker, read what each says."""
    device = pick_device(args.device)
    check_questions(args)
    if args.dtype != "auto" and not args.model:
        raise ValueError("--dtype is that of a model: add --model")
    if args.model:
        from audio import load_config

        check_prompt(args, load_config(args.model))
    if importlib.util.find_spec("gradio") is None:
        raise ValueError("the page needs gradio: pip install gradio")
    sys.path.append(str(Path(__file__).resolve().parent / "examples"))
    from demo_page import build_page

    separator, checkpoint = open_separator(args, spectrograms=True, device=device)
    if not separator.is_spectrogram:
        raise ValueError(f"{checkpoint} reads features: the page needs a spectrogram separator")
    answer = load_integrated(args, separator, device) if args.model else None
    infer = partial(infer_recording, separator=separator, threshold=args.threshold)
    if answer:  # separate what the model is given
        infer = partial(infer, num_bins=answer.args[1].feature_extractor.feature_size)
    print(f"separator {checkpoint}")
    page = build_page(infer, answer, separator.max_speakers, args.num_speakers)
    _, address, _ = page.launch(server_name="127.0.0.1", server_port=args.port, inbrowser=True,
                                quiet=True, prevent_thread_lock=True)
    print(f"page {address}, until Ctrl-C", flush=True)
    page.block_thread()


# --------------------------------------------------------------------------------------------------
# Command line: options


def unslashed(name: str) -> str:
    """Return a name without the slash that a shell adds to a folder's: both name one model."""
    return name.rstrip("/") or name


def add_train_arguments(add) -> None:
    """Add the options of ``train``.

    Options that are not given stay unset, so that a resumed run keeps its earlier values.
    """
    add("--data_dir", default=DEFAULT_DATA_DIR, help="dataset; the default one is made if missing")
    add("--checkpoint_dir", default=DEFAULT_CHECKPOINT_DIR, help="checkpoints, report and curves")
    add("--init_from", metavar="PATH_OR_ID", default=argparse.SUPPRESS,
        help="separator to fine-tune, such as pretrained; its sizes stay")
    for name, (default, kind, _, _, text) in OPTIONS.items():
        text += "" if default is None else f" (default: {default})"
        pair = {"nargs": 2, "metavar": ("MIN", "MAX")} if name == "crop_seconds" else {}
        add(f"--{name}", type=kind, default=argparse.SUPPRESS, help=text, **pair)
    add("--no_remix", dest="remix", action="store_false", default=argparse.SUPPRESS,
        help="the same mixtures every epoch instead of fresh ones")
    add("--recompute", action="store_true", default=argparse.SUPPRESS,
        help="recompute blocks in the backward pass, to save memory on long recordings")
    add("--resume", action="store_true", help="go on from the newest checkpoint; more "
        "--epochs than before change the learning rates")
    add("--export", metavar="DIR", help="also save the best weights alone, for from_pretrained")


def add_evaluate_arguments(add) -> None:
    """Add the options of ``evaluate``."""
    add("--data_dir",       default=DEFAULT_DATA_DIR, help="dataset")
    add("--split",          default="val", choices=["val", "train"], help="which mixtures to score")
    add("--batch_size",     default=8, type=int, help="mixtures per step")
    add("--model",          metavar="PATH_OR_ID", type=unslashed,
        help="also count word errors of this model")
    add("--json",           metavar="FILE", help="also write every number to this file")
    add("--picture",        metavar="FILE", help="also draw mixtures, talkers and streams (.png)")


def add_infer_arguments(add) -> None:
    """Add the options of ``infer``."""
    add("--input",      required=True, help="features [T, D] as .npy, audio, or a folder of either")
    add("--jsonl",      metavar="FILE", help="add a line for each input; skip paths that have one")
    add("--encoder",    type=unslashed,
        help="model that makes the features (default: the checkpoint's)")
    add("--output_dir", default="separated", help="folder for speaker_1.npy ...")


def add_integrate_arguments(add) -> None:
    """Add the options of ``integrate``."""
    add("--model",          required=True, type=unslashed,
        help="Qwen2-Audio or Whisper: a folder or a hub id")
    add("--audio",          required=True, nargs="+", action="extend", help="recordings")
    add("--mode",           default="separate", choices=["separate", "joint"],
        help="an answer per talker, or one about all of them in one prompt")
    add("--json",           metavar="FILE", help="also write the answers, and those per window")
    add("--jsonl",          metavar="FILE",
        help="add a line for each recording; skip paths that have one")


def add_demo_arguments(add) -> None:
    """Add the options of ``demo``."""
    add("--model",          metavar="PATH_OR_ID", type=unslashed,
        help="also show what this model answers")
    add("--port",           type=int,
        help="port of 127.0.0.1 (default: the first free one from 7860 on)")


def add_shared_arguments(name: str, add) -> None:
    """Add the options that several commands have."""
    if name != "train":
        more = "" if name in ("integrate", "demo") else " for audio, else checkpoints/best_model.pt"
        add("--checkpoint", type=unslashed, help=f"separator (default: the shipped one{more})")
        add("--threshold", type=float,
            help="lowest probability of a talker (default: the checkpoint's); for spectrograms "
                 "the likeliest stream needs at most 0.5, unless the threshold is 1")
        add("--num_speakers", type=int,
            help="number of talkers, if known; recordings longer than a window may get fewer")
    if name in ("infer", "integrate"):
        add("--layer", type=int, help="encoder block to separate after (default: the checkpoint's)")
    if name in ("evaluate", "integrate", "demo"):
        add("--prompt", help="question to Qwen2-Audio (default: What does the person say?)")
        add("--language", help="language that Whisper writes, such as en (default: detected)")
        add("--max_new_tokens", type=int,
            help="length limit of each answer (default: 256; Whisper: 200)")
    default = argparse.SUPPRESS if name == "train" else "auto"
    add("--device", default=default, help="where to compute: auto, cpu, cuda or mps")
    own, fast = "that of a model's files", "bfloat16 if it is fast"
    auto = {"infer": "float32", "train": fast, "evaluate": f"{fast}; for a --model {own}"}
    choices = ["auto", "float32"] if name == "infer" else ["auto", "float32", "bfloat16"]
    add("--dtype", default=default, choices=choices,
        help=f"precision (auto: {auto.get(name, own)})")


COMMANDS = {  # function, its options and an example
    "train": (cmd_train, add_train_arguments, "--epochs=20 --batch_size=8 --lr=1e-4"),
    "evaluate": (cmd_evaluate, add_evaluate_arguments,
                 "--checkpoint checkpoints/best_model.pt --json scores.json"),
    "infer": (cmd_infer, add_infer_arguments, "--input multi_speaker_data/val/mixed/val_00000.npy"),
    "integrate": (cmd_integrate, add_integrate_arguments,
                  "--model openai/whisper-tiny.en --audio meeting.wav"),
    "demo": (cmd_demo, add_demo_arguments, "--model openai/whisper-tiny.en"),
}


# --------------------------------------------------------------------------------------------------
# Command line: parsers and main


class Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Help within 80 columns: short value names, defaults where there are any, whole examples."""

    def _get_default_metavar_for_optional(self, action):
        kind = getattr(action.type, "__name__", "")
        return {"int": "N", "float": "X"}.get(kind) or action.dest.upper()

    def _get_help_string(self, action):
        return super()._get_help_string(action) if action.default else action.help


class Parser(argparse.ArgumentParser):
    """Parser of one command that reports a fault in one line."""

    def parse_args(self, args=None, namespace=None):
        """Parse as argparse does; refuse empty values, as of unset variables of a shell."""
        for text in sys.argv[1:] if args is None else args:
            if re.fullmatch("(--[^=]+=(--)?)?", text):  # argparse stumbles over --name=--
                self.error(f"{text.partition('=')[0] or 'an option'} needs a value")
        return super().parse_args(args, namespace)

    def parse_known_args(self, args=None, namespace=None):
        """Refuse unknown flags in the parser of the command, so that the error names its help."""
        namespace, unknown = super().parse_known_args(args, namespace)
        for flag in (f"--{word.split('=')[0][2:].replace('-', '_')}" for word in unknown):
            if flag in self._option_string_actions:
                self.error(f"flags have underscores: {flag}")
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return namespace, unknown

    def error(self, message: str):
        """Print the fault and stop with exit status 2."""
        message = " ".join(message.split())[:LONGEST_LINE]
        self.exit(2, f"error: {message} (see {self.prog} --help)\n")


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of every subcommand."""
    example = "example:\n  python speaker_separator_module.py {} \\\n      {}"
    parser = Parser(description="Train and use a speaker separator inside a frozen speech model.",
                    epilog=example.format("train", COMMANDS["train"][2]), formatter_class=Help,
                    allow_abbrev=False)
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, (run, add_arguments, flags) in COMMANDS.items():
        command = subparsers.add_parser(
            name, help=run.__doc__, description=run.__doc__, epilog=example.format(name, flags),
            formatter_class=Help, allow_abbrev=False)
        add_arguments(command.add_argument)
        add_shared_arguments(name, command.add_argument)
    return parser


def tell_stop(args, message: str) -> None:
    """Say how to go on after a stop."""
    if message == "stopped" and getattr(args, "command", "") == "train":
        message += (f"; train --resume goes on from the last checkpoint in {args.checkpoint_dir}"
                    ", an earlier run's if this one has made none"
                    if list_checkpoints(Path(args.checkpoint_dir)) else
                    " before the first checkpoint: start again without --resume")
    if process_rank()[0] == 0:
        print("\n" * sys.stderr.isatty() + message, file=sys.stderr)


def main(argv: list[str] | None = None) -> int:
    """Run a subcommand; return 0, or 2 after one line on standard error for bad input."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # users cannot act on its warnings
    args, signals = None, []

    def stop(number: int, _):
        signals.append(number)
        raise Stopped(number)

    try:
        with handling_signals(stop):
            args = build_parser().parse_args(argv)
            check_limits(vars(args))
            with join_processes(pick_device(getattr(args, "device", "auto"))):
                COMMANDS[args.command][0](args)
    except (Exception, KeyboardInterrupt) as error:
        if signals and not isinstance(error, Stopped):  # C libraries turn it into other errors
            error = Stopped(signals[0])
        if isinstance(error, KeyboardInterrupt):
            tell_stop(args, str(error) or "stopped")
            return leave(getattr(error, "status", 130))
        if is_out_of_memory(error):
            error = MemoryError("out of memory: shorter recordings, a smaller --batch_size (train "
                                "also has --recompute) or --device=cpu need less of it")
        if str(error).startswith("DataLoader worker (pid"):
            error = ChildProcessError("a process that loads or mixes died, out of memory? Use "
                                      "fewer --workers; train --resume goes on from the last "
                                      "checkpoint")
        if isinstance(error, ModuleNotFoundError) and error.name in SIBLINGS:
            error = ModuleNotFoundError(f"this needs {error.name}.py beside {Path(__file__).name}")
        if not isinstance(error, (ValueError, OSError, ModuleNotFoundError, MemoryError)):
            raise
        if fails_first():
            print(f"error: {first_line(error)}", file=sys.stderr)
        return leave(2)
    return 0


if __name__ == "__main__":
    sys.exit(main())
