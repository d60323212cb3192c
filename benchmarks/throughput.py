"""Measure what a training step costs beside the matrix products that it consists of.

In one run, on whatever device: the device's own rate of matrix products, then forward pass and
training step of both separators as FLOP/s and as a fraction of that rate; the time outside matrix
products; what optimizer and data pipeline add; memory.

    python benchmarks/throughput.py --json throughput.json

FLOPs are counted by the shapes of the products (``torch.utils.flop_counter``). A step is forward
and backward pass and has three times those of the forward pass; the optimizer is extra. On a CPU
with one thread, times are CPU time of the process, so that other work does not count; otherwise
they are wall-clock time.
"""

import argparse
import contextlib
import gc
import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import generate_multi_speaker_dataset as generator  # noqa: E402
import speaker_separator_module as ssm  # noqa: E402
from audio import SAMPLING_RATE, write_wav  # noqa: E402
from scoring import markdown_table  # noqa: E402

CASES = (  # separator, batch, frames, frames per second
    ("features", 8, 100, 25), ("features", 4, 750, 25),
    ("spectrogram", 8, 600, 100), ("spectrogram", 1, 3000, 100))
SIZE = 2048  # of the square matrices that set the device's rate
PRODUCTS = ("mm", "matmul", "conv", "attention", "linear")  # in names of product operations


def clock(device: str) -> float:
    """Wait until the device has finished; return seconds."""
    getattr(torch, device).synchronize()
    alone = device == "cpu" and torch.get_num_threads() == 1
    return time.process_time() if alone else time.perf_counter()


def seconds_of(call, device: str, repeats: int) -> float:
    """Return the least seconds that a call takes, after a warm-up call."""
    call()
    times = []
    for _ in range(repeats):
        start = clock(device)
        call()
        times.append(clock(device) - start)
    return min(times)


def product_rate(device: str, dtype: torch.dtype) -> float:
    """Return FLOP/s of a product of two square matrices."""
    a, b = (torch.randn(SIZE, SIZE, device=device, dtype=dtype) for _ in range(2))
    return 2 * SIZE**3 / seconds_of(lambda: a @ b, device, 5)


def make_batch(separator, B: int, T: int, device: str) -> dict:
    """Return a batch of random mixtures that are all of two talkers."""
    S, D = separator.max_speakers, separator.feature_dim or separator.BINS
    targets = torch.randn(B, S, T, D, device=device)
    talks = (torch.arange(S, device=device) < 2).expand(B, S)
    return {"mixture": targets[:, :2].sum(1), "targets": targets, "speaker_mask": talks,
            "frame_mask": torch.ones(B, T, dtype=torch.bool, device=device)}


def count_flops(call) -> int:
    """Return the FLOPs of the matrix products in a call."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        call()
    return counter.get_total_flops()


def share_outside_products(call, device: str) -> float:
    """Return the share of the device's time that a call spends on anything but products."""
    kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device == "cuda")
    with profile(activities=kinds) as profiler:
        call()
        getattr(torch, device).synchronize()
    name = "self_device_time_total" if device == "cuda" else "self_cpu_time_total"
    events = [(event.key, getattr(event, name)) for event in profiler.key_averages()]
    inside = sum(spent for key, spent in events if any(part in key for part in PRODUCTS))
    return 1 - inside / max(sum(spent for _, spent in events), 1)


def reset_peak(device: str) -> None:
    """Reset the peak memory: that of CUDA, and on Linux that of the process."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes(device: str) -> int:
    """Return the peak memory: of tensors on a GPU, otherwise of the whole process."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def measure(kind: str, B: int, T: int, rate: int, device: str, dtype, repeats: int) -> dict:
    """Return seconds, FLOPs and memory of one separator at one size."""
    gc.collect()  # the separator before this one
    torch.manual_seed(0)
    kinds = {"features": ssm.SpeakerSeparatorTransformer, "spectrogram": ssm.SpectrogramSeparator}
    separator = kinds[kind]().to(device).train()
    name = str(dtype).removeprefix("torch.")
    optimizer = ssm.make_optimizer(separator, ssm.TrainOptions(dtype=name))
    batch = make_batch(separator, B, T, device)

    def forward():
        return ssm.batch_loss(separator, batch, ssm.LossWeights(), device, dtype).total

    def step():
        optimizer.zero_grad(set_to_none=True)
        forward().backward()

    def infer():
        with ssm.autocast(device, dtype):
            separator(batch["mixture"], batch["frame_mask"])

    flops = {"step": 3 * count_flops(forward)}
    reset_peak(device)
    seconds = {"step": seconds_of(step, device, repeats),
               "optimizer": seconds_of(optimizer.step, device, repeats)}
    peak = peak_bytes(device)
    outside = share_outside_products(step, device)
    separator.eval()  # spectrograms take two passes then
    flops["forward"] = count_flops(infer)  # the counter fails on weights without gradients
    with torch.no_grad():
        seconds["forward"] = seconds_of(infer, device, repeats)
    return {"separator": kind, "batch": B, "frames": T, "dtype": name,
            "seconds": seconds, "flops": flops, "outside_products": outside, "peak_bytes": peak,
            "peak_bytes_per_second_of_audio": peak / (B * T / rate),
            "optimizer_share": seconds["optimizer"] / (seconds["optimizer"] + seconds["step"])}


