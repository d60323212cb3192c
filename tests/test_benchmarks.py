"""The benchmarks run, on short recordings."""

import sys

from conftest import ROOT, save_tiny_checkpoint, sine, tiny_spectrogram_separator, write_wav

sys.path.insert(0, str(ROOT / "benchmarks"))
import long_recording  # noqa: E402


def make_digits(folder):
    """Recordings 5 to 9 of ten digits by two speakers with different pitches."""
    for digit in range(10):
        for take in range(5, 10):
            for speaker, pitch in (("low", 130), ("high", 520)):
                samples = sine(0.3, pitch + 7 * digit, 8000)
                write_wav(folder / f"{digit}_{speaker}_{take}.wav", samples, 8000)
    return folder


def test_long_recording(tmp_path, capsys):
    folder = make_digits(tmp_path / "digits")
    row = long_recording.measure(folder, None, seconds=70, seed=1)
    assert row == {"windows": 4, "kept": 1.0, "talkers": 2}  # the talkers' own spectrograms
    separator = tiny_spectrogram_separator(threshold=0.0)
    checkpoint = save_tiny_checkpoint(tmp_path / "separator.pt", separator)
    argv = [f"--recordings={folder}", f"--checkpoint={checkpoint}", "--seconds=40", "--seeds=1",
            "--num_speakers=2"]  # fmt: skip
    assert long_recording.main(argv) == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith("| 2 |")


def test_without_recordings(tmp_path, capsys):
    assert long_recording.main([f"--recordings={tmp_path}"]) == 2
    assert f"no recordings in {tmp_path}" in capsys.readouterr().err
