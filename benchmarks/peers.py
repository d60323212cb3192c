"""Measure what separation costs beside Whisper: ours, ConvTasNet's and SepFormer's.

In one run on the CPU, on 30 s of two talkers: seconds of every separator and of Whisper on the two
talkers, real-time factor, peak memory, and ratios to Whisper alone and to ours. Ours is the shipped
separator in float32, as the commands run it. The peers have random weights, so this says nothing
about quality. Whisper is timed on the talkers' own recordings, because random streams would give
texts of random length.

    pip install -r requirements.txt && pip install -r benchmarks/peers-requirements.txt
    python benchmarks/peers.py --model openai/whisper-tiny.en --speech first.wav second.wav

The peers have the sizes that their authors published for two talkers at 8 kHz: ConvTasNet (Luo and
Mesgarani, 2019, arXiv:1809.07454), SepFormer (Subakan et al., 2021, arXiv:2010.13154).
"""

import argparse
import json
import os
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from throughput import clock, peak_bytes, reset_peak  # noqa: E402

import speaker_separator_module as ssm  # noqa: E402
from audio import SAMPLING_RATE, load_model, log_mel, read_audio  # noqa: E402
from long_recordings import ask  # noqa: E402
from scoring import markdown_table  # noqa: E402

SECONDS, PEER_RATE = 30, 8000


def load_talkers(paths: list[str]) -> np.ndarray:
    """Return the recordings of two talkers, each repeated or cut to 30 s: [2, samples]."""
    return np.stack([np.resize(read_audio(path), SECONDS * SAMPLING_RATE) for path in paths])


def ours():
    """Return the shipped separator, from samples to spectrograms."""
    separator = ssm.load_separator()
    return (lambda samples: separator(log_mel(samples[None], separator.BINS)), separator,
            SAMPLING_RATE)


def conv_tasnet():
    """Return ConvTasNet of torchaudio."""
    from torchaudio.models import ConvTasNet

    model = ConvTasNet(num_sources=2, enc_kernel_size=16, enc_num_feats=512, msk_kernel_size=3,
                       msk_num_feats=128, msk_num_hidden_feats=512, msk_num_layers=8,
                       msk_num_stacks=3).eval()
    return lambda samples: model(samples[None, None]), model, PEER_RATE


def sepformer():
    """Return SepFormer of speechbrain, built as its recipe for WSJ0-2mix does."""
    from speechbrain.lobes.models.dual_path import (
        Decoder,
        Dual_Path_Model,
        Encoder,
        SBTransformerBlock,
    )

    encoder = Encoder(kernel_size=16, out_channels=256)
    inner, across = (SBTransformerBlock(
        num_layers=8, d_model=256, nhead=8, d_ffn=1024, use_positional_encoding=True,
        norm_before=True) for _ in range(2))
    masks = Dual_Path_Model(
        256, 256, inner, across, num_layers=2, norm="ln", K=250, num_spks=2,
        skip_around_intra=True, linear_layer_after_inter_intra=False)
    decoder = Decoder(in_channels=256, out_channels=1, kernel_size=16, stride=8, bias=False)
    model = torch.nn.ModuleList([encoder, masks, decoder]).eval()

    def separate(samples: torch.Tensor):
        hidden = encoder(samples[None])
        return [decoder(hidden * mask) for mask in masks(hidden)]

    return separate, model, PEER_RATE


@torch.inference_mode()
def measure(call, *inputs) -> dict:
    """Call on each input in turn; return seconds and peak memory above that before."""
    reset_peak("cpu")
    before, start = peak_bytes("cpu"), clock("cpu")
    for values in inputs:
        call(values)
    return {"seconds": clock("cpu") - start, "peak_bytes": peak_bytes("cpu") - before}


def measure_all(model: str, talkers: np.ndarray) -> dict:
    """Return what Whisper takes for both talkers and what each separator takes for their sum."""
    whisper, processor = load_model(model)

    def transcribe(samples):
        ask(whisper, processor, [samples])

    measure(transcribe, talkers[0, :SAMPLING_RATE])  # the first call is slow
    results = {"Whisper": measure(transcribe, *talkers)}
    for make in (ours, conv_tasnet, sepformer):
        separate, module, rate = make()
        mixture = torch.from_numpy(talkers.sum(0)[:: SAMPLING_RATE // rate].copy())
        with torch.inference_mode():
            separate(mixture[:rate])
        results[make.__name__] = measure(separate, mixture) | {
            "parameters": sum(weight.numel() for weight in module.parameters())}
    return results


def table(results: dict) -> list[str]:
    """Return the lines of a Markdown table; "with Whisper" adds its time for both talkers."""
    whisper = results["Whisper"]["seconds"]
    added = results["ours"]["seconds"]
    rows = []
    for name, row in results.items():
        alone = name == "Whisper"
        seconds, size = row["seconds"], "" if alone else f"{row['parameters'] / 1e6:.1f}M"
        rows.append([
            "Whisper alone, two talkers" if alone else name, size, f"{seconds:.2f}",
            f"{seconds / SECONDS:.3f}", f"{1 if alone else 1 + seconds / whisper:.2f}",
            "" if alone else f"{(whisper + seconds) / (whisper + added):.2f}",
            "" if alone else f"{seconds / added:.1f}", f"{row['peak_bytes'] / 1e6:.0f} MB"])
    return markdown_table(
        ["separator", "parameters", "seconds", "real-time factor", "total / Whisper alone",
         "total / ours", "separation / ours", "peak memory"], rows)


def main(argv: list[str] | None = None) -> int:
    """Print the table; return 0, or 2 after one line on standard error for bad input."""
    parser = argparse.ArgumentParser(description="Cost of separators beside Whisper's.")
    parser.add_argument("--model", required=True, help="Whisper: a folder or a hub id")
    parser.add_argument("--speech", required=True, nargs=2, metavar="AUDIO",
                        help="recordings of two talkers, repeated or cut to 30 s")
    parser.add_argument("--json", metavar="FILE", help="also write every number to this file")
    args = parser.parse_args(argv)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        results = measure_all(args.model, load_talkers(args.speech))
    except (ValueError, OSError, ModuleNotFoundError) as error:
        print(f"error: {ssm.first_line(error)}", file=sys.stderr)
        return 2
    print(f"CPU, {torch.get_num_threads()} threads, {SECONDS} s of two talkers\n")
    print("\n".join(table(results)))
    if args.json:
        Path(args.json).write_text(json.dumps(results, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
