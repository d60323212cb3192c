"""The commands, in-process through main(): what they print and write, and how they refuse."""

import json
import os
import re
import shutil
import subprocess
import sys
from itertools import permutations
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from conftest import (
    CPU_FLAGS,
    FRAMES,
    PNG,
    RATE,
    ROOT,
    SHORT_FLAGS,
    WIDTH,
    assert_fails,
    edit_json,
    run,
    save_tiny_checkpoint,
    sine,
    tiny_separator,
    tiny_spectrogram_separator,
    train_flags,
    write_wav,
)

import audio
import generate_multi_speaker_dataset as generator
import speaker_separator_module as ssm

COMMANDS = ["train", "evaluate", "infer", "integrate", "demo"]


@pytest.fixture
def recording(tmp_path):
    return write_wav(tmp_path / "recording.wav", sine(0.3, 300))


class Untouched:
    """Checks at the end that files still hold what they held at the start."""

    def __init__(self, *paths):
        self.content = {path: path.read_bytes() for path in paths}

    def check(self):
        for path, content in self.content.items():
            assert path.read_bytes() == content, path


# --------------------------------------------------------------------------------------------------
# Help and parsing


@pytest.mark.parametrize("command", [*COMMANDS, "generate"])
def test_help(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    main, argv = (generator.main, []) if command == "generate" else (ssm.main, [command])
    assert run(main, [*argv, "--help"]) == 0
    text = capsys.readouterr().out
    description = text.split("\n\n")[1]
    assert description.strip().endswith(".")
    assert "example:" in text
    assert "(default:" in text and "None" not in text
    assert max(map(len, text.splitlines())) < 80


@pytest.mark.parametrize("fault", [torch.OutOfMemoryError("CUDA out of memory"), None])
def test_out_of_memory(fault, spectrogram_checkpoint, tmp_path, monkeypatch, capsys):
    """That of a GPU by its error, that of a CPU by asking for 2**50 bytes."""
    def separate(*_):
        if fault:
            raise fault
        torch.empty(1 << 48)

    monkeypatch.setattr(ssm, "infer_recording", separate)
    path = write_wav(tmp_path / "a.wav", sine(0.5, 200))
    argv = ["infer", f"--input={path}", f"--checkpoint={spectrogram_checkpoint}",
            f"--output_dir={tmp_path / 'out'}", "--device=cpu"]  # fmt: skip
    assert_fails(capsys, argv, "out of memory", "--device=cpu")


def test_overall_help_lists_the_commands(capsys):
    assert run(ssm.main, ["--help"]) == 0
    text = capsys.readouterr().out
    assert all(command in text for command in COMMANDS)
    assert "example:" in text


@pytest.mark.parametrize("epochs", [["--epochs=3"], ["--epochs", "3"]])
def test_both_spellings(epochs):
    args = ssm.build_parser().parse_args(["train", *epochs, "--batch_size=8", "--lr=1e-4"])
    assert (args.epochs, args.batch_size, args.lr) == (3, 8, 1e-4)
    assert args.data_dir == "multi_speaker_data"
    assert args.checkpoint_dir == "checkpoints"


@pytest.mark.parametrize(
    "argv",
    [
        ["train", "--epochs=0"],
        ["train", "--lr=-1"],
        ["train", "--lr=nan"],
        ["train", "--dropout=1.5"],
        ["train", "--activity_weight=-1"],
        ["train", "--save_every=0"],
        ["train", "--seed=-1"],
        ["train", "--optimizer=muon"],
        ["evaluate", "--threshold=2"],
        ["infer"],
        ["integrate", "--model=x"],
        ["nonsense"],
        [],
    ],
)
def test_mistyped(argv, capsys):
    assert run(ssm.main, argv) == 2
    assert "error:" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("flag", "words"),
    [("--data-dir=x", "flags have underscores: --data_dir"), ("--llm=x", "arguments: --llm=x"),
     ("--js=x", "arguments: --js=x")])
def test_unknown_flag(flag, words, capsys):
    assert_fails(capsys, ["evaluate", flag], words, "evaluate --help")


@pytest.mark.parametrize(
    ("flag", "words"),
    [("--json=", "--json needs a value"), ("", "an option needs a value"),
     ("--picture=a.pdf", "--picture writes .png")])
def test_values_that_are_refused(flag, words, capsys):
    assert_fails(capsys, ["evaluate", flag], words)


@pytest.mark.parametrize("argv", [["--speech_dir", ""], ["--noise_dir="], ["--train=1"]])
def test_generator_takes_no_empty_or_shortened_options(argv, tmp_path, capsys):
    assert run(generator.main, argv) == 2
    assert "error: " in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", COMMANDS)
def test_unknown_device(command, recording, tmp_path, capsys):
    needed = {"infer": ["--input=x.npy"], "integrate": ["--model=x", f"--audio={recording}"]}
    assert_fails(capsys, [command, *needed.get(command, []), "--device=tpu"], "tpu", "mps")
    assert list(tmp_path.iterdir()) == [recording]  # no default dataset, for one


@pytest.mark.parametrize(
    ("script", "argv"),
    [("speaker_separator_module", ["evaluate"]), ("generate_multi_speaker_dataset", [])])
