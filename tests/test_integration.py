"""Both kinds of separators inside real models of a tiny size."""

import contextlib
import copy
import json
import os
import pickle
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import (
    CPU_FLAGS,
    RATE,
    ROOT,
    SHARED,
    save_tiny_checkpoint,
    shake,
    sine,
    tiny_extractor,
    tiny_separator,
    tiny_spectrogram_separator,
    tower_states,
    train_flags,
    write_wav,
)
from transformers import GenerationConfig

import speaker_separator_module as ssm
from audio import load_model, read_audio
from long_recordings import answer_per_talker, ask, build_prompt

RECORDINGS = [sine(0.9, 150), sine(0.35, 420), sine(0.61, 260)]
LAYERS = [None, 0, 1, 2]
KINDS = ["spectrogram", *LAYERS]  # of separators: of spectrograms, or of what follows a layer
PROMPT = "What does the person say?"
JOINT = {"mode": "joint", "max_new_tokens": 6}


def processed(processor, recordings, prompt=PROMPT):
    """The documented call of the processor, for one recording or several."""
    text = build_prompt(processor, prompt)
    return processor(
        text=[text] * len(recordings), audio=list(recordings), sampling_rate=RATE,
        return_tensors="pt", padding=True)  # fmt: skip


def answers(model, inputs, **options):
    """New tokens of every row, without padding and without what follows the end."""
    rows = model.generate(**inputs, **options)[:, inputs["input_ids"].size(1) :].tolist()
    stop = model.generation_config.eos_token_id
    return [row[: row.index(stop)] if stop in row else row for row in rows]


def make_separator(kind, seed=4, **options):
    """An untrained separator whose streams differ enough for different answers."""
    if kind != "spectrogram":
        return tiny_separator(3, seed, **options)
    separator = tiny_spectrogram_separator(3, seed, **options)
    with torch.no_grad():
        separator.output[1].weight.mul_(40)
    return separator


def pass_through(model):
    """Make the separator of an integrated model return the mixture, as the one talker."""

    def forward(features, frame_mask=None):
        streams = torch.zeros(len(features), 3, *features.shape[1:])
        streams[:, 0] = features
        return streams, torch.tensor([[1.0, 0.0, 0.0]]).repeat(len(features), 1)

    model.speaker_separator.forward = forward
    return model


def with_probabilities(model, *rows):
    """Keep the streams of an integrated model and say how likely each is a talker."""
    separate = model.speaker_separator.forward

    def forward(features, frame_mask=None):
        return separate(features, frame_mask)[0], torch.tensor(rows)[: len(features)]

    model.speaker_separator.forward = forward
    return model


@pytest.fixture
def integrate(tmp_path):
    """Put a tiny separator (random unless given) into a model; every stream is a talker."""

    def put(model, kind=None, threshold=0.0, separator=None):
        path = save_tiny_checkpoint(tmp_path / "put.pt", separator or make_separator(kind))
        layer = None if kind == "spectrogram" else kind
        return ssm.integrate_speaker_separator(
            model, separator_checkpoint=path, layer=layer, threshold=threshold)  # fmt: skip

    return put


# --------------------------------------------------------------------------------------------------
# The encoder, cut at a block


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("model", ["qwen", "whisper"])
def test_mel_frames_of_a_frame(model, kind, integrate, processor, request):
    integration = integrate(request.getfixturevalue(model), kind)._speaker_integration
    features = processed(processor, RECORDINGS)["input_features"]
    streams, _, _ = integration.separate(features, None)
    assert streams.shape[2] * integration.stride == features.shape[2] == integration.mel_frames


