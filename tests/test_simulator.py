"""The simulator: programs, grids, schedules, its standard library, MLX's source."""

# Kernels stand on one line here.
# ruff: noqa: E501

from __future__ import annotations

import functools
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from moeflux_mlx.engine import simulator
from moeflux_mlx.engine.metal.library import kernels_folder
from moeflux_mlx.errors import SimulatorError

pytestmark = pytest.mark.skipif(
    not simulator.available(), reason="the simulator needs ziglang and pyelftools"
)
HEAD = "#include <metal_stdlib>\nusing namespace metal;\n"
IDS = """kernel void k(device uint* y, uint3 g [[thread_position_in_grid]],
  uint3 in [[thread_position_in_threadgroup]], uint3 at [[threadgroup_position_in_grid]],
  uint3 size [[threads_per_threadgroup]], uint3 grid [[threads_per_grid]],
  uint3 n [[threadgroups_per_grid]], uint i [[thread_index_in_threadgroup]],
  uint lane [[thread_index_in_simdgroup]], uint sg [[simdgroup_index_in_threadgroup]],
  uint w [[threads_per_simdgroup]], uint nsg [[simdgroups_per_threadgroup]]) {
  device uint* row = y + 20 * (g.x + grid.x * (g.y + grid.y * g.z));
  uint all[20] = {g.x, g.y, g.z, in.x, in.y, in.z, at.x, at.y, at.z, size.x, size.y,
    size.z, n.x, n.y, n.z, i, lane, sg, w, nsg};
  for (int j = 0; j < 20; ++j) row[j] = all[j];
}"""


TYPES = {"f4": "float", "u4": "uint"}


@functools.cache
def program_of(
    expressions: tuple[str, ...], inputs: str, out: str
) -> simulator.Program:
    """Compile one kernel for each expression of ``a``, ``b`` and the lane ``i``."""
    names = [f"device const {TYPES[t]}* {n}" for t, n in zip(inputs.split(), "ab")]  # noqa: B905
    head = ", ".join([*names, f"device {TYPES[out]}* out"])
    kernels = [
        f"kernel void k{n}({head}, uint i [[thread_position_in_grid]]) "
        f"{{ out[i] = {e}; }}\n"
        for n, e in enumerate(expressions)
    ]
    return simulator.Program(HEAD + "".join(kernels))


def lanes(expression: str, table, *inputs: np.ndarray, out="f4", seed: int = 0):
    """Run one of the table's expressions in one simdgroup."""
    kinds = " ".join(x.dtype.str[1:] for x in inputs)
    program = program_of(tuple(table), kinds, out)
    result = np.zeros(32, out)
    name = f"k{list(table).index(expression)}"
    program.run(name, [*inputs, result], (32, 1, 1), (32, 1, 1), seed=seed)
    return result


RNG = np.random.default_rng(0)
X = RNG.uniform(0.1, 3, 32).astype(np.float32)
Y = RNG.uniform(-3, 3, 32).astype(np.float32)
U = RNG.integers(1, 1 << 31, 32).astype(np.uint32)