def test_help_of_a_script_is_light_and_silent(script, argv, tmp_path):
    """It imports nothing heavy and prints nothing else."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", ROOT / f"{script}.py", *argv, "--help"],
        cwd=tmp_path, capture_output=True, text=True, timeout=60)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage:")
    imports, others = [], []
    for line in done.stderr.splitlines():
        (imports if line.startswith("import time:") else others).append(line.split("|")[-1].strip())
    heavy = {"transformers", "matplotlib", "soundfile", "soxr", "jiwer", "pyroomacoustics"}
    assert "torch" in imports and not heavy & set(imports) and not others
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", COMMANDS)
def test_interrupted(command, monkeypatch, capsys):
    """Only training can be gone on with."""
    def stop(args):
        raise KeyboardInterrupt

    monkeypatch.setitem(ssm.COMMANDS, command, (stop, *ssm.COMMANDS[command][1:]))
    needed = {"infer": ["--input=x.npy"], "integrate": ["--model=x", "--audio=x.wav"]}
    assert ssm.main([command, *needed.get(command, [])]) == 130
    message = capsys.readouterr().err
    assert message.strip().startswith("stopped")
    assert ("--resume" in message) is (command == "train")


def test_audio_needs_the_siblings(recording, spectrogram_checkpoint, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "long_recordings", None)  # as if the file were not there
    argv = infer_flags(spectrogram_checkpoint, recording, "out")
    assert_fails(capsys, argv, "this needs long_recordings.py beside speaker_separator_module.py")


# --------------------------------------------------------------------------------------------------
# train


@pytest.mark.pictures
def test_train(dataset, tmp_path, capsys):
    assert ssm.main(train_flags(dataset, tmp_path / "run", "--epochs=2")) == 0
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names == {"best_model.pt", "checkpoint_epoch_2.pt", "training_report.md",
                     "training_curves.png"}  # fmt: skip
    output = capsys.readouterr().out
    assert all(name in output for name in names)
    assert output.count("epoch ") == 2


def test_train_makes_the_default_dataset(tmp_path, monkeypatch, capsys):
    calls, parser = [], generator.build_parser()
    parser.set_defaults(feature_dim=32, seq_len=20, train_samples=2, val_samples=2)
    monkeypatch.setattr(generator, "build_parser", lambda: calls.append(1) or parser)
    argv = ["train", "--epochs=1", *SHORT_FLAGS, *CPU_FLAGS]
    (tmp_path / "multi_speaker_data").mkdir()  # as a generator leaves it that was stopped
    assert ssm.main(argv) == 0
    assert "making the default dataset" in capsys.readouterr().out
    assert (tmp_path / "checkpoints/best_model.pt").is_file()
    assert calls
    calls.clear()
    assert ssm.main(argv) == 0
    assert not calls  # the second run finds the dataset


def test_train_makes_no_dataset_elsewhere(tmp_path, capsys):
    argv = train_flags(tmp_path / "mistyped", tmp_path / "run")
    assert_fails(capsys, argv, tmp_path / "mistyped", "generate_multi_speaker_dataset.py")
    assert not (tmp_path / "mistyped").exists()


def test_the_module_alone(best, dataset, monkeypatch, tmp_path, capsys):
    """It infers from a folder of features, and makes no dataset."""
    monkeypatch.setattr(ssm, "import_sibling", lambda name: None)
    monkeypatch.setitem(sys.modules, "mixing", None)
    argv = infer_flags(best, dataset / "val/mixed", tmp_path / "out")
    assert ssm.main(argv) == 0
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        p.name for p in (dataset / "val/mixed").iterdir()}
    shutil.rmtree(tmp_path / "out")
    argv = ["train", "--epochs=1", *SHORT_FLAGS, *CPU_FLAGS]
    assert_fails(capsys, argv, "no dataset at multi_speaker_data", "generate_multi_speaker_dataset")
    assert not list(tmp_path.iterdir())


# --------------------------------------------------------------------------------------------------
# evaluate


@pytest.mark.pictures
def test_evaluate(best, dataset, tmp_path, capsys):
    outputs = [f"--json={tmp_path / 'scores.json'}", f"--picture={tmp_path / 'streams.png'}"]
    argv = ["evaluate", f"--checkpoint={best}", f"--data_dir={dataset}", *CPU_FLAGS, *outputs]
    assert ssm.main(argv) == 0
    printed = capsys.readouterr().out
    scores = json.loads((tmp_path / "scores.json").read_text())
    expected = ssm.evaluate_separator(
        ssm.load_separator(best), ssm.MultiSpeakerDataset(dataset, "val"),
        dtype=ssm.pick_dtype("auto", "cpu")[0])  # fmt: skip
    trivial = scores["trivial_mse"]
    assert list(trivial) == ["zeros", "mixture", "mixture / count"]
    assert trivial == pytest.approx(expected["trivial_mse"])
    del scores["trivial_mse"], expected["trivial_mse"]
    assert scores == pytest.approx(expected)
    for name, value in trivial.items():
        assert f"| {name} | {value:.3f} |" in printed
    for value in (f"{scores['separation']:.3f}", f"{scores['si_sdr_improvement']:.1f}"):
        assert f" {value} |" in printed
    assert "3 mixtures" in printed
    assert (tmp_path / "streams.png").read_bytes().startswith(PNG)


def test_evaluate_train_split_and_threshold(best, dataset, tmp_path, capsys):
    argv = ["evaluate", f"--checkpoint={best}", f"--data_dir={dataset}", *CPU_FLAGS,
            "--split=train", "--threshold=0", f"--json={tmp_path / 'scores.json'}"]  # fmt: skip
    assert ssm.main(argv) == 0
    scores = json.loads((tmp_path / "scores.json").read_text())
    counts = [s["num_speakers"] for s in json.loads((dataset / "train/metadata.json").read_text())]
    assert "4 mixtures" in capsys.readouterr().out
    assert scores["recall"] == 1  # every stream is taken for a talker
    assert scores["count_accuracy"] == counts.count(max(counts)) / len(counts)
    assert scores["precision"] == pytest.approx(np.mean(counts) / max(counts))


@pytest.mark.parametrize(
    ("flags", "said"),
    [([], True), (["--threshold=0.5"], False), (["--num_speakers=2"], False),
     (["--split=train"], False)])
def test_evaluate_on_what_the_threshold_was_chosen_on(flags, said, dataset, best, capsys):
    argv = ["evaluate", f"--checkpoint={best}", f"--data_dir={dataset}", *CPU_FLAGS, *flags]
    assert ssm.main(argv) == 0
    assert ("chose epoch and threshold on these mixtures" in capsys.readouterr().out) == said


def test_evaluate_with_a_known_count(best, dataset, tmp_path, capsys):
    argv = ["evaluate", f"--checkpoint={best}", f"--data_dir={dataset}", *CPU_FLAGS,
            "--split=train", f"--json={tmp_path / 'scores.json'}"]  # fmt: skip
    assert ssm.main([*argv, "--num_speakers=2", "--threshold=1"]) == 0
    scores = json.loads((tmp_path / "scores.json").read_text())
    counts = [s["num_speakers"] for s in json.loads((dataset / "train/metadata.json").read_text())]
    printed = capsys.readouterr().out
    assert "4 mixtures" in printed and "2 talkers taken as known" in printed
    assert scores["count_accuracy"] == counts.count(2) / len(counts)
    assert_fails(capsys, [*argv, "--num_speakers=9"], "num_speakers must be 0 to")


@pytest.mark.pictures
def test_evaluate_recordings(recordings, spectrogram_checkpoint, tmp_path, capsys):
    outputs = [f"--json={tmp_path / 'scores.json'}", f"--picture={tmp_path / 'streams.png'}"]
    argv = ["evaluate", f"--checkpoint={spectrogram_checkpoint}", f"--data_dir={recordings}",
            *CPU_FLAGS, *outputs]  # fmt: skip
    assert ssm.main(argv) == 0
    printed = capsys.readouterr().out
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert f"4 mixtures of {recordings}/val, separator {spectrogram_checkpoint}" in printed
    for name, value in scores["trivial_mse"].items():
        assert f"| {name} | {value:.3f} |" in printed
    assert f"| **separator** | {scores['separation']:.3f} | " in printed
    assert (tmp_path / "streams.png").read_bytes().startswith(PNG)


def test_picture_has_streams_beside_their_talkers(best, dataset, tmp_path, monkeypatch):
    """Every panel of a stream follows the panel of the talker it is assigned to."""
    import scoring

    drawn = []
    monkeypatch.setattr(scoring, "plot_streams", lambda path, rows, *more: drawn.extend(rows))
    argv = ["evaluate", f"--checkpoint={best}", f"--data_dir={dataset}", *CPU_FLAGS,
            f"--picture={tmp_path / 'streams.png'}"]  # fmt: skip
    assert ssm.main(argv) == 0
    separator, val_set = ssm.load_separator(best), ssm.MultiSpeakerDataset(dataset, "val")
    assert len(drawn) == 3
    for row, item, sample in zip(drawn, val_set, val_set.samples, strict=True):
        torch.testing.assert_close(row[f"mixture {sample['id']}"], item["mixture"])
        with torch.no_grad():
            streams = separator(item["mixture"][None])[0][0]
        errors = (streams[:, None] - item["targets"]).square().mean((2, 3)).numpy()
        count = len(item["targets"])
        best_order = min(permutations(range(3), count),
                         key=lambda order, e=errors: sum(e[s, n] for n, s in enumerate(order)))
        for n, stream in enumerate(best_order):
            torch.testing.assert_close(row[f"speaker {n + 1} alone"], item["targets"][n])
            torch.testing.assert_close(row[f"speaker {n + 1} separated"], streams[stream])


def test_evaluate_refusals(best, spectrogram_checkpoint, dataset, recordings, capsys):
    def flags(checkpoint, data, *more):
        return ["evaluate", f"--checkpoint={checkpoint}", f"--data_dir={data}", *CPU_FLAGS, *more]

    for argv, *words in (
        (flags(best, recordings), "features 32 wide", "spectrograms of recordings"),
        (flags(spectrogram_checkpoint, dataset), "spectrograms of recordings", "32 wide"),
        (flags(best, dataset, "--prompt=Who?"), "--prompt", "add --model"),
        (flags(best, dataset, "--max_new_tokens=5"), "--max_new_tokens", "add --model"),
        (flags(best, dataset, "--language=en"), "--language", "add --model"),
        (flags(best, dataset, "--model=x"), "no recordings with transcripts"),
        (flags(spectrogram_checkpoint, recordings, "--model=gone"), "cannot load a model", "gone"),
        (flags("gone.pt", dataset), "no checkpoint at gone.pt"),
    ):
        assert_fails(capsys, argv, *words)


@pytest.mark.parametrize(
    ("source", "words"),
    [({"kind": "speech"}, "simulated features and gets speech features"),
     ({"encoder": "a/b"}, "features of None and gets features of b"), ({}, "")])  # fmt: skip
def test_evaluate_warns_of_other_features(source, words, best, own_dataset, capsys):
    edit_json(own_dataset / "dataset.json", lambda about: about.update(source))
    argv = ["evaluate", f"--checkpoint={best}", f"--data_dir={own_dataset}", *CPU_FLAGS]
    assert ssm.main(argv) == 0
    errors = capsys.readouterr().err
    assert words in errors and errors.count("warning:") == bool(words)


def test_evaluate_cannot_write(best, dataset, tmp_path, capsys):
    argv = ["evaluate", f"--checkpoint={best}", f"--data_dir={dataset}", *CPU_FLAGS]
    for flag in ("json", "picture"):
        path = tmp_path / "missing" / "out.png"
        assert_fails(capsys, [*argv, f"--{flag}={path}"], path)


# --------------------------------------------------------------------------------------------------
# infer


@pytest.fixture
def mixture_file(dataset):
    return next((dataset / "val/mixed").glob("*.npy"))


def infer_flags(checkpoint, source, output, *more):
    return ["infer", f"--checkpoint={checkpoint}", f"--input={source}", f"--output_dir={output}",
            *CPU_FLAGS, *map(str, more)]  # fmt: skip


def check_separation(folder, separator, features, active):
    """The folder holds these streams, in this order, and says so."""
    result = json.loads((folder / "separation.json").read_text())
    with torch.no_grad():
        streams, probs = separator(features[None])
    names = [f"speaker_{n}.npy" for n in range(1, len(active) + 1)]
    assert sorted(path.name for path in folder.glob("*.npy")) == names
    for name, stream in zip(names, active, strict=True):
        saved = np.load(folder / name)
        assert saved.dtype == np.float32
        np.testing.assert_allclose(saved, streams[0, stream].numpy(), rtol=1e-4, atol=1e-5)
    assert result["num_speakers"] == len(active)
    assert result["probabilities"] == pytest.approx(probs[0].tolist(), abs=1e-4)
    assert [row["file"] for row in result["speakers"]] == names
    assert [row["stream"] for row in result["speakers"]] == active
    assert (folder / "separation.png").is_file()
    return result


def test_infer_writes_active_talkers_only(best, mixture_file, tmp_path, capsys):
    separator, features = ssm.load_separator(best), torch.from_numpy(np.load(mixture_file))
    probs = ssm.separate(separator, features).probabilities.tolist()
    threshold = (sorted(probs)[0] + sorted(probs)[1]) / 2  # leaves out the least likely
    active = [s for s, p in enumerate(probs) if p >= threshold]
    assert ssm.main(infer_flags(best, mixture_file, tmp_path, f"--threshold={threshold}")) == 0
    result = check_separation(tmp_path, separator, features, active)
    assert len(active) == len(probs) - 1
    assert result["num_frames"] == FRAMES
    assert f"{len(active)} talkers" in capsys.readouterr().out


@pytest.mark.parametrize("count", [1, 2])
def test_infer_known_count_removes_stale_files(count, best, mixture_file, tmp_path, capsys):
    for name in ("speaker_1.npy", "speaker_7.npy", "speaker_12.npy", "speaker_notes.txt",
                 "separation.json", ".separation/speaker_3.npy"):  # the last one of a killed run
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"old")
    assert ssm.main(infer_flags(best, mixture_file, tmp_path, f"--num_speakers={count}")) == 0
    separator, features = ssm.load_separator(best), torch.from_numpy(np.load(mixture_file))
    likeliest = separator(features[None])[1][0].argsort(descending=True)[:count]
    check_separation(tmp_path, separator, features, sorted(likeliest.tolist()))
    assert (tmp_path / "speaker_notes.txt").read_bytes() == b"old"
    assert f"replacing the earlier separation in {tmp_path}" in capsys.readouterr().out


def test_infer_leaves_files_of_another_origin(best, mixture_file, tmp_path):
    (tmp_path / "speaker_7.wav").write_bytes(b"mine")
    assert ssm.main(infer_flags(best, mixture_file, tmp_path)) == 0
    assert (tmp_path / "speaker_7.wav").read_bytes() == b"mine"


def test_infer_uses_the_checkpoints_threshold(mixture_file, tmp_path):
    for threshold, count in ((0.0, 3), (1.0, 0)):
        path = tmp_path / "model.pt"
        separator = tiny_separator(threshold=threshold)
        save_tiny_checkpoint(path, separator)
        assert ssm.main(infer_flags(path, mixture_file, tmp_path / "out")) == 0
        features = torch.from_numpy(np.load(mixture_file))
        check_separation(tmp_path / "out", separator, features, list(range(count)))


def test_infer_hidden_features(qwen_folder, qwen_checkpoint, tmp_path, capsys):
    """The encoder and layer come from the checkpoint, or from the flags."""
    wave = sine(0.5, 200, 8000)
    source = write_wav(tmp_path / "mixture.wav", np.stack([wave, wave], 1), 8000)  # stereo
    argv = infer_flags(qwen_checkpoint, source, tmp_path / "out", "--threshold=0")
    separator = ssm.load_separator(qwen_checkpoint)
    for flags, layer in (([], 1), (["--layer=0"], 0), ([f"--encoder={qwen_folder}"], 1)):
        assert ssm.main([*argv, *flags]) == 0
        encoder = audio.load_audio_encoder(str(qwen_folder), layer)
        features = encoder.encode([audio.read_audio(source)])[0]
        assert features.shape == (25, WIDTH)
        with torch.no_grad():
            streams = separator(features[None])[0][0]
        for stream, expected in enumerate(streams, start=1):
            saved = np.load(tmp_path / f"out/speaker_{stream}.npy")
            np.testing.assert_allclose(saved, expected.numpy(), rtol=1e-4, atol=1e-5)
    result = json.loads((tmp_path / "out/separation.json").read_text())
    assert (result["num_frames"], result["frame_rate"], result["num_windows"]) == (25, 50.0, 1)
    assert not list((tmp_path / "out").glob("*.wav"))  # features are not audio


@pytest.fixture
def even_checkpoint(tmp_path):
    """A spectrogram separator with streams about 22 dB below the mixture, before they share it."""
    separator = tiny_spectrogram_separator()
    with torch.no_grad():
        separator.output[1].bias.fill_(-8)
    return save_tiny_checkpoint(tmp_path / "even.pt", separator)


@pytest.mark.pictures
def test_infer_audio(even_checkpoint, recording, tmp_path, capsys):
    out = tmp_path / "out"
    assert ssm.main(infer_flags(even_checkpoint, recording, out, "--num_speakers=2")) == 0
    assert "2 talkers (probabilities 0." in (printed := capsys.readouterr().out)
    assert f"separator {even_checkpoint}" in printed
    assert sorted(path.name for path in out.iterdir()) == [
        "separation.json", "separation.png", "speaker_1.npy", "speaker_1.wav", "speaker_2.npy",
        "speaker_2.wav"]  # fmt: skip
    assert (out / "separation.png").read_bytes().startswith(PNG)
    result = json.loads((out / "separation.json").read_text())
    assert (result["num_speakers"], result["num_frames"], result["frame_rate"]) == (2, 30, 100)
    assert result["input"] == str(recording) and result["checkpoint"] == str(even_checkpoint)
    samples, separator = audio.read_audio(recording), ssm.load_separator(even_checkpoint)
    mixture = audio.log_mel(torch.from_numpy(samples))[:30]
    with torch.no_grad():
        gains, probs = separator.gains(mixture[None])
    likeliest = sorted(probs[0].argsort(descending=True)[:2].tolist())
    for number, stream in enumerate(likeliest, start=1):
        row = result["speakers"][number - 1]
        assert (row["file"], row["audio"]) == (f"speaker_{number}.npy", f"speaker_{number}.wav")
        assert row["probability"] == pytest.approx(probs[0, stream].item(), abs=1e-4)
        assert row["windows"][0]["end"] == 0.3
        expected = audio.floor_log_mel(mixture + gains[0, stream]).numpy()
        saved = np.load(out / row["file"])
        assert saved.dtype == np.float32
        np.testing.assert_allclose(saved, expected, atol=1e-4)
        heard = audio.read_audio(out / row["audio"])
        assert len(heard) == len(samples)
        loss = 20 * np.log10(np.std(samples) / np.std(heard))
        assert loss == pytest.approx(-40 * gains[0, stream].mean().item(), abs=0.5)
        assert 1.5 < loss < 5  # three that are not sure to be talkers: less than 4.8 dB


def test_infer_spectrogram(spectrogram_checkpoint, tmp_path):
    """A spectrogram with any number of bins, as features [T, D]."""
    features = torch.rand(23, 128)
    np.save(tmp_path / "mel.npy", features.numpy())
    out = tmp_path / "out"
    assert ssm.main(infer_flags(spectrogram_checkpoint, tmp_path / "mel.npy", out,
                                "--threshold=0")) == 0  # fmt: skip
    separator = ssm.load_separator(spectrogram_checkpoint)
    check_separation(out, separator, features, [0, 1, 2])


@pytest.mark.parametrize("kind", ["features", "audio"])
def test_infer_leaves_its_own_input(kind, best, spectrogram_checkpoint, mixture_file, recording,
                                    tmp_path, capsys):  # fmt: skip
    """What was separated before, and lies in the output folder, may be separated again."""
    out = tmp_path / "out"
    out.mkdir()
    suffix, checkpoint, source = {"features": ("npy", best, mixture_file),
                                  "audio": ("wav", spectrogram_checkpoint, recording)}[kind]
    old, own = out / f"speaker_7.{suffix}", out / f"speaker_2.{suffix}"
    for path in (old, own):
        shutil.copy(source, path)
    (out / "separation.json").write_text("{}")
    untouched = Untouched(old, own)
    argv = infer_flags(checkpoint, own, out, "--num_speakers=2")
    assert_fails(capsys, argv, own, "overwritten", "--output_dir")
    untouched.check()
    assert len(list(out.iterdir())) == 3
    assert ssm.main(infer_flags(checkpoint, old, out, "--num_speakers=1")) == 0
    assert old.read_bytes() == source.read_bytes()
    assert not own.exists()  # of an earlier run with two talkers


def test_infer_spares_files_of_another_origin(
    spectrogram_checkpoint, recording, tmp_path, capsys
):
    """Recordings may be named as results are: without a separation.json they are none."""
    out = tmp_path / "out"
    out.mkdir()
    first, last = out / "speaker_1.wav", out / "speaker_9.wav"
    shutil.copy(recording, first)
    shutil.copy(recording, last)
    untouched = Untouched(first, last)
    argv = infer_flags(spectrogram_checkpoint, recording, out, "--num_speakers=2")
    assert_fails(capsys, argv, first, "--output_dir")
    untouched.check()
    picture = first.rename(out / "separation.png")
    assert_fails(capsys, argv, picture, "--output_dir")
    picture.unlink()
    assert ssm.main(argv) == 0
    assert last.read_bytes() == recording.read_bytes()


def test_samples_at_another_rate(spectrogram_checkpoint):
    separator, options = ssm.load_separator(spectrogram_checkpoint), {"threshold": 0.0}
    samples = sine(0.5, 300, rate=3 * RATE)
    about, mixture, talkers = ssm.infer_recording(
        samples, separator, sampling_rate=3 * RATE, **options)
    _, same, others = ssm.infer_recording(audio.read_audio(samples, 3 * RATE), separator, **options)
    assert torch.equal(mixture, same) and len(mixture) == about["frame_rate"] / 2
    assert all(torch.equal(a[2], b[2]) for a, b in zip(talkers, others, strict=True))


def test_talkers_of_a_loud_recording_keep_their_levels(
    spectrogram_checkpoint, recording, monkeypatch
):
    """Beyond full scale all are turned down by the same factor, wherever they are heard."""
    levels = iter((2.0, 0.5))
    monkeypatch.setattr(audio, "apply_gains", lambda *_: torch.full((1, 640), next(levels)))
    separator = ssm.load_separator(spectrogram_checkpoint)
    _, _, talkers = ssm.infer_recording(recording, separator, None, 0.0, num_speakers=2)
    assert [float(samples.max()) for *_, samples in talkers] == [1.0, 0.25]


def test_default_checkpoints(best, spectrogram_checkpoint, mixture_file, recording, recordings,
                             dataset, tmp_path, monkeypatch, capsys):  # fmt: skip
    """Features go to what was trained last, audio to the separator that comes with the source."""
    shipped = tmp_path / "pretrained"
    ssm.export_separator(ssm.load_separator(spectrogram_checkpoint), shipped)
    monkeypatch.setattr(ssm, "SHIPPED_SEPARATOR", shipped)
    (tmp_path / "checkpoints").mkdir()
    shutil.copy(best, tmp_path / "checkpoints")
    for argv, used in (
        (["infer", f"--input={mixture_file}"], "checkpoints/best_model.pt"),
        (["infer", f"--input={recording}"], shipped),
        (["evaluate", f"--data_dir={dataset}"], "checkpoints/best_model.pt"),
        (["evaluate", f"--data_dir={recordings}"], shipped),
    ):
        assert ssm.main([*argv, *CPU_FLAGS]) == 0
        assert f"separator {used}" in capsys.readouterr().out


def test_without_the_default_checkpoints(mixture_file, recording, recordings, qwen_folder,
                                         tmp_path, monkeypatch, capsys):  # fmt: skip
    shipped = tmp_path / "pretrained"
    monkeypatch.setattr(ssm, "SHIPPED_SEPARATOR", shipped)
    for argv, missing in (
        (["infer", f"--input={mixture_file}"], "no checkpoint at checkpoints/best_model.pt"),
        (["infer", f"--input={recording}"], f"no separator at {shipped}"),
        (["evaluate", f"--data_dir={recordings}"], f"no separator at {shipped}"),
        (["integrate", f"--model={qwen_folder}", f"--audio={recording}"],
         f"no separator at {shipped}"),
    ):
        assert_fails(capsys, [*argv, *CPU_FLAGS], missing, "train one")


def npy(change):
    def make(folder):
        path = folder / "input.npy"
        np.save(path, change(np.ones((FRAMES, WIDTH), np.float32)))
        return path

    return make


def wav(samples):
    """A recording: samples in a .wav file, or bytes that are none."""

    def make(folder):
        path = folder / "input.wav"
        if isinstance(samples, bytes):
            path.write_bytes(samples)
            return path
        return write_wav(path, samples)

    return make


BAD_AUDIO = {
    "missing": (lambda folder: folder / "gone.wav", "no such audio file"),
    "a folder": (lambda folder: folder, "no such audio file"),
    "empty file": (wav(b""), "cannot read audio"),
    "not audio": (wav(b"these are words"), "cannot read audio"),
    "no samples": (wav(np.zeros(0, np.float32)), "no samples"),
    "too short": (wav(np.full(160, 0.1, np.float32)), "lasts 10 ms"),
}


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda folder: folder / "gone.npy", "gone.npy"),
        (npy(lambda a: a[0]), "[T, D]"),
        (npy(lambda a: a[None]), "[T, D]"),
        (npy(lambda a: a[:0]), "[T, D]"),
        (npy(lambda a: a[:, 1:]), str(WIDTH - 1)),
        (npy(lambda a: a.T), f"save them as [T, {WIDTH}], transposed"),
        (npy(lambda a: a.astype(np.int16)), "int16"),
        (npy(lambda a: a * np.nan), "NaN"),
    ],
)
def test_infer_bad_features(make, words, best, tmp_path, capsys):
    assert_fails(capsys, infer_flags(best, make(tmp_path), tmp_path / "out"), words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", BAD_AUDIO)
def test_infer_bad_audio(kind, spectrogram_checkpoint, qwen_checkpoint, tmp_path, capsys):
    make, words = BAD_AUDIO[kind]
    for checkpoint in (spectrogram_checkpoint, qwen_checkpoint):
        argv = infer_flags(checkpoint, make(tmp_path), tmp_path / "out")
        assert_fails(capsys, argv, words)
        assert not (tmp_path / "out").exists()


def test_infer_refusals(best, mixture_file, qwen_checkpoint, spectrogram_checkpoint, recording,
                        tmp_path, capsys):  # fmt: skip
    (tmp_path / "file").write_text("in the way")
    np.save(tmp_path / "whispers_own.npy", np.zeros((80, 30), np.float32))
    (tmp_path / "empty").mkdir()
    out = tmp_path / "out"
    for argv, *words in (
        (infer_flags(best, tmp_path / "empty", out), "is a folder", "name one file"),
        (infer_flags(best, tmp_path / "a.npz", out), "a.npz is an archive", "as .npy"),
        (infer_flags(spectrogram_checkpoint, tmp_path / "whispers_own.npy", out),
         "80 or 128; save them as [T, 80], transposed"),
        (infer_flags(best, recording, out), "simulated features", "spectrogram separator"),
        (infer_flags(best, recording, out, f"--encoder={tmp_path}"), tmp_path),
        (infer_flags(qwen_checkpoint, recording, out, "--layer=9"), "layer must be 0 to 2"),
        (infer_flags(spectrogram_checkpoint, recording, out, "--layer=1"), "--layer", "hidden"),
        (infer_flags(spectrogram_checkpoint, recording, out, "--encoder=x"), "--encoder", "hidden"),
        (infer_flags(best, mixture_file, out, "--encoder=x"), "--encoder", "audio"),
        (infer_flags(best, mixture_file, out, "--num_speakers=4"), "num_speakers", "0 to 3"),
        (infer_flags(tmp_path / "gone.pt", mixture_file, out), "gone.pt"),
        (infer_flags(tmp_path, mixture_file, out), tmp_path),
        (infer_flags("no-such-user/no-such-model", mixture_file, out), "no-such-model"),
        (infer_flags(best, mixture_file, tmp_path / "file"), "cannot write to", "file"),
        (infer_flags(best, mixture_file, tmp_path / "file" / "out"), "cannot write to"),
    ):
        assert_fails(capsys, argv, *words)
        assert not out.exists()


# --------------------------------------------------------------------------------------------------
# integrate


def integrate_flags(model, checkpoint, recordings, *more):
    return ["integrate", f"--model={model}", f"--checkpoint={checkpoint}", *CPU_FLAGS,
            "--max_new_tokens=4", "--audio", *map(str, recordings), *map(str, more)]  # fmt: skip


@pytest.mark.parametrize("kind", ["hidden features", "spectrograms"])
def test_integrate(kind, qwen_folder, qwen_checkpoint, spectrogram_checkpoint, tmp_path, capsys):
    checkpoint = qwen_checkpoint if kind == "hidden features" else spectrogram_checkpoint
    recordings = [write_wav(tmp_path / f"{pitch}.wav", sine(0.4, pitch)) for pitch in (150, 400)]
    answers = tmp_path / "answers.json"
    argv = integrate_flags(qwen_folder, checkpoint, recordings, f"--json={answers}")
    assert ssm.main([*argv, "--threshold=0", "--prompt=Who speaks?"]) == 0
    printed = capsys.readouterr().out
    assert f"separator {checkpoint}" in printed
    content = json.loads(answers.read_text())
    assert list(content) == [str(path) for path in recordings]
    for path, rows in content.items():
        assert path in printed
        assert [row["speaker"] for row in rows] == [1, 2, 3]
        for row in rows:
            line = f"Speaker {row['speaker']} ({row['probability']:.2f}): {row['text']}"
            assert line.strip() in printed


def test_integrate_goes_on_in_a_file_of_lines(
    whisper_folder, spectrogram_checkpoint, tmp_path, capsys
):
    recordings = [write_wav(tmp_path / f"{pitch}.wav", sine(0.4, pitch)) for pitch in (150, 400)]
    lines = tmp_path / "answers.jsonl"
    argv = integrate_flags(whisper_folder, spectrogram_checkpoint, recordings,
                           f"--jsonl={lines}", "--threshold=0")  # fmt: skip
    assert ssm.main(argv) == 0
    whole = lines.read_text()
    rows = [json.loads(line) for line in whole.splitlines()]
    assert [row["input"] for row in rows] == [str(path) for path in recordings]
    assert all([talker["speaker"] for talker in row["answers"]] == [1, 2, 3] for row in rows)
    first = whole.index("\n") + 1
    lines.write_text(whole[: first + 30])  # killed while it wrote the second line
    capsys.readouterr()
    assert ssm.main(argv) == 0
    assert lines.read_text() == whole
    printed = capsys.readouterr().out
    assert "150.wav" not in printed and "has 1 of 2 recordings already" in printed
    lines.write_text(whole[:-1])  # as an editor leaves it
    capsys.readouterr()
    slashes = [f"--model={whisper_folder}/", f"--checkpoint={spectrogram_checkpoint}/"]
    for more in ([], slashes):
        assert ssm.main([*argv, *more]) == 0 and lines.read_text() == whole
        assert "every recording already" in capsys.readouterr().out
    answers = tmp_path / "answers.json"
    assert ssm.main([*argv, f"--json={answers}"]) == 0  # what was answered before is in it
    assert json.loads(answers.read_text()) == {row["input"]: row["answers"] for row in rows}
    assert_fails(capsys, [*argv, f"--json={lines}"], "the same file")
    shutil.copytree(whisper_folder, tmp_path / "other")
    assert_fails(capsys, [*argv, f"--model={tmp_path / 'other'}"], "another model's answers")
    lines.unlink()
    assert ssm.main([*argv, f"--audio={recordings[0]}"]) == 0  # named twice, answered once
    assert lines.read_text() == whole
    infer = infer_flags(spectrogram_checkpoint, recordings[0], tmp_path / "out")
    assert_fails(capsys, [*infer, f"--jsonl={lines}"], "answers.jsonl", "another command")
    for line, words in (("[1]", "--jsonl"), ('{"a": 1}', "another command"),
                        ('{"input": [1], "answers": []}', "--jsonl")):
        lines.write_text(line)
        assert_fails(capsys, argv, "answers.jsonl", words)
        assert lines.read_text() == line


def test_infer_folder(spectrogram_checkpoint, tmp_path, capsys):
    recordings = [write_wav(tmp_path / "meetings" / name, sine(0.4, pitch))
                  for name, pitch in (("150.wav", 150), ("400.aiff", 400))]
    out, lines = tmp_path / "out", tmp_path / "lines.jsonl"
    argv = infer_flags(
        spectrogram_checkpoint, tmp_path / "meetings", out, f"--jsonl={lines}", "--threshold=0")
    assert ssm.main(argv) == 0
    for path in recordings:
        assert len(list((out / path.name).glob("speaker_*.wav"))) == 3
    rows = [json.loads(line) for line in lines.read_text().splitlines()]
    assert [row["input"] for row in rows] == [str(path) for path in recordings]
    assert all(row["num_speakers"] == len(row["probabilities"]) == 3 for row in rows)
    shutil.rmtree(out)
    lines.write_text(json.dumps(rows[0]) + "\n")
    assert ssm.main(argv) == 0
    assert [path.name for path in out.iterdir()] == ["400.aiff"]
    (tmp_path / "empty").mkdir()
    assert_fails(capsys, infer_flags(spectrogram_checkpoint, tmp_path / "empty", out), "a folder")
    for name in ("200.wav", "300.wav"):  # each that cannot be read is named
        (tmp_path / "meetings" / name).touch()
    assert_fails(capsys, infer_flags(spectrogram_checkpoint, tmp_path / "meetings", out),
                 "200.wav", "; ", "300.wav")


def test_lines_of_other_options_are_not_answers(
    spectrogram_checkpoint, recording, whisper_folder, tmp_path, capsys
):
    """Those of a call without an option are not what a call with it asks for, nor of another."""
    lines = tmp_path / "lines.jsonl"
    calls = [
        infer_flags(spectrogram_checkpoint, recording, tmp_path / "out", f"--jsonl={lines}"),
        integrate_flags(whisper_folder, spectrogram_checkpoint, [recording], f"--jsonl={lines}")]
    copied = shutil.copy(spectrogram_checkpoint, tmp_path / "other.pt")
    for argv, others in zip(calls, (["--threshold=0.3"], ["--max_new_tokens=5"]), strict=True):
        assert ssm.main(argv) == 0
        before = lines.read_text()
        for option in (*others, "--num_speakers=1", f"--checkpoint={copied}"):
            name = option.split("=")[0]
            assert_fails(capsys, [*argv, option], "lines.jsonl", f"with another {name}")
        assert lines.read_text() == before
        row = json.loads(before)  # as earlier versions wrote it, without one option and without all
        del row["options"]["num_speakers"]
        lines.write_text(json.dumps(row) + "\n")
        assert_fails(capsys, [*argv, "--num_speakers=1"], "with another --num_speakers")
        del row["options"]
        lines.write_text(json.dumps(row) + "\n")
        assert ssm.main([*argv, "--num_speakers=1"]) == 0
        assert "every recording already" in capsys.readouterr().out
        lines.unlink()


def test_infer_leaves_out_its_own_talkers_and_says_what_it_cannot_read(
    spectrogram_checkpoint, recording, tmp_path, capsys
):
    folder = tmp_path / "meetings"
    assert ssm.main(infer_flags(spectrogram_checkpoint, recording, folder, "--threshold=0")) == 0
    assert len(list(folder.glob("speaker_*.wav"))) == 3
    shutil.copy(recording, folder / "first.wav")
    (folder / "second.M4A").write_bytes(b"")
    out = tmp_path / "out"
    assert ssm.main(infer_flags(spectrogram_checkpoint, folder, out)) == 0
    assert [path.name for path in out.iterdir()] == ["first.wav"]
    assert f"left out the .m4a files in {folder}" in capsys.readouterr().out


@pytest.mark.parametrize(("rate", "warned"), [(8000, True), (11025, False)])
def test_half_a_band_is_warned_of(
    rate, warned, spectrogram_checkpoint, whisper_folder, tmp_path, capsys
):
    path = write_wav(tmp_path / "call.wav", sine(0.4, 150, rate), rate)
    for argv in (infer_flags(spectrogram_checkpoint, path, tmp_path / "out"),
                 integrate_flags(whisper_folder, spectrogram_checkpoint, [path])):
        assert ssm.main(argv) == 0
        errors = capsys.readouterr().err
        assert (f"{path} has 8000 samples a second, nothing above 4 kHz" in errors) is warned


@pytest.mark.parametrize("channels", [1, 2])
def test_a_talker_per_channel_is_warned_of(channels, spectrogram_checkpoint, tmp_path, capsys):
    path, call = tmp_path / "call.wav", np.zeros((32000, channels))
    call[:16000, 0], call[16000:, -1] = sine(1, 150), sine(1, 250)
    soundfile.write(path, call, 16000)
    assert ssm.main(infer_flags(spectrogram_checkpoint, path, tmp_path / "out")) == 0
    warning = f"warning: {path} seems to have a talker per channel"
    assert (warning in capsys.readouterr().err) is (channels == 2)


def test_a_folder_of_results_that_is_a_file(
    spectrogram_checkpoint, recording, tmp_path, capsys, monkeypatch
):
    """The input's own folder is none to write to, which is said before anything is separated."""
    monkeypatch.delattr(ssm, "infer_file")
    argv = infer_flags(spectrogram_checkpoint, recording.parent, recording.parent)
    assert_fails(capsys, argv, "cannot write to", recording, "--output_dir")


