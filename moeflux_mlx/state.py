"""Keep what a run has come to: its caches, the tokens they stand for, the hot experts.

A saved state spares reading a prompt again, and the experts in memory with it. Within a
run a ``CacheCheckpoint`` takes tokens back.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import xxhash
from mlx_lm.models.cache import ArraysCache, KVCache, QuantizedKVCache

from .errors import ModelError, StateError
from .experts.safetensors import read_header

FORMAT, VERSION = "moeflux-state", 1
TOKENS, EXPERTS = "tokens", "experts"
KINDS: dict[str, Any] = {
    kind.__name__: kind for kind in (KVCache, QuantizedKVCache, ArraysCache)
}


@dataclass(frozen=True)
class State:
    """Caches as ``mlx_lm`` takes them (``prompt_cache=``), and their tokens."""

    cache: list[Any]
    tokens: list[int]


def save_state(
    path: str | os.PathLike, model: nn.Module, cache: list[Any], tokens: Sequence[int]
) -> None:
    """Write caches, tokens and the set of experts in memory to one file, atomically.

    Between tokens only; what is still being computed is waited for.

    Args:
        cache: one sequence's caches of this model, one for each layer.
        tokens: every token that went into them, in order.

    Raises:
        StateError: the caches are not this model's or not of these tokens, or the file
            cannot be written.
    """
    path, identity = Path(path), _identity(model)
    layers = [_Layer.of(i, c) for i, c in enumerate(cache)]
    tensors = {name: x for layer in layers for name, x in layer.tensors.items()}
    tensors[TOKENS] = mx.array(np.asarray(tokens, np.uint32))
    tensors[EXPERTS] = mx.array(np.asarray(_held(model), np.int32).reshape(-1, 2))
    _check(path, model, layers, len(tokens))
    mx.eval(tensors)
    mx.synchronize()
    about = {
        "format": FORMAT,
        "version": str(VERSION),
        "model": identity,
        "layers": json.dumps([layer.about for layer in layers]),
        "checksum": _checksum(tensors),
    }
    # A name of its own that ends as MLX wants it, in the same directory.
    part = path.with_name(f".{path.name}.{os.getpid()}.safetensors")
    try:
        mx.save_safetensors(str(part), tensors, about)
        with open(part, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    except (OSError, RuntimeError) as error:
        with contextlib.suppress(OSError):
            part.unlink()
        raise StateError(f"[state] cannot write {path}: {error}") from error


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

    Nothing changes unless all of the file is right. Where there is room for fewer
    experts, as many of each layer are read.

    Raises:
        StateError: the file cannot be read, is damaged, of another version, of another
            model, or of caches that this model does not have; says which.
        ExpertStoreError: an expert could not be read.
    """
    path = Path(path)
    tensors, about = _read(path)
    _expect(path, "format", FORMAT, about.get("format"))
    _expect(path, "version", str(VERSION), about.get("version"))
    _expect(path, "model", _identity(model), about.get("model"))
    with _as_damage(path):
        if about["checksum"] != _checksum(tensors):
            raise StateError(f"[state] {path} is damaged: its checksum is another")
        tokens = np.array(tensors[TOKENS]).tolist()
        experts = [(int(row), int(e)) for row, e in np.array(tensors[EXPERTS])]
        layers = [
            _Layer.read(i, entry, tensors)
            for i, entry in enumerate(json.loads(about["layers"]))
        ]
    _check(path, model, layers, len(tokens))
    streamer = model.streamer
    if streamer is not None:
        if not set(experts) <= set(streamer.experts):
            raise StateError(f"[state] {path}: expected experts of this model")
        streamer.preload(experts)
    return State([layer.cache for layer in layers], tokens)


