"""Reading and writing audio, log-mel spectrograms, gains back to audio, frozen encoders."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import soundfile
import soxr
import torch
from conftest import RATE, ROOT, WIDTH, sine, tower_states

import audio
from mixing import list_recordings
from speaker_separator_module import audio_tower_of

RECORDINGS = [sine(0.9, 150), sine(0.35, 420), sine(0.61, 260)]
LAYERS = [None, 0, 1, 2]


# --------------------------------------------------------------------------------------------------
# Reading and writing


def test_read_audio(tmp_path):
    """A sine stays that sine at another rate; channels are averaged."""
    t = np.arange(8000) / 8000
    left, right = np.sin(2 * np.pi * 440 * t), np.zeros(8000)
    soundfile.write(tmp_path / "a.wav", np.stack([left, right], 1), 8000, subtype="FLOAT")
    samples = audio.read_audio(tmp_path / "a.wav")
    expected = 0.5 * np.sin(2 * np.pi * 440 * np.arange(16000) / 16000)
    assert samples.dtype == np.float32
    np.testing.assert_allclose(samples[200:-200], expected[200:-200], atol=2e-3)
    assert audio.read_audio([0.5, -0.5]).tolist() == [0.5, -0.5]


@pytest.mark.parametrize(
    ("other", "heard"), [(-0.999, 1.0), (-1.001, 1.0), (-0.9, 1.0), (-0.4, 0.3), (0.0, 0.5)])
def test_channels_in_opposite_phase_do_not_cancel(other, heard, tmp_path):
    """Where the power of their sum is below 0.3 of the louder one's, the first is read."""
    samples = sine(0.4, 200)
    path = tmp_path / "stereo.wav"
    soundfile.write(path, np.stack([samples, other * samples], axis=1), 16000)
    np.testing.assert_allclose(audio.read_audio(path), heard * samples, atol=1e-4)


@pytest.mark.parametrize("form", [{}, {"format": "OGG", "subtype": "VORBIS"}])
def test_channels_in_opposite_phase_with_noise(form, tmp_path):
    """What is read is one channel from the first block to the last, not the noise of both."""
    speech, rng = np.tile(sine(4, 200), 10), np.random.default_rng(0)
    channels = np.stack([speech, -speech], axis=1) + rng.normal(0, 0.003, (len(speech), 2))
    soundfile.write(tmp_path / "a", channels, RATE, **({"format": "WAV"} | form))
    blocks = audio.read_audio(tmp_path / "a").reshape(-1, RATE)
    expected = speech.reshape(-1, RATE)
    likeness = (blocks * expected).sum(1) / np.square(expected).sum(1)
    np.testing.assert_allclose(likeness, 1, atol=0.02)


def test_channels_in_opposite_phase_beside_a_silent_one(tmp_path):
    samples = sine(0.4, 200)
    soundfile.write(tmp_path / "a.wav", np.stack([samples, -samples, 0 * samples], axis=1), 16000)
    np.testing.assert_allclose(np.abs(audio.read_audio(tmp_path / "a.wav")), np.abs(samples),
                               atol=1e-4)


@pytest.mark.parametrize(("kind", "found"), [
    ("call", True), ("call of 8 dB", False), ("call with a silent third", True),
    ("short answers", True), ("one answer", False), ("one side", False), ("hiss", False),
    ("mono", False), ("twice the same", False), ("silence", False), ("short", False)])
def test_channels_that_take_turns(kind, found, tmp_path):
    """Two talkers of 3 s, one after the other; in a call each is 12 dB softer in the other's.

    Short answers take 1 of 6 s, one answer half a second.
    """
    first, second = np.zeros((2, 6 * 8000))
    turn = {"short answers": 40000, "one answer": 44000}.get(kind, 24000)
    first[:turn], second[turn:] = sine(6, 200, 8000)[:turn], sine(6, 300, 8000)[turn:]
    bleed = 0.4 if kind == "call of 8 dB" else 0.25
    left, right = first + bleed * second, second + bleed * first
    channels = {
        "call with a silent third": [left, right, 0 * left], "one side": [first, 0.25 * first],
        "hiss": [first, 1e-3 * second],
        "mono": [left], "twice the same": [left, left], "silence": [0 * left, 0 * left],
        "short": [left[23000:25000], right[23000:25000]]}.get(kind, [left, right])
    soundfile.write(tmp_path / "a.wav", np.stack(channels, axis=1), 8000)
    assert audio.channels_take_turns(tmp_path / "a.wav") is found


