"""The qwen3_moe of our own equals mlx-lm's, by the blocks of every other family."""

from __future__ import annotations

import re
from pathlib import Path

import mlx.core as mx
import mlx_lm
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models import qwen3_moe as stock
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.tuner.utils import linear_to_lora_layers
from native_models import (
    LAYER,
    edit_config,
    greedy,
    launches,
    least,
    load,
    made_of,
    relative_rms,
    simulated,
    tokens,
)
from test_steps import Lazy, Traced
from tiny import make_checkpoint, make_qwen3_moe

import moeflux_mlx
from moeflux_mlx.engine.executors import EXECUTORS
from moeflux_mlx.engine.native import NativeModel
from moeflux_mlx.errors import ModelError
from moeflux_mlx.experts.files.pack import pack
from moeflux_mlx.measure.routing import record_routing
from moeflux_mlx.streaming import StreamedModel

# Odd numbers of experts and heads, one expert or ten, layers without experts, widths
# that fit no kernel.
CONFIGS = {
    "e8-k2": {},
    "e5-k1-heads3-tied": dict(
        num_experts=5,
        num_experts_per_tok=1,
        num_attention_heads=3,
        num_key_value_heads=1,
        tie_word_embeddings=True,
    ),
    "e13-k10-dense-layers": dict(
        num_experts=13,
        num_experts_per_tok=10,
        num_attention_heads=6,
        num_key_value_heads=3,
        num_hidden_layers=6,
        mlp_only_layers=[0, 3, 4],
    ),
    "e7-k3-every2-unnormalised-floats": dict(
        hidden_size=72,
        num_experts=7,
        num_experts_per_tok=3,
        head_dim=20,
        moe_intermediate_size=36,
        intermediate_size=52,
        num_hidden_layers=4,
        decoder_sparse_step=2,
        norm_topk_prob=False,
    ),
}
N_GREEDY = 64


plain, packed = made_of(make_qwen3_moe, CONFIGS)


def open_with(plain, packed, names=(), **options) -> dict[str, NativeModel]:
    """Return models whose experts are in memory, in as little as can be, or ahead.

    Args:
        names: which of them, all by default.
    """
    small, more = {"expert_memory": least(packed)}, {"expert_memory": least(packed, 5)}
    budgets = {
        "resident": (plain, {}),
        "least": (plain, {"expert_memory": least(plain)}),
        "least of a pack": (packed, {**small, "read_ahead": "off"}),
        "reads ahead": (packed, {**small, "read_ahead": "on"}),
        "runs ahead": (packed, {**more, "optimistic": "on"}),
    }
    models = {}
    for name in names or budgets:
        path, own = budgets[name]
        models[name] = load(path, **own, **options)
    return models


@pytest.mark.sampled
@pytest.mark.parametrize("n_seqs", [1, 3])
def test_64_greedy_tokens_and_their_logits_are_mlx_lms(plain, packed, n_seqs):
    n = N_GREEDY if n_seqs == 1 else 16
    expected, chosen = greedy(mlx_lm.load(str(plain))[0], n_seqs, n)
    names = ("resident", "least") if n_seqs > 1 else ()
    models = open_with(plain, packed, names, executor="ops")
    for name, model in models.items():
        got, found = greedy(model, n_seqs, n)
        assert relative_rms(got, expected) < 1e-5, name
        assert found == chosen, name
        if name != "resident":
            assert model.streamer.stats.total.misses, name


# Odd experts, many choices, layers without experts.
@pytest.mark.slow
@simulated
@pytest.mark.parametrize("plain", ["e13-k10-dense-layers"], indirect=True)
def test_kernels_give_mlx_lms_tokens_and_logits(plain, packed):
    models = open_with(plain, packed, ("resident", "least"), executor="sim")
    for name, n_seqs in (("resident", 1), ("least", 3)):
        expected, chosen = greedy(mlx_lm.load(str(plain))[0], n_seqs, 1)
        got, found = greedy(models[name], n_seqs, 1)
        assert relative_rms(got, expected) < 1e-5, name
        assert found == chosen, name


@pytest.mark.sampled
def test_any_budget_gives_the_same_bits(plain, packed):
    models = open_with(plain, packed, executor="ops")
    expected, _ = greedy(models.pop("resident"), 1, 6)
    # Its arrays are MLX's, which adds in another order than NumPy.
    models.pop("runs ahead")
    for name, model in models.items():
        assert mx.array_equal(greedy(model, 1, 6)[0], expected), name


@pytest.mark.sampled
@pytest.mark.parametrize("n_seqs", [1, 3])
def test_traces_that_run_ahead_give_what_waiting_gives(
    plain, packed, n_seqs, monkeypatch
):
    for executor in (Lazy, Traced):
        monkeypatch.setitem(EXECUTORS, executor.name, executor)
    found = {}
    # All that a call of three sequences can ask of a layer fits.
    bound = {"expert_memory": least(packed, 20)}
    for name, optimistic in (("lazy", "off"), ("lazy", "on"), ("traced", "on")):
        options = {**bound, "executor": name, "optimistic": optimistic}
        model, _ = moeflux_mlx.load(packed, **options, read_ahead="on")
        found[name, optimistic], _ = greedy(model, n_seqs, 6)
        assert model.runtime.steps == (optimistic == "on")
    expected = found.pop(("lazy", "off"))
    for name, got in found.items():
        assert relative_rms(got, expected) < 1e-6, name


