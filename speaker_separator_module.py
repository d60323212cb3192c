"""Separate the talkers inside a frozen audio-language model.

Qwen2-Audio and Whisper hear one talker. This script trains one module, the speaker separator, that
sits inside the frozen model: encoder features ``[T, D]`` of a mixture go in, one feature stream per
talker comes out, and the model answers for each stream on its own.

    python speaker_separator_module.py train --epochs=20
    python speaker_separator_module.py evaluate --checkpoint checkpoints/best_model.pt
    python speaker_separator_module.py integrate --model Qwen/Qwen2-Audio-7B-Instruct \
        --checkpoint checkpoints/best_model.pt --audio meeting.wav

The first makes its own small dataset when there is none and ends in minutes on a laptop's CPU.

Shapes, everywhere: ``B`` batch, ``S`` streams (at most this many talkers), ``T`` frames, ``D``
feature width.

Papers: permutation-invariant training (Yu et al., 2017, arXiv:1607.00325); talker queries that
count and separate (SepTDA, Lee et al., 2024, arXiv:2401.12473); separation inside a frozen Whisper
(Sidecar, Meng et al., 2023, arXiv:2302.09908).

Deliberately absent: waveform separation, diarisation beyond "who is stream 1", training of the
encoder or the language model, configuration files, distributed training.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import shutil
import sys
import time
import warnings
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from functools import cache, partial
from itertools import count as count_from
from itertools import permutations, product
from pathlib import Path
from typing import NamedTuple

DEFAULT_DATA_DIR = "multi_speaker_data"
DEFAULT_CHECKPOINT_DIR = "checkpoints"
MAX_STREAMS = 7  # the loss looks at every order of them: 5040
DEFAULT_PROMPT = "What does the person say?"
AUDIO_BLOCK = 1 << 18  # samples read at a time: 16 s at 16 kHz


class InputError(ValueError):
    """Something the user gave that the user can mend; the command line prints it and exits 2."""


def first_line(error: Exception) -> str:
    """Return what an error says, without the rest of the story."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


class TrainOptions(NamedTuple):
    """How to train; the flags of ``train`` by the same names, which explain themselves there."""

    epochs: int = 20
    batch_size: int = 8
    lr: float | None = None
    optimizer: str = "adamw"
    weight_decay: float = 0.01
    num_layers: int = 4
    num_heads: int = 8
    ff_dim: int = 2048
    dropout: float = 0.1
    trunk: str | None = None
    mask: str | None = None
    max_speakers: int | None = None
    reconstruction_weight: float | None = None
    activity_weight: float = 0.5
    remix: bool | None = None
    mixtures_per_epoch: int | None = None
    output_weight: float = 0.0
    output_block: int | None = None
    llm: str | None = None
    llm_weight: float = 0.1
    llm_prompt: str = DEFAULT_PROMPT
    save_every: int = 5
    patience: int | None = None
    resume: bool = False
    start_from: str | None = None
    seed: int = 42
    device: str = "auto"
    dtype: str = "auto"


# --------------------------------------------------------------------------------------------------
# Command line: stands before torch is imported, so that --help answers at once


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the examples as written and shows every default that is a value."""

    def _get_help_string(self, action):
        shows = action.default not in (None, False, argparse.SUPPRESS) and "%(" not in action.help
        return action.help + (" (default: %(default)s)" if shows else "")


class _Parser(argparse.ArgumentParser):
    """Complains in one line."""

    def error(self, message):
        self.exit(2, f"error: {message} (see {self.prog} --help)\n")


def _number(kind: type, low: float, high: float = math.inf):
    """Return an argument type: a finite number from ``low`` to ``high``."""

    def parse(text: str):
        value = kind(text)
        if not low <= value <= high or value == math.inf:
            raise argparse.ArgumentTypeError(f"must be between {low:g} and {high:g}, not {text}")
        return value

    parse.__name__ = kind.__name__  # what argparse calls a text that is no number at all
    return parse


_positive_int = _number(int, 1)
_positive_float = _number(float, 1e-12)
_probability = _number(float, 0, 1)
_weight = _number(float, 0)
_seed = _number(int, 0, 2**62)


def _add_device_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--device", default="auto", help="where to compute: auto, cpu, cuda or mps")
    add("--dtype", default="auto", choices=["auto", "float32", "bfloat16"],
        help="precision of the matrix products; auto takes bfloat16 where it is faster")


def _add_count_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--threshold", type=_probability,
        help="a stream is a talker from this probability on (default: the checkpoint's)")
    add("--num_speakers", type=_positive_int, help="take this many talkers when the count is known")


def _train_parser(parser: argparse.ArgumentParser) -> None:
    add, parser_defaults = parser.add_argument, TrainOptions._field_defaults
    add("--data_dir", default=DEFAULT_DATA_DIR, help="dataset; the default one is made if missing")
    add("--checkpoint_dir", default=DEFAULT_CHECKPOINT_DIR, help="checkpoints, report and curves")
    add("--epochs", type=_positive_int, help="passes over the training mixtures")
    add("--batch_size", type=_positive_int, help="mixtures per step")
    add("--lr", type=_positive_float,
        help="learning rate at the start of the cosine (default: 0.128 / feature width)")
    add("--optimizer", choices=["adamw", "muon"],
        help="muon takes orthogonalized steps for the weight matrices of the blocks: fewer, dearer")
    add("--weight_decay", type=_weight, help="weight decay of the optimizer")
    add("--num_layers", type=_positive_int, help="decoder blocks of the talker queries")
    add("--num_heads", type=_positive_int, help="attention heads")
    add("--ff_dim", type=_positive_int, help="width of the feed-forward layers")
    add("--dropout", type=_probability, help="dropout in every block")
    add("--trunk", choices=["queries", "frames"],
        help="what the decoder blocks work on (default: queries if the data is a sum, or frames)")
    add("--mask", choices=["shares", "gains", "residual"],
        help="how streams are made of the mixture (default: shares if the data is a sum, or gains)")
    add("--max_speakers", type=_positive_int, help="streams (default: what the data has)")
    add("--reconstruction_weight", type=_weight,
        help="weight of 'streams sum to the mixture' (default: 0.5 where the data is a sum, or 0)")
    add("--activity_weight", type=_weight, help="weight of the talker activity loss")
    add("--remix", action="store_true",
        help="fresh mixtures every epoch: sums of source features (the default where the data is "
             "a sum), or recordings mixed and encoded anew")
    add("--no_remix", dest="remix", action="store_false", help="the same mixtures every epoch")
    add("--mixtures_per_epoch", type=_positive_int,
        help="with remixing: how many are drawn (default: twice what the data has, 120 or more)")
    add("--output_weight", type=_weight,
        help="weight of the separation error at the encoder's output, behind the frozen blocks "
             "that follow --layer of the dataset")
    add("--output_block", type=int, metavar="K",
        help="measure it behind block K already, which is cheaper (default: the output)")
    add("--llm", metavar="PATH_OR_ID",
        help="also train against the transcripts through this frozen Qwen2-Audio or Whisper")
    add("--llm_weight", type=_weight, help="weight of the transcripts' cross-entropy")
    add("--llm_prompt", help="what the model is asked about each talker")
    add("--save_every", type=_positive_int, help="epochs between periodic checkpoints")
    add("--patience", type=_positive_int, help="stop after this many epochs without a better one")
    add("--resume", action="store_true", help="go on from the newest checkpoint")
    add("--start_from", metavar="SEPARATOR",
        help="begin a new run with these weights: a checkpoint, an exported folder or a hub id")
    add("--seed", type=_seed, help="seed of weights, order, remixing and dropout")
    add("--export", metavar="DIR", help="also save the best weights alone, for from_pretrained")
    _add_device_arguments(parser)
    parser.set_defaults(**parser_defaults)


def _evaluate_parser(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--checkpoint", default=f"{DEFAULT_CHECKPOINT_DIR}/best_model.pt", help="trained separator")
    add("--data_dir", default=DEFAULT_DATA_DIR, help="dataset")
    add("--split", default="val", choices=["val", "train"], help="which mixtures to score")
    add("--batch_size", type=_positive_int, default=8, help="mixtures per step")
    add("--model", metavar="PATH_OR_ID",
        help="also count word errors of this Qwen2-Audio or Whisper (needs recordings)")
    add("--prompt", default=DEFAULT_PROMPT, help="what the model is asked about each talker")
    add("--max_new_tokens", type=_positive_int, default=64, help="length limit of each answer")
    add("--json", metavar="FILE", help="also write every number to this file")
    add("--picture", metavar="FILE", help="also draw mixtures, targets and streams to this .png")
    _add_count_arguments(parser)
    _add_device_arguments(parser)


def _infer_parser(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--checkpoint", default=f"{DEFAULT_CHECKPOINT_DIR}/best_model.pt", help="trained separator")
    add("--input", required=True, help="features [T, D] as .npy, or an audio file")
    add("--encoder", help="model whose encoder reads audio (default: the one it was trained on)")
    add("--layer", type=int, help="encoder block to separate after (default: the checkpoint's)")
    add("--output_dir", default="separated", help="where speaker_1.npy ... go")
    _add_count_arguments(parser)
    _add_device_arguments(parser)


def _integrate_parser(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", required=True, help="Qwen2-Audio or Whisper: a local folder or a hub id")
    add("--checkpoint", default=f"{DEFAULT_CHECKPOINT_DIR}/best_model.pt", help="trained separator")
    add("--audio", required=True, nargs="+", action="extend", help="recordings of any length")
    add("--prompt", help=f"what to ask Qwen2-Audio about each talker (default: {DEFAULT_PROMPT})")
    add("--mode", default="separate", choices=["separate", "joint"],
        help="an answer per talker, or one about all of them in one prompt")
    add("--layer", type=int, help="encoder block to separate after (default: the checkpoint's)")
    add("--max_new_tokens", type=_positive_int,
        help="length limit of the answer for each window (default: 256, or what Whisper has)")
    add("--json", metavar="FILE", help="also write the answers, by window too, to this file")
    _add_count_arguments(parser)
    _add_device_arguments(parser)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of every subcommand; it needs no torch."""
    run = "python speaker_separator_module.py"
    commands = {
        "train": (_train_parser, "Train a separator; writes checkpoints, a report and curves.",
                  f"{run} train --epochs=20 --batch_size=8 --lr=1e-4"),
        "evaluate": (_evaluate_parser, "Score a separator beside the trivial outputs.",
                     f"{run} evaluate --checkpoint checkpoints/best_model.pt --json scores.json"),
        "infer": (_infer_parser, "Separate one mixture into a feature file per active talker.",
                  f"{run} infer --input multi_speaker_data/val/mixed/val_00000.npy"),
        "integrate": (_integrate_parser, "Print what each talker of a recording says.",
                      f"{run} integrate --model Qwen/Qwen2-Audio-7B-Instruct --audio meeting.wav"),
    }
    parser = _Parser(
        description="Train and use a speaker separator inside a frozen audio-language model.",
        epilog="example:\n  " + commands["train"][2], formatter_class=_HelpFormatter)
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, (add_arguments, description, example) in commands.items():
        add_arguments(subparsers.add_parser(
            name, help=description, description=description, formatter_class=_HelpFormatter,
            epilog=f"example:\n  {example}"))
    return parser


if __name__ == "__main__":  # torch takes seconds to import; help and mistyped flags do not wait
    build_parser().parse_args()
    sys.modules["speaker_separator_module"] = sys.modules["__main__"]  # the generator imports it

import numpy as np  # noqa: E402
import torch  # noqa: E402
from huggingface_hub import PyTorchModelHubMixin  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402
from torch.utils.data import DataLoader, Dataset  # noqa: E402

# --------------------------------------------------------------------------------------------------
# Model


def sinusoidal_positions(num_frames: int, dim: int, device=None) -> Tensor:
    """Return the parameter-free positions [T, D] of Vaswani et al. (2017), float32."""
    rates = torch.exp(-math.log(10000.0) * torch.arange(0, dim, 2, device=device) / dim)
    angles = torch.arange(num_frames, device=device)[:, None] * rates
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)[:, :dim]


def masked_mean(values: Tensor, mask: Tensor, dim: int) -> Tensor:
    """Mean of ``values`` over ``dim`` where ``mask`` (broadcastable) is set; 0 where nothing is."""
    weights = mask.to(values.dtype).expand_as(values)
    return (values * weights).sum(dim) / weights.sum(dim).clamp(min=1)


def _frames_first(
    block: nn.TransformerDecoderLayer, frames: Tensor, queries: Tensor, padding: Tensor
) -> tuple[Tensor, Tensor]:
    """Run a decoder block with its work on frames [B, T, D]; queries [B, S, D] only look at them.

    Frames take self-attention and feed-forward, queries the cross-attention, which is nearly free.
    """
    seen = block.multihead_attn(
        block.norm2(queries), frames, frames, key_padding_mask=padding, need_weights=False)[0]
    queries = queries + block.dropout2(seen)
    normed = block.norm1(frames)
    heard = block.self_attn(normed, normed, normed, key_padding_mask=padding, need_weights=False)[0]
    frames = frames + block.dropout1(heard)
    hidden = block.dropout(F.gelu(block.linear1(block.norm3(frames))))
    return frames + block.dropout3(block.linear2(hidden)), queries


class Convolution(nn.Module):
    """Frames that hear their neighbours: the convolution module of a Conformer (arXiv:2005.08100).

    Its norm of the convolved frames is per frame, so that padding and batches change nothing.
    """

    def __init__(self, dim: int, kernel_size: int):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.gate = nn.Linear(dim, 2 * dim)
        self.depthwise = nn.Conv1d(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, frames: Tensor, padding: Tensor) -> Tensor:
        """Update ``frames [B, T, D]``; those set in ``padding [B, T]`` are heard as silence."""
        hidden = F.glu(self.gate(self.norm(frames)), dim=-1).masked_fill(padding[..., None], 0.0)
        hidden = self.depthwise(hidden.transpose(1, 2)).transpose(1, 2)
        return frames + self.out(F.silu(F.layer_norm(hidden, hidden.shape[-1:])))


