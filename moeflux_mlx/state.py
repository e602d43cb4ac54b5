"""Save and load the state of a run: caches, tokens, and the experts in memory.

A saved state saves the work of reading a prompt and its experts again. Within a run a
``CacheCheckpoint`` removes tokens.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import xxhash
from mlx_lm.models.cache import (
    ArraysCache,
    KVCache,
    QuantizedKVCache,
    make_prompt_cache,
)

from .adapters import has_adapters
from .errors import BudgetError, ModelError, StateError
from .experts.compute.exchange import Exchange
from .experts.files.safetensors import (
    DTYPE_BYTES,
    TensorEntry,
    header_bytes,
    parse_header,
)
from .memory.cache_layouts import DTYPES, CacheReader, TensorForm, check_kinds, describe
from .saving.whole import store_of
from .streaming import StreamedModel
from .system.files import open_file, parse_json, replacing, short

FORMAT, VERSION = "moeflux-state", 2
TOKENS, EXPERTS = "tokens", "experts"
# Bounds: a header of a thousand layers is smaller, and no model has more experts.
HEADER_BYTES, MOST_EXPERTS = 4 << 20, 1 << 20
# Bound of the context if the configuration states none; no model's is longer.
MOST_TOKENS = 1 << 24
MLX_DTYPES = {name: dtype for dtype, name in DTYPES.items()}
# Caches from which CacheCheckpoint can remove tokens.
TAKE_BACK = (KVCache, QuantizedKVCache, ArraysCache)


@dataclass(frozen=True)
class State:
    """Caches for mlx-lm (``prompt_cache=``), and their tokens."""

    cache: list[Any]
    tokens: list[int]


def save_state(
    path: str | os.PathLike, model: nn.Module, cache: list[Any], tokens: Sequence[int]
) -> None:
    """Write caches, tokens and the list of experts in memory to a file, atomically.

    Call it between tokens; it waits for arrays that are still being computed. Only the
    file's owner can read it. Ranks that share the experts write the same file one after
    the other, and any number of ranks can load it.

    Args:
        cache: one sequence's caches of this model, one per layer.
        tokens: all tokens in the caches, in order.

    Raises:
        StateError: the caches do not match the model or the tokens, or the file cannot
            be written.
        GroupError: another rank failed or ended.
    """
    path, run = _path(path), _Run.of(model)
    caches, layouts = _caches(cache), run.needs.cache_layouts
    token_ids = _token_ids(path, tokens, run.needs.vocab_size)
    if len(caches) != len(layouts):
        _refuse(path, "number of layers", len(layouts), len(caches))
    found = [
        describe(f"layer {i}", one, layout, len(token_ids))
        for i, (one, layout) in enumerate(zip(caches, layouts, strict=True))
    ]
    arrays = {
        f"layers.{i}.{part}": x
        for i, (_, parts) in enumerate(found)
        for part, x in enumerate(parts)
    }
    arrays[TOKENS] = mx.array(token_ids)
    arrays[EXPERTS] = mx.array(np.asarray(run.held, np.int32).reshape(-1, 2))
    mx.eval(arrays)
    mx.synchronize()
    entries = {name: _entry(path, name, x) for name, x in arrays.items()}
    about = {
        "format": FORMAT,
        "version": str(VERSION),
        "model": run.identity,
        "layers": json.dumps([about for about, _ in found]),
    }
    _Checked(path, run, entries, about)
    digest = _digest(about)
    for name in sorted(arrays):
        digest.update(_heading(entries[name]))
        digest.update(_bytes_of(arrays[name]))
    about["checksum"] = digest.hexdigest()

    def write() -> None:
        try:
            with replacing(path) as file:
                file.write(header_bytes(list(entries.values()), about))
                for name in entries:
                    file.write(_bytes_of(arrays[name]))
        except (OSError, ValueError) as error:
            raise StateError(f"[state] cannot write {path}: {error}") from error

    if run.exchange is None:
        write()
        return
    # One after the other: it may be one file.
    for rank in range(run.exchange.size):
        run.exchange.alike(write if rank == run.exchange.rank else lambda: None)


def check_keeps_state(model: nn.Module) -> None:
    """Raise StateError if no state of this model can be saved."""
    check_kinds(_Run.of(model).needs.cache_layouts)


@dataclass(frozen=True)
class _Run:
    """The parts of a model that a state needs; its class is ours, or it is streamed.

    ``store`` has all experts; ``exchange`` connects the ranks if several share them.
    """

    identity: str
    model: nn.Module
    needs: Any
    streamer: Any
    keeper: Any
    exchange: Exchange | None = None
    store: Any = None

    @classmethod
    def of(cls, model: nn.Module) -> _Run:
        """Return the parts of a model that a state needs.

        Raises:
            StateError: the model's files are unknown, or it has adapters.
        """
        if has_adapters(model):
            raise StateError(
                "[state] expected a model without adapters but got one with "
                "adapters: fuse them with mlx_lm.fuse to save states"
            )
        streams = isinstance(model, StreamedModel)
        if streams and model.__dict__["pipeline"]:
            raise StateError(
                "[state] expected all layers of a model but this rank has some of "
                "them: load it without pipeline to save its state"
            )
        owner: Any = model if streams else getattr(model, "runtime", None)
        if owner is None:
            kind = type(model)
            raise StateError(
                "[state] expected streamed experts or a class of moeflux-mlx's own "
                f"but got {kind.__module__}.{kind.__name__}: load it with a bound on "
                "memory to save its state"
            )
        needs, streamer = model.needs, model.streamer
        run = cls(str(owner.identity), model, needs, streamer, owner.keeper)
        calls = model.__dict__["calls"] if streams else owner
        exchange = calls.together.exchange
        return replace(run, exchange=exchange, store=store_of(model))

    @property
    def experts(self) -> list[tuple[int, int]]:
        """All experts, those of other ranks too."""
        if self.exchange is None:
            return [] if self.streamer is None else self.streamer.experts
        store = self.store
        return [(layer, e) for layer in store.layers for e in range(store.count(layer))]

    @property
    def held(self) -> list[tuple[int, int]]:
        """The experts in memory on any rank; empty if they are parameters."""
        held = [] if self.streamer is None else self.streamer.held
        if self.exchange is None:
            return held
        own = {(layer, self._own(layer)[e]) for layer, e in held}
        everything = self.experts
        told = self.exchange.tell([one in own for one in everything]).sum(axis=0)
        return [everything[place] for place in np.flatnonzero(told)]

    def preload(self, experts: list[tuple[int, int]]) -> None:
        """Read experts; a rank reads only its own."""
        if self.exchange is not None:
            experts = [
                (layer, e - self._own(layer).start)
                for layer, e in experts
                if e in self._own(layer)
            ]
        if self.streamer is not None:
            self.streamer.preload(experts)

    def _own(self, layer: int) -> range:
        assert self.exchange is not None
        return self.exchange.own(self.store.count(layer))


def load_state(path: str | os.PathLike, model: nn.Module) -> State:
    """Return saved caches and tokens, and read the experts that were in memory.

    Nothing changes unless the whole file is valid. Every size is compared with the
    model before any data is read. If there is room for fewer experts, the same number
    is read for each layer.

    Raises:
        StateError: the file is unreadable, damaged, of another version or model, or has
            caches that this model lacks; the message says which.
        BudgetError: the caches do not fit into the model's memory.
        ExpertStoreError: an expert could not be read.
        GroupError: another rank failed, ended or has the state of other tokens.
    """
    path, run = _path(path), _Run.of(model)
    if run.exchange is None:
        return _loaded(path, run)
    state = run.exchange.alike(lambda: _loaded(path, run))
    run.exchange.agree({"tokens of the state": state.tokens})
    return state


def _loaded(path: Path, run: _Run) -> State:
    try:
        with open_file(path) as file:
            entries, about = parse_header(path, file, HEADER_BYTES)
            checked = _Checked(path, run, entries, about)
            checked.make_room()
            arrays = _read(path, file, entries, about)
    except (OSError, ModelError, ValueError) as error:
        if isinstance(error, StateError | BudgetError):
            raise
        raise StateError(f"[state] cannot read {path}: {error}") from error
    tokens = checked.tokens(arrays[TOKENS])
    experts = checked.experts(arrays[EXPERTS])
    caches = [
        layer.fill([arrays[f"layers.{i}.{part}"] for part in range(len(layer.tensors))])
        for i, layer in enumerate(checked.layers)
    ]
    run.preload(experts)
    return State(caches, tokens)


class _Checked:
    """A state's header after a comparison of every field with the model.

    Raises:
        StateError: a field differs from that of a state of this model.
    """

    def __init__(
        self,
        path: Path,
        run: _Run,
        entries: dict[str, TensorEntry],
        about: dict[str, str],
    ):
        self._path, self._run = path, run
        self._expect("format", FORMAT, about.get("format"))
        if (version := about.get("version")) != str(VERSION):
            got = version and short(version)[1:-1]
            raise StateError(
                f"[state] {path}: expected version {VERSION} but got {got}: save the "
                "state again"
            )
        self._expect("model", run.identity, about.get("model"))
        self._n_tokens = self._count(entries)
        found, layouts = self._json(about.get("layers", "")), run.needs.cache_layouts
        self._expect("number of layers", len(layouts), len(found))
        read = CacheReader(self._n_tokens, partial(_refuse, path))
        self.layers = [
            read(f"layer {i}", fields, layout)
            for i, (fields, layout) in enumerate(zip(found, layouts, strict=True))
        ]
        rows = entries[EXPERTS].shape[:1] if EXPERTS in entries else ()
        n_experts = min([*rows, self._most_experts])
        expected: dict[str, TensorForm] = {
            TOKENS: (("U32",), (self._n_tokens,)),
            EXPERTS: (("I32",), (n_experts, 2)),
        }
        for i, layer in enumerate(self.layers):
            expected |= {
                f"layers.{i}.{p}": form for p, form in enumerate(layer.tensors)
            }
        self._expect("tensors", sorted(expected), sorted(entries))
        for name, (dtypes, shape) in expected.items():
            self._expect(f"shape of {name}", shape, entries[name].shape)
            if entries[name].dtype not in dtypes:
                _refuse(path, f"type of {name}", dtypes, entries[name].dtype)

    @property
    def _most_experts(self) -> int:
        is_streamed = self._run.streamer is not None
        return len(self._run.experts) if is_streamed else MOST_EXPERTS

    def make_room(self) -> None:
        """Release experts to make room for the caches, if memory is bounded.

        Raises:
            BudgetError: the caches do not fit even with the minimum of experts.
        """
        keeper, needs = self._run.keeper, self._run.needs
        if keeper is None:
            return
        forms = [form for layer in self.layers for form in layer.tensors]
        n_bytes = sum(DTYPE_BYTES[d[0]] * math.prod(shape) for d, shape in forms)
        n_rows = max(1, n_bytes // max(1, needs.cache_row_bytes))
        empty = make_prompt_cache(self._run.model)
        keeper.make_room(empty, 1, min(self._n_tokens, n_rows))

    def tokens(self, array: mx.array) -> list[int]:
        """Return the token ids; check that all are in the vocabulary."""
        tokens: list[int] = np.array(array).tolist()
        if max(tokens) >= (size := self._run.needs.vocab_size):
            _refuse(self._path, "tokens", f"less than {size}", max(tokens))
        return tokens

    def experts(self, array: mx.array) -> list[tuple[int, int]]:
        """Return the experts as ``(layer, expert)``; check that they are distinct."""
        experts = [(layer, expert) for layer, expert in np.array(array).tolist()]
        if len(set(experts)) < len(experts):
            _refuse(self._path, "experts", "each once", "one twice")
        is_streamed = self._run.streamer is not None
        if is_streamed and not set(experts) <= set(self._run.experts):
            raise StateError(f"[state] {self._path}: expected experts of this model")
        return experts

    def _count(self, entries: dict[str, TensorEntry]) -> int:
        """Return the number of tokens."""
        shape = entries[TOKENS].shape if TOKENS in entries else (0,)
        most = min(MOST_TOKENS, self._run.needs.most_tokens)
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

    def _expect(self, what: str, expected: Any, found: Any) -> None:
        if expected != found:
            _refuse(self._path, what, expected, found)


def _refuse(path: Path, what: str, expected: Any, found: Any) -> NoReturn:
    wanted, got = (v if isinstance(v, str) else short(v) for v in (expected, found))
    # The text may come from the file.
    got = got if len(got) < 200 and got.isprintable() else short(found)
    raise StateError(f"[state] {path}: expected {what} {wanted} but got {got}")


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
    # A conversion by NumPy would truncate fractions and parse text.
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
    """Begin a checksum with all header fields except the checksum."""
    rest = {name: text for name, text in about.items() if name != "checksum"}
    return xxhash.xxh3_64(json.dumps(rest, sort_keys=True).encode())


def _heading(entry: TensorEntry) -> bytes:
    return f"{entry.name} {entry.dtype} {entry.shape}\n".encode()


def _read(
    path: Path, file: BinaryIO, entries: dict[str, TensorEntry], about: dict[str, str]
) -> dict[str, mx.array]:
    """Read all tensors, whose sizes are known to be right, and check their bytes."""
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


class CacheCheckpoint:
    """A point in a run to return to: KV caches by length, states by reference.

    It makes no copy. Tokens may be added and removed any number of times.
    """

    def __init__(self, cache: list[Any]):
        for i, c in enumerate(_caches(cache)):
            if type(c) not in TAKE_BACK:
                kind = type(c).__name__
                raise StateError(f"[state] layer {i}: cannot go back in a {kind}")
        self._cache = cache
        self._points = [(c, _point(c)) for c in cache]

    @classmethod
    def take(cls, cache: list[Any]) -> CacheCheckpoint:
        """Record the present position of the caches of a run.

        Raises:
            StateError: a cache cannot be restored.
        """
        return cls(cache)

    def restore(self) -> None:
        """Remove all tokens added since.

        Raises:
            StateError: a cache was replaced or shortened since; nothing changes.
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
