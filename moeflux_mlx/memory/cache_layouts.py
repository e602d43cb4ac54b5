"""Layouts of mlx-lm's caches: describe them, save them in a file and restore them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

import mlx.core as mx
from mlx_lm.models.cache import (
    ArraysCache,
    CacheList,
    ChunkedKVCache,
    KVCache,
    QuantizedKVCache,
    RotatingKVCache,
)

from ..errors import StateError
from ..experts.weights import DTYPE_NAMES
from .own_caches import OwnForm, is_own

# Some caches keep token ids, so they need more types than weights.
DTYPES = {**DTYPE_NAMES, mx.int64: "I64", mx.uint64: "U64"}
FLOATS = ("F32", "F16", "BF16")
# The quantisations that QuantizedKVCache supports.
CACHE_BITS, CACHE_GROUPS = (2, 4, 8), (32, 64, 128)
# Longer than any context or window.
MOST_ROWS = 1 << 31

# The fields of each kind of cache in a file, besides its arrays.
KINDS: dict[type, tuple[str, ...]] = {
    KVCache: (),
    QuantizedKVCache: ("group_size", "bits"),
    RotatingKVCache: ("keep", "max_size", "index", "rows"),
    ChunkedKVCache: ("chunk_size", "start_position"),
    ArraysCache: (),
    CacheList: ("caches",),
}
# The constructor arguments of a cache, which the model chooses.
MADE_WITH: dict[type, tuple[str, ...]] = {
    RotatingKVCache: ("keep", "max_size"),
    ChunkedKVCache: ("chunk_size",),
}
# Kinds of cache that users may substitute for the model's own kind.
STAND_INS: dict[type, tuple[type, ...]] = {
    KVCache: (KVCache, QuantizedKVCache, RotatingKVCache)
}

# A shape; None stands for the number of rows.
Shape = tuple[int | None, ...]
# The form of a tensor in a file: its allowed types and its shape.
TensorForm = tuple[tuple[str, ...], tuple[int, ...]]
# Raises an error; called with a name, the expected value and the found value.
Refuse = Callable[[str, Any, Any], NoReturn]


@dataclass(frozen=True)
class CacheLayout:
    """The form of one of a model's caches, with tokens of one sequence.

    ``arrays`` has the shape and type of each array, or None for an empty place.
    ``numbers`` are the constructor's arguments, ``caches`` the members of a
    ``CacheList``. ``own`` returns the form of a cache of the model's own class after a
    number of tokens.
    """

    kind: type
    arrays: tuple[tuple[Shape, mx.Dtype] | None, ...] = ()
    numbers: Mapping[str, int] = field(default_factory=dict)
    caches: tuple[CacheLayout, ...] = ()
    own: Callable[[int], OwnForm] | None = None

    @classmethod
    def of(cls, cache: Any, own: Callable[[int], OwnForm] | None = None) -> CacheLayout:
        """Return the layout of a cache after a call.

        Args:
            cache: the cache.
            own: as the attribute, for a cache of the model's own class.
        """
        kind = type(cache)
        if is_own(cache) and OwnForm.of(cache).is_plain:
            return cls(kind, own=own)
        if kind is CacheList:
            return cls(kind, caches=tuple(map(cls.of, cache.caches)))
        if kind is ArraysCache:
            held = (x if x is None else (x.shape, x.dtype) for x in cache.cache)
            return cls(kind, tuple(held))
        pair = (getattr(cache, name, None) for name in ("keys", "values"))
        rows = [x for x in pair if isinstance(x, mx.array)]
        numbers = {name: getattr(cache, name) for name in MADE_WITH.get(kind, ())}
        shapes = ((*x.shape[:-2], None, x.shape[-1]) for x in rows)
        types = (x.dtype for x in rows)
        return cls(kind, tuple(zip(shapes, types, strict=True)), numbers)


def check_kinds(layouts: Iterable[CacheLayout]) -> None:
    """Raise StateError if a cache is of a kind that cannot be saved."""
    for i, layout in enumerate(layouts):
        if layout.kind not in KINDS and layout.own is None:
            raise _unknown(f"layer {i}", layout.kind)
        check_kinds(layout.caches)


def _unknown(where: str, kind: type) -> StateError:
    known = ", ".join(kind.__name__ for kind in KINDS)
    return StateError(
        f"[state] {where}: expected a cache of {known} but got {kind.__name__}: use "
        "caches of make_prompt_cache, or save no caches"
    )


def describe(
    where: str, cache: Any, layout: CacheLayout, n_tokens: int
) -> tuple[dict[str, Any], list[mx.array]]:
    """Return a cache's fields for a file, and its arrays.

    Args:
        where: the cache's name for errors.
        cache: the cache.
        layout: the model's layout for it.
        n_tokens: number of tokens in the cache.

    Raises:
        StateError: the cache cannot be saved, or does not have the tokens of one
            sequence.
    """
    kind = type(cache)
    if layout.own is not None and kind is layout.kind:
        return _describe_own(where, cache, layout.own(n_tokens))
    if kind not in KINDS:
        raise _unknown(where, kind)
    if kind is CacheList:
        return _describe_several(where, cache, layout, n_tokens)
    if kind is ArraysCache:
        arrays = _arrays_of(where, cache)
    else:
        arrays = [] if cache.keys is None else _rows_of(cache)
    if not arrays and any(x is not None for x in layout.arrays):
        raise StateError(f"[state] {where}: expected a cache with tokens")
    if kind is not ArraysCache and arrays and cache.offset != n_tokens:
        raise StateError(
            f"[state] {where}: expected tokens {n_tokens} but got {cache.offset}"
        )
    fields: dict[str, Any] = {"kind": kind.__name__}
    for name in KINDS[kind]:
        if name == "rows":
            fields[name] = arrays[0].shape[-2] if arrays else 0
        else:
            fields[name] = getattr(cache, "_idx" if name == "index" else name)
    return fields, arrays


def _describe_own(
    where: str, cache: Any, form: OwnForm
) -> tuple[dict[str, Any], list[mx.array]]:
    if (other := form.difference(OwnForm.of(cache))) is not None:
        name, expected, found = other
        raise StateError(
            f"[state] {where}: expected {name} {expected} but got {found}: give one "
            "sequence's caches with all of its tokens"
        )
    return {"kind": form.kind.__name__}, [getattr(cache, n) for n in form.arrays]


def _describe_several(
    where: str, cache: Any, layout: CacheLayout, n_tokens: int
) -> tuple[dict[str, Any], list[mx.array]]:
    if layout.kind is not CacheList or len(cache.caches) != len(layout.caches):
        n_caches = len(layout.caches) or 1
        raise StateError(
            f"[state] {where}: expected {n_caches} caches but got {len(cache.caches)}"
        )
    found = [
        describe(f"{where}, cache {i}", one, own, n_tokens)
        for i, (one, own) in enumerate(zip(cache.caches, layout.caches, strict=True))
    ]
    fields = {"kind": CacheList.__name__, "caches": [fields for fields, _ in found]}
    return fields, [array for _, arrays in found for array in arrays]


def _arrays_of(where: str, cache: Any) -> list[mx.array]:
    if cache.lengths is not None or cache.left_padding is not None:
        raise StateError(f"[state] {where}: expected no padded batch")
    return [x for x in cache.cache if x is not None]


def _rows_of(cache: Any) -> list[mx.array]:
    """Return the arrays' rows in use, in storage order."""
    n_rows = cache.offset - getattr(cache, "start_position", 0)
    sides = (x if isinstance(x, list | tuple) else [x] for x in _pair(cache))
    return [x[..., : min(n_rows, x.shape[-2]), :] for side in sides for x in side]


