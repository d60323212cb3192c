"""Make multi_speaker_data/: mixtures of talkers with each talker alone.

    python generate_multi_speaker_dataset.py --train_samples=100 --val_samples=30
    python generate_multi_speaker_dataset.py --speech_dir LibriSpeech/dev-clean \
        --output_dir recordings --overlap 0.2 1

Simulated talkers (the default) are feature vectors. A voice is a set of feature bands and a rate of
modulation, the same in all datasets. An utterance is its voice's bands, swelling and fading in
phrases with gaps between, each feature modulated by a sine of its own phase; the mixture is the
sum. The bands of two voices overlap only in part, so that an oracle that knows the voices beats
every trivial output; sources have unit power (zeros score 1).

Recordings (``--speech_dir``) of different speakers are mixed as waveforms (``mixing.py``) and kept
as wavs. With ``--encoder`` the dataset also keeps features of a frozen Whisper or Qwen2-Audio, and
the mixtures fit into its window.
"""

from __future__ import annotations

import os
import signal
import sys

if __name__ == "__main__":  # Ctrl-C during the slow imports below would print a traceback
    signal.signal(signal.SIGINT, lambda *_: (os.write(2, b"stopped\n"), os._exit(130)))
elif __name__ == "__mp_main__":  # a rendering process leaves Ctrl-C to the main one
    signal.signal(signal.SIGINT, signal.SIG_IGN)

import argparse
import contextlib
import json
import math
import re
import shutil
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from importlib.util import find_spec
from itertools import chain, islice, pairwise
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

import numpy as np
import torch
from tqdm import tqdm

import mixing
from audio import SAMPLING_RATE, first_line, load_audio_encoder, write_wav
from mixing import MixingOptions, SpeechSource, Utterance, group_by_speaker

NUM_VOICES = 12
NUM_BANDS = 32
BANDS_PER_VOICE = 6
VOICE_SEED = 1280  # one inventory for all datasets; --seed draws utterances and mixtures
MODULATION = 0.6
MOST_VALUES = 10_000_000  # of an array of simulated features
MIXING = {  # options of mixtures of recordings: type, smallest, largest, help
    "same_corpus": (float, 0, 1, "share of the mixtures whose talkers are of one corpus alone"),
    "join": (int, 1, 1000, "recordings said in a row by each talker"),
    "min_seconds": (float, 0, 1000, "least seconds per talker; recordings are added to reach it"),
    "max_gap": (float, 0, 1000, "longest pause between a talker's recordings in seconds"),
    "max_onset": (float, 0, 1000, "latest start in seconds; with --overlap, of the first talker"),
    "overlap": (float, 0, 1, "share of time with two or more talkers (default: random starts)"),
    "turns": (float, 0, 1, "share of mixtures whose talkers take turns, if --max_seconds has room"),
    "level_difference": (float, 0, 60, "largest level difference between talkers in dB"),
    "speed": (float, 0.5, 2, "factor by which a talker's recordings are sped up"),
    "formants": (float, 0.5, 2, "factor that scales a talker's formants, training split only"),
    "equalizer": (float, 0, 30, "dB of a random equalizer per talker, training split only"),
    "snr_db": (float, -100, 100, "signal-to-noise ratio in dB, before any telephone"),
    "reverb": (float, 0, 1, "share of mixtures in a simulated room; a bare --reverb means all"),
    "telephone": (float, 0, 1, "share of mixtures that come through a telephone"),
    "max_seconds": (float, 0.001, 1e6, "longest mixture in seconds; speech is left out or cut")}
BOUNDS = {name: (low, high) for name, (_, low, high, _) in MIXING.items()}
PAIRS = ("join", "overlap", "speed", "formants", "snr_db")  # drawn between two values
SPEAKER_COLUMNS, TEXT_COLUMNS = ("speaker", "speaker_id", "client_id"), ("text", "sentence")
FETCHED = "fetched_speech"  # folder in a dataset: recordings copied from the hub
REPLACING = ".replacing"  # holds a dataset while it is moved to its place


def check_bounds(values: dict, bounds: dict[str, tuple]) -> None:
    """Raise ValueError unless numbers, and pairs in ascending order, are within their bounds."""
    for name, (low, high) in bounds.items():
        value, pair = values[name], name in PAIRS
        if value is None and name in ("overlap", "max_seconds"):
            continue
        numbers = value if pair else [value]
        if len(numbers) != 1 + pair or not all(a <= b for a, b in pairwise([low, *numbers, high])):
            order = ", the smaller first" if pair else ""
            raise ValueError(f"--{name} must be {low:g} to {high:g}{order}, not {value!s:.40}")


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


