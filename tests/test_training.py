"""Training: what is learnt, what is saved, what survives a kill, and what is refused."""

import json
import math
import os
import pickle
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    CPU,
    CPU_FLAGS,
    PNG,
    SHORT,
    SHORT_FLAGS,
    SIZES,
    SPECTROGRAM_SIZES,
    WIDTH,
    assert_fails,
    make_dataset,
    save_tiny_checkpoint,
    tiny_separator,
    tiny_spectrogram_separator,
    train_flags,
    train_tiny,
)

import generate_multi_speaker_dataset as generator
import scoring
import speaker_separator_module as ssm

KINDS = ["features", "recordings"]
DATA = {"features": "dataset", "recordings": "recordings"}  # fixtures
MORE = {"features": {"dropout": 0.1}, "recordings": SPECTROGRAM_SIZES}  # options of each kind


def losses(history):
    return [(row["train"]["total"], row["val"]["total"]) for row in history]


def snapshot(folder):
    """Bytes of every checkpoint in a folder."""
    return {path.name: path.read_bytes() for path in folder.glob("*.pt")}


@pytest.fixture
def run_folder(trained, tmp_path):
    """A copy of the trained run that a test may go on with."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def data(kind, request):
    """A dataset of each kind; not to be written to."""
    return request.getfixturevalue(DATA[kind])


# --------------------------------------------------------------------------------------------------
# Learning


def test_few_items_are_overfitted(dataset, tmp_path):
    options = {"epochs": 60, "lr": 2e-2, "dropout": 0.0, "remix": False, "save_every": 60}
    history = train_tiny(dataset, tmp_path, **options)
    first, last = history[0]["train"], history[-1]["train"]
    assert last["separation"] < 0.25 * first["separation"]
    assert last["activity"] < 0.5 * first["activity"]
    train_set = ssm.MultiSpeakerDataset(dataset, "train")
    separator = ssm.load_separator(tmp_path / "checkpoint_epoch_60.pt")
    scores = ssm.evaluate_separator(separator, train_set, threshold=0.5)
    assert scores["separation"] < 0.25 * min(scores["trivial_mse"].values())
    assert scores["count_accuracy"] == 1


def test_few_recordings_are_overfitted(speech_dir, tmp_path):
    """Talkers overlap fully, so that the mixture itself is far from each of them."""
    argv = [f"--speech_dir={speech_dir}", f"--output_dir={tmp_path / 'data'}", "--overlap", "0.8",
            "1", "--train_samples=3", "--val_samples=1", "--min_speakers=2", "--max_speakers=2",
            "--split_by=utterance", "--join", "2", "3"]  # fmt: skip
    assert generator.main(argv) == 0
    options = {**SPECTROGRAM_SIZES, "dim": 64, "ff_dim": 128, "lr": 3e-3, "remix": False}
    history = train_tiny(tmp_path / "data", tmp_path, epochs=60, save_every=60, **options)
    first, last = history[0]["train"], history[-1]["train"]
    assert last["separation"] < 0.7 * first["separation"]
    separator = ssm.load_separator(tmp_path / "checkpoint_epoch_60.pt")
    train_set = ssm.MultiSpeakerDataset(tmp_path / "data", "train")
    scores = ssm.evaluate_separator(separator, train_set, threshold=0.5)
    assert scores["separation"] < 0.8 * min(scores["trivial_mse"].values())
    assert scores["si_sdr_improvement"] > 2
    assert scores["count_accuracy"] == 1


def test_same_seed_same_losses(kind, data, tmp_path):
    first, same, other = (
        losses(train_tiny(data, tmp_path / name, epochs=1, seed=seed, **MORE[kind]))
        for name, seed in (("first", 1), ("same", 1), ("other", 2))
    )
    assert first == same
    assert all(a != b for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_recomputed_blocks_train_alike_and_keep_less(kind, data, dtype, tmp_path, monkeypatch):
    kept, step = [], ssm.batch_loss

    def watch(*args):
        def keep(tensor):
            kept[-1] += tensor.nbytes
            return tensor

        kept.append(0)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            return step(*args)

    monkeypatch.setattr(ssm, "batch_loss", watch)
    whole, again = (losses(train_tiny(data, tmp_path / str(recompute), recompute=recompute,
                                      **MORE[kind] | {"dtype": dtype}))
                    for recompute in (False, True))
    assert again == whole
    assert all(few < 0.9 * many for many, few in zip(kept[:2], kept[2:], strict=True))


@pytest.mark.parametrize("remix", [True, False])
def test_mixtures_are_fresh_every_epoch(remix, kind, data, tmp_path, monkeypatch):
    seen, step = [], ssm.batch_loss

    def watch(separator, batch, *args):
        seen.extend((batch["mixture"].mean(2) * torch.arange(batch["mixture"].shape[1])).sum(1))
        return step(separator, batch, *args)

    monkeypatch.setattr(ssm, "batch_loss", watch)
    train_tiny(data, tmp_path, epochs=3, batch_size=1, remix=remix, **MORE[kind])
    seen = [round(float(fingerprint), 3) for fingerprint in seen]
    size = len(seen) // 3
    epochs = [sorted(seen[start : start + size]) for start in range(0, len(seen), size)]
    if remix:
        heard = [fingerprint for fingerprint in seen if fingerprint]  # silence is drawn too
        assert len(seen) == 12
        assert len(set(heard)) == len(heard) > 9
    else:
        assert len(epochs[0]) == len(ssm.MultiSpeakerDataset(data, "train"))
        assert epochs[1] == pytest.approx(epochs[0]) and epochs[2] == pytest.approx(epochs[0])


def test_more_streams_than_speakers(speech_dir, tmp_path):
    """Three speakers to train on and five streams: mixtures have three talkers at most."""
    for speaker in range(3):
        shutil.copytree(speech_dir / f"s{speaker}", tmp_path / f"speech/s{speaker}")
    argv = [f"--speech_dir={tmp_path / 'speech'}", f"--output_dir={tmp_path / 'data'}",
            "--train_samples=3", "--val_samples=2", "--max_speakers=2", "--split_by=utterance"]
    assert generator.main(argv) == 0
    run = tmp_path / "run"
    train_tiny(tmp_path / "data", run, max_speakers=5, mixtures_per_epoch=8, **SPECTROGRAM_SIZES)
    assert ssm.load_separator(run / "best_model.pt").max_speakers == 5
    train_set = ssm.MultiSpeakerDataset(tmp_path / "data", "train")
    fresh = ssm.RemixedRecordings(train_set, ssm.TrainOptions(), 5)
    assert {fresh.draw_count(number)[1] for number in range(200)} == {0, 1, 2, 3}


def test_single_talkers_alone_can_be_trained_on(tmp_path):
    """The mixture itself is perfect there, so there is nothing to divide the error by."""
    data = make_dataset(tmp_path / "data", "--min_speakers=1", "--max_speakers=1")
    history = train_tiny(data, tmp_path / "run", epochs=1)
    assert history[0]["val"]["trivial_mse"]["mixture"] == 0
    assert "best trivial -" in ssm.format_epoch(history[0], 1)


def test_patience(dataset, tmp_path, monkeypatch, capsys):
    evaluate, totals = ssm.evaluate_separator, iter([2.0, 1.0, 1.5, 1.2, 1.1])

    def worse(*args, **kwargs):
        return evaluate(*args, **kwargs) | {"total": next(totals)}

    monkeypatch.setattr(ssm, "evaluate_separator", worse)
    history = train_tiny(dataset, tmp_path, epochs=20, patience=2)
    assert len(history) == 4
    assert torch.load(tmp_path / "best_model.pt")["epoch"] == 2
    assert (tmp_path / "checkpoint_epoch_4.pt").is_file()
    assert "best was 2" in capsys.readouterr().out
    (tmp_path / "training_report.md").unlink()
    assert len(train_tiny(dataset, tmp_path, epochs=20, resume=True)) == 4  # stays stopped
    assert "more with --patience" in capsys.readouterr().out
    assert (tmp_path / "training_report.md").is_file()
    assert len(train_tiny(dataset, tmp_path, epochs=20, patience=3, resume=True, lr=5e-3)) == 5
    assert "| lr | 0.005 |" in (tmp_path / "training_report.md").read_text()


@pytest.mark.parametrize("dtype", ["bf16", torch.bfloat16])
def test_unknown_dtype(dtype, dataset, tmp_path):
    with pytest.raises(ValueError, match="unknown dtype .*auto, float32, bfloat16"):
        train_tiny(dataset, tmp_path, epochs=1, dtype=dtype)


# --------------------------------------------------------------------------------------------------
# Optimizer, learning rate and average


def test_which_weights_are_under_muon():
    """The matrices inside the blocks; the ends, convolutions, biases and norms are AdamW's."""
    separator = tiny_spectrogram_separator()
    names = {id(weight): name for name, weight in separator.named_parameters()}
    optimizer = ssm.MuonAdamW(separator, 1e-3, 0.01)
    muon, adamw = ({names[id(weight)] for weight in group["params"]}
                   for group in optimizer.param_groups)  # fmt: skip
    assert muon | adamw == set(names.values()) and not muon & adamw
    for name in ("mixture_blocks.0.attention.qkv.weight", "exchanges.0.mean.weight", "gain.weight",
                 "query_attention.1.in_proj_weight", "stream_blocks.0.convolution.gate.weight",
                 "mixture_blocks.1.feed_forward.1.weight"):  # fmt: skip
        assert name in muon
    for name in ("input.weight", "output.1.weight", "speaker_queries", "activity_head.0.weight",
                 "attention_pool.weight", "mixture_blocks.0.convolution.depthwise.weight",
                 "gain.bias", "mixture_blocks.0.attention.norm.weight"):  # fmt: skip
        assert name in adamw


