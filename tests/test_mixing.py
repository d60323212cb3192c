"""Mixing recordings: what is planned, what is rendered, what is said to bad input."""

import json
import shutil
import subprocess
import sys
from itertools import pairwise, product

import numpy as np
import pytest
import soundfile
import torch
from conftest import RATE, ROOT, assert_fails, edit_json, sine
from conftest import write_wav as wav

import generate_multi_speaker_dataset as generator
import mixing
from mixing import (
    ROOMS,
    MixingOptions,
    PlannedMixture,
    PlannedTalker,
    SpeechSource,
    Utterance,
    recording_seconds,
    render_mixture,
    render_talker,
)


@pytest.fixture(scope="module")
def by_speaker(speech_dir):
    return mixing.group_by_speaker(generator.read_speech(speech_dir))


@pytest.fixture(scope="module")
def noise_dir(tmp_path_factory):
    """One recording of noise longer than a mixture and one that has to be looped, at 22 kHz."""
    folder, rng = tmp_path_factory.mktemp("noise"), np.random.default_rng(0)
    for name, seconds in (("long", 5), ("sub/short", 0.1)):
        wav(folder / f"{name}.wav", 0.1 * rng.standard_normal(round(22050 * seconds)), 22050)
    return folder


def plans(by_speaker, count, noises=(), talkers=None, split="train", **options):
    source = SpeechSource(MixingOptions(**options), by_speaker, noises, split)
    rng = np.random.default_rng(1)
    return [mixing.plan_mixture(rng, source, talkers) for _ in range(count)]


def one_talker(audio, **more):
    utterance = Utterance(audio, "someone", "word")
    seconds = recording_seconds(audio)
    return PlannedTalker((utterance,), 1.0, (0.0,), seconds, 0.0, 0.0)._replace(**more)


def flags_for(speech, output, *more):
    return [f"--speech_dir={speech}", f"--output_dir={output}", "--train_samples=3",
            "--val_samples=2", "--max_speakers=2", "--split_by=utterance", *map(str, more)]


def contents(folder):
    files = (p for p in folder.rglob("*") if p.is_file() and p.name != "dataset.json")
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


def metadata(folder, split):
    return json.loads((folder / split / "metadata.json").read_text())


def mixing_of(folder):
    return json.loads((folder / "dataset.json").read_text())["mixing"]


def decibels(of, to):
    return 10 * np.log10(np.mean(of**2) / np.mean(to**2))


# --------------------------------------------------------------------------------------------------
# Splits


def test_split_by_speaker_shares_no_speaker(by_speaker):
    everything = [u for group in by_speaker.values() for u in group]
    split = generator.split_speech(everything, "speaker", seed=3)
    speakers = {name: {u.speaker for u in group} for name, group in split.items()}
    assert not speakers["train"] & speakers["val"]
    assert (len(speakers["train"]), len(speakers["val"])) == (4, 1)
    drawn = [generator.split_speech(everything, "speaker", seed)["val"] for seed in range(5)]
    assert len({group[0].speaker for group in drawn}) > 1


def test_split_by_utterance_shares_speakers_but_no_utterance(by_speaker):
    everything = [u for group in by_speaker.values() for u in group]
    split = generator.split_speech(everything, "utterance", seed=3)
    assert not set(split["train"]) & set(split["val"])
    assert sorted(split["train"] + split["val"]) == sorted(everything)
    for speaker in by_speaker:
        assert sum(u.speaker == speaker for u in split["val"]) == 2  # a fifth of ten
    assert split != generator.split_speech(everything, "utterance", seed=4)


def test_only_utterance_of_a_speaker_is_for_training(by_speaker):
    lonely = [group[0] for group in by_speaker.values()]
    assert generator.split_speech(lonely, "utterance", 0) == {"train": lonely, "val": []}


# --------------------------------------------------------------------------------------------------
# Plans


def test_plan_is_a_function_of_the_seed(by_speaker):
    options = {"overlap": (0, 1), "speed": (0.9, 1.1), "reverb": 1.0, "join": (1, 3)}
    assert plans(by_speaker, 5, **options) == plans(by_speaker, 5, **options)
    assert len(set(plans(by_speaker, 5, **options))) == 5


def test_defaults():
    """A dataset made without options stays the same."""
    assert MixingOptions() == (2, 3, (1, 1), 0.0, 0.15, 0.4, 3.0, None, (1.0, 1.0), (1.0, 1.0), 0.0,
                               None, (10.0, 20.0), 0.0, None, 0.0, 0.0, (), 0.0)  # fmt: skip


def test_talkers_of_one_corpus(by_speaker):
    """Where a corpus has too few speakers, those of others join."""
    corpus_of = {name: "large" if number > 1 else name for number, name in enumerate(by_speaker)}
    groups = {name: [u._replace(corpus=corpus_of[name]) for u in group]
              for name, group in by_speaker.items()}
    one_corpus = {}
    for share in (0.0, 0.5, 1.0):
        drawn = [{corpus_of[talker.utterances[0].speaker] for talker in plan.talkers}
                 for plan in plans(groups, 200, max_speakers=2, same_corpus=share)]
        assert all(corpora == {"large"} or len(corpora) == 2 for corpora in drawn)
        one_corpus[share] = sum(corpora == {"large"} for corpora in drawn)
    large = len(by_speaker) - 2
    apart = large * (large - 1) / (len(by_speaker) * (len(by_speaker) - 1))
    for share, count in one_corpus.items():
        alone = large / len(by_speaker) + (1 - large / len(by_speaker)) * apart
        assert count / 200 == pytest.approx(share * alone + (1 - share) * apart, abs=0.1)
    everybody = [len({corpus_of[talker.utterances[0].speaker] for talker in plan.talkers})
                 for plan in plans(groups, 100, talkers=large, same_corpus=1.0)]
    assert everybody.count(1) > 40  # as many as it has