@pytest.mark.parametrize("layer", LAYERS)
def test_front_and_rest_make_the_tower(layer, qwen, processor):
    tower, inputs = ssm.audio_tower_of(qwen), processed(processor, RECORDINGS)
    states, output, inside, halved = tower_states(
        tower, inputs["input_features"], inputs["feature_attention_mask"])
    with torch.no_grad():
        hidden, frame_mask = ssm.tower_front(
            tower, inputs["input_features"], inputs["feature_attention_mask"], layer)  # fmt: skip
        whole = ssm.tower_rest(tower, hidden, frame_mask, layer)
    assert torch.equal(frame_mask, halved if layer is None else inside)
    expected = output if layer is None else states[layer]
    torch.testing.assert_close(hidden[frame_mask], expected[frame_mask], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(whole[halved], output[halved], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layer", LAYERS)
def test_front_and_rest_make_whispers_tower(layer, whisper):
    tower, inputs = ssm.audio_tower_of(whisper), listen(RECORDINGS)
    with torch.no_grad():
        output = tower(inputs["input_features"]).last_hidden_state
        hidden, frame_mask = ssm.tower_front(
            tower, inputs["input_features"], inputs["attention_mask"], layer)  # fmt: skip
        whole = ssm.tower_rest(tower, hidden, frame_mask, layer)
    assert frame_mask.sum(1).tolist() == [45, 18, 31]  # 0.9, 0.35 and 0.61 s
    torch.testing.assert_close(whole, output, rtol=1e-4, atol=1e-4)


# --------------------------------------------------------------------------------------------------
# One row per talker


@pytest.mark.parametrize("kind", ["spectrogram", None])
def test_the_documented_snippet(kind, integrate, qwen, processor):
    """One row per talker that is active, in the order of the streams; then the likeliest ones."""
    model = integrate(qwen, kind)
    prompt, audio = build_prompt(processor, PROMPT), RECORDINGS[0]
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
    model, inputs = integrate(qwen), processed(processor, RECORDINGS)
    model.generate(**inputs, max_new_tokens=1)
    rows = model.speaker_rows
    threshold = float(np.median([p for *_, p in rows]))
    model = integrate(model, threshold=threshold)
    ids = model.generate(**inputs, max_new_tokens=1)
    assert model.speaker_rows == [row for row in rows if row[2] >= threshold]
    assert 0 < len(ids) == len(model.speaker_rows) < len(rows)


def slow_rows(model, separator, inputs, kind, **options):
    """What the untouched model answers when it hears each stream of one recording.

    Streams of hidden features stand in place of what the encoder returns.
    """
    from transformers.modeling_outputs import BaseModelOutput

    tower, rows, features = ssm.audio_tower_of(model), [], inputs["input_features"]
    if "feature_attention_mask" in inputs:
        mask = inputs["feature_attention_mask"]
    else:  # Whisper's: up to the last frame that is not at the floor of 80 dB
        sounding = (features[0].amax(0) > features.max() - 1.99).nonzero()
        mask = (torch.arange(features.shape[-1]) <= sounding.max()).long()[None]
    with torch.no_grad():
        if kind == "spectrogram":
            streams, _ = separator(features.transpose(1, 2), mask.bool())
            return [model.generate(**{**inputs, "input_features": s[None].mT}, **options)
                    for s in streams[0]]  # fmt: skip
        hidden, frame_mask = ssm.tower_front(tower, features, mask, kind)
        streams, _ = separator(hidden, frame_mask)
        streams = torch.where(frame_mask[:, None, :, None], streams, hidden[:, None])
        for s in range(streams.shape[1]):
            out = ssm.tower_rest(tower, streams[:, s], frame_mask, kind)
            tower.forward = lambda *a, f=out, **k: BaseModelOutput(
                f.repeat_interleave(len(a[0] if a else k["input_features"]), 0))  # fmt: skip
            rows.append(model.generate(**inputs, **options))
            del tower.forward
    return rows


@pytest.mark.parametrize("kind", KINDS)
def test_rows_equal_the_untouched_model_on_each_stream(kind, integrate, qwen, processor):
    separator, inputs = make_separator(kind), processed(processor, RECORDINGS[:1])
    slow = slow_rows(qwen, separator, inputs, kind, max_new_tokens=6)
    model = integrate(qwen, kind, separator=separator)
    got = model.generate(**inputs, max_new_tokens=6)
    expected = torch.nn.utils.rnn.pad_sequence([row[0] for row in slow], batch_first=True)
    assert torch.equal(got, expected)  # padded with 0, as by the model
    assert len({tuple(row) for row in got.tolist()}) > 1  # the streams do say different things


@pytest.mark.parametrize("kind", ["spectrogram", None, 1])
def test_batch_equals_one_by_one(kind, integrate, qwen, processor):
    """Rows are grouped by recording; padding on the left of short prompts changes nothing."""
    model, inputs = integrate(qwen, kind), processed(processor, RECORDINGS)
    assert (inputs["attention_mask"][:, 0] == 0).sum() == 2
    together = answers(model, inputs, max_new_tokens=6)
    rows = model.speaker_rows
    assert [row[:2] for row in rows] == [(b, s) for b in range(3) for s in range(3)]
    alone, probabilities = [], []
    for samples in RECORDINGS:
        alone += answers(model, processed(processor, [samples]), max_new_tokens=6)
        probabilities += [p for *_, p in model.speaker_rows]
    assert together == alone
    assert [p for *_, p in rows] == pytest.approx(probabilities, abs=1e-4)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_pass_through_equals_the_untouched_model(kind, count, beams, integrate, qwen, processor):
    inputs = processed(processor, RECORDINGS[:count])
    options = {"max_new_tokens": 8, "num_beams": beams}
    untouched = qwen.generate(**inputs, **options)
    model = pass_through(integrate(qwen, kind, threshold=0.5))
    assert torch.equal(model.generate(**inputs, **options), untouched)
    assert model.speaker_rows == [(b, 0, 1.0) for b in range(count)]
    padded = {k: v.clone() for k, v in inputs.items()}  # more padding on the left
    for name, value in (("input_ids", 0), ("attention_mask", 0)):
        padded[name] = torch.nn.functional.pad(padded[name], (3, 0), value=value)
    got = model.generate(**padded, **options)
    assert torch.equal(got[:, 3:], untouched)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["spectrogram", None, 1])
def test_half_precision(kind, dtype, integrate, qwen_folder, processor):
    """The model in half precision, the separator in float32, whatever is done to the model."""
    from transformers import Qwen2AudioForConditionalGeneration

    qwen = Qwen2AudioForConditionalGeneration.from_pretrained(qwen_folder, dtype=dtype).eval()
    inputs = processed(processor, RECORDINGS)
    untouched = qwen.generate(**inputs, max_new_tokens=6)
    model = integrate(qwen, kind, threshold=0.0)
    assert len(model.generate(**inputs, max_new_tokens=2)) == 9
    model = pass_through(integrate(qwen, kind, threshold=0.5).to(dtype))
    assert torch.equal(model.generate(**inputs, max_new_tokens=6), untouched)
    assert {p.dtype for p in model.speaker_separator.parameters()} == {torch.float32}


@pytest.mark.parametrize("kind", ["spectrogram", 1])
def test_beams_of_several_talkers(kind, integrate, qwen, processor):
    """Beams stay with their talker: each row is what its recording alone gives."""
    model, inputs = integrate(qwen, kind), processed(processor, RECORDINGS)
    together = answers(model, inputs, max_new_tokens=6, num_beams=3)
    alone = [
        row
        for samples in RECORDINGS
        for row in answers(model, processed(processor, [samples]), max_new_tokens=6, num_beams=3)
    ]
    assert together == alone


@pytest.mark.parametrize("kind", ["spectrogram", None])
def test_nobody_gives_no_row(kind, integrate, qwen, processor):
    model, inputs = integrate(qwen, kind, threshold=1.0), processed(processor, RECORDINGS)
    ids = model.generate(**inputs, max_new_tokens=4)
    assert ids.shape == (0, inputs["input_ids"].size(1))
    assert ids.dtype == inputs["input_ids"].dtype
    assert model.speaker_rows == []
    assert model.generate(**inputs, max_new_tokens=4, num_speakers=0).shape == ids.shape


@pytest.mark.parametrize("kind", ["spectrogram", None, 1])
def test_digital_silence_is_no_trouble(kind, integrate, qwen, whisper, processor):
    silence = [np.zeros(8000, np.float32), RECORDINGS[1]]
    model = integrate(qwen, kind)
    assert len(model.generate(**processed(processor, silence), max_new_tokens=2)) == 6
    assert np.isfinite([p for *_, p in model.speaker_rows]).all()
    model = integrate(whisper, kind)
    features = listen(silence)["input_features"]
    assert len(model.generate(features, max_new_tokens=2, language="en")) == 6
    assert np.isfinite([p for *_, p in model.speaker_rows]).all()


@pytest.mark.parametrize("kind", ["spectrogram", None])
def test_nobody_in_one_recording_of_a_batch(kind, integrate, qwen, processor):
    inputs = processed(processor, RECORDINGS)
    everyone = answers(integrate(qwen, kind), inputs, max_new_tokens=6)
    model = with_probabilities(
        integrate(qwen, kind, threshold=0.5), [0.9, 0.1, 0.8], [0.1, 0.2, 0.3], [0.0, 0.7, 0.1])
    got = answers(model, inputs, max_new_tokens=6)
    assert [row[:2] for row in model.speaker_rows] == [(0, 0), (0, 2), (2, 1)]
    assert [row[2] for row in model.speaker_rows] == pytest.approx([0.9, 0.8, 0.7])
    whole = everyone[7]
    if kind == "spectrogram":  # one talker alone is heard as recorded
        whole = answers(ssm.remove_speaker_separator(model), inputs, max_new_tokens=6)[2]
    assert got == [everyone[0], everyone[2], whole]


@pytest.mark.parametrize("kind", ["spectrogram", 1])
def test_dropout_is_off_inside_the_model(kind, integrate, qwen, processor):
    """Also where the separator is handed over while it trains, and the model is set to train."""
    inputs, separator = processed(processor, RECORDINGS[:1]), make_separator(kind, dropout=0.5)
    expected = integrate(qwen, kind, separator=separator).generate(**inputs, max_new_tokens=6)
    rows = qwen.speaker_rows
    layer = None if kind == "spectrogram" else kind
    model = ssm.integrate_speaker_separator(qwen, 3, separator.train(), layer, threshold=0.0)
    model.train().generate(**inputs, max_new_tokens=1)
    model.eval()
    assert not any(module.training for module in model.speaker_separator.modules())
    assert torch.equal(model.generate(**inputs, max_new_tokens=6), expected)
    assert model.speaker_rows == rows


@pytest.mark.parametrize("bins", [16, 80])
def test_one_set_of_weights_in_both_models(bins, qwen, whisper_folder, processor, tmp_path):
    """A spectrogram separator fits models of any width and any number of mel bins."""
    from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperForConditionalGeneration

    path = save_tiny_checkpoint(tmp_path / "s.pt", make_separator("spectrogram"))
    model = ssm.integrate_speaker_separator(qwen, separator_checkpoint=path, threshold=0.0)
    assert len(model.generate(**processed(processor, RECORDINGS[:1]), max_new_tokens=2)) == 3
    config = WhisperConfig.from_pretrained(whisper_folder, num_mel_bins=bins, d_model=64)
    model = WhisperForConditionalGeneration(config).eval()
    extractor = WhisperFeatureExtractor(feature_size=bins, chunk_length=1)
    mel = extractor(RECORDINGS, sampling_rate=RATE, return_tensors="pt")["input_features"]
    ssm.integrate_speaker_separator(model, separator_checkpoint=path, threshold=0.0)
    assert len(model.generate(mel, max_new_tokens=2)) == len(model.speaker_rows) == 9


# --------------------------------------------------------------------------------------------------
# Every way of calling generate


@pytest.mark.parametrize("kind", ["spectrogram", 1])
def test_dictionary_output(kind, integrate, qwen, processor):
    model, inputs = integrate(qwen, kind), processed(processor, RECORDINGS)
    plain = model.generate(**inputs, max_new_tokens=4)
    output = model.generate(
        **inputs, max_new_tokens=4, return_dict_in_generate=True, output_scores=True)  # fmt: skip
    assert torch.equal(output.sequences, plain)
    assert all(scores.shape[0] == 9 for scores in output.scores)
    nobody = model.generate(
        **inputs, max_new_tokens=4, return_dict_in_generate=True, num_speakers=0)  # fmt: skip
    assert nobody.sequences.shape == (0, inputs["input_ids"].shape[1])


@pytest.mark.parametrize("options", [{"do_sample": True}, {"num_beams": 2}], ids=str)
@pytest.mark.parametrize("kind", ["spectrogram", 1])
def test_several_answers_each(kind, options, integrate, qwen, processor):
    """``speaker_rows`` names the talker of every returned row."""
    model, inputs = integrate(qwen, kind), processed(processor, RECORDINGS[:2])
    torch.manual_seed(3)
    got = answers(model, inputs, max_new_tokens=5, num_return_sequences=2, **options)
    expected = [(b, s) for b in range(2) for s in range(3) for _ in range(2)]
    assert [row[:2] for row in model.speaker_rows] == expected
    if "num_beams" in options:  # the better of two beams is what one answer would be
        assert got[::2] == answers(model, inputs, max_new_tokens=5, **options)
    else:
        torch.manual_seed(3)
        assert got == answers(model, inputs, max_new_tokens=5, num_return_sequences=2, **options)
        assert got[::2] != got[1::2]


@pytest.mark.parametrize("kind", ["spectrogram", 1])
def test_streamer(kind, integrate, qwen, processor):
    from transformers import TextIteratorStreamer

    model, inputs = integrate(qwen, kind), processed(processor, RECORDINGS[:1])
    streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True)
    ids = model.generate(**inputs, max_new_tokens=4, num_speakers=1, streamer=streamer)
    new = ids[0, inputs["input_ids"].shape[1] :]
    assert "".join(streamer).split() == processor.tokenizer.decode(new).split()


