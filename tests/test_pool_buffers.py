"""The pool: prefix uploads and downloads, aligned and borrowed memory, the plan."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from moeflux_mlx import ops
from moeflux_mlx.engine.executors import open_executor
from moeflux_mlx.engine.graph import BufferPool, BufId, Graph
from moeflux_mlx.engine.graph import roles as b
from moeflux_mlx.errors import GraphError, SizeMismatch

TWO_MIB = 2 << 20
N, DIM = 3, 5
# A role for each type of value; the host sees bfloat16 as uint16.
TYPES = {
    "float32": (mx.float32, b.GDecayBuf, np.float32),
    "bfloat16": (mx.bfloat16, b.HiddenBuf, np.uint16),
    "float16": (mx.float16, b.HiddenBuf, np.float16),
    "int32": (mx.float32, b.TokenIdsBuf, np.int32),
    "uint8": (mx.float32, b.ExpertBaseBuf, np.uint8),
}


@pytest.fixture
def pool():
    return BufferPool()


@pytest.fixture(params=TYPES)
def buffer(request):
    """A pool with one buffer ``[3, 5]``, and 15 host values for it."""
    activations, role, host_type = TYPES[request.param]
    pool = BufferPool(activations)
    values = np.arange(1, 16).astype(host_type).reshape(N, DIM)
    return pool, pool.alloc(role, (N, DIM), "values"), values


def address(array):
    return np.array(array, copy=False).ctypes.data


def fetch(pool, buf, like):
    host = np.empty_like(like)
    pool.download(buf, host)
    return host


# Host bytes in and out.
def test_a_buffer_reads_as_zeros_until_it_is_written(buffer):
    pool, buf, values = buffer
    assert not fetch(pool, buf, values).any()
    assert pool.handle(buf).shape == (N, DIM)
    assert pool.handle(buf).dtype == pool.info(buf).dtype


def test_uploaded_values_are_downloaded_unchanged(buffer):
    pool, buf, values = buffer
    pool.upload(buf, values)
    assert np.array_equal(fetch(pool, buf, values), values)
    assert pool.handle(buf).dtype == pool.info(buf).dtype


def test_a_shorter_upload_replaces_the_beginning_only(buffer):
    pool, buf, values = buffer
    pool.upload(buf, values)
    pool.upload(buf, values[:1] * 2)
    assert np.array_equal(fetch(pool, buf, values)[1:], values[1:])
    assert np.array_equal(fetch(pool, buf, values)[0], values[0] * 2)


def test_an_upload_at_an_offset_leaves_both_sides_alone(buffer):
    pool, buf, values = buffer
    row = DIM * values.itemsize
    pool.upload_at(buf, row, values[:1])
    expected = np.zeros_like(values)
    expected[1] = values[0]
    assert np.array_equal(fetch(pool, buf, values), expected)


def test_bytes_need_not_fall_on_whole_values(buffer):
    pool, buf, values = buffer
    pool.upload_at(buf, 1, values.tobytes()[1:-1])
    expected = bytearray(values.tobytes())
    expected[0] = expected[-1] = 0
    assert fetch(pool, buf, values).tobytes() == bytes(expected)


def test_a_shorter_download_takes_the_beginning(buffer):
    pool, buf, values = buffer
    pool.upload(buf, values)
    assert np.array_equal(fetch(pool, buf, values[:2]), values[:2])


def test_an_empty_upload_changes_nothing(buffer):
    pool, buf, values = buffer
    pool.upload(buf, values)
    pool.upload(buf, b"")
    pool.upload_at(buf, values.nbytes, b"")
    assert np.array_equal(fetch(pool, buf, values), values)


def test_too_many_bytes_are_refused_with_label_and_sizes(buffer):
    pool, buf, values = buffer
    long = bytearray(values.nbytes + 1)
    for move in (pool.upload, pool.download):
        with pytest.raises(SizeMismatch) as error:
            move(buf, long)
        facts = error.value.label, error.value.expected, error.value.actual
        assert facts == ("values", values.nbytes, values.nbytes + 1)
    assert not fetch(pool, buf, values).any()


@pytest.mark.parametrize(("offset", "end"), [(1, 61), (60, 120), (-1, 59)])
def test_an_upload_past_either_end_is_refused(pool, offset, end):
    buf = pool.alloc(b.HiddenBuf, (N, DIM), "hidden")
    with pytest.raises(SizeMismatch, match="'hidden' holds 60 bytes but got") as error:
        pool.upload_at(buf, offset, bytes(60))
    assert (error.value.expected, error.value.actual) == (60, end)


def test_an_upload_leaves_values_already_handed_out_alone(pool):
    buf = pool.alloc(b.HiddenBuf, (N, DIM), "hidden")
    pool.upload(buf, np.ones((N, DIM), np.float32))
    before = pool.handle(buf)
    pool.upload(buf, np.full((N, DIM), 7, np.float32))
    assert mx.all(before == 1) and mx.all(pool.handle(buf) == 7)


def test_a_value_of_another_shape_is_not_bound(pool):
    buf = pool.alloc(b.HiddenBuf, (N, DIM), "hidden")
    with pytest.raises(GraphError, match=r"'hidden' expected shape \(3, 5\)"):
        pool.bind(buf, mx.zeros((DIM, N)))


# Owned and borrowed memory.
@pytest.mark.parametrize("alignment", [4096, TWO_MIB])
@pytest.mark.parametrize("n_bytes", [1, 65537])
def test_aligned_memory_begins_at_a_multiple(pool, n_bytes, alignment):
    bufs = [
        pool.alloc_aligned(b.ExpertBaseBuf, n_bytes, alignment, f"experts{i}")
        for i in range(3)
    ]
    for buf in bufs:
        assert address(pool.handle(buf)) % alignment == 0
        assert pool.handle(buf).shape == (n_bytes,)
        assert not np.array(pool.handle(buf)).any()


def test_uploads_to_aligned_memory_land_in_place(pool):
    buf = pool.alloc_aligned(b.ExpertBaseBuf, 65537, TWO_MIB, "experts")
    array = pool.handle(buf)
    before = address(array)
    pool.upload_at(buf, 65530, bytes(range(1, 8)))
    assert address(pool.handle(buf)) == before
    assert np.array(array)[-8:].tolist() == [0, 1, 2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize("alignment", [0, -4096, 3000])
def test_an_alignment_is_a_power_of_two(pool, alignment):
    with pytest.raises(GraphError, match="'experts': expected a power of two"):
        pool.alloc_aligned(b.ExpertBaseBuf, 7, alignment, "experts")


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.uint8], ids=str)
def test_borrowed_memory_is_the_lenders(pool, dtype):
    array = mx.ones((N, DIM), dtype)
    mx.eval(array)
    buf = pool.register_borrowed(b.ExpertBaseBuf, array, "experts")
    assert pool.handle(buf) is array
    assert pool.info(buf).dtype == dtype and pool.info(buf).shape == (N, DIM)


def test_bytes_written_into_borrowed_memory_are_seen_by_both(pool):
    array = mx.zeros((7,), mx.uint8)
    buf = pool.register_borrowed(b.ExpertBaseBuf, array, "experts")
    pool.upload(buf, b"\x01\x02")
    assert array.tolist() == [1, 2, 0, 0, 0, 0, 0]
    np.array(array, copy=False)[6] = 9
    assert fetch(pool, buf, np.empty(7, np.uint8)).tolist() == [1, 2, 0, 0, 0, 0, 9]


def test_writes_to_disjoint_buffers_do_not_clobber_each_other(pool):
    bufs = [pool.alloc(b.ExpertBaseBuf, (33,), name) for name in "abc"]
    for buf, byte in zip(bufs, (0xAA, 0xBB, 0xCC), strict=True):
        pool.upload(buf, bytes([byte] * 33))
    for buf, byte in zip(bufs, (0xAA, 0xBB, 0xCC), strict=True):
        assert (fetch(pool, buf, np.empty(33, np.uint8)) == byte).all()


# Ids and labels.
def test_ids_count_up_and_labels_stay(pool):
    bufs = [pool.alloc(b.HiddenBuf, (N, DIM), name) for name in "abc"]
    assert [str(buf) for buf in bufs] == ["%0", "%1", "%2"]
    assert [pool.label(buf) for buf in bufs] == ["a", "b", "c"]
    assert pool.physical_buffer_count == 3


@pytest.mark.parametrize("index", [-1, 1, 99])
def test_an_id_of_no_buffer_is_refused_everywhere(pool, index):
    pool.alloc(b.HiddenBuf, (N, DIM), "only")
    bad = BufId(index, b.HiddenBuf)
    for use in (
        pool.info,
        pool.label,
        pool.handle,
        lambda buf: pool.upload(buf, b""),
        lambda buf: pool.upload_at(buf, 0, b""),
        lambda buf: pool.download(buf, bytearray()),
        lambda buf: pool.bind(buf, mx.zeros((N, DIM))),
    ):
        with pytest.raises(GraphError, match=f"buffer id %{index} out of range"):
            use(bad)


def test_reset_forgets_buffers_after_the_last_persistent_one(pool):
    scratch = pool.alloc(b.HiddenBuf, (N, DIM), "scratch")
    kept = pool.alloc(b.HiddenBuf, (N, DIM), "kept", persistent=True)
    gone = pool.alloc(b.HiddenBuf, (N, DIM), "gone")
    for buf in (scratch, kept, gone):
        pool.upload(buf, np.full((N, DIM), 7, np.float32))
    pool.reset_transient()
    assert mx.all(pool.handle(kept) == 7)
    assert mx.all(pool.handle(scratch) == 0) and pool.label(scratch) == "scratch"
    with pytest.raises(GraphError, match=f"{gone} out of range"):
        pool.handle(gone)
    assert pool.physical_buffer_count == 2
    assert pool.alloc(b.HiddenBuf, (N, DIM), "next").index == gone.index


def test_reset_without_persistent_buffers_forgets_all(pool):
    pool.alloc(b.HiddenBuf, (N, DIM), "scratch")
    pool.reset_transient()
    assert pool.physical_buffer_count == 0 and not pool.infos


# The plan.
def chain(pool, n_links=5):
    """Add ``mixed`` to ``stream`` repeatedly; return the graph and its buffers."""
    stream = pool.alloc(b.HiddenBuf, (N, DIM), "stream", persistent=True)
    mixed = pool.alloc(b.OProjOutBuf, (N, DIM), "mixed")
    pool.upload(stream, np.full((N, DIM), 2, np.float32))
    pool.upload(mixed, np.full((N, DIM), 3, np.float32))
    graph, bufs = Graph(pool), [stream]
    for i in range(n_links):
        bufs.append(pool.alloc(b.ResidualBuf, (N, DIM), f"sum{i}"))
        graph.push(
            ops.ResidualAddNTokens(
                label=f"add{i}",
                a=mixed,
                b=bufs[-2],
                out=bufs[-1],
                n_tokens=N,
                dim=DIM,
            )
        )
    return graph, mixed, bufs


def test_values_that_never_live_together_share_a_place(pool):
    graph, _, _ = chain(pool)
    assert pool.physical_buffer_count == 7
    pool.commit_plan(graph)
    assert pool.physical_buffer_count == 2 + 2


def test_the_plan_keeps_persistent_and_uploaded_values(pool):
    graph, mixed, bufs = chain(pool)
    pool.commit_plan(graph)
    assert mx.all(pool.handle(bufs[0]) == 2) and mx.all(pool.handle(mixed) == 3)
    assert pool.physical[bufs[0].index] != pool.physical[mixed.index]


def test_a_planned_graph_runs_and_leaves_its_result(pool):
    graph, _, bufs = chain(pool)
    pool.commit_plan(graph)
    for _ in range(2):
        open_executor("ops").execute(graph, "chain")
        assert mx.all(pool.handle(bufs[-1]) == 2 + 5 * 3)


def test_the_plan_is_the_same_every_time():
    places = []
    for _ in range(3):
        pool = BufferPool()
        pool.commit_plan(chain(pool)[0])
        places.append(list(pool.physical))
    assert places[0] == places[1] == places[2]


def test_planning_twice_changes_nothing(pool):
    graph, mixed, bufs = chain(pool)
    pool.commit_plan(graph)
    before = list(pool.physical)
    pool.commit_plan(graph)
    assert len(set(pool.physical)) == len(set(before)) == pool.physical_buffer_count
    shared = [[p == q for q in before] for p in before]
    assert shared == [[p == q for q in pool.physical] for p in pool.physical]
    assert mx.all(pool.handle(bufs[0]) == 2) and mx.all(pool.handle(mixed) == 3)


def test_a_planned_layout_outlives_a_reset(pool):
    graph, mixed, bufs = chain(pool)
    pool.commit_plan(graph)
    pool.reset_transient()
    pool.upload(mixed, np.full((N, DIM), 4, np.float32))
    open_executor("ops").execute(graph, "chain")
    assert mx.all(pool.handle(bufs[-1]) == 2 + 5 * 4)
    assert pool.label(bufs[-1]) == "sum4"


def test_a_second_graph_may_be_planned_over_the_same_pool(pool):
    graph, mixed, bufs = chain(pool)
    pool.commit_plan(graph)
    second = Graph(pool, "second")
    out = pool.alloc(b.ResidualBuf, (N, DIM), "total")
    op = ops.ResidualAddNTokens(
        label="total", a=mixed, b=bufs[-1], out=out, n_tokens=N, dim=DIM
    )
    second.push(op)
    pool.commit_plan(second)
    for each in (graph, second):
        open_executor("ops").execute(each, each.name)
    assert mx.all(pool.handle(out) == 2 + 6 * 3)


def test_a_shared_place_takes_uploads_while_it_holds_a_value_of_another_shape(pool):
    graph, _, bufs = chain(pool, n_links=2)
    narrow = pool.alloc(b.SharedFfnActBuf, (N, 2), "narrow")
    gate = pool.alloc(b.SharedFfnGateBuf, (N, 2), "gate", persistent=True)
    up = pool.alloc(b.SharedFfnUpBuf, (N, 2), "up", persistent=True)
    graph.push(
        ops.SwigluFusedBatched(
            label="act", gate=gate, up=up, out=narrow, n_tokens=N, dim=2
        )
    )
    pool.commit_plan(graph)
    first = bufs[1]
    assert pool.physical[first.index] == pool.physical[narrow.index]
    open_executor("ops").execute(graph, "run")
    assert pool.handle(narrow).shape == (N, 2)
    values = np.arange(N * DIM, dtype=np.float32).reshape(N, DIM)
    pool.upload(first, values)
    assert np.array_equal(fetch(pool, first, values), values)
