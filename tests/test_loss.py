"""Loss and metrics against analytic values and an independent slow loop."""

import math
from itertools import permutations

import numpy as np
import pytest
import torch
from conftest import tiny_separator, tiny_spectrogram_separator

import speaker_separator_module as ssm

B, S, T, D = 5, 3, 4, 6
COUNTS = [3, 2, 1, 0, 2]  # talkers of each recording
LENGTHS = [4, 3, 1, 4, 2]  # valid frames of each recording


def random_batch():
    g = torch.Generator().manual_seed(3)
    targets = torch.randn(B, S, T, D, generator=g)
    batch = {
        "separated": torch.randn(B, S, T, D, generator=g),
        "speaker_probs": torch.rand(B, S, generator=g) * 0.8 + 0.1,
        "targets": targets,
        "speaker_mask": torch.arange(S) < torch.tensor(COUNTS)[:, None],
        "mixture": torch.randn(B, T, D, generator=g),
        "frame_mask": torch.arange(T) < torch.tensor(LENGTHS)[:, None],
    }
    targets[~batch["speaker_mask"]] = 0
    return batch


def slow_loss(separated, speaker_probs, targets, speaker_mask, mixture, frame_mask):
    """Loop over recordings, assignments, talkers and frames in float64."""
    separated, probs, targets, mixture = (
        x.double().numpy() for x in (separated, speaker_probs, targets, mixture)
    )
    errors, reconstruction, activity, assignments = [], [], [], []
    for b in range(len(mixture)):
        talkers = [s for s in range(S) if speaker_mask[b, s]]
        frames = [t for t in range(T) if frame_mask[b, t]]

        def error(stream, talker, b=b, frames=frames):
            squares = [(separated[b, stream, t] - targets[b, talker, t]) ** 2 for t in frames]
            return float(np.mean(squares))

        costs = {p: sum(error(p[s], s) for s in talkers) for p in permutations(range(S))}
        best = min(costs, key=costs.get)
        assignments.append(best)
        errors += [error(best[s], s) for s in talkers]
        for t in frames:
            total = sum((separated[b, best[s], t] for s in talkers), np.zeros(D))
            reconstruction.append(np.mean((total - mixture[b, t]) ** 2))
        for s in range(S):
            p = probs[b, best[s]]
            activity.append(-math.log(p if s in talkers else 1 - p))
    return np.mean(errors), np.mean(reconstruction), np.mean(activity), assignments


def perfect(order, probability=0.9):
    """Streams that are the talkers of one recording in another order."""
    targets = torch.randn(1, 3, T, D)
    separated = torch.empty_like(targets)
    separated[:, list(order)] = targets
    probs = torch.full((1, 3), probability)
    return separated, probs, targets, torch.ones(1, 3, dtype=torch.bool), targets.sum(1)


@pytest.mark.parametrize("order", list(permutations(range(3))))
def test_every_permutation_is_recovered(order):
    loss = ssm.separator_loss(*perfect(order))
    assert loss.assignment.tolist() == [list(order)]
    assert loss.separation.item() == 0
    assert loss.reconstruction.item() == pytest.approx(0, abs=1e-12)
    assert loss.activity.item() == pytest.approx(-math.log(0.9), rel=1e-5)
    assert loss.total.item() == pytest.approx(-0.5 * math.log(0.9), rel=1e-5)


def test_probabilities_follow_their_streams():
    """Two talkers in streams 2 and 0: the head is right when it says so, and only then."""
    targets = torch.randn(1, 3, T, D)
    targets[:, 2] = 0
    separated = torch.stack([targets[:, 1], torch.zeros(1, T, D), targets[:, 0]], 1)
    mask, mixture = torch.tensor([[True, True, False]]), targets.sum(1)
    right = ssm.separator_loss(separated, torch.tensor([[0.8, 0.2, 0.8]]), targets, mask, mixture)
    wrong = ssm.separator_loss(separated, torch.tensor([[0.8, 0.8, 0.2]]), targets, mask, mixture)
    assert right.assignment.tolist() == [[2, 0, 1]]
    assert right.activity.item() == pytest.approx(-math.log(0.8), rel=1e-5)
    expected = -(math.log(0.8) + 2 * math.log(0.2)) / 3
    assert wrong.activity.item() == pytest.approx(expected, rel=1e-5)


def test_agrees_with_slow_loop():
    batch = random_batch()
    loss = ssm.separator_loss(**batch)
    separation, reconstruction, activity, assignments = slow_loss(**batch)
    assert loss.separation.item() == pytest.approx(separation, rel=1e-5)
    assert loss.reconstruction.item() == pytest.approx(reconstruction, rel=1e-5)
    assert loss.activity.item() == pytest.approx(activity, rel=1e-5)
    for row, expected, count in zip(loss.assignment.tolist(), assignments, COUNTS, strict=True):
        assert row[:count] == list(expected[:count])
        assert sorted(row) == list(range(S))


