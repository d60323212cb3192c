"""Feed generated bad input to the commands and count what is not answered in one clear line.

    python benchmarks/fuzz.py --inputs 5000 --seed 1

An input is a valid checkpoint, dataset, array, recording, model folder, exported separator, list
of recordings or command line, damaged once or several times within its structure: bytes, entries
of JSON, tensors, fields of headers, values of options. A worker process runs the commands on it,
one after the other. Failures are tracebacks, crashes, hangs, messages of more than one line, files
changed outside the output folder, and memory over 1 GB above that of an idle worker. Any
input can be run again alone: ``--seed S --only NUMBER``.
"""

import argparse
import contextlib
import copy
import io
import json
import multiprocessing
import os
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from unittest import mock

from tqdm import tqdm

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # as the commands do
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
SECONDS, MEGABYTES = 60, 1024  # limits of an input: CPU time, memory above an idle worker
NESTED = "nested"  # becomes lists in lists, which no JSON writer can write
ODD = [None, True, -1, 0, 0.5, 3, 2**31, 2**63, 10**30, 1e30, 1e308, float("inf"), float("nan"), "",
       "x", "a\nb", "\0", "../../../etc/passwd", "/etc/passwd", "é" * 300, [], {}, [1, [2]],
       {"a": None}, "9" * 30, NESTED, "ENORMOUS"]


# --------------------------------------------------------------------------------------------------
# Damage


def damage_bytes(rng, data: bytes) -> bytes:
    """Flip, cut, zero, double or insert."""
    data, kind = bytearray(data), rng.integers(5)
    at = int(rng.integers(len(data) + 1))
    length = int(2 ** rng.uniform(0, 12))
    if kind == 0:
        for place in rng.integers(len(data), size=rng.integers(1, 9)) if data else ():
            data[place] ^= 1 << int(rng.integers(8))
    elif kind == 1:
        del data[at:]
    elif kind == 2:
        data[at : at + length] = bytes(len(data[at : at + length]))
    elif kind == 3:
        data[at:at] = data[at : at + length]
    else:
        data[at:at] = rng.bytes(length)
    return bytes(data)


def places(content, path=()):
    """Yield the paths to all entries of nested dicts and lists."""
    keys = content if isinstance(content, dict) else range(
        min(len(content), 40)) if isinstance(content, list) else ()
    for key in list(keys):
        yield (*path, key)
        yield from places(content[key], (*path, key))


def odd_plain(rng, _=None):
    """Return a copy of a value of ``ODD``, which later damage may change in place."""
    return copy.deepcopy(ODD[int(rng.integers(len(ODD)))])


def damage_entries(rng, content, odd=odd_plain):
    """Replace, drop, rename or move an entry of plain values, in place."""
    found = list(places(content))
    path = found[int(rng.integers(len(found)))]
    owner = content
    for key in path[:-1]:
        owner = owner[key]
    kind = rng.integers(6)
    if kind == 0:
        del owner[path[-1]]
    elif kind == 1 and isinstance(owner, dict):
        owner[f"{path[-1]}_"] = owner.pop(path[-1])
    elif kind == 2:
        owner[path[-1]] = json.loads(json.dumps(str(owner[path[-1]])[:100]))
    else:
        owner[path[-1]] = odd(rng, owner[path[-1]])
    return content


def write_odd_json(path: Path, content) -> None:
    """Write JSON that no JSON library writes: deep nesting, very long integers."""
    text = json.dumps(content)
    text = text.replace(f'"{NESTED}"', "[" * 50_000 + "]" * 50_000)
    path.write_text(text.replace('"ENORMOUS"', "9" * 5000))


def damage_json(rng, path: Path) -> None:
    """Damage a file of JSON by entry, or by bytes."""
    if rng.random() < 0.15:
        path.write_bytes(damage_bytes(rng, path.read_bytes()))
        return
    content = json.loads(path.read_text())
    for _ in range(rng.integers(1, 4)):
        if len(list(places(content))):
            damage_entries(rng, content)
    write_odd_json(path, content)


