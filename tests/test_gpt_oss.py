"""The gpt_oss of our own equals mlx-lm's: sinks, windows, experts with biases."""

from __future__ import annotations

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from mlx_lm.models import gpt_oss as stock
from mlx_lm.models.cache import (
    BatchKVCache,
    BatchRotatingKVCache,
    KVCache,
    make_prompt_cache,
)
from mlx_lm.tuner.utils import linear_to_lora_layers
from moeflux_mlx.models.gpt_oss import lacks
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
from test_door_pack import interleaved, rewrite
from test_steps import Lazy, Traced
from tiny import GPT_OSS_CONFIG, make_gpt_oss, make_qwen3_moe

import moeflux_mlx
from moeflux_mlx.engine.compiled_layers import CompiledLayers
from moeflux_mlx.engine.executors import EXECUTORS
from moeflux_mlx.engine.native import NativeModel
from moeflux_mlx.errors import ExpertStoreError, ModelError
from moeflux_mlx.experts.files.pack import pack
from moeflux_mlx.experts.streaming.streamer import ExpertStreamer
from moeflux_mlx.experts.weights import Quantization
from moeflux_mlx.measure.compare import compare
from moeflux_mlx.memory.caches import CACHE_STEP

SLIDING, FULL = "sliding_attention", "full_attention"
MXFP4 = Quantization(4, 32, "mxfp4")
# Odd numbers of experts and heads, windows shorter than a prompt, each kind of layer
# first, widths that fit no kernel.
CONFIGS = {
    "e7-k3": dict(
        num_local_experts=7,
        num_experts_per_tok=3,
        num_hidden_layers=3,
        layer_types=[SLIDING, FULL, SLIDING],
    ),
    "e6-k2-mxfp4": dict(num_local_experts=6, num_hidden_layers=2, layer_types=None),
    "e5-k1-full-first-floats": dict(
        hidden_size=72,
        intermediate_size=36,
        num_local_experts=5,
        num_experts_per_tok=1,
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=20,
        sliding_window=5,
        num_hidden_layers=3,
        layer_types=[FULL, SLIDING, SLIDING],
    ),
}


def make(path, *, bits, **config):
    """Write a checkpoint, its experts in mxfp4 where the name of ``path`` ends so."""
    experts = MXFP4 if path.name.endswith("mxfp4") else None
    return make_gpt_oss(path, bits=bits, experts=experts, **config)


plain, packed = made_of(make, CONFIGS)
only_quantised = pytest.mark.parametrize("plain", ["e7-k3"], indirect=True)


@pytest.mark.sampled
@pytest.mark.parametrize("n_seqs", [1, 3])
def test_64_greedy_tokens_and_their_logits_are_mlx_lms(plain, n_seqs):
    expected, chosen = greedy(mlx_lm.load(str(plain))[0], n_seqs, 64)
    for options in ({}, {"expert_memory": least(plain)}):
        model = load(plain, executor="ops", **options)
        got, found = greedy(model, n_seqs, 64)
        assert relative_rms(got, expected) < 1e-5, options
        assert found == chosen, options
    assert model.streamer.stats.total.misses


@pytest.mark.sampled
def test_any_budget_gives_the_same_bits(plain, packed):
    expected, _ = greedy(load(plain, executor="ops"), 1, 6)
    for path, more in ((plain, {}), (packed, {}), (packed, {"read_ahead": "on"})):
        model = load(path, executor="ops", expert_memory=least(path), **more)
        assert mx.array_equal(greedy(model, 1, 6)[0], expected), (path, more)


@simulated
@only_quantised
def test_kernels_give_mlx_lms_tokens_and_logits(plain):
    for n_seqs, options in ((1, {}), (3, {"expert_memory": least(plain)})):
        expected, chosen = greedy(mlx_lm.load(str(plain))[0], n_seqs, 1)
        model = load(plain, executor="sim", **options)
        got, found = greedy(model, n_seqs, 1)
        assert relative_rms(got, expected) < 1e-5, n_seqs
        assert found == chosen, n_seqs


@pytest.mark.slow
@simulated
def test_a_token_takes_the_nine_launches_a_layer_that_qwens_takes(tmp_path):
    """Biases, sinks, windows and what clips are within."""
    sizes = dict(num_hidden_layers=2, layer_types=[SLIDING, FULL])
    path = make_gpt_oss(tmp_path / "model", experts=MXFP4, **sizes)
    names = launches(load(path, executor="sim", optimistic="on"))
    assert [name.replace("_ungated", "") for name in names[1:19]] == 2 * LAYER


