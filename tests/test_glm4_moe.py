"""The glm4_moe of our own equals mlx-lm's, and follows transformers where they part."""

from __future__ import annotations

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from commands import moeflux
from mlx.utils import tree_flatten, tree_map_with_path
from mlx_lm.models import glm4_moe as stock
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.tuner.utils import linear_to_lora_layers
from mlx_lm.utils import save_model
from native_models import (
    assert_ahead_is_as_waiting,
    assert_kernels_give_mlx_lms,
    assert_tokens_are_mlx_lms,
    edit_config,
    launches,
    least,
    load,
    made_of,
    relative_rms,
    simulated,
    tokens,
)
from test_steps import Lazy
from tiny import make_glm4_moe

import moeflux_mlx
from moeflux_mlx.engine.executors import EXECUTORS
from moeflux_mlx.errors import ModelError
from moeflux_mlx.measure.routing import record_routing
from moeflux_mlx.streaming import StreamedModel

# Groups or none, one expert or several, odd numbers of experts and heads, with norms
# and biases or without, layers without experts, widths that fit no kernel.
CONFIGS = {
    "e8-k2": {},
    "e9-k3-groups-heads3": dict(
        n_routed_experts=9,
        num_experts_per_tok=3,
        n_group=3,
        topk_group=2,
        num_attention_heads=3,
        num_key_value_heads=1,
        use_qk_norm=False,
        first_k_dense_replace=0,
        num_hidden_layers=2,
    ),
    "e13-k1-raw-floats": dict(
        hidden_size=72,
        n_routed_experts=13,
        num_experts_per_tok=1,
        norm_topk_prob=False,
        n_shared_experts=2,
        moe_intermediate_size=36,
        head_dim=20,
        partial_rotary_factor=0.4,
        attention_bias=False,
        first_k_dense_replace=2,
        num_hidden_layers=4,
    ),
}
GROUPS = "e9-k3-groups-heads3"


plain, packed = made_of(make_glm4_moe, CONFIGS)


@pytest.mark.sampled
@pytest.mark.parametrize(("n_seqs", "n_tokens"), [(1, 64), (3, 16)])
def test_greedy_tokens_and_their_logits_are_mlx_lms(plain, packed, n_seqs, n_tokens):
    assert_tokens_are_mlx_lms(plain, packed, n_seqs, n_tokens)


@pytest.mark.slow
@simulated
@pytest.mark.parametrize("plain", [GROUPS], indirect=True)
def test_kernels_give_mlx_lms_tokens_and_logits(plain):
    assert_kernels_give_mlx_lms(plain, 1, 1)


@pytest.mark.parametrize("plain", [GROUPS], indirect=True)
@pytest.mark.parametrize("n_seqs", [1, 3])
def test_running_ahead_gives_what_waiting_gives(packed, n_seqs, monkeypatch):
    monkeypatch.setitem(EXECUTORS, Lazy.name, Lazy)
    assert_ahead_is_as_waiting(packed, n_seqs, Lazy.name)


def test_weights_caches_and_calls_are_mlx_lms(plain):
    expected, ours = mlx_lm.load(str(plain))[0], load(plain)
    assert isinstance(ours, stock.Model)
    names = {name: p.shape for name, p in tree_flatten(expected.parameters())}
    assert {name: p.shape for name, p in tree_flatten(ours.parameters())} == names
    kinds = [type(c) for c in make_prompt_cache(expected)]
    assert [type(c) for c in make_prompt_cache(ours)] == kinds
    prompt = tokens(19, seed=4, n_seqs=2)
    rows, wanted = ours.model.embed_tokens(prompt), expected(prompt)
    assert relative_rms(ours(prompt), wanted) < 1e-5
    assert relative_rms(ours(prompt, input_embeddings=rows), wanted) < 1e-5


