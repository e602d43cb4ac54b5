"""Choose how to reach experts: files mapped into memory, or records read into slots."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rich.filesize import decimal

from ... import config
from ...errors import BudgetError, ConfigError
from ...system.progress import Report, notice
from ..files.layout import ExpertLayout
from ..files.packed import PackedExperts
from ..files.store import ExpertStore
from ..pool.budget import MEMORY_SHARE, most_bytes, within_working_set
from ..pool.pool import pool_stride
from ..pool.segments import full_bytes
from .mapped import MappedExperts
from .streamer import ExpertStreamer


def expert_io(io: str | None, *, gives_way: bool) -> str:
    """Return the requested way of reading experts.

    Args:
        io: one of ``config.EXPERT_IO``; None takes the environment's choice.
        gives_way: the pool must shrink as caches grow, which mapped experts cannot.

    Raises:
        ConfigError: ``io`` is unknown, or is ``mmap`` while ``gives_way`` is set.
    """
    io = config.expert_io(io)
    if not gives_way:
        return io
    if io == "mmap":
        raise ConfigError(
            "[expert_io] expected 'pread' or 'direct' with memory= but got 'mmap': "
            "mapped experts cannot give way to caches; bound them with "
            "expert_memory= instead"
        )
    return "pread" if io == "auto" else io


def open_experts(
    store: ExpertStore,
    memory: int | None,
    stream: Callable[[], ExpertStreamer],
    *,
    io: str | None = None,
    on_host: bool = False,
    report: Report | None = None,
) -> ExpertStreamer | MappedExperts:
    """Map a pack if it fits and MLX can use its pages, else stream; print the choice.

    On a CPU a store that fits is read into slots instead: the system drops idle pages
    of mapped files, and the next token would wait for the disk again.

    Args:
        store: the open files of the experts.
        memory: bytes for experts, as for ``ExpertStreamer``.
        stream: opens the store's streamer with that memory.
        io: one of ``config.EXPERT_IO``; None takes the environment's choice.
        on_host: whether MoE Ops take NumPy arrays here.
        report: receives the progress of reading a map.

    Raises:
        ConfigError: ``io`` is unknown, or the experts cannot be mapped as requested.
        BudgetError: ``memory`` is too small for the map or for one token.
        ExpertStoreError: a record cannot be read.
    """
    io = config.expert_io(io)
    if io == "mmap":
        experts = MappedExperts(
            _mappable(store, memory), on_host=on_host, report=report
        )
        notice(f"experts mapped as requested: {_decision(store)}")
        return experts
    fits = io == "auto" and all_fit(store, memory)
    if fits and not on_host and isinstance(store, PackedExperts):
        try:
            experts = MappedExperts(store, on_host=False, report=report)
        except ConfigError:
            # MLX cannot compute on mapped pages here: read every expert into the pool.
            pass
        else:
            notice(f"experts mapped: {_decision(store)}")
            return experts
    if memory is not None and (most := within_working_set(memory)) < memory:
        notice(
            f"experts take {decimal(most)} of {decimal(memory)}: this device "
            "recommends no larger working set"
        )
    streamer = stream()
    if io == "auto":
        held = "all of them" if streamer.resident else f"{streamer.n_slots} at a time"
        notice(f"experts read into memory, {held}: {_decision(store)}")
    return streamer


def all_fit(store: ExpertStore, memory: int | None) -> bool:
    """Return whether an ``ExpertStreamer`` with ``memory`` would hold every expert.

    The bound is the smaller of ``memory`` and the default budget (``most_bytes``).
    """
    layouts = [store.layout(layer) for layer in store.layers]
    counts = [store.count(layer) for layer in store.layers]
    return slots_fit(layouts, counts, memory)


def slots_fit(
    layouts: Sequence[ExpertLayout], counts: Sequence[int], memory: int | None = None
) -> bool:
    """Return ``all_fit`` for layers with these record layouts and expert counts."""
    most = most_bytes()
    budget = most if memory is None else min(memory, most)
    return full_bytes(counts, pool_stride(layouts)) <= budget


def all_bytes(store: ExpertStore) -> int:
    """Return the bytes of all records of a store."""
    return sum(store.count(i) * store.layout(i).stride for i in store.layers)


def _mappable(store: ExpertStore, memory: int | None) -> PackedExperts:
    if not isinstance(store, PackedExperts):
        raise ConfigError(
            "[expert_io] expected a packed directory for 'mmap' but got a plain "
            "checkpoint: pack it first, or use 'pread'"
        )
    if memory is not None and memory < all_bytes(store):
        raise BudgetError(
            f"[expert_io] expected memory of at least {all_bytes(store)} bytes, all "
            f"experts, for 'mmap' but got {memory}: use 'pread'"
        )
    return store


def _decision(store: ExpertStore) -> str:
    return (
        f"{decimal(all_bytes(store))} in all; unbounded they may take "
        f"{decimal(most_bytes())}, {MEMORY_SHARE:.0%} of this machine's memory"
    )
