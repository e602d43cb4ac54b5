"""How experts are reached: mapped where files can be the memory, else in slots."""

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
    """Return the way of reading that is asked for; mapped experts never give way.

    Args:
        io: one of ``config.EXPERT_IO``; None takes the environment's choice.
        gives_way: experts are to give way as caches grow.

    Raises:
        ConfigError: ``io`` is none of these, or one that cannot give way.
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
    """Map a pack that fits where MLX computes on its pages, else stream; say which.

    On a CPU all that fit are read into slots once: the system takes idle pages of files
    away, and then a token waits for the disk again.

    Args:
        store: the open files that experts come from.
        memory: bytes for experts, as for ``ExpertStreamer``.
        stream: opens the store's streamer with that memory.
        io: one of ``config.EXPERT_IO``; None takes the environment's choice.
        on_host: MoE Ops take NumPy arrays here.
        report: hears how far the reading of a map has come.

    Raises:
        ConfigError: ``io`` is none of these, or experts are to be mapped that cannot.
        BudgetError: ``memory`` is too small, for the map or for a token.
        ExpertStoreError: a record could not be read.
    """
    io = config.expert_io(io)
    if io == "mmap":
        experts = MappedExperts(
            _mappable(store, memory), on_host=on_host, report=report
        )
        notice(f"experts mapped as asked: {_decision(store)}")
        return experts
    fits = io == "auto" and all_fit(store, memory)
    if fits and not on_host and isinstance(store, PackedExperts):
        try:
            experts = MappedExperts(store, on_host=False, report=report)
        except ConfigError:
            # MLX wants memory of its own here: they are read once, into the pool.
            pass
        else:
            notice(f"experts mapped: {_decision(store)}")
            return experts
    if memory is not None and (most := within_working_set(memory)) < memory:
        notice(
            f"experts take {decimal(most)} of {decimal(memory)}: that is the working "
            "set which this device recommends"
        )
    streamer = stream()
    if io == "auto":
        held = "all of them" if streamer.resident else f"{streamer.n_slots} at a time"
        notice(f"experts read into memory, {held}: {_decision(store)}")
    return streamer


def all_fit(store: ExpertStore, memory: int | None) -> bool:
    """Tell whether slots for all experts fit into ``memory`` and the machine's share.

    These are the slots that an ``ExpertStreamer`` would read them all into, and the
    share is what it takes where no ``memory`` is given.
    """
    layouts = [store.layout(layer) for layer in store.layers]
    counts = [store.count(layer) for layer in store.layers]
    return slots_fit(layouts, counts, memory)


def slots_fit(
    layouts: Sequence[ExpertLayout], counts: Sequence[int], memory: int | None = None
) -> bool:
    """Do as ``all_fit`` for layers of so many experts of these layouts."""
    most = most_bytes()
    asked = most if memory is None else memory
    return full_bytes(counts, pool_stride(layouts)) <= min(asked, most)


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