def test_talkers_as_recorded(by_speaker):
    groups = {name: [u._replace(corpus="changed" if number % 2 else "kept") for u in group]
              for number, (name, group) in enumerate(by_speaker.items())}
    drawn = plans(groups, 20, as_recorded=("kept",), speed=(1.1, 1.2), formants=(0.8, 0.9))
    talkers = [talker for plan in drawn for talker in plan.talkers]
    kept = [t for t in talkers if t.utterances[0].corpus == "kept"]
    changed = [t for t in talkers if t.utterances[0].corpus == "changed"]
    assert {(t.speed, t.voice[0], *set(t.voice[1:])) for t in kept} == {(1.0, 1.0, 0.0)}
    assert len({len(talker.voice) for talker in talkers}) == 1  # one tensor holds them all
    assert all(1.1 <= t.speed <= 1.2 and 0.8 <= t.voice[0] <= 0.9 for t in changed) and changed


def test_a_talker_of_two_corpora_is_recorded_as_the_first_says(by_speaker):
    groups = {name: [u._replace(corpus="changed" if take % 2 else "kept")
                     for take, u in enumerate(group)] for name, group in by_speaker.items()}
    drawn = plans(groups, 20, as_recorded=("kept",), speed=(1.1, 1.2), formants=(0.8, 0.9))
    talkers = [talker for plan in drawn for talker in plan.talkers]
    assert {t.utterances[0].corpus for t in talkers} == {"kept", "changed"}
    assert {(t.speed, *t.voice[:1]) for t in talkers} == {(1.0, 1.0)}


def test_voices_are_drawn_after_everything_else(by_speaker):
    """Formants and equalizers change no other number of a plan of one talker."""
    one = {"min_speakers": 1, "max_speakers": 1}
    plain = plans(by_speaker, 1, **one)[0].talkers[0]
    (voiced,) = plans(by_speaker, 1, formants=(0.8, 1.25), equalizer=6.0, **one)[0].talkers
    assert voiced._replace(voice=()) == plain
    real = plans(by_speaker, 1, split="val", formants=(0.8, 1.25), equalizer=6.0, **one)
    assert real[0].talkers == (plain,)  # validation is on voices as they are
    many = plans(by_speaker, 60, formants=(0.8, 1.25), equalizer=6.0, **one)
    drawn = [plan.talkers[0] for plan in many]
    factors = [talker.voice[0] for talker in drawn]
    assert 0.8 <= min(factors) < 0.9 and 1.15 < max(factors) <= 1.25
    spread = np.std([talker.voice[1:] for talker in drawn], axis=0)
    assert spread == pytest.approx(6 / np.tile([1.5, 3.0, 4.5, 6.0], 2), rel=0.4)


def test_names_that_end_in_nothing(by_speaker):
    """Arrays of NumPy would drop what JSON allows in a name: null characters at its end."""
    odd = {f"{name}\0": utterances for name, utterances in by_speaker.items()}
    for one, other in zip(plans(odd, 5), plans(by_speaker, 5), strict=True):
        assert one.talkers == other.talkers


def test_a_planned_voice_is_rendered(by_speaker):
    """The level is that of the plan, whatever the equalizer does."""
    (plan,) = plans(by_speaker, 1, min_speakers=1, max_speakers=1)
    (talker,) = plan.talkers
    voice = (1.0, 12.0, *[0.0] * 7)
    plain, equalized = (mixing.render_talker(t) for t in (talker, talker._replace(voice=voice)))
    samples = torch.from_numpy(mixing.read_audio(talker.utterances[0].audio))
    changed = mixing.change_voices(mixing.stft(samples), torch.tensor(voice))
    expected = mixing.istft(changed, len(samples)).numpy()
    part = equalized[round(talker.onset * RATE) :]
    assert np.corrcoef(part, expected)[0, 1] > 0.9999
    assert decibels(part, plain[round(talker.onset * RATE) :]) == pytest.approx(0, abs=0.01)


def test_plan_decodes_nothing(by_speaker, monkeypatch):
    monkeypatch.setattr(mixing, "read_audio", None)
    plans(by_speaker, 5, overlap=(0, 1), reverb=1.0)


def test_one_to_max_speakers_talkers(by_speaker):
    counts = {len(p.talkers) for p in plans(by_speaker, 60, min_speakers=1, max_speakers=4)}
    assert counts == {1, 2, 3, 4}
    for plan in plans(by_speaker, 20, min_speakers=2, max_speakers=5):
        assert len({t.utterances[0].speaker for t in plan.talkers}) == len(plan.talkers)


@pytest.mark.parametrize(
    ("spans", "ratio"),
    [
        ([(0, 1)], 0),
        ([(0, 1), (0, 1)], 1),
        ([(0, 1), (1, 2)], 0),
        ([(0, 1), (2, 3)], 0),
        ([(0.5, 2.5), (1.5, 2.5)], 0.5),
        ([(0, 3), (2, 4), (3.5, 5)], 0.3),
        ([(0, 4), (0, 2), (2, 4)], 1),
        ([(0, 4), (1, 2), (1, 2)], 0.25),
    ],
)
def test_overlap_ratio(spans, ratio):
    assert mixing.overlap_ratio(*np.array(spans, float).T) == pytest.approx(ratio)


@pytest.mark.parametrize("target", [0.0, 0.3, 0.5])
@pytest.mark.parametrize("talkers", [2, 3, 4])
def test_overlap_ratio_is_as_asked(target, talkers, by_speaker):
    """Three or four recordings each: lengths are so near each other that the ratio is in reach."""
    options = {"overlap": (target, target), "join": (3, 4), "min_speakers": talkers}
    for plan in plans(by_speaker, 15, max_speakers=talkers, **options):
        assert plan.overlap == pytest.approx(target, abs=0.011)
        assert min(t.onset for t in plan.talkers) <= 0.4
        sources, _ = render_mixture(plan)
        first, last = zip(*(np.flatnonzero(source)[[0, -1]] for source in sources), strict=True)
        talking = np.zeros(sources.shape[1], int)
        for start, end in zip(first, last, strict=True):  # pauses inside count as speech
            talking[start : end + 1] += 1
        span = talking[min(first) : max(last) + 1]
        assert np.mean(span > 1) == pytest.approx(plan.overlap, abs=0.005)


