"""The examples, on a model and recordings of a tiny size."""

import json
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, assert_fails, sine, write_wav

import audio
import speaker_separator_module as ssm
from generate_multi_speaker_dataset import load_source

sys.path.insert(0, str(ROOT / "examples"))

import overlapped_digits  # noqa: E402
import overlapped_speech  # noqa: E402
import pretrain  # noqa: E402
import two_talkers  # noqa: E402


@pytest.fixture
def fsdd(tmp_path):
    """Recordings named as those of the Free Spoken Digit Dataset, a tenth of their length."""
    for digit in range(3):
        for speaker in range(3):
            for take in (1, 2, 10, 11):
                name = tmp_path / f"fsdd/{digit}_s{speaker}_{take}.wav"
                pitch = 150 + 90 * speaker + 20 * digit
                write_wav(name, sine(0.05 + 0.002 * take, pitch, 8000), 8000)
    return tmp_path / "fsdd"


def shrink(monkeypatch, module, *flags):
    """Let an example run the project's commands with a separator of a tiny size."""
    run, make = module.run, module.make_dataset

    def run_small(command, *words):
        run(command, *words, *(flags if words[0] == "train" else ()))

    def make_small(folder, *words):
        training = "--val_samples=120" in words
        return make(folder, *words, *(("--val_samples=4", "--train_samples=1") * training))

    monkeypatch.setattr(module, "run", run_small)
    monkeypatch.setattr(module, "make_dataset", make_small)


def ends(capsys, example, argv, *words):
    """An example ends with status 2 and one line that holds these words."""
    with pytest.raises(SystemExit) as ended:
        example.main(argv)
    errors = capsys.readouterr().err
    assert ended.value.code == 2 and errors.count("\n") == 1
    assert all(word in errors for word in words)


def test_overlapped_digits_tells_the_whole_story(
    fsdd, qwen_folder, tmp_path, capsys, monkeypatch
):
    shrink(monkeypatch, overlapped_digits, "--dim=16", "--num_heads=2", "--ff_dim=16")
    monkeypatch.setattr(overlapped_digits, "TALKERS", (3,))
    argv = [f"--fsdd={fsdd}", f"--model={qwen_folder}", "--epochs=1", "--mixtures_per_epoch=4",
            "--test_samples=1"]  # fmt: skip
    overlapped_digits.main(argv)
    printed = capsys.readouterr().out
    assert "| 3 talkers, room | 1 |" in printed
    assert "--num_speakers 3" in printed
    assert (tmp_path / "overlapped_digits/3_talkers.png").is_file()
    overlapped_digits.main(argv)  # goes on where it stopped: nothing is made or trained again
    again = capsys.readouterr().out
    assert " train " not in again and "--speech_dir" not in again
    assert printed[printed.index("| cpWER") :] == again[again.index("| cpWER") :]
    overlapped_digits.main([*argv[:-1], "--test_samples=2"])  # other test sets, the same training
    other = capsys.readouterr().out
    assert " train " not in other and "| 3 talkers, room | 2 |" in other
    longer = [flag.replace("epoch=4", "epoch=8") for flag in argv]
    ends(capsys, overlapped_digits, longer, "a run of --mixtures_per_epoch=4", "--work_dir")
    last = tmp_path / "overlapped_digits/checkpoints/checkpoint_epoch_1.pt"
    about = tmp_path / "overlapped_digits/data/dataset.json"
    for damaged in (last, about):
        damaged.write_bytes(damaged.read_bytes()[:-20])
        ends(capsys, overlapped_digits, argv, damaged.name)
    (fsdd / "0_s0_1.wav").unlink()
    ends(capsys, overlapped_digits, argv, "digits.jsonl lists other recordings", "--work_dir")