def odd_value(rng, old):
    """Return another value; for a tensor one of another shape, type or layout, or with NaN."""
    import torch

    if not isinstance(old, torch.Tensor) or rng.random() < 0.15:
        return [value for value in ODD if value not in (NESTED, "ENORMOUS")][rng.integers(25)]
    flat = old.float().flatten()
    changes = [
        lambda: flat.long(), lambda: old[:0] if old.dim() else old[None], lambda: flat,
        lambda: old * torch.nan, lambda: old * 1e38 * 1e38, lambda: old - 1e30, old.double,
        old.bfloat16, old.bool, lambda: torch.zeros(1).expand(1 << 20, 1 << 12), old.to_sparse,
        lambda: torch.zeros(0), lambda: -old - 1, lambda: torch.ones(500, 500),
        lambda: flat.repeat(2), lambda: old.to(torch.complex64),
        lambda: old.t() if old.dim() == 2 else old]
    return changes[int(rng.integers(len(changes)))]()


def damage_checkpoint(rng, path: Path) -> None:
    """Damage a checkpoint by entry or by bytes, or put another kind of file there."""
    import torch

    kind = rng.random()
    if kind < 0.25:
        path.write_bytes(damage_bytes(rng, path.read_bytes()))
    elif kind < 0.3:
        path.write_bytes(damage_bytes(rng, path.read_bytes()[: int(rng.integers(100))]))
    else:
        content = torch.load(path)
        for _ in range(rng.integers(1, 3)):
            part = content
            if rng.random() < 0.6:  # half of all entries are moments
                names = [n for n in ("model_config", "optimizer_state_dict", "train_history",
                                     "options", "model_state_dict", "progress") if content.get(n)]
                part = content[names[int(rng.integers(len(names)))]] if names else content
            if isinstance(part, (dict, list)) and list(places(part)):
                damage_entries(rng, part, odd_value)
        torch.save(content, path, _use_new_zipfile_serialization=rng.random() < 0.95)


def damage_array(rng, path: Path) -> None:
    """Damage the header or the values of a .npy file."""
    import numpy as np

    data = path.read_bytes()
    if rng.random() < 0.3:
        path.write_bytes(damage_bytes(rng, data))
    elif rng.random() < 0.5:
        array = np.load(path)
        array.flat[int(rng.integers(array.size))] = rng.choice([np.nan, np.inf, 3e38, -1e30, 1e-45])
        kinds = (np.float16, np.float64, np.int64, np.complex64, "U3", object, bool, ">f4", "f4")
        with np.errstate(all="ignore"):
            array = array.astype(kinds[int(rng.integers(len(kinds)))])
        shapes = (array, array[0], array[:0], array.T, array[:, :0], array[:1], array[None])
        np.save(path, shapes[int(rng.integers(7))])
    else:
        descr = ["<f4", "<f8", "|O", "<i4", "V9", "x", "<f99999", "[('a', '<f4')]"][rng.integers(8)]
        shape = ["(20, 32)", "(99999999999, 32)", "(20, 99999999999999999999)", "(-1, 32)", "()",
                 "(20, 0)", "(" * 300, "(2**70,)", "(1e3, 32)", "(10000000, 32)"][rng.integers(10)]
        order = ["False", "True", "5"][rng.integers(3)]
        header = f"{{'descr': '{descr}', 'fortran_order': {order}, 'shape': {shape}, }}\n".encode()
        version = bytes([int(rng.integers(1, 5)), 0])
        length = len(header) + 7 * int(rng.integers(2))
        size = struct.pack("<H" if version[0] == 1 else "<I", length)
        path.write_bytes(b"\x93NUMPY" + version + size + header + data[128:])


def damage_audio(rng, path: Path) -> Path:
    """Damage a recording: bytes, header fields, length, rate, level, channels, kind of file."""
    import numpy as np
    import soundfile

    samples, _ = soundfile.read(path, dtype="float32")
    kind = rng.integers(6)
    if kind == 0:
        rate = int(rng.choice([1, 7, 999, 1001, 8000, 11025, 44100, 192_000, 767_999, 2**31 - 1]))
        length = int(rng.choice([0, 1, 100, 639, 640, 641, 700, 959, 960, 961, 1600, 5000]))
        soundfile.write(path, samples[:length], min(rate, 2**31 - 1))
    elif kind == 1:
        level = rng.choice([0, 1e-30, 1e-6, 1, 100, 1e9, 1e20, 1e30, 3e38, np.inf, np.nan])
        with np.errstate(all="ignore"):
            loud = samples * np.float32(level) + np.float32(rng.choice([0, 0, 1]))
        soundfile.write(path, loud, 16000, "FLOAT")
    elif kind == 2:
        channels = int(rng.choice([2, 3, 8, 255, 1000]))
        soundfile.write(path, np.repeat(samples[:2000, None], channels, 1), 16000)
    elif kind == 3:  # a field of the header of a wav
        data = bytearray(path.read_bytes())
        at = int(rng.choice([4, 16, 20, 22, 24, 28, 32, 34, 40]))
        value = int(rng.choice([0, 1, 7, 2**16, 2**31 - 1, 2**32 - 1]))
        data[at : at + 4] = struct.pack("<I", value)
        path.write_bytes(data)
    else:
        other = ("FLAC", "OGG", "MP3", "WAV", "AIFF")[rng.integers(5)]
        path = path.with_suffix(f".{other.lower()}")
        soundfile.write(path, samples, 16000, format=other)
        path.write_bytes(damage_bytes(rng, path.read_bytes()))
    return path