@pytest.mark.parametrize("rate", [16000, 8000, 44100])
def test_blocks_are_the_whole(rate, tmp_path, monkeypatch):
    """A file read and resampled block by block equals one resampled at once."""
    monkeypatch.setattr(audio, "READ_BLOCK", 5000)
    wave = sine(1.3, 300, rate)
    soundfile.write(tmp_path / "a.wav", np.stack([wave, wave], 1), rate, subtype="FLOAT")
    whole = soxr.resample(wave, rate, RATE)
    for source, given in ((tmp_path / "a.wav", None), (str(tmp_path / "a.wav"), None),
                          (wave, rate), (torch.from_numpy(wave), rate), (wave.tolist(), rate)):
        blocks = list(audio.audio_blocks(source, given))
        assert len(blocks) > 3
        np.testing.assert_allclose(np.concatenate(blocks), whole, atol=1e-5)


def test_the_rate_of_a_file_is_its_own(tmp_path):
    soundfile.write(tmp_path / "a.wav", sine(0.5, 300, 8000), 8000)
    assert len(audio.read_audio(tmp_path / "a.wav", sampling_rate=44100)) == RATE // 2


def test_a_flac_file_from_a_pipe_is_answered_with_its_conversion(tmp_path):
    soundfile.write(tmp_path / "a.flac", sine(0.4, 150), RATE)
    content = bytearray((tmp_path / "a.flac").read_bytes())
    content[21] &= 0xF0  # its number of samples: unknown
    content[22:26] = bytes(4)
    (tmp_path / "a.flac").write_bytes(content)
    with pytest.raises(ValueError, match=r"convert it: ffmpeg -i \S+a\.flac \S+a\.wav"):
        audio.read_audio(tmp_path / "a.flac")


def test_a_recording_is_read_where_standard_error_is_closed(tmp_path):
    soundfile.write(tmp_path / "a.wav", sine(0.4, 150), RATE)
    code = "import os, audio; os.close(2); print(len(audio.read_audio('a.wav')))"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True,
                          text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})  # fmt: skip
    assert done.stdout == f"{round(0.4 * RATE)}\n"


@pytest.mark.parametrize("kind", ["AU", "NIST", "RF64", "W64"])
def test_a_file_of_a_rarer_kind_that_breaks_off(kind, tmp_path):
    soundfile.write(tmp_path / "a", sine(0.4, 150), RATE, format=kind)
    content = (tmp_path / "a").read_bytes()
    (tmp_path / "a").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="breaks off"):
        audio.read_audio(tmp_path / "a")


@pytest.mark.parametrize(("kind", "place"), [("WAV", 4), ("RF64", 20), ("W64", 16)])
def test_a_file_of_3_gb_that_breaks_off(kind, place, tmp_path):
    soundfile.write(tmp_path / "a", sine(0.4, 150), RATE, format=kind)
    data = bytearray((tmp_path / "a").read_bytes())
    data[place : place + 4] = (3 << 30).to_bytes(4, "little")
    (tmp_path / "a").write_bytes(data)
    with pytest.raises(ValueError, match="breaks off"):
        audio.read_audio(tmp_path / "a")


@pytest.mark.parametrize("kind", ["VORBIS", "OPUS", "CONSTANT", "VARIABLE"])
def test_joined_files(kind, tmp_path):
    """Only the first would be read. MP3s may have tags and one frame more than they count."""
    mp3 = kind in ("CONSTANT", "VARIABLE")
    form = ({"format": "MP3", "bitrate_mode": kind, "compression_level": 0.5} if mp3
            else {"format": "OGG", "subtype": kind})
    noise = np.random.default_rng(0).normal(0, 0.1, 8 * RATE)
    soundfile.write(tmp_path / "a", noise, RATE, **form)
    one = (tmp_path / "a").read_bytes()
    soundfile.write(tmp_path / "a", noise[::-1], RATE, **form)
    wholes, pieces = [one], [one + (tmp_path / "a").read_bytes()]
    if mp3:
        tag = b"ID3\3\0\0\0\0\2\1" + bytes(257)
        wholes += [tag + one, one + b"TAG" + bytes(20_000), one + b"\xff\xfb" + bytes(1000)]
        pieces += [tag + one + tag + one]
    for content in wholes:
        (tmp_path / "a").write_bytes(content)
        assert len(audio.read_audio(tmp_path / "a")) == pytest.approx(8 * RATE, abs=3000)
    for content in pieces:
        (tmp_path / "a").write_bytes(content)
        with pytest.raises(ValueError, match=r"several streams in a row.*convert it: ffmpeg"):
            audio.read_audio(tmp_path / "a")


