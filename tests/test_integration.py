"""Encoders and the separator inside real models of a tiny size."""

import copy
import json
import pickle
import shutil

import numpy as np
import pytest
import soundfile
import torch
from conftest import (
    RATE,
    SHARED,
    WIDTH,
    save_tiny_checkpoint,
    sine,
    tiny_extractor,
    tiny_separator,
)

import speaker_separator_module as ssm

RECORDINGS = [sine(0.9, 150), sine(0.35, 420), sine(0.61, 260)]
LAYERS = [None, 0, 1, 2]
PROMPT = "What does the person say?"


def ask(processor, recordings, prompt=PROMPT):
    """The documented call of the processor, for one recording or several."""
    text = ssm.build_prompt(processor, prompt)
    return processor(
        text=[text] * len(recordings), audio=list(recordings), sampling_rate=RATE,
        return_tensors="pt", padding=True)  # fmt: skip


def answers(model, inputs, **options):
    """New tokens of every row, without padding and without what follows the end."""
    rows = model.generate(**inputs, **options)[:, inputs["input_ids"].size(1) :].tolist()
    stop = model.generation_config.eos_token_id
    return [row[: row.index(stop)] if stop in row else row for row in rows]


def pass_through(model):
    """Make the separator of an integrated model return the mixture, as the one talker."""

    def forward(features, frame_mask=None):
        streams = torch.zeros(len(features), 3, *features.shape[1:])
        streams[:, 0] = features
        return streams, torch.tensor([[1.0, 0.0, 0.0]]).repeat(len(features), 1)

    model.speaker_separator.forward = forward
    return model


@pytest.fixture
def integrate(tmp_path):
    """Put a tiny separator (random unless given) into a model; every stream is a talker."""

    def put(model, layer=None, threshold=0.0, separator=None):
        path = save_tiny_checkpoint(tmp_path / "put.pt", separator or tiny_separator(3, seed=4))
        return ssm.integrate_speaker_separator(
            model, separator_checkpoint=path, layer=layer, threshold=threshold)  # fmt: skip

    return put


