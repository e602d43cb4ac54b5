"""Parse amounts of memory, and convert the experts' share into a number of slots."""

from __future__ import annotations

import re
import reprlib
from dataclasses import dataclass

from ... import config, device
from ...errors import BudgetError, ConfigError

UNITS = {
    "": 1,
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}
AMOUNT = re.compile(r"\s*(\d+(?:\.\d+)?(?:[eE]\+?\d+)?)\s*([A-Za-z]*)\s*", re.ASCII)

# More than any machine has, and the first value that int64 byte counts cannot hold.
MOST = 2**63
# Experts take at most this share of physical memory. A larger one would leave too
# little for the system and the page cache.
MEMORY_SHARE = 0.75
# An amount as users write it.
Amount = int | float | str
# The amount that a search finds to be the fastest.
AUTO = "auto"


def parse_bytes(memory: Amount, name: str = "memory") -> int:
    """Parse an amount of memory such as ``8GB``, ``512MiB``, ``1.5e9`` or an int.

    Raises:
        ConfigError: the amount is not a positive number in a known unit; names the
            argument.
    """
    amount = _amount(memory)
    if amount is None or not 1 <= amount < MOST:
        raise ConfigError(
            f"[{name}] expected bytes such as 8GB, 512MiB or 1.5e9 but got "
            f"{_shown(memory)}"
        )
    return int(amount)


def _shown(value: object) -> str:
    # Python refuses to print an int of more than 4,300 digits.
    if isinstance(value, int) and abs(value) >= MOST:
        return "an int beyond 63 bits"
    return reprlib.repr(value)


def _amount(memory: object) -> float | None:
    if isinstance(memory, int | float) and not isinstance(memory, bool):
        return memory
    if not isinstance(memory, str) or (found := AMOUNT.fullmatch(memory)) is None:
        return None
    unit = UNITS.get(found[2].upper())
    return None if unit is None else float(found[1]) * unit


def most_bytes() -> int:
    """Return the default budget: a share of physical memory, capped by the device."""
    return within_working_set(int(MEMORY_SHARE * device.physical_memory_bytes()))


def within_working_set(n_bytes: int) -> int:
    """Return ``n_bytes``, capped at the working set that the device recommends."""
    limits = device.gpu_limits()
    return n_bytes if limits is None else min(n_bytes, limits.working_set_bytes)


@dataclass(frozen=True)
class Amounts:
    """Memory bounds in bytes for the process and for its experts; None: unbounded.

    ``fastest``: search for the fastest amount within the process's bound.
    """

    process: int | None = None
    experts: int | None = None
    fastest: bool = False

    @classmethod
    def read(cls, memory: Amount | None, expert_memory: Amount | None) -> Amounts:
        """Parse a user's amounts; without any, take the environment's.

        Raises:
            ConfigError: as ``parse_bytes``.
        """
        if memory is None and expert_memory is None:
            memory, expert_memory = config.memory(), config.expert_memory()
        most = (
            None
            if expert_memory is None
            else parse_bytes(expert_memory, "expert_memory")
        )
        if memory == AUTO:
            return cls(most_bytes(), most, fastest=True)
        return cls(None if memory is None else parse_bytes(memory), most)


def count_slots(
    memory: int,
    *,
    stride: int,
    slack_bytes: int,
    n_records: int,
    n_minimum: int,
) -> int:
    """Return how many slots of ``stride`` bytes fit into ``memory`` less the slack.

    Args:
        memory: the budget for experts in bytes.
        slack_bytes: bytes for the pool's alignment.
        n_records: number of records, which is the most slots of use.
        n_minimum: number of slots that one token needs.

    Raises:
        BudgetError: ``n_minimum`` slots do not fit; states the bytes they need.
    """
    n_slots = min((memory - slack_bytes) // stride, n_records)
    if n_slots < n_minimum:
        minimum_bytes = n_minimum * stride + slack_bytes
        raise BudgetError(
            f"[expert_memory] expected at least {minimum_bytes} bytes "
            f"({minimum_bytes / 2**20:.2f} MiB: {n_minimum} experts of {stride} bytes "
            f"and {slack_bytes} for alignment) but got {memory}"
        )
    return n_slots