@pytest.mark.parametrize(("suffix", "kind"), [
    ("wave", "WAV"), ("aifc", "AIFF"), ("au", "AU"), ("caf", "CAF"), ("oga", "OGG"),
    ("rf64", "RF64"), ("sph", "NIST"), ("w64", "W64")])  # fmt: skip
def test_a_folder_has_every_kind_that_is_read(suffix, kind, tmp_path):
    path = tmp_path / f"a.{suffix}"
    soundfile.write(path, sine(0.4, 150), RATE, format=kind)
    assert list_recordings(tmp_path) == [path]
    assert len(audio.read_audio(path)) == 0.4 * RATE


@pytest.mark.parametrize("kind", ["wav", "aiff", "ogg", "opus", "flac", "mp3"])
def test_half_a_file(kind, tmp_path):
    """libsndfile takes the first three for shorter recordings."""
    path = tmp_path / f"a.{kind}"
    form = {"format": "OGG", "subtype": "OPUS"} if kind == "opus" else {}
    soundfile.write(path, np.random.default_rng(0).normal(0, 0.1, 8 * RATE), RATE, **form)
    assert len(audio.read_audio(path)) == pytest.approx(8 * RATE, abs=3000)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match=rf"cannot read audio from .*a\.{kind}"):
        audio.read_audio(path)


@pytest.mark.parametrize("kind", ["VORBIS", "OPUS"])
@pytest.mark.parametrize("damage", ["its end is gone", "its last page is gone", "another byte"])
def test_damaged_ogg(kind, damage, tmp_path):
    """What the decoder leaves out would let the rest begin too early."""
    path = tmp_path / "a.ogg"
    noise = np.random.default_rng(0).normal(0, 0.1, 30 * RATE)
    soundfile.write(path, noise, RATE, format="OGG", subtype=kind)
    assert len(audio.read_audio(path)) == 30 * RATE
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= "byte" in damage
    end = {"its end is gone": -500, "its last page is gone": data.rindex(b"OggS")}.get(damage)
    path.write_bytes(data[:end])
    with pytest.raises(ValueError, match=r"cannot read audio from .*a\.ogg"):
        audio.read_audio(path)


def test_mp3_of_changing_bit_rate(tmp_path):
    """Its decoder seeks to another sample than asked for: blocks are read in one go."""
    path, rng = tmp_path / "a.mp3", np.random.default_rng(0)
    noise = np.repeat(rng.uniform(0, 0.3, 80), 24000) * rng.normal(0, 1, 40 * 48000)
    soundfile.write(path, noise, 48000, format="MP3")
    whole, _ = soundfile.read(path, dtype="float32")
    blocks = np.concatenate(list(audio._blocks_of_file(path)))
    assert len(noise) > 3 * audio.READ_BLOCK
    assert np.array_equal(blocks, whole)


@pytest.mark.parametrize("size", [0, 33000, 0x7FFFFFFF, 0xFFFFFFFF])
def test_wav_of_a_stream(size, tmp_path):
    """What a pipe writes does not know its size; a header 1 kB off is let pass."""
    soundfile.write(tmp_path / "a.wav", sine(1, 200), RATE)
    data = bytearray((tmp_path / "a.wav").read_bytes())
    data[4:8] = size.to_bytes(4, "little")
    (tmp_path / "a.wav").write_bytes(data)
    assert len(audio.read_audio(tmp_path / "a.wav")) == RATE


@pytest.mark.parametrize("samples", [
    [0, 1000, -1000], torch.tensor([0, 1000], dtype=torch.int32), np.array([0, 255], np.uint8)])