def logits_after(model, n_prompt: int, n_seqs: int) -> mx.array:
    """Return the logits of a prompt and of 21 tokens after it, each alone."""
    cache, ids = make_prompt_cache(model), tokens(n_prompt + 21, n_seqs=n_seqs)
    parts = [model(ids[:, :n_prompt], cache=cache)]
    for i in range(n_prompt, n_prompt + 21):
        parts.append(model(ids[:, i : i + 1], cache=cache))
    return mx.concatenate(parts, axis=1)


@pytest.mark.slow
@only_quantised
@pytest.mark.parametrize("n_seqs", [3, 1])
def test_running_ahead_gives_what_waiting_gives(plain, n_seqs, monkeypatch):
    """Windows are 8: they fill up, are full at once, or are cut, and go round twice."""
    monkeypatch.setitem(EXECUTORS, Lazy.name, Lazy)
    passed = []
    run = CompiledLayers.__call__
    monkeypatch.setattr(
        CompiledLayers, "__call__", lambda *a, **k: passed.append(a[1]) or run(*a, **k)
    )
    budget = {"executor": Lazy.name, "expert_memory": least(plain, 9)}
    waits, ahead = (load(plain, optimistic=on, **budget) for on in ("off", "on"))
    for n_prompt in (3, 8, 13):
        expected = logits_after(waits, n_prompt, n_seqs)
        assert passed == []
        got = logits_after(ahead, n_prompt, n_seqs)
        assert relative_rms(got, expected) < 1e-6
        # All layers at least once for every token that caches had room for.
        assert sum(map(len, passed)) >= 3 * 20
        passed.clear()
    theirs = logits_after(mlx_lm.load(str(plain))[0], n_prompt, n_seqs)
    assert relative_rms(got, theirs) < 1e-5
    assert ahead.streamer.stats.total.misses


@only_quantised
def test_a_step_that_fails_may_be_made_again(plain, monkeypatch):
    """Full windows have lost a row by then that no later token sees."""
    monkeypatch.setitem(EXECUTORS, Lazy.name, Lazy)
    budget = {"executor": Lazy.name, "expert_memory": least(plain, 9)}
    waits, ahead = (load(plain, optimistic=on, **budget) for on in ("off", "on"))
    confirm = ExpertStreamer.confirm

    def fail(*_args, **_options):
        raise ExpertStoreError("[test] read failed")

    found = []
    for model in (waits, ahead):
        cache, ids = make_prompt_cache(model), tokens(18)
        parts = [model(ids[:, :13], cache=cache)]
        for i in range(13, 18):
            ends = [c.offset for c in cache]
            if model is ahead and i > 13:
                monkeypatch.setattr(ExpertStreamer, "confirm", fail)
                with pytest.raises(ExpertStoreError, match="read failed"):
                    model(ids[:, i : i + 1], cache=cache)
                monkeypatch.setattr(ExpertStreamer, "confirm", confirm)
            assert [c.offset for c in cache] == ends
            parts.append(model(ids[:, i : i + 1], cache=cache))
        found.append(mx.concatenate(parts, axis=1))
    assert relative_rms(found[1], found[0]) < 1e-6


@only_quantised
@pytest.mark.parametrize("executor", [Lazy, Traced])
def test_what_is_lazy_gives_the_same(plain, executor, monkeypatch):
    monkeypatch.setitem(EXECUTORS, executor.name, executor)
    expected, chosen = greedy(mlx_lm.load(str(plain))[0], 2, 6)
    for options in ({}, {"expert_memory": least(plain, 4)}):
        model = load(plain, executor=executor.name, optimistic="on", **options)
        got, found = greedy(model, 2, 6)
        assert relative_rms(got, expected) < 1e-5, options
        assert found == chosen, options


@only_quantised
def test_a_plan_counts_windows_as_caches_have_them(plain):
    model = load(plain, executor="ops", expert_memory=least(plain))
    needs, cache = model.needs, make_prompt_cache(model)
    row_bytes = 2 * GPT_OSS_CONFIG["num_key_value_heads"] * 32 * 4
    n_rows = GPT_OSS_CONFIG["sliding_window"]
    assert needs.cache_row_bytes == row_bytes
    assert needs.cache_state_bytes == 2 * n_rows * row_bytes
    for n_tokens in (256, 200, 1):
        mx.eval(model(tokens(n_tokens), cache=cache))
    held = sum(each.nbytes for each in cache)
    assert held == needs.cache_state_bytes + 2 * CACHE_STEP * needs.cache_row_bytes


