"""Messages between the ranks of a process group: their experts' rows, and checks.

Each rank computes the rows of its own experts and has zeros for the others. The ranks
add their rows as integers, which keeps every bit, even of -0.0 and NaN. Marks beside
each row are added too. They show whether all ranks chose the same experts, and whether
one failed. So either all ranks continue, or all of them raise an error.

Ranks that compute the same layer on different devices may get different bits, and then
choose different experts. In that case rank 0 leads: all ranks take rank 0's input of
the block and its choice of experts, compute the block again, and continue from rank 0's
output of the layer.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import mlx.core as mx
import numpy as np
import xxhash
from mlx.utils import tree_map

from ... import device
from ...errors import BudgetError, GroupError, PeerBudgetError, PeerError
from ..files.share import share_of
from ..weights import leaves

T = TypeVar("T")
# Each rank has a bit in the mark of failures, so there are no more ranks than this.
MOST_RANKS = 32
# Numbers beside each row: the expert's, its square, and a bit for each failed rank.
N_MARKS = 3
# All ranks take rank 0's results of up to this size, so that they draw the same tokens.
LED_BYTES = 8 << 20


class OtherChoiceError(GroupError):
    """Ranks chose different experts; every rank raises this for the same block."""


class Told(NamedTuple):
    """The sums of all ranks' marks on some blocks' rows, and the ids of this rank.

    ``ids`` is ``[B, n]`` and ``marks`` ``[B, n, N_MARKS]`` for B blocks. The functions
    in ``asked`` are called with a block's checked ids, to count this rank's experts.
    Without ``ids`` the marks are compared with the ranks' mean id.
    """

    names: Sequence[str]
    ids: mx.array | np.ndarray | None
    marks: mx.array
    asked: Sequence[Callable[[np.ndarray], None]]


class Exchange:
    """One rank's connection to a process group.

    Every rank must make the same calls in the same order. ``waits``: each block waits
    for the other ranks' rows, as on a CPU; a GPU checks them at the end of a call.

    Args:
        group: the group that ``mx.distributed.init`` returns.

    Raises:
        GroupError: there are more than ``MOST_RANKS`` ranks.
    """

    def __init__(self, group: mx.distributed.Group):
        self._group = group
        self.rank, self.size = group.rank(), group.size()
        self.waits = device.on_cpu()
        # If true, this call checks only at its end that all ranks agree.
        self.defers = False
        # Whether all ranks can check the present call at its end.
        self.may_defer = False
        # Whether ranks chose different experts in the present layer, and in how many
        # layers so far.
        self._parted = False
        self.n_parted = 0
        self._owed: list[Told] = []
        if self.size > MOST_RANKS:
            raise GroupError(
                f"[group] expected at most {MOST_RANKS} ranks but got {self.size}"
            )

    def own(self, n_experts: int) -> range:
        """Return this rank's share of a block's experts."""
        return share_of(n_experts, self.rank, self.size)

    def rows(
        self,
        name: str,
        ids: np.ndarray,
        own: range,
        like: tuple[int, mx.Dtype],
        make: Callable[[np.ndarray], mx.array],
    ) -> mx.array:
        """Return a row for each of the expert ``ids``, from the rank with the expert.

        Args:
            name: the block's name for errors.
            ids: expert ids, the same on every rank.
            own: this rank's experts.
            like: the length of a row, and its type.
            make: returns the rows for places in ``ids`` that have ``own`` experts.

        Raises:
            PeerError: another rank failed.
            OtherChoiceError: another rank chose other experts.
            GroupError: another rank ended.
        """
        places = np.flatnonzero((ids >= own.start) & (ids < own.stop))
        self._settle()
        failure: Exception | None = None
        rows = mx.zeros((0, like[0]), like[1])
        try:
            if len(places):
                rows = make(places)
                mx.eval(rows)
        except Exception as error:
            failure = error
            places, rows = places[:0], mx.zeros((0, like[0]), like[1])
        marked = self._marked(ids, places, rows, failed=failure is not None)
        total = self._added(marked)
        if failure is not None:
            self._evaluate(total)
            raise failure
        return self._given(name, ids, total, like[1], lambda _: None)

    def masked(
        self,
        name: str,
        ids: mx.array,
        own: range,
        rows: mx.array,
        asked: Callable[[int], None],
    ) -> mx.array:
        """Return a row for each of the expert ``ids``, without waiting for them.

        Args:
            name: the block's name for errors.
            ids: expert ids, the same on every rank.
            own: this rank's experts.
            rows: a row for each id; rows of other ranks' experts are ignored.
            asked: receives the number of ids in ``own`` once the ids are known.

        Raises:
            GroupError: another rank ended.
        """
        total = self.masked_sum(ids, own, rows)

        def count(ids: np.ndarray) -> None:
            asked(n_within(ids, own))

        return self._given(name, ids, total, rows.dtype, count)

    def masked_sum(self, ids: mx.array, own: range, rows: mx.array) -> mx.array:
        """Return the lazy sum of all ranks' rows and marks, uint32 ``[words]``.

        ``parted`` divides it again; the other arguments are those of ``masked``.
        """
        inside = (ids >= own.start) & (ids < own.stop)
        words = mx.where(inside[:, None], rows.view(mx.uint32), 0)
        numbers, column = ids.astype(mx.uint32)[:, None] + 1, mx.arange(N_MARKS)
        squares = mx.where(column == 1, numbers * numbers, 0)
        marks = mx.where(column == 0, numbers, squares)
        return self._added(_joined(words, marks))

    def _given(
        self,
        name: str,
        ids: mx.array | np.ndarray,
        total: mx.array,
        dtype: mx.Dtype,
        asked: Callable[[np.ndarray], None],
    ) -> mx.array:
        """Return the rows of a sum; check the marks now, or later if ``defers``."""
        rows, marks = parted(total, len(ids), dtype)
        self.owe(Told([name], ids[None], marks[None], [asked]))
        if not self.defers:
            self._evaluate(total)
            self._settle()
        return rows

    def owe(self, told: Told) -> None:
        """Check marks at the end of the call, or before the next rows are needed."""
        self._owed.append(told)

    @contextlib.contextmanager
    def together(self, *, defers: bool) -> Iterator[None]:
        """Run one call in this context, at whose end all ranks must agree.

        Args:
            defers: check only at the end, unless something needs the results earlier.

        Raises:
            PeerError, OtherChoiceError, GroupError: as ``rows``.
        """
        self.defers, self._parted = defers, False
        try:
            yield
            self._settle()
            if self._parted:
                raise GroupError(
                    "[group] expected every rank to choose the same experts but they "
                    "chose others outside any decoder layer: load it in one process"
                )
        finally:
            self.defers = self._parted = False
            self._owed.clear()

    def led(self, array: mx.array) -> mx.array:
        """Return rank 0's array; other ranks' ``array`` gives only shape and type."""
        flat = array.reshape(-1).view(mx.uint8)
        words = mx.pad(flat, (0, -flat.size % 4)).view(mx.uint32)
        total = self._added(words if self.rank == 0 else mx.zeros_like(words))
        return total.view(mx.uint8)[: flat.size].view(array.dtype).reshape(array.shape)

    def follow(self, *arrays: mx.array) -> list[mx.array]:
        """Return rank 0's arrays after different choices; ``mended`` does the rest."""
        self._parted = True
        self.n_parted += 1
        found = [self.led(array) for array in arrays]
        self._evaluate(*found)
        return found

    @property
    def has_parted(self) -> bool:
        """Whether ranks chose different experts in the present layer."""
        return self._parted

    def mended(self, out: Any) -> Any:
        """Return a layer's output; rank 0's if ranks chose different experts in it."""
        if not self._parted:
            return out
        self._parted = False
        led = tree_map(lambda x: self.led(x) if isinstance(x, mx.array) else x, out)
        self._evaluate(*leaves(led))
        return led

    def _settle(self) -> None:
        """Check all deferred marks."""
        owed, self._owed = self._owed, []
        if owed:
            lazy = (x for told in owed for x in (told.marks, told.ids))
            self._evaluate(*(x for x in lazy if isinstance(x, mx.array)))
        for names, given, lazy_marks, asked in owed:
            sums = np.array(lazy_marks)
            # If the numbers of all ranks are equal, each is their mean.
            own = sums[..., 0] // self.size - 1 if given is None else np.array(given)
            for name, ids, marks, count in zip(names, own, sums, asked, strict=True):
                self._check(name, ids, marks)
                count(ids)

    def _marked(
        self, ids: np.ndarray, places: np.ndarray, rows: mx.array, *, failed: bool
    ) -> mx.array:
        """Return rows at their places and zeros elsewhere, each row with its marks."""
        words = rows.view(mx.uint32)
        blank = mx.zeros((1, words.shape[1]), mx.uint32)
        taken = np.full(len(ids), len(places), np.uint32)
        taken[places] = np.arange(len(places), dtype=np.uint32)
        marks = np.zeros((len(ids), N_MARKS), np.uint32)
        # If n numbers have the sum n x, and their squares the sum n x^2, then each of
        # the numbers is x.
        marks[:, 0] = ids.astype(np.uint32) + 1
        marks[:, 1] = marks[:, 0] ** 2
        marks[:, 2] = failed << self.rank
        placed = mx.concatenate([words, blank])[mx.array(taken)]
        return _joined(placed, mx.array(marks))

    def _check(self, name: str, ids: np.ndarray, told: np.ndarray) -> None:
        self._check_failed(name, int(told[0, 2]) if len(told) else 0)
        wanted = ids.astype(np.uint32) + 1
        if (told[:, 0] < wanted + self.size - 1).any():
            raise GroupError(
                f"[group] {name}: expected the sum of all ranks' numbers but got this "
                "one's alone: use another --backend of mlx.launch"
            )
        same = told[:, 0] == wanted * self.size
        same &= told[:, 1] == wanted**2 * np.uint32(self.size)
        if not same.all():
            place = int(np.flatnonzero(~same)[0])
            raise OtherChoiceError(
                f"[group] {name}: expected every rank to choose the same experts but "
                f"for row {place} not all chose {ids[place]}: use machines of one "
                "kind, with the same model and the same version of MLX"
            )

    def _check_failed(
        self, name: str, bits: int, kind: type[PeerError] = PeerError
    ) -> None:
        if failed := [rank for rank in range(self.size) if bits >> rank & 1]:
            ranks = ", ".join(map(str, failed))
            raise kind(
                f"[group] {name}: expected every rank to go on but rank {ranks} "
                "failed: its own error says why"
            )

    def call(
        self,
        n_seqs: int,
        n_tokens: int,
        ids: mx.array,
        step: Callable[[], int],
        *,
        resident: Callable[[], bool],
    ) -> int:
        """Return the number of tokens to compute together: all ranks' smallest.

        Args:
            n_seqs: number of sequences.
            n_tokens: tokens of each sequence.
            ids: the call's token ids, to compare with the other ranks'.
            step: returns the number of tokens for which this rank has room.
            resident: returns whether this rank keeps all of its experts in memory.
                Ranks may check late only if all make the call in the same way.

        Raises:
            PeerBudgetError: another rank has no room.
            PeerError: another rank failed otherwise.
            GroupError: another rank's call has other tokens, or it ended.
        """
        failure: Exception | None = None
        found = 0
        try:
            found = step()
        except Exception as error:
            failure = error
        fails, lacks = failure is not None, isinstance(failure, BudgetError)
        way = 0 if self.waits else 1 + resident()
        told = self.tell([way, n_seqs, n_tokens, *_digest(ids), fails, lacks, found])
        ways, told = told[:, 0], told[:, 1:]
        self.may_defer = bool(ways[0] and (ways == ways[0]).all())
        if failure is not None:
            raise failure
        kind = PeerBudgetError if told[:, -2].any() else PeerError
        self._check_failed("call", _bits(told[:, -3]), kind)
        told = np.delete(told, (-3, -2), axis=1)
        if (told[:, :-1] != told[0, :-1]).any():
            shapes = [f"{row[0]} x {row[1]}" for row in told]
            raise GroupError(
                "[group] expected the same tokens on every rank but got others, of "
                f"shapes {', '.join(shapes)}: call every rank alike, with the same "
                "mx.random.seed"
            )
        return int(told[:, -1].min())

    def end(self, failure: Exception | None) -> None:
        """Tell all ranks whether this one failed; raise its failure, if any.

        Raises:
            PeerError: another rank failed.
        """
        told = self.tell([failure is not None])
        if failure is not None:
            raise failure
        self._check_failed("call", _bits(told[:, 0]))

    def alike(self, work: Callable[[], T]) -> T:
        """Do work that all ranks do; raise an error if it fails on any of them.

        Raises:
            PeerError: another rank failed.
        """
        failure: Exception | None = None
        try:
            done = work()
        except Exception as error:
            failure = error
        self.end(failure)
        return done

    def least(self, number: int) -> int:
        """Return the smallest of all ranks' numbers, each of up to 64 bits."""
        told = self.tell([number >> 32, number & 0xFFFFFFFF]).tolist()
        return min(high << 32 | low for high, low in told)

    def agree(self, facts: Mapping[str, object]) -> None:
        """Check that all ranks have equal facts, such as options.

        Args:
            facts: values by name; equal values must have the same ``repr``.

        Raises:
            GroupError: a fact differs; names it.
        """
        shown = [repr(fact).encode() for fact in facts.values()]
        told = self.tell([n for text in shown for n in _hash(text)])
        for number, (name, fact) in enumerate(facts.items()):
            columns = told[:, 2 * number : 2 * number + 2]
            others = np.flatnonzero((columns != columns[self.rank]).any(axis=1))
            if len(others):
                raise GroupError(
                    f"[group] expected the same {name} on every rank but got another "
                    f"than {fact!r} on rank {others[0]}: start all ranks alike"
                )

    def first(self, numbers: Sequence[int]) -> list[int]:
        """Return rank 0's ``numbers``, of 32 bits each."""
        found: list[int] = self.tell(numbers)[0].tolist()
        return found

    def tell(self, numbers: Sequence[int]) -> np.ndarray:
        """Return the 32-bit numbers of every rank, ``[size, n]``."""
        own = np.zeros((self.size, len(numbers)), np.uint32)
        own[self.rank] = numbers
        total = self._added(mx.array(own))
        self._evaluate(total)
        return np.array(total)

    def _added(self, own: mx.array) -> mx.array:
        """Return the lazy sum over all ranks, modulo 2**32."""
        return mx.distributed.all_sum(own, group=self._group)

    def _evaluate(self, *sums: mx.array) -> None:
        try:
            mx.eval(*sums)
        except RuntimeError as error:
            told = " ".join(str(error).split())
            raise GroupError(
                f"[group] expected {self.size} ranks but one of them ended ({told}): "
                "its own error says why"
            ) from error