class Exchange(nn.Module):
    """Streams that look at each other: attention across talkers (SepReformer, arXiv:2406.05983)."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.attention = nn.MultiheadAttention(dim, num_heads, batch_first=True)

    def forward(self, streams: Tensor) -> Tensor:
        """Update ``streams [B, S, T, D]``, frame by frame."""
        B = len(streams)
        sides = self.norm(streams).transpose(1, 2).flatten(0, 1)  # [B T, S, D]
        # With weights it takes plain products: fused ones end at 65,535 sequences on CUDA.
        heard = self.attention(sides, sides, sides, need_weights=True)[0]
        return streams + heard.unflatten(0, (B, -1)).transpose(1, 2)


class SpeakerSeparatorTransformer(nn.Module, PyTorchModelHubMixin):
    """Splits the features of a mixture into one stream per talker and says which are active.

    ``S`` learned talker queries and the mixture's frames meet in ``num_layers`` decoder blocks and
    a refinement block; each stream is then the frames plus its query, read by a last refinement
    block whose update is the logit of a mask over the mixture.

    Parameters
    ----------
    feature_dim : int
        Width D of the features; even and divisible by ``num_heads``.
    max_speakers : int
        Number S of streams.
    num_layers, num_heads, ff_dim, dropout
        Size of the decoder blocks; refinement blocks have ``num_heads // 2`` heads.
    threshold : float
        Probability from which a stream counts as a talker; training sets it to what counts most
        validation mixtures right.
    feature_source : dict, optional
        Where the training features came from (encoder, layer, frame rate).
    mask : "shares", "gains" or "residual"
        Shares of the streams in the mixture sum to 1, right where features of talkers add up;
        gains in [0, 2] are free of each other, for the features of an encoder; with residual a
        stream is the mixture plus the update in standard deviations of each feature.
    trunk : "queries" or "frames"
        What the decoder blocks work on. Queries look the recording over (self-attention divides
        the talkers among them, cross-attention finds them in time), which is cheap and right for
        voices that keep their bands. Frames take a block of work each before the streams part, as
        speech needs, while queries look at them with the block's cross-attention; streams are the
        frames times and plus what their queries say, and exchange what they hold between two
        refinement blocks. A convolution goes before every block.
    kernel_size : int
        Frames that a convolution of the trunk on frames spans; odd.

    Raises
    ------
    ValueError
        If the sizes do not fit each other.
    """

    def __init__(
        self,
        feature_dim: int = 1280,
        max_speakers: int = 3,
        num_layers: int = 4,
        num_heads: int = 8,
        ff_dim: int = 2048,
        dropout: float = 0.1,
        threshold: float = 0.5,
        feature_source: dict | None = None,
        mask: str = "shares",
        trunk: str = "queries",
        kernel_size: int = 15,
    ):
        super().__init__()
        if not 1 <= max_speakers <= MAX_STREAMS:
            raise InputError(f"max_speakers must be 1 to {MAX_STREAMS}, not {max_speakers}")
        if num_heads < 2 or num_heads % 2 or feature_dim % num_heads:
            raise InputError(
                f"num_heads must be even and divide feature_dim, not {num_heads} for {feature_dim}"
            )
        if mask not in ("shares", "gains", "residual"):
            raise InputError(f"mask must be shares, gains or residual, not {mask!r}")
        if trunk not in ("queries", "frames"):
            raise InputError(f"trunk must be queries or frames, not {trunk!r}")
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise InputError(f"kernel_size must be odd and positive, not {kernel_size}")
        sizes = {"dim_feedforward": ff_dim, "dropout": dropout}
        options = {"activation": "gelu", "batch_first": True, "norm_first": True, **sizes}
        self.feature_dim, self.max_speakers = feature_dim, max_speakers
        self.threshold, self.feature_source = threshold, dict(feature_source or {})
        self.mask, self.trunk = mask, trunk
        self.config = {  # what builds another of the kind
            "feature_dim": feature_dim, "max_speakers": max_speakers, "num_layers": num_layers,
            "num_heads": num_heads, "ff_dim": ff_dim, "dropout": dropout, "threshold": threshold,
            "feature_source": self.feature_source, "mask": mask, "trunk": trunk,
            "kernel_size": kernel_size}
        self.speaker_queries = nn.Parameter(torch.randn(max_speakers, feature_dim))
        self.decoder = nn.ModuleList(
            nn.TransformerDecoderLayer(feature_dim, num_heads, **options) for _ in range(num_layers)
        )
        self.refinement = nn.ModuleList(
            nn.TransformerEncoderLayer(feature_dim, num_heads // 2, **options)
            for _ in range(3 if trunk == "frames" else 2)
        )
        if trunk == "frames":
            self.convolutions = nn.ModuleList(  # one before each of the blocks above
                Convolution(feature_dim, kernel_size) for _ in range(num_layers + 3)
            )
            self.gain = nn.Linear(feature_dim, feature_dim)
            self.exchange = Exchange(feature_dim, num_heads // 2)
        evidence_dim = 2 * feature_dim if trunk == "frames" else feature_dim
        self.activity_head = nn.Sequential(
            nn.Linear(evidence_dim, ff_dim), nn.GELU(), nn.Linear(ff_dim, 1)
        )

    def forward(
        self, mixed_features: Tensor, frame_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Separate a batch of mixtures.

        Parameters
        ----------
        mixed_features : Tensor [B, T, D]
        frame_mask : Tensor [B, T] of bool, optional
            True for valid frames; the others change nothing in the valid ones and come out as 0.

        Returns
        -------
        separated_features : Tensor [B, S, T, D]
        speaker_probs : Tensor [B, S], in [0, 1]
        """
        frame_mask = self._check(mixed_features, frame_mask)
        _, T, D = mixed_features.shape
        valid = frame_mask[..., None]
        mixture = torch.where(valid, mixed_features, 0.0)  # [B, T, D]
        # A silent recording has no frame to attend to: let it see its own zeros.
        padding = ~(frame_mask | ~frame_mask.any(1, keepdim=True))

        centre, spread = self._normalization(mixture, frame_mask)
        positions = 0.3 * sinusoidal_positions(T, D, mixture.device)
        frames = torch.where(valid, (mixture - centre) / spread, 0.0)
        frames = (frames + positions).to(mixture.dtype)
        context, queries = self._meet(frames, padding)
        start = self._part(context, queries)
        streams = self._refine(start, padding)
        update = (streams - (frames[:, None] if self.trunk == "queries" else start)).float()
        if self.mask == "residual":
            separated = mixture[:, None] + update * spread[:, None]
            separated = torch.where(valid[:, None], separated, 0.0)
        else:
            mask = update.softmax(dim=1) if self.mask == "shares" else 1 + update.tanh()
            separated = mask * mixture[:, None]
        separated = separated.to(mixture.dtype)
        # Activity is read off what was separated: an empty stream is a talker who is not there.
        # The features of an encoder are never empty; there it is read off the refined stream.
        evidence = separated / spread[:, None] if self.trunk == "queries" else streams
        pooled = masked_mean(evidence, valid[:, None], 2)  # [B, S, D]
        if self.trunk == "frames":
            pooled = F.layer_norm(pooled, (D,))
            others = pooled.mean(1, keepdim=True).expand_as(pooled)  # two alike are one talker
            pooled = torch.cat([pooled, others], dim=-1)
        speaker_probs = self.activity_head(pooled.to(mixture.dtype)).squeeze(-1).float().sigmoid()
        return separated, speaker_probs

    def _normalization(self, mixture: Tensor, frame_mask: Tensor) -> tuple[Tensor | float, Tensor]:
        """Return what to subtract and divide by: loud and soft recordings look alike inside."""
        power = masked_mean(mixture.float().square().mean(-1), frame_mask, 1)
        level = (power + 1e-8).sqrt()[:, None, None]  # [B, 1, 1]
        if self.mask != "residual":
            return 0.0, level
        # An encoder's features sit on large offsets; what tells talkers apart is small beside them.
        valid = frame_mask[..., None]
        centre = masked_mean(mixture.float(), valid, 1)[:, None]  # [B, 1, D]
        variance = masked_mean((mixture - centre).float().square(), valid, 1)[:, None]
        return centre, (variance + (0.01 * level) ** 2).sqrt()

    def _meet(self, frames: Tensor, padding: Tensor) -> tuple[Tensor, Tensor]:
        """Let frames and queries meet: context [B, T, D] and queries [B, S, D]."""
        B, _, D = frames.shape
        queries = self.speaker_queries.expand(B, -1, D)
        if self.trunk == "frames":
            for block, convolution in zip(self.decoder, self.convolutions, strict=False):
                frames = convolution(frames, padding)
                frames, queries = _frames_first(block, frames, queries, padding)
            frames = self.convolutions[len(self.decoder)](frames, padding)
        frames = self.refinement[0](frames, src_key_padding_mask=padding)
        context = F.layer_norm(frames, (D,))
        if self.trunk == "queries":
            for block in self.decoder:
                queries = block(queries, context, memory_key_padding_mask=padding)
        return context, F.layer_norm(queries, (D,))

    def _part(self, context: Tensor, queries: Tensor) -> Tensor:
        """Return the streams [B, S, T, D] that context [B, T, D] and queries [B, S, D] make."""
        context, queries = context[:, None], queries[:, :, None]
        if self.trunk == "frames":
            context = context * (1 + self.gain(queries))
        return context + queries

    def _refine(self, streams: Tensor, padding: Tensor) -> Tensor:
        """Let every stream of [B, S, T, D] be read by the blocks that are left."""
        B, S = streams.shape[:2]
        streams, padding = streams.flatten(0, 1), padding.repeat_interleave(S, dim=0)
        if self.trunk == "frames":
            streams = self.convolutions[-2](streams, padding)
            streams = self.refinement[1](streams, src_key_padding_mask=padding)
            streams = self.exchange(streams.unflatten(0, (B, S))).flatten(0, 1)
            streams = self.convolutions[-1](streams, padding)
        return self.refinement[-1](streams, src_key_padding_mask=padding).unflatten(0, (B, S))

    def _check(self, features: Tensor, frame_mask: Tensor | None) -> Tensor:
        if features.dim() != 3 or features.shape[-1] != self.feature_dim or not features.shape[1]:
            raise InputError(
                f"features must be [B, T, {self.feature_dim}] with T of 1 or more, "
                f"not {list(features.shape)}"
            )
        if frame_mask is None:
            return features.new_ones(features.shape[:2], dtype=torch.bool)
        if frame_mask.shape != features.shape[:2]:
            raise InputError(
                f"frame_mask must be {list(features.shape[:2])}, not {list(frame_mask.shape)}"
            )
        return frame_mask.bool()


# --------------------------------------------------------------------------------------------------
# Loss and metrics


class SeparatorLoss(NamedTuple):
    """The combined loss and its parts (scalars) with the stream of each talker ([B, S])."""

    total: Tensor
    separation: Tensor
    reconstruction: Tensor
    activity: Tensor
    assignment: Tensor


def pairwise_mse(separated: Tensor, targets: Tensor, frame_mask: Tensor) -> Tensor:
    """Mean squared error of every stream against every talker: [B, S, S], streams first."""
    valid = frame_mask[:, None, :, None].to(separated.dtype)
    a, b = (separated * valid).flatten(2), (targets * valid).flatten(2)
    squares = a.square().sum(-1)[:, :, None] + b.square().sum(-1)[:, None, :]
    size = frame_mask.sum(1).clamp(min=1) * separated.shape[-1]
    return (squares - 2 * a @ b.transpose(1, 2)).clamp(min=0) / size[:, None, None]


def best_assignment(cost: Tensor, speaker_mask: Tensor) -> Tensor:
    """Return the stream of each talker, [B, S], with the least summed cost over active talkers.

    All S! assignments are scored from the one matrix ``cost [B, S, S]`` (streams first), as in
    permutation-invariant training (arXiv:1607.00325).
    """
    S = cost.shape[1]
    orders = torch.tensor(list(permutations(range(S))), device=cost.device)  # [S!, S]
    talkers = torch.arange(S, device=cost.device)
    scores = (cost[:, orders, talkers] * speaker_mask[:, None].to(cost.dtype)).sum(-1)  # [B, S!]
    return orders[scores.argmin(1)]


def reorder(values: Tensor, assignment: Tensor) -> Tensor:
    """Put streams in the order of the talkers: ``values [B, S, ...]`` by ``assignment [B, S]``."""
    index = assignment.reshape(*assignment.shape, *[1] * (values.dim() - 2))
    return values.gather(1, index.expand(-1, -1, *values.shape[2:]))


def talker_mse(estimates: Tensor, targets: Tensor, frame_mask: Tensor) -> Tensor:
    """Mean squared error [B, S] of each talker's own estimate over valid frames."""
    return masked_mean((estimates - targets).square().mean(-1), frame_mask[:, None], -1)


def _check_loss_shapes(separated, speaker_probs, targets, speaker_mask, mixture, frame_mask):
    B, S, T, D = separated.shape if separated.dim() == 4 else (0, 0, 0, 0)
    expected = {
        "separated": (separated, (B, S, T, D)),
        "speaker_probs": (speaker_probs, (B, S)),
        "targets": (targets, (B, S, T, D)),
        "speaker_mask": (speaker_mask, (B, S)),
        "mixture": (mixture, (B, T, D)),
        "frame_mask": (frame_mask, (B, T)),
    }
    for name, (value, shape) in expected.items():
        if tuple(value.shape) != shape:
            raise InputError(f"{name} must be {list(shape)}, not {list(value.shape)}")


def separator_loss(
    separated: Tensor,
    speaker_probs: Tensor,
    targets: Tensor,
    speaker_mask: Tensor,
    mixture: Tensor,
    frame_mask: Tensor | None = None,
    reconstruction_weight: float = 0.5,
    activity_weight: float = 0.5,
) -> SeparatorLoss:
    """Score separated streams under the best assignment of streams to talkers.

    Parameters
    ----------
    separated : Tensor [B, S, T, D]
    speaker_probs : Tensor [B, S]
    targets : Tensor [B, S, T, D]
        Features of each talker alone, zero-padded in the talker dimension.
    speaker_mask : Tensor [B, S]
        True where there is a talker.
    mixture : Tensor [B, T, D]
    frame_mask : Tensor [B, T], optional
        True for valid frames.

    Returns
    -------
    SeparatorLoss
        ``separation``: mean squared error per active talker (arXiv:1607.00325);
        ``reconstruction``: mean squared error of the sum of active streams against the mixture;
        ``activity``: binary cross-entropy of the reordered probabilities; ``total``: their
        weighted sum; ``assignment [B, S]``: the stream of each talker.

    Raises
    ------
    ValueError
        If a shape does not fit; the message names it.
    """
    if frame_mask is None:
        frame_mask = mixture.new_ones(mixture.shape[:2], dtype=torch.bool)
    _check_loss_shapes(separated, speaker_probs, targets, speaker_mask, mixture, frame_mask)
    separated, targets, mixture = separated.float(), targets.float(), mixture.float()
    probs = speaker_probs.float()
    active = speaker_mask.to(separated.dtype)
    with torch.no_grad():
        assignment = best_assignment(pairwise_mse(separated, targets, frame_mask), active)
    estimates, probs = reorder(separated, assignment), reorder(probs, assignment)

    per_talker = talker_mse(estimates, targets, frame_mask)
    separation = (per_talker * active).sum() / active.sum().clamp(min=1)
    summed = (estimates * active[..., None, None]).sum(1)
    frame_error = (summed - mixture).square().mean(-1)
    reconstruction = masked_mean(frame_error.flatten(), frame_mask.flatten(), 0)
    activity = F.binary_cross_entropy(probs, active)
    total = separation + reconstruction_weight * reconstruction + activity_weight * activity
    return SeparatorLoss(total, separation, reconstruction, activity, assignment)


def si_sdr(estimate: Tensor, target: Tensor, frame_mask: Tensor) -> Tensor:
    """Scale-invariant signal-to-distortion ratio in dB over [..., T, D] features.

    The features of a talker are taken as one long vector (Le Roux et al., 2019, arXiv:1811.02508).
    """
    valid = frame_mask[..., None].to(target.dtype)
    a, b = (estimate * valid).flatten(-2), (target * valid).flatten(-2)
    scale = (a * b).sum(-1, keepdim=True) / b.square().sum(-1, keepdim=True).clamp(min=1e-8)
    signal, noise = (scale * b).square().sum(-1), (a - scale * b).square().sum(-1)
    return 10 * torch.log10((signal + 1e-8) / (noise + 1e-8))


def trivial_outputs(mixture: Tensor, speaker_mask: Tensor) -> dict[str, Tensor]:
    """Return what needs no separator, [B, T, D] each: the yardsticks of every score here."""
    count = speaker_mask.sum(1).clamp(min=1).to(mixture.dtype)[:, None, None]
    return {
        "zeros": torch.zeros_like(mixture),
        "mixture": mixture,
        "mixture / count": mixture / count,
    }


def active_streams(
    speaker_probs: Tensor, threshold: float = 0.5, num_speakers: int | None = None
) -> Tensor:
    """Say which streams are talkers, [B, S]: by threshold, or the ``num_speakers`` likeliest."""
    if num_speakers is None:
        return speaker_probs >= threshold
    if not 0 <= num_speakers <= speaker_probs.shape[-1]:
        raise InputError(
            f"num_speakers must be 0 to {speaker_probs.shape[-1]}, not {num_speakers}: "
            "the separator has no more streams"
        )
    likeliest = speaker_probs.topk(num_speakers, dim=-1).indices
    return torch.zeros_like(speaker_probs, dtype=torch.bool).scatter(-1, likeliest, True)


def calibrate_threshold(speaker_probs: Tensor, speaker_mask: Tensor) -> float:
    """Return the threshold that gets most talker counts right, [N, S] each; ties go near 0.5."""
    candidates = torch.linspace(0.05, 0.95, 37)
    counts = (speaker_probs[None] >= candidates[:, None, None]).sum(-1)  # [candidates, N]
    right = (counts == speaker_mask.sum(-1)).float().mean(-1)
    best = candidates[right == right.max()]
    return round(float(best[(best - 0.5).abs().argmin()]), 3)


# --------------------------------------------------------------------------------------------------
# Dataset


