"""The main kernels of a model, at any shape, and compared with one another.

Shapes are random: widths within and past a tile, one row to several groups of rows. The
seed of the schedule is random too, and one example in four runs in checked mode.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeflux_mlx.engine import simulator
from moeflux_mlx.engine.executors.sim import SimExecutor
from moeflux_mlx.engine.launch import KERNELS, attention, linear_attention
from moeflux_mlx.engine.launch.check import check
from moeflux_mlx.engine.simulator.compile import NUMBERS

pytestmark = pytest.mark.skipif(
    not simulator.available(), reason="the simulator needs ziglang and pyelftools"
)
BITS = st.sampled_from((2, 4, 8))
GROUPS = st.sampled_from((32, 64, 128))
FEW = st.integers(1, 9)
# Half of the examples have bfloat16 scales, whatever the activations.
QUANTISED = {"g": GROUPS, "s": st.integers(0, 1)}


def sizes_of(**strategies: st.SearchStrategy[int]) -> st.SearchStrategy[dict[str, int]]:
    return st.fixed_dictionaries(strategies)


def in_groups(
    strategy: st.SearchStrategy[dict[str, int]], name: str, most: int
) -> st.SearchStrategy[dict[str, int]]:
    """Add a width ``name``: whole groups of ``g``, up to about ``most``."""

    def widen(sizes: dict[str, int]) -> st.SearchStrategy[dict[str, int]]:
        g = sizes["g"]
        return st.integers(1, max(1, most // g)).map(lambda n: {**sizes, name: n * g})

    return strategy.flatmap(widen)


def up_to(
    strategy: st.SearchStrategy[dict[str, int]], name: str, most: str, limit: int = 64
) -> st.SearchStrategy[dict[str, int]]:
    """Add a number ``name`` of at least 1 and at most the number ``most``."""
    return strategy.flatmap(
        lambda sizes: st.integers(1, min(sizes[most], limit)).map(
            lambda n: {**sizes, name: n}
        )
    )


HEADS = sizes_of(
    b=st.integers(1, 3),
    h=st.integers(1, 3),
    s=st.integers(1, 70),
    d=st.sampled_from((32, 64, 96, 128, 256)),
).flatmap(
    # No mask, one mask for all sequences, or one for each.
    lambda sizes: st.sampled_from((0, 1, sizes["b"])).map(
        lambda masks: {**sizes, "masks": masks}
    )
)
DELTA = sizes_of(
    b=st.integers(1, 2),
    hk=st.integers(1, 2),
    dk=st.sampled_from((32, 64, 128)),
    dv=st.integers(1, 40),
    strong=st.integers(0, 1),
).flatmap(
    lambda sizes: st.integers(1, 3).map(lambda n: {**sizes, "hv": n * sizes["hk"]})
)
ANY_SIZES: dict[str, st.SearchStrategy[dict[str, int]]] = {
    "dequant_matvec_4bit_v3": in_groups(
        sizes_of(o=st.integers(1, 40), **QUANTISED), "i", 1500
    ),
    "dequant_matvec_8bit_v3_n_tokens": in_groups(
        sizes_of(t=FEW, o=st.integers(1, 40), **QUANTISED), "i", 700
    ),
    "qmm_t": in_groups(
        sizes_of(t=st.integers(1, 70), o=st.integers(1, 140), bits=BITS, **QUANTISED),
        "i",
        400,
    ),
    "matvec_residual": in_groups(
        sizes_of(o=st.integers(1, 80), bits=BITS, **QUANTISED), "i", 1500
    ),
    "norm_gate_up_swiglu": in_groups(
        sizes_of(o=st.integers(1, 80), bits=BITS, more=FEW, **QUANTISED), "i", 1500
    ),
    "experts_gate_up_swiglu": in_groups(
        sizes_of(k=FEW, n=st.integers(1, 40), base=FEW, bits=BITS, **QUANTISED),
        "i",
        1200,
    ),
    "experts_down_rows": in_groups(
        sizes_of(k=FEW, d=st.integers(1, 40), base=FEW, bits=BITS, **QUANTISED),
        "n",
        600,
    ),
    "experts_down_sum": in_groups(
        sizes_of(k=FEW, d=st.integers(1, 40), base=FEW, bits=BITS, **QUANTISED),
        "n",
        600,
    ),
    "moe_mm_id": in_groups(
        up_to(
            sizes_of(
                t=st.integers(1, 40),
                e=st.integers(2, 9),
                o=st.integers(1, 140),
                each=st.integers(0, 1),
                base=FEW,
                bits=BITS,
                **QUANTISED,
            ),
            "k",
            "e",
        ),
        "i",
        200,
    ),
    "moe_softmax_topk": up_to(sizes_of(t=FEW, e=st.integers(2, 300)), "k", "e", 16),
    "rms_norm_bf16_fused_n_tokens": sizes_of(
        t=FEW, d=st.integers(1, 5000), s=st.integers(0, 1)
    ),
    "sdpa_decode": HEADS.flatmap(
        lambda sizes: st.integers(1, 8).map(lambda per: {**sizes, "per": per})
    ),
    "sdpa_causal_direct_fold2": up_to(HEADS, "t", "s", 9).flatmap(
        lambda sizes: st.integers(1, 3).map(lambda n: {**sizes, "per": 2 * n})
    ),
    "gated_delta_net_step": DELTA.map(lambda sizes: {**sizes, "t": 1}),
    "gated_delta_net_chunkwise": DELTA.flatmap(
        lambda sizes: st.integers(1, 50).map(lambda t: {**sizes, "t": t})
    ),
    "mla_sdpa_folded": up_to(
        sizes_of(
            h=st.integers(1, 20),
            s=st.integers(1, 70),
            l=st.integers(1, 12).map(lambda n: 32 * n),
            r=st.integers(1, 32).map(lambda n: 2 * n),
            rise=st.integers(0, 1),
        ),
        "t",
        "s",
        5,
    ),
}


@pytest.mark.sampled
@pytest.mark.parametrize("name", ANY_SIZES)
# Shapes differ at every run. Each needs its own source, compiled in about a second.
@settings(max_examples=2)
@given(data=st.data())
def test_a_kernel_gives_the_result_of_its_reference_at_any_shape(name, data):
    kernel = KERNELS[name]
    dtype = data.draw(st.sampled_from(kernel.dtypes), "dtype")
    sizes = data.draw(ANY_SIZES[name], "sizes")
    checked = data.draw(st.integers(0, 3), "checked") == 3
    seed = data.draw(st.integers(0, 2**16), "seed")
    executor = SimExecutor(checked=checked, seed=seed)
    result = check(kernel, dtype, sizes, executor.run)
    assert result.passed, str(result)


# A kernel of many tokens computes each as the kernel of one token does.
def identical(a: mx.array, b: mx.array) -> bool:
    return bool(np.array_equal(np.array(a.view(mx.uint8)), np.array(b.view(mx.uint8))))


# Apple's compiler may contract a * b + c: equal bits must not depend on that.
ANYHOW = [(mx.float16, "plain"), (mx.bfloat16, "plain")]
ANYHOW += [(mx.float32, numbers) for numbers in NUMBERS]


@pytest.mark.sampled
@pytest.mark.parametrize(("dtype", "numbers"), ANYHOW)
def test_tokens_together_give_the_bits_that_each_gives_alone(dtype, numbers):
    one, many = "dequant_matvec_8bit_v3", "dequant_matvec_8bit_v3_n_tokens"
    run = SimExecutor(checked=False, seed=1, numbers=numbers).run
    sizes: dict[str, Any] = {"i": 320, "o": 21, "g": 64, "s": 1}
    x, *matrix = KERNELS[many].arguments(dtype, **sizes, t=3)
    (together,) = run(KERNELS[many](x, *matrix))
    for token in range(3):
        (alone,) = run(KERNELS[one](x[token], *matrix))
        assert identical(alone, together[token])


@pytest.mark.sampled
@pytest.mark.parametrize("fold", [2, 4, 8])
@pytest.mark.parametrize(("dtype", "numbers"), ANYHOW[1:])
def test_folding_heads_changes_no_bit(fold, dtype, numbers):
    run = SimExecutor(checked=False, seed=1, numbers=numbers).run
    sizes = {"b": 2, "t": 5, "h": 2, "per": 8, "s": 37, "d": 64, "masks": 2}
    folded = KERNELS[f"sdpa_causal_direct_fold{fold}"]
    args = folded.arguments(dtype, **sizes)
    (alone,) = run(KERNELS["sdpa_causal_direct"](*args))
    (together,) = run(folded(*args))
    assert identical(alone, together)


# Ragged, and wide enough for the registers to matter.
WIDE: dict[str, dict[str, int]] = {
    "gated_delta_decode": dict(b=1, hk=1, hv=2, dk=256, dv=37, w=4, s=1),
    "sdpa_decode": dict(b=1, h=1, per=8, s=19, d=256, masks=1),
    "sdpa_decode_parts": dict(b=1, h=1, per=8, s=70, d=256, at=66),
}
# The launches measured on the H200: threads, and the part of the template that differs.
ON_CUDA = {
    "gated_delta_decode": (512, {"ROWS": 8, "SIMDGROUPS": 16}),
    "sdpa_decode": (256, {"FOLD": 8}),
    "sdpa_decode_parts": (256, {"FOLD": 4}),
}
FOLDS = (512, 512), (1024, 2048)
# Macs have fewer registers than CUDA's devices, so launches differ: (Metal's, CUDA's).
HELD = (8, 1024), (16, 2048)
LAUNCHES = [
    ("gated_delta_decode", linear_attention, "DECODE_SIMDGROUPS HELD_VALUES", HELD),
    ("sdpa_decode", attention, "FOLDED_CHANNELS DECODE_CHANNELS", FOLDS),
    ("sdpa_decode_parts", attention, "FOLDED_CHANNELS DECODE_CHANNELS", FOLDS),
]


@pytest.mark.sampled
@pytest.mark.parametrize(("name", "module", "constants", "values"), LAUNCHES)
def test_launches_on_macs_differ_from_cudas_and_give_the_same_bits(
    name, module, constants, values, monkeypatch
):
    kernel, launches, outputs = KERNELS[name], [], []
    for each in values:
        for constant, value in zip(constants.split(), each, strict=True):
            monkeypatch.setattr(module, constant, value)
        args = kernel.arguments(kernel.dtypes[0], **WIDE[name])
        launches.append(kernel(*args))
        outputs.append(SimExecutor(checked=False, seed=2).run(launches[-1]))
        checked = SimExecutor(checked=True, seed=3).run
        assert check(kernel, kernel.dtypes[0], WIDE[name], checked).passed
    metal, cuda = launches
    assert metal.threadgroup == (256, 1, 1)
    assert (cuda.threadgroup[0], cuda.template) == (
        ON_CUDA[name][0],
        {**metal.template, **ON_CUDA[name][1]},
    )
    assert cuda.template != metal.template
    for a, b in zip(*outputs, strict=True):
        assert identical(a, b)


# Three kernels of the gated delta rule, one recurrence.
DELTA_ARGS = tuple[mx.array, mx.array, mx.array, mx.array, int]


def delta(name: str, args: DELTA_ARGS) -> tuple[mx.array, mx.array]:
    """Return a kernel's state and rows for a sequence."""
    state, rows = SimExecutor(checked=False, seed=1).run(KERNELS[name](*args))
    return state, rows


