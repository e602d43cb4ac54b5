"""Executors encode lazily, wait once, leave results, and count by label."""

from __future__ import annotations

import os
import subprocess
import sys

import mlx.core as mx
import numpy as np
import pytest
from op_cases import SPECS, TOLERANCE, relative_rms

from moeflux_mlx import ops
from moeflux_mlx.engine.executors import EXECUTORS, Executor, OpsExecutor, open_executor
from moeflux_mlx.engine.graph import BufferPool, Graph, WeightRef
from moeflux_mlx.engine.graph import roles as b
from moeflux_mlx.errors import BackendError
from moeflux_mlx.experts.weights import Weight

N, DIM = 3, 7
WEIGHTS = {"o_proj": Weight(mx.eye(DIM) * 2), "norm": Weight(mx.ones(DIM))}


@pytest.fixture
def executor():
    return open_executor("ops")


@pytest.fixture
def graph():
    """``residual = 2 * attended + hidden``, then its norm; inputs are in the pool."""
    pool = BufferPool()
    hidden = pool.alloc(b.HiddenBuf, (N, DIM), "hidden", persistent=True)
    attended = pool.alloc(b.AttnOutBuf, (N, DIM), "attended", persistent=True)
    mixed = pool.alloc(b.OProjOutBuf, (N, DIM), "mixed")
    residual = pool.alloc(b.ResidualBuf, (N, DIM), "residual")
    normed = pool.alloc(b.MoeInputBuf, (N, DIM), "normed")
    pool.upload(hidden, np.full((N, DIM), 3, np.float32))
    pool.upload(attended, np.full((N, DIM), 5, np.float32))
    graph = Graph(pool)
    graph.push(
        ops.MatvecNTokens(
            label="o_proj",
            weight=WeightRef("o_proj", (DIM, DIM)),
            input=attended,
            output=mixed,
            in_dim=DIM,
            out_dim=DIM,
            n_tokens=N,
        )
    )
    graph.push(
        ops.ResidualAddNTokens(
            label="residual_add", a=mixed, b=hidden, out=residual, n_tokens=N, dim=DIM
        )
    )
    graph.push(
        ops.RmsNormBf16NTokens(
            label="norm",
            x=residual,
            weight=WeightRef("norm", (DIM,)),
            out=normed,
            dim=DIM,
            n_tokens=N,
            eps=1e-6,
        )
    )
    return graph


def poison(pool, op):
    """Fill the fields that ``op`` only writes with NaN."""
    for buf in set(op.writes) - set(op.reads):
        info = pool.info(buf)
        shape = [d or 1 for d in info.shape]
        pool.bind(buf, mx.full(shape, float("nan")).astype(info.dtype))


# Opening.
def test_the_environment_sets_the_default_executor(monkeypatch):
    monkeypatch.delenv("MOEFLUX_EXECUTOR", raising=False)
    assert isinstance(open_executor(), OpsExecutor)
    monkeypatch.setenv("MOEFLUX_EXECUTOR", "abacus")
    with pytest.raises(BackendError, match="abacus"):
        open_executor()


def test_an_unknown_executor_is_refused_with_the_choices():
    with pytest.raises(BackendError) as error:
        open_executor("abacus")
    choices = ", ".join(EXECUTORS)
    assert str(error.value) == f"[executor] expected one of {choices} but got 'abacus'"


def test_every_executor_opens_by_name_or_gives_a_reason():
    for name in EXECUTORS:
        try:
            opened = open_executor(name)
        except BackendError as error:
            assert name in str(error)
        else:
            assert isinstance(opened, Executor) and opened.name == name


# Running.
@pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.id)
def test_every_op_runs_from_pool_to_pool(spec, executor):
    case = spec.build()
    for field in case.inputs:
        buf = getattr(case.op, field)
        if buf is not None:
            case.pool.bind(buf, case.on_device(field))
    poison(case.pool, case.op)
    graph = Graph(case.pool)
    graph.push(case.op)
    refs = {ref.name: case.weights[ref.name] for ref in case.op.weight_refs}
    executor.execute(graph, "run", refs)
    for buf, expected in zip(case.op.writes, case.expected(), strict=True):
        assert relative_rms(case.pool.handle(buf), expected) < TOLERANCE


