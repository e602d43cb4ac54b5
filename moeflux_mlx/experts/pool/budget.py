"""Read amounts of memory, and turn experts' share into a number of slots."""

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

# More than any machine has, or than counters of bytes can hold.
MOST = 2**63
# Above this share of physical memory experts would push everything else out.
MEMORY_SHARE = 0.75
# An amount as users give it.
Amount = int | float | str
# Instead of an amount: as much as is found to be the fastest.
AUTO = "auto"


def parse_bytes(memory: Amount, name: str = "memory") -> int:
    """Read an amount of memory such as ``8GB``, ``512MiB``, ``1.5e9`` or an int.

    Raises:
        ConfigError: names the argument when the amount is not a positive number of
            bytes in a known unit.
    """
    amount = _amount(memory)
    if amount is None or not 1 <= amount < MOST:
        raise ConfigError(
            f"[{name}] expected bytes such as 8GB, 512MiB or 1.5e9 but got "
            f"{_shown(memory)}"
        )
    return int(amount)


def _shown(value: object) -> str:
    # Python refuses to write whole numbers of more than 4,300 digits.
    if isinstance(value, int) and abs(value) >= MOST:
        return "more bytes than there are"
    return reprlib.repr(value)


def _amount(memory: object) -> float | None:
    if isinstance(memory, int | float) and not isinstance(memory, bool):
        return memory
    if not isinstance(memory, str) or (found := AMOUNT.fullmatch(memory)) is None:
        return None
    unit = UNITS.get(found[2].upper())
    return None if unit is None else float(found[1]) * unit


def most_bytes() -> int:
    """Return the memory to take where none is asked for."""
    return within_working_set(int(MEMORY_SHARE * device.physical_memory_bytes()))


def within_working_set(n_bytes: int) -> int:
    """Return as many of the bytes as the device recommends to use at most."""
    limits = device.gpu_limits()
    return n_bytes if limits is None else min(n_bytes, limits.working_set_bytes)


@dataclass(frozen=True)
class Amounts:
    """Bounds on memory in bytes: on the process, and on its experts; None: neither.

    ``fastest``: the process takes the amount found to be the fastest, within its bound.
    """

    process: int | None = None
    experts: int | None = None
    fastest: bool = False

    @classmethod
    def read(cls, memory: Amount | None, expert_memory: Amount | None) -> Amounts:
        """Read a user's amounts; the environment has them where the user gives none.

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
    """Return how many slots of ``stride`` bytes fit into ``memory`` beside the slack.

    Args:
        memory: the budget for experts.
        slack_bytes: bytes for the pool's alignment.
        n_records: no more slots than these are of use.
        n_minimum: fewer slots cannot serve one token.

    Raises:
        BudgetError: the minimum does not fit; states it.
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
