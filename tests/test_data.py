"""The generator, the dataset classes, batches, and what bad input is answered with."""

import json
import os
import pickle
import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from conftest import FRAMES, RATE, WIDTH, assert_fails, edit_json, make_dataset, sine, train_flags
from conftest import write_wav as wav

import audio
import generate_multi_speaker_dataset as generator
import mixing
import speaker_separator_module as ssm


def metadata(folder, split):
    return json.loads((folder / split / "metadata.json").read_text())


def arrays(folder, split):
    """Every mixture of a split: its metadata entry, mixture [T, D] and sources [n, T, D]."""
    for entry in metadata(folder, split):
        sources = [np.load(folder / split / s["feature_file"]) for s in entry["speakers"]]
        yield entry, np.load(folder / split / entry["mixed_audio"]), np.stack(sources)


def contents(folder):
    """Every file below a folder except dataset.json, which names the folder."""
    files = (p for p in folder.rglob("*") if p.is_file() and p.name != "dataset.json")
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


# --------------------------------------------------------------------------------------------------
# Simulated


def test_same_seed_same_bytes(dataset, tmp_path):
    assert contents(make_dataset(tmp_path / "again")) == contents(dataset)


def test_no_utterance_occurs_twice(dataset, tmp_path):
    other = make_dataset(tmp_path / "other", "--seed=43")
    sources = [
        source.tobytes()
        for folder in (dataset, other)
        for split in ("train", "val")
        for _, _, group in arrays(folder, split)
        for source in group
    ]
    assert len(set(sources)) == len(sources)


def test_metadata(dataset):
    for split, samples in (("train", 4), ("val", 3)):
        entries = list(arrays(dataset, split))
        assert len(entries) == samples
        for index, (entry, mixture, sources) in enumerate(entries):
            name = f"{split}_{index:05d}"
            assert entry["id"] == name
            assert entry["mixed_audio"] == f"mixed/{name}.npy"
            assert entry["num_speakers"] == len(entry["speakers"]) == len(sources)
            assert entry["num_speakers"] in (2, 3)
            assert (entry["seq_len"], entry["feature_dim"]) == mixture.shape == (FRAMES, WIDTH)
            assert mixture.dtype == sources.dtype == np.float32
            for i, speaker in enumerate(entry["speakers"]):
                assert set(speaker) == {"speaker_id", "text", "feature_file"}
                assert speaker["feature_file"] == f"separated/{name}_speaker_{i}.npy"
            assert len({s["speaker_id"] for s in entry["speakers"]}) == len(sources)
            turns = [{k: s[k] for k in ("speaker_id", "text")} for s in entry["speakers"]]
            assert entry["conversation"] == turns
    about = json.loads((dataset / "dataset.json").read_text())
    assert (about["kind"], about["encoder"], about["layer"]) == ("simulated", None, None)
    assert about["seed"] == 42
    assert "--feature_dim=32" in about["command_line"]


def test_mixture_is_sum_of_unit_power_sources(dataset):
    for split in ("train", "val"):
        for _, mixture, sources in arrays(dataset, split):
            np.testing.assert_allclose(sources.astype(np.float64).sum(0), mixture, atol=1e-5)
            np.testing.assert_allclose(
                np.mean(sources.astype(np.float64) ** 2, (1, 2)), 1, atol=1e-3
            )


def test_statistics_are_printed(tmp_path, capsys):
    folder = make_dataset(tmp_path / "data", "--min_speakers=3", "--max_speakers=3")
    printed = capsys.readouterr().out
    voices = {s["speaker_id"] for e in metadata(folder, "train") for s in e["speakers"]}
    assert f"train: 4 mixtures of {len(voices)} different talkers, 3.00 talkers" in printed
    assert "3 talkers: 4" in printed
    assert f"MB in {folder}" in printed


@pytest.mark.parametrize("width", [320, 1280])
def test_oracle_beats_trivial_outputs(width, tmp_path):
    """Knowing the voices solves the task; what knows nothing does not."""
    folder = make_dataset(tmp_path / "data", f"--feature_dim={width}", "--seq_len=60")
    envelopes = {v.speaker_id: v.envelope for v in generator.make_voices(width)}
    errors = {"oracle": [], "zeros": [], "mixture": [], "mixture / count": []}
    for split in ("train", "val"):
        for entry, mixture, sources in arrays(folder, split):
            bands = np.stack([envelopes[s["speaker_id"]] for s in entry["speakers"]])  # [n, D]
            energy, *_ = np.linalg.lstsq(bands.T, mixture.T, rcond=None)  # [n, T]
            fitted = energy.clip(0)[:, :, None] * bands[:, None]  # [n, T, D]
            share = fitted / fitted.sum(0).clip(1e-6)
            errors["oracle"].append(np.mean((share * mixture - sources) ** 2))
            errors["zeros"].append(np.mean(sources**2))
            errors["mixture"].append(np.mean((mixture - sources) ** 2))
            errors["mixture / count"].append(np.mean((mixture / len(sources) - sources) ** 2))
    scores = {name: np.mean(values) for name, values in errors.items()}
    assert scores["zeros"] == pytest.approx(1, abs=1e-3)
    assert scores["mixture"] > 1
    assert 2 * scores["oracle"] < scores["mixture / count"] < 1
    assert scores["oracle"] < 0.15


def test_earlier_dataset_is_replaced_and_other_files_stay(own_dataset, capsys):
    (own_dataset / "notes.txt").write_text("mine")
    before = metadata(own_dataset, "train")
    make_dataset(own_dataset, "--seed=7", "--train_samples=2")
    assert f"replacing the earlier dataset in {own_dataset}" in capsys.readouterr().out
    assert (own_dataset / "notes.txt").read_text() == "mine"
    assert len(metadata(own_dataset, "train")) == 2 != len(before)
    assert len(list((own_dataset / "train/mixed").iterdir())) == 2


@pytest.mark.parametrize("about", [None, '[{"mine": 1}]'])
def test_a_folder_of_somebody_else_stays(about, tmp_path, capsys):
    (tmp_path / "train").mkdir()
    (tmp_path / "train/mine.txt").touch()
    if about:
        (tmp_path / "train/metadata.json").write_text(about)
    assert_fails(capsys, [f"--output_dir={tmp_path}"], "is no dataset", main=generator.main)
    assert (tmp_path / "train/mine.txt").is_file()


@pytest.mark.parametrize("killed_at", range(1, 7))
def test_a_run_killed_while_it_replaces_a_dataset(killed_at, own_dataset, monkeypatch):
    """The next run finds a whole dataset, the new one or the earlier one."""
    replace, moves = Path.replace, []

    def move(self, target):
        moves.append(target)
        if len(moves) == killed_at:
            raise KeyboardInterrupt
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", move)
    argv = ["--feature_dim=32", "--seq_len=5", "--train_samples=2", "--val_samples=1", "--seed=7"]
    assert generator.main([*argv, f"--output_dir={own_dataset}"]) == 130
    shutil.rmtree(generator.make_staging(own_dataset))
    sizes = {len(metadata(own_dataset, split)) for split in ("train", "val")}
    about = json.loads((own_dataset / "dataset.json").read_text())
    assert (about["seed"] == 7) == (sizes == {2, 1}) == (killed_at > 1)


def test_foreign_folder_is_not_replaced(tmp_path, capsys):
    mine = tmp_path / "data/train/mine.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    argv = ["--train_samples=1", "--val_samples=1", f"--output_dir={tmp_path / 'data'}"]
    assert_fails(capsys, argv, mine.parent, "--output_dir", main=generator.main)
    assert mine.read_text() == "mine"


def test_foreign_file_is_not_replaced(tmp_path, capsys):
    (tmp_path / "dataset.json").write_text('{"name": "mine"}')
    argv = ["--train_samples=1", "--val_samples=1", f"--output_dir={tmp_path}"]
    assert_fails(capsys, argv, tmp_path / "dataset.json", "--output_dir", main=generator.main)
    assert [path.name for path in tmp_path.iterdir()] == ["dataset.json"]
    assert (tmp_path / "dataset.json").read_text() == '{"name": "mine"}'