@pytest.mark.parametrize("kind", ["spectrogram", 1])
def test_positional_arguments(kind, integrate, qwen, processor):
    from transformers import GenerationConfig

    model, inputs = integrate(qwen, kind), processed(processor, RECORDINGS)
    named = model.generate(**inputs, max_new_tokens=4)
    prompt = inputs.pop("input_ids")
    assert torch.equal(model.generate(prompt, **inputs, max_new_tokens=4), named)
    config = GenerationConfig(max_new_tokens=3, pad_token_id=0, eos_token_id=-1)
    ids = model.generate(prompt, config, **inputs)
    assert ids.shape == (9, prompt.shape[1] + 3)


def test_audio_that_never_reached_the_processor(integrate, qwen, processor):
    """The processor ignores ``audios=``, its argument of old."""
    text = [build_prompt(processor, PROMPT)]
    inputs = processor.tokenizer(text, return_tensors="pt", return_token_type_ids=False)
    with pytest.raises(ValueError, match="audio=.*audios="):
        integrate(qwen).generate(**inputs)


@pytest.mark.parametrize("mode", ["separate", "joint"])
@pytest.mark.parametrize("kind", ["spectrogram", 1])
def test_recordings_without_their_mask(kind, mode, integrate, qwen, processor):
    inputs = processed(processor, RECORDINGS[:1])
    del inputs["feature_attention_mask"]
    with pytest.raises(ValueError, match="without the processor's feature_attention_mask"):
        integrate(qwen, kind).generate(**inputs, mode=mode, tokenizer=processor.tokenizer)


def test_several_audio_slots(integrate, qwen, processor):
    model, inputs = integrate(qwen), two_slots(processor)
    with pytest.raises(ValueError, match="2 audio slots.*joint"):
        model.generate(**inputs)
    inputs["input_features"] = inputs["input_features"][:1]
    with pytest.raises(ValueError, match="2 audio slots came with 1 recordings"):
        model.generate(**inputs)


def test_unknown_mode(integrate, qwen, processor):
    with pytest.raises(ValueError, match="separate or joint"):
        integrate(qwen).generate(**processed(processor, RECORDINGS), mode="both")


# --------------------------------------------------------------------------------------------------
# All talkers in one prompt


def two_slots(processor):
    text = "<|im_start|> user a <|audio_bos|> <|AUDIO|> <|audio_eos|> " \
           "Who <|audio_bos|> <|AUDIO|> <|audio_eos|> speaks? <|im_end|>"  # fmt: skip
    return processor(text=[text], audio=RECORDINGS[:2], sampling_rate=RATE, return_tensors="pt")


