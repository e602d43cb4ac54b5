"""The words of commands before they read a model: does it fit, how will it run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .. import config, device
from ..errors import BudgetError, MoefluxError
from ..experts.pool.budget import Amounts, most_bytes
from ..experts.pool.pool import POOL_ALIGNMENT
from ..memory.forecast import Forecast, memory_bandwidth
from ..memory.plan import MemoryPlan, own_bytes
from ..opening.download import check_kinds
from ..opening.headers import is_local, model_headers
from ..system.bandwidth import disk_bytes_per_second
from ..system.progress import notice
from .inspect_summary import ModelSummary, summarize

# The flags that say how experts come and go, as they are where nobody gives them.
DEFAULTS = {"scope": "global", "policy": None, "read_ahead": "auto", "expert_io": None}


def announce(model: str | Path, options: dict[str, Any]) -> None:
    """Print a line about a model that is about to be loaded with these options.

    Nothing is printed of a model that loading will refuse, or of a model without
    experts.

    Raises:
        BudgetError: a model of a hub, not downloaded yet, is larger than memory and
            nothing bounds it.
    """
    try:
        amounts = Amounts.read(options.get("memory"), options.get("expert_memory"))
        with model_headers(model) as path:
            check_kinds(path)
            summary = summarize(path)
            found = forecast(path, summary, amounts)
    except (MoefluxError, OSError, ValueError):
        return
    if found.streams and found.held_bytes < summary.bytes_per_expert:
        return
    if not found.fits and not found.streams:
        if not is_local(model):
            raise BudgetError(f"[load] {model}: {found.mode()}: {advice(found)}")
        return
    notice(f"before loading {model}: {found.mode()}; {found.speed()}")
    if flags := without_effect(options, found):
        notice(
            f"before loading {model}: {', '.join(flags)} will have no effect, since "
            "all experts are in memory: bound them with --memory or --expert-memory"
        )


def without_effect(options: dict[str, Any], found: Forecast) -> list[str]:
    """Return the flags on streaming that were given where all experts are held."""
    if found.streams and found.missing:
        return []
    given = {name: options.get(name) for name in DEFAULTS if name in options}
    flags = [name for name, value in given.items() if value != DEFAULTS[name]]
    if found.streams:
        # A pack is read or mapped as this one says, all at once.
        flags = [name for name in flags if name != "expert_io"]
    return ["--" + name.replace("_", "-") for name in flags]


def forecast(
    path: Path,
    summary: ModelSummary,
    amounts: Amounts,
    plan: MemoryPlan | None = None,
) -> Forecast:
    """Foretell how a model runs within these amounts of memory.

    Args:
        path: its directory, whose files tell the disk's speed.
        plan: the plan of its memory, where there is one.
    """
    streams = summary.is_packed or amounts != Amounts()
    held = _held_bytes(summary, amounts, plan) if streams else summary.expert_bytes
    return Forecast(
        resident_bytes=summary.resident_bytes,
        expert_bytes=summary.expert_bytes,
        token_bytes=summary.token_bytes,
        held_bytes=max(0, min(held, summary.expert_bytes)),
        room_bytes=device.left_bytes(),
        streams=streams,
        memory_bandwidth=memory_bandwidth(),
        disk_bandwidth=_disk_bandwidth(path),
    )


def _held_bytes(
    summary: ModelSummary, amounts: Amounts, plan: MemoryPlan | None
) -> int:
    whole = summary.expert_bytes
    if plan is not None:
        return whole * plan.n_slots // plan.n_experts
    given = summary.full_bytes if summary.all_fit else most_bytes()
    if amounts.process is not None:
        others = own_bytes() + device.PROCESS_GROWTH_BYTES + summary.resident_bytes
        given = amounts.process - others
    if amounts.experts is not None:
        given = min(given, amounts.experts) if amounts.process else amounts.experts
    # Slots begin at an aligned place, which takes some of the memory.
    slots = summary.full_bytes - POOL_ALIGNMENT
    return whole * (given - POOL_ALIGNMENT) // max(1, slots)


def _disk_bandwidth(path: Path) -> float | None:
    """Return how fast the largest of a model's files is read; None: it has no bytes."""
    files = [file for file in path.iterdir() if file.is_file()]
    largest = max(files, key=lambda file: file.stat().st_size, default=None)
    if largest is None or _is_hole(largest):
        return None
    return disk_bytes_per_second(largest, config.read_threads())


def _is_hole(file: Path) -> bool:
    """Tell whether a file is mostly a hole, which no disk has to read."""
    found = file.stat()
    return found.st_blocks * 512 < found.st_size // 2


def advice(found: Forecast) -> str:
    """Name the flag that would do where a model does not fit."""
    bound = f"{most_bytes() / 1e9:.2g}GB"
    return (
        f"stream the experts with --memory {bound} (in Python "
        f'memory="{bound}", for mlx-lm MOEFLUX_MEMORY={bound})'
    )