def tower_states(tower, inputs):
    """What the tower itself computes: hidden states after every block, its output, both masks."""
    states, hooks = [], []
    hooks.append(tower.layers[0].register_forward_pre_hook(lambda m, args: states.append(args[0])))
    for block in tower.layers:
        keep = lambda m, a, out: states.append(out[0] if isinstance(out, tuple) else out)  # noqa: E731
        hooks.append(block.register_forward_hook(keep))
    mask = inputs["feature_attention_mask"]
    frames = mask.shape[1] // 2
    lengths = (mask.sum(1) - 1) // 2 + 1
    inside = torch.arange(frames) < lengths[:, None]
    blocked = torch.zeros(len(mask), 1, frames, frames).masked_fill(
        ~inside[:, None, None], torch.finfo(torch.float32).min)  # fmt: skip
    with torch.no_grad():
        output = tower(inputs["input_features"], attention_mask=blocked).last_hidden_state
    for hook in hooks:
        hook.remove()
    halved = torch.arange(frames // 2) < ((lengths - 2) // 2 + 1)[:, None]
    return states, output, inside, halved


# --------------------------------------------------------------------------------------------------
# Encoders


@pytest.mark.parametrize("layer", LAYERS)
def test_encode_audio_equals_the_models_own_tower(layer, qwen, qwen_folder, processor):
    encoder = ssm.load_audio_encoder(str(qwen_folder))
    inputs = ask(processor, RECORDINGS)
    states, output, inside, halved = tower_states(ssm.audio_tower_of(qwen), inputs)
    expected, mask = (output, halved) if layer is None else (states[layer], inside)
    assert encoder.frame_rate(layer) == (25 if layer is None else 50)
    for b, samples in enumerate(RECORDINGS):
        features = ssm.encode_audio(samples, encoder, layer)
        assert features.shape == (int(mask[b].sum()), WIDTH)
        torch.testing.assert_close(features, expected[b][mask[b]], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layer", LAYERS)
def test_front_and_rest_make_the_tower(layer, qwen, processor):
    tower, inputs = ssm.audio_tower_of(qwen), ask(processor, RECORDINGS)
    _, output, inside, halved = tower_states(tower, inputs)
    with torch.no_grad():
        hidden, frame_mask = ssm.tower_front(
            tower, inputs["input_features"], inputs["feature_attention_mask"], layer)  # fmt: skip
        whole = ssm.tower_rest(tower, hidden, frame_mask, layer)
    assert torch.equal(frame_mask, halved if layer is None else inside)
    torch.testing.assert_close(whole[halved], output[halved], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layer", LAYERS)
def test_whisper_encoder(layer, whisper_folder):
    from transformers import WhisperFeatureExtractor, WhisperForConditionalGeneration

    model = WhisperForConditionalGeneration.from_pretrained(whisper_folder).eval()
    extractor = WhisperFeatureExtractor.from_pretrained(whisper_folder)
    mel = extractor(RECORDINGS[2], sampling_rate=RATE, return_tensors="pt")["input_features"]
    with torch.no_grad():
        output = model.model.encoder(mel, output_hidden_states=True)
    expected = output.last_hidden_state[0]
    if layer in (0, 1):  # the last hidden state that Whisper reports is after its layer norm
        expected = output.hidden_states[layer][0]
    elif layer == 2:
        block = model.model.encoder.layers[1]
        with torch.no_grad():
            out = block(output.hidden_states[1], None)
        expected = (out[0] if isinstance(out, tuple) else out)[0]
    encoder = ssm.load_audio_encoder(str(whisper_folder))
    features = ssm.encode_audio(RECORDINGS[2], encoder, layer)
    assert encoder.frame_rate(layer) == 50
    assert len(features) == 31  # 0.61 s
    torch.testing.assert_close(features, expected[:31], rtol=1e-4, atol=1e-4)


def test_encode_audio_reads_files_and_other_rates(qwen_folder, tmp_path):
    encoder, wave = ssm.load_audio_encoder(str(qwen_folder)), sine(0.5, 200, 48000)
    soundfile.write(tmp_path / "a.wav", np.stack([wave, wave], 1), 48000, subtype="FLOAT")
    from_file = ssm.encode_audio(tmp_path / "a.wav", encoder)
    torch.testing.assert_close(ssm.encode_audio(wave, encoder, sampling_rate=48000), from_file)
    torch.testing.assert_close(ssm.encode_audio(str(tmp_path / "a.wav"), qwen_folder), from_file)
    assert len(from_file) == 12


def test_read_audio(tmp_path):
    """A sine stays that sine at another rate; channels are averaged."""
    t = np.arange(8000) / 8000
    left, right = np.sin(2 * np.pi * 440 * t), np.zeros(8000)
    soundfile.write(tmp_path / "a.wav", np.stack([left, right], 1), 8000, subtype="FLOAT")
    samples = ssm.read_audio(tmp_path / "a.wav", 16000)
    expected = 0.5 * np.sin(2 * np.pi * 440 * np.arange(16000) / 16000)
    assert samples.dtype == np.float32
    np.testing.assert_allclose(samples[200:-200], expected[200:-200], atol=2e-3)
    assert ssm.read_audio([0.5, -0.5], 16000).tolist() == [0.5, -0.5]


@pytest.mark.parametrize(
    ("samples", "words"),
    [([], "no samples"), ([0.0, float("nan")], "NaN"), ([[0.0, 0.0]], r"\[1, 2\]")],
)
def test_bad_audio_in_memory(samples, words):
    with pytest.raises(ValueError, match=words):
        ssm.read_audio(samples, RATE)


@pytest.mark.parametrize("layer", [-1, 3])
def test_layer_out_of_range(layer, qwen, qwen_folder):
    with pytest.raises(ValueError, match="0 to 2"):
        ssm.encode_audio(RECORDINGS[0], qwen_folder, layer)
    with pytest.raises(ValueError, match="0 to 2"):
        ssm.integrate_speaker_separator(qwen, layer=layer)


def test_encoder_of_another_kind(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "wav2vec2"}))
    with pytest.raises(ValueError) as error:
        ssm.load_audio_encoder(str(tmp_path))
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize("kind", ["truncated", "missing"])
def test_encoder_with_damaged_weights(kind, qwen_folder, tmp_path):
    folder = shutil.copytree(qwen_folder, tmp_path / "damaged")
    weights = folder / "model.safetensors"
    content = weights.read_bytes()
    weights.unlink()
    if kind == "truncated":
        weights.write_bytes(content[:1000])
    with pytest.raises(ValueError) as error:
        ssm.load_audio_encoder(str(folder))
    assert str(folder) in str(error.value)


def test_recording_longer_than_the_window(qwen_folder):
    with pytest.raises(ValueError, match=r"1\.5 s"):
        ssm.encode_audio(np.zeros(24000, np.float32), qwen_folder)


# --------------------------------------------------------------------------------------------------
# One row per talker


def test_the_documented_snippet(integrate, qwen, processor):
    """One row per talker that is active, in the order of the streams; then the likeliest ones."""
    model = integrate(qwen)
    prompt, audio = ssm.build_prompt(processor, PROMPT), RECORDINGS[0]
    inputs = processor(text=prompt, audio=audio, return_tensors="pt", sampling_rate=RATE)
    ids = model.generate(**inputs, max_new_tokens=6)
    texts = processor.batch_decode(ids[:, inputs["input_ids"].size(1) :], skip_special_tokens=True)
    assert len(texts) == len(ids) == 3
    assert (ids[:, : inputs["input_ids"].size(1)] == inputs["input_ids"]).all()
    assert [row[:2] for row in model.speaker_rows] == [(0, 0), (0, 1), (0, 2)]
    probabilities = [row[2] for row in model.speaker_rows]
    for count in (1, 2, 3):
        some = model.generate(**inputs, max_new_tokens=6, num_speakers=count)
        chosen = sorted(np.argsort(probabilities)[::-1][:count].tolist())
        assert [row[1] for row in model.speaker_rows] == chosen
        assert some.tolist() == ids[chosen].tolist()


def test_threshold_decides(integrate, qwen, processor):
    model, inputs = integrate(qwen), ask(processor, RECORDINGS)
    model.generate(**inputs, max_new_tokens=1)
    rows = model.speaker_rows
    threshold = float(np.median([p for *_, p in rows]))
    model = integrate(model, threshold=threshold)
    ids = model.generate(**inputs, max_new_tokens=1)
    assert model.speaker_rows == [row for row in rows if row[2] >= threshold]
    assert 0 < len(ids) == len(model.speaker_rows) < len(rows)


@pytest.mark.parametrize("layer", LAYERS)
def test_rows_equal_the_untouched_model_on_each_stream(integrate, layer, qwen, processor):
    separator, inputs = tiny_separator(3, seed=4), ask(processor, RECORDINGS[:1])
    slow = slow_rows(qwen, separator, inputs, layer, max_new_tokens=6)
    model = integrate(qwen, layer, separator=separator)
    got = model.generate(**inputs, max_new_tokens=6)
    expected = torch.nn.utils.rnn.pad_sequence([row[0] for row in slow], batch_first=True)
    assert torch.equal(got, expected)  # padded with 0, as by the model
    assert len({tuple(row) for row in got.tolist()}) > 1  # the streams do say different things


@pytest.mark.parametrize("layer", [None, 1])
def test_batch_equals_one_by_one(integrate, layer, qwen, processor):
    """Rows are grouped by recording; padding on the left of short prompts changes nothing."""
    model, inputs = integrate(qwen, layer), ask(processor, RECORDINGS)
    assert (inputs["attention_mask"][:, 0] == 0).sum() == 2
    together = answers(model, inputs, max_new_tokens=6)
    rows = model.speaker_rows
    assert [row[:2] for row in rows] == [(b, s) for b in range(3) for s in range(3)]
    alone, probabilities = [], []
    for samples in RECORDINGS:
        alone += answers(model, ask(processor, [samples]), max_new_tokens=6)
        probabilities += [p for *_, p in model.speaker_rows]
    assert together == alone
    assert [p for *_, p in rows] == pytest.approx(probabilities, abs=1e-4)


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("layer", [None, 0, 1])
def test_pass_through_equals_the_untouched_model(integrate, layer, beams, qwen, processor):
    inputs = ask(processor, RECORDINGS)
    options = {"max_new_tokens": 8, "num_beams": beams}
    untouched = qwen.generate(**inputs, **options)
    model = pass_through(integrate(qwen, layer, threshold=0.5))
    assert model.generate(**inputs, **options).tolist() == untouched.tolist()
    assert model.speaker_rows == [(0, 0, 1.0), (1, 0, 1.0), (2, 0, 1.0)]
    assert len({tuple(row) for row in answers(model, inputs, **options)}) > 1


@pytest.mark.parametrize("layer", [None, 1])
def test_half_precision(layer, integrate, qwen, processor):
    """The model in bfloat16, the separator in float32."""
    qwen.bfloat16()
    inputs = ask(processor, RECORDINGS)
    untouched = qwen.generate(**inputs, max_new_tokens=6)
    model = integrate(qwen, layer, threshold=0.0)
    assert len(model.generate(**inputs, max_new_tokens=2)) == 9
    assert {p.dtype for p in model.speaker_separator.parameters()} == {torch.float32}
    model = pass_through(integrate(qwen, layer, threshold=0.5))
    assert torch.equal(model.generate(**inputs, max_new_tokens=6), untouched)


def test_beams_of_several_talkers(integrate, qwen, processor):
    """Beams stay with their talker: each row is what its recording alone gives."""
    model, inputs = integrate(qwen, 1), ask(processor, RECORDINGS)
    together = answers(model, inputs, max_new_tokens=6, num_beams=3)
    alone = [
        row
        for samples in RECORDINGS
        for row in answers(model, ask(processor, [samples]), max_new_tokens=6, num_beams=3)
    ]
    assert together == alone


def test_silence_gives_no_row(integrate, qwen, processor):
    model, inputs = integrate(qwen, threshold=1.0), ask(processor, RECORDINGS)
    ids = model.generate(**inputs, max_new_tokens=4)
    assert ids.shape == (0, inputs["input_ids"].size(1))
    assert ids.dtype == inputs["input_ids"].dtype
    assert model.speaker_rows == []
    assert model.generate(**inputs, max_new_tokens=4, num_speakers=0).shape == ids.shape


def test_silence_in_one_recording_of_a_batch(integrate, qwen, processor):
    inputs = ask(processor, RECORDINGS)
    everyone = answers(integrate(qwen), inputs, max_new_tokens=6)
    separate = qwen.speaker_separator.forward

    def forward(features, frame_mask=None):
        probs = torch.tensor([[0.9, 0.1, 0.8], [0.1, 0.2, 0.3], [0.0, 0.7, 0.1]])
        return separate(features, frame_mask)[0], probs

    model = integrate(qwen, threshold=0.5)
    model.speaker_separator.forward = forward
    got = answers(model, inputs, max_new_tokens=6)
    assert [row[:2] for row in model.speaker_rows] == [(0, 0), (0, 2), (2, 1)]
    assert [row[2] for row in model.speaker_rows] == pytest.approx([0.9, 0.8, 0.7])
    assert got == [everyone[0], everyone[2], everyone[7]]


def test_answer_per_talker(integrate, qwen, processor):
    model = integrate(qwen)
    rows = ssm.answer_per_talker(model, processor, RECORDINGS[0], PROMPT, max_new_tokens=5)
    inputs = ask(processor, RECORDINGS[:1])
    expected = processor.batch_decode(
        answers(model, inputs, max_new_tokens=5), skip_special_tokens=True
    )
    assert [row["speaker"] for row in rows] == [1, 2, 3]
    assert [row["text"] for row in rows] == [text.strip() for text in expected]
    assert [row["probability"] for row in rows] == [round(p, 4) for *_, p in model.speaker_rows]


def test_answer_per_talker_of_silence(integrate, qwen, processor):
    assert ssm.answer_per_talker(integrate(qwen, threshold=1.0), processor, RECORDINGS[0]) == []


# --------------------------------------------------------------------------------------------------
# Every way of calling generate


def slow_rows(model, separator, inputs, layer, **options):
    """What the untouched model answers with each stream in place of its audio's features.

    ``inputs`` are of one recording; the list has an answer for every stream of the separator.
    """
    from transformers.modeling_outputs import BaseModelOutput

    tower, rows = ssm.audio_tower_of(model), []
    mask = inputs.get("feature_attention_mask", inputs.get("attention_mask"))
    with torch.no_grad():
        hidden, frame_mask = ssm.tower_front(tower, inputs["input_features"], mask, layer)
        streams, _ = separator(hidden, frame_mask)
        streams = torch.where(frame_mask[:, None, :, None], streams, hidden[:, None])
        for s in range(streams.shape[1]):
            features = ssm.tower_rest(tower, streams[:, s], frame_mask, layer)
            tower.forward = lambda *a, f=features, **k: BaseModelOutput(
                f.repeat_interleave(len(a[0] if a else k["input_features"]), 0))  # fmt: skip
            rows.append(model.generate(**inputs, **options))
            del tower.forward
    return rows


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("count", [1, 3])
def test_pass_through_of_one_and_of_three(count, beams, integrate, qwen, processor):
    inputs = ask(processor, RECORDINGS[:count])
    options = {"max_new_tokens": 8, "num_beams": beams}
    untouched = qwen.generate(**inputs, **options)
    model = pass_through(integrate(qwen, 1, threshold=0.5))
    assert torch.equal(model.generate(**inputs, **options), untouched)
    padded = {k: v.clone() for k, v in inputs.items()}  # more padding on the left
    for name, value in (("input_ids", 0), ("attention_mask", 0)):
        padded[name] = torch.nn.functional.pad(padded[name], (3, 0), value=value)
    got = model.generate(**padded, **options)
    assert torch.equal(got[:, 3:], untouched)


def test_dictionary_output(integrate, qwen, processor):
    model, inputs = integrate(qwen, 1), ask(processor, RECORDINGS)
    plain = model.generate(**inputs, max_new_tokens=4)
    output = model.generate(
        **inputs, max_new_tokens=4, return_dict_in_generate=True, output_scores=True)  # fmt: skip
    assert torch.equal(output.sequences, plain)
    assert all(scores.shape[0] == 9 for scores in output.scores)
    nobody = model.generate(
        **inputs, max_new_tokens=4, return_dict_in_generate=True, num_speakers=0)  # fmt: skip
    assert nobody.sequences.shape == (0, inputs["input_ids"].shape[1])


@pytest.mark.parametrize("options", [{"do_sample": True}, {"num_beams": 2}])
def test_several_answers_each(options, integrate, qwen, processor):
    """``speaker_rows`` names the talker of every returned row."""
    model, inputs = integrate(qwen, 1), ask(processor, RECORDINGS[:2])
    torch.manual_seed(3)
    got = answers(model, inputs, max_new_tokens=5, num_return_sequences=2, **options)
    expected = [(b, s) for b in range(2) for s in range(3) for _ in range(2)]
    assert [row[:2] for row in model.speaker_rows] == expected
    if "num_beams" in options:  # the better of two beams is what one answer would be
        assert got[::2] == answers(model, inputs, max_new_tokens=5, **options)
    else:
        torch.manual_seed(3)
        assert got == answers(model, inputs, max_new_tokens=5, num_return_sequences=2, **options)


def test_streamer(integrate, qwen, processor):
    from transformers import TextIteratorStreamer

    model, inputs = integrate(qwen, 1), ask(processor, RECORDINGS[:1])
    streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True)
    ids = model.generate(**inputs, max_new_tokens=4, num_speakers=1, streamer=streamer)
    new = ids[0, inputs["input_ids"].shape[1] :]
    assert "".join(streamer).split() == processor.tokenizer.decode(new).split()


