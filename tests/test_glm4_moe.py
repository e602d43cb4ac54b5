"""The glm4_moe of our own equals mlx-lm's, and follows transformers where they part."""

from __future__ import annotations

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from commands import moeflux
from mlx.utils import tree_map_with_path
from mlx_lm.models import deepseek_v3, glm4_moe
from mlx_lm.utils import save_model
from native_models import (
    assert_mlx_lms_class_serves,
    assert_refused,
    edit_config,
    launches,
    load,
    of,
    relative_rms,
    simulated,
    tokens,
)
from tiny import make_glm4_moe

import moeflux_mlx

GROUPS = "e9-k3-groups-heads3"


# One token: five of attention with norms of heads, then experts and a shared one.
ATTENTION = [
    "norm_matvecs",
    "attention_inputs_append",
    "sdpa_decode_parts",
    "sdpa_decode_join",
    "matvec_residual",
]
EXPERTS = [
    "norm_dense_matvecs",
    "experts_noaux_gate_up",
    "experts_down_combine",
]


@pytest.mark.slow
@simulated
def test_a_token_takes_eight_launches_a_layer(tmp_path):
    sizes = dict(num_hidden_layers=2, first_k_dense_replace=0, moe_intermediate_size=64)
    path = make_glm4_moe(tmp_path / "model", group_size=64, **sizes)
    names = launches(load(path, executor="sim", optimistic="on"))
    assert names[1:17] == 2 * [*ATTENTION, *EXPERTS]


def of_dropped_groups(gates, bias, top_k, n_group, topk_group, scale, norm):
    """Choose as mlx-lm does, but no expert of a group that was dropped."""
    scores = mx.sigmoid(gates.astype(mx.float32))
    by_group = mx.unflatten(scores + bias, -1, (n_group, -1))
    pairs = mx.topk(by_group, 2, axis=-1).sum(axis=-1, keepdims=True)
    dropped = mx.argsort(pairs, axis=-2)[..., : n_group - topk_group, :]
    nothing = mx.array(-np.inf)
    biased = mx.put_along_axis(by_group, dropped, nothing, axis=-2).flatten(-2)
    indices = mx.argsort(-biased, axis=-1)[..., :top_k]
    chosen = mx.take_along_axis(scores, indices, axis=-1)
    return indices, chosen / chosen.sum(axis=-1, keepdims=True) * scale


def lowered(plain, path):
    """Write a checkpoint whose scores for choosing are all negative; and its model."""
    model = mlx_lm.load(str(plain))[0]

    def change(name, p):
        return p - 2 if name.endswith("e_score_correction_bias") else p

    model.update(tree_map_with_path(change, model.parameters()))
    path.mkdir()
    for file in plain.glob("*.json"):
        (path / file.name).write_bytes(file.read_bytes())
    save_model(path, model)
    return model, path


@pytest.mark.parametrize(
    ("plain", "stock"),
    [
        (("glm4_moe", GROUPS), glm4_moe),
        (("deepseek_v3", "e9-k3-groups-heads3-no-rank"), deepseek_v3),
    ],
    indirect=["plain"],
    ids=["glm4_moe", "deepseek_v3"],
)
def test_no_expert_of_a_dropped_group_is_chosen(plain, stock, tmp_path, monkeypatch):
    """Where all scores are negative mlx-lm prefers the dropped groups' zeros."""
    model, edit = lowered(plain, tmp_path / "model")
    by_mlx_lm, got = model(tokens(9)), load(edit)(tokens(9))
    assert relative_rms(got, by_mlx_lm) > 1e-2
    theirs, _ = moeflux_mlx.load(edit, native=False)
    assert relative_rms(theirs(tokens(9)), by_mlx_lm) < 1e-5
    monkeypatch.setattr(stock, "group_expert_select", of_dropped_groups)
    assert relative_rms(got, model(tokens(9))) < 1e-5


@pytest.mark.slow
@of("glm4_moe", GROUPS)
def test_compare_names_what_it_may_be(plain, tmp_path):
    _, path = lowered(plain, tmp_path / "model")
    ours = moeflux("compare", path, "--prompt", "ab", "-m", 2)
    assert ours.returncode == 1
    said = " ".join(ours.stdout.split())
    assert "outside the tolerance" in said and "experts of groups left out" in said
    theirs = moeflux("compare", path, "--prompt", "ab", "-m", 2, "--no-native")
    assert theirs.returncode == 0 and "left out" not in theirs.stdout


@pytest.fixture
def copied(tmp_path):
    return make_glm4_moe(tmp_path / "copy", num_hidden_layers=2)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_scaling"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "rope_param"),
        ({"scoring_func": "softmax"}, "scoring_func"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"num_experts_per_tok": 1}, "norm_topk_prob of one expert"),
    ],
)
def test_what_it_does_not_do_mlx_lms_class_does(copied, changes, why, capsys):
    edit_config(copied, **changes)
    assert_mlx_lms_class_serves(copied, why, capsys)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_group": ...}, "n_group but it is missing"),
        ({"n_group": 3}, r"n_routed_experts to be a multiple of n_group \(3\)"),
        ({"n_group": 8, "topk_group": 8}, "n_group to be of n_routed_experts"),
        ({"n_group": 2, "topk_group": 3}, "topk_group"),
        ({"num_experts_per_tok": 6, "n_group": 2}, "of topk_group groups"),
        ({"routed_scaling_factor": "2"}, "routed_scaling_factor"),
        ({"first_k_dense_replace": 0}, "layers.0.mlp.gate|layers? 0"),
        ({"first_k_dense_replace": -1}, "first_k_dense_replace"),
        ({"first_k_dense_replace": 2}, "first_k_dense_replace"),
        ({"n_shared_experts": 0}, "n_shared_experts"),
        ({"partial_rotary_factor": 0.3}, "rope"),
        ({"partial_rotary_factor": 2}, "partial_rotary_factor"),
    ],
)
def test_a_configuration_that_is_not_of_the_files_is_refused(copied, changes, message):
    edit_config(copied, **changes)
    assert_refused(copied, message)
