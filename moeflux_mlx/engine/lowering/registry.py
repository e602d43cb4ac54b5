"""The registry of ways to run each Op and of fusions, and the choice among them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import mlx.core as mx

from ... import config
from ...errors import ConfigError
from ..graph.lower import FusedCall, Kernel
from ..graph.op import REGISTRY, Op
from ..launch import Launch
from .tuned import ONE_BY_ONE, tuned

Run = Callable[[Launch], tuple[mx.array, ...]]


@dataclass(frozen=True)
class Way:
    """A way to run the Ops for which ``fits`` is true: launches over their values.

    ``call(op, run, *values)`` takes and returns the same values as the Op's reference.
    ``kernels`` names every kernel that it may launch.
    """

    name: str
    fits: Callable[[Any], bool]
    call: Callable[..., Any]
    kernels: tuple[str, ...] = ()


# The last way of every Op: its reference on MLX's own operations.
MLX = "mlx"
WAYS: dict[type[Op], tuple[Way, ...]] = {}
# Returns whether the kernel of a name may be launched.
Usable = Callable[[str], bool]


def any_kernel(_name: str) -> bool:
    """Allow every kernel."""
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
        name: the name of the way, which is that of its first kernel.
        fits: returns whether an Op of this type can run this way.
        kernels: all kernels that it may launch; default: the one of its name.
    """
    launched = (name,) if kernels is None else kernels

    def add(call: Callable[..., Any]) -> Callable[..., Any]:
        WAYS[op_type] = (*WAYS.get(op_type, ()), Way(name, fits, call, launched))
        return call

    return add


def ways(op: Op) -> tuple[Way, ...]:
    """Return the ways that fit an Op, the preferred one first and MLX's own last."""
    last = Way(MLX, _always, lambda op, _run, *values: op.reference(*values))
    return (*(w for w in WAYS[type(op)] if w.fits(op)), last)


# The longest row for which tensor cores do not repay the staging of an input.
SHORT_ROW = 512


def _has_short_rows(op: Any) -> bool:
    return bool(op.in_dim <= SHORT_ROW)


def _has_long_rows(op: Any) -> bool:
    return not _has_short_rows(op)


@dataclass(frozen=True)
class Preferred:
    """The name of a way, and the Ops for which it is preferred."""

    name: str
    fits: Callable[[Any], bool] = lambda op: True


