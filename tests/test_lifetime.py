"""Lifetimes and colours: exact on a small graph, and valid on random ones."""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeflux_mlx import ops
from moeflux_mlx.engine.executors import open_executor
from moeflux_mlx.engine.graph import (
    BufferPool,
    BufId,
    Graph,
    WeightRef,
    analyze_lifetimes,
    greedy_color,
    planned_peak_bytes,
)
from moeflux_mlx.engine.graph import roles as b
from moeflux_mlx.engine.graph.lifetime import Lifetime
from moeflux_mlx.experts.weights import Weight

N = 3
EXECUTOR = open_executor("ops")


# A small graph, by hand.
@pytest.fixture
def block():
    """norm → product → norm in place → add: one norm's output is read twice."""
    pool = BufferPool()
    x = pool.alloc(b.HiddenBuf, (N, 7), "x", persistent=True)
    normed = pool.alloc(b.AttnInputBuf, (N, 7), "normed")
    k = pool.alloc(b.KProjOutBuf, (N, 5), "k")
    mixed = pool.alloc(b.OProjOutBuf, (N, 7), "mixed")
    out = pool.alloc(b.ResidualBuf, (N, 7), "out")
    graph = Graph(pool)
    norm = dict(dim=7, n_tokens=N, eps=1e-6)
    graph.push(
        ops.RmsNormBf16NTokens(
            label="norm", x=x, weight=WeightRef("w", (7,)), out=normed, **norm
        )
    )
    for label, target, n_out in (("k_proj", k, 5), ("mix", mixed, 7)):
        graph.push(
            ops.MatvecNTokens(
                label=label,
                weight=WeightRef(label, (n_out, 7)),
                input=normed,
                output=target,
                in_dim=7,
                out_dim=n_out,
                n_tokens=N,
            )
        )
    graph.push(
        ops.RmsNormPerHeadNTokens(
            label="k_norm",
            x=k,
            weight=WeightRef("k_norm", (5,)),
            num_heads=1,
            head_dim=5,
            n_tokens=N,
            eps=1e-6,
        )
    )
    graph.push(
        ops.ResidualAddNTokens(label="add", a=mixed, b=x, out=out, n_tokens=N, dim=7)
    )
    return graph


def by_label(graph, per_index):
    return {graph.pool.infos[i].label: value for i, value in per_index.items()}


def test_a_value_lives_from_its_first_write_to_its_last_read(block):
    assert by_label(block, analyze_lifetimes(block)) == {
        "normed": Lifetime(0, 2),
        # Written in place and never read again: a result.
        "k": Lifetime(1, 4),
        "mixed": Lifetime(2, 4),
        "out": Lifetime(4, 4),
    }


def test_the_lowest_free_colour_is_taken(block):
    coloring = greedy_color(analyze_lifetimes(block))
    assert by_label(block, coloring.colors) == {
        "normed": 0,
        "k": 1,
        "mixed": 2,
        "out": 0,
    }
    assert coloring.n_colors == 3


def test_the_peak_is_that_of_the_op_with_most_alive(block):
    # mix reads normed and writes mixed while k waits.
    assert planned_peak_bytes(block) == 4 * N * (7 + 5 + 7)


def overlap(one: Lifetime, other: Lifetime) -> bool:
    """Return whether both values are live at some Op."""
    return one.first <= other.last and other.first <= one.last


def test_an_empty_graph_needs_nothing():
    graph = Graph(BufferPool())
    assert analyze_lifetimes(graph) == {} and planned_peak_bytes(graph) == 0
    assert greedy_color({}).n_colors == 0


def test_values_from_outside_are_not_planned(block):
    assert "x" not in by_label(block, analyze_lifetimes(block))


def test_a_planned_graph_has_the_lifetimes_it_had(block):
    before, peak = analyze_lifetimes(block), planned_peak_bytes(block)
    block.pool.commit_plan(block)
    assert analyze_lifetimes(block) == before and planned_peak_bytes(block) == peak


def test_scratch_counts_only_while_its_op_runs():
    pool = BufferPool()
    gate = pool.alloc(b.SharedFfnGateBuf, (N, 7), "gate", persistent=True)
    up = pool.alloc(b.SharedFfnUpBuf, (N, 7), "up", persistent=True)
    act = pool.alloc(b.SharedFfnActBuf, (N, 7), "act")
    op = ops.SwigluFusedBatched(
        label="act", gate=gate, up=up, out=act, n_tokens=N, dim=7
    )
    graph = Graph(pool)
    graph.push(op)
    assert planned_peak_bytes(graph) == 4 * N * 7 + op.scratch_bytes(4)


