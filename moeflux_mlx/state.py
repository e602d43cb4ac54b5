"""Keep what a run has come to: its caches, the tokens they stand for, the hot experts.

A saved state spares reading a prompt again, and the experts in memory with it. Within a
run a ``CacheCheckpoint`` takes tokens back.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import xxhash
from mlx_lm.models.cache import ArraysCache, KVCache, QuantizedKVCache

from .errors import BudgetError, ModelError, StateError
from .experts.pool import MLX_DTYPES
from .experts.safetensors import DTYPE_BYTES, TensorEntry, header_bytes, parse_header
from .files import open_file, parse_json, replacing, short

FORMAT, VERSION = "moeflux-state", 2
TOKENS, EXPERTS = "tokens", "experts"
# A state of a thousand layers has less to say, and no model has more experts.
HEADER_BYTES, MOST_EXPERTS = 4 << 20, 1 << 20
KINDS: dict[str, Any] = {
    kind.__name__: kind for kind in (KVCache, QuantizedKVCache, ArraysCache)
}
# What QuantizedKVCache can go on with.
CACHE_BITS, CACHE_GROUPS = (2, 4, 8), (32, 64, 128)
DTYPES = {dtype: name for name, dtype in MLX_DTYPES.items()}
FLOATS = ("F32", "F16", "BF16")


@dataclass(frozen=True)
class State:
    """Caches as ``mlx_lm`` takes them (``prompt_cache=``), and their tokens."""

    cache: list[Any]
    tokens: list[int]


def save_state(
    path: str | os.PathLike, model: nn.Module, cache: list[Any], tokens: Sequence[int]
) -> None:
    """Write caches, tokens and the set of experts in memory to one file, atomically.

    Between tokens only; what is still being computed is waited for. Nobody but the
    file's owner can read it.

    Args:
        cache: one sequence's caches of this model, one for each layer.
        tokens: every token that went into them, in order.

    Raises:
        StateError: the caches are not this model's or not of these tokens, or the file
            cannot be written.
    """
    path, identity = _path(path), _identity(model)
    layers = [_describe(i, c) for i, c in enumerate(_caches(cache))]
    arrays = {name: x for _, parts in layers for name, x in parts.items()}
    token_ids = _token_ids(path, tokens, model.needs.vocab_size)
    arrays[TOKENS] = mx.array(token_ids)
    arrays[EXPERTS] = mx.array(np.asarray(_held(model), np.int32).reshape(-1, 2))
    mx.eval(arrays)
    mx.synchronize()
    entries = {name: _entry(path, name, x) for name, x in arrays.items()}
    about = {
        "format": FORMAT,
        "version": str(VERSION),
        "model": identity,
        "layers": json.dumps([about for about, _ in layers]),
    }
    for i, c in enumerate(cache):
        if not isinstance(c, ArraysCache) and c.offset != len(token_ids):
            _refuse(path, f"layer {i}: tokens", len(token_ids), c.offset)
    _Checked(path, model, entries, about)
    digest = _digest(about)
    for name in sorted(arrays):
        digest.update(_heading(entries[name]))
        digest.update(_bytes_of(arrays[name]))
    about["checksum"] = digest.hexdigest()
    try:
        with replacing(path) as file:
            file.write(header_bytes(list(entries.values()), about))
            for name in entries:
                file.write(_bytes_of(arrays[name]))
    except (OSError, ValueError) as error:
        raise StateError(f"[state] cannot write {path}: {error}") from error


def check_keeps_state(model: nn.Module) -> None:
    """Raise StateError if a model's state cannot be kept, whatever it will be."""
    _identity(model)


def _identity(model: nn.Module) -> str:
    runtime = getattr(model, "runtime", None)
    if runtime is None:
        kind = type(model)
        raise StateError(
            "[state] expected a model of moeflux-mlx's own class but got "
            f"{kind.__module__}.{kind.__name__}: its state cannot be kept"
        )
    return str(runtime.identity)


def load_state(path: str | os.PathLike, model: nn.Module) -> State:
    """Return saved caches and tokens, the experts that were in memory there again.

    Nothing changes unless all of the file is right. Every size is held against the
    model before anything of it is read. Where there is room for fewer experts, as many
    of each layer are read.

    Raises:
        StateError: the file cannot be read, is damaged, of another version, of another
            model, or of caches that this model does not have; says which.
        BudgetError: the caches do not fit into the model's memory.
        ExpertStoreError: an expert could not be read.
    """
    path = _path(path)
    try:
        with open_file(path) as file:
            entries, about = parse_header(path, file, HEADER_BYTES)
            checked = _Checked(path, model, entries, about)
            checked.make_room()
            arrays = _read(path, file, entries, about)
    except (OSError, ModelError, ValueError) as error:
        if isinstance(error, StateError | BudgetError):
            raise
        raise StateError(f"[state] cannot read {path}: {error}") from error
    tokens = checked.tokens(arrays[TOKENS])
    experts = checked.experts(arrays[EXPERTS])
    caches = [
        layer.fill([arrays[f"layers.{i}.{part}"] for part in range(len(layer.parts))])
        for i, layer in enumerate(checked.layers)
    ]
    if model.streamer is not None:
        model.streamer.preload(experts)
    return State(caches, tokens)