def test_agrees_with_slow_loop_without_mask():
    batch = random_batch()
    batch["frame_mask"] = None
    loss = ssm.separator_loss(**batch)
    batch["frame_mask"] = torch.ones(B, T, dtype=torch.bool)
    separation, reconstruction, activity, _ = slow_loss(**batch)
    parts = [loss.separation.item(), loss.reconstruction.item(), loss.activity.item()]
    assert parts == pytest.approx([separation, reconstruction, activity], rel=1e-5)


def test_pairwise_mse():
    batch = random_batch()
    separated, targets = batch["separated"], batch["targets"]
    cost = ssm.pairwise_mse(separated, targets, batch["frame_mask"])
    for b, frames in enumerate(LENGTHS):
        differences = separated[b, :, None, :frames] - targets[b, None, :, :frames]
        torch.testing.assert_close(cost[b], differences.square().mean((2, 3)))


def test_loss_sizes():
    assert ssm.loss_sizes(random_batch()).tolist() == [sum(COUNTS), sum(LENGTHS), B]


def test_padding_frames_do_not_count():
    batch = random_batch()
    clean = ssm.separator_loss(**batch)
    padding = ~batch["frame_mask"]
    batch["separated"].transpose(1, 2)[padding] = 1e4
    batch["mixture"][padding] = -1e4
    dirty = ssm.separator_loss(**batch)
    for a, b in zip(clean, dirty, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(("reconstruction", "activity"), [(0.5, 0.5), (0.0, 0.5), (2.0, 0.25)])
def test_weights(reconstruction, activity):
    weights = {"reconstruction_weight": reconstruction, "activity_weight": activity}
    loss = ssm.separator_loss(**random_batch(), **weights)
    expected = loss.separation + reconstruction * loss.reconstruction + activity * loss.activity
    assert loss.total.item() == pytest.approx(expected.item(), rel=1e-6)


def test_default_weights():
    loss = ssm.separator_loss(**random_batch())
    expected = loss.separation + 0.5 * loss.reconstruction + 0.5 * loss.activity
    assert loss.total.item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("probability", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("silent", ["a talker", "everything", "nobody active"])
def test_silence_is_finite(silent, probability):
    batch = random_batch()
    if silent == "nobody active":
        batch["speaker_mask"][:] = False
    else:
        batch["targets"][:, 0 if silent == "a talker" else slice(None)] = 0
    if silent == "everything":
        batch["mixture"][:], batch["separated"][:] = 0, 0
    batch["speaker_probs"][:] = probability
    leaves = [batch[name].requires_grad_() for name in ("separated", "speaker_probs")]
    loss = ssm.separator_loss(**batch)
    loss.total.backward()
    assert all(part.isfinite() for part in loss[:4])
    assert all(leaf.grad.isfinite().all() for leaf in leaves)
    if silent == "nobody active":
        assert loss.separation.item() == 0


def test_a_probability_that_is_no_number_is_not_hidden():
    batch = random_batch()
    batch["speaker_probs"][0, 0] = math.nan
    assert ssm.separator_loss(**batch).total.isnan()


def test_matching_takes_the_likelier_of_two_streams_alike():
    """Without it the talker is whichever is nearer by a trace; a clear error still outweighs it."""
    target = torch.ones(1, 2, T, D)
    streams = torch.stack([target[:, 0], 1.001 * target[:, 0]], 1)
    probs, talks = torch.tensor([[0.2, 0.9]]), torch.tensor([[True, False]])
    target[:, 1] = 0

    def assigned(streams, weight):
        return ssm.separator_loss(
            streams, probs, target, talks, target[:, 0], matching_weight=weight).assignment.tolist()

    assert assigned(streams, 0.0) == [[0, 1]]
    assert assigned(streams, 0.04) == [[1, 0]]
    streams[:, 1] *= 1.5
    assert assigned(streams, 0.04) == [[0, 1]]
    # The least total: error plus a weight times the mean cross-entropy of both probabilities.
    error, entropy = 1e-2, math.log(9) + math.log(4)
    streams[:, 1] = 1 + error**0.5
    assert assigned(streams, 2 * error / entropy * 0.99) == [[0, 1]]
    assert assigned(streams, 2 * error / entropy * 1.01) == [[1, 0]]


def test_an_assignment_of_many_streams():
    """Seven streams have 5,040 assignments; the cost has one with no error at all."""
    order = [4, 2, 6, 0, 1, 5, 3]
    cost = torch.rand(2, 7, 7, generator=torch.Generator().manual_seed(0)) + 1
    for talker, stream in enumerate(order):
        cost[0, stream, talker] = 0
    assignment = ssm.best_assignment(cost, torch.ones(2, 7))
    assert assignment[0].tolist() == order
    assert sorted(assignment[1].tolist()) == list(range(7))
    streams = torch.arange(14.0).reshape(2, 7, 1)
    assert ssm.reorder(streams, assignment)[0].flatten().tolist() == order


def test_gradient_reaches_streams_and_probabilities():
    batch = random_batch()
    leaves = [batch[name].requires_grad_() for name in ("separated", "speaker_probs")]
    ssm.separator_loss(**batch).total.backward()
    assert (leaves[0].grad[0].abs().sum((1, 2)) > 0).all()  # three talkers, so all three streams
    assert (leaves[1].grad != 0).all()


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("separated", (B, S, T)),
        ("speaker_probs", (B, S + 1)),
        ("targets", (B, S - 1, T, D)),
        ("targets", (B, S, T, D + 1)),
        ("speaker_mask", (B + 1, S)),
        ("mixture", (B, T + 1, D)),
        ("frame_mask", (B, T - 1)),
    ],
)
def test_wrong_shape_raises(name, shape):
    batch = random_batch() | {name: torch.zeros(shape)}
    with pytest.raises(ValueError, match="must be") as error:
        ssm.separator_loss(**batch)
    assert str(list(shape)) in str(error.value)


