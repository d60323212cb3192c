"""The benchmarks run, on short recordings."""

import json
import sys
from itertools import count

import numpy as np
import pytest
import torch
from conftest import (
    RATE,
    ROOT,
    save_tiny_checkpoint,
    sine,
    tiny_separator,
    tiny_spectrogram_separator,
    write_wav,
)

sys.path.insert(0, str(ROOT / "benchmarks"))
import long_recording  # noqa: E402
import meetings  # noqa: E402
import peers  # noqa: E402
import processes  # noqa: E402
import throughput  # noqa: E402

import speaker_separator_module as ssm  # noqa: E402


def make_digits(folder):
    """Recordings 5 to 9 of ten digits by two speakers with different pitches."""
    for digit in range(10):
        for take in range(5, 10):
            for speaker, pitch in (("low", 130), ("high", 520)):
                samples = sine(0.3, pitch + 7 * digit, 8000)
                write_wav(folder / f"{digit}_{speaker}_{take}.wav", samples, 8000)
    return folder


def test_long_recording(tmp_path, capsys, monkeypatch):
    folder = make_digits(tmp_path / "digits")
    row = long_recording.measure(folder, None, seconds=70, seed=1)
    assert row == {"windows": 4, "kept": 1.0, "talkers": 2}  # the talkers' own spectrograms
    with monkeypatch.context() as patch:  # everybody is somebody new in every window
        news = count()
        patch.setattr(long_recording.long_recordings.TalkerTracker, "number",
                      lambda _, streams, present, sound: {s: next(news) for s in present})
        row = long_recording.measure(folder, None, seconds=70, seed=1)
    assert row["talkers"] > 4
    assert row["kept"] <= 0.5
    separator = tiny_spectrogram_separator(threshold=0.0)
    checkpoint = save_tiny_checkpoint(tmp_path / "separator.pt", separator)
    argv = [f"--recordings={folder}", f"--checkpoint={checkpoint}", "--seconds=40", "--seeds=1",
            "--num_speakers=2"]  # fmt: skip
    assert long_recording.main(argv) == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith("| 2 |")


def test_without_recordings(tmp_path, capsys):
    assert long_recording.main([f"--recordings={tmp_path}"]) == 2
    assert f"named like 7_theo_3.wav in {tmp_path}" in capsys.readouterr().err
    write_wav(tmp_path / "digits.wav", sine(0.3, 130))
    assert long_recording.main([f"--recordings={tmp_path}"]) == 2
    for bad in ("--window=0", "--seconds=-3", "--seconds=nan"):
        assert long_recording.main([f"--recordings={tmp_path}", bad]) == 2
        assert "must be 1 or more" in capsys.readouterr().err


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
    for content, words in (("", "has no turns"), ("SPEAKER", "is no RTTM file")):
        (tmp_path / "reference.rttm").write_text(content)
        assert meetings.main([f"--recordings={tmp_path}"]) == 2
        assert f"reference.rttm {words}" in capsys.readouterr().err


def test_a_meeting_fills_one_window(tmp_path, whisper_path, spectrogram_checkpoint, capsys):
    """A sample more than the model's window of 1 s is no longer recording; a second more is."""
    (tmp_path / "reference.rttm").write_text("SPEAKER one 1 0.0 1.0 <NA> <NA> a <NA> <NA>\n")
    argv = [f"--recordings={tmp_path}", f"--model={whisper_path}",
            f"--checkpoint={spectrogram_checkpoint}"]  # fmt: skip
    write_wav(tmp_path / "one.wav", sine(1 + 1 / RATE, 200))
    assert meetings.main(argv) == 0
    assert "| one | 1 |" in capsys.readouterr().out
    write_wav(tmp_path / "one.wav", sine(2, 200))
    assert meetings.main(argv) == 2
    assert "one.wav is longer than what" in capsys.readouterr().err


