"""The qwen3_moe of our own equals mlx-lm's, by the blocks of every other family."""

from __future__ import annotations

import re
from pathlib import Path

import mlx_lm
import pytest
from native_models import (
    LAYER,
    UNGATED_LAYER,
    assert_kernels_give_mlx_lms,
    assert_mlx_lms_class_serves,
    assert_refused,
    edit_config,
    launches,
    of,
    relative_rms,
    simulated,
    tokens,
)
from tiny import make_checkpoint, make_qwen3_moe

import moeflux_mlx
from moeflux_mlx.engine.native import NativeModel
from moeflux_mlx.experts.files.pack import pack
from moeflux_mlx.streaming import StreamedModel

N_GREEDY = 64


# Odd experts, many choices, layers without experts.
@pytest.mark.slow
@simulated
@of("qwen3_moe", "e13-k10-dense-layers")
@pytest.mark.parametrize("n_seqs", [1, 3])
def test_kernels_give_mlx_lms_tokens_and_logits(plain, n_seqs):
    assert_kernels_give_mlx_lms(plain, n_seqs)


@pytest.mark.slow
@simulated
def test_a_token_takes_no_more_launches_a_layer_than_qwen3_5_moe(tmp_path):
    n = 3
    sizes = dict(
        group_size=64,
        num_hidden_layers=n,
        num_experts=9,
        num_experts_per_tok=3,
        moe_intermediate_size=64,
    )
    ours = make_qwen3_moe(tmp_path / "ours", **sizes)
    other = make_checkpoint(tmp_path / "other", full_attention_interval=1, **sizes)
    found = {}
    for path in (ours, other):
        model, _ = moeflux_mlx.load(path, executor="sim", optimistic="on")
        found[path] = launches(model)
    assert found[other][1 : 1 + n * len(LAYER)] == n * LAYER
    first, *_ = found[other]
    last = found[other][1 + n * len(LAYER) :]
    assert found[ours] == [first, *n * UNGATED_LAYER, *last]


@pytest.mark.slow
@simulated
def test_a_layer_without_experts_takes_two_launches_after_attention(tmp_path):
    path = make_qwen3_moe(tmp_path / "model", mlp_only_layers=[0, 1])
    model, _ = moeflux_mlx.load(path, executor="sim", optimistic="on")
    names = launches(model)
    dense = [*UNGATED_LAYER[:5], "norm_gate_up_swiglu", "matvec_residual"]
    assert names[1:15] == 2 * dense


ROOT = Path(__file__).resolve().parents[1]


def test_a_family_is_a_short_file_of_forms():
    families = [path for path in (ROOT / "models").glob("*.py") if path.stem[0] != "_"]
    assert {path.stem for path in families} >= {"qwen3_5_moe", "qwen3_moe"}
    engine = ("executors", "graph", "launch", "lowering", "metal", "model", "ops")
    for path in families:
        text = path.read_text()
        assert len(text.splitlines()) < 120, path
        for name in re.findall(r"from moeflux_mlx\.(\w+)", text):
            assert name not in engine, path


def test_the_package_names_no_family():
    for path in (ROOT / "moeflux_mlx").rglob("*.py"):
        named = re.search(
            r"is_linear|\.language_model|qwen|linear_attn", path.read_text()
        )
        assert named is None or path.name == "delta_net.py", (path, named)


@pytest.fixture
def copied(tmp_path):
    return make_qwen3_moe(tmp_path / "copy")


@pytest.mark.sampled
@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_scaling"),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, "rope_scaling"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"hidden_act": "gelu"}, "hidden_act"),
    ],
)
def test_what_it_does_not_do_mlx_lms_class_does(copied, changes, why, capsys):
    edit_config(copied, **changes)
    assert_mlx_lms_class_serves(copied, why, capsys)
    pack(copied, copied.parent / "packed")
    packed, _ = moeflux_mlx.load(copied.parent / "packed")
    assert isinstance(packed, StreamedModel)


def test_default_rope_scaling_is_none(copied):
    edit_config(copied, rope_scaling={"rope_type": "default"})
    assert isinstance(moeflux_mlx.load(copied)[0], NativeModel)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"decoder_sparse_step": ...}, "decoder_sparse_step but it is missing"),
        ({"decoder_sparse_step": 0}, "decoder_sparse_step"),
        ({"mlp_only_layers": 3}, "mlp_only_layers"),
        ({"mlp_only_layers": ["0"]}, "mlp_only_layers"),
        ({"mlp_only_layers": [1]}, "layers.1.mlp.gate_proj"),
        ({"num_experts_per_tok": 9}, r"num_experts_per_tok|8 experts per token"),
        ({"head_dim": 33}, "q_proj"),
        ({"rope_theta": 0}, "rope_theta"),
        ({"num_hidden_layers": 2**31 - 1}, r"layers?\b.3"),
        ({"intermediate_size": -1}, "intermediate_size"),
    ],
)
def test_a_configuration_that_is_not_of_the_files_is_refused(copied, changes, message):
    edit_config(copied, **changes)
    assert_refused(copied, message)


@of("qwen3_moe")
def test_fewer_experts_chosen_before_the_first_call_are_fewer(plain):
    models = [mlx_lm.load(str(plain))[0], moeflux_mlx.load(plain)[0]]
    for model in models:
        for layer in model.layers:
            if "switch_mlp" in layer.mlp:
                layer.mlp.top_k = 1
    expected, got = (model(tokens(9)) for model in models)
    assert relative_rms(got, expected) < 1e-5