def test_talkers_say_something_else_where_lengths_do_not_fit(tmp_path):
    """Of a word of a second and a shorter one each, two of like length overlap."""
    for shorter, overlap in ((0.2, (0.9, 1)), (0.985, (1, 1))):
        group = {name: [Utterance(wav(tmp_path / f"{name}{s}.wav", sine(s, 200)), name, name)
                        for s in (1.0, shorter)] for name in ("a", "b")}
        found = plans(group, 15, max_speakers=2, overlap=overlap)
        assert all(plan.overlap == pytest.approx(plan.overlap_target, abs=0.011) for plan in found)


def test_overlap_out_of_reach_is_as_near_as_lengths_allow(tmp_path):
    """A second beside 0.2 s cannot overlap by more than 0.2; beside one another word, by 0.4."""
    group = {name: [Utterance(wav(tmp_path / f"{name}.wav", sine(s, 200)), name, name)]
             for name, s in (("long", 1.0), ("short", 0.2))}
    for plan in plans(group, 5, max_speakers=2, overlap=(1, 1)):
        assert plan.overlap == pytest.approx(0.2)
        assert plan.overlap_target == 1
    several = plans(group, 20, max_speakers=2, overlap=(1, 1), join=(1, 2), max_gap=0)
    assert max(plan.overlap for plan in several) == pytest.approx(0.4)
    assert all(len(t.utterances) == 1 for p in several for t in p.talkers
               if t.utterances[0].speaker == "long")


def test_utterances_that_do_not_fit_are_not_planned(by_speaker):
    window = 0.7
    for overlap in (None, (0, 0.5)):
        for plan in plans(by_speaker, 20, join=(1, 6), max_seconds=window, overlap=overlap):
            sources, _ = render_mixture(plan)
            assert sources.shape[1] <= window * RATE
            for talker, source in zip(plan.talkers, sources, strict=True):
                spoken = sum(round(soundfile.info(u.audio).duration * RATE)
                             for u in talker.utterances)
                assert np.count_nonzero(source) > 0.99 * spoken
                assert talker.text.split() == [u.text for u in talker.utterances]


def test_turns_do_not_exceed_the_window(by_speaker):
    """Three talkers of 0.3 s and more cannot take turns in 0.5 s: they overlap instead."""
    options = {"overlap": (0, 0), "join": (2, 2), "max_seconds": 0.7, "min_speakers": 3}
    for plan in plans(by_speaker, 10, **options):
        assert plan.seconds <= 0.7
        assert plan.overlap > 0
    for plan in plans(by_speaker, 10, talkers=2, overlap=(0, 0), max_seconds=1.0, max_onset=5.0):
        assert plan.seconds <= 1.0
        assert plan.overlap == pytest.approx(0)  # a late start moves all talkers alike


def test_the_others_speak_in_a_row_beside_the_longest():
    """Two of a second each beside one of four: they can overlap with it in half of the time."""
    talkers = [PlannedTalker((), 1.0, (), seconds, 0.0, 0.0) for seconds in (4.0, 1.0, 1.0)]
    for seed in range(10):
        onsets, miss = mixing._place(np.random.default_rng(seed), talkers, 1.0, 9.0)
        assert miss == pytest.approx(0.5)
        first, second = np.sort(np.subtract(onsets[1:], onsets[0]))
        assert 0 <= first <= second - 1 + 1e-9 <= 2 + 1e-9


def test_a_talker_longer_than_the_window_has_the_others_beside():
    """The sum of two lengths differs from the third by rounding, which once left no placement."""
    lengths = (3.033063678688803, 16.634325099811733, 19.240260427045353)
    talkers = [PlannedTalker((), 1.0, (), seconds, 0.0, 0.0) for seconds in lengths]
    for seed in range(20):
        onsets, miss = mixing._place(np.random.default_rng(seed), talkers, 0.0, 17.0)
        assert miss <= 1
        assert max(np.add(onsets, lengths)) == pytest.approx(lengths[2])


def test_a_share_of_the_mixtures_takes_turns(by_speaker):
    """The others start together, and overlap."""
    drawn = plans(by_speaker, 200, talkers=2, turns=0.3, max_onset=0)
    assert all((plan.overlap == 0) == (plan.overlap_target == 0) for plan in drawn)
    assert np.mean([plan.overlap == 0 for plan in drawn]) == pytest.approx(0.3, abs=0.1)
    (alone,) = plans(by_speaker, 1, talkers=1, turns=1.0)
    assert alone.overlap_target is None


def test_speaker_with_recordings_that_fit_says_those(by_speaker):
    plan = plans(by_speaker, 30, max_seconds=0.16)
    assert {t.utterances[0].audio.stem for p in plan for t in p.talkers} == set("0369")
    plan = plans(by_speaker, 30, max_seconds=0.32, speed=(0.5, 0.5))  # they last twice as long
    assert {t.utterances[0].audio.stem for p in plan for t in p.talkers} == set("0369")
    plan = plans({"s0": by_speaker["s0"]}, 60, talkers=1, max_seconds=0.26)  # the longest
    assert {p.talkers[0].utterances[0].audio.stem for p in plan} == set("0123456789")


def test_speakers_are_drawn_by_how_many_utterances_they_have(by_speaker):
    """One with ten times as many as each of the others talks in nearly every mixture of two."""
    groups = {name: group[: 10 if name == "s0" else 1] for name, group in by_speaker.items()}
    drawn = [{t.utterances[0].speaker for t in p.talkers}
             for p in plans(groups, 100, max_speakers=2)]
    assert sum("s0" in speakers for speakers in drawn) > 80
    assert set().union(*drawn) == set(groups)


