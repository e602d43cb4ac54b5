"""The winners of ``moeflux tune`` on this device, as lowering reads them.

Each device and executor has one JSON file. Its entries name the winner for an Op, or a
fusion of Ops, at one shape, with all times for readers.

A file of another device or another MLX is ignored with one warning. So is a broken file
in this machine's cache, which ``moeflux tune`` overwrites. A broken file that
``MOEFLUX_TUNING`` names is an error.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from ... import config
from ...device import machine_name, mlx_version
from ...errors import ConfigError
from ...system import private
from ...system.files import RECORD_BYTES, read_json, short
from ...system.volume import in_turn
from ..graph.op import Op, WeightRef

FORMAT = 2
# A day: larger times are invalid.
MOST_US = 24 * 3600 * 10**6
# The winner in the entry of a fusion: common launches, or each Op alone.
TOGETHER, ONE_BY_ONE = "together", "one by one"


@dataclass(frozen=True)
class Entry:
    """The fastest way of an Op, or of a fusion, at one shape.

    ``us`` holds the microseconds on the device of every way with right results, and
    ``launches`` its number of launches, 1 for MLX's own operations. ``launch_us`` is
    the host's time for one launch. ``refused`` says why each other way was refused.
    """

    name: str
    shape: str
    n_tokens: int
    default: str
    winner: str
    us: Mapping[str, float]
    launches: Mapping[str, int] = field(default_factory=dict)
    launch_us: float = 0.0
    refused: Mapping[str, str] = field(default_factory=dict)

    def cost(self, way: str) -> float:
        """Return the microseconds of a way on the device plus those on the host.

        It is the sum because a token may wait for either.
        """
        return self.us[way] + self.launches.get(way, 1) * self.launch_us

    @property
    def gain(self) -> float:
        """The cost of the default over that of the winner."""
        if self.winner == self.default or self.default not in self.us:
            return 1.0
        return self.cost(self.default) / self.cost(self.winner)


@dataclass(frozen=True)
class Tuning:
    """Entries of one device, one executor and one MLX."""

    device: str
    executor: str
    mlx: str
    date: str
    entries: tuple[Entry, ...]
    format: int = FORMAT

    def winner(self, name: str, shape: str, n_tokens: int) -> str | None:
        """Return the fastest way, or None if no such Op was tuned.

        One token takes the winner for one token. A prompt takes the winner for the
        prompt of the nearest length by ratio, the shorter of two equally near.
        """
        found = self._by_shape.get((name, shape), {})
        if n_tokens <= 1:
            return found.get(n_tokens)
        prompts = sorted(n for n in found if n > 1)
        if not prompts:
            return None
        nearest = min(prompts, key=lambda n: abs(math.log(n / n_tokens)))
        return found[nearest]

    @functools.cached_property
    def _by_shape(self) -> dict[tuple[str, str], dict[int, str]]:
        found: dict[tuple[str, str], dict[int, str]] = {}
        for entry in self.entries:
            by_length = found.setdefault((entry.name, entry.shape), {})
            by_length[entry.n_tokens] = entry.winner
        return found

    def merged(self, older: Tuning | None) -> Tuning:
        """Return these entries and those of ``older`` that they do not replace.

        An older tuning of another device, executor or MLX is dropped.
        """
        if older is None or older._origin != self._origin:
            return self
        new = {(e.name, e.shape, e.n_tokens): e for e in self.entries}
        old = {(e.name, e.shape, e.n_tokens): e for e in older.entries}
        return replace(self, entries=tuple((old | new).values()))

    @property
    def _origin(self) -> tuple[int, str, str, str]:
        return self.format, self.device, self.executor, self.mlx


def shape_of(ops: Sequence[Op]) -> str:
    """Return the facts of Ops that decide which way is fast, except their tokens.

    They are dimensions by name, the form of weights and the optional fields in use, and
    the names of several Ops.
    """
    if len(ops) == 1:
        return " ".join(_parts(ops[0]))
    return " | ".join(" ".join([op.variant_name, *_parts(op)]) for op in ops)


def _parts(op: Op) -> Iterable[str]:
    optional = {f.name for f in op.buffer_fields if f.optional}
    for each in fields(op):  # type: ignore[arg-type]
        value = getattr(op, each.name)
        if isinstance(value, WeightRef):
            yield f"{each.name}={_stored(value)}"
        elif isinstance(value, int) and each.name != "n_tokens":
            yield f"{each.name}={value}"
        elif each.name in optional and value is not None:
            yield f"+{each.name}"


def _stored(ref: WeightRef) -> str:
    dtype = str(ref.dtype).rsplit(".", 1)[-1]
    q = ref.quantization
    return dtype if q is None else f"{q.bits}bit/{q.group_size}/{q.mode}/{dtype}"


def n_tokens_of(ops: Sequence[Op]) -> int:
    """Return the number of tokens of Ops; 0 if they have none."""
    return int(getattr(ops[0], "n_tokens", 0))


def tuned(name: str, ops: Sequence[Op], executor: str) -> str | None:
    """Return the fastest way found for these Ops here, or None.

    Raises:
        ConfigError: ``MOEFLUX_TUNING`` names a file that is not a tuning.
    """
    if not executor:
        return None
    tuning = current(executor)
    if tuning is None:
        return None
    return tuning.winner(name, shape_of(ops), n_tokens_of(ops))


def current(executor: str) -> Tuning | None:
    """Return the tuning in force for an executor here, if any.

    Raises:
        ConfigError: ``MOEFLUX_TUNING`` names a file that is not a tuning.
    """
    chosen = config.tuning()
    if chosen is False:
        return None
    named = isinstance(chosen, Path)
    path = chosen if isinstance(chosen, Path) else _own_file(executor)
    if path is None:
        return None
    return _usable(path, executor, named)


def default_path(executor: str) -> Path:
    """Return the path of this device's own file; make its folder."""
    return private.made("tuned") / _own_name(executor)