def test_generation_config_in_second_place(integrate, qwen, processor):
    from transformers import GenerationConfig

    model, inputs = integrate(qwen, 1), ask(processor, RECORDINGS)
    config = GenerationConfig(max_new_tokens=3, pad_token_id=0, eos_token_id=-1)
    prompt = inputs.pop("input_ids")
    ids = model.generate(prompt, config, **inputs)
    assert ids.shape == (9, prompt.shape[1] + 3)


def test_audio_that_never_reached_the_processor(integrate, qwen, processor):
    """The processor ignores ``audios=``, its argument of old."""
    text = [ssm.build_prompt(processor, PROMPT)]
    inputs = processor.tokenizer(text, return_tensors="pt", return_token_type_ids=False)
    with pytest.raises(ValueError, match="audio=.*audios="):
        integrate(qwen).generate(**inputs)


def test_several_audio_slots(integrate, qwen, processor):
    model, inputs = integrate(qwen), two_slots(processor)
    with pytest.raises(ValueError, match="2 audio slots.*joint"):
        model.generate(**inputs)
    inputs["input_features"] = inputs["input_features"][:1]
    with pytest.raises(ValueError, match="2 audio slots came with 1 recordings"):
        model.generate(**inputs)


def test_unknown_mode(integrate, qwen, processor):
    with pytest.raises(ValueError, match="separate or joint"):
        integrate(qwen).generate(**ask(processor, RECORDINGS), mode="both")


