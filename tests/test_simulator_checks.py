"""Deliberately broken kernels are caught, with kind and line; good ones pass."""

# Bodies of kernels stand on one line here.
# ruff: noqa: E501

from __future__ import annotations

import re
import textwrap
from dataclasses import dataclass

import numpy as np
import pytest

from moeflux_mlx.engine import simulator
from moeflux_mlx.errors import SimulatorError

pytestmark = pytest.mark.skipif(
    not simulator.available(), reason="the simulator needs ziglang and pyelftools"
)
N, GROUP = 256, 64
HEAD = """
#include <metal_stdlib>
using namespace metal;
kernel void k(device const float* x, device float* y,
              uint i [[thread_position_in_grid]],
              uint l [[thread_index_in_threadgroup]],
              uint lane [[thread_index_in_simdgroup]],
              uint sg [[simdgroup_index_in_threadgroup]]) {
"""
BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"
TILE = "threadgroup float t[64];\n"


@dataclass(frozen=True)
class Broken:
    """A kernel's body, the finding in it, and the line of the finding."""

    body: str
    finding: str
    line: int
    fast: bool = False


BROKEN = {
    "missing barrier": Broken(TILE + "t[l] = x[i];\ny[i] = t[63 - l];", "race", 3),
    "missing second barrier": Broken(
        TILE + f"t[l] = x[i];\n{BARRIER}\nfloat v = t[63 - l];\nt[l] = v;\n{BARRIER}\n"
        "y[i] = t[l];",
        "race",
        5,
    ),
    "barrier that orders nothing": Broken(
        TILE + "t[l] = x[i];\nthreadgroup_barrier(mem_flags::mem_none);\n"
        "y[i] = t[63 - l];",
        "race",
        4,
    ),
    "barrier for device memory only": Broken(
        TILE + "t[l] = x[i];\nthreadgroup_barrier(mem_flags::mem_device);\n"
        "y[i] = t[63 - l];",
        "race",
        4,
    ),
    "simdgroup barrier where a threadgroup's is needed": Broken(
        TILE + "t[l] = x[i];\nsimdgroup_barrier(mem_flags::mem_threadgroup);\n"
        "y[i] = t[63 - l];",
        "race",
        4,
    ),
    "race through device memory": Broken("y[i] = x[i];\nif (l > 0) y[i - 1] = 0.0f;", "race", 2),
    "every lane writes one word": Broken("y[i] = x[i];\ny[0] = 1.0f;", "race", 2),
    "two threadgroups write one word": Broken("y[i % 64] = x[i];\ny[i] = 0.0f;", "race", 1),
    "sum without an atomic": Broken("y[i] = 0.0f;\ny[i / 64 * 64] += x[i];", "race", 2),
    "uninitialised threadgroup memory": Broken(
        TILE + f"if (l < 32) t[l] = x[i];\n{BARRIER}\ny[i] = t[63 - l];",
        "uninitialised read",
        4,
    ),
    "output read before it is written": Broken("y[i] += x[i];", "uninitialised read", 1),
    "early return before a barrier": Broken(
        TILE + f"t[l] = x[i];\nif (l > 40) return;\n{BARRIER}\ny[i] = t[l];",
        "divergent barrier",
        4,
        fast=True,
    ),
    "barriers in two branches": Broken(
        TILE + f"t[l] = x[i];\nif (l > 31) {{\n{BARRIER}\n}} else {{\n{BARRIER}\n}}\n"
        "y[i] = t[l];",
        "divergent barrier",
        6,
        fast=True,
    ),
    "trip counts that differ": Broken(
        TILE + f"t[l] = x[i];\nfor (uint j = 0; j < 1 + l / 32; ++j) {{\n{BARRIER}\n}}\n"
        "y[i] = t[l];",
        "divergent barrier",
        4,
        fast=True,
    ),
    "read one past the end": Broken("y[i] = x[i + 1];", "out of bounds", 1),
    "read before the start": Broken("y[i] = x[int(i) - 1];", "out of bounds", 1),
    "write past the end": Broken("y[i] = x[i];\ny[i + 256] = 0.0f;", "out of bounds", 2),
    "read far away": Broken("y[i] = x[i + 100000000];", "out of bounds", 1),
    "threadgroup array overrun": Broken(
        TILE + f"t[l] = x[i];\n{BARRIER}\ny[i] = t[l + 1];", "index out of bounds", 4
    ),
    "threadgroup overrun through a pointer": Broken(
        TILE + f"t[l] = x[i];\n{BARRIER}\nthreadgroup float* p = t;\ny[i] = p[l + 1];",
        "out of bounds",
        5,
    ),
    "thread array overrun": Broken(
        "float a[4] = {x[0], x[1], x[2], x[3]};\ny[i] = a[i % 5];", "index out of bounds", 2
    ),
    "integer division by zero": Broken(
        "y[i] = float(100 / (int(i) - 5));", "division by zero", 1, fast=True
    ),
    "vector load off its alignment": Broken(
        "uint j = i < 250 ? i : 250;\n"
        "y[i] = (*(device const float4*)(x + j)).x;",
        "misaligned",
        2,
    ),
}  # fmt: skip
GOOD = {
    "two barriers around a reduction": TILE
    + f"t[l] = x[i];\n{BARRIER}\nfloat v = t[63 - l];\n{BARRIER}\nt[l] = v;\n{BARRIER}\n"
    "y[i] = t[63 - l];",
    "simdgroup barrier within a simdgroup": TILE
    + "t[l] = x[i];\nsimdgroup_barrier(mem_flags::mem_threadgroup);\ny[i] = t[l ^ 31];",
    "sums of simdgroups": "threadgroup float s[2];\nfloat v = simd_sum(x[i]);\n"
    f"if (lane == 0) s[sg] = v;\n{BARRIER}\ny[i] = s[0] + s[1];",
    "reused scratch with a barrier before it": "threadgroup float s[2];\nfloat v = x[i];\n"
    "for (int j = 0; j < 3; ++j) {\nv = simd_sum(v);\n"
    f"{BARRIER}\nif (lane == 0) s[sg] = v;\n{BARRIER}\nv = s[0] + s[1];\n}}\ny[i] = v;",
    "lanes that leave a simd operation out": "float v = 0.0f;\n"
    "if (lane < 16) v = simd_sum(x[i]);\ny[i] = v;",
}
WRONG_SPACES = {
    "device pointer from threadgroup": TILE + "device float* p = t;\ny[i] = *p;",
    "threadgroup pointer from device": "threadgroup const float* p = x;\ny[i] = *p;",
    "write through a const input": "x[i] = 0.0f;\ny[i] = 0.0f;",
    "ambiguous min": "y[i] = float(min(i, 3));",
    "bfloat from half": "half h = half(x[i]);\nbfloat b = h;\ny[i] = float(b);",
    "initialised threadgroup variable": "threadgroup float s = 0.0f;\ny[i] = s;",
    "a function that Metal lacks": "y[i] = log1p(x[i]);",
}


