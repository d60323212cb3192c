"""What the tests share: tiny datasets, separators and real models of a tiny size; no network."""

import json
import os
import shutil
import sys
import warnings
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported
# Before torch is: tests run in two processes, whose threads would wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

import generate_multi_speaker_dataset as generator  # noqa: E402
import scoring  # noqa: E402
import speaker_separator_module as ssm  # noqa: E402

SHARED = ROOT.parent / "shared"
WIDTH, FRAMES = 32, 20
SIZES = {"num_layers": 1, "num_heads": 4, "ff_dim": 32}
SPECTROGRAM_SIZES = {
    "num_layers": 2, "num_heads": 2, "ff_dim": 32, "dim": 16, "dropout": 0.0}
SHORT = {"batch_size": 2, "mixtures_per_epoch": 4}  # epochs of two steps
SHORT_FLAGS = [f"--{name}={value}" for name, value in {**SIZES, **SHORT}.items()]
CPU = {"device": "cpu", "dtype": "float32"}
CPU_FLAGS = ["--device=cpu"]  # commands run with the precision that users get
PNG = b"\x89PNG"
RATE = 16000
CHAT = (
    "{% for m in messages %}<|im_start|> {{ m['role'] }} {% if m['content'] is string %}"
    "{{ m['content'] }} {% else %}{% for c in m['content'] %}{% if c['type'] == 'audio' %}"
    "<|audio_bos|> <|AUDIO|> <|audio_eos|> {% elif c['type'] == 'text' %}{{ c['text'] }} "
    "{% endif %}{% endfor %}{% endif %}<|im_end|> {% endfor %}"
    "{% if add_generation_prompt %}<|im_start|> assistant {% endif %}"
)


# --------------------------------------------------------------------------------------------------
# Helpers


def tiny_separator(max_speakers=3, seed=0, **options):
    """A separator of feature vectors."""
    torch.manual_seed(seed)
    return ssm.SpeakerSeparatorTransformer(
        **{"feature_dim": WIDTH, "max_speakers": max_speakers, **SIZES, **options}
    ).eval()


def tiny_spectrogram_separator(max_speakers=3, seed=0, **options):
    """A separator of log-mel spectrograms."""
    torch.manual_seed(seed)
    return ssm.SpectrogramSeparator(
        **{"max_speakers": max_speakers, **SPECTROGRAM_SIZES, **options}).eval()


def train_tiny(data, folder, **options):
    options = {**SIZES, **SHORT, **CPU, "epochs": 1, **options}
    return ssm.train_speaker_separator(data, folder, **options)


def train_flags(data, folder, *more):
    """Command line of a one-epoch training run of the tiny separator."""
    return ["train", f"--data_dir={data}", f"--checkpoint_dir={folder}", "--epochs=1",
            *SHORT_FLAGS, *CPU_FLAGS, *map(str, more)]  # fmt: skip


def make_dataset(folder, *flags):
    sizes = [
        f"--feature_dim={WIDTH}",
        f"--seq_len={FRAMES}",
        "--train_samples=4",
        "--val_samples=3",
    ]
    assert generator.main([*sizes, f"--output_dir={folder}", *map(str, flags)]) == 0
    return Path(folder)


def save_tiny_checkpoint(path, separator):
    """Write a separator of either kind as training would, without training it."""
    checkpoint = {"epoch": 1, "optimizer_state_dict": {}, "scheduler_state_dict": {},
                  "train_loss": 1.0, "val_loss": 1.0, "train_history": [],
                  "model_config": separator.config,
                  "model_state_dict": separator.state_dict()}  # fmt: skip
    torch.save(checkpoint, path)
    return path


def edit_json(path, change):
    """Apply ``change`` to the content of a JSON file, in place."""
    content = json.loads(path.read_text())
    path.write_text(json.dumps(change(content) or content))


def run(main, argv):
    """Exit status of a command, whether it returns or argparse exits."""
    try:
        return main([str(a) for a in argv])
    except SystemExit as stop:
        return stop.code


def assert_fails(capsys, argv, *words, main=ssm.main):
    """The command exits 2 with one line on standard error that has all of ``words`` in it.

    Warnings count as lines: pytest keeps them off standard error, a user would see them there.
    """
    capsys.readouterr()
    with warnings.catch_warnings(record=True) as caught:
        status, errors = run(main, argv), capsys.readouterr().err
    assert status == 2
    loud = (UserWarning, RuntimeWarning, FutureWarning)
    errors += "".join(f"{w.message}\n" for w in caught if issubclass(w.category, loud))
    assert len(errors.strip().splitlines()) == 1, errors
    for word in words:
        assert str(word) in errors
    assert "Traceback" not in errors