def test_muon_steps_are_orthogonal_and_as_long_as_those_of_adamw():
    separator, lr = tiny_spectrogram_separator(), 1e-2
    before = {name: weight.detach().clone() for name, weight in separator.named_parameters()}
    optimizer = ssm.MuonAdamW(separator, lr=lr, weight_decay=0.0)
    for weight in separator.parameters():
        weight.grad = torch.randn_like(weight)
    optimizer.step()
    muon = {id(weight) for weight in optimizer.param_groups[0]["params"]}
    for name, weight in separator.named_parameters():
        step = weight.detach() - before[name]
        if id(weight) in muon:
            lengths = torch.linalg.svdvals(step) / (0.2 * lr * max(weight.shape) ** 0.5)
            assert lengths.quantile(0.1) > 0.6 and lengths.max() < 1.3  # of the gradient: 0 to 2
        else:  # AdamW's first step is the sign of the gradient
            torch.testing.assert_close(step, -lr * weight.grad.sign(), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stacked_muon_steps_as_torch_does(dtype):
    """Matrices of three shapes, wide, tall and square; two steps, so that the momentum counts."""
    random = torch.Generator().manual_seed(0)
    shapes = [(8, 12), (12, 8), (6, 6), (8, 12)]
    ours, theirs = ([torch.nn.Parameter(torch.ones(shape)) for shape in shapes] for _ in range(2))
    optimizers = (ssm.StackedMuon(ours, dtype, lr=0.1, weight_decay=0.5),
                  torch.optim.Muon(theirs, lr=0.1, weight_decay=0.5,
                                   adjust_lr_fn="match_rms_adamw"))  # fmt: skip
    for _ in range(2):
        for weight, same in zip(ours, theirs, strict=True):
            weight.grad = torch.randn(weight.shape, generator=random)
            same.grad = weight.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for weight, same in zip(ours, theirs, strict=True):
        # torch multiplies in bfloat16
        torch.testing.assert_close(weight, same, rtol=0, atol=2e-3)
        assert (weight - 1).abs().max() > 0.05


@pytest.mark.parametrize("name", ["float32", "bfloat16"])
def test_muon_multiplies_in_the_precision_of_the_run(name):
    muon = ssm.make_optimizer(tiny_spectrogram_separator(), ssm.TrainOptions(dtype=name)).parts[0]
    group, matrices = muon.param_groups[0], torch.randn(2, 8, 12)
    exact = ssm.StackedMuon([torch.nn.Parameter(matrices[0])], torch.float64)._orthogonal(
        matrices, group)
    found = muon._orthogonal(matrices, group)
    assert str(found.dtype) == f"torch.{name}"
    error = (found - exact).abs().max()
    assert error < 1e-5 if name == "float32" else 1e-4 < error < 0.1


def test_more_processes_than_matrices(monkeypatch):
    """The last ones have no matrix to step, and step the other weights."""
    optimizer = ssm.MuonAdamW(tiny_spectrogram_separator(), 1e-2, 0.0)
    for weight in (weight for group in optimizer.param_groups for weight in group["params"]):
        weight.grad = torch.ones_like(weight)
    before = [group["params"][0].detach().clone() for group in optimizer.param_groups]
    monkeypatch.setattr(ssm, "process_rank", lambda: (999, 1000))
    monkeypatch.setattr(ssm, "send_shares", lambda tensors: None)
    optimizer.step()
    after = [group["params"][0] for group in optimizer.param_groups]
    assert torch.equal(before[0], after[0]) and not torch.equal(before[1], after[1])


def test_numpy_numbers_as_options(dataset, tmp_path):
    """A checkpoint with one in it would not open with a bare torch.load."""
    train_tiny(dataset, tmp_path, lr=np.float32(0.5), dropout=np.float64(0), epochs=np.int64(1))
    assert torch.load(tmp_path / "best_model.pt")["options"]["lr"] == 0.5


def test_numpy_lengths_as_options(recordings, tmp_path):
    train_tiny(
        recordings, tmp_path, **SPECTROGRAM_SIZES, crop_seconds=tuple(np.linspace(0.5, 1, 2)))
    assert torch.load(tmp_path / "best_model.pt")["options"]["crop_seconds"] == [0.5, 1.0]


def test_default_learning_rates():
    """Measured on recordings; wider separators of features want smaller steps."""
    options = ssm.TrainOptions()
    optimizer = ssm.make_optimizer(tiny_spectrogram_separator(), options)
    assert isinstance(optimizer, ssm.MuonAdamW)
    assert [group["lr"] for group in optimizer.param_groups] == [2e-3, 2e-3]
    optimizer = ssm.make_optimizer(tiny_separator(), options)
    assert isinstance(optimizer, torch.optim.AdamW)
    assert optimizer.param_groups[0]["lr"] == 0.128 / WIDTH
    given = ssm.make_optimizer(tiny_separator(), options._replace(lr=0.5, weight_decay=0.25))
    assert (given.param_groups[0]["lr"], given.param_groups[0]["weight_decay"]) == (0.5, 0.25)


@pytest.mark.filterwarnings("ignore:Detected call of")
def test_learning_rate():
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
    scheduler = ssm.make_scheduler(optimizer, 10)
    rates = []
    for _ in range(11):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    assert rates[0] == 1e-3
    assert rates[5] == pytest.approx(0.55e-3)  # half way, in the middle of 1e-3 and 1e-4
    assert rates[10] == pytest.approx(1e-4)
    assert ssm.make_scheduler(optimizer, 10, done=7).get_last_lr()[0] == pytest.approx(rates[7])


def test_learning_rate_of_a_run(kind, data, tmp_path):
    history = train_tiny(data, tmp_path, epochs=4, lr=1e-3, **MORE[kind])
    expected = [1e-4 + 0.45e-3 * (1 + math.cos(math.pi * epoch / 4)) for epoch in range(4)]
    assert [row["lr"] for row in history] == pytest.approx(expected)


def test_averaged_weights():
    """By hand: after n steps the average is n / (n + 10) the old one and the rest the new."""
    separator = tiny_separator()
    averaged = ssm.RunningAverage(separator)
    assert not any(p.requires_grad for p in averaged.parameters())
    expected = [p.detach().clone() for p in separator.parameters()]
    for step in range(30):
        with torch.no_grad():
            for p in separator.parameters():
                p.add_(torch.randn_like(p))
        averaged.update_parameters(separator)
        keep = step / (10 + step)
        expected = [keep * e + (1 - keep) * p.detach()
                    for e, p in zip(expected, separator.parameters(), strict=True)]  # fmt: skip
    for e, p in zip(expected, averaged.module.parameters(), strict=True):
        torch.testing.assert_close(e, p, atol=1e-4, rtol=1e-4)
    assert averaged.n_averaged == 30


def test_the_average_is_what_is_saved(trained):
    checkpoint = torch.load(trained / "checkpoint_epoch_3.pt")
    assert checkpoint["steps"] == 6
    current, averaged = checkpoint["training_state_dict"], checkpoint["model_state_dict"]
    assert current.keys() == averaged.keys()
    assert not torch.equal(current["speaker_queries"], averaged["speaker_queries"])


# --------------------------------------------------------------------------------------------------
# Evaluating


class Scripted(torch.nn.Module):
    """Returns given streams [S, T, D] and probabilities [S], mixture after mixture."""

    def __init__(self, answers, is_spectrogram=False, threshold=0.5):
        super().__init__()
        self.answers, self.is_spectrogram, self.threshold = answers, is_spectrogram, threshold
        self.speaker_queries = torch.nn.Parameter(torch.zeros(1))
        self.max_speakers = len(answers[0][1])
        self.calls = 0

    def forward(self, mixture, frame_mask=None):
        rows = [self.answers[self.calls + b] for b in range(len(mixture))]
        self.calls += len(mixture)
        streams = [torch.nn.functional.pad(s, (0, 0, 0, mixture.shape[1] - s.shape[1]))
                   for s, _ in rows]  # fmt: skip
        return torch.stack(streams), torch.tensor([p for _, p in rows])


def batch_of(dataset, index, streams=2):
    """One mixture as a batch, with spectrograms if it is a recording."""
    return ssm.add_spectrograms(ssm.collate([dataset[index]], streams))


def test_threshold_is_calibrated_on_every_other_mixture_and_scored_on_the_rest():
    """Even mixtures are counted right from 0.7 on, odd ones only below 0.6."""
    items, answers = [], []
    for number in range(6):
        talkers, second = (1, 0.7) if number % 2 == 0 else (2, 0.6)
        targets = torch.randn(talkers, 4, WIDTH)
        items.append({"mixture": targets.sum(0), "targets": targets})
        streams = torch.nn.functional.pad(targets, (0, 0, 0, 0, 0, 2 - talkers))
        answers.append((streams, [0.9, second]))
    plain = ssm.evaluate_separator(Scripted(answers), items, batch_size=4)
    assert (plain["threshold"], plain["count_accuracy"]) == (0.5, 0.5)
    tuned = ssm.evaluate_separator(Scripted(answers), items, batch_size=4, calibrate=True)
    assert 0.7 < tuned["threshold"] < 0.75
    assert tuned["count_accuracy"] == 0
    assert tuned["total"] == plain["total"]  # losses are over all mixtures


@pytest.fixture
def scripted(recordings):
    """A separator that returns the talkers of the validation recordings, last talker first."""
    dataset, answers = ssm.MultiSpeakerDataset(recordings, "val"), []
    for index in range(len(dataset)):
        batch = batch_of(dataset, index)
        talkers = int(batch["speaker_mask"].sum())
        answers.append((batch["targets"][0].flip(0), [float(talkers > 1), 1.0]))
    return Scripted(answers, is_spectrogram=True), dataset


def test_errors_far_below_the_loudest_bin_do_not_train(scripted):
    """Streams with nothing in the lowest 30 dB train as the talkers themselves do."""
    ideal, dataset = scripted
    batch = batch_of(dataset, 0)
    quiet = batch["mixture"].amax() - 1.3  # 52 dB
    streams = torch.maximum(batch["targets"][0], quiet)
    assert (streams - batch["targets"][0]).max() > 0.5
    for shift in (0.0, 0.5):
        separator = Scripted([(streams - shift, [1.0, 1.0])], is_spectrogram=True)
        loss = ssm.batch_loss(separator, batch, ssm.LossWeights(0.0, 0.0), "cpu", torch.float32)
        assert 0.01 * shift <= loss.separation <= shift**2


def test_what_is_audible_is_so_in_its_own_mixture(scripted):
    """Beside one that is 40 dB louder the errors of a mixture train as they do alone."""
    batch = batch_of(scripted[1], 0)
    pair = batch | {key: batch[key].repeat_interleave(2, 0) for key in (
        "mixture", "targets", "frame_mask", "speaker_mask")}
    for key in ("mixture", "targets"):
        pair[key][1] -= 1.0
    alone, together = (
        ssm.batch_loss(
            Scripted([(talkers + 0.1, [1.0, 1.0]) for talkers in mixtures["targets"]], True),
            mixtures, ssm.LossWeights(0.0, 0.0), "cpu", torch.float32).separation
        for mixtures in (batch, pair))
    torch.testing.assert_close(together, alone)


def test_improvement_of_audio(scripted):
    """The ideal gains improve the audio; gains of 0 dB leave it as it was."""
    ideal, dataset = scripted
    scores = ssm.evaluate_separator(ideal, dataset, batch_size=1)
    assert scores["separation"] == 0
    assert scores["si_sdr_improvement"] > 5
    assert (scores["count_accuracy"], scores["precision"], scores["recall"]) == (1, 1, 1)
    mixtures = [batch_of(dataset, i)["mixture"].expand(2, -1, -1) for i in range(len(dataset))]
    idle = Scripted([(mixture, [1.0, 0.0]) for mixture in mixtures], is_spectrogram=True)
    scores = ssm.evaluate_separator(idle, dataset, batch_size=1)
    assert scores["si_sdr_improvement"] == pytest.approx(0, abs=0.05)
    assert scores["separation"] == pytest.approx(scores["trivial_mse"]["mixture"], rel=1e-5)
    batch = batch_of(dataset, 0)
    lifted = batch["mixture"][:, None].expand(1, 2, -1, -1).clone()
    lifted[:, :, ::2] += 0.5  # a floor may lie above the mixture: audio is never raised
    assert ssm.si_sdr_improvement(lifted, batch).abs().max() < 0.05


def test_improvement_of_audio_does_not_depend_on_the_batch():
    """A recording cut within speech keeps its last frame's gain, beside a longer one too."""
    torch.manual_seed(0)
    cut = torch.stack([torch.randn(4800), 0.03 * torch.randn(4800)])
    items = [{"waveforms": torch.cat([cut.sum(0)[None], cut])},
             {"waveforms": torch.randn(2, 9600)}]
    separator, scores = tiny_spectrogram_separator(2), []
    for size in (1, 2):
        scores.append(ssm.evaluate_separator(separator, items, batch_size=size))
    assert scores[0]["si_sdr_improvement"] == pytest.approx(
        scores[1]["si_sdr_improvement"], abs=1e-3)


@pytest.mark.parametrize("kind", ["features", "recordings"])
def test_silent_talkers_have_no_improvement(kind):
    torch.manual_seed(0)
    talkers = torch.randn(2, 20, WIDTH) if kind == "features" else torch.randn(2, 3200)

    def item(sources):
        if kind == "features":
            return {"mixture": sources.sum(0), "targets": sources}
        return {"waveforms": torch.cat([sources.sum(0)[None], sources])}

    silent = talkers * torch.tensor([1.0, 0.0]).view(2, *[1] * (talkers.dim() - 1))
    separator = (tiny_separator if kind == "features" else tiny_spectrogram_separator)(2)
    scores = [ssm.evaluate_separator(separator, items)["si_sdr_improvement"]
              for items in ([item(talkers)], [item(talkers), item(silent)], [item(silent)])]
    assert scores == [pytest.approx(scores[0]), pytest.approx(scores[0], abs=1e-4), None]


def test_single_talkers_have_no_improvement(tmp_path):
    """The mixture is the talker: a number would say that the separator changed nothing."""
    singles = make_dataset(tmp_path, "--min_speakers=1", "--max_speakers=1")
    scores = ssm.evaluate_separator(
        tiny_separator(), ssm.MultiSpeakerDataset(singles, "val"), batch_size=1)
    assert scores["si_sdr_improvement"] is None
    assert {row.split("|")[3].strip() for row in scoring.score_table(scores)[2:]} == {"-"}


def test_the_likeliest_of_streams_alike_is_the_talker(recordings, scripted):
    """Of a talker alone every stream is the mixture; the one that errs by a trace more is likely.

    By error alone the other one was the talker, and precision and recall were 0.
    """
    dataset = scripted[1]
    single = [i for i in range(len(dataset)) if len(dataset[i]["waveforms"]) == 2][:1]
    talker = batch_of(dataset, *single)["targets"][0, :1]
    near = Scripted([(torch.cat([talker, talker + 1e-3]), [0.1, 0.9])], is_spectrogram=True)
    scores = ssm.evaluate_separator(near, torch.utils.data.Subset(dataset, single))
    assert (scores["count_accuracy"], scores["precision"], scores["recall"]) == (1, 1, 1)
    assert scores["activity"] == pytest.approx(-np.log(0.9), rel=1e-4)


def test_trivial_outputs_of_recordings(recordings, scripted):
    """Against the feature extractor of Whisper itself, from the wavs."""
    from transformers import WhisperFeatureExtractor

    import audio

    extractor, errors = WhisperFeatureExtractor(), {"zeros": [], "mixture": []}
    for sample in json.loads((recordings / "val/metadata.json").read_text()):
        names = [sample["mixed_wav"], *(s["wav_file"] for s in sample["speakers"])]
        samples = [audio.read_audio(recordings / "val" / name) for name in names]
        spectrograms = extractor(samples, sampling_rate=16000)["input_features"]
        mixture, *sources = np.asarray(spectrograms)[:, :, : len(samples[0]) // 160]
        for source in sources:
            errors["zeros"].append(np.mean(np.square(mixture.max() - 2 - source)))
            errors["mixture"].append(np.mean(np.square(mixture - source)))
    trivial = ssm.evaluate_separator(*scripted, batch_size=2)["trivial_mse"]
    for name, values in errors.items():
        assert trivial[name] == pytest.approx(np.mean(values), rel=1e-3)


def test_pictures_have_streams_assigned_to_their_talkers(scripted):
    ideal, dataset = scripted
    rows = ssm.sample_panels(ideal, dataset, "cpu", count=4)
    assert len(rows) == 4
    for index, row in enumerate(rows):
        talkers = len(dataset.samples[index]["speakers"])
        titles = [f"speaker {n + 1} {what}" for n in range(talkers)
                  for what in ("alone", "separated")]  # fmt: skip
        assert list(row) == [f"mixture {dataset.samples[index]['id']}", *titles]
        for n in range(1, talkers + 1):
            assert torch.equal(row[f"speaker {n} separated"], row[f"speaker {n} alone"])


def test_scores_do_not_depend_on_the_batch_size(kind, data):
    val_set = ssm.MultiSpeakerDataset(data, "val")
    separator = {"features": tiny_separator, "recordings": tiny_spectrogram_separator}[kind](3)
    scores = [ssm.evaluate_separator(separator, val_set, batch_size=size) for size in (1, 2, 8)]
    for other in scores[1:]:
        assert other.pop("trivial_mse") == pytest.approx(scores[0]["trivial_mse"], rel=1e-4)
        expected = {name: value for name, value in scores[0].items() if name != "trivial_mse"}
        assert other == pytest.approx(expected, rel=1e-4, abs=1e-3)


def test_losses_of_an_epoch_are_means_over_its_mixtures(dataset, tmp_path):
    """Steps of four and two mixtures, too short to move anything, have the losses of two of 3."""
    options = {"mixtures_per_epoch": 6, "lr": 1e-12, "dropout": 0.0}
    rows = [train_tiny(dataset, tmp_path / str(size), batch_size=size, **options)[0]
            for size in (4, 3)]
    uneven, even = (row["train"] for row in rows)
    for part in ("reconstruction", "activity"):
        assert uneven[part] == pytest.approx(even[part], rel=1e-5)


def test_the_last_frame_does_not_depend_on_the_batch():
    """It reaches past the end of a recording: zeros follow there, in a batch and alone."""
    short, longer = torch.randn(2, 1610), torch.randn(2, 4800)
    items = [{"waveforms": short}, {"waveforms": longer}]
    batch = ssm.add_spectrograms(ssm.collate(items, 2))
    for row, (item, frames) in enumerate(zip(items, (10, 30), strict=True)):
        alone = ssm.add_spectrograms(ssm.collate([item], 2))
        assert batch["frame_mask"][row].sum() == alone["mixture"].shape[1] == frames
        torch.testing.assert_close(batch["mixture"][row, :frames], alone["mixture"][0])
        torch.testing.assert_close(batch["targets"][row, :, :frames], alone["targets"][0])


@pytest.mark.parametrize("given", [{}, {"reconstruction_weight": 2.0, "activity_weight": 0.25}])
def test_the_printed_total_is_the_sum_of_its_weighted_parts(given, kind, data, tmp_path, capsys):
    history = train_tiny(data, tmp_path, **given, **MORE[kind])
    weights = {"features": (0.5, 0.5), "recordings": (0.0, 0.02)}[kind]
    if given:
        weights = tuple(given.values())
    for split in ("train", "val"):
        total, *parts = (history[0][split][name] for name in ssm.LOSS_PARTS)
        expected = parts[0] + weights[0] * parts[1] + weights[1] * parts[2]
        assert total == pytest.approx(expected, rel=1e-5)
    line = next(x for x in capsys.readouterr().out.splitlines() if x.startswith("epoch "))
    numbers = re.search(
        r"val (\S+) \(separation (\S+) reconstruction (\S+) activity (\S+)\)", line)
    total, *parts = (float(number) for number in numbers.groups())
    assert total == pytest.approx(parts[0] + weights[0] * parts[1] + weights[1] * parts[2],
                                  abs=0.001 * (1 + sum(weights)))
    report = (tmp_path / "training_report.md").read_text()
    val = history[-1]["val"]
    shares = [f"{part} | {weight} | {weight * val[part] / val['total']:.0%} |" for part, weight in
              zip(ssm.LOSS_PARTS[1:], (1.0, *weights), strict=True)]
    assert all(share in report for share in shares)


# --------------------------------------------------------------------------------------------------
# Resuming


@pytest.mark.parametrize("remix", [True, False])
def test_resumed_run_equals_unbroken_run(remix, kind, data, tmp_path):
    options = {"epochs": 4, "save_every": 2, "remix": remix, "lr": 2e-3, **MORE[kind]}
    whole = train_tiny(data, tmp_path / "whole", **options)
    (tmp_path / "resumed").mkdir()
    shutil.copy(tmp_path / "whole/checkpoint_epoch_2.pt", tmp_path / "resumed")
    resumed = train_tiny(data, tmp_path / "resumed", resume=True, **options)
    np.testing.assert_allclose(losses(resumed), losses(whole), rtol=0, atol=1e-6)
    assert [row["lr"] for row in resumed] == [row["lr"] for row in whole]
    last = [torch.load(tmp_path / name / "checkpoint_epoch_4.pt") for name in ("whole", "resumed")]
    for state in ("model_state_dict", "training_state_dict"):
        for a, b in zip(*(c[state].values() for c in last), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    assert last[0]["model_config"] == last[1]["model_config"]
    assert last[0]["steps"] == last[1]["steps"]


def test_resumed_run_keeps_its_seed_and_precision(dataset, tmp_path):
    """Neither has to be asked for again."""
    options = {"epochs": 2, "save_every": 1}
    whole = train_tiny(dataset, tmp_path / "whole", seed=7, dtype="bfloat16", **options)
    (tmp_path / "resumed").mkdir()
    shutil.copy(tmp_path / "whole/checkpoint_epoch_1.pt", tmp_path / "resumed")
    resumed = train_tiny(dataset, tmp_path / "resumed", resume=True, dtype="auto", **options)
    np.testing.assert_allclose(losses(resumed), losses(whole), rtol=0, atol=1e-6)
    kept = torch.load(tmp_path / "resumed/checkpoint_epoch_2.pt")["options"]
    assert (kept["seed"], kept["dtype"]) == (7, "bfloat16")


@pytest.mark.parametrize(
    "flag", ["--num_layers=2", "--num_heads=2", "--ff_dim=64", "--dropout=0.3", "--max_speakers=5",
             "--dim=8", "--seed=7", "--dtype=bfloat16"])  # fmt: skip
def test_flags_that_contradict_the_checkpoint(flag, run_folder, dataset, capsys):
    before = snapshot(run_folder)
    argv = train_flags(dataset, run_folder, "--resume", "--epochs=4", flag)
    assert_fails(capsys, argv, flag, "contradicts")
    assert snapshot(run_folder) == before


@pytest.mark.filterwarnings("error")
def test_flags_that_agree_with_the_checkpoint(run_folder, dataset, capsys):
    """Training goes on with them, in the same folder and without a warning."""
    flags = ["--num_layers=1", "--max_speakers=3", "--seed=42", "--dtype=float32", "--batch_size=1",
             "--reconstruction_weight=0.5", "--activity_weight=0.5"]
    assert ssm.main(train_flags(dataset, run_folder, "--resume", "--epochs=4", *flags)) == 0
    assert "float32 (as before)" in capsys.readouterr().out
    assert torch.load(run_folder / "checkpoint_epoch_4.pt")["epoch"] == 4
    assert not (run_folder / "previous_run").exists()
    assert (run_folder / "checkpoint_epoch_2.pt").is_file()


@pytest.mark.parametrize("part", ["reconstruction", "activity"])
def test_resumed_run_keeps_its_loss(part, run_folder, dataset, capsys):
    """Epochs are compared by it."""
    argv = train_flags(dataset, run_folder, "--resume", f"--{part}_weight=0.25")
    assert_fails(capsys, argv, f"--{part}_weight=0.25 contradicts the checkpoint")


def test_resume_takes_the_newest(trained, dataset, tmp_path):
    """The best may be newer than the last periodic checkpoint, and older."""
    for best_epoch, stamp in ((9, 20), (1, 20), (1, 5)):
        folder = Path(shutil.copytree(trained, tmp_path / f"{best_epoch}_{stamp}"))
        best = torch.load(folder / "best_model.pt") | {"epoch": best_epoch}
        torch.save(best, folder / "best_model.pt")
        os.utime(folder / "best_model.pt", (stamp, stamp))
        for number in (2, 3):
            os.utime(folder / f"checkpoint_epoch_{number}.pt", (10, 10))
        assert ssm.newest_checkpoint(folder)["epoch"] == max(best_epoch, 3)
    stopped = torch.load(trained / "checkpoint_epoch_3.pt") | {"progress": {"step_size": 2}}
    torch.save(stopped, folder / ssm.INTERRUPTED)  # in the epoch after
    assert "progress" in ssm.newest_checkpoint(folder)


def test_resume_of_a_finished_run_changes_nothing(trained, dataset, tmp_path, capsys):
    folder = Path(shutil.copytree(trained, tmp_path / "run"))
    history = train_tiny(dataset, folder, epochs=3, resume=True)
    assert "3 epochs are done already; ask for more with --epochs" in capsys.readouterr().out
    assert [row["epoch"] for row in history] == [1, 2, 3]
    assert snapshot(folder) == snapshot(trained)


def test_resume_writes_what_a_kill_left_out(trained, dataset, tmp_path):
    """It came after best_model.pt and before the last epoch's own checkpoint."""
    folder = Path(shutil.copytree(trained, tmp_path / "run"))
    whole, best = (torch.load(folder / name) for name in ("checkpoint_epoch_3.pt", "best_model.pt"))
    assert best["epoch"] == whole["epoch"] == 3
    (folder / "checkpoint_epoch_3.pt").unlink()
    train_tiny(dataset, folder, epochs=3, resume=True)
    made = torch.load(folder / "checkpoint_epoch_3.pt")
    assert made.keys() == whole.keys()
    for part in ("model_state_dict", "training_state_dict"):
        for name, weight in whole[part].items():
            assert torch.equal(made[part][name], weight)
    assert made["scheduler_state_dict"] == whole["scheduler_state_dict"]
    assert made["train_history"] == whole["train_history"] and made["steps"] == whole["steps"]


def test_resume_on_data_of_another_kind(run_folder, recordings, capsys):
    argv = train_flags(recordings, run_folder, "--resume", "--epochs=4")
    assert_fails(capsys, argv, "spectrograms", run_folder)


def test_resume_on_other_validation_mixtures(run_folder, tmp_path, capsys):
    """Their losses would not compare; the same ones in another place do."""
    other = make_dataset(tmp_path / "other", "--seed=43")
    before = snapshot(run_folder)
    argv = train_flags(other, run_folder, "--resume", "--epochs=4")
    assert_fails(capsys, argv, "validated on other mixtures", other, "--data_dir")
    assert snapshot(run_folder) == before
    same = make_dataset(tmp_path / "same")
    assert ssm.main(train_flags(same, run_folder, "--resume", "--epochs=4")) == 0


# --------------------------------------------------------------------------------------------------
# Starting from a separator


def test_training_starts_from_a_separator(kind, data, tmp_path, capsys):
    """Its weights and sizes, not its threshold; steps that are too short to move anything."""
    make = {"features": tiny_separator, "recordings": tiny_spectrogram_separator}[kind]
    source = {"feature_source": {"kind": "another"}} if kind == "features" else {}
    start = make(max_speakers=4, seed=5, dropout=0.4, threshold=0.9, **source)
    ssm.export_separator(start, tmp_path / "start", torch.bfloat16)
    flags = [f"--data_dir={data}", f"--checkpoint_dir={tmp_path / 'run'}", *CPU_FLAGS]
    assert ssm.main(["train", *flags, f"--init_from={tmp_path / 'start'}", "--epochs=1",
                     "--mixtures_per_epoch=2", "--lr=1e-12", "--dropout=0.2"]) == 0
    printed = capsys.readouterr().out
    assert f"parameters of {tmp_path / 'start'}" in printed
    _, before, epoch, after, *_ = printed.splitlines()
    assert before.startswith("before training  val ") and before.split("val")[1] in epoch
    assert after == f"no epoch is better than {tmp_path / 'start'} was: try a lower --lr"
    tuned = ssm.load_separator(tmp_path / "run/best_model.pt")
    for name, weight in start.state_dict().items():
        torch.testing.assert_close(tuned.state_dict()[name], weight.bfloat16().float())
    assert tuned.max_speakers == 4
    assert tuned.config["dropout"] == 0.2
    assert tuned.threshold < 0.9
    assert tuned.feature_source["kind"] != "another"
    assert str(tmp_path / "start") in (tmp_path / "run/training_report.md").read_text()
    options = torch.load(tmp_path / "run/best_model.pt")["options"]
    sets = [ssm.MultiSpeakerDataset(data, split) for split in ("train", "val")]
    run = ssm.start_run(ssm.TrainOptions(**options | {"lr": None}), *sets, tmp_path)
    whole = 2e-3 if kind == "recordings" else 0.128 / WIDTH
    assert {group["lr"] for group in run.optimizer.param_groups} == {whole / 4}
    assert run.loader.dataset.max_speakers == max(split.max_speakers for split in sets) < 4


def test_a_step_of_one_talker(dataset, tmp_path):
    """Its shares are the loss itself; a loss that is not finite is named by its batch."""
    options = ssm.TrainOptions(**{**SIZES, **SHORT, **CPU, "dropout": 0.0})
    run = ssm.start_run(
        options, *(ssm.MultiSpeakerDataset(dataset, split) for split in ("train", "val")), tmp_path)
    mixture = 10 * torch.randn(5, WIDTH)
    batch = ssm.collate([{"mixture": mixture, "targets": mixture[None]}], 3)
    row = ssm.backward(run, [batch])
    gradients = [weight.grad.norm() for weight in run.separator.parameters()]
    assert row[5] > 1 and torch.stack(gradients).norm() == pytest.approx(1)  # clipped
    loss = ssm.batch_loss(run.separator, batch, run.weights, "cpu", torch.float32)
    torch.testing.assert_close(row[:4], torch.stack(loss[:4]).detach())
    with pytest.raises(ValueError, match=r"epoch 7, batch 2 \(mixtures number"):
        ssm.check_finite(run, 7, torch.stack([row, row * torch.nan]))


def test_a_starting_separator_is_never_replaced(trained, best, dataset, tmp_path, capsys):
    folder = Path(shutil.copytree(trained, tmp_path / "run/previous_run"))
    shutil.copy(best, tmp_path / "run")
    argv = train_flags(dataset, tmp_path / "run")[:3] + CPU_FLAGS
    assert_fails(capsys, [*argv, f"--init_from={folder / 'best_model.pt'}", "--epochs=1"],
                 "would be replaced")
    assert snapshot(folder) == snapshot(trained)
    ssm.export_separator(ssm.load_separator(best), tmp_path / "exported")
    for name in ("", "model.safetensors"):
        assert_fails(capsys, [*argv, f"--init_from={tmp_path / 'exported' / name}",
                              f"--export={tmp_path / 'exported'}"], "would replace")


def test_a_starting_separator_brings_no_data(best, capsys):
    """The default dataset would be of features, whatever the separator reads."""
    assert_fails(capsys, ["train", f"--init_from={best}"], "no dataset at multi_speaker_data")
    assert not any(Path().iterdir())


@pytest.mark.parametrize(("flags", "words"), [
    (["--ff_dim=64"], ("--ff_dim=64", "contradicts", "has 32")),
    (["--resume"], ("--init_from", "contradicts")),
    (["--init_from=nowhere.pt"], ("nowhere.pt", "")),
    (["--data_dir=RECORDINGS"], ("features 32 wide", "spectrograms")),
])  # fmt: skip
def test_separators_that_cannot_be_started_from(
        flags, words, trained, best, dataset, recordings, tmp_path, capsys):
    flags = [flag.replace("RECORDINGS", str(recordings)) for flag in flags]
    folder = Path(shutil.copytree(trained, tmp_path / "run"))
    argv = ["train", f"--data_dir={dataset}", f"--checkpoint_dir={folder}", f"--init_from={best}",
            "--epochs=4", *CPU_FLAGS, *flags]
    assert_fails(capsys, argv, *words)
    assert snapshot(folder) == snapshot(trained)


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


def test_checkpoints_are_separate_files(dataset, tmp_path):
    """What happens to one, in a sync or an editor, does not happen to another."""
    train_tiny(dataset, tmp_path, epochs=1)
    files = [tmp_path / name for name in ("best_model.pt", "checkpoint_epoch_1.pt")]
    assert len({path.stat().st_ino for path in files}) == 2
    assert {path.stat().st_nlink for path in files} == {1}
    assert torch.load(files[0])["epoch"] == torch.load(files[1])["epoch"] == 1


def test_checkpoint_of_recordings(recordings, tmp_path):
    train_tiny(recordings, tmp_path, **SPECTROGRAM_SIZES)
    checkpoint = torch.load(tmp_path / "best_model.pt")
    model = ssm.SpectrogramSeparator(**checkpoint["model_config"])
    model.load_state_dict(checkpoint["model_state_dict"])
    sizes = {name: checkpoint["model_config"][name] for name in SPECTROGRAM_SIZES}
    assert sizes == SPECTROGRAM_SIZES
    report = (tmp_path / "training_report.md").read_text()
    assert "| dim | 16 |" in report and "| activity_weight |" in report
    assert "50 dB" in report  # what training and validation losses leave out differs
    assert "fresh mixtures of 5 talkers" in report  # the dataset's own mixtures have fewer


def test_best_model_has_the_lowest_validation_loss(trained, dataset, best):
    history = torch.load(trained / "checkpoint_epoch_3.pt")["train_history"]
    lowest = min(row["val"]["total"] for row in history)
    checkpoint = torch.load(best)
    assert checkpoint["val_loss"] == lowest
    separator = ssm.load_separator(best)
    scores = ssm.evaluate_separator(separator, ssm.MultiSpeakerDataset(dataset, "val"))
    assert scores["total"] == pytest.approx(lowest, rel=1e-5)
    assert separator.threshold == checkpoint["train_history"][-1]["val"]["threshold"]


def test_report(trained, dataset):
    report = (trained / "training_report.md").read_text()
    assert f"## Data: {dataset}\n" in report
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
        gain = "-" if name == "zeros" else "0.0"  # of zeros SI-SDR says nothing
        assert f"| {name} | {np.mean(values):.3f} | {gain} |" in report
    assert "null" not in report and '"auto"' not in report  # the values that were used
    for words in ("feature_dim | 32", "max_speakers", "| train | 4 |", '| device | "cpu" |',
                  "| reconstruction_weight | 0.5 |", "| mixtures_per_epoch | 4 |", "| val | 3 |",
                  "reconstruction", "best_model.pt", "checkpoint_epoch_2.pt",
                  "checkpoint_epoch_3.pt"):  # fmt: skip
        assert words in report
    for row in torch.load(trained / "checkpoint_epoch_3.pt")["train_history"]:
        assert f"| {row['train']['total']:.4f} | {row['val']['total']:.4f} |" in report
    assert (trained / "training_curves.png").read_bytes().startswith(PNG)


def test_the_report_has_the_threshold_of_the_best_epoch(trained, dataset, tmp_path):
    history = torch.load(trained / "checkpoint_epoch_3.pt")["train_history"]
    history[0]["val"] |= {"total": 0.0, "threshold": 0.125}
    sets = [ssm.MultiSpeakerDataset(dataset, split) for split in ("train", "val")]
    scoring.write_report(tmp_path, {}, {"separation": 1.0}, *sets, history)
    report = (tmp_path / "training_report.md").read_text()
    assert "| threshold | 0.125 |" in report and "every other mixture" in report
    del sets[1].samples[1:]  # one mixture calibrates nothing
    scoring.write_report(tmp_path, {}, {"separation": 1.0}, *sets, history)
    assert "every other mixture" not in (tmp_path / "training_report.md").read_text()


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


def test_earlier_run_is_moved(dataset, tmp_path, capsys):
    """One run is kept in previous_run/, the one before it goes."""
    kept, previous = [], tmp_path / "previous_run"
    for number in (1, 2, 3):
        train_tiny(dataset, tmp_path, seed=number, epochs=number)
        printed = capsys.readouterr().out
        assert (f"moved the earlier run in {tmp_path} to {previous}" in printed) is (number > 1)
        assert ("in place of the one before it" in printed) is (number > 2)
        kept.append((snapshot(tmp_path), (tmp_path / "training_report.md").read_bytes()))
        if number > 1:
            files = snapshot(previous), (previous / "training_report.md").read_bytes()
            assert files == kept[number - 2]
            assert (previous / "training_curves.png").is_file()
    assert set(kept[2][0]) == {"best_model.pt", "checkpoint_epoch_3.pt"}
    assert not (previous / "previous_run").exists()


def test_refused_command_leaves_an_earlier_run(trained, dataset, tmp_path, capsys):
    folder = Path(shutil.copytree(trained, tmp_path / "run"))
    before = snapshot(folder)
    assert_fails(capsys, train_flags(dataset, folder, "--num_heads=3"), "num_heads")
    assert snapshot(folder) == before


def test_export(kind, data, tmp_path, capsys):
    weights = tmp_path / "weights"
    more = ["--dim=16"] if kind == "recordings" else []
    argv = train_flags(data, tmp_path / "run", f"--export={weights}", *more)
    assert ssm.main(argv) == 0
    assert f"exported the best weights to {weights}" in capsys.readouterr().out
    exported, best = (
        ssm.load_separator(tmp_path / name) for name in ("weights", "run/best_model.pt"))
    assert exported.config == best.config
    for a, b in zip(exported.parameters(), best.parameters(), strict=True):
        assert torch.equal(a, b)
    for path in weights.iterdir():
        assert str(tmp_path).encode() not in path.read_bytes(), path


def test_export_is_checked_before_training(dataset, tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    argv = train_flags(dataset, tmp_path / "run", f"--export={tmp_path / 'file'}")
    assert_fails(capsys, argv, "cannot write to", tmp_path / "file")
    (tmp_path / "whisper").mkdir()
    (tmp_path / "whisper/config.json").write_text('{"model_type": "whisper"}')
    argv = train_flags(dataset, tmp_path / "run", f"--export={tmp_path / 'whisper'}")
    assert_fails(capsys, argv, "--export", "another model")
    assert os.listdir(tmp_path / "whisper") == ["config.json"]
    (tmp_path / "whisper/config.json").rename(tmp_path / "whisper/model.safetensors")
    assert_fails(capsys, argv, "--export", "another model")
    assert not (tmp_path / "run").exists()


# --------------------------------------------------------------------------------------------------
# Kills and full disks


def half_written(error):
    """A ``torch.save`` that dies in the middle."""

    def save(checkpoint, path):
        Path(path).write_bytes(b"half a checkpoint")
        raise error

    return save


def test_full_disk_leaves_earlier_checkpoints(run_folder, dataset, capsys, monkeypatch):
    before = snapshot(run_folder)
    monkeypatch.setattr(torch, "save", half_written(RuntimeError("PytorchStreamWriter failed")))
    argv = train_flags(dataset, run_folder, "--resume", "--epochs=4")
    assert_fails(capsys, argv, "could not write", "disk full", "intact")
    assert snapshot(run_folder) == before
    assert not list(run_folder.glob("*.tmp"))


def test_full_disk_is_an_input_error(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "save", half_written(OSError(28, "No space left on device")))
    with pytest.raises(ValueError, match="No space left"):
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


def test_check_disk_counts_what_is_still_to_be_written(tmp_path, monkeypatch):
    """Sixteen bytes a parameter: the best, one every other epoch, the last, and one being written.

    A resumed run does not write those of its epochs again, even where they were deleted.
    """
    options = ssm.TrainOptions(epochs=5, save_every=2)  # the best, epochs 2, 4 and 5

    def check(done, free):
        usage = shutil.disk_usage(tmp_path)._replace(free=16 * 1000 * free)
        monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
        ssm.check_disk(tmp_path, 1000, options, done)
        with pytest.raises(ValueError, match=f"{free - 1} checkpoints need"):
            ssm.check_disk(tmp_path, 1001, options, done)

    check(0, 5)
    check(3, 3)
    check(4, 2)


def test_save_every_zero_is_refused(dataset, tmp_path, capsys):
    with pytest.raises(ValueError, match="save_every must be 1 or more"):
        train_tiny(dataset, tmp_path / "run", save_every=0)
    assert_fails(capsys, train_flags(dataset, tmp_path / "run", "--save_every=0"), "save_every")
    assert not (tmp_path / "run").exists()


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


def test_resume_makes_no_dataset(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    argv = ["train", "--resume", f"--checkpoint_dir={trained}", *CPU_FLAGS]
    assert_fails(capsys, argv, "no dataset at multi_speaker_data: --resume needs the --data_dir")
    assert not list(tmp_path.iterdir())


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


def test_sizes_that_the_separator_does_not_have(dataset, tmp_path, capsys):
    assert_fails(capsys, train_flags(dataset, tmp_path / "run", "--dim=16"), "--dim",
                 "not for a separator")


def test_crop_seconds_needs_two_lengths_and_fresh_mixtures(recordings, tmp_path, capsys):
    argv = train_flags(recordings, tmp_path / "run", "--crop_seconds", 1, 2, "--no_remix")
    assert_fails(capsys, argv, "--crop_seconds", "--no_remix")
    with pytest.raises(ValueError, match=r"two lengths, not 3\.0"):
        train_tiny(recordings, tmp_path / "run", crop_seconds=3.0)
    with pytest.raises(ValueError, match=r"crop_seconds must be 0\.2"):
        train_tiny(recordings, tmp_path / "run", crop_seconds=(None, 6.0))


def test_crop_seconds_is_for_recordings(dataset, tmp_path, capsys):
    argv = train_flags(dataset, tmp_path / "run", "--crop_seconds", 1, 2)
    assert_fails(capsys, argv, "--crop_seconds", "recordings")
    with pytest.raises(ValueError, match="crop_seconds"):
        train_tiny(dataset, tmp_path / "run", crop_seconds=(1, 2), remix=False)


def test_crop_lengths_come_in_order(recordings, tmp_path, capsys):
    argv = train_flags(recordings, tmp_path / "run", "--crop_seconds", 2, 1)
    assert_fails(capsys, argv, "--crop_seconds", "shorter")
