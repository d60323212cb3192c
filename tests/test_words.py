"""Transcripts: speech remixing, the loss through the frozen model, word error rates."""

import numpy as np
import pytest
import torch
from conftest import (
    RATE,
    WIDTH,
    assert_fails,
    edit_json,
    sine,
    tiny_extractor,
    tiny_separator,
    train_flags,
    write_wav,
)
from torch.nn import functional as F

import generate_multi_speaker_dataset as generator
import speaker_separator_module as ssm

LAYERS = [None, 0, 1]


@pytest.fixture(scope="module")
def speech_data(qwen_folder, tmp_path_factory):
    """A dataset of recordings that are said to say a word each; not to be written to."""
    folder = tmp_path_factory.mktemp("speech")
    for speaker in range(4):
        for take in range(3):
            name = folder / f"recordings/s{speaker}/{take}"
            write_wav(name.with_suffix(".wav"), sine(0.3 + 0.05 * take, 150 + 70 * speaker))
            name.with_suffix(".txt").write_text(f"w{speaker} w{take}")
    argv = [f"--speech_dir={folder / 'recordings'}", f"--encoder={qwen_folder}", "--layer=1",
            "--min_speakers=1", "--train_samples=3", "--val_samples=6", "--split_by=utterance",
            "--device=cpu", f"--output_dir={folder / 'data'}"]  # fmt: skip
    assert generator.main(argv) == 0
    return folder / "data"


@pytest.fixture(scope="module")
def whisper_and_processor(whisper_folder, tmp_path_factory):
    """The tiny Whisper with a tokenizer of letters beside it."""
    from transformers import WhisperForConditionalGeneration, WhisperProcessor, WhisperTokenizer

    special = ["<|endoftext|>", "<|startoftranscript|>", "<|en|>", "<|notimestamps|>"]
    vocabulary = {token: i for i, token in enumerate([*special, *"wabcde0123456789", "Ġ"])}
    tokenizer = WhisperTokenizer(vocab=vocabulary, merges=[])
    folder = tmp_path_factory.mktemp("listener")
    model = WhisperForConditionalGeneration.from_pretrained(whisper_folder)
    model.save_pretrained(folder)
    WhisperProcessor(tiny_extractor(), tokenizer).save_pretrained(folder)
    return folder


# --------------------------------------------------------------------------------------------------
# Speech remixing


def remixed(data, seed=5, streams=3):
    return ssm.RemixedSpeech(ssm.MultiSpeakerDataset(data, "train"), streams, seed, length=24)


def test_speech_remix_is_deterministic(speech_data):
    first, again, other = remixed(speech_data), remixed(speech_data), remixed(speech_data, seed=6)
    for index in (3, 0, 7):
        for a, b in zip(first[index]["waveforms"], again[index]["waveforms"], strict=True):
            np.testing.assert_array_equal(a, b)
    assert [first[i]["texts"] for i in range(12)] != [other[i]["texts"] for i in range(12)]
    before = first[0]["waveforms"][0]
    first.epoch = 1
    assert not np.array_equal(first[0]["waveforms"][0], before)


def test_speech_remix_adds_up_and_is_encoded_together(speech_data, qwen_folder):
    mixtures = remixed(speech_data, seed=7)
    items = [mixtures[i] for i in range(24)]
    assert {len(item["texts"]) for item in items} >= {1, 2, 3}
    counts = np.bincount([mixtures.draw_count(i)[1] for i in range(3000)]) / 3000
    np.testing.assert_allclose(counts, [0.04, 0.16, 0.32, 0.48], atol=0.03)
    for item in items:
        mixture, *sources = item["waveforms"]
        np.testing.assert_allclose(mixture, sum(sources, np.zeros_like(mixture)), atol=1e-6)
        assert all(text in {f"w{s} w{t}" for s in range(4) for t in range(3)}
                   for text in item["texts"])  # fmt: skip
    encoded = mixtures.encode(items)
    alone = ssm.encode_audio(items[0]["waveforms"][0], str(qwen_folder), 1, RATE)
    torch.testing.assert_close(encoded[0]["mixture"], alone, atol=1e-4, rtol=1e-4)
    for item, features in zip(items, encoded, strict=True):
        assert features["targets"].shape == (len(item["texts"]), *features["mixture"].shape)