# --------------------------------------------------------------------------------------------------
# Inputs: each makes damaged files in a folder and returns commands to run there


def checkpoint(rng, folder: Path) -> list[list[str]]:
    """Damage checkpoints to resume from, evaluate and infer with."""
    kind = "recordings" if rng.random() < 0.3 else "features"
    names = ("checkpoint_epoch_1.pt", "interrupted.pt", "best_model.pt")
    path = folder / f"run_{kind}" / names[int(rng.integers(3))]
    damage_checkpoint(rng, path)
    for other in path.parent.glob("*.pt"):
        if other != path:
            other.unlink()
    data = f"--data_dir={kind}"
    if rng.random() < 0.5 or path.name == "interrupted.pt":
        return [["train", data, f"--checkpoint_dir={path.parent.name}", "--resume", "--epochs=2"]]
    mixture = "--input=mixture.wav" if kind == "recordings" else "--input=mixture.npy"
    weights = f"--checkpoint={path.relative_to(folder)}"
    return [["evaluate", data, weights], ["infer", mixture, weights, "--output_dir=out"]]


def metadata(rng, folder: Path) -> list[list[str]]:
    """Damage a dataset's lists of mixtures and utterances, or its dataset.json."""
    kind = "recordings" if rng.random() < 0.4 else "features"
    files = [*folder.glob(f"{kind}/*/*.json"), *folder.glob(f"{kind}/*.json")]
    damage_json(rng, files[int(rng.integers(len(files)))])
    if rng.random() < 0.5:
        return [["evaluate", f"--data_dir={kind}", f"--checkpoint=run_{kind}/best_model.pt"]]
    return [["train", f"--data_dir={kind}", "--checkpoint_dir=out", "--epochs=1", *TINY[kind]]]


def array(rng, folder: Path) -> list[list[str]]:
    """Damage features to separate, train on and evaluate."""
    if rng.random() < 0.7:
        damage_array(rng, folder / "mixture.npy")
        return [["infer", "--input=mixture.npy", "--checkpoint=run_features/best_model.pt",
                 "--output_dir=out"]]
    files = sorted(folder.glob("features/*/*/*.npy"))
    damage_array(rng, files[int(rng.integers(len(files)))])
    return [["train", "--data_dir=features", "--checkpoint_dir=out", "--epochs=1",
             *TINY["features"]]]


def audio(rng, folder: Path) -> list[list[str]]:
    """Damage recordings to separate, ask a model about, train on and mix."""
    kind = rng.random()
    if kind < 0.75:
        path = damage_audio(rng, folder / "mixture.wav").name
        weights = "--checkpoint=run_recordings/best_model.pt"
        if kind < 0.5:
            return [["infer", f"--input={path}", weights, "--output_dir=out"]]
        return [["integrate", "--model=whisper", f"--audio={path}", weights, "--max_new_tokens=3"]]
    files = sorted(folder.glob("speech/*/*.wav"))
    damage_audio(rng, files[int(rng.integers(len(files)))])
    return [GENERATE]


def model(rng, folder: Path) -> list[list[str]]:
    """Damage the folder of a Whisper."""
    files = [p for p in folder.glob("whisper/*") if p.suffix in (".json", ".safetensors")]
    path = files[int(rng.integers(len(files)))]
    if path.suffix == ".json":
        damage_json(rng, path)
    else:
        path.write_bytes(damage_bytes(rng, path.read_bytes()))
    return [["integrate", "--model=whisper", "--audio=mixture.wav", "--max_new_tokens=3",
             "--checkpoint=run_recordings/best_model.pt"]]


