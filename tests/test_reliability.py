"""Damaged, hostile and interrupted: one clear line, nothing lost."""

import contextlib
import json
import os
import pickletools
import shutil
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    CPU_FLAGS,
    ROOT,
    WIDTH,
    assert_fails,
    edit_json,
    run,
    sine,
    tiny_separator,
    tiny_spectrogram_separator,
    train_flags,
    write_wav,
)

import generate_multi_speaker_dataset as generator
import long_recordings
import speaker_separator_module as ssm

# --------------------------------------------------------------------------------------------------
# Checkpoints: every damage is named before anything is loaded


def edited(change):
    """Damage that changes the content of a checkpoint."""

    def damage(path):
        content = torch.load(path)
        change(content)
        torch.save(content, path)

    return damage


def moment(name, change):
    """Damage to one moment of the optimizer."""

    def spoil(content):
        moments = content["optimizer_state_dict"]["state"][3]
        moments[name] = change(moments[name])

    return edited(spoil)


def weight(change, key="model_state_dict"):
    def spoil(content):
        content[key]["speaker_queries"] = change(content[key]["speaker_queries"])

    return edited(spoil)


def compressed(path):
    """A small file that unpacks to much."""
    with zipfile.ZipFile(path) as archive:
        files = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content + bytes(1 << 20 if name.endswith("pkl") else 0))


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "a bit flipped": flip_a_bit,
    "compressed": compressed,
    "more than tensors": lambda path: torch.save({**torch.load(path), "more": {1, 2}}, path),
    "history a number": edited(lambda c: c.update(train_history=5)),
    "configuration a list": edited(lambda c: c.update(model_config=[])),
    "a billion wide": edited(lambda c: c["model_config"].update(feature_dim=10**9)),
    "a billion layers": edited(lambda c: c["model_config"].update(num_layers=10**9)),
    "huge feed-forward": edited(lambda c: c["model_config"].update(ff_dim=40_000_000)),
    "dropout in words": edited(lambda c: c["model_config"].update(dropout="much")),
    "threshold missing": edited(lambda c: c["model_config"].update(threshold=None)),
    "layers a list": edited(lambda c: c["model_config"].update(num_layers=[1])),
    "threshold NaN": edited(lambda c: c["model_config"].update(threshold=float("nan"))),
    "numbered weights": edited(lambda c: c["model_state_dict"].update({3: torch.zeros(2)})),
    "weight in words": weight(str),
    "weight NaN": weight(lambda w: w * torch.nan),
    "one number NaN": weight(lambda w: w.index_fill(1, torch.tensor([3]), torch.nan)),
    "weight infinite": weight(lambda w: w / 0),
    "weight of integers": weight(torch.Tensor.long),
    "weight cut": weight(lambda w: w[:1]),
}
RESUME_DAMAGE = {
    **{kind: damage for kind, damage in DAMAGE.items() if "threshold" not in kind},
    "trained weight NaN": weight(lambda w: w * torch.nan, "training_state_dict"),
    "history of another epoch": edited(lambda c: c["train_history"].pop()),
    "history without losses": edited(lambda c: c["train_history"][0].update(train={})),
    "loss in words": edited(lambda c: c["train_history"][0]["val"].update(total="low")),
    "no moments": edited(lambda c: c.update(optimizer_state_dict={})),
    "moment missing": edited(lambda c: c["optimizer_state_dict"]["state"][3].pop("exp_avg")),
    "moment empty": moment("exp_avg", lambda m: m[:0]),
    "moment of integers": moment("exp_avg", torch.Tensor.long),
    "moment of another shape": moment("exp_avg_sq", lambda m: torch.ones(1000, 1000)),
    "moment negative": moment("exp_avg_sq", lambda m: m - 1),
    "step in words": moment("step", str),
    "steps unknown": edited(lambda c: c["optimizer_state_dict"].update(state={})),
    "history of tensors": edited(lambda c: c["train_history"].__setitem__(0, torch.ones(2, 2))),
    "speakers a tensor": edited(lambda c: c["model_config"].update(max_speakers=torch.zeros(0))),
    "speakers in words": edited(lambda c: c["model_config"].update(max_speakers="x")),
    "options a list": edited(lambda c: c.update(options=[1])),
    "workers negative": edited(lambda c: c["options"].update(workers=-3)),
    "epochs in words": edited(lambda c: c["options"].update(save_every="often")),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_checkpoint(kind, best, dataset, tmp_path, capsys):
    path = shutil.copy(best, tmp_path / "best_model.pt")
    DAMAGE[kind](path)
    argv = ["evaluate", f"--checkpoint={path}", f"--data_dir={dataset}", *CPU_FLAGS]
    assert_fails(capsys, argv, path)


@pytest.mark.parametrize("kind", RESUME_DAMAGE)
def test_resume_from_damaged_checkpoint(kind, trained, dataset, tmp_path, capsys):
    path = shutil.copy(trained / "checkpoint_epoch_3.pt", tmp_path / "checkpoint_epoch_3.pt")
    RESUME_DAMAGE[kind](path)
    named = {"workers negative": "workers", "epochs in words": "save_every"}.get(kind, tmp_path)
    assert_fails(capsys, train_flags(dataset, tmp_path, "--resume", "--epochs=4"), named)


def test_checkpoints_hold_what_is_opened(trained):
    """The list of allowed names is not wider than what training writes."""
    with zipfile.ZipFile(trained / "best_model.pt") as archive:
        data = archive.read(next(n for n in archive.namelist() if n.endswith("data.pkl")))
    names = {arg for code, arg, _ in pickletools.genops(data) if code.name == "GLOBAL"}
    assert all(ssm.PICKLED.fullmatch(name) for name in names)
    assert not ssm.PICKLED.fullmatch("builtins bytearray")


@pytest.mark.parametrize("change", [
    lambda state: state.pop("speaker_queries"),
    lambda state: state.update(more=torch.zeros(2)),
    lambda state: state.update(speaker_queries=torch.zeros(1, WIDTH)),
    lambda state: state.update(speaker_queries=torch.full((3, WIDTH), torch.nan)),
])  # fmt: skip
def test_exported_weights_that_do_not_fit(change, tmp_path):
    from safetensors.torch import load_file, save_file

    ssm.export_separator(tiny_separator(), tmp_path / "weights")
    path = tmp_path / "weights/model.safetensors"
    save_file((state := load_file(path), change(state))[0], path)
    with pytest.raises(ValueError, match="does not fit"):
        ssm.load_separator(tmp_path / "weights")
    if not any(weight.isnan().any() for weight in state.values()):
        with pytest.raises(RuntimeError):
            ssm.SpeakerSeparatorTransformer.from_pretrained(tmp_path / "weights")


# --------------------------------------------------------------------------------------------------
# Losses that are not finite


def test_rate_that_explodes_stops_before_the_weights_take_it(dataset, tmp_path, capsys):
    argv = train_flags(dataset, tmp_path / "run", "--lr=1e30", "--epochs=3")
    assert_fails(capsys, argv, "not finite", "batch", "mixtures number")
    for path in (tmp_path / "run").glob("*.pt"):
        assert all(w.isfinite().all() for w in torch.load(path)["model_state_dict"].values())


def test_mixtures_of_a_broken_batch_are_named(own_dataset, tmp_path, capsys, monkeypatch):
    for path in (own_dataset / "train").rglob("*00002*.npy"):
        np.save(path, np.full_like(np.load(path), 1e30))
    argv = train_flags(own_dataset, tmp_path / "run", "--no_remix", "--batch_size=1")
    assert_fails(capsys, argv, "epoch 1", "(mixtures train_00002)")


# --------------------------------------------------------------------------------------------------
# Ctrl-C and SIGTERM


def test_a_worker_that_fails_is_told_in_one_line(own_dataset, tmp_path, capsys):
    """Its error comes with a traceback of its own."""
    argv = train_flags(own_dataset, tmp_path / "run", "--workers=1", "--no_remix")
    for path in (own_dataset / "train/mixed").glob("*.npy"):
        content = np.load(path)
        content[3, 3] = np.nan
        np.save(path, content)
    assert_fails(capsys, argv, "mixed", "holds NaN")


def test_a_worker_that_is_killed_is_told_in_one_line(dataset, tmp_path, capsys, monkeypatch):
    """As the system kills one when memory runs out."""
    def die(*_):
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(ssm.RemixedFeatures, "__getitem__", die)
    argv = train_flags(dataset, tmp_path / "run", "--workers=1")
    assert_fails(capsys, argv, "a process that loads or mixes died", "fewer --workers")


def test_validation_data_are_read_before_training(own_dataset, tmp_path, capsys, monkeypatch):
    """The epoch before would be lost, and an earlier run moved away."""
    monkeypatch.delattr(ssm, "train_epoch")
    path = next((own_dataset / "val/separated").glob("*.npy"))
    np.save(path, np.full_like(np.load(path), np.nan))
    assert_fails(capsys, train_flags(own_dataset, tmp_path / "run"), path, "holds NaN")


def test_workers_outlast_signals_to_all_processes():
    """torch would make a traceback of a worker that ends before the main process."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(number) for number in numbers]
    try:
        ssm.outlast_signals()
        for number in numbers:
            os.kill(os.getpid(), number)
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def signal_after(monkeypatch, calls, number=signal.SIGINT, name="backward"):
    """Send this process a signal in the n-th call of a function of training."""
    original, count = getattr(ssm, name), iter(range(1, 1000))

    def wrapped(*args, **kwargs):
        if next(count) == calls:
            os.kill(os.getpid(), number)
        return original(*args, **kwargs)

    monkeypatch.setattr(ssm, name, wrapped)


def contents(path):
    """What decides how a run goes on, without the seconds that it took."""
    kept = torch.load(path)
    del kept["options"]
    for row in kept["train_history"]:
        del row["seconds"]
    return kept


def assert_same(a, b):
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert a == b


@pytest.fixture(scope="module")
def whole(dataset, tmp_path_factory):
    """A run of three epochs of three steps, never stopped."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert ssm.main(train_flags(dataset, folder, *LONGER)) == 0
    return folder


LONGER = ["--epochs=3", "--mixtures_per_epoch=6"]


@pytest.mark.parametrize(("calls", "number", "name", "words"), [
    (1, signal.SIGINT, "backward", "epoch 1 after 1 of 3"),
    (5, signal.SIGINT, "backward", "epoch 2 after 2 of 3"),
    (6, signal.SIGTERM, "backward", "epoch 2 after 3 of 3"),
    (2, signal.SIGTERM, "evaluate_separator", "after epoch 2"),
    (1, signal.SIGINT, "save_checkpoint", "after epoch 1"),
])
def test_a_stopped_run_goes_on_as_if_never_stopped(
    calls, number, name, words, whole, dataset, tmp_path, monkeypatch, capsys
):
    argv, run = train_flags(dataset, tmp_path / "run", *LONGER), tmp_path / "run"
    with monkeypatch.context() as patch:
        signal_after(patch, calls, number, name)
        assert ssm.main(argv) == 128 + number
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1
    assert errors[0].startswith("stopped") and words in errors[0] and "--resume" in errors[0]
    assert (run / "interrupted.pt").is_file() and not list(run.glob("*.tmp"))
    assert ssm.main([*argv, "--resume"]) == 0
    for path in ("best_model.pt", "checkpoint_epoch_3.pt"):
        assert_same(contents(run / path), contents(whole / path))
    assert sorted(p.name for p in run.iterdir()) == sorted(p.name for p in whole.iterdir())


def test_a_signal_in_the_last_epoch_ends_the_run(dataset, tmp_path, monkeypatch):
    signal_after(monkeypatch, 3, name="evaluate_separator")
    assert ssm.main(train_flags(dataset, tmp_path / "run", *LONGER)) == 0
    assert (tmp_path / "run/training_report.md").is_file()


def test_the_rest_of_an_epoch_keeps_its_batches(own_dataset, tmp_path, monkeypatch, capsys):
    argv = train_flags(own_dataset, tmp_path / "run", *LONGER)
    with monkeypatch.context() as patch:
        signal_after(patch, 2)
        assert ssm.main(argv) == 130
    assert_fails(capsys, [*argv, "--resume", "--batch_size=3"], "steps of")
    assert_fails(capsys, [*argv, "--resume", "--no_remix"], "--no_remix contradicts")
    path = tmp_path / "run/interrupted.pt"
    whole = path.read_bytes()
    for change in ({"rows": torch.zeros(2, 3)}, {"step_size": 0}, {"step_size": "8"}):
        content = torch.load(path)
        torch.save({**content, "progress": content["progress"] | change}, path)
        assert_fails(capsys, [*argv, "--resume"], "cannot resume")
    path.write_bytes(whole)
    edit_json(own_dataset / "train/metadata.json", lambda samples: samples[:-1])
    assert_fails(capsys, [*argv, "--resume"], "drew from other data", own_dataset / "train")


def test_signals_where_there_is_nothing_to_save(dataset, tmp_path, monkeypatch, capsys):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's "&" leaves it ignored
    signal_after(monkeypatch, 1, signal.SIGTERM, "start_run")
    assert ssm.main(train_flags(dataset, tmp_path / "run")) == 143
    assert "before the first checkpoint" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_the_third_signal_stops_at_once(dataset, tmp_path, monkeypatch, capsys):
    """A step that hangs can be left; nothing is saved of it."""
    monkeypatch.setattr(
        ssm, "backward", lambda *_: [os.kill(os.getpid(), signal.SIGINT) for _ in range(3)])
    assert ssm.main(train_flags(dataset, tmp_path / "run")) == 130
    assert "before the first checkpoint" in capsys.readouterr().err
    assert not (tmp_path / "run/interrupted.pt").exists()


# --------------------------------------------------------------------------------------------------
# Folders: one run at a time, a damaged checkpoint among others


@contextlib.contextmanager
def held_by_another_process(folder):
    """Lock a folder elsewhere; that process ends by a kill."""
    code = ("import time; from pathlib import Path; import speaker_separator_module as ssm\n"
            f"with ssm.locked(Path({str(folder)!r})): print('held', flush=True); time.sleep(60)")
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=ROOT)
    try:
        assert holder.stdout.readline() == b"held\n"
        yield holder.pid
    finally:
        holder.kill()
        holder.wait()