def simulate_mixture(args, split: str, index: int, voices: list[Voice]) -> dict:
    """Draw mixture ``index`` of a split: arguments of ``write_mixture``."""
    rng = np.random.default_rng([args.seed, split == "val", index])
    count = int(rng.integers(args.min_speakers, args.max_speakers + 1))
    chosen = rng.choice(len(voices), size=count, replace=False)
    features = [simulate_utterance(voices[v], args.seq_len, rng) for v in chosen]
    speakers = [{"speaker_id": voices[v].speaker_id,
                 "text": f"simulated utterance {split} {index}.{i}"} for i, v in enumerate(chosen)]
    return {"speakers": speakers, "features": [sum(features), *features]}


def check_space(folder: Path, need: int) -> None:
    """Raise ValueError if a folder's disk lacks ``need`` bytes; the folder need not exist."""
    while not folder.exists():
        folder = folder.parent
    if need > (free := shutil.disk_usage(folder).free):
        raise ValueError(f"the dataset takes up to {need / 1e9:.1f} GB and {folder.resolve()} has "
                         f"{free / 1e9:.1f} GB free")


def simulated_dataset(args, sizes: dict[str, int]) -> tuple[Iterator[dict], dict]:
    """Return the mixtures of train, then of val, and what dataset.json says of them."""
    most = sum(sizes.values()) * (1 + args.max_speakers)
    check_space(Path(args.output_dir), 4 * most * args.seq_len * args.feature_dim)
    voices = make_voices(args.feature_dim)
    mixtures = (simulate_mixture(args, split, index, voices)
                for split, samples in sizes.items() for index in range(samples))
    return mixtures, {"kind": "simulated", "encoder": None, "layer": None, "frame_rate": None}


# --------------------------------------------------------------------------------------------------
# Recorded talkers


def _read_manifest(manifest: Path) -> list[Utterance]:
    utterances, number = [], 1
    try:
        with open(manifest, encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                row = json.loads(line)
                audio = manifest.parent / row["audio"]
                if row["speaker"] in (None, ""):
                    raise ValueError("speaker is empty")
                if not os.path.isfile(audio):
                    raise FileNotFoundError(
                        f"{manifest}, line {number}: no such audio file: {audio}")
                text, *names = ("" if row.get(key) is None else str(row[key])
                                for key in ("text", "speaker", "split", "corpus"))
                speaker, split, corpus = map(sys.intern, names)  # a million lines repeat them
                utterances.append(Utterance(audio, speaker, text, split, corpus))
    except (ValueError, RecursionError, KeyError, TypeError) as error:
        raise ValueError(
            f"{manifest}, line {number}: no JSON with audio and speaker ({error})") from None
    return utterances


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error})") from None


def _read_speaker_folders(path: Path) -> list[Utterance]:
    transcripts, chapters = {}, set()
    found = mixing.list_recordings(path)
    recordings = [audio for audio in found if audio.parent != path]
    if loose := len(found) - len(recordings):
        print(f"left out the recordings in no speaker's folder, but in {path} itself: {loose}")
    folders = {audio.parent for audio in recordings}  # rglob would not follow links as that does
    for listing in chain.from_iterable(folder.glob("*.trans.txt") for folder in folders):
        for line in _read_text(listing).splitlines():
            name, _, text = line.partition(" ")
            transcripts[listing.parent / name] = text
        chapters.add(listing.parent)
    mixed = {about.parent / part for about in path.rglob("dataset.json")  # that this script made
             if (about.parent / "train/metadata.json").is_file()
             for part in ("train", "val", FETCHED)}
    utterances = []
    for audio in recordings:
        if not mixed.isdisjoint(audio.parents):  # mixtures are nobody's speech
            continue
        parts = audio.relative_to(path).parts  # [subset,] speaker, chapter, file in LibriSpeech
        speaker = parts[-3] if audio.parent in chapters and len(parts) > 3 else parts[0]
        text, beside = transcripts.get(audio.with_suffix(""), ""), audio.with_suffix(".txt")
        if not text and beside.is_file():
            text = _read_text(beside).strip()
        utterances.append(Utterance(audio, speaker, text))
    return utterances


def is_hub_dataset(source: str) -> bool:
    """Return whether ``source`` is OWNER/NAME[:CONFIG[:SPLIT]] and no folder OWNER is here."""
    owner, _, name = source.partition("/")
    return bool(owner and name) and "/" not in name and not Path(owner).exists()


