"""Make multi_speaker_data/: mixtures of talkers as encoder features, with each talker alone.

    python generate_multi_speaker_dataset.py --train_samples=100 --val_samples=30
    python generate_multi_speaker_dataset.py --speech_dir LibriSpeech/dev-clean \
        --encoder openai/whisper-large-v3 --train_samples=1000

Simulated (the default; nothing is downloaded). A voice is a set of feature bands and a rate of
modulation, drawn once for all datasets, so that a separator trained on one knows the voices of the
next. An utterance is its voice's bands, swelling and fading in phrases with gaps between, each
feature modulated by a sine of its own phase; the mixture is the sum. No utterance occurs twice.

What makes it solvable: features are energies, so at each frame the bands tell which voices speak;
bands of two voices overlap only in part, and a mask takes them apart. An oracle that knows the
voices of a mixture and fits their bands to each frame by least squares is far below every trivial
output. What keeps those from it: sources have unit power (zeros score 1) and are equally loud (the
mixture scores the power of the others, more than 1), and the mixture divided by the count only
splits the difference. The test suite measures all four.

Speech (``--speech_dir``). Random utterances of different speakers are mixed as waveforms and
encoded by a frozen Whisper or Qwen2-Audio tower; targets are the encoded single talkers, aligned.
The plan of all mixtures is drawn first from the seed; rendering it draws nothing more.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

NUM_VOICES = 12
NUM_BANDS = 32
BANDS_PER_VOICE = 6
VOICE_SEED = 1280  # one inventory for all datasets; --seed draws utterances and mixtures
MODULATION = 0.6
SPEECH_RMS = 0.05  # level of a talker before level differences, full scale 1
AUDIO_SUFFIXES = {".wav", ".flac", ".ogg", ".mp3"}

# --------------------------------------------------------------------------------------------------
# Command line: stands before numpy and torch are imported, so that --help answers at once


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the example as written and shows every default that is a value."""

    def _get_help_string(self, action):
        shows = action.default not in (None, False, argparse.SUPPRESS)
        return action.help + (" (default: %(default)s)" if shows else "")


class _Parser(argparse.ArgumentParser):
    """Complains in one line."""

    def error(self, message):
        self.exit(2, f"error: {message} (see {self.prog} --help)\n")


def build_parser() -> argparse.ArgumentParser:
    """Return the parser; its defaults make the dataset of the README."""
    parser = _Parser(
        description="Make mixtures of talkers with each talker alone, as encoder features.",
        epilog="example:\n  python generate_multi_speaker_dataset.py --train_samples=100",
        formatter_class=_HelpFormatter)
    add = parser.add_argument
    add("--train_samples", type=int, default=30, help="training mixtures")
    add("--val_samples", type=int, default=10, help="validation mixtures")
    add("--max_speakers", type=int, default=3, help="most talkers in a mixture")
    add("--min_speakers", type=int, default=2, help="fewest talkers in a mixture")
    add("--seed", type=int, default=42, help="draws utterances and mixtures")
    add("--output_dir", default="multi_speaker_data", help="where train/ and val/ go")
    simulated = parser.add_argument_group("simulated talkers").add_argument
    simulated("--seq_len", type=int, default=100, help="frames per mixture")
    simulated("--feature_dim", type=int, default=1280, help="feature width")
    speech = parser.add_argument_group("recorded talkers").add_argument
    speech("--speech_dir", help="a folder per speaker, or a JSON-lines manifest; takes recordings")
    speech("--encoder", help="Whisper or Qwen2-Audio, a local folder or hub id")
    speech("--layer", type=int, help="encoder block whose features to take; none: its output")
    speech("--join", type=int, nargs=2, default=[1, 1], metavar=("MIN", "MAX"),
           help="recordings said in a row by each talker")
    speech("--max_gap", type=float, default=0.15, help="longest pause between them in seconds")
    speech("--max_onset", type=float, default=0.4, help="latest start of a talker in seconds")
    speech("--level_difference", type=float, default=3.0, help="most dB between two talkers")
    speech("--share_speakers", action="store_true", help="use every speaker in train and val")
    speech("--device", default="auto", help="where the encoder runs: auto, cpu, cuda or mps")
    return parser


if __name__ == "__main__":
    build_parser().parse_args()

import numpy as np  # noqa: E402