def test_throughput(tmp_path, capsys, monkeypatch):
    layer, x = torch.nn.Linear(30, 50), torch.randn(7, 30)
    assert throughput.count_flops(lambda: layer(x)) == 2 * 7 * 30 * 50
    monkeypatch.setattr(throughput, "SIZE", 64)
    monkeypatch.setattr(throughput, "CASES", (("spectrogram", 1, 40, 100),))
    argv = ["--device=cpu", "--dtypes=float32", "--cases=0", "--repeats=1", "--times=2",
            f"--json={tmp_path / 'a.json'}"]  # fmt: skip
    assert throughput.main(argv) == 0
    results = json.loads((tmp_path / "a.json").read_text())
    (row,), printed = results["cases"], capsys.readouterr().out
    step = 3 * 2 * 20 * sum(  # of all blocks on 20 steps of 40 ms and those on streams thrice
        w.numel() * (3 if "stream_blocks" in name or "exchanges" in name else 1)
        for name, w in ssm.SpectrogramSeparator().named_parameters() if w.dim() == 2)
    assert row["flops"]["step"] == pytest.approx(step, rel=0.15)
    two_passes = 2 * 22 / 20  # of 11 stacks each, as a pass is shifted by half a stack
    assert row["flops"]["forward"] == pytest.approx(two_passes * step / 3, rel=0.15)
    assert 0 < row["outside_products"] < 1 and 0 < row["optimizer_share"] < 1
    assert row["peak_bytes"] > 0 and results["data"]["mixing"] > 0
    assert "| spectrogram | 2 x 40 | float32 |" in printed
    for bad in ("--device=tpu", "--times=0", "--repeats=0", f"--json={tmp_path / 'gone/a.json'}"):
        assert throughput.main([bad]) == 2
        assert capsys.readouterr().err.startswith("error: ")


def test_throughput_of_features(monkeypatch):
    separator = tiny_separator()
    monkeypatch.setattr(throughput.ssm, "SpeakerSeparatorTransformer", lambda: separator)
    row = throughput.measure("features", 2, 20, 25, "cpu", torch.float32, 1)
    assert row["flops"]["step"] == pytest.approx(3 * row["flops"]["forward"], rel=0.01)
    assert row["peak_bytes_per_second_of_audio"] == pytest.approx(row["peak_bytes"] / 1.6)


def test_a_process_of_the_benchmark(tmp_path, capsys, monkeypatch):
    pinned = []
    monkeypatch.setattr(processes.os, "sched_setaffinity", lambda *a: pinned.append(a), False)
    monkeypatch.setattr(processes, "BATCH", 2)
    monkeypatch.setitem(processes.PARTS, "spectrograms", (0.5, 0.5))
    monkeypatch.setenv("LOCAL_RANK", "0")
    data = processes.make_data(tmp_path, "spectrograms")
    assert processes.main(["--mixtures=4", "--dtype=float32", f"--worker=spectrograms={data}"]) == 0
    printed = capsys.readouterr().out
    assert pinned == [(0, {0})] and "(remixed to 4 an epoch)" in printed
    assert "float32 (as asked)" in printed
    assert float(printed.split("seconds ")[-1]) > 0
    assert processes.main(["--mixtures=1"]) == 2


def test_peers(tmp_path, whisper_folder, capsys):
    separate, separator, rate = peers.ours()
    with torch.no_grad():
        streams, probabilities = separate(torch.randn(rate))
    assert streams.shape == (1, 3, 100, 80) and probabilities.shape == (1, 3)
    rows = {"Whisper": {"seconds": 4.0, "peak_bytes": 0}}
    rows |= {name: {"seconds": seconds, "peak_bytes": 0, "parameters": 1_000_000}
             for name, seconds in (("ours", 1.0), ("other", 6.0))}
    assert "| 6.00 | 0.200 | 2.50 | 2.00 | 6.0 |" in peers.table(rows)[-1]
    argv = [f"--model={whisper_folder}", "--speech", str(tmp_path / "gone.wav"), "gone.wav"]
    assert peers.main(argv) == 2
    assert "gone.wav" in capsys.readouterr().err