# Random straight-line graphs.
@dataclass
class Program:
    """A random graph with the values and weights that make it run."""

    rng: Random
    pool: BufferPool = field(default_factory=BufferPool)
    weights: dict[str, Weight] = field(default_factory=dict)
    given: dict[int, Any] = field(default_factory=dict)
    bufs: list[BufId] = field(default_factory=list)

    def __post_init__(self):
        self.graph = Graph(self.pool, "random")
        self.numbers = np.random.default_rng(self.rng.randrange(2**32))

    def push_random(self) -> None:
        kinds = (self.add, self.act, self.norm, self.norm_in_place, self.gate, self.mix)
        self.graph.push(self.rng.choice(kinds)(f"op{len(self.graph)}"))

    def read(self, role: type, width: int | None = None) -> BufId:
        """Pick a buffer of the role, or bring a new one from outside."""
        fitting = [
            buf
            for buf in self.bufs
            if issubclass(buf.role, role) and width in (None, self.width(buf))
        ]
        if fitting and self.rng.random() < 0.8:
            return self.rng.choice(fitting)
        concrete = {b.RmsNormIn: b.HiddenBuf, b.MatvecIn: b.MoeInputBuf}.get(role, role)
        shape = (N, width or self.rng.choice((2, 3, 5, 8)))
        is_kept = self.rng.random() < 0.5
        buf = self.pool.alloc(concrete, shape, "given", persistent=is_kept)
        self.given[buf.index] = self.random(*shape)
        self.bufs.append(buf)
        return buf

    def write(self, role: type, width: int) -> BufId:
        """Pick a buffer to overwrite, or add a new one."""
        fitting = [x for x in self.bufs if x.role is role and self.width(x) == width]
        if fitting and self.rng.random() < 0.2:
            return self.rng.choice(fitting)
        self.bufs.append(self.pool.alloc(role, (N, width), "made"))
        return self.bufs[-1]

    def width(self, buf: BufId) -> int:
        return self.pool.info(buf).shape[1]

    def random(self, *shape: int) -> mx.array:
        return mx.array(self.numbers.standard_normal(shape).astype(np.float32))

    def weight(self, *shape: int) -> WeightRef:
        name = f"w{len(self.weights)}"
        self.weights[name] = Weight(self.random(*shape))
        return WeightRef(name, shape, None, mx.float32)

    def add(self, label: str) -> ops.ResidualAddNTokens:
        a = self.read(b.OProjOutBuf)
        width = self.width(a)
        return ops.ResidualAddNTokens(
            label=label,
            a=a,
            b=self.read(b.RmsNormIn, width),
            out=self.write(b.ResidualBuf, width),
            n_tokens=N,
            dim=width,
        )

    def act(self, label: str) -> ops.SwigluFusedBatched:
        gate = self.read(b.SharedFfnGateBuf)
        width = self.width(gate)
        return ops.SwigluFusedBatched(
            label=label,
            gate=gate,
            up=self.read(b.SharedFfnUpBuf, width),
            out=self.write(b.SharedFfnActBuf, width),
            n_tokens=N,
            dim=width,
        )

    def norm(self, label: str) -> ops.RmsNormBf16NTokens:
        x = self.read(b.RmsNormIn)
        width = self.width(x)
        role = self.rng.choice((b.AttnInputBuf, b.MoeInputBuf))
        return ops.RmsNormBf16NTokens(
            label=label,
            x=x,
            weight=self.weight(width),
            out=self.write(role, width),
            dim=width,
            n_tokens=N,
            eps=1e-6,
        )

    def norm_in_place(self, label: str) -> ops.RmsNormPerHeadNTokens:
        x = self.read(b.RmsNormIn)
        return ops.RmsNormPerHeadNTokens(
            label=label,
            x=x,
            weight=self.weight(self.width(x)),
            num_heads=1,
            head_dim=self.width(x),
            n_tokens=N,
            eps=1e-6,
        )

    def gate(self, label: str) -> ops.SigmoidGateNTokens:
        x = self.read(b.AttnOutBuf)
        width = self.width(x)
        gate = self.read(b.QGateBuf, width)
        return ops.SigmoidGateNTokens(
            label=label, x=x, gate=gate, dim=width, n_tokens=N
        )

    def mix(self, label: str) -> ops.MatvecNTokens:
        x = self.read(b.MatvecIn)
        n_out = self.rng.choice((2, 3, 5, 8))
        roles = (b.OProjOutBuf, b.SharedFfnGateBuf, b.SharedFfnUpBuf, b.KProjOutBuf)
        return ops.MatvecNTokens(
            label=label,
            weight=self.weight(n_out, self.width(x)),
            input=x,
            output=self.write(self.rng.choice(roles), n_out),
            in_dim=self.width(x),
            out_dim=n_out,
            n_tokens=N,
        )

    def start(self) -> None:
        """Put the given values where the pool now keeps them."""
        for index, value in self.given.items():
            self.pool.bind(BufId(index, self.pool.infos[index].role), value)

    def naive(self) -> dict[int, mx.array]:
        """Run Op by Op, keeping every buffer's last value."""
        values = dict(self.given)
        for op in self.graph:
            reads = [values[buf.index] for buf in op.reads]
            weights = [self.weights[ref.name] for ref in op.weight_refs]
            if isinstance(op, ops.MatvecNTokens):
                weights.append(None)
            result = op.reference(*reads, *weights)
            (written,) = op.writes
            values[written.index] = result
        return values

    def results(self) -> set[int]:
        """Buffers that no Op reads after their last write."""
        found: set[int] = set()
        for op in self.graph:
            found -= {buf.index for buf in op.reads}
            found |= {buf.index for buf in op.writes}
        return found


