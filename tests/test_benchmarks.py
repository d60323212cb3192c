"""The benchmarks run, on models of a tiny size."""

import sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import true_size  # noqa: E402


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_true_size():
    from transformers import Qwen2AudioConfig

    tower = {"model_type": "qwen2_audio_encoder", "d_model": 32, "encoder_layers": 2,
             "encoder_ffn_dim": 64, "encoder_attention_heads": 4, "num_mel_bins": 16,
             "max_source_positions": 50}  # fmt: skip
    rows = list(true_size.benchmark(Qwen2AudioConfig(audio_config=tower), [1, None]))
    names = [f"after {place}, {n} talkers" for place in ("block 1", "output") for n in (1, 2, 3)]
    assert [row["pass"] for row in rows] == ["untouched", *names]
    assert all(row["seconds"] > 0 and row["time"] > 0 for row in rows)
