"""The page: what stands on it, without a browser and in one, and how its command refuses."""

import shutil
import sys
from functools import partial
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import soundfile
from conftest import (
    CPU_FLAGS,
    RATE,
    ROOT,
    assert_fails,
    save_tiny_checkpoint,
    sine,
    tiny_separator,
    tiny_spectrogram_separator,
    write_wav,
)

import speaker_separator_module as ssm
from audio import load_model
from long_recordings import answer_per_talker

sys.path.insert(0, str(ROOT / "examples"))

import demo_page  # noqa: E402


@pytest.fixture
def recording(tmp_path):
    return write_wav(tmp_path / "recording.wav", sine(0.4, 300) + sine(0.4, 190))


@pytest.fixture
def separator():
    return tiny_spectrogram_separator()


@pytest.fixture
def separate(separator):
    return partial(ssm.infer_recording, separator=separator)


@pytest.fixture
def ask(qwen_folder, separator):
    model, processor = load_model(str(qwen_folder))
    ssm.integrate_speaker_separator(model, None, separator)
    return partial(answer_per_talker, model, processor, max_new_tokens=4)


def test_talkers_on_the_page(recording, separate, ask):
    warnings, picture, rows = demo_page.talkers_of(recording, separate, ask, 2)
    _, _, talkers = separate(recording, num_speakers=2)
    answers = ask(recording, num_speakers=2)
    assert [title for title, _, _ in rows] == ["speaker 1", "speaker 2"]
    assert [text for _, _, text in rows] == [answer["text"] for answer in answers]
    for (_, samples, _), (_, _, audio) in zip(rows, talkers, strict=True):
        assert samples.dtype == np.int16 and len(samples) == 0.4 * RATE
        np.testing.assert_allclose(samples / 32767, audio.numpy(), atol=1 / 32767)
    _, _, wider = demo_page.talkers_of(recording, separate, None, 3)
    assert [text for _, _, text in wider] == [None] * 3
    assert warnings == [] and picture.ndim == 3 and picture.std() > 10


def test_a_call_on_the_page(tmp_path, separate):
    call = np.zeros((2 * 8000, 2))
    call[:8000, 0], call[8000:, 1] = sine(1, 150, 8000), sine(1, 250, 8000)
    soundfile.write(tmp_path / "call.wav", call, 8000)
    warnings, _, _ = demo_page.talkers_of(tmp_path / "call.wav", separate, None, 1)
    assert ["a talker per channel" in text for text in warnings] == [True, False]
    assert ["nothing above 4 kHz" in text for text in warnings] == [False, True]


def test_a_fault_is_that_of_the_users_file(tmp_path):
    path = tmp_path / "gradios copy" / "phone.m4a"
    error = ValueError(f"cannot read audio from {path}: convert it: ffmpeg -i {path} other.wav")
    assert demo_page.explain(error, str(path)) == (
        "cannot read audio from phone.m4a: convert it: ffmpeg -i phone.m4a other.wav")


def test_nobody_on_the_page(recording, separate):
    nobody = partial(separate, threshold=1.0)
    warnings, picture, rows = demo_page.talkers_of(recording, nobody, None, None)
    assert warnings == rows == [] and picture.ndim == 3


@pytest.fixture
def gradio(monkeypatch):
    """Let the command find a gradio where there is none."""
    module = ModuleType("gradio")
    module.__spec__ = ModuleSpec("gradio", None)
    monkeypatch.setitem(sys.modules, "gradio", module)


def test_command_serves_on_this_machine_alone(
    gradio, separator, recording, qwen_folder, tmp_path, monkeypatch, capsys
):
    checkpoint = save_tiny_checkpoint(tmp_path / "a.pt", separator)
    launched, pages = {}, []

    def launch(**options):
        launched.update(options)
        return None, "http://127.0.0.1:7999/", None

    page = SimpleNamespace(launch=launch, block_thread=lambda: pages.append("waits"))
    monkeypatch.setattr(demo_page, "build_page", lambda *given: pages.append(given) or page)
    argv = ["demo", f"--checkpoint={checkpoint}", "--port=7999", "--num_speakers=2", *CPU_FLAGS]
    assert ssm.main(argv) == 0
    assert (launched["server_name"], launched["server_port"]) == ("127.0.0.1", 7999)
    assert pages[0][1:] == (None, 3, 2) and pages[1] == "waits"
    printed = capsys.readouterr().out
    assert f"separator {checkpoint}" in printed and "page http://127.0.0.1:7999/" in printed
    assert ssm.main([*argv, f"--model={qwen_folder}"]) == 0
    mixtures = [pages[number][0](recording)[1] for number in (0, 2)]
    assert [mixture.shape[1] for mixture in mixtures] == [80, 16]  # the bins that the model reads


def test_command_refuses(gradio, whisper_folder, tmp_path, monkeypatch, capsys):
    features = save_tiny_checkpoint(tmp_path / "a.pt", tiny_separator())
    argv = ["demo", f"--checkpoint={features}", *CPU_FLAGS]
    assert_fails(capsys, argv, "needs a spectrogram separator")
    assert_fails(capsys, ["demo", f"--model={whisper_folder}", "--prompt=Who?"], "takes no prompt")
    assert_fails(capsys, [*argv, "--dtype=bfloat16"], "--dtype", "add --model")
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert_fails(capsys, argv, "pip install gradio")


def open_browser():
    """A headless Chromium, or None where there is none."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="the browser needs selenium")
    driver = shutil.which("chromedriver")
    if driver is None:
        pytest.skip("no chromedriver")
    options = webdriver.ChromeOptions()
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage"):
        options.add_argument(flag)
    return webdriver.Chrome(options, webdriver.ChromeService(driver))


def test_page_in_a_browser(recording, separate, ask, monkeypatch):
    pytest.importorskip("gradio", reason="the page needs gradio")
    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
    browser, page = open_browser(), demo_page.build_page(separate, ask, 3, count=2)
    try:
        _, url, _ = page.launch(server_name="127.0.0.1", prevent_thread_lock=True, quiet=True)
        assert url.startswith("http://127.0.0.1:")
        browser.get(url)
        browser.implicitly_wait(60)  # seconds until an element is there
        browser.find_element("css selector", "input[type=file]").send_keys(str(recording))
        browser.find_element("xpath", "//*[contains(text(), 'speaker 2 says')]")
        areas = browser.find_elements("tag name", "textarea")
        texts = [answer["text"] for answer in ask(recording, num_speakers=2)]
        assert [area.get_attribute("value") for area in areas] == texts
        assert "speaker 3" not in browser.find_element("tag name", "body").text
        assert len(browser.find_elements("css selector", "img")) >= 1
    finally:
        browser.quit()
        page.close()
