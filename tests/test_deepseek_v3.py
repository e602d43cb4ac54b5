"""The deepseek_v3 of our own equals mlx-lm's, and follows transformers elsewhere."""

from __future__ import annotations

import mlx.core as mx
import mlx_lm
import pytest
from mlx_lm.models.cache import QuantizedKVCache, RotatingKVCache, make_prompt_cache
from native_family_table import YARN
from native_models import (
    assert_large_caches_give_the_same_bits,
    assert_mlx_lms_class_serves,
    assert_refused,
    edit_config,
    launches,
    least,
    load,
    of,
    relative_rms,
    simulated,
    tokens,
)
from test_glm4_moe import EXPERTS
from tiny import make_deepseek_v3

import moeflux_mlx
from moeflux_mlx.errors import ModelError
from moeflux_mlx.experts.files.pack import pack
from moeflux_mlx.measure.profile import profile
from moeflux_mlx.measure.recording import filled_caches
from moeflux_mlx.streaming import StreamedModel


@of("deepseek_v3", "e8-k2")
def test_a_short_cache_forgets(plain):
    prompt, found = tokens(21), []
    for model in (mlx_lm.load(str(plain))[0], load(plain)):
        cache = [RotatingKVCache(8, 2) for _ in model.layers]
        mx.eval(model(prompt, cache=cache))
        found.append(model(tokens(1, seed=9), cache=cache))
    assert relative_rms(found[1], found[0]) < 1e-5


@of("deepseek_v3", "e8-k2")
def test_a_quantised_cache_is_refused(plain):
    model = load(plain)
    with pytest.raises(ModelError, match="unquantised cache of latent rows"):
        model(tokens(5), cache=[QuantizedKVCache(32, 4) for _ in model.layers])


@of("deepseek_v3", "e8-k2")
def test_a_step_is_profiled_over_a_filled_cache(plain):
    model = load(plain, executor="ops")
    found = profile(model, context=40, repeats=1)
    names = {row.ops for row in found.rows}
    assert any("SdpaLatentCausal" in each for each in names)
    assert [cache.offset for cache in filled_caches(model, 40)] == 3 * [40]


# One token: a narrow row of queries first, then all of latent attention.
ATTENTION = [
    "norm_matvecs",
    "norm_matvecs",
    "mla_inputs_append",
    "mla_q_prime_4bit",
    "mla_sdpa_tile_accumulate",
    "mla_sdpa_tile_finalize",
    "mla_out_per_head_4bit",
    "matvec_residual",
]


@pytest.mark.slow
@simulated
def test_a_token_takes_eleven_launches_a_layer(tmp_path):
    sizes = dict(num_hidden_layers=2, first_k_dense_replace=0, kv_lora_rank=64)
    sizes |= dict(v_head_dim=32)
    path = make_deepseek_v3(tmp_path / "model", **sizes)
    names = launches(load(path, executor="sim", optimistic="on"))
    assert names[1:23] == 2 * [*ATTENTION, *EXPERTS]


@pytest.fixture(scope="module")
def one_layer(tmp_path_factory):
    """A layer whose heads' matrices fit kernels; 22 tokens are worth expanding."""
    sizes = dict(num_hidden_layers=1, first_k_dense_replace=0, kv_lora_rank=64)
    sizes |= dict(qk_nope_head_dim=32, v_head_dim=32, num_attention_heads=9)
    return make_deepseek_v3(tmp_path_factory.mktemp("one") / "layer", **sizes)


@pytest.mark.slow
@simulated
def test_a_cache_too_large_to_be_copied_gets_the_same_bits(one_layer, monkeypatch):
    assert_large_caches_give_the_same_bits(
        one_layer, monkeypatch, "mla_inputs_append", "mla_inputs"
    )


@pytest.mark.slow
@simulated
def test_a_batchs_tokens_take_the_kernels_that_one_takes(one_layer):
    theirs = mlx_lm.load(str(one_layer))[0]
    ours = load(one_layer, executor="sim", optimistic="on")
    found, launched = [], []
    for model in (theirs, ours):
        cache, ids = make_prompt_cache(model), tokens(7, n_seqs=3)
        parts = [model(ids[:, at : at + n], cache=cache) for at, n in ((0, 5), (5, 1))]
        mx.eval(parts)
        ours.runtime.executor.on_launch = launched.append
        parts.append(model(ids[:, 6:], cache=cache))
        mx.eval(parts)
        ours.runtime.executor.on_launch = None
        found.append(mx.concatenate(parts, axis=1))
    assert relative_rms(found[1], found[0]) < 1e-5
    latent = [n for n in launched if n.startswith(("mla_", "yarn_"))]
    # A cache object of mlx-lm appends the rows.
    ours = [n for n in ATTENTION if n.startswith("mla_")]
    assert latent == ["mla_inputs", *ours[1:]]
    assert len(latent) == 5


