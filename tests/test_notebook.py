"""The example notebook runs from a clean kernel, as its user runs it."""

import os

import pytest
from conftest import ROOT, save_tiny_checkpoint, sine, tiny_spectrogram_separator, write_wav

nbclient = pytest.importorskip("nbclient", reason="running the notebook needs nbclient")
pytest.importorskip("ipykernel", reason="running the notebook needs ipykernel")
NOTEBOOK = ROOT / "examples/multi_speaker_qwen2_audio.ipynb"


def execute(monkeypatch, model, checkpoint, recording=None) -> tuple[str, list[str]]:
    """Run every cell; returns what they print, and the kinds of everything they show."""
    import nbformat

    monkeypatch.setenv("SPEAKER_SEPARATOR_MODEL", str(model))
    monkeypatch.setenv("SPEAKER_SEPARATOR_CHECKPOINT", str(checkpoint))
    if recording:
        monkeypatch.setenv("SPEAKER_SEPARATOR_AUDIO", str(recording))
    monkeypatch.setenv("OMP_NUM_THREADS", os.environ.get("OMP_NUM_THREADS", "2"))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    client = nbclient.NotebookClient(
        notebook, timeout=300, kernel_name="python3",
        resources={"metadata": {"path": str(NOTEBOOK.parent)}})  # fmt: skip
    client.execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    shown = ["image" if "image/png" in data else "audio" if "<audio" in data["text/html"] else ""
             for data in (output["data"] for output in outputs if "data" in output)]  # fmt: skip
    assert not [output for output in outputs if output.get("name") == "stderr"]
    return "".join(output.get("text", "") for output in outputs), shown


def checkpoint_with(folder, threshold):
    separator = tiny_spectrogram_separator(2, threshold=threshold)
    return save_tiny_checkpoint(folder / "best_model.pt", separator)


def test_without_recordings_and_separator(whisper_path, tmp_path, monkeypatch):
    printed, shown = execute(monkeypatch, whisper_path, tmp_path / "gone")
    assert "two hums instead" in printed and "random weights instead" in printed
    for line in ("Speaker 1 (", "Speaker 2 (", "[(0, 0, ", "Speaker 2: "):
        assert line in printed
    assert shown == ["audio", "audio", "audio", "image"]


@pytest.mark.parametrize(("threshold", "found"), [(0.0, 2), (1.0, 0)])
def test_with_a_recording_and_a_checkpoint(threshold, found, qwen_folder, tmp_path, monkeypatch):
    recording = write_wav(tmp_path / "a.wav", sine(0.8, 200, 8000), 8000)
    checkpoint = checkpoint_with(tmp_path, threshold)
    printed, shown = execute(monkeypatch, qwen_folder, checkpoint, recording)
    assert " instead" not in printed
    assert shown == ["audio"] * (1 + found) + ["image"]
    assert printed.count("Speaker ") == printed.count("speaker ") == found
    assert printed.count("no talker found") == (0 if found else 2)
    assert ("Speakers [1, 2]: " in printed) is (found == 2)
