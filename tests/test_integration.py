"""Encoders and the separator inside real models of a tiny size."""

import copy
import json
import shutil

import numpy as np
import pytest
import soundfile
import torch
from conftest import RATE, SHARED, WIDTH, save_tiny_checkpoint, sine, tiny_separator

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
    states, output, inside, halved = tower_states(qwen.model.audio_tower, inputs)
    expected, mask = (output, halved) if layer is None else (states[layer], inside)
    assert encoder.frame_rate(layer) == (25 if layer is None else 50)
    for b, samples in enumerate(RECORDINGS):
        features = ssm.encode_audio(samples, encoder, layer)
        assert features.shape == (int(mask[b].sum()), WIDTH)
        torch.testing.assert_close(features, expected[b][mask[b]], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layer", LAYERS)
def test_front_and_rest_make_the_tower(layer, qwen, processor):
    tower, inputs = qwen.model.audio_tower, ask(processor, RECORDINGS)
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
    """The slow path: encode, separate by hand, let the rest of the tower read one stream."""
    from transformers.modeling_outputs import BaseModelOutput

    plain, separator = copy.deepcopy(qwen), tiny_separator(3, seed=4)
    model, inputs = integrate(qwen, layer, separator=separator), ask(processor, RECORDINGS[:1])
    got = answers(model, inputs, max_new_tokens=6)
    tower, expected = plain.model.audio_tower, []
    with torch.no_grad():
        hidden, frame_mask = ssm.tower_front(
            tower, inputs["input_features"], inputs["feature_attention_mask"], layer)  # fmt: skip
        streams, probs = separator(hidden, frame_mask)
        streams = torch.where(frame_mask[:, None, :, None], streams, hidden[:, None])
        for s in range(3):
            features = ssm.tower_rest(tower, streams[:, s], frame_mask, layer)
            tower.forward = lambda *a, f=features, **k: BaseModelOutput(f)
            expected += answers(plain, inputs, max_new_tokens=6)
    assert got == expected
    assert len({tuple(row) for row in got}) > 1  # the streams do say different things
    assert [row[2] for row in model.speaker_rows] == pytest.approx(probs[0].tolist(), abs=1e-5)


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
    attributes, tower_attributes = set(qwen.__dict__), set(qwen.model.audio_tower.__dict__)
    model = integrate(qwen, layer)
    assert isinstance(model.speaker_separator, ssm.SpeakerSeparatorTransformer)
    model.generate(**inputs, max_new_tokens=6)
    assert ssm.remove_speaker_separator(model) is qwen
    assert "generate" not in qwen.__dict__
    assert set(qwen.__dict__) == attributes
    assert set(qwen.model.audio_tower.__dict__) == tower_attributes
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
    states, output, inside, halved = tower_states(model.model.audio_tower, inputs)
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