@pytest.mark.slow
@simulated
@pytest.mark.parametrize("n_seqs", [2, 1])
def test_a_long_prompt_makes_keys_and_values_of_heads(one_layer, n_seqs):
    """A short one, and a token, leave the cache's rows as they are."""
    theirs = mlx_lm.load(str(one_layer))[0]
    ours, launched = load(one_layer, executor="sim"), []
    ours.runtime.executor.on_launch = launched.append
    found = []
    for model in (theirs, ours):
        cache, ids = make_prompt_cache(model), tokens(74, n_seqs=n_seqs)
        parts = [model(ids[:, at : at + 37], cache=cache) for at in (0, 37)]
        mx.eval(parts)
        found.append(mx.concatenate(parts, axis=1))
    assert relative_rms(found[1], found[0]) < 1e-5
    by_head = ("mla_q_prime_4bit", "mla_sdpa_folded", "mla_out_per_head_4bit")
    assert not {*by_head} & {*launched} and "mla_split_q_kv" in launched
    launched.clear()
    mx.eval(ours(tokens(4), cache=make_prompt_cache(ours)))
    assert [n for n in launched if n in by_head] == [*by_head]


@of("deepseek_v3", "e13-k1-biases-floats")
def test_heads_matrices_in_one_tensor_are_parted(plain, tmp_path):
    """The publisher's files have keys' and values' matrices of all heads in one."""
    expected = mlx_lm.load(str(plain))[0](tokens(9))
    path = tmp_path / "joint"
    path.mkdir()
    for file in plain.glob("*.json"):
        (path / file.name).write_bytes(file.read_bytes())
    weights = mx.load(str(next(plain.glob("*.safetensors"))))
    for name in [name for name in weights if name.endswith("embed_q.weight")]:
        values = weights.pop(name.replace("embed_q", "unembed_out"))
        both = [weights.pop(name).swapaxes(-1, -2), values]
        joint = mx.concatenate(both, axis=1).flatten(0, 1)
        weights[name.replace("embed_q", "kv_b_proj")] = joint
    mx.save_safetensors(str(path / "model.safetensors"), weights)
    for index in path.glob("*.index.json"):
        index.unlink()
    for options in ({}, {"expert_memory": least(path)}):
        assert relative_rms(load(path, **options)(tokens(9)), expected) < 1e-5
    pack(path, tmp_path / "packed")
    got = load(tmp_path / "packed", expert_memory=least(tmp_path / "packed"))
    assert relative_rms(got(tokens(9)), expected) < 1e-5


def test_kimi_k2_is_another_name(tmp_path):
    # transformers, which does not know the type, reads no YaRN of it.
    sizes = dict(num_hidden_layers=2, rope_scaling=None)
    path = make_deepseek_v3(tmp_path / "model", **sizes)
    expected = mlx_lm.load(str(path))[0](tokens(9))
    edit_config(path, model_type="kimi_k2")
    for options in ({}, {"expert_memory": least(path)}):
        assert relative_rms(load(path, **options)(tokens(9)), expected) < 1e-5


def test_the_publishers_eight_bit_floats_go_through_mlx_lms_class(tmp_path):
    """mlx-lm unpacks them, so only a pack of them can be streamed."""
    path = make_deepseek_v3(tmp_path / "model", num_hidden_layers=2, bits=None)
    edit_config(path, quantization_config={"quant_method": "fp8"})
    file = next(path.glob("*.safetensors"))
    made = {}
    for name, array in mx.load(str(file)).items():
        made[name] = array
        if ".shared_experts." in name:
            made[name] = mx.to_fp8(array)
            made[f"{name}_scale_inv"] = mx.array([[0.75]])
    for index in path.glob("*.index.json"):
        index.unlink()
    mx.save_safetensors(str(file), made)
    expected = mlx_lm.load(str(path))[0](tokens(9))
    pack(path, tmp_path / "packed")
    model, _ = moeflux_mlx.load(tmp_path / "packed")
    assert isinstance(model, StreamedModel)
    assert relative_rms(model(tokens(9)), expected) < 1e-5


@pytest.fixture
def copied(tmp_path):
    return make_deepseek_v3(tmp_path / "copy", num_hidden_layers=2)


@pytest.mark.sampled
@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, "rope_scaling"),
        ({"rope_scaling": {**YARN, "mscale": 0}}, "YaRN with one mscale"),
        ({"rope_scaling": {**YARN, "truncate": False}}, "truncate"),
        ({"rope_scaling": {**YARN, "attention_factor": 2.0}}, "attention_factor"),
        ({"rope_interleave": False}, "rope_interleave"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings"),
        ({"num_experts_per_tok": 1}, "norm_topk_prob of one expert"),
    ],
)
def test_what_it_does_not_do_mlx_lms_class_does(copied, changes, why, capsys):
    edit_config(copied, **changes)
    assert_mlx_lms_class_serves(copied, why, capsys)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_group": 3}, r"n_routed_experts to be a multiple of n_group \(3\)"),
        ({"n_group": 2, "topk_group": 3}, "topk_group"),
        ({"q_lora_rank": None}, "q_proj"),
        ({"q_lora_rank": 0}, "q_lora_rank"),
        ({"kv_lora_rank": 33}, "kv_a_proj_with_mqa"),
        ({"v_head_dim": 25}, "o_proj|unembed_out"),
        ({"moe_intermediate_size": 0}, "moe_intermediate_size|rows of gate_proj"),
        ({"n_routed_experts": 2.5}, "n_routed_experts"),
        ({"rope_scaling": {**YARN, "factor": "x"}}, "rope_scaling"),
        ({"first_k_dense_replace": 0}, "layers.0.mlp.gate|layers? 0"),
    ],
)
def test_a_configuration_that_is_not_of_the_files_is_refused(copied, changes, message):
    edit_config(copied, **changes)
    assert_refused(copied, message)
