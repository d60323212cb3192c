"""Scores in readable form: word errors, tables, pictures and the training report."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from audio import DIGITAL_SILENCE, LOG_MEL_RANGE, mel_bin

# --------------------------------------------------------------------------------------------------
# Words


def is_english(text: str) -> bool:
    """Return whether all letters of a text are ASCII."""
    return all(c.isascii() for c in text if c.isalpha())


def normalize_words(text: str, english: bool | None = None) -> list[str]:
    """Return the words of a text for counting errors.

    ``english`` text (default: ``is_english``) goes through Whisper's English normaliser, which
    unifies numerals and contractions. Its list of British spellings is left out, since not every
    model has it. Numbers are then split into digits, since "three one nine" and "3, 1, 9" mean the
    same. Other text goes through Whisper's basic normaliser; Chinese and Japanese are counted by
    characters.
    """
    from transformers.models.whisper.english_normalizer import (
        BasicTextNormalizer,
        EnglishTextNormalizer,
    )

    if is_english(text) if english is None else english:
        text = text.replace("\u2019", "'")  # typographic apostrophe
        # The normaliser would drop leading zeros of a number.
        text = re.sub(r"(?<![\d.,])0+(?=\d)", lambda zeros: " ".join(zeros[0]) + " ", text)
        text = EnglishTextNormalizer({})(text)
        words = re.sub(r"(\d)", r" \1 ", text).split()
        return ["1" if word == "one" else word for word in words]  # the only digit left as a word
    text = BasicTextNormalizer()(text)
    return re.sub(r"([\u3040-\u30ff\u4e00-\u9fff])", r" \1 ", text).split()


def cp_word_errors(references: list[str], hypotheses: list[str]) -> tuple[int, int]:
    """Return (word errors, reference words) under the best assignment of hypotheses to talkers.

    Their numbers may differ. Errors divided by words are the concatenated minimum-permutation word
    error rate (cpWER; Watanabe et al., 2020, arXiv:2004.09249).

    >>> cp_word_errors(["one two", "three"], ["3", "one too"])
    (1, 3)
    """
    from jiwer import process_words
    from scipy.optimize import linear_sum_assignment

    size = max(len(references), len(hypotheses))
    english = all(map(is_english, references))  # one normaliser for both sides
    said, heard = ([normalize_words(text, english) for text in texts] + [[]] * (size - len(texts))
                   for texts in (references, hypotheses))
    cost = np.zeros((size, size), int)
    for i, reference in enumerate(said):
        for j, hypothesis in enumerate(heard):
            cost[i, j] = len(hypothesis)
            if reference:
                errors = process_words(" ".join(reference), " ".join(hypothesis))
                cost[i, j] = errors.substitutions + errors.deletions + errors.insertions
    return int(cost[linear_sum_assignment(cost)].sum()), sum(map(len, said))


def word_scores(rows: list[dict]) -> list[dict]:
    """Sum up rows of ``evaluate_words`` by number of talkers and by overlap."""
    groups: dict[str, list[dict]] = {}
    for row in sorted(rows, key=lambda row: row["talkers"]):
        groups.setdefault(f"{row['talkers']} talker{'s' * (row['talkers'] != 1)}", []).append(row)
    several = [row for row in rows if row["talkers"] > 1 and row["overlap"] is not None]
    for low, high in ((0.0, 0.2), (0.2, 0.5), (0.5, 0.8), (0.8, 1.01)):
        if group := [row for row in several if low <= row["overlap"] < high]:
            groups[f"overlap {low:.0%} to {min(high, 1):.0%}"] = group
    scores = []
    for name, group in groups.items():
        words = sum(row["words"] for row in group)
        rates = {kind: sum(row[kind] for row in group) / words if words else None
                 for kind in ("mixture", "separated", "oracle")}
        right = float(np.mean([row["found"] == row["talkers"] for row in group]))
        scores.append({"of": name, "mixtures": len(group), "words": words, **rates,
                       "count_accuracy": right})
    return scores


# --------------------------------------------------------------------------------------------------
# Tables


def markdown_table(columns: list[str], rows: list[list]) -> list[str]:
    """Return the lines of a table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return ["| " + " | ".join(map(str, line)) + " |" for line in lines]