@dataclass(frozen=True)
class _Layer:
    """One layer's cache, and what of it is written."""

    cache: Any
    about: dict[str, Any]
    tensors: dict[str, mx.array]

    @classmethod
    def of(cls, index: int, cache: Any) -> _Layer:
        kind = type(cache).__name__
        about: dict[str, Any] = {"kind": kind}
        if kind not in KINDS:
            raise StateError(f"[state] layer {index}: cannot keep a cache of {kind}")
        if isinstance(cache, ArraysCache):
            if cache.lengths is not None or cache.left_padding is not None:
                raise StateError(f"[state] layer {index}: expected no padded batch")
            parts: list[Any] = cache.cache
        else:
            about["offset"] = cache.offset
            found = [] if cache.keys is None else _flat((cache.keys, cache.values))
            parts = [x[..., : cache.offset, :] for x in found]
            if isinstance(cache, QuantizedKVCache):
                about |= {"group_size": cache.group_size, "bits": cache.bits}
        if not parts or any(x is None for x in parts):
            raise StateError(f"[state] layer {index}: expected a cache with tokens")
        tensors = {f"layers.{index}.{i}": x for i, x in enumerate(parts)}
        return cls(cache, {**about, "n_parts": len(parts)}, tensors)

    @classmethod
    def read(cls, index: int, about: dict, tensors: dict[str, mx.array]) -> _Layer:
        names = [f"layers.{index}.{i}" for i in range(about["n_parts"])]
        parts = [tensors[name] for name in names]
        cache: Any
        if about["kind"] == ArraysCache.__name__:
            cache = ArraysCache(len(parts))
            cache.cache = list(parts)
        elif about["kind"] == KVCache.__name__:
            cache = KVCache()
            cache.keys, cache.values = parts
        else:
            cache = QuantizedKVCache(about["group_size"], about["bits"])
            half = len(parts) // 2
            cache.keys, cache.values = parts[:half], parts[half:]
        if "offset" in about:
            cache.offset = about["offset"]
        return cls(cache, about, dict(zip(names, parts, strict=True)))


def _check(path: Path, model: nn.Module, layers: list[_Layer], n_tokens: int) -> None:
    """Raise StateError unless the caches are the model's, of so many tokens."""
    shapes, dtype = model.needs.cache_shapes, model.needs.cache_dtype
    _expect(path, "number of layers", len(shapes), len(layers))
    most = model.needs.most_tokens
    if not 1 <= n_tokens <= most:
        raise StateError(f"[state] {path}: expected 1 to {most} tokens but {n_tokens}")
    for i, (layer, expected) in enumerate(zip(layers, shapes, strict=True)):
        cache = layer.cache
        where = f"layer {i}"
        grows = expected[0][2] is None
        _expect(path, f"{where}: growing", grows, not isinstance(cache, ArraysCache))
        if grows:
            _expect(path, f"{where}: tokens", n_tokens, cache.offset)
        if isinstance(cache, QuantizedKVCache):
            wanted = {(*shape[:2], n_tokens) for shape in expected}
            found = {x.shape[:3] for x in layer.tensors.values()}
            _expect(path, f"{where}: shape", wanted, found)
            continue
        sized = [tuple(n_tokens if d is None else d for d in s) for s in expected]
        found_shapes = [x.shape for x in layer.tensors.values()]
        _expect(path, f"{where}: shape", sized, found_shapes)
        types = {x.dtype for x in layer.tensors.values() if grows}
        _expect(path, f"{where}: type", {dtype} if grows else set(), types)


def _expect(path: Path, what: str, expected: Any, found: Any) -> None:
    if expected != found:
        raise StateError(f"[state] {path}: expected {what} {expected} but got {found}")


@contextlib.contextmanager
def _as_damage(path: Path) -> Iterator[None]:
    """Turn what a malformed file causes into StateError."""
    try:
        yield
    except (KeyError, ValueError, TypeError, IndexError, RuntimeError) as error:
        raise StateError(f"[state] {path} is damaged: {error!r}") from error


def _read(path: Path) -> tuple[dict[str, mx.array], dict[str, str]]:
    try:
        # Says what is wrong with the file; MLX does not.
        read_header(path)
        tensors: Any
        about: Any
        tensors, about = mx.load(str(path), format="safetensors", return_metadata=True)
        mx.eval(tensors)
    except (ModelError, RuntimeError) as error:
        raise StateError(f"[state] cannot read {path}: {error}") from error
    return tensors, about


def _checksum(tensors: dict[str, mx.array]) -> str:
    digest = xxhash.xxh3_64()
    for name in sorted(tensors):
        array = mx.contiguous(tensors[name])
        digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
        if array.size:
            digest.update(np.array(array.reshape(-1).view(mx.uint8), copy=False).data)
    return digest.hexdigest()


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
        for i, c in enumerate(cache):
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
