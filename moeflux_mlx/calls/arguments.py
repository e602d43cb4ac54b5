"""Checks of the arguments of a model's call, before anything uses them.

Single tokens come by the thousand. So if a call has the caches of the previous one,
only their number of sequences is checked again.
"""

from __future__ import annotations

import weakref
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple, Protocol

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import ArraysCache, KVCache, RotatingKVCache

from ..errors import ModelError

FLOATS = (mx.float32, mx.float16, mx.bfloat16)

INTEGERS = frozenset(
    (mx.int8, mx.int16, mx.int32, mx.int64, mx.uint8, mx.uint16, mx.uint32, mx.uint64)
)


class Kept(Protocol):
    """The part of a mixer that describes its cache."""

    @property
    def grows(self) -> bool:
        """Whether the cache has a row for each token."""

    @property
    def cache_shapes(self) -> tuple[tuple[int | None, ...], ...]:
        """The shapes of the cache's arrays for one sequence; None grows."""


class Arguments(NamedTuple):
    """Checked arguments: tokens ``[B, T]``, a cache per layer, rows ``[B, T, D]``.

    With ``embeddings`` the values of the tokens are not used.
    """

    tokens: mx.array
    cache: list[Any] | None
    embeddings: mx.array | None


class SeenCaches:
    """The caches of the last call, which need no new check for single tokens."""

    def __init__(self) -> None:
        self._types: list[type] = []
        self._last: weakref.ref[Any] | None = None

    def holds(self, cache: Sequence[Any], types: list[type], t: int) -> bool:
        """Tell whether a call of ``t`` tokens continues the caches of the last call."""
        seen = t == 1 and types == self._types and self._last is not None
        return seen and self._last() is cache[-1]  # type: ignore[misc]

    def keep(self, cache: Sequence[Any], types: list[type]) -> None:
        """Remember checked caches."""
        self._types = types
        self._last = None if cache[-1] is None else weakref.ref(cache[-1])


class ArgumentChecks:
    """Checks the arguments of a text model's calls.

    Args:
        mixers: one per layer.
    """

    def __init__(self, mixers: Sequence[Kept], hidden_size: int):
        self._mixers, self._hidden_size = mixers, hidden_size
        self._seen = SeenCaches()

    def __call__(self, inputs: Any, cache: Any, embeddings: Any) -> Arguments:
        """Return the arguments as arrays.

        Raises:
            ModelError: the model does not accept an argument, which it names.
        """
        if embeddings is None:
            tokens = token_ids(inputs)
        else:
            embeddings = float_rows(embeddings, self._hidden_size)
            tokens = tokens_beside(inputs, embeddings)
        if cache is not None:
            self._check_caches(cache, *tokens.shape)
        return Arguments(tokens, cache, embeddings)

    def _check_caches(self, cache: Any, n_seqs: int, t: int) -> None:
        check_number(cache, len(self._mixers), "one for each layer")
        types = list(map(type, cache))
        if not self._seen.holds(cache, types, t):
            _check_kinds(self._mixers, cache)
            self._seen.keep(cache, types)
        check_sequences(first_states(cache, types), n_seqs)


def check_number(cache: Any, n_caches: int, why: str) -> None:
    """Check the number of caches."""
    if not isinstance(cache, list | tuple) or len(cache) != n_caches:
        wanted = f"a list of {n_caches} caches, {why}"
        found = f"{len(cache)}" if isinstance(cache, list | tuple) else got(cache)
        raise misfit("cache", wanted, found, "make them with make_prompt_cache")


def check_sequences(states: Sequence[Any], n_seqs: int) -> None:
    """Check that caches and tokens have the same number of sequences."""
    if others := {len(x) for x in states if x is not None} - {n_seqs}:
        wrong = (x is not None and len(x) in others for x in states)
        why = f"caches of {n_seqs} sequences, as many as the tokens have"
        at = [*wrong].index(True)
        raise misfit("cache", why, f"{len(states[at])} in that of layer {at}")