# Grids and schedules.
@pytest.mark.parametrize("seed", [0, 1, 7])
@pytest.mark.parametrize(
    ("grid", "group"), [((70, 1, 1), (32, 1, 1)), ((5, 3, 2), (2, 2, 2)), ((9, 4, 1), (4, 4, 1))]
)  # fmt: skip
def test_every_thread_runs_once_and_knows_where_it_is(grid, group, seed):
    y = np.full((*grid[::-1], 20), 0xFFFFFFFF, np.uint32)
    simulator.Program(HEAD + IDS).run("k", [y], grid, group, seed=seed)
    z, yy, x = np.indices(grid[::-1])
    position = np.stack([x, yy, z], -1)
    assert np.array_equal(y[..., 0:3], position)
    assert np.array_equal(y[..., 3:6], position % group)
    assert np.array_equal(y[..., 6:9], position // group)
    size = np.minimum(group, np.array(grid) - position // group * group)
    assert np.array_equal(y[..., 9:12], size)
    assert (y[..., 12:15] == -(-np.array(grid) // group)).all()
    inside = position % group
    index = inside[..., 0] + size[..., 0] * (
        inside[..., 1] + size[..., 1] * inside[..., 2]
    )
    assert np.array_equal(y[..., 15], index)
    assert np.array_equal(y[..., 16], index % 32)
    assert np.array_equal(y[..., 17], index // 32)
    assert (y[..., 18] == 32).all()
    assert np.array_equal(y[..., 19], -(-size.prod(-1) // 32))


def test_a_seed_changes_the_order_of_threads_and_zero_does_not():
    source = (
        HEAD
        + """kernel void k(device atomic_uint* turn, device uint* y,
      uint i [[thread_position_in_grid]]) {
      y[i] = atomic_fetch_add_explicit(&turn[0], 1u, memory_order_relaxed);
    }"""
    )
    program = simulator.Program(source)

    def order(seed: int) -> list[int]:
        y = np.zeros(128, np.uint32)
        program.run(
            "k", [np.zeros(1, np.uint32), y], (128, 1, 1), (32, 1, 1), seed=seed
        )
        return y.tolist()

    assert order(0) == list(range(128))
    assert sorted(order(1)) == list(range(128))
    assert order(1) != order(0) and order(1) != order(2)
    assert order(2) == order(2)


# The standard library against NumPy.
UNARY = {
    "exp": np.exp, "exp2": np.exp2, "log": np.log, "log2": np.log2, "sqrt": np.sqrt,
    "rsqrt": lambda x: 1 / np.sqrt(x), "sin": np.sin, "cos": np.cos, "tanh": np.tanh,
    "floor": np.floor, "ceil": np.ceil, "rint": np.rint, "trunc": np.trunc,
    "fabs": np.abs, "abs": np.abs, "sign": np.sign, "fract": lambda x: x - np.floor(x),
    "saturate": lambda x: np.clip(x, 0, 1), "precise::exp": np.exp, "fast::exp": np.exp,
    "asinh": np.arcsinh,
}  # fmt: skip


@pytest.mark.parametrize("name", UNARY)
def test_functions_of_one_float(name):
    got = lanes(f"{name}(a[i])", [f"{n}(a[i])" for n in UNARY], X)
    np.testing.assert_allclose(got, UNARY[name](X), rtol=3e-6, atol=1e-6)


BINARY = {
    "min": np.minimum, "max": np.maximum, "fmin": np.minimum, "fmax": np.maximum,
    "pow": np.power, "fmod": np.fmod, "atan2": np.arctan2, "copysign": np.copysign,
}  # fmt: skip


@pytest.mark.parametrize("name", BINARY)
def test_functions_of_two_floats(name):
    got = lanes(f"{name}(a[i], b[i])", [f"{n}(a[i], b[i])" for n in BINARY], X, Y)
    np.testing.assert_allclose(got, BINARY[name](X, Y), rtol=3e-6)


INTEGER = {
    "popcount(a[i])": [bin(u).count("1") for u in U.tolist()],
    "clz(a[i])": [32 - u.bit_length() for u in U.tolist()],
    "ctz(a[i])": [(u & -u).bit_length() - 1 for u in U.tolist()],
    "reverse_bits(a[i])": [int(f"{u:032b}"[::-1], 2) for u in U.tolist()],
    "mulhi(a[i], a[i])": [u * u >> 32 for u in U.tolist()],
    "extract_bits(a[i], 3u, 5u)": [(u >> 3) & 31 for u in U.tolist()],
    "as_type<uint>(as_type<float>(a[i]))": U.tolist(),
    "clamp(a[i], 5u, 1000u)": np.clip(U, 5, 1000).tolist(),
    "select(1u, 2u, a[i] % 2 == 0)": np.where(U % 2 == 0, 2, 1).tolist(),
    "uint(uchar(a[i]))": (U & 255).tolist(),
}


@pytest.mark.parametrize("expression", INTEGER)
def test_functions_of_integers(expression):
    got = lanes(expression, INTEGER, U, out="u4")
    assert got.tolist() == INTEGER[expression]


PARTS = {
    "ldexp(a[i], 3)": np.ldexp(X, 3),
    "({ int p; float x = frexp(a[i], p); x * 8.0f + float(p); })": np.frexp(X)[0] * 8
    + np.frexp(X)[1],
    "({ float n; float x = modf(b[i], n); x + 8.0f * n; })": np.modf(Y)[0]
    + 8 * np.modf(Y)[1],
    "({ float c; float x = sincos(b[i], c); x + 2.0f * c; })": np.sin(Y)
    + 2 * np.cos(Y),
    "float(0.5h)": np.full_like(X, 0.5),
}


@pytest.mark.parametrize("expression", PARTS)
def test_functions_that_part_a_value(expression):
    got = lanes(expression, PARTS, X, Y)
    np.testing.assert_allclose(got, PARTS[expression], rtol=3e-6)


VECTORS = {
    "float4(a[i]).z": X,
    "float4(a[i], float2(b[i], 1.0f), 2.0f).y": Y,
    "float3(float2(a[i], b[i]).yx, 0.0f).x": Y,
    "dot(float4(a[i], b[i], 1.0f, 0.0f), float4(b[i], a[i], 3.0f, 9.0f))": 2 * X * Y
    + 3,
    "float4(int4(a[i])).x": np.trunc(X),
    "(float4(a[i]) * 2.0f + float4(b[i])).w": 2 * X + Y,
    "fma(float2(a[i]), float2(b[i]), float2(1.0f)).y": X * Y + 1,
    "max(float2(a[i]), float2(b[i])).x": np.maximum(X, Y),
    "length(float2(a[i], b[i]))": np.hypot(X, Y),
    "float(half4(float4(a[i])).x)": X.astype(np.float16).astype(np.float32),
    "as_type<float>(as_type<uint4>(float4(a[i])).x)": X,
    "any(float2(a[i], b[i]) < 0.0f) ? 1.0f : 0.0f": (Y < 0).astype(np.float32),
    "clamp(float2(b[i]), 0.0f, 1.0f).x": np.clip(Y, 0, 1),
}


@pytest.mark.parametrize("expression", VECTORS)
def test_vectors(expression):
    got = lanes(expression, VECTORS, X, Y)
    np.testing.assert_allclose(got, VECTORS[expression], rtol=1e-6)


def test_an_unsuffixed_literal_is_a_float_as_in_metal():
    expression = "(0.1 + a[i]) == (0.1f + a[i]) ? sizeof(0.1) : 0"
    got = lanes(expression, [expression], X)
    assert (got == 4).all()


def test_bfloat_rounds_to_nearest_even():
    got = lanes("float(bfloat(a[i]))", ["float(bfloat(a[i]))"], X)
    want = np.array(mx.array(X).astype(mx.bfloat16).astype(mx.float32))
    assert np.array_equal(got, want)


# Simdgroup operations.
SIMD = {
    "simd_sum(a[i])": np.full(32, X.sum()),
    "simd_max(a[i])": np.full(32, X.max()),
    "simd_min(a[i])": np.full(32, X.min()),
    "simd_product(a[i])": np.full(32, X.prod()),
    "simd_prefix_inclusive_sum(a[i])": np.cumsum(X),
    "simd_prefix_exclusive_sum(a[i])": np.cumsum(X) - X,
    "simd_shuffle(a[i], (i + 5) % 32)": np.roll(X, -5),
    "simd_shuffle_xor(a[i], 3)": X[np.arange(32) ^ 3],
    "simd_shuffle_down(a[i], 4)": np.concatenate([X[4:], X[28:]]),
    "simd_shuffle_up(a[i], 4)": np.concatenate([X[:4], X[:28]]),
    "simd_broadcast(a[i], 7)": np.full(32, X[7]),
    "simd_broadcast_first(a[i])": np.full(32, X[0]),
    "quad_sum(a[i])": np.repeat(X.reshape(8, 4).sum(1), 4),
    "quad_shuffle_xor(a[i], 1)": X[np.arange(32) ^ 1],
    "float(ulong(simd_ballot(a[i] > 1.0f)) >> 8 & 0xff)": np.full(
        32, sum(1 << j for j in range(8) if X[8 + j] > 1)
    ),
    "simd_any(a[i] > 2.9f) ? 1.0f : 0.0f": np.full(32, float((X > 2.9).any())),
    "simd_all(a[i] > 0.0f) ? 1.0f : 0.0f": np.ones(32),
}


@pytest.mark.parametrize("seed", [0, 3])
@pytest.mark.parametrize("expression", SIMD)
def test_simdgroup_operations(expression, seed):
    got = lanes(expression, SIMD, X, seed=seed)
    np.testing.assert_allclose(got, SIMD[expression], rtol=2e-6)


def test_a_simdgroup_operation_counts_only_lanes_that_take_part():
    body = "0.0f; if (i % 2) out[i] = simd_sum(a[i])"
    got = lanes(body, [body], X)
    np.testing.assert_allclose(got[1::2], X[1::2].sum(), rtol=1e-6)


def test_8x8_matrices_multiply_load_and_store_transposed():
    a, b = (RNG.standard_normal((8, 8)).astype(np.float32) for _ in range(2))
    body = """simdgroup_float8x8 x, y, z = simdgroup_float8x8(0.0f);
    simdgroup_load(x, a, 8); simdgroup_load(y, b, 8, ulong2(0, 0), true);
    simdgroup_multiply_accumulate(z, x, y, z); simdgroup_store(z, out, 8);"""
    source = f"""{HEAD}kernel void k(device const float* a, device const float* b,
      device float* out, uint i [[thread_position_in_grid]]) {{ {body} }}"""
    out = np.zeros((8, 8), np.float32)
    program = simulator.Program(source, checked=True)
    program.run("k", [a, b, out], (32, 1, 1), (32, 1, 1), uninitialised=[2])
    np.testing.assert_allclose(out, a @ b.T, rtol=2e-5, atol=1e-5)


# MLX's own source.
def doubled(
    body: str = "out[thread_position_in_grid.x] = 2 * x[thread_position_in_grid.x];",
):
    return mx.fast.metal_kernel(
        name="doubled", input_names=["x"], output_names=["out"], source=body
    )


def call(kernel, x, **options):
    n = x.size
    return simulator.call(
        kernel, inputs=[x], grid=(n, 1, 1), threadgroup=(n, 1, 1),
        output_shapes=[(n,)], output_dtypes=[x.dtype], **options,
    )[0]  # fmt: skip


@pytest.mark.parametrize(
    "dtype", [mx.float32, mx.float16, mx.bfloat16, mx.int32, mx.uint8]
)
@pytest.mark.parametrize("n", [1, 7, 8, 33])
def test_a_kernel_of_mlx_runs_for_every_type_and_address_space(n, dtype):
    x = mx.arange(1, n + 1).astype(dtype)
    assert mx.array_equal(call(doubled(), x), x + x)


def test_shapes_strides_and_dimensions_that_a_body_names_are_bound():
    kernel = mx.fast.metal_kernel(
        name="shapes", input_names=["x", "y"], output_names=["out"],
        source="out[0] = x_shape[0]; out[1] = x_shape[1]; out[2] = x_strides[0];"
        "out[3] = x_ndim; out[4] = y_shape[0]; out[5] = int(y[2]);",
    )  # fmt: skip
    x, y = mx.zeros((3, 5)), mx.arange(9.0)
    (out,) = simulator.call(
        kernel, inputs=[x, y], grid=(1, 1, 1), threadgroup=(1, 1, 1),
        output_shapes=[(6,)], output_dtypes=[mx.int32],
    )  # fmt: skip
    assert out.tolist() == [3, 5, 5, 2, 9, 2]


def test_an_input_that_does_not_lie_in_rows_is_copied_as_mlx_does():
    x = mx.arange(12.0).reshape(3, 4).T
    assert call(doubled(), x).tolist() == (2 * x).flatten().tolist()


def test_unwritten_outputs_are_not_a_number_unless_given_a_value():
    kernel = doubled("if (thread_position_in_grid.x == 0) out[0] = x[0];")
    x = mx.ones(9)
    assert np.isnan(np.array(call(kernel, x))[1:]).all()
    assert call(kernel, x, init_value=3).tolist() == [1.0] + [3.0] * 8


# Errors and files.
def test_a_compile_error_names_the_file_and_line_of_the_metal_source():
    source = f'{HEAD}#line 40 "quant.metal"\nkernel void k(device float* y) {{\n  y[0] = z;\n}}'
    with pytest.raises(
        SimulatorError, match=r"quant\.metal:41:.*undeclared identifier 'z'"
    ):
        simulator.Program(source)


LIMITS = {
    "threads": ((2048, 1, 1), (2048, 1, 1), 1, "at most 1024 threads"),
    "buffers": ((1, 1, 1), (1, 1, 1), 2, "expected 1 buffers but got 2"),
    "size": ((0, 1, 1), (1, 1, 1), 1, "expected positive sizes"),
}


@pytest.mark.parametrize("name", LIMITS)
def test_a_launch_beyond_metals_limits_is_refused(name):
    grid, group, n, message = LIMITS[name]
    program = simulator.Program(f"{HEAD}kernel void k(device float* y) {{ y[0] = 0; }}")
    with pytest.raises(SimulatorError, match=message):
        program.run("k", [np.zeros(4, np.float32)] * n, grid, group)


def test_too_much_threadgroup_memory_is_refused():
    source = f"""{HEAD}kernel void k(device float* y, uint i [[thread_position_in_grid]]) {{
      threadgroup float t[8193]; t[i] = 1.0f;
      threadgroup_barrier(mem_flags::mem_threadgroup); y[i] = t[3 - i]; }}"""
    program = simulator.Program(source)
    assert program.threadgroup_bytes("k") == 4 * 8193
    with pytest.raises(SimulatorError, match="at most 32768 bytes"):
        program.run("k", [np.zeros(4, np.float32)], (4, 1, 1), (4, 1, 1))


def test_compiled_objects_are_kept_by_content(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    kept = tmp_path / "moeflux-mlx" / "simulator"
    source = f"{HEAD}kernel void k(device float* y) {{ y[0] = 1; }}"
    simulator.Program(source)
    first = {p.name: p.stat().st_mtime_ns for p in kept.glob("fast-*.so")}
    simulator.Program(source)
    assert {p.name: p.stat().st_mtime_ns for p in kept.glob("fast-*.so")} == first
    simulator.Program(source.replace("= 1", "= 2"))
    assert len(list(kept.glob("fast-*.so"))) == len(first) + 1 == 2


SHARED = (
    HEAD
    + """kernel void k(device uint* y, uint i [[thread_index_in_threadgroup]]) {
  threadgroup uint s[64];
  for (uint n = 0; n < 50; ++n) {
    s[i] = y[i] + n;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    y[i] = s[63 - i];
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }
}"""
)


def turned(n_times: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the numbers that ``SHARED`` is given, and its results."""
    given = np.arange(64, dtype=np.uint32)
    result = given.copy()
    for n in range(n_times):
        result = (result + np.uint32(n))[::-1]
    return given, np.ascontiguousarray(result)


@pytest.mark.parametrize("checked", [False, True])
def test_a_library_runs_when_another_process_replaced_its_file(
    checked, tmp_path, monkeypatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    given, wanted = turned(50)
    for _ in range(2):
        program = simulator.Program(SHARED, checked=checked)
        values = given.copy()
        program.run("k", [values], (64, 1, 1), (64, 1, 1))
        assert (values == wanted).all()
        # Two processes that compile the same source both put the result here.
        for path in tmp_path.rglob("*.so"):
            copy = path.with_suffix(".other")
            copy.write_bytes(path.read_bytes())
            copy.chmod(0o600)
            copy.replace(path)


@pytest.mark.parametrize("declared", ["device const", "const device", "constant"])
def test_what_another_thread_writes_to_an_input_meanwhile_stays(declared):
    """As reading threads do, with slots that a running kernel does not read."""
    program = simulator.Program(
        HEAD + f"kernel void k({declared} uint* x, device uint* y,"
        "  uint i [[thread_position_in_grid]]) { y[i] = x[0]; }"
    )
    x, y = np.full(1 << 20, 7, np.uint32), np.zeros(1 << 15, np.uint32)
    is_over = False

    def write() -> None:
        for place in range(1, len(x)):
            if is_over:
                break
            x[place] = 0

    writer = threading.Thread(target=write)
    writer.start()
    for _ in range(3):
        program.run("k", [x, y], (len(y), 1, 1), (32, 1, 1))
    is_over = True
    writer.join()
    n_written = np.count_nonzero(x == 0)
    assert n_written and not x[1 : 1 + n_written].any() and (y == 7).all()


def test_kernels_of_two_threads_run_one_after_the_other():
    program = simulator.Program(SHARED)
    given, wanted = turned(50)

    def run(_: int) -> bool:
        values = given.copy()
        program.run("k", [values], (64, 1, 1), (64, 1, 1))
        return bool((values == wanted).all())

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(run, range(200)))


@pytest.mark.parametrize(
    "path", sorted(kernels_folder().glob("*.metal")), ids=lambda p: p.name
)
def test_our_files_compile_whole_and_unmodified(path: Path):
    simulator.Program.of_file(path)


@pytest.mark.slow
def test_the_command_line_compiles_files_and_fails_with_file_and_line(tmp_path):
    good, bad = tmp_path / "good.metal", tmp_path / "bad.metal"
    good.write_text(f"{HEAD}[[kernel]] void good(device float* y) {{ y[0] = 1.0f; }}\n")
    bad.write_text(f"{HEAD}kernel void bad(device float* y) {{ y = 1; }}\n")
    command = [sys.executable, "-m", "moeflux_mlx.engine.simulator"]
    done = subprocess.run([*command, good], capture_output=True, text=True)
    assert (done.returncode, "good" in done.stdout) == (0, True)
    done = subprocess.run([*command, good, bad], capture_output=True, text=True)
    assert done.returncode == 1
    assert "bad.metal:3" in done.stderr


NUMBERS_SOURCE = (
    HEAD + "kernel void k(device const float* x, device float* y, "
    "uint i [[thread_position_in_grid]]) { float a = x[0], b = x[1], c = x[2];"
    " y[0] = a * b + c; y[1] = exp(a); y[2] = precise::exp(a);"
    " y[3] = exp(-INFINITY); y[4] = log(0.0f); y[5] = exp(a); }"
)


@pytest.mark.parametrize("numbers", ["plain", "contracted", "fast"])
def test_numbers_are_computed_in_the_requested_mode(numbers):
    x = np.float32([1 + 2**-13, 1 - 2**-13, -1])
    y = np.zeros(6, np.float32)
    program = simulator.Program(NUMBERS_SOURCE, numbers=numbers)
    program.run("k", [x, y], (1, 1, 1), (1, 1, 1))
    # With one rounding, the product keeps low bits that the sum then reveals.
    assert y[0] == (0 if numbers == "plain" else -(2.0**-26))
    exact = np.exp(np.float64(x[0]))
    assert abs(y[2] - exact) <= 2**-23 * exact
    assert (y[1] == y[2]) == (numbers != "fast")
    assert abs(y[1] - exact) <= 6 * 2**-23 * exact
    assert list(y[3:5]) == [0, -np.inf] and y[5] == y[1]
