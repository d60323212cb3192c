"""The example notebook runs from a clean kernel, as its user runs it; other inputs run faster."""

import socket
import sys

import pytest
from conftest import ROOT, save_tiny_checkpoint, sine, tiny_spectrogram_separator, write_wav

nbclient = pytest.importorskip("nbclient", reason="running the notebook needs nbclient")
pytest.importorskip("ipykernel", reason="running the notebook needs ipykernel")
pytestmark = pytest.mark.pictures
NOTEBOOK = ROOT / "examples/multi_speaker_qwen2_audio.ipynb"


def read_notebook():
    import nbformat

    return nbformat.read(NOTEBOOK, as_version=4)


def execute(notebook) -> tuple[str, list[str]]:
    """Run every cell in a kernel; returns what they print, and the kinds of what they show."""
    client = nbclient.NotebookClient(
        notebook, timeout=300, kernel_name="python3",
        resources={"metadata": {"path": str(NOTEBOOK.parent)}})  # fmt: skip
    client.execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    shown = ["image" if "image/png" in data else "audio" if "<audio" in data["text/html"] else ""
             for data in (output["data"] for output in outputs if "data" in output)]  # fmt: skip
    assert not [output for output in outputs if output.get("name") == "stderr"]
    return "".join(output.get("text", "") for output in outputs), shown


def test_stored_outputs():
    """Every code cell but the first two shows something; nothing names the machine it ran on."""
    cells = [cell for cell in read_notebook().cells if cell.cell_type == "code"]
    assert [bool(cell.outputs) for cell in cells] == [False, False] + [True] * (len(cells) - 2)
    outputs = [output for cell in cells for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    texts = "".join(output.get("text", "") for output in outputs)
    assert "Speaker 2 (" in texts
    for local in ("/root", "/home", "/Users", "/tmp"):
        assert local not in texts


def test_without_recordings_and_separator(whisper_path, tmp_path, monkeypatch):
    monkeypatch.setenv("SPEAKER_SEPARATOR_MODEL", str(whisper_path))
    monkeypatch.setenv("SPEAKER_SEPARATOR_CHECKPOINT", str(tmp_path / "gone"))
    printed, shown = execute(read_notebook())
    assert "two hums instead" in printed and "random weights instead" in printed
    for line in ("Speaker 1 (", "Speaker 2 (", "[(0, 0, ", "Speaker 2: "):
        assert line in printed
    assert shown == ["audio", "audio", "audio", "image"]


@pytest.mark.parametrize(("threshold", "found"), [(0.0, 2), (1.0, 0)])
def test_with_a_recording_and_a_checkpoint(threshold, found, qwen_folder, tmp_path, monkeypatch,
                                           capsys):  # fmt: skip
    """The same cells in this process, which spares a kernel's start."""
    separator, shown = tiny_spectrogram_separator(2, threshold=threshold), []
    for name, path in (("MODEL", qwen_folder),
                       ("CHECKPOINT", save_tiny_checkpoint(tmp_path / "best_model.pt", separator)),
                       ("AUDIO", write_wav(tmp_path / "a.wav", sine(0.8, 200, 8000), 8000))):
        monkeypatch.setenv(f"SPEAKER_SEPARATOR_{name}", str(path))
    monkeypatch.setattr(socket, "create_connection", lambda *args, **more: socket.socket())
    monkeypatch.setattr(sys, "path", [str(NOTEBOOK.parent), *sys.path])
    monkeypatch.setattr("IPython.display.display", shown.append)
    names = {}
    for cell in read_notebook().cells:
        if cell.cell_type == "code":
            exec(cell.source, names)
    printed = capsys.readouterr().out
    assert " instead" not in printed
    assert [type(item).__name__ for item in shown] == ["Audio"] * found
    assert printed.count("Speaker ") == printed.count("speaker ") == found
    assert printed.count("no talker found") == (0 if found else 2)
    assert ("Speakers [1, 2]: " in printed) is (found == 2)
