"""Threads that read records straight into their slots."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from queue import SimpleQueue

import xxhash

from ..errors import ExpertStoreError
from .spans import Span

# Waking a thread takes longer than reading this much from the page cache.
INLINE_BYTES = 256 * 1024
# A thread that waits looks again after this long, should it have missed the news.
WAIT_SECONDS = 0.01


@dataclass(slots=True)
class Read:
    """One record on its way: ``done`` once a thread is through, well or not."""

    spans: tuple[Span, ...]
    buffer: memoryview
    layer: int
    expert: int
    checksum: int | None = None
    seconds: float = 0.0
    error: ExpertStoreError | None = None
    done: bool = False

    def run(self) -> None:
        """Read the record and, where a checksum is given, compare it."""
        start = time.perf_counter()
        try:
            for span in self.spans:
                self._fill(span)
            self._check()
        except ExpertStoreError as error:
            self.error = error
        self.seconds = time.perf_counter() - start
        self.done = True

    def _fill(self, span: Span) -> None:
        try:
            span.read(self.buffer)
        # A read that ended in any other way must not pass for a record.
        except Exception as error:
            raise self._failed(span, str(error)) from error

    def _check(self) -> None:
        if self.checksum is None:
            return
        found = xxhash.xxh3_64_intdigest(self.buffer)
        if found != self.checksum:
            raise self._failed(
                self.spans[0],
                f"expected checksum {self.checksum:016x} but got {found:016x}",
            )

    def _failed(self, span: Span, why: str) -> ExpertStoreError:
        return ExpertStoreError(
            f"[reader] {span.path}: expert {self.expert} of layer {self.layer} at "
            f"{span.offset}: {why}"
        )


class Batch:
    """Reads handed over together; threads take them one by one.

    The thread that waits may be interrupted anywhere, so it holds no lock: single
    operations on ``_left`` and ``_n_running`` are all it needs.
    """

    def __init__(self, reads: Sequence[Read]):
        self.reads = reads
        self._left = list(reversed(reads))
        self._n_running = 0
        self._counting = threading.Lock()
        self._news = threading.Lock()

    def run_here(self) -> None:
        """Do every read now; what an interrupt leaves out is not done."""
        self._left = []
        for read in self.reads:
            read.run()

    def take(self) -> tuple[Read | None, bool]:
        """Return a read to do, if any is left, and whether more are."""
        with self._counting:
            # Counted before it is taken: at no moment does it seem to be over.
            self._n_running += 1
            left = self._left
            try:
                return left.pop(), bool(left)
            except IndexError:
                self._n_running -= 1
                return None, False

    def finish_one(self) -> None:
        """Count one read as over."""
        with self._counting:
            self._n_running -= 1
            if self._news.locked():
                self._news.release()

    def cancel(self) -> None:
        """Leave out what no thread has begun."""
        self._left.clear()

    @property
    def over(self) -> bool:
        """Tell whether every read is over."""
        return not (self._left or self._n_running)

    def wait(self) -> None:
        """Wait until every read is over; Ctrl-C gets through, the reads go on."""
        while not self.over:
            self._news.acquire(timeout=WAIT_SECONDS)


class ReadPool:
    """A fixed number of reading threads, started at the first use.

    The threads are daemons: a process that is told to end does not wait for a disk.
    Batches of up to ``inline_bytes`` are read by the thread that submits them.
    """

    def __init__(self, n_threads: int, inline_bytes: int = INLINE_BYTES):
        self.n_threads, self.inline_bytes = n_threads, inline_bytes
        self._open()

    def _open(self) -> None:
        self._queue: SimpleQueue[Batch | None] = SimpleQueue()
        self._threads: list[threading.Thread] = []
        # Idle threads must not outlive a pool that nobody closed.
        weakref.finalize(self, self._queue.put, None)

    def submit(self, batch: Batch) -> None:
        """Begin to read; the batch tells when all of it is over."""
        if sum(len(read.buffer) for read in batch.reads) <= self.inline_bytes:
            batch.run_here()
            return
        while len(self._threads) < self.n_threads:
            thread = threading.Thread(
                target=_work, args=(self._queue,), name="expert-reader", daemon=True
            )
            thread.start()
            self._threads.append(thread)
        self._queue.put(batch)

    def close(self) -> None:
        """Let the threads finish what was submitted, and end them."""
        queue, threads = self._queue, self._threads
        self._open()
        queue.put(None)
        for thread in threads:
            thread.join()


def _work(queue: SimpleQueue[Batch | None]) -> None:
    """Do reads until None comes, and leave that to the other threads.

    How many there are nobody knows for sure: Ctrl-C may come between the start of one
    and its being noted down.
    """
    while (batch := queue.get()) is not None:
        read, has_more = batch.take()
        if has_more:
            queue.put(batch)
        if read is None:
            continue
        try:
            read.run()
        finally:
            batch.finish_one()
    queue.put(None)
