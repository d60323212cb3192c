"""Recordings longer than the encoder's window: reading, matching talkers, answers, memory."""

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import soxr
import torch
from conftest import (
    CPU_FLAGS,
    RATE,
    ROOT,
    SHARED,
    WIDTH,
    assert_fails,
    save_tiny_checkpoint,
    sine,
    tiny_extractor,
    tiny_separator,
)

import speaker_separator_module as ssm

sys.path.insert(0, str(ROOT / "benchmarks"))
import long_recording  # noqa: E402

WINDOW, STEP = 16000, 11520  # of the tiny extractor
LONG = np.concatenate([sine(1.7, 150), np.zeros(4000, np.float32), sine(1.9, 260)])


@pytest.fixture
def long_file(tmp_path):
    soundfile.write(tmp_path / "long.wav", LONG, RATE, subtype="FLOAT")
    return tmp_path / "long.wav"


# --------------------------------------------------------------------------------------------------
# Reading


@pytest.mark.parametrize("rate", [16000, 8000, 44100])
def test_pieces_are_the_whole(rate, tmp_path, monkeypatch):
    """A file read and resampled piece by piece equals one resampled at once."""
    monkeypatch.setattr(ssm, "AUDIO_BLOCK", 5000)
    wave = sine(1.3, 300, rate)
    soundfile.write(tmp_path / "a.wav", np.stack([wave, wave], 1), rate, subtype="FLOAT")
    whole = soxr.resample(wave, rate, RATE)
    for audio, given in ((tmp_path / "a.wav", None), (wave, rate), (torch.from_numpy(wave), rate),
                         (wave.tolist(), rate)):  # fmt: skip
        pieces = list(ssm.audio_blocks(audio, RATE, given))
        assert len(pieces) > 3
        np.testing.assert_allclose(np.concatenate(pieces), whole, atol=1e-5)


def test_half_precision_tensor_that_asks_for_gradients():
    wave = torch.tensor([0.5, -0.5], dtype=torch.bfloat16, requires_grad=True)
    assert ssm.read_audio(wave, RATE).tolist() == [0.5, -0.5]


def test_a_nan_far_into_a_file(tmp_path, qwen_folder, qwen_checkpoint, capsys):
    """Found before any answer is given."""
    samples = np.r_[np.zeros(20 * RATE), np.nan].astype(np.float32)
    soundfile.write(tmp_path / "a.wav", samples, RATE, subtype="FLOAT")
    common = [f"--checkpoint={qwen_checkpoint}", *CPU_FLAGS]
    for command in (["infer", "--input"], ["integrate", f"--model={qwen_folder}", "--audio"]):
        argv = [*command, tmp_path / "a.wav", *common]
        assert_fails(capsys, argv, "NaN", "a.wav")
        assert not capsys.readouterr().out


@pytest.mark.parametrize("length", [1, STEP, WINDOW, WINDOW + 1, WINDOW + STEP, 61234])
def test_windows_cover_the_recording(length):
    assert ssm.window_sizes(tiny_extractor()) == (WINDOW, STEP)
    samples = np.arange(length, dtype=np.float32)
    windows = list(ssm.audio_windows(iter(np.array_split(samples, 7)), WINDOW, STEP))
    assert [start for start, _ in windows] == [i * STEP for i in range(len(windows))]
    for start, window in windows:
        assert np.array_equal(window, samples[start : start + WINDOW])
    assert windows[-1][0] + len(windows[-1][1]) == length
    assert all(len(window) > WINDOW - STEP for _, window in windows[1:])  # each has something new


# --------------------------------------------------------------------------------------------------
# Who is who


def lanes(*talkers, shift=0.0, frames=40):
    """Streams [S, frames, D] of made-up talkers ("a0": voice a, frames from 0), None is silence.

    A talker is a mean of its own plus what it says, which is the same in the same seconds;
    ``shift`` stands for what the place in the window adds to all.
    """
    streams = []
    for talker in talkers:
        torch.manual_seed(ord(talker[0]) if talker else 1)
        voice = torch.randn(WIDTH)
        said = torch.randn(400, WIDTH)
        first = int(talker[1:]) if talker else 0
        spoken = voice + said[first : first + frames]
        streams.append(spoken if talker else torch.zeros(frames, WIDTH))
    return torch.stack(streams) + shift * torch.linspace(-1, 1, WIDTH)


def active(*flags):
    return torch.tensor(flags, dtype=torch.bool)