def test_full_disk_leaves_earlier_dataset(own_dataset, capsys, monkeypatch):
    before, save, calls = contents(own_dataset), np.save, []

    def fill(path, array):
        calls.append(path)
        if len(calls) > 5:
            raise OSError(28, "No space left on device")
        save(path, array)

    monkeypatch.setattr(np, "save", fill)
    argv = [f"--feature_dim={WIDTH}", f"--output_dir={own_dataset}", "--seed=9"]
    assert_fails(capsys, argv, own_dataset, "No space left", main=generator.main)
    assert contents(own_dataset) == before


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (["--train_samples=0"], "--train_samples"),
        (["--val_samples=-1"], "--val_samples"),
        (["--min_speakers=4"], "--min_speakers"),
        (["--min_speakers=0"], "--min_speakers"),
        (["--max_speakers=13"], "--max_speakers"),
        (["--feature_dim=31"], "--feature_dim"),
        (["--seq_len=0"], "--seq_len"),
        (["--seed=-1"], "--seed"),
        (["--speech_dir=somewhere"], "no speech at somewhere"),
        (["--join", "2", "1"], "--join"),
        (["--max_gap=-1"], "--max_gap"),
    ],
)
def test_bad_arguments(flags, word, tmp_path, capsys):
    argv = [*flags, f"--output_dir={tmp_path / 'data'}"]
    assert_fails(capsys, argv, word, main=generator.main)
    assert not (tmp_path / "data").exists()