from speaker_separator_module import (  # noqa: E402
    AudioEncoder,
    InputError,
    check_layer,
    encode_waveforms,
    first_line,
    load_audio_encoder,
    pick_device,
    read_audio,
)

# --------------------------------------------------------------------------------------------------
# Simulated talkers


class Voice(NamedTuple):
    """A simulated voice: its spectral envelope [D] and modulation rate in cycles per frame."""

    speaker_id: str
    envelope: np.ndarray
    rate: float


def make_voices(feature_dim: int) -> list[Voice]:
    """Draw the inventory of voices; the same for every seed."""
    rng = np.random.default_rng(VOICE_SEED)
    band_of = np.arange(feature_dim) * NUM_BANDS // feature_dim
    voices = []
    for number in range(NUM_VOICES):
        bands = rng.choice(NUM_BANDS, BANDS_PER_VOICE, replace=False)
        envelope = np.isin(band_of, bands).astype(np.float64)
        voices.append(Voice(f"voice_{number:02d}", envelope, rng.uniform(0.02, 0.2)))
    return voices


def phrase_envelope(seq_len: int, rng: np.random.Generator) -> np.ndarray:
    """Draw phrases that swell and fade, with silence before and between them: [T] in [0, 1]."""
    loudness, start = np.zeros(seq_len), int(rng.integers(0, 15))
    while start < seq_len or not loudness.any():
        length = int(rng.integers(15, 40))
        frames = np.arange(start % seq_len, min(start % seq_len + length, seq_len))
        loudness[frames] = np.sqrt(np.sin(np.pi * (frames - frames[0] + 0.5) / length))
        start += length + int(rng.integers(0, 12))
    return loudness


def simulate_utterance(voice: Voice, seq_len: int, rng: np.random.Generator) -> np.ndarray:
    """Draw a fresh utterance of a voice: [T, D] float32 of unit power."""
    phases = rng.uniform(0, 2 * np.pi, size=len(voice.envelope))
    cycles = voice.rate * rng.uniform(0.9, 1.1) * np.arange(seq_len)[:, None]
    energy = voice.envelope * (1 + MODULATION * np.sin(2 * np.pi * cycles + phases))
    features = energy * phrase_envelope(seq_len, rng)[:, None]
    return (features / np.sqrt(np.mean(features**2))).astype(np.float32)


def simulate_mixture(args, split: str, index: int, voices: list[Voice]) -> list[dict]:
    """Draw mixture ``index`` of a split: speaker_id, text and features [T, D] of each talker."""
    rng = np.random.default_rng([args.seed, split == "val", index])
    count = int(rng.integers(args.min_speakers, args.max_speakers + 1))
    chosen = rng.choice(len(voices), size=count, replace=False)
    return [
        {"speaker_id": voices[v].speaker_id, "text": f"simulated utterance {split} {index}.{i}",
         "features": simulate_utterance(voices[v], args.seq_len, rng)}
        for i, v in enumerate(chosen)
    ]


# --------------------------------------------------------------------------------------------------
# Recorded talkers


class Utterance(NamedTuple):
    """A recording of one speaker; ``split`` is "train", "val" or "" (either)."""

    audio: Path
    speaker: str
    text: str
    split: str = ""


def read_speech(path: Path) -> list[Utterance]:
    """List the utterances of a folder per speaker, or of a JSON-lines manifest.

    A manifest's lines have ``audio`` (relative to the manifest), ``speaker``, ``text`` and, if the
    split is given, ``split``. In a folder, transcripts are read from ``NAME.txt`` beside a
    recording or from LibriSpeech's ``*.trans.txt``.
    """
    manifest = path / "manifest.jsonl" if path.is_dir() else path
    if manifest.is_file():
        utterances = _read_manifest(manifest)
    elif path.is_dir():
        utterances = _read_speaker_folders(path)
    else:
        raise FileNotFoundError(f"no speech at {path}")
    if not utterances:
        raise InputError(f"{path} holds no manifest.jsonl and no recordings in folders per speaker")
    return utterances


def _read_manifest(manifest: Path) -> list[Utterance]:
    utterances = []
    try:
        lines = manifest.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        raise InputError(f"{manifest} is no manifest of JSON lines, nor a folder") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            audio, speaker = manifest.parent / row["audio"], str(row["speaker"])
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise InputError(
                f"{manifest}, line {number}: needs audio and speaker ({error})"
            ) from None
        if not audio.is_file():
            raise FileNotFoundError(f"{manifest}, line {number}: no such audio file: {audio}")
        text, split = (str(row.get(key) or "") for key in ("text", "split"))
        utterances.append(Utterance(audio, speaker, text, split))
    return utterances