def word_table(scores: list[dict]) -> list[str]:
    """Return the table of word error rates that ``evaluate --model`` prints."""
    rows = []
    for row in scores:
        rates = ["-" if row[kind] is None else f"{row[kind]:.1%}"
                 for kind in ("mixture", "separated", "oracle")]
        rows.append([row["of"], row["mixtures"], *rates, f"{row['count_accuracy']:.1%}"])
    return markdown_table(["cpWER", "mixtures", "no separator", "separated", "talker alone",
                           "count right"], rows)  # 76 columns


def score_table(scores: dict) -> list[str]:
    """Return the table that stands in the report and that ``evaluate`` prints."""
    gain = scores["si_sdr_improvement"]  # None without mixtures of several talkers
    as_it_is, improvement = ("-", "-") if gain is None else ("0.0", f"{gain:.1f}")
    rows = [[name, f"{value:.3f}", "-" if name == "zeros" else as_it_is, "-"]
            for name, value in scores["trivial_mse"].items()]
    commonest = f"{scores['majority_count_accuracy']:.1%}"
    rows.append(["always the commonest count", "-", "-", commonest])
    rows.append(["**separator**", f"{scores['separation']:.3f}", improvement,
                 f"{scores['count_accuracy']:.1%}"])
    return markdown_table(
        ["output", "separation error", "SI-SDR improvement (dB)", "talker count right"], rows)


