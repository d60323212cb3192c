"""Measure what the separator adds to the audio part of a Qwen2-Audio of the true size.

The tower (637M parameters) and projector of the default configuration get random weights: neither
time nor memory depends on their values. One 30 s recording goes through them untouched, then with
the separator after each ``--layers`` block for one, two and three talkers; rows are ratios to the
untouched pass of the same run. The language model is left out: it answers once per talker either
way, as for a batch of that size.

    python benchmarks/true_size.py --layers 2 output
"""

import argparse
import ctypes
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def build_model(config, device: str, dtype, seed: int = 0):
    """Return a Qwen2-Audio whose tower and projector have random weights, the rest none at all."""
    import torch
    from transformers import Qwen2AudioForConditionalGeneration

    import speaker_separator_module as ssm

    with torch.device("meta"):
        model = Qwen2AudioForConditionalGeneration(config).eval().to(dtype)
    projector = getattr(model, "model", model).multi_modal_projector
    torch.manual_seed(seed)
    for part in (ssm.audio_tower_of(model), projector):
        part.to_empty(device=device).requires_grad_(False)
        for weight in part.parameters():
            weight.uniform_(-0.02, 0.02)
    return model, projector


def clear_peak(device: str) -> float:
    """Forget the peak so far; returns what is in use, in MB."""
    import torch

    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() / 2**20
    ctypes.CDLL(None).malloc_trim(0)  # what was freed but kept would hide what a run takes
    Path("/proc/self/clear_refs").write_text("5")
    return read_status("VmRSS")


def read_status(field: str) -> float:
    """Memory of this process in MB, as Linux counts it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) / 1024


def measure(run, device: str, repeats: int) -> dict:
    """Return the shortest time of a run in seconds and its memory beyond what was there, in MB."""
    import torch

    import speaker_separator_module as ssm

    # On a CPU that others share too, only the process's own time is comparable.
    clock = time.process_time if device == "cpu" else time.perf_counter
    before, times = clear_peak(device), []
    for _ in range(repeats):
        ssm.synchronize(device)
        started = clock()
        run()
        ssm.synchronize(device)
        times.append(clock() - started)
    peak = torch.cuda.max_memory_allocated() / 2**20 if device == "cuda" else read_status("VmHWM")
    return {"seconds": min(times), "megabytes": peak - before}


def benchmark(config, layers: list, device="cpu", dtype=None, repeats=1, talkers=(1, 2, 3)):
    """Yield a row per pass: what it is, seconds, megabytes, and both over the untouched pass."""
    import torch

    import speaker_separator_module as ssm

    model, projector = build_model(config, device, dtype or torch.float32)
    tower, frames = ssm.audio_tower_of(model), 2 * config.audio_config.max_source_positions
    mel = torch.randn(1, config.audio_config.num_mel_bins, frames, device=device)

    @torch.inference_mode()
    def untouched():
        projector(tower(mel).last_hidden_state)

    @torch.inference_mode()
    def separated(integration, count):
        streams, mask, probs = integration.split(mel, None)
        found = [(0, s, float(probs[0, s])) for s in range(count)]
        integration.rows = ssm._Rows(streams[0, :count], mask[[0] * count], found, mel)
        projector(tower(integration.rows.pack()).last_hidden_state)
        integration.rows = None

    plain = measure(untouched, device, repeats)
    yield {"pass": "untouched", **plain, "time": 1.0, "memory": 1.0}
    for layer in layers:
        ssm.integrate_speaker_separator(model, 3, layer=layer)
        integration = model._speaker_integration
        if layer is not None:  # what the separator takes once and keeps is not a pass's memory
            with torch.inference_mode():
                integration.split(mel, None)
        for count in talkers:
            row = measure(lambda i=integration, n=count: separated(i, n), device, repeats)
            place = "output" if layer is None else f"block {layer}"
            yield {"pass": f"after {place}, {count} talkers", **row,
                   "time": row["seconds"] / plain["seconds"],
                   "memory": row["megabytes"] / max(plain["megabytes"], 1e-9)}  # fmt: skip
        ssm.remove_speaker_separator(model)


def main(argv: list[str] | None = None) -> int:
    """Print a table, row by row as it comes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    add = parser.add_argument
    add("--layers", nargs="+", default=["2", "output"], help="blocks to separate after")
    add("--repeats", type=int, default=1, help="runs of each pass; the shortest counts")
    add("--device", default="cpu", help="cpu or cuda")
    add("--dtype", default="float32", choices=["float32", "bfloat16"], help="precision")
    add("--json", metavar="FILE", help="also write the rows to this file")
    args = parser.parse_args(argv)
    import torch
    from transformers import Qwen2AudioConfig

    layers = [None if layer == "output" else int(layer) for layer in args.layers]
    dtype, rows = getattr(torch, args.dtype), []
    print("| audio part of a 30 s recording | time (s) | ratio | memory (MB) | ratio |")
    print("|---|---|---|---|---|")
    for row in benchmark(Qwen2AudioConfig(), layers, args.device, dtype, args.repeats):
        rows.append(row)
        print(f"| {row['pass']} | {row['seconds']:.1f} | {row['time']:.2f} | "
              f"{row['megabytes']:.0f} | {row['memory']:.2f} |", flush=True)  # fmt: skip
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