def write_recordings(rows: Iterable[dict], folder: Path) -> None:
    """Copy the recordings of a Hugging Face dataset into a folder, and write their manifest last.

    Rows have undecoded ``audio``, a speaker in one of ``SPEAKER_COLUMNS`` and perhaps a text in one
    of ``TEXT_COLUMNS``; ValueError if there are no rows, or one lacks audio or speaker.
    """
    folder.mkdir(parents=True, exist_ok=True)
    staging, number = folder / "manifest.part", -1
    with open(staging, "w", encoding="utf-8") as lines:
        for number, row in enumerate(tqdm(rows, "fetch", disable=None)):
            speaker, text = (
                next((str(row[name]) for name in names if row.get(name) is not None), None)
                for names in (SPEAKER_COLUMNS, TEXT_COLUMNS))
            stored = row.get("audio") or {}
            data, path = stored.get("bytes"), stored.get("path") or "audio.wav"
            if data is None and path.startswith("hf://"):  # a file of its own on the hub
                import fsspec

                with fsspec.open(path) as file:
                    data = file.read()
            if data is None or speaker is None:
                raise ValueError(f"row {number} has no audio, or no speaker as one of "
                                 f"{', '.join(SPEAKER_COLUMNS)}; its columns are {', '.join(row)}")
            name = f"{number:08d}{Path(path).suffix}"
            (folder / name).write_bytes(data)
            lines.write(json.dumps({"audio": name, "speaker": speaker, "text": text}) + "\n")
    if number < 0:
        raise ValueError("it has no rows")
    staging.replace(folder / "manifest.jsonl")


def fetch_speech(source: str, folder: Path) -> Path:
    """Copy a Hugging Face dataset into a subfolder of ``folder`` and return the subfolder.

    ``source`` is a folder of Parquet files, or OWNER/NAME[:CONFIG[:SPLIT]] on the hub; the default
    split is "train". A completed copy is reused, an interrupted one starts over. Raises ValueError
    if the dataset cannot be read or ``write_recordings`` does.
    """
    folder /= quote(source, safe="")
    if (folder / "manifest.jsonl").is_file():
        print(f"using the copy of {source} in {folder}")
        return folder
    name, config, split = (source, "", "") if Path(source).exists() else (
        *source.split(":", 2), "", "")[:3]
    try:
        from datasets import Audio, load_dataset

        rows = load_dataset(name, config or None, split=split or "train", streaming=True)
        write_recordings(rows.cast_column("audio", Audio(decode=False)), folder)
    except ImportError:
        raise ValueError(f"{source} is no folder of recordings here, and a Hugging Face dataset "
                         "needs: pip install datasets") from None
    except Exception as error:  # the library raises its own, pyarrow's and the network's
        raise ValueError(f"{source} is no folder of recordings here, and cannot be read as a "
                         f"Hugging Face dataset: {first_line(error)}") from None
    return folder


def read_speech(path: Path) -> list[Utterance]:
    """Return the utterances of folders per speaker, or of a JSON-lines manifest.

    A manifest's lines have ``audio`` (relative to the manifest) and ``speaker``, and optionally
    ``text``, ``split`` and, for ``--same_corpus`` and ``--as_recorded``, ``corpus``. In folders,
    transcripts are read from ``NAME.txt`` beside a recording or from LibriSpeech's
    ``*.trans.txt``.
    """
    manifest = path / "manifest.jsonl" if path.is_dir() else path
    if manifest.is_file():
        utterances = _read_manifest(manifest)
    elif path.is_dir():
        utterances = _read_speaker_folders(path)
    else:
        raise FileNotFoundError(f"no speech at {path}")
    if not utterances:
        raise ValueError(f"{path} holds no manifest.jsonl and no recordings in folders per speaker")
    return utterances


def check_apart(splits: dict[str, list[Utterance]]) -> None:
    """Raise ValueError if a recording is in both splits, under one name or two."""
    held_out = {(file.st_dev, file.st_ino) for file in (u.audio.stat() for u in splits["val"])}
    for utterance in splits["train"]:
        file = utterance.audio.stat()
        if (file.st_dev, file.st_ino) in held_out:
            raise ValueError(f"{utterance.audio} is in both splits: list it for one speaker, with "
                             "one text and split")


