"""Kernel instances: the source of each, and their number."""

from __future__ import annotations

import re

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import make_prompt_cache

import moeflux_mlx
from moeflux_mlx.engine import simulator
from moeflux_mlx.engine.executors.kernels import metal_kernel
from moeflux_mlx.engine.executors.sim import SimExecutor
from moeflux_mlx.engine.launch import KERNELS, Launch, prepare, prepared
from moeflux_mlx.engine.metal import Instance, Library, cuda
from moeflux_mlx.engine.metal.library import HEADER
from moeflux_mlx.errors import SimulatorError
from moeflux_mlx.experts.weights import Records
from moeflux_mlx.proof import lint

simulated = pytest.mark.skipif(
    not simulator.available(), reason="the simulator needs ziglang and pyelftools"
)
METAL = """
template <typename T, int N, bool HAS_GATE>
[[kernel]] void gated(
    device const T* x,
    device const T* gate,
    constant uint& n,
    constant int& shift,
    constant float& scale,
    device T* y,
    uint i [[thread_position_in_grid]]) {
  float opened = 1.0f;
  if (HAS_GATE) {
    opened = float(gate[i]);
  }
  y[i] = T(opened * scale * float(x[(i + uint(shift)) % n]));
}
"""
VALUES = {
    "T": mx.bfloat16,
    "N": 4,
    "HAS_GATE": False,
    "gate": None,
    "n": 2**32 - 1,
    "shift": -3,
    "scale": 0.1,
}


@pytest.fixture
def gated(tmp_path):
    """Return a library of one kernel."""
    (tmp_path / HEADER).write_text("")
    (tmp_path / "some.metal").write_text(METAL)
    return Library(tmp_path)


def written(instance: Instance, launch: Launch) -> str:
    ready = prepare(launch)
    kernel = metal_kernel(instance, lines=True)
    return simulator.written_source(kernel, ready.inputs, ready.options)


# The source.
def test_metal_has_values_as_definitions_before_the_body(gated):
    kernel = gated["gated"]
    assert gated.body(kernel, VALUES).split("{\n")[0] == (
        "using T = bfloat16_t;\n"
        "constexpr int N = 4;\n"
        "constexpr bool HAS_GATE = false;\n"
        "const device T* gate = nullptr;\n"
        "constexpr uint n = 4294967295;\n"
        "constexpr int shift = -3;\n"
        "const float scale = as_type<float>(0x3dcccccdu);\n"
        "const uint i = thread_position_in_grid.x;\n"
    )
    assert [p.name for p in Instance(kernel, VALUES).inputs] == ["x"]


def test_cuda_has_values_as_arguments(gated):
    kernel = gated["gated"]
    assert cuda.body(Instance(kernel, VALUES)) == (
        "msl::gated<msl::bfloat, 4, false>(x, nullptr, msl::uint(4294967295), "
        "msl::int(-3), msl::as_type<float>(0x3dcccccdu), y, "
        "msl::thread_position_in_grid().x);"
    )
    some = {name: VALUES[name] for name in ("T", "N", "HAS_GATE", "shift")}
    assert cuda.body(Instance(kernel, some)) == (
        "msl::gated<msl::bfloat, 4, false>(x, gate, *n, msl::int(-3), *scale, y, "
        "msl::thread_position_in_grid().x);"
    )


@simulated
@pytest.mark.parametrize("name", KERNELS)
def test_source_for_metal_passes_the_lint_and_has_no_template(name):
    kernel = KERNELS[name]
    dtype = mx.bfloat16 if mx.bfloat16 in kernel.dtypes else kernel.dtypes[0]
    launch = kernel(*kernel.arguments(dtype, **kernel.sizes[0]))
    source = written(prepare(launch).instance, launch)
    head = source[source.index("[[kernel]] void custom_kernel") :]
    assert "host_name" not in head
    bound = re.findall(r"(\w+) \[\[buffer\(\d+\)\]\]", head)
    instance = prepare(launch).instance
    assert bound == [p.name for p in (*instance.inputs, *kernel.metal.outputs)]
    assert not set(bound) & kernel.fixed
    assert lint.check(source) == []


