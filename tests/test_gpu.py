"""Run the registry's checks, every way and complete models on a GPU, if present."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import mlx.core as mx
import pytest
from mlx_lm.models.cache import make_prompt_cache
from native_models import least
from op_cases import KERNEL_SPECS, SPECS, as_list
from tiny import (
    make_checkpoint,
    make_deepseek_v3,
    make_glm4_moe,
    make_gpt_oss,
    make_minimax,
    make_qwen3_moe,
    make_qwen3_next,
)

import moeflux_mlx
from moeflux_mlx.engine import lowering
from moeflux_mlx.engine.executors import open_executor
from moeflux_mlx.engine.launch import KERNELS
from moeflux_mlx.engine.launch.check import check, relative_error
from moeflux_mlx.experts.files.pack import pack
from moeflux_mlx.experts.files.packed import PackedExperts
from moeflux_mlx.experts.pool.pool import POOL_ALIGNMENT
from moeflux_mlx.experts.weights import Quantization
from moeflux_mlx.memory.steady import active_bytes

on_gpu = pytest.mark.parametrize(
    "device",
    [
        pytest.param("metal", marks=pytest.mark.metal),
        pytest.param("cuda", marks=pytest.mark.cuda),
    ],
)
# References run on the GPU too, which multiplies float32 with 11 bits.
LIMIT = 2e-3


@on_gpu
@pytest.mark.parametrize("name", KERNELS)
def test_a_kernel_gives_the_result_of_its_reference(device, name):
    executor, kernel = open_executor(device), KERNELS[name]
    results = [
        check(kernel, dtype, sizes, executor.run)
        for dtype, sizes in itertools.product(kernel.dtypes, kernel.sizes)
    ]
    assert results != []
    assert [str(result) for result in results if not result.passed] == []


@on_gpu
def test_ops_give_the_result_of_their_reference_by_every_way(device, monkeypatch):
    executor, wrong = open_executor(device), []
    for spec in (*SPECS, *KERNEL_SPECS):
        case = spec.build()
        for way in lowering.ways(case.op):
            name = case.op.variant_name
            monkeypatch.setenv("MOEFLUX_LOWERING", f"{name}={way.name}")
            weights = [case.weights.get(n) for n in case.op.weight_fields]
            inputs = [case.on_device(n) for n in case.inputs]
            got = as_list(executor.kernel(case.op)(*inputs, *weights))
            for a, b in zip(got, case.on_device_result(), strict=True):
                exact = not mx.issubdtype(b.dtype, mx.floating)
                if not relative_error(a, b) <= (0 if exact else LIMIT):
                    wrong.append(f"{spec.id} {way.name}: {relative_error(a, b)}")
    assert wrong == []


@dataclass(frozen=True)
class Family:
    """A family's maker of random models, with its keys for experts and widths."""

    make: Callable[..., Path]
    n_experts: str = "num_experts"
    width: str = "moe_intermediate_size"


OF_GPT_OSS = "num_local_experts", "intermediate_size"
# A layer in the middle of the second has no experts, the first of two others none.
FAMILIES = {
    "qwen3_5_moe": Family(make_checkpoint),
    "qwen3_moe": Family(
        partial(make_qwen3_moe, num_hidden_layers=4, head_dim=64, mlp_only_layers=[1])
    ),
    "qwen3_next": Family(make_qwen3_next),
    "glm4_moe": Family(make_glm4_moe, "n_routed_experts"),
    # Latents so wide that the prompt here is taken in the expanded form.
    "deepseek_v3": Family(
        partial(make_deepseek_v3, kv_lora_rank=256, v_head_dim=32), "n_routed_experts"
    ),
    "kimi_k2": Family(
        partial(make_deepseek_v3, model_type="kimi_k2", rope_scaling=None),
        "n_routed_experts",
    ),
    "gpt_oss": Family(make_gpt_oss, *OF_GPT_OSS),
    # As published: experts in 4-bit floats.
    "gpt_oss-mxfp4": Family(
        partial(make_gpt_oss, experts=Quantization(4, 32, "mxfp4")), *OF_GPT_OSS
    ),
    "gpt_oss-nvfp4": Family(
        partial(make_gpt_oss, experts=Quantization(4, 16, "nvfp4")), *OF_GPT_OSS
    ),
    "minimax": Family(make_minimax, *OF_GPT_OSS),
    "minimax_m2": Family(partial(make_minimax, model_type="minimax_m2"), *OF_GPT_OSS),
}
each_family = pytest.fixture(scope="module", params=FAMILIES)


def made(name: str, path: Path, n_experts: int, **overrides: int) -> Path:
    """Write a model of few layers, wide enough for simdgroups and tensor cores."""
    family = FAMILIES[name]
    sizes = {family.n_experts: n_experts, family.width: 128, "hidden_size": 256}
    return family.make(path, seed=3, **sizes, **overrides)


@each_family
def plain(request, tmp_path_factory):
    return made(request.param, tmp_path_factory.mktemp("gpu") / "plain", 16)


