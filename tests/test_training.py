"""Training: what is learnt, what is saved, what survives a kill, and what is refused."""

import json
import math
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    CPU_FLAGS,
    PNG,
    SHORT_FLAGS,
    WIDTH,
    assert_fails,
    make_dataset,
    save_tiny_checkpoint,
    tiny_separator,
    train_flags,
    train_tiny,
)

import speaker_separator_module as ssm


def losses(history):
    return [(row["train"]["total"], row["val"]["total"]) for row in history]


def snapshot(folder):
    """Bytes of every checkpoint in a folder."""
    return {path.name: path.read_bytes() for path in folder.glob("*.pt")}


# --------------------------------------------------------------------------------------------------
# Learning


def test_few_items_are_overfitted(dataset, tmp_path):
    options = {"epochs": 30, "lr": 5e-3, "dropout": 0.0, "remix": False, "save_every": 30}
    history = train_tiny(dataset, tmp_path, **options)
    first, last = history[0]["train"], history[-1]["train"]
    assert last["separation"] < 0.25 * first["separation"]
    assert last["activity"] < 0.5 * first["activity"]
    train_set = ssm.MultiSpeakerDataset(dataset, "train")
    scores = ssm.evaluate_separator(
        ssm.load_separator(tmp_path / "checkpoint_epoch_30.pt"), train_set
    )
    assert scores["separation"] < 0.7 * min(scores["trivial_mse"].values())
    assert scores["count_accuracy"] == 1