@contextlib.contextmanager
def by_hand(model, processor, separator, inputs, kind):
    """Inputs of an untouched model for one prompt, its slots written out as text.

    Inside the block the encoder returns what it makes of the streams.
    """
    from transformers.modeling_outputs import BaseModelOutput

    tower, ids = ssm.audio_tower_of(model), inputs["input_ids"][0]
    text = processor.tokenizer.decode(ids[inputs["attention_mask"][0] == 1])
    mask, features = inputs["feature_attention_mask"], inputs["input_features"]
    rows = features.repeat_interleave(3, 0)
    with torch.no_grad():
        if kind == "spectrogram":
            rows = separator(features.mT, mask.bool())[0].flatten(0, 1).mT
        else:
            hidden, frame_mask = ssm.tower_front(tower, features, mask, kind)
            streams, _ = separator(hidden, frame_mask)
            streams = torch.where(frame_mask[:, None, :, None], streams, hidden[:, None])
            out = ssm.tower_rest(
                tower, streams.flatten(0, 1), frame_mask.repeat_interleave(3, 0), kind)
            tower.forward = lambda *a, **k: BaseModelOutput(out)
    for count in ((mask.sum(1) - 1) // 2 + 1 - 2) // 2 + 1:  # each slot once
        slot = " ".join(["<|audio_bos|>", *["<|AUDIO|>"] * count, "<|audio_eos|>"])
        labelled = " ".join(f"Speaker {n + 1}: {slot.replace('|', '!')}" for n in range(3))
        text = text.replace(slot, labelled, 1)
    prompt = processor.tokenizer([text.replace("!", "|")], return_tensors="pt")
    yield {"input_ids": prompt["input_ids"], "attention_mask": prompt["attention_mask"],
           "input_features": rows, "feature_attention_mask": mask.repeat_interleave(3, 0)}
    vars(tower).pop("forward", None)


def slow_joint(model, processor, separator, inputs, kind, **options):
    """The untouched model's answer to one prompt that was put together by hand."""
    with by_hand(model, processor, separator, inputs, kind) as prompt:
        ids = model.generate(**prompt, **options)
        return ids[0, prompt["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("kind", ["spectrogram", None, 1])
def test_joint(kind, integrate, qwen, processor):
    plain, separator = copy.deepcopy(qwen), make_separator(kind)
    model = integrate(qwen, kind, separator=separator)
    joint = {**JOINT, "tokenizer": processor.tokenizer}
    inputs = processed(processor, RECORDINGS)
    ids = model.generate(**inputs, **joint)
    L = inputs["input_ids"].shape[1]
    assert torch.equal(ids[:, :L], inputs["input_ids"])  # the documented snippet cuts there
    assert [row[:2] for row in model.speaker_rows] == [(b, s) for b in range(3) for s in range(3)]
    assert len({tuple(row) for row in ids[:, L:].tolist()}) > 1
    beams = answers(model, inputs, **joint, num_beams=2)
    for b, samples in enumerate(RECORDINGS):
        alone = processed(processor, [samples])
        expected = slow_joint(plain, processor, separator, alone, kind, max_new_tokens=6)
        assert ids[b, L : L + len(expected)].tolist() == expected
        assert answers(model, alone, **joint, num_beams=2)[0] == beams[b]
    text = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    pads = (text["attention_mask"] == 0).sum(1).tolist()
    assert max(pads) > min(pads)
    right = {name: torch.stack([row.roll(-p) for row, p in zip(rows, pads, strict=True)])
             for name, rows in text.items()}
    assert torch.equal(model.generate(**{**inputs, **right}, **joint)[:, L:], ids[:, L:])
    slots = two_slots(processor)
    expected = slow_joint(plain, processor, separator, slots, kind, max_new_tokens=6)
    ids = model.generate(**slots, **joint)
    assert ids[0, slots["input_ids"].shape[1] :].tolist() == expected
    assert [row[:2] for row in model.speaker_rows] == [(b, s) for b in range(2) for s in range(3)]


@pytest.mark.parametrize("slots", [1, 2])
@pytest.mark.parametrize("kind", ["spectrogram", 1])
def test_beams_of_a_joint_prompt_hear_every_talker_in_its_slot(
    kind, slots, integrate, qwen, processor
):
    """The score of the best beam is that of its answer under the untouched model."""
    plain, separator = copy.deepcopy(qwen), make_separator(kind)
    inputs = two_slots(processor) if slots == 2 else processed(processor, RECORDINGS[:1])
    model = integrate(qwen, kind, separator=separator)
    output = model.generate(
        **inputs, **JOINT, tokenizer=processor.tokenizer, num_beams=3, min_new_tokens=6,
        return_dict_in_generate=True, output_scores=True)  # fmt: skip
    answer = output.sequences[:, inputs["input_ids"].shape[1] :]
    with by_hand(plain, processor, separator, inputs, kind) as prompt, torch.no_grad():
        prompt["input_ids"] = torch.cat([prompt["input_ids"], answer], 1)
        prompt["attention_mask"] = torch.ones_like(prompt["input_ids"])
        logits = plain(**prompt).logits[:, -len(answer[0]) - 1 : -1].log_softmax(-1)
    score = logits.gather(-1, answer[..., None]).sum() / len(answer[0])
    assert float(output.sequences_scores) == pytest.approx(float(score), abs=1e-4)


@pytest.mark.parametrize("kind", ["spectrogram", 1])
def test_joint_leaves_silence_out(kind, integrate, qwen, processor):
    """Of three recordings the second is silent; its prompt gets no row."""
    inputs = processed(processor, RECORDINGS)
    joint = {**JOINT, "tokenizer": processor.tokenizer, "max_new_tokens": 4}
    model = with_probabilities(
        integrate(qwen, kind, threshold=0.5), [0.9, 0.1, 0.8], [0.1, 0.2, 0.3], [0.0, 0.7, 0.1])
    output = model.generate(**inputs, **joint, return_dict_in_generate=True)
    L = inputs["input_ids"].shape[1]
    assert [row[:2] for row in model.speaker_rows] == [(0, 0), (0, 2), (2, 1)]
    assert torch.equal(output.sequences[:, :L], inputs["input_ids"][[0, 2]])
    first = answers(model, processed(processor, RECORDINGS[:1]), **joint)
    assert first[0] == output.sequences[0, L : L + len(first[0])].tolist()


def test_joint_without_an_attention_mask(integrate, qwen, processor):
    """As the model itself does, it attends to the whole prompt."""
    inputs = processed(processor, RECORDINGS[:1])
    assert inputs["attention_mask"].all()
    model, joint = integrate(qwen), {**JOINT, "tokenizer": processor.tokenizer}
    expected = model.generate(**inputs, **joint)
    assert torch.equal(model.generate(**{**inputs, "attention_mask": None}, **joint), expected)


def test_joint_needs_a_tokenizer(integrate, qwen, processor):
    with pytest.raises(ValueError, match="tokenizer=processor.tokenizer"):
        integrate(qwen).generate(**processed(processor, RECORDINGS), mode="joint")


# --------------------------------------------------------------------------------------------------
# Copies, files, compilers and devices


@pytest.mark.parametrize("kind", ["spectrogram", 1])
def test_saving_saves_the_model_alone(kind, integrate, qwen, qwen_folder, processor, tmp_path):
    from safetensors.torch import load_file

    model, inputs = integrate(qwen, kind), processed(processor, RECORDINGS[:1])
    expected = model.generate(**inputs, max_new_tokens=5)
    model.save_pretrained(tmp_path / "model")
    model.speaker_separator.save_pretrained(tmp_path / "separator")
    saved, before = (load_file(f / "model.safetensors") for f in (tmp_path / "model", qwen_folder))
    assert saved.keys() == before.keys()
    assert all(torch.equal(saved[name], before[name]) for name in saved)
    again = type(qwen).from_pretrained(tmp_path / "model").eval()
    layer = None if kind == "spectrogram" else kind
    ssm.integrate_speaker_separator(
        again, separator_checkpoint=tmp_path / "separator", layer=layer, threshold=0.0)
    assert torch.equal(again.generate(**inputs, max_new_tokens=5), expected)


@pytest.mark.parametrize("how", ["copy", "pickle"])
@pytest.mark.parametrize("kind", ["spectrogram", 1])
def test_copies_stand_on_their_own(kind, how, integrate, qwen, processor):
    model, inputs = integrate(qwen, kind), processed(processor, RECORDINGS)
    expected = model.generate(**inputs, max_new_tokens=4)
    twin = copy.deepcopy(model) if how == "copy" else pickle.loads(pickle.dumps(model))
    assert twin._speaker_integration.model is twin
    ssm.remove_speaker_separator(model)
    with torch.no_grad():
        for weight in model.parameters():  # the twin must not read the original's weights
            weight.zero_()
    assert torch.equal(twin.generate(**inputs, max_new_tokens=4), expected)
    assert len(twin.speaker_rows) == 9


@pytest.mark.parametrize("what", ["model before", "model after", "forward", "tower", "in place"])
@pytest.mark.parametrize("kind", ["spectrogram", 1])
def test_compiled(kind, what, integrate, qwen, processor):
    inputs = processed(processor, RECORDINGS[:2])
    expected = integrate(copy.deepcopy(qwen), kind).generate(**inputs, max_new_tokens=2)
    compile_ = {"backend": "eager"}
    model = qwen
    if what == "model before":
        model = torch.compile(qwen, **compile_)
    if what == "tower":
        owner = getattr(qwen, "model", qwen)
        owner.audio_tower = torch.compile(owner.audio_tower, **compile_)
    if what == "in place":
        qwen.compile(**compile_)
    assert integrate(model, kind) is model
    if what == "model after":
        model = torch.compile(model, **compile_)
    if what == "forward":
        model.forward = torch.compile(model.forward, **compile_)
    got = model.generate(**inputs, max_new_tokens=2)
    assert torch.equal(got, expected)
    assert len(model.speaker_rows) == 6
    if what not in ("forward", "in place"):  # there other shapes are traced anew, for seconds
        rows = answer_per_talker(model, processor, RECORDINGS[0], max_new_tokens=2)
        assert [row["speaker"] for row in rows] == [1, 2, 3]
    ssm.remove_speaker_separator(model)
    assert "generate" not in vars(qwen)


@pytest.mark.parametrize("kind", ["spectrogram", 1])
def test_device_map(kind, qwen_folder, integrate, processor):
    pytest.importorskip("accelerate", reason="device_map needs accelerate")
    from accelerate import dispatch_model
    from transformers import Qwen2AudioForConditionalGeneration

    inputs = processed(processor, RECORDINGS)
    plain = Qwen2AudioForConditionalGeneration.from_pretrained(qwen_folder).eval()
    expected = integrate(plain, kind).generate(**inputs, max_new_tokens=5)
    placed = Qwen2AudioForConditionalGeneration.from_pretrained(qwen_folder, device_map="cpu")
    for model in (placed, dispatch_model(plain, {"": "cpu"}, force_hooks=True)):
        got = integrate(model, kind).generate(**inputs, max_new_tokens=5)
        assert torch.equal(got, expected)
        ssm.remove_speaker_separator(model)
        model.generate(**inputs, max_new_tokens=2)


ALONE = """
import json, sys
import torch
import speaker_separator_module as ssm
for argv in json.loads(sys.argv[1]):
    assert ssm.main(argv) == 0
print("trained")
print("trained", file=sys.stderr)
from transformers import AutoProcessor, Qwen2AudioForConditionalGeneration
model = Qwen2AudioForConditionalGeneration.from_pretrained(sys.argv[2]).eval()
processor = AutoProcessor.from_pretrained(sys.argv[2])
text = "<|audio_bos|> <|AUDIO|> <|audio_eos|> Who speaks?"
audio = torch.sin(torch.arange(9000) / 9).numpy()
inputs = processor(text=text, audio=audio, sampling_rate=16000, return_tensors="pt")
spectrograms = ssm.SpectrogramSeparator(dim=16, num_layers=1, num_heads=2, ff_dim=16)
for separator in ("run/best_model.pt", spectrograms):
    ssm.integrate_speaker_separator(model, None, separator, threshold=0)
    print(len(model.generate(**inputs, max_new_tokens=2)), len(model.speaker_rows))
"""


def test_the_module_alone_in_a_folder(dataset, qwen_folder, tmp_path):
    """Copied without its siblings it trains on features, infers from .npy and integrates."""
    shutil.copy(ROOT / "speaker_separator_module.py", tmp_path)
    mixture = next((dataset / "val/mixed").glob("*.npy"))
    infer = ["infer", f"--input={mixture}", "--checkpoint=run/best_model.pt", "--num_speakers=2"]
    commands = [train_flags(dataset, "run", "--max_speakers=3"), [*infer, *CPU_FLAGS]]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", ALONE, json.dumps(commands), str(qwen_folder)], cwd=tmp_path,
        env=environment, capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0 and done.stderr.startswith("trained"), done.stderr
    assert done.stdout.split("trained\n")[1].split() == ["3", "3"] * 2
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        "best_model.pt", "checkpoint_epoch_1.pt"]  # the report and the curves are a sibling's
    assert sorted(path.name for path in (tmp_path / "separated").iterdir()) == [
        "separation.json", "speaker_1.npy", "speaker_2.npy"]


# --------------------------------------------------------------------------------------------------
# Whisper


def timed_whisper(whisper_folder):
    """A tiny multilingual Whisper that knows timestamps, 0.02 s apart up to 1 s."""
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    config = WhisperConfig.from_pretrained(whisper_folder, vocab_size=160, max_target_positions=40)
    model = shake(WhisperForConditionalGeneration(config), seed=5)
    vars(model.generation_config).update(
        lang_to_id={"<|en|>": 90, "<|de|>": 91}, task_to_id={"transcribe": 92, "translate": 93},
        is_multilingual=True, no_timestamps_token_id=99, max_initial_timestamp_index=20,
        forced_decoder_ids=None, do_sample=False, max_length=20, decoder_start_token_id=1,
        pad_token_id=0, eos_token_id=2, alignment_heads=[[0, 1]])  # fmt: skip
    return model


@pytest.fixture
def whisper(whisper_folder):
    return timed_whisper(whisper_folder)


def ends_a_segment(ids, scores):
    """Logits that say "<0.00> word word word <0.40><0.40> <end>" after the language and the task.

    Which words is left to the model.
    """
    said = {3: 100, 7: 120, 8: 120, 9: 2}.get(ids.shape[1])
    words = torch.arange(3, 90)
    allowed = words if said is None else torch.tensor([said])
    barred = torch.full_like(scores, -torch.inf)
    return barred.index_copy(1, allowed, scores[:, allowed].clamp(min=-1e4))


def listen(recordings):
    return tiny_extractor()(
        recordings, sampling_rate=RATE, return_tensors="pt", return_attention_mask=True)


def stripped(rows):
    return [[t for t in row.tolist() if t] for row in rows]


@pytest.mark.parametrize("kind", KINDS)
def test_whisper_rows_equal_the_slow_path(kind, integrate, whisper):
    separator = make_separator(kind)
    options = {"max_new_tokens": 6, "language": "en", "suppress_tokens": list(range(99, 160))}
    expected, alone = [], [listen([samples]) for samples in RECORDINGS]
    for inputs in alone:
        expected += slow_rows(whisper, separator, inputs, kind, **options)
    model = integrate(whisper, kind, separator=separator)
    got = [row for inputs in alone for row in model.generate(**inputs, **options)]
    assert len({tuple(row.tolist()) for row in got}) > 1
    assert stripped(got) == stripped([row[0] for row in expected])
    batch = model.generate(**listen(RECORDINGS), **options)
    assert [row[:2] for row in model.speaker_rows] == [(b, s) for b in range(3) for s in range(3)]
    assert stripped(batch) == stripped(got)


TIMES = {"language": "en", "return_timestamps": True}


@pytest.mark.parametrize(
    "options",
    [
        {"language": "de", "task": "translate"},
        {"language": ["en", "de", "en"]},
        {"language": "en", "num_beams": 2},
        {"language": "en", "num_beams": 2, "num_return_sequences": 2},
        {"language": ["en", "de", "en"], "num_return_sequences": 2, "num_beams": 2},
        {"language": "en", "prompt_ids": torch.tensor([5, 6, 7])},  # as many as recordings
        {"language": "en", "return_dict_in_generate": True},
        {"language": "en", "return_token_timestamps": True},
        {"language": "en", "temperature": (0.0, 0.2), "logprob_threshold": 0.0},
        TIMES,
        {**TIMES, "num_beams": 2},
        {**TIMES, "read on": True},
        {**TIMES, "return_segments": True, "read on": True},
        {},  # finds the language by itself
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["spectrogram", None, 1])
def test_whisper_pass_through(kind, options, integrate, whisper):
    """Also where Whisper goes on from a timestamp in the middle of the recording.

    Hidden features cannot be read again: what needs that is refused, and without timestamps in the
    answer there is no place to go on from.
    """
    inputs, options = listen(RECORDINGS), dict(options)
    if options.pop("read on", False):
        options["logits_processor"] = [ends_a_segment]
    refused = {"return_timestamps", "temperature"} & set(options)
    if refused and kind != "spectrogram":
        with pytest.raises(ValueError, match=f"{refused.pop()} .* use a spectrogram separator"):
            integrate(whisper, kind).generate(**inputs, **options)
        return
    if "return_timestamps" not in options:
        options["suppress_tokens"] = list(range(100, 160))
    torch.manual_seed(1)
    untouched = whisper.generate(**inputs, max_new_tokens=8, **options)
    model = pass_through(integrate(whisper, kind, threshold=0.5))
    torch.manual_seed(1)
    if kind != "spectrogram":
        del options["suppress_tokens"]  # by itself
    got = model.generate(inputs.pop("input_features"), **inputs, max_new_tokens=8, **options)
    if not isinstance(got, torch.Tensor):
        got, untouched = got["sequences"], untouched["sequences"]
    assert torch.equal(got, untouched)
    assert len(model.speaker_rows) == len(got) == 3 * options.get("num_return_sequences", 1)


def test_whisper_reads_on_from_a_timestamp(integrate, whisper):
    """Every row is what the untouched Whisper makes of that talker's spectrogram, read thrice."""
    separator, slow = make_separator("spectrogram"), []
    options = {**TIMES, "logits_processor": [ends_a_segment], "return_segments": True}
    for samples in RECORDINGS:
        slow += slow_rows(whisper, separator, listen([samples]), "spectrogram", **options)
    model = integrate(whisper, "spectrogram", separator=separator)
    got = model.generate(listen(RECORDINGS)["input_features"], **options)
    assert stripped(got["sequences"]) == stripped([row["sequences"][0] for row in slow])
    starts = [[round(float(part["start"]), 2) for part in row] for row in got["segments"]]
    assert starts == [[0.0, 0.4, 0.8]] * 9
    assert len({tuple(row) for row in got["sequences"].tolist()}) > 1


@pytest.mark.parametrize("kind", KINDS)
def test_whisper_with_and_without_a_mask(kind, integrate, whisper):
    """Whisper's extractor gives no mask unless asked: the audio ends where the floor begins."""
    inputs, options = listen(RECORDINGS), {"max_new_tokens": 6, "language": "en"}
    model = integrate(whisper, kind)
    masked, rows = model.generate(**inputs, **options), model.speaker_rows
    assert torch.equal(model.generate(inputs["input_features"], **options), masked)
    assert model.speaker_rows == rows
    separate = model._speaker_integration.separate
    _, inside, _ = separate(inputs["input_features"], None)
    assert inside.sum(1).tolist() == pytest.approx(
        [len(r) / RATE * (100 if kind == "spectrogram" else 50) for r in RECORDINGS], abs=2)
    for louder in np.linspace(0, 0.9, 10):  # the floor is the floor whatever it was rounded to
        _, half, _ = separate((inputs["input_features"] + louder).bfloat16(), None)
        assert (half.sum(1) - inside.sum(1)).abs().max() <= 1


def test_whispers_configuration_counts_like_arguments(integrate, whisper):
    """Several answers each, timestamps and suppressed words, asked for by the configuration."""
    inputs, config = listen(RECORDINGS), whisper.generation_config
    model = pass_through(integrate(whisper, 1, threshold=0.5))
    options = {"language": "en", "max_new_tokens": 6}
    plain = model.generate(**inputs, **options)
    first = int(plain[0, 0])
    barred = model.generate(**inputs, **options, suppress_tokens=[first])
    config.suppress_tokens = [first]
    assert torch.equal(model.generate(**inputs, **options), barred)
    assert first not in barred[0] and first in plain[0]
    config.suppress_tokens, config.num_return_sequences, config.num_beams = None, 2, 2
    assert len(model.generate(**inputs, **options)) == len(model.speaker_rows) == 6
    assert [row[0] for row in model.speaker_rows] == [0, 0, 1, 1, 2, 2]
    config.return_timestamps = True
    with pytest.raises(ValueError, match="return_timestamps .* use a spectrogram separator"):
        model.generate(**inputs, **options)


@pytest.mark.parametrize("kind", ["spectrogram", 1])
def test_whisper_nobody_and_refusals(kind, integrate, whisper):
    model, inputs = integrate(whisper, kind), listen(RECORDINGS)
    assert model.generate(**inputs, num_speakers=0).shape[0] == 0
    assert model.generate(**inputs, num_speakers=0, return_segments=True)["segments"] == []
    times = model.generate(**inputs, num_speakers=0, return_token_timestamps=True)
    assert times["token_timestamps"].shape == times["sequences"].shape == (0, 0)
    both = {"return_segments": True, "return_token_timestamps": True}
    assert set(model.generate(**inputs, num_speakers=0, **both)) == {*times, "segments"}
    if kind == "spectrogram":  # the other one refuses timestamps
        timed = {"return_dict_in_generate": True, "return_timestamps": True}
        assert model.generate(**inputs, num_speakers=0, **timed)["segments"] == []
        with pytest.raises(ValueError, match="3 languages came with 2 recordings"):
            model.generate(listen(RECORDINGS[:2])["input_features"], language=["en", "de", "en"])
    with pytest.raises(ValueError, match="audio slot, as in Qwen2-Audio"):
        model.generate(**inputs, mode="joint")
    with pytest.raises(ValueError, match="200 mel frames.*answer_per_talker"):
        model.generate(torch.zeros(1, 16, 200))


# --------------------------------------------------------------------------------------------------
# What stays as it was


@pytest.mark.parametrize("kind", ["spectrogram", 1])
def test_text_and_labels_are_untouched(kind, integrate, qwen, processor):
    text = processor.tokenizer([PROMPT, "Who speaks? a a"], return_tensors="pt", padding=True)
    text = {"input_ids": text["input_ids"], "attention_mask": text["attention_mask"]}
    inputs = processed(processor, RECORDINGS)
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)

    def outcomes(model):
        with torch.no_grad():
            output = model(**inputs, labels=labels)
            logits = model(**text).logits
        ids = model.generate(**text, max_new_tokens=5)
        positional = model.generate(text["input_ids"][:1], max_new_tokens=5)
        return output.loss, output.logits, logits, ids, positional

    before = outcomes(qwen)
    after = outcomes(integrate(qwen, kind))
    assert before[3].shape[0] == 2
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    qwen.generate(**inputs, max_new_tokens=2)  # audio in between changes nothing either
    assert all(torch.equal(a, b) for a, b in zip(before, outcomes(qwen), strict=True))
    assert qwen.speaker_rows is None  # the last call had no talkers to list


@pytest.mark.parametrize("kind", ["spectrogram", None, 1])
def test_removal_restores_the_model(kind, integrate, qwen, processor):
    inputs = processed(processor, RECORDINGS)
    tokens = qwen.generate(**inputs, max_new_tokens=6)
    state = {name: value.clone() for name, value in qwen.state_dict().items()}
    attributes, tower_attributes = set(qwen.__dict__), set(ssm.audio_tower_of(qwen).__dict__)
    model = integrate(qwen, kind)
    assert model.speaker_separator.is_spectrogram == (kind == "spectrogram")
    model.generate(**inputs, max_new_tokens=6)
    assert ssm.remove_speaker_separator(model) is qwen
    assert set(qwen.__dict__) == attributes
    assert set(ssm.audio_tower_of(qwen).__dict__) == tower_attributes
    assert not hasattr(qwen, "speaker_separator")
    assert list(qwen.state_dict()) == list(state)
    assert all(torch.equal(value, state[name]) for name, value in qwen.state_dict().items())
    assert all(p.requires_grad for n, p in qwen.named_parameters() if "embed_positions" not in n)
    assert torch.equal(qwen.generate(**inputs, max_new_tokens=6), tokens)
    assert ssm.remove_speaker_separator(qwen) is qwen  # once more is no error


class Wrapper(torch.nn.Module):
    """Passes on what it lacks, as the wrappers of adapters do."""

    def __init__(self, model):
        super().__init__()
        self.base_model = model

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.base_model, name)


def test_a_wrapped_model_is_the_model(integrate, qwen, processor):
    """Its separator is found in it, replaced by another one and removed."""
    inputs, wrapped = processed(processor, RECORDINGS[:1]), Wrapper(integrate(qwen))
    once = answers(wrapped, inputs, max_new_tokens=2)
    assert answer_per_talker(wrapped, processor, RECORDINGS[0], max_new_tokens=1)
    assert answers(integrate(wrapped), inputs, max_new_tokens=2) == once
    assert len(once) == 3
    ssm.remove_speaker_separator(wrapped)
    assert len(wrapped.generate(**inputs, max_new_tokens=2)) == 1
    assert "generate" not in vars(qwen) and "generate" not in vars(wrapped)


class ByName(Wrapper):
    """Takes no argument by position, as PEFT's wrapper of Whisper does."""

    def generate(self, **options):
        return self.base_model.generate(**options)


@pytest.mark.parametrize("kind", ["spectrogram", 1])
def test_a_wrapper_that_takes_names_alone(kind, integrate, whisper):
    inputs = listen(RECORDINGS[:2])
    expected = integrate(copy.deepcopy(whisper), kind).generate(**inputs, max_new_tokens=3)
    wrapped = integrate(ByName(whisper), kind)
    assert torch.equal(wrapped.generate(**inputs, max_new_tokens=3), expected)


def test_outputs_of_the_encoder_are_those_of_the_mixture(integrate, whisper):
    inputs = listen(RECORDINGS[:1])
    outputs = whisper.get_encoder()(inputs["input_features"])
    with pytest.raises(ValueError, match="encoder_outputs are those of the mixture"):
        integrate(whisper).generate(**inputs, encoder_outputs=outputs)


@pytest.mark.parametrize(("kind", "mode"), [("spectrogram", "joint"), (1, "separate")])
@pytest.mark.parametrize("option", ["assistant_model", "prompt_lookup_num_tokens"])
def test_speculative_decoding_of_embedded_prompts(option, kind, mode, integrate, qwen, processor):
    """In separate mode, a spectrogram separator gives the same words with it."""
    inputs = processed(processor, RECORDINGS[:1])
    value = copy.deepcopy(qwen) if option == "assistant_model" else 2
    options = {option: value, "num_speakers": 1, "max_new_tokens": 5}
    model = integrate(qwen, kind)
    with pytest.raises(ValueError, match=f"{option} gives other words"):
        model.generate(**inputs, **options, mode=mode, tokenizer=processor.tokenizer)
    model = integrate(model, "spectrogram")
    plain = model.generate(**inputs, num_speakers=1, max_new_tokens=5)
    assert torch.equal(model.generate(**inputs, **options), plain)


def test_a_configuration_leaves_the_rest_to_the_model(integrate, whisper):
    """As in transformers: what it does not set is what the model's own says."""
    model, inputs = integrate(whisper, 1), listen(RECORDINGS[:1])
    allowed, given = 7, GenerationConfig(max_new_tokens=2)
    words = range(model.config.vocab_size)
    model.generation_config.suppress_tokens = [word for word in words if word != allowed]
    model.generation_config.num_return_sequences = 2
    model.generation_config.do_sample = True
    ids = model.generate(**inputs, generation_config=given)
    assert len(ids) == 6
    assert set(ids[:, -2:].flatten().tolist()) == {allowed}


def test_a_generate_of_ones_own_survives(integrate, qwen, processor):
    """Libraries keep wrappers on the object; the separator goes through them and leaves them."""
    inputs, calls = processed(processor, RECORDINGS[:1]), []
    original = qwen.generate
    qwen.generate = wrapper = lambda *a, **k: calls.append(1) or original(*a, **k)
    model = integrate(qwen, 1)
    model.generate(**inputs, max_new_tokens=1)
    assert calls == [1]
    ssm.remove_speaker_separator(model)
    assert qwen.generate is wrapper


@pytest.mark.parametrize("kind", ["spectrogram", 1])
def test_a_separator_object_comes_back_as_it_was(kind, qwen, processor):
    separator = make_separator(kind).train()
    separator.speaker_queries.requires_grad_(False)
    needed = [p.requires_grad for p in separator.parameters()]
    state = {name: value.clone() for name, value in separator.state_dict().items()}
    model = ssm.integrate_speaker_separator(qwen, separator_checkpoint=separator, threshold=0.0)
    assert model.speaker_separator is separator
    assert not separator.training and not any(p.requires_grad for p in separator.parameters())
    model.generate(**processed(processor, RECORDINGS[:1]), max_new_tokens=1)
    for _ in range(2):  # also where it is put in again without being taken out
        ssm.integrate_speaker_separator(model, separator_checkpoint=separator)
    ssm.remove_speaker_separator(model)
    assert all(module.training for module in separator.modules())
    assert [p.requires_grad for p in separator.parameters()] == needed
    assert sum(needed) == len(needed) - 1
    assert all(torch.equal(v, state[name]) for name, v in separator.state_dict().items())


@pytest.mark.parametrize("first", [0, 1])
def test_a_separator_in_two_models_comes_back_from_the_last(first, qwen, whisper):
    separator, models = make_separator("spectrogram").train(), [qwen, whisper]
    for model in models:
        ssm.integrate_speaker_separator(model, separator_checkpoint=separator)
    ssm.remove_speaker_separator(models.pop(first))
    assert not separator.training and not any(p.requires_grad for p in separator.parameters())
    ssm.remove_speaker_separator(models[0])
    assert separator.training and all(p.requires_grad for p in separator.parameters())


@pytest.mark.parametrize("kinds", [(2, 1), ("spectrogram", 1), (1, "spectrogram")])
def test_integrating_twice_replaces(kinds, integrate, qwen, processor):
    inputs = processed(processor, RECORDINGS[:1])
    untouched = qwen.generate(**inputs, max_new_tokens=4)
    once = answers(integrate(qwen, kinds[1]), inputs, max_new_tokens=4)
    twice = answers(integrate(integrate(qwen, kinds[0]), kinds[1]), inputs, max_new_tokens=4)
    assert once == twice
    ssm.remove_speaker_separator(qwen)
    assert torch.equal(qwen.generate(**inputs, max_new_tokens=4), untouched)


def test_failure_while_generating_leaves_the_model_usable(integrate, qwen, processor):
    model, inputs = integrate(qwen), processed(processor, RECORDINGS)
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


@pytest.mark.parametrize("kind", ["spectrogram", 1])
def test_checkpoint_brings_layer_and_threshold(kind, integrate, qwen, processor, tmp_path):
    source = {} if kind == "spectrogram" else {
        "feature_source": {"encoder": "x", "layer": 1, "frame_rate": 50.0}}  # fmt: skip
    separator = make_separator(kind, seed=6, threshold=0.0, **source)
    path = save_tiny_checkpoint(tmp_path / "best_model.pt", separator)
    separator.save_pretrained(tmp_path / "exported")
    inputs = processed(processor, RECORDINGS[:1])
    by_hand = answers(integrate(qwen, kind, 0.0, separator=separator), inputs, max_new_tokens=5)
    for origin in (path, str(path), tmp_path / "exported"):
        model = ssm.integrate_speaker_separator(qwen, max_speakers=3, separator_checkpoint=origin)
        assert answers(model, inputs, max_new_tokens=5) == by_hand
    model = ssm.integrate_speaker_separator(qwen, separator_checkpoint=path, threshold=1.0)
    assert len(model.generate(**inputs)) == 0
    if kind == 1:
        model = ssm.integrate_speaker_separator(qwen, separator_checkpoint=path, layer=0)
        other = answers(integrate(qwen, 0, separator=separator), inputs, max_new_tokens=5)
        assert answers(model, inputs, max_new_tokens=5) == other != by_hand


@pytest.mark.parametrize("origin", [{"model_state_dict": {}}, torch.nn.Linear(2, 2)])
def test_what_is_no_separator(origin, qwen):
    with pytest.raises(ValueError, match=f"or a separator, not a {type(origin).__name__}"):
        ssm.integrate_speaker_separator(qwen, separator_checkpoint=origin)


@pytest.mark.parametrize("threshold", [50, -1, float("nan")])
def test_threshold_and_number_that_cannot_be(threshold, integrate, qwen, processor):
    """Percentages would be taken for a rule that finds nobody."""
    with pytest.raises(ValueError, match="threshold must be 0 to 1"):
        integrate(qwen, threshold=threshold)
    separator = make_separator("spectrogram")
    with pytest.raises(ValueError, match="threshold must be 0 to 1"):
        ssm.infer_recording(RECORDINGS[0], separator, threshold=threshold)
    inputs = processed(processor, RECORDINGS[:1])
    for number in (1.5, [2], threshold):
        with pytest.raises(ValueError, match="num_speakers must be 0 to 3"):
            integrate(qwen).generate(**inputs, num_speakers=number)


@pytest.mark.parametrize("streams", [1, 2, 5])
def test_max_speakers(streams, qwen, processor, tmp_path, capsys):
    """Without ``max_speakers`` the checkpoint's count; more than it has is refused."""
    inputs = processed(processor, RECORDINGS[:1])
    for separator in (tiny_separator(streams), tiny_spectrogram_separator(streams)):
        path = save_tiny_checkpoint(tmp_path / "some.pt", separator)
        model = ssm.integrate_speaker_separator(qwen, None, path, threshold=0.0)
        assert len(model.generate(**inputs, max_new_tokens=1)) == streams
        ssm.integrate_speaker_separator(qwen, max_speakers=streams, separator_checkpoint=path)
        with pytest.raises(ValueError, match=f"{streams} streams and max_speakers={streams + 1}"):
            ssm.integrate_speaker_separator(qwen, streams + 1, path)
    assert "random weights" not in capsys.readouterr().err
    with pytest.raises(ValueError, match="max_speakers must be 1 to"):
        ssm.integrate_speaker_separator(qwen, max_speakers=0)
    model = ssm.integrate_speaker_separator(qwen, streams, threshold=0.0)  # no checkpoint
    assert "random weights" in capsys.readouterr().err
    assert len(model.generate(**inputs, max_new_tokens=1)) == streams


def test_checkpoint_of_other_width(qwen, tmp_path):
    path = save_tiny_checkpoint(tmp_path / "wide.pt", tiny_separator(3, feature_dim=64))
    with pytest.raises(ValueError, match="64.*32"):
        ssm.integrate_speaker_separator(qwen, separator_checkpoint=path)
    assert "generate" not in qwen.__dict__


def test_missing_checkpoint(qwen, tmp_path):
    with pytest.raises(FileNotFoundError, match="gone.pt"):
        ssm.integrate_speaker_separator(qwen, separator_checkpoint=tmp_path / "gone.pt")


@pytest.mark.parametrize("layer", [-1, 3])
def test_layer_out_of_range(layer, qwen):
    with pytest.raises(ValueError, match="0 to 2"):
        ssm.integrate_speaker_separator(qwen, layer=layer)


def test_layer_of_a_spectrogram_separator(qwen, spectrogram_checkpoint):
    with pytest.raises(ValueError, match="layer is for separators of hidden features"):
        ssm.integrate_speaker_separator(qwen, None, spectrogram_checkpoint, layer=1)
    assert "generate" not in qwen.__dict__


def test_more_prompts_than_recordings(integrate, qwen, processor):
    model, inputs = integrate(qwen), processed(processor, RECORDINGS)
    for name in ("input_features", "feature_attention_mask"):
        inputs[name] = inputs[name][:2]
    with pytest.raises(ValueError, match="3 prompts.*2 recordings"):
        model.generate(**inputs)


@pytest.mark.parametrize("kind", ["spectrogram", None])
def test_more_talkers_than_streams(kind, integrate, qwen, processor):
    with pytest.raises(ValueError, match="0 to 3"):
        integrate(qwen, kind).generate(**processed(processor, RECORDINGS), num_speakers=4)


def test_model_of_another_kind():
    with pytest.raises(ValueError, match="Linear is neither"):
        ssm.integrate_speaker_separator(torch.nn.Linear(2, 2))


class Listener(torch.nn.Module):
    """A model of another kind: its ``generate`` says how loud a spectrogram is, bin by bin."""

    def generate(self, input_features, **options):
        return (1000 * (input_features.amax(-1) + 10)).long()


def test_any_model_that_reads_spectrograms():
    """A spectrogram separator needs no encoder that it knows; one of hidden features does."""
    model, separator = Listener(), make_separator("spectrogram")
    features = listen(RECORDINGS)["input_features"]
    assert ssm.integrate_speaker_separator(model, 3, separator, threshold=0.0) is model
    got = model.generate(input_features=features)
    streams, _, _ = model._speaker_integration.separate(features, None)
    assert torch.equal(got, Listener().generate(streams.flatten(0, 1).mT))
    assert len(got.unique(dim=0)) == 9
    assert [row[:2] for row in model.speaker_rows] == [(b, s) for b in range(3) for s in range(3)]
    assert model.generate(features, num_speakers=0).shape == (0, 0)
    with pytest.raises(ValueError, match="layer is for separators of hidden features"):
        ssm.integrate_speaker_separator(model, None, separator, layer=1)
    ssm.remove_speaker_separator(model)
    assert torch.equal(model.generate(features), Listener().generate(features))
    with pytest.raises(ValueError, match="Listener is neither"):
        ssm.integrate_speaker_separator(model, None, tiny_separator())
    with pytest.raises(ValueError, match="Linear has no generate"):
        ssm.integrate_speaker_separator(torch.nn.Linear(2, 2), None, separator)


# --------------------------------------------------------------------------------------------------
# One call for an answer per talker


@pytest.mark.parametrize("kind", ["spectrogram", None])
def test_answer_per_talker(kind, integrate, qwen, processor):
    model = integrate(qwen, kind)
    rows = answer_per_talker(model, processor, RECORDINGS[0], PROMPT, max_new_tokens=5)
    inputs = processed(processor, RECORDINGS[:1])
    expected = processor.batch_decode(
        answers(model, inputs, max_new_tokens=5), skip_special_tokens=True)
    assert [row["speaker"] for row in rows] == [1, 2, 3]
    assert [row["text"] for row in rows] == [text.strip() for text in expected]
    assert [row["probability"] for row in rows] == [round(p, 4) for *_, p in model.speaker_rows]


@pytest.mark.parametrize("kind", ["spectrogram", None])
def test_answer_per_talker_of_nobody(kind, integrate, qwen, processor):
    model = integrate(qwen, kind, threshold=1.0)
    assert answer_per_talker(model, processor, RECORDINGS[0]) == []


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["spectrogram", 1])
def test_ask_a_model_in_half_precision(kind, dtype, qwen_folder, integrate):
    """What commands do: a model as its file or the user has it, recordings in, texts out."""
    model, processor = load_model(str(qwen_folder), "cpu", dtype)
    plain = ask(model, processor, RECORDINGS, max_new_tokens=4)
    model = pass_through(integrate(model, kind, threshold=0.5))
    assert next(model.parameters()).dtype == dtype
    assert ask(model, processor, RECORDINGS, max_new_tokens=4) == plain
    assert len(plain) == 3 and any(plain)