@pytest.mark.parametrize(
    ("flags", "seconds"),
    [(["--max_seconds=0.5"], 0.5), (["--encoder"], 1.0), (["--encoder", "--max_seconds=0.5"], 0.5),
     (["--encoder", "--max_seconds=5"], 1.0)],
)
def test_recording_longer_than_the_limit_is_cut_and_said_once(
    flags, seconds, tmp_path, qwen_folder, capsys
):
    """An encoder's window is a limit too, and the smaller one counts."""
    for speaker in range(2):
        for take in range(2):
            path = wav(tmp_path / f"speech/s{speaker}/{take}.wav", sine(1.5, 200))
            path.with_suffix(".txt").write_text("a long story")
    flags = [f"{flag}={qwen_folder}" if flag == "--encoder" else flag for flag in flags]
    argv = flags_for(tmp_path / "speech", tmp_path / "data", "--device=cpu", *flags)
    assert generator.main(argv) == 0
    printed = capsys.readouterr().out.splitlines()
    assert [line for line in printed if "cut" in line] == [
        f"cut to {seconds:g} s, without their text: 4 recordings"]
    entry = metadata(tmp_path / "data", "train")[0]
    assert {speaker["text"] for speaker in entry["speakers"]} == {""}  # its end is not said
    mixed, _ = soundfile.read(tmp_path / "data/train" / entry["mixed_wav"])
    assert len(mixed) / RATE == entry["seconds"] == pytest.approx(seconds, abs=0.0011)
    assert entry["overlap"] > 0.5
    assert mixing_of(tmp_path / "data")["max_seconds"] == pytest.approx(seconds, abs=0.0011)


def test_no_mixture_exceeds_max_seconds(speech_dir, tmp_path):
    """Those of the same seed without the option do."""
    lengths = []
    for name, flags in (("free", []), ("short", ["--max_seconds=0.6"])):
        argv = flags_for(speech_dir, tmp_path / name, "--join", 2, 3, "--reverb", *flags)
        assert generator.main(argv) == 0
        lengths.append([entry["seconds"] for entry in metadata(tmp_path / name, "train")])
    assert max(lengths[0]) > 0.8
    assert max(lengths[1]) <= 0.6


def test_the_space_for_recordings_is_known_before(speech_dir, tmp_path, monkeypatch):
    needs = []
    monkeypatch.setattr(generator, "check_space", lambda folder, need: needs.append(need))
    assert generator.main(flags_for(speech_dir, tmp_path)) == 0
    assert needs == [pytest.approx(
        sum(path.stat().st_size for path in tmp_path.rglob("*.wav")), rel=0.02)]


def test_overlap_that_does_not_fit_is_said(speech_dir, tmp_path, capsys):
    """Too much in a short mixture, too little where one says a second and the other 0.2 s."""
    for take, (name, s) in product(range(2), (("long", 1.0), ("short", 0.2))):
        wav(tmp_path / f"uneven/{name}/{take}.wav", sine(s, 200))
    turns = ["--turns=1", "--min_speakers=3", "--max_speakers=3"]
    for speech, flags, missed in (
            (speech_dir, turns, 0), (speech_dir, [*turns, "--max_seconds=0.3"], 5),
            (tmp_path / "uneven", ["--overlap", 1, 1], 5)):
        assert generator.main(flags_for(speech, tmp_path / "data", *flags)) == 0
        printed = capsys.readouterr().out
        assert ("another overlap than was asked for" in printed) is bool(missed)
        assert not missed or f"did not fit: {missed} mixtures" in printed


def test_talkers_who_say_too_little_are_counted(speech_dir, tmp_path, capsys):
    """A limit comes before the least seconds and the least number of recordings."""
    for number, flags in enumerate((["--min_seconds=0.6"], ["--join", 3, 3])):
        for limit in (60, 0.65):
            folder = tmp_path / f"{number} {limit}"
            argv = flags_for(speech_dir, folder, *flags, f"--max_seconds={limit}")
            assert generator.main(argv) == 0
            printed = capsys.readouterr().out
            assert ("talkers who say less" in printed) is (limit < 1)
    few = [s for split in ("train", "val") for entry in metadata(folder, split)
           for s in entry["speakers"] if len(s["text"].split()) < 3]
    assert f"which did not fit: {len(few)}\n" in printed


def test_overlap_is_told_of_all_mixtures_where_some_take_turns(speech_dir, tmp_path, capsys):
    argv = flags_for(speech_dir, tmp_path / "data", "--turns=0.4", "--train_samples=8")
    assert generator.main(argv) == 0
    entries = [e for e in metadata(tmp_path / "data", "train") if e["num_speakers"] > 1]
    assert 0 < sum("overlap_target" in entry for entry in entries) < len(entries)
    overlaps = [entry["overlap"] for entry in entries]
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("train:")]
    assert line.endswith(f", overlap {min(overlaps):.2f} to {max(overlaps):.2f}")


def test_a_manifest_without_a_split(speech_dir, tmp_path, capsys):
    rows = [{"audio": str(path), "speaker": path.parent.name, "split": "val"}
            for path in speech_dir.glob("*/*.wav")]
    manifest = tmp_path / "speech.jsonl"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    argv = [f"--speech_dir={manifest}", f"--output_dir={tmp_path / 'data'}", "--max_speakers=1"]
    assert_fails(capsys, [*argv, "--min_speakers=1"], "the train split has no speakers", "manifest",
                 main=generator.main)


def test_silence(by_speaker, noise_dir):
    (quiet,) = plans(by_speaker, 1, talkers=0)
    sources, mixture = render_mixture(quiet)
    assert (len(sources), quiet.overlap, quiet.talkers) == (0, 0, ())
    assert len(mixture) == round(quiet.seconds * RATE) > 0
    assert not mixture.any()
    options = {"snr_db": (20, 20), "reverb": 1.0}
    (noisy,) = plans(by_speaker, 1, mixing.list_noises(noise_dir), talkers=0, **options)
    _, mixture = render_mixture(noisy)
    assert np.sqrt(np.mean(mixture**2)) == pytest.approx(mixing.SPEECH_RMS / 10, rel=0.01)


def test_more_talkers_than_speakers(by_speaker):
    with pytest.raises(ValueError, match="6 talkers .* 5 speakers"):
        plans(by_speaker, 1, talkers=6)


# --------------------------------------------------------------------------------------------------
# Rendering


