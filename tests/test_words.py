"""Word errors: how words are counted, and what evaluate --model makes of recordings."""

import json
import shutil

import pytest
import torch
from conftest import (
    CPU_FLAGS,
    assert_fails,
    edit_json,
    save_tiny_checkpoint,
    tiny_separator,
)
from test_integration import make_separator

import generate_multi_speaker_dataset as generator
import speaker_separator_module as ssm
from audio import load_model, read_audio
from long_recordings import ask
from scoring import cp_word_errors, normalize_words, word_scores, word_table

# --------------------------------------------------------------------------------------------------
# Counting


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Hello, World!", ["hello", "world"]),
        ("three one nine", ["3", "1", "9"]),
        ("3, 1, 9.", ["3", "1", "9"]),
        ("319", ["3", "1", "9"]),
        ("007 at 10:05", ["0", "0", "7", "at", "1", "0", "0", "5"]),
        ("3.05 and 0.5", ["3", ".", "0", "5", "and", "0", ".", "5"]),
        ("one", ["1"]),
        ("I'm sure it won't.", ["i", "am", "sure", "it", "will", "not"]),
        ("[noise] um yes", ["yes"]),
        ("", []),
        ("今天天氣很好。", list("今天天氣很好")),
        ("Qwen 很好", ["qwen", "很", "好"]),
        ("いい天気です", list("いい天気です")),
        ("Où est-il ?", ["où", "est", "il"]),
        ("“It’s twenty” — really", ["it", "is", "2", "0", "really"]),
    ],
)
def test_normalize_words(text, words):
    assert normalize_words(text) == words


@pytest.mark.parametrize(
    ("said", "heard", "errors", "words"),
    [
        (["one two", "three"], ["three", "one two"], 0, 3),
        (["One, two!", "three"], ["three.", "one TWO"], 0, 3),
        (["three one nine"], ["3, 1, 9."], 0, 3),
        (["three one nine"], ["3, 1, 5."], 1, 3),
        (["one two", "three"], ["one two three"], 2, 3),
        (["one two", "three"], [], 3, 3),
        (["one two"], ["one two", "four"], 1, 2),
        (["one two", "three four", "five"], ["five", "three two four", "one"], 2, 5),
        # A greedy assignment would take "a b" for "a b c" first, at five errors.
        (["a b c", "a b d"], ["a b d", "x y c"], 2, 6),
        ([], [], 0, 0),
        ([], ["one two"], 2, 0),
        (["", "one"], ["one"], 0, 1),
        (["今天天氣很好", "出去"], ["出去", "今天天汽很好"], 1, 8),
        # One normaliser for both sides, whatever letters the answer has.
        (["He\u2019s twenty."], ["he is 20"], 0, 4),
        (["\u00e9l est\u00e1", "he has ten"], ["\u00e9l est\u00e1", "he has 10"], 1, 5),
        (["he is in the cafe at twenty one"], ["He\u2019s in the caf\u00e9 at 21."], 0, 8),
    ],
)
def test_cp_word_errors(said, heard, errors, words):
    assert cp_word_errors(said, heard) == (errors, words)


def test_word_scores_are_grouped():
    rows = [
        {"talkers": n, "overlap": overlap, "words": 4, "found": found,
         "mixture": 4, "separated": 1, "oracle": 0}
        for n, overlap, found in ((1, 0.0, 1), (2, 0.8, 2), (2, 0.1, 3), (3, 1.0, 3), (2, None, 2))
    ]  # fmt: skip
    scores = {row["of"]: row for row in word_scores(rows)}
    assert list(scores) == ["1 talker", "2 talkers", "3 talkers",
                            "overlap 0% to 20%", "overlap 80% to 100%"]  # fmt: skip
    assert scores["2 talkers"]["count_accuracy"] == pytest.approx(2 / 3)
    assert scores["overlap 80% to 100%"]["mixtures"] == 2
    assert scores["overlap 0% to 20%"]["mixtures"] == 1  # of one talker there is no overlap
    assert scores["3 talkers"]["separated"] == 0.25 and scores["3 talkers"]["mixture"] == 1


def test_rates_are_of_words_and_not_of_mixtures():
    rows = [{"talkers": 1, "overlap": None, "words": words, "found": 1, "mixture": words,
             "separated": errors, "oracle": 0} for words, errors in ((1, 1), (9, 0))]  # fmt: skip
    (score,) = word_scores(rows)
    assert (score["words"], score["mixture"], score["separated"]) == (10, 1.0, 0.1)
    (silent,) = word_scores([rows[0] | {"words": 0, "separated": 3}])
    assert silent["separated"] is None
    table = word_table([score, silent])
    assert "| 1 talker | 2 | 100.0% | 10.0% | 0.0% | 100.0% |" in table
    assert "| 1 talker | 1 | - | - | - | 100.0% |" in table


# --------------------------------------------------------------------------------------------------
# Word errors of a model


