"""The gpt_oss of our own equals mlx-lm's: sinks, windows, experts with biases."""

from __future__ import annotations

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from mlx_lm.models.cache import (
    BatchKVCache,
    BatchRotatingKVCache,
    KVCache,
    make_prompt_cache,
)
from moeflux_mlx.models.gpt_oss import lacks
from native_family_table import FULL, GPT_OSS, MXFP4, SLIDING
from native_models import (
    UNGATED_LAYER,
    assert_mlx_lms_class_serves,
    assert_refused,
    edit_config,
    greedy,
    launches,
    least,
    load,
    of,
    relative_rms,
    simulated,
    tokens,
)
from test_door_pack import interleaved, rewrite
from test_steps import Lazy
from tiny import GPT_OSS_CONFIG, make_gpt_oss, make_qwen3_moe

import moeflux_mlx
from moeflux_mlx.engine.compiled_layers import CompiledLayers
from moeflux_mlx.engine.executors import EXECUTORS
from moeflux_mlx.engine.native import NativeModel
from moeflux_mlx.errors import ExpertStoreError, ModelError
from moeflux_mlx.experts.files.pack import pack
from moeflux_mlx.experts.streaming.streamer import ExpertStreamer
from moeflux_mlx.measure.compare import compare
from moeflux_mlx.memory.caches import CACHE_STEP

only_quantised = of("gpt_oss", "e7-k3")


@pytest.mark.slow
@simulated
def test_a_token_takes_the_eight_launches_that_qwen3_moes_takes(tmp_path):
    """Biases, sinks, windows and what clips are within."""
    sizes = dict(num_hidden_layers=2, layer_types=[SLIDING, FULL])
    path = make_gpt_oss(tmp_path / "model", experts=MXFP4, **sizes)
    names = launches(load(path, executor="sim", optimistic="on"))
    assert names[1:17] == 2 * UNGATED_LAYER


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
    kinds = GPT_OSS["e7-k3"]["layer_types"]
    for make in (
        lambda: make_prompt_cache(theirs),
        lambda: batched(kinds, [0, 3]),
        lambda: [KVCache() for _ in kinds],
        lambda: [None for _ in kinds],
    ):
        expected, got = (logits_of(model, make()) for model in (theirs, ours))
        # Padding sees nothing.
        assert relative_rms(got[:, 3:], expected[:, 3:]) < 1e-5


@only_quantised
def test_quantised_caches_are_refused(plain):
    model = load(plain)
    cache = make_prompt_cache(model)
    mx.eval(model(tokens(3), cache=cache))
    cache[1] = cache[1].to_quantized(group_size=32, bits=8)
    with pytest.raises(ModelError, match="attention has sinks"):
        model(tokens(1), cache=cache)


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
    assert_mlx_lms_class_serves(copied, why, capsys)


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
    assert_refused(copied, message)


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
