"""The commands, in-process through main(): what they print and write, and how they refuse."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import (
    CPU_FLAGS,
    FRAMES,
    PNG,
    ROOT,
    SHORT_FLAGS,
    WIDTH,
    assert_fails,
    run,
    save_tiny_checkpoint,
    sine,
    tiny_separator,
    train_flags,
    write_wav,
)

import generate_multi_speaker_dataset as generator
import speaker_separator_module as ssm

COMMANDS = ["train", "evaluate", "infer", "integrate"]


@pytest.fixture
def recording(tmp_path):
    return write_wav(tmp_path / "recording.wav", sine(0.3, 300))


# --------------------------------------------------------------------------------------------------
# Help and parsing


@pytest.mark.parametrize("command", [*COMMANDS, "generate"])
def test_help(command, capsys):
    main, argv = (generator.main, []) if command == "generate" else (ssm.main, [command])
    assert run(main, [*argv, "--help"]) == 0
    text = capsys.readouterr().out
    description = text.split("\n\n")[1]
    assert description.strip().endswith(".")
    assert "example:" in text
    assert "(default:" in text


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


@pytest.mark.parametrize("command", COMMANDS)
def test_unknown_device(command, recording, tmp_path, capsys):
    needed = {"infer": ["--input=x.npy"], "integrate": ["--model=x", f"--audio={recording}"]}
    assert_fails(capsys, [command, *needed.get(command, []), "--device=tpu"], "tpu", "mps")
    assert list(tmp_path.iterdir()) == [recording]  # no default dataset, for one


@pytest.mark.parametrize("command", [*COMMANDS, "generate"])
def test_runs_as_a_script(command, tmp_path):
    script = [ROOT / "speaker_separator_module.py", command]
    if command == "generate":
        script = [ROOT / "generate_multi_speaker_dataset.py"]
    done = subprocess.run(
        [sys.executable, *script, "--help"],
        cwd=tmp_path, capture_output=True, text=True, timeout=60)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage:")
    assert not done.stderr
    assert not list(tmp_path.iterdir())


def test_import_is_light_and_silent(tmp_path):
    code = (
        "import sys, speaker_separator_module, generate_multi_speaker_dataset\n"
        "heavy = {'transformers', 'matplotlib', 'soundfile', 'soxr', 'jiwer', 'pyroomacoustics'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# --------------------------------------------------------------------------------------------------
# train


def test_train(dataset, tmp_path, capsys):
    assert ssm.main(train_flags(dataset, tmp_path / "run", "--epochs=2")) == 0
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names == {"best_model.pt", "checkpoint_epoch_2.pt", "training_report.md",
                     "training_curves.png"}  # fmt: skip
    output = capsys.readouterr().out
    assert all(name in output for name in names)
    assert output.count("epoch ") == 2


def test_train_makes_the_default_dataset(tmp_path, monkeypatch, capsys):
    calls, make = [], generator.main
    sizes = ["--feature_dim=32", "--seq_len=20", "--train_samples=2", "--val_samples=2"]

    def make_tiny(argv):
        calls.append(argv)
        return make([*argv, *sizes])

    monkeypatch.setattr(generator, "main", make_tiny)
    argv = ["train", "--epochs=1", *SHORT_FLAGS, *CPU_FLAGS]
    assert ssm.main(argv) == 0
    assert "making the default dataset" in capsys.readouterr().out
    assert (tmp_path / "checkpoints/best_model.pt").is_file()
    assert ssm.main(argv) == 0
    assert calls == [[]]  # the second run finds the dataset


def test_train_makes_no_dataset_elsewhere(tmp_path, capsys):
    argv = train_flags(tmp_path / "mistyped", tmp_path / "run")
    assert_fails(capsys, argv, tmp_path / "mistyped", "generate_multi_speaker_dataset.py")
    assert not (tmp_path / "mistyped").exists()


# --------------------------------------------------------------------------------------------------
# evaluate


def test_evaluate(best, dataset, tmp_path, capsys):
    outputs = [f"--json={tmp_path / 'scores.json'}", f"--picture={tmp_path / 'streams.png'}"]
    argv = ["evaluate", f"--checkpoint={best}", f"--data_dir={dataset}", *CPU_FLAGS, *outputs]
    assert ssm.main(argv) == 0
    printed = capsys.readouterr().out
    scores = json.loads((tmp_path / "scores.json").read_text())
    expected = ssm.evaluate_separator(
        ssm.load_separator(best), ssm.MultiSpeakerDataset(dataset, "val"))  # fmt: skip
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


def test_evaluate_with_a_known_count(best, dataset, tmp_path, capsys):
    argv = ["evaluate", f"--checkpoint={best}", f"--data_dir={dataset}", *CPU_FLAGS,
            "--split=train", f"--json={tmp_path / 'scores.json'}"]  # fmt: skip
    assert ssm.main([*argv, "--num_speakers=2", "--threshold=1"]) == 0
    scores = json.loads((tmp_path / "scores.json").read_text())
    counts = [s["num_speakers"] for s in json.loads((dataset / "train/metadata.json").read_text())]
    assert "4 mixtures" in (printed := capsys.readouterr().out) and "2 taken as known" in printed
    assert scores["count_accuracy"] == counts.count(2) / len(counts)
    assert_fails(capsys, [*argv, "--num_speakers=9"], "num_speakers must be 0 to")


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
    assert (folder / "separation.png").read_bytes().startswith(PNG)
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
def test_infer_known_count_removes_stale_files(count, best, mixture_file, tmp_path):
    for name in ("speaker_1.npy", "speaker_7.npy", "speaker_12.npy", "speaker_notes.txt"):
        (tmp_path / name).write_bytes(b"old")
    assert ssm.main(infer_flags(best, mixture_file, tmp_path, f"--num_speakers={count}")) == 0
    separator, features = ssm.load_separator(best), torch.from_numpy(np.load(mixture_file))
    likeliest = separator(features[None])[1][0].argsort(descending=True)[:count]
    check_separation(tmp_path, separator, features, sorted(likeliest.tolist()))
    assert (tmp_path / "speaker_notes.txt").read_bytes() == b"old"


def test_infer_uses_the_checkpoints_threshold(mixture_file, tmp_path):
    for threshold, count in ((0.0, 3), (1.0, 0)):
        path = tmp_path / "model.pt"
        separator = tiny_separator(threshold=threshold)
        save_tiny_checkpoint(path, separator)
        assert ssm.main(infer_flags(path, mixture_file, tmp_path / "out")) == 0
        features = torch.from_numpy(np.load(mixture_file))
        check_separation(tmp_path / "out", separator, features, list(range(count)))


def test_infer_audio(qwen_folder, qwen_checkpoint, tmp_path):
    """The encoder and layer come from the checkpoint, or from the flags."""
    wave = sine(0.5, 200, 8000)
    source = write_wav(tmp_path / "mixture.wav", np.stack([wave, wave], 1), 8000)  # stereo
    argv = infer_flags(qwen_checkpoint, source, tmp_path / "out", "--threshold=0")
    separator = ssm.load_separator(qwen_checkpoint)
    encoder = ssm.load_audio_encoder(str(qwen_folder))
    for flags, layer in (([], 1), (["--layer=0"], 0), ([f"--encoder={qwen_folder}"], 1)):
        assert ssm.main([*argv, *flags]) == 0
        features = ssm.encode_audio(source, encoder, layer)
        assert features.shape == (25, WIDTH)
        result = check_separation(tmp_path / "out", separator, features, [0, 1, 2])
        assert (result["layer"], result["num_frames"]) == (layer, 25)
    assert result["frame_rate"] == 50.0


def npy(change):
    def make(folder):
        path = folder / "input.npy"
        np.save(path, change(np.ones((FRAMES, WIDTH), np.float32)))
        return path

    return make


def audio(samples):
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
    "empty file": (audio(b""), "cannot read audio"),
    "not audio": (audio(b"these are words"), "cannot read audio"),
    "no samples": (audio(np.zeros(0, np.float32)), "no samples"),
}


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda folder: folder / "gone.npy", "gone.npy"),
        (npy(lambda a: a[0]), "[T, D]"),
        (npy(lambda a: a[None]), "[T, D]"),
        (npy(lambda a: a[:0]), "[T, D]"),
        (npy(lambda a: a[:, 1:]), str(WIDTH - 1)),
        (npy(lambda a: a.astype(np.int16)), "int16"),
        (npy(lambda a: a * np.nan), "NaN"),
    ],
)
def test_infer_bad_features(make, words, best, tmp_path, capsys):
    assert_fails(capsys, infer_flags(best, make(tmp_path), tmp_path / "out"), words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", BAD_AUDIO)
def test_infer_bad_audio(kind, qwen_checkpoint, tmp_path, capsys):
    make, words = BAD_AUDIO[kind]
    assert_fails(capsys, infer_flags(qwen_checkpoint, make(tmp_path), tmp_path / "out"), words)


def test_infer_refusals(best, mixture_file, qwen_checkpoint, recording, tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    out = tmp_path / "out"
    for argv, *words in (
        (infer_flags(best, recording, out), "--encoder"),
        (infer_flags(best, recording, out, f"--encoder={tmp_path}"), tmp_path),
        (infer_flags(qwen_checkpoint, recording, out, "--layer=9"), "layer must be 0 to 2"),
        (infer_flags(best, mixture_file, out, "--num_speakers=4"), "num_speakers", "0 to 3"),
        (infer_flags(tmp_path / "gone.pt", mixture_file, out), "gone.pt"),
        (infer_flags(tmp_path, mixture_file, out), tmp_path),
        (infer_flags("no-such-user/no-such-model", mixture_file, out), "no-such-model"),
        (infer_flags(best, mixture_file, tmp_path / "file"), "cannot write to", "file"),
        (infer_flags(best, mixture_file, tmp_path / "file" / "out"), "cannot write to"),
    ):
        assert_fails(capsys, argv, *words)


# --------------------------------------------------------------------------------------------------
# integrate


def integrate_flags(model, checkpoint, recordings, *more):
    return ["integrate", f"--model={model}", f"--checkpoint={checkpoint}", *CPU_FLAGS,
            "--max_new_tokens=4", "--audio", *map(str, recordings), *map(str, more)]  # fmt: skip


def test_integrate(qwen_folder, qwen_checkpoint, tmp_path, capsys):
    recordings = [write_wav(tmp_path / f"{pitch}.wav", sine(0.4, pitch)) for pitch in (150, 400)]
    answers = tmp_path / "answers.json"
    argv = integrate_flags(qwen_folder, qwen_checkpoint, recordings, f"--json={answers}")
    assert ssm.main([*argv, "--threshold=0", "--prompt=Who speaks?"]) == 0
    printed = capsys.readouterr().out
    content = json.loads(answers.read_text())
    assert list(content) == [str(path) for path in recordings]
    for path, rows in content.items():
        assert path in printed
        assert [row["speaker"] for row in rows] == [1, 2, 3]
        for row in rows:
            line = f"Speaker {row['speaker']} ({row['probability']:.2f}): {row['text']}"
            assert line.strip() in printed


@pytest.mark.parametrize(("flag", "rows"), [("--num_speakers=2", 2), ("--threshold=1", 0)])
def test_integrate_count(flag, rows, qwen_folder, qwen_checkpoint, tmp_path, capsys):
    recording = write_wav(tmp_path / "a.wav", sine(0.4, 150))
    assert ssm.main(integrate_flags(qwen_folder, qwen_checkpoint, [recording], flag)) == 0
    printed = capsys.readouterr().out
    assert printed.count("Speaker ") == rows
    assert ("no talker found" in printed) is (rows == 0)


@pytest.mark.parametrize("kind", BAD_AUDIO)
def test_integrate_bad_audio(kind, qwen_folder, qwen_checkpoint, tmp_path, capsys):
    make, words = BAD_AUDIO[kind]
    assert_fails(capsys, integrate_flags(qwen_folder, qwen_checkpoint, [make(tmp_path)]), words)


def test_integrate_audio_too_short(qwen_folder, qwen_checkpoint, tmp_path, capsys):
    """A hundredth of a second is less than one frame of the encoder's output."""
    click = write_wav(tmp_path / "click.wav", np.full(160, 0.1, np.float32))
    assert_fails(capsys, integrate_flags(qwen_folder, qwen_checkpoint, [click], "--threshold=0"))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--layer=7"], "layer must be 0 to 2"),
        (["--num_speakers=5"], "0 to 3"),
        (["--prompt=<|AUDIO|> Who speaks?"], "audio"),  # more audio slots than recordings
        (["--json=/proc/missing/answers.json"], "/proc/missing"),
        (["--checkpoint=gone.pt"], "gone.pt"),
        (["--model=no-such-user/no-such-model"], "no-such-user/no-such-model"),
    ],
)
def test_integrate_refusals(flags, words, qwen_folder, qwen_checkpoint, recording, capsys):
    assert_fails(capsys, integrate_flags(qwen_folder, qwen_checkpoint, [recording], *flags), words)


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


