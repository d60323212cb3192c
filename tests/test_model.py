"""Both separators: size, shapes, padding, position and level, gradients, saving."""

import math
from functools import partial
from itertools import product
from pathlib import Path

import pytest
import torch
from conftest import RATE, WIDTH, sine, tiny_separator, tiny_spectrogram_separator

import audio
import speaker_separator_module as ssm

MODES = ["train", "eval", "inference"]  # torch takes another path through a block without gradients


def padded_batch(garbage=0.0):
    """Two recordings of 9 and 5 frames; the second has 4 frames of padding."""
    mixture = torch.randn(2, 9, WIDTH, generator=torch.Generator().manual_seed(1))
    frame_mask = torch.ones(2, 9, dtype=torch.bool)
    frame_mask[1, 5:] = False
    mixture[1, 5:] = garbage
    return mixture, frame_mask


def test_default_size():
    with torch.device("meta"):
        separator = ssm.SpeakerSeparatorTransformer()
    assert sum(p.numel() for p in separator.parameters()) == 99_734_785
    assert separator.feature_dim == 1280
    assert separator.max_speakers == 3


@pytest.mark.parametrize(
    ("batch", "frames", "streams"), [(2, 7, 3), (3, 13, 2), (1, 1, 3), (2, 4, 1)]
)
def test_shapes_and_range(batch, frames, streams):
    separated, probs = tiny_separator(streams)(torch.randn(batch, frames, WIDTH))
    assert separated.shape == (batch, streams, frames, WIDTH)
    assert probs.shape == (batch, streams)
    assert separated.isfinite().all()
    assert ((probs >= 0) & (probs <= 1)).all()


def test_streams_differ():
    separated, probs = tiny_separator(3)(torch.randn(1, 11, WIDTH))
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert not torch.allclose(separated[:, a], separated[:, b])
        assert probs[0, a] != probs[0, b]


def test_gradient_reaches_every_parameter():
    separator = tiny_separator(3, dropout=0.0).train()
    mixture, frame_mask = padded_batch()
    separated, probs = separator(mixture, frame_mask)
    torch.manual_seed(2)
    targets, speaker_mask = torch.randn(2, 3, 9, WIDTH), torch.tensor([[1, 1, 0], [1, 1, 1]])
    loss = ssm.separator_loss(separated, probs, targets, speaker_mask, mixture, frame_mask)
    loss.total.backward()
    for name, parameter in separator.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("garbage", [7.0, 1e30, float("inf"), float("nan")])
def test_padding_changes_nothing(garbage, mode):
    separator = tiny_separator(3, dropout=0.0).train(mode == "train")
    with torch.inference_mode(mode == "inference"):
        clean, probs = separator(*padded_batch())
        dirty, dirty_probs = separator(*padded_batch(garbage))
    assert torch.equal(clean, dirty)
    assert torch.equal(probs, dirty_probs)
    assert (dirty[1, :, 5:] == 0).all()


