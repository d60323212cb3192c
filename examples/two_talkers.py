"""Two people talk at once, and the model answers for each: from any two recordings to a picture.

    python examples/two_talkers.py one.wav other.wav --model openai/whisper-tiny.en

Mixes two recordings at equal levels, the second half a second later, and asks a Whisper or
Qwen2-Audio about the mixture as it is and with the separator inside. Writes ``mixture.wav``,
``speaker_1.wav`` and ``speaker_2.wav`` to listen to, and ``two_talkers.png``: the spectrograms with
the answers under them.
"""

import argparse
import os
import sys
import textwrap
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import speaker_separator_module as ssm  # noqa: E402
from audio import FRAME_RATE, SAMPLING_RATE, load_model, read_audio, write_wav  # noqa: E402
from long_recordings import answer_per_talker, ask  # noqa: E402
from scoring import DECIBELS, decibels, draw_features  # noqa: E402

LEVEL = 0.05  # root mean square of each talker
LATER = SAMPLING_RATE // 2  # samples between the talkers' starts
LONGEST = 30  # seconds that Whisper reads at a time
RESULTS = ("two_talkers.png", "mixture.wav", "speaker_1.wav", "speaker_2.wav")  # as written


def mix(one: Path, other: Path) -> np.ndarray:
    """Return the sum [samples] of two recordings at equal levels, the second one later."""
    talkers = [read_audio(path) for path in (one, other)]
    for path, samples, start in zip((one, other), talkers, (0, LATER), strict=True):
        if not samples.any() or len(samples) + start > LONGEST * SAMPLING_RATE:
            raise ValueError(f"{path} is silent or, with its start, longer than {LONGEST} s")
    talkers = [samples * (LEVEL / np.sqrt(np.mean(samples**2) + 1e-12)) for samples in talkers]
    mixture = np.zeros(max(len(talkers[0]), len(talkers[1]) + LATER), np.float32)
    mixture[: len(talkers[0])] += talkers[0]
    mixture[LATER : LATER + len(talkers[1])] += talkers[1]
    return mixture


def answer(args, mixture: np.ndarray) -> tuple[str, list[str], int]:
    """Return the model's answer to the mixture, its answers per talker, and its mel bins."""
    model, processor = load_model(args.model)
    (alone,) = ask(model, processor, [mixture], max_new_tokens=128)
    ssm.integrate_speaker_separator(model, separator_checkpoint=args.checkpoint)
    rows = answer_per_talker(model, processor, mixture, num_speakers=2, max_new_tokens=128)
    return alone, [row["text"] for row in rows], processor.feature_extractor.feature_size


def picture(path: Path, panels: list[tuple[str, object, str]]) -> None:
    """Draw (title, spectrogram [T, D], text) panels, one under the other."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 2.4 * len(panels)), layout="constrained")
    column = figure.subplots(len(panels))
    top = max(float(values.amax()) for _, values, _ in panels)
    for axes, (title, values, text) in zip(column, panels, strict=True):
        image = draw_features(axes, decibels(values, top), FRAME_RATE, DECIBELS, True)
        axes.set_title(title, fontsize=10, loc="left")
        axes.set_ylabel("kHz", fontsize=8)
        words = "\n".join(["seconds", *textwrap.wrap(text, 100)])
        axes.set_xlabel(words, fontsize=9, parse_math=False)  # a text may hold prices in dollars
    bar = figure.colorbar(image, ax=list(column), pad=0.01, aspect=60)
    bar.set_label("dB, 0 at the peak", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    figure.savefig(path, dpi=120)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("one", help="recording of a talker, of 30 s at most")
    add("other", help="recording of another talker, of 30 s at most")
    add("--model", default="openai/whisper-tiny.en", help="Whisper or Qwen2-Audio: folder or id")
    add("--checkpoint", default=ssm.SHIPPED_SEPARATOR, help="separator")
    add("--output_dir", type=Path, default=Path("two_talkers"), help="where everything goes")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Mix, separate, answer, and write everything."""
    args = build_parser().parse_args(argv)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        ssm.prepare_folder(args.output_dir)
        results = [args.output_dir / name for name in RESULTS]
        ssm.check_writable(*map(str, results), inputs=(args.one, args.other))
        foreign = [path for path in results if path.exists() and not results[0].exists()]
        if foreign:
            raise ValueError(f"{foreign[0]} is not of an earlier run and would be overwritten: "
                             "choose another --output_dir")
        mixture = mix(args.one, args.other)
        separator = ssm.load_separator(args.checkpoint)
        alone, per_talker, bins = answer(args, mixture)
        _, spectrogram, talkers = ssm.infer_recording(
            mixture, separator, num_speakers=2, num_bins=bins)
        if len(per_talker) != len(talkers):  # a model of short windows may miss one
            raise ValueError(f"{args.model} reads less than this mixture at a time, and finds "
                             f"{len(per_talker)} talkers in it: take shorter recordings")
        print(f"without separator: {alone}")
        panels = [("Two people talk at once, and the model writes:", spectrogram, alone)]
        for number, (text, (_, values, _)) in enumerate(zip(per_talker, talkers, strict=True), 1):
            print(f"speaker {number}: {text}")
            panels.append((f"With the separator, speaker {number}:", values, text))
        picture(results[0], panels)
        sounds = [mixture, *(audio.numpy() for _, _, audio in talkers)]
        for path, sound in zip(results[1:], sounds, strict=True):
            write_wav(path, sound)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    print(f"pictures and sound: {args.output_dir}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
