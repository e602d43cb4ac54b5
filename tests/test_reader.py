"""Reads by position are complete, or end in an error that names the place."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import xxhash

from moeflux_mlx.errors import ExpertStoreError
from moeflux_mlx.experts.files.reader import Batch, HostPlace, Read, ReadWorkers
from moeflux_mlx.experts.files.spans import Span, read_fully

INTERRUPTED = """
import sys
from moeflux_mlx.experts.files.reader import Batch, HostPlace, Read, ReadWorkers
from moeflux_mlx.experts.files.spans import Span
file = open(sys.argv[1], "rb")
buffer = memoryview(bytearray(16 << 20))
span = Span(file.fileno(), "f", 0, ((0, len(buffer)),))
reads = [Read((span,), HostPlace(buffer), 0, e) for e in range(100_000)]
pool, batch = ReadWorkers(3), Batch(reads)
pool.submit(batch)
print("reading", flush=True)
batch.wait()
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "experts.bin"
    path.write_bytes(bytes(i * 7 % 251 for i in range(100_003)))
    with open(path, "rb") as opened:
        yield opened


def read_of(file, offset, n_bytes, **fields):
    place = HostPlace(memoryview(bytearray(n_bytes)))
    span = Span(file.fileno(), Path(file.name), offset, ((0, n_bytes),))
    return Read((span,), place, layer=3, expert=17, **fields)


@pytest.fixture(params=[0, 10**9], ids=["threads", "inline"])
def inline_bytes(request):
    return request.param


def run(reads, inline_bytes):
    pool, batch = ReadWorkers(3, inline_bytes), Batch(reads)
    pool.submit(batch)
    batch.wait()
    pool.close()
    return reads


def test_many_reads_by_few_threads_fill_every_buffer(file, inline_bytes):
    content = Path(file.name).read_bytes()
    reads = run([read_of(file, n * 97, n % 7 + 1) for n in range(1_001)], inline_bytes)
    for n, read in enumerate(reads):
        assert read.error is None and read.done
        assert bytes(read.place.open()) == content[n * 97 : n * 97 + n % 7 + 1]