def run(body: str, *, checked: bool, seed: int = 0) -> np.ndarray:
    source = HEAD + textwrap.dedent(body) + "\n}\n"
    program = simulator.Program(source, checked=checked, name="broken.metal")
    x = np.arange(1, N + 1, dtype=np.float32)
    y = np.full(N, np.nan, np.float32)
    program.run("k", [x, y], (N, 1, 1), (GROUP, 1, 1), seed=seed, uninitialised=[1])
    return y


@pytest.mark.parametrize("name", [name for name, b in BROKEN.items() if b.finding])
def test_a_broken_kernel_is_caught_at_its_line(name):
    broken = BROKEN[name]
    with pytest.raises(SimulatorError) as caught:
        run(broken.body, checked=True)
    line = HEAD.count("\n") + broken.line
    pattern = rf"{broken.finding}.*broken\.metal:{line}\b"
    assert re.search(pattern, str(caught.value)), str(caught.value)


@pytest.mark.parametrize("name", [name for name, b in BROKEN.items() if b.fast])
def test_fast_mode_catches_barriers_and_divisions_too(name):
    broken = BROKEN[name]
    with pytest.raises(SimulatorError, match=broken.finding):
        run(broken.body, checked=False)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("name", GOOD)
def test_a_good_kernel_raises_no_false_alarm(name, seed):
    checked = run(GOOD[name], checked=True, seed=seed)
    assert np.isfinite(checked).all()
    assert np.array_equal(checked, run(GOOD[name], checked=False, seed=seed))


@pytest.mark.parametrize("name", WRONG_SPACES)
def test_code_that_metal_refuses_is_refused_with_its_line(name):
    with pytest.raises(SimulatorError, match=r"broken\.metal:\d+.*error"):
        run(WRONG_SPACES[name], checked=False)


def test_a_race_shows_in_fast_mode_as_another_result_under_another_seed():
    body = BROKEN["two threadgroups write one word"].body.split("\n")[0]
    assert not np.array_equal(
        run(body, checked=False, seed=1)[:64], run(body, checked=False, seed=2)[:64]
    )


def test_a_finding_names_both_threads_and_the_array():
    with pytest.raises(SimulatorError) as caught:
        run(BROKEN["missing second barrier"].body, checked=True)
    message = str(caught.value)
    assert re.search(r"thread \d+ (reads|writes) what thread \d+", message)
    assert "threadgroup array 't', byte" in message


def test_the_process_survives_a_fault_and_runs_the_next_kernel():
    with pytest.raises(SimulatorError, match="outside of memory"):
        run("y[i] = x[i + 1000000000];", checked=False)
    assert run("y[i] = x[i];", checked=False)[5] == 6
