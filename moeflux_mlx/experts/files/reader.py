"""Threads that read records straight into their slots."""

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
# Disks and networks give these for bytes that they read a moment later.
TRANSIENT = {errno.EIO, errno.EINTR, errno.EAGAIN, errno.ESTALE, errno.ETIMEDOUT}


class Place:
    """Where a record goes: ``n_bytes`` that are read into between open and close."""

    def __init__(self, n_bytes: int):
        self.n_bytes = n_bytes

    def open(self) -> memoryview:
        """Return host memory to read the record into."""
        raise NotImplementedError

    def close(self, whole: bool) -> None:
        """Have the read arrive if it is whole; nobody reads into it any more."""


class HostPlace(Place):
    """Memory that the host writes where it is."""

    def __init__(self, buffer: memoryview):
        super().__init__(len(buffer))
        self._buffer = buffer

    def open(self) -> memoryview:
        return self._buffer


@dataclass(slots=True)
class Read:
    """One record on its way: ``done`` once all of it was read, well or not.

    ``place`` takes the record and ``padding`` bytes after it, which direct reads fill
    too. ``name`` is the layer's in errors. ``second_tries`` counts spans whose
    first read failed.
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
        """Have memory to read into; for one thread at a time, before each span."""
        if self._memory is None and self.error is None:
            try:
                self._memory = self.place.open()
            except Exception as error:
                self.fail(self.spans[0], error)

    def read(self, span: Span) -> bool:
        """Read one of the spans, unless another one has failed.

        Returns:
            Whether it took a second try.
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
        # A read that ended in any other way must not pass for a record.
        except Exception as error:
            self.fail(span, error)
        return False

    def finish(self) -> None:
        """Once every span was read, compare the checksum, if any, and let it arrive."""
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
        """Say why a span could not be read."""
        self.error = ExpertStoreError(
            f"[reader] {span.path}: expert {self.expert} of "
            f"{self.name or f'layer {self.layer}'} at {span.offset}: "
            f"{str(why) or type(why).__name__}"
        )
        if isinstance(why, Exception):
            self.error.__cause__ = why


class Batch:
    """Reads handed over together; threads take their spans one by one.

    The thread that waits may be interrupted anywhere, so it holds no lock, and what it
    waits for is a state: news only say that it is time to look at it again.
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
        """Whether nothing is left to read and no thread is at it."""
        return not (self._left or self._n_threads)

    def let_go(self) -> None:
        """Keep no slots' memory: a thread may yet come to find nothing left."""
        self.reads = ()

    def cancel(self) -> None:
        """Leave out reads that no thread has begun; such ones are never ``done``."""
        self._left.clear()

    def wait(self) -> None:
        """Wait until every read is over; Ctrl-C gets through, the reads go on."""
        while not self.over:
            self._news.get()

    def run_here(self) -> None:
        """Do every read now; those that an interrupt leaves out are not done."""
        left, self._left = self._left, []
        while left:
            self._run(*left.pop())

    def run_some(self) -> None:
        """Read spans until none is left: the work of every reading thread."""
        with self._counting:
            # Before any is taken: at no moment does it seem to be over.
            self._n_threads += 1
        while (part := self._take()) is not None:
            self._run(*part)
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
        # A thread that ended here would be waited for without end.
        except Exception as error:
            read.fail(span, error)
        read.seconds += time.perf_counter() - start


class ReadWorkers:
    """A fixed number of reading threads: so many reads are under way at a time.

    The threads are daemons: a process that is told to end does not wait for a disk.
    Batches of up to ``inline_bytes`` are read by the thread that submits them, and all
    are once the pool is closed.
    """

    def __init__(self, n_threads: int, inline_bytes: int = INLINE_BYTES):
        self.inline_bytes = inline_bytes
        self._queue: SimpleQueue[Batch | None] = SimpleQueue()
        # Idle threads must not outlive a pool that nobody closed.
        weakref.finalize(self, self._queue.put, None)
        self._threads = [
            threading.Thread(
                target=_work, args=(self._queue,), name="expert-reader", daemon=True
            )
            for _ in range(n_threads)
        ]
        # Not at the first read: Ctrl-C in Thread.start may come out of it as another
        # error, and must leave every request with its own.
        for thread in self._threads:
            thread.start()

    def submit(self, batch: Batch) -> None:
        """Begin to read; the batch tells which have arrived."""
        n_bytes = sum(read.n_bytes for read in batch.reads)
        if n_bytes <= self.inline_bytes or not self._threads:
            batch.run_here()
            return
        for _ in range(min(len(self._threads), batch.n_spans)):
            self._queue.put(batch)

    def close(self) -> None:
        """Let the threads finish submitted reads, and end them."""
        self._queue.put(None)
        for thread in self._threads:
            thread.join()
        self._threads = []


def _work(queue: SimpleQueue[Batch | None]) -> None:
    """Do reads until None comes, and leave that to the other threads."""
    while (batch := queue.get()) is not None:
        batch.run_some()
        # An idle thread keeps no slot's memory.
        del batch
    queue.put(None)
