"""Which kernels an Op may run as, which it does, and who decides."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import mlx.core as mx

from ... import config
from ...errors import ConfigError
from ..graph.lower import Kernel, Together
from ..graph.op import REGISTRY, Op
from ..launch import Launch
from .tuned import ONE_BY_ONE, tuned

Run = Callable[[Launch], tuple[mx.array, ...]]


@dataclass(frozen=True)
class Way:
    """One way to run an Op: launches over its values, where ``fits`` allows.

    ``call(op, run, *values)`` takes the values that the Op's reference takes and
    returns the same. ``kernels`` names every kernel that it may launch.
    """

    name: str
    fits: Callable[[Any], bool]
    call: Callable[..., Any]
    kernels: tuple[str, ...] = ()


# MLX's own operations: every Op's last way.
MLX = "mlx"
TABLE: dict[type[Op], tuple[Way, ...]] = {}
# Tells of a kernel, by its name, whether it may be launched.
Usable = Callable[[str], bool]


def any_kernel(_name: str) -> bool:
    """Let every kernel be launched."""
    return True


def _always(_op: Any) -> bool:
    return True


def way(
    op_type: type[Op],
    name: str,
    fits: Callable[[Any], bool] = _always,
    kernels: tuple[str, ...] | None = None,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Add the decorated function to an Op's ways; earlier ones are preferred.

    Args:
        op_type: the Op.
        name: of the way: that of its kernel, or of its first one.
        fits: whether an Op of this type can go this way.
        kernels: all that it may launch, if not just the one of its name.
    """
    launched = (name,) if kernels is None else kernels

    def add(call: Callable[..., Any]) -> Callable[..., Any]:
        TABLE[op_type] = (*TABLE.get(op_type, ()), Way(name, fits, call, launched))
        return call

    return add


def ways(op: Op) -> tuple[Way, ...]:
    """Return the ways open to an Op, the preferred one first, MLX's own last."""
    last = Way(MLX, _always, lambda op, _run, *values: op.reference(*values))
    return (*(w for w in TABLE[type(op)] if w.fits(op)), last)


# Values of a row so short that tensor cores do not pay for staging an input.
SHORT_ROW = 512


def _has_short_rows(op: Any) -> bool:
    return bool(op.in_dim <= SHORT_ROW)


def _has_long_rows(op: Any) -> bool:
    return not _has_short_rows(op)


@dataclass(frozen=True)
class Preferred:
    """The name of a way, and the Ops that it is preferred for."""

    name: str
    fits: Callable[[Any], bool] = lambda op: True


# Ways that go before the table's order on an executor: on CUDA as measured there, on
# Metal those that need no measurement, until `moeflux tune` has made some.
PREFERRED: Mapping[str, Mapping[str, tuple[Preferred, ...]]] = {
    "metal": {
        # One token goes by rows. For several MLX has matrix units that our tiles have
        # not, and knows which Macs have better ones.
        "MatvecNTokens": (
            # Without the 16 KiB that v3 reserves more threadgroups fit on a core.
            Preferred("dequant_matvec_4bit_v4", _has_long_rows),
            Preferred("dequant_matvec_4bit_v3"),
            Preferred("dequant_matvec_2bit"),
            Preferred("bf16_matvec"),
            Preferred(MLX),
        ),
        "SdpaCausalTiled": (
            Preferred("sdpa_decode_parts"),
            Preferred("sdpa_decode"),
            Preferred(MLX),
        ),
    },
    "cuda": {
        # MLX's own products of many tokens use tensor cores; its dense one is several
        # times as fast as its quantised one.
        "MatvecNTokens": (
            Preferred("dequant_matvec_4bit_fast", _has_short_rows),
            Preferred("dequant_matvec_4bit_v4"),
            Preferred("dequant_matvec_2bit"),
            Preferred("mlx_dequantize"),
            Preferred(MLX),
        ),
        # MLX's attention of many tokens uses tensor cores and ours does not.
        "SdpaCausalTiled": (
            Preferred("sdpa_decode_parts"),
            Preferred("sdpa_decode"),
            Preferred(MLX),
        ),
        "GatedDeltaNetChunkwise": (Preferred("gated_delta_net_chunkwise"),),
    },
}


def choose(op: Op, executor: str = "", usable: Usable = any_kernel) -> Way:
    """Return the way an Op goes on an executor.

    That is the environment's choice, or what was found fastest on this device, or what
    is preferred on the executor, or the table's first. A way that does not fit this
    Op's shape is passed over, and so is one with a kernel that is not usable, unless
    the environment asks for it.

    Raises:
        ConfigError: the environment names an Op or a way that does not exist.
    """
    by_name = {way.name: way for way in ways(op)}
    asked = asked_ways().get(op.variant_name)
    if asked in by_name:
        return by_name[asked]
    winner = by_name.get(tuned(op.variant_name, [op], executor) or "")
    if winner is not None and all(map(usable, winner.kernels)):
        return winner
    return default_way(op, executor, usable)