def _pair(cache: Any) -> tuple[Any, Any]:
    return cache.keys, cache.values


@dataclass(frozen=True)
class CacheFile:
    """A cache in a file: its tensors' forms, and a function that builds the cache."""

    tensors: list[TensorForm]
    fill: Callable[[list[mx.array]], Any]


class CacheReader:
    """Check a file's caches against the model's layouts.

    Args:
        n_tokens: number of tokens in the caches.
        refuse: raises StateError.
    """

    def __init__(self, n_tokens: int, refuse: Refuse):
        self._n_tokens, self._refuse = n_tokens, refuse

    def __call__(self, where: str, fields: Any, layout: CacheLayout) -> CacheFile:
        """Return one cache of the file.

        Raises:
            StateError: the cache does not fit the model.
        """
        name = fields.get("kind") if isinstance(fields, dict) else None
        if layout.own is not None:
            self._expect(f"{where}: kind", layout.kind.__name__, name)
            self._expect(f"{where}: fields", ["kind"], sorted(fields))
            return self._own(layout.own(self._n_tokens))
        allowed = STAND_INS.get(layout.kind, (layout.kind,))
        known = {kind.__name__: kind for kind in allowed if kind in KINDS}
        if not isinstance(name, str) or name not in known:
            self._refuse(f"{where}: kind", f"one of {[*known]}", name)
        kind = known[name]
        self._expect(f"{where}: fields", sorted(["kind", *KINDS[kind]]), sorted(fields))
        read: dict[type, Callable[[str, Any, CacheLayout], CacheFile]] = {
            KVCache: self._plain,
            QuantizedKVCache: self._quantized,
            RotatingKVCache: self._rotating,
            ChunkedKVCache: self._chunked,
            ArraysCache: self._arrays,
            CacheList: self._several,
        }
        return read[kind](where, fields, layout)

    def _plain(self, where: str, fields: Any, layout: CacheLayout) -> CacheFile:
        return self._rows(KVCache(), layout, self._n_tokens)

    def _quantized(self, where: str, fields: Any, layout: CacheLayout) -> CacheFile:
        bits, group = fields["bits"], fields["group_size"]
        for name, allowed in (("bits", CACHE_BITS), ("group_size", CACHE_GROUPS)):
            value = fields[name]
            if type(value) is not int or value not in allowed:
                self._refuse(f"{where}: {name}", f"one of {allowed}", value)
        tensors: list[TensorForm] = []
        for dtype, (*front, width) in self._sized(layout, self._n_tokens):
            if width % group:
                self._refuse(f"{where}: group_size", f"a divisor of {width}", group)
            scales = (dtype,), (*front, width // group)
            tensors += [(("U32",), (*front, width * bits // 32)), scales, scales]

        def fill(arrays: list[mx.array]) -> Any:
            cache: Any = QuantizedKVCache(group, bits)
            if arrays:
                cache.keys, cache.values = tuple(arrays[:3]), tuple(arrays[3:])
                cache.offset = self._n_tokens
            return cache

        return CacheFile(tensors, fill)

    def _rotating(self, where: str, fields: Any, layout: CacheLayout) -> CacheFile:
        own = layout.numbers
        keep = self._whole(where, fields, "keep", own.get("keep", 0))
        size = self._whole(where, fields, "max_size", own.get("max_size", keep + 1))
        if layout.kind is RotatingKVCache:
            for name, value in own.items():
                self._expect(f"{where}: {name}", value, fields[name])
        if not layout.arrays:
            return self._rows(RotatingKVCache(size, keep), layout, 0)
        # A window drops rows only when it is full, and overwrites old rows only when it
        # has exactly ``size`` rows.
        least = min(size, self._n_tokens)
        n_rows = self._whole(where, fields, "rows", least, self._n_tokens)
        overwrites = n_rows == size < self._n_tokens
        first = min(keep + 1, n_rows) if overwrites else n_rows
        index = self._whole(where, fields, "index", first, n_rows)
        cache = RotatingKVCache(size, keep)
        cache._idx = index
        return self._rows(cache, layout, n_rows)

    def _chunked(self, where: str, fields: Any, layout: CacheLayout) -> CacheFile:
        size = layout.numbers["chunk_size"]
        self._expect(f"{where}: chunk_size", size, fields["chunk_size"])
        last = self._n_tokens - 1
        start = self._whole(where, fields, "start_position", 0, last)
        cache = ChunkedKVCache(size)
        cache.start_position = start
        return self._rows(cache, layout, self._n_tokens - start)

    def _arrays(self, where: str, fields: Any, layout: CacheLayout) -> CacheFile:
        present = [x for x in layout.arrays if x is not None]
        # Accept any float: an executor on the host keeps these arrays in float32.
        types = [(d, (DTYPES.get(d, str(d)),)) for _, d in present]
        dtypes = [FLOATS if mx.issubdtype(d, mx.floating) else t for d, t in types]
        shapes = [tuple(n or 0 for n in shape) for shape, _ in present]

        def fill(arrays: list[mx.array]) -> Any:
            cache: Any = ArraysCache(len(layout.arrays))
            found = iter(arrays)
            cache.cache = [None if x is None else next(found) for x in layout.arrays]
            return cache

        return CacheFile([*zip(dtypes, shapes, strict=True)], fill)

    def _own(self, form: OwnForm) -> CacheFile:
        found = form.arrays.values()
        tensors: list[TensorForm] = [
            ((DTYPES.get(d, str(d)),), shape) for shape, d in found
        ]
        return CacheFile(tensors, form.filled)

    def _several(self, where: str, fields: Any, layout: CacheLayout) -> CacheFile:
        caches = fields["caches"]
        if not isinstance(caches, list):
            self._refuse(f"{where}: caches", "a list", caches)
        self._expect(f"{where}: caches", len(layout.caches), len(caches))
        files = [
            self(f"{where}, cache {i}", one, own)
            for i, (one, own) in enumerate(zip(caches, layout.caches, strict=True))
        ]

        def fill(arrays: list[mx.array]) -> Any:
            rest = iter(arrays)
            return CacheList(*(f.fill([next(rest) for _ in f.tensors]) for f in files))

        return CacheFile([form for file in files for form in file.tensors], fill)

    def _rows(self, cache: Any, layout: CacheLayout, n_rows: int) -> CacheFile:
        """Return a cache of ``n_rows`` rows of keys and values; ``cache`` is empty."""

        def fill(arrays: list[mx.array]) -> Any:
            if arrays:
                cache.keys, cache.values = arrays
                cache.offset = self._n_tokens
            return cache

        sized = self._sized(layout, n_rows)
        return CacheFile([((dtype,), shape) for dtype, shape in sized], fill)

    def _sized(
        self, layout: CacheLayout, n_rows: int
    ) -> Iterable[tuple[str, tuple[int, ...]]]:
        for x in layout.arrays:
            assert x is not None
            shape = tuple(n_rows if n is None else n for n in x[0])
            yield DTYPES.get(x[1], str(x[1])), shape

    def _whole(
        self, where: str, fields: Any, name: str, least: int, most: int = MOST_ROWS
    ) -> int:
        value = fields[name]
        if type(value) is not int or not least <= value <= most:
            wanted = f"an integer from {least} to {most}"
            self._refuse(f"{where}: {name}", wanted, value)
        return int(value)

    def _expect(self, name: str, expected: Any, found: Any) -> None:
        if expected != found:
            self._refuse(name, expected, found)
