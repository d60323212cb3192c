"""Measure how many more mixtures two processes train than one, each pinned to a core of its own.

    python benchmarks/processes.py

One process takes batches of 8 mixtures; two take 4 each, for the same training. Both separators
have their default size; recordings are noise, whose content costs what speech costs.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import generate_multi_speaker_dataset as generator  # noqa: E402
import speaker_separator_module as ssm  # noqa: E402
from audio import SAMPLING_RATE, write_wav  # noqa: E402
from scoring import markdown_table  # noqa: E402

BATCH = 8  # mixtures in a step of all processes
PARTS = {"features": None, "spectrograms": (4.0, 4.0)}  # crop_seconds


def make_data(folder: Path, kind: str) -> Path:
    """Make simulated features or recordings of noise to mix."""
    flags = ["--train_samples=8", "--val_samples=1", f"--output_dir={folder / kind}"]
    if kind == "spectrograms":
        rng = np.random.default_rng(0)
        for name in range(10):
            (folder / f"noise/{name}").mkdir(parents=True)
            write_wav(folder / f"noise/{name}/a.wav", 0.1 * rng.standard_normal(8 * SAMPLING_RATE))
        flags += [f"--speech_dir={folder / 'noise'}", "--max_speakers=2"]
    if generator.main(flags):
        raise SystemExit(2)
    return folder / kind


def train(folder: Path, kind: str, mixtures: int, dtype: str) -> None:
    """Train two epochs in a process of torchrun; rank 0 prints the seconds of the second epoch."""
    core = int(os.environ["LOCAL_RANK"]) % os.cpu_count()
    if hasattr(os, "sched_setaffinity"):  # Linux
        os.sched_setaffinity(0, {core})
    with ssm.join_processes("cpu"):
        options = ssm.TrainOptions(
            batch_size=BATCH // ssm.process_rank()[1], mixtures_per_epoch=mixtures, device="cpu",
            dtype=dtype, crop_seconds=PARTS[kind])
        train_set, val_set = (ssm.MultiSpeakerDataset(folder, split) for split in ("train", "val"))
        run = ssm.start_run(options, train_set, val_set, folder)
        ssm.train_epoch(run, 1)
        start = time.perf_counter()
        ssm.train_epoch(run, 2)
        print(f"seconds {time.perf_counter() - start}", flush=True)


def seconds_of(processes: int, data: Path, kind: str, args) -> float:
    """Return the seconds that one epoch takes ``processes`` processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
               f"--nproc_per_node={processes}", __file__, f"--mixtures={args.mixtures}",
               f"--dtype={args.dtype}", f"--worker={kind}={data}"]
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, text=True,
                          stdout=subprocess.PIPE, check=True)
    return float(done.stdout.split()[-1])


def main(argv: list[str] | None = None) -> int:
    """Print a row for each separator."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--mixtures", type=int, default=8 * BATCH, help="mixtures in an epoch")
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16"],
                        help="precision of matrix products, auto: as train chooses")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.worker:
        kind, _, data = args.worker.partition("=")
        train(Path(data), kind, args.mixtures, args.dtype)
        return 0
    if args.mixtures < BATCH:
        print(f"error: --mixtures must be {BATCH} or more, not {args.mixtures}", file=sys.stderr)
        return 2
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for kind in PARTS:
            data = make_data(Path(folder), kind)
            one, two = (seconds_of(n, data, kind, args) * BATCH / args.mixtures for n in (1, 2))
            rows.append([kind, f"{one:.2f} s", f"{two:.2f} s", f"{one / two:.2f}"])
    print("\n".join(markdown_table(
        ["separator", "step of 8 in one process", "of 4 in each of two", "ratio"], rows)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