def test_every_instance_has_a_name_of_its_own():
    kernel = KERNELS["rms_norm_sum_sq"]
    names = set()
    for width in (8, 9, 10):
        launch = kernel(mx.ones((2, width)))
        source = written(prepare(launch).instance, launch)
        names.add(
            re.search(r"void (custom_kernel_moeflux_rms_norm_sum_sq_\w+)", source)[1]
        )
        again = prepare(kernel(mx.ones((5, width)))).instance
        assert metal_kernel(again, lines=True) is metal_kernel(
            prepare(launch).instance, lines=True
        )
    assert len(names) == 3


# Absent inputs.
def arrays(given):
    """Yield the arrays in a launch's arguments, also inside records and matrices."""
    if isinstance(given, mx.array | Records):
        yield getattr(given, "array", given)
    elif isinstance(given, tuple | list):
        for each in given:
            yield from arrays(each)


def test_no_launch_makes_an_array_for_an_absent_input(monkeypatch):
    cases = [
        (kernel, kernel.arguments(kernel.dtypes[0], **sizes))
        for kernel in KERNELS.values()
        if any(name.startswith("HAS_") for name in kernel.metal.values)
        for sizes in kernel.sizes
    ]

    def refuse(*args, **options):
        raise AssertionError("an array was made")

    for name in ("zeros", "zeros_like", "full", "ones", "arange", "broadcast_to"):
        monkeypatch.setattr(mx, name, refuse)
    absent = set()
    for kernel, arguments in cases:
        ready = prepare(kernel(*arguments))
        values = ready.instance.values
        absent |= {(kernel.name, n) for n, v in values.items() if v is None}
        given = {id(x) for x in arrays(arguments)}
        bound = {
            id(x)
            for p, x in zip(ready.instance.inputs, ready.inputs, strict=True)
            if p.name not in ready.numbers
        }
        assert bound <= given
    # Each is absent in some sample, which runs in checked mode.
    optional = {
        (kernel.name, p.name)
        for kernel in KERNELS.values()
        for p in kernel.metal.inputs
        if f"HAS_{p.name.upper()}" in kernel.metal.values
    }
    assert absent == optional and len(optional) > 10


@simulated
@pytest.mark.parametrize("checked", [False, True], ids=["fast", "checked"])
def test_a_read_of_an_absent_input_is_found(gated, monkeypatch, checked):
    def launch(gate):
        inputs = {"x": mx.arange(8.0), "gate": gate, "n": 8, "shift": 1, "scale": 2.0}
        template = {"N": 1, "HAS_GATE": int(gate is not None)}
        size = (8, 1, 1)
        return Launch("gated", inputs, {"y": (8,)}, size, size, template)

    def run(found, gate=None):
        for module in (prepared, moeflux_mlx.engine.executors.kernels):
            monkeypatch.setattr(module, "library", lambda: found)
        (y,) = SimExecutor(checked=checked).run(launch(gate))
        return np.array(y).tolist()

    shifted = [2.0 * ((i + 1) % 8) for i in range(8)]
    assert run(gated) == shifted
    assert run(gated, mx.full(8, 0.5)) == [0.5 * y for y in shifted]
    path = gated.folder / "some.metal"
    path.write_text(METAL.replace("if (HAS_GATE)", "if (x[i] > 3.0f)"))
    line = 1 + path.read_text().split("\n").index("    opened = float(gate[i]);")
    with pytest.raises(SimulatorError, match=rf"some\.metal:{line} thread"):
        run(Library(gated.folder))


# The number of instances.
@pytest.mark.slow
@simulated
def test_tokens_and_prompts_of_other_lengths_need_no_other_source(checkpoint):
    model = moeflux_mlx.load(checkpoint, executor="sim")[0]
    executor = model.runtime.executor
    tokens = mx.array([[5, 9, 300, 17, 4, 8, 2, 11, 7]])

    def call(*lengths: int) -> set[Instance]:
        cache, at = make_prompt_cache(model), 0
        for n in lengths:
            mx.eval(model(tokens[:, at : at + n], cache=cache))
            at += n
        return set(executor.instances)

    first = call(4, 1)
    assert len(first) > 10
    assert call(7, 1, 1) == first
