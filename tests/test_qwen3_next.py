"""The qwen3_next of our own equals mlx-lm's: projections by key head, dense layers."""

from __future__ import annotations

import json

import mlx.core as mx
import mlx_lm
import pytest
from native_models import (
    LAYER,
    assert_mlx_lms_class_serves,
    assert_refused,
    edit_config,
    launches,
    least,
    load,
    relative_rms,
    simulated,
    tokens,
)
from tiny import make_qwen3_next

import moeflux_mlx
from moeflux_mlx.engine.native import NativeModel
from moeflux_mlx.experts.files.pack import pack


@pytest.mark.slow
@simulated
def test_a_token_takes_the_launches_of_qwen3_5_moe(tmp_path):
    sizes = dict(num_experts=7, num_experts_per_tok=3, moe_intermediate_size=64)
    heads = dict(linear_num_value_heads=6, num_hidden_layers=2)
    path = make_qwen3_next(tmp_path / "model", group_size=64, **sizes, **heads)
    names = launches(load(path, executor="sim", optimistic="on"))
    linear = [LAYER[0], "gated_delta_decode", *LAYER[5:]]
    assert names[1:-1] == [*linear, *LAYER]


def as_published(path) -> None:
    """Rewrite a dense checkpoint: an expert a tensor, centred norms, an unused head."""
    config = json.loads((path / "config.json").read_text())
    found = mx.load(str(path / "model.safetensors"))
    for name in list(found):
        if ".switch_mlp." in name:
            for expert, one in enumerate(found.pop(name)):
                found[name.replace("switch_mlp", f"experts.{expert}")] = one
        elif "conv1d" in name:
            found[name] = found[name].moveaxis(1, 2)
        elif "norm.weight" in name and "linear_attn" not in name:
            found[name] = found[name] - 1.0
    found["mtp.norm.weight"] = mx.zeros(config["hidden_size"])
    mx.save_safetensors(str(path / "model.safetensors"), found)
    (path / "model.safetensors.index.json").unlink()


def test_a_checkpoint_as_published_gives_the_same_however_it_is_read(tmp_path):
    path = make_qwen3_next(tmp_path / "model", bits=None, mlp_only_layers=[2])
    expected = mlx_lm.load(str(path))[0](tokens(9))
    as_published(path)
    assert relative_rms(mlx_lm.load(str(path))[0](tokens(9)), expected) < 1e-5
    pack(path, tmp_path / "packed")
    for place in (path, tmp_path / "packed"):
        for options in ({}, {"expert_memory": least(place)}):
            model, _ = moeflux_mlx.load(place, **options)
            assert isinstance(model, NativeModel)
            assert relative_rms(model(tokens(9)), expected) < 1e-5, (place, options)


@pytest.fixture
def copied(tmp_path):
    return make_qwen3_next(tmp_path / "copy", num_hidden_layers=2)


@pytest.mark.parametrize(
    ("changes", "why"),
    [({"hidden_act": "gelu"}, "hidden_act")],
)
def test_what_it_does_not_do_mlx_lms_class_does(copied, changes, why, capsys):
    edit_config(copied, **changes)
    assert_mlx_lms_class_serves(copied, why, capsys)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"linear_num_key_heads": 4}, "in_proj_qkvz"),
        ({"linear_key_head_dim": ...}, "linear_key_head_dim but it is missing"),
        ({"full_attention_interval": 0}, "full_attention_interval"),
        ({"mlp_only_layers": [1]}, "layers.1.mlp.gate_proj"),
        ({"partial_rotary_factor": 2.0}, "partial_rotary_factor"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "rope_scaling"),
        ({"shared_expert_intermediate_size": 32}, "shared_expert"),
    ],
)
def test_a_configuration_that_is_not_of_the_files_is_refused(copied, changes, message):
    edit_config(copied, **changes)
    assert_refused(copied, message)