def logits_of(model, caches, seed: int = 0) -> mx.array:
    """Return the logits of prompts and of single tokens, two sequences each."""
    parts = []
    for i, n in enumerate((11, 1, 1, 5, 1, 2)):
        parts.append(model(tokens(n, seed + i, n_seqs=2), cache=caches))
    return mx.concatenate(parts, axis=1)


def batched(kinds: list[str], padding: list[int]) -> list:
    return [
        BatchKVCache(padding) if kind == FULL else BatchRotatingKVCache(8, padding)
        for kind in kinds
    ]


@only_quantised
@pytest.mark.parametrize("optimistic", ["off", "on"])
def test_caches_of_other_kinds_are_seen_through_the_windows(plain, optimistic):
    theirs, _ = mlx_lm.load(str(plain))
    ours = load(plain, optimistic=optimistic)
    kinds = CONFIGS["e7-k3"]["layer_types"]
    for make in (
        lambda: make_prompt_cache(theirs),
        lambda: batched(kinds, [0, 3]),
        lambda: [KVCache() for _ in kinds],
        lambda: [None for _ in kinds],
    ):
        expected, got = (logits_of(model, make()) for model in (theirs, ours))
        # What is padding sees nothing.
        assert relative_rms(got[:, 3:], expected[:, 3:]) < 1e-5


@only_quantised
def test_quantised_caches_are_refused(plain):
    model = load(plain)
    cache = make_prompt_cache(model)
    mx.eval(model(tokens(3), cache=cache))
    cache[1] = cache[1].to_quantized(group_size=32, bits=8)
    with pytest.raises(ModelError, match="attention has sinks"):
        model(tokens(1), cache=cache)


def test_a_state_goes_on_where_it_was_saved(packed, tmp_path):
    model = load(packed, expert_memory=least(packed, 3))
    cache, prompt = make_prompt_cache(model), tokens(21)
    mx.eval(model(prompt, cache=cache))
    moeflux_mlx.save_state(tmp_path / "state", model, cache, prompt[0].tolist())
    expected = model(tokens(1, seed=9), cache=cache)
    again = load(packed, expert_memory=least(packed, 3))
    state = moeflux_mlx.load_state(tmp_path / "state", again)
    assert mx.array_equal(again(tokens(1, seed=9), cache=state.cache), expected)


@only_quantised
def test_a_budget_of_the_process_gives_the_same(packed):
    bounded = load(packed, memory="4GB")
    assert bounded.runtime.plan is not None
    got, expected = (greedy(model, 1, 4)[0] for model in (bounded, load(packed)))
    assert relative_rms(got, expected) < 1e-5


@only_quantised
def test_adapters_and_a_compiled_call_take_mlx_lms_modules(plain):
    expected, ours = mlx_lm.load(str(plain))[0], load(plain)
    prompt = tokens(11)
    assert relative_rms(mx.compile(ours)(prompt), expected(prompt)) < 1e-5
    for model in (expected, ours):
        mx.random.seed(0)
        model.freeze()
        linear_to_lora_layers(model, 1, {"rank": 4, "scale": 2.0, "dropout": 0.0})
        layer = model.layers[-1].self_attn.q_proj
        layer.lora_b = mx.random.normal(layer.lora_b.shape)
    assert relative_rms(ours(prompt), expected(prompt)) < 1e-5


