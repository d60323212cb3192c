"""Recordings longer than the encoder's window: who is who, streams, answers, memory."""

import io
import json
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

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
    edit_json,
    save_tiny_checkpoint,
    sine,
    tiny_extractor,
    tiny_separator,
    write_wav,
)
from test_integration import TIMES, ends_a_segment, make_separator, timed_whisper
from tqdm import tqdm
from transformers import GenerationConfig, WhisperFeatureExtractor

import audio
import long_recordings
import speaker_separator_module as ssm
from audio import floor_log_mel, load_audio_encoder, log_mel, read_audio
from long_recordings import (
    TalkerTracker,
    answer_per_talker,
    ask,
    has_sound,
    join_texts,
    read_windows,
    separate_recording,
    window_step,
)

WINDOW, STEP = 16000, 11520  # of the tiny models
LONG = np.concatenate([sine(1.7, 150), np.zeros(4000, np.float32), sine(1.9, 260)])
COUNT = 1 + -(-(len(LONG) - WINDOW) // STEP)


@pytest.fixture
def long_file(tmp_path):
    soundfile.write(tmp_path / "long.wav", LONG, RATE, subtype="FLOAT")
    return tmp_path / "long.wav"


@pytest.fixture
def short_windows(monkeypatch):
    """Spectrograms too in windows of the tiny models' second."""
    monkeypatch.setattr(long_recordings, "WINDOW_SECONDS", 1)


def test_a_window_is_what_whisper_reads():
    assert WhisperFeatureExtractor().n_samples == long_recordings.WINDOW_SECONDS * RATE


@pytest.mark.parametrize("length", [640, STEP, WINDOW, WINDOW + 1, WINDOW + STEP, 61234])
def test_windows_cover_the_recording(length, monkeypatch):
    assert window_step(tiny_extractor().n_samples) == STEP
    monkeypatch.setattr(audio, "READ_BLOCK", length // 7 + 1)
    samples = np.arange(length, dtype=np.float32)
    windows = list(read_windows(samples, WINDOW))
    assert [start for start, *_ in windows] == [i * STEP for i in range(len(windows))]
    for start, window, alone in windows:
        assert np.array_equal(window, samples[start : start + WINDOW])
        assert alone == (length <= WINDOW)
    assert windows[-1][0] + len(windows[-1][1]) == length
    assert all(len(window) > WINDOW - STEP for _, window, _ in windows[1:])  # something new


# --------------------------------------------------------------------------------------------------
# Who is who


def lanes(*talkers, shift=0.0, frames=40):
    """Streams [S, frames, D] of made-up talkers ("a0": voice a, frames from 0), None is silence.

    A talker is a mean of its own plus what it says, which is the same in the same seconds; "a0+"
    begins to talk after 10 frames, which the window before has too. ``shift`` stands for what the
    place in the window adds to all.
    """
    streams = []
    for talker in talkers:
        torch.manual_seed(ord(talker[0]) if talker else 1)
        voice = torch.randn(WIDTH)
        said = torch.randn(400, WIDTH)
        first = int(talker[1:].rstrip("+")) if talker else 0
        spoken = voice + said[first : first + frames]
        if talker and talker.endswith("+"):
            spoken[:10] = 0
        streams.append(spoken if talker else torch.zeros(frames, WIDTH))
    return torch.stack(streams) + shift * torch.linspace(-1, 1, WIDTH)


def active(*flags):
    """The numbers of the streams whose flag is set."""
    return [number for number, flag in enumerate(flags) if flag]


def test_streams_are_followed_through_the_shared_seconds():
    tracker = TalkerTracker(shared=10)
    both = active(1, 1, 0)
    assert tracker.number(lanes("a0", "b0", None), both) == {0: 0, 1: 1}
    assert tracker.number(lanes("b30", "a30", None, shift=2), both) == {1: 0, 0: 1}
    later = lanes(None, "a60", "b60", shift=-2)
    assert tracker.number(later, active(0, 1, 1)) == {1: 0, 2: 1}


def test_numbers_by_first_appearance_and_return():
    """b comes later, a leaves and comes back in silence after the distances have been learnt."""
    tracker = TalkerTracker(shared=10)
    assert tracker.number(lanes(None, "a0"), active(0, 1)) == {1: 0}
    assert tracker.number(lanes("a30", "b30+"), active(1, 1)) == {0: 0, 1: 1}
    assert tracker.number(lanes("b60", None), active(1, 0)) == {0: 1}
    assert tracker.number(lanes(None, None), active(0, 0)) == {}
    assert tracker.number(lanes("a120", None), active(1, 0), sound=False) == {0: 0}
    assert tracker.number(lanes("c150+", "a150"), active(1, 1)) == {1: 0, 0: 2}


def test_after_silence_the_last_seen_goes_on():
    tracker = TalkerTracker(shared=10)
    assert tracker.number(lanes("a0", None), active(1, 0)) == {0: 0}
    assert tracker.number(lanes(None, None), active(0, 0)) == {}
    assert tracker.number(lanes(None, "a100"), active(0, 1), sound=False) == {1: 0}


def test_streams_of_a_window_with_nobody_are_not_followed():
    """It has sound, but no stream of it was a talker; both talkers come back the other way."""
    tracker = TalkerTracker(shared=10)
    assert tracker.number(lanes("a0", "b0"), active(1, 1)) == {0: 0, 1: 1}
    assert tracker.number(lanes("a30", "b30"), active(0, 0)) == {}
    back = lanes("b60", "a60")
    back[:, :10] = lanes("a0", "b0")[:, -10:]  # as the window before that one ended, by chance
    assert tracker.number(back, active(1, 1)) == {1: 0, 0: 1}


def test_a_recording_that_repeats_itself():
    """The voices of all windows are equal: no distance is divided by zero."""
    tracker = TalkerTracker(shared=10)
    streams = lanes("a0", "b0")
    for _ in range(3):
        assert tracker.number(streams, active(1, 1)) == {0: 0, 1: 1}


def test_a_known_count_is_never_exceeded():
    tracker = TalkerTracker(shared=10, num_speakers=2)
    seen = set()
    for index, pair in enumerate([("a", "b"), ("c", "b"), ("d", "e"), ("b", "a")]):
        streams = lanes(*(f"{name}{30 * index}" for name in pair))
        seen |= set(tracker.number(streams, active(1, 1), sound=False).values())
    assert seen == {0, 1}


def test_a_wrong_look_at_the_shared_seconds_is_outvoted_by_the_voice():
    """Both streams change places; a fifth of the shared seconds looks as if they had not."""
    tracker = TalkerTracker(shared=10)
    for first in (0, 30, 60):
        assert tracker.number(lanes(f"a{first}", f"b{first}"), active(1, 1)) == {0: 0, 1: 1}
    misleading = lanes("b90", "a90")
    misleading[0, :2] = lanes("a90")[0, :2]
    misleading[1, :2] = lanes("b90")[0, :2]
    assert tracker.number(misleading, active(1, 1)) == {0: 1, 1: 0}


def test_many_talkers_at_once():
    tracker, names = TalkerTracker(shared=10), "abcdefg"
    everybody = list(range(7))
    assert tracker.number(lanes(*(f"{n}0" for n in names)), everybody) == {s: s for s in range(7)}
    turned = lanes(*(f"{n}30" for n in names[::-1]))
    assert tracker.number(turned, everybody) == {s: 6 - s for s in range(7)}


def test_a_voice_is_the_mean_of_its_windows():
    tracker, streams = TalkerTracker(shared=10), [lanes(f"a{first}") for first in (0, 30, 60)]
    assert [tracker.number(stream, active(1)) for stream in streams] == [{0: 0}] * 3
    voices = torch.stack([tracker._voice(stream[0]) for stream in streams])
    torch.testing.assert_close(tracker.voices[0], voices.mean(0))


@pytest.mark.parametrize(
    ("distances", "talker"),
    [([1, 3], 1),  # who was found in 20 windows is likelier: by 2 ln 20 = 6
     ([1, 8], 0),  # but not where the voice is that much further, in mean distances of one talker
     ([7, 14], 2)])  # a new talker: further than twice the root of 1 and 9
def test_voice_and_number_of_windows(distances, talker):
    tracker = TalkerTracker(shared=10)
    tracker.windows, tracker.same, tracker.different = [1, 20], [0.5, 1.0, 1.5], [9.0]
    assert tracker._assign(np.array([distances], float), np.full((1, 2), np.nan)) == [talker]


def digits_of(speaker, seconds, rng):
    """Recorded digits of one speaker in a row, at an RMS of 0.05."""
    pieces, length = [], 0
    while length < seconds * RATE:
        samples = read_audio(
            SHARED / "fsdd" / f"{rng.integers(10)}_{speaker}_{rng.integers(5, 10)}.wav")
        gap = np.zeros(round(rng.uniform(0.02, 0.15) * RATE), np.float32)
        pieces += [samples * (0.05 / np.sqrt(np.mean(samples**2))), gap]
        length += len(samples) + len(gap)
    return np.concatenate(pieces)[: round(seconds * RATE)]


def two_tracks(seconds, seed):
    """Two talkers who take turns of 3 to 8 s, up to 2 s too early."""
    rng, tracks = np.random.default_rng(seed), np.zeros((2, seconds * RATE), np.float32)
    start, turn = 0.0, 0
    while start < seconds:
        length = min(rng.uniform(3, 8), seconds - start)
        samples = digits_of(("nicolas", "george")[turn % 2], length, rng)
        first = round(start * RATE)
        room = tracks[turn % 2, first : first + len(samples)]
        room += samples[: len(room)]
        start, turn = start + max(1, length + rng.uniform(-2, 1)), turn + 1
    return tracks


def test_turns_in_the_shared_seconds_tell_talkers_apart():
    """In the shared seconds one talks and the other is silent; the voices say nothing."""
    tracker = TalkerTracker(shared=10)
    speech = lanes("a0", "a0")
    speech[0, :10] = speech[1, -10:] = 0
    assert tracker.number(speech, active(1, 1)) == {0: 0, 1: 1}
    again = lanes("a30", "a30")
    again[0, :10] = 0  # who was silent at the end of the window before: stream 1 there
    assert tracker.number(again, active(1, 1)) == {0: 1, 1: 0}
    assert (len(tracker.same), len(tracker.different)) == (2, 2)


def test_real_voices_are_followed():
    """Three recordings in windows of 4 s; the talkers' own spectrograms come in random order."""
    if not (SHARED / "fsdd").is_dir():
        pytest.skip("no spoken digits")
    window, step, kept = 4 * RATE, 3 * RATE, []
    for seed in (2, 3, 4):
        tracks, rng = two_tracks(95, seed), np.random.default_rng(seed)
        tracker, right = TalkerTracker(100, num_speakers=2), []
        for first in range(0, tracks.shape[1] - window + 1, step):
            order = rng.permutation(2)
            alone = tracks[order, first : first + window]
            present = np.flatnonzero(np.square(alone).mean(1) > 1e-5).tolist()
            mixture = alone.sum(0)
            numbers = tracker.number(
                floor_log_mel(log_mel(torch.from_numpy(alone))), present,
                has_sound(mixture[: window - step], mixture))
            right.append(all(order[stream] == number for stream, number in numbers.items()))
        assert len(right) == 31
        kept.append(max(np.mean(right), 1 - np.mean(right)))  # either talker may come first
    assert np.mean(kept) >= 0.95, kept


# --------------------------------------------------------------------------------------------------
# Streams


def changing_gains(model, gains=(-0.1, -0.3, -0.6)):
    """Make every stream the mixture plus a gain; the order changes from call to call."""
    gains, calls = torch.tensor(gains), []

    def gains_of(spectrograms, frame_mask=None):
        order = torch.roll(torch.arange(3), len(calls))
        calls.append(order)
        probs = torch.tensor([0.9, 0.8, 0.7])[order].expand(len(spectrograms), 3)
        # By frame, so that it shows where a window's part begins and ends.
        steps = torch.arange(spectrograms.shape[1])[:, None] * 1e-4
        values = gains[order].view(1, 3, 1, 1) - steps
        return values.expand(len(spectrograms), 3, *spectrograms.shape[1:]), probs

    def forward(spectrograms, frame_mask=None):
        values, probs = gains_of(spectrograms)
        return spectrograms[:, None] + values, probs

    separator = getattr(model, "speaker_separator", model)
    separator.gains, separator.forward = gains_of, forward
    return model


def spectrogram_windows(bins):
    for first in range(0, COUNT * STEP, STEP):
        samples = LONG[first : first + WINDOW]
        yield first // 160, log_mel(torch.from_numpy(samples), bins)


def test_every_frame_is_from_one_window(short_windows):
    """Of the frames two windows share, the first half is the earlier one's."""
    separator = changing_gains(make_separator("spectrogram"))
    separate = ssm.window_separator(separator, 0.5, None)
    recording = separate_recording(separate, LONG, num_bins=16)
    assert recording.num_windows == COUNT and recording.frame_rate == 100
    assert recording.mixture.shape == (len(LONG) // 160, 16)
    assert [(t.number, t.probability) for t in recording.talkers] == [
        (1, pytest.approx(0.9)), (2, pytest.approx(0.8)), (3, pytest.approx(0.7))]
    for talker, gain in zip(recording.talkers, (-0.1, -0.3, -0.6), strict=True):
        assert len(talker.windows) == COUNT
        assert [window["end"] for window in talker.windows] == [
            min(i * STEP + WINDOW, len(LONG)) / RATE for i in range(COUNT)]
        for index, (first, frames) in enumerate(spectrogram_windows(16)):
            begin = 14 * (index > 0)
            end = len(frames) - 14 * (index + 1 < COUNT)
            place = slice(first + begin, first + end)
            torch.testing.assert_close(recording.mixture[place], frames[begin:end])
            expected = gain - 1e-4 * torch.arange(begin, end)[:, None].expand(-1, 16)
            torch.testing.assert_close(talker.values[place], expected)
        stream = recording.stream(talker)
        torch.testing.assert_close(stream, floor_log_mel(recording.mixture + talker.values))
        assert stream.amax() - stream.amin() <= 2 + 1e-5


def test_a_talker_is_absent_elsewhere(short_windows):
    """In windows where it was not found, it is 80 dB down; windows come in batches."""
    def separate(features, alone):
        low = torch.arange(16) < 8
        streams = torch.stack([torch.where(low, -0.1, -1.0), torch.where(low, -1.0, -0.1)])
        streams = streams[:, None].expand(len(features), 2, features.shape[1], 16)
        here = torch.tensor([[True, sum(sizes) + i == 1] for i in range(len(features))])
        sizes.append(len(features))
        return streams, torch.tensor([[0.9, 0.6]] * len(features)), here

    sizes = []
    recording = separate_recording(separate, LONG, num_bins=16)
    assert sum(sizes) == COUNT and max(sizes) == sizes[0] == long_recordings.WINDOW_BATCH
    first, second = recording.talkers
    assert len(second.windows) == 1 and second.windows[0]["start"] == STEP / RATE
    low = [-1.0] * 8 + [-0.1] * 8
    torch.testing.assert_close(second.values[72 + 14 : 172], torch.tensor([low] * 86))
    assert (second.values[: 72 + 14] == -2).all() and (second.values[172:] == -2).all()
    torch.testing.assert_close(first.values, torch.tensor([low[::-1]] * len(first.values)))


def test_the_tracker_is_told_whether_shared_seconds_have_sound(
    integrated, processor, short_windows, monkeypatch
):
    told, number = [], TalkerTracker.number
    monkeypatch.setattr(TalkerTracker, "number", lambda tracker, streams, present, sound: (
        told.append(sound) or number(tracker, streams, present, sound)))
    samples = LONG.copy()
    samples[STEP:WINDOW] = 0  # what the first two windows share
    answer_per_talker(integrated, processor, samples, max_new_tokens=1)
    assert told == [True, False, True, True, True][:COUNT]
    separate_recording(
        ssm.window_separator(make_separator("spectrogram"), 0.5, None), samples, num_bins=16)
    assert told[COUNT:] == told[:COUNT]


def test_windows_that_share_silence_share_no_words(
    integrated, processor, short_windows, monkeypatch
):
    numbers, samples = [], LONG.copy()
    samples[STEP:WINDOW] = 0  # what the first two windows share
    monkeypatch.setattr(long_recordings, "join_texts", lambda texts, shared: (
        numbers.append([number for number, _ in texts]) or ""))
    answer_per_talker(integrated, processor, samples, max_new_tokens=1)
    assert numbers and all(found == [0, *range(2, COUNT + 1)] for found in numbers)


def test_infer_a_long_recording(qwen_folder, long_file, tmp_path, capsys):
    """Files are as long as the recording and hold the talker's stream of every window."""
    source = {"encoder": str(qwen_folder), "layer": 1, "frame_rate": 50.0}
    separator = tiny_separator(3, seed=4, feature_source=source)
    path = save_tiny_checkpoint(tmp_path / "s.pt", separator)
    argv = ["infer", f"--checkpoint={path}", f"--input={long_file}", "--threshold=0", *CPU_FLAGS,
            f"--output_dir={tmp_path / 'out'}"]  # fmt: skip
    assert ssm.main(argv) == 0
    assert "3 talkers" in capsys.readouterr().out
    result = json.loads((tmp_path / "out/separation.json").read_text())
    assert (result["num_frames"], result["num_windows"]) == (193, COUNT)
    assert result["speakers"][0]["windows"][-1]["end"] == pytest.approx(len(LONG) / RATE)
    encoder, tracker = load_audio_encoder(str(qwen_folder), 1), TalkerTracker(14)
    for index in range(COUNT):
        samples = LONG[index * STEP : index * STEP + WINDOW]
        features = encoder.encode([samples])[0]
        streams, _, active = ssm.separate(separator, features, threshold=0.0)
        sound = has_sound(samples[: WINDOW - STEP], samples)
        numbers = tracker.number(streams, active.nonzero().flatten().tolist(), sound)
        begin = 7 * (index > 0)
        end = len(features) - 7 * (index + 1 < COUNT)
        for stream, number in numbers.items():
            saved = np.load(tmp_path / f"out/speaker_{number + 1}.npy")
            assert saved.shape == (193, WIDTH)
            np.testing.assert_allclose(
                saved[index * 36 + begin : index * 36 + end], streams[stream][begin:end].numpy(),
                atol=1e-5)


# --------------------------------------------------------------------------------------------------
# Joined texts


@pytest.mark.parametrize(
    ("texts", "joined"),
    [
        ([(0, "one two three fo")], "one two three fo"),
        ([(0, "one two three"), (1, "Three, four")], "one two three four"),
        # Words that an edge cut in two go.
        ([(0, "a b c d three fo"), (1, "hree three four five six e")],
         "a b c d three four five six e"),
        ([(0, "five six"), (2, "six seven")], "five six six seven"),  # no shared seconds
        ([(0, "one two"), (1, "three four")], "one two three four"),
        ([(0, "no no x"), (1, "no no one")], "no no one"),
        # The shared 0.3 s hold two words, and a cut one.
        ([(0, "no no no no"), (1, "no no no no a")], "no no no no no a"),
        ([(0, ""), (1, "one")], "one"),
        ([], ""),
        ([(0, "今天天氣很好"), (1, "很好我們出去")], "今天天氣很好我們出去"),
        ([(0, "今天 天氣很好。"), (1, "好。出去")], "今天天氣很好。出去"),
        ([(0, "いい天気"), (2, "天気です")], "いい天気天気です"),
        ([(0, "one two three"), (1, "three 天氣 很好 four")], "one two three天氣很好four"),
    ],
)
def test_join_texts(texts, joined):
    assert join_texts(texts, 0.3) == joined


@pytest.mark.parametrize(("later", "joined"), [
    ("a I think it b", "I think it b"), ("a b I think it c", "I think it x y a b I think it c")])
def test_words_in_common_lie_in_the_shared_second(later, joined):
    """It holds six words: five from the run on, and those before it in the later text."""
    assert join_texts([(0, "I think it x y"), (1, later)], 1.0) == joined


@pytest.mark.parametrize("last", [0, 3, 30, 60])
def test_shared_words_are_said_once(last):
    """Of a talker of 3 words a second, late or throughout, whatever the last window's length."""
    said = [f"w{i}" for i in range(90 + last)]
    for first in (0, 75):  # the talker's first word; windows share seconds 22 to 30
        parts = said[first:90], said[max(first, 66) :]
        texts = [(i, " ".join(part)) for i, part in enumerate(parts)]
        assert join_texts(texts, 8) == " ".join(said[first:])


def test_windows_that_hear_words_differently():
    """Three words that both heard are enough, two are not."""
    assert join_texts([(0, "x x b c d e"), (1, "a b c d f g")], 2) == "x x b c d f g"
    assert join_texts([(0, "x x b c y e"), (1, "a b c d f g")], 2) == "x x b c y e a b c d f g"


# --------------------------------------------------------------------------------------------------
# Answers, window by window


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


@pytest.fixture(params=["spectrogram", 1])
def integrated(request, qwen, tmp_path):
    """A Qwen2-Audio with either kind of separator."""
    path = save_tiny_checkpoint(tmp_path / "put.pt", make_separator(request.param))
    layer = None if request.param == "spectrogram" else 1
    return ssm.integrate_speaker_separator(
        qwen, separator_checkpoint=path, layer=layer, threshold=0.5)


def test_answers_of_a_long_recording(integrated, processor, long_file):
    """Each talker's text is that of its windows, whichever stream it is in."""
    model = changing_streams(integrated)
    rows = answer_per_talker(model, processor, long_file, max_new_tokens=3)
    assert [row["speaker"] for row in rows] == [1, 2, 3]
    assert [row["probability"] for row in rows] == [0.9, 0.8, 0.7]
    for row, gain in zip(rows, (0.3, 1.0, 3.0), strict=True):
        assert len(row["windows"]) == COUNT
        for index, window in enumerate(row["windows"]):
            start = index * STEP
            end = min(start + WINDOW, len(LONG))
            assert (window["start"], window["end"]) == (start / RATE, end / RATE)
            alone = changing_streams(model, (gain, gain, gain))
            expected = answer_per_talker(
                alone, processor, LONG[start:end], num_speakers=1, max_new_tokens=3)
            assert window["text"] == expected[0]["text"]
        texts = [(i, window["text"]) for i, window in enumerate(row["windows"])]
        assert row["text"] == join_texts(texts, (WINDOW - STEP) / RATE)


def test_samples_in_memory(integrated, processor, long_file):
    from_file = answer_per_talker(integrated, processor, long_file, max_new_tokens=2)
    for samples in (LONG, torch.from_numpy(LONG)):
        assert answer_per_talker(integrated, processor, samples, max_new_tokens=2) == from_file
    twice = soxr.resample(LONG, RATE, 2 * RATE)
    changing_streams(integrated)
    rows = answer_per_talker(
        integrated, processor, twice, sampling_rate=2 * RATE, max_new_tokens=2)
    assert rows[0]["windows"][-1]["end"] == pytest.approx(len(LONG) / RATE, abs=1e-3)


def test_shortest_recordings(integrated, processor):
    """Qwen2-Audio makes one token of 700 samples, which transformers takes for none yet."""
    samples = np.random.default_rng(0).normal(0, 0.1, 4800).astype(np.float32)
    for recordings in ([samples[:700]], [samples[:700], samples]):
        texts = ask(changing_streams(integrated), processor, recordings, max_new_tokens=2)
        assert len(texts) == 3 * len(recordings)


def test_a_question_from_another_thread(processor):
    """Only the main one can bound what a template takes."""
    with ThreadPoolExecutor(1) as pool:
        prompt = pool.submit(long_recordings.build_prompt, processor, "Who speaks?").result()
    assert prompt == long_recordings.build_prompt(processor, "Who speaks?")


@pytest.mark.skipif(sys.platform != "linux", reason="templates are bounded on Linux alone")
def test_a_question_leaves_the_callers_timer(processor):
    """A test runner's limit, for one."""
    signal.setitimer(signal.ITIMER_REAL, 500)
    try:
        long_recordings.build_prompt(processor, "Who speaks?")
        assert 400 < signal.getitimer(signal.ITIMER_REAL)[0] <= 500
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def test_a_separator_in_training_infers_without_dropout():
    separator = make_separator("spectrogram", dropout=0.5)
    _, _, talkers = ssm.infer_recording(LONG, separator, threshold=0.0)
    _, _, again = ssm.infer_recording(LONG, separator.train(), threshold=0.0)
    for (_, stream, _), (_, same, _) in zip(talkers, again, strict=True):
        assert torch.equal(stream, same)


def test_known_count_of_a_long_recording(integrated, processor):
    model = changing_streams(integrated)
    rows = answer_per_talker(model, processor, LONG, num_speakers=2, max_new_tokens=2)
    assert [row["speaker"] for row in rows] == [1, 2]
    with pytest.raises(ValueError, match="0 to 3"):
        answer_per_talker(integrated, processor, LONG, num_speakers=4)


def test_a_window_may_lack_a_known_talker(integrated, processor):
    """A count is of the whole recording: below the threshold nobody is made up in a window."""
    model = changing_streams(integrated)
    model._speaker_integration.threshold = 0.85
    rows = answer_per_talker(model, processor, LONG, num_speakers=2, max_new_tokens=2)
    assert [row["speaker"] for row in rows] == [1]
    rows = answer_per_talker(model, processor, LONG[:WINDOW], num_speakers=2, max_new_tokens=2)
    assert [row["speaker"] for row in rows] == [1, 2]


@pytest.mark.parametrize(("alone", "found"), [(True, 2), (False, 1)])
def test_a_window_beside_others_may_lack_a_known_talker(alone, found):
    """As above, where the whole recording is separated: one talker reaches the threshold."""
    separate = ssm.window_separator(changing_gains(make_separator("spectrogram")), 0.85, 2)
    assert separate(torch.zeros(1, 10, 16), alone)[2].sum() == found


def test_the_probability_of_a_talker_is_its_highest():
    parts = [(number, {"probability": p, "text": ""}) for number, p in enumerate((0.6, 0.9, 0.7))]
    (row,) = long_recordings._join_answers({1: parts}, "speaker", 7.5)
    assert row["probability"] == 0.9


def test_joint_answers_of_a_long_recording(integrated, processor):
    (row,) = answer_per_talker(
        changing_streams(integrated), processor, LONG, mode="joint", max_new_tokens=2)
    assert row["speakers"] == [1, 2, 3]
    assert len(row["windows"]) == COUNT
    assert all(window["speakers"] == [1, 2, 3] for window in row["windows"])


def test_a_model_without_a_separator(qwen, processor):
    with pytest.raises(ValueError, match="integrate_speaker_separator first"):
        answer_per_talker(qwen, processor, LONG)


# --------------------------------------------------------------------------------------------------
# Answers of Whisper


@pytest.fixture
def listener(whisper_folder):
    """A tiny Whisper that knows timestamps, and a processor with a word for each token."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, WhisperProcessor

    words = {f"t{i}": i for i in range(100)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="t99"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="t0", bos_token="t1", eos_token="t2",
        additional_special_tokens=[f"t{i}" for i in range(90, 100)])
    return timed_whisper(whisper_folder), WhisperProcessor(tiny_extractor(), tokenizer)


def test_a_whisper_that_repeats_itself_decodes_again(listener):
    model, processor = listener
    options = long_recordings.answer_options(model, processor, {"max_new_tokens": None})
    assert options["temperature"][0] == 0 and max(options["temperature"]) > 0
    assert options["compression_ratio_threshold"] < 2
    assert options["max_new_tokens"] == model.config.max_target_positions // 2
    given = {"max_new_tokens": 3, "temperature": 0.0, "num_beams": 2}
    assert long_recordings.answer_options(model, processor, given).items() >= given.items()
    for limit in ({"max_length": 9}, {"generation_config": model.generation_config}):
        assert "max_new_tokens" not in long_recordings.answer_options(model, processor, limit)
    assert options["task"] == "transcribe"  # many languages, no task in its files
    short = {"generation_config": GenerationConfig(max_new_tokens=2)}  # the rest is the model's
    assert long_recordings.answer_options(model, processor, short)["task"] == "transcribe"
    for name, value in (("task", "translate"), ("is_multilingual", False)):
        changed = {"generation_config": GenerationConfig(**{name: value})}
        assert "task" not in long_recordings.answer_options(model, processor, changed)
    plain = {"generation_config": GenerationConfig(temperature=1.0)}  # as if none were given
    assert "temperature" in long_recordings.answer_options(model, processor, plain)
    greedy = {"generation_config": GenerationConfig(temperature=0.0)}
    assert "temperature" not in long_recordings.answer_options(model, processor, greedy)
    assert "temperature" in long_recordings.answer_options(model, processor, short)
    model.generation_config.temperature = 0.0
    assert "temperature" not in long_recordings.answer_options(model, processor, short)
    model.generation_config.temperature = None
    model.generation_config.task_to_id = None
    assert "task" not in long_recordings.answer_options(model, processor, short)
    hidden = make_separator("output")
    ssm.integrate_speaker_separator(model, None, hidden)
    assert "temperature" not in long_recordings.answer_options(model, processor, {})  # cannot


SAY = {**TIMES, "logits_processor": [ends_a_segment]}


def test_whisper_decodes_each_talkers_spectrogram(
    listener, long_file, short_windows, monkeypatch
):
    """Its own long-form algorithm on the stitched streams, as on any recording."""
    model, processor = listener
    shown = []
    monkeypatch.setattr(long_recordings, "_show_progress", lambda bar, seek: shown.append(seek))
    separator = changing_gains(make_separator("spectrogram"))
    recording = separate_recording(
        ssm.window_separator(separator, 0.5, None), LONG, num_bins=16)
    expected = [
        model.generate(recording.stream(t).T[None], **SAY, return_segments=True)["segments"][0]
        for t in recording.talkers]
    changing_gains(separator)
    ssm.integrate_speaker_separator(model, None, separator, threshold=0.5)
    own = {name: value for name, value in SAY.items() if name != "return_timestamps"}
    rows = answer_per_talker(model, processor, long_file, **own, return_segments=False)
    assert [(row["speaker"], row["probability"]) for row in rows] == [
        (1, 0.9), (2, 0.8), (3, 0.7)]
    for row, parts in zip(rows, expected, strict=True):
        texts = [" ".join(f"t{i}" for i in part["tokens"].tolist() if 2 < i < 90)
                 for part in parts]
        assert [part["text"] for part in row["windows"]] == texts
        assert row["text"] == " ".join(texts)
        starts = [part["start"] for part in row["windows"]]
        assert starts == pytest.approx([0.4 * i for i in range(10)], abs=0.011)  # to 3.85 s
        for part in row["windows"]:  # none ends after the recording
            end = min(part["start"] + 0.4, len(LONG) / RATE)
            assert part["end"] == pytest.approx(end, abs=0.0051)
        assert {part["probability"] for part in row["windows"]} == {row["probability"]}
    assert len({row["text"] for row in rows}) > 1
    assert [seek.tolist() for seek in shown] == [[[40 * i, 385]] * 3 for i in range(10)]


def test_a_bar_shows_the_seconds_that_all_talkers_have():
    bar = tqdm(total=90, file=io.StringIO())
    for frames, seconds in (([4500, 3000], 30), ([8999, 9000], 89)):
        long_recordings._show_progress(bar, torch.tensor([frames, [9000, 9000]]).T)
        assert bar.n == seconds


def test_what_whisper_makes_up_in_silence_is_left_out():
    """Of segments of one second the second talker is silent in the first, faint in the last."""
    frames, segments = 3 * audio.FRAME_RATE, []
    for row in (0, 10):
        segments.append([{"start": torch.tensor(float(s)), "end": torch.tensor(s + 1.0),
                          "tokens": torch.tensor([row + s])} for s in range(3)])
    late = torch.zeros(frames, 16)
    late[: frames // 2] = long_recordings.ABSENT
    late[-audio.FRAME_RATE :] = -0.75  # 30 dB
    talkers = [long_recordings.Talker(number, gains, [{"probability": 0.9}])
               for number, gains in ((1, torch.zeros(frames, 16)), (2, late))]
    recording = long_recordings.SeparatedRecording(
        torch.rand(frames, 16), talkers, audio.FRAME_RATE, 3)
    integration = SimpleNamespace(
        model=SimpleNamespace(device="cpu", dtype=torch.float32),
        original_generate=lambda **_: {
            "sequences": [[0, 1, 2], [10, 11, 12]], "segments": segments})
    processor = SimpleNamespace(
        feature_extractor=SimpleNamespace(nb_max_frames=frames // 3),
        decode=lambda row, **_: " ".join(str(int(token)) for token in row))
    rows = long_recordings._decode_streams(integration, processor, recording, {})
    assert [row["text"] for row in rows] == ["0 1 2", "11"]
    assert [(part["start"], part["text"]) for part in rows[1]["windows"]] == [(1.0, "11")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_whisper_of_one_window(dtype, listener):
    """Of one talker who is the whole recording Whisper reads what its own processor makes.

    It is loud to the end, so that what stands after the end matters; there the processor's last
    frames reach into the silence, and those of windows do not.
    """
    model, processor = listener
    noise, heard = np.random.default_rng(0).normal(0, 0.1, 8000).astype(np.float32), []
    untouched = model.to(dtype).generate
    model.generate = lambda **inputs: heard.append(inputs) or untouched(**inputs)
    separator = make_separator("spectrogram")
    separator.gains = lambda features, mask=None: (
        features.new_zeros(1, 3, *features.shape[1:]), torch.tensor([[1.0, 0.0, 0.0]]))
    ssm.integrate_speaker_separator(model, None, separator, threshold=0.5)
    options = {"max_new_tokens": 8, "language": "en", "suppress_tokens": list(range(100, 160))}
    (row,) = answer_per_talker(model, processor, noise, **options)
    got = heard[0]["input_features"]
    own = processor.feature_extractor(noise, sampling_rate=RATE, return_tensors="pt")
    for part in (slice(0, 48), slice(52, 100)):
        expected = own["input_features"][..., part].to(dtype)
        torch.testing.assert_close(got[..., part], expected, atol=2e-3, rtol=0)
    assert heard[0]["attention_mask"].sum() == 50
    said = [f"t{i}" for i in untouched(got, **options)[0].tolist() if 2 < i < 90]
    assert row["text"] == " ".join(said) != ""
    assert [(part["start"], part["end"]) for part in row["windows"]] == [(0.0, 0.5)]
    separator.gains = lambda features, mask=None: (
        features.new_zeros(1, 3, *features.shape[1:]), torch.zeros(1, 3))
    assert answer_per_talker(model, processor, noise, **options) == []


def test_whisper_is_told_where_recordings_end(listener):
    """Without a mask transformers warns of batches."""
    model, processor = listener
    untouched, lengths = model.generate, []
    model.generate = lambda **inputs: (
        lengths.append(inputs["attention_mask"].sum(1).tolist()) or untouched(**inputs))
    ask(model, processor, [LONG[:RATE], LONG[:8000]], max_new_tokens=2)
    assert lengths == [[100, 50]]


def test_whisper_with_hidden_features_answers_window_by_window(listener):
    model, processor = listener
    ssm.integrate_speaker_separator(model, None, make_separator(1), layer=1, threshold=0.5)
    rows = answer_per_talker(changing_streams(model), processor, LONG, max_new_tokens=3)
    assert [row["speaker"] for row in rows] == [1, 2, 3]
    for row in rows:
        assert [part["start"] for part in row["windows"]] == [i * STEP / RATE for i in range(COUNT)]
        texts = [(i, part["text"]) for i, part in enumerate(row["windows"])]
        assert row["text"] == join_texts(texts, (WINDOW - STEP) / RATE)


@pytest.mark.parametrize("options", [{"prompt": "Who?"}, {"mode": "joint"}])
def test_whisper_takes_no_prompt(options, listener):
    model, processor = listener
    ssm.integrate_speaker_separator(model, None, make_separator("spectrogram"))
    with pytest.raises(ValueError, match="mode must be separate or joint, not 'joined'"):
        answer_per_talker(model, processor, np.zeros(RATE, np.float32), mode="joined")
    with pytest.raises(ValueError, match="no prompt and no joint mode"):
        answer_per_talker(model, processor, LONG, **options)


# --------------------------------------------------------------------------------------------------
# The command


@pytest.fixture
def whisper_path(listener, tmp_path):
    """The tiny Whisper on disk, in half precision as many are."""
    model, processor = listener
    model.generation_config.max_length = 12
    model.generation_config.language = "en"
    model.generation_config._from_model_config = False  # it would be made anew when it is read
    model.half().save_pretrained(tmp_path / "whisper")
    processor.save_pretrained(tmp_path / "whisper")
    return tmp_path / "whisper"


@pytest.fixture
def checkpoint(request, tmp_path, qwen_checkpoint, spectrogram_checkpoint):
    return {1: qwen_checkpoint, "spectrogram": spectrogram_checkpoint}[request.param]


either = pytest.mark.parametrize("checkpoint", ["spectrogram", 1], indirect=True)


def integrate_flags(model, checkpoint, *audio, more=()):
    return ["integrate", f"--model={model}", f"--checkpoint={checkpoint}", *CPU_FLAGS,
            "--threshold=0", *map(str, more), "--audio", *map(str, audio)]  # fmt: skip


@pytest.mark.parametrize("option", [
    {"num_return_sequences": 2, "num_beams": 2}, {"return_dict_in_generate": True},
    {"return_segments": True}, {"return_token_timestamps": True}])  # fmt: skip
def test_one_text_for_each_talker(option, integrated, processor):
    for options in (option, {"generation_config": GenerationConfig(**option)}):
        with pytest.raises(ValueError, match=f"{next(iter(option))} is for generate"):
            answer_per_talker(integrated, processor, LONG, **options)
    assert answer_per_talker(
        integrated, processor, LONG, num_return_sequences=1, max_new_tokens=1)


@either
def test_the_command_with_whisper(
    checkpoint, whisper_path, long_file, tmp_path, capsys, monkeypatch
):
    """A line per talker and recording, in the precision of the model's file."""
    second = tmp_path / "b.wav"
    soundfile.write(second, LONG[:9000], RATE)
    argv = integrate_flags(whisper_path, checkpoint, long_file, second,
                           more=[f"--json={tmp_path / 'a.json'}", "--max_new_tokens=6"])
    assert ssm.main(argv) == 0
    printed = capsys.readouterr().out
    answers = json.loads((tmp_path / "a.json").read_text())
    assert list(answers) == [str(long_file), str(second)]
    assert all(len(rows) == 3 for rows in answers.values())
    for rows in answers.values():
        for row in rows:
            assert f"Speaker {row['speaker']} ({row['probability']:.2f}): {row['text']}" in printed
    assert str(checkpoint) in printed
    for flag in ("--prompt=Who speaks?", "--mode=joint"):
        assert_fails(capsys, [*argv, flag], "Qwen2-Audio", "Whisper")
    with monkeypatch.context() as patch:
        for name in ("separate_recording", "_answer_windows"):
            patch.delattr(long_recordings, name)  # refused before the recording is separated
        assert_fails(capsys, [*argv, "--language=klingon"], "writes no 'klingon'", "de, en")
    english = shutil.copytree(whisper_path, tmp_path / "english")
    edit_json(english / "generation_config.json", lambda about: about.update(is_multilingual=False))
    argv = integrate_flags(english, checkpoint, second, more=["--language=de"])
    assert_fails(capsys, argv, f"{english} writes English alone: leave out --language")


@either
def test_the_command_with_qwen(checkpoint, qwen_folder, long_file, tmp_path, capsys):
    more = ["--max_new_tokens=2", f"--json={tmp_path / 'a.json'}", "--num_speakers=2"]
    assert ssm.main(integrate_flags(qwen_folder, checkpoint, long_file, more=more)) == 0
    rows = json.loads((tmp_path / "a.json").read_text())[str(long_file)]
    assert [row["speaker"] for row in rows] == [1, 2]
    assert max(len(row["windows"]) for row in rows) == COUNT
    assert capsys.readouterr().out.count("Speaker ") == 2
    argv = integrate_flags(qwen_folder, checkpoint, long_file, more=["--mode=joint", *more])
    assert ssm.main(argv) == 0
    (row,) = json.loads((tmp_path / "a.json").read_text())[str(long_file)]
    numbers = ", ".join(map(str, row["speakers"]))
    assert f"Speakers {numbers} ({row['probability']:.2f}): " in capsys.readouterr().out


def test_the_command_finds_nobody(qwen_folder, spectrogram_checkpoint, long_file, capsys):
    argv = integrate_flags(qwen_folder, spectrogram_checkpoint, long_file)
    assert ssm.main([*argv, "--threshold=1"]) == 0
    assert "no talker found" in capsys.readouterr().out


def damaged_audio(kind, folder):
    path = folder / f"{kind}.wav"
    if kind == "nan":  # found before any answer is given
        samples = np.r_[np.zeros(20 * RATE), np.nan].astype(np.float32)
        soundfile.write(path, samples, RATE, subtype="FLOAT")
    elif kind == "short":
        soundfile.write(path, np.zeros(600, np.float32), RATE)
    elif kind == "empty":
        soundfile.write(path, np.zeros(0, np.float32), RATE)
    elif kind == "text":
        path.write_text("no audio")
    elif kind == "truncated":
        path = path.with_suffix(".flac")
        noise = np.random.default_rng(0).normal(0, 0.1, 5 * RATE)
        soundfile.write(path, noise, RATE)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path


@pytest.mark.parametrize(
    ("kind", "words"),
    [("nan", "NaN"), ("short", "38 ms"), ("empty", "no samples"), ("text", "cannot read"),
     ("truncated", "cannot read"), ("missing", "no such audio file")],
)  # fmt: skip
def test_bad_audio(kind, words, qwen_folder, spectrogram_checkpoint, long_file, tmp_path, capsys):
    """Named in one line, before the first recording is answered."""
    path = damaged_audio(kind, tmp_path)
    argv = integrate_flags(qwen_folder, spectrogram_checkpoint, long_file, path)
    assert_fails(capsys, argv, words, path.name)
    assert "Speaker" not in capsys.readouterr().out
    argv = ["infer", f"--input={path}", f"--checkpoint={spectrogram_checkpoint}", *CPU_FLAGS]
    assert_fails(capsys, argv, words, path.name)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--prompt=What does <|AUDIO|> say?"], ["<|AUDIO|>"]),
        (["--language=en"], ["--language is for Whisper"]),
        (["--num_speakers=4"], ["num_speakers", "0 to 3"]),
        (["--json=gone/a.json"], ["gone/a.json"]),
        (["--layer=1"], ["layer", "spectrogram"]),
        (["--checkpoint=gone.pt"], ["gone.pt"]),
        (["--model=no/such_model"], ["no/such_model"]),
        (["--device=abacus"], ["abacus"]),
        (["--threshold=1.5"], ["1.5"]),
    ],
    ids=str,
)
def test_bad_flags(flags, words, qwen_folder, spectrogram_checkpoint, long_file, capsys):
    argv = integrate_flags(qwen_folder, spectrogram_checkpoint, long_file)
    assert_fails(capsys, [*argv, *flags], *words)


def test_separator_of_another_model(qwen_folder, long_file, tmp_path, capsys):
    path = save_tiny_checkpoint(tmp_path / "wide.pt", tiny_separator(3, feature_dim=64))
    argv = integrate_flags(qwen_folder, path, long_file)
    assert_fails(capsys, argv, "64 wide", "32", "spectrogram separator")
    path = save_tiny_checkpoint(tmp_path / "s.pt", tiny_separator(3))
    argv = integrate_flags(qwen_folder, path, long_file, more=["--layer=3"])
    assert_fails(capsys, argv, "0 to 2")


# --------------------------------------------------------------------------------------------------
# Memory

MEASURE = """
import resource, sys
import numpy as np, soundfile
sys.path.insert(0, {root!r})
import long_recordings, speaker_separator_module as ssm
from audio import load_model
long_recordings.WINDOW_SECONDS = 8
model, processor = load_model({model!r})
ssm.integrate_speaker_separator(model, None, {hidden!r}, threshold=1.0)
spectrograms = ssm.window_separator(ssm.load_separator({spectrogram!r}), 0.0, None)
rng = np.random.default_rng(0)
for seconds in (30, 300):
    with soundfile.SoundFile("a.wav", "w", 16000, 1) as file:
        for _ in range(seconds):
            file.write(0.1 * rng.normal(size=16000))
    assert long_recordings.answer_per_talker(model, processor, "a.wav") == []
    found = long_recordings.separate_recording(spectrograms, "a.wav", num_bins=16)
    assert len(found.mixture) == 100 * seconds
    streams = sum(t.values.nbytes for t in found.talkers) + found.mixture.nbytes
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, streams)
    del found
"""


def test_memory_does_not_grow(qwen_folder, qwen_checkpoint, spectrogram_checkpoint, tmp_path):
    """A recording ten times as long takes no more than its streams do.

    Measured: 8 MB more. Its samples alone would take 17 MB more.
    """
    script = MEASURE.format(root=str(ROOT), model=str(qwen_folder), hidden=str(qwen_checkpoint),
                            spectrogram=str(spectrogram_checkpoint))  # fmt: skip
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True,
                          text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr
    (short, _), (long, streams) = (map(int, line.split()) for line in done.stdout.splitlines())
    assert long - short < streams + 20e6


@pytest.mark.parametrize("seconds", [1.0, 70.0])
def test_a_recording_is_decoded_once(seconds, tmp_path, monkeypatch):
    """Separation reads a file through one time, whatever its length."""
    path, opened = write_wav(tmp_path / "a.wav", sine(seconds, 200)), []
    blocks = audio._blocks_of_file
    monkeypatch.setattr(audio, "_blocks_of_file", lambda p: opened.append(p) or blocks(p))

    def separate(features, alone):
        talker = torch.ones(len(features), 1)
        return torch.zeros_like(features)[:, None], talker, talker.bool()

    recording = long_recordings.separate_recording(separate, path)
    assert opened == [path]
    assert len(recording.mixture) == 100 * seconds
    ssm.infer_recording(path, make_separator("spectrogram"))
    assert opened == [path] * 2