def test_infer_keeps_what_is_listed(spectrogram_checkpoint, recording, tmp_path, capsys):
    """A second input must not take the folder of the first, which --jsonl says is done."""
    out, lines = tmp_path / "out", tmp_path / "lines.jsonl"
    other = write_wav(tmp_path / "other.wav", sine(0.4, 300))
    argv = infer_flags(spectrogram_checkpoint, recording, out, f"--jsonl={lines}")
    assert ssm.main(argv) == 0
    before = {path: path.read_bytes() for path in [lines, *out.iterdir()]}
    assert_fails(capsys, [*argv, f"--input={other}"], out, recording, "another --output_dir")
    assert {path: path.read_bytes() for path in before} == before


def test_infer_reads_a_folder_before_it_writes(spectrogram_checkpoint, tmp_path, capsys):
    for name, samples in (("1.wav", sine(0.4, 150)), ("2.wav", sine(0.4, 150)[:300])):
        write_wav(tmp_path / "meetings" / name, samples)
    argv = infer_flags(spectrogram_checkpoint, tmp_path / "meetings", tmp_path / "out")
    assert_fails(capsys, argv, "2.wav", "lasts 19 ms")
    for name, width in (("1.npy", 80), ("2.npy", 0)):
        path = tmp_path / "features" / name
        path.parent.mkdir(exist_ok=True)
        np.save(path, np.zeros((9, width), np.float32))
    argv = infer_flags(spectrogram_checkpoint, tmp_path / "features", tmp_path / "out")
    assert_fails(capsys, argv, "2.npy", "must hold [T, D] features")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("flag", "rows"), [("--num_speakers=2", 2), ("--threshold=1", 0)])