def check_ids(ids: mx.array, vocab_size: int) -> None:
    """Raise ModelError unless all ids, which must have values, are in a vocabulary."""
    values = np.array(ids)
    low, high = int(values.min()), int(values.max())
    if low < 0 or high >= vocab_size:
        raise ModelError(
            f"[tokens] expected ids from 0 to {vocab_size - 1} but got "
            f"{low if low < 0 else high}"
        )


def got(value: Any) -> str:
    """Describe a value in a few words."""
    if isinstance(value, mx.array):
        return f"shape {sizes(value.shape)}"
    if isinstance(value, int) and abs(value) > 1 << 64:
        return f"a number of {value.bit_length()} bits"
    if value is None or isinstance(value, bool | int | float | np.number):
        return str(value)
    if isinstance(value, str):
        return repr(value[:40])
    return type(value).__name__


def sizes(shape: Sequence[int | None]) -> str:
    """Return a shape as text; None stands for any size."""
    return "[" + ", ".join("any" if n is None else str(n) for n in shape) + "]"


def bounded(tokens: mx.array, vocab_size: int) -> tuple[mx.array, mx.array]:
    """Return ids moved into a vocabulary, and a mask of those that were inside."""
    tokens = as_int32(tokens, vocab_size)
    ids = mx.clip(tokens, 0, vocab_size - 1)
    return ids, tokens == ids


def as_int32(tokens: mx.array, vocab_size: int) -> mx.array:
    """Return ids as int32; those outside of a vocabulary stay outside."""
    if tokens.dtype == mx.uint32:
        # Ids from 2^31 on become negative; no value is copied.
        return tokens.view(mx.int32)
    if tokens.dtype.size > 4:
        # -1 is no number of uint64, whose ids are never negative.
        low = 0 if tokens.dtype == mx.uint64 else -1
        tokens = mx.clip(tokens, low, vocab_size)
    return tokens.astype(mx.int32)


def float_rows(embeddings: Any, hidden_size: int | None = None) -> mx.array:
    """Return embeddings ``[B, T, D]`` as an array.

    Raises:
        ModelError: they are not rows of floats of width ``hidden_size``.
    """
    if isinstance(embeddings, np.ndarray) and embeddings.dtype.kind == "f":
        embeddings = mx.array(embeddings)
    if not isinstance(embeddings, mx.array):
        raise misfit("input_embeddings", "an array of floats", got(embeddings))
    if embeddings.dtype not in FLOATS:
        wanted = "float32, float16 or bfloat16"
        raise misfit("input_embeddings", wanted, _type(embeddings))
    shape = embeddings.shape
    fits = len(shape) == 3 and hidden_size in (None, shape[2])
    if not fits or not embeddings.size:
        wanted = f"shape [B, T, {hidden_size or 'D'}], at least one row"
        raise misfit("input_embeddings", wanted, got(embeddings))
    return embeddings


def token_ids(inputs: Any) -> mx.array:
    """Return tokens ``[B, T]`` as an array, for a vocabulary of any size.

    Raises:
        ModelError: they are not ids of this shape.
    """
    if isinstance(inputs, list | tuple):
        try:
            inputs = np.asarray(inputs)
        except (TypeError, ValueError, OverflowError):
            raise misfit("tokens", "ids in rows of one length", "others") from None
    if isinstance(inputs, np.ndarray) and inputs.dtype.kind in "iu":
        inputs = mx.array(inputs)
    if not isinstance(inputs, mx.array):
        found = inputs.dtype if isinstance(inputs, np.ndarray) else got(inputs)
        raise misfit("tokens", "integer ids [B, T]", found)
    if inputs.dtype not in INTEGERS or inputs.ndim != 2 or not inputs.size:
        wanted = "integer ids [B, T], at least one"
        raise misfit("tokens", wanted, f"{_type(inputs)} of {got(inputs)}")
    return inputs


