"""The benchmarks run, on short recordings."""

import sys

import numpy as np
import torch
from conftest import ROOT, save_tiny_checkpoint, sine, tiny_spectrogram_separator, write_wav

sys.path.insert(0, str(ROOT / "benchmarks"))
import long_recording  # noqa: E402
import meetings  # noqa: E402


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


def test_talkers_in_every_frame_of_a_meeting(tmp_path):
    """A reference of two talkers, and streams that talk in the same frames, else 60 dB down."""
    rttm = tmp_path / "reference.rttm"
    turns = ((0.0, 4.0, "a"), (2.0, 4.0, "b"), (3.0, 0.5, "a"))
    rttm.write_text("".join(
        f"SPEAKER one 1 {start} {seconds} <NA> <NA> {who} <NA> <NA>\n"
        for start, seconds, who in turns))  # fmt: skip
    counts, talkers = meetings.reference_counts(rttm)["one"]
    assert talkers == 2
    expected = np.repeat([1, 2, 1], 200)
    assert np.array_equal(counts, expected)
    streams = torch.full((2, 600, 80), -1.5)
    streams[0, :400], streams[1, 200:] = 0.0, 0.0
    found = meetings.estimated_counts(streams.amax(0), list(streams))
    assert np.mean(found == expected) > 0.9  # within a quarter of a second of every change
    quiet = torch.full((1, 600, 80), -1.5)
    quiet[:, :300] = 0.0
    assert np.mean(meetings.estimated_counts(quiet[0], list(quiet)) == np.repeat([1, 0], 300)) > 0.9


def test_a_meeting_has_a_reference(tmp_path, capsys):
    assert meetings.main([f"--recordings={tmp_path}"]) == 2
    assert "no reference.rttm" in capsys.readouterr().err
