"""The simulator on mlx-lm's own kernels, as mlx-lm calls them."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import pytest

from moeflux_mlx.engine import simulator
from moeflux_mlx.engine.launch.check import relative_error
from moeflux_mlx.errors import SimulatorError

pytestmark = pytest.mark.skipif(
    not simulator.available(), reason="the simulator needs ziglang and pyelftools"
)
TYPES = [mx.float32, mx.bfloat16, mx.float16]
# The references round every step to the type of the activations.
LIMITS = {mx.float32: 2e-6, mx.bfloat16: 2e-2, mx.float16: 2e-3}
MODES = [(False, 0), (False, 1), (False, 2), (True, 0)]


class Simulated:
    """Replaces a kernel of MLX in mlx-lm, and runs it on the simulator."""

    mode = (False, 0)

    def __init__(self, kernel: Any):
        self._kernel = kernel

    def __call__(self, **options: Any) -> list[mx.array]:
        checked, seed = Simulated.mode
        return simulator.call(self._kernel, **options, checked=checked, seed=seed)


@pytest.fixture(scope="module")
def load() -> Iterator[Any]:
    """Import a module of mlx-lm anew, as on a Mac."""
    patch = pytest.MonkeyPatch()
    real = mx.fast.metal_kernel
    patch.setattr(mx.metal, "is_available", lambda: True)
    patch.setattr(mx.fast, "metal_kernel", lambda **k: Simulated(real(**k)))

    def import_anew(name: str) -> Any:
        spec = importlib.util.find_spec(f"mlx_lm.models.{name}")
        assert spec and spec.loader
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    modules = {name: import_anew(name) for name in ("gated_delta", "ssm")}
    patch.undo()
    yield modules.__getitem__


def noise(seed: int, *shape: int, scale: float = 1.0) -> mx.array:
    return scale * mx.random.normal(shape, key=mx.random.key(seed))


def delta_inputs(dtype: mx.Dtype, dk: int, *, vectorised: bool) -> list[mx.array]:
    b, t, hk, hv, dv = 2, 5, 1, 2, 16
    q, k = (noise(i, b, t, hk, dk, scale=dk**-0.5).astype(dtype) for i in (1, 2))
    v = noise(3, b, t, hv, dv).astype(dtype)
    shape = (b, t, hv, dk) if vectorised else (b, t, hv)
    g = mx.sigmoid(noise(4, *shape) + 2)
    beta = mx.sigmoid(noise(5, b, t, hv)).astype(dtype)
    return [q, k, v, g, beta, noise(6, b, hv, dv, dk, scale=0.3)]


VARIANTS = {
    "plain": ("gated_delta_kernel_unpacked", 64, False, False),
    "masked": ("gated_delta_kernel_unpacked", 64, False, True),
    "vectorised": ("gated_delta_kernel_unpacked", 32, True, False),
    "vectorised-masked": ("gated_delta_kernel_unpacked", 32, True, True),
    "tree": ("gated_delta_kernel_xtree", 128, False, False),
    "packed": ("gated_delta_kernel", 128, False, False),
}


@pytest.mark.sampled
@pytest.mark.parametrize(("checked", "seed"), MODES, ids=["0", "1", "2", "checked"])
@pytest.mark.parametrize("dtype", TYPES, ids=["f32", "bf16", "f16"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_gated_delta_kernels_equal_mlx_lms_operations(
    variant, dtype, checked, seed, load, monkeypatch
):
    monkeypatch.setattr(Simulated, "mode", (checked, seed))
    module = load("gated_delta")
    name, dk, vectorised, masked = VARIANTS[variant]
    inputs = delta_inputs(dtype, dk, vectorised=vectorised)
    mask = mx.array([[1, 1, 0, 1, 1], [0, 1, 1, 1, 0]], mx.bool_) if masked else None
    if masked and checked:
        # Every lane writes the same zero for a masked token: harmless, but a race.
        with pytest.raises(SimulatorError, match=r"race: .* writes .* \(buffer 'y'"):
            getattr(module, name)(*inputs, mask=mask)
        return
    y, state = getattr(module, name)(*inputs, mask=mask)
    wide = [x.astype(mx.float32) for x in inputs]
    want_y, want_state = module.gated_delta_ops(*wide, mask=mask)
    if mask is not None:  # A masked token's output is undefined.
        y, want_y = (mx.where(mask[..., None, None], x, 0) for x in (y, want_y))
    assert relative_error(y, want_y.astype(y.dtype)) <= LIMITS[dtype]
    assert relative_error(state, want_state) <= LIMITS[dtype]


def test_the_packed_kernel_gives_the_bits_of_the_explicit_tree(load):
    """mlx-lm promises this; it holds here because contraction is off."""
    module = load("gated_delta")
    inputs = delta_inputs(mx.float32, 128, vectorised=False)
    packed = module.gated_delta_kernel(*inputs)
    tree = module.gated_delta_kernel_xtree(*inputs)
    for a, b in zip(packed, tree, strict=True):
        assert mx.array_equal(a, b)


@pytest.mark.parametrize(("checked", "seed"), MODES, ids=["0", "1", "2", "checked"])
@pytest.mark.parametrize("dtype", TYPES, ids=["f32", "bf16", "f16"])
def test_the_state_space_kernel_equals_mlx_lms_operations(
    dtype, checked, seed, load, monkeypatch
):
    monkeypatch.setattr(Simulated, "mode", (checked, seed))
    module = load("ssm")
    b, heads, groups, width, states = 2, 4, 2, 16, 32
    x = noise(1, b, 1, heads, width).astype(dtype)
    a_log, d = noise(2, heads).astype(dtype), noise(3, heads).astype(dtype)
    key, query = (noise(i, b, 1, groups, states).astype(dtype) for i in (4, 5))
    dt, bias = noise(6, b, 1, heads).astype(dtype), noise(7, heads).astype(dtype)
    state = noise(8, b, heads, width, states)
    arguments = (x, a_log, key, query, d, dt, bias, state)
    y, new_state = module.ssm_update_kernel(*arguments, (0.001, 100.0))
    wide = [v.astype(mx.float32) for v in arguments]
    want_y, want_state = module.ssm_attn(
        *wide[:7], state=wide[7], time_step_limit=(0.001, 100.0)
    )
    assert relative_error(y, want_y.astype(y.dtype)) <= LIMITS[dtype]
    assert relative_error(new_state, want_state) <= LIMITS[dtype]
