"""The separator that the repository ships loads, and separates real speech where there is some."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, sine

import speaker_separator_module as ssm
from audio import SAMPLING_RATE, log_mel, read_audio

SPEECH = Path(os.environ.get("SPEECH", ROOT.parent / "shared/speech"))


@pytest.fixture(scope="module")
def shipped():
    """A change of the architecture that these weights do not fit fails here, and names them."""
    return ssm.load_separator(ssm.SHIPPED_SEPARATOR)


def test_shipped_files():
    files = {path.name: path.stat().st_size for path in ssm.SHIPPED_SEPARATOR.iterdir()}
    assert {"config.json", "model.safetensors", "README.md"} <= set(files)
    assert sum(files.values()) < 12.1e6
    config = json.loads((ssm.SHIPPED_SEPARATOR / "config.json").read_text(encoding="utf-8"))
    assert all(isinstance(value, int | float) for value in config.values())  # no path


def test_silence_and_a_hum_are_nobody(shipped):
    for sound in (np.zeros(2 * SAMPLING_RATE, np.float32), np.tile(sine(0.5, 100), 4)):
        assert not ssm.separate(shipped, log_mel(torch.from_numpy(sound))).active.any()


def real_talkers(count):
    """The first 4 s of development speakers at equal levels: [count, samples]."""
    if not SPEECH.is_dir():
        pytest.skip(f"needs recordings of speech in {SPEECH}")
    files = sorted((SPEECH / "librispeech_dev").glob("*.flac"))[:count]
    talkers = torch.stack([torch.from_numpy(read_audio(f)[: 4 * SAMPLING_RATE]) for f in files])
    return talkers * (0.05 / talkers.square().mean(1, keepdim=True).sqrt())


def test_one_real_talker_passes_unharmed(shipped):
    for talker in real_talkers(4):
        mixture = log_mel(talker)
        found = ssm.separate(shipped, mixture)
        assert int(found.active.sum()) == 1
        loud = mixture > mixture.amax() - 0.5  # 20 dB below the loudest bin, in Whisper's units
        assert (found.streams[found.active][0] - mixture)[loud].abs().mean() < 0.05  # 2 dB


def test_two_real_talkers_are_separated(shipped):
    """The error is far below that of the mixture, at 80 and at 128 mel bins alike."""
    talkers = real_talkers(2)
    waveforms, shares = torch.cat([talkers.sum(0, keepdim=True), talkers]), []
    for bins in (80, 128):
        mixture, *alone = log_mel(waveforms, bins)
        found = ssm.separate(shipped, mixture, num_speakers=2)
        targets, active = torch.stack(alone)[None], torch.ones(1, 2, dtype=torch.bool)
        mask = torch.ones(1, len(mixture), dtype=torch.bool)
        cost = ssm.pairwise_mse(found.streams[found.active][None], targets, mask)
        best = ssm.best_assignment(cost, active)
        streams = ssm.reorder(found.streams[found.active][None], best)
        errors = ssm.talker_mse(streams, targets, mask).mean()
        shares.append(float(errors / ssm.talker_mse(mixture[None, None], targets, mask).mean()))
    assert max(shares) < 0.6
    assert shares[1] == pytest.approx(shares[0], rel=0.15)