def test_integrate_count(flag, rows, qwen_folder, qwen_checkpoint, tmp_path, capsys):
    recording = write_wav(tmp_path / "a.wav", sine(0.4, 150))
    assert ssm.main(integrate_flags(qwen_folder, qwen_checkpoint, [recording], flag)) == 0
    printed = capsys.readouterr().out
    assert printed.count("Speaker ") == rows
    assert ("no talker found" in printed) is (rows == 0)


def test_integrate_out_of_memory(qwen_folder, qwen_checkpoint, recording, monkeypatch, capsys):
    """Errors from outside this project's files are a model's fault, but not this one."""
    def answer(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("long_recordings.answer_per_talker", answer)
    argv = ["integrate", f"--model={qwen_folder}", f"--audio={recording}", *CPU_FLAGS]
    assert_fails(capsys, [*argv, f"--checkpoint={qwen_checkpoint}"], "shorter recordings")


def test_a_model_draws_the_same_every_time():
    """A Whisper that repeats itself decodes again at a higher temperature."""
    draws = []
    for seed in (1, 2):
        state = torch.manual_seed(seed).get_state()
        with ssm.running("model"):
            draws.append(torch.rand(3))
        assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(*draws)


@pytest.mark.parametrize("language", ["de", "german", "<|de|>"])
def test_a_language_by_code_or_name(language):
    config = SimpleNamespace(lang_to_id={"<|en|>": 0, "<|de|>": 1})
    ssm.check_language("model", language, config)
    with pytest.raises(ValueError, match=f"model writes no '{re.escape(language)}'"):
        ssm.check_language("model", language, SimpleNamespace(lang_to_id={"<|en|>": 0}))


def test_integrate_prints_no_warnings_of_others(qwen_folder, qwen_checkpoint, recording, tmp_path):
    """Transformers warns of max_length beside max_new_tokens, which no flag of ours can mend."""
    model = shutil.copytree(qwen_folder, tmp_path / "model")
    edit_json(model / "generation_config.json", lambda config: config.update(max_length=9))
    argv = integrate_flags(model, qwen_checkpoint, [recording], "--threshold=0")
    done = subprocess.run(
        [sys.executable, ROOT / "speaker_separator_module.py", *argv], capture_output=True,
        text=True, timeout=120, env=os.environ | {"HF_HUB_OFFLINE": "1"})  # fmt: skip
    assert done.returncode == 0 and done.stderr == ""


@pytest.mark.parametrize(
    ("source", "given", "words"),
    [({"kind": "simulated", "layer": None}, [], "simulated features and gets speech features"),
     ({"kind": "speech", "layer": 1}, ["--layer=2"], "gets features after layer 2"),
     ({"kind": "speech", "layer": 1}, [], "")])  # fmt: skip
def test_integrate_warns_of_other_features(source, given, words, qwen_folder, recording, tmp_path,
                                           capsys):  # fmt: skip
    checkpoint = save_tiny_checkpoint(tmp_path / "a.pt", tiny_separator(feature_source=source))
    assert ssm.main(integrate_flags(qwen_folder, checkpoint, [recording], *given)) == 0
    errors = capsys.readouterr().err
    assert words in errors
    assert errors.count("warning") == len(errors.splitlines()) == bool(words)


@pytest.mark.parametrize("kind", BAD_AUDIO)
def test_integrate_bad_audio(kind, qwen_folder, qwen_checkpoint, tmp_path, capsys):
    make, words = BAD_AUDIO[kind]
    assert_fails(capsys, integrate_flags(qwen_folder, qwen_checkpoint, [make(tmp_path)]), words)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--layer=7"], "layer must be 0 to 2"),
        (["--num_speakers=5"], "0 to 3"),
        (["--prompt=<|AUDIO|> Who speaks?"], "--prompt must not hold <|AUDIO|>"),
        (["--json=/proc/missing/answers.json"], "/proc/missing"),
        (["--checkpoint=gone.pt"], "gone.pt"),
        (["--model=no-such-user/no-such-model"], "no-such-user/no-such-model"),
    ],
)
def test_integrate_refusals(flags, words, qwen_folder, qwen_checkpoint, recording, capsys):
    assert_fails(capsys, integrate_flags(qwen_folder, qwen_checkpoint, [recording], *flags), words)


