"""The minimax of our own equals mlx-lm's."""

from __future__ import annotations

import mlx.core as mx
import mlx_lm
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models import minimax as stock
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.tuner.utils import linear_to_lora_layers
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
from tiny import make_minimax

import moeflux_mlx
from moeflux_mlx.engine.executors import EXECUTORS
from moeflux_mlx.errors import ModelError
from moeflux_mlx.experts.files.pack import pack
from moeflux_mlx.measure.routing import record_routing
from moeflux_mlx.streaming import StreamedModel

# Odd numbers of experts and heads, one expert or several, norms or none, as many heads
# of keys as of queries, widths that fit no kernel.
CONFIGS = {
    "e8-k2": {},
    "e9-k3-heads3-tied": dict(
        num_local_experts=9,
        num_experts_per_tok=3,
        num_attention_heads=3,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    ),
    "e13-k1-raw-floats": dict(
        hidden_size=72,
        num_local_experts=13,
        num_experts_per_tok=1,
        intermediate_size=36,
        head_dim=None,
        rotary_dim=6,
        use_qk_norm=False,
        num_hidden_layers=3,
    ),
}
ODD = "e9-k3-heads3-tied"


plain, packed = made_of(make_minimax, CONFIGS)


@pytest.mark.sampled
@pytest.mark.parametrize(("n_seqs", "n_tokens"), [(1, 64), (3, 16)])
def test_greedy_tokens_and_their_logits_are_mlx_lms(plain, packed, n_seqs, n_tokens):
    assert_tokens_are_mlx_lms(plain, packed, n_seqs, n_tokens)


@pytest.mark.slow
@simulated
@pytest.mark.parametrize("plain", [ODD], indirect=True)
@pytest.mark.parametrize("n_seqs", [1, 3])
def test_kernels_give_mlx_lms_tokens_and_logits(plain, n_seqs):
    assert_kernels_give_mlx_lms(plain, n_seqs, 1)


@pytest.mark.sampled
@pytest.mark.parametrize("plain", [ODD], indirect=True)
@pytest.mark.parametrize("n_seqs", [1, 3])
def test_running_ahead_gives_what_waiting_gives(packed, n_seqs, monkeypatch):
    monkeypatch.setitem(EXECUTORS, Lazy.name, Lazy)
    assert_ahead_is_as_waiting(packed, n_seqs, Lazy.name)


@pytest.mark.sampled
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
def test_what_mlx_lms_modules_compute_goes_on_with_its_caches(plain):
    """Adapters are run by modules, whose calls have a mask before their caches."""
    models, found = (mlx_lm.load(str(plain))[0], load(plain)), []
    for model in models:
        mx.random.seed(0)
        model.freeze()
        linear_to_lora_layers(model, 1, {"rank": 4, "scale": 2.0, "dropout": 0.0})
        layer = model.layers[-1].self_attn.q_proj
        layer.lora_b = mx.random.normal(layer.lora_b.shape)
        cache = make_prompt_cache(model)
        mx.eval(model(tokens(7), None, cache))
        found.append(model(tokens(2, seed=5), cache=cache))
    assert relative_rms(found[1], found[0]) < 1e-5
    with pytest.raises(ModelError, match=r"\[mask\] expected None"):
        models[1](tokens(7), mx.array(1))


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
    assert list(trace.layers) == [0, 1]


# One token: eight of attention, whose norms are of all heads, then experts.
LAYER = [
    "norm_matvecs",
    *2 * ["rms_norm_bf16_fused_n_tokens"],
    "attention_inputs_ungated",
    "kv_cache_append_n_tokens",
    "sdpa_decode_parts",
    "sdpa_decode_join",
    "matvec_residual",
    "norm_matvecs",
    "moe_noaux_topk",
    "experts_gate_up_swiglu",
    "experts_down_combine",
]


@pytest.mark.slow
@simulated
def test_a_token_takes_twelve_launches_a_layer(tmp_path):
    path = make_minimax(tmp_path / "model", group_size=64, intermediate_size=64)
    names = launches(load(path, executor="sim", optimistic="on"))
    assert names[1:25] == 2 * LAYER


@pytest.fixture
def copied(tmp_path):
    return make_minimax(tmp_path / "copy")


@pytest.mark.sampled
@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_scaling"),
        ({"scoring_func": "softmax"}, "scoring_func"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"attn_type_list": [0, 1]}, "attn_type_list"),
        ({"qk_norm_type": "per_head"}, "qk_norm_type"),
    ],
)
def test_what_it_does_not_do_mlx_lms_class_does(copied, changes, why, capsys):
    edit_config(copied, **changes)
    model, _ = moeflux_mlx.load(copied, expert_memory="3MB")
    assert isinstance(model, StreamedModel)
    assert f"our own class does not support {why}" in capsys.readouterr().err
    expected = mlx_lm.load(str(copied))[0](tokens(9))
    assert relative_rms(model(tokens(9)), expected) < 1e-5


def test_the_publishers_name_is_the_same_class(copied):
    expected = load(copied)(tokens(9))
    edit_config(copied, model_type="minimax_m2", attn_type_list=[1, 1])
    assert mx.array_equal(load(copied)(tokens(9)), expected)


MATRICES = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}


def as_published(path):
    """Have each expert's matrices be tensors of their own, under other names."""
    weights = mx.load(str(path / "model.safetensors"))
    for name in [name for name in weights if ".switch_mlp." in name]:
        block, matrix = name.removesuffix(".weight").split(".switch_mlp.")
        for expert, array in enumerate(weights.pop(name)):
            weights[f"{block}.experts.{expert}.{MATRICES[matrix]}.weight"] = array
    mx.save_safetensors(str(path / "model.safetensors"), weights)
    (path / "model.safetensors.index.json").unlink()
    return path


def test_experts_may_be_named_as_published(tmp_path):
    path = make_minimax(tmp_path / "published", bits=None)
    expected = load(path)(tokens(9))
    pack(as_published(path), tmp_path / "packed")
    assert relative_rms(mlx_lm.load(str(path))[0](tokens(9)), expected) < 1e-5
    for source in (path, tmp_path / "packed"):
        for bound in ({}, {"expert_memory": least(path)}):
            assert mx.array_equal(load(source, **bound)(tokens(9)), expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rotary_dim": ...}, "rotary_dim but it is missing"),
        ({"rotary_dim": 64}, "rotary_dim to be a positive number up to 32"),
        ({"rotary_dim": 7}, r"\[rope\].*7 channels"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok|8 experts per token"),
        ({"num_key_value_heads": 4}, "k_proj.weight.* to be .128, 64"),
        ({"head_dim": 0}, "head_dim"),
        ({"rope_theta": 0}, "rope_theta"),
    ],
)
def test_a_configuration_that_is_not_of_the_files_is_refused(copied, changes, message):
    edit_config(copied, **changes)
    for bound in ({}, {"expert_memory": "3MB"}):
        with pytest.raises(ModelError, match=message):
            moeflux_mlx.load(copied, **bound)
