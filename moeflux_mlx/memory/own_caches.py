"""Caches of a class that a model's own file defines: told of, and made again.

Nobody here knows what such a class does. So a model is asked what its cache is after
some tokens, by a lazy call, and a file has to agree with that in everything but values.
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
    """A cache by its attributes: shapes and types of arrays, and all else by value."""

    kind: type
    arrays: dict[str, tuple[tuple[int, ...], mx.Dtype]]
    values: dict[str, Any]

    @classmethod
    def of(cls, cache: Any) -> OwnForm:
        """Return the form of a cache; no array is evaluated."""
        found = sorted(vars(cache).items())
        arrays = {n: (x.shape, x.dtype) for n, x in found if isinstance(x, mx.array)}
        values = {n: x for n, x in found if n not in arrays}
        return cls(type(cache), arrays, values)

    @property
    def is_plain(self) -> bool:
        """Whether arrays are all of a cache but for numbers and text."""
        return all(isinstance(value, PLAIN) for value in self.values.values())

    def difference(self, other: OwnForm) -> tuple[str, Any, Any] | None:
        """Return the first attribute in which another form differs, and both's."""
        own, others = {**self.arrays, **self.values}, {**other.arrays, **other.values}
        for name in sorted(own.keys() | others.keys()):
            pair = own.get(name), others.get(name)
            if pair[0] != pair[1]:
                return name, *pair
        return None

    def filled(self, arrays: Sequence[mx.array]) -> Any:
        """Return a cache of this form with these arrays, in the order of names."""
        cache: Any = object.__new__(self.kind)
        vars(cache).update(self.values)
        vars(cache).update(zip(self.arrays, arrays, strict=True))
        return cache


def is_own(cache: Any) -> bool:
    """Return whether a cache's class is none of those that mlx-lm's models share."""
    return type(cache).__module__ != KVCache.__module__ and hasattr(cache, "__dict__")