@pytest.mark.parametrize("plain", ["e8-k2"], indirect=True)
def test_what_mlx_lms_modules_compute_takes_embeddings_too(plain):
    """Adapters are run by modules, and mlx-lm's backbone takes ids alone."""
    models, prompt = (mlx_lm.load(str(plain))[0], load(plain)), tokens(7)
    for model in models:
        mx.random.seed(0)
        model.freeze()
        linear_to_lora_layers(model, 1, {"rank": 4, "scale": 2.0, "dropout": 0.0})
        layer = model.layers[-1].self_attn.q_proj
        layer.lora_b = mx.random.normal(layer.lora_b.shape)
    wanted, ours = models[0](prompt), models[1]
    rows = ours.model.embed_tokens(prompt)
    assert relative_rms(ours(prompt), wanted) < 1e-5
    assert relative_rms(ours(0 * prompt, input_embeddings=rows), wanted) < 1e-5


@pytest.mark.parametrize("plain", ["e8-k2"], indirect=True)
def test_a_state_goes_on_and_routing_is_recorded(packed, tmp_path):
    model = load(packed, expert_memory=least(packed, 3))
    cache, prompt = make_prompt_cache(model), tokens(21)
    mx.eval(model(prompt, cache=cache))
    moeflux_mlx.save_state(tmp_path / "state", model, cache, prompt[0].tolist())
    expected = model(tokens(1, seed=9), cache=cache)
    again = load(packed, expert_memory=least(packed, 3))
    state = moeflux_mlx.load_state(tmp_path / "state", again)
    assert mx.array_equal(again(tokens(1, seed=9), cache=state.cache), expected)
    trace = record_routing(model, [5, 6, 7], max_tokens=3)
    assert list(trace.layers) == [1, 2]


# One token: six of attention with norms of heads, then experts and a shared one.
ATTENTION = [
    "norm_matvecs",
    "attention_inputs_ungated",
    "kv_cache_append_n_tokens",
    "sdpa_decode_parts",
    "sdpa_decode_join",
    "matvec_residual",
]
EXPERTS = [
    "norm_matvecs",
    "bf16_matvec",
    "moe_noaux_topk",
    "experts_gate_up_swiglu",
    "experts_down_combine",
]


@pytest.mark.slow
@simulated
def test_a_token_takes_eleven_launches_a_layer(tmp_path):
    sizes = dict(num_hidden_layers=2, first_k_dense_replace=0, moe_intermediate_size=64)
    path = make_glm4_moe(tmp_path / "model", group_size=64, **sizes)
    names = launches(load(path, executor="sim", optimistic="on"))
    assert names[1:23] == 2 * [*ATTENTION, *EXPERTS]


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


@pytest.mark.parametrize("plain", [GROUPS], indirect=True)
def test_no_expert_of_a_dropped_group_is_chosen(plain, tmp_path, monkeypatch):
    """Where all scores are negative mlx-lm prefers the dropped groups' zeros."""
    model, edit = lowered(plain, tmp_path / "model")
    by_mlx_lm, got = model(tokens(9)), load(edit)(tokens(9))
    assert relative_rms(got, by_mlx_lm) > 1e-2
    theirs, _ = moeflux_mlx.load(edit, native=False)
    assert relative_rms(theirs(tokens(9)), by_mlx_lm) < 1e-5
    monkeypatch.setattr(stock, "group_expert_select", of_dropped_groups)
    assert relative_rms(got, model(tokens(9))) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("plain", [GROUPS], indirect=True)
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
    model, _ = moeflux_mlx.load(copied, expert_memory="3MB")
    assert isinstance(model, StreamedModel)
    assert f"our own class does not support {why}" in capsys.readouterr().err
    expected = mlx_lm.load(str(copied))[0](tokens(9))
    assert relative_rms(model(tokens(9)), expected) < 1e-5


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
    for bound in ({}, {"expert_memory": "3MB"}):
        with pytest.raises(ModelError, match=message):
            moeflux_mlx.load(copied, **bound)
