"""A profile's counts and sums, and its timers on a fake clock; no real times."""

from __future__ import annotations

import csv
import io
import itertools
import re
import sys
from collections.abc import Sequence
from dataclasses import replace

import mlx.core as mx
import pytest
from mlx_lm.models.cache import make_prompt_cache
from rich.console import Console

import moeflux_mlx
from moeflux_mlx.cli import main
from moeflux_mlx.cli.profile import print_profile
from moeflux_mlx.engine import simulator
from moeflux_mlx.engine.executors import EXECUTORS, OpsExecutor
from moeflux_mlx.errors import ConfigError, ModelError
from moeflux_mlx.measure import check_plot, profile, save_plot
from moeflux_mlx.measure.timing import (
    TIMED_LAUNCHES,
    Blocker,
    DeviceTimer,
    HostTimer,
    StepTimer,
    Timing,
    Work,
    linked,
)

simulated = pytest.mark.skipif(
    not simulator.available(), reason="the simulator needs ziglang and pyelftools"
)
# The tiny model: three layers of gated delta, one of full attention.
N_LINEAR, N_FULL = 3, 1


class Fixed(StepTimer):
    """A timer that performs everything twice and reports two microseconds."""

    def __init__(self):
        super().__init__(repeats=1)
        self.n_works: list[int] = []

    def time(self, works: Sequence[Work]) -> Timing:
        self.n_works.append(len(works))
        for work in (*works, *works):
            mx.eval([x for x in work.perform() if isinstance(x, mx.array)])
        return Timing(2e-6)

    def copy_bytes_per_s(self) -> float:
        return 1e9


class Traced(OpsExecutor):
    """Run references on MLX arrays, with a compiled step of decoding, as on a GPU."""

    name = "traced"
    takes_host_arrays = False
    compiles = True
    spare_rows = True


@pytest.fixture(autouse=True)
def traced_executor(monkeypatch):
    monkeypatch.setitem(EXECUTORS, "traced", Traced)


def load(path, executor="ops", **options):
    return moeflux_mlx.load(path, executor=executor, **options)[0]


def rows_by_label(found):
    return {(row.graph, row.label): row for row in found.rows}


def test_every_op_of_a_step_is_in_one_row_as_often_as_it_is_performed(checkpoint):
    model, timer = load(checkpoint), Fixed()
    found = profile(model, context=5, timer=timer)
    by_graph = {row.graph: row.count for row in found.rows}
    assert by_graph == {
        "embed": 1,
        "linear attention layer": N_LINEAR,
        "full attention layer": N_FULL,
        "norm": 1,
        "logits": 1,
        "sampling": 1,
    }
    assert sorted(timer.n_works) == sorted(row.count for row in found.rows)
    single = [g for g in model.runtime.graphs.values() if g.graph.ops[0].n_tokens == 1]
    expected = {(g.graph.name, label) for g in single for label in g.graph.labels()}
    assert set(rows_by_label(found)) == {*expected, ("sampling", "argmax")}
    assert found.kernels_us == pytest.approx(2 * sum(r.count for r in found.rows))
    assert found.remainder_us == pytest.approx(found.whole_us - found.kernels_us)
    assert found.host_us is not None and found.n_launches == 0


