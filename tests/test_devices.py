"""Decisions per device, by name, and what a device without float64 (MPS) would choke on."""

from contextlib import nullcontext

import pytest
import torch
from conftest import SIZES, WIDTH, assert_fails, tiny_separator, train_flags
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import speaker_separator_module as ssm


@pytest.fixture
def machine(monkeypatch):
    """Pretend that this machine has, or has not, CUDA and MPS."""

    def pretend(cuda=False, mps=False, capability=(8, 0)):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)

    return pretend


@pytest.mark.parametrize(
    ("there", "chosen"),
    [({"cuda": True, "mps": True}, "cuda"), ({"mps": True}, "mps"), ({}, "cpu")],
)
def test_auto_takes_the_first_there(there, chosen, machine):
    machine(**there)
    assert ssm.pick_device("auto") == ssm.pick_device() == chosen
    assert ssm.pick_device("cpu") == "cpu"
    for name in there:
        assert ssm.pick_device(name) == name


@pytest.mark.parametrize("name", ["cuda", "mps"])
def test_device_that_is_not_there(name, machine, dataset, tmp_path, capsys):
    machine()
    with pytest.raises(ValueError, match=f"no {name} device here"):
        ssm.pick_device(name)
    assert_fails(capsys, train_flags(dataset, tmp_path, f"--device={name}"), name, "--device=auto")


def test_unknown_device():
    with pytest.raises(ValueError, match="tpu.*cpu, cuda, mps"):
        ssm.pick_device("tpu")


def test_precision(machine, monkeypatch):
    for device in ("cpu", "cuda", "mps"):
        assert ssm.pick_dtype("float32", device) == torch.float32
        assert ssm.pick_dtype("bfloat16", device) == torch.bfloat16
    assert ssm.pick_dtype("auto", "mps") == torch.float32
    for capability, expected in (((8, 0), torch.bfloat16), ((7, 5), torch.float32)):
        machine(cuda=True, capability=capability)
        assert ssm.pick_dtype("auto", "cuda") == expected
    for native, expected in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(ssm, "cpu_prefers_bfloat16", lambda n=native: n)
        assert ssm.pick_dtype("auto", "cpu") == expected


@pytest.mark.parametrize(("slower", "expected"), [(torch.float32, True), (torch.bfloat16, False)])
def test_precision_of_a_cpu_is_measured(monkeypatch, slower, expected):
    """A CPU with bfloat16 instructions that takes twice as long with them is not asked to."""
    clock, product = [0.0], torch.Tensor.__matmul__

    def timed_product(a, b):
        clock[0] += 2.0 if a.dtype == slower else 1.0
        return product(a, b)

    monkeypatch.setattr(torch.Tensor, "__matmul__", timed_product)
    monkeypatch.setattr(ssm.time, "perf_counter", lambda: clock[0])
    assert ssm.cpu_prefers_bfloat16.__wrapped__() is expected


def test_autocast():
    for device in ("cpu", "cuda", "mps"):
        assert isinstance(ssm.autocast(device, torch.float32), nullcontext)
    a = torch.ones(2, 2)
    with ssm.autocast("cpu", torch.bfloat16):
        assert (a @ a).dtype == torch.bfloat16
    with ssm.autocast("cpu", torch.float32):
        assert (a @ a).dtype == torch.float32


@pytest.mark.parametrize(
    ("device", "pins", "fuses"), [("cpu", False, True), ("cuda", True, True), ("mps", False, False)]
)
def test_memory_and_optimizer(device, pins, fuses):
    assert ssm.pins_memory(device) is pins
    assert ssm.fuses_optimizer(device) is fuses


@pytest.mark.parametrize("device", ["cpu", "cuda", "mps"])
def test_synchronize_waits_for_its_device_only(device, monkeypatch):
    waited = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: waited.append("cuda"))
    monkeypatch.setattr(torch.mps, "synchronize", lambda *_: waited.append("mps"))
    ssm.synchronize(device)
    assert waited == [name for name in ("cuda", "mps") if name == device]


def test_to_device_moves_every_tensor():
    batch = ssm.to_device({"a": torch.ones(2), "b": torch.zeros(1, dtype=torch.bool)}, "meta")
    assert {name: value.device.type for name, value in batch.items()} == {"a": "meta", "b": "meta"}


class NoFloat64(TorchDispatchMode):
    """Fails on any operation that reads or makes a float64 tensor, as MPS does."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves((args, kwargs, result)):
            if isinstance(value, torch.Tensor) and value.dtype in (torch.float64, torch.complex128):
                raise TypeError(f"{func} touches {value.dtype}")
        return result


def test_the_guard_works():
    with NoFloat64(), pytest.raises(TypeError, match="float64"):
        torch.ones(2, dtype=torch.float64)


@pytest.mark.parametrize("fused", [True, False])  # as on CPU and CUDA, as on MPS
def test_no_float64(fused, dataset):
    train_set = ssm.MultiSpeakerDataset(dataset, "train")
    separator = ssm.SpeakerSeparatorTransformer(WIDTH, 3, **SIZES)
    optimizer = torch.optim.AdamW(separator.parameters(), lr=1e-3, fused=fused)
    scheduler = ssm.make_scheduler(optimizer, 2, 1e-3)
    before = [p.detach().clone() for p in separator.parameters()]
    with NoFloat64():
        loader = ssm.make_loader(ssm.RemixedFeatures(train_set, 3), 2, 3, "cpu", seed=1)
        ssm.train_epoch(separator, loader, optimizer, {}, "cpu", torch.float32, 1)
        scheduler.step()
        ssm.evaluate_separator(separator, train_set, threshold=0.5)
        separation = ssm.separate(separator, train_set[0]["mixture"], num_speakers=2)
    assert separation.active.sum() == 2
    assert any(not torch.equal(a, b) for a, b in zip(before, separator.parameters(), strict=True))


def test_bfloat16_training_step_agrees(dataset):
    """Half precision is for matrix products only: losses agree with float32, weights stay so."""
    train_set = ssm.MultiSpeakerDataset(dataset, "train")
    losses = {}
    for dtype in (torch.float32, torch.bfloat16):
        separator = tiny_separator(3, dropout=0.0)
        optimizer = torch.optim.AdamW(separator.parameters(), lr=1e-3)
        loader = ssm.make_loader(train_set, 2, 3, "cpu")
        losses[dtype] = ssm.train_epoch(separator, loader, optimizer, {}, "cpu", dtype, 1)
        assert {p.dtype for p in separator.parameters()} == {torch.float32}
    assert losses[torch.bfloat16] == pytest.approx(losses[torch.float32], rel=0.05)