@pytest.mark.parametrize("mode", MODES)
def test_padded_equals_alone(mode):
    separator = tiny_separator(3, dropout=0.0).train(mode == "train")
    mixture, frame_mask = padded_batch(garbage=1e4)
    with torch.inference_mode(mode == "inference"):
        separated, probs = separator(mixture, frame_mask)
        alone = [separator(mixture[b : b + 1, :frames]) for b, frames in enumerate((9, 5))]
    for b, (streams, alone_probs) in enumerate(alone):
        frames = streams.shape[2]
        torch.testing.assert_close(separated[b, :, :frames], streams[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(probs[b], alone_probs[0], rtol=1e-4, atol=1e-5)


def test_evaluation_is_deterministic_and_dropout_works():
    mixture = torch.randn(2, 6, WIDTH)
    separator = tiny_separator(2, dropout=0.5)
    assert torch.equal(separator(mixture)[0], separator(mixture)[0])
    separator.train()
    assert not torch.equal(separator(mixture)[0], separator(mixture)[0])


def test_loudness_passes_through():
    separator, mixture = tiny_separator(3), torch.randn(2, 8, WIDTH)
    separated, probs = separator(mixture)
    louder, louder_probs = separator(10 * mixture)
    torch.testing.assert_close(louder, 10 * separated, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(louder_probs, probs, rtol=1e-4, atol=1e-5)


def test_streams_are_shares_of_the_mixture():
    mixture = torch.randn(2, 7, WIDTH)
    separated = tiny_separator(3)(mixture)[0]
    torch.testing.assert_close(separated.sum(1), mixture)
    assert (separated.abs() <= mixture[:, None].abs()).all()
    assert (separated * mixture[:, None] >= 0).all()


@pytest.mark.parametrize("nothing_valid", [False, True])
def test_silence_is_finite(nothing_valid):
    separator = tiny_separator(3, dropout=0.0).train()
    mixture = torch.zeros(2, 6, WIDTH, requires_grad=True)
    frame_mask = torch.ones(2, 6, dtype=torch.bool)
    frame_mask[1] = not nothing_valid
    separated, probs = separator(mixture, frame_mask)
    (separated.square().sum() + probs.sum()).backward()
    with torch.inference_mode():
        quick, quick_probs = separator.eval()(mixture, frame_mask)
    for output in (separated, probs, quick, quick_probs):
        assert output.isfinite().all()
    assert mixture.grad.isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in separator.parameters())


@pytest.mark.parametrize(
    ("features", "frame_mask", "named"),
    [
        (torch.zeros(1, 5, WIDTH + 1), None, f"[1, 5, {WIDTH + 1}]"),
        (torch.zeros(5, WIDTH), None, f"[5, {WIDTH}]"),
        (torch.zeros(1, 0, WIDTH), None, f"[1, 0, {WIDTH}]"),
        (torch.zeros(0, 5, WIDTH), None, f"[0, 5, {WIDTH}]"),
        (torch.zeros(2, 5, WIDTH), torch.ones(2, 4), "[2, 4]"),
    ],
)
def test_wrong_shape_is_named(features, frame_mask, named):
    with pytest.raises(ValueError, match="must be") as error:
        tiny_separator(2)(features, frame_mask)
    assert named in str(error.value)


@pytest.mark.parametrize(("wrong", "width"), [(3, WIDTH), (3, 30), (10, WIDTH), (1, WIDTH)])
def test_heads_that_do_not_fit(wrong, width):
    with pytest.raises(ValueError, match=f"num_heads .* not {wrong} for {width}"):
        tiny_separator(2, num_heads=wrong, feature_dim=width)


def test_save_and_load(tmp_path):
    source = {"encoder": "some/encoder", "layer": 2, "frame_rate": 50.0}
    separator = tiny_separator(2, threshold=0.375, feature_source=source)
    separator.save_pretrained(tmp_path)
    loaded = ssm.SpeakerSeparatorTransformer.from_pretrained(str(tmp_path)).eval()
    again = ssm.load_separator(tmp_path)
    config, weights = (tmp_path / name for name in ("config.json", "model.safetensors"))
    assert weights.stat().st_mode == config.stat().st_mode  # who reads one, reads the other
    mixture = torch.randn(1, 7, WIDTH)
    for other in (loaded, again):
        for a, b in zip(other(mixture), separator(mixture), strict=True):
            assert torch.equal(a, b)
        assert other.threshold == 0.375
        assert other.feature_source == source
    separator.threshold = 0.625
    separator.save_pretrained(tmp_path)
    assert ssm.load_separator(tmp_path / "model.safetensors").threshold == 0.625


def test_separate():
    separator = tiny_separator(3)
    features = torch.randn(6, WIDTH)
    streams, probs = separator(features[None])
    separation = ssm.separate(separator, features)
    torch.testing.assert_close(separation.streams, streams[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(separation.probabilities, probs[0], rtol=1e-4, atol=1e-5)
    assert separation.active.tolist() == [p >= 0.5 for p in probs[0].tolist()]
    assert ssm.separate(separator, features, threshold=0.0).active.all()
    likeliest = ssm.separate(separator, features, num_speakers=1).active.nonzero().item()
    assert likeliest == probs[0].argmax()
    with pytest.raises(ValueError, match=r"\[T, D\]"):
        ssm.separate(separator, features[None])


def test_bfloat16_weights():
    for separator in kinds():
        mixture = example(separator)
        expected, probs = separator(mixture)
        streams, halved = separator.bfloat16()(mixture.bfloat16())
        assert streams.dtype == torch.bfloat16
        torch.testing.assert_close(streams.float(), expected, atol=0.1, rtol=0)
        torch.testing.assert_close(halved, probs, atol=0.02, rtol=0)


def test_too_many_streams_are_refused():
    for make in (tiny_separator, tiny_spectrogram_separator):
        with pytest.raises(ValueError, match="max_speakers must be 1 to 7, not 12"):
            make(max_speakers=12)


# --------------------------------------------------------------------------------------------------
# Separator of spectrograms


def spectrogram(frames=40, bins=80, seed=1, batch=1):
    """Random log-mel frames [B, T, D], all of them well above the floor of 80 dB."""
    generator = torch.Generator().manual_seed(seed)
    return 1.2 * torch.rand(batch, frames, bins, generator=generator) - 0.2


def vivid_separator(*args, **options):
    """An untrained separator whose gains range from 0 dB to -60 dB instead of around -0.3 dB."""
    separator = tiny_spectrogram_separator(*args, **options)
    with torch.no_grad():
        separator.output[1].weight.mul_(15)
    return separator


def power(spectra):
    """Mel power of log-mel spectra in Whisper's units."""
    return 10 ** (4 * spectra.double() - 4)


@pytest.mark.parametrize(("frames", "bins", "streams"), [
    (40, 80, 3), (41, 128, 2), (43, 16, 1), (1, 80, 3), (6, 128, 7)])  # fmt: skip
def test_spectrogram_shapes(frames, bins, streams):
    separator = vivid_separator(streams)
    separated, probs = separator(spectrogram(frames, bins, batch=2))
    assert separated.shape == (2, streams, frames, bins)
    assert probs.shape == (2, streams)
    assert separated.isfinite().all()
    assert ((probs > 0) & (probs < 1)).all()


def test_spectrogram_default_size():
    with torch.device("meta"):
        separator = ssm.SpectrogramSeparator()
    assert separator.max_speakers == 3
    assert separator.input.weight.shape == (256, 4 * 80)
    assert (len(separator.mixture_blocks), len(separator.stream_blocks)) == (4, 2)
    assert separator.feature_dim is None and separator.is_spectrogram


def test_spectrogram_streams_differ():
    separated, probs = vivid_separator()(spectrogram())
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert (separated[0, a] - separated[0, b]).abs().max() > 1e-3
        assert probs[0, a] != probs[0, b]


def test_resampled_constants_stay_constant():
    for bins in (16, 80, 127, 128):
        resampled = ssm.resample_bins(torch.full((2, 3, 80), 0.7), bins)
        assert resampled.shape == (2, 3, bins)
        torch.testing.assert_close(resampled, torch.full((2, 3, bins), 0.7))


@pytest.mark.parametrize("bins", [80, 128])
def test_bins_are_resampled_at_their_centres(bins):
    """A spectrum that is a straight line over the mel scale is the same line in other bins."""
    def line(n):
        return torch.arange(1, n + 1) / (n + 1)

    inner = slice(1, -1)  # past the outermost centres the nearest bin counts
    resampled = ssm.resample_bins(line(208 - bins), bins)
    torch.testing.assert_close(resampled[inner], line(bins)[inner], atol=1e-5, rtol=0)


def test_resampling_there_and_back():
    smooth = torch.sin(torch.linspace(0, 9, 80)).repeat(5, 1)
    there = ssm.resample_bins(smooth, 128)
    back = ssm.resample_bins(there, 80)
    assert (back - smooth)[:, 1:-1].abs().max() < 0.005
    assert (back - smooth).abs().max() < 0.03  # the outermost bins are cut
    assert ssm.resample_bins(smooth, 80) is smooth


def test_one_set_of_weights_for_any_number_of_bins():
    """Gains for 128 bins are those for 80 bins of the same sound, resampled."""
    separator = vivid_separator()
    smooth = torch.sin(torch.linspace(0, 7, 80)) * torch.linspace(0.1, 0.4, 40)[None, :, None]
    gains, probs = separator.gains(smooth)
    finer, finer_probs = separator.gains(ssm.resample_bins(smooth, 128))
    error = (finer - ssm.resample_bins(gains, 128)).square().mean().sqrt()
    assert error < 0.05 * gains.std()
    torch.testing.assert_close(finer_probs, probs, atol=0.01, rtol=0)


@pytest.mark.parametrize("hertz", [110.0, 157.0, 211.0])
def test_pooled_bins_are_those_of_wider_filters(hertz):
    """A voice of many harmonics, seen through 128 filters and pooled, is that seen through 80."""
    time = torch.arange(RATE) / RATE
    harmonics = torch.arange(1, 30)[:, None]
    voice = (torch.sin(2 * math.pi * hertz * harmonics * time) / harmonics).sum(0)
    expected = audio.floor_log_mel(audio.log_mel(voice, 80))[10:-10]
    fine = audio.floor_log_mel(audio.log_mel(voice, 128))[10:-10]
    loud = expected > expected.amax() - 1  # 40 dB
    error = (ssm.pool_bins(fine, 80) - expected)[loud].abs().mean()
    assert error < 0.06  # 2.4 dB
    assert error < 0.6 * (ssm.resample_bins(fine, 80) - expected)[loud].abs().mean()
    assert torch.equal(ssm.pool_bins(fine, 200), ssm.resample_bins(fine, 200))
    torch.testing.assert_close(ssm.pool_bins(torch.full((128,), 0.3), 80), torch.full((80,), 0.3))


def test_talkers_share_the_mixture():
    """Gains in dB of two likely talkers, and of a third who is not, in two bins.

    At -6 and -16 dB they miss 5.6 dB of the mixture, at 0 dB nothing.
    """
    gains = torch.tensor([[-6.0, 0.0], [-16.0, 0.0], [-30.0, -30.0]]) / 40
    likely = torch.tensor([[1.0, 1.0, 0.0]], requires_grad=True)
    rise = -10 * math.log10(10**-0.6 + 10**-1.6 + 1e-4 * 10**-3)  # 1e-4: the least probability
    expected = torch.tensor([[rise - 6, 0], [rise - 16, 0], [rise - 30, -30]])
    shared = ssm.share_mixture(gains[None, :, None], likely)
    torch.testing.assert_close(40 * shared[0, :, 0], expected, rtol=0, atol=1e-4)
    assert not shared.requires_grad  # the probabilities learn from the talkers alone
    alone = ssm.share_mixture(gains[None, :, None], torch.tensor([[0.0, 1.0, 0.0]]))
    assert alone[0, 1].abs().max() < 0.05 / 40  # the mixture itself
    unsure = torch.tensor([-3.0, -20.0]).view(1, 2, 1, 1) / 40
    shared = 40 * ssm.share_mixture(unsure, torch.tensor([[0.5, 1.0]])).flatten()
    assert shared[0] == 0  # no louder than the mixture
    assert shared[1] == pytest.approx(-20 - 10 * math.log10(0.5 * 10**-0.3 + 10**-2), abs=1e-4)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("garbage", [-1.5, 7.0, float("inf"), float("nan")])
def test_spectrogram_padding_changes_nothing(garbage, mode):
    """Padding of a batch, whatever is in it, on lengths that are no multiple of a stack."""
    separator = vivid_separator().train(mode == "train")
    mixture, frame_mask = spectrogram(21, batch=2), torch.ones(2, 21, dtype=torch.bool)
    frame_mask[1, 10:] = False
    padded = mixture.clone()
    padded[1, 10:] = garbage
    with torch.inference_mode(mode == "inference"):
        separated, probs = separator(padded, frame_mask)
        alone, alone_probs = separator(mixture[1:, :10])
    torch.testing.assert_close(separated[1, :, :10], alone[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(probs[1], alone_probs[0], rtol=1e-4, atol=1e-5)
    floor = alone[0].amax((1, 2)) - 2
    expected = floor[:, None, None].expand(-1, 11, 80)
    torch.testing.assert_close(separated[1, :, 10:], expected, rtol=1e-4, atol=1e-5)


def test_dropout_is_for_training_only():
    separator, mixture = vivid_separator(dropout=0.5), spectrogram(40)
    gains = [separator.gains(mixture)[0] for _ in range(2)]
    assert torch.equal(*gains)
    separator.train()
    for part in (separator.mixture_blocks, separator.stream_blocks):
        for block in part:
            for module in (block.convolution, block.attention):
                assert module.dropout.p == block.feed_forward[-1].p == 0.5
    assert (separator.gains(mixture)[0] - gains[0]).std() > 0.1 * gains[0].std()


def test_speech_in_a_window_is_separated_as_alone():
    """Four seconds, and the same four in a window of 30 s that digital silence fills up."""
    samples = torch.from_numpy(sine(4, 170) + sine(4, 310))
    window = torch.nn.functional.pad(samples, (0, 26 * RATE))
    speech, whole = (audio.floor_log_mel(audio.log_mel(x))[None] for x in (samples, window))
    separator = vivid_separator()
    alone, alone_probs = separator(speech)
    separated, probs = separator(whole)
    assert separated.shape[2] == 3000 and alone.shape[2] == 400
    for s in range(3):
        expected = power(alone[0, s])
        difference = (power(separated[0, s, :400]) - expected).abs().sum()
        assert difference < 0.01 * expected.sum()
    torch.testing.assert_close(probs, alone_probs, atol=1e-3, rtol=0)
    assert (separated[0, :, 410:] == separated[0].amin((1, 2))[:, None, None]).all()


@pytest.mark.parametrize("samples", [4 * RATE, 4 * RATE + 70])
def test_a_cut_recording_in_a_window_is_separated_as_alone(samples):
    """Where it is cut, two frames of the window hold a click that the recording alone lacks."""
    noise = 0.1 * torch.randn(samples, generator=torch.Generator().manual_seed(0))
    window = torch.nn.functional.pad(noise, (0, 30 * RATE - samples))
    whole, separator = audio.floor_log_mel(audio.log_mel(window))[None], vivid_separator()
    alone, alone_probs = separator(whole[:, :400])
    separated, probs = separator(whole)
    torch.testing.assert_close(power(separated[:, :, :400]), power(alone), rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(probs, alone_probs)


def test_heard_frames():
    """A last frame 6 dB softer than the one before is the end of a cut, if silence follows."""
    loud = torch.tensor([[1.0, 0.5, 1.0, 0.8, -1.5, -1.5], [1.0, 0.5, 1.0, 0.9, -1.5, -1.5],
                         [1.0, 0.5, 1.0, 0.8, -1.5, -1.5], [1.0, 0.5, 1.0, 0.9, 0.9, 0.7],
                         [-1.5] * 6, [1.0, -1.5, -1.5, -1.5, -1.5, -1.5]])  # fmt: skip
    mask = torch.ones(6, 6, dtype=torch.bool)
    mask[2, 4:] = False
    expected = [[1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 0, 0], [1] * 6, [0] * 6,
                [1, 0, 0, 0, 0, 0]]  # fmt: skip
    assert ssm.heard_frames(loud[..., None].expand(-1, -1, 80), mask).int().tolist() == expected


def test_a_masked_frame_before_the_last_one_is_not_read():
    """Whether a recording is cut there does not depend on it."""
    separator, mixture = vivid_separator(), spectrogram(40).repeat(2, 1, 1)
    mixture[0, 37], mixture[:, 39] = mixture.amax() + 0.5, mixture.min() - 2
    mask = torch.ones(2, 40, dtype=torch.bool)
    mask[:, 37] = False
    separated, probs = separator(mixture, mask)
    torch.testing.assert_close(separated[0], separated[1], rtol=0, atol=1e-6)
    torch.testing.assert_close(probs[0], probs[1], rtol=0, atol=1e-6)


@pytest.mark.parametrize("stacks", [1, 50])
def test_the_position_in_the_window_changes_nothing(stacks):
    mixture, lead = spectrogram(40), stacks * ssm.SpectrogramSeparator.STACK
    floor = mixture.amax() - 2
    shifted = torch.nn.functional.pad(mixture, (0, 0, lead, 3), value=floor.item())
    separator = vivid_separator()
    expected, expected_probs = separator(mixture)
    separated, probs = separator(shifted)
    torch.testing.assert_close(
        separated[:, :, lead : lead + 40], expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(probs, expected_probs, rtol=1e-4, atol=1e-5)


def test_the_order_of_frames_is_heard():
    """Attention has no positions; the convolutions must tell what came first."""
    separator, mixture = vivid_separator(), spectrogram(40)
    separated, reverse = separator(mixture)[0], separator(mixture.flip(1))[0]
    assert (reverse.flip(2) - separated).abs().max() > 1e-3


@pytest.mark.parametrize("gain", [-0.5, 0.75])
def test_the_gain_of_the_recording_passes_through(gain):
    separator, mixture = vivid_separator(), spectrogram() + 0.5
    separated, probs = separator(mixture)
    louder, louder_probs = separator(mixture + gain)
    torch.testing.assert_close(louder, separated + gain, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(louder_probs, probs, rtol=1e-4, atol=1e-5)


def test_two_passes_half_a_stack_apart_are_averaged():
    """A recording that starts half a stack later swaps its two passes, and nothing else."""
    separator, mixture = vivid_separator(), spectrogram(40)
    half = ssm.SpectrogramSeparator.STACK // 2
    later = torch.nn.functional.pad(mixture, (0, 0, half, half), value=mixture.min() - 2)
    separated, probs = separator(mixture)
    shifted, shifted_probs = separator(later)
    torch.testing.assert_close(shifted[:, :, half:-half], separated, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(shifted_probs, probs, rtol=1e-4, atol=1e-5)
    assert (separator.train()(mixture)[0] - separated).abs().max() > 0.05


def test_gains_are_softened_outside_training():
    """One talker per bin: of gains so low that nothing else matters three quarters are left."""
    separator = vivid_separator(1, dropout=0.0)
    separator.output[1].weight.data.zero_()
    separator.output[1].bias.data.fill_(-20)
    unshared = {}
    for training in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ssm, "share_mixture", lambda gains, probabilities: gains)
            unshared[training] = separator.train(training).gains(spectrogram())[0]
    torch.testing.assert_close(unshared[False], 0.75 * unshared[True])
    assert unshared[True].unique().numel() == 1


def test_streams_lie_between_their_floor_and_the_mixture():
    separator = vivid_separator()
    separator.output[1].weight.data.mul_(3)  # gains reach beyond the floor
    mixture = spectrogram(40)
    separated = separator(mixture)[0]
    assert (separated <= mixture[:, None]).all()
    for stream in separated[0]:
        assert stream.amin().item() == pytest.approx(stream.amax().item() - 2, abs=1e-5)
    gains = separator.gains(mixture)[0]
    assert (gains <= 0).all() and gains.min() < -2


@pytest.mark.parametrize("case", ["all silent", "one of two silent", "nothing valid"])
def test_digital_silence_is_finite(case):
    separator = vivid_separator().train()
    mixture, frame_mask = spectrogram(20, batch=2), torch.ones(2, 20, dtype=torch.bool)
    mixture[0 if case != "all silent" else slice(None)] = ssm.DIGITAL_SILENCE
    frame_mask[0] = case != "nothing valid"
    mixture.requires_grad_()
    separated, probs = separator(mixture, frame_mask)
    (separated.square().sum() + probs.sum()).backward()
    with torch.inference_mode():
        quick, quick_probs = separator.eval()(mixture, frame_mask)
    for output in (separated, probs, quick, quick_probs, mixture.grad):
        assert output.isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in separator.parameters())
    assert (separated[0] == ssm.DIGITAL_SILENCE).all()  # nothing to separate, nothing changed


def test_spectrogram_gradient_reaches_every_parameter():
    separator = vivid_separator().train()
    mixture, targets = spectrogram(20, batch=2), torch.rand(2, 3, 20, 80)
    speaker_mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    separated, probs = separator(mixture)
    ssm.separator_loss(separated, probs, targets, speaker_mask, mixture).total.backward()
    for name, parameter in separator.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        if name != "attention_pool.bias":  # a softmax is indifferent to a constant
            assert parameter.grad.abs().max() > 1e-8, name


def test_convolution_reads_its_neighbours_only():
    torch.manual_seed(0)
    convolution, frames = ssm.Convolution(16, 5, 0.0), torch.randn(1, 12, 16)
    everywhere, changed = torch.ones(1, 12, dtype=torch.bool), frames.clone()
    changed[0, 3, 0] += 3
    difference = convolution(changed, everywhere) - convolution(frames, everywhere)
    assert difference.abs().amax(-1)[0].gt(1e-6).nonzero().flatten().tolist() == [1, 2, 3, 4, 5]
    silent = everywhere.clone()
    silent[0, 3] = False  # nothing is read from it
    difference = convolution(changed, silent) - convolution(frames, silent)
    assert difference.abs().amax(-1)[0].gt(1e-6).nonzero().flatten().tolist() == [3]


def test_streams_exchange_frame_by_frame_whatever_their_order():
    torch.manual_seed(0)
    exchange, streams = ssm.Exchange(16), torch.randn(2, 3, 7, 16)
    changed = streams.clone()
    changed[0, 1, 4] += torch.randn(16)
    difference = (exchange(changed) - exchange(streams)).abs().amax(-1)
    assert difference.gt(1e-6).nonzero().tolist() == [[0, 0, 4], [0, 1, 4], [0, 2, 4]]
    torch.testing.assert_close(exchange(streams[:, [2, 0, 1]]), exchange(streams)[:, [2, 0, 1]])


def test_the_kth_likeliest_stream_talks_if_at_least_k_do():
    separator, mixture = vivid_separator(), spectrogram()
    seen = []
    separator.activity_head.register_forward_hook(lambda *call: seen.append(call[-1]))
    _, probs = separator(mixture)
    own = seen[0].squeeze(-1).sigmoid()[0]  # each stream by itself
    expected = torch.zeros(3)
    for talks in product((0, 1), repeat=3):
        talking = torch.tensor(talks, dtype=torch.bool)
        expected[: sum(talks)] += torch.where(talking, own, 1 - own).prod()
    order = own.argsort(descending=True)
    torch.testing.assert_close(probs[0][order], expected)


def test_streams_trade_places_with_their_queries():
    separator, mixture = vivid_separator(), spectrogram()
    separated, probs = separator(mixture)
    with torch.no_grad():
        separator.speaker_queries.copy_(separator.speaker_queries[[2, 0, 1]])
    moved, moved_probs = separator(mixture)
    torch.testing.assert_close(moved, separated[:, [2, 0, 1]], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(moved_probs, probs[:, [2, 0, 1]], rtol=1e-4, atol=1e-5)


def test_sounding_frames():
    """Above 80 dB below the recording's own loudest bin, and above digital silence."""
    recordings = torch.full((4, 5, 80), -1.5)
    recordings[0, :, 7] = torch.tensor([0.9, -1.05, -1.1, -1.5, -0.5])  # floor at -1.1
    recordings[1, :, 3] = torch.tensor([-1.4, -1.5, -1.0, -1.5, -1.5])  # soft, floor at -1.5
    recordings[3, :, 0] = torch.tensor([1.5, 1.5, 0.0, -0.4, -1.0])
    mask = torch.ones(4, 5, dtype=torch.bool)
    mask[3, :2] = False  # the loudest frames do not count
    expected = [[1, 1, 0, 0, 1], [1, 0, 1, 0, 0], [0, 0, 0, 0, 0], [0, 0, 1, 1, 1]]
    assert ssm.sounding_frames(recordings, mask).int().tolist() == expected
    assert ssm.sounding_frames(recordings)[3].int().tolist() == [1, 1, 1, 1, 0]


@pytest.mark.parametrize(
    ("spectra", "frame_mask", "named"),
    [
        (torch.zeros(5, 80), None, "[5, 80]"),
        (torch.zeros(1, 0, 80), None, "[1, 0, 80]"),
        (torch.zeros(1, 5, 0), None, "[1, 5, 0]"),
        (torch.zeros(2, 5, 80), torch.ones(2, 4), "[2, 4]"),
    ],
)
def test_wrong_spectrogram_is_named(spectra, frame_mask, named):
    for method in (vivid_separator(), vivid_separator().gains):
        with pytest.raises(ValueError, match="must be") as error:
            method(spectra, frame_mask)
        assert named in str(error.value)


@pytest.mark.parametrize("wrong", [{"num_heads": 3}, {"num_heads": 1}, {"max_speakers": 0}])
def test_wrong_spectrogram_sizes(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        vivid_separator(**wrong)


# --------------------------------------------------------------------------------------------------
# Weights keep their meaning


def noise(*shape, start=0):
    """Numbers between -1 and 1 that no random generator makes."""
    n = torch.arange(start, start + torch.Size(shape).numel(), dtype=torch.float64)
    return ((n * 12.9898).sin() * 43758.5453).frac().view(shape).float()


@pytest.mark.parametrize(("make", "width", "training", "sums", "expected_probs"), [
    (tiny_separator, WIDTH, False, [23.2558, -8.8505, -12.7746, 11.5336, 0, 0],
     [0.66675, 0.67558, 0.62899, 0.65369, 0.66555, 0.66555]),
    (tiny_spectrogram_separator, 80, True,
     [88.5857, -102.9889, -73.0610, 64.2691, -19.1359, -17.7680],
     [0.99868, 0.92863, 0.89814, 0.99726, 0, 0]),
    (tiny_spectrogram_separator, 128, True,
     [149.0302, -119.2255, -55.0224, 126.1230, -40.0941, 20.3765],
     [0.99895, 0.93631, 0.99740, 0.90060, 0, 0]),
    (tiny_spectrogram_separator, 80, False,
     [88.9437, -103.1406, -73.2403, 64.5323, -19.1359, -17.7680],
     [0.99852, 0.92464, 0.99679, 0.88991, 0, 0])])  # fmt: skip
def test_weights_of_earlier_versions_separate_alike(make, width, training, sums, expected_probs):
    """What one version of the code computed; a change would spoil every checkpoint there is."""
    separator = make(2, dropout=0.0).train(training)
    with torch.no_grad():
        for name, weight in separator.named_parameters():
            weight.copy_(2 * noise(*weight.shape, start=sum(map(ord, name))))
            weight.mul_(6 if name in ("speaker_queries", "output.1.weight") else 1)
            weight.mul_(weight.shape[-1] ** -0.5).add_("norm" in name)
    mixture, frame_mask = 0.7 * noise(3, 9, width), torch.arange(9) < torch.tensor([[9], [6], [0]])
    mixture[0, 3] -= 1.5  # 80 dB below the loudest frame
    streams, probs = separator(mixture, frame_mask)
    weighted = (streams * noise(*streams.shape[1:], start=5000)).sum((2, 3)).flatten()
    assert weighted.tolist() == pytest.approx(sums, abs=2e-3)
    assert probs.flatten().tolist() == pytest.approx(expected_probs, abs=2e-5)


# --------------------------------------------------------------------------------------------------
# Exported weights


def example(separator):
    return spectrogram(20) if separator.is_spectrogram else torch.randn(1, 7, WIDTH)


def kinds(**options):
    return [tiny_separator(2, **options), tiny_spectrogram_separator(2, **options)]


def test_export_in_float32():
    for number, separator in enumerate(kinds(threshold=0.375)):
        folder, features = f"exported{number}", example(separator)
        ssm.export_separator(separator, folder)
        for other in (ssm.load_separator(folder), type(separator).from_pretrained(folder).eval()):
            assert type(other) is type(separator)
            assert other.threshold == 0.375
            assert other.config == separator.config
            for a, b in zip(other(features), separator(features), strict=True):
                assert torch.equal(a, b)


def test_export_in_bfloat16():
    """Half the size on disk, read back as float32, and close."""
    for number, separator in enumerate(kinds()):
        features = example(separator)
        sizes = []
        for dtype in (torch.float32, torch.bfloat16):
            folder = Path(f"exported{number}_{dtype}")
            ssm.export_separator(separator, folder, dtype)
            sizes.append((folder / "model.safetensors").stat().st_size)
        assert sizes[1] < 0.7 * sizes[0]
        loaded = ssm.load_separator(folder)
        assert {p.dtype for p in loaded.parameters()} == {torch.float32}
        assert {p.dtype for p in separator.parameters()} == {torch.float32}  # as it was
        for weight, kept in zip(separator.parameters(), loaded.parameters(), strict=True):
            assert torch.equal(weight.bfloat16().float(), kept)
        torch.testing.assert_close(
            loaded(features)[0], separator(features)[0], atol=0.1, rtol=0)


def test_export_holds_no_local_path(tmp_path):
    """An encoder on a disk, here or elsewhere, is named by its folder alone; a hub id is whole."""
    Path("openai/whisper-tiny.en").mkdir(parents=True)
    for encoder, exported in ((str(tmp_path / "encoder"), "encoder"),
                              ("openai/whisper-tiny.en", "openai/whisper-tiny.en")):
        source = {"encoder": encoder, "layer": 2, "frame_rate": 50.0}
        separator = tiny_separator(2, feature_source=source)
        for export in (partial(ssm.export_separator, separator), separator.save_pretrained):
            export(tmp_path / "weights")
            loaded = ssm.load_separator(tmp_path / "weights")
            assert loaded.feature_source == {**source, "encoder": exported}
            assert separator.feature_source == source
            for path in (tmp_path / "weights").iterdir():
                assert str(tmp_path).encode() not in path.read_bytes(), path


def test_folder_without_a_separator(tmp_path):
    with pytest.raises(FileNotFoundError, match="no separator at .*gone"):
        ssm.load_separator(tmp_path / "gone")
    with pytest.raises(FileNotFoundError, match="no config.json"):
        ssm.load_separator(tmp_path)
    for content in ("[]", "{", '{"d_model": 32}'):
        ssm.export_separator(tiny_separator(2), tmp_path / "weights")
        (tmp_path / "weights/config.json").write_text(content)
        with pytest.raises(ValueError, match="weights (cannot be loaded|does not fit)"):
            ssm.load_separator(tmp_path / "weights")
    with pytest.raises(ValueError, match="nobody/nothing is no file or folder here, and cannot"):
        ssm.load_separator("nobody/nothing")