def test_no_sample_is_lost(by_speaker):
    """The mixture is as long as its longest talker and is the sum of all of them."""
    for plan in plans(by_speaker, 10, join=(1, 3), max_onset=0.1):
        sources, mixture = render_mixture(plan)
        assert mixture.dtype == sources.dtype == np.float32
        np.testing.assert_allclose(sources.sum(0), mixture, atol=1e-6)
        ends = [round((t.onset + t.seconds) * RATE) for t in plan.talkers]
        assert abs(len(mixture) - max(ends)) <= 1
        for talker, source in zip(plan.talkers, sources, strict=True):
            spoken = sum(soundfile.info(u.audio).frames for u in talker.utterances)
            assert abs(np.count_nonzero(source) - spoken) <= 0.01 * spoken  # zero crossings


def test_utterances_are_said_in_order_with_pauses(by_speaker):
    for plan in plans(by_speaker, 10, join=(3, 3), max_gap=0.1):
        for talker in plan.talkers:
            lengths = [recording_seconds(u.audio) for u in talker.utterances]
            ends = [s + n for s, n in zip(talker.starts, lengths, strict=True)]
            pauses = [b - a for a, b in zip(ends, talker.starts[1:], strict=False)]
            assert all(0 <= pause <= 0.1 for pause in pauses)
            assert talker.seconds == pytest.approx(ends[-1])
            waveform = render_talker(talker)
            for u, start, n in zip(talker.utterances, talker.starts, lengths, strict=True):
                begin = round((talker.onset + start) * RATE)
                part = waveform[begin : begin + round(n * RATE)]
                original = soundfile.read(u.audio)[0]
                assert np.corrcoef(part, original)[0, 1] > 0.999


def test_talkers_go_on_until_min_seconds(by_speaker):
    """They say no more recordings than that takes, nor fewer than ``join`` asks for."""
    for least, join in ((1.5, (1, 1)), (0.1, (4, 4))):
        for plan in plans(by_speaker, 10, join=join, min_seconds=least):
            for talker in plan.talkers:
                assert talker.seconds >= least
                assert len(talker.utterances) >= join[0]
                if len(talker.utterances) > join[0]:
                    assert talker.starts[-1] < least + 0.15


def test_overlap_leaves_each_talker_min_seconds(by_speaker):
    options = {"join": (1, 3), "min_seconds": 1.5, "overlap": (0.95, 1.0)}
    for plan in plans(by_speaker, 20, talkers=2, **options):
        assert min(talker.seconds for talker in plan.talkers) >= 1.5


@pytest.mark.parametrize("amplitude", [1e-3, 0.1, 5.0])
def test_the_level_of_a_recording_does_not_matter(amplitude, tmp_path):
    path, samples = tmp_path / "sine.wav", sine(0.5, 200)
    soundfile.write(path, amplitude * samples, RATE, subtype="FLOAT")
    wanted = samples * (0.05 / np.sqrt(np.mean(samples**2)))
    np.testing.assert_allclose(render_talker(one_talker(path)), wanted, atol=1e-5)


def test_level_difference(by_speaker):
    differences = []
    for plan in plans(by_speaker, 40, level_difference=12.0, max_speakers=2, max_onset=0):
        one, other = render_mixture(plan)[0]
        levels = [decibels(s[s != 0], np.array([0.05])) for s in (one, other)]
        assert levels == pytest.approx([t.gain_db for t in plan.talkers], abs=0.05)
        differences.append(abs(levels[0] - levels[1]))
    assert max(differences) <= 12.05
    assert max(differences) > 6


@pytest.mark.parametrize("peak", [1, -1])
def test_peaks_fit_into_a_wav(peak, tmp_path):
    """A click is far above its own RMS; talkers and mixture are turned down together."""
    click = np.full(4000, 1e-3, np.float32)
    click[100] = peak
    audio = wav(tmp_path / "click.wav", click)
    talkers = (one_talker(audio, gain_db=10.0), one_talker(audio, gain_db=4.0))
    plan = PlannedMixture(talkers, 0.25, 1.0)
    sources, mixture = render_mixture(plan)
    assert np.abs(mixture).max() == pytest.approx(1)
    assert decibels(sources[0], sources[1]) == pytest.approx(6, abs=0.01)
    np.testing.assert_allclose(sources.sum(0), mixture, atol=1e-6)


@pytest.mark.parametrize("snr_db", [-5.0, 0.0, 15.0])
def test_noise_is_in_the_mixture_alone_at_the_ratio_asked_for(snr_db, by_speaker, noise_dir):
    noises, used = mixing.list_noises(noise_dir), set()
    for plan in plans(by_speaker, 8, noises, snr_db=(snr_db, snr_db)):
        sources, mixture = render_mixture(plan)
        noise = mixture - sources.sum(0)
        assert decibels(sources.sum(0), noise) == pytest.approx(snr_db, abs=0.05)
        quiet, _ = render_mixture(plan._replace(noise=None))
        scale = np.abs(quiet).max() / np.abs(sources).max()  # noise may lift the peak
        np.testing.assert_allclose(scale * sources, quiet, atol=1e-5)
        assert noise[-100:].any()  # looped to the end
        used.add(plan.noise.audio)
    assert len(used) == 2


def test_noise_is_taken_from_its_planned_start(noise_dir):
    path = noise_dir / "long.wav"
    noise = mixing.render_noise(
        mixing.PlannedNoise(str(path), 1.5, 0.0), np.ones(8000, np.float32))
    expected = mixing.read_audio(path)[24000:32000]
    np.testing.assert_allclose(noise, expected / np.sqrt(np.mean(expected**2)), atol=1e-3)


def test_speed_changes_durations_alone(by_speaker):
    options = {"join": (2, 2), "max_gap": 0.1}
    for speed, limit in product((0.8, 1.25), (None, 0.5)):  # in 0.5 s some say one recording less
        for plan in plans(by_speaker, 5, speed=(speed, speed), max_seconds=limit, **options):
            for talker in plan.talkers:
                spoken = sum(recording_seconds(u.audio) for u in talker.utterances)
                end = talker.onset + talker.seconds
                waveform = render_talker(talker)
                assert np.count_nonzero(waveform) / RATE == pytest.approx(spoken / speed, rel=0.01)
                assert len(waveform) / RATE == pytest.approx(end, abs=1e-3)
    drawn = plans(by_speaker, 5, speed=(0.9, 1.1), join=(1, 3))
    speeds = {talker.speed for plan in drawn for talker in plan.talkers}
    assert len(speeds) > 5
    assert all(0.9 <= s <= 1.1 for s in speeds)


