"""The generator, the dataset class and what both say to bad input."""

import json
import shutil
from itertools import pairwise

import numpy as np
import pytest
import soundfile
import torch
from conftest import FRAMES, RATE, WIDTH, assert_fails, edit_json, make_dataset, sine, train_flags
from conftest import write_wav as wav

import generate_multi_speaker_dataset as generator
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


def test_foreign_folder_is_not_replaced(tmp_path, capsys):
    mine = tmp_path / "data/train/mine.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    argv = ["--train_samples=1", "--val_samples=1", f"--output_dir={tmp_path / 'data'}"]
    assert_fails(capsys, argv, mine.parent, "--output_dir", main=generator.main)
    assert mine.read_text() == "mine"


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
        (["--speech_dir=somewhere"], "--encoder"),
        (["--speech_dir=somewhere", "--encoder=x"], "no speech at somewhere"),
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


def test_collate_pads():
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
        "mixed_audio",
    ),
    "width in words": (with_entry("feature_dim", "wide"), "metadata.json"),
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
}  # fmt: skip


def read_all(folder):
    for split in ("train", "val"):
        items = ssm.MultiSpeakerDataset(folder, split)
        for index in range(len(items)):
            items[index]


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_dataset(damage, own_dataset, tmp_path, capsys):
    spoil, words = DAMAGE[damage]
    spoil(own_dataset)
    with pytest.raises((ssm.InputError, FileNotFoundError)) as error:
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
    return folder, ssm.RemixedFeatures(ssm.MultiSpeakerDataset(folder, "train"), 3, 5, length=6)


def test_remix_is_deterministic(remixed):
    folder, mixtures = remixed
    again = ssm.RemixedFeatures(ssm.MultiSpeakerDataset(folder, "train"), 3, seed=5)
    other = ssm.RemixedFeatures(ssm.MultiSpeakerDataset(folder, "train"), 3, seed=6)
    assert len(again) == 120  # a small dataset is mixed more often than it has mixtures
    mixtures.epoch = again.epoch = other.epoch = 2
    drawn = [mixtures[i]["mixture"] for i in range(len(mixtures))]
    assert len(mixtures) == 6
    for index in reversed(range(6)):  # whatever the order of access
        assert torch.equal(again[index]["mixture"], drawn[index])
    assert sum(torch.equal(other[i]["mixture"], drawn[i]) for i in range(6)) <= 1
    assert not any(torch.equal(a, b) for a, b in pairwise(drawn))
    mixtures.epoch = 3
    assert sum(torch.equal(mixtures[i]["mixture"], drawn[i]) for i in range(6)) <= 1


def test_remix_sums_sources_of_different_talkers(remixed):
    """Every target is a rotation in time of a training source, each of another talker."""
    folder, mixtures = remixed
    talker_of = {}
    for entry, _, sources in arrays(folder, "train"):
        for speaker, source in zip(entry["speakers"], sources, strict=True):
            talker_of[np.sort(source, axis=0).tobytes()] = speaker["speaker_id"]
    counts = []
    for mixtures.epoch in range(20):
        for index in range(len(mixtures)):
            item = mixtures[index]
            mixture, targets = item["mixture"].numpy(), item["targets"].numpy()
            talkers = [talker_of[np.sort(target, axis=0).tobytes()] for target in targets]
            assert len(set(talkers)) == len(talkers)
            assert mixture.shape == (FRAMES, WIDTH)
            np.testing.assert_allclose(mixture, targets.sum(0), atol=1e-5)
            counts.append(len(talkers))
    assert set(counts) == {0, 1, 2, 3}
    assert counts.count(0) < 0.15 * len(counts)


# --------------------------------------------------------------------------------------------------
# Speech


@pytest.fixture(scope="module")
def speech_dir(tmp_path_factory):
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
def manifest(speech_dir, tmp_path_factory):
    """The same recordings in a manifest that gives the split: even speakers train."""
    path = tmp_path_factory.mktemp("manifest") / "list.jsonl"
    rows = [
        {"audio": str(audio), "speaker": audio.parent.name, "text": f"said {audio.stem}",
         "split": "val" if int(audio.parent.name[-1]) % 2 else "train"}
        for audio in sorted(speech_dir.rglob("*.wav"))
    ]  # fmt: skip
    path.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    return path


def speech_flags(speech, encoder, output, *more):
    return [f"--speech_dir={speech}", f"--encoder={encoder}", f"--output_dir={output}",
            "--train_samples=3", "--val_samples=2", "--max_speakers=2", "--device=cpu",
            *more]  # fmt: skip


def make_speech(*arguments):
    assert generator.main(speech_flags(*arguments)) == 0
    return arguments[2]


def speakers(folder, split):
    return {s["speaker_id"] for e in metadata(folder, split) for s in e["speakers"]}


@pytest.mark.parametrize(
    ("family", "layer", "rate"),
    [("qwen", None, 25), ("qwen", 1, 50), ("whisper", None, 50), ("whisper", 0, 50)],
)
def test_speech(family, layer, rate, speech_dir, tmp_path, request):
    encoder = request.getfixturevalue(f"{family}_folder")
    flags = [] if layer is None else [f"--layer={layer}"]
    folder = make_speech(speech_dir, encoder, tmp_path / "data", *flags)
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
            np.testing.assert_allclose(sum(waves), mixed, atol=2e-4)  # 16 bits
            for speaker, wave in zip(entry["speakers"], waves, strict=True):
                number = speaker["speaker_id"].removeprefix("speaker")
                assert speaker["text"] in (f"take 0 of {number}", f"take 1 of {number}")
                level = 20 * np.log10(np.sqrt(np.mean(wave[wave != 0] ** 2)) / 0.05)
                assert -2.0 < level < 2.0  # 3 dB between talkers, so 1.5 dB either way
    assert not ssm.MultiSpeakerDataset(folder, "train").is_sum


def test_speech_features_are_those_of_the_written_audio(speech_dir, whisper_folder, tmp_path):
    folder = make_speech(speech_dir, whisper_folder, tmp_path / "data")
    for entry, mixture, sources in arrays(folder, "train"):
        encoded = ssm.encode_audio(folder / "train" / entry["mixed_wav"], whisper_folder)
        error = np.mean((encoded.numpy() - mixture) ** 2)
        others = min(np.mean((source - mixture) ** 2) for source in sources)
        assert error < 0.02 * others  # what 16 bits cost


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


def test_speakers_may_be_shared(speech_dir, qwen_folder, tmp_path):
    flags = ["--split_by=utterance", "--max_speakers=9", "--min_speakers=9"]
    folder = make_speech(speech_dir, qwen_folder, tmp_path / "data", *flags)
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
def test_bad_speech_arguments(flags, words, speech_dir, qwen_folder, tmp_path, capsys):
    argv = speech_flags(speech_dir, qwen_folder, tmp_path / "data", *flags)
    assert_fails(capsys, argv, words, main=generator.main)


def test_silent_recordings_make_no_nan(tmp_path, qwen_folder):
    broken_wav(np.zeros(2000, np.float32))(tmp_path / "speech")
    folder = make_speech(tmp_path / "speech", qwen_folder, tmp_path / "data")
    read_all(folder)


def test_speech_is_no_sum_even_where_it_starts_with_one_talker(own_dataset):
    edit_json(own_dataset / "dataset.json", lambda about: about.update(kind="speech"))
    assert not ssm.MultiSpeakerDataset(own_dataset, "train").is_sum