def test_integrate_looks_for_recordings_before_it_loads_a_separator(qwen_folder, tmp_path, capsys):
    argv = integrate_flags(qwen_folder, "gone.pt", [tmp_path / "gone.wav"])
    assert_fails(capsys, argv, "no such audio file", "gone.wav")


def test_integrate_refuses_before_the_model_is_loaded(
    whisper_folder, spectrogram_checkpoint, recording, capsys, monkeypatch
):
    def load(*args, **kwargs):
        pytest.fail("loads the model")

    monkeypatch.setattr(audio, "load_model", load)
    for flags, words in ((["--prompt=Who?"], "Whisper takes no prompt"),
                         (["--mode=joint"], "--mode=joint"),
                         (["--layer=1"], "--layer is for separators of hidden features")):
        argv = integrate_flags(whisper_folder, spectrogram_checkpoint, [recording], *flags)
        assert_fails(capsys, argv, words)


def test_integrate_separator_of_other_width(qwen_folder, recording, tmp_path, capsys):
    wide = save_tiny_checkpoint(tmp_path / "wide.pt", tiny_separator(3, feature_dim=64))
    assert_fails(capsys, integrate_flags(qwen_folder, wide, [recording]), "64", "32")


@pytest.mark.parametrize("kind", ["empty", "truncated"])
def test_integrate_bad_model(kind, qwen_folder, qwen_checkpoint, recording, tmp_path, capsys):
    folder = tmp_path / "model"
    shutil.copytree(qwen_folder, folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    if kind == "empty":
        shutil.rmtree(folder)
        folder.mkdir()
    assert_fails(capsys, integrate_flags(folder, qwen_checkpoint, [recording]), folder)


def test_integrate_model_of_another_kind(
    qwen_folder, qwen_checkpoint, recording, tmp_path, capsys, monkeypatch
):
    """Seen in its configuration: reading it as Qwen2-Audio fills 30 GB with random weights."""
    from transformers import Qwen2AudioForConditionalGeneration

    def build(*args, **kwargs):
        pytest.fail("builds a random 7B model")

    monkeypatch.setattr(Qwen2AudioForConditionalGeneration, "from_pretrained", build)
    folder = shutil.copytree(qwen_folder, tmp_path / "other")
    (folder / "config.json").write_text(json.dumps({"model_type": "wav2vec2"}))
    argv = integrate_flags(folder, qwen_checkpoint, [recording])
    assert_fails(capsys, argv, folder, "wav2vec2, not Qwen2-Audio or Whisper")


# --------------------------------------------------------------------------------------------------
# From recordings to answers


def test_recordings_from_end_to_end(speech_dir, qwen_folder, tmp_path, capsys):
    """Generate, train, evaluate, infer and integrate: one separator for any model."""
    data, folder, out = tmp_path / "data", tmp_path / "run", tmp_path / "out"
    assert generator.main([
        f"--speech_dir={speech_dir}", "--max_speakers=2", "--train_samples=4", "--val_samples=2",
        "--split_by=utterance", f"--output_dir={data}"]) == 0  # fmt: skip
    assert ssm.main(train_flags(data, folder, "--dim=16", "--max_speakers=3")) == 0
    best, mixed = folder / "best_model.pt", data / "val/mixed/val_00000.wav"
    loss = torch.load(best)["train_history"][0]["val"]
    assert loss["total"] == pytest.approx(loss["separation"] + 0.02 * loss["activity"], rel=1e-5)
    assert ssm.load_separator(best).max_speakers == 3
    assert ssm.main(["evaluate", f"--checkpoint={best}", f"--data_dir={data}", *CPU_FLAGS]) == 0
    assert ssm.main(infer_flags(best, mixed, out, "--num_speakers=2")) == 0
    assert len(audio.read_audio(out / "speaker_2.wav")) == len(audio.read_audio(mixed))
    capsys.readouterr()
    assert ssm.main(integrate_flags(qwen_folder, best, [mixed], "--num_speakers=2")) == 0
    assert capsys.readouterr().out.count("Speaker ") == 2


def test_hidden_features_from_end_to_end(speech_dir, qwen_folder, tmp_path, capsys):
    """The same after block 1 of a real encoder."""
    data, folder, out = tmp_path / "data", tmp_path / "run", tmp_path / "out"
    assert generator.main([
        f"--speech_dir={speech_dir}", f"--encoder={qwen_folder}", "--layer=1",
        "--max_speakers=2", "--train_samples=4", "--val_samples=2", "--device=cpu",
        "--split_by=utterance", f"--output_dir={data}"]) == 0  # fmt: skip
    assert ssm.main(train_flags(data, folder)) == 0
    best, mixed = folder / "best_model.pt", data / "val/mixed/val_00000"
    loss, separator = torch.load(best)["train_history"][0]["val"], ssm.load_separator(best)
    # features of a real encoder do not add up, so nothing in the loss says they do
    assert loss["total"] == pytest.approx(loss["separation"] + 0.5 * loss["activity"], rel=1e-5)
    assert separator.max_speakers == 2
    assert separator.feature_source["encoder"] == str(qwen_folder)
    assert separator.feature_source["layer"] == 1
    assert ssm.main(["evaluate", f"--checkpoint={best}", f"--data_dir={data}", *CPU_FLAGS]) == 0
    features = torch.from_numpy(np.load(f"{mixed}.npy"))
    assert ssm.main(infer_flags(best, f"{mixed}.npy", out, "--num_speakers=2")) == 0
    assert check_separation(out, separator, features, [0, 1])["frame_rate"] == 50.0
    saved = [np.load(out / f"speaker_{n}.npy") for n in (1, 2)]
    assert ssm.main(infer_flags(best, f"{mixed}.wav", out, "--num_speakers=2")) == 0
    for n, expected in enumerate(saved, start=1):
        np.testing.assert_allclose(np.load(out / f"speaker_{n}.npy"), expected, atol=1e-3)
    capsys.readouterr()
    argv = integrate_flags(qwen_folder, best, [f"{mixed}.wav"], "--num_speakers=2")
    assert ssm.main(argv) == 0
    assert capsys.readouterr().out.count("Speaker ") == 2