def _joined(rows: mx.array, marks: mx.array) -> mx.array:
    """Return a message: the rows come first, so that nothing is copied out of it."""
    return mx.concatenate([rows.reshape(-1), marks.reshape(-1)])


def parted(total: mx.array, n: int, dtype: mx.Dtype) -> tuple[mx.array, mx.array]:
    """Return the ``n`` rows of a sum of ``masked_sum``, and its marks."""
    n_marks = n * N_MARKS
    rows, marks = mx.split(total, [total.size - n_marks])
    return rows.view(dtype).reshape(n, -1), marks.reshape(n, N_MARKS)


def n_within(ids: np.ndarray, own: range) -> int:
    """Return how many ids are in a rank's share."""
    return int(((ids >= own.start) & (ids < own.stop)).sum())


def _bits(flags: np.ndarray) -> int:
    """Return a whole number with a bit for each flag that is set."""
    return sum(1 << int(rank) for rank in np.flatnonzero(flags))


def _digest(ids: mx.array) -> tuple[int, int]:
    """Return a hash of a call's token ids as two 32-bit numbers."""
    if not mx.issubdtype(ids.dtype, mx.integer):
        return 0, 0
    return _hash(np.array(ids).astype(np.int64).tobytes())


def _hash(value: bytes) -> tuple[int, int]:
    high, low = divmod(xxhash.xxh3_64_intdigest(value), 1 << 32)
    return high, low