def unrounded(dims: int, base: float, scaling: dict) -> np.ndarray:
    """Return wave lengths as transformers has them where nothing is truncated."""
    pairs = np.arange(dims // 2)
    angles = base ** (-2 * pairs / dims)
    longest, factor = scaling["original_max_position_embeddings"], scaling["factor"]
    turns = (scaling["beta_fast"], scaling["beta_slow"])
    low, high = (
        dims * np.log(longest / (n * 2 * np.pi)) / (2 * np.log(base)) for n in turns
    )
    share = np.clip((pairs - max(low, 0)) / (min(high, dims - 1) - max(low, 0)), 0, 1)
    return 1 / (angles / factor * share + angles * (1 - share))


@pytest.mark.slow
def test_a_false_truncate_is_followed_as_transformers_does(tmp_path, capsys):
    scaling = {**GPT_OSS_CONFIG["rope_scaling"], "truncate": False}
    path = make_gpt_oss(tmp_path / "model", rope_scaling=scaling)
    theirs, _ = mlx_lm.load(str(path))
    rounded = theirs(tokens(40))
    for layer in theirs.layers:
        layer.self_attn.rope._freqs = mx.array(
            unrounded(32, 10000.0, scaling), mx.float32
        )
    expected = theirs(tokens(40))
    ours = load(path)
    assert "in rope_scaling that does not truncate" in capsys.readouterr().err
    assert relative_rms(ours(tokens(40)), expected) < 1e-5
    found = compare(path, "some text", max_tokens=2)
    assert found.departs is not None and not found.within_tolerance
    assert relative_rms(rounded, expected) > 1e-4
    other, _ = moeflux_mlx.load(path, native=False)
    assert relative_rms(other(tokens(40)), rounded) < 1e-5


def test_the_published_form_runs_once_it_is_packed(tmp_path):
    made = make_gpt_oss(tmp_path / "mlx", bits=None, experts=MXFP4)
    path = rewrite(made, interleaved)
    edit_config(path, quantization=..., quantization_config={"quant_method": "mxfp4"})
    expected, chosen = greedy(mlx_lm.load(str(path))[0], 1, 6)
    unpacked, _ = moeflux_mlx.load(path)
    assert not isinstance(unpacked, NativeModel)
    pack(path, tmp_path / "packed")
    for options in ({}, {"expert_memory": least(tmp_path / "packed")}):
        got, found = greedy(load(tmp_path / "packed", **options), 1, 6)
        assert relative_rms(got, expected) < 1e-5, options
        assert found == chosen, options


def test_biases_that_a_model_has_no_place_for_are_refused(tmp_path):
    path = make_qwen3_moe(tmp_path / "model", num_hidden_layers=1)
    file = path / "model.safetensors"
    found = mx.load(str(file))
    stem = "model.layers.0.mlp.switch_mlp"
    for name in ("gate_proj", "up_proj", "down_proj"):
        n_rows = found[f"{stem}.{name}.weight"].shape[1]
        found[f"{stem}.{name}.bias"] = mx.zeros((8, n_rows))
    mx.save_safetensors(str(file), found, {"format": "mlx"})
    (path / "model.safetensors.index.json").unlink()
    with pytest.raises(ModelError, match="expected no biases"):
        moeflux_mlx.load(path, expert_memory="3MB")
    with pytest.raises(ModelError):
        moeflux_mlx.load(path)


@pytest.fixture
def copied(tmp_path):
    return make_gpt_oss(
        tmp_path / "copy", num_hidden_layers=2, layer_types=[SLIDING, FULL]
    )


YARN = GPT_OSS_CONFIG["rope_scaling"]


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"rope_scaling": ...}, "rope_scaling"),
        ({"rope_scaling": {**YARN, "rope_type": "linear"}}, "rope_scaling"),
        ({"rope_scaling": {**YARN, "attention_factor": 1.0}}, "attention_factor"),
        ({"swiglu_limit": 5.0}, "swiglu_limit"),
        ({"hidden_act": "gelu"}, "hidden_act"),
    ],
)
def test_what_it_does_not_do_mlx_lms_class_does(copied, changes, why, capsys):
    edit_config(copied, **changes)
    assert type(moeflux_mlx.load(copied)[0]) is stock.Model
    assert f"our own class does not support {why}" in capsys.readouterr().err
    with pytest.raises(ModelError, match=f"our own class does not support {why}"):
        moeflux_mlx.load(copied, native=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer_types": [FULL, FULL]}, "layer_types"),
        ({"layer_types": [SLIDING]}, "layer_types"),
        ({"layer_types": [SLIDING, [FULL]]}, "layer_types"),
        ({"num_hidden_layers": 1, "layer_types": None}, "layer_types|layer below 1"),
        ({"sliding_window": 0}, "sliding_window"),
        ({"num_local_experts": 4}, "router|experts"),
        ({"num_experts_per_tok": 9}, r"num_experts_per_tok|8 experts per token|got 9"),
        ({"head_dim": 16}, "q_proj"),
        ({"rope_scaling": {**YARN, "factor": "4"}}, "rope_scaling"),
        ({"rope_scaling": {**YARN, "truncate": 1}}, "truncate"),
    ],
)
def test_a_configuration_that_is_not_of_the_files_is_refused(copied, changes, message):
    edit_config(copied, **changes)
    for bound in ({}, {"expert_memory": "3MB"}):
        with pytest.raises(ModelError, match=message):
            moeflux_mlx.load(copied, **bound)


def test_the_published_configuration_is_one_of_ours():
    scaling = {
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
        "rope_type": "yarn",
        "truncate": False,
    }
    config = {
        "attention_bias": True,
        "hidden_act": "silu",
        "rope_scaling": scaling,
        "swiglu_limit": 7.0,
        "tie_word_embeddings": False,
        "quantization": {"group_size": 32, "bits": 4, "mode": "mxfp4"},
    }
    assert lacks(config) is None