def test_streams_are_followed_through_the_shared_seconds():
    tracker = ssm.TalkerTracker(shared=10)
    both = active(1, 1, 0)
    assert tracker.number(lanes("a0", "b0", None), both) == {0: 0, 1: 1}
    assert tracker.number(lanes("b30", "a30", None, shift=2), both) == {1: 0, 0: 1}
    later = lanes(None, "a60", "b60", shift=-2)
    assert tracker.number(later, active(0, 1, 1)) == {1: 0, 2: 1}


def test_numbers_by_first_appearance_and_return():
    """b comes later, a leaves and comes back in silence after the distances have been learnt."""
    tracker = ssm.TalkerTracker(shared=10)
    assert tracker.number(lanes(None, "a0"), active(0, 1)) == {1: 0}
    assert tracker.number(lanes("a30", "b30"), active(1, 1)) == {0: 0, 1: 1}
    assert tracker.number(lanes("b60", None), active(1, 0)) == {0: 1}
    assert tracker.number(lanes(None, None), active(0, 0)) == {}
    assert tracker.number(lanes("a120", None), active(1, 0), sound=False) == {0: 0}
    assert tracker.number(lanes("c150", "a150"), active(1, 1)) == {1: 0, 0: 2}


def test_after_silence_the_last_seen_goes_on():
    tracker = ssm.TalkerTracker(shared=10)
    assert tracker.number(lanes("a0", None), active(1, 0)) == {0: 0}
    assert tracker.number(lanes(None, None), active(0, 0)) == {}
    assert tracker.number(lanes(None, "a100"), active(0, 1), sound=False) == {1: 0}


def test_streams_of_a_window_with_nobody_are_not_followed():
    """It has sound, but no stream of it was a talker; both talkers come back the other way."""
    tracker = ssm.TalkerTracker(shared=10)
    assert tracker.number(lanes("a0", "b0"), active(1, 1)) == {0: 0, 1: 1}
    assert tracker.number(lanes("a30", "b30"), active(0, 0)) == {}
    assert tracker.number(lanes("b60", "a60"), active(1, 1)) == {1: 0, 0: 1}


def test_a_known_count_is_never_exceeded():
    tracker = ssm.TalkerTracker(shared=10, most=2)
    seen = set()
    for index, pair in enumerate([("a", "b"), ("c", "b"), ("d", "e"), ("b", "a")]):
        streams = lanes(*(f"{name}{30 * index}" for name in pair))
        seen |= set(tracker.number(streams, active(1, 1), sound=False).values())
    assert seen == {0, 1}


def test_a_wrong_look_at_the_shared_seconds_is_outvoted_by_the_voice():
    """Both streams change places; the shared seconds of one look like the other talker's."""
    tracker = ssm.TalkerTracker(shared=10)
    for first in (0, 30, 60):
        assert tracker.number(lanes(f"a{first}", f"b{first}"), active(1, 1)) == {0: 0, 1: 1}
    misleading = lanes("b90", "a90")
    misleading[0, :10] = lanes("a90")[0, :10]
    misleading[1, :10] = lanes("b90")[0, :10]
    assert tracker.number(misleading, active(1, 1)) == {0: 1, 1: 0}


def test_many_talkers_at_once():
    tracker, names = ssm.TalkerTracker(shared=10), "abcdefg"
    everybody = torch.ones(7, dtype=torch.bool)
    assert tracker.number(lanes(*(f"{n}0" for n in names)), everybody) == {s: s for s in range(7)}
    turned = lanes(*(f"{n}30" for n in names[::-1]))
    assert tracker.number(turned, everybody) == {s: 6 - s for s in range(7)}


def test_the_talkers_own_features_are_followed():
    """A 95 s recording of real talkers who alternate and overlap; streams in random order."""
    model, recordings = SHARED / "qwen2-audio-digits", SHARED / "fsdd"
    if not (model.is_dir() and recordings.is_dir()):
        pytest.skip(f"no spoken-digits model at {model}")
    score = long_recording.measure(recordings, model, layer=1, seed=2)
    assert score["windows"] == 32
    assert score["talkers"] == 2
    assert score["kept"] >= 0.95


def test_a_trained_separator_keeps_talkers():
    """The same of a trained separator, where SPEAKER_SEPARATOR_DIGITS names its checkpoint."""
    checkpoint = os.environ.get("SPEAKER_SEPARATOR_DIGITS")
    if not checkpoint:
        pytest.skip("SPEAKER_SEPARATOR_DIGITS names no checkpoint of a digits separator")
    model = ssm.load_separator(checkpoint).feature_source["encoder"]
    rows = [long_recording.measure(SHARED / "fsdd", model, checkpoint, seed=s) for s in range(3)]
    kept = sum(row["kept"] * row["windows"] for row in rows) / sum(r["windows"] for r in rows)
    assert kept >= 0.95, rows


