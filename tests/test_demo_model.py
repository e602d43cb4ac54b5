"""The demo model is small, trained, equal to mlx-lm, and planned as measured."""

from __future__ import annotations

import json
import re
from pathlib import Path

import mlx.core as mx
import mlx_lm
import pytest
from mlx_lm.models.cache import make_prompt_cache

import moeflux_mlx
from moeflux_mlx.engine import lowering, ops, simulator
from moeflux_mlx.engine.graph import planned_peak_bytes
from moeflux_mlx.experts.files.pack import pack

DEMO = Path(__file__).parent.parent / "models" / "demo"


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    target = tmp_path_factory.mktemp("demo") / "packed"
    pack(DEMO, target)
    return target


def greedy(model, tokenizer, prompt: str, n: int) -> tuple[list[int], str]:
    steps = list(mlx_lm.stream_generate(model, tokenizer, prompt, max_tokens=n))
    return [step.token for step in steps], "".join(step.text for step in steps)


def test_the_demo_model_matches_its_card():
    config = json.loads((DEMO / "config.json").read_text())
    text = config.get("text_config", config)
    assert sum(f.stat().st_size for f in DEMO.iterdir()) <= 12_000_000
    assert config["model_type"] == "qwen3_5_moe"
    assert text["linear_key_head_dim"] == text["linear_value_head_dim"] == 128
    assert text["num_experts"] >= 32
    assert text["num_experts_per_tok"] >= 4
    assert text["num_hidden_layers"] > text["full_attention_interval"]
    gate = config["quantization"]["language_model.model.layers.0.mlp.gate"]
    assert gate == {"group_size": 64, "bits": 8}


def test_the_card_is_the_scripts_text_with_numbers(monkeypatch):
    monkeypatch.syspath_prepend(str(DEMO.parents[1] / "scripts"))
    from demo_model.card import ALL_ROWS_ARE_SLOW, CARD

    texts = re.split(r"\{[\w:.,%]+\}", CARD)
    pattern = ".+?".join(map(re.escape, texts))
    card = (DEMO / "README.md").read_text()
    assert re.fullmatch(pattern, card, re.DOTALL) and ALL_ROWS_ARE_SLOW in card


@pytest.mark.slow
def test_200_greedy_tokens_are_those_of_mlx_lm_in_float32(packed):
    expected, tokenizer = mlx_lm.load(str(DEMO))
    expected.set_dtype(mx.float32)
    ours, _ = moeflux_mlx.load(packed, expert_memory="4MB")
    tokenizer.eos_token_ids = set()
    want, _ = greedy(expected, tokenizer, "def ", 200)
    got, _ = greedy(ours, tokenizer, "def ", 200)
    assert got == want
    assert not ours.streamer.resident
    assert ours.streamer.stats.total.misses > 0


def test_logits_are_within_1e_4_of_mlx_lm_in_float32(packed):
    expected, tokenizer = mlx_lm.load(str(DEMO))
    expected.set_dtype(mx.float32)
    ours, _ = moeflux_mlx.load(packed, expert_memory="4MB")
    text = Path(__file__).read_text()[:300]
    ids = mx.array([tokenizer.encode(text)])
    want = expected(ids, cache=make_prompt_cache(expected))
    error = ours(ids, cache=make_prompt_cache(ours)) - want
    rms = mx.sqrt(mx.mean(error**2)) / mx.sqrt(mx.mean(want**2))
    assert rms.item() < 1e-4


def test_it_continues_def_into_a_function_with_an_indented_body(packed):
    ours, tokenizer = moeflux_mlx.load(packed, expert_memory="4MB")
    _, text = greedy(ours, tokenizer, "def ", 60)
    assert re.match(r"\s*\w+\([^)]*\):\s*\n\s+\S", text), text


@pytest.mark.slow
@pytest.mark.parametrize("layer", [0, 3], ids=["linear", "full"])
def test_the_planned_peak_is_within_a_quarter_of_mlxs_memory(layer):
    model, _ = moeflux_mlx.load(DEMO)
    sample = model.graph_layers[layer].sample(512, mx.float32)
    planned = planned_peak_bytes(sample.layer.graph)
    measured = sample.peak_bytes(model.runtime.executor)
    assert abs(planned - measured) <= 0.25 * measured


@pytest.mark.parametrize("layer", [0, 3], ids=["linear", "full"])
def test_a_layers_buffers_share_fewer_places(layer):
    model, _ = moeflux_mlx.load(DEMO)
    pool = model.graph_layers[layer].sample(64, mx.float32).layer.graph.pool
    assert pool.physical_buffer_count < 0.6 * len(pool.infos)


@pytest.mark.slow
@pytest.mark.skipif(not simulator.available(), reason="the simulator needs ziglang")
@pytest.mark.parametrize("fuse", ["0", "1"])
def test_tokens_on_simulated_kernels_are_those_of_the_references(
    packed, fuse, monkeypatch
):
    monkeypatch.setenv("MOEFLUX_FUSE", fuse)
    references, tokenizer = moeflux_mlx.load(
        packed, expert_memory="4MB", executor="ops"
    )
    kernels, _ = moeflux_mlx.load(packed, expert_memory="4MB", executor="sim")
    # Few tokens: simulating one takes seconds.
    want, _ = greedy(references, tokenizer, "def f(x):", 2)
    got, _ = greedy(kernels, tokenizer, "def f(x):", 2)
    assert got == want
    built = set(kernels.runtime.executor.built)
    assert {"experts_gate_up_swiglu", "qmm_t", "moe_mm_id"} <= built
    if fuse == "1":
        groups = {group.name for group in lowering.FUSIONS if group.kernels}
        assert groups - built == {ONLY_RESIDENT, *OF_OTHERS}
        resident, _ = moeflux_mlx.load(DEMO, executor="sim")
        got, _ = greedy(resident, tokenizer, "def f(x):", 2)
        assert got == want
        assert ONLY_RESIDENT in resident.runtime.executor.built
        return
    for op, ways in lowering.WAYS.items():
        if op not in OTHER_FAMILIES:
            assert {way.name for way in ways} & built or ways[0].name in HOST_KERNELS


# mlx-lm's cache object appends keys and values. Only NumPy runs the experts of a prompt
# one after the other, each adding to a sum that begins with zeros.
HOST_KERNELS = {"kv_cache_append_n_tokens", "zero_buffer"}
# Streaming must know the experts before the launch that runs them.
ONLY_RESIDENT = "experts_route_gate_up"
# Ops that this family's layers lack.
OTHER_FAMILIES = {
    ops.HeadMatvecNTokens,
    ops.MlaSplitQKv,
    ops.MoeNoauxTopK,
    ops.PartKeyHeadsNTokens,
    ops.SdpaLatentCausal,
}
# The demo model gates its attention, which is not latent. Its matrices are
# quantised, all its layers have experts, and a softmax chooses these.
OF_OTHERS = (
    "attention_inputs_ungated",
    "attention_inputs_append",
    "mla_inputs",
    "mla_inputs_append",
    "norm_dense_matvecs",
    "norm_gate_up_swiglu",
    "dense_residual",
    "experts_noaux_gate_up",
)
