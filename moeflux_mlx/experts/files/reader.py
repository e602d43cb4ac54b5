"""Worker threads that read records directly into their slots."""

from __future__ import annotations

import errno
import threading
import time
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from queue import SimpleQueue

import xxhash

from ...errors import ExpertStoreError
from .spans import Span

# Waking a thread takes longer than reading this much from the page cache.
INLINE_BYTES = 256 * 1024
# Errors after which a second try often succeeds, on disks and network volumes.
TRANSIENT = {errno.EIO, errno.EINTR, errno.EAGAIN, errno.ESTALE, errno.ETIMEDOUT}


class Place:
    """The target of a read: ``n_bytes`` of memory, valid between open and close."""

    def __init__(self, n_bytes: int):
        self.n_bytes = n_bytes

    def open(self) -> memoryview:
        """Return host memory to read the record into."""
        raise NotImplementedError

    def close(self, whole: bool) -> None:
        """End the read; if it is whole, deliver the record."""


class HostPlace(Place):
    """Host memory that the read fills directly."""

    def __init__(self, buffer: memoryview):
        super().__init__(len(buffer))
        self._buffer = buffer

    def open(self) -> memoryview:
        return self._buffer


@dataclass(slots=True)
class Read:
    """The read of one record; ``done`` once all spans were read or one failed.

    ``place`` has room for the record and for ``padding`` bytes after it, which direct
    reads fill too. ``name`` is the layer's name for errors. ``second_tries`` counts the
    spans whose first read failed.
    """

    spans: tuple[Span, ...]
    place: Place
    layer: int
    expert: int
    checksum: int | None = None
    padding: int = 0
    name: str = ""
    seconds: float = 0.0
    second_tries: int = 0
    error: ExpertStoreError | None = None
    done: bool = False
    n_left: int = field(init=False)
    _memory: memoryview | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self.n_left = len(self.spans)

    @property
    def n_bytes(self) -> int:
        """Bytes of the record, without padding."""
        return self.place.n_bytes - self.padding

    def begin(self) -> None:
        """Open the place before the first span; one thread at a time may call this."""
        if self._memory is None and self.error is None:
            try:
                self._memory = self.place.open()
            except Exception as error:
                self.fail(self.spans[0], error)

    def read(self, span: Span) -> bool:
        """Read a span, unless another one has failed.

        Returns:
            Whether a second try was needed.
        """
        if self.error is not None:
            return False
        assert self._memory is not None
        try:
            try:
                span.read(self._memory)
            except (OSError, EOFError) as error:
                if isinstance(error, OSError) and error.errno not in TRANSIENT:
                    raise
                span.read(self._memory)
                return True
        # Catch everything: an unfinished read must never pass for a record.
        except Exception as error:
            self.fail(span, error)
        return False

    def finish(self) -> None:
        """Compare the checksum, if any, and deliver the record, after the last span."""
        if self.error is None and self.checksum is not None:
            self._compare()
        try:
            self.place.close(self.error is None)
        except Exception as error:
            self.fail(self.spans[0], error)
        self._memory = None
        self.done = True

    def _compare(self) -> None:
        assert self._memory is not None
        found = xxhash.xxh3_64_intdigest(self._memory[: self.n_bytes])
        if found != self.checksum:
            self.fail(
                self.spans[0],
                f"expected checksum {self.checksum:016x} but got {found:016x}",
            )

    def fail(self, span: Span, why: Exception | str) -> None:
        """Record the error of a span."""
        self.error = ExpertStoreError(
            f"[reader] {span.path}: expert {self.expert} of "
            f"{self.name or f'layer {self.layer}'} at {span.offset}: "
            f"{str(why) or type(why).__name__}"
        )
        if isinstance(why, Exception):
            self.error.__cause__ = why


class Batch:
    """Reads submitted together; workers take their spans one by one.

    Ctrl-C may interrupt the waiting thread anywhere, so that thread takes no lock. It
    waits until ``over`` is true; an entry in ``_news`` only tells it to check again.
    """

    def __init__(self, reads: Sequence[Read]):
        self.reads = reads
        self._left = [
            (read, span) for read in reversed(reads) for span in reversed(read.spans)
        ]
        self.n_spans = len(self._left)
        self._n_threads = 0
        self._counting = threading.Lock()
        self._news: SimpleQueue[None] = SimpleQueue()

    @property
    def over(self) -> bool:
        """Whether no span is left and no worker is reading one."""
        return not (self._left or self._n_threads)

    def let_go(self) -> None:
        """Drop the reads and so their slots: a late worker may still hold the batch."""
        self.reads = ()

    def cancel(self) -> None:
        """Drop the spans that no worker has begun; their reads never get ``done``."""
        self._left.clear()

    def wait(self) -> None:
        """Wait until the batch is over; after Ctrl-C the reads go on."""
        while not self.over:
            self._news.get()

    def run_here(self) -> None:
        """Do every read in this thread; an interrupt leaves the rest not ``done``."""
        left, self._left = self._left, []
        while left:
            self._run(*left.pop())

    def run_some(self) -> None:
        """Read spans until none is left; each worker calls this."""
        with self._counting:
            # Count before taking a span, so that ``over`` is never true too early.
            self._n_threads += 1
        while (taken := self._take()) is not None:
            self._run(*taken)
        with self._counting:
            self._n_threads -= 1
        if self.over:
            self._news.put(None)

    def _take(self) -> tuple[Read, Span] | None:
        try:
            return self._left.pop()
        except IndexError:
            return None

    def _run(self, read: Read, span: Span) -> None:
        start = time.perf_counter()
        try:
            with self._counting:
                read.begin()
            second_try = read.read(span)
            with self._counting:
                read.second_tries += second_try
                read.n_left -= 1
                is_last = not read.n_left
            if is_last:
                read.finish()
        # Catch everything: if the worker ended here, ``wait`` would never return.
        except Exception as error:
            read.fail(span, error)
        read.seconds += time.perf_counter() - start


class ReadWorkers:
    """A fixed number of worker threads, which bounds the reads in flight.

    The threads are daemons, so a process can end without waiting for a disk. The
    submitting thread itself reads batches of at most ``inline_bytes``, and all batches
    once the workers are closed.
    """

    def __init__(self, n_threads: int, inline_bytes: int = INLINE_BYTES):
        self.inline_bytes = inline_bytes
        self._queue: SimpleQueue[Batch | None] = SimpleQueue()
        # End idle threads with this object, in case nobody calls ``close``.
        weakref.finalize(self, self._queue.put, None)
        self._threads = [
            threading.Thread(
                target=_work, args=(self._queue,), name="expert-reader", daemon=True
            )
            for _ in range(n_threads)
        ]
        # Start now and not at the first read: Ctrl-C inside Thread.start may surface as
        # another error, and a request must only raise its own errors.
        for thread in self._threads:
            thread.start()

    def submit(self, batch: Batch) -> None:
        """Begin to read a batch, which then tells when it is over."""
        n_bytes = sum(read.n_bytes for read in batch.reads)
        if n_bytes <= self.inline_bytes or not self._threads:
            batch.run_here()
            return
        for _ in range(min(len(self._threads), batch.n_spans)):
            self._queue.put(batch)

    def close(self) -> None:
        """Finish submitted reads and end the threads."""
        self._queue.put(None)
        for thread in self._threads:
            thread.join()
        self._threads = []


def _work(queue: SimpleQueue[Batch | None]) -> None:
    """Read batches until None arrives, then pass None on to the other threads."""
    while (batch := queue.get()) is not None:
        batch.run_some()
        # Do not keep slots alive while idle.
        del batch
    queue.put(None)