def read_features(path: Path, feature_dim: int | None = None, header_only: bool = False):
    """Read float features [T, D] from a .npy file.

    With ``header_only`` only the shape and type are looked at and the values stay on disk.

    Raises
    ------
    FileNotFoundError, ValueError
        If the file is missing or no such array (rank, width, type, NaN or infinity).
    """
    if not path.is_file():
        raise FileNotFoundError(f"no such feature file: {path}")
    try:
        features = np.load(path, mmap_mode="r" if header_only else None, allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise InputError(f"{path} is not a .npy file of numbers ({error})") from None
    if not isinstance(features, np.ndarray) or features.ndim != 2 or not features.shape[0]:
        raise InputError(f"{path} must hold [T, D] features, not {getattr(features, 'shape', '')}")
    if features.dtype.kind != "f":
        raise InputError(f"{path} must hold floating-point features, not {features.dtype}")
    if feature_dim is not None and features.shape[1] != feature_dim:
        raise InputError(f"{path} has width {features.shape[1]}, expected {feature_dim}")
    if header_only:
        return features
    with np.errstate(over="ignore"):
        features = features.astype(np.float32, copy=False)
    if not np.isfinite(features).all():
        raise InputError(f"{path} holds NaN, infinite or too large values")
    return torch.from_numpy(features)


def _read_json(path: Path):
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not JSON ({error})") from None


class MultiSpeakerDataset(Dataset):
    """The mixtures of one split: dicts with ``mixture [T, D]``, ``targets [n, T, D]``, ``texts``.

    Parameters
    ----------
    data_dir : path
        What ``generate_multi_speaker_dataset.py`` wrote.
    split : "train" or "val"

    Raises
    ------
    FileNotFoundError, ValueError
        If the dataset is missing or empty, or its metadata or files do not fit each other.
    """

    def __init__(self, data_dir, split: str):
        self.folder = Path(data_dir) / split
        path = self.folder / "metadata.json"
        if not path.is_file():
            raise FileNotFoundError(
                f"no dataset at {path}; make one: python generate_multi_speaker_dataset.py "
                f"--output_dir={data_dir}"
            )
        self.samples = _read_json(path)
        if not isinstance(self.samples, list) or not self.samples:
            raise InputError(f"{path} lists no mixtures; generate the dataset again")
        try:
            self.feature_dim = int(self.samples[0]["feature_dim"])
            self.max_speakers = max(len(sample["speakers"]) for sample in self.samples)
            for sample in self.samples:
                self._check_sample(sample)
        except (KeyError, TypeError) as error:
            raise InputError(f"{path} misses an entry: {error}") from None
        except InputError:
            raise
        except (AttributeError, ValueError) as error:
            raise InputError(f"{path} is damaged: {error}") from None
        source = Path(data_dir) / "dataset.json"
        self.source = _read_json(source) if source.is_file() else {}
        if not isinstance(self.source, dict):
            raise InputError(f"{source} must hold an object, not a {type(self.source).__name__}")
        several = (i for i, s in enumerate(self.samples) if len(s["speakers"]) > 1)
        probe = self[next(several, 0)]  # one talker alone is always a sum
        adds_up = torch.allclose(probe["targets"].sum(0), probe["mixture"], atol=1e-4)
        self.is_sum = self.source.get("kind") != "speech" and adds_up

    def _files(self, sample) -> list[Path]:
        names = [sample["mixed_audio"], *(s["feature_file"] for s in sample["speakers"])]
        return [self.folder / name for name in names]

    def _check_sample(self, sample) -> None:
        shapes = {read_features(path, self.feature_dim, True).shape for path in self._files(sample)}
        if len(shapes) > 1:
            lengths = sorted(shape[0] for shape in shapes)
            raise InputError(
                f"sources and mixture of {sample['id']} differ in length ({self.folder}): {lengths}"
            )

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict:
        files = self._files(self.samples[index])
        mixture, *targets = (read_features(path, self.feature_dim) for path in files)
        texts = [str(speaker.get("text") or "") for speaker in self.samples[index]["speakers"]]
        return {"mixture": mixture, "targets": stack_targets(targets, mixture), "texts": texts}

    def source_files(self) -> list[tuple[str, Path]]:
        """(talker, feature file) of every source in the split."""
        talkers = (speaker for sample in self.samples for speaker in sample["speakers"])
        return [(str(s["speaker_id"]), self.folder / s["feature_file"]) for s in talkers]


def stack_targets(targets: list[Tensor], mixture: Tensor) -> Tensor:
    """Stack the features of each talker to [n, T, D], also when there is none."""
    return torch.stack(targets) if targets else mixture.new_zeros(0, *mixture.shape)


class RemixedDataset(Dataset):
    """Fresh mixtures of the training sources every epoch, from silence to ``max_speakers`` talkers.

    Deterministic for a seed, an epoch and an index, so that a resumed run draws the same.
    """

    SILENCE = 0.04  # share of mixtures without any talker
    LEAST, TIMES = 120, 2  # mixtures per epoch: sources make many more mixtures than the data has

    def __init__(self, base: MultiSpeakerDataset, max_speakers: int, seed: int, length: int | None):
        self.base, self.max_speakers, self.seed, self.epoch = base, max_speakers, seed, 0
        self.length = length or max(self.TIMES * len(base), self.LEAST)

    def __len__(self) -> int:
        return self.length

    def draw_count(self, index: int) -> tuple[np.random.Generator, int]:
        """Return a generator for mixture ``index`` of this epoch and how many talkers it has."""
        rng = np.random.default_rng([self.seed, self.epoch, index])
        silent = rng.random() < self.SILENCE
        return rng, 0 if silent else self.draw_talkers(rng)

    def draw_talkers(self, rng: np.random.Generator) -> int:
        """Return how many talkers a mixture that is not silent has; every count alike."""
        return int(rng.integers(1, self.max_speakers + 1))


class RemixedFeatures(RemixedDataset):
    """Sums of source features of different talkers, each rolled to start at a random frame."""

    def __init__(
        self, base: MultiSpeakerDataset, max_speakers: int, seed: int = 0, length: int | None = None
    ):
        super().__init__(base, max_speakers, seed, length)
        self.by_talker: dict[str, list[Path]] = {}
        for talker, path in base.source_files():
            self.by_talker.setdefault(talker, []).append(path)
        self.max_speakers = min(max_speakers, len(self.by_talker))

    def __getitem__(self, index: int) -> dict:
        rng, count = self.draw_count(index)
        talkers = rng.choice(list(self.by_talker), size=max(count, 1), replace=False)
        files = [self.by_talker[t][rng.integers(len(self.by_talker[t]))] for t in talkers]
        sources = [read_features(path, self.base.feature_dim) for path in files]
        length = max(len(source) for source in sources)
        sources = [F.pad(source, (0, 0, 0, length - len(source))) for source in sources]
        shifted = [source.roll(int(rng.integers(length)), dims=0) for source in sources]
        targets = torch.stack(shifted)[:count]
        return {"mixture": targets.sum(0), "targets": targets, "texts": [""] * count}


class RemixedSpeech(RemixedDataset):
    """Mixtures of the training recordings, drawn as the dataset was, encoded batch by batch.

    Raises
    ------
    FileNotFoundError, ValueError
        If the dataset was not made from recordings, or they or the encoder are gone.
    """

    def __init__(
        self, base: MultiSpeakerDataset, max_speakers: int, seed: int = 0,
        length: int | None = None, device: str = "cpu",
    ):
        import generate_multi_speaker_dataset as generator

        super().__init__(base, max_speakers, seed, length)
        self.generator, self.layer = generator, base.source.get("layer")
        self.mixing = generator.load_mixing(base.folder.parent, "train")
        self.encoder = load_audio_encoder(base.source.get("encoder"), device)

    def draw_talkers(self, rng: np.random.Generator) -> int:
        """Return a count, n talkers n times as often as one: each is a lesson."""
        counts = np.arange(1, self.max_speakers + 1)
        return int(rng.choice(counts, p=counts / counts.sum()))

    def plan(self, index: int):
        """Return the planned mixture ``index`` of this epoch."""
        rng, count = self.draw_count(index)
        return self.generator.plan_mixture(rng, *self.mixing, count)

    def seconds(self) -> list[float]:
        """Length of every mixture of this epoch, before any is rendered."""
        return [self.plan(index).seconds for index in range(len(self))]

    def __getitem__(self, index: int) -> dict:
        plan = self.plan(index)
        sources, mixture = self.generator.render_mixture(
            plan, self.encoder.sampling_rate, self.encoder.max_samples)
        return {"waveforms": [mixture, *sources], "texts": [talker.text for talker in plan.talkers]}

    def encode(self, items: list[dict]) -> list[dict]:
        """Turn waveforms into features, all of a batch at once."""
        waveforms = [waveform for item in items for waveform in item["waveforms"]]
        features = iter(encode_waveforms(self.encoder, waveforms, self.layer))
        encoded = []
        for item in items:
            mixture, *targets = (next(features) for _ in item["waveforms"])
            targets = stack_targets(targets, mixture)
            encoded.append({"mixture": mixture, "targets": targets, "texts": item["texts"]})
        return encoded


def collate(items: list[dict], max_speakers: int) -> dict:
    """Pad items into a batch: mixture [B, T, D], targets [B, S, T, D], two masks, and texts."""
    first = items[0]["mixture"]
    B, S, D = len(items), max_speakers, first.shape[-1]
    T = max(len(item["mixture"]) for item in items)
    batch = {
        "mixture": first.new_zeros(B, T, D),
        "targets": first.new_zeros(B, S, T, D),
        "speaker_mask": first.new_zeros(B, S, dtype=torch.bool),
        "frame_mask": first.new_zeros(B, T, dtype=torch.bool),
        "texts": [item.get("texts", []) for item in items],
    }
    for b, item in enumerate(items):
        n, t = item["targets"].shape[:2]
        batch["mixture"][b, :t] = item["mixture"]
        batch["targets"][b, :n, :t] = item["targets"]
        batch["speaker_mask"][b, :n] = True
        batch["frame_mask"][b, :t] = True
    return batch


def make_loader(
    dataset: Dataset, batch_size: int, max_speakers: int, device: str, seed: int | None = None
) -> DataLoader:
    """Batches of a dataset, in order or, with a seed, shuffled by it."""
    encode = getattr(dataset, "encode", lambda items: items)
    speech = isinstance(dataset, RemixedSpeech)
    order = None if seed is None else torch.Generator().manual_seed(seed)
    if speech and order:
        batches = {"batch_sampler": shuffled_batches(dataset.seconds(), batch_size, order)}
    else:
        batches = {"batch_size": batch_size, "shuffle": order is not None, "generator": order}
    return DataLoader(
        dataset,
        **batches,
        collate_fn=lambda items: collate(encode(items), max_speakers),
        pin_memory=pins_memory(device) and not speech,
    )


def shuffled_batches(
    lengths: list[float], batch_size: int, random: torch.Generator
) -> list[list[int]]:
    """Shuffle items into batches whose items are of similar length: padding costs time.

    Sixteen batches at a time are sorted by length and cut, so that who meets whom still varies;
    then the batches are shuffled.
    """
    order, batches = torch.randperm(len(lengths), generator=random).tolist(), []
    for start in range(0, len(order), 16 * batch_size):
        alike = sorted(order[start : start + 16 * batch_size], key=lengths.__getitem__)
        batches += [alike[i : i + batch_size] for i in range(0, len(alike), batch_size)]
    return [batches[i] for i in torch.randperm(len(batches), generator=random).tolist()]


# --------------------------------------------------------------------------------------------------
# Devices: one small function per decision, each by device name alone


def pick_device(name: str = "auto") -> str:
    """Return "cuda", "mps" or "cpu"; "auto" takes the first that is there."""
    mps = torch.backends.mps.is_available()
    there = {"cuda": torch.cuda.is_available(), "mps": mps, "cpu": True}
    if name == "auto":
        return next(device for device, found in there.items() if found)
    if name not in there:
        raise InputError(f"unknown device {name!r}; choose from auto, cpu, cuda, mps")
    if not there[name]:
        raise InputError(f"no {name} device here; use --device=auto")
    return name


def pick_dtype(name: str, device: str) -> torch.dtype:
    """Return the precision of matrix products; "auto" is bfloat16 where that is faster.

    That is CUDA from Ampere on, and the CPUs on which it is; MPS gains nothing from it.
    """
    if name != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]
    if device == "cuda":
        native = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] >= 8
    else:
        native = device == "cpu" and cpu_prefers_bfloat16()
    return torch.bfloat16 if native else torch.float32


@cache
def cpu_prefers_bfloat16() -> bool:
    """Time one product in both precisions: what a CPU's instructions promise, it may not keep.

    Measured, bfloat16 beside float32: 4 times faster on one CPU with AVX-512 bfloat16, 2 times
    slower on another, 7 times slower where it is emulated.
    """
    a = torch.ones(512, 512)  # drawing it would move the random state of whoever asks
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        b = a.to(dtype)
        times = []
        for _ in range(5):
            started = time.perf_counter()
            b @ b
            times.append(time.perf_counter() - started)
        seconds[dtype] = min(times)
    return seconds[torch.bfloat16] < 0.7 * seconds[torch.float32]


def autocast(device: str, dtype: torch.dtype):
    """Return the context for matrix products in ``dtype``; nothing to do for float32."""
    return nullcontext() if dtype == torch.float32 else torch.autocast(device, dtype=dtype)


def attention_kernel(device: str, dtype: torch.dtype):
    """Return the context for attention in training.

    On CPUs in bfloat16 that is plain products: with heads 48 wide they take 0.6 of the time of the
    fused kernel, forward and back (measured; 1.1 with heads 320 wide).
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel

    plain = device == "cpu" and dtype == torch.bfloat16
    return sdpa_kernel(SDPBackend.MATH) if plain else nullcontext()


def pins_memory(device: str) -> bool:
    """Page-locked batches copy faster to CUDA and only there."""
    return device == "cuda"


def fuses_optimizer(device: str) -> bool:
    """AdamW in one kernel: 10 times faster on CPU (measured); on MPS only in newer versions."""
    return device in ("cpu", "cuda")


def synchronize(device: str) -> None:
    """Wait for the device, so that a clock read next is honest; a CPU never runs ahead."""
    waits = {"cuda": torch.cuda.synchronize, "mps": torch.mps.synchronize}
    waits.get(device, lambda: None)()


def to_device(batch: dict, device: str) -> dict:
    """Move the tensors of a batch, without waiting where its memory is page-locked."""
    pinned = pins_memory(device)
    return {key: value.to(device, non_blocking=pinned) if isinstance(value, Tensor) else value
            for key, value in batch.items()}


# --------------------------------------------------------------------------------------------------
# Checkpoints

CHECKPOINT_KEYS = (
    "epoch", "model_state_dict", "optimizer_state_dict", "scheduler_state_dict",
    "train_loss", "val_loss", "train_history",
)


def save_checkpoint(path: Path, checkpoint: dict) -> None:
    """Write a checkpoint under a temporary name, then rename: a kill leaves the old one whole."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        torch.save(checkpoint, temporary)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
        temporary.unlink(missing_ok=True)
        reason = first_line(error)
        raise InputError(
            f"could not write {path} (is the disk full?); earlier checkpoints are intact ({reason})"
        ) from None


def link_or_copy(source: Path, target: Path) -> None:
    """Give a file a second name: checkpoints are replaced, never changed, so two may share one."""
    temporary = target.with_name(target.name + ".tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)
    except OSError:  # a file system without links
        shutil.copyfile(source, temporary)
    os.replace(temporary, target)


def load_checkpoint(path) -> dict:
    """Open a training checkpoint without running any code that is in it.

    Raises
    ------
    FileNotFoundError, ValueError
        If it is missing, truncated, not one of ours or would run code.
    """
    from pickle import UnpicklingError

    if not Path(path).is_file():
        raise FileNotFoundError(f"no checkpoint at {path}; train one first")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError:
        raise InputError(
            f"{path} is no checkpoint, or holds more than tensors and plain values; not opened"
        ) from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, IndexError):
        raise InputError(f"{path} is truncated or not a checkpoint") from None
    missing = [key for key in (*CHECKPOINT_KEYS, "model_config")
               if not isinstance(checkpoint, dict) or key not in checkpoint]
    if missing:
        raise InputError(f"{path} is not a separator checkpoint: it has no {missing[0]!r}")
    if not isinstance(checkpoint["model_config"], dict):
        raise InputError(f"{path} is not a separator checkpoint: its configuration is damaged")
    return checkpoint


def build_separator(config: dict, state: dict, origin) -> SpeakerSeparatorTransformer:
    """Rebuild a separator from its configuration and weights; errors name ``origin``."""
    try:
        separator = SpeakerSeparatorTransformer(**config)
        separator.load_state_dict(state)
    except (TypeError, ValueError, RuntimeError) as error:
        reason = first_line(error)
        raise InputError(f"{origin} does not fit this version of the separator: {reason}") from None
    return separator


def load_separator(path_or_id, device: str = "cpu") -> SpeakerSeparatorTransformer:
    """Load a separator, ready for inference, from a checkpoint, a folder or a hub id.

    Parameters
    ----------
    path_or_id : str or path
        ``best_model.pt``, what ``save_pretrained`` or ``train --export`` wrote, or a hub id.

    Raises
    ------
    FileNotFoundError, ValueError
        If it is missing or not a separator.
    """
    path = Path(path_or_id)
    if path.is_file() or path.suffix == ".pt":
        checkpoint = load_checkpoint(path)
        separator = build_separator(
            checkpoint["model_config"], checkpoint["model_state_dict"], path
        )
    elif path.is_dir() and not (path / "config.json").is_file():
        raise FileNotFoundError(f"{path} has no config.json; give it a best_model.pt instead")
    else:
        try:
            separator = SpeakerSeparatorTransformer.from_pretrained(str(path_or_id))
        except Exception as error:  # the hub raises dozens of kinds, over many lines
            reason = first_line(error)
            raise InputError(f"cannot load a separator from {path_or_id}: {reason}") from None
    return separator.to(device).eval()


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints in a folder, best_model.pt first, then by epoch."""
    periodic = [p for p in folder.glob("checkpoint_epoch_*.pt") if p.stem.split("_")[-1].isdigit()]
    best = [p for p in [folder / "best_model.pt"] if p.is_file()]
    return best + sorted(periodic, key=lambda p: int(p.stem.split("_")[-1]))


def newest_checkpoint(folder: Path) -> dict:
    """Open the checkpoint with the highest epoch, on the CPU."""
    paths = list_checkpoints(folder)
    if not paths:
        raise FileNotFoundError(f"nothing to resume in {folder}; train without --resume first")
    ends = {paths[0], paths[-1]}  # best_model.pt may be newer than the last periodic one
    return max((load_checkpoint(path) for path in ends), key=lambda found: found["epoch"])


def set_aside_earlier_run(folder: Path) -> Path | None:
    """Move the checkpoints of an earlier run into a numbered folder beside; nothing is lost."""
    paths = list_checkpoints(folder)
    if not paths:
        return None
    names = (folder / f"earlier_run_{number}" for number in count_from(1))
    aside = next(name for name in names if not name.exists())
    aside.mkdir()
    for path in [*paths, folder / "training_report.md", folder / "training_curves.png"]:
        if path.exists():
            path.rename(aside / path.name)
    return aside


# --------------------------------------------------------------------------------------------------
# Train

LOSS_PARTS = ("total", "separation", "reconstruction", "activity")


ADAM_BETAS = (0.9, 0.98)


class MuonAdamW(torch.optim.Optimizer):
    """Muon for the weight matrices of a separator's blocks, AdamW for everything else.

    Muon makes every direction of a matrix's step equally long (Jordan et al. 2024); scaled to the
    step length of AdamW (Liu et al. 2025, arXiv:2502.16982), both take the same learning rate.
    """

    def __init__(self, separator: nn.Module, lr: float, weight_decay: float, fused: bool = False):
        ends = ("speaker_queries", "activity_head")
        matrices, others = [], []
        for name, weight in separator.named_parameters():
            inside = weight.ndim == 2 and not name.startswith(ends)
            (matrices if inside else others).append(weight)
        settings = {"lr": lr, "weight_decay": weight_decay}
        self.parts = (
            torch.optim.Muon(matrices, adjust_lr_fn="match_rms_adamw", **settings),
            torch.optim.AdamW(others, betas=ADAM_BETAS, fused=fused, **settings))
        super().__init__([group for part in self.parts for group in part.param_groups], {})
        self._share()

    def _share(self) -> None:
        """Let the parts work on the groups and the state that this optimizer shows and saves."""
        for part, group in zip(self.parts, self.param_groups, strict=True):
            part.param_groups, part.state = [group], self.state

    def step(self, closure=None):
        """Take one step with both; a closure is not supported."""
        for part in self.parts:
            part.step()

    def load_state_dict(self, state_dict: dict) -> None:
        """Restore both from what ``state_dict`` returned."""
        super().load_state_dict(state_dict)
        self._share()


class AveragedSeparator:
    """The separator that is validated and saved: its weights follow those of the last steps.

    Without it a step more or less moves the validation loss by a tenth.
    """

    KEEP = 0.97  # per step: the average reaches back some 30 steps

    def __init__(self, separator: SpeakerSeparatorTransformer, steps: int = 0):
        self.separator, self.steps = copy.deepcopy(separator).requires_grad_(False), steps

    @torch.no_grad()
    def update(self, separator: SpeakerSeparatorTransformer) -> None:
        """Move towards the weights of this step, faster in the first few."""
        keep = min(self.KEEP, self.steps / (10 + self.steps))
        self.steps += 1
        torch._foreach_lerp_(
            list(self.separator.parameters()), list(separator.parameters()), 1 - keep)


def train_epoch(
    separator, loader, optimizer, weights: dict, device: str, dtype: torch.dtype, epoch: int,
    extras: tuple = (), averaged: AveragedSeparator | None = None,
) -> dict[str, float]:
    """One pass over the training mixtures; returns the mean of every loss part.

    Losses are read once at the end, so that a GPU is not waited for at every step (the ``extras``
    do wait: they pick the rows of active talkers).
    """
    from tqdm import tqdm

    separator.train()
    losses, sizes = [], []
    for batch in tqdm(loader, desc=f"epoch {epoch}", unit="batch", leave=False, disable=None):
        batch = to_device(batch, device)
        parts = batch_loss(separator, batch, weights, device, dtype, extras)
        optimizer.zero_grad(set_to_none=True)
        parts["total"].backward()
        nn.utils.clip_grad_norm_(separator.parameters(), 1.0)
        optimizer.step()
        if averaged:
            averaged.update(separator)
        losses.append(torch.stack([part.detach() for part in parts.values()]))
        sizes.append(len(batch["mixture"]))
    table = torch.stack(losses).cpu()  # [batches, parts]
    broken = (~table.isfinite().all(1)).nonzero()
    if len(broken):
        raise InputError(
            f"the loss is not finite in epoch {epoch}, batch {int(broken[0]) + 1}; the last "
            "checkpoint is intact: lower --lr or look at that data"
        )
    means = (table * torch.tensor(sizes)[:, None]).sum(0) / sum(sizes)
    return dict(zip(parts, means.tolist(), strict=True))


def batch_loss(
    separator, batch: dict, weights: dict, device: str, dtype: torch.dtype, extras: tuple = ()
) -> dict[str, Tensor]:
    """Every part of the loss of one batch by name; "total" is what to minimise.

    ``extras`` are losses through frozen models: callables with a ``name`` and a ``weight``.
    """
    with autocast(device, dtype), attention_kernel(device, dtype):
        separated, probs = separator(batch["mixture"], batch["frame_mask"])
    loss = separator_loss(
        separated, probs, batch["targets"], batch["speaker_mask"],
        batch["mixture"], batch["frame_mask"], **weights)
    parts = {part: getattr(loss, part) for part in LOSS_PARTS}
    for extra in extras:
        with autocast(device, dtype), attention_kernel(device, dtype):
            parts[extra.name] = extra(separated, loss.assignment, batch)
        parts["total"] = parts["total"] + extra.weight * parts[extra.name]
    return parts


def make_scheduler(optimizer, epochs: int, rate: float, done: int = 0):
    """Cosine per epoch from ``rate`` to a tenth of it, ``done`` epochs in."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] = rate
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs, eta_min=rate / 10)
    with warnings.catch_warnings():  # it asks for optimizer steps first; they were in another run
        warnings.simplefilter("ignore", UserWarning)
        for _ in range(done):
            scheduler.step()
    return scheduler