def test_mixtures_of_a_batch_are_of_like_length(speech_data):
    """Batches of like length, each mixture once, in an order that changes with the seed."""
    lengths = np.random.default_rng(0).uniform(1, 4, 330).tolist()
    batches = [ssm.shuffled_batches(lengths, 8, torch.Generator().manual_seed(seed))
               for seed in (1, 1, 2)]  # fmt: skip
    assert batches[0] == batches[1] != batches[2]
    for split in batches:
        assert sorted(i for batch in split for i in batch) == list(range(330))
        padded = sum(max(lengths[i] for i in batch) * len(batch) for batch in split)
        assert sum(lengths) < padded < 1.1 * sum(lengths)
        means = [np.mean([lengths[i] for i in batch]) for batch in split]
        assert abs(np.mean(means[:20]) - np.mean(means[20:])) < 0.5  # not from short to long
    mixtures = remixed(speech_data)
    batch = next(iter(ssm.make_loader(mixtures, 3, 3, "cpu", seed=1)))
    assert len(batch["mixture"]) == 3
    rendered = [len(mixtures[i]["waveforms"][0]) / RATE for i in range(24)]
    np.testing.assert_allclose(mixtures.seconds(), rendered, atol=0.01)


def test_training_on_remixed_speech(speech_data, tmp_path, capsys):
    assert ssm.main(train_flags(speech_data, tmp_path / "run", "--remix")) == 0
    assert "3 training (remixed to 4 an epoch)" in capsys.readouterr().out


def test_remixing_needs_the_recordings(speech_data, tmp_path, capsys):
    import shutil

    data = shutil.copytree(speech_data, tmp_path / "data")
    edit_json(data / "train/utterances.json", lambda rows: rows[0].update(audio="gone.wav"))
    assert_fails(capsys, train_flags(data, tmp_path / "run", "--remix"), "gone.wav")


# --------------------------------------------------------------------------------------------------
# The loss through the frozen model


def a_batch(layer, frames=(24, 18)):
    """Two mixtures with two talkers and one; T is a count of frames after ``layer``."""
    per = 1 if layer is None else 2
    lengths = torch.tensor(frames) * per // 2
    T = int(lengths.max())
    torch.manual_seed(3)
    return {"mixture": torch.randn(2, T, WIDTH), "frame_mask": torch.arange(T) < lengths[:, None],
            "texts": [["w1 w2", "w3"], ["w4 w5 w6"]]}  # fmt: skip