def test_reverb_lengthens_and_keeps_onset_level_and_sum(by_speaker):
    for plan in plans(by_speaker, 4, reverb=1.0):
        wet, mixture = render_mixture(plan)
        dry, _ = render_mixture(plan._replace(room=None))
        again, _ = render_mixture(plan)
        assert np.array_equal(wet, again)
        np.testing.assert_allclose(wet.sum(0), mixture, atol=1e-6)
        assert 0.1 * RATE < wet.shape[1] - dry.shape[1] <= 0.4 * RATE
        for talker, w, d in zip(plan.talkers, wet, dry, strict=True):
            speaking = d != 0
            level = decibels(w[: len(d)][speaking], np.array([0.05]))
            assert level == pytest.approx(talker.gain_db, abs=0.1)
            onset = round(talker.onset * RATE)
            assert np.abs(w[: max(onset - 50, 0)]).max(initial=0) < 1e-5  # half a filter
            assert w[onset : onset + RATE // 50].any()


def test_direct_sound_stays_at_the_onset(by_speaker):
    responses = [pair for room in range(5) for pair in mixing.room_responses(room)]
    assert len(responses) == 5 * mixing.MOUTHS
    for response, direct in responses:
        assert abs(int(np.argmax(np.abs(response[: direct + 20]))) - direct) <= 1
        assert len(response) <= direct + 0.4 * RATE + 1
    (plan,) = plans(by_speaker, 1, talkers=1)
    dry = render_talker(plan.talkers[0])
    wet = render_talker(plan.talkers[0], (np.eye(1, 50, 40, dtype=np.float32)[0], 40))
    np.testing.assert_allclose(wet[: len(dry)], dry, atol=1e-5)  # nothing but direct sound
    firsts = {response.tobytes() for response, _ in responses}
    assert len(firsts) == len(responses)  # no two places sound the same


def test_share_of_mixtures_in_rooms_and_no_room_in_both_splits(by_speaker):
    rooms = {split: [p.room for p in plans(by_speaker, 200, split=split, reverb=0.4)]
             for split in ("train", "val")}
    for split, first in (("train", 0), ("val", ROOMS)):
        inside = [room for room in rooms[split] if room is not None]
        assert 60 <= len(inside) <= 100
        assert first <= min(inside) < max(inside) < first + ROOMS
        assert len(set(inside)) > 40
    assert all(plan.room is None for plan in plans(by_speaker, 20, reverb=0.0))
    assert all(plan.room is not None for plan in plans(by_speaker, 20, reverb=1.0))


def test_telephones_change_nothing_else_of_a_plan(by_speaker, noise_dir):
    options = {"noises": mixing.list_noises(noise_dir), "max_speakers": 2}
    for split in ("train", "val"):
        (plan,), (called,) = (plans(by_speaker, 1, split=split, telephone=share, **options)
                              for share in (0.0, 1.0))
        assert called == plan._replace(band=called.band) != plan
    bands = [plan.band for plan in plans(by_speaker, 200, telephone=0.4) if plan.band]
    assert 60 <= len(bands) <= 100
    assert all(150 <= low <= 350 and 3200 <= high <= 3900 for low, high in bands)
    assert len(set(bands)) == len(bands)


@pytest.mark.parametrize("talkers", [0, 1, 3])
def test_a_telephone_transmits_its_band(talkers, by_speaker, noise_dir):
    """Of white noise and of each talker; nothing comes later and the talkers still add up."""
    (plan,) = plans(by_speaker, 1, mixing.list_noises(noise_dir), talkers=talkers, snr_db=(0, 0))
    plan = plan._replace(band=(300.0, 3400.0))
    sources, mixture = render_mixture(plan)
    whole_sources, whole = render_mixture(plan._replace(band=()))
    assert sources.shape == whole_sources.shape == (talkers, len(mixture))
    assert sources.dtype == mixture.dtype == np.float32
    noise, whole_noise = mixture - sources.sum(0), whole - whole_sources.sum(0)
    frequencies, window = np.fft.rfftfreq(len(mixture), 1 / RATE), np.hanning(len(mixture))
    for narrow, wide in zip([*sources, noise], [*whole_sources, whole_noise], strict=True):
        kept, had = (np.abs(np.fft.rfft(window * samples)) ** 2
                     for samples in (narrow, wide))
        inside = (frequencies > 400) & (frequencies < 3200)
        assert kept[inside].sum() == pytest.approx(had[inside].sum(), rel=0.1)
        assert kept[frequencies < 100].sum() <= 0.01 * had[frequencies < 100].sum() + 1e-6
        assert kept[frequencies > 4000].sum() < 1e-5 * kept.sum()


def test_max_seconds_cuts_talkers_and_mixture_alike(by_speaker):
    (plan,) = plans(by_speaker, 1, join=(3, 3), reverb=1.0)
    sources, mixture = render_mixture(plan)
    cut_sources, cut = render_mixture(plan, 0.3)
    assert (cut_sources.shape, cut.shape) == ((len(sources), 4800), (4800,))
    np.testing.assert_allclose(cut_sources, sources[:, :4800], atol=1e-7)
    np.testing.assert_allclose(cut, mixture[:4800], atol=1e-7)


def test_long_recordings_are_not_kept(tmp_path):
    path = wav(tmp_path / "long.wav", sine(mixing.CACHED_SECONDS + 0.1, 200))
    render_talker(one_talker(path))
    before = mixing._decoded.cache_info()
    render_talker(one_talker(path))
    assert mixing._decoded.cache_info() == before


# --------------------------------------------------------------------------------------------------
# The command


EVERYTHING = ("--join", 1, 3, "--overlap", 0.2, 0.8, "--speed", 0.9, 1.1, "--reverb", 0.8,
              "--snr_db", 0, 10, "--formants", 0.9, 1.1, "--equalizer", 3, "--same_corpus", 0.5,
              "--turns", 0.2, "--telephone", 0.5, "--as_recorded", "kept", "other")


@pytest.fixture(scope="module")
def everything(speech_dir, noise_dir, tmp_path_factory):
    """A dataset with all options on; not to be written to."""
    folder = tmp_path_factory.mktemp("everything") / "data"
    argv = flags_for(speech_dir, folder, *EVERYTHING, f"--noise_dir={noise_dir}")
    assert generator.main(argv) == 0
    return folder


@pytest.mark.parametrize("workers", [0, 2])
def test_same_bytes_from_any_number_of_workers(
    workers, everything, speech_dir, noise_dir, tmp_path
):
    """As a script: its rendering processes import it under another name than it has."""
    argv = flags_for(speech_dir, tmp_path / "data", *EVERYTHING, f"--noise_dir={noise_dir}",
                     f"--workers={workers}")
    if workers:
        done = subprocess.run([sys.executable, generator.__file__, *argv],
                              capture_output=True, text=True, timeout=300)
        assert (done.returncode, done.stderr) == (0, "")
    else:
        assert generator.main(argv) == 0
    assert contents(tmp_path / "data") == contents(everything)


def test_metadata(everything):
    rooms, targets = [], set()
    for split in ("train", "val"):
        for entry in metadata(everything, split):
            assert 0 <= entry["overlap"] <= 1
            targets.add(entry["overlap_target"])
            assert 0 <= entry["snr_db"] <= 10
            rooms.append(entry.get("room"))
            for speaker in entry["speakers"]:
                takes = [word.split("-") for word in speaker["text"].split()]
                assert {name for name, _ in takes} == {speaker["speaker_id"]}
                assert (everything / split / speaker["wav_file"]).is_file()
    taking_turns = {0.0}
    assert all(0.2 <= target <= 0.8 for target in targets - taking_turns)
    assert len(targets - taking_turns) >= 3
    assert any(room is not None and room < ROOMS for room in rooms[:3])
    assert any(room is not None and room >= ROOMS for room in rooms[3:])


def test_unknown_corpora_are_named(speech_dir, tmp_path, capsys):
    flags = flags_for(speech_dir, tmp_path / "data", "--as_recorded", "digits")
    assert generator.main(flags) == 0
    assert "no recording is of the corpus digits" in capsys.readouterr().out


def test_part_of_a_transcript_is_none():
    utterances = [mixing.Utterance("a.wav", "a", text) for text in ("one", "two", "")]
    said = {(0, 1): "one two", (0, 2): "", (2,): ""}
    for numbers, text in said.items():
        talker = mixing.PlannedTalker(tuple(utterances[i] for i in numbers), 1.0, (), 1.0, 0.0, 0.0)
        assert talker.text == text


def test_transcripts_are_in_order(everything):
    """The text names the recordings that are heard, one after the other."""
    source = generator.load_source(everything, "train")
    rng = np.random.default_rng([42, source.split == "val"])
    planned = [mixing.plan_mixture(rng, source) for _ in range(3)]
    for entry, plan in zip(metadata(everything, "train"), planned, strict=True):
        assert [t.text for t in plan.talkers] == [s["text"] for s in entry["speakers"]]
        assert entry.get("room") == plan.room
        assert entry.get("band", []) == pytest.approx(list(plan.band), abs=1e-4)
        for talker in plan.talkers:
            assert [u.audio.stem for u in talker.utterances] == [
                word.split("-")[1] for word in talker.text.split()]
            assert all(a < b for a, b in pairwise(talker.starts))


def test_load_source(everything, noise_dir):
    train, val = (generator.load_source(everything, split) for split in ("train", "val"))
    assert train.options == val.options == MixingOptions(
        max_speakers=2, join=(1, 3), overlap=(0.2, 0.8), speed=(0.9, 1.1), reverb=0.8,
        noise_dir=str(noise_dir), snr_db=(0, 10), formants=(0.9, 1.1), equalizer=3.0,
        same_corpus=0.5, turns=0.2, telephone=0.5, as_recorded=("kept", "other"))
    assert (train.split, val.split) == ("train", "val")
    assert len(train.noises) == 2
    assert train.by_speaker.keys() == val.by_speaker.keys()
    paths = [{u.audio for group in source.by_speaker.values() for u in group}
             for source in (train, val)]
    assert not paths[0] & paths[1]
    assert all(path.is_absolute() for path in paths[0])


def test_reverb_without_a_number_is_for_all(speech_dir, tmp_path):
    argv = flags_for(speech_dir, tmp_path / "data", "--reverb", "--train_samples=1")
    assert generator.main(argv) == 0
    assert mixing_of(tmp_path / "data")["reverb"] == 1
    assert all("room" in entry for entry in metadata(tmp_path / "data", "val"))


def test_load_source_says_what_is_gone(everything, dataset, tmp_path):
    with pytest.raises(FileNotFoundError, match="--speech_dir"):
        generator.load_source(dataset, "train")
    damaged = shutil.copytree(everything, tmp_path / "copy")
    edit_json(damaged / "train/utterances.json", lambda rows: rows[3].update(audio="/gone.wav"))
    with pytest.raises(FileNotFoundError, match="/gone.wav"):
        generator.load_source(damaged, "train")
    edit_json(damaged / "dataset.json", lambda about: about["mixing"].update(noise_dir="/gone"))
    with pytest.raises(FileNotFoundError, match="/gone"):
        generator.load_source(damaged, "val")
    edit_json(damaged / "dataset.json", lambda about: about["mixing"].update(colour="red"))
    with pytest.raises(ValueError, match="colour"):
        generator.load_source(damaged, "val")
    edit_json(damaged / "dataset.json", lambda about: about.pop("mixing") and about)
    with pytest.raises(ValueError, match="mixing"):
        generator.load_source(damaged, "val")
    (damaged / "val/utterances.json").write_text("{")
    with pytest.raises(ValueError, match=r"utterances\.json"):
        generator.load_source(damaged, "val")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--overlap", "0.8", "0.2"], "--overlap"),
        (["--overlap", "0", "1.2"], "--overlap"),
        (["--overlap", "-0.1", "1"], "--overlap"),
        (["--overlap", "nan", "1"], "--overlap"),
        (["--overlap", "0.5"], "--overlap"),
        (["--snr_db", "20", "10"], "--snr_db"),
        (["--snr_db", "nan", "10"], "--snr_db"),
        (["--snr_db", "10", "inf"], "--snr_db"),
        (["--speed", "1.1", "0.9"], "--speed"),
        (["--speed", "0", "1"], "--speed"),
        (["--reverb", "1.5"], "--reverb must be 0 to 1"),
        (["--reverb", "nan"], "--reverb must be 0 to 1"),
        (["--max_seconds", "0"], "--max_seconds must be 0.001 to 1e+06"),
        (["--max_seconds", "nan"], "--max_seconds must be 0.001 to 1e+06"),
        (["--workers", "-1"], "--workers"),
        (["--telephone", "2"], "--telephone must be 0 to 1"),
        (["--level_difference", "61"], "--level_difference must be 0 to 60"),
        (["--turns", "2"], "--turns must be 0 to 1"),
        (["--layer", "1"], "--layer needs --encoder"),
        (["--snr_db", "0", "5"], "--snr_db needs --noise_dir"),
        (["--seq_len", "50"], "--seq_len is for simulated talkers"),
        (["--split_by", "colour"], "--split_by"),
        (["--noise_dir", "/no/such/folder"], "/no/such/folder"),
        (["--noise_dir", "."], "holds no recordings"),
        (["--max_speakers", "6"], "the train split has 5 speakers"),
        (["--max_speakers", "8"], "--max_speakers must be 1 to 7"),
        (["--min_seconds", "5", "--max_seconds", "2"], "--min_seconds is more than"),
    ],
)
def test_bad_arguments(flags, words, speech_dir, tmp_path, capsys):
    argv = flags_for(speech_dir, tmp_path / "data", *flags)
    assert_fails(capsys, argv, words, main=generator.main)
    assert not (tmp_path / "data").exists()