def split_speech(utterances: list[Utterance], split_by: str, seed: int) -> dict[str, list]:
    """Divide utterances into train and val: as the manifest says, else a fifth is held out.

    ``split_by`` "speaker" holds out a fifth of the speakers, "utterance" a fifth of each speaker's
    utterances (one if there are two to nine). A manifest gives the split of all or of none.
    """
    if any(u.split for u in utterances):
        splits = {split: [u for u in utterances if u.split == split] for split in ("train", "val")}
        if odd := next((u for u in utterances if u.split not in splits), None):
            raise ValueError("the manifest's split must be train or val for every line or for "
                             f"none, and {odd.audio} has {odd.split or 'none'!r}")
        return splits
    rng, groups = np.random.default_rng(seed), group_by_speaker(utterances)
    if split_by == "speaker":
        speakers = sorted(groups)
        rng.shuffle(speakers)
        held_out = {u for s in speakers[: max(1, len(speakers) // 5)] for u in groups[s]}
    else:
        held_out = {group[i] for _, group in sorted(groups.items())
                    for i in rng.permutation(len(group))[: max(len(group) // 5, len(group) > 1)]}
    return {"train": [u for u in utterances if u not in held_out],
            "val": [u for u in utterances if u in held_out]}


# --------------------------------------------------------------------------------------------------
# Recorded talkers: mixtures


def mixing_options(values: dict) -> MixingOptions:
    """Return options from JSON or the command line, where several values are a list."""
    several = (*PAIRS, "as_recorded")
    return MixingOptions(**{
        k: tuple(v) if k in several and v is not None else v for k, v in values.items()})


def pick_device(name: str) -> str:
    """Return the device for the encoder; "auto" takes a GPU if there is one."""
    found = torch.accelerator.current_accelerator(check_available=True)
    best = found.type if found else "cpu"
    if name not in ("auto", "cpu", best):
        raise ValueError(f"no {name} device here; use --device=auto")
    return best if name == "auto" else name


def _with_features(plans: list, rendered: Iterator, encoder, longest: float) -> Iterator[dict]:
    """Yield arguments of ``write_mixture`` for rendered mixtures, with features if encoded.

    A talker longer than ``longest`` seconds was cut and gets no text, since its end is missing.
    """
    told = False
    for plan, (sources, mixture) in zip(plans, rendered, strict=True):
        silent = [talker.utterances[0].audio
                  for talker, waveform in zip(plan.talkers, sources, strict=True)
                  if not waveform.any()]
        if silent and not told:
            tqdm.write(f"recordings without any sound count as talkers; the first is {silent[0]}")
            told = True
        waveforms = [mixture, *sources]
        features = [f.cpu().numpy() for f in encoder.encode(waveforms)] if encoder else None
        speakers = [{"speaker_id": t.utterances[0].speaker,
                     "text": t.text if t.seconds <= longest else ""} for t in plan.talkers]
        about = {"overlap": plan.overlap, "overlap_target": plan.overlap_target,
                 "snr_db": plan.noise and plan.noise.snr_db, "room": plan.room,
                 "band": plan.band or None}
        yield {"speakers": speakers, "features": features, "waveforms": waveforms,
               **{k: np.round(v, 4).tolist() for k, v in about.items() if v is not None}}


def plan_mixtures(args, options: MixingOptions, sizes: dict, splits: dict) -> list:
    """Plan the mixtures of train, then of val; ValueError if a split has too few speakers."""
    noises, plans = mixing.list_noises(options.noise_dir), []
    for split, samples in sizes.items():
        speakers = group_by_speaker(splits[split])
        if not speakers:
            raise ValueError(f"the {split} split has no speakers: add some to --speech_dir; a "
                             "manifest that names splits needs train and val")
        if len(speakers) < args.max_speakers:
            hint = ", or use --split_by utterance" if args.split_by == "speaker" else ""
            raise ValueError(f"the {split} split has {len(speakers)} speakers and mixtures of "
                             f"{args.max_speakers} were asked for: lower --max_speakers{hint}")
        source = SpeechSource(options, speakers, noises, split)
        rng = np.random.default_rng([args.seed, split == "val"])
        plans += [mixing.plan_mixture(rng, source)
                  for _ in tqdm(range(samples), f"plan {split}", leave=False, disable=None)]
    longest = options.max_seconds or np.inf
    if cut := {t.utterances for plan in plans for t in plan.talkers if t.seconds > longest}:
        print(f"cut to {round(longest, 2):g} s, without their text: {len(cut)} recordings")
    if short := sum(t.seconds < options.min_seconds or len(t.utterances) < options.join[0]
                    for plan in plans for t in plan.talkers):
        print("talkers who say less than --min_seconds or --join asks for, which did not fit: "
              f"{short}")
    if missed := sum(p.overlap_target is not None and
                     abs(p.overlap - p.overlap_target) > mixing.OVERLAP_TOLERANCE for p in plans):
        print(f"another overlap than was asked for, which did not fit: {missed} mixtures")
    return plans


def speech_dataset(args, sizes: dict, splits: dict[str, list]) -> tuple[Iterator[dict], dict]:
    """Return the mixtures of train, then of val, and what dataset.json says of them."""
    options = mixing_options({name: getattr(args, name) for name in MixingOptions._fields})
    encoder, about = None, {"kind": "recordings"}
    if args.encoder:
        encoder = load_audio_encoder(args.encoder, args.layer, pick_device(args.device))
        local = Path(args.encoder).exists()
        about = {"kind": "speech", "layer": args.layer, "frame_rate": encoder.frame_rate,
                 "encoder": str(Path(args.encoder).resolve()) if local else args.encoder}
        window = encoder.feature_extractor.n_samples / SAMPLING_RATE - 0.001
        options = options._replace(max_seconds=min(window, options.max_seconds or window))
    plans = plan_mixtures(args, options, sizes, splits)
    rate = 3 * SAMPLING_RATE  # bytes a second: 24 bits a sample, and float32 features
    if encoder:
        rate += 4 * encoder.frame_rate * encoder.tower.config.d_model
    seconds = sum((1 + len(plan.talkers)) * plan.seconds for plan in plans)
    check_space(Path(args.output_dir), round(seconds * rate))
    rendered = mixing.render_mixtures(plans, options.max_seconds, args.workers)
    mixtures = _with_features(plans, rendered, encoder, options.max_seconds or np.inf)
    return mixtures, about | {"mixing": options._asdict()}


# --------------------------------------------------------------------------------------------------
# Recorded talkers: read back for training


def _utterance(row: dict, listing: Path) -> Utterance:
    """Return an utterance of a listing; relative paths start at the dataset's folder."""
    return Utterance(listing.parents[1] / row["audio"], str(row["speaker"]), str(row["text"]),
                     corpus=str(row.get("corpus", "")))


class ListedUtterances(Sequence):
    """The utterances of one talker in utterances.json, each read from its line when it is drawn."""

    def __init__(self, listing: Path):
        self.listing, self.places = listing, array("q")  # bytes from the start of the file
        self.version = self._version_of(os.stat(listing))

    @staticmethod
    def _version_of(file: os.stat_result) -> tuple[int, int]:
        return file.st_ino, file.st_mtime_ns

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> Utterance:
        with open(self.listing, "rb") as lines:
            if self._version_of(os.fstat(lines.fileno())) != self.version:
                raise ValueError(f"{self.listing} was replaced while it was in use")
            lines.seek(self.places[index])
            return _utterance(json.loads(lines.readline().rstrip(b",\n")), self.listing)


def _read_listing(listing: Path) -> dict[str, Sequence[Utterance]]:
    """Return the utterances of each talker; a million, with a line each, take about 10 MB."""
    talkers, place = {}, 0
    with open(listing, "rb") as lines:
        if lines.readline() != b"[\n" or not lines.readline().startswith(b'{"'):
            lines.seek(0)
            return group_by_speaker(_utterance(row, listing) for row in json.load(lines))
        lines.seek(0)
        for line in lines:
            if len(line) > 2:  # between the brackets
                speaker = _utterance(json.loads(line.rstrip(b",\n")), listing).speaker
                talkers.setdefault(speaker, ListedUtterances(listing)).places.append(place)
            place += len(line)
    return talkers


def load_source(data_dir, split: str):
    """Return the ``mixing.SpeechSource`` that a split of recordings was drawn from.

    Raises FileNotFoundError or ValueError if the dataset was not made from recordings, its files
    are damaged, or one of its first thousand recordings is gone.
    """
    listing = Path(data_dir) / split / "utterances.json"
    if not listing.is_file():
        raise FileNotFoundError(f"no {listing}: {data_dir} was not made with --speech_dir")
    try:
        about = json.loads((Path(data_dir) / "dataset.json").read_text(encoding="utf-8"))
        options = mixing_options(about["mixing"])
        check_bounds(options._asdict(), BOUNDS | {
            "max_speakers": (1, mixing.MOUTHS), "min_speakers": (1, options.max_speakers)})
        talkers, noises = _read_listing(listing), mixing.list_noises(options.noise_dir)
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"dataset.json or {listing} is damaged ({error})") from None
    first = islice(chain.from_iterable(talkers.values()), 1000)
    gone = next((u.audio for u in first if not u.audio.is_file()), None)
    if gone is not None:
        raise FileNotFoundError(f"{data_dir} was made from {gone}, which is gone")
    return SpeechSource(options, talkers, noises, split)


# --------------------------------------------------------------------------------------------------
# Writing


def write_mixture(
    folder: Path, name: str, speakers: list[dict], features=None, waveforms=None, **more
) -> dict:
    """Save the features and waveforms, mixture first; return the mixture's metadata entry."""
    entry = {"id": name, "num_speakers": len(speakers), "conversation": speakers}
    stems = [f"mixed/{name}", *(f"separated/{name}_speaker_{i}" for i in range(len(speakers)))]
    for arrays, write, suffix, mixed, alone in (
            (features, np.save, "npy", "mixed_audio", "feature_file"),
            (waveforms, write_wav, "wav", "mixed_wav", "wav_file")):
        if arrays is not None:
            files = [f"{stem}.{suffix}" for stem in stems]
            for file, array in zip(files, arrays, strict=True):
                write(folder / file, array)
            entry[mixed] = files[0]
            speakers = [s | {alone: file} for s, file in zip(speakers, files[1:], strict=True)]
    if features is not None:
        entry["seq_len"], entry["feature_dim"] = features[0].shape
    if waveforms is not None:
        entry["seconds"] = round(len(waveforms[0]) / SAMPLING_RATE, 4)
    return entry | {"speakers": speakers} | more


def write_split(
    folder: Path, split: str, samples: int, mixtures: Iterator[dict],
    utterances: list[Utterance], output_dir: Path,
) -> list[dict]:
    """Write a split's mixtures as they are rendered, then its metadata and utterances."""
    (folder / "mixed").mkdir(parents=True)
    (folder / "separated").mkdir()
    entries = [write_mixture(folder, f"{split}_{index:05d}", **next(mixtures))
               for index in tqdm(range(samples), split, leave=False, disable=None)]
    (folder / "metadata.json").write_text(json.dumps(entries, indent=1) + "\n", encoding="utf-8")
    if utterances:  # one a line, so that each can be read alone
        home = os.path.join(os.path.abspath(output_dir), "")  # it may move: relative paths inside
        rows = ({"audio": os.path.abspath(u.audio).removeprefix(home), "speaker": u.speaker,
                 "text": u.text, "corpus": u.corpus} for u in utterances)
        listing = "[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n"
        (folder / "utterances.json").write_text(listing, encoding="utf-8")
    return entries


def print_statistics(split: str, entries: list[dict]) -> None:
    """Print how many mixtures and talkers a split has, and the number of talkers per mixture."""
    counts = [entry["num_speakers"] for entry in entries]
    talkers = len({s["speaker_id"] for entry in entries for s in entry["speakers"]})
    spread = ", ".join(f"{n} talkers: {c}" for n, c in sorted(Counter(counts).items()))
    overlap = ""
    if any("overlap_target" in entry for entry in entries):
        overlaps = [entry["overlap"] for entry in entries if entry["num_speakers"] > 1]
        overlap = f", overlap {min(overlaps):.2f} to {max(overlaps):.2f}"
    print(f"{split}: {len(counts)} mixtures of {talkers} different talkers, "
          f"{np.mean(counts):.2f} talkers on average ({spread}){overlap}")


def make_staging(output_dir: Path) -> Path:
    """Make the folder that this process writes to; clear up after processes that were killed."""
    staging = output_dir / f".making_{os.getpid()}"
    finish_replacing(output_dir)
    shutil.rmtree(staging, ignore_errors=True)
    for folder in output_dir.glob(".making_[0-9]*"):
        with contextlib.suppress(PermissionError):  # another user's process is running
            try:
                os.kill(int(folder.name.removeprefix(".making_")), 0)
            except ProcessLookupError:
                shutil.rmtree(folder, ignore_errors=True)
    staging.mkdir(parents=True)
    return staging


def replace_dataset(staging: Path, output_dir: Path) -> None:
    """Replace the dataset in ``output_dir`` by that in ``staging``; other files stay."""
    staging.replace(output_dir / REPLACING)  # one of two simultaneous runs fails here
    finish_replacing(output_dir)


def finish_replacing(output_dir: Path) -> None:
    """Move a whole dataset from ``REPLACING`` to its place: now, or after a process was killed.

    The earlier splits are moved away first. So, whenever a process is killed, a split in place is
    whole and belongs to the dataset.json beside it.
    """
    new = output_dir / REPLACING
    for split in ("train", "val"):
        if (new / split).exists() and (output_dir / split).exists():
            (output_dir / split).replace(new / f"old_{split}")
    for part in ("dataset.json", "val", "train"):
        if (new / part).exists():
            (new / part).replace(output_dir / part)
    shutil.rmtree(new, ignore_errors=True)


def write_dataset(
    output_dir: Path, sizes: dict, mixtures: Iterator[dict], splits: dict, about: dict
) -> dict[str, list[dict]]:
    """Write a dataset into a staging folder and move it into place; return its metadata."""
    staging = make_staging(output_dir)
    try:
        entries = {
            s: write_split(staging / s, s, samples, mixtures, splits.get(s), output_dir)
            for s, samples in sizes.items()}
        (staging / "dataset.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
        if (output_dir / "train").exists():
            print(f"replacing the earlier dataset in {output_dir}")
        replace_dataset(staging, output_dir)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return entries


def _holds(file: Path, text: str) -> bool:
    if not file.is_file():
        return False
    with open(file, encoding="utf-8", errors="replace") as content:
        return text in content.read(1 << 16)


# --------------------------------------------------------------------------------------------------
# Command line


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Help that names a default only where there is one."""

    def _get_help_string(self, action):
        return action.help if action.default in (None, ()) else super()._get_help_string(action)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser; its defaults make the dataset of the README."""
    parser = argparse.ArgumentParser(
        description="Make mixtures of talkers, and each talker alone.",
        epilog="example: python generate_multi_speaker_dataset.py --train_samples=100",
        formatter_class=Help, allow_abbrev=False)
    parser.error = lambda message: parser.exit(
        2, f"error: {' '.join(message.split())[:500]} (see {parser.prog} --help)\n")
    add, defaults = parser.add_argument, MixingOptions()
    add("--train_samples", type=int, default=30, help="training mixtures")
    add("--val_samples", type=int, default=10, help="validation mixtures")
    add("--max_speakers", type=int, default=defaults.max_speakers, help="most talkers in a mixture")
    add("--min_speakers", type=int, default=defaults.min_speakers, help="fewest talkers")
    add("--seed", type=int, default=42, help="random seed of utterances and mixtures")
    add("--output_dir", default="multi_speaker_data", help="where train/ and val/ go")
    simulated = parser.add_argument_group("simulated talkers").add_argument
    simulated("--seq_len", type=int, default=100, help="frames per mixture")
    simulated("--feature_dim", type=int, default=1280, help="feature width")
    speech = parser.add_argument_group("recorded talkers").add_argument
    speech("--speech_dir", help="a folder per speaker, a JSON-lines manifest, or a "
           "Hugging Face dataset: OWNER/NAME[:CONFIG[:SPLIT]], or a folder of Parquet files")
    speech("--encoder", help="keep features of this Whisper or Qwen2-Audio too: folder or hub id")
    speech("--layer", type=int, help="encoder block to cut after (default: its output)")
    speech("--split_by", choices=("speaker", "utterance"), default="speaker",
           help="what train and val do not share, unless the manifest gives the split")
    speech("--workers", type=int, default=0, help="processes that render; 0: this one")
    speech("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto",
           help="where the encoder runs")
    add = parser.add_argument_group("mixing recorded talkers").add_argument
    add("--noise_dir", type=os.path.abspath,
        help="recordings of noise to add to the mixtures, the same in both splits")
    add("--as_recorded", nargs="+", default=defaults.as_recorded, metavar="CORPUS",
        help="corpora whose talkers keep their speed and voice, as they will be met in use")
    for name, (kind, _, _, text) in MIXING.items():
        more = {"nargs": 2, "metavar": ("MIN", "MAX")} if name in PAIRS else {}
        if name == "reverb":
            more = {"nargs": "?", "const": 1.0, "metavar": "SHARE"}
        add(f"--{name}", type=kind, default=getattr(defaults, name), help=text, **more)
    return parser


def check_arguments(args) -> None:
    """Raise ValueError if the arguments cannot make a dataset."""
    check_bounds(vars(args), {
        "train_samples": (1, 1e5), "val_samples": (1, 1e5), "seed": (0, 1 << 62),
        "max_speakers": (1, mixing.MOUTHS if args.speech_dir else NUM_VOICES),
        "min_speakers": (1, args.max_speakers), "workers": (0, 1024), "seq_len": (1, 1e6),
        "feature_dim": (NUM_BANDS, 1e5), **BOUNDS})
    if args.seq_len * args.feature_dim > MOST_VALUES:
        raise ValueError(f"--seq_len times --feature_dim can be {MOST_VALUES:,} at most")
    if args.min_seconds > (args.max_seconds or math.inf):
        raise ValueError("--min_seconds is more than --max_seconds")
    default = build_parser().parse_args([])
    for name, needed in (("layer", "encoder"), ("snr_db", "noise_dir")):
        if getattr(args, name) != getattr(default, name) and not getattr(args, needed):
            raise ValueError(f"--{name} needs --{needed}")
    recorded = (*MIXING, "noise_dir", "as_recorded", "encoder", "split_by", "workers", "device")
    for name in ("seq_len", "feature_dim") if args.speech_dir else recorded:
        if getattr(args, name) != getattr(default, name):
            raise ValueError(f"--{name} is for simulated talkers alone" if args.speech_dir else
                             f"--{name} needs recordings: give --speech_dir")
    if args.reverb and not find_spec("pyroomacoustics"):
        raise ValueError("--reverb needs pyroomacoustics: pip install -r requirements.txt")


def generate_dataset(args, command_line: str) -> None:
    """Make the dataset asked for; an earlier dataset stays until the new one is whole."""
    check_arguments(args)
    output_dir, splits = Path(args.output_dir), {}
    sizes = {"train": args.train_samples, "val": args.val_samples}
    for old in (output_dir / split for split in sizes):
        if old.exists() and not _holds(old / "metadata.json", '"num_speakers":'):
            raise ValueError(f"{old} exists and is no dataset; choose another --output_dir")
    description = output_dir / "dataset.json"
    if description.is_file() and not _holds(description, '"kind":'):
        raise ValueError(
            f"{description} is not of a dataset made here; choose another --output_dir")
    if args.speech_dir:
        speech = Path(args.speech_dir)
        if is_hub_dataset(args.speech_dir) or any(speech.glob("*.parquet")):
            speech = fetch_speech(args.speech_dir, output_dir / FETCHED)
        splits = split_speech(read_speech(speech), args.split_by, args.seed)
        check_apart(splits)
        utterances = chain(*splits.values())
        for corpus in sorted(set(args.as_recorded).difference(u.corpus for u in utterances)):
            print(f"--as_recorded: no recording is of the corpus {corpus}")
    mixtures, about = (speech_dataset(args, sizes, splits) if splits else
                       simulated_dataset(args, sizes))
    about |= {"seed": args.seed, "command_line": command_line}
    try:
        entries = write_dataset(output_dir, sizes, mixtures, splits, about)
    except FileNotFoundError:  # a recording is gone
        raise
    except torch.OutOfMemoryError as error:  # a RuntimeError too
        raise MemoryError(f"out of memory, --device=cpu has more: {error}") from None
    except (OSError, RuntimeError) as error:  # soundfile reports a full disk as RuntimeError
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"cannot write the dataset to {output_dir}: {reason}") from None
    finally:
        mixtures.close()  # ends rendering processes
    for split in entries:
        print_statistics(split, entries[split])
    size = sum(path.stat().st_size for split in sizes for path in (output_dir / split).rglob("*"))
    print(f"{size / 1e6:.0f} MB in {output_dir}")


def main(argv: list[str] | None = None) -> int:
    """Make a dataset; return 0, or 2 after one line on standard error for bad input."""
    arguments, parser = sys.argv[1:] if argv is None else argv, build_parser()
    signals, before = [], {}

    def stop(number: int, _):
        signals.append(number)
        raise KeyboardInterrupt

    with contextlib.suppress(ValueError):  # outside the main thread there are no signals
        before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        # Refuse empty values, as unset shell variables give; argparse stumbles over --name=--.
        if odd := [text for text in arguments if re.fullmatch("(--[^=]+=(--)?)?", text)]:
            parser.error(f"{odd[0].partition('=')[0] or 'an option'} needs a value")
        args = parser.parse_args(arguments)
        generate_dataset(args, " ".join(["generate_multi_speaker_dataset.py", *arguments]))
    except (Exception, KeyboardInterrupt) as error:
        if signals or isinstance(error, KeyboardInterrupt):  # in numpy it becomes a TypeError
            print("stopped; an earlier dataset stays until a new one is whole", file=sys.stderr)
            return 128 + (signals or [signal.SIGINT])[0]
        if not isinstance(error, (ValueError, OSError, MemoryError)):
            raise
        print(f"error: {first_line(error)}", file=sys.stderr)
        return 2
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)
    return 0


if __name__ == "__main__":
    sys.exit(main())
