"""The README's commands are ones that the parsers take, and CI runs its test command."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import generate_multi_speaker_dataset
import speaker_separator_module as ssm

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "examples"))

import overlapped_digits  # noqa: E402
import overlapped_speech  # noqa: E402
import two_talkers  # noqa: E402

PARSERS = {
    "examples/overlapped_digits.py": overlapped_digits.build_parser(),
    "examples/overlapped_speech.py": overlapped_speech.build_parser(),
    "examples/two_talkers.py": two_talkers.build_parser(),
    "speaker_separator_module.py": ssm.build_parser(),
    "generate_multi_speaker_dataset.py": generate_multi_speaker_dataset.build_parser(),
}


def readme_commands(name="README.md") -> list[list[str]]:
    """Every `python SCRIPT.py ...` of the README as words from the script on.

    It is behind `$`, `&&` or `torchrun ...` in a block, or in backticks in a sentence.
    """
    pieces = (ROOT / name).read_text(encoding="utf-8").split("```")
    blocks, prose = pieces[1::2], pieces[::2]
    parts = [part.strip().removeprefix("$ ") for block in blocks for line in block.splitlines()
             for part in line.split("&&")]
    parts += [" ".join(span.split()) for text in prose for span in re.findall("`([^`]+)`", text)]
    commands = [re.fullmatch(r"(?:python|torchrun)(?: --\S+)* (\S+\.py(?: .*)?)", part)
                for part in parts]
    return [shlex.split(command[1]) for command in commands if command and "..." not in command[0]]


@pytest.mark.parametrize("command", readme_commands(), ids=" ".join)
def test_command_is_understood(command):
    script, *arguments = command
    assert (ROOT / script).is_file()
    if script in PARSERS:
        PARSERS[script].parse_args(arguments)


def test_every_command_of_the_module_but_none_more_is_shown():
    shown = {command[1] for command in readme_commands() if "separator_module" in command[0]}
    assert shown == set(ssm.COMMANDS)


def test_git_ignores_what_the_commands_leave_behind():
    made = {"checkpoints/", "multi_speaker_data/", "separated/"}
    for command in readme_commands():
        for flag, value in re.findall(r"--(\S+?)[ =](\S+)", " ".join(command)):
            if flag in ("output_dir", "checkpoint_dir", "work_dir", "export"):
                made.add(f"{value}/")
            elif flag in ("json", "picture"):
                made.add(value)
    made -= {"pretrained/"}  # comes with the project
    done = subprocess.run(["git", "check-ignore", *sorted(made)], cwd=ROOT, capture_output=True,
                          text=True)  # fmt: skip
    if done.returncode == 128:
        pytest.skip("no git repository")
    assert set(done.stdout.split()) == made


def typed_lines(name: str) -> list[str]:
    """Every line of a file's code blocks that is typed in a shell, in order."""
    blocks = (ROOT / name).read_text(encoding="utf-8").split("```")[1::2]
    lines = [line.strip().removeprefix("$ ") for block in blocks for line in block.splitlines()]
    tools = ("python", "pip ", "torchrun ", "git ", "cd ", "speaker-separator ")
    return [line for line in lines if line.startswith(tools)]


def test_translation_shows_the_same_commands():
    if not (ROOT / "README.zh-TW.md").is_file():
        pytest.skip("no README.zh-TW.md")
    assert typed_lines("README.zh-TW.md") == typed_lines("README.md") != []


def test_files_named_in_the_tree_exist():
    tree = (ROOT / "README.md").read_text(encoding="utf-8").split("## Files")[1]
    names = [line.split()[0] for line in tree.splitlines() if line and line[0] not in "`#"]
    made_by_commands = {"multi_speaker_data/"}
    for name in set(names) - made_by_commands:
        assert list(ROOT.glob(name.rstrip("/"))), name


def test_ci_runs_the_test_command_of_the_readme():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    command = next(line for line in readme.splitlines() if "pytest" in line and "pip" in line)
    last_of_ci = (ROOT / ".ci/run").read_text(encoding="utf-8").strip().splitlines()[-1]
    assert command.endswith(last_of_ci)
    workflow = (ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8")
    for words in ("run: bash .ci/run", "ubuntu-latest, macos-latest", '"3.11", "3.13"'):
        assert words in workflow


def test_contributing_names_what_exists():
    """Files, functions and fixtures in backticks."""
    words = re.findall(r"(?<!`)`([^`\s]+)`(?!`)", (ROOT / "CONTRIBUTING.md").read_text("utf-8"))
    paths = [word for word in words if "/" in word or word.endswith(".py")]
    assert not [path for path in paths if not (ROOT / path).exists()]
    code = "".join(path.read_text("utf-8") for path in [*ROOT.glob("*.py"), *ROOT.glob("*/*.py")])
    names = [word for word in words if word.isidentifier()]
    assert len(names) > 20
    assert not [name for name in names if not re.search(rf"\b{name}\b", code)]