def write_report(
    folder: Path, settings: dict, weights: dict, train_set, val_set, history: list[dict],
    mixed: int = 0,
) -> None:
    """Write training_report.md: settings, data, losses, and scores beside trivial outputs.

    ``settings`` and ``weights`` (of the loss parts) are those of the run. ``mixed`` is the number
    of talkers that fresh training mixtures were drawn from, 0 without fresh mixtures.
    """
    last, best = history[-1], min(history, key=lambda row: row["val"]["total"])
    settings = settings | {"threshold": best["val"]["threshold"]}
    parts = ["total", *weights]
    data, losses = [], []
    for name, dataset in (("train", train_set), ("val", val_set)):
        counts = [len(sample["speakers"]) for sample in dataset.samples]
        by_count = "; ".join(f"{n}: {counts.count(n)}" for n in sorted(set(counts)))
        talkers = len(dataset.files_by_talker())
        data.append([name, len(counts), talkers, f"{np.mean(counts):.2f}", by_count])
    for row in history:
        losses.append([row["epoch"], f"{row['lr']:.2e}", f"{row['train']['total']:.4f}",
                       *(f"{row['val'][part]:.4f}" for part in parts),
                       f"{row['val']['count_accuracy']:.1%}"])
    total = max(last["val"]["total"], 1e-12)
    shares = [[part, weight, f"{weight * last['val'][part] / total:.0%}"]
              for part, weight in weights.items()]
    lines = [
        "# Training report", "", "## Configuration", "",
        *markdown_table(["setting", "value"], [[k, json.dumps(v)] for k, v in settings.items()
                                               if v is not None]),
        "", f"## Data: {train_set.data_dir}", "",
        *markdown_table(["split", "mixtures", "talkers", "mean per mixture",
                         "mixtures by talkers"], data),
        *["", f"Training drew fresh mixtures of {mixed} talkers."] * (mixed > 0),
        "", f"## Validation, best epoch ({best['epoch']})", "", *score_table(best["val"]),
        *["", "Talkers are counted in every other mixture; the threshold was chosen on the rest."]
        * (len(val_set) > 1),
        "", "## Loss by epoch", "",
        *["Training losses are of a single pass and ignore levels more than 50 dB below the "
          "loudest bin; validation losses are of the separator as used, except that a single "
          "talker is separated, too.", ""]
        * train_set.has_recordings,
        *markdown_table(["epoch", "lr", "train", "validation", *weights, "talker count right"],
                        losses),
        "", "## Loss composition, last epoch (validation)", "",
        *markdown_table(["part", "weight", "share"], shares),
        "", "## Checkpoints", "", *(f"- {path.name}" for path in sorted(folder.glob("*.pt"))),
    ]
    (folder / "training_report.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


# --------------------------------------------------------------------------------------------------
# Pictures


def plot_history(path: Path, history: list[dict]) -> None:
    """Draw losses, separation beside the trivial outputs, and count accuracy against epochs."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    epochs = [row["epoch"] for row in history]
    best = min(history, key=lambda row: row["val"]["total"])["epoch"]
    figure = Figure(figsize=(12, 3.8), layout="constrained")
    loss, separation, count = figure.subplots(1, 3)
    for split, style in (("train", "o--"), ("val", "o-")):
        loss.plot(epochs, [row[split]["total"] for row in history], style, ms=3, label=split)
        values = [row[split]["separation"] for row in history]
        separation.plot(epochs, values, style, ms=3, label=f"separator, {split}")
    trivial = history[-1]["val"]["trivial_mse"].items()
    for (name, error), grey in zip(trivial, ("0.2", "0.45", "0.7"), strict=True):
        separation.axhline(error, color=grey, linestyle=":", label=name)
    count.plot(
        epochs, [100 * row["val"]["count_accuracy"] for row in history], "o-", ms=3, label="val")
    count.set_ylim(0, 105)
    labels = (("combined loss", "loss"), ("separation error per talker", "mean squared error"),
              ("talker count", "% of mixtures counted right"))
    for axes, (title, label) in zip((loss, separation, count), labels, strict=True):
        axes.axvline(best, color="0.8", linewidth=1, zorder=0, label=f"best epoch ({best})")
        axes.set(title=title, xlabel="epoch", ylabel=label, xlim=(0.5, epochs[-1] + 0.5))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(0, -0.18), ncols=2)
    figure.savefig(path, dpi=120, format="png")


COLUMNS = 4000  # most of a picture of features
DECIBELS = {"vmin": -80, "vmax": 0, "cmap": "magma"}


def draw_features(axes, values, frame_rate: float | None, scale: dict, log_mel: bool):
    """Draw values [T, D] over seconds or frames, with kHz or feature numbers; return the image."""
    extent = (0, len(values) / (frame_rate or 1), 0, values.shape[1])
    frames = -(-len(values) // COLUMNS)  # averaged into one column of the picture
    columns = F.avg_pool1d(values.T, frames, ceil_mode=True) if frames > 1 else values.T
    image = axes.imshow(columns.numpy(), aspect="auto", origin="lower", extent=extent,
                        interpolation="nearest", **scale)
    axes.set_xlabel("seconds" if frame_rate else "frame", fontsize=8)
    axes.tick_params(labelsize=7)
    if log_mel:
        marks = np.array([250, 500, 1000, 2000, 4000])
        places = mel_bin(marks, values.shape[1]) + 0.5
        axes.set_yticks(places, [f"{hertz / 1000:g}" for hertz in marks])
    return image


def decibels(values, top):
    """Return log-mel values in Whisper's units as dB relative to ``top``."""
    return 40 * (values - top)


def plot_streams(path, rows: list[dict], frame_rate: float | None, log_mel: bool) -> None:
    """Draw [T, D] arrays as panels with titles, one row of panels per recording.

    Log-mel spectrograms have axes in seconds and kHz and a scale in dB; other features have frames
    or seconds and feature numbers.
    """
    from matplotlib.figure import Figure

    columns = max(len(row) for row in rows)
    figure = Figure(figsize=(2.8 * columns + 0.8, 2.4 * len(rows)), layout="constrained")
    grid = figure.subplots(len(rows), columns, squeeze=False)
    for axes_row, row in zip(grid, rows, strict=True):
        arrays = {title: torch.as_tensor(values).float().cpu() for title, values in row.items()}
        first = next(iter(arrays.values()))
        if log_mel:
            scale, top = DECIBELS, first.amax()
            top += LOG_MEL_RANGE * (top <= DIGITAL_SILENCE)  # silence is dark
            arrays = {title: decibels(values, top) for title, values in arrays.items()}
        else:
            limit = max(float(np.quantile(first.abs().numpy(), 0.99)), 1e-6)
            scale = {"vmin": -limit, "vmax": limit, "cmap": "RdBu_r"}
        for axes in axes_row[len(arrays) :]:
            axes.set_axis_off()
        for axes, (title, values) in zip(axes_row, arrays.items(), strict=False):
            image = draw_features(axes, values, frame_rate, scale, log_mel)
            axes.set_title(title, fontsize=9)
        axes_row[0].set_ylabel("kHz" if log_mel else "feature", fontsize=8)
        bar = figure.colorbar(image, ax=list(axes_row), pad=0.01)
        bar.set_label("dB, 0 at the mixture's peak" if log_mel else "feature value", fontsize=8)
        bar.ax.tick_params(labelsize=7)
    figure.savefig(path, dpi=120, format="png")
