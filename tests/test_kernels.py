"""Compare every registered kernel with its reference on the simulator."""

from __future__ import annotations

import re

import mlx.core as mx
import numpy as np
import pytest

from moeflux_mlx.engine import simulator
from moeflux_mlx.engine.executors.kernels import metal_kernel
from moeflux_mlx.engine.executors.sim import SimExecutor
from moeflux_mlx.engine.launch import KERNELS, elementwise, prepare, quant
from moeflux_mlx.engine.launch.check import check, relative_error
from moeflux_mlx.engine.launch.prepared import Prepared
from moeflux_mlx.engine.metal import Input, library

pytestmark = pytest.mark.skipif(
    not simulator.available(), reason="the simulator needs ziglang and pyelftools"
)
N_SEEDS = 3
# Each size has one type, in turn. All sizes in all types are in the record that
# `moeflux doctor` makes; a test checks that the record matches these kernels.
CASES = [
    pytest.param(
        *(kernel, dtype, sizes),
        id=f"{kernel.name}-{str(dtype)[9:]}-{i}",
        marks=[pytest.mark.slow] if i or j else [],
    )
    for kernel in KERNELS.values()
    for j, dtype in enumerate(kernel.dtypes)
    for i, sizes in enumerate(kernel.sizes)
    if (i + j) % len(kernel.dtypes) == 0
]
# Checked mode is about 20 times slower, so it runs a kernel's smaller sizes.
SMALL = [
    pytest.param(
        kernel, sizes, id=f"{kernel.name}-{i}", marks=[pytest.mark.slow] if i else []
    )
    for kernel in KERNELS.values()
    for i, sizes in enumerate(kernel.sizes[: -(-len(kernel.sizes) // 2)])
]


@pytest.mark.parametrize(("kernel", "dtype", "sizes"), CASES)
def test_a_kernel_gives_the_result_of_its_reference_in_any_schedule(
    kernel, dtype, sizes
):
    for seed in range(N_SEEDS):
        executor = SimExecutor(checked=False, seed=seed)
        result = check(kernel, dtype, sizes, executor.run)
        assert result.passed, str(result)


@pytest.mark.parametrize(("kernel", "sizes"), SMALL)
def test_a_kernel_has_no_race_and_touches_only_its_own_memory(kernel, sizes):
    executor = SimExecutor(checked=True)
    result = check(kernel, kernel.dtypes[0], sizes, executor.run)
    assert result.passed, str(result)


@pytest.mark.parametrize(
    ("o", "factor", "passes"),
    [(1, 1 + 2**-7, True), (1, 1.05, False), (35, 1 + 2**-7, False)],
)
def test_only_few_values_may_all_be_rounded_the_other_way(o, factor, passes):
    kernel = KERNELS["norm_gate_up_swiglu"]

    def run(launch):
        (out,) = SimExecutor(checked=False).run(launch)
        return ((out.astype(mx.float32) * factor).astype(out.dtype),)

    sizes = next(each for each in kernel.sizes if each["o"] == o)
    assert check(kernel, mx.bfloat16, sizes, run).passed == passes


# Functions that Apple's compiler replaces by less exact ones.
INEXACT = re.compile(r"(?<!precise::)\b(?:exp2?|log2?|r?sqrt)\(")


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16, mx.float32], ids=str)
def test_a_swiglu_with_its_products_has_the_bits_of_one_after_them(dtype):
    run, kernel = SimExecutor(checked=False).run, KERNELS["norm_gate_up_swiglu"]
    for sizes in kernel.sizes[2:5]:
        x, norm, *matrix, eps, bits, group = kernel.arguments(dtype, **sizes)
        (row,) = run(quant.norm_matvecs(x, norm, [(*matrix, bits)], eps, group))
        both = row.reshape(-1)[: 2 * sizes["o"]].reshape(2, 1, -1)
        (apart,) = run(elementwise.swiglu_fused_batched(*both))
        (got,) = run(quant.norm_gate_up_swiglu(x, norm, *matrix, eps, bits, group))
        assert got.dtype == dtype and mx.array_equal(got.reshape(1, -1), apart)


def calls_inexact(kernel) -> bool:
    kernels = library()
    text = kernels.header(kernel.metal, lines=False)
    return bool(INEXACT.search(text + kernels.body(kernel.metal, lines=False)))


@pytest.mark.sampled
@pytest.mark.parametrize("name", [k.name for k in KERNELS.values() if calls_inexact(k)])
def test_a_kernel_is_right_with_functions_as_inexact_as_apples(name):
    kernel = KERNELS[name]
    executor = SimExecutor(checked=False, numbers="fast")
    middle = kernel.sizes[len(kernel.sizes) // 2]
    result = check(kernel, kernel.dtypes[0], middle, executor.run)
    assert result.passed, str(result)


def test_every_metal_function_is_registered_and_every_registration_has_one():
    assert set(KERNELS) == set(library().kernels)


def test_nan_in_an_output_is_an_infinite_error():
    assert relative_error(mx.array([np.nan, 1.0]), mx.array([0.0, 1.0])) == np.inf


def in_constant_memory(ready: Prepared, names: set[str]) -> str:
    """Return the source that MLX writes when these inputs have few elements."""
    arrays = [
        mx.zeros(1 if p.name in names else 8, x.dtype) if isinstance(p, Input) else x
        for p, x in zip(ready.instance.inputs, ready.inputs, strict=True)
    ]
    kernel = metal_kernel(ready.instance, lines=True)
    return simulator.written_source(kernel, arrays, ready.options)


@pytest.mark.sampled
@pytest.mark.parametrize("name", KERNELS)
def test_any_input_may_lie_in_constant_memory(name):
    """MLX puts inputs of fewer than 8 elements there: try each alone, and all."""
    kernel = KERNELS[name]
    ready = prepare(kernel(*kernel.arguments(kernel.dtypes[-1], **kernel.sizes[-1])))
    names = [p.name for p in ready.instance.inputs if isinstance(p, Input)]
    for chosen in {frozenset(names), *(frozenset([n]) for n in names)}:
        source = in_constant_memory(ready, set(chosen))
        for n in chosen:
            assert re.search(rf"const constant \w+\* {n} \[\[buffer", source)
        simulator.examine(source)
