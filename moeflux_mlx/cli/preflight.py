"""Checks and forecasts of commands before they load a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .. import config, device
from ..errors import BudgetError, MoefluxError
from ..experts.pool.budget import Amounts, most_bytes
from ..experts.pool.pool import POOL_ALIGNMENT
from ..memory.forecast import Forecast, memory_bandwidth
from ..memory.plan import MemoryPlan, own_bytes
from ..opening.chat_template import check_chat_template, check_syntax
from ..opening.download import check_kinds
from ..opening.headers import local, model_headers
from ..system.bandwidth import disk_bytes_per_second
from ..system.progress import notice
from .inspect_summary import ModelSummary, summarize

# The flags of streaming with their defaults.
DEFAULTS = {"scope": "global", "policy": None, "read_ahead": "auto", "expert_io": None}


def check_template(model: str | Path, given: str | None = None) -> None:
    """Check the chat template of a command that uses one.

    The template of a model that is yet to be downloaded is not checked.

    Args:
        given: a template that replaces the model's.

    Raises:
        ModelError: the template is not in Jinja's syntax.
    """
    if given is not None:
        check_syntax("--chat-template", given)
    elif (path := local(model)) is not None:
        check_chat_template(path)


def announce(model: str | Path, options: dict[str, Any]) -> None:
    """Print a forecast for a model that is about to be loaded with these options.

    It prints nothing for a model without experts, or for one that loading will refuse.

    Raises:
        BudgetError: a model that would be downloaded is larger than memory, and no
            option bounds it.
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
        if local(model) is None:
            raise BudgetError(f"[load] {model}: {found.mode()}: {advice(found)}")
        return
    notice(f"before loading {model}: {found.mode()}; {found.speed()}")
    if flags := without_effect(options, found):
        notice(
            f"before loading {model}: {', '.join(flags)} will have no effect, since "
            "all experts are in memory: bound them with --memory or --expert-memory"
        )


def without_effect(options: dict[str, Any], found: Forecast) -> list[str]:
    """Return the given flags of streaming if all experts are in memory."""
    if found.streams and found.missing:
        return []
    given = {name: options.get(name) for name in DEFAULTS if name in options}
    flags = [name for name, value in given.items() if value != DEFAULTS[name]]
    if found.streams:
        # --expert-io also decides how a whole pack is read or mapped.
        flags = [name for name in flags if name != "expert_io"]
    return ["--" + name.replace("_", "-") for name in flags]


def forecast(
    path: Path,
    summary: ModelSummary,
    amounts: Amounts,
    plan: MemoryPlan | None = None,
) -> Forecast:
    """Predict how a model runs within these amounts of memory.

    Args:
        path: the model's directory, whose largest file is read to measure the disk.
        plan: the model's memory plan, if there is one.
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
    # Aligning the first slot takes some of the memory.
    slots = summary.full_bytes - POOL_ALIGNMENT
    return whole * (given - POOL_ALIGNMENT) // max(1, slots)


def _disk_bandwidth(path: Path) -> float | None:
    """Measure the disk on the largest file; None if that file has no data."""
    files = [file for file in path.iterdir() if file.is_file()]
    largest = max(files, key=lambda file: file.stat().st_size, default=None)
    if largest is None or _is_hole(largest):
        return None
    return disk_bytes_per_second(largest, config.read_threads())


def _is_hole(file: Path) -> bool:
    """Tell whether a file is mostly a hole, which needs no disk read."""
    found = file.stat()
    return found.st_blocks * 512 < found.st_size // 2


def advice(found: Forecast) -> str:
    """Name the flag that makes a model fit."""
    bound = f"{most_bytes() / 1e9:.2g}GB"
    return (
        f"stream the experts with --memory {bound} (in Python "
        f'memory="{bound}", for mlx-lm MOEFLUX_MEMORY={bound})'
    )