def test_bad_arguments_of_the_function(tmp_path):
    args = generator.build_parser().parse_args(
        ["--val_samples=0", f"--output_dir={tmp_path / 'data'}"])
    with pytest.raises(ValueError, match="val_samples"):
        generator.generate_dataset(args, "")
    assert not (tmp_path / "data").exists()


def test_nothing_of_a_kind_may_be_asked_for(speech_dir, tmp_path):
    none = [f"--{name}=0" for name in ("min_seconds", "max_gap", "max_onset", "turns", "reverb",
                                       "level_difference", "equalizer", "same_corpus", "telephone",
                                       "seed")]
    argv = flags_for(speech_dir, tmp_path / "data", *none)
    generator.check_arguments(generator.build_parser().parse_args(argv))


@pytest.mark.parametrize(
    ("flags", "word"),
    [(["--reverb"], "--speech_dir"), (["--noise_dir=."], "--speech_dir"),
     (["--overlap", "0", "1"], "--speech_dir"), (["--max_seconds=3"], "--speech_dir"),
     (["--encoder=model"], "--speech_dir"), (["--layer=1"], "--encoder"),
     (["--join", "2", "3"], "--speech_dir"), (["--same_corpus=1"], "--speech_dir"),
     (["--split_by=utterance"], "--speech_dir"), (["--workers=2"], "--speech_dir")],
)
def test_simulated_talkers_are_not_mixed_like_recordings(flags, word, tmp_path, capsys):
    argv = [*flags, f"--output_dir={tmp_path / 'data'}"]
    assert_fails(capsys, argv, flags[0].partition("=")[0], word, main=generator.main)
    assert not (tmp_path / "data").exists()