def test_two_separations_into_one_folder(best, dataset, tmp_path, capsys):
    """The second is refused; it would mix its talkers' files with the first one's."""
    mixture = next((dataset / "val/mixed").glob("*.npy"))
    argv = ["infer", f"--checkpoint={best}", f"--input={mixture}",
            f"--output_dir={tmp_path / 'out'}", "--device=cpu"]  # fmt: skip
    assert ssm.main(argv) == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    with held_by_another_process(tmp_path / "out") as pid:
        assert_fails(capsys, argv, "in use by process", pid)
    (tmp_path / "out/.lock").unlink()
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_a_second_run_in_a_folder_is_refused(dataset, tmp_path, capsys):
    (tmp_path / ".lock").write_text("process 1 on another machine")  # stale
    with held_by_another_process(tmp_path) as pid:
        assert_fails(capsys, train_flags(dataset, tmp_path), f"in use by process {pid} on")
    assert (tmp_path / ".lock").exists()  # stale
    assert ssm.main(train_flags(dataset, tmp_path)) == 0
    assert not (tmp_path / ".lock").exists()


@pytest.mark.parametrize("name", ["checkpoint_epoch_3.pt", "best_model.pt"])
def test_a_damaged_checkpoint_is_passed_over(name, trained, dataset, tmp_path, capsys):
    run = shutil.copytree(trained, tmp_path / "run")
    flip_a_bit(run / name)
    assert ssm.main(train_flags(dataset, run, "--resume", "--epochs=4")) == 0
    assert f"passed over a checkpoint: {run / name}" in capsys.readouterr().out
    assert torch.load(run / "checkpoint_epoch_4.pt")["epoch"] == 4


