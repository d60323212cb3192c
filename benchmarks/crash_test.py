"""Kill training and the generator at random moments; count what is lost.

    python benchmarks/crash_test.py --kills 50

Training of a tiny model saves after every epoch, so that many kills fall into a write. After
each kill every checkpoint in the folder is opened and --resume goes on; a run at its last epoch
is compared, bit for bit, with one that was never killed. A third of the signals are SIGTERM and
SIGINT, which training answers with a checkpoint and exit status 143 or 130. The generator is killed
while it makes a dataset, and while it replaces one: if the folder then opens as a dataset, it must
be the old or the new one, whole, and a rerun must write the same bytes as a run never killed.
"""

import argparse
import contextlib
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import generate_multi_speaker_dataset as generator  # noqa: E402
import speaker_separator_module as ssm  # noqa: E402

HANDLED = {signal.SIGINT, signal.SIGTERM}
SIGNALS = [signal.SIGKILL] * 4 + [signal.SIGTERM, signal.SIGINT]
EPOCHS = 4
SMALL = ["--feature_dim=256", "--seq_len=20", "--train_samples=40", "--val_samples=10"]


def quietly(main, argv: list[str], errors: str) -> None:
    """Run a command in a child process, its errors in a file, and exit with its status.

    Signals are blocked until handlers are set, as the scripts set them before their imports.
    """
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    torch.set_num_threads(1)
    for number in HANDLED:
        signal.signal(number, lambda n, _: os._exit(128 + n))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, HANDLED)
    os._exit(main(argv))


def run(main, argv: list[str], kill_after: float | None = None, number=signal.SIGKILL,
        errors: str = os.devnull) -> int:
    """Run a command, perhaps send it a signal; return its exit status, negative if killed."""
    signal.pthread_sigmask(signal.SIG_BLOCK, HANDLED)
    process = multiprocessing.get_context("fork").Process(
        target=quietly, args=(main, argv, errors))
    process.start()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, HANDLED)
    process.join(kill_after)
    if process.is_alive():
        os.kill(process.pid, number)
    process.join()
    return process.exitcode


def timed(main, argv: list[str]) -> float:
    """Return the seconds that a command takes when nothing stops it."""
    started = time.perf_counter()
    assert run(main, argv) == 0, argv
    return time.perf_counter() - started


def same(a, b) -> bool:
    """Compare the content of checkpoints bit for bit, without times and options."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(
            same(a[key], b[key]) for key in a if key not in ("seconds", "options"))
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def kill_training(rng, folder: Path, kills: int) -> tuple[Counter, Counter]:
    """Kill training ``kills`` times; return the signals that came in time and what was lost."""
    data, signals, found = folder / "data", Counter(), Counter()
    assert run(generator.main, [*SMALL, f"--output_dir={data}"]) == 0
    argv = ["train", f"--data_dir={data}", f"--epochs={EPOCHS}", "--save_every=1", "--device=cpu",
            "--num_layers=1", "--num_heads=4", "--ff_dim=1024", "--mixtures_per_epoch=24"]
    last = f"checkpoint_epoch_{EPOCHS}.pt"
    seconds = timed(ssm.main, [*argv, f"--checkpoint_dir={folder / 'whole'}"])
    series = 0
    while signals.total() < kills:
        here, series = folder / f"run_{series}", series + 1
        while not (here / last).exists() and signals.total() < kills:
            reached = [path.name for path in ssm.list_checkpoints(here)]
            more = ["--resume"] if reached else []
            number = SIGNALS[int(rng.integers(len(SIGNALS)))]
            status = run(ssm.main, [*argv, f"--checkpoint_dir={here}", *more],
                         rng.uniform(0, 0.6) * seconds, number, str(folder / "errors"))
            if status == 0:
                break
            signals[number.name] += 1
            unexpected = status != (-9 if number == signal.SIGKILL else 128 + number)
            found["unexpected status"] += unexpected
            if unexpected:
                print(number.name, status, (folder / "errors").read_text()[-1000:], flush=True)
            found["checkpoints lost"] += len(
                {n for n in reached if n != ssm.INTERRUPTED}
                - {path.name for path in ssm.list_checkpoints(here)})
            for path in ssm.list_checkpoints(here):
                try:
                    ssm.load_checkpoint(path)
                except ValueError:
                    found["unreadable"] += 1
        more = ["--resume"] if ssm.list_checkpoints(here) else []
        status = run(ssm.main, [*argv, f"--checkpoint_dir={here}", *more],
                     errors=str(folder / "errors"))
        found["resume refused"] += status != 0
        if status:
            print("resumed", status, (folder / "errors").read_text()[-1000:], flush=True)
        else:
            equal = same(torch.load(here / last), torch.load(folder / "whole" / last))
            found["series that ended equal" if equal else "series that ended otherwise"] += 1
        shutil.rmtree(here)
    return signals, found


def content(folder: Path) -> dict:
    """Return the bytes of a dataset, but for dataset.json, which holds the command line."""
    return {str(path.relative_to(folder)): path.read_bytes()
            for split in ("train", "val") for path in (folder / split).rglob("*.*")}


def kill_generator(rng, folder: Path, kills: int) -> tuple[Counter, Counter]:
    """Kill the generator ``kills`` times, every other time with an earlier dataset in place."""
    signals, found = Counter(), Counter()
    old, new = [*SMALL, "--seed=1"], [*SMALL, "--seed=2"]
    timed(generator.main, [*old, f"--output_dir={folder / 'old'}"])
    seconds = timed(generator.main, [*new, f"--output_dir={folder / 'new'}"])
    contents = [content(folder / name) for name in ("old", "new")]
    while signals.total() < kills:
        here = folder / "here"
        shutil.rmtree(here, ignore_errors=True)
        if signals.total() % 2:
            shutil.copytree(folder / "old", here)
        number = SIGNALS[int(rng.integers(len(SIGNALS)))]
        argv = [*new, f"--output_dir={here}"]
        if run(generator.main, argv, rng.uniform(0, 1.02) * seconds, number) == 0:
            continue
        signals[number.name] += 1
        with contextlib.suppress(ValueError, FileNotFoundError):
            for split in ("train", "val"):
                ssm.MultiSpeakerDataset(here, split)
            found["half-made taken for whole"] += content(here) not in contents
        found["not made again"] += run(generator.main, argv) != 0
        found["other bytes"] += content(here) != contents[1]
    return signals, found


def main(argv: list[str] | None = None) -> int:
    """Run both tests and print a line about each; return 1 if anything was lost."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50, help="of training and generator each")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args(argv)
    lost = 0
    for name, test in (("training", kill_training), ("generator", kill_generator)):
        with tempfile.TemporaryDirectory() as scratch:
            signals, found = test(np.random.default_rng(args.seed), Path(scratch), args.kills)
        sent = ", ".join(f"{count} {number}" for number, count in sorted(signals.items()))
        print(f"{name}: {signals.total()} kills ({sent}); "
              + ", ".join(f"{what} {count}" for what, count in found.items()), flush=True)
        lost += sum(count for what, count in found.items() if what != "series that ended equal")
    return int(lost > 0)


if __name__ == "__main__":
    sys.exit(main())