def test_rendering_processes_end_with_the_main_one():
    """Even where that one is killed; else they would hold its output open for ever."""
    code = ("import os, multiprocessing, concurrent.futures, mixing;"
            "context = multiprocessing.get_context('spawn');"
            "pool = concurrent.futures.ProcessPoolExecutor(1, context, mixing._start_worker);"
            "print(pool.submit(int).result(), flush=True); os.kill(os.getpid(), 9)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60, cwd=ROOT)
    assert (done.returncode, done.stdout) == (-9, b"0\n")


@pytest.mark.parametrize("workers", [0, 1])
def test_bad_noise(workers, speech_dir, tmp_path, capsys):
    """Also where another process renders: its error is told in one line as well."""
    bad = tmp_path / "noise/bad.wav"
    bad.parent.mkdir()
    bad.write_bytes(b"no audio at all")
    argv = flags_for(speech_dir, tmp_path / "data", f"--noise_dir={bad.parent}",
                     f"--workers={workers}")
    assert_fails(capsys, argv, bad, "cannot read audio", main=generator.main)
    soundfile.write(bad, np.full(2000, np.nan), RATE, subtype="FLOAT")
    assert_fails(capsys, argv, bad, "NaN", main=generator.main)
    assert not list((tmp_path / "data").iterdir())


def test_bad_recording(tmp_path, capsys):
    for speaker in range(2):
        for take in range(2):
            samples = np.full(2000, np.nan, np.float32)
            path = tmp_path / f"speech/s{speaker}/{take}.wav"
            path.parent.mkdir(parents=True, exist_ok=True)
            soundfile.write(path, samples, RATE, subtype="FLOAT")
    argv = flags_for(tmp_path / "speech", tmp_path / "data")
    assert_fails(capsys, argv, "NaN", main=generator.main)
    assert not (tmp_path / "data/train").exists()


@pytest.mark.parametrize("there", [None, "cuda", "mps"])
def test_device_of_the_encoder(there, monkeypatch):
    """By default a GPU where there is one; a device that is not there is refused."""
    import torch

    found = there and torch.device(there)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: found)
    assert generator.build_parser().parse_args([]).device == "auto"
    assert generator.pick_device("auto") == (there or "cpu")
    assert generator.pick_device("cpu") == "cpu"
    for name in {"cuda", "mps"} - {there}:
        with pytest.raises(ValueError, match=f"no {name} device here"):
            generator.pick_device(name)
