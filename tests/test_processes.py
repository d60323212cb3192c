"""Several processes: the losses of one, checkpoints that either resumes, and a killed process."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CPU, ROOT, SIZES, SPECTROGRAM_SIZES, assert_fails
from torch import distributed as dist

import speaker_separator_module as ssm

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="torch was built without gloo")

WORKER = """
import json, os, sys, torch
torch.set_num_threads(1)
import speaker_separator_module as ssm
for port, argv in json.loads(sys.argv[1]):
    os.environ["MASTER_PORT"] = str(port)
    status = ssm.main(argv)
    if status:
        sys.exit(status)
"""


def free_ports(count):
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.create_server(("127.0.0.1", 0)))
                  for _ in range(count)]
        return [probe.getsockname()[1] for probe in probes]


def start(*commands, ranks=2):
    """Start so many processes, as torchrun does, that run commands one after another."""
    ports = free_ports(len(commands))
    argv = [list(map(str, command)) for command in commands]
    argv = [sys.executable, "-c", WORKER, json.dumps(list(zip(ports, argv, strict=True)))]
    shared = {"WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "PYTHONPATH": ROOT,
              "OMP_NUM_THREADS": 1}
    return [
        subprocess.Popen(
            argv, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env=os.environ | {name: str(value) for name, value in own.items()})
        for own in (shared | {"RANK": rank, "LOCAL_RANK": rank} for rank in range(ranks))]


def finish(processes, seconds=120):
    """Exit statuses, outputs and errors of processes; a hang fails."""
    try:
        texts = [process.communicate(timeout=seconds) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [process.returncode for process in processes], *zip(*texts, strict=True)


def train(data, folder, **options):
    """Command line of a training run."""
    flags = [f"--{name}={value}" for name, value in (options | CPU).items()]
    return ["train", f"--data_dir={data}", f"--checkpoint_dir={folder}", *flags]


def losses(folder):
    """Every loss and the talker count of every epoch of the newest checkpoint in a folder."""
    history = ssm.newest_checkpoint(Path(folder))["train_history"]
    return [[*row["train"].values(), row["val"]["total"], row["val"]["count_accuracy"],
             row["val"]["threshold"]] for row in history]


def assert_close(first, second):
    assert len(first) == len(second) == 2
    for ours, theirs in zip(first, second, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)


@pytest.fixture(scope="module")
def launched(dataset, recordings, tmp_path_factory):
    """Runs of one process and of two, begun and resumed by either, then a fault: folder, results.

    An epoch has 20 mixtures at 8 per step, or 2 times 4: the last step has 4, or 2 times 2.
    """
    folder = tmp_path_factory.mktemp("processes")
    begin = {"epochs": 1, "lr": 1e-3, "mixtures_per_epoch": 20}
    features, wavs = begin | SIZES | {"dropout": 0.0}, begin | SPECTROGRAM_SIZES | {"epochs": 2}
    one, two, end = {"batch_size": 8}, {"batch_size": 4}, {"epochs": 2}
    commands = [train(recordings, folder / "wavs of one", **wavs | one),
                train(dataset, folder / "one", **features | one | end),
                train(dataset, folder / "begun by one", **features | one)]
    assert not any(map(ssm.main, commands))
    results = finish(start(
        train(recordings, folder / "wavs of two", **wavs, batch_size=2, accumulate=2),
        [*train(dataset, folder / "begun by one", **two | end), "--resume"],
        train(dataset, folder / "begun by two", **features | two),
        train(recordings, folder / "wavs begun by two", **wavs | {"epochs": 1} | two),
        train(folder / "nothing", folder / "nothing")))
    for data, name in ((dataset, "begun by two"), (recordings, "wavs begun by two")):
        assert ssm.main([*train(data, folder / name, **one | end), "--resume"]) == 0
    return folder, *results


def test_two_processes_train_as_one(launched):
    folder = launched[0]
    assert_close(losses(folder / "wavs of two"), losses(folder / "wavs of one"))


@pytest.mark.parametrize(
    ("name", "alone"),
    [("begun by one", "one"), ("begun by two", "one"), ("wavs begun by two", "wavs of one")])
def test_resume_with_another_number_of_processes(name, alone, launched):
    folder = launched[0]
    assert_close(losses(folder / name), losses(folder / alone))


def test_the_first_process_alone_prints_and_writes(launched):
    folder, _, outputs, _ = launched
    assert outputs[0].count("2 processes") == outputs[0].count("holds") == 4 and outputs[1] == ""
    assert (folder / "wavs of two/training_report.md").is_file()


def test_a_fault_of_all_processes_is_one_line(launched):
    _, statuses, _, errors = launched
    assert statuses == [2, 2]
    assert "".join(errors).count("error:") == 1 and "no dataset at" in "".join(errors)


def test_a_killed_process_ends_the_others_with_one_line(dataset, tmp_path):
    command = train(dataset, tmp_path, epochs=10_000, save_every=10_000, **SIZES)
    processes = start(command)
    while not processes[0].stdout.readline().startswith("epoch"):
        assert processes[0].poll() is None
    processes[1].send_signal(signal.SIGKILL)
    statuses, _, errors = finish(processes)
    assert statuses == [2, -signal.SIGKILL]
    assert errors[0].strip().splitlines()[-1].startswith("error: another process ended")
    assert "Traceback" not in errors[0]
    assert (tmp_path / "best_model.pt").is_file()


def test_what_one_process_finds_leaves_the_earlier_run(own_dataset, tmp_path):
    assert ssm.main(train(own_dataset, tmp_path / "run", epochs=1, **SIZES)) == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").glob("*.pt")}
    mixture = own_dataset / "val/mixed/val_00001.npy"
    np.save(mixture, np.nan * np.load(mixture))
    statuses, _, errors = finish(start(train(own_dataset, tmp_path / "run", **SIZES)))
    assert statuses == [2, 2] and "val_00001.npy" in "".join(errors)
    assert "".join(errors).count("error:") == 1
    assert before == {name: (tmp_path / "run" / name).read_bytes() for name in before}


@pytest.mark.parametrize("same", [True, False])
def test_processes_with_other_data_are_refused(same, dataset, own_dataset, monkeypatch):
    """A copy elsewhere is the same data."""
    ours, theirs = ([ssm.MultiSpeakerDataset(folder, split) for split in ("train", "val")]
                    for folder in (dataset, own_dataset))
    if not same:
        theirs[1].samples.pop()
    sent = torch.tensor([int(data.digest[:12], 16) for data in theirs])
    monkeypatch.setattr(ssm, "process_rank", lambda: (0, 2))
    monkeypatch.setattr(ssm, "sum_over_processes", lambda values: values + sent)
    refused = pytest.raises(ValueError, match="is not the same for all processes")
    with contextlib.nullcontext() if same else refused:
        ssm.check_same_data(*ours)


def test_evaluation_of_other_data_is_refused(recordings, capsys, monkeypatch):
    monkeypatch.setattr(ssm, "sum_over_processes", lambda values: values + 1)
    argv = ["evaluate", f"--data_dir={recordings}", "--device=cpu"]
    assert_fails(capsys, argv, "is not the same for all processes")


def test_a_port_that_is_taken_is_one_line(dataset, tmp_path, capsys, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        world = {"RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1",
                 "MASTER_PORT": taken.getsockname()[1]}
        for name, value in world.items():
            monkeypatch.setenv(name, str(value))
        assert_fails(capsys, train(dataset, tmp_path), "the processes cannot be joined")


def test_parts_of_an_epoch_are_its_batches(dataset, monkeypatch):
    """Whatever the number of processes, a step has the mixtures that it has in one."""
    data = ssm.MultiSpeakerDataset(dataset, "train")
    numbers = torch.utils.data.Subset(data, [i % len(data) for i in range(21)])
    steps = [sorted(batch) for batch in ssm.EpochBatches(numbers, 8, 0, 0)]
    parts = []
    for rank in range(2):
        monkeypatch.setattr(ssm, "process_rank", lambda rank=rank: (rank, 2))
        sampler = ssm.EpochBatches(numbers, 2, 0, 0, accumulate=2)
        parts.append(list(sampler))
        assert len(parts[-1]) == len(sampler) == 6
    joined = [sorted(sum((batches[i] for batches in parts for i in (2 * s, 2 * s + 1)), []))
              for s in range(3)]
    assert joined == steps
    assert not list(ssm.EpochBatches(torch.utils.data.Subset(data, [0, 1]), 2, 0, 0, 2))
