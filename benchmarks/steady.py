"""Train a tiny separator for many steps; memory and open files must not grow.

    python benchmarks/steady.py --steps 20000

Training runs in a separate process and is observed from outside (/proc, so Linux only) after every
epoch, which is 1,000 steps and a validation.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
EPOCH, BATCH = 1000, 2  # steps, mixtures
SIZES = ["--num_layers=1", "--num_heads=4", "--ff_dim=32", f"--batch_size={BATCH}",
         f"--mixtures_per_epoch={EPOCH * BATCH}", "--device=cpu"]


def look(pid: int) -> tuple[float, int]:
    """Return a process's memory in MB, without file pages, and its number of open files.

    The number is the least of 20, because training opens and closes feature files in between.
    """
    process = Path(f"/proc/{pid}")
    rows = dict(row.split(":", 1) for row in (process / "status").read_text().splitlines())
    files = min(len(list((process / "fd").iterdir())) for _ in range(20))
    return int(rows["RssAnon"].split()[0]) / 1024, files


def main(argv: list[str] | None = None) -> int:
    """Print memory and open files after every epoch; return 1 if either grew."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20_000, help="a multiple of 1,000")
    args = parser.parse_args(argv)
    if args.steps < EPOCH:
        parser.error(f"--steps must be {EPOCH} or more")
    with tempfile.TemporaryDirectory() as scratch:
        subprocess.run([sys.executable, ROOT / "generate_multi_speaker_dataset.py",
                        "--feature_dim=64", "--seq_len=20", "--output_dir=data"],
                       cwd=scratch, check=True, stdout=subprocess.DEVNULL)
        command = [sys.executable, ROOT / "speaker_separator_module.py", "train",
                   "--data_dir=data", f"--epochs={args.steps // EPOCH}", *SIZES]
        looks = []
        with subprocess.Popen(command, cwd=scratch, stdout=subprocess.PIPE, text=True) as training:
            for line in training.stdout:
                if line.startswith("epoch "):
                    looks.append(look(training.pid))
                    print(f"{len(looks) * EPOCH} steps: {looks[-1][0]:.1f} MB, "
                          f"{looks[-1][1]} open files", flush=True)
    growth = looks[-1][0] / looks[0][0] - 1
    print(f"memory after {len(looks) * EPOCH} steps {growth:+.2%} of that after {EPOCH}, open "
          f"files {looks[0][1]} and {looks[-1][1]}")
    return int(training.returncode or growth > 0.02 or looks[-1][1] != looks[0][1])


if __name__ == "__main__":
    sys.exit(main())
