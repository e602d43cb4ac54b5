"""The estimate of registers is near published figures, and launches fit it."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path

import mlx.core as mx
import pytest

from moeflux_mlx import device
from moeflux_mlx.device import MAX_REGISTERS, THREADGROUP_REGISTERS
from moeflux_mlx.engine import simulator
from moeflux_mlx.engine.executors.registers import (
    fits,
    n_threads,
    registers,
)
from moeflux_mlx.engine.launch import KERNELS
from moeflux_mlx.engine.simulator.registers import estimate

ROOT = Path(__file__).resolve().parent.parent
MLX = Path(mx.__file__).parent / "include" / "mlx" / "backend" / "metal" / "kernels"
simulated = pytest.mark.skipif(
    not simulator.available(), reason="the simulator needs ziglang and pyelftools"
)


@pytest.fixture(scope="module")
def tool():
    sys.path.insert(0, str(ROOT / "scripts"))
    yield importlib.import_module("kernel_registers")
    sys.path.remove(str(ROOT / "scripts"))


def published() -> list:
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        widths = importlib.import_module("kernel_registers").PUBLISHED
    finally:
        sys.path.remove(str(ROOT / "scripts"))
    return [
        pytest.param(name, sizes, id=f"{name}-{'x'.join(map(str, sizes.values()))}")
        for name, each in widths.items()
        for sizes in each
    ]


@simulated
@pytest.mark.skipif(not (MLX / "sdpa_vector.h").exists(), reason="MLX came without it")
@pytest.mark.parametrize(("width", "allowed"), [(256, 1024), (512, 832)])
def test_the_estimate_is_near_the_limits_of_a_mac_for_mlxs_kernels(width, allowed):
    """An M1 runs MLX's attention of one token with 1024 threads at 256, 832 at 512."""
    text = (MLX / "sdpa_vector.h").read_text()
    constant = r"constant (bool|int) (\w+) \[\[function_constant\(\d+\)\]\];"
    text = re.sub(constant, r"constexpr constant \1 \2 = 0;", text)
    text = re.sub(r",\s*function_constant\(\w+\)", "", text).replace("thread U", "U")
    limits = (
        "template <typename T> struct Limits "
        "{ static constexpr constant T finite_min = -3.4e38f; };\n"
    )
    made = f"sdpa_vector<half, {width}, {width}>"
    line = f'template [[host_name("k")]] [[kernel]] decltype({made}) {made};\n'
    found = THREADGROUP_REGISTERS // estimate(limits + text + line, 1024)
    if allowed == 1024:
        assert found >= 1024
    else:
        assert abs(found - allowed) <= 0.1 * allowed


@pytest.mark.sampled
@simulated
@pytest.mark.parametrize(("name", "sizes"), published())
def test_a_launch_of_a_published_width_fits_the_registers_of_m1(name, sizes):
    launch = KERNELS[name](*KERNELS[name].arguments(mx.bfloat16, **sizes))
    n = registers(launch)
    assert fits(launch, n), f"{n_threads(launch)} threads of {n} registers"


@pytest.mark.slow
def test_a_launch_of_many_threads_has_an_estimate(tool):
    """Up to 384 threads fit with any registers; larger launches need an estimate."""
    assert 384 * MAX_REGISTERS <= THREADGROUP_REGISTERS

    def many(kernel, dtype, sizes) -> list:
        launch = kernel(*kernel.arguments(dtype, **sizes))
        if n_threads(launch) <= 384:
            return []
        return [(kernel.name, tuple(launch.template.items()), launch.threadgroup)]

    looked_at = {
        form
        for name, each in tool.PUBLISHED.items()
        for sizes in each
        for form in many(KERNELS[name], mx.bfloat16, sizes)
    }
    found = {
        form
        for kernel in KERNELS.values()
        for sizes in kernel.sizes
        for form in many(kernel, kernel.dtypes[0], sizes)
    }
    assert found and found <= looked_at


@pytest.mark.sampled
@pytest.mark.parametrize(("name", "sizes"), published())
def test_a_template_that_a_published_width_reaches_stands_in_a_sample(name, sizes):
    """The doctor and the tests try the templates that models run."""
    kernel = KERNELS[name]

    def template(dtype, each) -> dict:
        return dict(kernel(*kernel.arguments(dtype, **each)).template)

    reached = template(mx.bfloat16, sizes)
    assert reached in [template(kernel.dtypes[0], each) for each in kernel.sizes]


def test_on_a_mac_no_launch_counts_on_the_registers_of_cuda(monkeypatch):
    assert not device.has_many_registers()
    monkeypatch.setattr(mx.cuda, "is_available", lambda: True)
    assert device.has_many_registers()