def tokens_beside(inputs: Any, embeddings: mx.array) -> mx.array:
    """Return tokens in the shape of the embeddings; zeros if there are none."""
    n_seqs, t, _ = embeddings.shape
    if inputs is None or (isinstance(inputs, mx.array) and not inputs.size):
        return mx.zeros((n_seqs, t), mx.int32)
    tokens = token_ids(inputs)
    if tokens.shape != (n_seqs, t):
        wanted = f"as many rows as tokens, {list(tokens.shape)}"
        raise misfit("input_embeddings", wanted, got(embeddings))
    return tokens


def _check_kinds(mixers: Sequence[Kept], cache: Sequence[Any]) -> None:
    """Check the kind of each layer's cache, and that all caches end at one position."""
    offsets = set()
    for i, (mixer, each) in enumerate(zip(mixers, cache, strict=True)):
        if each is None:
            continue
        if not mixer.grows:
            states = getattr(each, "cache", None)
            fits = isinstance(states, list) and len(states) == 2
            fits = fits and hasattr(each, "advance") and hasattr(each, "lengths")
            wanted = "an ArraysCache of 2"
        else:
            fits = hasattr(each, "update_and_fetch") and hasattr(each, "offset")
            wanted = "a KVCache or one like it"
        if not fits:
            advice = "make them with make_prompt_cache"
            raise misfit(f"cache of layer {i}", wanted, got(each), advice)
        _check_states(i, mixer, each)
        if mixer.grows and isinstance(each.offset, int):
            offsets.add(each.offset)
    check_position(offsets)


def check_position(offsets: Collection[int]) -> None:
    """Check that all caches end at the same position."""
    if len(offsets) > 1:
        found = ", ".join(map(str, sorted(offsets)))
        raise misfit("cache", "caches that end at one position", found)


def _check_states(index: int, mixer: Kept, cache: Any) -> None:
    """Check the shapes of a cache's arrays, except the number of sequences."""
    shapes = [(None, *shape[1:]) for shape in mixer.cache_shapes]
    if not mixer.grows:
        held = cache.cache
    else:
        rows = [getattr(cache, name, None) for name in ("keys", "values")]
        # A quantised cache holds three arrays instead of one.
        held = [None if isinstance(x, tuple | list) else x for x in rows]
    for state, wanted in zip(held, shapes, strict=True):
        if state is None:
            continue
        shape = getattr(state, "shape", ())
        alike = len(shape) == len(wanted) and all(
            n in (None, found) for n, found in zip(wanted, shape, strict=True)
        )
        if not isinstance(state, mx.array) or not alike:
            where = f"cache of layer {index}"
            raise misfit(where, f"shape {sizes(wanted)}", got(state))


def first_states(cache: Sequence[Any], types: Sequence[type]) -> list[Any]:
    """Return from each cache an array with one row per sequence, or None if empty."""
    # This runs for every token, so the common types are handled first.
    return [
        each.keys
        if kind is KVCache or kind is RotatingKVCache
        else each.cache[0]
        if kind is ArraysCache
        else _first_state(each)
        for kind, each in zip(types, cache, strict=True)
    ]


def _first_state(cache: Any) -> Any:
    if cache is None:
        return None
    if (several := getattr(cache, "caches", None)) is not None:
        return _first_state(several[0]) if several else None
    state = getattr(cache, "keys", None)
    if state is None:
        states = getattr(cache, "cache", None)
        state = states[0] if states else None
    # A quantised cache holds three arrays instead of one.
    return state[0] if isinstance(state, tuple | list) else state


def _type(x: mx.array) -> str:
    return str(x.dtype).removeprefix("mlx.core.")


def misfit(name: str, wanted: str, found: Any, advice: str = "") -> ModelError:
    """Return the error for a wrong argument."""
    end = f": {advice}" if advice else ""
    return ModelError(f"[{name}] expected {wanted} but got {found}{end}")