def test_integers_of_unknown_scale(samples):
    with pytest.raises(ValueError, match="integers in memory must be int16"):
        audio.read_audio(samples)


def test_less_than_a_sample(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.zeros(1), 48000)
    with pytest.raises(ValueError, match=r"a\.wav has no samples"):
        audio.read_audio(tmp_path / "a.wav")


@pytest.mark.parametrize("rate", [0, 16])  # kHz for Hz
def test_no_such_rate(rate):
    with pytest.raises(ValueError, match=f"the audio has a sampling rate of {rate} Hz"):
        audio.read_audio([0.5, -0.5], rate)


def test_samples_without_a_header(tmp_path):
    (tmp_path / "a.raw").write_bytes(bytes(4000))
    with pytest.raises(ValueError, match="cannot read audio from .*a.raw"):
        audio.audio_info(tmp_path / "a.raw")


def test_a_kind_that_needs_to_be_converted(tmp_path):
    path = tmp_path / "new memo.M4A"
    path.write_bytes(b"\0\0\0\x20ftypM4A ")
    with pytest.raises(ValueError, match=rf"convert it: ffmpeg -i '{path}' '.*/new memo\.wav'"):
        audio.audio_info(path)


def test_half_precision_tensor_that_asks_for_gradients():
    wave = torch.tensor([0.5, -0.5], dtype=torch.bfloat16, requires_grad=True)
    assert audio.read_audio(wave).tolist() == [0.5, -0.5]


@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy])
def test_16_bit_samples_in_memory_are_scaled(kind):
    samples = kind(np.array([-32768, 0, 16384], np.int16))
    assert audio.read_audio(samples).tolist() == [-1, 0, 0.5]


@pytest.mark.parametrize(
    ("samples", "words"),
    [([], "no samples"), ([0.0, float("nan")], "NaN"), ([0.0, float("inf")], "infinite"),
     ([[0.0, 0.0]], r"\[1, 2\]"), (0.5, r"\[\]"),
     ({"array": [0.0], "sampling_rate": 8000}, "path or samples, not dict"),
     ((8000, [0.0, 0.0]), "path or samples, not tuple")],
)
def test_bad_audio_in_memory(samples, words):
    with pytest.raises(ValueError, match=words):
        audio.read_audio(samples)