def exported(rng, folder: Path) -> list[list[str]]:
    """Damage what train --export wrote."""
    from safetensors.torch import load_file, save_file

    if rng.random() < 0.5:
        damage_json(rng, folder / "exported/config.json")
    elif rng.random() < 0.3:
        path = folder / "exported/model.safetensors"
        path.write_bytes(damage_bytes(rng, path.read_bytes()))
    else:
        path = folder / "exported/model.safetensors"
        state = load_file(path)
        damage_entries(rng, state, odd_value)
        state = {k: v.to_dense().contiguous().clone() if v.is_sparse else v.contiguous().clone()
                 for k, v in state.items() if hasattr(v, "numel") and v.numel() < 1e6}
        save_file(state, path)
    return [["infer", "--input=mixture.npy", "--checkpoint=exported", "--output_dir=out"]]


def manifest(rng, folder: Path) -> list[list[str]]:
    """Damage lists of recordings to mix."""
    path = folder / "speech/manifest.jsonl"
    rows = [{"audio": str(p.relative_to(path.parent)), "speaker": p.parent.name, "text": p.stem}
            for p in sorted(folder.glob("speech/*/*.wav"))]
    write_odd_json(path, damage_entries(rng, rows))
    path.write_text(path.read_text()[1:-1].replace("}, {", "}\n{"))
    if rng.random() < 0.3:
        path.write_bytes(damage_bytes(rng, path.read_bytes()))
    return [GENERATE]


def command_line(rng, folder: Path) -> list[list[str]]:
    """Choose odd values of options of every command."""
    import speaker_separator_module as ssm

    odd = ["", "--", "-", "-1", "0", "1e999", "nan", "inf", "9" * 25, "9" * 5000, "a\nb", "\udcff",
           "2147483648", "0x10", "\u0661", "../..", "/", ".", "mixture.npy", "/dev/null",
           "x" * 5000, "1e-9", "0.5", "7", "None", "*", "~", "%s", "mixture.wav", "features",
           "/proc/self/mem", "exported"]
    commands = {
        "train": ["train", "--data_dir=features", "--checkpoint_dir=out", "--epochs=1",
                  *TINY["features"]],
        "evaluate": ["evaluate", "--data_dir=features", "--checkpoint=run_features/best_model.pt"],
        "infer": ["infer", "--input=mixture.npy", "--checkpoint=run_features/best_model.pt",
                  "--output_dir=out"],
        "integrate": ["integrate", "--model=whisper", "--audio=mixture.wav", "--max_new_tokens=3",
                      "--checkpoint=run_recordings/best_model.pt"],
        "generate": [*GENERATE[:2], "--output_dir=out", "--feature_dim=32", "--train_samples=2",
                     "--val_samples=2"]}
    name = list(commands)[int(rng.integers(len(commands)))]
    if name == "generate":
        import generate_multi_speaker_dataset as generator

        options = [a.option_strings[0] for a in generator.build_parser()._actions]
    else:
        parser = ssm.build_parser()._subparsers._group_actions[0].choices[name]
        options = [action.option_strings[0] for action in parser._actions]
    argv = commands[name]
    # Leave out options whose valid values ask for long work or for files anywhere.
    options = [o for o in options if o not in ("--help", "-h", "--output_dir", "--checkpoint_dir",
                                               "--json", "--jsonl", "--picture", "--export",
                                               "--workers",
                                               "--epochs", "--max_new_tokens", "--train_samples")]
    for _ in range(rng.integers(1, 3)):
        option, value = options[int(rng.integers(len(options)))], odd[int(rng.integers(len(odd)))]
        argv = argv + ([f"{option}={value}"] if rng.random() < 0.7 else [option, value])
    return [argv]


INPUTS = (checkpoint, metadata, array, command_line, audio, model, exported, manifest)
TINY = {"features": ["--num_layers=1", "--num_heads=4", "--ff_dim=32", "--batch_size=2",
                     "--mixtures_per_epoch=4"],
        "recordings": ["--num_layers=2", "--num_heads=2", "--ff_dim=32", "--dim=16",
                       "--batch_size=2", "--mixtures_per_epoch=4"]}
GENERATE = ["generate", "--speech_dir=speech", "--output_dir=out", "--train_samples=2",
            "--val_samples=2", "--max_speakers=2", "--split_by=utterance"]