# --------------------------------------------------------------------------------------------------
# All talkers in one prompt


def two_slots(processor):
    text = "<|im_start|> user a <|audio_bos|> <|AUDIO|> <|audio_eos|> " \
           "Who <|audio_bos|> <|AUDIO|> <|audio_eos|> speaks? <|im_end|>"  # fmt: skip
    return processor(text=[text], audio=RECORDINGS[:2], sampling_rate=RATE, return_tensors="pt")


def slow_joint(model, processor, separator, inputs, layer, **options):
    """One prompt at a time: slots written out as text, streams put in as audio features."""
    from transformers.modeling_outputs import BaseModelOutput

    tower, ids = ssm.audio_tower_of(model), inputs["input_ids"][0]
    text = processor.tokenizer.decode(ids[inputs["attention_mask"][0] == 1])
    mask = inputs["feature_attention_mask"]
    with torch.no_grad():
        hidden, frame_mask = ssm.tower_front(tower, inputs["input_features"], mask, layer)
        streams, _ = separator(hidden, frame_mask)
        streams = torch.where(frame_mask[:, None, :, None], streams, hidden[:, None])
        S = streams.shape[1]
        features = ssm.tower_rest(
            tower, streams.flatten(0, 1), frame_mask.repeat_interleave(S, 0), layer)  # fmt: skip
    for count in ((mask.sum(1) - 1) // 2 + 1 - 2) // 2 + 1:  # each slot once
        slot = " ".join(["<|audio_bos|>", *["<|AUDIO|>"] * count, "<|audio_eos|>"])
        labelled = " ".join(f"Speaker {n + 1}: {slot.replace('|', '!')}" for n in range(S))
        text = text.replace(slot, labelled, 1)
    prompt = processor.tokenizer([text.replace("!", "|")], return_tensors="pt")
    tower.forward = lambda *a, **k: BaseModelOutput(features)
    try:
        ids = model.generate(
            input_ids=prompt["input_ids"], attention_mask=prompt["attention_mask"],
            input_features=inputs["input_features"].repeat_interleave(S, 0),
            feature_attention_mask=mask.repeat_interleave(S, 0), **options)  # fmt: skip
    finally:
        del tower.forward
    return ids[0, prompt["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("layer", [None, 1])
def test_joint(layer, integrate, qwen, processor):
    plain, separator = copy.deepcopy(qwen), tiny_separator(3, seed=4)
    model, options = integrate(qwen, layer, separator=separator), {"max_new_tokens": 6}
    joint = {"mode": "joint", "tokenizer": processor.tokenizer}
    inputs = ask(processor, RECORDINGS)
    ids = model.generate(**inputs, **joint, **options)
    L = inputs["input_ids"].shape[1]
    assert torch.equal(ids[:, :L], inputs["input_ids"])  # the documented snippet cuts there
    assert [row[:2] for row in model.speaker_rows] == [(b, s) for b in range(3) for s in range(3)]
    assert len({tuple(row) for row in ids[:, L:].tolist()}) > 1
    for b, samples in enumerate(RECORDINGS):
        alone = ask(processor, [samples])
        expected = slow_joint(plain, processor, separator, alone, layer, **options)
        assert ids[b, L : L + len(expected)].tolist() == expected
        beams = answers(model, alone, **joint, **options, num_beams=2)
        assert beams[0] == answers(model, inputs, **joint, **options, num_beams=2)[b]
    slots = two_slots(processor)
    expected = slow_joint(plain, processor, separator, slots, layer, **options)
    ids = model.generate(**slots, **joint, **options)
    assert ids[0, slots["input_ids"].shape[1] :].tolist() == expected
    with pytest.raises(ValueError, match="beams"):
        model.generate(**slots, **joint, num_beams=2)


def test_joint_leaves_silence_out(integrate, qwen, processor):
    """Of three recordings the second is silent; its prompt gets no row."""
    inputs = ask(processor, RECORDINGS)
    joint = {"mode": "joint", "tokenizer": processor.tokenizer, "max_new_tokens": 4}
    model = integrate(qwen, 1, threshold=0.5)
    separate = model.speaker_separator.forward

    def forward(features, frame_mask=None):
        probs = torch.tensor([[0.9, 0.1, 0.8], [0.1, 0.2, 0.3], [0.0, 0.7, 0.1]])
        return separate(features, frame_mask)[0], probs[: len(features)]

    model.speaker_separator.forward = forward
    output = model.generate(**inputs, **joint, return_dict_in_generate=True)
    L = inputs["input_ids"].shape[1]
    assert [row[:2] for row in model.speaker_rows] == [(0, 0), (0, 2), (2, 1)]
    assert torch.equal(output.sequences[:, :L], inputs["input_ids"][[0, 2]])
    first = model.generate(**ask(processor, RECORDINGS[:1]), **joint)
    assert torch.equal(first[0, -4:], output.sequences[0, L:])


def test_joint_needs_a_tokenizer(integrate, qwen, processor):
    with pytest.raises(ValueError, match="tokenizer=processor.tokenizer"):
        integrate(qwen).generate(**ask(processor, RECORDINGS), mode="joint")


# --------------------------------------------------------------------------------------------------
# Copies, files, compilers and devices


def test_saving_saves_the_model_alone(integrate, qwen, qwen_folder, processor, tmp_path):
    from safetensors.torch import load_file

    model, inputs = integrate(qwen, 1), ask(processor, RECORDINGS[:1])
    expected = model.generate(**inputs, max_new_tokens=5)
    model.save_pretrained(tmp_path / "model")
    model.speaker_separator.save_pretrained(tmp_path / "separator")
    saved, before = (load_file(f / "model.safetensors") for f in (tmp_path / "model", qwen_folder))
    assert saved.keys() == before.keys()
    assert all(torch.equal(saved[name], before[name]) for name in saved)
    again = type(qwen).from_pretrained(tmp_path / "model").eval()
    ssm.integrate_speaker_separator(
        again, separator_checkpoint=tmp_path / "separator", layer=1, threshold=0.0)  # fmt: skip
    assert torch.equal(again.generate(**inputs, max_new_tokens=5), expected)


@pytest.mark.parametrize("how", ["copy", "pickle"])
def test_copies_stand_on_their_own(how, integrate, qwen, processor):
    model, inputs = integrate(qwen, 1), ask(processor, RECORDINGS)
    expected = model.generate(**inputs, max_new_tokens=4)
    twin = copy.deepcopy(model) if how == "copy" else pickle.loads(pickle.dumps(model))
    assert twin._speaker_integration.tower is ssm.audio_tower_of(twin)
    ssm.remove_speaker_separator(model)
    assert torch.equal(twin.generate(**inputs, max_new_tokens=4), expected)
    assert len(twin.speaker_rows) == 9


@pytest.mark.parametrize("what", ["model before", "model after", "forward", "tower", "in place"])
def test_compiled(what, integrate, qwen, processor):
    inputs = ask(processor, RECORDINGS[:2])
    expected = integrate(copy.deepcopy(qwen), 1).generate(**inputs, max_new_tokens=3)
    compile_ = {"backend": "eager"}
    model = qwen
    if what == "model before":
        model = torch.compile(qwen, **compile_)
    if what == "tower":
        owner = getattr(qwen, "model", qwen)
        owner.audio_tower = torch.compile(owner.audio_tower, **compile_)
    if what == "in place":
        qwen.compile(**compile_)
    assert integrate(model, 1) is model
    if what == "model after":
        model = torch.compile(model, **compile_)
    if what == "forward":
        model.forward = torch.compile(model.forward, **compile_)
    got = model.generate(**inputs, max_new_tokens=3)
    assert torch.equal(got, expected)
    assert len(model.speaker_rows) == 6
    ssm.remove_speaker_separator(model)
    assert "generate" not in vars(qwen)


def test_float16_by_one_argument(qwen_folder, integrate, processor):
    from transformers import Qwen2AudioForConditionalGeneration

    qwen = Qwen2AudioForConditionalGeneration.from_pretrained(qwen_folder, dtype=torch.float16)
    inputs = ask(processor, RECORDINGS)
    untouched = qwen.generate(**inputs, max_new_tokens=5)
    model = pass_through(integrate(qwen, 1, threshold=0.5))
    assert torch.equal(model.generate(**inputs, max_new_tokens=5), untouched)
    assert model.half().speaker_separator.speaker_queries.dtype == torch.float32


def test_device_map(qwen_folder, integrate, processor):
    pytest.importorskip("accelerate", reason="device_map needs accelerate")
    from transformers import Qwen2AudioForConditionalGeneration

    inputs = ask(processor, RECORDINGS)
    plain = Qwen2AudioForConditionalGeneration.from_pretrained(qwen_folder).eval()
    expected = integrate(plain, 1).generate(**inputs, max_new_tokens=5)
    placed = Qwen2AudioForConditionalGeneration.from_pretrained(qwen_folder, device_map="cpu")
    from accelerate import dispatch_model

    for model in (placed, dispatch_model(plain, {"": "cpu"}, force_hooks=True)):
        got = integrate(model, 1).generate(**inputs, max_new_tokens=5)
        assert torch.equal(got, expected)
        ssm.remove_speaker_separator(model)
        model.generate(**inputs, max_new_tokens=2)


# --------------------------------------------------------------------------------------------------
# Whisper


@pytest.fixture
def whisper(whisper_folder):
    """A tiny multilingual Whisper that knows timestamps, 0.02 s apart up to 1 s."""
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    config = WhisperConfig.from_pretrained(whisper_folder, vocab_size=160, max_target_positions=40)
    torch.manual_seed(5)
    model = WhisperForConditionalGeneration(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" not in name and "embed_positions" not in name:
                weight.mul_(8)
    vars(model.generation_config).update(
        lang_to_id={"<|en|>": 90, "<|de|>": 91}, task_to_id={"transcribe": 92, "translate": 93},
        is_multilingual=True, no_timestamps_token_id=99, max_initial_timestamp_index=20,
        forced_decoder_ids=None, do_sample=False, max_length=20, decoder_start_token_id=1,
        pad_token_id=0, eos_token_id=2)  # fmt: skip
    return model.eval()


def ends_a_segment(ids, scores):
    """Logits that say "<0.00> word <0.40><0.40> <end>" after the language and the task."""
    said = {3: 100, 5: 120, 6: 120, 7: 2}.get(ids.shape[1])
    if said is None:
        return scores
    return torch.full_like(scores, -torch.inf).index_fill(1, torch.tensor([said]), 0.0)


def listen(recordings):
    return tiny_extractor()(recordings, sampling_rate=RATE, return_tensors="pt")


@pytest.mark.parametrize("layer", LAYERS)
def test_whisper_rows_equal_the_slow_path(layer, integrate, whisper):
    separator = tiny_separator(3, seed=4)
    options = {"max_new_tokens": 6, "language": "en", "suppress_tokens": list(range(99, 160))}
    expected, alone = [], [listen([samples]) for samples in RECORDINGS]
    for inputs in alone:
        expected += slow_rows(whisper, separator, inputs, layer, **options)
    model = integrate(whisper, layer, separator=separator)
    got = [row for inputs in alone for row in model.generate(**inputs, **options)]
    assert len({tuple(row.tolist()) for row in got}) > 1
    assert [row.tolist() for row in got] == [row[0].tolist() for row in expected]
    batch = model.generate(**listen(RECORDINGS), **options)
    assert [row[:2] for row in model.speaker_rows] == [(b, s) for b in range(3) for s in range(3)]
    stripped = [[t for t in row.tolist() if t] for row in batch]
    assert stripped == [[t for t in row.tolist() if t] for row in got]


@pytest.mark.parametrize(
    "options",
    [
        {"language": "de", "task": "translate"},
        {"language": ["en", "de", "en"]},
        {"language": "en", "num_beams": 2},
        {"language": "en", "num_beams": 2, "num_return_sequences": 2},
        {"language": "en", "prompt_ids": torch.tensor([5, 6, 7])},  # as many as recordings
        {"language": "en", "return_timestamps": True},
        {"language": "en", "return_timestamps": True, "num_beams": 2},
        {"language": "en", "return_timestamps": True, "read on": True},
        {"language": "en", "return_timestamps": True, "return_segments": True, "read on": True},
        {"language": "en", "return_dict_in_generate": True},
        {},  # finds the language by itself
    ],
    ids=str,
)
@pytest.mark.parametrize("layer", [None, 1])
def test_whisper_pass_through(layer, options, integrate, whisper):
    """Also where Whisper goes on from a timestamp in the middle of the recording."""
    inputs, options = listen(RECORDINGS), dict(options)
    if reads_on := options.pop("read on", False):
        options["logits_processor"] = [ends_a_segment]
    untouched = whisper.generate(**inputs, max_new_tokens=8, **options)
    model = pass_through(integrate(whisper, layer, threshold=0.5))
    again, read_on = model._speaker_integration.split_from, []
    model._speaker_integration.split_from = lambda *a: read_on.append(a) or again(*a)
    got = model.generate(inputs.pop("input_features"), **inputs, max_new_tokens=8, **options)
    if not isinstance(got, torch.Tensor):
        got, untouched = got["sequences"], untouched["sequences"]
    assert torch.equal(got, untouched)
    assert len(model.speaker_rows) == len(got) == 3 * options.get("num_return_sequences", 1)
    assert not reads_on or {start for _, start in read_on} == {40, 80}


def test_whisper_reads_on_with_the_same_talker(integrate, whisper):
    """Reading on at a timestamp, each talker's stream is the one it had, wherever it now is."""
    model, mel = integrate(whisper, 1), listen(RECORDINGS[:1])["input_features"]
    integration = model._speaker_integration
    gains, order = torch.tensor([0.2, 1.0, 3.0]), [0, 1, 2]

    def forward(features, frame_mask=None):
        return features[:, None] * gains[order].view(1, 3, 1, 1), torch.ones(len(features), 3)

    model.speaker_separator.forward = forward
    streams, mask, probs = integration.split(mel, None)
    talkers, _ = integration.pick(streams, mask, probs)
    integration.rows = ssm._Rows(streams[0], mask[[0, 0, 0]], talkers, mel)
    order[:] = [2, 0, 1]
    later = torch.nn.functional.pad(mel[..., 40:], (0, 40))
    with torch.no_grad():
        hidden, _ = ssm.tower_front(whisper.model.encoder, later, None, 1)
    for row in range(3):
        stream = integration.split_from(row, 40)
        torch.testing.assert_close(stream[:25], hidden[0, :25] * gains[row])  # of 0.9 s


def test_whisper_silence_and_refusals(integrate, whisper):
    model, inputs = integrate(whisper, 1), listen(RECORDINGS)
    assert model.generate(**inputs, num_speakers=0).shape[0] == 0
    assert model.generate(**inputs, num_speakers=0, return_segments=True)["segments"] == []
    with pytest.raises(ValueError, match="audio slot, as in Qwen2-Audio"):
        model.generate(**inputs, mode="joint")
    with pytest.raises(ValueError, match="200 mel frames.*answer_per_talker"):
        model.generate(torch.zeros(1, 16, 200))


# --------------------------------------------------------------------------------------------------
# What stays as it was


def test_text_and_labels_are_untouched(integrate, qwen, processor):
    text = processor.tokenizer([PROMPT, "Who speaks? a a"], return_tensors="pt", padding=True)
    text = {"input_ids": text["input_ids"], "attention_mask": text["attention_mask"]}
    inputs = ask(processor, RECORDINGS)
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)

    def outcomes(model):
        with torch.no_grad():
            output = model(**inputs, labels=labels)
            logits = model(**text).logits
        ids = model.generate(**text, max_new_tokens=5)
        positional = model.generate(text["input_ids"][:1], max_new_tokens=5)
        return output.loss, output.logits, logits, ids, positional

    before = outcomes(qwen)
    after = outcomes(integrate(qwen, layer=1))
    assert before[3].shape[0] == 2
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    qwen.generate(**inputs, max_new_tokens=2)  # audio in between changes nothing either
    assert all(torch.equal(a, b) for a, b in zip(before, outcomes(qwen), strict=True))


def test_positional_prompt(integrate, qwen, processor):
    model, inputs = integrate(qwen), ask(processor, RECORDINGS)
    named = model.generate(**inputs, max_new_tokens=4)
    prompt = inputs.pop("input_ids")
    assert torch.equal(model.generate(prompt, **inputs, max_new_tokens=4), named)


@pytest.mark.parametrize("layer", [None, 1])
def test_removal_restores_the_model(integrate, layer, qwen, processor):
    inputs = ask(processor, RECORDINGS)
    tokens = qwen.generate(**inputs, max_new_tokens=6)
    state = {name: value.clone() for name, value in qwen.state_dict().items()}
    attributes, tower_attributes = set(qwen.__dict__), set(ssm.audio_tower_of(qwen).__dict__)
    model = integrate(qwen, layer)
    assert isinstance(model.speaker_separator, ssm.SpeakerSeparatorTransformer)
    model.generate(**inputs, max_new_tokens=6)
    assert ssm.remove_speaker_separator(model) is qwen
    assert "generate" not in qwen.__dict__
    assert set(qwen.__dict__) == attributes
    assert set(ssm.audio_tower_of(qwen).__dict__) == tower_attributes
    assert not hasattr(qwen, "speaker_separator")
    assert list(qwen.state_dict()) == list(state)
    assert all(torch.equal(value, state[name]) for name, value in qwen.state_dict().items())
    assert all(p.requires_grad for n, p in qwen.named_parameters() if "embed_positions" not in n)
    assert torch.equal(qwen.generate(**inputs, max_new_tokens=6), tokens)
    assert ssm.remove_speaker_separator(qwen) is qwen  # once more is no error


def test_integrating_twice_replaces(integrate, qwen, processor):
    inputs = ask(processor, RECORDINGS[:1])
    untouched = qwen.generate(**inputs, max_new_tokens=4)
    once = answers(integrate(qwen, layer=1), inputs, max_new_tokens=4)
    twice = answers(integrate(integrate(qwen, layer=2), layer=1), inputs, max_new_tokens=4)
    assert once == twice
    ssm.remove_speaker_separator(qwen)
    assert torch.equal(qwen.generate(**inputs, max_new_tokens=4), untouched)


def test_failure_while_generating_leaves_the_model_usable(integrate, qwen, processor):
    model, inputs = integrate(qwen), ask(processor, RECORDINGS)
    before = model.generate(**inputs, max_new_tokens=3)

    def fail(*args, **kwargs):
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        model.generate(**inputs, max_new_tokens=3, stopping_criteria=[fail])
    with torch.no_grad():
        assert model(**inputs).logits.isfinite().all()
    assert torch.equal(model.generate(**inputs, max_new_tokens=3), before)


# --------------------------------------------------------------------------------------------------
# Checkpoints and refusals


def test_checkpoint_brings_layer_and_threshold(integrate, qwen, processor, tmp_path):
    source = {"encoder": "x", "layer": 1, "frame_rate": 50.0}
    separator = tiny_separator(3, seed=6, threshold=0.0, feature_source=source)
    path = save_tiny_checkpoint(tmp_path / "best_model.pt", separator)
    separator.save_pretrained(tmp_path / "exported")
    inputs = ask(processor, RECORDINGS[:1])
    by_hand = answers(integrate(qwen, 1, 0.0, separator=separator), inputs, max_new_tokens=5)
    for origin in (path, str(path), tmp_path / "exported"):
        model = ssm.integrate_speaker_separator(qwen, max_speakers=3, separator_checkpoint=origin)
        assert answers(model, inputs, max_new_tokens=5) == by_hand
    model = ssm.integrate_speaker_separator(
        qwen, separator_checkpoint=path, layer=0, threshold=1.0)  # fmt: skip
    assert len(model.generate(**inputs)) == 0


def test_checkpoint_of_other_width(qwen, processor, tmp_path):
    path = save_tiny_checkpoint(tmp_path / "wide.pt", tiny_separator(3, feature_dim=64))
    with pytest.raises(ValueError, match="64.*32"):
        ssm.integrate_speaker_separator(qwen, separator_checkpoint=path)
    assert "generate" not in qwen.__dict__


def test_checkpoint_with_too_few_streams(qwen, tmp_path):
    path = save_tiny_checkpoint(tmp_path / "two.pt", tiny_separator(2))
    with pytest.raises(ValueError, match="2 streams"):
        ssm.integrate_speaker_separator(qwen, max_speakers=3, separator_checkpoint=path)
    ssm.integrate_speaker_separator(qwen, max_speakers=2, separator_checkpoint=path)


def test_missing_checkpoint(qwen, tmp_path):
    with pytest.raises(FileNotFoundError, match="gone.pt"):
        ssm.integrate_speaker_separator(qwen, separator_checkpoint=tmp_path / "gone.pt")


def test_more_prompts_than_recordings(integrate, qwen, processor):
    model, inputs = integrate(qwen), ask(processor, RECORDINGS)
    for name in ("input_features", "feature_attention_mask"):
        inputs[name] = inputs[name][:2]
    with pytest.raises(ValueError, match="3 prompts.*2 recordings"):
        model.generate(**inputs)


def test_more_talkers_than_streams(integrate, qwen, processor):
    with pytest.raises(ValueError, match="0 to 3"):
        integrate(qwen).generate(**ask(processor, RECORDINGS), num_speakers=4)


def test_model_of_another_kind():
    with pytest.raises(ValueError, match="Linear is neither"):
        ssm.integrate_speaker_separator(torch.nn.Linear(2, 2))


# --------------------------------------------------------------------------------------------------
# The spoken-digits model, where it is there


@pytest.fixture
def digits():
    folder, recordings = SHARED / "qwen2-audio-digits", SHARED / "fsdd"
    if not (folder.is_dir() and recordings.is_dir()):
        pytest.skip(f"no spoken-digits model at {folder}")
    from transformers import AutoProcessor, Qwen2AudioForConditionalGeneration

    pieces = [ssm.read_audio(recordings / f"{d}_theo_6.wav", RATE) for d in (3, 1, 9)]
    gap = np.zeros(1600, np.float32)
    samples = np.concatenate([gap, pieces[0], gap, pieces[1], gap, pieces[2]])
    samples *= 0.05 / np.sqrt(np.mean(np.concatenate(pieces) ** 2))
    model = Qwen2AudioForConditionalGeneration.from_pretrained(folder).eval()
    return model, AutoProcessor.from_pretrained(folder), samples, folder


def test_digits_model(digits):
    model, processor, samples, folder = digits
    inputs = ask(processor, [samples])
    states, output, inside, halved = tower_states(ssm.audio_tower_of(model), inputs)
    encoder = ssm.load_audio_encoder(str(folder))
    for layer in (None, 1):
        features = ssm.encode_audio(samples, encoder, layer)
        expected = output[halved] if layer is None else states[layer][inside]
        torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-4)
    untouched = model.generate(**inputs)
    for layer in (None, 1):
        ssm.integrate_speaker_separator(model, layer=layer)
        rows = ssm.answer_per_talker(pass_through(model), processor, samples)
        assert [row["text"] for row in rows] == ["three one nine"]
        assert torch.equal(model.generate(**inputs), untouched)


def test_whisper_gives_a_row_per_talker(whisper_folder):
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    torch.manual_seed(0)
    config = WhisperConfig.from_pretrained(whisper_folder)
    whisper = WhisperForConditionalGeneration(config).eval()
    frames = 2 * config.max_source_positions
    mel = torch.randn(2, config.num_mel_bins, frames)
    options = {"decoder_input_ids": torch.tensor([[3], [3]]), "max_new_tokens": 4}
    before = whisper.generate(mel, **options)
    ssm.integrate_speaker_separator(whisper, threshold=0)
    assert len(whisper.generate(mel, **options)) == len(whisper.speaker_rows) == 6
    ssm.remove_speaker_separator(whisper)
    torch.testing.assert_close(whisper.generate(mel, **options), before)


def test_a_hook_on_the_tower_survives(qwen):
    """Libraries that place a model on devices wrap the forward of its parts."""
    tower = ssm.audio_tower_of(qwen)
    original = tower.forward
    tower.forward = hook = lambda *args, **kwargs: original(*args, **kwargs)
    ssm.integrate_speaker_separator(qwen)
    assert tower.forward is not hook
    ssm.remove_speaker_separator(qwen)
    assert tower.forward is hook