# What a tensor may be: its type is one of these, its shape is this.
Part = tuple[tuple[str, ...], tuple[int, ...]]


@dataclass(frozen=True)
class _Layer:
    """How one layer's cache is filled, and its parts: possible types, and shape."""

    fill: Callable[[list[mx.array]], Any]
    parts: list[Part]


class _Checked:
    """A state's header, every field of it held against the model.

    Raises:
        StateError: something is not as the model would have written it.
    """

    def __init__(
        self,
        path: Path,
        model: nn.Module,
        entries: dict[str, TensorEntry],
        about: dict[str, str],
    ):
        self._path, self._model = path, model
        self._expect("format", FORMAT, about.get("format"))
        if (version := about.get("version")) != str(VERSION):
            got = version and short(version)[1:-1]
            raise StateError(
                f"[state] {path}: expected version {VERSION} but got {got}: save the "
                "state anew"
            )
        self._expect("model", _identity(model), about.get("model"))
        needs = model.needs
        self._n_tokens = self._count(entries)
        found = self._json(about.get("layers", ""))
        self._expect("number of layers", len(needs.cache_shapes), len(found))
        self.layers = [
            self._layer(f"layer {i}", fields, needs.cache_shapes[i])
            for i, fields in enumerate(found)
        ]
        rows = entries[EXPERTS].shape[:1] if EXPERTS in entries else ()
        n_experts = min([*rows, self._most_experts])
        expected: dict[str, Part] = {
            TOKENS: (("U32",), (self._n_tokens,)),
            EXPERTS: (("I32",), (n_experts, 2)),
        }
        for i, layer in enumerate(self.layers):
            expected |= {f"layers.{i}.{p}": part for p, part in enumerate(layer.parts)}
        self._expect("tensors", sorted(expected), sorted(entries))
        for name, (dtypes, shape) in expected.items():
            self._expect(f"shape of {name}", shape, entries[name].shape)
            if entries[name].dtype not in dtypes:
                _refuse(path, f"type of {name}", dtypes, entries[name].dtype)

    @property
    def _most_experts(self) -> int:
        streamer = self._model.streamer
        return MOST_EXPERTS if streamer is None else len(streamer.experts)

    def make_room(self) -> None:
        """Let experts give way to the caches, where memory is bounded.

        Raises:
            BudgetError: even with the fewest experts they do not fit.
        """
        keeper, needs = self._model.runtime.keeper, self._model.needs
        if keeper is None:
            return
        parts = [part for layer in self.layers for part in layer.parts]
        n_bytes = sum(DTYPE_BYTES[d[0]] * math.prod(shape) for d, shape in parts)
        n_rows = max(1, n_bytes // max(1, needs.cache_row_bytes))
        grow = [shapes[0][2] is None for shapes in needs.cache_shapes]
        empty = [KVCache() if grows else ArraysCache(2) for grows in grow]
        keeper.make_room(empty, 1, min(self._n_tokens, n_rows))

    def tokens(self, array: mx.array) -> list[int]:
        """Return the token ids, which are all of the vocabulary."""
        tokens: list[int] = np.array(array).tolist()
        if max(tokens) >= self._model.needs.vocab_size:
            size = self._model.needs.vocab_size
            _refuse(self._path, "tokens", f"less than {size}", max(tokens))
        return tokens

    def experts(self, array: mx.array) -> list[tuple[int, int]]:
        """Return the experts as ``(layer, expert)``: the model's, each once."""
        experts = [(layer, expert) for layer, expert in np.array(array).tolist()]
        if len(set(experts)) < len(experts):
            _refuse(self._path, "experts", "each once", "one twice")
        streamer = self._model.streamer
        if streamer is not None and not set(experts) <= set(streamer.experts):
            raise StateError(f"[state] {self._path}: expected experts of this model")
        return experts

    def _count(self, entries: dict[str, TensorEntry]) -> int:
        """Return how many tokens there are."""
        shape = entries[TOKENS].shape if TOKENS in entries else (0,)
        most = self._model.needs.most_tokens
        if len(shape) != 1 or not 1 <= shape[0] <= most:
            raise StateError(
                f"[state] {self._path}: expected 1 to {most} tokens but {shape}"
            )
        return shape[0]

    def _json(self, text: str) -> list[Any]:
        try:
            found = parse_json(text)
        except ValueError as error:
            raise StateError(f"[state] {self._path} is damaged: {error}") from error
        if not isinstance(found, list):
            _refuse(self._path, "layers", "a list", found)
        return found

    def _layer(self, where: str, fields: Any, shapes: Any) -> _Layer:
        kind = fields.get("kind") if isinstance(fields, dict) else None
        if not isinstance(kind, str) or kind not in KINDS:
            _refuse(self._path, f"{where}: kind", f"one of {[*KINDS]}", kind)
        grows = shapes[0][2] is None
        self._expect(f"{where}: growing", grows, kind != ArraysCache.__name__)
        quantized = kind == QuantizedKVCache.__name__
        names = {"kind", "group_size", "bits"} if quantized else {"kind"}
        self._expect(f"{where}: fields", sorted(names), sorted(fields))
        sized = [tuple(self._n_tokens if d is None else d for d in s) for s in shapes]
        if quantized:
            return self._quantized(where, fields["bits"], fields["group_size"], sized)
        own = DTYPES[self._model.needs.cache_dtype]
        dtypes = (own,) if grows else FLOATS
        fill = self._fill_rows if grows else _fill_arrays
        return _Layer(fill, [(dtypes, shape) for shape in sized])

    def _quantized(self, where: str, bits: Any, group: Any, shapes: Any) -> _Layer:
        for what, value, allowed in (
            ("bits", bits, CACHE_BITS),
            ("group_size", group, CACHE_GROUPS),
        ):
            if type(value) is not int or value not in allowed:
                _refuse(self._path, f"{where}: {what}", f"one of {allowed}", value)
        parts: list[Part] = []
        own = DTYPES[self._model.needs.cache_dtype]
        for *front, width in shapes:
            if width % group:
                _refuse(self._path, f"{where}: group_size", f"a part of {width}", group)
            scales = (own,), (*front, width // group)
            parts += [(("U32",), (*front, width * bits // 32)), scales, scales]

        def fill(arrays: list[mx.array]) -> Any:
            cache: Any = QuantizedKVCache(group, bits)
            cache.keys, cache.values = arrays[:3], arrays[3:]
            cache.offset = self._n_tokens
            return cache

        return _Layer(fill, parts)

    def _fill_rows(self, arrays: list[mx.array]) -> Any:
        cache: Any = KVCache()
        cache.keys, cache.values = arrays
        cache.offset = self._n_tokens
        return cache

    def _expect(self, what: str, expected: Any, found: Any) -> None:
        if expected != found:
            _refuse(self._path, what, expected, found)


def _fill_arrays(arrays: list[mx.array]) -> Any:
    cache: Any = ArraysCache(len(arrays))
    cache.cache = arrays
    return cache


def _refuse(path: Path, what: str, expected: Any, found: Any) -> NoReturn:
    wanted, got = (v if isinstance(v, str) else short(v) for v in (expected, found))
    # Text may be the file's.
    got = got if len(got) < 200 and got.isprintable() else short(found)
    raise StateError(f"[state] {path}: expected {what} {wanted} but got {got}")


def _describe(index: int, cache: Any) -> tuple[dict[str, Any], dict[str, mx.array]]:
    """Return what the header says of a layer's cache, and what of it is written."""
    kind = type(cache).__name__
    about: dict[str, Any] = {"kind": kind}
    if kind not in KINDS:
        raise StateError(f"[state] layer {index}: cannot keep a cache of {kind}")
    if isinstance(cache, ArraysCache):
        if cache.lengths is not None or cache.left_padding is not None:
            raise StateError(f"[state] layer {index}: expected no padded batch")
        parts: list[Any] = cache.cache
    else:
        found = [] if cache.keys is None else _flat((cache.keys, cache.values))
        parts = [x[..., : cache.offset, :] for x in found]
        if isinstance(cache, QuantizedKVCache):
            about |= {"group_size": cache.group_size, "bits": cache.bits}
    if not parts or any(x is None for x in parts):
        raise StateError(f"[state] layer {index}: expected a cache with tokens")
    return about, {f"layers.{index}.{i}": x for i, x in enumerate(parts)}


def _path(path: str | os.PathLike) -> Path:
    if isinstance(path, str | os.PathLike):
        return Path(path)
    raise StateError(f"[state] expected the path of a file but got {short(path)}")


def _caches(cache: list[Any]) -> list[Any]:
    if isinstance(cache, list | tuple):
        return [*cache]
    raise StateError(f"[state] expected a list of caches but got {short(cache)}")


def _token_ids(path: Path, tokens: Sequence[int], vocab_size: int) -> np.ndarray:
    try:
        found = np.asarray(tokens)
    except (OverflowError, TypeError, ValueError):
        found = np.array(tokens, object)
    # NumPy would cut fractions off and read numbers in text.
    are_ids = found.ndim == 1 and found.size and found.dtype.kind in "iu"
    if are_ids and found.min() >= 0 and found.max() < vocab_size:
        return found.astype(np.uint32)
    raise StateError(
        f"[state] {path}: expected token ids from 0 to {vocab_size - 1} but got "
        f"{short(tokens)}"
    )


def _entry(path: Path, name: str, array: mx.array) -> TensorEntry:
    dtype = DTYPES.get(array.dtype, str(array.dtype))
    return TensorEntry(path, name, dtype, tuple(array.shape), 0, array.nbytes)


def _bytes_of(array: mx.array) -> memoryview:
    flat = mx.contiguous(array).reshape(-1)
    return np.array(flat.view(mx.uint8) if flat.size else flat).data.cast("B")


def _digest(about: dict[str, str]) -> xxhash.xxh3_64:
    """Begin a checksum with all that a header says but for the checksum itself."""
    rest = {name: text for name, text in about.items() if name != "checksum"}
    return xxhash.xxh3_64(json.dumps(rest, sort_keys=True).encode())


def _heading(entry: TensorEntry) -> bytes:
    return f"{entry.name} {entry.dtype} {entry.shape}\n".encode()


def _read(
    path: Path, file: BinaryIO, entries: dict[str, TensorEntry], about: dict[str, str]
) -> dict[str, mx.array]:
    """Read all tensors, whose sizes are right; their bytes must be too."""
    digest, arrays = _digest(about), {}
    for name in sorted(entries):
        entry = entries[name]
        file.seek(entry.offset)
        data = file.read(entry.n_bytes)
        if len(data) != entry.n_bytes:
            raise StateError(f"[state] {path} is damaged: it was cut while it was read")
        digest.update(_heading(entry))
        digest.update(data)
        flat = mx.array(np.frombuffer(data, np.uint8)).view(MLX_DTYPES[entry.dtype])
        arrays[name] = flat.reshape(entry.shape)
    mx.eval(arrays)
    if about.get("checksum") != digest.hexdigest():
        raise StateError(f"[state] {path} is damaged: its checksum is another")
    return arrays


def _held(model: nn.Module) -> list[tuple[int, int]]:
    streamer = model.streamer
    return [] if streamer is None else streamer.held


def _flat(parts: Iterable[Any]) -> list[Any]:
    nested = (p if isinstance(p, list | tuple) else [p] for p in parts)
    return [x for part in nested for x in part]


class CacheCheckpoint:
    """A point in a run to go back to: KV caches by length, states by reference.

    Costs no copy. Tokens may be added after it and taken back as often as wanted.
    """

    def __init__(self, cache: list[Any]):
        for i, c in enumerate(_caches(cache)):
            if type(c).__name__ not in KINDS:
                kind = type(c).__name__
                raise StateError(f"[state] layer {i}: cannot go back in a {kind}")
        self._cache = cache
        self._points = [(c, _point(c)) for c in cache]

    @classmethod
    def take(cls, cache: list[Any]) -> CacheCheckpoint:
        """Remember where the caches of a run are.

        Raises:
            StateError: there is a cache that cannot go back.
        """
        return cls(cache)

    def restore(self) -> None:
        """Take back all tokens added since.

        Raises:
            StateError: a cache was replaced, or was shortened since; nothing changes.
        """
        for i, (now, (then, point)) in enumerate(
            zip(self._cache, self._points, strict=True)
        ):
            if now is not then:
                raise StateError(f"[state] layer {i}: expected the cache of that time")
            if not isinstance(now, ArraysCache) and now.offset < point:
                raise StateError(
                    f"[state] layer {i}: expected {point} tokens or more but "
                    f"{now.offset} are left"
                )
        for cache, point in self._points:
            if isinstance(cache, ArraysCache):
                arrays, cache.left_padding, cache.lengths = point
                cache.cache = list(arrays)
            else:
                cache.trim(cache.offset - point)


def _point(cache: Any) -> Any:
    if isinstance(cache, ArraysCache):
        return list(cache.cache), cache.left_padding, cache.lengths
    return cache.offset