def make_base(folder: Path) -> None:
    """Make one valid file of every kind."""
    import numpy as np
    import soundfile
    import torch
    from conftest import shake, sine, tiny_extractor
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    import generate_multi_speaker_dataset as generator
    import speaker_separator_module as ssm

    for speaker in range(3):
        for take in range(3):
            path = folder / f"speech/s{speaker}/{take}.wav"
            path.parent.mkdir(parents=True, exist_ok=True)
            soundfile.write(path, sine(0.3 + 0.1 * take, 150 + 40 * speaker + 3 * take), 16000)
    soundfile.write(folder / "mixture.wav", sine(0.8, 170) + sine(0.8, 320), 16000)
    generator.main(["--train_samples=4", "--val_samples=2", "--feature_dim=32", "--seq_len=20",
                    f"--output_dir={folder / 'features'}"])
    generator.main([*GENERATE[1:], f"--speech_dir={folder / 'speech'}",
                    f"--output_dir={folder / 'recordings'}"])
    for kind, sizes in TINY.items():
        run = folder / f"run_{kind}"
        ssm.main(["train", f"--data_dir={folder / kind}", f"--checkpoint_dir={run}", "--epochs=1",
                  *sizes, f"--export={folder / 'exported'}"][: None if kind == "features" else -1])
        content = torch.load(run / "best_model.pt")
        content["progress"] = {"rows": torch.ones(1, 6), "step_size": 2}
        torch.save(content, run / "interrupted.pt")
    shutil.copy(next((folder / "features/val/mixed").glob("*.npy")), folder / "mixture.npy")
    config = WhisperConfig(
        d_model=32, encoder_layers=2, encoder_attention_heads=4, encoder_ffn_dim=64,
        decoder_layers=1, decoder_attention_heads=4, decoder_ffn_dim=64, num_mel_bins=16,
        max_source_positions=50, max_target_positions=16, vocab_size=50, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, decoder_start_token_id=1, suppress_tokens=None,
        begin_suppress_tokens=None)
    shake(WhisperForConditionalGeneration(config), seed=2).save_pretrained(folder / "whisper")
    save_whisper_processor(folder / "whisper", tiny_extractor())
    assert np.load(folder / "mixture.npy").shape == (20, 32)