def test_bytes_are_those_that_a_step_must_move(checkpoint):
    model = load(checkpoint, "traced")
    rows = rows_by_label(profile(model, context=5, timer=Fixed()))
    linear, full = "linear attention layer", "full attention layer"
    # float32 scales and biases in groups of 32, 4 bits a value.
    product = 64 * 128 // 2 + 2 * 4 * 64 * 128 // 32
    assert rows[linear, "out_proj"].n_bytes == product + 4 * (128 + 64)
    one_expert = 3 * (64 * 64 // 2 + 2 * 4 * 64 * 64 // 32)
    chosen = 2 * (4 + 4)
    assert rows[linear, "experts"].n_bytes == 2 * one_expert + 4 * 2 * 64 + chosen
    # Only the rows looked up, appended and attended, not complete tables and caches.
    row = 64 // 2 + 2 * 4 * 64 // 32
    assert rows["embed", "embed"].n_bytes == 4 + row + 4 * 64
    assert rows[full, "kv_append"].n_bytes == 2 * 2 * 4 * 64
    seen, queries = 2 * 6 * 4 * 64, 2 * 4 * 128
    assert rows[full, "sdpa"].n_bytes == seen + queries + 4
    assert rows["sampling", "argmax"].n_bytes == 4 * 320
    assert rows[linear, "delta_rule"].n_bytes > 2 * 4 * 4 * 32 * 32


def test_a_traced_step_is_profiled_as_the_trace_performs_it(checkpoint):
    found = rows_by_label(profile(load(checkpoint, "traced"), context=9, timer=Fixed()))
    append = found["full attention layer", "kv_append"]
    assert append.ops == ("KvCacheAppendNTokens",) and append.count == N_FULL


@pytest.mark.slow
@simulated
def test_our_launches_are_counted_where_ops_run_together(packed):
    found = profile(load(packed, "sim"), context=3, timer=Fixed())
    rows = rows_by_label(found)
    experts = next(row for row in found.rows if "MoeDecodeExperts" in row.ops)
    assert experts.kernels == ("experts_route_gate_up", "experts_down_combine")
    assert rows["embed", "embed"].kernels == ("embed_gather_4bit",)
    # The cache object appends; MLX chooses the token.
    assert rows["full attention layer", "kv_append"].kernels == ()
    assert found.n_launches == sum(r.count * len(r.kernels) for r in found.rows)
    layers = [row for row in found.rows if row.graph == "linear attention layer"]
    # Two products more than a norm fuses: their quantisation group size differs.
    assert sum(len(row.kernels) for row in layers) == 8


@pytest.mark.parametrize("executor", ["ops", "traced"])
def test_a_prompt_counts_no_more_experts_than_there_are(checkpoint, executor):
    found = profile(load(checkpoint, executor), prefill=40, timer=Fixed())
    assert (found.n_tokens, found.context, found.host_us) == (40, 0, None)
    experts = [row for row in found.rows if row.labels == ("experts",)]
    one_expert = 3 * (64 * 64 // 2 + 2 * 4 * 64 * 64 // 32)
    assert [row.count for row in experts] == [N_LINEAR, N_FULL]
    assert all(8 * one_expert < row.n_bytes < 12 * one_expert for row in experts)


@pytest.mark.parametrize("executor", ["ops", "traced"])
def test_profiling_leaves_no_effect_on_a_model(checkpoint, executor):
    model = load(checkpoint, executor)

    def logits():
        cache = make_prompt_cache(model)
        model(mx.array([[3, 1, 2]]), cache=cache)
        return model(mx.array([[7]]), cache=cache)

    before = logits()
    profile(model, context=7, timer=Fixed())
    assert model.runtime.executor.observer is None
    assert mx.array_equal(logits(), before)


def test_streamed_experts_are_refused(packed, budget):
    with pytest.raises(ModelError, match=r"\[experts\] expected all experts in mem"):
        profile(load(packed, expert_memory=budget))
    assert profile(load(packed), context=2, timer=Fixed()).rows


def test_a_model_that_is_not_ours_is_refused():
    with pytest.raises(ModelError, match="a model of moeflux_mlx but got object"):
        profile(object())


@pytest.mark.parametrize("name", ["context", "repeats", "prefill"])
def test_an_unusable_number_is_refused(checkpoint, name):
    value = -1 if name == "prefill" else 0
    with pytest.raises(ConfigError, match=rf"\[--{name}\] expected at least"):
        profile(load(checkpoint), **{name: value})


class Clock:
    """A clock that stands still unless moved."""

    def __init__(self):
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds

    def takes(self, seconds: float, result=()):
        self.seconds += seconds
        return result


def test_a_host_timer_divides_by_all_works():
    clock = Clock()
    works = [Work(lambda s: clock.takes(s), [s]) for s in (1.0, 2.0, 6.0)]
    assert HostTimer(3, clock).time(works).seconds == pytest.approx(3)


class NoBlocker:
    """A blocker that takes no time."""

    def lasting(self, seconds: float):
        return lambda: [mx.ones(1)]


def test_a_device_timer_subtracts_links_and_reports_host_time():
    clock, x = Clock(), mx.ones(64)

    def slow_to_launch(x):
        clock.seconds += 1e-4
        return x + 1

    timer = DeviceTimer(3, clock)
    timer._blocker = NoBlocker()
    timing = timer.time([Work(slow_to_launch, [x]) for _ in range(4)])
    assert timing.seconds == pytest.approx(1e-4)
    assert not timing.is_hidden
    # Blockers and steps take no time on this clock.
    timing = timer.time([Work(lambda x: x + 1, [x])])
    assert timing == Timing(0.0, False)


def test_launches_cost_extra_only_where_the_host_does_not_compute():
    ticks = itertools.count()
    assert HostTimer(3, lambda: next(ticks)).launch_seconds() == 0
    found = DeviceTimer(3, lambda: next(ticks)).launch_seconds()
    assert found == 1 / TIMED_LAUNCHES


def test_a_device_timer_reads_the_devices_clock_where_it_can():
    """On this device a step takes 7 us, a link 2 us, and a blocker any time."""
    device_ns, read = 0, []

    def step(x):
        nonlocal device_ns
        device_ns += 7_000
        return x + 1

    class Linked(Work):
        def link(self, after):
            nonlocal device_ns
            device_ns += 2_000
            return super().link(after)

    class AnyBlocker:
        def lasting(self, seconds: float):
            def run():
                nonlocal device_ns
                device_ns += 1_000_000 * (len(read) % 7)
                return [mx.ones(1)]

            return run

    def clock(after):
        read.append(device_ns)
        return mx.array([device_ns, 0], mx.uint64)

    timer = DeviceTimer(3, Clock(), clock=clock)
    timer._blocker = AnyBlocker()
    timing = timer.time([Linked(step, [mx.ones(64)]) for _ in range(4)])
    assert timing.seconds == pytest.approx(7e-6)
    assert len(set(read)) > 6


def test_a_device_timer_queues_until_the_host_is_hidden():
    """The blocker moves the clock when evaluated, and launches move it when encoded."""
    asked = []

    class Scripted(DeviceTimer):
        def _queued(self, blocker, encode):
            encode(blocker())
            return 3.0, 1e-3

        def _behind(self, works, n, blocker_s):
            asked.append(blocker_s)
            return Timing(1.0, is_hidden=blocker_s > 5e-3)

    timing = Scripted(1).time([Work(lambda x: x + 1, [mx.ones(64)])])
    assert timing.is_hidden
    assert asked == pytest.approx([1.5e-3, 6e-3])


def test_a_device_timer_queues_as_many_steps_as_it_may():
    queued = []

    class Scripted(DeviceTimer):
        def _behind(self, works, n, blocker_s):
            queued.append(n * len(works))
            return Timing(1.0)

    for limit in (64, 8, 1):
        timer = Scripted(1, Clock(), limit)
        timer._blocker = NoBlocker()
        timer.time([Work(lambda x: x + 1, [mx.ones(64)]) for _ in range(3)])
    assert queued == [63, 6, 3]


def test_a_blocker_lasts_at_least_the_requested_time():
    widths = []

    def elapsed(run):
        (product,) = run()
        widths.append(product.shape[0])
        return 1e-3 * (product.shape[0] / 1024) ** 3

    run = Blocker(elapsed).lasting(3e-2)
    assert set(widths) == {1024, 2048}
    assert run()[0].shape == (2048, 2048)


def test_linked_work_waits_and_gets_the_same_values():
    seen = []

    def call(x, ids):
        seen.append((x, ids))
        return x * mx.nan

    x, ids = mx.arange(32, dtype=mx.float32), mx.array([1, 2], mx.int32)
    work = Work(call, [x, ids])
    first = work.perform()
    second = work.perform(first)
    mx.eval(second)
    # The smaller input is tiny, which is slow to read on some devices.
    assert seen[1][0] is not x and mx.array_equal(seen[1][0], x)
    assert seen[1][1] is ids
    assert work.is_linked and not Work(lambda: mx.ones(3), []).is_linked


def test_a_state_is_carried_from_step_to_step():
    state = mx.zeros(16)
    work = Work(lambda s, x: (x, s + 1), [state, mx.ones(16)], carried=((1, 0),))
    for _ in range(3):
        work.perform()
    assert mx.array_equal(work.inputs[0], mx.full(16, 3.0))


def test_the_command_prints_and_writes_every_row(checkpoint, tmp_path, capsys):
    path = tmp_path / "rows.csv"
    flags = ["--executor", "ops", "--context", "3", "--repeats", "1"]
    assert main(["profile", str(checkpoint), *flags, "--csv", str(path)]) == 0
    text = capsys.readouterr().out
    for part in ("one token after 3", "whole step, end to end", "sum of calls"):
        assert part in text
    rows = list(csv.DictReader(path.read_text().splitlines()))
    assert [row["graph"] for row in rows[-3:]] == ["sum", "whole step", "remainder"]
    steps = [row for row in rows if row["labels"]]
    total = sum(float(row["us_per_step"]) for row in steps)
    assert total == pytest.approx(float(rows[-3]["us_per_step"]), rel=1e-3)
    assert sum(float(row["share"]) for row in steps) == pytest.approx(1, abs=0.01)
    assert "MoeDecodeExperts" in {row["ops"] for row in steps}


def test_without_time_left_the_largest_call_is_timed_and_the_rest_counted(
    checkpoint, capsys
):
    told = []
    found = profile(
        load(checkpoint),
        context=3,
        seconds=0,
        timer=Fixed(),
        report=lambda what, done, total: told.append((done, total)),
    )
    whole = profile(load(checkpoint), context=3, timer=Fixed())
    *calls, sampling = whole.rows
    largest = max(calls, key=lambda row: row.count * row.n_bytes)
    assert [row.label for row in found.rows] == [largest.label, sampling.label]
    assert found.n_untimed == sum(row.count for row in calls) - largest.count
    assert whole.n_untimed == 0 and found.whole_us > 0
    assert told == [(1, len(calls))]
    print_profile(found, Console(width=160))
    assert f"{found.n_untimed} calls were not timed" in capsys.readouterr().out


def test_two_launches_link_calls_of_any_types():
    """A GPU compiles a launch for each combination of types, which takes seconds."""
    types = (mx.float32, mx.bfloat16, mx.int32, mx.bool_)
    names = set()
    for x_type, *seen in itertools.product(types, types, types):
        for after in (seen, seen[:1], seen * 3):
            x = mx.ones((3, 5), x_type)
            made = linked(x, [mx.ones((2, 3), dtype) for dtype in after])
            assert made.dtype == x_type and made.shape == x.shape
            graph = io.StringIO()
            mx.export_to_dot(graph, made)
            names |= {*re.findall(r'label ="(Compiled[^"]*)"', graph.getvalue())}
    assert len(names) == 2
    x = mx.arange(6.0).reshape(2, 3).T
    assert mx.array_equal(linked(x, [x]), x)


def test_a_plot_without_matplotlib_names_the_extra_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ConfigError, match=r"pip install 'moeflux-mlx\[plot\]'"):
        check_plot(tmp_path / "x.png")


@pytest.mark.slow
def test_a_plot_has_a_bar_for_every_kind_of_step(checkpoint, tmp_path):
    pytest.importorskip("matplotlib")
    found = profile(load(checkpoint), context=2, timer=Fixed())
    path = tmp_path / "plot.svg"
    check_plot(path)
    save_plot(found, path)
    svg = path.read_text()
    assert "<!-- linear: delta_rule -->" in svg
    assert "smaller kinds -->" in svg
    save_plot(replace(found, rows=found.rows * 2), tmp_path / "many.png")
    with pytest.raises(ConfigError, match="expected a name that ends in"):
        check_plot(tmp_path / "plot.docx")