@each_family
def unrouted(request, tmp_path_factory):
    """A model whose tokens use every expert.

    With random routers, some choice is always so close that 11 bits decide it.
    """
    path = tmp_path_factory.mktemp("gpu") / "unrouted"
    return made(request.param, path, 8, num_experts_per_tok=8)


def logits(model, n_seqs: int = 1) -> mx.array:
    """Return the logits of a prompt and of single tokens after it."""
    tokens = mx.random.randint(1, 320, (n_seqs, 46), key=mx.random.key(4))
    cache = make_prompt_cache(model)
    parts = [model(tokens[:, :37], cache=cache)]
    parts += [model(tokens[:, i : i + 1], cache=cache) for i in range(37, 46)]
    out = mx.concatenate(parts, axis=1)
    mx.eval(out)
    return out


@on_gpu
@pytest.mark.parametrize("n_seqs", [1, 3])
@pytest.mark.parametrize("fuse", ["0", "1"])
def test_a_model_gives_the_logits_of_the_references(
    device, unrouted, n_seqs, fuse, monkeypatch
):
    monkeypatch.setenv("MOEFLUX_FUSE", fuse)
    kernels, references = (
        moeflux_mlx.load(unrouted, executor=name)[0] for name in (device, "ops")
    )
    expected = logits(references, n_seqs)
    assert relative_error(logits(kernels, n_seqs), expected) < 10 * LIMIT


@pytest.fixture(scope="module")
def packed(plain):
    path = plain.with_name("packed")
    pack(plain, path)
    return path


@on_gpu
@pytest.mark.parametrize("bound", ["memory", "expert_memory"])
@pytest.mark.parametrize("share", [1, 5 / 8])
def test_memory_falls_with_the_pool(device, packed, bound, share):
    """A smaller pool frees memory of the GPU, and no bit changes."""
    expected = logits(moeflux_mlx.load(packed, executor=device)[0])
    with PackedExperts.open(packed) as store:
        layers = store.layers
        n_slots = round(share * len(layers) * store.n_experts)
        n_segments = n_slots // store.n_experts if bound == "memory" else 1
        stride = store.layout(layers[0]).stride
    options = {bound: "4GB"}
    if share < 1:
        options["expert_memory"] = n_slots * stride + n_segments * POOL_ALIGNMENT
    model, _ = moeflux_mlx.load(packed, executor=device, expert_io="pread", **options)
    streamer, keeper = model.streamer, model.runtime.keeper
    assert streamer.resident == (share == 1)
    assert bound == "expert_memory" or len(streamer.pools) == n_segments
    change = streamer.resize if keeper is None else keeper.limit
    for n in (streamer.most_slots // 2, streamer.least_slots, streamer.most_slots):
        assert mx.array_equal(logits(model), expected)
        gc.collect()
        before, taken = active_bytes(), streamer.memory_bytes
        mx.clear_cache()
        change(n)
        assert mx.get_cache_memory() < 1 << 17
        lost, wanted = before - active_bytes(), taken - streamer.memory_bytes
        assert abs(wanted) > 1 << 18 and abs(lost - wanted) < 1 << 17
        mx.eval(model(mx.array([[3]]), cache=make_prompt_cache(model)))
        # The token's caches, which are larger than the bound, are gone at once.
        assert abs(before - active_bytes() - wanted) < 1 << 17
    assert mx.array_equal(logits(model), expected)


@on_gpu
@pytest.mark.parametrize("read_ahead", ["off", "on"])
@pytest.mark.parametrize("n_slots", [4, 20])
def test_any_budget_gives_the_same_bits(device, packed, n_slots, read_ahead):
    whole, _ = moeflux_mlx.load(packed, executor=device)
    with PackedExperts.open(packed) as store:
        memory = n_slots * store.layout(store.layers[0]).stride + POOL_ALIGNMENT
        n_routed = len(store.layers)
    few, _ = moeflux_mlx.load(
        packed, expert_memory=memory, executor=device, read_ahead=read_ahead
    )
    # Threads read records of any size, so that layers are computed meanwhile.
    few.streamer._in_flight.reader.inline_bytes = 0
    assert mx.array_equal(logits(few), logits(whole))
    total = few.streamer.stats.total
    assert total.misses > 0
    # With more slots, two routed layers may leave nothing to read ahead.
    if n_slots == 4 or n_routed > 2 or read_ahead == "off":
        assert bool(total.read_ahead) == (read_ahead == "on")


@on_gpu
@pytest.mark.parametrize("n_seqs", [1, 3])
def test_the_smallest_budget_gives_the_bits_of_all_experts(device, plain, n_seqs):
    whole, _ = moeflux_mlx.load(plain, executor=device)
    few, _ = moeflux_mlx.load(plain, executor=device, expert_memory=least(plain))
    assert mx.array_equal(logits(few, n_seqs), logits(whole, n_seqs))
    assert few.streamer.stats.total.misses > 0


@on_gpu
def test_the_smallest_budget_gives_the_logits_of_the_references(device, unrouted):
    memory = least(unrouted)
    kernels, references = (
        moeflux_mlx.load(unrouted, executor=name, expert_memory=memory)[0]
        for name in (device, "ops")
    )
    assert relative_error(logits(kernels), logits(references)) < 10 * LIMIT