def default_way(op: Op, executor: str = "", usable: Usable = any_kernel) -> Way:
    """Return the way an Op goes on an executor where nobody chose and nothing is tuned.

    That is a way preferred there, or the table's first that fits, of the ways whose
    kernels are usable.
    """
    by_name = {way.name: way for way in ways(op) if all(map(usable, way.kernels))}
    entries = PREFERRED.get(executor, {}).get(op.variant_name, ())
    preferred = [e.name for e in entries if e.fits(op)]
    return next(by_name[name] for name in (*preferred, *by_name) if name in by_name)


def asked_ways() -> dict[str, str]:
    """Return the ways that the environment asks for by Op name.

    Raises:
        ConfigError: there is no such Op or way.
    """
    wanted = config.lowering()
    for op, name in wanted.items():
        if op not in REGISTRY:
            raise ConfigError(f"[MOEFLUX_LOWERING] expected an Op but got {op!r}")
        names = [w.name for w in TABLE[REGISTRY[op]]] + [MLX]
        if name not in names:
            raise ConfigError(
                f"[MOEFLUX_LOWERING] {op}: expected one of {', '.join(names)} but got "
                f"{name!r}"
            )
    return wanted


Values = Mapping[Any, Any]


@dataclass(frozen=True)
class Group:
    """Consecutive Ops that launches perform together, for less than one by one.

    ``types`` are those of the Ops, of which the last may come again; ``takes(ops)``
    tells how many of the Ops ahead it performs, 0 for none;
    ``call(ops, run, values)`` takes what their buffers and weights hold by ``BufId``
    and name and returns by ``BufId`` what it wrote of buffers read later. Whether it
    ``takes_parts`` of rows as they are; ``joint``: matrices come as those that hold
    them. ``kernels`` names every kernel that it may launch.
    """

    name: str
    types: tuple[type[Op], ...]
    takes: Callable[[Sequence[Op]], int]
    call: Callable[[Sequence[Op], Run, Values], Values]
    takes_parts: bool
    joint: bool
    kernels: tuple[str, ...]

    def weights(self, ops: Sequence[Op]) -> tuple[str, ...]:
        """Return the names of the layer's weights that it reads."""
        refs = (ref for op in ops for ref in op.weight_refs)
        names = (
            ref.joint.name if self.joint and ref.joint else ref.name for ref in refs
        )
        return tuple(dict.fromkeys(names))


GROUPS: list[Group] = []


def group(
    name: str,
    types: tuple[type[Op], ...],
    takes: Callable[[Sequence[Op]], int],
    *,
    takes_parts: bool = False,
    joint: bool = False,
    kernels: tuple[str, ...] | None = None,
) -> Callable[[Callable[..., Values]], Callable[..., Values]]:
    """Add the decorated function as a group, named after its kernel.

    Args:
        kernels: all that it may launch, if not just the one of its name.
    """
    launched = (name,) if kernels is None else kernels

    def add(call: Callable[..., Values]) -> Callable[..., Values]:
        GROUPS.append(Group(name, types, takes, call, takes_parts, joint, launched))
        # Where several fit, that of most Ops.
        GROUPS.sort(key=lambda each: -len(each.types))
        return call

    return add


def launched_by(kernel: str) -> list[str]:
    """Return the names of the Ops, and groups of them, that may launch a kernel."""
    by_ops = {
        op.__name__
        for op, ways in TABLE.items()
        if any(kernel in way.kernels for way in ways)
    }
    return sorted(by_ops) + [each.name for each in GROUPS if kernel in each.kernels]


def fused(
    ops: Sequence[Op], run: Run, executor: str = "", usable: Usable = any_kernel
) -> Together | None:
    """Return how the Ops ahead are performed together, or None.

    An Op whose way the environment chose is left alone, as are Ops that were found
    faster one by one on this device. A group with a kernel that is not usable is passed
    over.
    """
    if not config.fuse():
        return None
    asked = asked_ways()
    for each, n in groups_ahead(ops):
        chosen = any(op.variant_name in asked for op in ops[:n])
        if chosen or not all(map(usable, each.kernels)):
            continue
        if tuned(each.name, ops[:n], executor) != ONE_BY_ONE:
            call = partial(each.call, ops[:n], run)
            return Together(n, call, each.weights(ops[:n]), each.takes_parts)
    return None


def groups_ahead(ops: Sequence[Op]) -> Iterator[tuple[Group, int]]:
    """Yield the groups that can perform Ops ahead, and how many of them."""
    for each in GROUPS:
        ahead = zip(ops, each.types, strict=False)
        here = len(ops) >= len(each.types) and all(isinstance(*pair) for pair in ahead)
        n = each.takes(ops) if here else 0
        if n:
            yield each, n


def lowered(
    op: Op, run: Run, executor: str = "", usable: Usable = any_kernel
) -> Kernel:
    """Return the function that performs ``op`` with launches given to ``run``."""
    return partial(choose(op, executor, usable).call, op, run)