def test_an_interrupt_while_threads_start_leaves_none_behind(monkeypatch):
    """Ctrl-C may come when a thread runs but its start has not returned."""
    start, started = threading.Thread.start, []

    def interrupted(thread):
        start(thread)
        started.append(thread)
        if len(started) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(threading.Thread, "start", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ReadWorkers(3)
    assert len(started) == 2
    for thread in started:
        thread.join(timeout=10)
        assert not thread.is_alive()


def test_a_closed_pool_reads_without_threads(file):
    content = Path(file.name).read_bytes()
    pool = ReadWorkers(3, inline_bytes=0)
    pool.close()
    pool.submit(batch := Batch([read_of(file, 5, 63), read_of(file, 6, 63)]))
    assert batch.over
    assert [bytes(read.place.open()) for read in batch.reads] == [
        content[5:68],
        content[6:69],
    ]


def test_reads_of_a_batch_end_in_any_order(file, monkeypatch):
    """The second of three is held until the third is done."""
    content, preadv, go_on = Path(file.name).read_bytes(), os.preadv, threading.Event()

    def held(fd, buffers, offset):
        if offset == 100:
            assert go_on.wait(timeout=60)
        return preadv(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", held)
    reads = [read_of(file, 100 * n, 63) for n in range(3)]
    pool, batch = ReadWorkers(2, inline_bytes=0), Batch(reads)
    pool.submit(batch)
    deadline = time.monotonic() + 60
    while not (reads[0].done and reads[2].done):
        assert time.monotonic() < deadline
        time.sleep(0.001)
    assert not batch.over and not reads[1].done
    go_on.set()
    batch.wait()
    assert batch.over and all(read.done for read in reads)
    for read in reads:
        assert bytes(read.place.open()) == content[read.spans[0].offset :][:63]
    pool.close()


def test_cancelled_reads_are_not_awaited(file, monkeypatch):
    preadv, begun, go_on = os.preadv, threading.Event(), threading.Event()

    def held(*args):
        begun.set()
        assert go_on.wait(timeout=60)
        return preadv(*args)

    monkeypatch.setattr(os, "preadv", held)
    reads = [read_of(file, 0, 63) for _ in range(5)]
    pool, batch = ReadWorkers(1, inline_bytes=0), Batch(reads)
    pool.submit(batch)
    assert begun.wait(timeout=60)
    batch.cancel()
    go_on.set()
    batch.wait()
    assert [read.done for read in reads] == [True] + [False] * 4
    pool.close()


def test_the_spans_of_one_read_are_read_at_the_same_time(file, monkeypatch):
    """Each read waits for the other one to have begun."""
    content, preadv = Path(file.name).read_bytes(), os.preadv
    both = threading.Barrier(2, timeout=60)

    def held(*args):
        both.wait()
        return preadv(*args)

    monkeypatch.setattr(os, "preadv", held)
    fd, path = file.fileno(), Path(file.name)
    spans = Span(fd, path, 50, ((30, 33),)), Span(fd, path, 0, ((0, 30),))
    read = Read(spans, HostPlace(memoryview(bytearray(70))), 3, 17, padding=7)
    expected = content[:30] + content[50:83]
    read.checksum = xxhash.xxh3_64_intdigest(expected)
    run([read], inline_bytes=0)
    assert read.error is None and bytes(read.place.open()) == expected + bytes(7)


def test_a_read_past_the_end_names_file_layer_and_expert(file, inline_bytes):
    good, bad = run([read_of(file, 0, 63), read_of(file, 100_000, 63)], inline_bytes)
    assert good.error is None
    assert isinstance(bad.error, ExpertStoreError)
    for part in (file.name, "expert 17", "layer 3", "ends after 3"):
        assert part in str(bad.error)


def test_a_read_that_the_system_refuses_names_file_layer_and_expert(
    tmp_path, inline_bytes
):
    fd = os.open(tmp_path, os.O_RDONLY)
    span = Span(fd, tmp_path, 0, ((0, 5),))
    read = Read((span,), HostPlace(memoryview(bytearray(5))), 3, 17)
    run([read], inline_bytes)
    os.close(fd)
    assert "expert 17 of layer 3" in str(read.error)
    assert "directory" in str(read.error)


def test_a_checksum_is_compared_when_given(file, inline_bytes):
    content = Path(file.name).read_bytes()[5:68]
    checksum = xxhash.xxh3_64_intdigest(content)
    good, bad = run(
        [
            read_of(file, 5, 63, checksum=checksum),
            read_of(file, 6, 63, checksum=checksum),
        ],
        inline_bytes,
    )
    assert good.error is None
    assert f"expected checksum {checksum:016x}" in str(bad.error)


def test_short_reads_are_continued():
    path = "/proc/kallsyms"
    if not os.path.exists(path):
        pytest.skip("no file here whose reads are short")
    with open(path, "rb") as opened:
        buffer = memoryview(bytearray(100_003))
        first = os.preadv(opened.fileno(), [buffer], 0)
        assert 0 < first < len(buffer), "this file's reads are not short"
        read_fully(opened.fileno(), 0, buffer)
    with open(path, "rb") as opened:
        assert opened.read(100_003) == bytes(buffer)


@pytest.mark.slow
def test_an_interrupt_ends_a_process_that_waits_for_reads(tmp_path):
    path = tmp_path / "sparse.bin"
    with open(path, "wb") as sparse:
        sparse.truncate(16 << 20)
    command = [sys.executable, "-c", INTERRUPTED, str(path)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "reading\n"
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert "KeyboardInterrupt" in errors
    assert process.returncode != 0


def test_short_scatter_reads_are_continued_in_the_middle_of_a_buffer():
    path = "/proc/kallsyms"
    if not os.path.exists(path):
        pytest.skip("no file here whose reads are short")
    sizes = [1, 4_093, 17, 50_000, 3, 45_889]
    buffers = [memoryview(bytearray(n_bytes)) for n_bytes in sizes]
    with open(path, "rb") as opened:
        first = os.preadv(opened.fileno(), buffers, 0)
        assert 0 < first < sum(sizes), "this file's reads are not short"
        read_fully(opened.fileno(), 0, *buffers)
    with open(path, "rb") as opened:
        assert opened.read(sum(sizes)) == b"".join(map(bytes, buffers))


def test_a_read_of_several_spans_names_the_file_that_ends_early(
    file, tmp_path, inline_bytes
):
    short = tmp_path / "short.bin"
    short.write_bytes(b"x" * 5)
    with open(short, "rb") as other:
        good = Span(file.fileno(), Path(file.name), 7, ((10, 3), (0, 10)))
        bad = Span(other.fileno(), short, 0, ((13, 6),))
        reads = [
            Read((good,), HostPlace(memoryview(bytearray(19))), 3, 17),
            Read((good, bad), HostPlace(memoryview(bytearray(19))), 3, 17),
        ]
        run(reads, inline_bytes)
    content = Path(file.name).read_bytes()
    expected = content[10:20] + content[7:10] + bytes(6)
    assert reads[0].error is None and bytes(reads[0].place.open()) == expected
    for part in (str(short), "expert 17", "layer 3", "ends after 5"):
        assert part in str(reads[1].error)


@pytest.mark.parametrize("step", ["begin", "read", "finish"])
def test_an_unexpected_error_belongs_to_its_read_and_ends_no_thread(
    file, monkeypatch, step
):
    def broken(*_):
        raise ZeroDivisionError

    pool = ReadWorkers(2, inline_bytes=0)
    with monkeypatch.context() as patch:
        patch.setattr(Read, step, broken)
        batch = Batch([read_of(file, n, 63) for n in range(9)])
        pool.submit(batch)
        batch.wait()
    # The error has no message, so its type must be named.
    named = ["ZeroDivisionError" in str(read.error) for read in batch.reads]
    assert all(named) and not any(read.done for read in batch.reads)
    pool.submit(again := Batch([read_of(file, 5, 63)]))
    again.wait()
    assert bytes(again.reads[0].place.open()) == Path(file.name).read_bytes()[5:68]
    pool.close()