def sine(seconds, pitch, rate=RATE):
    """A tone with overtones that swells and fades."""
    t = np.arange(round(seconds * rate)) / rate
    wave = sum(np.sin(2 * np.pi * pitch * k * t) / k for k in (1, 2, 3))
    return (0.1 * wave * np.sin(np.pi * t / seconds)).astype(np.float32)


def write_wav(path, samples, rate=RATE):
    import soundfile

    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, samples, rate)
    return path


@pytest.fixture(autouse=True)
def own_world(request, tmp_path, monkeypatch):
    """Every test starts from one seed, in its own folder, and draws nothing unless marked."""
    torch.manual_seed(0)
    monkeypatch.chdir(tmp_path)
    if not request.node.get_closest_marker("pictures"):
        for name in ("plot_history", "plot_streams"):
            monkeypatch.setattr(scoring, name, lambda path, *content, **more: Path(path).touch())


# --------------------------------------------------------------------------------------------------
# Data and checkpoints


@pytest.fixture(scope="session")
def dataset(tmp_path_factory):
    """A tiny simulated dataset; not to be written to."""
    return make_dataset(tmp_path_factory.mktemp("simulated") / "data")


@pytest.fixture
def own_dataset(dataset, tmp_path):
    """A copy of the dataset that a test may damage."""
    return Path(shutil.copytree(dataset, tmp_path / "own_data"))


@pytest.fixture(scope="session")
def trained(dataset, tmp_path_factory):
    """Checkpoint folder of a short training run; not to be written to."""
    folder = tmp_path_factory.mktemp("trained") / "checkpoints"
    train_tiny(dataset, folder, epochs=3, save_every=2)
    return folder


@pytest.fixture
def best(trained):
    return trained / "best_model.pt"


# --------------------------------------------------------------------------------------------------
# Real models of a tiny size: 16 mel bins, a window of 1 s (50 frames, 25 at Qwen2-Audio's output)


def shake(model, seed):
    """Give a fresh model weights so large that different inputs get different answers."""
    generator_ = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" not in name:
                weight.copy_(0.3 * torch.randn(weight.shape, generator=generator_))
    return model.eval()


def tiny_extractor():
    from transformers import WhisperFeatureExtractor

    return WhisperFeatureExtractor(feature_size=16, chunk_length=1, return_attention_mask=True)


def tower_states(tower, input_features, mask):
    """What the tower itself computes: hidden states after every block, its output, both masks."""
    states, hooks = [], []
    hooks.append(tower.layers[0].register_forward_pre_hook(lambda m, args: states.append(args[0])))
    for block in tower.layers:
        keep = lambda m, a, out: states.append(out[0] if isinstance(out, tuple) else out)  # noqa: E731
        hooks.append(block.register_forward_hook(keep))
    frames = mask.shape[1] // 2
    lengths = (mask.sum(1) - 1) // 2 + 1
    inside = torch.arange(frames) < lengths[:, None]
    blocked = torch.zeros(len(mask), 1, frames, frames).masked_fill(
        ~inside[:, None, None], torch.finfo(torch.float32).min)
    with torch.no_grad():
        output = tower(input_features, attention_mask=blocked).last_hidden_state
    for hook in hooks:
        hook.remove()
    halved = torch.arange(frames // 2) < ((lengths - 2) // 2 + 1)[:, None]
    return states, output, inside, halved


def tiny_processor():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2AudioProcessor

    special = ["<|endoftext|>", "<unk>", "<|im_start|>", "<|im_end|>",
               "<|audio_bos|>", "<|AUDIO|>", "<|audio_eos|>"]  # fmt: skip
    words = (
        "system user assistant You are a helpful assistant. What does the person say? Who speaks?"
    )
    vocabulary = [*special, *words.split(), *(f"w{i}" for i in range(40))]
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys(vocabulary))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<|endoftext|>",
        eos_token="<|im_end|>", padding_side="left", additional_special_tokens=special[2:],
    )  # fmt: skip
    return Qwen2AudioProcessor(tiny_extractor(), tokenizer, chat_template=CHAT)


@pytest.fixture(scope="session")
def processor():
    return tiny_processor()


