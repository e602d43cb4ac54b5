"""Caches of a class that a model's own file defines: describe and rebuild them.

Nothing is known about such a class. So a lazy call shows the form of the model's cache
after some tokens. A file must agree with that form in everything but arrays' values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import KVCache

PLAIN = (int, float, str, type(None))


@dataclass(frozen=True)
class OwnForm:
    """A cache's attributes: arrays by shape and type, all others by value."""

    kind: type
    arrays: dict[str, tuple[tuple[int, ...], mx.Dtype]]
    values: dict[str, Any]

    @classmethod
    def of(cls, cache: Any) -> OwnForm:
        """Return the form of a cache, without evaluating arrays."""
        found = sorted(vars(cache).items())
        arrays = {n: (x.shape, x.dtype) for n, x in found if isinstance(x, mx.array)}
        values = {n: x for n, x in found if n not in arrays}
        return cls(type(cache), arrays, values)

    @property
    def is_plain(self) -> bool:
        """Whether all attributes that are not arrays are numbers, text or None."""
        return all(isinstance(value, PLAIN) for value in self.values.values())

    def difference(self, other: OwnForm) -> tuple[str, Any, Any] | None:
        """Return the first differing attribute: its name, our value, the other's."""
        own, others = {**self.arrays, **self.values}, {**other.arrays, **other.values}
        for name in sorted(own.keys() | others.keys()):
            pair = own.get(name), others.get(name)
            if pair[0] != pair[1]:
                return name, *pair
        return None

    def filled(self, arrays: Sequence[mx.array]) -> Any:
        """Return a cache of this form with these arrays, in the order of ``arrays``."""
        cache: Any = object.__new__(self.kind)
        vars(cache).update(self.values)
        vars(cache).update(zip(self.arrays, arrays, strict=True))
        return cache


def is_own(cache: Any) -> bool:
    """Return whether a cache's class is not one of mlx-lm's shared cache classes."""
    return type(cache).__module__ != KVCache.__module__ and hasattr(cache, "__dict__")
