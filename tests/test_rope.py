"""Rotary positions of each of mlx-lm's kinds equal stock's, or are refused at once."""

from __future__ import annotations

import json
import math
import shutil

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from mlx_lm.models.cache import make_prompt_cache

import moeflux_mlx
from moeflux_mlx.engine import checks
from moeflux_mlx.errors import ModelError

PLAIN = {"rope_theta": 10000.0, "partial_rotary_factor": 0.5}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
FACTORS = [1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5]
KINDS = {
    "default": {},
    "none": None,
    "linear": {"rope_type": "linear", "factor": 2.5},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": YARN,
    "yarn-typed": {**YARN, "type": "yarn", "beta_fast": 16, "beta_slow": 2},
    "yarn-mscale": {**YARN, "mscale": 0.707, "mscale_all_dim": 1.0},
    "longrope": {
        "rope_type": "longrope",
        "short_factor": FACTORS,
        "long_factor": FACTORS,
        "original_max_position_embeddings": 256,
    },
    "mrope": {"rope_type": "mrope", "mrope_section": [4, 2, 2]},
    "mrope-in-default": {"mrope_interleaved": True, "mrope_section": [4, 2, 2]},
    "proportional": {"rope_type": "proportional", "factor": 2.0},
}


def with_rope(checkpoint, path, parameters, **fields):
    shutil.copytree(checkpoint, path)
    config = json.loads((path / "config.json").read_text())
    config["text_config"].update(rope_parameters=parameters, **fields)
    (path / "config.json").write_text(json.dumps(config))
    return path


def logits(model):
    """Return the logits of a prompt and of two tokens far behind it."""
    cache = make_prompt_cache(model)
    ids = mx.array(np.random.RandomState(0).randint(1, 320, (1, 99)))
    parts = [model(ids, cache=cache)]
    parts += [model(ids[:, i : i + 1], cache=cache) for i in range(2)]
    joined = mx.concatenate(parts, axis=1).astype(mx.float32)
    mx.eval(joined)
    return np.array(joined)


@pytest.mark.sampled
@pytest.mark.parametrize("kind", KINDS)
def test_positions_are_those_of_mlx_lm(kind, checkpoint, budget, tmp_path):
    given = KINDS[kind]
    parameters = None if given is None else {**PLAIN, **given}
    path = with_rope(checkpoint, tmp_path / "model", parameters)
    expected = logits(mlx_lm.load(str(path))[0])
    resident = logits(moeflux_mlx.load(path)[0])
    error = np.abs(resident - expected).max() / np.abs(expected).max()
    assert error < 1e-5, error
    streamed = logits(moeflux_mlx.load(path, expert_memory=budget)[0])
    assert np.array_equal(streamed, resident)


def test_the_kinds_are_distinguished(checkpoint, tmp_path):
    found = {}
    for kind in ("default", "linear", "llama3", "yarn", "yarn-mscale", "longrope"):
        parameters = {**PLAIN, **KINDS[kind]}
        path = with_rope(checkpoint, tmp_path / kind, parameters)
        found[kind] = logits(moeflux_mlx.load(path)[0])[:, -1]
    kinds = list(found)
    for i, a in enumerate(kinds):
        for b in kinds[i + 1 :]:
            assert np.abs(found[a] - found[b]).max() > 1e-3, (a, b)


@pytest.mark.parametrize(
    ("parameters", "word"),
    [
        ({"rope_type": "dynamic", "factor": 2.0}, "DynamicNTK"),
        ({"rope_type": "spiral"}, "spiral"),
        ({"rope_type": "yarn"}, "factor"),
        ({"rope_type": "linear", "factor": 0}, "zero"),
        ({"rope_type": "mrope", "mrope_section": [1]}, "MRoPE"),
        ({"rope_theta": 0}, "rope_theta"),
        ({"rope_theta": "many"}, "rope_theta"),
        ({"rope_theta": math.nan}, "rope_theta"),
        ({"partial_rotary_factor": 0}, "partial_rotary_factor"),
        ({"partial_rotary_factor": 2}, "partial_rotary_factor"),
        ({"partial_rotary_factor": 0.1}, "channels"),
        ({**YARN, "factor": math.inf}, "finite"),
    ],
    ids=str,
)
@pytest.mark.parametrize("memory", [None, "3MB"])
def test_other_positions_are_refused_before_experts_are_read(
    parameters, word, memory, checkpoint, tmp_path
):
    path = with_rope(checkpoint, tmp_path / "model", {**PLAIN, **parameters})
    with pytest.raises(ModelError) as caught:
        moeflux_mlx.load(path, expert_memory=memory)
    message = str(caught.value)
    assert word in message and "\n" not in message, message


def test_a_failure_of_the_device_is_not_one_of_the_configuration(
    checkpoint, monkeypatch
):
    def fail(*_, **__):
        raise RuntimeError("the device failed")

    monkeypatch.setattr(checks, "rotation", fail)
    with pytest.raises(RuntimeError, match=r"^the device failed$"):
        moeflux_mlx.load(checkpoint)