def save_whisper_processor(folder: Path, extractor) -> None:
    """Save a processor with a tokenizer of numbered words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: i for i, word in enumerate(["<|endoftext|>", "<s>", "</s>",
                                               *(f"w{i}" for i in range(47))])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<|endoftext|>",
                            eos_token="</s>", unk_token="w0").save_pretrained(folder)
    extractor.save_pretrained(folder)


# --------------------------------------------------------------------------------------------------
# Running


def snapshot(folder: Path) -> dict:
    """Return what could change: sizes and times of the files outside the output folder."""
    return {str(p.relative_to(folder)): (p.stat().st_size, p.stat().st_mtime_ns)
            for p in folder.rglob("*") if p.is_file() and "out" not in p.relative_to(folder).parts}


@contextlib.contextmanager
def captured(errors: io.StringIO):
    """Collect what Python and libraries in C print on standard error."""
    kept = os.dup(2)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            with contextlib.redirect_stderr(errors):
                yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            file.seek(0)
            errors.write(file.read().decode(errors="replace"))


def run_command(argv: list[str]) -> str:
    """Run one command here; return what is wrong with its answer, or ""."""
    import generate_multi_speaker_dataset as generator
    import speaker_separator_module as ssm

    errors = io.StringIO()
    try:
        with captured(errors), contextlib.redirect_stdout(io.StringIO()):
            if argv[0] == "generate":
                status = generator.main(argv[1:])
            else:
                status = ssm.main([*argv, "--device=cpu"])
    except SystemExit as stop:
        status = stop.code
    except BaseException as error:
        frames = traceback.extract_tb(error.__traceback__)
        own = [frame for frame in frames if str(ROOT) in frame.filename][-1]
        places = [f"{Path(frame.filename).name}:{frame.lineno}" for frame in (own, frames[-1])]
        return f"traceback: {type(error).__name__} {str(error)[:80]!r} at {', '.join(places)}"
    lines = errors.getvalue().strip().splitlines()
    if status not in (0, 2) or status == 2 and not lines:  # a warning may go with a result
        return f"status {status} with {len(lines)} lines: {lines[:1]}"
    return f"{len(lines)} lines: {lines[:3]}" if len(lines) > 1 else ""


def touch(path, *_) -> None:
    """Stand in for a function that draws a picture."""
    Path(path).touch()


def run_input(base: Path, seed: int, number: int) -> tuple[str, str, list]:
    """Make input ``number`` and run its commands; return kind, fault or "", and commands."""
    import numpy as np

    import scoring

    rng = np.random.default_rng([seed, number])
    make, fault = INPUTS[number % len(INPUTS)], ""
    drawing = contextlib.nullcontext()
    if number // len(INPUTS) % 8:  # it takes half of the time: one input in eight draws
        drawing = mock.patch.multiple(scoring, plot_history=touch, plot_streams=touch)
    with tempfile.TemporaryDirectory() as scratch, drawing:
        folder = Path(shutil.copytree(base, Path(scratch) / "here"))
        os.chdir(folder)
        commands = make(rng, folder)
        for argv in commands:
            before = snapshot(Path(scratch))
            fault = fault or run_command(argv)
            changed = before.items() ^ snapshot(Path(scratch)).items()
            changed = {n for n, _ in changed if not ("--resume" in argv and "/run_" in n)}
            if changed and not fault:
                fault = f"changed outside the output folder: {sorted(changed)[:3]}"
        os.chdir("/")
    return make.__name__, fault, commands


def work(base: Path, seed: int, pipe) -> None:
    """Run inputs until the parent ends this process; exit after one that took too much memory."""
    import transformers  # noqa: F401  # its log goes where standard error is at its import

    run_input(base, 0, 0)
    idle = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    pipe.send(None)
    while True:
        number = pipe.recv()
        signal.setitimer(signal.ITIMER_PROF, SECONDS)  # its signal ends this process
        kind, fault, commands = run_input(base, seed, number)
        signal.setitimer(signal.ITIMER_PROF, 0)
        more = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - idle) / 1024
        pipe.send((kind, fault or (f"{more:.0f} MB more than an idle worker" * (more > MEGABYTES)),
                   commands, more))
        if more > MEGABYTES:
            return


class Worker:
    """A process that runs inputs, started anew after a crash, a hang or too much memory."""

    def __init__(self, base: Path, seed: int):
        self.context, self.arguments, self.process = (
            multiprocessing.get_context("spawn"), (base, seed), None)

    def start(self) -> None:
        """Start a process and wait until it has done an input."""
        self.pipe, theirs = self.context.Pipe()
        self.process = self.context.Process(
            target=work, args=(*self.arguments, theirs), daemon=True)
        self.process.start()
        theirs.close()
        self.pipe.recv()

    def run(self, number: int) -> tuple:
        """Return kind, fault, commands and memory of an input."""
        if self.process is None or not self.process.is_alive():
            self.start()
        kind = INPUTS[number % len(INPUTS)].__name__
        self.pipe.send(number)
        try:
            if self.pipe.poll(10 * SECONDS):
                return self.pipe.recv()
            fault = "hang: waits for nothing"
        except EOFError:
            self.process.join()
            fault = f"crash: exit code {self.process.exitcode}"
            if self.process.exitcode == -signal.SIGPROF:
                fault = f"hang: more than {SECONDS} s of processor time"
        self.process.kill()
        self.process.join()
        return kind, fault, [], 0


def main(argv: list[str] | None = None) -> int:
    """Run the inputs; return the number of failures, 100 at most."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--inputs", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", type=int, help="run this input again, here")
    parser.add_argument("--kind", choices=[make.__name__ for make in INPUTS], help="only of a kind")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as scratch:
        base = Path(scratch) / "base"
        base.mkdir()
        with contextlib.redirect_stdout(io.StringIO()):
            make_base(base)
        if args.only is not None:
            print(*run_input(base, args.seed, args.only), sep="\n")
            return 0
        worker, counts, failures, most = Worker(base, args.seed), Counter(), Counter(), 0.0
        started = time.perf_counter()
        numbers = [number for number in range(args.inputs)
                   if args.kind in (None, INPUTS[number % len(INPUTS)].__name__)]
        with contextlib.suppress(KeyboardInterrupt):  # Ctrl-C ends it with the summary
            for number in tqdm(numbers, "inputs", disable=None):
                kind, fault, commands, more = worker.run(number)
                counts[kind] += 1
                most = max(most, more)
                if fault:
                    failures[fault.split()[0].strip(":")] += 1
                    print(f"{kind} {number}: {fault}\n    {str(commands)[:300]}", flush=True)
        if worker.process is not None:
            worker.process.kill()
    kinds = f" {dict(failures)}" if failures else ""
    print(f"{counts.total()} inputs ({', '.join(f'{k} {n}' for k, n in counts.items())}), seed "
          f"{args.seed}: {failures.total()} failures{kinds}, at most {most:.0f} MB "
          f"above an idle worker, {time.perf_counter() - started:.0f} s")
    return min(failures.total(), 100)


if __name__ == "__main__":
    sys.exit(main())
