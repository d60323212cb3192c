"""The examples, on a model and recordings of a tiny size."""

import sys

from conftest import ROOT, sine, write_wav

sys.path.insert(0, str(ROOT / "examples"))

import overlapped_digits


def test_overlapped_digits_tells_the_whole_story(qwen_folder, tmp_path, capsys):
    for digit in range(3):
        for speaker in range(3):
            for take in (1, 2, 10, 11):
                name = tmp_path / f"fsdd/{digit}_s{speaker}_{take}.wav"
                pitch = 150 + 90 * speaker + 20 * digit
                write_wav(name, sine(0.1 + 0.02 * take, pitch, 8000), 8000)
    argv = [f"--fsdd={tmp_path / 'fsdd'}", f"--model={qwen_folder}", "--layer=1", "--epochs=1",
            "--overlap_epochs=1", "--word_epochs=1", "--mixtures_per_epoch=4",
            "--test_samples=1"]  # fmt: skip
    overlapped_digits.main(argv)
    printed = capsys.readouterr().out
    assert "| 3 talkers, room | 1 |" in printed and "nobody found in" in printed
    assert (tmp_path / "overlapped_digits/2_talkers.png").is_file()
    overlapped_digits.main(argv)  # goes on where it stopped: nothing is made or trained again
    again = capsys.readouterr().out
    assert " train " not in again and "--speech_dir" not in again
    assert printed[printed.index("| cpWER") :][:400] == again[again.index("| cpWER") :][:400]