@pytest.mark.parametrize(("gain", "noise"), [(1.0, 1.0), (1.0, 0.1), (3.0, 0.3), (0.5, 5.0)])
def test_si_sdr(gain, noise):
    """Target and noise are orthogonal and equally strong, so the ratio is gain to noise."""
    target = torch.tensor([1.0, -1, 2, 0, 0, 0, 0, 0])
    disturbance = torch.tensor([0.0, 0, 0, 0, 2, 1, 0, 1])
    estimates = torch.stack([gain * target + noise * disturbance, -2 * target + 0.2 * disturbance])
    ratio = ssm.si_sdr(estimates, target.expand(2, -1))
    expected = [20 * math.log10(gain / noise), 20.0]  # a turned phase is no distortion
    assert ratio.tolist() == pytest.approx(expected, abs=1e-3)
    several = ssm.si_sdr(estimates[:, None].expand(-1, 3, -1), target.expand(2, 3, -1))
    torch.testing.assert_close(several, ratio[:, None].expand(-1, 3))


def test_si_sdr_of_silence_is_finite():
    silence = torch.zeros(2, 3, 12)
    assert ssm.si_sdr(silence, silence).isfinite().all()
    assert ssm.si_sdr(torch.ones(2, 3, 12), silence).isfinite().all()
    assert ssm.si_sdr(torch.ones(2, 3, 12), silence).shape == (2, 3)


def test_trivial_outputs():
    mixture = torch.tensor([[[6.0, -3.0]], [[1.0, 4.0]], [[5.0, 5.0]]])
    mask = torch.tensor([[True, True, True], [True, True, False], [False, False, False]])
    outputs = ssm.trivial_outputs(mixture, mask)
    assert list(outputs) == ["zeros", "mixture", "mixture / count"]
    assert outputs["zeros"].tolist() == [[[0, 0]], [[0, 0]], [[0, 0]]]
    assert outputs["mixture"].tolist() == mixture.tolist()
    assert outputs["mixture / count"].tolist() == [[[2, -1]], [[0.5, 2]], [[5, 5]]]


def test_trivial_outputs_of_log_mel_spectrograms():
    """In Whisper's units 80 dB are 2, and half the amplitude (6 dB) is 0.15."""
    mixture = torch.tensor([[[0.5, -1.0], [1.25, 0.0]], [[0.0, -0.5], [0.25, 0.5]]])
    outputs = ssm.trivial_outputs(mixture, torch.tensor([[True, True], [True, False]]), True)
    assert list(outputs) == ["zeros", "mixture", "mixture / count"]
    assert outputs["zeros"].tolist() == [[[-0.75] * 2] * 2, [[-1.5] * 2] * 2]
    assert outputs["mixture"].tolist() == mixture.tolist()
    shared = mixture - outputs["mixture / count"]
    torch.testing.assert_close(shared[0], torch.full((2, 2), 20 * math.log10(2) / 40))
    assert (shared[1] == 0).all()


def test_calibrate_threshold():
    one = torch.tensor([[True, False], [True, False]])
    clear = torch.tensor([[0.9, 0.3], [0.8, 0.2]])
    assert ssm.calibrate_threshold(clear, one) == 0.5  # anything from 0.3 to 0.8 is right
    high = torch.tensor([[0.9, 0.71], [0.8, 0.6]])
    assert 0.71 < ssm.calibrate_threshold(high, one) < 0.75
    low = torch.tensor([[0.21, 0.05], [0.4, 0.1]])
    assert 0.17 < ssm.calibrate_threshold(low, one) <= 0.21
    nobody = torch.tensor([[False, False], [False, False]])
    assert ssm.calibrate_threshold(clear, nobody) > 0.9