@pytest.mark.parametrize("end", ["gone.wav", "folder, which is a folder: name one file in it"])
def test_missing_file(end, tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(FileNotFoundError, match=f"{end}$"):
        audio.read_audio(tmp_path / end.partition(",")[0])


@pytest.mark.parametrize("content", [b"", b"no audio at all", b"RIFF\x00\x00\x00\x00WAVE"])
def test_file_that_is_no_audio(content, tmp_path):
    (tmp_path / "a.wav").write_bytes(content)
    with pytest.raises(ValueError, match=r"cannot read audio from .*a\.wav"):
        audio.read_audio(tmp_path / "a.wav")


def test_file_without_samples(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.zeros(0), RATE)
    with pytest.raises(ValueError, match=r"a\.wav has no samples"):
        audio.read_audio(tmp_path / "a.wav")


def test_flac_that_breaks_off(tmp_path, capfd):
    """Its header promises 40 s: the first block is read, then there is one error and no more."""
    noise = 0.1 * np.random.default_rng(0).standard_normal(40 * RATE)
    soundfile.write(tmp_path / "a.flac", noise, RATE)
    content = (tmp_path / "a.flac").read_bytes()
    (tmp_path / "a.flac").write_bytes(content[: len(content) // 2])
    blocks = audio.audio_blocks(tmp_path / "a.flac")
    assert len(next(blocks)) == audio.READ_BLOCK
    with pytest.raises(ValueError, match=r"cannot read audio from .*a\.flac") as error:
        list(blocks)
    assert error.value.__suppress_context__
    assert len(str(error.value).splitlines()) == 1
    assert capfd.readouterr().err == ""


def test_nan_far_into_a_file(tmp_path):
    samples = np.r_[np.zeros(20 * RATE), np.nan].astype(np.float32)
    soundfile.write(tmp_path / "a.wav", samples, RATE, subtype="FLOAT")
    with pytest.raises(ValueError, match=r"a\.wav holds NaN"):
        audio.read_audio(tmp_path / "a.wav")


def test_check_length(tmp_path):
    audio.check_length(np.zeros(640), 640)
    with pytest.raises(ValueError, match="the recording lasts 20 ms; .* 40 ms"):
        audio.check_length(np.zeros(320), 320)
    with pytest.raises(ValueError, match=r"a\.wav lasts 12 ms"):
        audio.check_length(tmp_path / "a.wav", 200)


def test_write_wav_turns_down_what_exceeds_full_scale(tmp_path):
    samples = np.array([0.5, -2.5, 1.0, 0.0], np.float32)
    audio.write_wav(tmp_path / "loud.wav", samples)
    np.testing.assert_allclose(audio.read_audio(tmp_path / "loud.wav"), samples / 2.5, atol=1e-6)
    audio.write_wav(tmp_path / "quiet.wav", samples / 5)
    np.testing.assert_allclose(audio.read_audio(tmp_path / "quiet.wav"), samples / 5, atol=1e-6)
    info = soundfile.info(tmp_path / "quiet.wav")
    assert (info.samplerate, info.subtype, info.channels) == (RATE, "PCM_24", 1)


# --------------------------------------------------------------------------------------------------
# Spectrograms


@pytest.mark.parametrize("bins", [80, 128])
def test_log_mel_equals_whispers(bins):
    """Of a batch in which one recording is far louder: each has a floor of its own."""
    from transformers import WhisperFeatureExtractor

    extractor = WhisperFeatureExtractor(feature_size=bins, chunk_length=2)
    noise = np.random.default_rng(0).standard_normal(32000).astype(np.float32)
    waves = [sine(0.7, 300), 1e-3 * noise, sine(1.9, 110) + 1e-4 * noise[:30400]]
    expected = extractor(waves, sampling_rate=RATE, return_tensors="pt")["input_features"]
    padded = torch.stack([torch.nn.functional.pad(torch.from_numpy(w), (0, 32000 - len(w)))
                          for w in waves])
    spectrograms = audio.floor_log_mel(audio.log_mel(padded, bins))
    assert spectrograms.shape == (3, 200, bins)
    torch.testing.assert_close(spectrograms, expected.transpose(1, 2), rtol=0, atol=1e-4)
    torch.testing.assert_close(
        audio.floor_log_mel(audio.log_mel(padded[2], bins)), spectrograms[2])


def test_gain_moves_log_mel_by_a_constant():
    """20 dB are 2 in log10 of power and 0.5 in Whisper's units."""
    wave = torch.randn(8000)
    torch.testing.assert_close(
        audio.log_mel(10 * wave), audio.log_mel(wave) + 0.5, rtol=0, atol=1e-4)


def test_one_frame_per_hop():
    for samples, frames in ((159, 0), (160, 1), (16000, 100), (16159, 100), (16160, 101)):
        assert audio.log_mel(torch.randn(2, samples)).shape == (2, frames, 80)


def test_floor_is_80_db_below_the_loudest_bin():
    spectrograms = torch.tensor([[[1.0, -0.5], [-1.4, -1.0]], [[-1.0, -1.5], [-1.5, -1.5]]])
    floored = [[[1.0, -0.5], [-1.0, -1.0]], [[-1.0, -1.5], [-1.5, -1.5]]]
    assert audio.floor_log_mel(spectrograms).tolist() == floored


@pytest.mark.parametrize("samples", [16000, 12345, 200])
def test_gains_everywhere_alike(samples):
    """No gain gives the waveform back, and -0.5 is -20 dB: a tenth of the amplitude."""
    wave = torch.randn(samples)
    gains = torch.tensor([0.0, -0.5, 0.25])[:, None, None].expand(3, samples // 160, 80)
    talkers = audio.apply_gains(wave, gains)
    expected = torch.stack([wave, 0.1 * wave, 10**0.5 * wave])
    torch.testing.assert_close(talkers, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("bins", [80, 128])
def test_gains_take_tones_apart(bins):
    """Bins are on the mel scale: the lower half ends at 1.8 kHz."""
    t = torch.arange(RATE) / RATE
    low, high = torch.sin(2 * torch.pi * 1000 * t), torch.sin(2 * torch.pi * 3000 * t)
    gains = torch.zeros(2, 100, bins)
    gains[0, :, bins // 2 :] = gains[1, :, : bins // 2] = -3
    talkers = audio.apply_gains(low + high, gains)
    torch.testing.assert_close(talkers[:, 400:-400], torch.stack([low, high])[:, 400:-400],
                               rtol=0, atol=0.01)


def test_gains_between_centres_of_bins_are_interpolated():
    """1 kHz is 15 mel of 45.245, so it lies at 15 / 45.245 * 81 - 1 = 25.854 of 80 bins."""
    tone = torch.sin(2 * torch.pi * 1000 * torch.arange(RATE) / RATE)
    talkers = audio.apply_gains(tone, (-0.02 * torch.arange(80.0)).expand(1, 100, 80))
    level = 20 * torch.log10(talkers[0, 800:-800].std() / tone[800:-800].std())
    assert float(level) == pytest.approx(-40 * 0.02 * 25.854, abs=0.1)


@pytest.mark.parametrize("frames", [40, 41, 59])
def test_gains_of_a_long_recording_are_applied_in_pieces(frames, monkeypatch):
    """As in one piece; the samples past the last frame belong to the last piece."""
    wave, gains = torch.randn(160 * frames + 70), -torch.rand(2, frames, 80)
    whole = audio.apply_gains(wave, gains)
    monkeypatch.setattr(audio, "PIECE", 20)
    torch.testing.assert_close(audio.apply_gains(wave, gains), whole, rtol=0, atol=1e-5)


def test_gains_change_in_time():
    gains = torch.zeros(1, 100, 80)
    gains[:, 50:] = -3
    wave = torch.randn(RATE)
    (talker,) = audio.apply_gains(wave, gains)
    torch.testing.assert_close(talker[:7600], wave[:7600], rtol=0, atol=1e-5)
    assert talker[8400:].abs().max() < 1e-5


def vowel(seconds, pitch, formant):
    """Pulses through a resonance that is 200 Hz wide."""
    from scipy.signal import lfilter

    pulses = np.zeros(int(seconds * RATE), np.float32)
    pulses[:: round(RATE / pitch)] = 1
    radius = np.exp(-np.pi * 200 / RATE)
    poles = [1, -2 * radius * np.cos(2 * np.pi * formant / RATE), radius**2]
    return lfilter([1], poles, pulses).astype(np.float32)


def in_voice(samples, formants, *equalizer):
    """Samples with moved formants and, in dB, coefficients of an equalizer."""
    voice = torch.tensor([formants, *(equalizer or [0.0] * 8)])
    spectrum = audio.change_voices(audio.stft(torch.from_numpy(samples)), voice)
    return audio.istft(spectrum, len(samples)).numpy()


@pytest.mark.parametrize("factor", [0.85, 1.0, 1.2])
def test_formants_move_and_the_pitch_stays(factor):
    """At 100 Hz harmonics are 100 Hz apart, and the loudest is nearest to the formant."""
    changed = in_voice(vowel(1, 100, 2000), factor)
    spectrum = np.abs(np.fft.rfft(changed))  # bins of 1 Hz
    assert abs(int(spectrum.argmax()) - factor * 2000) <= 60
    harmonics = spectrum[100:6000:100]
    between = spectrum[150:6000:100]
    assert np.median(harmonics / between) > 20


def test_moved_formants_raise_nothing_by_more_than_26_db():
    """Of speech by telephone the band above 4 kHz is empty."""
    spectrum = audio.stft(torch.randn(8000))
    spectrum[100:] *= 1e-4
    changed = audio.change_voices(spectrum, torch.tensor([1.3, *[0.0] * 8]))
    assert 20 < (changed.abs() / spectrum.abs()).max() < 20.1


def test_the_curve_of_an_equalizer():
    """The second cosine and sine go once around over the logarithm of bins of 40 Hz."""
    colour = (0.0, 6.0, 0.0, 0.0, 0.0, -3.0, 0.0, 0.0)
    for hertz in (1000, 2500, 6000):
        tone = np.sin(2 * np.pi * hertz * np.arange(RATE, dtype=np.float32) / RATE)
        changed = in_voice(tone, 1.0, *colour)[400:-400]  # a tone ends abruptly
        level = 20 * np.log10(changed.std() / tone.std())
        angle = 2 * np.pi * np.log1p(hertz / 40) / np.log(201)
        assert level == pytest.approx(6 * np.cos(angle) - 3 * np.sin(angle), abs=0.3)


def test_voices_of_a_batch_are_changed_each_by_its_own():
    waves = torch.from_numpy(np.stack([vowel(0.3, 100, 2000), vowel(0.3, 140, 900)]))
    voices = torch.tensor([[0.9, *[2.0] * 8], [1.0, *[0.0] * 8]])
    spectra = audio.stft(waves)
    changed = audio.change_voices(spectra, voices)
    alone = audio.change_voices(spectra[0], voices[0])
    torch.testing.assert_close(changed[0], alone, rtol=1e-4, atol=1e-4)
    assert (changed[0] - spectra[0]).abs().max() > 1
    assert torch.equal(changed[1], spectra[1])  # the speaker's own


# --------------------------------------------------------------------------------------------------
# Frozen models


@pytest.mark.parametrize("layer", LAYERS)
def test_encode_equals_the_models_own_tower(layer, qwen, qwen_folder, processor):
    encoder = audio.load_audio_encoder(str(qwen_folder), layer)
    inputs = processor.feature_extractor(
        RECORDINGS, sampling_rate=RATE, return_attention_mask=True, padding="max_length",
        return_tensors="pt")
    states, output, inside, halved = tower_states(
        audio_tower_of(qwen), inputs["input_features"], inputs["attention_mask"])
    expected, mask = (output, halved) if layer is None else (states[layer], inside)
    assert encoder.frame_rate == (25 if layer is None else 50)
    together = encoder.encode(RECORDINGS)
    for b, samples in enumerate(RECORDINGS):
        (features,) = encoder.encode([samples])
        assert features.shape == (int(mask[b].sum()), WIDTH)
        torch.testing.assert_close(features, expected[b][mask[b]], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(together[b], features, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layer", LAYERS)
def test_whisper_encoder(layer, whisper_folder):
    from transformers import WhisperFeatureExtractor, WhisperForConditionalGeneration

    model = WhisperForConditionalGeneration.from_pretrained(whisper_folder).eval()
    extractor = WhisperFeatureExtractor.from_pretrained(whisper_folder)
    mel = extractor(RECORDINGS[2], sampling_rate=RATE, return_tensors="pt")["input_features"]
    with torch.no_grad():
        output = model.model.encoder(mel, output_hidden_states=True)
    expected = output.last_hidden_state[0]
    if layer in (0, 1):  # the last hidden state that Whisper reports is after its layer norm
        expected = output.hidden_states[layer][0]
    elif layer == 2:
        block = model.model.encoder.layers[1]
        with torch.no_grad():
            out = block(output.hidden_states[1], None)
        expected = (out[0] if isinstance(out, tuple) else out)[0]
    encoder = audio.load_audio_encoder(str(whisper_folder), layer)
    (features,) = encoder.encode([RECORDINGS[2]])
    assert encoder.frame_rate == 50
    assert len(features) == 31  # 0.61 s
    torch.testing.assert_close(features, expected[:31], rtol=1e-4, atol=1e-4)


def test_encoder_is_frozen(qwen_folder):
    tower = audio.load_audio_encoder(str(qwen_folder), 1).tower
    assert not tower.training
    assert not any(p.requires_grad for p in tower.parameters())
    assert len(tower.layers) == 1  # the blocks after it are not kept


@pytest.mark.parametrize("how", ["sharded", "half precision"])
def test_encoder_from_weights_saved_otherwise(how, qwen, qwen_folder, tmp_path):
    folder = shutil.copytree(qwen_folder, tmp_path / "model")
    (folder / "model.safetensors").unlink()
    if how == "sharded":
        qwen.save_pretrained(folder, max_shard_size="30KB")
        assert len(list(folder.glob("model-*.safetensors"))) > 1
    else:
        qwen.bfloat16().save_pretrained(folder)
    (whole,) = audio.load_audio_encoder(str(qwen_folder)).encode(RECORDINGS[:1])
    (features,) = audio.load_audio_encoder(str(folder)).encode(RECORDINGS[:1])
    assert features.dtype == torch.float32
    if how == "sharded":
        assert torch.equal(features, whole)
    else:
        assert 0 < (features - whole).std() < 0.1 * whole.std()


@pytest.mark.parametrize("layer", [-1, 3])
def test_layer_out_of_range(layer, qwen_folder):
    with pytest.raises(ValueError, match=f"0 to 2 for this encoder, not {layer}"):
        audio.load_audio_encoder(str(qwen_folder), layer)


@pytest.mark.parametrize("load", [audio.load_config, audio.load_audio_encoder, audio.load_model])
def test_model_of_another_kind(load, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "wav2vec2"}))
    with pytest.raises(ValueError, match="wav2vec2, not Qwen2-Audio or Whisper") as error:
        load(str(tmp_path))
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize("load", [audio.load_config, audio.load_audio_encoder, audio.load_model])
def test_no_model_there(load):
    words = "cannot load .* from /no/such/model: no such folder here; ."
    with pytest.raises(ValueError, match=words) as error:
        load("/no/such/model")
    assert len(str(error.value).splitlines()) == 1


def test_only_downloads_show_bars():
    from huggingface_hub.utils import are_progress_bars_disabled
    from transformers.utils import logging

    shown = []

    class Model:
        def from_pretrained(self, name, **options):
            shown.append((logging.is_progress_bar_enabled(), not are_progress_bars_disabled()))

    audio.load_pretrained(Model(), "openai/whisper-tiny.en")
    assert shown == [(False, True)]


@pytest.mark.parametrize("shown", [True, False])
def test_progress_bars_are_as_they_were(shown, whisper_folder):
    from transformers.utils import logging

    before, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    switch = {True: logging.enable_progress_bar, False: logging.disable_progress_bar}
    try:
        switch[shown]()
        logging.set_verbosity_info()
        audio.load_config(str(whisper_folder))
        assert logging.is_progress_bar_enabled() == shown
        assert logging.get_verbosity() == logging.INFO
    finally:
        switch[before]()
        logging.set_verbosity(level)


def test_a_configuration_of_more_weights_than_its_files_hold(whisper_folder):
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    config = WhisperConfig.from_pretrained(whisper_folder)
    audio.check_size(WhisperForConditionalGeneration, config, whisper_folder)
    config.vocab_size = 10**6
    with pytest.raises(ValueError, match="more than its files hold"):
        audio.check_size(WhisperForConditionalGeneration, config, whisper_folder)


@pytest.mark.parametrize("kind", ["truncated", "missing", "other model"])
def test_encoder_with_damaged_weights(kind, qwen_folder, whisper_folder, tmp_path):
    folder = shutil.copytree(qwen_folder, tmp_path / "damaged")
    weights = folder / "model.safetensors"
    content = weights.read_bytes()
    weights.unlink()
    if kind == "truncated":
        weights.write_bytes(content[:1000])
    elif kind == "other model":
        shutil.copy(whisper_folder / "model.safetensors", weights)
    words = {"truncated": "cannot load a model", "missing": "no file named model.safetensors",
             "other model": "lacks the encoder's weight conv1.bias"}[kind]
    with pytest.raises(ValueError, match=words) as error:
        audio.load_audio_encoder(str(folder))
    assert str(folder) in str(error.value)


def test_recording_longer_than_the_window(qwen_folder):
    encoder = audio.load_audio_encoder(str(qwen_folder))
    assert len(encoder.encode([np.zeros(16000, np.float32)])[0]) == 25
    with pytest.raises(ValueError, match=r"lasts 1\.5 s and .*qwen reads 1 s"):
        encoder.encode([np.zeros(16000, np.float32), np.zeros(24000, np.float32)])


@pytest.mark.parametrize("family", ["Qwen2Audio", "Whisper"])
def test_load_model(family, qwen_folder, whisper_folder):
    folder = qwen_folder if family == "Qwen2Audio" else whisper_folder
    model, processor = audio.load_model(str(folder), dtype=torch.bfloat16)
    assert type(model).__name__ == f"{family}ForConditionalGeneration"
    assert (model.dtype, model.training) == (torch.bfloat16, False)
    assert not any(p.requires_grad for p in model.parameters())
    inputs = getattr(processor, "feature_extractor", processor)  # Whisper's has no tokenizer here
    assert inputs.feature_size == 16