def test_same_seed_same_losses(dataset, tmp_path):
    first, same, other = (
        losses(train_tiny(dataset, tmp_path / name, epochs=2, seed=seed))
        for name, seed in (("first", 1), ("same", 1), ("other", 2))
    )
    assert first == same
    assert all(a != b for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize(
    ("remix", "optimizer"), [(True, "adamw"), (False, "adamw"), (True, "muon")])
def test_resumed_run_equals_unbroken_run(remix, optimizer, dataset, tmp_path):
    options = {"epochs": 4, "save_every": 2, "remix": remix, "lr": 2e-3, "optimizer": optimizer}
    whole = train_tiny(dataset, tmp_path / "whole", **options)
    (tmp_path / "resumed").mkdir()
    shutil.copy(tmp_path / "whole/checkpoint_epoch_2.pt", tmp_path / "resumed")
    resumed = train_tiny(dataset, tmp_path / "resumed", resume=True, **options)
    np.testing.assert_allclose(losses(resumed), losses(whole), rtol=0, atol=1e-6)
    assert [row["lr"] for row in resumed] == [row["lr"] for row in whole]
    assert [row["val"]["threshold"] for row in resumed] == [0.5] * 4
    last = [torch.load(tmp_path / name / "checkpoint_epoch_4.pt") for name in ("whole", "resumed")]
    for a, b in zip(*(c["model_state_dict"].values() for c in last), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_muon_steps_of_matrices_are_orthogonal_and_as_long_as_those_of_adamw():
    separator, lr = tiny_separator(2), 1e-2
    before = {name: weight.detach().clone() for name, weight in separator.named_parameters()}
    optimizer = ssm.MuonAdamW(separator, lr=lr, weight_decay=0.0)
    for weight in separator.parameters():
        weight.grad = torch.randn_like(weight)
    optimizer.step()
    for name, weight in separator.named_parameters():
        step = weight.detach() - before[name]
        if weight.ndim == 2 and name.startswith(("decoder", "refinement")):
            lengths = torch.linalg.svdvals(step) / (0.2 * lr * max(weight.shape) ** 0.5)
            assert lengths.quantile(0.1) > 0.6 and lengths.max() < 1.3  # of the gradient: 0 to 2
        else:  # AdamW's first step is the sign of the gradient
            torch.testing.assert_close(step, -lr * weight.grad.sign(), rtol=1e-3, atol=1e-5)


def test_resumed_on_other_data_the_best_is_the_best_on_that_data(dataset, tmp_path):
    train_tiny(dataset, tmp_path / "run", epochs=2)
    other = make_dataset(tmp_path / "other", "--seed=5")
    history = train_tiny(other, tmp_path / "run", epochs=4, resume=True)
    assert history[0]["val"]["trivial_mse"] != history[3]["val"]["trivial_mse"]
    history[0]["val"]["total"] = 0.0  # however low it was on the data from before
    best = min(history[2:], key=lambda row: row["val"]["total"])
    assert ssm.best_epoch(history) is best
    assert torch.load(tmp_path / "run/best_model.pt")["epoch"] == best["epoch"]


def test_an_unknown_optimizer_is_refused(dataset, tmp_path):
    with pytest.raises(ValueError, match="adamw or muon"):
        train_tiny(dataset, tmp_path, optimizer="sgd")


def test_resuming_with_another_optimizer_is_refused(trained, dataset, tmp_path, capsys):
    folder = Path(shutil.copytree(trained, tmp_path / "run"))
    assert_fails(capsys, train_flags(dataset, folder, "--resume", "--optimizer=muon", "--epochs=4"),
                 "optimizer state")


@pytest.mark.parametrize("remix", [True, False])
def test_remixing_draws_anew_every_epoch(remix, dataset, tmp_path, monkeypatch):
    seen, train_epoch = [], ssm.train_epoch

    def watch(separator, loader, *args):
        seen.append(
            [
                float(item["mixture"].abs().sum())
                for item in map(loader.dataset.__getitem__, range(4))
            ]
        )
        return train_epoch(separator, loader, *args)

    monkeypatch.setattr(ssm, "train_epoch", watch)
    train_tiny(dataset, tmp_path, epochs=3, remix=remix)
    assert len({tuple(epoch) for epoch in seen}) == (3 if remix else 1)


def test_resume_takes_the_newest(trained, dataset, tmp_path):
    """The best may be newer than the last periodic checkpoint, and older."""
    for best_epoch, stamp in ((9, 20), (1, 20), (1, 5)):
        folder = Path(shutil.copytree(trained, tmp_path / f"{best_epoch}_{stamp}"))
        best = torch.load(folder / "best_model.pt") | {"epoch": best_epoch}
        (folder / "best_model.pt").unlink()  # it may share its file with another name
        torch.save(best, folder / "best_model.pt")
        os.utime(folder / "best_model.pt", (stamp, stamp))
        for number in (2, 3):
            os.utime(folder / f"checkpoint_epoch_{number}.pt", (10, 10))
        assert ssm.newest_checkpoint(folder)["epoch"] == max(best_epoch, 3)


def test_resume_of_a_finished_run_changes_nothing(trained, dataset, tmp_path):
    folder = Path(shutil.copytree(trained, tmp_path / "run"))
    history = train_tiny(dataset, folder, epochs=3, resume=True)
    assert [row["epoch"] for row in history] == [1, 2, 3]
    assert snapshot(folder) == snapshot(trained)


@pytest.mark.filterwarnings("error")
def test_resume_warns_of_nothing(trained, dataset, tmp_path):
    train_tiny(dataset, shutil.copytree(trained, tmp_path / "run"), epochs=4, resume=True)


def test_learning_rate():
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
    scheduler = ssm.make_scheduler(optimizer, 10, 1e-3)
    rates = []
    for _ in range(11):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    assert rates[0] == 1e-3
    assert rates[5] == pytest.approx(0.55e-3)  # half way, in the middle of 1e-3 and 1e-4
    assert rates[10] == pytest.approx(1e-4)
    assert ssm.make_scheduler(optimizer, 10, 1e-3, done=7).get_last_lr()[0] == pytest.approx(
        rates[7]
    )


def test_learning_rate_of_a_run(dataset, tmp_path):
    history = train_tiny(dataset, tmp_path, epochs=4, lr=1e-3)
    expected = [1e-4 + 0.45e-3 * (1 + math.cos(math.pi * epoch / 4)) for epoch in range(4)]
    assert [row["lr"] for row in history] == pytest.approx(expected)


def test_patience(dataset, tmp_path, monkeypatch, capsys):
    evaluate, totals = ssm.evaluate_separator, iter([2.0, 1.0, 1.5, 1.2, 0.1])

    def worse(*args, **kwargs):
        return evaluate(*args, **kwargs) | {"total": next(totals)}

    monkeypatch.setattr(ssm, "evaluate_separator", worse)
    history = train_tiny(dataset, tmp_path, epochs=20, patience=2)
    assert len(history) == 4
    assert torch.load(tmp_path / "best_model.pt")["epoch"] == 2
    assert (tmp_path / "checkpoint_epoch_4.pt").is_file()
    assert "best was 2" in capsys.readouterr().out


# --------------------------------------------------------------------------------------------------
# What is written


def test_checkpoint(trained, dataset):
    keys = {"epoch", "model_state_dict", "optimizer_state_dict", "scheduler_state_dict",
            "train_loss", "val_loss", "train_history"}  # fmt: skip
    assert {path.name for path in trained.glob("*.pt")} == {
        "best_model.pt", "checkpoint_epoch_2.pt", "checkpoint_epoch_3.pt"}  # fmt: skip
    for path in trained.glob("*.pt"):
        checkpoint = torch.load(path)  # bare: weights only
        assert keys <= set(checkpoint)
        model = tiny_separator(checkpoint["model_config"]["max_speakers"])
        model.load_state_dict(checkpoint["model_state_dict"])
        assert len(checkpoint["train_history"]) == checkpoint["epoch"]
        assert checkpoint["train_loss"] == checkpoint["train_history"][-1]["train"]["total"]
        assert checkpoint["model_config"]["feature_source"]["kind"] == "simulated"
    assert torch.load(trained / "checkpoint_epoch_2.pt")["epoch"] == 2


def test_best_model_has_the_lowest_validation_loss(trained, dataset, best):
    history = torch.load(trained / "checkpoint_epoch_3.pt")["train_history"]
    lowest = min(row["val"]["total"] for row in history)
    checkpoint = torch.load(best)
    assert checkpoint["val_loss"] == lowest
    separator = ssm.load_separator(best)
    scores = ssm.evaluate_separator(separator, ssm.MultiSpeakerDataset(dataset, "val"))
    assert scores["total"] == pytest.approx(lowest, rel=1e-5)
    assert separator.threshold == checkpoint["train_history"][-1]["val"]["calibrated_threshold"]


def test_report(trained, dataset):
    report = (trained / "training_report.md").read_text()
    errors = {"zeros": [], "mixture": [], "mixture / count": []}
    for sample in json.loads((dataset / "val/metadata.json").read_text()):
        mixture = np.load(dataset / "val" / sample["mixed_audio"])
        for speaker in sample["speakers"]:
            source = np.load(dataset / "val" / speaker["feature_file"])
            errors["zeros"].append(np.mean(source**2))
            errors["mixture"].append(np.mean((mixture - source) ** 2))
            errors["mixture / count"].append(
                np.mean((mixture / len(sample["speakers"]) - source) ** 2))  # fmt: skip
    for name, values in errors.items():
        assert f"| {name} | {np.mean(values):.3f} |" in report
    for words in ("feature_dim | 32", "max_speakers", "| train | 4 |", "| val | 3 |",
                  "reconstruction", "best_model.pt", "checkpoint_epoch_2.pt",
                  "checkpoint_epoch_3.pt"):  # fmt: skip
        assert words in report
    for row in torch.load(trained / "checkpoint_epoch_3.pt")["train_history"]:
        assert f"| {row['train']['total']:.4f} | {row['val']['total']:.4f} |" in report
    assert (trained / "training_curves.png").read_bytes().startswith(PNG)


def test_log(dataset, tmp_path, capsys):
    history = train_tiny(dataset, tmp_path, epochs=2)
    lines = capsys.readouterr().out.splitlines()
    parameters = sum(p.numel() for p in tiny_separator(3).parameters())
    for words in (
        "device cpu",
        "float32",
        f"{parameters:,} parameters",
        "4 training",
        "3 validation",
    ):
        assert words in lines[0]
    for line, row in zip(lines[1:3], history, strict=True):
        relative = row["val"]["separation"] / min(row["val"]["trivial_mse"].values())
        assert f"{row['epoch']}/2" in line
        assert f"train {row['train']['total']:.3f}" in line
        assert f"val {row['val']['total']:.3f}" in line
        assert f"trivial {relative:.2f}" in line


def test_earlier_run_is_set_aside(dataset, tmp_path, capsys):
    kept = []
    for number in (1, 2, 3):
        train_tiny(dataset, tmp_path, seed=number)
        kept.append((snapshot(tmp_path), (tmp_path / "training_report.md").read_bytes()))
        if number > 1:
            assert f"earlier_run_{number - 1}" in capsys.readouterr().out
    for number in (1, 2):
        aside = tmp_path / f"earlier_run_{number}"
        assert (snapshot(aside), (aside / "training_report.md").read_bytes()) == kept[number - 1]


def test_refused_command_leaves_an_earlier_run(trained, dataset, tmp_path, capsys):
    folder = Path(shutil.copytree(trained, tmp_path / "run"))
    before = snapshot(folder)
    assert_fails(capsys, train_flags(dataset, folder, "--num_heads=3"), "num_heads")
    assert snapshot(folder) == before


def test_single_talkers_alone_can_be_trained_on(tmp_path):
    """The mixture itself is perfect there, so there is nothing to divide the error by."""
    data = make_dataset(tmp_path / "data", "--min_speakers=1", "--max_speakers=1")
    history = train_tiny(data, tmp_path / "run", epochs=1)
    assert history[0]["val"]["trivial_mse"]["mixture"] == 0
    assert "best trivial -" in ssm.format_epoch(history[0], 1)


def test_earlier_runs_may_be_tidied_up(dataset, tmp_path):
    """The user has thrown away earlier_run_1 and kept earlier_run_2."""
    train_tiny(dataset, tmp_path, seed=1)
    (tmp_path / "earlier_run_2").mkdir()
    (tmp_path / "earlier_run_2/best_model.pt").write_bytes(b"kept")
    before = snapshot(tmp_path)
    train_tiny(dataset, tmp_path, seed=2)
    assert (tmp_path / "earlier_run_2/best_model.pt").read_bytes() == b"kept"
    aside = [snapshot(folder) for folder in tmp_path.glob("earlier_run_*")]
    assert before in aside


def test_export(dataset, tmp_path):
    argv = train_flags(dataset, tmp_path / "run", f"--export={tmp_path / 'weights'}")
    assert ssm.main(argv) == 0
    mixture = torch.randn(1, 5, WIDTH)
    exported, best = (
        ssm.load_separator(tmp_path / name)(mixture) for name in ("weights", "run/best_model.pt")
    )
    assert torch.equal(exported[0], best[0]) and torch.equal(exported[1], best[1])
    assert {p.name for p in (tmp_path / "weights").iterdir()} >= {
        "config.json",
        "model.safetensors",
    }


# --------------------------------------------------------------------------------------------------
# Kills and full disks


def half_written(error):
    """A ``torch.save`` that dies in the middle."""

    def save(checkpoint, path):
        Path(path).write_bytes(b"half a checkpoint")
        raise error

    return save


@pytest.fixture
def run_folder(trained, tmp_path):
    return Path(shutil.copytree(trained, tmp_path / "run"))


def test_full_disk_leaves_earlier_checkpoints(run_folder, dataset, capsys, monkeypatch):
    before = snapshot(run_folder)
    monkeypatch.setattr(torch, "save", half_written(RuntimeError("PytorchStreamWriter failed")))
    argv = train_flags(dataset, run_folder, "--resume", "--epochs=4")
    assert_fails(capsys, argv, "could not write", "disk full", "intact")
    assert snapshot(run_folder) == before
    assert not list(run_folder.glob("*.tmp"))


def test_full_disk_is_an_input_error(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "save", half_written(OSError(28, "No space left on device")))
    with pytest.raises(ssm.InputError, match="No space left"):
        ssm.save_checkpoint(tmp_path / "best_model.pt", {})
    assert not list(tmp_path.iterdir())


def test_kill_while_saving_leaves_earlier_checkpoints(run_folder, dataset, capsys, monkeypatch):
    before, argv = snapshot(run_folder), train_flags(dataset, run_folder, "--resume", "--epochs=4")
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", half_written(KeyboardInterrupt()))
        assert ssm.main(argv) == 130
    assert snapshot(run_folder) == before
    assert ssm.main(argv) == 0
    assert torch.load(run_folder / "checkpoint_epoch_4.pt")["epoch"] == 4


def test_too_little_disk_is_found_before_training(dataset, tmp_path, capsys, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    assert_fails(capsys, train_flags(dataset, tmp_path / "run"), "GB free", "--save_every")
    assert not list((tmp_path / "run").glob("*.pt"))


def test_check_disk_arithmetic(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=16 * 1000 * 3)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    ssm.check_disk(tmp_path, parameters=1000, checkpoints=3)
    with pytest.raises(ssm.InputError):
        ssm.check_disk(tmp_path, parameters=1001, checkpoints=3)


def test_loss_that_is_not_finite(own_dataset, tmp_path, capsys):
    """The first epoch is sound, in the second the data of one mixture overflow the loss."""
    argv = train_flags(own_dataset, tmp_path / "run", "--no_remix", "--batch_size=4")
    assert ssm.main(argv) == 0
    before = snapshot(tmp_path / "run")
    for path in (own_dataset / "train").rglob("*00002*.npy"):
        np.save(path, np.full_like(np.load(path), 1e30))
    assert_fails(capsys, [*argv, "--resume", "--epochs=2"], "not finite", "epoch 2, batch 1")
    assert snapshot(tmp_path / "run") == before
    separator = ssm.load_separator(tmp_path / "run/best_model.pt")
    assert all(weight.isfinite().all() for weight in separator.parameters())


def test_validation_loss_that_is_not_finite(own_dataset, tmp_path, capsys):
    """Else the first epoch stays the best for ever: nothing is smaller than NaN."""
    for path in (own_dataset / "val").rglob("*00001*.npy"):
        np.save(path, np.full_like(np.load(path), 1e30))
    assert_fails(capsys, train_flags(own_dataset, tmp_path / "run"), "not finite", "epoch 1")
    assert not (tmp_path / "run/best_model.pt").exists()


# --------------------------------------------------------------------------------------------------
# Checkpoints that are none


class Malicious:
    """Unpickling this would write a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (open, (self.path, "w"))


def changed(**changes):
    """A checkpoint with some of its keys replaced, or dropped where the value is None."""

    def write(path, good):
        content = {**torch.load(good), **changes}
        torch.save({k: v for k, v in content.items() if v is not None}, path)

    return write


FOREIGN = {
    "missing": lambda path, good: None,
    "empty": lambda path, good: path.write_bytes(b""),
    "text": lambda path, good: path.write_text("weights\n"),
    "truncated": lambda path, good: path.write_bytes(good.read_bytes()[:5000]),
    "cut at the end": lambda path, good: path.write_bytes(good.read_bytes()[:-100]),
    "list": lambda path, good: torch.save([1, 2], path),
    "another dict": lambda path, good: torch.save({"weights": torch.zeros(2)}, path),
    "a module": lambda path, good: torch.save(torch.nn.Linear(2, 2), path),
    "code": lambda path, good: torch.save({"epoch": Malicious(path.with_name("ran"))}, path),
    "plain pickle": lambda path, good: path.write_bytes(
        pickle.dumps(Malicious(path.with_name("ran")))),
    "no configuration": changed(model_config=None),
    "configuration a number": changed(model_config=5),
    "configuration of another model": changed(model_config={"d_model": 32}),
    "weights of other sizes": lambda path, good: changed(
        model_state_dict=tiny_separator(3, ff_dim=16).state_dict())(path, good),
    "weights missing": changed(model_state_dict={}),
}  # fmt: skip


@pytest.mark.parametrize("kind", FOREIGN)
def test_foreign_checkpoint(kind, best, dataset, tmp_path, capsys):
    path = tmp_path / "best_model.pt"
    FOREIGN[kind](path, best)
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        ssm.load_separator(path)
    assert str(path) in str(error.value)
    assert_fails(
        capsys, ["evaluate", f"--checkpoint={path}", f"--data_dir={dataset}", *CPU_FLAGS], path
    )
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("kind", FOREIGN)
def test_resume_from_foreign_checkpoint(kind, best, dataset, tmp_path, capsys):
    path = tmp_path / "checkpoint_epoch_1.pt"
    FOREIGN[kind](path, best)
    assert_fails(capsys, train_flags(dataset, tmp_path, "--resume", "--epochs=4"), tmp_path)
    assert not (tmp_path / "ran").exists()


# --------------------------------------------------------------------------------------------------
# Data and separator that do not fit


def test_resume_with_nothing_there(dataset, tmp_path, capsys):
    assert_fails(capsys, train_flags(dataset, tmp_path, "--resume"), "nothing to resume", tmp_path)


def test_resume_on_other_width(run_folder, tmp_path, capsys):
    other = make_dataset(tmp_path / "wide", "--feature_dim=64")
    before = snapshot(run_folder)
    assert_fails(capsys, train_flags(other, run_folder, "--resume", "--epochs=4"), "32", "64")
    assert snapshot(run_folder) == before


def test_evaluate_on_other_width(best, tmp_path, capsys):
    other = make_dataset(tmp_path / "wide", "--feature_dim=64")
    argv = ["evaluate", f"--checkpoint={best}", f"--data_dir={other}", *CPU_FLAGS]
    assert_fails(capsys, argv, "32 wide", "64")


def test_evaluate_with_too_few_streams(dataset, tmp_path, capsys):
    small = save_tiny_checkpoint(tmp_path / "small.pt", tiny_separator(1))
    argv = ["evaluate", f"--checkpoint={small}", f"--data_dir={dataset}", *CPU_FLAGS]
    assert_fails(capsys, argv, "1 streams")


def test_max_speakers_smaller_than_data(dataset, tmp_path, capsys):
    assert_fails(capsys, train_flags(dataset, tmp_path, "--max_speakers=1"), "--max_speakers=1")


def test_max_speakers_larger_than_data(dataset, tmp_path):
    train_tiny(dataset, tmp_path, max_speakers=5)
    assert ssm.load_separator(tmp_path / "best_model.pt").max_speakers == 5


def test_splits_of_different_width(own_dataset, tmp_path, capsys):
    other = make_dataset(tmp_path / "wide", "--feature_dim=64")
    shutil.rmtree(own_dataset / "val")
    shutil.copytree(other / "val", own_dataset / "val")
    assert_fails(capsys, train_flags(own_dataset, tmp_path / "run"), "64", "32")


def test_heads_that_do_not_divide_the_width(dataset, tmp_path, capsys):
    assert_fails(capsys, train_flags(dataset, tmp_path, "--num_heads=6"), "num_heads", "32")


def test_checkpoint_folder_not_writable(dataset, tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    for folder in (tmp_path / "file", tmp_path / "file" / "run"):
        assert_fails(capsys, train_flags(dataset, folder), "cannot write to", folder)


def test_sizes_come_from_the_data(tmp_path, capsys):
    data = make_dataset(tmp_path / "data", "--feature_dim=48", "--max_speakers=2")
    argv = ["train", f"--data_dir={data}", f"--checkpoint_dir={tmp_path / 'run'}", "--epochs", "1"]
    assert ssm.main([*argv, *SHORT_FLAGS, *CPU_FLAGS]) == 0
    separator = ssm.load_separator(tmp_path / "run/best_model.pt")
    assert (separator.feature_dim, separator.max_speakers) == (48, 2)


def test_start_from_begins_with_those_weights(dataset, best, tmp_path):
    """A step too small to matter leaves what was loaded; sizes come with the weights."""
    train_tiny(dataset, tmp_path / "run", start_from=str(best), lr=1e-12, num_layers=3)
    before, after = (ssm.load_separator(path) for path in (best, tmp_path / "run/best_model.pt"))
    for a, b in zip(before.parameters(), after.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)
    checkpoint = ssm.load_checkpoint(tmp_path / "run/best_model.pt")
    assert checkpoint["epoch"] == 1 and checkpoint["model_config"]["num_layers"] == 1


def test_start_from_bad_input(dataset, qwen_checkpoint, tmp_path, capsys):
    argv = train_flags(dataset, tmp_path / "run", "--start_from=gone.pt")
    assert_fails(capsys, argv, "gone.pt")


def test_averaged_weights_follow(dataset):
    """By hand: after n steps the average is that of the weights of every step, newest heaviest."""
    separator = tiny_separator()
    averaged = ssm.AveragedSeparator(separator)
    expected = [p.detach().clone() for p in separator.parameters()]
    for step in range(30):
        with torch.no_grad():
            for p in separator.parameters():
                p.add_(torch.randn_like(p))
        averaged.update(separator)
        keep = min(0.97, step / (10 + step))
        expected = [keep * e + (1 - keep) * p.detach()
                    for e, p in zip(expected, separator.parameters(), strict=True)]  # fmt: skip
    for e, p in zip(expected, averaged.separator.parameters(), strict=True):
        torch.testing.assert_close(e, p, atol=1e-4, rtol=1e-4)
    assert averaged.steps == 30