def check_disk(folder: Path, parameters: int, checkpoints: int) -> None:
    """Refuse a run whose checkpoints (weights twice and two moments, 4 bytes each) cannot fit."""
    need, free = 16 * parameters * checkpoints, shutil.disk_usage(folder).free
    if need > free:
        raise InputError(
            f"{folder} has {free / 1e9:.1f} GB free and {checkpoints} checkpoints need "
            f"{need / 1e9:.1f} GB; free some, or raise --save_every"
        )


def _prepare_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".write_test").touch()
        (folder / ".write_test").unlink()
    except OSError as error:
        raise InputError(f"cannot write to {folder}: {error.strerror}") from None


def format_epoch(row: dict, epochs: int) -> str:
    """One line of the training log."""
    train, val = row["train"], row["val"]
    parts = " ".join(f"{part} {val[part]:.3f}" for part in train if part != "total")
    trivial = ", ".join(f"{name} {mse:.3f}" for name, mse in val["trivial_mse"].items())
    best = min(val["trivial_mse"].values())  # 0 where every mixture is one talker or silence
    relative = f"{val['separation'] / best:.2f}" if best else "-"
    return (
        f"epoch {row['epoch']:3d}/{epochs}  train {train['total']:.3f}  val {val['total']:.3f} "
        f"({parts})  count {val['count_accuracy']:.0%}  MSE / best trivial {relative} "
        f"({trivial})  lr {row['lr']:.1e}  {row['seconds']:.0f} s"
    )


class _Run(NamedTuple):
    """What one training run holds; built by ``_start_run``."""

    options: TrainOptions
    device: str
    dtype: torch.dtype
    config: dict
    weights: dict
    separator: SpeakerSeparatorTransformer  # what is trained
    averaged: AveragedSeparator  # what is validated and saved
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    mixtures: Dataset
    val_set: Dataset
    history: list[dict]
    extras: tuple  # losses through frozen models