# Ways that an executor tries before the order of ``WAYS``. Those of CUDA were measured;
# those of Metal follow from its design, until `moeflux tune` measures there.
PREFERRED: Mapping[str, Mapping[str, tuple[Preferred, ...]]] = {
    "metal": {
        # One token uses our kernels by rows. For more, MLX uses matrix units that our
        # tiles do not, and knows which Macs have better ones.
        "MatvecNTokens": (
            # v3 reserves 16 KiB, so that fewer threadgroups fit on a core.
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
        # For many tokens MLX's products use tensor cores, and its dense product is
        # several times as fast as its quantised one.
        "MatvecNTokens": (
            Preferred("dequant_matvec_4bit_fast", _has_short_rows),
            Preferred("dequant_matvec_4bit_v4"),
            Preferred("dequant_matvec_2bit"),
            Preferred("mlx_dequantize"),
            Preferred(MLX),
        ),
        # For many tokens MLX's attention uses tensor cores, which ours does not.
        "SdpaCausalTiled": (
            Preferred("sdpa_decode_parts"),
            Preferred("sdpa_decode"),
            Preferred(MLX),
        ),
        "GatedDeltaNetChunkwise": (Preferred("gated_delta_net_chunkwise"),),
    },
}


def choose(op: Op, executor: str = "", usable: Usable = any_kernel) -> Way:
    """Return the way to run an Op on an executor.

    The environment's choice comes first, then the fastest way found on this device, the
    way preferred on the executor, and the first of ``WAYS``. Ways that do not fit the
    Op are skipped, and so are ways with a kernel that is not usable, unless the
    environment requests them.

    Raises:
        ConfigError: the environment names an Op or a way that does not exist.
    """
    by_name = {way.name: way for way in ways(op)}
    requested = requested_ways().get(op.variant_name)
    if requested in by_name:
        return by_name[requested]
    winner = by_name.get(tuned(op.variant_name, [op], executor) or "")
    if winner is not None and all(map(usable, winner.kernels)):
        return winner
    return default_way(op, executor, usable)


def default_way(op: Op, executor: str = "", usable: Usable = any_kernel) -> Way:
    """Return the way to run an Op without a request and without tuning.

    It is the first way with usable kernels: of those preferred on the executor, then of
    ``WAYS``.
    """
    by_name = {way.name: way for way in ways(op) if all(map(usable, way.kernels))}
    entries = PREFERRED.get(executor, {}).get(op.variant_name, ())
    preferred = [e.name for e in entries if e.fits(op)]
    return next(by_name[name] for name in (*preferred, *by_name) if name in by_name)


def requested_ways() -> dict[str, str]:
    """Return the ways that the environment requests, by the name of the Op.

    Raises:
        ConfigError: there is no such Op or way.
    """
    wanted = config.lowering()
    for op, name in wanted.items():
        if op not in REGISTRY:
            raise ConfigError(f"[MOEFLUX_LOWERING] expected an Op but got {op!r}")
        names = [w.name for w in WAYS[REGISTRY[op]]] + [MLX]
        if name not in names:
            raise ConfigError(
                f"[MOEFLUX_LOWERING] {op}: expected one of {', '.join(names)} but got "
                f"{name!r}"
            )
    return wanted


Values = Mapping[Any, Any]


@dataclass(frozen=True)
class Fusion:
    """Consecutive Ops that cost less in common launches than one by one.

    ``types`` are the types of its first Ops; the last type may repeat. ``takes(ops)``
    returns how many of the given Ops it performs, 0 for none.
    ``call(ops, run, values)`` takes the values of their buffers, by ``BufId``, and
    weights, by name. It returns, by ``BufId``, the values written that later Ops read.

    ``takes_parts``: it takes ``RowPart`` values as they are. ``joint``: it takes joint
    matrices in place of the matrices in them. ``kernels`` names every kernel that it
    may launch.
    """

    name: str
    types: tuple[type[Op], ...]
    takes: Callable[[Sequence[Op]], int]
    call: Callable[[Sequence[Op], Run, Values], Values]
    takes_parts: bool
    joint: bool
    kernels: tuple[str, ...]

    def weights(self, ops: Sequence[Op]) -> tuple[str, ...]:
        """Return the names of the weights that it reads."""
        refs = (ref for op in ops for ref in op.weight_refs)
        names = (
            ref.joint.name if self.joint and ref.joint else ref.name for ref in refs
        )
        return tuple(dict.fromkeys(names))


FUSIONS: list[Fusion] = []


def fusion(
    name: str,
    types: tuple[type[Op], ...],
    takes: Callable[[Sequence[Op]], int],
    *,
    takes_parts: bool = False,
    joint: bool = False,
    kernels: tuple[str, ...] | None = None,
) -> Callable[[Callable[..., Values]], Callable[..., Values]]:
    """Add the decorated function as a fusion, named after its kernel.

    Args:
        kernels: all kernels that it may launch; default: the one of its name.
    """
    launched = (name,) if kernels is None else kernels

    def add(call: Callable[..., Values]) -> Callable[..., Values]:
        FUSIONS.append(Fusion(name, types, takes, call, takes_parts, joint, launched))
        # Where several fit, the one of most Ops is tried first.
        FUSIONS.sort(key=lambda each: -len(each.types))
        return call

    return add


def launched_by(kernel: str) -> list[str]:
    """Return the names of the Ops and fusions that may launch a kernel."""
    by_ops = {
        op.__name__
        for op, ways in WAYS.items()
        if any(kernel in way.kernels for way in ways)
    }
    return sorted(by_ops) + [each.name for each in FUSIONS if kernel in each.kernels]


def fused(
    ops: Sequence[Op], run: Run, executor: str = "", usable: Usable = any_kernel
) -> FusedCall | None:
    """Return the fusion that a list of Ops begins with, or None.

    Ops are not fused if the environment requests a way of one of them, if they were
    faster one by one on this device, or if a kernel of the fusion is not usable.
    """
    if not config.fuse():
        return None
    requested = requested_ways()
    for each, n in fusions_ahead(ops):
        chosen = any(op.variant_name in requested for op in ops[:n])
        if chosen or not all(map(usable, each.kernels)):
            continue
        if tuned(each.name, ops[:n], executor) != ONE_BY_ONE:
            call = partial(each.call, ops[:n], run)
            return FusedCall(n, call, each.weights(ops[:n]), each.takes_parts)
    return None


def fusions_ahead(ops: Sequence[Op]) -> Iterator[tuple[Fusion, int]]:
    """Yield the fusions that a list of Ops can begin with, and their number of Ops."""
    for each in FUSIONS:
        ahead = zip(ops, each.types, strict=False)
        here = len(ops) >= len(each.types) and all(isinstance(*pair) for pair in ahead)
        n = each.takes(ops) if here else 0
        if n:
            yield each, n


def lowered(
    op: Op, run: Run, executor: str = "", usable: Usable = any_kernel
) -> Kernel:
    """Return the function that performs ``op`` by passing launches to ``run``."""
    return partial(choose(op, executor, usable).call, op, run)
