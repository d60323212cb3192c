"""The example notebook runs from a clean kernel, as its user runs it."""

import os

import pytest
from conftest import ROOT, SHARED, save_tiny_checkpoint, sine, tiny_separator, write_wav

nbclient = pytest.importorskip("nbclient", reason="running the notebook needs nbclient")
pytest.importorskip("ipykernel", reason="running the notebook needs ipykernel")
NOTEBOOK = ROOT / "examples/multi_speaker_qwen2_audio.ipynb"


def execute(monkeypatch, **settings) -> str:
    """Run every cell; returns what they print."""
    import nbformat

    for name in ("MODEL", "CHECKPOINT", "AUDIO"):
        monkeypatch.setenv(f"SPEAKER_SEPARATOR_{name}", str(settings.get(name, f"no {name}")))
    monkeypatch.setenv("OMP_NUM_THREADS", os.environ.get("OMP_NUM_THREADS", "2"))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    client = nbclient.NotebookClient(
        notebook, timeout=300, kernel_name="python3",
        resources={"metadata": {"path": str(NOTEBOOK.parent)}})  # fmt: skip
    client.execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return "".join(output.get("text", "") for output in outputs if output.get("name") == "stdout")


def test_on_a_tiny_random_model(qwen_folder, monkeypatch):
    printed = execute(monkeypatch, MODEL=qwen_folder)
    assert "two hums" in printed
    assert "random weights" in printed
    for line in ("stream 0 (", "stream 1 (", "Speaker 1 (", "Speaker 2 (", "0.0 to   1.0 s"):
        assert line in printed


def test_with_a_recording_and_a_checkpoint(qwen_folder, tmp_path, monkeypatch):
    source = {"encoder": str(qwen_folder), "layer": 1, "frame_rate": 50.0}
    separator = tiny_separator(2, seed=4, threshold=0.0, feature_source=source)
    path = save_tiny_checkpoint(tmp_path / "best_model.pt", separator)
    recording = write_wav(tmp_path / "a.wav", sine(1.4, 200, 8000), 8000)
    printed = execute(monkeypatch, MODEL=qwen_folder, CHECKPOINT=path, AUDIO=recording)
    assert " instead" not in printed
    assert printed.count("stream ") == printed.count("Speaker ") == 2


def test_on_the_digits_model(monkeypatch):
    folder = SHARED / "qwen2-audio-digits"
    if not folder.is_dir():
        pytest.skip(f"no spoken-digits model at {folder}")
    assert "Speaker 2 (" in execute(monkeypatch, MODEL=folder)