@pytest.fixture(scope="session")
def qwen_folder(processor, tmp_path_factory):
    """A saved Qwen2-Audio with random weights, its processor beside it."""
    from transformers import Qwen2AudioConfig, Qwen2AudioForConditionalGeneration

    ids = processor.tokenizer.get_vocab()
    config = Qwen2AudioConfig(
        audio_config={"model_type": "qwen2_audio_encoder", "d_model": WIDTH, "encoder_layers": 2,
                      "encoder_attention_heads": 4, "encoder_ffn_dim": 64, "num_mel_bins": 16,
                      "max_source_positions": 50},
        text_config={"model_type": "qwen2", "hidden_size": WIDTH, "num_hidden_layers": 2,
                     "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64,
                     "vocab_size": len(ids), "max_position_embeddings": 512,
                     "tie_word_embeddings": False},
        audio_token_index=ids["<|AUDIO|>"], pad_token_id=0, bos_token_id=ids["<|im_start|>"],
        eos_token_id=ids["<|im_end|>"],
    )  # fmt: skip
    model = shake(Qwen2AudioForConditionalGeneration(config), seed=1)
    model.generation_config.update(
        pad_token_id=0, bos_token_id=ids["<|im_start|>"], eos_token_id=ids["<|im_end|>"],
        do_sample=False, max_new_tokens=8)  # fmt: skip
    folder = tmp_path_factory.mktemp("models") / "qwen"
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture
def qwen(qwen_folder):
    """The tiny Qwen2-Audio, fresh from disk."""
    from transformers import Qwen2AudioForConditionalGeneration

    return Qwen2AudioForConditionalGeneration.from_pretrained(qwen_folder).eval()


@pytest.fixture(scope="session")
def whisper_folder(tmp_path_factory):
    """A saved Whisper with random weights."""
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    config = WhisperConfig(
        d_model=WIDTH, encoder_layers=2, encoder_attention_heads=4, encoder_ffn_dim=64,
        decoder_layers=1, decoder_attention_heads=4, decoder_ffn_dim=64, num_mel_bins=16,
        max_source_positions=50, max_target_positions=16, vocab_size=50, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, decoder_start_token_id=1, suppress_tokens=None,
        begin_suppress_tokens=None)  # fmt: skip
    folder = tmp_path_factory.mktemp("models") / "whisper"
    shake(WhisperForConditionalGeneration(config), seed=2).save_pretrained(folder)
    tiny_extractor().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def whisper_path(whisper_folder, tmp_path_factory):
    """The tiny Whisper in half precision, with a tokenizer of letters beside it."""
    from transformers import WhisperForConditionalGeneration, WhisperProcessor, WhisperTokenizer

    special = ["<|endoftext|>", "<|startoftranscript|>", "<|en|>", "<|notimestamps|>"]
    vocabulary = {token: i for i, token in enumerate([*special, *"s-abcde0123456789", "Ġ"])}
    folder = tmp_path_factory.mktemp("listener")
    model = WhisperForConditionalGeneration.from_pretrained(whisper_folder, dtype=torch.float16)
    model.save_pretrained(folder)
    WhisperProcessor(tiny_extractor(), WhisperTokenizer(vocab=vocabulary, merges=[])
                     ).save_pretrained(folder)  # fmt: skip
    return folder


@pytest.fixture
def qwen_checkpoint(qwen_folder, tmp_path):
    """An untrained separator for the tiny Qwen2-Audio after block 1."""
    source = {"encoder": str(qwen_folder), "layer": 1, "frame_rate": 50.0}
    return save_tiny_checkpoint(tmp_path / "sep.pt", tiny_separator(feature_source=source))


@pytest.fixture
def spectrogram_checkpoint(tmp_path):
    """An untrained spectrogram separator."""
    return save_tiny_checkpoint(tmp_path / "spectrogram.pt", tiny_spectrogram_separator())


# --------------------------------------------------------------------------------------------------
# Recordings


@pytest.fixture(scope="session")
def speech_dir(tmp_path_factory):
    """Five speakers with ten short recordings each; a text names its speaker and take."""
    folder = tmp_path_factory.mktemp("speech")
    for speaker in range(5):
        for take in range(10):
            seconds = (0.11, 0.17, 0.26)[take % 3] + 0.01 * speaker
            samples = sine(seconds, 150 + 40 * speaker + 3 * take) + np.float32(1e-4)
            path = write_wav(folder / f"s{speaker}" / f"{take}.wav", samples)
            path.with_suffix(".txt").write_text(f"s{speaker}-{take}")
    return folder


@pytest.fixture(scope="session")
def recordings(speech_dir, tmp_path_factory):
    """A small dataset of wavs without an encoder; not to be written to."""
    folder = tmp_path_factory.mktemp("recordings") / "data"
    argv = [f"--speech_dir={speech_dir}", f"--output_dir={folder}", "--train_samples=3",
            "--val_samples=4", "--max_speakers=2", "--min_speakers=1", "--split_by=utterance",
            "--join", "2", "3"]  # fmt: skip
    assert generator.main(argv) == 0
    return folder