# --------------------------------------------------------------------------------------------------
# Metadata and arrays


METADATA = {
    "nested": lambda text: "[" * 100_000,
    "a number of 5,000 digits": lambda text: text.replace(": 32", ": " + "9" * 5000),
    "infinite width": lambda text: text.replace(": 32", ": Infinity"),
    "width of 1e999": lambda text: text.replace(": 32", ": 1e999"),
    "no speaker": lambda text: text.replace('"speaker_id"', '"name"'),
    "text a list": lambda text: text.replace('"text": ', '"text": [1], "was": '),
    "path a number": lambda text: text.replace('"feature_file": ', '"feature_file": 3, "was": '),
    "null byte": lambda text: text.replace("mixed/", "mixed/\\u0000"),
    "overlap of 1.5": lambda text: text.replace('"id"', '"overlap": 1.5, "id"'),
}


@pytest.mark.parametrize("kind", METADATA)
def test_damaged_metadata(kind, own_dataset, tmp_path, capsys):
    path = own_dataset / "train/metadata.json"
    path.write_text(METADATA[kind](path.read_text()))
    assert_fails(capsys, train_flags(own_dataset, tmp_path / "run"))


HEADERS = {
    "no dictionary": "(" * 200,
    "open string": "{'descr': '<f4",
    "huge shape": "{'descr': '<f4', 'fortran_order': False, 'shape': (9" + "0" * 30 + ", 32)}",
    "negative shape": "{'descr': '<f4', 'fortran_order': False, 'shape': (-1, 32)}",
    "objects": "{'descr': '|O', 'fortran_order': False, 'shape': (1, 32)}",
    "claims more": "{'descr': '<f4', 'fortran_order': False, 'shape': (10000000, 32)}",
    "zero wide": "{'descr': '<f4', 'fortran_order': False, 'shape': (5, 0)}",
}


