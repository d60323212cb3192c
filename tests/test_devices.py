"""Decisions per device, by name, and what a device without float64 (MPS) would choke on."""

from contextlib import nullcontext

import pytest
import torch
from conftest import CPU, SHORT, SIZES, SPECTROGRAM_SIZES, assert_fails, train_flags
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
        for dtype in (torch.float32, torch.bfloat16):
            name = str(dtype).removeprefix("torch.")
            assert ssm.pick_dtype(name, device) == (dtype, "as asked")
    assert ssm.pick_dtype("auto", "mps")[0] == torch.float32
    for capability, expected in (((8, 0), torch.bfloat16), ((7, 5), torch.float32)):
        machine(cuda=True, capability=capability)
        assert ssm.pick_dtype("auto", "cuda")[0] == expected
    for amx, avx, word in ((True, True, "AMX"), (False, True, "AVX512"), (False, False, "no")):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda amx=amx: amx)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda avx=avx: avx)
        dtype, reason = ssm.pick_dtype("auto", "cpu")
        assert dtype == (torch.bfloat16 if avx else torch.float32)
        assert word in reason


@pytest.mark.parametrize(("device", "dtype", "plain"), [
    ("cpu", torch.bfloat16, True), ("cpu", torch.float32, False), ("cuda", torch.bfloat16, False),
    ("mps", torch.float32, False)])  # fmt: skip
def test_attention_in_training(device, dtype, plain):
    fused = torch.backends.cuda.flash_sdp_enabled
    with ssm.attention_kernel(device, dtype):
        assert fused() is not plain
    assert fused()


def test_autocast():
    for device in ("cpu", "cuda", "mps"):
        assert isinstance(ssm.autocast(device, torch.float32), nullcontext)
    a = torch.ones(2, 2)
    with ssm.autocast("cpu", torch.bfloat16):
        assert (a @ a).dtype == torch.bfloat16
    with ssm.autocast("cpu", torch.float32):
        assert (a @ a).dtype == torch.float32


@pytest.mark.parametrize(("device", "fuses"), [("cpu", True), ("cuda", True), ("mps", False)])
def test_optimizer(device, fuses):
    assert ssm.fuses_optimizer(device) is fuses


@pytest.mark.parametrize("device", ["cpu", "cuda", "mps"])
def test_batches_are_pinned_and_compact_for_cuda_alone(device):
    loader = ssm.make_loader([0], 1, 3, device)
    assert loader.pin_memory is loader.collate_fn.keywords["compact"] is (device == "cuda")


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


@pytest.fixture(params=["features", "recordings"])
def train_set(request):
    """A training set of each kind."""
    name = {"features": "dataset", "recordings": "recordings"}[request.param]
    return ssm.MultiSpeakerDataset(request.getfixturevalue(name), "train")


def tiny_run(train_set, tmp_path, **options):
    """A run with the tiny separator of a dataset's kind, its first epoch ahead."""
    sizes = SPECTROGRAM_SIZES if train_set.has_recordings else {**SIZES, "dropout": 0.0}
    options = {**sizes, **SHORT, **CPU, "epochs": 2, "lr": 1e-3, **options}
    return ssm.start_run(ssm.TrainOptions(**options), train_set, train_set, tmp_path)


@pytest.mark.parametrize("fuses", [True, False])  # as on CPU and CUDA, as on MPS
def test_no_float64(fuses, train_set, tmp_path, monkeypatch):
    """Mixing is NumPy's; whatever happens on the device is float32 or bfloat16."""
    monkeypatch.setattr(ssm, "fuses_optimizer", lambda device: fuses)
    run = tiny_run(train_set, tmp_path)
    before = [p.detach().clone() for p in run.separator.parameters()]
    with NoFloat64():
        ssm.train_epoch(run, 1)
        run.scheduler.step()
        ssm.evaluate_separator(run.averaged.module, train_set, threshold=0.5)
        batch = ssm.add_spectrograms(ssm.collate([train_set[0]], run.separator.max_speakers))
        separation = ssm.separate(run.separator, batch["mixture"][0], num_speakers=2)
    assert separation.active.sum() == 2
    after = run.separator.parameters()
    assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_bfloat16_training_agrees(train_set, tmp_path):
    """Half precision is for matrix products only: losses agree with float32, weights stay so."""
    losses = {}
    for dtype in ("float32", "bfloat16"):
        run = tiny_run(train_set, tmp_path, dtype=dtype)
        losses[dtype] = ssm.train_epoch(run, 1)
        assert {p.dtype for p in run.separator.parameters()} == {torch.float32}
        assert {p.dtype for p in run.averaged.module.parameters()} == {torch.float32}
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.05)
    assert losses["bfloat16"] != losses["float32"]


# --------------------------------------------------------------------------------------------------
# Waiting for the device


class Reads(TorchDispatchMode):
    """Counts what makes a host wait for its device: values read, and shapes that depend on them."""

    NAMES = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero")

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        masks = [a for a in (args[1] if op.overloadpacket.__name__.startswith("index") else ())
                 if isinstance(a, torch.Tensor) and a.dtype == torch.bool]  # fmt: skip
        if op.overloadpacket.__name__ in self.NAMES or masks:
            self.found.append(str(op))
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["dataset", "recordings"])
def test_a_step_reads_nothing_back(kind, request, tmp_path):
    """Of a GPU nothing is waited for but at the epoch's end; the average counts on the CPU."""
    data = request.getfixturevalue(kind)
    sizes = SIZES if kind == "dataset" else SPECTROGRAM_SIZES
    options = ssm.TrainOptions(**{**sizes, **SHORT, **CPU})
    sets = [ssm.MultiSpeakerDataset(data, split) for split in ("train", "val")]
    run = ssm.start_run(options, *sets, tmp_path)
    raw = next(iter(run.loader))
    with Reads() as reads:
        torch.ones(2).sum().item(), torch.ones(3)[torch.ones(3) > 0]
    assert len(reads.found) == 2
    with Reads() as reads:
        ssm.backward(run, [ssm.add_spectrograms(ssm.to_device(raw, "cpu"))])
        run.optimizer.step()
    assert reads.found == []
    with Reads() as reads:
        run.averaged.update_parameters(run.separator)
    assert set(reads.found) <= {"aten._local_scalar_dense.default"} and len(reads.found) <= 2
    assert run.averaged.n_averaged.device.type == "cpu"