def test_ask_takes_what_read_audio_takes(qwen, processor, tmp_path):
    whole = (32767 * RECORDINGS[0]).astype(np.int16)
    path = write_wav(tmp_path / "a.wav", whole)
    given = [whole, torch.from_numpy(whole), path, str(path), torch.from_numpy(whole / 32768.0)]
    texts = ask(qwen, processor, given, max_new_tokens=4)
    assert len(set(texts)) == 1 and texts == ask(qwen, processor, [whole / 32768.0] * 5,
                                                 max_new_tokens=4)


# --------------------------------------------------------------------------------------------------
# The spoken-digits model, where it is there


def test_digits_model():
    folder, recordings = SHARED / "qwen2-audio-digits", SHARED / "fsdd"
    if not (folder.is_dir() and recordings.is_dir()):
        pytest.skip(f"no spoken-digits model at {folder}")
    model, processor = load_model(str(folder))
    pieces = [read_audio(recordings / f"{d}_theo_6.wav") for d in (3, 1, 9)]
    gap = np.zeros(1600, np.float32)
    samples = np.concatenate([gap, pieces[0], gap, pieces[1], gap, pieces[2]])
    samples *= 0.05 / np.sqrt(np.mean(np.concatenate(pieces) ** 2))
    inputs = processed(processor, [samples])
    untouched = model.generate(**inputs)
    separator = tiny_spectrogram_separator()
    for options in ({"layer": None}, {"layer": 1}, {"separator_checkpoint": separator}):
        ssm.integrate_speaker_separator(model, **options)
        rows = answer_per_talker(pass_through(model), processor, samples)
        assert [row["text"] for row in rows] == ["three one nine"]
        assert torch.equal(model.generate(**inputs), untouched)
