"""What stands in the pictures: axes with units, ticks, legends, one scale per recording."""

import pytest
import torch

import scoring
from audio import DIGITAL_SILENCE

pytestmark = pytest.mark.pictures


@pytest.fixture
def drawn(monkeypatch):
    """Figures in the order in which they are saved."""
    from matplotlib.figure import Figure

    figures = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *a, **k: (save(self, *a, **k), figures.append(self)))
    return figures


def epochs(*totals):
    trivial = dict.fromkeys(("zeros", "mixture", "mixture / count"), 1.0)
    return [{"epoch": number, "train": {"total": total, "separation": total},
             "val": {"total": total, "separation": total, "count_accuracy": 0.25,
                     "trivial_mse": trivial}}
            for number, total in enumerate(totals, start=1)]  # fmt: skip


@pytest.mark.parametrize("totals", [(0.5,), (0.5, 0.3), (0.5, 0.3, 0.4)])
def test_curves(totals, drawn, tmp_path):
    scoring.plot_history(tmp_path / "curves.png", epochs(*totals))
    best = min(2, len(totals))
    for axes in drawn[0].axes:
        assert axes.get_xlabel() == "epoch" and axes.get_ylabel() and axes.get_title()
        low, high = axes.get_xlim()
        assert {t for t in axes.get_xticks() if low <= t <= high} == {*range(1, len(totals) + 1)}
        lines = {line.get_label(): line for line in axes.lines}
        assert set(lines[f"best epoch ({best})"].get_xdata()) == {best}
        assert axes.get_legend().get_bbox_to_anchor().y1 < axes.bbox.y0  # below, over no curve
        assert lines[max(name for name in lines if "val" in name)].get_marker() == "o"
    assert drawn[0].axes[2].lines[0].get_ydata()[0] == 25  # percent


def test_silence_is_dark(drawn, tmp_path):
    silence = torch.full((4, 80), DIGITAL_SILENCE)
    scoring.plot_streams(tmp_path / "silence.png", [{"mixture": silence}], 100, log_mel=True)
    assert drawn[0].axes[0].images[0].get_array().max() == -80


def test_spectrograms(drawn, tmp_path):
    """Two recordings, the louder one in the second row: each is 0 dB at its mixture's peak."""
    loud = torch.full((150, 80), -1.0)
    loud[20, 40] = 1.0
    rows = [{"mixture": loud - 1, "speaker 1": loud - 1.5}, {"mixture": loud}]
    scoring.plot_streams(tmp_path / "a.png", rows, 100, log_mel=True)
    pictures = [axes for axes in drawn[0].axes if axes.images]
    assert [axes.get_title() for axes in pictures] == ["mixture", "speaker 1", "mixture"]
    assert [float(axes.images[0].get_array().max()) for axes in pictures] == [0, -20, 0]
    for axes in pictures:
        assert axes.get_xlabel() == "seconds" and axes.get_xlim() == (0, 1.5)
        ticks = zip((label.get_text() for label in axes.get_yticklabels()), axes.get_yticks(),
                    strict=True)  # 1 kHz is 15 mel of 45.245; bin 0 is drawn from 0 to 1
        assert dict(ticks)["1"] == pytest.approx(15 / 45.245 * 81 - 0.5, abs=0.01)
    assert pictures[0].get_ylabel() == "kHz"
    bars = [axes.get_ylabel() for axes in drawn[0].axes if axes.get_label() == "<colorbar>"]
    assert bars == ["dB, 0 at the mixture's peak"] * 2


@pytest.mark.parametrize(("rate", "unit", "end"), [(None, "frame", 50), (25, "seconds", 2)])
def test_features(rate, unit, end, drawn, tmp_path):
    scoring.plot_streams(tmp_path / "a.png", [{"mixture": torch.randn(50, 8)}], rate, log_mel=False)
    axes, bar = drawn[0].axes
    assert (axes.get_xlabel(), axes.get_xlim()[1], axes.get_ylabel()) == (unit, end, "feature")
    assert bar.get_ylabel() == "feature value"


@pytest.mark.parametrize(("frames", "columns"), [(4000, 4000), (4001, 2001), (9000, 3000)])
def test_a_long_recording_is_drawn_in_means(frames, columns, drawn, tmp_path):
    """The axis keeps its seconds, and every column is the mean of as many frames."""
    values = torch.arange(frames).float()[:, None].expand(-1, 8)
    scoring.plot_streams(tmp_path / "a.png", [{"mixture": values}], 100, log_mel=False)
    (image,) = drawn[0].axes[0].images
    assert image.get_array().shape == (8, columns)
    assert image.get_extent()[:2] == [0, frames / 100]
    each = -(-frames // 4000)
    assert image.get_array()[3, 7] == pytest.approx(7 * each + (each - 1) / 2)