def _own_file(executor: str) -> Path | None:
    """Return this device's own file; None if it is missing or others may write it."""
    folder = private.found("tuned")
    path = folder / _own_name(executor) if folder else None
    return path if path and private.is_private(path) else None


def _own_name(executor: str) -> str:
    device = re.sub(r"[^a-z0-9]+", "-", machine_name().lower()).strip("-")
    return f"{device}-{executor}.json"


@functools.cache
def _usable(path: Path, executor: str, named: bool) -> Tuning | None:
    """Read a file once; return None, with a warning, if it is of no use here."""
    try:
        tuning = read(path)
    except ConfigError as error:
        if named:
            raise
        _pass_over(f"{error}: run moeflux tune again")
        return None
    expected = (FORMAT, machine_name(), executor, mlx_version())
    if tuning._origin != expected:
        wanted, got = (", ".join(map(str, x[1:])) for x in (expected, tuning._origin))
        _pass_over(
            f"[tuning] {path}: expected times of {wanted} but they are of {got}: run "
            "moeflux tune again"
        )
        return None
    return tuning


def _pass_over(message: str) -> None:
    warnings.warn(message, stacklevel=2)


def read(path: Path) -> Tuning:
    """Read a file that ``save`` wrote.

    Raises:
        ConfigError: it cannot be read, or has another format.
    """
    try:
        found: dict[str, Any] = read_json(path, RECORD_BYTES)
        if type(found["format"]) is not int or found["format"] != FORMAT:
            raise ConfigError(
                f"[tuning] {path}: expected format {FORMAT} but got "
                f"{short(found['format'])}"
            )
        entries = tuple(_entry(**entry) for entry in found.pop("entries"))
        tuning = Tuning(**found, entries=entries)
        _check_texts(tuning.device, tuning.executor, tuning.mlx, tuning.date)
        return tuning
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(
            f"[tuning] {path}: expected a file of moeflux tune but got {short(error)}"
        ) from error


def _entry(**values: Any) -> Entry:
    entry = Entry(**values)
    names = (*entry.us, *entry.launches, *entry.refused, *entry.refused.values())
    _check_texts(entry.name, entry.shape, entry.default, entry.winner, *names)
    counts = (entry.n_tokens, *entry.launches.values())
    times = (entry.launch_us, *entry.us.values())
    if any(type(n) is not int or n < 0 for n in counts):
        raise ValueError(f"counts {short(counts)}")
    if any(type(t) not in (int, float) or not 0 <= t <= MOST_US for t in times):
        raise ValueError(f"times {short(times)}")
    if entry.winner not in entry.us or not entry.cost(entry.winner):
        raise ValueError(f"entry {short(entry.name)} without a timed winner")
    return entry


def _check_texts(*values: object) -> None:
    for value in values:
        if not isinstance(value, str):
            raise TypeError(f"{short(value)} where text is expected")


def add(tuning: Tuning, path: Path) -> None:
    """Add entries to a file, which keeps its others if they are of the same origin.

    A file that is no tuning is replaced.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Commands that tune two models at once keep the winners of both.
    with in_turn(path.parent):
        older = None
        with contextlib.suppress(ConfigError):
            older = read(path)
        save(tuning.merged(older), path)


def save(tuning: Tuning, path: Path) -> None:
    """Write a file atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    private.write_text(path, json.dumps(asdict(tuning), indent=1) + "\n")
    _usable.cache_clear()