@pytest.mark.parametrize("planned", [False, True], ids=["unplanned", "planned"])
def test_execute_leaves_results_in_the_pool_again_and_again(graph, executor, planned):
    _, add, norm = graph
    if planned:
        graph.pool.commit_plan(graph)
    for value in (3, 4):
        graph.pool.upload(add.b, np.full((N, DIM), value, np.float32))
        executor.execute(graph, "block", WEIGHTS)
        assert mx.allclose(graph.pool.handle(norm.out), mx.ones((N, DIM)))
        assert mx.all(graph.pool.handle(add.b) == value)


def test_an_input_that_was_never_written_is_zeros(graph, executor):
    pool = graph.pool
    add = graph.ops[1]
    fresh = pool.alloc(b.OProjOutBuf, (N, DIM), "fresh")
    out = pool.alloc(b.ResidualBuf, (N, DIM), "out")
    again = Graph(pool)
    again.push(
        ops.ResidualAddNTokens(
            label="again", a=fresh, b=add.b, out=out, n_tokens=N, dim=DIM
        )
    )
    executor.execute(again, "again")
    assert mx.all(pool.handle(out) == 3)


def test_one_op_at_a_time_gives_the_result_of_the_graph(graph, executor):
    results = []
    for encode in (
        lambda encoding: executor.encode_graph(graph, encoding),
        lambda encoding: executor.encode_graph(executor.lower(graph), encoding),
        lambda encoding: [executor.encode_op(op, encoding) for op in graph],
    ):
        encoding = executor.begin_encoding(graph.pool, WEIGHTS)
        encode(encoding)
        executor.submit_and_wait(encoding, "block")
        results.append(np.array(encoding.value(graph.ops[-1].out)).tobytes())
    assert len(set(results)) == 1


def test_an_op_encoded_alone_keeps_its_inputs(graph, executor):
    encoding = executor.begin_encoding(graph.pool, WEIGHTS)
    for op in graph:
        executor.encode_op(op, encoding)
    mixed, residual = graph.ops[0].output, graph.ops[1].out
    assert mx.all(encoding.value(mixed) == 10)
    assert mx.all(encoding.value(residual) == 13)


def test_a_run_does_not_touch_the_pool_before_it_is_submitted(graph, executor):
    hidden, out = graph.ops[1].b, graph.ops[-1].out
    encoding = executor.begin_encoding(graph.pool, WEIGHTS)
    encoding.bind(hidden, mx.zeros((N, DIM)))
    executor.encode_graph(graph, encoding)
    assert mx.all(graph.pool.handle(hidden) == 3)
    assert mx.all(graph.pool.handle(out) == 0)
    executor.submit_and_wait(encoding, "block")
    assert mx.all(graph.pool.handle(hidden) == 0)
    assert mx.allclose(graph.pool.handle(out), mx.ones((N, DIM)))


def test_two_runs_over_one_pool_do_not_interfere(graph, executor):
    add = graph.ops[1]
    steps = executor.lower(graph)
    encodings = [executor.begin_encoding(graph.pool, WEIGHTS) for _ in range(2)]
    for encoding, value in zip(encodings, (-10, 6), strict=True):
        encoding.bind(add.b, mx.full((N, DIM), value))
        for step in steps[:2]:
            executor.encode_graph([step], encoding)
    first, second = (encoding.value(add.out) for encoding in encodings)
    assert mx.all(first == 0) and mx.all(second == 16)


def test_a_host_function_stands_in_for_an_op(graph, executor):
    seen = []

    def subtract(a, b):
        seen.append((a, b))
        return b - a

    host = {ops.ResidualAddNTokens: subtract}
    encoding = executor.begin_encoding(graph.pool, WEIGHTS, host)
    executor.encode_graph(executor.lower(graph)[:2], encoding)
    assert mx.all(encoding.value(graph.ops[1].out) == 3 - 10)
    (arguments,) = seen
    assert mx.all(arguments[0] == 10) and mx.all(arguments[1] == 3)


