"""The separator itself: size, shapes, padding, gradients, saving."""

import pytest
import torch
from conftest import WIDTH, tiny_separator

import speaker_separator_module as ssm

MASKS = ["shares", "gains"]
KINDS = [("shares", "queries"), ("gains", "queries"), ("gains", "frames"),
         ("residual", "frames"), ("residual", "queries")]
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


@pytest.mark.parametrize(("mask", "trunk"), KINDS)
def test_gradient_reaches_every_parameter(mask, trunk):
    separator = tiny_separator(3, dropout=0.0, mask=mask, trunk=trunk).train()
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
@pytest.mark.parametrize(("mask", "trunk"), KINDS)
@pytest.mark.parametrize("garbage", [7.0, 1e30, float("inf"), float("nan")])
def test_padding_changes_nothing(garbage, mask, trunk, mode):
    separator = tiny_separator(3, dropout=0.0, mask=mask, trunk=trunk).train(mode == "train")
    with torch.inference_mode(mode == "inference"):
        clean, probs = separator(*padded_batch())
        dirty, dirty_probs = separator(*padded_batch(garbage))
    assert torch.equal(clean, dirty)
    assert torch.equal(probs, dirty_probs)
    assert (dirty[1, :, 5:] == 0).all()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("mask", "trunk"), KINDS)
def test_padded_equals_alone(mask, trunk, mode):
    separator = tiny_separator(3, dropout=0.0, mask=mask, trunk=trunk).train(mode == "train")
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


@pytest.mark.parametrize(("mask", "trunk"), KINDS)
def test_loudness_passes_through(mask, trunk):
    separator, mixture = tiny_separator(3, mask=mask, trunk=trunk), torch.randn(2, 8, WIDTH)
    separated, probs = separator(mixture)
    louder, louder_probs = separator(10 * mixture)
    torch.testing.assert_close(louder, 10 * separated, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(louder_probs, probs, rtol=1e-4, atol=1e-5)


def test_masks():
    """Shares add up to the mixture; gains multiply it by 0 to 2, each stream for itself."""
    mixture = torch.randn(2, 7, WIDTH)
    shares, gains = (tiny_separator(3, mask=mask)(mixture)[0] for mask in MASKS)
    torch.testing.assert_close(shares.sum(1), mixture)
    assert (shares.abs() <= mixture[:, None].abs()).all()
    ratio = gains / mixture[:, None]
    assert (ratio >= 0).all() and (ratio <= 2.0001).all()
    assert not torch.allclose(gains.sum(1), mixture, atol=0.1)


@pytest.mark.parametrize(("mask", "trunk"), KINDS)
@pytest.mark.parametrize("nothing_valid", [False, True])
def test_silence_is_finite(nothing_valid, mask, trunk):
    separator = tiny_separator(3, dropout=0.0, mask=mask, trunk=trunk).train()
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
        (torch.zeros(2, 5, WIDTH), torch.ones(2, 4), "[2, 4]"),
    ],
)
def test_wrong_shape_is_named(features, frame_mask, named):
    with pytest.raises(ValueError, match="must be") as error:
        tiny_separator(2)(features, frame_mask)
    assert named in str(error.value)


@pytest.mark.parametrize("wrong", [{"num_heads": 3}, {"num_heads": 10}, {"num_heads": 1},
                                   {"mask": "softmax"},
                                   {"kernel_size": 4}, {"kernel_size": 0}])  # fmt: skip
def test_wrong_options(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        tiny_separator(2, **wrong)


def test_convolution_hears_its_neighbours_only():
    torch.manual_seed(0)
    convolution, frames = ssm.Convolution(WIDTH, 5), torch.randn(1, 12, WIDTH)
    nowhere, changed = torch.zeros(1, 12, dtype=torch.bool), frames.clone()
    changed[0, 3, 0] += 3
    difference = (convolution(changed, nowhere) - convolution(frames, nowhere)).abs().amax(-1)[0]
    assert [frame for frame in range(12) if difference[frame] > 1e-6] == [1, 2, 3, 4, 5]
    padding = nowhere.clone()
    padding[0, 3] = True  # padding is silence to the others
    difference = (convolution(changed, padding) - convolution(frames, padding)).abs().amax(-1)[0]
    assert [frame for frame in range(12) if difference[frame] > 1e-6] == [3]


def test_streams_exchange_frame_by_frame_whatever_their_order():
    torch.manual_seed(0)
    exchange, streams = ssm.Exchange(WIDTH, 2), torch.randn(2, 3, 7, WIDTH)
    changed = streams.clone()
    changed[0, 1, 4] += 1
    difference = (exchange(changed) - exchange(streams)).abs().amax(-1)
    assert difference.nonzero().tolist() == [[0, 0, 4], [0, 1, 4], [0, 2, 4]]
    torch.testing.assert_close(exchange(streams[:, [2, 0, 1]]), exchange(streams)[:, [2, 0, 1]])


def test_kernel_size_is_kept(tmp_path):
    separator = tiny_separator(2, trunk="frames", kernel_size=7)
    separator.save_pretrained(tmp_path)
    again = ssm.load_separator(tmp_path)
    assert [c.depthwise.weight.shape[-1] for c in again.convolutions] == [7] * len(
        separator.convolutions)
    mixture = torch.randn(1, 7, WIDTH)
    assert torch.equal(again(mixture)[0], separator(mixture)[0])


def test_save_and_load(tmp_path):
    source = {"encoder": "some/encoder", "layer": 2, "frame_rate": 50.0}
    separator = tiny_separator(2, threshold=0.375, feature_source=source, mask="gains")
    separator.save_pretrained(tmp_path)
    loaded = ssm.SpeakerSeparatorTransformer.from_pretrained(str(tmp_path)).eval()
    again = ssm.load_separator(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} >= {"config.json", "model.safetensors"}
    mixture = torch.randn(1, 7, WIDTH)
    for other in (loaded, again):
        for a, b in zip(other(mixture), separator(mixture), strict=True):
            assert torch.equal(a, b)
        assert other.threshold == 0.375
        assert other.feature_source == source
        assert other.mask == "gains"


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
    separator = tiny_separator().eval()
    mixture = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(3))
    expected, probs = separator(mixture)
    streams, halved = separator.bfloat16()(mixture.bfloat16())
    assert streams.dtype == torch.bfloat16
    torch.testing.assert_close(streams.float(), expected, atol=0.1, rtol=0)
    torch.testing.assert_close(halved, probs, atol=0.02, rtol=0)


def test_too_many_streams_are_refused():
    with pytest.raises(ValueError, match="max_speakers must be 1 to 7, not 12"):
        tiny_separator(max_speakers=12)