def part(args: DELTA_ARGS, state: mx.array, begin: int, end: int) -> DELTA_ARGS:
    """Return the arguments of tokens ``begin`` to ``end``, from a state on."""
    qkv, _, g, beta, n_heads = args
    return qkv[begin:end], state, g[begin:end], beta[begin:end], n_heads


def close(found: mx.array, wanted: mx.array, limit: float) -> bool:
    return float(mx.abs(found - wanted).max()) <= limit * float(mx.abs(wanted).max())


@pytest.mark.slow
@pytest.mark.parametrize("strong", [0, 1])
def test_step_sequence_and_chunks_of_the_delta_rule_agree(strong):
    sizes = {"b": 1, "t": 512, "hk": 1, "hv": 2, "dk": 128, "dv": 16, "strong": strong}
    kernel = KERNELS["gated_delta_net_sequential"]
    args = kernel.arguments(mx.float32, **sizes)
    wanted = kernel.expected(*args)
    for found in (
        delta("gated_delta_net_sequential", args),
        delta("gated_delta_net_chunkwise", args),
    ):
        assert close(found[0], wanted[0], 1e-4)
        assert close(found[1], wanted[1], 1e-4)
    state, rows = args[1], []
    for token in range(64):
        state, row = delta("gated_delta_net_step", part(args, state, token, token + 1))
        rows.append(row)
    assert close(mx.concatenate(rows), wanted[1][:64], 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("split", [1, 15, 16, 17, 33])
def test_the_delta_rule_continues_from_its_state(split):
    sizes = {"b": 1, "t": 34, "hk": 1, "hv": 1, "dk": 64, "dv": 9}
    name = "gated_delta_net_chunkwise"
    args = KERNELS[name].arguments(mx.float32, **sizes)
    state, rows = delta(name, args)
    left, first = delta(name, part(args, args[1], 0, split))
    last, second = delta(name, part(args, left, split, 34))
    assert close(mx.concatenate([first, second]), rows, 1e-5)
    assert close(last, state, 1e-5)
