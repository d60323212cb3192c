"""A page to try a separator: drop or record audio, see and hear each talker, read each answer.

    python speaker_separator_module.py demo --model openai/whisper-tiny.en

That command serves it on 127.0.0.1 alone; recordings stay on this machine. It needs gradio.
"""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np

from audio import FRAME_RATE, SAMPLING_RATE, recording_doubts
from scoring import plot_streams


def look_at(mixture, talkers: list) -> np.ndarray:
    """Return a picture [H, W, RGBA] of the spectrograms [T, D] of a mixture and its talkers."""
    from PIL import Image

    panels = {f"speaker {number}, probability {facts['probability']:.2f}": values
              for number, (facts, values, _) in enumerate(talkers, start=1)}
    file = io.BytesIO()
    plot_streams(file, [{"mixture": mixture, **panels}], FRAME_RATE, log_mel=True)
    return np.asarray(Image.open(file))


def talkers_of(recording: str, separate: Callable, ask: Callable | None, count: int | None):
    """Separate a recording of ``count`` talkers (None: find out how many).

    ``separate`` and ``ask`` take the recording and ``num_speakers``; they are ``infer_recording``
    and ``answer_per_talker`` with other arguments bound. Returns warnings, a picture and, for each
    talker, a title, int16 samples at 16 kHz and the text (None without ``ask``). Raises as they do.
    """
    _, mixture, talkers = separate(recording, num_speakers=count)
    answers = ask(recording, num_speakers=count) if ask and talkers else []
    texts = {row["speaker"]: row["text"] for row in answers}
    rows = []
    for number, (_, _, audio) in enumerate(talkers, start=1):
        samples = (32767 * audio).short().numpy()  # gradio would make all equally loud
        rows.append((f"speaker {number}", samples, texts.get(number, "") if ask else None))
    warnings = [f"This recording {doubt}." for doubt in recording_doubts(recording)]
    return warnings, look_at(mixture, talkers), rows


def explain(error: Exception, recording: str) -> str:
    """Return what is wrong with a recording, without the folder that gradio copied it to."""
    return str(error).replace(f"{Path(recording).parent}/", "")


def build_page(separate: Callable, ask: Callable | None, most: int, count: int | None = None):
    """Return the page; of 1 to ``most`` talkers, ``count`` is preselected (None: find out)."""
    import gradio

    with gradio.Blocks(title="Speaker separator", analytics_enabled=False) as page:
        gradio.Markdown("# Who says what\nDrop a recording in which several people talk at once.")
        recording = gradio.Audio(type="filepath", sources=["upload", "microphone"],
                                 label="recording", buttons=[])
        choices = [("find out", 0), *range(1, most + 1)]
        known = gradio.Radio(choices, value=count or 0, label="talkers")

        @gradio.render(inputs=[recording, known])
        def show(recording, count):
            if not recording:
                return
            try:
                warnings, picture, talkers = talkers_of(recording, separate, ask, count or None)
            except (ValueError, OSError) as error:
                gradio.Markdown(f"**{explain(error, recording)}**")
                return
            for text in warnings + ["no talker found"] * (not talkers):
                gradio.Markdown(text)
            gradio.Image(picture, show_label=False, format="png", buttons=["fullscreen"])
            for title, samples, text in talkers:
                gradio.Audio((SAMPLING_RATE, samples), label=title, buttons=["download"])
                if text is not None:
                    gradio.Textbox(text, label=f"{title} says")

    return page