def test_speech_from_end_to_end(qwen_folder, tmp_path, capsys):
    """Generate, train, evaluate, infer and integrate after block 1 of a real encoder."""
    for speaker in range(10):
        write_wav(tmp_path / f"speech/s{speaker}/a.wav", sine(0.3, 120 + 40 * speaker))
    data, folder, out = tmp_path / "data", tmp_path / "run", tmp_path / "out"
    assert generator.main([
        f"--speech_dir={tmp_path / 'speech'}", f"--encoder={qwen_folder}", "--layer=1",
        "--max_speakers=2", "--train_samples=4", "--val_samples=2", "--device=cpu",
        f"--output_dir={data}"]) == 0  # fmt: skip
    assert ssm.main(train_flags(data, folder)) == 0
    best, mixed = folder / "best_model.pt", data / "val/mixed/val_00000"
    checkpoint, separator = torch.load(best), ssm.load_separator(best)
    loss = checkpoint["train_history"][0]["val"]
    # features of a real encoder do not add up, so nothing in the model or the loss says they do
    assert loss["total"] == pytest.approx(loss["separation"] + 0.5 * loss["activity"], rel=1e-5)
    assert (separator.mask, separator.max_speakers) == ("gains", 2)
    assert separator.feature_source["encoder"] == str(qwen_folder)
    assert separator.feature_source["layer"] == 1
    assert ssm.main(["evaluate", f"--checkpoint={best}", f"--data_dir={data}", *CPU_FLAGS]) == 0
    audio_features = ssm.encode_audio(f"{mixed}.wav", str(qwen_folder), 1)
    file_features = torch.from_numpy(np.load(f"{mixed}.npy"))
    for suffix, features in (("wav", audio_features), ("npy", file_features)):
        assert ssm.main(infer_flags(best, f"{mixed}.{suffix}", out, "--num_speakers=2")) == 0
        result = check_separation(out, separator, features, [0, 1])
        assert (result["layer"], result["frame_rate"]) == (1, 50.0)
    capsys.readouterr()
    argv = integrate_flags(qwen_folder, best, [f"{mixed}.wav"], "--num_speakers=2")
    assert ssm.main(argv) == 0
    assert capsys.readouterr().out.count("Speaker ") == 2