def _read_speaker_folders(path: Path) -> list[Utterance]:
    utterances, transcripts = [], {}
    for listing in sorted(path.rglob("*.trans.txt")):
        for line in listing.read_text(encoding="utf-8").splitlines():
            name, _, text = line.partition(" ")
            transcripts[listing.parent / name] = text
    for audio in sorted(p for p in path.rglob("*") if p.suffix.lower() in AUDIO_SUFFIXES):
        speaker, beside = audio.relative_to(path).parts[0], audio.with_suffix(".txt")
        if audio.parent == path:
            continue  # not in a speaker's folder
        text = transcripts.get(audio.with_suffix(""), "")
        if not text and beside.is_file():
            text = beside.read_text(encoding="utf-8").strip()
        utterances.append(Utterance(audio, speaker, text))
    return utterances


def split_speech(utterances: list[Utterance], share_speakers: bool, seed: int) -> dict[str, list]:
    """Divide utterances into train and val: as the manifest says, else by speaker (a fifth)."""
    if any(u.split for u in utterances):
        return {s: [u for u in utterances if u.split in (s, "")] for s in ("train", "val")}
    if share_speakers:
        return {"train": utterances, "val": utterances}
    speakers = sorted({u.speaker for u in utterances})
    np.random.default_rng(seed).shuffle(speakers)
    held_out = set(speakers[: max(1, len(speakers) // 5)])
    return {
        "train": [u for u in utterances if u.speaker not in held_out],
        "val": [u for u in utterances if u.speaker in held_out],
    }


class PlannedTalker(NamedTuple):
    """What one talker says in a mixture: utterances in a row, gaps before each, and a gain."""

    utterances: list[Utterance]
    gaps: list[float]  # seconds before each utterance; the first is the onset
    gain_db: float


def plan_speech(args, split: str, utterances: list[Utterance], samples: int) -> list[list]:
    """Draw all mixtures of a split: for each, its talkers and what they say."""
    by_speaker: dict[str, list[Utterance]] = {}
    for utterance in utterances:
        by_speaker.setdefault(utterance.speaker, []).append(utterance)
    if samples and len(by_speaker) < args.max_speakers:
        raise InputError(
            f"the {split} split has {len(by_speaker)} speakers and mixtures of {args.max_speakers} "
            "were asked for: lower --max_speakers, or use --share_speakers"
        )
    rng = np.random.default_rng([args.seed, split == "val"])
    plan = []
    for _ in range(samples):
        count = int(rng.integers(args.min_speakers, args.max_speakers + 1))
        talkers = []
        for speaker in rng.choice(sorted(by_speaker), size=count, replace=False):
            pool = by_speaker[str(speaker)]
            words = int(rng.integers(args.join[0], args.join[1] + 1))
            picks = [pool[int(i)] for i in rng.integers(len(pool), size=words)]
            gaps = rng.uniform(0, [args.max_onset, *[args.max_gap] * (words - 1)]).tolist()
            half = args.level_difference / 2
            talkers.append(PlannedTalker(picks, gaps, float(rng.uniform(-half, half))))
        plan.append(talkers)
    return plan


def render_talker(talker: PlannedTalker, sampling_rate: int) -> np.ndarray:
    """Build the waveform of one planned talker, at SPEECH_RMS while speaking plus the gain."""
    pieces, speech = [], []
    for utterance, gap in zip(talker.utterances, talker.gaps, strict=True):
        pieces.append(np.zeros(round(gap * sampling_rate), np.float32))
        speech.append(read_audio(utterance.audio, sampling_rate))
        pieces.append(speech[-1])
    rms = float(np.sqrt(np.mean(np.concatenate(speech) ** 2)))
    gain = SPEECH_RMS / max(rms, 1e-5) * 10 ** (talker.gain_db / 20)
    return gain * np.concatenate(pieces)


def mix_talkers(waveforms: list[np.ndarray], max_samples: int) -> tuple[np.ndarray, np.ndarray]:
    """Pad talkers to the longest and sum them: sources [n, samples] and mixture [samples].

    Nothing is cut but what the encoder's window could not hold (the transcript keeps its words).
    """
    length = min(max(len(waveform) for waveform in waveforms), max_samples)
    sources = np.zeros((len(waveforms), length), np.float32)
    for source, waveform in zip(sources, waveforms, strict=True):
        kept = waveform[:length]
        source[: len(kept)] = kept
    peak = max(np.abs(sources).max(), np.abs(sources.sum(axis=0)).max())
    sources /= max(1.0, peak)  # a .wav holds no more than full scale
    return sources, sources.sum(axis=0)


def render_speech_mixture(
    talkers: list[PlannedTalker], encoder: AudioEncoder, layer, folder: Path, name: str
):
    """Render, encode and save the audio of one mixture; returns its talkers and its features."""
    import soundfile

    rate = encoder.sampling_rate
    waveforms = [render_talker(talker, rate) for talker in talkers]
    sources, mixture = mix_talkers(waveforms, encoder.max_samples)
    mixed, *features = encode_waveforms(encoder, [mixture, *sources], layer)
    soundfile.write(folder / f"mixed/{name}.wav", mixture, rate, subtype="PCM_24")
    speakers = []
    for i, (talker, source, feature) in enumerate(zip(talkers, sources, features, strict=True)):
        wav = f"separated/{name}_speaker_{i}.wav"
        soundfile.write(folder / wav, source, rate, subtype="PCM_24")
        text = " ".join(u.text for u in talker.utterances if u.text)
        speakers.append({"speaker_id": talker.utterances[0].speaker, "text": text,
                         "features": feature.cpu().numpy(), "wav_file": wav})
    return speakers, mixed.cpu().numpy()


# --------------------------------------------------------------------------------------------------
# Writing


def write_mixture(folder: Path, name: str, speakers: list[dict], mixed, **extra) -> dict:
    """Save the features of a mixture and its talkers; returns its entry for metadata.json."""
    np.save(folder / f"mixed/{name}.npy", mixed)
    entries = []
    for i, speaker in enumerate(speakers):
        entry = {k: v for k, v in speaker.items() if k != "features"}
        entry["feature_file"] = f"separated/{name}_speaker_{i}.npy"
        np.save(folder / entry["feature_file"], speaker["features"])
        entries.append(entry)
    turns = [{"speaker_id": entry["speaker_id"], "text": entry["text"]} for entry in entries]
    return {
        "id": name, "mixed_audio": f"mixed/{name}.npy", "num_speakers": len(entries),
        "speakers": entries, "conversation": turns, "seq_len": int(mixed.shape[0]),
        "feature_dim": int(mixed.shape[1]), **extra,
    }


def write_split(folder: Path, split: str, samples: int, render) -> list[dict]:
    """Render every mixture of a split into ``folder`` and write its metadata.json."""
    from tqdm import tqdm

    (folder / "mixed").mkdir(parents=True)
    (folder / "separated").mkdir()
    entries = []
    for index in tqdm(range(samples), desc=split, unit="mixture", leave=False, disable=None):
        entries.append(render(folder, f"{split}_{index:05d}", index))
    (folder / "metadata.json").write_text(json.dumps(entries, indent=1) + "\n", encoding="utf-8")
    return entries


def print_statistics(split: str, entries: list[dict]) -> None:
    """Print how many mixtures and talkers a split has and how the counts are distributed."""
    counts = [entry["num_speakers"] for entry in entries]
    if not counts:
        print(f"{split}: no mixtures")
        return
    talkers = len({s["speaker_id"] for entry in entries for s in entry["speakers"]})
    spread = ", ".join(f"{n} talkers: {c}" for n, c in sorted(Counter(counts).items()))
    print(f"{split}: {len(counts)} mixtures of {talkers} different talkers, "
          f"{np.mean(counts):.2f} talkers on average ({spread})")


def check_replaceable(output_dir: Path) -> None:
    """Fail if the dataset would take the place of something that is none."""
    for split in ("train", "val"):
        old = output_dir / split
        if old.exists() and not (old / "metadata.json").is_file():
            raise InputError(f"{old} exists and is no dataset; choose another --output_dir")


def replace_splits(output_dir: Path, staging: Path) -> None:
    """Put the finished dataset in place of an earlier one; other files in the folder stay."""
    if (output_dir / "train").exists():
        print(f"replacing the earlier dataset in {output_dir}")
    for split in ("train", "val"):
        shutil.rmtree(output_dir / split, ignore_errors=True)
        (staging / split).rename(output_dir / split)
    (staging / "dataset.json").replace(output_dir / "dataset.json")


def _renderers(args) -> tuple[dict, dict]:
    """How to render a mixture of each split, and what dataset.json says of the features."""
    if not args.speech_dir:
        voices = make_voices(args.feature_dim)

        def render_simulated(folder, name, index):
            speakers = simulate_mixture(args, name.split("_")[0], index, voices)
            return write_mixture(folder, name, speakers, sum(s["features"] for s in speakers))

        about = {"kind": "simulated", "encoder": None, "layer": None, "frame_rate": None}
        return {"train": render_simulated, "val": render_simulated}, about
    splits = split_speech(read_speech(Path(args.speech_dir)), args.share_speakers, args.seed)
    samples = {"train": args.train_samples, "val": args.val_samples}
    plans = {s: plan_speech(args, s, splits[s], samples[s]) for s in splits}
    encoder = load_audio_encoder(args.encoder, pick_device(args.device))
    check_layer(encoder.tower, args.layer)

    def render_speech(folder, name, index):
        plan = plans[name.split("_")[0]][index]
        speakers, mixed = render_speech_mixture(plan, encoder, args.layer, folder, name)
        return write_mixture(folder, name, speakers, mixed, mixed_wav=f"mixed/{name}.wav")

    about = {"kind": "speech", "encoder": encoder.name, "layer": args.layer,
             "frame_rate": encoder.frame_rate(args.layer)}
    return {"train": render_speech, "val": render_speech}, about


def generate_dataset(args, command_line: str) -> None:
    """Make the dataset that the arguments ask for; an earlier one stays until it is whole."""
    output_dir = Path(args.output_dir)
    check_replaceable(output_dir)
    staging = output_dir / ".staging"
    renderers, about = _renderers(args)
    try:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        samples = {"train": args.train_samples, "val": args.val_samples}
        entries = {s: write_split(staging / s, s, samples[s], renderers[s]) for s in samples}
        about |= {"seed": args.seed, "command_line": command_line}
        (staging / "dataset.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
        replace_splits(output_dir, staging)
    except FileNotFoundError:
        raise
    except OSError as error:
        reason = error.strerror or error
        raise InputError(f"cannot write the dataset to {output_dir}: {reason}") from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    for split in entries:
        print_statistics(split, entries[split])
    files = [path for path in output_dir.rglob("*") if path.is_file()]
    print(f"{sum(path.stat().st_size for path in files) / 1e6:.0f} MB in {output_dir}")


# --------------------------------------------------------------------------------------------------
# Main


def check_arguments(args) -> None:
    """Fail with one line if the arguments cannot make a dataset."""
    simulated = not args.speech_dir
    rules = [
        (args.train_samples >= 1 and args.val_samples >= 1, "--train_samples and --val_samples "
         "must be 1 or more"),
        (1 <= args.min_speakers <= args.max_speakers, "--min_speakers must be 1 to "
         f"--max_speakers ({args.max_speakers}), not {args.min_speakers}"),
        (args.seed >= 0, f"--seed must be 0 or more, not {args.seed}"),
        (not simulated or args.max_speakers <= NUM_VOICES, "--max_speakers can be "
         f"{NUM_VOICES} at most: there are no more simulated voices"),
        (not simulated or args.feature_dim >= NUM_BANDS, f"--feature_dim must be {NUM_BANDS} or "
         f"more, not {args.feature_dim}"),
        (not simulated or args.seq_len >= 1, f"--seq_len must be 1 or more, not {args.seq_len}"),
        (simulated or args.encoder, "--speech_dir needs --encoder (Whisper or Qwen2-Audio)"),
        (1 <= args.join[0] <= args.join[1], "--join needs two numbers, the smaller first"),
        (all(0 <= x < 1000 for x in (args.max_gap, args.max_onset, args.level_difference)),
         "--max_gap, --max_onset and --level_difference must be numbers of 0 or more"),
    ]
    for holds, complaint in rules:
        if not holds:
            raise InputError(complaint)


def main(argv: list[str] | None = None) -> int:
    """Make a dataset; returns 0, or 2 after one line on standard error for bad input."""
    args = build_parser().parse_args(argv)
    arguments = sys.argv[1:] if argv is None else argv
    try:
        check_arguments(args)
        generate_dataset(args, " ".join(["generate_multi_speaker_dataset.py", *arguments]))
    except (InputError, OSError) as error:
        print(f"error: {first_line(error)}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