# --------------------------------------------------------------------------------------------------
# Answers


def test_join_texts():
    """Words of shared seconds once; cut words at either edge go; a gap between windows is kept."""
    parts = [(0, "one two three fo"), (1, "ree four five six"), (3, "six seven")]
    assert ssm.join_texts(parts[:1], 0.25) == "one two three fo"
    assert ssm.join_texts([(0, "one two three"), (1, "Three, four")], 0.25) == "one two three four"
    both = [(0, "a b c d three fo"), (1, "hree three four five six e")]
    assert ssm.join_texts(both, 0.25) == "a b c d three four five six e"
    assert ssm.join_texts([(0, "five six"), (2, "six seven")], 0.25) == "five six six seven"
    assert ssm.join_texts([(0, "one two"), (1, "three four")], 0.25) == "one two three four"
    assert ssm.join_texts([(0, ""), (1, "one")], 0.25) == "one"


def changing_streams(model, gains=(0.3, 1.0, 3.0)):
    """Make every stream the mixture times a gain; the order changes from call to call."""
    gains, calls = torch.tensor(gains), []

    def forward(features, frame_mask=None):
        order = torch.roll(torch.arange(3), len(calls))
        calls.append(order)
        probs = torch.tensor([0.9, 0.8, 0.7])[order].expand(len(features), 3)
        return features[:, None] * gains[order].view(1, 3, 1, 1), probs

    model.speaker_separator.forward = forward
    return model


@pytest.fixture
def integrated(qwen, tmp_path):
    path = save_tiny_checkpoint(tmp_path / "put.pt", tiny_separator(3, seed=4))
    return ssm.integrate_speaker_separator(qwen, separator_checkpoint=path, layer=1, threshold=0.5)


