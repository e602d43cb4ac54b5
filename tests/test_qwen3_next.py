"""The qwen3_next of our own equals mlx-lm's: projections by key head, dense layers."""

from __future__ import annotations

import json

import mlx.core as mx
import mlx_lm
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models import qwen3_next as stock
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
from tiny import make_qwen3_next

import moeflux_mlx
from moeflux_mlx.engine.native import NativeModel
from moeflux_mlx.errors import ModelError
from moeflux_mlx.experts.files.pack import pack
from moeflux_mlx.streaming import StreamedModel

# Odd numbers of experts and heads, layers without experts, widths that fit no kernel.
CONFIGS = {
    "e7-k3-dense-layers": dict(
        num_experts=7,
        num_experts_per_tok=3,
        linear_num_value_heads=6,
        mlp_only_layers=[1],
        tie_word_embeddings=True,
    ),
    "e5-k1-every2-floats": dict(
        hidden_size=72,
        num_experts=5,
        num_experts_per_tok=1,
        head_dim=20,
        num_attention_heads=3,
        num_key_value_heads=1,
        partial_rotary_factor=0.5,
        full_attention_interval=3,
        num_hidden_layers=3,
        decoder_sparse_step=2,
        linear_num_value_heads=9,
        linear_num_key_heads=3,
        linear_key_head_dim=20,
        linear_value_head_dim=12,
        linear_conv_kernel_dim=3,
        norm_topk_prob=False,
        attention_bias=True,
    ),
}


plain, packed = made_of(make_qwen3_next, CONFIGS)


def open_with(plain, packed, **options) -> dict[str, NativeModel]:
    """Return models whose experts are in memory, or in as little as can be."""
    budgets = {
        "resident": (plain, {}),
        "least": (plain, {"expert_memory": least(plain)}),
        "least of a pack": (packed, {"expert_memory": least(packed)}),
        "reads ahead": (packed, {"expert_memory": least(packed), "read_ahead": "on"}),
    }
    models = {}
    for name, (path, own) in budgets.items():
        models[name] = load(path, **own, **options)
    return models


@pytest.mark.sampled
@pytest.mark.parametrize("n_seqs", [1, 3])
def test_64_greedy_tokens_and_their_logits_are_mlx_lms(plain, packed, n_seqs):
    expected, chosen = greedy(mlx_lm.load(str(plain))[0], n_seqs, 64)
    models = open_with(plain, packed, executor="ops")
    for name in ("resident", "least"):
        got, found = greedy(models[name], n_seqs, 64)
        assert relative_rms(got, expected) < 1e-5, name
        assert found == chosen, name
    assert models["least"].streamer.stats.total.misses


def test_any_budget_gives_the_same_bits(plain, packed):
    models = open_with(plain, packed, executor="ops")
    expected, _ = greedy(models.pop("resident"), 1, 6)
    for name, model in models.items():
        assert mx.array_equal(greedy(model, 1, 6)[0], expected), name


@pytest.mark.slow
@simulated
def test_kernels_give_mlx_lms_tokens_in_the_launches_of_qwen3_5_moe(tmp_path):
    sizes = dict(num_experts=7, num_experts_per_tok=3, moe_intermediate_size=64)
    heads = dict(linear_num_value_heads=6, num_hidden_layers=2)
    path = make_qwen3_next(tmp_path / "model", group_size=64, **sizes, **heads)
    memory = {"expert_memory": least(path)}
    for n_seqs, options in ((1, {"optimistic": "on"}), (3, memory)):
        expected, chosen = greedy(mlx_lm.load(str(path))[0], n_seqs, 1)
        model, _ = moeflux_mlx.load(path, executor="sim", **options)
        got, found = greedy(model, n_seqs, 1)
        assert relative_rms(got, expected) < 1e-5, n_seqs
        assert found == chosen, n_seqs
        if n_seqs == 1:
            linear = [LAYER[0], "gated_delta_decode", *LAYER[5:]]
            assert launches(model)[1:-2] == [*linear, *LAYER]


def test_a_state_goes_on_where_it_was_saved(packed, tmp_path):
    model, _ = moeflux_mlx.load(packed, expert_memory=least(packed, 3))
    cache, prompt = make_prompt_cache(model), tokens(21)
    mx.eval(model(prompt, cache=cache))
    moeflux_mlx.save_state(tmp_path / "state", model, cache, prompt[0].tolist())
    expected = model(tokens(1, seed=9), cache=cache)
    again, _ = moeflux_mlx.load(packed, expert_memory=least(packed, 3))
    state = moeflux_mlx.load_state(tmp_path / "state", again)
    assert mx.array_equal(again(tokens(1, seed=9), cache=state.cache), expected)


def test_names_of_weights_and_types_of_caches_are_mlx_lms(plain):
    expected, _ = mlx_lm.load(str(plain))
    ours, _ = moeflux_mlx.load(plain)
    names = {name: p.shape for name, p in tree_flatten(expected.parameters())}
    assert {name: p.shape for name, p in tree_flatten(ours.parameters())} == names
    kinds = [type(c) for c in make_prompt_cache(expected)]
    assert [type(c) for c in make_prompt_cache(ours)] == kinds
    assert isinstance(ours, stock.Model)


def test_adapters_and_a_compiled_call_take_mlx_lms_modules(plain):
    expected, _ = mlx_lm.load(str(plain))
    ours, _ = moeflux_mlx.load(plain)
    prompt = tokens(7)
    assert relative_rms(mx.compile(ours)(prompt), expected(prompt)) < 1e-5
    for model in (expected, ours):
        mx.random.seed(0)
        model.freeze()
        linear_to_lora_layers(model, 2, {"rank": 4, "scale": 2.0, "dropout": 0.0})
        projection = next(
            m for k, m in model.named_modules() if k.endswith("in_proj_ba")
        )
        projection.lora_b = mx.random.normal(projection.lora_b.shape)
    wanted = expected(prompt)
    assert relative_rms(ours(prompt), wanted) < 1e-5
    rows = ours.model.embed_tokens(prompt)
    assert relative_rms(ours(prompt, input_embeddings=rows), wanted) < 1e-5


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
def test_what_it_does_not_do_mlx_lms_class_does(copied, changes, why):
    edit_config(copied, **changes)
    assert isinstance(moeflux_mlx.load(copied)[0], StreamedModel | stock.Model)
    assert not isinstance(moeflux_mlx.load(copied)[0], NativeModel)
    with pytest.raises(ModelError, match=f"our own class does not support {why}"):
        moeflux_mlx.load(copied, native=True)


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
    for bound in ({}, {"expert_memory": "3MB"}):
        with pytest.raises(ModelError, match=message):
            moeflux_mlx.load(copied, **bound)