def test_a_missing_weight_is_named(graph, executor):
    with pytest.raises(KeyError, match="o_proj"):
        executor.execute(graph, "block", {"norm": WEIGHTS["norm"]})


# Statistics.
def test_waits_are_counted_by_label(graph, executor):
    assert executor.stats.snapshot() == {}
    for label in ("layer", "layer", "logits"):
        executor.execute(graph, label, WEIGHTS)
    stats = executor.stats.snapshot()
    assert {label: s.count for label, s in stats.items()} == {"layer": 2, "logits": 1}
    assert all(s.wait_ns > 0 for s in stats.values())


def test_a_snapshot_is_a_copy(graph, executor):
    executor.execute(graph, "layer", WEIGHTS)
    before = executor.stats.snapshot()
    executor.execute(graph, "layer", WEIGHTS)
    assert before["layer"].count == 1
    before["layer"].count = 99
    assert executor.stats.snapshot()["layer"].count == 2


def test_reset_begins_anew(graph, executor):
    executor.execute(graph, "layer", WEIGHTS)
    before = executor.stats.snapshot()
    executor.stats.reset()
    assert executor.stats.snapshot() == {} and before["layer"].count == 1


def test_executors_count_apart(graph, executor):
    executor.execute(graph, "layer", WEIGHTS)
    assert open_executor("ops").stats.snapshot() == {}


def test_the_table_lists_labels_by_falling_time(executor):
    executor.stats.add("short", 1_000_000)
    executor.stats.add("long", 2_000_000)
    executor.stats.add("long", 1_000_000)
    head, *rows = executor.stats.table().splitlines()
    assert head.split() == ["label", "count", "total", "ms", "mean", "us", "%"]
    assert [row.split() for row in rows] == [
        ["long", "2", "3.00", "1500.0", "75.0"],
        ["short", "1", "1.00", "1000.0", "25.0"],
    ]


PROFILED = """
import mlx.core as mx
from moeflux_mlx import ops
from moeflux_mlx.engine.executors import open_executor
from moeflux_mlx.engine.graph import BufferPool, Graph
from moeflux_mlx.engine.graph import roles as b

pool = BufferPool()
a = pool.alloc(b.OProjOutBuf, (3, 7), "a", persistent=True)
x = pool.alloc(b.HiddenBuf, (3, 7), "x", persistent=True)
graph = Graph(pool)
for label in ("first", "second"):
    out = pool.alloc(b.ResidualBuf, (3, 7), label)
    graph.push(
        ops.ResidualAddNTokens(label=label, a=a, b=x, out=out, n_tokens=3, dim=7)
    )
    x = out
executor = open_executor("ops")
for _ in range(3):
    executor.execute(graph, "whole")
"""


@pytest.mark.slow
def test_profiling_per_op_prints_a_row_for_each_label_at_exit():
    done = subprocess.run(
        [sys.executable, "-c", PROFILED],
        env={**os.environ, "MOEFLUX_PROFILE_PER_OP": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    rows = [line.split() for line in done.stderr.splitlines()]
    counts = {" ".join(row[:2]): row[2] for row in rows if row[0].endswith("NTokens")}
    assert counts == {"ResidualAddNTokens first": "3", "ResidualAddNTokens second": "3"}
    assert done.stdout == ""


@pytest.mark.parametrize("flag", ["", "0"])
def test_without_the_flag_only_whole_graphs_are_counted(graph, monkeypatch, flag):
    monkeypatch.setenv("MOEFLUX_PROFILE_PER_OP", flag)
    executor = open_executor("ops")
    executor.execute(graph, "whole", WEIGHTS)
    assert list(executor.stats.snapshot()) == ["whole"]


# Hooks.
def test_layers_may_be_announced_and_the_device_drained(graph, executor):
    executor.begin_layer(0, 0)
    executor.execute(graph, "layer", WEIGHTS)
    executor.begin_layer(chunk=1, layer=39)
    executor.drain()
    executor.drain()
    assert mx.allclose(graph.pool.handle(graph.ops[-1].out), mx.ones((N, DIM)))
    assert executor.stats.snapshot()["layer"].count == 1