def test_output_folder_not_writable(tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    assert_fails(
        capsys, [f"--output_dir={tmp_path / 'file' / 'data'}"], "file/data", main=generator.main
    )


# --------------------------------------------------------------------------------------------------
# Dataset


def test_items(dataset):
    for split in ("train", "val"):
        items = ssm.MultiSpeakerDataset(dataset, split)
        assert items.feature_dim == WIDTH
        assert items.is_sum
        for index, (_, mixture, sources) in enumerate(arrays(dataset, split)):
            assert np.array_equal(items[index]["mixture"], mixture)
            assert np.array_equal(items[index]["targets"], sources)
        assert items.max_speakers == max(len(sources) for *_, sources in arrays(dataset, split))


def test_collate_pads_features():
    items = [
        {
            "mixture": torch.full((n + 2, 4), float(n)),
            "targets": torch.full((n, n + 2, 4), float(n)),
        }
        for n in (2, 1, 0)
    ]
    batch = ssm.collate(items, 3)
    assert batch["speaker_mask"].sum(1).tolist() == [2, 1, 0]
    assert batch["frame_mask"].sum(1).tolist() == [4, 3, 2]
    assert batch["targets"].sum((1, 2, 3)).tolist() == [2 * 2 * 4 * 4, 1 * 1 * 3 * 4, 0]
    assert batch["mixture"].sum((1, 2)).tolist() == [2 * 4 * 4, 1 * 3 * 4, 0]


def with_entry(key, value):
    """Damage one entry of the first training mixture."""

    def damage(folder):
        edit_json(folder / "train/metadata.json", lambda samples: samples[0].update({key: value}))

    return damage


def with_array(change, name="mixed/train_00000.npy", split="train"):
    """Replace an array of the dataset by what ``change`` makes of it."""

    def damage(folder):
        np.save(folder / split / name, change(np.load(folder / split / name)))

    return damage


def with_bytes(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def put(value):
    def change(array):
        array[1, 2] = value
        return array

    return change


SOURCE = "separated/train_00000_speaker_1.npy"
DAMAGE = {
    "no dataset": (shutil.rmtree, "no dataset at"),
    "no validation split": (lambda f: shutil.rmtree(f / "val"), "val/metadata.json"),
    "no mixtures": (with_bytes("train/metadata.json", b"[]"), "no mixtures"),
    "not a list": (with_bytes("train/metadata.json", b'{"id": 3}'), "no mixtures"),
    "list of numbers": (with_bytes("train/metadata.json", b"[1, 2]"), "metadata.json"),
    "not JSON": (with_bytes("train/metadata.json", b'[{"id": '), "not JSON"),
    "binary metadata": (with_bytes("train/metadata.json", b"\xff\xfe\x00"), "not JSON"),
    "missing entry": (
        lambda f: edit_json(f / "train/metadata.json", lambda s: s[0].pop("mixed_audio") and s),
        "misses an entry",
    ),
    "missing entry later": (
        lambda f: edit_json(f / "train/metadata.json", lambda s: s[2].pop("mixed_audio") and s),
        "misses an entry: 'mixed_audio'",
    ),
    "outside": (with_entry("mixed_audio", "../val/mixed/val_00000.npy"), "outside its folder"),
    "outside, absolute": (with_entry("mixed_audio", "/etc/hostname"), "outside its folder"),
    "width in words": (with_entry("feature_dim", "wide"), "metadata.json"),
    "another number of speakers": (with_entry("num_speakers", 7), "has 7 speakers and lists"),
    "speakers a number": (with_entry("speakers", 3), "metadata.json"),
    "dataset.json not JSON": (with_bytes("dataset.json", b"{"), "dataset.json"),
    "dataset.json a list": (with_bytes("dataset.json", b"[1]"), "dataset.json"),
    "missing mixture": (with_entry("mixed_audio", "mixed/gone.npy"), "gone.npy"),
    "missing source": (lambda f: (f / "train" / SOURCE).unlink(), SOURCE),
    "rank 1": (with_array(lambda a: a[0]), "train_00000.npy"),
    "rank 3": (with_array(lambda a: a[None], SOURCE), SOURCE),
    "no frames": (with_array(lambda a: a[:0]), "train_00000.npy"),
    "width": (with_array(lambda a: a[:, :-1], SOURCE), f"width {WIDTH - 1}"),
    "integers": (with_array(lambda a: a.astype(np.int64)), "int64"),
    "complex": (with_array(lambda a: a.astype(np.complex64)), "complex64"),
    "NaN": (with_array(put(np.nan)), "NaN"),
    "infinity": (with_array(put(np.inf), SOURCE), "infinite"),
    "too large for float32": (
        with_array(lambda a: put(1e300)(a.astype(np.float64))), "infinite"),
    "NaN in validation": (with_array(put(np.nan), "mixed/val_00002.npy", "val"), "val_00002.npy"),
    "lengths differ": (with_array(lambda a: a[:-1], SOURCE), "differ in length"),
    "not an array": (with_bytes(f"train/{SOURCE}", b"features"), SOURCE),
    "truncated array": (with_bytes(f"train/{SOURCE}", b"\x93NUMPY\x01\x00v\x00{"), SOURCE),
    "empty file": (with_bytes(f"train/{SOURCE}", b""), SOURCE),
}


def read_all(folder):
    for split in ("train", "val"):
        items = ssm.MultiSpeakerDataset(folder, split)
        for index in range(len(items)):
            items[index]


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_dataset(damage, own_dataset, tmp_path, capsys):
    spoil, words = DAMAGE[damage]
    spoil(own_dataset)
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        read_all(own_dataset)
    assert words in str(error.value)
    assert_fails(capsys, train_flags(own_dataset, tmp_path / "out", "--no_remix"), words)


def test_damaged_dataset_is_a_value_error(own_dataset):
    with_array(put(np.nan))(own_dataset)
    with pytest.raises(ValueError, match="NaN"):
        read_all(own_dataset)


# --------------------------------------------------------------------------------------------------
# Remixing


@pytest.fixture
def remixed(tmp_path):
    folder = make_dataset(tmp_path / "data", "--train_samples=6")
    return folder, remix(folder, seed=5, mixtures_per_epoch=6)


def remix(folder, kind=ssm.RemixedFeatures, max_speakers=3, **options):
    data = ssm.MultiSpeakerDataset(folder, "train")
    return kind(data, ssm.TrainOptions(**options), max_speakers)


def test_a_mixture_depends_on_seed_and_number_alone(remixed):
    folder, mixtures = remixed
    again, other = remix(folder, seed=5), remix(folder, seed=6)
    assert len(mixtures) == 6
    assert len(again) == 120  # a small dataset is mixed more often than it has mixtures
    drawn = [mixtures[number]["mixture"] for number in range(12)]
    for number in reversed(range(12)):  # whatever the order of access
        assert torch.equal(again[number]["mixture"], drawn[number])
    assert sum(torch.equal(other[i]["mixture"], drawn[i]) for i in range(12)) <= 1
    assert not any(torch.equal(a, b) for a, b in pairwise(drawn))


def test_talkers_whose_names_end_in_nothing(remixed):
    """Arrays of NumPy would drop null characters at the end."""
    folder, mixtures = remixed
    drawn = [mixtures[number]["mixture"] for number in range(6)]

    def rename(entries):
        for speaker in (s for entry in entries for s in entry["speakers"]):
            speaker["speaker_id"] += "\0"

    edit_json(folder / "train/metadata.json", rename)
    again = remix(folder, seed=5)
    for number in range(6):
        assert torch.equal(again[number]["mixture"], drawn[number])


def test_no_more_talkers_than_there_are(tmp_path):
    """Of two voices in the training data, mixtures of three cannot be made."""
    folder = make_dataset(tmp_path / "data", "--train_samples=1", "--max_speakers=2")
    mixtures = remix(folder)
    assert {len(mixtures[number]["targets"]) for number in range(60)} == {0, 1, 2}


def test_remix_sums_sources_of_different_talkers(remixed):
    """Every target is a rotation in time of a training source, each of another talker."""
    folder, mixtures = remixed
    talker_of = {}
    for entry, _, sources in arrays(folder, "train"):
        for speaker, source in zip(entry["speakers"], sources, strict=True):
            talker_of[np.sort(source, axis=0).tobytes()] = speaker["speaker_id"]
    counts = []
    for number in range(120):
        item = mixtures[number]
        mixture, targets = item["mixture"].numpy(), item["targets"].numpy()
        talkers = [talker_of[np.sort(target, axis=0).tobytes()] for target in targets]
        assert len(set(talkers)) == len(talkers)
        assert mixture.shape == (FRAMES, WIDTH)
        np.testing.assert_allclose(mixture, targets.sum(0), atol=1e-5)
        counts.append(len(talkers))
    assert set(counts) == {0, 1, 2, 3}
    assert counts.count(0) < 0.15 * len(counts)
    assert min(counts.count(n) for n in (1, 2, 3)) > 0.2 * len(counts)  # equally often


# --------------------------------------------------------------------------------------------------
# Datasets of recordings


def test_recordings_on_disk(recordings):
    """Wavs of 24 bits that add up, their texts, where they come from, and no features."""
    assert not list(recordings.rglob("*.npy"))
    about = json.loads((recordings / "dataset.json").read_text())
    assert (about["kind"], about["seed"]) == ("recordings", 42)
    assert about["mixing"]["join"] == [2, 3]
    for split, samples in (("train", 3), ("val", 4)):
        entries, folder = metadata(recordings, split), recordings / split
        assert [entry["id"] for entry in entries] == [f"{split}_{i:05d}" for i in range(samples)]
        for entry in entries:
            assert set(entry) == {
                "id", "num_speakers", "conversation", "mixed_wav", "seconds", "speakers", "overlap"}
            name, count = entry["id"], entry["num_speakers"]
            assert entry["mixed_wav"] == f"mixed/{name}.wav"
            assert len(entry["speakers"]) == count in (1, 2)
            for i, speaker in enumerate(entry["speakers"]):
                assert set(speaker) == {"speaker_id", "text", "wav_file"}
                assert speaker["wav_file"] == f"separated/{name}_speaker_{i}.wav"
            turns = [{k: s[k] for k in ("speaker_id", "text")} for s in entry["speakers"]]
            assert entry["conversation"] == turns
            mixed, rate = soundfile.read(folder / entry["mixed_wav"])
            waves = [soundfile.read(folder / s["wav_file"])[0] for s in entry["speakers"]]
            assert rate == RATE
            assert len(mixed) / RATE == pytest.approx(entry["seconds"], abs=1e-4)
            np.testing.assert_allclose(sum(waves), mixed, atol=1e-6)
            assert soundfile.info(folder / entry["mixed_wav"]).subtype == "PCM_24"
        assert (folder / "utterances.json").is_file()


def test_items_of_recordings(recordings):
    for split in ("train", "val"):
        data = ssm.MultiSpeakerDataset(recordings, split)
        assert data.has_recordings
        assert (data.feature_dim, data.max_speakers, data.is_sum) == (None, 2, False)
        for index, entry in enumerate(metadata(recordings, split)):
            names = [entry["mixed_wav"], *(s["wav_file"] for s in entry["speakers"])]
            waves = [soundfile.read(recordings / split / name)[0] for name in names]
            expected = torch.from_numpy(np.stack(waves)).float()
            assert torch.equal(data[index]["waveforms"], expected)


def with_wav(change, name="mixed/val_00001.wav"):
    def damage(folder):
        path = folder / "val" / name
        path.write_bytes(change(path.read_bytes()))

    return damage


def with_samples(samples, name="mixed/val_00001.wav"):
    def damage(folder):
        samples_ = samples(soundfile.read(folder / "val" / name)[0])
        soundfile.write(folder / "val" / name, samples_, RATE, subtype="FLOAT")

    return damage


def val_entry(**entries):
    return lambda f: edit_json(f / "val/metadata.json", lambda s: s[1].update(entries))


DAMAGED_RECORDINGS = {
    "missing mixture": (lambda f: (f / "val/mixed/val_00001.wav").unlink(), "val_00001.wav"),
    "missing talker": (lambda f: (f / "val/separated/val_00001_speaker_0.wav").unlink(),
                       "val_00001_speaker_0.wav"),
    "missing entry": (lambda f: edit_json(f / "val/metadata.json",
                                          lambda s: s[1].pop("mixed_wav") and s),
                      "misses an entry: 'mixed_wav'"),
    "not audio": (with_wav(lambda b: b"wave"), "cannot read audio from"),
    "broken off": (with_wav(lambda b: b[: len(b) // 2]), "breaks off"),
    "no samples": (with_samples(lambda w: w[:0]), "no samples"),
    "lengths differ": (with_samples(lambda w: w[:-1]), "val_00001 differ in length"),
    "NaN": (with_samples(lambda w: np.r_[w[:-1], np.nan]), "NaN"),
    "outside": (val_entry(mixed_wav="../train/mixed/train_00000.wav"), "outside its folder"),
    "outside, absolute": (val_entry(mixed_wav="/etc/hostname"), "outside its folder"),
    "a number for a file": (val_entry(mixed_wav=3), "metadata.json"),
}


@pytest.mark.parametrize("damage", DAMAGED_RECORDINGS)
def test_damaged_recordings(damage, recordings, tmp_path):
    spoil, words = DAMAGED_RECORDINGS[damage]
    folder = shutil.copytree(recordings, tmp_path / "own")
    spoil(folder)
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        read_all(folder)
    assert words in str(error.value)
    assert len(str(error.value).splitlines()) == 1


# --------------------------------------------------------------------------------------------------
# Remixing recordings


def remix_recordings(folder, **options):
    return remix(folder, ssm.RemixedRecordings, 2, **options)


def slices(whole, part):
    """Where ``part [samples]`` occurs in ``whole [samples]``."""
    windows = np.lib.stride_tricks.sliding_window_view(whole, len(part))
    return np.flatnonzero((windows == part).all(axis=1)).tolist()


def test_remixed_recordings_are_sums_of_talkers_and_more_often_of_many(recordings):
    mixtures, counts = remix_recordings(recordings, seed=3), []
    for number in range(150):
        plan, *_ = mixtures.plan(number)
        counts.append(len(plan.talkers))
        said = {u.audio for t in plan.talkers for u in t.utterances}
        assert len({u.parent for u in said}) == len(plan.talkers)
        if number < 20:
            mixture, *talkers = mixtures[number]["waveforms"]
            assert len(talkers) == len(plan.talkers)
            torch.testing.assert_close(sum(talkers, torch.zeros_like(mixture)), mixture)
            assert mixtures.seconds(number) == pytest.approx(len(mixture) / RATE, abs=1e-4)
    shares = [counts.count(n) / len(counts) for n in (0, 1, 2)]
    assert shares == pytest.approx([0.04, 0.32, 0.64], abs=0.09)


@pytest.mark.parametrize("streams", [4, 7])
def test_as_many_talkers_as_there_are_speakers_or_streams(streams, recordings):
    """The recordings are of five speakers."""
    mixtures = ssm.RemixedRecordings(
        ssm.MultiSpeakerDataset(recordings, "train"), ssm.TrainOptions(seed=3), streams)
    counts = [len(mixtures.plan(number)[0].talkers) for number in range(60)]
    assert max(counts) == mixtures.max_speakers == min(streams, 5)


def test_a_remixed_recording_depends_on_seed_and_number_alone(recordings):
    one, again = (remix_recordings(recordings, seed=3) for _ in range(2))
    other = remix_recordings(recordings, seed=4)
    drawn = [one[number]["waveforms"] for number in range(6)]
    for number in reversed(range(6)):
        assert torch.equal(again[number]["waveforms"], drawn[number])
    assert len({tuple(waves[0].tolist()) for waves in drawn}) == 6
    assert not any(torch.equal(other[i]["waveforms"], drawn[i]) for i in range(6))


@pytest.mark.parametrize("reverb", [0.0, 1.0])
def test_crops_are_parts_without_the_talkers_that_are_silent_there(
    reverb, recordings, tmp_path, monkeypatch
):
    """A talker counts who is heard for more than 0.1 s of the 0.25 s.

    Convolution with a room's response leaves values of about 1e-8 where nobody talks yet.
    """
    response = np.float32(0.01 * np.random.default_rng(0).standard_normal(2000))
    response[40] = 1
    monkeypatch.setattr(mixing, "room_responses", lambda room: [(response, 40)] * 7)
    folder = shutil.copytree(recordings, tmp_path / "own")
    changes = {"reverb": reverb, "max_onset": 2.0}
    edit_json(folder / "dataset.json", lambda about: about["mixing"].update(changes))
    whole = remix_recordings(folder, seed=5)
    cropped = remix_recordings(folder, seed=5, crop_seconds=(0.25, 0.25))
    starts, dropped = set(), 0
    for number in range(40):
        mixture, *talkers = whole[number]["waveforms"].numpy()
        part, *heard = cropped[number]["waveforms"].numpy()
        assert len(part) == min(4000, len(mixture))
        assert cropped.seconds(number) == 0.25
        if not part.any():
            assert not heard
            continue
        start = round(cropped.plan(number)[1] * RATE)
        assert start in slices(mixture, part)
        starts.add(start)
        parts = [talker[start : start + 4000] for talker in talkers]
        expected = [p for p in parts if np.count_nonzero(np.abs(p) > 1e-5) > 1600]
        dropped += len(parts) - len(expected)
        assert len(heard) == len(expected)
        assert all(np.array_equal(a, b) for a, b in zip(heard, expected, strict=True))
    assert len(starts) > 20
    assert dropped > 5


def test_crops_lie_where_all_talkers_talk(recordings, monkeypatch):
    """Two talkers of 2 s overlap or pause for 0.5 s: the middle of the part is there."""
    one = mixing.PlannedTalker((), 1.0, (), 2.0, 0.0, 0.0)
    mixtures, middles, lengths = remix_recordings(recordings, crop_seconds=(0.2, 0.4)), [], []
    for second in (1.5, 2.5):
        plan = mixing.PlannedMixture((one, one._replace(onset=second)), second + 2, 0.0)
        monkeypatch.setattr(mixing, "plan_mixture", lambda *_, plan=plan: plan)
        for number in range(200):
            _, start, length = mixtures.plan(number)
            middles.append((start + length / 2 - min(second, 2)) / 0.5)
            lengths.append(length)
    assert 0 <= min(middles) < 0.1
    assert 0.9 < max(middles) <= 1
    assert 0.2 <= min(lengths) < 0.22
    assert 0.38 < max(lengths) <= 0.4
    monkeypatch.setattr(mixing, "plan_mixture", lambda *_: plan._replace(talkers=()))
    parts = [mixtures.plan(number) for number in range(100)]
    assert all(0 <= start <= 4.5 - length for _, start, length in parts)


def test_short_mixtures_are_not_cropped(recordings):
    whole, same = (remix_recordings(recordings, crop_seconds=s) for s in (None, (60.0, 60.0)))
    assert all(torch.equal(whole[i]["waveforms"], same[i]["waveforms"]) for i in range(10))


def test_remixed_recordings_stay_within_max_seconds(speech_dir, tmp_path):
    """As the dataset does, also where reverberation goes on after the last word."""
    argv = [f"--speech_dir={speech_dir}", f"--output_dir={tmp_path / 'data'}", "--max_speakers=2",
            "--train_samples=1", "--val_samples=1", "--split_by=utterance", "--reverb",
            "--max_seconds=0.3"]
    assert generator.main(argv) == 0
    mixtures = remix_recordings(tmp_path / "data")
    assert max(mixtures[i]["waveforms"].shape[1] for i in range(4)) == 4800


def test_utterances_are_read_when_drawn(recordings, tmp_path):
    """An older listing, without a line for each, is read whole; both say the same."""
    folder = shutil.copytree(recordings, tmp_path / "own")
    lined = generator.load_source(folder, "train").by_speaker
    listing = folder / "train/utterances.json"
    rows = json.loads(listing.read_text())
    assert sum(map(len, lined.values())) == len(rows) > 5
    before = {speaker: list(talker) for speaker, talker in lined.items()}
    assert [u.text for talker in before.values() for u in talker] == [row["text"] for row in rows]
    listing.write_text(json.dumps(rows, indent=1))
    assert generator.load_source(folder, "train").by_speaker == before
    listing.unlink()
    with pytest.raises(FileNotFoundError):
        next(iter(lined.values()))[0]


def test_a_transcript_of_another_encoding_is_named(speech_dir, tmp_path, capsys):
    folder = shutil.copytree(speech_dir, tmp_path / "speech")
    beside = next(folder.rglob("*.wav")).with_suffix(".txt")
    beside.write_bytes("caf\u00e9".encode("latin-1"))
    assert generator.main([f"--speech_dir={folder}", f"--output_dir={tmp_path / 'data'}"]) == 2
    assert f"{beside} is not UTF-8" in capsys.readouterr().err


def test_recordings_that_are_gone(recordings, tmp_path):
    folder = shutil.copytree(recordings, tmp_path / "own")
    edit_json(folder / "train/utterances.json", lambda rows: rows[0].update(audio="/gone.wav"))
    with pytest.raises(FileNotFoundError, match="/gone.wav, which is gone"):
        remix_recordings(folder)


# --------------------------------------------------------------------------------------------------
# Batches


def test_collate_pads_recordings():
    items = [{"waveforms": torch.full((1 + n, 300 + n), float(n + 1))} for n in (2, 0, 1)]
    batch = ssm.collate(items, 3)
    assert batch["waveforms"].shape == (3 + 1 + 2, 302)
    assert batch["rows"].tolist() == [0, 1, 2, 4, 8, 9]
    assert batch["lengths"].tolist() == [302, 300, 301]
    assert batch["speaker_mask"].tolist() == [
        [True, True, False], [False, False, False], [True, False, False]]
    for waves, item in zip(ssm.by_mixture(batch["waveforms"], batch), items, strict=True):
        rows, samples = item["waveforms"].shape
        assert torch.equal(waves[:rows, :samples], item["waveforms"])
        assert waves.sum() == item["waveforms"].sum()  # the rest is zero


@pytest.mark.parametrize("bins", [80, 128])
def test_spectrograms_of_a_batch_are_those_of_each_waveform(bins):
    """Zeros follow each waveform, whatever else is in the batch."""
    items = [{"waveforms": torch.randn(1 + n, samples)}
             for n, samples in ((1, 8000), (2, 5130), (0, 100))]
    batch = ssm.add_spectrograms(ssm.collate(items, 2), bins)
    assert batch["mixture"].shape == (3, 50, bins)
    assert batch["targets"].shape == (3, 2, 50, bins)
    assert batch["frame_mask"].sum(1).tolist() == [50, 32, 1]
    assert batch["frame_mask"][1, :32].all()
    for b, item in enumerate(items):
        frames = batch["frame_mask"][b]
        padded = torch.nn.functional.pad(item["waveforms"], (0, 400))
        alone = audio.floor_log_mel(audio.log_mel(padded, bins))[:, : int(frames.sum())]
        talkers = len(item["waveforms"]) - 1
        torch.testing.assert_close(batch["mixture"][b, frames], alone[0], rtol=0, atol=1e-5)
        torch.testing.assert_close(
            batch["targets"][b, :talkers, frames], alone[1:], rtol=0, atol=1e-5)
        assert not batch["targets"][b, talkers:].any()


def test_talkers_get_the_voices_that_are_planned(recordings, tmp_path):
    """Each keeps its power, mixtures stay sums, and noise stays as it is."""
    folder = shutil.copytree(recordings, tmp_path / "own")
    plain = remix_recordings(folder, seed=3)
    changes = {"formants": (0.85, 1.18), "equalizer": 6.0}
    edit_json(folder / "dataset.json", lambda about: about["mixing"].update(changes))
    voiced = remix_recordings(folder, seed=3)
    numbers = [n for n in range(40) if len(plain.plan(n)[0].talkers) == 1][:4] + [
        n for n in range(40) if not plain.plan(n)[0].talkers][:1]
    before, items = ([data[n] for n in numbers] for data in (plain, voiced))
    for a, b, number in zip(before, items, numbers, strict=True):
        assert torch.equal(a["waveforms"], b["waveforms"])
        planned = [talker.voice for talker in voiced.plan(number)[0].talkers]
        assert b.get("voices", torch.zeros(0)).tolist() == torch.tensor(planned).tolist()
    hiss = 0.01 * torch.randn(items[1]["waveforms"].shape[1])
    items[1]["waveforms"][0] += hiss
    batch = ssm.collate(items, 2)
    assert batch["voices"].shape == (len(batch["rows"]), 9)
    spectra = audio.stft(batch["waveforms"])
    changed = ssm.change_talkers(spectra, batch)
    powers = [x.abs().square().sum((1, 2))[1::2] for x in (spectra, changed)]
    torch.testing.assert_close(*powers)
    differences = (changed - spectra)[:8]
    assert differences[1::2].abs().amax((1, 2)).min() > 0.01
    torch.testing.assert_close(differences[::2], differences[1::2])
    assert torch.equal(changed[8:], spectra[8:])  # nobody talks
    voiced = ssm.add_spectrograms(batch)
    del batch["voices"]
    plain = ssm.add_spectrograms(batch)
    assert (plain["targets"] - voiced["targets"]).abs().max() > 0.1


def test_compact_batches_change_no_valid_frame():
    """Packed for a GPU, a batch is that of a CPU but for rounding; features are not padded."""
    items = [{"waveforms": 0.05 * torch.randn(1 + n, samples)}
             for n, samples in ((1, 8000), (2, 5130))]
    for item in items:
        item["voices"] = torch.tensor([[1.1, 3.0, -3.0]]).expand(len(item["waveforms"]) - 1, -1)
    plain, packed = (ssm.add_spectrograms(ssm.collate(items, 2, how)) for how in (False, True))
    assert packed["waveforms"].shape == (32, 16000)
    assert packed["waveforms"].dtype == torch.float16
    assert packed["rows"].tolist() == [0, 1, 3, 4, 5] + [6] * 27
    mask = plain["frame_mask"]
    assert torch.equal(packed["frame_mask"][:, :50], mask)
    assert not packed["frame_mask"][:, 50:].any()
    for name in ("mixture", "targets"):
        a, b = (batch[name].flatten(0, -3) for batch in (plain, packed))
        rows = mask.repeat_interleave(len(a) // 2, 0)
        torch.testing.assert_close(b[:, :50][rows], a[rows], rtol=0, atol=5e-3)
    feature_item = {"mixture": torch.randn(9, 4), "targets": torch.randn(1, 9, 4)}
    assert ssm.collate([feature_item], 2, True)["mixture"].shape == (1, 9, 4)


def test_batch_of_features_has_no_spectrograms_made(dataset):
    batch = ssm.collate([ssm.MultiSpeakerDataset(dataset, "train")[0]], 3)
    assert ssm.add_spectrograms(batch) is batch


def test_batches_of_like_length():
    """Batches hold neighbours in length out of sixteen batches' worth, and come in any order."""
    lengths = torch.rand(200, generator=torch.Generator().manual_seed(0)).tolist()
    order = torch.randperm(200, generator=torch.Generator().manual_seed(1)).tolist()
    random = torch.Generator().manual_seed(2)
    batches = list(ssm.batches_of_like_length(order, lengths.__getitem__, 5, random))
    assert [len(batch) for batch in batches] == [5] * 40
    assert sorted(sum(batches, [])) == list(range(200))
    spans = [max(group) - min(group) for group in ([lengths[i] for i in b] for b in batches)]
    assert np.mean(spans[:32]) < 0.1  # 0.67 at random
    assert set(sum(batches[:16], [])) == set(order[:80])
    means = [np.mean([lengths[i] for i in batch]) for batch in batches[:16]]
    assert means != sorted(means)


def numbers(dataset, epoch, seed=1):
    batches = ssm.EpochBatches(dataset, 5, seed, epoch)
    drawn = list(batches)
    assert len(drawn) == len(batches)
    return drawn


def test_epochs_shuffle_a_fixed_dataset(dataset):
    data = ssm.MultiSpeakerDataset(dataset, "train")
    data.samples = data.samples * 3
    first, second = numbers(data, 0), numbers(data, 1)
    assert [len(batch) for batch in first] == [5, 5, 2]
    for epoch in (first, second):
        assert sorted(sum(epoch, [])) == list(range(12))
    assert first != second
    assert first == numbers(data, 0) != numbers(data, 0, seed=7)


@pytest.mark.parametrize("kind", ["features", "recordings"])
def test_epochs_have_mixtures_of_their_own(kind, dataset, recordings):
    if kind == "features":
        data = remix(dataset, mixtures_per_epoch=12)
    else:
        data = remix_recordings(recordings, mixtures_per_epoch=12)
    for epoch in (0, 1, 7):
        drawn = numbers(data, epoch)
        assert sorted(map(len, drawn)) == [2, 5, 5]
        assert sorted(sum(drawn, [])) == list(range(12 * epoch, 12 * epoch + 12))
        assert drawn == numbers(data, epoch)
    assert [[n - 12 for n in batch] for batch in numbers(data, 1)] != numbers(data, 0)


def test_parts_are_sorted_by_length_without_a_plan(recordings, monkeypatch):
    """A plan takes a millisecond, and one process sorts for all that mix."""
    monkeypatch.setattr(mixing, "plan_mixture", None)
    data = remix_recordings(recordings, mixtures_per_epoch=20, crop_seconds=(0.1, 0.4))
    assert sorted(map(len, numbers(data, 0))) == [5] * 4


def test_epochs_of_recordings_have_batches_of_like_length(recordings):
    data = remix_recordings(recordings, mixtures_per_epoch=80)
    batches = [[data.seconds(n) for n in batch] for batch in numbers(data, 0)]
    everything = sum(batches, [])
    mean_span = np.mean([max(batch) - min(batch) for batch in batches])
    assert mean_span < 0.15 * (max(everything) - min(everything))


@pytest.mark.parametrize("workers", [0, 1])
def test_loader(workers, recordings):
    """Worker processes change nothing; where they are spawned, what collates is pickled."""
    data = remix_recordings(recordings, mixtures_per_epoch=8)
    loader = ssm.make_loader(data, 3, 2, workers=workers, seed=1, epoch=4)
    batches = list(loader)
    assert len(batches) == 3
    for batch, drawn in zip(batches, ssm.EpochBatches(data, 3, 1, 4), strict=True):
        expected = ssm.collate([data[number] for number in drawn], 2)
        assert all(torch.equal(batch[key], expected[key]) for key in expected)
    pickle.dumps((loader.collate_fn, loader.dataset))


def test_loader_without_a_seed_keeps_the_order(dataset):
    data = ssm.MultiSpeakerDataset(dataset, "train")
    (first, second) = ssm.make_loader(data, 2, 3)
    for batch, items in ((first, (0, 1)), (second, (2, 3))):
        assert torch.equal(batch["mixture"], torch.stack([data[i]["mixture"] for i in items]))


# --------------------------------------------------------------------------------------------------
# Recordings of other sources, splits and encoders


@pytest.fixture(scope="module")
def ten_speakers(tmp_path_factory):
    """Ten speakers with two recordings each, at three rates, transcripts beside them."""
    folder = tmp_path_factory.mktemp("speech")
    for speaker in range(10):
        for take in range(2):
            rate = (8000, 16000, 44100)[(speaker + take) % 3]
            samples = sine(0.15 + 0.02 * speaker, 120 + 35 * speaker + 5 * take, rate)
            path = wav(folder / f"speaker{speaker}" / f"{take}.wav", samples, rate)
            path.with_suffix(".txt").write_text(f"take {take} of {speaker}\n")
    return folder


@pytest.fixture(scope="module")
def manifest(ten_speakers, tmp_path_factory):
    """The same recordings in a manifest that gives the split: even speakers train."""
    path = tmp_path_factory.mktemp("manifest") / "list.jsonl"
    rows = [
        {"audio": str(audio), "speaker": audio.parent.name, "text": f"said {audio.stem}",
         "split": "val" if int(audio.parent.name[-1]) % 2 else "train",
         "corpus": f"corpus {int(audio.parent.name[-1]) // 3}"}
        for audio in sorted(ten_speakers.rglob("*.wav"))
    ]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    return path


def speech_flags(speech, encoder, output, *more):
    return [f"--speech_dir={speech}", f"--encoder={encoder}", f"--output_dir={output}",
            "--train_samples=3", "--val_samples=2", "--max_speakers=2", "--device=cpu", *more]


def make_speech(*arguments):
    assert generator.main(speech_flags(*arguments)) == 0
    return arguments[2]


def speakers(folder, split):
    return {s["speaker_id"] for e in metadata(folder, split) for s in e["speakers"]}


@pytest.mark.parametrize(
    ("family", "layer", "rate"),
    [("qwen", None, 25), ("qwen", 1, 50), ("whisper", None, 50), ("whisper", 0, 50)],
)
def test_speech(family, layer, rate, ten_speakers, tmp_path, request):
    encoder = request.getfixturevalue(f"{family}_folder")
    flags = [] if layer is None else [f"--layer={layer}"]
    folder = make_speech(ten_speakers, encoder, tmp_path / "data", *flags)
    about = json.loads((folder / "dataset.json").read_text())
    assert about["kind"] == "speech"
    assert (about["encoder"], about["layer"]) == (str(encoder), layer)
    assert (about["frame_rate"], about["seed"]) == (rate, 42)
    assert f"--encoder={encoder}" in about["command_line"]
    assert not speakers(folder, "train") & speakers(folder, "val")
    for split in ("train", "val"):
        for entry, mixture, sources in arrays(folder, split):
            waves = [soundfile.read(folder / split / s["wav_file"])[0] for s in entry["speakers"]]
            mixed, wav_rate = soundfile.read(folder / split / entry["mixed_wav"])
            assert wav_rate == RATE
            assert mixture.shape == sources.shape[1:]
            assert abs(len(mixture) - len(mixed) / RATE * rate) <= 1.5
            np.testing.assert_allclose(sum(waves), mixed, atol=1e-6)
            for speaker, wave in zip(entry["speakers"], waves, strict=True):
                number = speaker["speaker_id"].removeprefix("speaker")
                assert speaker["text"] in (f"take 0 of {number}", f"take 1 of {number}")
                level = 20 * np.log10(np.sqrt(np.mean(wave[wave != 0] ** 2)) / 0.05)
                assert -2.0 < level < 2.0  # 3 dB between talkers, so 1.5 dB either way
    assert not ssm.MultiSpeakerDataset(folder, "train").is_sum


def test_speech_features_are_those_of_the_written_audio(ten_speakers, whisper_folder, tmp_path):
    folder = make_speech(ten_speakers, whisper_folder, tmp_path / "data")
    encoder = audio.load_audio_encoder(str(whisper_folder))
    for entry, mixture, sources in arrays(folder, "train"):
        mixed, *alone = [audio.read_audio(folder / "train" / name) for name in (
            entry["mixed_wav"], *(s["wav_file"] for s in entry["speakers"]))]
        for features, samples in ((mixture, mixed), *zip(sources, alone, strict=True)):
            np.testing.assert_allclose(encoder.encode([samples])[0], features, atol=0.02)


def test_speech_same_seed_same_bytes(manifest, qwen_folder, tmp_path):
    folders = [
        make_speech(manifest, qwen_folder, tmp_path / name, f"--seed={seed}")
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    ]
    first, same, other = map(contents, folders)
    waves = [content for name, content in first.items() if name.endswith(".wav")]
    assert not any(b"PEAK" in wave[:200] for wave in waves)  # libsndfile writes the time there
    assert first == same
    assert first["train/mixed/train_00000.wav"] != other["train/mixed/train_00000.wav"]


def test_manifest_gives_the_split(manifest, qwen_folder, tmp_path):
    folder = make_speech(manifest, qwen_folder, tmp_path / "data", "--join", "2", "2")
    assert all(int(name[-1]) % 2 == 0 for name in speakers(folder, "train"))
    assert all(int(name[-1]) % 2 == 1 for name in speakers(folder, "val"))
    for entry in metadata(folder, "train"):
        for speaker in entry["speakers"]:
            words = speaker["text"].split()
            assert words[::2] == ["said", "said"]


def test_manifest_gives_the_corpus(manifest, tmp_path):
    argv = [flag for flag in speech_flags(manifest, "", tmp_path / "data") if "encoder" not in flag]
    assert generator.main(argv) == 0
    names, corpora, _ = generator.load_source(tmp_path / "data", "train").speakers
    assert names == [f"speaker{i}" for i in range(0, 10, 2)]
    assert corpora.tolist() == [f"corpus {i // 3}" for i in range(0, 10, 2)]


def test_manifest_that_gives_some_splits_is_refused(manifest, tmp_path, capsys):
    rows = [json.loads(line) for line in manifest.read_text().splitlines() if line]
    for value, words in ((None, "has 'none'"), ("test", "has 'test'")):
        rows[3]["split"] = value
        (tmp_path / "list.jsonl").write_text("\n".join(map(json.dumps, rows)))
        argv = [f"--speech_dir={tmp_path / 'list.jsonl'}", f"--output_dir={tmp_path / 'data'}"]
        assert_fails(capsys, argv, "train or val for every line", rows[3]["audio"], words,
                     main=generator.main)


def test_recording_in_both_splits_of_a_manifest_is_refused(manifest, tmp_path, capsys):
    rows = [json.loads(line) for line in manifest.read_text().splitlines() if line]
    twice = {**rows[0], "split": "val"}
    (tmp_path / "list.jsonl").write_text("\n".join(map(json.dumps, [*rows, twice])))
    argv = [f"--speech_dir={tmp_path / 'list.jsonl'}", f"--output_dir={tmp_path / 'data'}"]
    assert_fails(capsys, argv, twice["audio"], "in both splits", main=generator.main)
    (tmp_path / "again.wav").symlink_to(manifest.parent / rows[0]["audio"])
    os.link(manifest.parent / rows[0]["audio"], tmp_path / "and_again.wav")
    for name in ("again.wav", "and_again.wav"):
        twice["audio"] = str(tmp_path / name)
        (tmp_path / "list.jsonl").write_text("\n".join(map(json.dumps, [*rows, twice])))
        assert_fails(capsys, argv, rows[0]["audio"], "in both splits", main=generator.main)


@pytest.mark.parametrize("split_by", ["speaker", "utterance"])
def test_recording_in_both_splits_by_chance_is_refused(split_by, manifest, tmp_path, capsys):
    """One recording is listed for every speaker, with another text each."""
    rows = [json.loads(line) for line in manifest.read_text().splitlines() if line]
    rows = [row | {"split": None} for row in rows]
    rows += [row | {"audio": rows[0]["audio"], "text": str(i)} for i, row in enumerate(rows)]
    (tmp_path / "list.jsonl").write_text("\n".join(map(json.dumps, rows)))
    argv = [f"--speech_dir={tmp_path / 'list.jsonl'}", f"--output_dir={tmp_path / 'data'}",
            f"--split_by={split_by}"]  # fmt: skip
    assert_fails(capsys, argv, rows[0]["audio"], "in both splits", main=generator.main)


def test_values_of_a_manifest(manifest, tmp_path, capsys):
    """As Windows writes it, with labels that are numbers."""
    row = json.loads(manifest.read_text().splitlines()[0])
    rows = [row | {"text": text} for text in (0, 1, None, "two")]
    path = tmp_path / "list.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8-sig")
    assert [u.text for u in generator.read_speech(path)] == ["0", "1", "", "two"]
    path.write_text(json.dumps(row | {"speaker": None}))
    assert_fails(capsys, [f"--speech_dir={path}"], "line 1", "speaker is empty",
                 main=generator.main)


def test_librispeech_layout(tmp_path, ten_speakers):
    """Speaker, chapter, FLAC files and one list of transcripts per chapter."""
    for speaker in ("19", "26"):
        folder = tmp_path / "speech" / speaker / "198"
        for take in range(2):
            wav(folder / f"{speaker}-198-{take}.flac", sine(0.2, 200 + take))
        lines = [f"{speaker}-198-{take} SAID {take} BY {speaker}" for take in range(2)]
        (folder / f"{speaker}-198.trans.txt").write_text("\n".join(lines) + "\n")
    read = generator.read_speech(tmp_path / "speech")
    assert [(u.speaker, u.text) for u in read] == [
        (s, f"SAID {take} BY {s}") for s in ("19", "26") for take in range(2)]
    assert [u.audio.name for u in read[:2]] == ["19-198-0.flac", "19-198-1.flac"]
    (tmp_path / "linked").mkdir()
    for speaker in ("19", "26"):
        (tmp_path / "linked" / speaker).symlink_to(tmp_path / "speech" / speaker)
    linked = generator.read_speech(tmp_path / "linked")
    assert [(u.speaker, u.text) for u in linked] == [(u.speaker, u.text) for u in read]
    (tmp_path / "deep/all").mkdir(parents=True)
    (tmp_path / "deep/all/below").symlink_to(tmp_path / "speech")
    (tmp_path / "deep/all/again").symlink_to(tmp_path / "deep")  # round in a circle
    deep = generator.read_speech(tmp_path / "deep")
    assert sorted(u.text for u in deep) == sorted(u.text for u in read)
    (tmp_path / "corpus").mkdir()
    (tmp_path / "speech").rename(tmp_path / "corpus/dev-clean")  # all subsets at once
    assert {u.speaker for u in generator.read_speech(tmp_path / "corpus")} == {"19", "26"}


def test_a_dataset_moves_with_the_recordings_in_its_folder(ten_speakers, tmp_path, monkeypatch):
    """As those copied from the hub are; the paths of other recordings stay as they were."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ten_speakers, "data/copy")
    for name, speech in (("data", "data/copy"), ("other", ten_speakers)):
        assert generator.main([f"--speech_dir={speech}", f"--output_dir={name}",
                               "--train_samples=1", "--val_samples=1", "--max_speakers=2"]) == 0
    Path("data").rename("moved")
    Path("other").rename("moved_other")
    for name, home in (("moved", Path("moved/copy")), ("moved_other", ten_speakers)):
        talkers = generator.load_source(name, "train").by_speaker
        paths = [utterance.audio for group in talkers.values() for utterance in group]
        assert paths and all(path.is_file() and path.is_relative_to(home) for path in paths)


def test_a_dataset_in_the_folder_of_its_speech(ten_speakers, tmp_path):
    speech = Path(shutil.copytree(ten_speakers, tmp_path / "speech"))
    listed = generator.read_speech(speech)
    assert generator.main([f"--speech_dir={speech}", f"--output_dir={speech}", "--train_samples=1",
                           "--val_samples=1", "--max_speakers=2"]) == 0
    assert generator.read_speech(speech) == listed


def test_a_listing_that_is_replaced_meanwhile(recordings, tmp_path):
    folder = shutil.copytree(recordings, tmp_path / "data")
    talkers = generator.load_source(folder, "train").by_speaker
    listing = folder / "train/utterances.json"
    content = listing.read_bytes()
    listing.unlink()
    (tmp_path / "keeps the number of the file").touch()
    listing.write_bytes(content)  # its lines may be another talker's
    with pytest.raises(ValueError, match=f"{listing} was replaced"):
        next(iter(talkers.values()))[0]


def test_neither_datasets_nor_hidden_files_are_speech(tmp_path, capsys):
    """A dataset in the folder that it was made of, what macOS leaves beside a file, and streams."""
    wav(tmp_path / "a/take.wav", sine(0.2, 200))
    (tmp_path / "a/take.txt").write_text("said", encoding="utf-8-sig")
    wav(tmp_path / "a/._take.wav", sine(0.2, 200))
    wav(tmp_path / "nobody.wav", sine(0.2, 200))
    wav(tmp_path / ".ipynb_checkpoints/a/take.wav", sine(0.2, 200))
    wav(tmp_path / "b/speaker_1.wav", sine(0.2, 200))  # no separation.json beside it
    wav(tmp_path / "a/separated/take.wav/speaker_1.wav", sine(0.2, 200))
    (tmp_path / "a/separated/take.wav/separation.json").write_text("{}")
    for name in ("val/mixed/val_0", "fetched_speech/digits/0"):
        wav(tmp_path / f"multi_speaker_data/{name}.wav", sine(0.2, 300))
    for name in ("multi_speaker_data/dataset.json", "multi_speaker_data/train/metadata.json",
                 "a/dataset.json"):  # the last one is somebody else's
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    assert [(u.audio, u.text) for u in generator.read_speech(tmp_path)] == [
        (tmp_path / "a/take.wav", "said"), (tmp_path / "b/speaker_1.wav", "")]
    assert capsys.readouterr().out == (
        f"left out the recordings in no speaker's folder, but in {tmp_path} itself: 1\n")


def write_parquet(folder, recordings, **columns):
    """A dataset as the Hugging Face hub keeps it: the bytes of the files and other columns."""
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pytest.importorskip("datasets")
    audio = [{"path": path.name, "bytes": path.read_bytes()} for path in recordings]
    folder.mkdir(parents=True)
    parquet.write_table(arrow.table({"audio": audio, **columns}), folder / "train-00000.parquet")
    return folder


def test_hugging_face_dataset_is_copied_once(speech_dir, tmp_path):
    files = sorted(speech_dir.glob("s*/*.wav"))
    speakers = [int(path.parent.name[1:]) for path in files]
    texts = [path.with_suffix(".txt").read_text() for path in files]
    source = write_parquet(tmp_path / "hub", files, speaker_id=speakers, sentence=texts)
    argv = [f"--speech_dir={source}", f"--output_dir={tmp_path / 'data'}", "--train_samples=2",
            "--val_samples=2", "--min_speakers=1", "--max_speakers=1", "--seed=3"]
    assert generator.main(argv) == 0
    (source / "train-00000.parquet").write_bytes(b"gone")  # not read again
    first = contents(tmp_path / "data")
    assert generator.main(argv) == 0
    assert contents(tmp_path / "data") == first

    copied = generator.read_speech(next((tmp_path / "data/fetched_speech").iterdir()))
    assert [(u.speaker, u.text) for u in copied] == list(
        zip(map(str, speakers), texts, strict=True))
    assert [u.audio.read_bytes() for u in copied] == [path.read_bytes() for path in files]


def test_hugging_face_dataset_without_speakers_is_refused(speech_dir, tmp_path, capsys):
    files = sorted(speech_dir.glob("s0/*.wav"))
    source = write_parquet(tmp_path / "hub", files, text=["said"] * len(files))
    argv = [f"--speech_dir={source}", f"--output_dir={tmp_path / 'data'}"]
    for _ in range(2):  # what was fetched in part is not taken for whole
        assert_fails(capsys, argv, source, "row 0 has no audio, or no speaker as one of speaker, ",
                     "its columns are audio, text", main=generator.main)
    assert not (tmp_path / "data/train").exists()


def test_rows_of_a_hugging_face_dataset(tmp_path):
    """Undecoded audio is bytes or an address; a file on this disk is not taken from a stranger."""
    wave = wav(tmp_path / "there.wav", sine(0.2, 300)).read_bytes()
    rows = [{"audio": {"bytes": wave, "path": "a.flac"}, "speaker": None, "client_id": 7},
            {"audio": {"bytes": wave, "path": None}, "speaker": 8, "text": "one"}]
    generator.write_recordings(rows, tmp_path / "copied")
    found = generator.read_speech(tmp_path / "copied")
    assert [(u.audio.name, u.speaker, u.text) for u in found] == [
        ("00000000.flac", "7", ""), ("00000001.wav", "8", "one")]
    local = {"bytes": None, "path": str(tmp_path / "there.wav")}
    for bad, words in (([], "no rows"), ([{"speaker": 8}], "row 0 has no audio"),
                       ([{"audio": local, "speaker": 8}], "row 0"),
                       ([{"audio": None, "speaker": 8}], "row 0")):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            generator.write_recordings(bad, tmp_path / "bad")
        assert not (tmp_path / "bad/manifest.jsonl").exists()


def test_hugging_face_datasets_have_copies_of_their_own(tmp_path, monkeypatch, capsys):
    datasets = pytest.importorskip("datasets")
    asked = []

    def load(name, config, **more):
        asked.append((name, config, more["split"]))
        raise OSError("no network")

    monkeypatch.setattr(datasets, "load_dataset", load)
    for source in ("a/b", "a/b:c", "a/b:c:d"):
        with pytest.raises(ValueError, match=f"^{source} is no folder .*: no network"):
            generator.fetch_speech(source, tmp_path)
    assert asked == [("a/b", None, "train"), ("a/b", "c", "train"), ("a/b", "c", "d")]
    for source in ("a/b_c", "a/b:c"):
        folder = tmp_path / generator.quote(source, safe="")
        folder.mkdir()
        (folder / "manifest.jsonl").touch()
        assert generator.fetch_speech(source, tmp_path) == folder
        assert f"using the copy of {source} in {folder}" in capsys.readouterr().out


@pytest.mark.parametrize("source, is_one", [
    ("openslr/librispeech_asr:clean:train.100", True), ("fsdd/fsdd", True), ("speech", False),
    ("/data/speech", False), ("here/speech", False), ("nowhere/speech/train", False)])  # fmt: skip
def test_names_of_hub_datasets(source, is_one, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    assert generator.is_hub_dataset(source) == is_one


def test_speakers_may_be_shared(ten_speakers, qwen_folder, tmp_path):
    flags = ["--split_by=utterance", "--max_speakers=7", "--min_speakers=7"]
    folder = make_speech(ten_speakers, qwen_folder, tmp_path / "data", *flags)
    assert speakers(folder, "train") & speakers(folder, "val")


def broken_manifest(line):
    def make(folder):
        (folder / "manifest.jsonl").write_text(line + "\n")

    return make


def broken_wav(content):
    """A speech folder in which every recording has this content (bytes, or samples)."""

    def make(folder):
        for speaker in range(10):
            path = folder / f"speaker{speaker}" / "0.wav"
            if isinstance(content, bytes):
                path.parent.mkdir()
                path.write_bytes(content)
            else:
                wav(path, content)

    return make


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda folder: None, "no recordings"),
        (lambda folder: wav(folder / "one/0.wav", sine(0.1, 200)), "speakers"),
        (broken_manifest("not json"), "manifest.jsonl, line 1"),
        (broken_manifest('{"audio": "a.wav"}'), "line 1"),
        (broken_manifest('["a.wav", "x"]'), "line 1"),
        (broken_manifest('{"audio": "gone.wav", "speaker": "x"}'), "gone.wav"),
        (broken_wav(b"no audio at all"), "cannot read audio"),
        (broken_wav(np.zeros(0, np.float32)), "no samples"),
    ],
)
def test_bad_speech(make, words, qwen_folder, tmp_path, capsys):
    (tmp_path / "speech").mkdir()
    make(tmp_path / "speech")
    argv = speech_flags(tmp_path / "speech", qwen_folder, tmp_path / "data")
    assert_fails(capsys, argv, words, main=generator.main)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--layer=3"], "layer must be 0 to 2"),
        (["--layer=-1"], "layer must be 0 to 2"),
        (["--max_speakers=3"], "--split_by"),
        (["--device=tpu"], "tpu"),
        (["--encoder=/no/such/model"], "/no/such/model"),
    ],
)
def test_bad_speech_arguments(flags, words, ten_speakers, qwen_folder, tmp_path, capsys):
    argv = speech_flags(ten_speakers, qwen_folder, tmp_path / "data", *flags)
    assert_fails(capsys, argv, words, main=generator.main)


def test_silent_recordings_make_no_nan(tmp_path, qwen_folder, capsys):
    broken_wav(np.zeros(2000, np.float32))(tmp_path / "speech")
    folder = make_speech(tmp_path / "speech", qwen_folder, tmp_path / "data")
    assert capsys.readouterr().out.count("recordings without any sound count as talkers") == 1
    read_all(folder)


def test_features_of_an_encoder_are_no_sum(own_dataset):
    edit_json(own_dataset / "dataset.json", lambda about: about.update(kind="speech"))
    assert not ssm.MultiSpeakerDataset(own_dataset, "train").is_sum


def test_one_talker_alone_says_nothing_of_sums(own_dataset):
    """Of a dataset of other features, in no dataset.json, the first mixture of several decides."""
    def start_with_one(rows):
        rows[0] |= {"num_speakers": 1, "speakers": rows[0]["speakers"][:1],
                    "mixed_audio": rows[0]["speakers"][0]["feature_file"]}

    edit_json(own_dataset / "train/metadata.json", start_with_one)
    (own_dataset / "dataset.json").unlink()
    assert ssm.MultiSpeakerDataset(own_dataset, "train").is_sum
    for path in (own_dataset / "train/mixed").iterdir():
        np.save(path, 2 * np.load(path))
    assert not ssm.MultiSpeakerDataset(own_dataset, "train").is_sum