@pytest.mark.parametrize("layer", LAYERS)
def test_transcript_loss_equals_the_slow_way(layer, qwen, qwen_folder, processor):
    """One row at a time, its embeddings put together by hand."""
    batch, assignment = a_batch(layer), torch.tensor([[2, 0, 1], [1, 0, 2]])
    separated = torch.randn(2, 3, *batch["mixture"].shape[1:])
    loss = ssm.TranscriptLoss(str(qwen_folder), layer)(separated, assignment, batch)
    inner, tokenizer = getattr(qwen, "model", qwen), processor.tokenizer
    before, after = ssm.build_prompt(processor, ssm.DEFAULT_PROMPT).split("<|AUDIO|>")
    total = count = 0
    for sample, stream, text in ((0, 2, "w1 w2"), (0, 0, "w3"), (1, 1, "w4 w5 w6")):
        T = int(batch["frame_mask"][sample].sum())
        streams = separated[sample : sample + 1, stream, :T]
        hidden = ssm.tower_rest(inner.audio_tower, streams, None, layer)
        audio = inner.multi_modal_projector(hidden)[0]
        embed = inner.get_input_embeddings()
        answer = torch.tensor(tokenizer(text)["input_ids"] + [tokenizer.eos_token_id])
        pieces = [embed(torch.tensor(tokenizer(before)["input_ids"])), audio,
                  embed(torch.tensor(tokenizer(after)["input_ids"])), embed(answer)]  # fmt: skip
        logits = qwen(inputs_embeds=torch.cat(pieces)[None]).logits[0]
        wrong = F.cross_entropy(logits[-len(answer) - 1 : -1], answer, reduction="sum")
        total, count = total + wrong, count + len(answer)
    torch.testing.assert_close(loss, total / count, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("layer", LAYERS)
def test_whisper_transcript_loss_equals_the_slow_way(layer, whisper_and_processor):
    transcripts = ssm.TranscriptLoss(str(whisper_and_processor), layer)
    batch, assignment = a_batch(layer), torch.tensor([[2, 0, 1], [1, 0, 2]])
    batch["frame_mask"][:] = True
    separated = torch.randn(2, 3, *batch["mixture"].shape[1:])
    loss = transcripts(separated, assignment, batch)
    model, _ = ssm.load_listener(str(whisper_and_processor))
    ids = transcripts.processor.tokenizer
    total = count = 0
    for sample, stream, text in ((0, 2, "w1 w2"), (0, 0, "w3"), (1, 1, "w4 w5 w6")):
        streams = separated[sample : sample + 1, stream]
        hidden = ssm.tower_rest(model.model.encoder, streams, None, layer)
        said = torch.tensor(ids(text)["input_ids"])
        logits = model(encoder_outputs=(hidden,), decoder_input_ids=said[None, :-1]).logits[0]
        total = total + F.cross_entropy(logits, said[1:], reduction="sum")
        count += len(said) - 1
    torch.testing.assert_close(loss, total / count, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("layer", "until"), [*((layer, None) for layer in LAYERS), (0, 1)])
def test_output_loss_equals_the_slow_way(layer, until, qwen):
    """One talker at a time, without padding; no loss for streams that are right."""
    tower, batch = ssm.audio_tower_of(qwen), a_batch(layer)
    assignment = torch.tensor([[2, 0, 1], [1, 0, 2]])
    separated, targets = (torch.randn(2, 3, *batch["mixture"].shape[1:]) for _ in range(2))
    batch |= {"targets": targets, "speaker_mask": torch.tensor([[1, 1, 0], [1, 0, 0]]).bool()}
    loss = ssm.OutputLoss(tower, layer, 1.0, until)
    errors = []
    for sample, talker, stream in ((0, 0, 2), (0, 1, 0), (1, 0, 1)):
        T = int(batch["frame_mask"][sample].sum())
        a, b = (ssm.tower_rest(tower, features[None, :T], None, layer, until) for features in
                (separated[sample, stream], targets[sample, talker]))  # fmt: skip
        errors.append((a - b).square().mean())
    expected = torch.stack(errors).mean()
    torch.testing.assert_close(loss(separated, assignment, batch), expected, rtol=1e-3, atol=1e-5)
    right = ssm.reorder(targets, assignment.argsort(1))
    assert loss(right, assignment, batch) < 1e-6


def test_train_with_output_loss(speech_data, tmp_path, capsys):
    argv = train_flags(speech_data, tmp_path / "run", "--remix", "--output_weight=10",
                       "--mask=residual")  # fmt: skip
    assert ssm.main(argv) == 0
    assert " output " in capsys.readouterr().out
    checkpoint = ssm.load_checkpoint(tmp_path / "run/best_model.pt")
    row = checkpoint["train_history"][0]["val"]
    assert row["total"] == pytest.approx(
        row["separation"] + 0.5 * row["activity"] + 10 * row["output"], rel=1e-4)  # fmt: skip
    assert checkpoint["model_config"]["mask"] == "residual"


def test_output_block_must_follow_the_layer(speech_data, tmp_path, capsys):
    argv = train_flags(speech_data, tmp_path / "run", "--output_weight=1", "--output_block=1")
    assert_fails(capsys, argv, "--output_block", "behind the data's layer, 1")


def test_gradients_reach_the_separator_and_nothing_else(qwen_folder):
    transcripts = ssm.TranscriptLoss(str(qwen_folder), 1)
    before = {name: weight.clone() for name, weight in transcripts.model.state_dict().items()}
    separator = tiny_separator(mask="gains").train()
    optimizer = torch.optim.AdamW(separator.parameters(), lr=1e-2)
    batch, losses = a_batch(1), []
    for _ in range(12):
        separated, _ = separator(batch["mixture"], batch["frame_mask"])
        loss = transcripts(separated, torch.tensor([[0, 1, 2]] * 2), batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    touched = [name for name, p in separator.named_parameters()
               if p.grad is not None and p.grad.abs().sum() > 0]  # fmt: skip
    assert "speaker_queries" in touched and "refinement.0.linear1.weight" in touched
    assert losses[-1] < losses[0]
    after = transcripts.model.state_dict()
    assert all(torch.equal(after[name], weight) for name, weight in before.items())
    assert all(weight.grad is None for weight in transcripts.model.parameters())


def test_mixtures_without_transcripts_cost_nothing(qwen_folder):
    batch = a_batch(1) | {"texts": [["", ""], []]}
    separated = torch.randn(2, 3, *batch["mixture"].shape[1:], requires_grad=True)
    transcripts = ssm.TranscriptLoss(str(qwen_folder), 1)
    loss = transcripts(separated, torch.tensor([[0, 1, 2]] * 2), batch)
    loss.backward()
    assert loss.item() == 0 and separated.grad.abs().sum() == 0


def test_train_with_llm(speech_data, qwen_folder, tmp_path, capsys):
    argv = train_flags(speech_data, tmp_path / "run", "--remix", f"--llm={qwen_folder}")
    assert ssm.main(argv) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch"))
    assert "transcript" in line
    history = ssm.load_checkpoint(tmp_path / "run/best_model.pt")["train_history"]
    row = history[0]["val"]
    parts = row["separation"] + 0.5 * row["activity"] + 0.1 * row["transcript"]
    assert row["total"] == pytest.approx(parts, rel=1e-4)


def test_llm_bad_input(speech_data, dataset, whisper_folder, qwen_folder, tmp_path, capsys):
    argv = train_flags(dataset, tmp_path / "run", f"--llm={qwen_folder}")
    assert_fails(capsys, argv, "--llm", "recordings")
    argv = train_flags(speech_data, tmp_path / "run", "--llm=no/such_model")
    assert_fails(capsys, argv, "no/such_model")


# --------------------------------------------------------------------------------------------------
# Word error rates


@pytest.mark.parametrize(
    ("said", "heard", "errors"),
    [
        (["one two", "three"], ["three", "one two"], 0),
        (["One, two!", "three"], ["three.", "one TWO"], 0),
        (["one two", "three"], ["one two three"], 2),
        (["one two", "three"], [], 3),
        (["one two"], ["one two", "four"], 1),
        (["one two", "three four", "five"], ["five", "three two four", "one"], 2),
        ([], [], 0),
        ([], ["one two"], 2),
        (["", "one"], ["one"], 0),
    ],
)
def test_cp_word_errors(said, heard, errors):
    assert ssm.cp_word_errors(said, heard) == errors


def test_word_scores_are_grouped():
    rows = [
        {"talkers": n, "overlap": overlap, "words": 4, "found": found,
         "mixture": 4, "separated": 1, "oracle": 0}
        for n, overlap, found in ((1, 0.0, 1), (2, 0.9, 2), (2, 0.1, 3), (3, 1.0, 3))
    ]  # fmt: skip
    scores = {row["of"]: row for row in ssm.word_scores(rows)}
    assert list(scores) == ["1 talker", "2 talkers", "3 talkers",
                            "overlap 0% to 20%", "overlap 80% to 100%"]  # fmt: skip
    assert scores["2 talkers"]["count_accuracy"] == 0.5
    assert scores["overlap 80% to 100%"]["mixtures"] == 2
    assert scores["3 talkers"]["separated"] == 0.25 and scores["3 talkers"]["mixture"] == 1


def test_evaluate_words_against_the_slow_way(speech_data, qwen_folder, qwen, processor):
    """Every recording by itself, before and after the separator is put in."""
    data = ssm.MultiSpeakerDataset(speech_data, "val")
    separator = tiny_separator(seed=4, threshold=0.0, feature_source={"layer": 1})
    model, _ = ssm.load_listener(str(qwen_folder))
    rows = ssm.evaluate_words(separator, data, model, processor, max_new_tokens=5)
    assert not hasattr(model, "speaker_separator")

    def answer(wav):
        samples = ssm.read_audio(data.folder / wav, RATE)
        return ssm.hear(qwen, processor, [samples], ssm.DEFAULT_PROMPT, max_new_tokens=5)[0]

    texts = [[s["text"] for s in sample["speakers"]] for sample in data.samples]
    plain = [answer(sample["mixed_wav"]) for sample in data.samples]
    alone = [[answer(s["wav_file"])[0] for s in sample["speakers"]] for sample in data.samples]
    ssm.integrate_speaker_separator(qwen, 3, separator)
    streams = [answer(sample["mixed_wav"]) for sample in data.samples]
    for i, row in enumerate(rows):
        assert row["mixture"] == ssm.cp_word_errors(texts[i], plain[i])
        assert row["oracle"] == ssm.cp_word_errors(texts[i], alone[i])
        assert row["separated"] == ssm.cp_word_errors(texts[i], streams[i])
        assert row["found"] == 3 and row["words"] == sum(len(t.split()) for t in texts[i])
    known = ssm.evaluate_words(separator, data, model, processor, num_speakers=2, max_new_tokens=5)
    assert {row["found"] for row in known} == {2}


def test_evaluate_model_prints_and_writes(speech_data, qwen_folder, tmp_path, capsys):
    assert ssm.main(train_flags(speech_data, tmp_path / "run")) == 0
    argv = ["evaluate", f"--checkpoint={tmp_path / 'run/best_model.pt'}", "--device=cpu",
            f"--data_dir={speech_data}", f"--model={qwen_folder}", "--max_new_tokens=4",
            f"--json={tmp_path / 'scores.json'}"]  # fmt: skip
    capsys.readouterr()
    assert ssm.main(argv) == 0
    assert "| cpWER | mixtures | no separator | separated | oracle |" in capsys.readouterr().out
    import json

    words = json.loads((tmp_path / "scores.json").read_text())["words"]
    assert sum(row["mixtures"] for row in words if "talker" in row["of"]) == 6


def test_evaluate_model_needs_recordings(best, dataset, qwen_folder, capsys):
    argv = ["evaluate", f"--checkpoint={best}", f"--data_dir={dataset}", f"--model={qwen_folder}",
            "--device=cpu"]  # fmt: skip
    assert_fails(capsys, argv, "--speech_dir")




def test_speech_takes_the_trunk_on_frames(speech_data, tmp_path):
    for flags, trunk in (((), "frames"), (("--trunk=queries",), "queries")):
        assert ssm.main(train_flags(speech_data, tmp_path / trunk, *flags)) == 0
        config = ssm.load_checkpoint(tmp_path / trunk / "best_model.pt")["model_config"]
        assert (config["trunk"], config["mask"]) == (trunk, "gains")