def measure_data(seconds: float, batch_size: int, device: str, repeats: int) -> dict:
    """Return the seconds that mixing a batch of recordings and its spectrograms take."""
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        for speaker in range(10):
            for take in range(4):
                path = Path(folder, "speech", f"s{speaker}", f"{take}.wav")
                path.parent.mkdir(parents=True, exist_ok=True)
                write_wav(path, 0.1 * rng.standard_normal(round(seconds * SAMPLING_RATE)))
        flags = [f"--speech_dir={folder}/speech", f"--output_dir={folder}/data", "--min_speakers=1",
                 "--train_samples=1", "--val_samples=1", "--split_by=utterance"]
        with contextlib.redirect_stdout(sys.stderr):
            if generator.main(flags):
                raise ValueError("could not make recordings to mix")
        base = ssm.MultiSpeakerDataset(Path(folder, "data"), "train")
        mixtures = ssm.RemixedRecordings(base, ssm.TrainOptions(batch_size=batch_size), 3)
        numbers = iter(range(100_000))

        def mix():
            items = [mixtures[next(numbers)] for _ in range(batch_size)]
            return ssm.to_device(ssm.collate(items, 3), device)

        batch = mix()
        return {"mixing": seconds_of(mix, device, repeats),
                "log_mel": seconds_of(lambda: ssm.add_spectrograms(batch), device, repeats)}


def table(results: dict) -> list[str]:
    """Return the lines of a Markdown table."""
    rows = []
    for row in results["cases"]:
        cells = []
        for part in ("forward", "step"):
            speed = row["flops"][part] / row["seconds"][part]
            cells += [f"{speed / 1e9:.0f} GFLOP/s", f"{speed / results['rates'][row['dtype']]:.0%}"]
        rows.append([
            row["separator"], f"{row['batch']} x {row['frames']}", row["dtype"], *cells,
            f"{row['outside_products']:.0%}", f"{row['optimizer_share']:.0%}",
            f"{row['peak_bytes'] / 1e6:.0f} MB",
            f"{row['peak_bytes_per_second_of_audio'] / 1e6:.1f} MB"])
    return markdown_table(
        ["separator", "batch x frames", "precision", "forward", "of product rate", "step",
         "of product rate", "time outside products", "optimizer", "peak memory", "per s of audio"],
        rows)


def main(argv: list[str] | None = None) -> int:
    """Print the tables; return 0, or 2 after an error."""
    parser = argparse.ArgumentParser(description="Cost of a step beside its matrix products.")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"],
                        choices=["float32", "bfloat16"], help="precisions")
    parser.add_argument("--cases", nargs="+", type=int, default=range(len(CASES)),
                        choices=range(len(CASES)), help="numbers of the sizes to measure")
    parser.add_argument("--times", type=int, default=1,
                        help="multiply the batches: a GPU needs larger ones")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs; the least time counts")
    parser.add_argument("--json", metavar="FILE", help="also write every number to this file")
    args = parser.parse_args(argv)
    try:
        device = ssm.pick_device(args.device)
        ssm.check_writable(args.json)
        if min(args.times, args.repeats) < 1:
            raise ValueError("--times and --repeats must be 1 or more")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    dtypes = [getattr(torch, name) for name in args.dtypes]
    results = {"device": device, "threads": torch.get_num_threads(), "cases": []}
    results["rates"] = {name: product_rate(device, dtype)
                        for name, dtype in zip(args.dtypes, dtypes, strict=True)}
    rates = ", ".join(f"{name} {rate / 1e9:.0f}" for name, rate in results["rates"].items())
    print(f"{device}, {results['threads']} threads; products of {SIZE} x {SIZE} matrices in "
          f"GFLOP/s: {rates}\n")
    for number in args.cases:
        kind, batch, *sizes = CASES[number]
        for dtype in dtypes:
            results["cases"].append(
                measure(kind, batch * args.times, *sizes, device, dtype, args.repeats))
    print("\n".join(table(results)))
    results["data"] = measure_data(6.0, 8, device, args.repeats)
    print(f"\na batch of 8 mixtures of 6 s: mixing {results['data']['mixing']:.3f} s in one "
          f"process, spectrograms {results['data']['log_mel']:.3f} s")
    ssm.write_json(args.json, results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