def test_pretrain_exports_what_it_trained(fsdd, tmp_path, capsys, monkeypatch):
    shrink(monkeypatch, pretrain, "--num_layers=1")
    monkeypatch.setattr(pretrain, "SIZES", ["--dim=16", "--num_heads=2", "--ff_dim=16"])
    rows = []
    for speaker in range(6):
        path = write_wav(tmp_path / f"speech/s{speaker}.wav", sine(0.5, 150 + 60 * speaker))
        rows.append({"audio": path.name, "speaker": f"reader{speaker}", "text": "words",
                     "split": "val" if speaker > 2 else "train"})  # fmt: skip
    listing = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "speech/manifest.jsonl").write_text(listing + "\n")  # a blank line
    write_wav(tmp_path / "speech/noise/hum.wav", sine(1, 50))
    argv = [f"--speech={tmp_path / 'speech'}", f"--fsdd={fsdd}", "--epochs=2",
            "--mixtures_per_epoch=8", f"--output_dir={tmp_path / 'weights'}"]
    pretrain.main(argv)
    exported = ssm.load_separator(tmp_path / "weights")
    trained = ssm.load_separator(tmp_path / "pretraining/checkpoints/checkpoint_epoch_2.pt")
    assert exported.config == trained.config
    for a, b in zip(exported.parameters(), trained.parameters(), strict=True):
        assert (a - b).abs().max() < 0.01  # stored in bfloat16
    drawn = {split: load_source(tmp_path / "pretraining/data", split) for split in ("train", "val")}
    corpora = {split: set(source.speakers[1]) for split, source in drawn.items()}
    assert "fsdd" in corpora["train"] and "fsdd" not in corpora["val"]  # few digits speak alike
    assert drawn["train"].options.as_recorded == ("fsdd",)
    pretrain.main(argv)
    printed = capsys.readouterr().out
    assert printed.count(".py train ") == 1 and printed.count("exported") == 2  # trained once
    ends(capsys, pretrain, [*argv, "--batch_size=12"], "--batch_size must be a multiple of 8")
    (tmp_path / "taken").touch()
    argv += ["--work_dir=new", f"--output_dir={tmp_path / 'taken'}"]
    ends(capsys, pretrain, argv, "cannot write to", "taken")
    (tmp_path / "whisper").mkdir()
    (tmp_path / "whisper/model.safetensors").touch()
    argv[-1] = f"--output_dir={tmp_path / 'whisper'}"
    ends(capsys, pretrain, argv, "--output_dir", "holds another model")
    assert not any((tmp_path / "new").iterdir())  # refused before any work


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_pretrain_without_the_device_asked_for(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(pretrain, "make_data", lambda args: tmp_path / "data")
    with pytest.raises(SystemExit) as end:
        pretrain.main(["--speech=none", "--fsdd=none", "--device=cuda"])
    assert end.value.code == 2
    assert "error: no cuda device here" in capsys.readouterr().err


def test_a_picture_of_prices(tmp_path):
    spectrogram = torch.rand(50, 16)
    two_talkers.picture(tmp_path / "a.png", [("$", spectrogram, "$100 and 5% of $7")] * 2)
    assert (tmp_path / "a.png").stat().st_size > 10_000


@pytest.mark.pictures
def test_two_talkers_from_any_two_recordings(qwen_folder, spectrogram_checkpoint, tmp_path, capsys):
    one = write_wav(tmp_path / "one.wav", sine(0.7, 200))
    other = write_wav(tmp_path / "other.wav", 0.1 * sine(0.4, 370))
    argv = [str(one), str(other), f"--model={qwen_folder}",
            f"--checkpoint={spectrogram_checkpoint}", "--output_dir=out"]  # fmt: skip
    assert two_talkers.main(argv) == 0
    mixture = audio.read_audio("out/mixture.wav")
    assert len(mixture) == 8000 + 6400  # the other starts after half a second
    assert np.square(mixture).sum() == pytest.approx(0.05**2 * (11200 + 6400), rel=0.05)
    assert np.square(mixture[11200:]).sum() > 0.05**2 * 3000
    printed = capsys.readouterr().out
    assert "without separator: " in printed
    assert "speaker 1: " in printed and "speaker 2: " in printed
    for name in ("speaker_1.wav", "speaker_2.wav"):
        assert len(audio.read_audio(tmp_path / "out" / name)) == len(mixture)
    assert (tmp_path / "out/two_talkers.png").stat().st_size > 10_000
    write_wav(tmp_path / "long.wav", sine(29.6, 200))
    write_wav(tmp_path / "none.wav", 0 * sine(0.4, 200))
    before = (tmp_path / "out/two_talkers.png").read_bytes()
    for bad in ("long.wav", "none.wav"):  # the other starts half a second later
        assert_fails(capsys, [argv[0], bad, *argv[2:]], bad, "30 s", main=two_talkers.main)
    assert (tmp_path / "out/two_talkers.png").read_bytes() == before
    assert_fails(capsys, ["gone.wav", *argv[1:]], "gone.wav", main=two_talkers.main)
    assert_fails(capsys, ["out/mixture.wav", *argv[1:]], "overwritten", main=two_talkers.main)
    (tmp_path / "mine").mkdir()
    argv[-1] = "--output_dir=mine"
    assert_fails(capsys, [*argv, "--checkpoint=none.pt"], "none.pt", main=two_talkers.main)
    assert not any((tmp_path / "mine").iterdir())
    (tmp_path / "mine/speaker_2.wav").touch()
    assert_fails(capsys, argv, "speaker_2.wav is not of an earlier run", main=two_talkers.main)


@pytest.mark.parametrize("telephone", [0, 1])
def test_overlapped_speech_takes_one_corpus(
    telephone, speech_dir, qwen_folder, spectrogram_checkpoint, tmp_path, capsys
):
    rows = [{"audio": str(path), "speaker": path.parent.name, "text": "words",
             "split": ("train", "val")[number % 2], "corpus": f"book_{number % 2}"}
            for number, path in enumerate(sorted(speech_dir.glob("*/*.wav")))]  # fmt: skip
    rows.append({"audio": "none.wav", "speaker": "x", "text": "", "split": "val", "corpus": "web"})
    (tmp_path / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    overlapped_speech.main([
        f"--speech={tmp_path}", "--corpus=book", f"--model={qwen_folder}", "--samples=2",
        f"--checkpoint={spectrogram_checkpoint}", "--talkers", "1", "2",
        *["--telephone"] * telephone])  # fmt: skip
    printed = capsys.readouterr().out
    assert "| 1 talker | 2 |" in printed and "| 2 talkers | 2 |" in printed
    data = tmp_path / "overlapped_speech" / f"2_talkers{'_by_telephone' * telephone}"
    assert json.loads((data / "dataset.json").read_text())["mixing"]["telephone"] == telephone
    score = json.loads((data / "scores.json").read_text())
    assert f"| 2 talkers | {score['si_sdr_improvement']:z.1f} |" in printed
    argv = [f"--speech={tmp_path}", "--corpus=book", "--model=none", "--talkers", "1", "7"]
    ends(capsys, overlapped_speech, argv, "mixtures of 7 were asked for")
    ends(capsys, overlapped_speech, [*argv, "--corpus=bok"], "a corpus that starts with bok")
    every = [flag for flag in argv if "corpus" not in flag]
    ends(capsys, overlapped_speech, every, "none.wav")
    (tmp_path / "manifest.jsonl").write_text(json.dumps(rows[1]))
    ends(capsys, overlapped_speech, argv, "book.jsonl lists other recordings", "--work_dir")
    ends(capsys, overlapped_speech, every, "speech.jsonl lists other recordings", "--work_dir")


@pytest.mark.parametrize("line", ["{", "[]", "{}", '{"audio": 1}'])
def test_overlapped_speech_of_an_odd_manifest(line, tmp_path, capsys):
    (tmp_path / "manifest.jsonl").write_text(f"\n{line}\n")
    argv = [f"--speech={tmp_path}", "--corpus=a/b", "--model=none"]
    ends(capsys, overlapped_speech, argv, "manifest.jsonl, line 2", "no JSON with audio")
    (tmp_path / "manifest.jsonl").write_text('{"audio": "a.wav", "speaker": "s", "corpus": "a/b"}')
    ends(capsys, overlapped_speech, argv, "no such audio file")


@pytest.mark.parametrize("example", [pretrain, overlapped_speech])
def test_speech_without_a_manifest(example, tmp_path, capsys):
    more = {pretrain: ["--fsdd=none"], overlapped_speech: ["--model=none", "--corpus=book"]}
    with pytest.raises(SystemExit) as ended:
        example.main([f"--speech={tmp_path}", *more[example]])
    assert ended.value.code == 2
    assert capsys.readouterr().err == f"error: no {tmp_path / 'manifest.jsonl'}\n"


@pytest.mark.parametrize(("flags", "words"), [
    (["--work_dir=file"], "cannot write to file"), ([], "no speech/noise")])  # fmt: skip
def test_pretrain_refuses(flags, words, tmp_path, capsys):
    (tmp_path / "file").touch()
    (tmp_path / "speech").mkdir()
    (tmp_path / "speech/manifest.jsonl").touch()
    with pytest.raises(SystemExit) as ended:
        pretrain.main(["--speech=speech", "--fsdd=none", *flags])
    assert ended.value.code == 2
    assert words in capsys.readouterr().err