@pytest.fixture(scope="module")
def encoded(speech_dir, qwen_folder, tmp_path_factory):
    """A dataset with the features of a tiny Qwen2-Audio after block 1; not to be written to."""
    folder = tmp_path_factory.mktemp("encoded") / "data"
    argv = [f"--speech_dir={speech_dir}", f"--output_dir={folder}", f"--encoder={qwen_folder}",
            "--layer=1", "--train_samples=2", "--val_samples=4", "--max_speakers=2",
            "--min_speakers=1", "--split_by=utterance", "--device=cpu"]  # fmt: skip
    assert generator.main(argv) == 0
    return folder


@pytest.fixture
def word_data(request, recordings, encoded):
    return {"spectrogram": recordings, 1: encoded}[request.param]


both = pytest.mark.parametrize(
    ("kind", "word_data"), [("spectrogram", "spectrogram"), (1, 1)], indirect=["word_data"])


def separator_of(kind):
    if kind == "spectrogram":
        return make_separator(kind, threshold=0.0)
    return tiny_separator(seed=4, threshold=0.0, feature_source={"layer": 1})


@both
@pytest.mark.parametrize("which", ["qwen", "whisper"])
def test_evaluate_words_against_the_slow_way(
    which, kind, word_data, qwen_folder, whisper_path, request
):
    """Every recording by itself, before and after the separator is put in."""
    data, options = ssm.MultiSpeakerDataset(word_data, "val"), {"max_new_tokens": 5}
    path = str(qwen_folder if which == "qwen" else whisper_path)
    model, processor = load_model(path, dtype=torch.float32)
    separator = separator_of(kind).train()
    rows = ssm.evaluate_words(separator, data, model, processor, **options)
    assert not hasattr(model, "speaker_separator") and separator.training

    def answer(wav):
        return ask(model, processor, [read_audio(data.folder / wav)], **options)

    texts = [[s["text"] for s in sample["speakers"]] for sample in data.samples]
    plain = [answer(sample["mixed_wav"]) for sample in data.samples]
    alone = [[answer(s["wav_file"])[0] for s in sample["speakers"]] for sample in data.samples]
    ssm.integrate_speaker_separator(model, 3, separator)
    streams = [answer(sample["mixed_wav"]) for sample in data.samples]
    with pytest.raises(ValueError, match="remove_speaker_separator first"):  # no baseline with it
        ssm.evaluate_words(separator, data, model, processor, **options)
    for i, row in enumerate(rows):
        assert (row["mixture"], row["words"]) == cp_word_errors(texts[i], plain[i])
        assert row["oracle"] == cp_word_errors(texts[i], alone[i])[0]
        assert row["separated"] == cp_word_errors(texts[i], streams[i])[0]
        assert row["id"] == data.samples[i]["id"] and row["talkers"] == len(texts[i])
        assert row["found"] == 3
    ssm.remove_speaker_separator(model)
    known = ssm.evaluate_words(separator, data, model, processor, num_speakers=2, **options)
    assert {row["found"] for row in known} == {2}
    nobody = ssm.evaluate_words(separator, data, model, processor, threshold=1.0, **options)
    assert all(row["found"] == 0 and row["separated"] == row["words"] for row in nobody)


def test_words_only_of_mixtures_with_all_transcripts(recordings, whisper_path, capsys):
    data = ssm.MultiSpeakerDataset(recordings, "val")
    data.samples[1]["speakers"][0]["text"] = ""
    model, processor = load_model(str(whisper_path), dtype=torch.float32)
    rows = ssm.evaluate_words(
        separator_of("spectrogram"), data, model, processor, max_new_tokens=1)
    assert [row["id"] for row in rows] == [
        sample["id"] for i, sample in enumerate(data.samples) if i != 1]
    assert "without 1 mixtures that lack" in capsys.readouterr().out


@pytest.mark.parametrize("wav_file", [None, "../../speaker.wav"])
def test_words_of_damaged_metadata(wav_file, encoded, qwen_folder, tmp_path, capsys):
    """The features beside the recordings are whole."""
    data = shutil.copytree(encoded, tmp_path / "data")
    speaker = {} if wav_file is None else {"wav_file": wav_file}
    edit_json(data / "val/metadata.json", lambda rows: rows[0]["speakers"].__setitem__(
        0, {k: v for k, v in rows[0]["speakers"][0].items() if k != "wav_file"} | speaker))
    checkpoint = save_tiny_checkpoint(tmp_path / "a.pt", separator_of(1))
    argv = ["evaluate", f"--data_dir={data}", f"--checkpoint={checkpoint}",
            f"--model={qwen_folder}", "--device=cpu"]  # fmt: skip
    assert_fails(capsys, argv, data / "val", "outside" if wav_file else "no recordings")


def test_answers_that_a_window_ends_are_counted(recordings, qwen_folder, capsys):
    model, processor = load_model(str(qwen_folder), dtype=torch.float32)
    data = ssm.MultiSpeakerDataset(recordings, "val")
    window = processor.feature_extractor.n_samples / 16000
    cut = sum(sample["seconds"] > window for sample in data.samples)
    assert 0 < cut < len(data)
    ssm.evaluate_words(separator_of("spectrogram"), data, model, processor, max_new_tokens=1)
    assert capsys.readouterr().out.startswith(f"{cut} mixtures are longer than the model's window")