def test_answers_of_a_long_recording(integrated, processor, long_file):
    """Each talker's text is that of its windows, whichever stream it is in."""
    model = changing_streams(integrated)
    rows = ssm.answer_per_talker(model, processor, long_file, max_new_tokens=3)
    assert [row["speaker"] for row in rows] == [1, 2, 3]
    assert [row["probability"] for row in rows] == [0.9, 0.8, 0.7]
    count = 1 + -(-(len(LONG) - WINDOW) // STEP)
    for row, gain in zip(rows, (0.3, 1.0, 3.0), strict=True):
        assert len(row["windows"]) == count
        for index, window in enumerate(row["windows"]):
            start = index * STEP
            end = min(start + WINDOW, len(LONG))
            assert (window["start"], window["end"]) == (start / RATE, end / RATE)
            alone = changing_streams(model, (gain, gain, gain))
            expected = ssm.answer_per_talker(
                alone, processor, LONG[start:end], num_speakers=1, max_new_tokens=3)  # fmt: skip
            assert window["text"] == expected[0]["text"]
        texts = [(i, window["text"]) for i, window in enumerate(row["windows"])]
        assert row["text"] == ssm.join_texts(texts, 1 - STEP / WINDOW)


def test_samples_in_memory(integrated, processor, long_file):
    from_file = ssm.answer_per_talker(integrated, processor, long_file, max_new_tokens=2)
    for audio in (LONG, torch.from_numpy(LONG)):
        assert ssm.answer_per_talker(integrated, processor, audio, max_new_tokens=2) == from_file
    twice = soxr.resample(LONG, RATE, 2 * RATE)
    rows = ssm.answer_per_talker(
        integrated, processor, twice, sampling_rate=2 * RATE, max_new_tokens=2)  # fmt: skip
    assert rows[0]["windows"][-1]["end"] == pytest.approx(len(LONG) / RATE, abs=1e-3)


def test_known_count_of_a_long_recording(integrated, processor):
    model = changing_streams(integrated)
    rows = ssm.answer_per_talker(model, processor, LONG, num_speakers=2, max_new_tokens=2)
    assert [row["speaker"] for row in rows] == [1, 2]
    with pytest.raises(ValueError, match="0 to 3"):
        ssm.answer_per_talker(integrated, processor, LONG, num_speakers=4)


def test_joint_answers_of_a_long_recording(integrated, processor):
    (row,) = ssm.answer_per_talker(
        changing_streams(integrated), processor, LONG, mode="joint", max_new_tokens=2)  # fmt: skip
    assert row["speakers"] == [1, 2, 3]
    assert all(window["speakers"] == [1, 2, 3] for window in row["windows"])


def test_a_model_without_a_separator(qwen, processor):
    with pytest.raises(ValueError, match="integrate_speaker_separator first"):
        ssm.answer_per_talker(qwen, processor, LONG)


def save_whisper(folder, whisper_folder, processor):
    """The tiny Whisper with a processor: any tokenizer will do."""
    from transformers import WhisperForConditionalGeneration, WhisperProcessor

    model = WhisperForConditionalGeneration.from_pretrained(whisper_folder)
    model.generation_config.max_length = 8
    model.save_pretrained(folder)
    WhisperProcessor(tiny_extractor(), processor.tokenizer).save_pretrained(folder)
    return folder


def integrate_flags(model, checkpoint, audio, *more):
    return ["integrate", f"--model={model}", f"--checkpoint={checkpoint}", f"--audio={audio}",
            *CPU_FLAGS, "--threshold=0", *map(str, more)]  # fmt: skip


def test_the_command_with_whisper(
    whisper_folder, qwen_checkpoint, processor, long_file, tmp_path, capsys
):
    folder = save_whisper(tmp_path / "whisper", whisper_folder, processor)
    argv = integrate_flags(folder, qwen_checkpoint, long_file, f"--json={tmp_path / 'a.json'}")
    assert ssm.main(argv) == 0
    printed = capsys.readouterr().out
    rows = json.loads((tmp_path / "a.json").read_text())[str(long_file)]
    assert {len(row["windows"]) for row in rows} == {5}
    assert printed.count("Speaker ") == len(rows) == 3
    for flag in ("--prompt=Who speaks?", "--mode=joint"):
        assert_fails(capsys, [*argv, flag], "Qwen2-Audio", "Whisper")


def test_the_command_in_joint_mode(qwen_folder, qwen_checkpoint, long_file, tmp_path, capsys):
    flags = ["--mode=joint", "--max_new_tokens=2", f"--json={tmp_path / 'a.json'}"]
    assert ssm.main(integrate_flags(qwen_folder, qwen_checkpoint, long_file, *flags)) == 0
    (row,) = json.loads((tmp_path / "a.json").read_text())[str(long_file)]
    assert capsys.readouterr().out.startswith(f"Speakers {', '.join(map(str, row['speakers']))} (")


# --------------------------------------------------------------------------------------------------
# Streams


def test_infer_a_long_recording(qwen_folder, long_file, tmp_path, capsys):
    """Files are as long as the recording and hold the talker's stream of every window."""
    source = {"encoder": str(qwen_folder), "layer": 1, "frame_rate": 50.0}
    separator = tiny_separator(3, seed=4, feature_source=source)
    path = save_tiny_checkpoint(tmp_path / "s.pt", separator)
    argv = ["infer", f"--checkpoint={path}", f"--input={long_file}", "--threshold=0", *CPU_FLAGS,
            f"--output_dir={tmp_path / 'out'}"]  # fmt: skip
    assert ssm.main(argv) == 0
    assert "3 talkers (5 windows" in capsys.readouterr().out
    result = json.loads((tmp_path / "out/separation.json").read_text())
    assert result["num_frames"] == 193
    assert result["windows"][-1]["end"] == 193  # 3.85 s at 50 frames a second
    encoder = ssm.load_audio_encoder(str(qwen_folder))
    windows = list(ssm.separate_recording(separator, LONG, encoder, 1, threshold=0.0))
    for number in (1, 2, 3):
        saved = np.load(tmp_path / f"out/speaker_{number}.npy")
        assert saved.shape == (193, WIDTH)
        for index, window in enumerate(windows):
            assert window.start == index * 36
            stream = {t: s for s, t in window.talkers.items()}[number - 1]
            start = 7 * (index > 0)  # the first half of what is shared is the window's before
            end = len(window.features) - 7 * (index + 1 < len(windows))
            np.testing.assert_allclose(
                saved[window.start + start : window.start + end],
                window.separation.streams[stream][start:end].numpy(), atol=1e-5)  # fmt: skip


def test_memory_does_not_grow(qwen_folder, tmp_path):
    """A recording three times and one twenty times as long, in processes of their own."""
    separator = save_tiny_checkpoint(tmp_path / "s.pt", tiny_separator(3, seed=4, threshold=0.0))
    short, long = (
        long_recording.peak_memory(str(qwen_folder), seconds, str(separator))
        for seconds in (30, 95)
    )
    assert long < 1.1 * short
    assert Path(separator).is_file()
