"""The examples, on a model and recordings of a tiny size."""

import json
import sys

import pytest
from conftest import ROOT, sine, write_wav

import speaker_separator_module as ssm

sys.path.insert(0, str(ROOT / "examples"))

import overlapped_digits  # noqa: E402
import pretrain  # noqa: E402


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
    run = module.run

    def run_small(command, *words):
        run(command, *words, *(flags if words[0] == "train" else ()))

    monkeypatch.setattr(module, "run", run_small)


def test_overlapped_digits_tells_the_whole_story(
    fsdd, qwen_folder, tmp_path, capsys, monkeypatch
):
    shrink(monkeypatch, overlapped_digits, "--dim=16", "--num_heads=2", "--ff_dim=16")
    argv = [f"--fsdd={fsdd}", f"--model={qwen_folder}", "--epochs=1", "--mixtures_per_epoch=4",
            "--test_samples=1"]  # fmt: skip
    overlapped_digits.main(argv)
    printed = capsys.readouterr().out
    assert "| 3 talkers, room | 1 |" in printed
    assert "--num_speakers 3" in printed
    assert (tmp_path / "overlapped_digits/2_talkers.png").is_file()
    overlapped_digits.main(argv)  # goes on where it stopped: nothing is made or trained again
    again = capsys.readouterr().out
    assert " train " not in again and "--speech_dir" not in again
    assert printed[printed.index("| cpWER") :] == again[again.index("| cpWER") :]


def test_pretrain_exports_what_it_trained(fsdd, tmp_path, capsys, monkeypatch):
    shrink(monkeypatch, pretrain, "--num_layers=1")
    monkeypatch.setattr(pretrain, "SIZES", ["--dim=16", "--num_heads=2", "--ff_dim=16"])
    rows = []
    for speaker in range(4):
        path = write_wav(tmp_path / f"speech/s{speaker}.wav", sine(0.5, 150 + 60 * speaker))
        rows.append({"audio": path.name, "speaker": f"s{speaker}", "text": "words",
                     "split": "val" if speaker == 3 else "train"})  # fmt: skip
    listing = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "speech/manifest.jsonl").write_text(listing)
    write_wav(tmp_path / "speech/noise/hum.wav", sine(1, 50))
    argv = [f"--speech={tmp_path / 'speech'}", f"--fsdd={fsdd}", "--epochs=1",
            "--mixtures_per_epoch=4", f"--output_dir={tmp_path / 'weights'}"]  # fmt: skip
    pretrain.main(argv)
    exported = ssm.load_separator(tmp_path / "weights")
    trained = ssm.load_separator(tmp_path / "pretraining/checkpoints/best_model.pt")
    assert exported.config == trained.config
    for a, b in zip(exported.parameters(), trained.parameters(), strict=True):
        assert (a - b).abs().max() < 0.01  # stored in bfloat16
    pretrain.main(argv)
    assert "1 epochs are done already" in capsys.readouterr().out