@pytest.mark.parametrize("kind", HEADERS)
def test_damaged_header_of_an_array(kind, best, tmp_path, capsys):
    header = HEADERS[kind].encode() + b"\n"
    content = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + bytes(640)
    (tmp_path / "mixture.npy").write_bytes(content)
    argv = ["infer", f"--input={tmp_path / 'mixture.npy'}", f"--checkpoint={best}", *CPU_FLAGS]
    assert_fails(capsys, argv, "mixture.npy")


def test_features_that_attention_has_no_memory_for(best, tmp_path, capsys):
    np.save(tmp_path / "mixture.npy", np.ones((4001, WIDTH), np.float32))
    argv = ["infer", f"--input={tmp_path / 'mixture.npy'}", f"--checkpoint={best}", *CPU_FLAGS]
    assert_fails(capsys, argv, "4,001 frames")


def test_zip_in_place_of_an_array(best, tmp_path, capsys):
    (tmp_path / "mixture.npy").write_bytes(b"PK\x03\x04" + bytes(50))
    argv = ["infer", f"--input={tmp_path / 'mixture.npy'}", f"--checkpoint={best}", *CPU_FLAGS]
    assert_fails(capsys, argv, "mixture.npy")


# --------------------------------------------------------------------------------------------------
# Command line