def _start_run(options: TrainOptions, train_set, val_set, folder: Path) -> _Run:
    """Agree on sizes, make or restore separator and optimizer, and say what will be trained."""
    device = pick_device(options.device)
    dtype = pick_dtype(options.dtype, device)
    streams = _agree_on_streams(train_set, val_set, options.max_speakers)
    checkpoint = newest_checkpoint(folder) if options.resume else None
    config, separator, averaged = _make_separator(options, train_set, streams, checkpoint, folder)
    for module in (separator, averaged.separator):
        module.to(device)
    parameters = sum(p.numel() for p in separator.parameters())
    check_disk(folder, parameters, 2 + options.epochs // options.save_every)
    optimizer, scheduler, history = _make_optimizer(options, separator, checkpoint, folder)
    mixtures = _remixed(options, train_set, separator.max_speakers, device)
    extras = _extra_losses(options, train_set, mixtures, separator.feature_dim, device)
    reconstruction = options.reconstruction_weight
    if reconstruction is None:
        reconstruction = 0.5 if train_set.is_sum else 0.0
    weights = {"reconstruction_weight": reconstruction, "activity_weight": options.activity_weight}
    remix = isinstance(mixtures, RemixedDataset)
    remixed = f" (remixed to {len(mixtures)} an epoch)" if remix else ""
    print(
        f"device {device}, {str(dtype).removeprefix('torch.')}, {parameters:,} parameters, "
        f"{len(train_set)} training{remixed} and {len(val_set)} validation mixtures, "
        f"{separator.max_speakers} streams"
    )
    return _Run(options, device, dtype, config, weights, separator, averaged, optimizer, scheduler,
                mixtures, val_set, history, extras)


def _make_separator(options: TrainOptions, train_set, streams: int, checkpoint, folder: Path):
    """Return the configuration, the separator to train and its average, new or as they were."""
    config = {"feature_dim": train_set.feature_dim, "max_speakers": streams, "threshold": 0.5,
              "mask": options.mask or ("shares" if train_set.is_sum else "gains"),
              "feature_source": train_set.source,
              "trunk": options.trunk or ("queries" if train_set.is_sum else "frames"),
              "num_layers": options.num_layers, "num_heads": options.num_heads,
              "ff_dim": options.ff_dim, "dropout": options.dropout}
    torch.manual_seed(options.seed)
    if checkpoint:
        config = {**checkpoint["model_config"], "threshold": 0.5}  # as in an unbroken run
        saved = build_separator(config, checkpoint["model_state_dict"], folder)
        averaged = AveragedSeparator(saved, checkpoint.get("steps", 0))
        trained = checkpoint.get("training_state_dict", checkpoint["model_state_dict"])
        separator = build_separator(config, trained, folder)
    elif options.start_from:
        separator = load_separator(options.start_from)
        config = {**separator.config, "threshold": 0.5, "feature_source": train_set.source}
        averaged = AveragedSeparator(separator)
    else:
        separator = SpeakerSeparatorTransformer(**config)
        averaged = AveragedSeparator(separator)
    _check_sizes(separator, train_set.feature_dim, streams, "the data")
    return config, separator, averaged


def _make_optimizer(options: TrainOptions, separator, checkpoint, folder: Path):
    """Return the optimizer, its cosine and the history of the run so far."""
    # Wider separators want smaller steps; 1e-4 at 1280 (benchmarks/ABLATIONS.md).
    lr = options.lr or 0.128 / separator.feature_dim
    if options.optimizer not in ("adamw", "muon"):
        raise InputError(f"optimizer must be adamw or muon, not {options.optimizer!r}")
    fused = fuses_optimizer(separator.speaker_queries.device.type)
    settings = {"lr": lr, "weight_decay": options.weight_decay}
    if options.optimizer == "muon":
        optimizer = MuonAdamW(separator, fused=fused, **settings)
    else:
        optimizer = torch.optim.AdamW(
            separator.parameters(), betas=ADAM_BETAS, fused=fused, **settings)
    history = restore_optimizer(optimizer, checkpoint, folder) if checkpoint else []
    for group in optimizer.param_groups:
        group["weight_decay"] = options.weight_decay
    return optimizer, make_scheduler(optimizer, options.epochs, lr, len(history)), history


def _remixed(options: TrainOptions, train_set, streams: int, device: str) -> Dataset:
    """Return what an epoch draws its mixtures from: the training set, or fresh mixtures of it."""
    remix = train_set.is_sum if options.remix is None else options.remix
    if not remix:
        return train_set
    if train_set.is_sum:
        return RemixedFeatures(train_set, streams, options.seed, options.mixtures_per_epoch)
    if train_set.source.get("kind") != "speech":
        raise InputError("--remix needs mixtures that are sums of their sources, or recordings; "
                         "these are neither")
    return RemixedSpeech(train_set, streams, options.seed, options.mixtures_per_epoch, device)


def _extra_losses(options: TrainOptions, train_set, mixtures, width: int, device: str) -> tuple:
    """Return the losses through frozen models that the options ask for."""
    extras, source = [], train_set.source
    if (options.output_weight or options.llm) and source.get("kind") != "speech":
        raise InputError("--output_weight and --llm need features of recordings (generate with "
                         "--speech_dir)")
    if options.output_weight:
        remixed = isinstance(mixtures, RemixedSpeech)  # it has the encoder already
        encoder = mixtures.encoder if remixed else load_audio_encoder(source["encoder"], device)
        extras.append(OutputLoss(
            encoder.tower, source.get("layer"), options.output_weight, options.output_block))
    if options.llm:
        if not any(speaker.get("text") for s in train_set.samples for speaker in s["speakers"]):
            raise InputError("--llm trains against transcripts and the training data has none")
        extras.append(TranscriptLoss(
            options.llm, source.get("layer"), device, options.llm_prompt, options.llm_weight))
        if extras[-1].width != width:
            raise InputError(f"the features are {width} wide and {options.llm} has "
                             f"{extras[-1].width}: generate them with its own encoder")
    return tuple(extras)


def restore_optimizer(optimizer, checkpoint: dict, origin) -> list[dict]:
    """Put an optimizer back where a checkpoint left it; returns the history of its run."""
    try:
        optimizer.load_state_dict(checkpoint["optimizer_state_dict"])
        return list(checkpoint["train_history"])
    except (TypeError, ValueError, KeyError) as error:
        raise InputError(f"cannot resume from {origin}: its optimizer state is {error}") from None


def _run_epoch(run: _Run, epoch: int) -> dict:
    """Train and validate once; returns the epoch's row of the history."""
    started, seed = time.perf_counter(), run.options.seed + epoch
    if isinstance(run.mixtures, RemixedDataset):
        run.mixtures.epoch = epoch
    torch.manual_seed(seed)  # dropout of a resumed run is that of an unbroken one
    loader = make_loader(
        run.mixtures, run.options.batch_size, run.separator.max_speakers, run.device, seed
    )
    rate = run.scheduler.get_last_lr()[0]
    train = train_epoch(run.separator, loader, run.optimizer, run.weights, run.device, run.dtype,
                        epoch, run.extras, run.averaged)
    val = evaluate_separator(
        run.averaged.separator, run.val_set, device=run.device, dtype=run.dtype,
        extras=run.extras, **run.weights)
    if not math.isfinite(val["total"]):
        raise InputError(f"the validation loss is not finite in epoch {epoch}; the last "
                         "checkpoint is intact: look at the validation data")
    run.scheduler.step()
    synchronize(run.device)
    seconds = time.perf_counter() - started
    return {"epoch": epoch, "lr": rate, "seconds": seconds, "train": train, "val": val}


def train_speaker_separator(
    data_dir=DEFAULT_DATA_DIR, checkpoint_dir=DEFAULT_CHECKPOINT_DIR, **options
) -> list[dict]:
    """Train a separator on a dataset; writes checkpoints, report and curves.

    Parameters
    ----------
    data_dir, checkpoint_dir : path
    **options
        The fields of ``TrainOptions``, explained by ``train --help``.

    Returns
    -------
    list of dict
        One per epoch: ``epoch, lr, seconds, train`` (loss parts) and ``val`` (loss parts, count
        accuracy, SI-SDR improvement and the scores of the trivial outputs).

    Raises
    ------
    FileNotFoundError, ValueError
        For data, checkpoints or devices that cannot be used.
    """
    options, folder = TrainOptions(**options), Path(checkpoint_dir)
    pick_device(options.device)
    train_set, val_set = (MultiSpeakerDataset(data_dir, split) for split in ("train", "val"))
    _prepare_folder(folder)
    run = _start_run(options, train_set, val_set, folder)
    history = run.history
    if len(history) >= options.epochs:
        print(f"{len(history)} epochs are done already; ask for more with --epochs")
        return history
    # After every check, so that a refused command leaves an earlier run where it is.
    if not options.resume and (aside := set_aside_earlier_run(folder)):
        print(f"an earlier run was in {folder}; moved it to {aside}")
    for epoch in range(len(history) + 1, options.epochs + 1):
        history.append(_run_epoch(run, epoch))
        print(format_epoch(history[-1], options.epochs), flush=True)
        best = best_epoch(history)["epoch"]
        stop = options.patience is not None and epoch - best >= options.patience
        last = stop or epoch == options.epochs
        write_epoch(folder, run, epoch == best, last or epoch % options.save_every == 0)
        if stop:
            print(f"no better epoch in {options.patience}; stopped, the best was {best}")
            break
    write_report(folder, run, train_set)
    plot_history(folder / "training_curves.png", history)
    return history


def best_epoch(history: list[dict]) -> dict:
    """Return the epoch of least validation loss among those validated on the data of the last one.

    A run may be resumed on other data, whose losses say nothing about the earlier ones; the scores
    of the trivial outputs tell validation data apart.
    """
    def trivial(row):
        return list(row["val"]["trivial_mse"].values())

    same = [row for row in history if np.allclose(trivial(row), trivial(history[-1]), rtol=1e-3)]
    return min(same, key=lambda row: row["val"]["total"])


def checkpoint_of(run: _Run) -> dict:
    """Everything a checkpoint holds: plain types and tensors only."""
    row = run.history[-1]
    return {
        "epoch": row["epoch"], "model_state_dict": run.averaged.separator.state_dict(),
        "optimizer_state_dict": run.optimizer.state_dict(),
        "scheduler_state_dict": run.scheduler.state_dict(),
        "train_loss": row["train"]["total"], "val_loss": row["val"]["total"],
        "train_history": run.history, "training_state_dict": run.separator.state_dict(),
        "steps": run.averaged.steps, "options": run.options._asdict(),
        "model_config": {**run.config, "threshold": row["val"]["calibrated_threshold"]},
    }


def write_epoch(folder: Path, run: _Run, is_best: bool, is_periodic: bool) -> None:
    """Write the checkpoints that an epoch calls for; one that is both is written once."""
    periodic = folder / f"checkpoint_epoch_{run.history[-1]['epoch']}.pt"
    if is_best:
        save_checkpoint(folder / "best_model.pt", checkpoint_of(run))
    if is_best and is_periodic:
        link_or_copy(folder / "best_model.pt", periodic)
    elif is_periodic:
        save_checkpoint(periodic, checkpoint_of(run))


def _agree_on_streams(train_set, val_set, max_speakers: int | None) -> int:
    if val_set.feature_dim != train_set.feature_dim:
        raise InputError(
            f"validation features are {val_set.feature_dim} wide, training {train_set.feature_dim}"
        )
    found = max(train_set.max_speakers, val_set.max_speakers, 1)
    if max_speakers is not None and max_speakers < found:
        raise InputError(
            f"--max_speakers={max_speakers} is smaller than the {found} talkers in the data"
        )
    return max_speakers or found


def _check_sizes(separator, feature_dim: int, max_speakers: int, other) -> None:
    """Fail unless a separator fits the other side's feature width and number of talkers."""
    if separator.feature_dim != feature_dim:
        raise InputError(
            f"the separator reads features {separator.feature_dim} wide and {other} has "
            f"{feature_dim}: train one on these features"
        )
    if separator.max_speakers < max_speakers:
        raise InputError(
            f"the separator has {separator.max_speakers} streams and {other} asks for "
            f"{max_speakers}: train one with --max_speakers={max_speakers}"
        )


def _markdown_table(header: str, rows: list) -> list[str]:
    columns = header.split(", ")
    lines = [columns, ["---"] * len(columns), *rows]
    return ["", *("| " + " | ".join(map(str, line)) + " |" for line in lines), ""]


def write_report(folder: Path, run: _Run, train_set) -> None:
    """Write training_report.md: what was run, on what, and how it scored beside trivial outputs."""
    last, best = run.history[-1], best_epoch(run.history)
    settings = {**run.options._asdict(), **run.config, **run.weights}
    data, losses = [], []
    for name, dataset in (("train", train_set), ("val", run.val_set)):
        counts = [len(sample["speakers"]) for sample in dataset.samples]
        by_count = "; ".join(f"{n}: {counts.count(n)}" for n in sorted(set(counts)))
        talkers = len({talker for talker, _ in dataset.source_files()})
        data.append([name, len(counts), talkers, f"{np.mean(counts):.2f}", by_count])
    for row in run.history:
        parts = [f"{row['val'][part]:.4f}" for part in LOSS_PARTS]
        losses.append([row["epoch"], f"{row['lr']:.2e}", f"{row['train']['total']:.4f}", *parts,
                       f"{row['val']['count_accuracy']:.1%}"])
    terms = {"separation": 1.0, "reconstruction": run.weights["reconstruction_weight"],
             "activity": run.weights["activity_weight"],
             **{extra.name: extra.weight for extra in run.extras}}
    total = max(sum(terms[part] * last["val"][part] for part in terms), 1e-12)
    shares = [[part, weight, f"{weight * last['val'][part] / total:.0%}"]
              for part, weight in terms.items()]
    lines = [
        "# Training report", "", "## Configuration",
        *_markdown_table("setting, value", [[k, json.dumps(v)] for k, v in settings.items()]),
        "## Data",
        *_markdown_table("split, mixtures, talkers, mean per mixture, mixtures by talkers", data),
        f"## Validation, best epoch ({best['epoch']})", "", *score_table(best["val"]), "",
        "## Loss by epoch",
        *_markdown_table("epoch, lr, train, validation, separation, reconstruction, activity, "
                         "talker count right", losses),
        "## Loss composition, last epoch (validation)",
        *_markdown_table("part, weight, share", shares),
        "## Checkpoints", "", *(f"- {path.name}" for path in list_checkpoints(folder)),
    ]
    (folder / "training_report.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def plot_history(path: Path, history: list[dict]) -> None:
    """Draw losses, separation beside the trivial outputs, and count accuracy against epochs."""
    from matplotlib.figure import Figure

    epochs = [row["epoch"] for row in history]
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    loss, separation, count = figure.subplots(1, 3)
    for split, style in (("train", "--"), ("val", "-")):
        loss.plot(epochs, [row[split]["total"] for row in history], style, label=split)
        values = [row[split]["separation"] for row in history]
        separation.plot(epochs, values, style, label=f"separator, {split}")
    for (name, value), grey in zip(
        history[-1]["val"]["trivial_mse"].items(), ("0.2", "0.45", "0.7"), strict=True
    ):
        separation.axhline(value, color=grey, linestyle=":", label=name)
    count.plot(epochs, [row["val"]["count_accuracy"] for row in history], label="val")
    count.set_ylim(0, 1.05)
    titles = ("combined loss", "separation MSE per talker", "talker count accuracy")
    for axes, title in zip((loss, separation, count), titles, strict=True):
        axes.set(title=title, xlabel="epoch")
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=120, format="png")


# --------------------------------------------------------------------------------------------------
# Evaluate


@torch.inference_mode()
def evaluate_separator(
    separator: SpeakerSeparatorTransformer,
    dataset: Dataset,
    *,
    batch_size: int = 8,
    device: str | None = None,
    dtype: torch.dtype = torch.float32,
    threshold: float | None = None,
    num_speakers: int | None = None,
    reconstruction_weight: float = 0.5,
    activity_weight: float = 0.5,
    extras: tuple = (),
) -> dict:
    """Score a separator on a dataset beside the outputs that need none.

    ``num_speakers`` takes that many streams for talkers in every mixture, whatever ``threshold``.

    Returns
    -------
    dict
        ``total, separation, reconstruction, activity`` (loss parts), ``si_sdr_improvement`` (dB,
        feature space, over mixtures of two or more), ``count_accuracy``, ``precision`` and
        ``recall`` of activity at ``threshold`` (default: the separator's own),
        ``calibrated_threshold``, ``majority_count_accuracy`` (always the commonest count) and
        ``trivial_mse`` by name; also each of ``extras`` (see ``batch_loss``), mean per talker.
    """
    separator.eval()
    device = device or separator.speaker_queries.device.type
    weights = {"reconstruction_weight": reconstruction_weight, "activity_weight": activity_weight}
    names = (*LOSS_PARTS, "zeros", "mixture", "mixture / count", "improvement",
             *(extra.name for extra in extras))
    sums, probabilities, truths, weight_sums = [], [], [], []
    for batch in make_loader(dataset, batch_size, separator.max_speakers, device):
        batch = to_device(batch, device)
        with autocast(device, dtype):
            separated, probs = separator(batch["mixture"], batch["frame_mask"])
        values, sizes, assignment = _score_batch(separated, probs, batch, weights)
        talkers = batch["speaker_mask"].sum()
        with autocast(device, dtype):
            more = [extra(separated, assignment, batch).float() * talkers for extra in extras]
        sums.append(torch.stack([*values, *more]))
        weight_sums.append(torch.cat([sizes, talkers.expand(len(extras))]))
        probabilities.append(reorder(probs.float(), assignment))
        truths.append(batch["speaker_mask"])
    means = torch.stack(sums).sum(0).cpu() / torch.stack(weight_sums).sum(0).cpu().clamp(min=1e-9)
    scores = dict(zip(names, means.tolist(), strict=True))
    scores["trivial_mse"] = {name: scores.pop(name) for name in names[4:7]}
    scores["si_sdr_improvement"] = scores.pop("improvement")
    scores["total"] += sum(extra.weight * scores[extra.name] for extra in extras)
    probabilities, truths = torch.cat(probabilities).cpu(), torch.cat(truths).cpu()
    threshold = separator.threshold if threshold is None else threshold
    return {**scores, **_activity_scores(probabilities, truths, threshold, num_speakers)}


def _score_batch(separated, probs, batch: dict, weights: dict) -> tuple[Tensor, Tensor, Tensor]:
    """Return sums of every score, what to divide them by, and the stream of each talker."""
    mixture, targets, frame_mask = batch["mixture"], batch["targets"], batch["frame_mask"]
    active = batch["speaker_mask"].float()
    loss = separator_loss(
        separated, probs, targets, batch["speaker_mask"], mixture, frame_mask, **weights
    )
    talkers, size = active.sum(), active.new_tensor(len(active))
    parts = torch.stack([getattr(loss, part) for part in LOSS_PARTS])
    part_sizes = torch.stack([size, talkers, frame_mask.sum().float(), size])
    trivial = torch.stack([
        (talker_mse(output[:, None], targets, frame_mask) * active).sum()
        for output in trivial_outputs(mixture, batch["speaker_mask"]).values()
    ])
    valid = frame_mask[:, None]
    estimates = reorder(separated.float(), loss.assignment)
    improvement = si_sdr(estimates, targets, valid) - si_sdr(mixture[:, None], targets, valid)
    several = active * (active.sum(1, keepdim=True) > 1)
    values = torch.cat([parts * part_sizes, trivial, (improvement * several).sum()[None]])
    sizes = torch.cat([part_sizes, talkers.repeat(3), several.sum()[None]])
    return values, sizes, loss.assignment


def _activity_scores(
    probs: Tensor, truth: Tensor, threshold: float, num_speakers: int | None = None
) -> dict[str, float]:
    """Talker counting and activity scores from [N, S] probabilities in the order of the talkers."""
    found, counts = active_streams(probs, threshold, num_speakers), truth.sum(1)
    hits = (found & truth).sum().item()
    return {
        "threshold": threshold,
        "calibrated_threshold": calibrate_threshold(probs, truth),
        "count_accuracy": (found.sum(1) == counts).float().mean().item(),
        "majority_count_accuracy": (counts == counts.mode().values).float().mean().item(),
        "precision": hits / max(found.sum().item(), 1),
        "recall": hits / max(truth.sum().item(), 1),
    }


def score_table(scores: dict) -> list[str]:
    """Lines of the table that stands in the report and that ``evaluate`` prints."""
    lines = ["| output | separation MSE | SI-SDR improvement (dB) | talker count right |",
             "|---|---|---|---|"]
    improvements = {"zeros": "-", "mixture": "0.0", "mixture / count": "0.0"}
    for name, value in scores["trivial_mse"].items():
        lines.append(f"| {name} | {value:.3f} | {improvements[name]} | - |")
    commonest = scores["majority_count_accuracy"]
    lines.append(f"| always the commonest count | - | - | {commonest:.1%} |")
    lines.append(f"| **separator** | {scores['separation']:.3f} | "
                 f"{scores['si_sdr_improvement']:.1f} | {scores['count_accuracy']:.1%} |")
    return lines


def plot_streams(path, rows: list[dict[str, Tensor]]) -> None:
    """Draw feature maps, frames to the right, a row per recording and a panel per entry [T, D]."""
    from matplotlib.figure import Figure

    columns = max(len(row) for row in rows)
    figure = Figure(figsize=(2.6 * columns, 2.2 * len(rows)), layout="constrained")
    for axes_row, row in zip(figure.subplots(len(rows), columns, squeeze=False), rows, strict=True):
        reference = next(iter(row.values())).float().cpu()
        limit = max(reference.abs().quantile(0.99).item() if reference.numel() < 1 << 24
                    else reference.abs().max().item(), 1e-6)
        for axes in axes_row[len(row) :]:
            axes.set_axis_off()
        for axes, (title, features) in zip(axes_row, row.items(), strict=False):
            axes.imshow(features.float().cpu().numpy().T, aspect="auto", origin="lower",
                        cmap="RdBu_r", vmin=-limit, vmax=limit, interpolation="nearest")
            axes.set_title(title, fontsize=8)
            axes.tick_params(labelsize=6)
        axes_row[0].set(xlabel="frame", ylabel="feature")
    figure.savefig(path, dpi=120, format="png")


@torch.inference_mode()
def plot_samples(path, separator, dataset, device: str, count: int = 3) -> None:
    """Draw mixture, targets and the streams assigned to them for the first few mixtures."""
    rows = []
    for index in range(min(count, len(dataset))):
        batch = to_device(collate([dataset[index]], separator.max_speakers), device)
        separated, _ = separator(batch["mixture"])
        cost = pairwise_mse(separated, batch["targets"], batch["frame_mask"])
        streams = reorder(separated, best_assignment(cost, batch["speaker_mask"]))[0]
        row = {"mixture": batch["mixture"][0]}
        for i in range(int(batch["speaker_mask"].sum())):
            row |= {f"talker {i + 1}": batch["targets"][0, i], f"stream {i + 1}": streams[i]}
        rows.append(row)
    plot_streams(path, rows)


# --------------------------------------------------------------------------------------------------
# Encoders: the audio towers of Qwen2-Audio and Whisper, cut at a block


def _open_audio(audio) -> tuple[str, int | None, Iterator[np.ndarray]]:
    """Return the name of some audio, its rate where it has one, and its mono pieces."""
    import soundfile

    if isinstance(audio, (str, os.PathLike)):
        if not Path(audio).is_file():
            raise FileNotFoundError(f"no such audio file: {audio}")
        try:
            file = soundfile.SoundFile(audio)
        except soundfile.LibsndfileError as error:
            raise InputError(f"cannot read audio from {audio}: {error.error_string}") from None
        pieces = file.blocks(AUDIO_BLOCK, dtype="float32", always_2d=True)
        return str(audio), file.samplerate, (piece.mean(axis=1) for piece in pieces)
    samples = np.asarray(audio.detach().float().cpu() if isinstance(audio, Tensor) else audio)
    if samples.ndim != 1:
        raise InputError(f"audio in memory must be mono [samples], not {list(samples.shape)}")
    starts = range(0, len(samples), AUDIO_BLOCK)
    return "the audio", None, (samples[i : i + AUDIO_BLOCK].astype(np.float32) for i in starts)


def audio_blocks(audio, sampling_rate: int, given_rate: int | None = None) -> Iterator[np.ndarray]:
    """Yield what ``read_audio`` returns piece by piece: memory does not grow."""
    import soxr

    name, rate, pieces = _open_audio(audio)
    rate, heard = rate or given_rate or sampling_rate, 0
    stream = soxr.ResampleStream(rate, sampling_rate, 1) if rate != sampling_rate else None
    for piece in pieces:
        if not np.isfinite(piece).all():
            raise InputError(f"{name} holds NaN or infinite samples")
        heard += len(piece)
        yield stream.resample_chunk(piece) if stream else piece
    if not heard:
        raise InputError(f"{name} has no samples")
    if stream:
        yield stream.resample_chunk(np.zeros(0, np.float32), last=True)


def read_audio(audio, sampling_rate: int, given_rate: int | None = None) -> np.ndarray:
    """Return mono float32 samples at ``sampling_rate`` from a file or from samples in memory.

    Samples in memory are an array, tensor or list at ``given_rate`` (default: already right).
    Raises FileNotFoundError or ValueError if the file is missing or unreadable, or there is no
    sample or a NaN in it.
    """
    return np.concatenate(list(audio_blocks(audio, sampling_rate, given_rate)))


def window_sizes(feature_extractor) -> tuple[int, int]:
    """Return the samples of an encoder's window and from one window's start to the next.

    A quarter is shared; the step is whole frames of the coarsest encoder, four mel frames each.
    """
    window, frame = feature_extractor.n_samples, 4 * feature_extractor.hop_length
    return window, window * 3 // 4 // frame * frame


def recording_length(audio, feature_extractor, sampling_rate: int | None = None) -> int:
    """Read a recording through and return its samples at the encoder's rate."""
    rate = feature_extractor.sampling_rate
    length = sum(map(len, audio_blocks(audio, rate, sampling_rate)))
    if length < rate // 25:  # one frame of the coarsest encoder
        name = audio if isinstance(audio, (str, os.PathLike)) else "the recording"
        raise InputError(f"{name} lasts {1000 * length / rate:.0f} ms, too short to hear")
    return length


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


class AudioEncoder(NamedTuple):
    """A frozen audio tower with the feature extractor that feeds it."""

    tower: nn.Module
    feature_extractor: object
    name: str

    @property
    def sampling_rate(self) -> int:
        """Samples per second that the tower reads."""
        return self.feature_extractor.sampling_rate

    @property
    def max_samples(self) -> int:
        """Length of the tower's window in samples."""
        return self.feature_extractor.n_samples

    def frame_rate(self, layer: int | None) -> float:
        """Feature frames per second after block ``layer`` (None: at the output)."""
        mel_rate = self.sampling_rate / self.feature_extractor.hop_length
        return mel_rate / (4 if layer is None and is_qwen_tower(self.tower) else 2)

    def num_frames(self, samples: int, layer: int | None) -> int:
        """Feature frames of so many samples after block ``layer``."""
        frames = (-(-samples // self.feature_extractor.hop_length) + 1) // 2
        return frames // 2 if layer is None and is_qwen_tower(self.tower) else frames


def is_qwen_tower(tower: nn.Module) -> bool:
    """Qwen2-Audio's tower masks padding and halves the frames at its end; Whisper's does not."""
    return hasattr(tower, "avg_pooler")


def _load(kind: str, path_or_id: str, what: str = "a model", **options):
    """Load with a class of transformers; whatever goes wrong is bad input."""
    import transformers

    try:
        return getattr(transformers, kind).from_pretrained(path_or_id, **options)
    except Exception as error:  # safetensors' and the hub's own kinds among them
        reason = first_line(error)
        raise InputError(f"cannot load {what} from {path_or_id}: {reason}") from None


def load_config(path_or_id: str, what: str = "a model"):
    """Load the configuration of a Qwen2-Audio or Whisper model, and fail if it is neither."""
    config = _load("AutoConfig", path_or_id, what)
    if config.model_type not in ("qwen2_audio", "whisper"):
        raise InputError(f"{path_or_id} is {config.model_type}, not Qwen2-Audio or Whisper")
    return config


def load_audio_encoder(path_or_id: str, device: str = "cpu") -> AudioEncoder:
    """Load the audio tower alone, its weights picked from the checkpoint's safetensors.

    Raises ValueError if there is no such model or it is neither Qwen2-Audio nor Whisper.
    """
    from transformers.models.qwen2_audio.modeling_qwen2_audio import Qwen2AudioEncoder
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    config = load_config(path_or_id, "an encoder")
    extractor = _load("AutoFeatureExtractor", path_or_id, "an encoder")
    if config.model_type == "qwen2_audio":
        tower, prefix = Qwen2AudioEncoder(config.audio_config), "audio_tower."
    else:
        tower, prefix = WhisperEncoder(config), "encoder."
    state = _tower_weights(path_or_id, prefix)
    if missing := sorted(set(tower.state_dict()) - set(state)):
        raise InputError(f"{path_or_id} lacks the tower's weight {missing[0]}")
    tower.load_state_dict(state)
    tower.requires_grad_(False)
    return AudioEncoder(tower.to(device).eval(), extractor, str(path_or_id))


def _tower_weights(path_or_id: str, prefix: str) -> dict[str, Tensor]:
    """Weights below ``prefix`` (``model.`` before it or not) from the shards that hold them."""
    from safetensors import SafetensorError, safe_open
    from transformers.utils import cached_file

    find = partial(cached_file, path_or_id, _raise_exceptions_for_missing_entries=False)
    inside = (prefix, f"model.{prefix}")
    shards, state = ["model.safetensors"], {}
    if index := find("model.safetensors.index.json"):
        placed = _read_json(Path(index))["weight_map"]
        shards = sorted({shard for key, shard in placed.items() if key.startswith(inside)})
    for shard in shards:
        path = find(shard)
        if path is None:
            raise InputError(f"{path_or_id} has no {shard}; only safetensors are read")
        try:
            with safe_open(path, "pt") as weights:
                for key in filter(lambda key: key.startswith(inside), weights.keys()):
                    name = key.removeprefix("model.").removeprefix(prefix)
                    state[name] = weights.get_tensor(key).float()
        except SafetensorError as error:
            raise InputError(f"{path} is truncated or damaged: {error}") from None
    return state


def check_layer(tower: nn.Module, layer: int | None) -> None:
    """Fail unless the tower has a block ``layer`` to separate after."""
    if layer is not None and not 0 <= layer <= len(tower.layers):
        raise InputError(f"layer must be 0 to {len(tower.layers)} for this encoder, not {layer}")


def _run_blocks(tower: nn.Module, hidden: Tensor, blocks, frame_mask: Tensor | None) -> Tensor:
    attention_mask = None
    if is_qwen_tower(tower) and frame_mask is not None and not frame_mask.all():
        from transformers.masking_utils import create_bidirectional_mask

        attention_mask = create_bidirectional_mask(  # in the form that the model's attention takes
            config=tower.config, inputs_embeds=hidden, attention_mask=frame_mask)
    for block in blocks:
        output = block(hidden, attention_mask)
        hidden = output[0] if isinstance(output, tuple) else output
    return hidden


def tower_front(
    tower: nn.Module, input_features: Tensor, mel_mask: Tensor | None, layer: int | None
) -> tuple[Tensor, Tensor]:
    """Run a tower up to and with block ``layer`` (0: the convolutions only; None: all of it).

    ``input_features [B, mel bins, mel frames]``, ``mel_mask [B, mel frames]`` 1 where there is
    audio; returns the hidden states [B, T, D] and which frames are audio [B, T].
    """
    weight = tower.conv1.weight
    hidden = F.gelu(tower.conv1(input_features.to(weight.device, weight.dtype)))
    hidden = F.gelu(tower.conv2(hidden)).transpose(1, 2) + tower.embed_positions.weight
    B, T = hidden.shape[:2]
    lengths = torch.full((B,), 2 * T) if mel_mask is None else mel_mask.sum(-1)
    lengths = (lengths.to(hidden.device) - 1) // 2 + 1
    frame_mask = torch.arange(T, device=hidden.device) < lengths[:, None]
    hidden = _run_blocks(tower, hidden, tower.layers[:layer], frame_mask)
    if layer is not None:
        return hidden, frame_mask
    hidden = tower_rest(tower, hidden, None, len(tower.layers))
    if is_qwen_tower(tower):
        frame_mask = torch.arange(T // 2, device=hidden.device) < (lengths[:, None] - 2) // 2 + 1
    return hidden, frame_mask


def tower_rest(
    tower: nn.Module, hidden: Tensor, frame_mask: Tensor | None, layer: int | None,
    until: int | None = None,
) -> Tensor:
    """Run what follows block ``layer`` of a tower on ``hidden [B, T, D]``; not past ``until``."""
    if layer is None:
        return hidden
    hidden = _run_blocks(tower, hidden, tower.layers[layer:until], frame_mask)
    if until is not None:
        return hidden
    if is_qwen_tower(tower):
        hidden = tower.avg_pooler(hidden.transpose(1, 2)).transpose(1, 2)
    return tower.layer_norm(hidden)


@torch.inference_mode()
def encode_waveforms(
    encoder: AudioEncoder, waveforms: list[np.ndarray], layer: int | None = None
) -> list[Tensor]:
    """Encode recordings at the encoder's rate in one batch; returns valid frames [T, D] of each."""
    longest, rate = max(map(len, waveforms)), encoder.sampling_rate
    if longest > encoder.max_samples:
        raise InputError(
            f"the recording lasts {longest / rate:.1f} s and {encoder.name} reads "
            f"{encoder.max_samples / rate:.0f} s at a time: separate_recording reads longer ones")
    inputs = encoder.feature_extractor(
        waveforms, sampling_rate=rate, return_attention_mask=True, padding="max_length",
        return_tensors="pt")
    hidden, frame_mask = tower_front(
        encoder.tower, inputs["input_features"], inputs["attention_mask"], layer)
    return [h[m].float() for h, m in zip(hidden, frame_mask, strict=True)]


def encode_audio(
    audio, encoder, layer: int | None = None, sampling_rate: int | None = None, device: str = "cpu"
) -> Tensor:
    """Encode one recording into the features [T, D], float32, that a separator reads.

    Parameters
    ----------
    audio : path or array [samples]
        Mono samples need ``sampling_rate`` (default: taken as the encoder's).
    encoder : AudioEncoder, or a local folder or hub id of Whisper or Qwen2-Audio
    layer : int, optional
        Encoder block to stop after; 0 is after the convolutions, None the encoder's output.
    """
    if not isinstance(encoder, AudioEncoder):
        encoder = load_audio_encoder(str(encoder), device)
    check_layer(encoder.tower, layer)
    samples = read_audio(audio, encoder.sampling_rate, sampling_rate)
    return encode_waveforms(encoder, [samples], layer)[0]


# --------------------------------------------------------------------------------------------------
# Infer


class Separation(NamedTuple):
    """Streams [S, T, D] of one recording, their probabilities [S] and which are talkers [S]."""

    streams: Tensor
    probabilities: Tensor
    active: Tensor


def active_in_window(probs, threshold: float, num_speakers: int | None, alone: bool) -> Tensor:
    """Say which streams [..., S] are talkers; a window not ``alone`` may have fewer than all."""
    active = active_streams(probs, threshold)
    if num_speakers is None:
        return active
    likeliest = active_streams(probs, threshold, num_speakers)
    return likeliest if alone else likeliest & active


@torch.inference_mode()
def separate(
    separator: SpeakerSeparatorTransformer, features: Tensor, threshold: float | None = None,
    num_speakers: int | None = None, alone: bool = True,
) -> Separation:
    """Separate the features [T, D] of one recording, or of a window of one.

    ``num_speakers`` takes that many of the likeliest streams; else every stream from ``threshold``
    (default: the separator's calibrated one) on is a talker. A window that is not ``alone`` may
    have fewer than ``num_speakers``.
    """
    weight = separator.speaker_queries
    if features.dim() != 2:
        raise InputError(f"features must be [T, D], not {list(features.shape)}")
    separated, probs = separator.eval()(features.to(weight.device, weight.dtype)[None])
    threshold = separator.threshold if threshold is None else threshold
    active = active_in_window(probs, threshold, num_speakers, alone)
    return Separation(separated[0], probs[0], active[0])


class TalkerTracker:
    """Numbers the talkers in the windows of one recording by first appearance.

    Streams get the numbers that speak for them most, together: that the seconds which the window
    shares with the one before are alike in the stream and in that talker's stream; that the voice
    (mean and spread of features, changing frames counting most) is near the talker's mean voice;
    and that the talker has been heard often. How far apart voices may be is learnt on the way from
    talkers who go on and talkers who speak at once; until then nobody new appears without speaking
    at once with somebody. In doubt a talker is one who returns.

    Measured on spoken digits in windows of 4 s, the talkers' own features as streams, 95 s: of two
    talkers who take turns and overlap the numbers are right in every window; of three in a third
    of them. It cannot take back a number.

    Adjacent windows share ``shared`` frames; no more than ``most`` talkers are counted.
    """

    # Measured in 15 recordings of two talkers, the streams of two separators of digits:
    ALIKE = 0.8  # correlation above which shared seconds speak for one talker
    SECONDS, OFTEN = 2.0, 0.5  # weight of the shared seconds and of how often a talker was heard

    def __init__(self, shared: int, most: int | None = None):
        self.shared, self.most = shared, most
        self.voices: list[tuple[Tensor, int]] = []  # mean voice of each talker, of how many windows
        self.same: list[float] = []  # distances between voices of one talker,
        self.different: list[float] = []  # and of two
        self.talker_of: dict[int, int] = {}  # {stream: talker} of the last window with any talker
        self.tail = self.scale = None

    def number(self, streams: Tensor, active: Tensor, sound: bool = True) -> dict[int, int]:
        """Return {stream: talker}, from 0, of the next window's ``streams [S, T, D]``.

        ``sound`` says whether the seconds shared with the window before hold any.
        """
        streams = streams.float()
        found = active.nonzero().flatten().tolist()
        voices = {s: self._voice(streams[s]) for s in found}
        heard = self._compare(streams[:, : self.shared], found) if sound else {}
        named, count = self._name(voices, heard), len(self.voices)
        for s, talker in named.items():
            if heard.get((s, talker), 0.0) > self.ALIKE:
                self.same.append(self._distance(voices[s], talker))
            others = [t for t in named.values() if t != talker and t < count]
            self.different += [self._distance(voices[s], t) for t in others]
        for s in sorted(found, key=named.get):
            self._remember(named[s], voices[s])
        self.talker_of = named or self.talker_of  # the last seen, also after silence
        self.tail = streams[:, -self.shared :].clone() if found else None
        return named

    def _voice(self, stream: Tensor) -> Tensor:
        """Mean and spread [2 D] of a stream [T, D], in units of the features' own spread."""
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

    def _compare(self, head: Tensor, found: list[int]) -> dict[tuple[int, int], float]:
        """Correlate the shared frames [S, T, D] with the window before: {(stream, talker): r}."""
        if self.tail is None or self.tail.shape != head.shape:
            return {}
        now, then = (x - x.mean(1, keepdim=True) for x in (head, self.tail))
        now, then = (F.normalize(x.flatten(1), dim=1) for x in (now, then))
        alike = (now @ then.T).tolist()
        return {(s, t): alike[s][before] for s in found for before, t in self.talker_of.items()}

    def _limit(self) -> float:
        """Return the distance up to which two voices are taken for one talker's."""
        # Measured: of two talkers a third is found less and less often up to a factor of 2.
        if self.same and self.different:
            return 2 * math.sqrt(np.mean(self.same) * np.mean(self.different))
        known = self.same or self.different
        return 2 * np.mean(known) if known else math.inf

    def _name(self, voices: dict[int, Tensor], heard: dict) -> dict[int, int]:
        """Give every stream a talker of its own, or a new one: what has the highest summed score.

        Distances count in those between voices of one talker, the number of windows as its log.
        """
        from scipy.optimize import linear_sum_assignment

        count, limit = len(self.voices), min(self._limit(), 1e6)
        unit = np.mean(self.same) if self.same else limit / 4
        new = range(len(voices) if self.most is None else min(len(voices), self.most - count))
        nearer = {} if heard else dict.fromkeys(self.talker_of.values(), 0.9)  # after silence
        score = np.full((len(voices), count + len(new)), -limit / unit)
        for row, (s, voice) in enumerate(voices.items()):
            for t in range(count):
                alike = heard.get((s, t), self.ALIKE) - self.ALIKE
                distance = nearer.get(t, 1.0) * self._distance(voice, t) / unit
                often = math.log(self.voices[t][1])
                score[row, t] = self.SECONDS * alike - distance + self.OFTEN * often
        if heard and len(set(self.talker_of.values())) == count:
            # Everybody is in the window before: what is unlike them all is not yet somebody new.
            score[:, count:] -= self.SECONDS * self.ALIKE
        score[:, count:] -= 1e-9 * np.arange(len(new))  # the next number first
        _, talkers = linear_sum_assignment(score, maximize=True)
        return dict(zip(voices, talkers.tolist(), strict=True))


class SeparatedWindow(NamedTuple):
    """A window of a recording: its first frame, features [T, D], streams and {stream: talker}."""

    start: int
    features: Tensor
    separation: Separation
    talkers: dict[int, int]


def has_sound(part: np.ndarray, whole: np.ndarray) -> bool:
    """Say whether a part of a window is louder than a tenth of the whole (-20 dB)."""
    return bool(np.square(part).mean() > 0.01 * np.square(whole).mean())


def tracked_windows(
    audio, encoder: AudioEncoder, layer: int | None, num_speakers: int | None,
    sampling_rate: int | None,
) -> tuple[TalkerTracker, int, Iterator[tuple[int, np.ndarray, bool]]]:
    """Return a tracker for a recording's windows, their number, and an iterator over them.

    It yields the first sample, the samples, and whether what is shared with the window before has
    sound.
    """
    window, step = window_sizes(encoder.feature_extractor)
    shared = encoder.num_frames(window, layer) - encoder.num_frames(step, layer)
    length = recording_length(audio, encoder.feature_extractor, sampling_rate)
    blocks = audio_blocks(audio, encoder.sampling_rate, sampling_rate)
    windows = ((start, samples, has_sound(samples[: window - step], samples))
               for start, samples in audio_windows(blocks, window, step))
    count = 1 + max(0, -(-(length - window) // step))
    return TalkerTracker(shared, num_speakers), count, windows


def separate_recording(
    separator: SpeakerSeparatorTransformer, audio, encoder: AudioEncoder, layer: int | None = None,
    threshold: float | None = None, num_speakers: int | None = None,
    sampling_rate: int | None = None,
) -> Iterator[SeparatedWindow]:
    """Separate a recording of any length, window by window: memory does not grow.

    Windows share a quarter; ``TalkerTracker`` says who is who in them, and what it cannot tell.
    Parameters are those of ``separate`` and ``encode_audio``; of a recording longer than a window
    ``num_speakers`` counts the whole of it, and a talker must also reach ``threshold``.
    """
    check_layer(encoder.tower, layer)
    tracker, count, windows = tracked_windows(audio, encoder, layer, num_speakers, sampling_rate)
    for start, samples, sound in windows:
        features = encode_waveforms(encoder, [samples], layer)[0]
        separation = separate(separator, features, threshold, num_speakers, count == 1)
        talkers = tracker.number(separation.streams, separation.active, sound)
        yield SeparatedWindow(encoder.num_frames(start, layer), features, separation, talkers)


def write_separation(
    folder: Path, windows: Iterable[SeparatedWindow], num_frames: int, about: dict
) -> dict:
    """Write each talker's features, separation.json and separation.png; returns the JSON.

    The picture is of the first window. Of the frames that two windows share, each has half.
    """
    speakers, parts, end = {}, [], 0
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob("speaker_*.npy"):  # of an earlier, perhaps longer, list
            if old.stem.removeprefix("speaker_").isdigit():
                old.unlink()
        for window in windows:
            if not parts:
                _plot_window(folder / "separation.png", window)
            skip = max(0, (end - window.start) // 2)
            end = window.start + len(window.features)
            probs = [round(p, 4) for p in window.separation.probabilities.tolist()]
            for stream, talker in window.talkers.items():
                file = f"speaker_{talker + 1}.npy"
                row = speakers.setdefault(
                    talker, {"file": file, "stream": stream, "probability": 0.0})
                row["probability"] = max(row["probability"], probs[stream])
                features = window.separation.streams[stream].float().cpu().numpy()
                _write_frames(folder / file, features, window.start, skip, num_frames)
            parts.append({"start": window.start, "end": end, "probabilities": probs,
                          "speakers": {talker + 1: s for s, talker in window.talkers.items()}})
        result = {**about, "num_frames": num_frames, "num_speakers": len(speakers),
                  "speakers": [row for _, row in sorted(speakers.items())]}
        several = len(parts) > 1
        result |= {"windows": parts} if several else {"probabilities": parts[0]["probabilities"]}
        (folder / "separation.json").write_text(json.dumps(result, indent=2) + "\n")
    except OSError as error:
        raise InputError(f"cannot write to {folder}: {error.strerror}") from None
    return result


def _write_frames(path: Path, features: np.ndarray, start: int, skip: int, total: int) -> None:
    """Put frames [T, D] but the first ``skip`` at ``start`` into a file [total, D], 0 elsewhere."""
    if not path.exists():
        shape = (total, features.shape[1])
        np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=shape)
    file = np.load(path, mmap_mode="r+")  # opened anew each time: pages in use count as memory
    file[start + skip : start + len(features)] = features[skip:]
    file.flush()


def _plot_window(path: Path, window: SeparatedWindow) -> None:
    probs, streams = window.separation.probabilities, window.separation.streams
    panels = {"mixture": window.features}
    panels |= {f"speaker {talker + 1} ({probs[s]:.2f})": streams[s]
               for s, talker in sorted(window.talkers.items(), key=lambda pair: pair[1])}
    plot_streams(path, [panels])


# --------------------------------------------------------------------------------------------------
# Integrate


def audio_tower_of(model: nn.Module) -> nn.Module:
    """Return the audio tower of a Qwen2-Audio or Whisper model, old or new in layout.

    transformers >= 5.10 keeps Qwen2-Audio's parts under ``model.model``, before it on ``model``.
    """
    inner = getattr(model, "model", model)
    for owner, name in ((inner, "audio_tower"), (model, "audio_tower"), (inner, "encoder")):
        tower = getattr(owner, name, None)
        if hasattr(tower, "conv1"):
            return getattr(tower, "_orig_mod", tower)  # of a compiled one
    raise InputError(f"{type(model).__name__} is neither Qwen2-Audio nor Whisper")


class _Rows(NamedTuple):
    """The R streams that a running ``generate`` answers for."""

    streams: Tensor  # [R, T, D]
    frame_mask: Tensor  # [R, T]
    talkers: list[tuple[int, int, float]]  # (recording, stream, probability)
    spectrograms: Tensor  # [A, mel bins, mel frames] of the recordings
    prompts: list[int] | None = None  # with all talkers in one prompt: the prompt of each row

    def pack(self) -> Tensor:
        """Stand in for the spectrograms, [R, 2, mel frames]: the row's number, the frame's number.

        What ``generate`` does to its input (repeat rows for beams, drop finished ones, cut at a
        timestamp) it does to these, so the tower can tell which stream is asked for, and from when.
        """
        R, M = len(self.streams), self.spectrograms.shape[-1]
        numbers = torch.meshgrid(torch.arange(R), torch.arange(M), indexing="ij")
        return torch.stack(numbers, dim=1).float().to(self.spectrograms.device)

    def unpack(self, packed: Tensor) -> tuple[list[int], list[int]]:
        """Return the row that each packed input asks for and the mel frame that it starts at.

        Beams repeat every row in place; the copies of a prompt want all of its rows each.
        """
        numbers, starts = packed[:, :, 0].long().T.tolist()
        copies = len(packed) // len(self.streams)
        if self.prompts is None or copies < 2:
            return numbers, starts
        order = []
        for prompt in dict.fromkeys(self.prompts):
            rows = [row for row, owner in enumerate(self.prompts) if owner == prompt]
            if len({self.talkers[row][0] for row in rows}) > 1:
                raise InputError("a prompt with several audio slots takes no beams and one answer")
            order += rows * copies
        return order, starts


class _Integration:
    """What an integrated model does differently; lives on the model until it is removed."""

    def __init__(self, model, separator, layer: int | None, threshold: float | None):
        self.model, self.tower, self.separator = model, audio_tower_of(model), separator
        self.layer = layer
        self.threshold = separator.threshold if threshold is None else threshold
        # What libraries keep on the objects themselves (accelerate its hooks) is called, and kept.
        self.own = {"generate": model.__dict__.get("generate"),
                    "forward": self.tower.__dict__.get("forward")}
        self.rows: _Rows | None = None  # while ``generate`` runs

    def original(self, owner, name: str):
        """Return the method that this integration stands before."""
        return self.own[name] or getattr(type(owner), name).__get__(owner)

    def resume_tower(self, input_features, attention_mask=None, **kwargs):
        """Run the tower as before; inside ``generate``, its rest on the streams asked for."""
        if self.rows is None:
            forward = self.original(self.tower, "forward")
            return forward(input_features, attention_mask=attention_mask, **kwargs)
        from transformers.modeling_outputs import BaseModelOutput

        numbers, starts = self.rows.unpack(input_features)
        hidden, frame_mask = self.rows.streams[numbers], self.rows.frame_mask[numbers]
        for i, start in enumerate(starts):
            if start:
                hidden[i] = self.split_from(numbers[i], start)
        return BaseModelOutput(tower_rest(self.tower, hidden, frame_mask, self.layer))

    @torch.no_grad()
    def split(self, input_features, mel_mask) -> tuple[Tensor, Tensor, Tensor]:
        """Streams [A, S, T, D] of A recordings, frame masks [A, T] and probabilities [A, S]."""
        hidden, frame_mask = tower_front(self.tower, input_features, mel_mask, self.layer)
        self.separator.to(hidden.device)
        weight = self.separator.speaker_queries
        streams, probs = self.separator(hidden.to(weight.dtype), frame_mask)
        # Past the end of the audio a talker is as silent as the mixture.
        inside = frame_mask[:, None, :, None]
        return torch.where(inside, streams.to(hidden.dtype), hidden[:, None]), frame_mask, probs

    def split_from(self, row: int, start: int) -> Tensor:
        """Stream [T, D] of a row's talker where Whisper goes on from mel frame ``start``.

        The recording is read anew from there, as Whisper does; the talker's stream is the one
        nearest to what it was in the same seconds before.
        """
        mel = self.rows.spectrograms[self.rows.talkers[row][0], None, :, start:]
        inside = self.rows.frame_mask[row, None, start // 2 :].repeat_interleave(2, dim=1)
        streams, _, _ = self.split(F.pad(mel, (0, start)), inside)
        known = self.rows.streams[row, start // 2 :]
        error = (streams[0, :, : len(known)] - known).float().square().mean((1, 2))
        return streams[0, error.argmin()]

    def pick(self, streams, frame_mask, probs, num_speakers=None):
        """Return (recording, stream, probability) of the active talkers and the number of each."""
        active = active_streams(probs, self.threshold, num_speakers)
        talkers = [(a, s, float(probs[a, s])) for a, s in active.nonzero().tolist()]
        recordings = [a for a, _, _ in talkers]
        return talkers, [recordings[:i].count(a) + 1 for i, a in enumerate(recordings)]

    def generate(self, inputs=None, *args, num_speakers=None, mode="separate", pick=None, **kwargs):
        """Stand before the model's ``generate``; ``integrate_speaker_separator`` explains it."""
        model, is_qwen, ids = self.model, is_qwen_tower(self.tower), None
        generate, model.speaker_rows = self.original(model, "generate"), None
        if is_qwen:
            ids, features = kwargs.pop("input_ids", inputs), kwargs.get("input_features")
        else:
            features = kwargs.pop("input_features", inputs)
        _check_call(model, ids, features, mode, kwargs)
        if features is None:
            return generate(ids, *args, **kwargs)
        mel_mask = kwargs.get("feature_attention_mask" if is_qwen else "attention_mask")
        split = self.split(features, mel_mask)
        talkers, labels = (pick or self.pick)(*split, num_speakers)
        if not talkers:
            model.speaker_rows = []
            return _no_rows(model, ids, args, kwargs)
        chosen, prompts = [a for a, _, _ in talkers], None
        if mode == "joint":
            main, joint, prompts = _joint_prompts(model, ids, chosen, labels, kwargs)
            kwargs |= joint | {"feature_attention_mask": mel_mask[chosen]}
        else:
            kwargs = _repeat(kwargs, chosen, len(features))
            main = ids[chosen] if is_qwen else None
        streams = split[0][chosen, [s for _, s, _ in talkers]]
        self.rows = _Rows(streams, split[1][chosen], talkers, features, prompts)
        if is_qwen:
            kwargs["input_features"] = self.rows.pack()
        else:
            main = self.rows.pack()
        try:
            output = generate(main, *args, **kwargs)
        finally:
            self.rows = None
        if prompts is not None:
            output = _restore_prompts(output, ids[list(dict.fromkeys(prompts))], main.shape[1])
        sequences = output if isinstance(output, Tensor) else output["sequences"]
        copies = len(sequences) // len(talkers) if prompts is None else 1
        model.speaker_rows = [talker for talker in talkers for _ in range(copies)]
        return output


def audio_slots(model, ids: Tensor) -> list[tuple[int, int]]:
    """Return (start, end) of every run of audio tokens in one prompt [L]."""
    inside = F.pad((ids == model.config.audio_token_id).int(), (1, 1)).diff()
    starts, ends = (inside > 0).nonzero().flatten(), (inside < 0).nonzero().flatten()
    return list(zip(starts.tolist(), ends.tolist(), strict=True))


def _check_call(model, ids, features, mode: str, kwargs: dict) -> None:
    """Refuse calls of ``generate`` that would answer something else than was asked."""
    if mode not in ("separate", "joint"):
        raise InputError(f"mode must be separate or joint, not {mode!r}")
    window = 2 * audio_tower_of(model).embed_positions.num_embeddings
    if features is not None and features.shape[-1] > window:
        raise InputError(f"the recording has {features.shape[-1]} mel frames and the model reads "
                         f"{window} at a time: answer_per_talker reads longer ones")
    if ids is None:
        if mode == "joint":
            raise InputError("mode='joint' needs a prompt with an audio slot, as in Qwen2-Audio")
        return
    slots = [len(audio_slots(model, row)) for row in ids]
    if features is None:
        if any(slots) and kwargs.get("past_key_values") is None:
            raise InputError("the prompt has an audio slot but no audio came with it: give the "
                             "processor audio=... (it ignores audios=)")
        return
    if sum(slots) != len(features):
        raise InputError(f"{len(ids)} prompts with {sum(slots)} audio slots came with "
                         f"{len(features)} recordings: give one per slot")
    wrong = [count for count in slots if count != 1]
    if mode == "separate" and wrong:
        raise InputError(f"a prompt has {wrong[0]} audio slots: one answer per talker takes one "
                         "slot each; mode='joint' puts the talkers of every slot in its place")


def _repeat(kwargs: dict, rows: list[int], A: int) -> dict:
    """Repeat what belongs to one of ``A`` recordings for each of its rows."""

    def expand(name, value):
        if isinstance(value, Tensor) and value.dim() > 1 and len(value) == A:
            return value[rows]
        per_sample = name == "language" and isinstance(value, (list, tuple))
        return [value[row] for row in rows] if per_sample else value

    return {name: expand(name, value) for name, value in kwargs.items()}


def _joint_prompts(model, ids: Tensor, chosen: list[int], labels: list[int], kwargs: dict):
    """Put a labelled audio slot for every talker where a prompt had one for the recording.

    Returns the new prompts with their attention mask (padded on the left) and the prompt of each
    row; prompts without any talker are left out.
    """
    tokenizer, mask = kwargs.get("tokenizer"), kwargs.get("attention_mask", torch.ones_like(ids))
    if tokenizer is None:
        raise InputError("mode='joint' labels the talkers: give tokenizer=processor.tokenizer")
    around = set(tokenizer.convert_tokens_to_ids(["<|audio_bos|>", "<|audio_eos|>"]))
    words = {n: tokenizer(f"Speaker {n}: ", add_special_tokens=False)["input_ids"] for n in labels}
    prompts, built, recording = [], [], -1
    for b, row in enumerate(ids):
        pieces, rest, talkers = [], 0, 0
        for start, end in audio_slots(model, row):
            recording += 1
            start -= start > 0 and int(row[start - 1]) in around
            end += end < len(row) and int(row[end]) in around
            pieces.append(row[rest:start])
            for label in (labels[i] for i, a in enumerate(chosen) if a == recording):
                pieces += [row.new_tensor(words[label]), row[start:end]]
                talkers += 1
            rest = end
        text = torch.cat([*pieces, row[rest:]])[int((mask[b] == 0).sum()) :]
        prompts += [b] * talkers
        built += [text] if talkers else []
    padded = nn.utils.rnn.pad_sequence(
        built, batch_first=True, padding_value=-1, padding_side="left")
    pad = model.generation_config.pad_token_id or 0
    mask = (padded >= 0).to(mask.dtype)
    return padded.where(padded >= 0, pad), {"attention_mask": mask}, prompts


def _restore_prompts(output, ids: Tensor, length: int):
    """Put the caller's own prompts [B, L] before the answers, that they cut off by that length."""
    sequences = output if isinstance(output, Tensor) else output["sequences"]
    own = ids.repeat_interleave(len(sequences) // len(ids), dim=0)
    restored = torch.cat([own, sequences[:, length:]], dim=1)
    if not isinstance(output, Tensor):
        output["sequences"] = restored
    return restored if isinstance(output, Tensor) else output


def _no_rows(model, ids, args: tuple, kwargs: dict):
    """Return what ``generate`` does, for no row at all."""
    from transformers.generation import GenerateDecoderOnlyOutput

    empty = torch.zeros(0, 0, dtype=torch.long) if ids is None else ids[:0]
    config = kwargs.get("generation_config") or (args[0] if args else model.generation_config)
    asked = kwargs.get("return_dict_in_generate", config.return_dict_in_generate)
    if kwargs.get("return_segments"):
        return {"sequences": empty, "segments": []}
    return GenerateDecoderOnlyOutput(sequences=empty) if asked else empty


def integrate_speaker_separator(
    model, max_speakers: int = 3, separator_checkpoint=None, layer: int | None = None,
    threshold: float | None = None,
):
    """Put a separator into an audio-language model, in place: ``generate`` answers per talker.

    After this ``model.generate(**inputs)`` returns one row per active talker, grouped by sample;
    ``model.speaker_rows`` lists their (sample, stream, probability), counted from 0. Encoder blocks
    up to ``layer`` run once per recording, later ones once per active talker. Where no talker is
    found in the whole batch the result is empty, ``[0, L]``. Text-only calls are untouched.

    ``generate`` takes two options more: ``num_speakers``, when it is known, and ``mode="joint"``
    with ``tokenizer=processor.tokenizer``: all talkers of a recording in one prompt, each in an
    audio slot of its own after the words "Speaker 1:", for one answer about the conversation (one
    row per prompt; ``speaker_rows`` then lists the slots).

    Parameters
    ----------
    model : Qwen2AudioForConditionalGeneration or WhisperForConditionalGeneration
        Also compiled, in half precision or spread over devices. The separator becomes
        ``model.speaker_separator``, outside the ``state_dict``, and saves itself.
    max_speakers : int
        Streams of the separator.
    separator_checkpoint : path, hub id or separator, optional
        ``best_model.pt``, an exported folder, a hub id or a loaded one; without it the separator
        has random weights and is good for tests only.
    layer : int, optional
        Encoder block to separate after; default: what the checkpoint was trained on.
    threshold : float, optional
        Probability from which a stream is a talker; default: the checkpoint's, else 0.5.

    Raises
    ------
    FileNotFoundError, ValueError
        If the model or checkpoint cannot be used or their sizes differ.
    """
    remove_speaker_separator(model)
    whole = getattr(model, "_orig_mod", model)  # of a compiled one
    tower = audio_tower_of(whole)
    width = tower.conv2.out_channels
    if separator_checkpoint is None:
        separator = SpeakerSeparatorTransformer(width, max_speakers).eval()
    else:
        loaded = isinstance(separator_checkpoint, SpeakerSeparatorTransformer)
        separator = separator_checkpoint if loaded else load_separator(separator_checkpoint)
        layer = separator.feature_source.get("layer") if layer is None else layer
        _check_sizes(separator, width, max_speakers, "the model")
    check_layer(tower, layer)
    separator.requires_grad_(False)
    integration = _Integration(whole, separator, layer, threshold)
    # Set past nn.Module: the separator is no part of the model's weights and keeps its precision.
    vars(whole).update(
        _speaker_integration=integration, speaker_separator=separator, speaker_rows=None,
        generate=integration.generate)
    tower.forward = integration.resume_tower
    return model


def remove_speaker_separator(model):
    """Take the separator out again; the model is then what it was, bit for bit."""
    attributes = vars(getattr(model, "_orig_mod", model))
    integration = attributes.pop("_speaker_integration", None)
    if integration is None:
        return model
    for name in ("generate", "speaker_separator", "speaker_rows"):
        del attributes[name]
    del integration.tower.forward
    for owner, name in ((attributes, "generate"), (vars(integration.tower), "forward")):
        if integration.own[name] is not None:
            owner[name] = integration.own[name]
    return model


def build_prompt(processor, prompt: str) -> str:
    """Return the model's chat text for one recording and a question about it."""
    content = [{"type": "audio", "audio_url": "recording"}, {"type": "text", "text": prompt}]
    chat = [{"role": "system", "content": "You are a helpful assistant."},
            {"role": "user", "content": content}]
    return processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)


def join_texts(texts: list[tuple[int, str]], shared: float) -> str:
    """Join the texts of windows, (number, text) each, saying words of shared seconds once.

    Of the ``shared`` part of two adjacent windows' words, the longest run that ends the one and
    starts the other is taken once; a word beyond it on either side was cut by the window's edge.
    """
    joined, last, room = [], None, 0
    for number, text in texts:
        words = text.split()
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
    return " ".join(joined)


def _ask(model, processor, recordings: list, prompt: str | None, **options) -> list[str]:
    """Return the text of every row that ``generate`` gives; Whisper takes no prompt."""
    read = {"sampling_rate": processor.feature_extractor.sampling_rate, "return_tensors": "pt"}
    if hasattr(processor, "audio_token"):
        text = [build_prompt(processor, prompt or DEFAULT_PROMPT)] * len(recordings)
        inputs = processor(text=text, audio=recordings, padding=True, **read)
    else:
        inputs = processor.feature_extractor(recordings, return_attention_mask=True, **read)
    ids = model.generate(**inputs.to(model.device), **options)
    prompted = inputs["input_ids"].shape[1] if "input_ids" in inputs else 0
    tokenizer = getattr(processor, "tokenizer", processor)
    return [tokenizer.decode(row[prompted:], skip_special_tokens=True).strip() for row in ids]


def _answer_windows(
    model, processor, audio, prompt: str | None, sampling_rate: int | None,
    num_speakers: int | None, mode: str, **options,
) -> Iterator[tuple[float, float, list]]:
    """Yield start and end in seconds of each window and its (talkers, probability, text)."""
    from tqdm import tqdm

    integration = vars(getattr(model, "_orig_mod", model)).get("_speaker_integration")
    if integration is None:
        raise InputError("there is no separator in this model: integrate_speaker_separator first")
    if prompt is not None and not is_qwen_tower(integration.tower):
        raise InputError("Whisper writes down what is said and takes no prompt")
    if mode == "joint":
        options["tokenizer"] = processor.tokenizer
    encoder = AudioEncoder(integration.tower, processor.feature_extractor, "the model")
    tracker, count, windows = tracked_windows(
        audio, encoder, integration.layer, num_speakers, sampling_rate)
    for start, samples, sound in tqdm(
            windows, "windows", count, leave=False, disable=count < 2 or None):
        pick = partial(_pick_tracked, integration.threshold, tracker, sound, count == 1)
        texts = _ask(model, processor, [samples], prompt, num_speakers=num_speakers, mode=mode,
                     pick=pick, **options)
        who = [(tracker.talker_of[stream] + 1, p) for _, stream, p in model.speaker_rows]
        if mode == "joint" and who:
            who = [(tuple(n for n, _ in who), max(p for _, p in who))]
        answers = [(*talker, text) for talker, text in zip(who, texts, strict=True)]
        yield start / encoder.sampling_rate, (start + len(samples)) / encoder.sampling_rate, answers


def _pick_tracked(threshold, tracker, sound, alone, streams, frame_mask, probs, num_speakers):
    """Choose the talkers of a window and number them by the tracker, in the order of numbers."""
    active = active_in_window(probs[0], threshold, num_speakers, alone)
    talkers = tracker.number(streams[0][:, frame_mask[0]], active, sound)
    order = sorted(talkers, key=talkers.get)
    return [(0, s, float(probs[0, s])) for s in order], [talkers[s] + 1 for s in order]


def answer_per_talker(
    model, processor, audio, prompt: str | None = None, sampling_rate: int | None = None,
    num_speakers: int | None = None, mode: str = "separate", **options,
) -> list[dict]:
    """Ask an integrated Qwen2-Audio or Whisper about one recording of any length.

    Recordings longer than the encoder's window are read in windows that share a quarter; memory
    does not grow. ``TalkerTracker`` says how talkers keep their numbers. Texts of windows are
    joined; words of shared seconds are said once where both windows have the same ones.

    Parameters
    ----------
    audio : path or array or tensor [samples]
    prompt : str, optional
        What to ask Qwen2-Audio about each talker; default: "What does the person say?".
    sampling_rate : int, optional
        Of samples in memory; default: what the model reads.
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
    rows: dict[int, dict] = {}
    texts: dict[int, list] = {}
    joint = mode == "joint"
    windows = _answer_windows(
        model, processor, audio, prompt, sampling_rate, num_speakers, mode, **options)
    for number, (start, end, answers) in enumerate(windows):
        for who, probability, text in answers:
            key, named = (0, {"speakers": list(who)}) if joint else (who, {"speaker": who})
            row = rows.setdefault(key, {**named, "probability": 0.0, "text": "", "windows": []})
            if joint:
                row["speakers"] = sorted({*row["speakers"], *who})
            row["windows"].append({"start": start, "end": end, **named,
                                   "probability": round(probability, 4), "text": text})
            texts.setdefault(key, []).append((number, text))
    size, step = window_sizes(processor.feature_extractor)
    for key, row in rows.items():
        row["probability"] = max(part["probability"] for part in row["windows"])
        row["text"] = join_texts(texts[key], 1 - step / size)
    return [rows[key] for key in sorted(rows)]


# --------------------------------------------------------------------------------------------------
# Transcripts: what the frozen model makes of the streams


def load_listener(path_or_id: str, device: str = "cpu", dtype="auto"):
    """Load a frozen Qwen2-Audio or Whisper model and its processor.

    Raises ValueError if there is no such model, or it is neither.
    """
    is_qwen = load_config(path_or_id).model_type == "qwen2_audio"
    processor = _load("AutoProcessor", path_or_id)
    name = "Qwen2Audio" if is_qwen else "Whisper"
    model = _load(f"{name}ForConditionalGeneration", path_or_id, dtype=dtype)
    return model.to(device).eval().requires_grad_(False), processor


class OutputLoss:
    """Mean squared error of streams at the encoder's output, behind its frozen blocks.

    The blocks that follow ``layer`` say which errors of a stream matter to the model. ``until``
    compares behind that block already: most of what the blocks say, the first one says.
    """

    name = "output"

    def __init__(
        self, tower: nn.Module, layer: int | None, weight: float, until: int | None = None
    ):
        self.tower, self.layer, self.weight, self.until = tower, layer, weight, until
        if until is not None and not (layer is not None and layer < until <= len(tower.layers)):
            raise InputError(f"--output_block must lie behind the data's layer, {layer}, and not "
                             f"past block {len(tower.layers)}, not {until}")

    def __call__(self, separated: Tensor, assignment: Tensor, batch: dict) -> Tensor:
        """Return the error per active talker; arguments as of ``TranscriptLoss``."""
        samples, talkers = batch["speaker_mask"].nonzero(as_tuple=True)
        if not len(samples):
            return 0.0 * separated.sum()
        frame_mask = batch["frame_mask"][samples]
        streams = separated[samples, assignment[samples, talkers]]  # [rows, T, D]
        output = tower_rest(self.tower, streams, frame_mask, self.layer, self.until).float()
        with torch.no_grad():
            alone = batch["targets"][samples, talkers]
            target = tower_rest(self.tower, alone, frame_mask, self.layer, self.until).float()
        T = output.shape[1]  # the tower may halve the frames
        lengths = frame_mask.sum(1, keepdim=True) // (frame_mask.shape[1] // max(T, 1))
        valid = torch.arange(T, device=output.device) < lengths
        return masked_mean((output - target).square().mean(-1), valid, 1).mean()


class TranscriptLoss:
    """Cross-entropy of each talker's transcript through the frozen rest of a model.

    Streams enter the tower after block ``layer``; gradients reach them and no weight of the model.
    """

    name = "transcript"

    def __init__(
        self, path_or_id: str, layer: int | None, device: str = "cpu",
        prompt: str = DEFAULT_PROMPT, weight: float = 0.1,
    ):
        self.layer, self.weight = layer, weight
        self.model, self.processor = load_listener(path_or_id, device)
        self.tower = audio_tower_of(self.model)
        check_layer(self.tower, layer)
        self.width = self.tower.conv2.out_channels
        self.prompt = build_prompt(self.processor, prompt) if is_qwen_tower(self.tower) else ""

    def __call__(self, separated: Tensor, assignment: Tensor, batch: dict) -> Tensor:
        """Mean cross-entropy per token over the talkers of a batch who have a transcript.

        ``separated [B, S, T, D]`` in any order of streams, ``assignment [B, S]`` of the feature
        loss, and of the batch ``frame_mask [B, T]`` and ``texts`` (a list per mixture).
        """
        rows = [(sample, talker, text) for sample, texts in enumerate(batch["texts"])
                for talker, text in enumerate(texts) if text]
        if not rows:
            return 0.0 * separated.sum()
        samples, talkers, texts = (list(column) for column in zip(*rows, strict=True))
        streams = separated[samples, assignment[samples, talkers]]  # [rows, T, D]
        streams = streams.to(self.tower.conv1.weight.dtype)
        frame_mask = batch["frame_mask"][samples]
        hidden = tower_rest(self.tower, streams, frame_mask, self.layer)
        if not self.prompt:
            return self.model(encoder_outputs=(hidden,), labels=self._label_texts(texts)).loss
        lengths = frame_mask.sum(1) // (1 if self.layer is None else 2)
        return self.model(**self._label_prompts(texts, hidden, lengths)).loss

    def _label_prompts(self, texts: list[str], hidden: Tensor, lengths: Tensor) -> dict:
        """Return Qwen2-Audio's inputs: prompt, audio, transcript; the loss on the last."""
        tokenizer, slot = self.processor.tokenizer, self.processor.audio_token
        end = self.model.generation_config.eos_token_id
        end = end[0] if isinstance(end, list) else end
        ids, labels = [], []
        for text, length in zip(texts, lengths.tolist(), strict=True):
            prompt = tokenizer(self.prompt.replace(slot, slot * length))["input_ids"]
            answer = [*tokenizer(text, add_special_tokens=False)["input_ids"], end]
            ids.append(torch.tensor(prompt + answer))
            labels.append(torch.tensor([-100] * len(prompt) + answer))
        ids, labels = (nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-200)
                       .to(hidden.device) for rows in (ids, labels))
        audio = getattr(self.model, "model", self.model).multi_modal_projector(hidden)
        audio = audio[torch.arange(audio.shape[1], device=audio.device) < lengths[:, None]]
        words = self.model.get_input_embeddings()(ids.clamp(min=0))
        slots = (ids == self.model.config.audio_token_id)[..., None]
        return {"inputs_embeds": words.masked_scatter(slots, audio.to(words.dtype)),
                "attention_mask": (ids >= 0).long(), "labels": labels.clamp(min=-100)}

    def _label_texts(self, texts: list[str]) -> Tensor:
        """Return Whisper's labels [R, tokens]: the transcripts, after the start token."""
        start = self.model.config.decoder_start_token_id
        ids = [self.processor.tokenizer(text)["input_ids"] for text in texts]
        ids = [torch.tensor(row[1:] if row[:1] == [start] else row) for row in ids]
        labels = nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=-100)
        return labels.to(self.model.device)


def cp_word_errors(references: list[str], hypotheses: list[str]) -> int:
    """Count word errors under the best assignment of hypotheses to talkers, in any number of each.

    Divided by the words of the references it is the concatenated minimum-permutation word error
    rate (cpWER; Watanabe et al., 2020, arXiv:2004.09249). Case and punctuation do not count.
    """
    from jiwer import process_words
    from transformers.models.whisper.english_normalizer import BasicTextNormalizer

    def errors(reference: str, hypothesis: str) -> int:
        if not reference:
            return len(hypothesis.split())
        found = process_words(reference, hypothesis)
        return found.substitutions + found.deletions + found.insertions

    normalize, size = BasicTextNormalizer(), max(len(references), len(hypotheses))
    said, heard = ([normalize(text).strip() for text in texts] + [""] * (size - len(texts))
                   for texts in (references, hypotheses))
    cost = [[errors(reference, hypothesis) for hypothesis in heard] for reference in said]
    return min(sum(row[i] for row, i in zip(cost, order, strict=True))
               for order in permutations(range(size)))


def hear(
    model, processor, recordings: list, prompt: str, desc: str | None = None, **options
) -> list[list[str]]:
    """Return what a model says of each recording: a text per talker, one if not integrated."""
    from tqdm import tqdm

    answers: list[list[str]] = [[] for _ in recordings]
    for start in tqdm(range(0, len(recordings), 16), desc, leave=False, disable=None):
        some = recordings[start : start + 16]
        texts = _ask(model, processor, some, prompt, **options)
        rows = getattr(model, "speaker_rows", None)
        samples = range(len(some)) if rows is None else [sample for sample, _, _ in rows]
        for sample, text in zip(samples, texts, strict=True):
            answers[start + sample].append(text)
    return answers


def texts_of_recordings(dataset: MultiSpeakerDataset) -> list[list[str]]:
    """Return what each talker of each mixture says; fails unless there are recordings to hear."""
    samples = dataset.samples
    texts = [[str(s.get("text") or "") for s in sample["speakers"]] for sample in samples]
    if not all("mixed_wav" in sample for sample in samples) or not any(map(any, texts)):
        raise InputError(f"{dataset.folder} has no recordings with transcripts to count words of: "
                         "make it with --speech_dir")
    return texts


def evaluate_words(
    separator: SpeakerSeparatorTransformer, dataset: MultiSpeakerDataset, model, processor, *,
    threshold: float | None = None, num_speakers: int | None = None,
    prompt: str = DEFAULT_PROMPT, **options,
) -> list[dict]:
    """Count word errors for the mixtures of a dataset of recordings, with and without separator.

    Returns one dict per mixture: ``talkers, overlap, words, found`` (talkers) and the word errors
    of ``mixture`` (the model as it is), ``separated`` and ``oracle`` (each talker alone).
    ``options`` go to ``generate``. Raises ValueError if there are no recordings or transcripts.
    """
    rate, samples = processor.feature_extractor.sampling_rate, dataset.samples
    texts = texts_of_recordings(dataset)
    mixtures = [read_audio(dataset.folder / sample["mixed_wav"], rate) for sample in samples]
    alone = [read_audio(dataset.folder / speaker["wav_file"], rate)
             for sample in samples for speaker in sample["speakers"]]
    listen = partial(hear, model, processor, prompt=prompt, **options)
    mixed, singles = listen(mixtures, desc="mixtures"), iter(listen(alone, desc="talkers"))
    integrate_speaker_separator(model, separator.max_speakers, separator, threshold=threshold)
    try:
        separated = listen(mixtures, desc="streams", num_speakers=num_speakers)
    finally:
        remove_speaker_separator(model)
    rows = []
    for sample, said, whole, streams in zip(samples, texts, mixed, separated, strict=True):
        oracle = [text for _ in said for text in next(singles)]
        errors = {"mixture": whole, "separated": streams, "oracle": oracle}
        rows.append({
            "id": sample["id"], "talkers": len(said), "overlap": sample.get("overlap"),
            "words": sum(len(text.split()) for text in said), "found": len(streams),
            **{name: cp_word_errors(said, heard) for name, heard in errors.items()}})
    return rows


def word_scores(rows: list[dict]) -> list[dict]:
    """Sum up ``evaluate_words`` by number of talkers and by overlap: cpWER and counts right."""
    groups: dict[str, list[dict]] = {}
    for row in sorted(rows, key=lambda row: row["talkers"]):
        groups.setdefault(f"{row['talkers']} talker{'s' * (row['talkers'] != 1)}", []).append(row)
    several = [row for row in rows if row["talkers"] > 1 and row["overlap"] is not None]
    for low, high in ((0.0, 0.2), (0.2, 0.5), (0.5, 0.8), (0.8, 1.01)):
        if found := [row for row in several if low <= row["overlap"] < high]:
            groups[f"overlap {low:.0%} to {min(high, 1):.0%}"] = found
    scores = []
    for name, group in groups.items():
        words = sum(row["words"] for row in group)
        rates = {kind: sum(row[kind] for row in group) / words if words else None
                 for kind in ("mixture", "separated", "oracle")}
        right = float(np.mean([row["found"] == row["talkers"] for row in group]))
        scores.append({"of": name, "mixtures": len(group), "words": words, **rates,
                       "count_accuracy": right})
    return scores


def word_table(scores: list[dict]) -> list[str]:
    """Lines of the table of word error rates that ``evaluate --model`` prints."""
    lines = ["| cpWER | mixtures | no separator | separated | oracle | talker count right |",
             "|---|---|---|---|---|---|"]
    for row in scores:
        rates = " | ".join("-" if row[kind] is None else f"{row[kind]:.1%}"
                           for kind in ("mixture", "separated", "oracle"))
        lines.append(f"| {row['of']} | {row['mixtures']} | {rates} | {row['count_accuracy']:.1%} |")
    return lines


# --------------------------------------------------------------------------------------------------
# Commands


def cmd_train(args) -> None:
    """Train, after making the default dataset when there is none."""
    options = {k: v for k, v in vars(args).items() if k not in ("command", "export")}
    pick_device(args.device)
    if args.data_dir == DEFAULT_DATA_DIR and not Path(args.data_dir).exists():
        import generate_multi_speaker_dataset

        print(f"no {DEFAULT_DATA_DIR}: making the default dataset first")
        if generate_multi_speaker_dataset.main([]):
            raise InputError("could not make the default dataset")
    train_speaker_separator(**options)
    folder = Path(args.checkpoint_dir)
    print(f"wrote {folder / 'training_report.md'}, {folder / 'training_curves.png'} and "
          + ", ".join(path.name for path in list_checkpoints(folder)))
    if args.export:
        load_separator(folder / "best_model.pt").save_pretrained(args.export)
        print(f"exported the best weights to {args.export}")


def cmd_evaluate(args) -> None:
    """Print the score table of a separator on one split."""
    device = pick_device(args.device)
    _check_writable(args.json)
    _check_writable(args.picture)
    dataset = MultiSpeakerDataset(args.data_dir, args.split)
    separator = load_separator(args.checkpoint, device)
    _check_sizes(separator, dataset.feature_dim, dataset.max_speakers, "the data")
    active_streams(torch.zeros(1, separator.max_speakers), 0.5, args.num_speakers)
    if args.model:
        texts_of_recordings(dataset)
    scores = evaluate_separator(
        separator, dataset, batch_size=args.batch_size, device=device,
        dtype=pick_dtype(args.dtype, device), threshold=args.threshold,
        num_speakers=args.num_speakers)
    chosen = (f"talkers from probability {scores['threshold']:.2f} on" if args.num_speakers is None
              else f"{args.num_speakers} taken as known")
    print(f"{len(dataset)} mixtures of {args.data_dir}/{args.split}, {chosen}\n")
    print("\n".join(score_table(scores)))
    print(f"\nactivity precision {scores['precision']:.1%}, recall {scores['recall']:.1%}")
    if args.model:
        model, processor = load_listener(args.model, device)
        rows = evaluate_words(separator, dataset, model, processor, threshold=args.threshold,
                              num_speakers=args.num_speakers, prompt=args.prompt,
                              max_new_tokens=args.max_new_tokens)
        scores["words"] = word_scores(rows)
        print("\n" + "\n".join(word_table(scores["words"])))
    if args.json:
        Path(args.json).write_text(json.dumps(scores, indent=2) + "\n")
    if args.picture:
        plot_samples(args.picture, separator, dataset, device)


def _windows_to_infer(args, separator, device: str) -> tuple[Iterator[SeparatedWindow], int, dict]:
    """Return the windows of a feature file or recording, all its frames, and what to say of it."""
    source = separator.feature_source
    layer = source.get("layer") if args.layer is None else args.layer
    about = {"input": args.input, "checkpoint": args.checkpoint, "layer": layer}
    if Path(args.input).suffix == ".npy":
        features = read_features(Path(args.input))
        _check_sizes(separator, features.shape[1], 0, args.input)
        separation = separate(separator, features, args.threshold, args.num_speakers)
        found = separation.active.nonzero().flatten().tolist()
        window = SeparatedWindow(0, features, separation, {s: i for i, s in enumerate(found)})
        return iter([window]), len(features), about | {"frame_rate": source.get("frame_rate")}
    encoder = args.encoder or source.get("encoder")
    if not encoder:
        raise InputError("the separator was trained on simulated features: audio needs --encoder")
    encoder = load_audio_encoder(encoder, device)
    _check_sizes(separator, encoder.tower.conv2.out_channels, 0, args.input)
    active_streams(torch.zeros(1, separator.max_speakers), 0.5, args.num_speakers)
    length = recording_length(args.input, encoder.feature_extractor)
    windows = separate_recording(
        separator, args.input, encoder, layer, args.threshold, args.num_speakers)
    about["frame_rate"] = encoder.frame_rate(layer)
    return windows, encoder.num_frames(length, layer), about


def cmd_infer(args) -> None:
    """Separate one recording into files."""
    device = pick_device(args.device)
    separator = load_separator(args.checkpoint, device)
    with autocast(device, pick_dtype(args.dtype, device)):
        windows, num_frames, about = _windows_to_infer(args, separator, device)
        result = write_separation(Path(args.output_dir), windows, num_frames, about)
    words, probabilities = "stream", result.get("probabilities")
    if "windows" in result:
        words = f"{len(result['windows'])} windows, highest"
        probabilities = [row["probability"] for row in result["speakers"]]
    print(f"{result['num_speakers']} talkers ({words} probabilities "
          f"{', '.join(f'{p:.2f}' for p in probabilities)}) -> {args.output_dir}")


def _check_integration(args, separator) -> None:
    """Check everything that can be before the model is loaded."""
    config, processor = load_config(args.model), _load("AutoProcessor", args.model)
    tower, layer = getattr(config, "audio_config", config), args.layer
    _check_sizes(separator, tower.d_model, 0, "the model")
    if layer is not None and not 0 <= layer <= tower.encoder_layers:
        raise InputError(f"layer must be 0 to {tower.encoder_layers} for this model, not {layer}")
    active_streams(torch.zeros(1, separator.max_speakers), 0.5, args.num_speakers)
    if config.model_type == "whisper" and (args.prompt is not None or args.mode == "joint"):
        raise InputError("--prompt and --mode=joint are for Qwen2-Audio; Whisper takes no prompt")
    token = getattr(processor, "audio_token", "<|AUDIO|>")
    if token in (args.prompt or ""):
        raise InputError(f"--prompt must not hold {token}: there is one audio each")
    for audio in args.audio:
        recording_length(audio, processor.feature_extractor)
    _check_writable(args.json)


def _check_writable(file: str | None) -> None:
    """Fail unless a result file could be written, before the work that fills it."""
    if file and not os.access(Path(file).resolve().parent, os.W_OK):
        raise InputError(f"cannot write {file}: no such folder, or not yours to write in")


def cmd_integrate(args) -> None:
    """Print what each talker of each recording says."""
    device = pick_device(args.device)
    dtype = "auto" if args.dtype == "auto" else getattr(torch, args.dtype)
    separator = load_separator(args.checkpoint)
    _check_integration(args, separator)
    model, processor = load_listener(args.model, device, dtype)
    integrate_speaker_separator(
        model, separator.max_speakers, separator, args.layer, args.threshold)
    length = args.max_new_tokens or (256 if is_qwen_tower(audio_tower_of(model)) else None)
    options = {"max_new_tokens": length} if length else {}  # Whisper's limit is its own
    answers = {}
    for audio in args.audio:
        answers[audio] = answer_per_talker(
            model, processor, audio, args.prompt,
            num_speakers=args.num_speakers, mode=args.mode, **options)
        if len(args.audio) > 1:
            print(audio)
        for row in answers[audio]:
            numbers = row["speakers"] if args.mode == "joint" else [row["speaker"]]
            who = f"Speaker{'s' * (len(numbers) > 1)} {', '.join(map(str, numbers))}"
            print(f"{who} ({row['probability']:.2f}): {row['text']}")
        if not answers[audio]:
            print("no talker found")
    if args.json:
        Path(args.json).write_text(json.dumps(answers, indent=2) + "\n")


def main(argv: list[str] | None = None) -> int:
    """Run a subcommand; returns 0, or 2 after one line on standard error for bad input."""
    args = build_parser().parse_args(argv)
    commands = {"train": cmd_train, "evaluate": cmd_evaluate, "infer": cmd_infer,
                "integrate": cmd_integrate}
    try:
        commands[args.command](args)
    except (InputError, OSError) as error:
        print(f"error: {first_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped; checkpoints so far are whole, train --resume goes on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