def test_names_of_weights_and_types_of_caches_are_mlx_lms(plain):
    expected, _ = mlx_lm.load(str(plain))
    ours, _ = moeflux_mlx.load(plain)
    names = {name: p.shape for name, p in tree_flatten(expected.parameters())}
    assert {name: p.shape for name, p in tree_flatten(ours.parameters())} == names
    kinds = [type(c) for c in make_prompt_cache(expected)]
    assert [type(c) for c in make_prompt_cache(ours)] == kinds
    assert isinstance(ours, stock.Model)


def test_a_call_without_a_cache_and_with_embeddings(plain):
    expected, _ = mlx_lm.load(str(plain))
    ours, _ = moeflux_mlx.load(plain)
    prompt = tokens(19, seed=4, n_seqs=2)
    rows = ours.model.embed_tokens(prompt)
    assert relative_rms(ours(prompt), expected(prompt)) < 1e-5
    assert relative_rms(ours(prompt, input_embeddings=rows), expected(prompt)) < 1e-5


def test_adapters_and_a_compiled_call_take_mlx_lms_modules(plain):
    expected, _ = mlx_lm.load(str(plain))
    ours, _ = moeflux_mlx.load(plain)
    prompt = tokens(7)
    assert relative_rms(mx.compile(ours)(prompt), expected(prompt)) < 1e-5
    for model in (expected, ours):
        mx.random.seed(0)
        model.freeze()
        linear_to_lora_layers(model, 1, {"rank": 4, "scale": 2.0, "dropout": 0.0})
        layer = model.layers[-1].self_attn.q_proj
        layer.lora_b = mx.random.normal(layer.lora_b.shape)
    assert relative_rms(ours(prompt), expected(prompt)) < 1e-5


def test_a_state_goes_on_where_it_was_saved(packed, tmp_path):
    model, _ = moeflux_mlx.load(packed, expert_memory=least(packed, 3))
    cache, prompt = make_prompt_cache(model), tokens(21)
    mx.eval(model(prompt, cache=cache))
    moeflux_mlx.save_state(tmp_path / "state", model, cache, prompt[0].tolist())
    expected = model(tokens(1, seed=9), cache=cache)
    again, _ = moeflux_mlx.load(packed, expert_memory=least(packed, 3))
    state = moeflux_mlx.load_state(tmp_path / "state", again)
    assert state.tokens == prompt[0].tolist()
    assert mx.array_equal(again(tokens(1, seed=9), cache=state.cache), expected)


@pytest.mark.sampled
def test_a_budget_of_the_process_gives_the_same(packed):
    bounded, _ = moeflux_mlx.load(packed, memory="4GB")
    free, _ = moeflux_mlx.load(packed)
    assert bounded.runtime.plan is not None
    got, expected = (greedy(model, 1, 4)[0] for model in (bounded, free))
    assert relative_rms(got, expected) < 1e-5


def test_routing_is_recorded_of_the_layers_that_route(plain):
    model, _ = moeflux_mlx.load(plain)
    routed = [i for i, layer in enumerate(model.layers) if "switch_mlp" in layer.mlp]
    trace = record_routing(model, [5, 6, 7], max_tokens=3)
    assert list(trace.layers) == routed
    assert trace.chosen.shape[1:] == (len(routed), model.args.num_experts_per_tok)


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
    assert [name.replace("_ungated", "") for name in found[ours]] == found[other]


@pytest.mark.slow
@simulated
def test_a_layer_without_experts_takes_six_launches(tmp_path):
    path = make_qwen3_moe(tmp_path / "model", mlp_only_layers=[0, 1])
    model, _ = moeflux_mlx.load(path, executor="sim", optimistic="on")
    names = launches(model)
    dense = ["norm_matvecs", "swiglu_fused_batched", "matvec_residual"]
    assert names.count("swiglu_fused_batched") == 2
    first = names.index("swiglu_fused_batched")
    assert names[first - 1 : first + 2] == dense


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
    model, _ = moeflux_mlx.load(copied, expert_memory="3MB")
    assert isinstance(model, StreamedModel)
    assert f"our own class does not support {why}" in capsys.readouterr().err
    with pytest.raises(ModelError, match=f"our own class does not support {why}"):
        moeflux_mlx.load(copied, native=True)
    pack(copied, copied.parent / "packed")
    packed, _ = moeflux_mlx.load(copied.parent / "packed")
    assert isinstance(packed, StreamedModel)


def test_default_rope_scaling_is_none(copied):
    edit_config(copied, rope_scaling={"rope_type": "default"})
    assert isinstance(moeflux_mlx.load(copied)[0], NativeModel)


@pytest.mark.sampled
def test_mlx_lms_class_serves_where_it_is_asked_for(packed, plain):
    for path in (packed, plain):
        model, _ = moeflux_mlx.load(path, native=False, expert_memory="3MB")
        assert isinstance(model, StreamedModel)
        expected = mlx_lm.load(str(plain))[0](tokens(9))
        assert relative_rms(model(tokens(9)), expected) < 1e-5


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
    for bound in ({}, {"expert_memory": "3MB"}):
        with pytest.raises(ModelError, match=message):
            moeflux_mlx.load(copied, **bound)


def test_fewer_experts_chosen_before_the_first_call_are_fewer(plain):
    models = [mlx_lm.load(str(plain))[0], moeflux_mlx.load(plain)[0]]
    for model in models:
        for layer in model.layers:
            if "switch_mlp" in layer.mlp:
                layer.mlp.top_k = 1
    expected, got = (model(tokens(9)) for model in models)
    assert relative_rms(got, expected) < 1e-5
