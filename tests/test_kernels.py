"""Every registered kernel against its reference, on the simulator."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from moeflux_mlx import simulator
from moeflux_mlx.executors.sim import SimExecutor
from moeflux_mlx.launch import KERNELS
from moeflux_mlx.launch.check import check, relative_error

pytestmark = pytest.mark.skipif(
    not simulator.available(), reason="the simulator needs ziglang and pyelftools"
)
N_SEEDS = 3
# Checked mode is some 20 times slower: the smaller half of a kernel's sizes.
CASES = [
    pytest.param(kernel, dtype, sizes, id=f"{kernel.name}-{str(dtype)[9:]}-{i}")
    for kernel in KERNELS.values()
    for dtype in kernel.dtypes
    for i, sizes in enumerate(kernel.sizes)
]
SMALL = [
    pytest.param(kernel, sizes, id=f"{kernel.name}-{i}")
    for kernel in KERNELS.values()
    for i, sizes in enumerate(kernel.sizes[: -(-len(kernel.sizes) // 2)])
]


@pytest.mark.parametrize(("kernel", "dtype", "sizes"), CASES)
def test_a_kernel_gives_what_its_reference_gives_in_any_schedule(kernel, dtype, sizes):
    for seed in range(N_SEEDS):
        executor = SimExecutor(checked=False, seed=seed)
        result = check(kernel, dtype, sizes, executor.run)
        assert result.passed, str(result)


@pytest.mark.parametrize(("kernel", "sizes"), SMALL)
def test_a_kernel_has_no_race_and_touches_only_its_own_memory(kernel, sizes):
    executor = SimExecutor(checked=True)
    result = check(kernel, kernel.dtypes[0], sizes, executor.run)
    assert result.passed, str(result)


def test_every_metal_function_is_registered_and_every_registration_has_one():
    from moeflux_mlx.metal import library

    assert set(KERNELS) == set(library().kernels)


def test_not_a_number_in_an_output_is_an_infinite_error():
    assert relative_error(mx.array([np.nan, 1.0]), mx.array([0.0, 1.0])) == np.inf