@pytest.mark.parametrize("flag", [
    "--input=--", "--threshold=--", "--num_speakers=99999999999999999999", "--device=\n\n",
    "--unknown=a\nb", "--threshold=nan",
])  # fmt: skip
def test_odd_values(flag, best, capsys, tmp_path):
    (tmp_path / "x.npy").write_bytes(b"")
    argv = ["infer", "--input=x.npy", f"--checkpoint={best}", *CPU_FLAGS, flag]
    assert_fails(capsys, argv)


@pytest.mark.parametrize("flag", [
    "--batch_size=99999999999999999999", "--mixtures_per_epoch=4000000000", "--epochs=1e9",
    "--ff_dim=40000000", "--num_layers=1000000", "--dim=16", "--save_every=9" + "0" * 400,
])  # fmt: skip
def test_sizes_are_bounded(flag, dataset, tmp_path, capsys):
    assert_fails(capsys, train_flags(dataset, tmp_path / "run", flag), flag[2:].split("=")[0])
    assert not list(tmp_path.glob("run/*.pt"))


# --------------------------------------------------------------------------------------------------
# Datasets: an earlier one stays until the new one is whole


def files_of(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


class Killed(BaseException):
    """Nothing handles it, as nothing handles a kill."""


@pytest.mark.parametrize("moves", range(6))
def test_a_kill_while_a_dataset_is_replaced(moves, dataset, tmp_path, monkeypatch, capsys):
    """Until the old one is moved it is whole, then nothing is a dataset until the new one is."""
    folder, new = shutil.copytree(dataset, tmp_path / "data"), tmp_path / "new"
    flags = ["--feature_dim=48", "--seq_len=10", "--train_samples=2", "--val_samples=2"]
    argv = [*flags, f"--output_dir={folder}"]
    assert generator.main([*flags, f"--output_dir={new}"]) == 0
    count = iter(range(100))

    def replace(path, target):
        if next(count) == moves:
            raise Killed
        os.replace(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", replace)
        with pytest.raises(Killed):
            generator.main(argv)
    if moves < 2:
        assert ssm.MultiSpeakerDataset(folder, "train").feature_dim == WIDTH
    else:
        assert_fails(capsys, train_flags(folder, tmp_path / "run"), "no dataset at")
    assert generator.main(argv) == 0
    assert {p.name for p in folder.iterdir()} == {"train", "val", "dataset.json"}
    kept = {p: c for p, c in files_of(folder).items() if p.name != "dataset.json"}
    assert kept == {p: c for p, c in files_of(new).items() if p.name != "dataset.json"}


def test_what_killed_generators_left_is_removed(tmp_path):
    """But not what a running process writes beside this one."""
    dead, alive = subprocess.Popen(["true"]), subprocess.Popen(["sleep", "100"])
    dead.wait()
    for name in (f".making_{dead.pid}", f".making_{alive.pid}", ".replacing"):
        (tmp_path / name / "train").mkdir(parents=True)
    assert generator.main(["--train_samples=1", "--val_samples=1", f"--output_dir={tmp_path}"]) == 0
    hidden = {path.name for path in tmp_path.iterdir() if path.name.startswith(".")}
    assert hidden == {f".making_{alive.pid}"}
    alive.terminate()
    assert alive.wait() == -signal.SIGTERM  # it was left alone


def test_two_generators_in_a_folder(tmp_path, monkeypatch):
    """One ends while the other writes: each leaves a whole dataset, and the last one wins."""
    replace = generator.replace_dataset

    def make(name, samples):
        argv = ["--feature_dim=32", "--seq_len=9", "--val_samples=1", f"--train_samples={samples}"]
        assert generator.main([*argv, f"--output_dir={tmp_path / name}"]) == 0
        return [files_of(tmp_path / name / split) for split in ("train", "val")]

    def replace_after_another(*folders):
        with monkeypatch.context() as patch:
            patch.setattr(generator, "replace_dataset", replace)
            patch.setattr(os, "getpid", os.getppid)
            assert make("data", 2) == make("alone", 2)
        replace(*folders)

    expected = make("other", 3)
    monkeypatch.setattr(generator, "replace_dataset", replace_after_another)
    assert make("data", 3) == expected


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_generator(number, status, tmp_path, monkeypatch, capsys):
    def stop(*_):
        os.kill(os.getpid(), number)

    monkeypatch.setattr(generator, "simulate_utterance", stop)
    assert run(generator.main, [f"--output_dir={tmp_path / 'data'}"]) == status
    assert capsys.readouterr().err.startswith("stopped")
    assert not list((tmp_path / "data").iterdir())


@pytest.mark.parametrize(("module", "name", "argv"), [
    (generator, "simulate_utterance", []), (ssm, "MultiSpeakerDataset", ["train"]),
])  # fmt: skip
def test_an_interruption_that_a_library_makes_another_error_of(
    module, name, argv, monkeypatch, capsys
):
    """As numpy does while it saves: what ends in TypeError was a signal."""

    def stop(*_):
        with contextlib.suppress(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
        raise TypeError("expected str, not BufferedWriter")

    monkeypatch.setattr(module, name, stop)
    if module is ssm:
        Path("multi_speaker_data/train").mkdir(parents=True)
        Path("multi_speaker_data/train/metadata.json").touch()
    assert run(module.main, argv) == 143
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize(("flag", "words"), [
    ("--train_samples=2147483648", "--train_samples"), ("--seq_len=9223372036854775808", "seq_len"),
    ("--feature_dim=99999999", "feature_dim"), (f"--seed={2**70}", "--seed"),
    ("--output_dir=--", "--output_dir"), ("--min_speakers=a\nb", "min_speakers"),
])  # fmt: skip
def test_generator_values(flag, words, capsys):
    assert_fails(capsys, [flag], words, main=generator.main)


def test_a_dataset_larger_than_the_disk(tmp_path, monkeypatch, capsys):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    argv = [f"--output_dir={tmp_path / 'data'}"]
    assert_fails(capsys, argv, "GB free", main=generator.main)
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("line", ["[" * 100_000, '{"audio": 5, "speaker": ' + "9" * 5000 + "}"])
def test_damaged_manifest(line, tmp_path, capsys):
    (tmp_path / "list.jsonl").write_text(line)
    argv = [f"--speech_dir={tmp_path / 'list.jsonl'}"]
    assert_fails(capsys, argv, "line 1", main=generator.main)


@pytest.mark.parametrize("change", [
    lambda about: about["mixing"].update(join=[10**9, 10**9]),
    lambda about: about["mixing"].update(min_seconds=1e308),
    lambda about: about["mixing"].update(speed="fast"),
    lambda about: about["mixing"].update(join=[1]),
    lambda about: about["mixing"].update(noise_dir=5),
    lambda about: about["mixing"].update(as_recorded=5),
])  # fmt: skip
def test_mixing_options_of_a_dataset_are_bounded(change, recordings, tmp_path, capsys):
    data = shutil.copytree(recordings, tmp_path / "data")
    edit_json(data / "dataset.json", change)
    argv = ["train", f"--data_dir={data}", f"--checkpoint_dir={tmp_path / 'run'}", *CPU_FLAGS]
    assert_fails(capsys, argv, "dataset.json")


# --------------------------------------------------------------------------------------------------
# Recordings and results


LOUD = {"too loud": 1e30, "NaN": np.nan}


@pytest.mark.parametrize("kind", LOUD)
def test_samples_that_cannot_be_squared(kind, spectrogram_checkpoint, tmp_path, capsys):
    import soundfile

    soundfile.write(tmp_path / "a.wav", np.full(4000, LOUD[kind], np.float32), 16000, "FLOAT")
    argv = ["infer", f"--input={tmp_path / 'a.wav'}", f"--checkpoint={spectrogram_checkpoint}"]
    assert_fails(capsys, [*argv, *CPU_FLAGS], "NaN or infinite")


def test_a_sampling_rate_of_7_hertz(spectrogram_checkpoint, tmp_path, capsys):
    write_wav(tmp_path / "a.wav", sine(0.1, 200), rate=7)
    argv = ["infer", f"--input={tmp_path / 'a.wav'}", f"--checkpoint={spectrogram_checkpoint}"]
    assert_fails(capsys, [*argv, *CPU_FLAGS], "7 Hz")


def test_damaged_mp3(spectrogram_checkpoint, tmp_path, capfd):
    """What its decoder prints on standard error is not seen."""
    path = write_wav(tmp_path / "a.mp3", sine(4, 200))
    whole, argv = path.read_bytes(), ["infer", f"--input={path}", *CPU_FLAGS,
                                      f"--checkpoint={spectrogram_checkpoint}"]
    for damaged in (whole[: len(whole) // 2], whole[:2000] + bytes(200) + whole[2200:]):
        path.write_bytes(damaged)
        assert_fails(capfd, argv, "breaks off")


def test_a_flac_that_claims_more_than_it_holds(spectrogram_checkpoint, tmp_path, capsys):
    import soundfile

    soundfile.write(tmp_path / "a.flac", sine(0.5, 200), 16000)
    data = bytearray((tmp_path / "a.flac").read_bytes())
    data[22:26] = b"\xff\xff\xff\xff"  # of the 36 bits that count the samples
    (tmp_path / "a.flac").write_bytes(data)
    argv = ["infer", f"--input={tmp_path / 'a.flac'}", f"--checkpoint={spectrogram_checkpoint}"]
    assert_fails(capsys, [*argv, *CPU_FLAGS], "a.flac")


AUDIBLE = {
    "silence": np.zeros(8000), "constant": np.ones(8000), "one frame": np.ones(640),
    "quiet": 1e-6 * sine(0.5, 200), "clipped": np.sign(sine(0.5, 200)),
    "in 16-bit units": 32768 * sine(0.5, 200),
}  # fmt: skip


@pytest.mark.parametrize("kind", AUDIBLE)
def test_odd_audio_has_finite_streams_and_gradients(kind):
    import audio

    separator = tiny_spectrogram_separator().train()
    waveform = torch.from_numpy(np.float32(AUDIBLE[kind]))
    mixture = audio.floor_log_mel(audio.log_mel(waveform, 80))[None]
    streams, probs = separator(mixture)
    mask = torch.tensor([[True, False, False]])
    loss = ssm.separator_loss(streams, probs, torch.stack([mixture] * 3, 1), mask, mixture)
    loss.total.backward()
    assert streams.isfinite().all() and probs.isfinite().all() and loss.total.isfinite()
    assert all(w.grad is None or w.grad.isfinite().all() for w in separator.parameters())


@pytest.mark.parametrize("scale", [0.0, 1e-6, 1.0, 1e12])
@pytest.mark.parametrize("frames", [1, 7])
def test_odd_features_have_finite_streams_and_gradients(scale, frames):
    separator = tiny_separator().train()
    mixture = torch.full((1, frames, WIDTH), scale)
    streams, probs = separator(mixture)
    targets = torch.stack([mixture] * 3, 1)
    loss = ssm.separator_loss(streams, probs, targets, torch.tensor([[True, True, False]]), mixture)
    loss.total.backward()
    assert streams.isfinite().all() and probs.isfinite().all() and loss.total.isfinite()
    assert all(w.grad is None or w.grad.isfinite().all() for w in separator.parameters())


def test_features_that_cannot_be_squared(best, tmp_path, capsys):
    np.save(tmp_path / "a.npy", np.full((5, WIDTH), 3e38, np.float32))
    argv = ["infer", f"--input={tmp_path / 'a.npy'}", f"--checkpoint={best}", *CPU_FLAGS]
    assert_fails(capsys, argv, "a.npy", "squared")


def test_a_full_disk_keeps_earlier_results(best, dataset, tmp_path, monkeypatch, capsys):
    mixture = next((dataset / "val/mixed").glob("*.npy"))
    argv = ["infer", f"--input={mixture}", f"--checkpoint={best}", "--threshold=0",
            f"--output_dir={tmp_path / 'out'}", *CPU_FLAGS]  # fmt: skip
    assert ssm.main(argv) == 0
    before = files_of(tmp_path / "out")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    assert_fails(capsys, argv, "No space left")
    assert files_of(tmp_path / "out") == before


@pytest.mark.parametrize("target", ["data/val/metadata.json", "data/dataset.json", "best.pt", "."])
def test_results_do_not_go_onto_inputs(target, best, dataset, tmp_path, capsys):
    shutil.copytree(dataset, tmp_path / "data")
    shutil.copy(best, tmp_path / "best.pt")
    before = files_of(tmp_path)
    argv = ["evaluate", f"--data_dir={tmp_path / 'data'}", f"--checkpoint={tmp_path / 'best.pt'}"]
    assert_fails(capsys, [*argv, f"--json={tmp_path / target}", *CPU_FLAGS], tmp_path / target)
    assert files_of(tmp_path) == before


def test_very_short_recordings_are_answered(qwen, processor, spectrogram_checkpoint):
    from long_recordings import answer_per_talker

    ssm.integrate_speaker_separator(qwen, None, spectrogram_checkpoint, threshold=0.0)
    for length in (640, 641, 799, 801, 959, 961):
        rows = answer_per_talker(qwen, processor, sine(length / 16000, 200), max_new_tokens=2)
        assert len(rows) == 3, length


# --------------------------------------------------------------------------------------------------
# A share of the benchmarks


def test_share_of_the_fuzzer(tmp_path, monkeypatch):
    """One input of every kind; ``--seed 7`` is one that no mend was made for."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import fuzz

    (tmp_path / "base").mkdir()
    fuzz.make_base(tmp_path / "base")
    answers = [fuzz.run_input(tmp_path / "base", 7, number) for number in range(len(fuzz.INPUTS))]
    assert [answer for answer in answers if answer[1]] == []


def test_the_fuzzer_sees_faults(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import fuzz

    def fail(argv):
        raise KeyError("exp_avg")

    monkeypatch.setattr(ssm, "main", fail)
    assert "traceback: KeyError" in fuzz.run_command(["train"])
    monkeypatch.setattr(ssm, "main", lambda argv: print("a\nb", file=sys.stderr) or 2)
    assert "2 lines" in fuzz.run_command(["train"])
    monkeypatch.setattr(ssm, "main", lambda argv: 2)
    assert "status 2 with 0 lines" in fuzz.run_command(["train"])


def test_share_of_the_crash_test():
    argv = [sys.executable, ROOT / "benchmarks/crash_test.py", "--kills=2"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(": 2 kills") == 2 and "ended equal" in done.stdout


# --------------------------------------------------------------------------------------------------
# Model folders


MODELS = {
    "a template that raises": ("chat_template.jinja", lambda _: "{{ raise_exception('no') }}"),
    "a template without an end": ("chat_template.jinja", lambda _: "".join(
        f"{{% for {x} in range(99999) %}}" for x in "ijk") + "{% endfor %}" * 3),
    "a template of 100 GB": ("chat_template.jinja", lambda _: "{{ 'x' * 100000000000 }}"),
    "an extractor that is a number": ("processor_config.json", lambda c: c | {
        "feature_extractor": 5}),
    "the sizes of another model": ("config.json", lambda c: c | {"text_config": None}),
    "a million layers": ("config.json", lambda c: c | {
        "audio_config": c["audio_config"] | {"encoder_layers": 10**6}}),
    "more layers than weights": ("config.json", lambda c: c | {
        "audio_config": c["audio_config"] | {"encoder_layers": 4}}),
    "code of its own": ("config.json", lambda c: {
        "model_type": "own", "auto_map": {"AutoConfig": "own.Config"}}),
    "nested": ("config.json", lambda _: "[" * 100_000),
    "windows of days": ("processor_config.json", lambda c: c | {
        "feature_extractor": c["feature_extractor"] | {"chunk_length": 10**6}}),
    "spectra of gigabytes": ("processor_config.json", lambda c: c | {
        "feature_extractor": c["feature_extractor"] | {"n_fft": 10**7}}),
}  # fmt: skip


@pytest.mark.parametrize("kind", MODELS)
def test_damaged_model_folder(
    kind, qwen_folder, spectrogram_checkpoint, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(long_recordings, "TEMPLATE_SECONDS", 1.0)
    folder = shutil.copytree(qwen_folder, tmp_path / "model")
    name, change = MODELS[kind]
    content = change(json.loads((folder / name).read_text()) if name.endswith("json") else None)
    (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    wav = write_wav(tmp_path / "a.wav", sine(0.5, 200))
    argv = ["integrate", f"--model={folder}", f"--audio={wav}", "--max_new_tokens=2",
            f"--checkpoint={spectrogram_checkpoint}", *CPU_FLAGS]  # fmt: skip
    assert_fails(capsys, argv, folder)
    assert not (tmp_path / "ran").exists()
