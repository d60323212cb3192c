"""What ``pip install .`` needs, as far as it can be checked without building or a network."""

import tomllib
from importlib import import_module

import pytest
from conftest import ROOT

CONFIG = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_every_module_is_installed_and_none_is_missing():
    listed = CONFIG["tool"]["setuptools"]["py-modules"]
    page = "examples.demo_page"
    assert (ROOT / "examples/demo_page.py").is_file()
    assert sorted(listed) == sorted([*(path.stem for path in ROOT.glob("*.py")), page])


@pytest.mark.parametrize("name", CONFIG["project"]["scripts"])
def test_console_script_resolves(name, capsys):
    module, function = CONFIG["project"]["scripts"][name].split(":")
    with pytest.raises(SystemExit) as stop:
        getattr(import_module(module), function)(["--help"])
    assert stop.value.code == 0
    assert "usage:" in capsys.readouterr().out


def test_requirements_can_be_read_as_dependencies():
    files = CONFIG["tool"]["setuptools"]["dynamic"]["dependencies"]["file"]
    lines = [line for name in files for line in (ROOT / name).read_text().splitlines()]
    packages = [line for line in lines if line and not line.startswith("#")]
    assert packages
    assert not [line for line in packages if line.startswith("-")]  # setuptools takes no options