@st.composite
def programs(draw):
    program = Program(draw(st.randoms(use_true_random=False)))
    for _ in range(draw(st.integers(1, 14))):
        program.push_random()
    program.start()
    return program


randomly = settings(max_examples=60, derandomize=True)


@randomly
@given(programs())
def test_values_of_one_colour_are_never_alive_together(program):
    lifetimes = analyze_lifetimes(program.graph)
    colors = greedy_color(lifetimes).colors
    assert colors.keys() == lifetimes.keys()
    for i in lifetimes:
        for j in lifetimes:
            if i != j and colors[i] == colors[j]:
                assert not overlap(lifetimes[i], lifetimes[j])


@given(
    st.dictionaries(
        st.integers(0, 40),
        st.tuples(st.integers(0, 20), st.integers(0, 9)).map(
            lambda pair: Lifetime(pair[0], pair[0] + pair[1])
        ),
    )
)
@randomly
def test_there_are_as_many_colours_as_values_alive_at_once(lifetimes):
    coloring = greedy_color(lifetimes)
    at_once = max(
        (sum(x.first <= i <= x.last for x in lifetimes.values()) for i in range(30)),
        default=0,
    )
    assert coloring.n_colors == at_once
    assert set(coloring.colors.values()) == set(range(at_once))
    assert greedy_color(dict(reversed(lifetimes.items()))) == coloring


@randomly
@given(programs())
def test_results_have_the_same_bits_with_and_without_the_plan(program):
    program.graph.verify()
    expected = program.naive()
    for plan in (False, True):
        if plan:
            program.pool.commit_plan(program.graph)
        program.start()
        encoding = EXECUTOR.begin_encoding(program.pool, program.weights)
        EXECUTOR.encode_graph(program.graph, encoding)
        EXECUTOR.submit_and_wait(encoding, "run")
        for index in program.results():
            got = encoding.value(BufId(index, program.pool.infos[index].role))
            assert np.array_equal(np.array(got), np.array(expected[index]))


@randomly
@given(programs())
def test_values_are_freed_after_their_last_use(program):
    program.pool.commit_plan(program.graph)
    program.start()
    encoding = EXECUTOR.begin_encoding(program.pool, program.weights)
    EXECUTOR.encode_graph(program.graph, encoding)
    outlive = program.results() | program.given.keys()
    kept = {program.pool.physical[index] for index in outlive}
    for place, value in enumerate(encoding.values):
        assert (value is None) == (place not in kept)


@randomly
@given(programs())
def test_the_planned_peak_covers_the_values_alive_at_each_op(program):
    graph, infos = program.graph, program.pool.infos
    peak = planned_peak_bytes(graph)
    results = program.results() - program.given.keys()
    for i, op in enumerate(graph):
        made = {x.index for earlier in graph.ops[: i + 1] for x in earlier.writes}
        wanted = {x.index for later in graph.ops[i:] for x in later.reads}
        touched = {x.index for x in (*op.reads, *op.writes)}
        live = (made & (wanted | results | touched)) - program.given.keys()
        assert peak >= sum(infos[index].n_bytes for index in live)


@randomly
@given(programs())
def test_the_plan_never_needs_more_places(program):
    before = program.pool.physical_buffer_count
    program.pool.commit_plan(program.graph)
    places = list(program.pool.physical)
    assert program.pool.physical_buffer_count <= before
    given_places = [places[index] for index in program.given]
    assert len(set(given_places)) == len(given_places)
    made = [p for i, p in enumerate(places) if i not in program.given]
    assert not set(given_places) & set(made)