def test_recordings_are_asked_in_batches(recordings, qwen_folder, monkeypatch):
    """More recordings than one batch holds; the answers come back in their order."""
    model, processor = load_model(str(qwen_folder))
    ssm.integrate_speaker_separator(model, None, make_separator("spectrogram"), threshold=0.0)
    data = ssm.MultiSpeakerDataset(recordings, "val")
    few = [read_audio(data.folder / sample["mixed_wav"]) for sample in data.samples]
    many = [few[i % len(few)] for i in range(18)]
    together = ssm.transcribe(model, processor, many, max_new_tokens=3)
    alone = [ask(model, processor, [samples], max_new_tokens=3) for samples in few]
    assert together == [alone[i % len(few)] for i in range(18)]
    assert [len(texts) for texts in together] == [3] * 18


@both
def test_evaluate_model_prints_and_writes(
    kind, word_data, qwen_folder, whisper_path, tmp_path, capsys
):
    """In the precision of the model's file: a Whisper in float16, a Qwen2-Audio in float32."""
    checkpoint = save_tiny_checkpoint(tmp_path / "s.pt", separator_of(kind))
    for model, words in ((whisper_path, "`language`"), (qwen_folder, "is for Whisper")):
        argv = ["evaluate", f"--checkpoint={checkpoint}", *CPU_FLAGS, f"--data_dir={word_data}",
                f"--model={model}", "--max_new_tokens=4", f"--json={tmp_path / 'scores.json'}"]
        assert_fails(capsys, [*argv, "--language=en"], words)
        if model == whisper_path:  # it failed late, and what was known before is kept
            assert "si_sdr_improvement" in json.loads((tmp_path / "scores.json").read_text())
        assert ssm.main(argv) == 0
        printed = capsys.readouterr().out
        header = "| cpWER | mixtures | no separator | separated | talker alone |"
        assert header in printed
        words = json.loads((tmp_path / "scores.json").read_text())["words"]
        assert sum(row["mixtures"] for row in words if "talker" in row["of"]) == 4
        assert all(line in printed for line in word_table(words))


def test_a_known_count_is_used_for_words_too(recordings, qwen_folder, tmp_path):
    checkpoint = save_tiny_checkpoint(tmp_path / "s.pt", separator_of("spectrogram"))
    argv = ["evaluate", f"--checkpoint={checkpoint}", *CPU_FLAGS, f"--data_dir={recordings}",
            f"--model={qwen_folder}", "--max_new_tokens=2", f"--json={tmp_path / 'scores.json'}"]
    counts = [len(s["speakers"]) for s in ssm.MultiSpeakerDataset(recordings, "val").samples]
    for known in (1, 2):
        assert ssm.main([*argv, f"--num_speakers={known}"]) == 0
        words = json.loads((tmp_path / "scores.json").read_text())["words"]
        right = {row["of"]: row["count_accuracy"] for row in words}
        assert {n for n in (1, 2) if right.get(f"{n} talker{'s' * (n > 1)}") == 1} == (
            {known} & set(counts))


# --------------------------------------------------------------------------------------------------
# Refusals


def test_evaluate_model_needs_recordings(best, dataset, qwen_folder, capsys):
    argv = ["evaluate", f"--checkpoint={best}", f"--data_dir={dataset}", f"--model={qwen_folder}",
            *CPU_FLAGS]  # fmt: skip
    assert_fails(capsys, argv, "transcripts", "--speech_dir")


def test_evaluate_model_needs_transcripts(
    recordings, spectrogram_checkpoint, qwen_folder, tmp_path, capsys
):
    import shutil

    data = shutil.copytree(recordings, tmp_path / "data")

    def without_texts(rows):
        for row in rows:
            for speaker in row["speakers"]:
                speaker["text"] = ""

    edit_json(data / "val/metadata.json", without_texts)
    argv = ["evaluate", f"--checkpoint={spectrogram_checkpoint}", f"--data_dir={data}",
            f"--model={qwen_folder}", *CPU_FLAGS]  # fmt: skip
    assert_fails(capsys, argv, "transcripts", "--speech_dir")


def test_evaluate_a_model_that_is_not_there(recordings, spectrogram_checkpoint, capsys):
    argv = ["evaluate", f"--checkpoint={spectrogram_checkpoint}", f"--data_dir={recordings}",
            "--model=no/such_model", *CPU_FLAGS]  # fmt: skip
    assert_fails(capsys, argv, "no/such_model")


def test_a_failure_takes_the_separator_out_again(recordings, qwen, processor):
    def fail(ids, scores):
        if getattr(qwen, "speaker_rows", 0) is None:  # only while a separator is inside
            raise RuntimeError("out of memory")
        return scores

    with pytest.raises(RuntimeError, match="out of memory"):
        ssm.evaluate_words(
            separator_of("spectrogram"), ssm.MultiSpeakerDataset(recordings, "val"), qwen,
            processor, max_new_tokens=2, logits_processor=[fail])
    assert not hasattr(qwen, "speaker_separator")