def test_count_scores():
    """Three mixtures: one counted right, one with a talker too many, one with a talker missed."""
    probs = torch.tensor([[0.9, 0.2], [0.8, 0.7], [0.9, 0.4]])
    truth = torch.tensor([[True, False], [True, False], [True, True]])
    scores = ssm.count_scores(probs, truth, 0.5)
    assert scores == pytest.approx({"threshold": 0.5, "count_accuracy": 1 / 3,
                                    "majority_count_accuracy": 2 / 3, "precision": 3 / 4,
                                    "recall": 3 / 4})  # fmt: skip
    known = ssm.count_scores(probs, truth, 0.5, num_speakers=2)
    assert known["count_accuracy"] == pytest.approx(1 / 3)
    assert (known["precision"], known["recall"]) == pytest.approx((4 / 6, 1))


def test_the_first_talker_needs_less():
    probs = torch.tensor([[0.4, 0.6, 0.6], [0.95, 0.8, 0.91], [0.4, 0.3, 0.2]])
    for threshold, expected in (
            (0.9, [[0, 1, 0], [1, 0, 1], [0, 0, 0]]), (0.3, [[1, 1, 1], [1, 1, 1], [1, 1, 0]]),
            (1.0, [[0, 0, 0]] * 3)):
        active = ssm.active_streams(probs, threshold, first=0.5)
        assert active.int().tolist() == expected
    # One threshold for a soft talker alone, a doubtful second one, and two talkers.
    probs = torch.tensor([[0.6, 0.2], [0.9, 0.7], [0.98, 0.9]])
    truth = torch.tensor([[True, False], [True, False], [True, True]])
    assert ssm.calibrate_threshold(probs, truth, 0.5) == pytest.approx(0.725)
    assert ssm.count_scores(probs, truth, 0.725, first=0.5)["count_accuracy"] == 1
    assert ssm.count_scores(probs, truth, 0.725)["count_accuracy"] == pytest.approx(2 / 3)


@pytest.mark.parametrize(("make", "expected"), [
    (tiny_separator, [[False] * 3, [True, False, False]]),
    (tiny_spectrogram_separator, [[True, False, False], [True, False, False]])])
def test_the_first_talker_of_a_recording_needs_half(make, expected):
    probs = torch.tensor([[0.5, 0.5, 0.2], [0.85, 0.8, 0.2]])
    values, mixture = torch.ones(2, 3, 4, 5), torch.zeros(2, 4, 5)
    _, active = ssm.choose_talkers(make(threshold=0.85), values, mixture, probs, None, None)
    assert active.tolist() == expected


@pytest.mark.parametrize(("make", "known", "replaced"), [
    (tiny_spectrogram_separator, None, True), (tiny_spectrogram_separator, 1, False),
    (tiny_separator, None, False)])
def test_a_talker_alone_is_the_mixture_unless_that_is_known(make, known, replaced):
    values, mixture = torch.ones(1, 3, 4, 5), torch.zeros(1, 4, 5)
    probs = torch.tensor([[0.1, 0.9, 0.1]])
    found, _ = ssm.choose_talkers(make(), values, mixture, probs, 0.5, known)
    assert found[0, :, 0, 0].tolist() == [1, 0 if replaced else 1, 1]


@pytest.mark.parametrize("damaged", [0, 1])
def test_damaged_output_is_refused(damaged):
    values, probs = torch.ones(1, 3, 4, 5), torch.full((1, 3), 0.5)
    (values, probs)[damaged][0, 0] = math.nan
    with pytest.raises(ValueError, match="not finite"):
        ssm.choose_talkers(tiny_separator(), values, values[:, 0], probs, None, None)


def test_active_streams():
    probs = torch.tensor([[0.2, 0.9, 0.5], [0.1, 0.3, 0.2]])
    assert ssm.active_streams(probs).tolist() == [[False, True, True], [False, False, False]]
    assert ssm.active_streams(probs, 0.2).tolist() == [[True, True, True], [False, True, True]]
    one, two = ssm.active_streams(probs, 0.99, 1), ssm.active_streams(probs, 0.99, 2)
    assert one.tolist() == [[False, True, False], [False, True, False]]
    assert two.tolist() == [[False, True, True], [False, True, True]]
    assert not ssm.active_streams(probs, 0.0, 0).any()
    assert ssm.active_streams(probs, 0.99, 3).all()
    for impossible in (-1, 4):
        with pytest.raises(ValueError, match="num_speakers"):
            ssm.active_streams(probs, 0.5, impossible)
