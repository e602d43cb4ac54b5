"""The differences between the two sides' tokens and logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ...errors import ModelError

COMPARED_VALUES = 1 << 22


@dataclass(frozen=True)
class Token:
    """A token id and its text."""

    id: int
    text: str


@dataclass(frozen=True)
class Divergence:
    """The first position, counted from 0, at which two continuations differ."""

    position: int
    stock: Token
    ours: Token


@dataclass(frozen=True)
class TokenAgreement:
    """The equal tokens of two greedy continuations, ``stock`` and ``ours``."""

    n_tokens: int
    n_equal: int
    first_divergence: Divergence | None
    stock: list[Token]
    ours: list[Token]

    @property
    def share(self) -> float:
        """Share of equal tokens."""
        return self.n_equal / self.n_tokens


@dataclass(frozen=True)
class LogitErrors:
    """The errors of our logits against stock's, both for stock's tokens.

    ``kl_mean`` and ``kl_max`` are KL(stock || ours) per position in nats.
    ``relative_rms_error`` is relative to the RMS of stock's logits. ``kl`` and
    ``equal_top1`` have a value for each position.
    """

    n_positions: int
    kl_mean: float
    kl_max: float
    kl_max_position: int
    top1_agreement: float
    max_error: float
    rms_error: float
    relative_rms_error: float
    kl: list[float]
    equal_top1: list[bool]


def agreement(stock: list[int], ours: list[int], tokenizer: Any) -> TokenAgreement:
    """Count the equal tokens of two continuations, and find the first difference."""
    theirs, own = (
        [Token(t, tokenizer.decode([t])) for t in side] for side in (stock, ours)
    )
    pairs = [*zip(theirs, own, strict=True)]
    differing = [i for i, (a, b) in enumerate(pairs) if a.id != b.id]
    first = Divergence(differing[0], *pairs[differing[0]]) if differing else None
    n_equal = len(pairs) - len(differing)
    return TokenAgreement(len(pairs), n_equal, first, theirs, own)


def logit_errors(stock: np.ndarray, ours: np.ndarray) -> LogitErrors:
    """Compare float32 logits ``[T, V]`` of two sides, a few rows at a time.

    Raises:
        ModelError: the vocabularies differ.
    """
    if stock.shape != ours.shape:
        raise ModelError(
            f"[compare] expected logits {list(stock.shape)} as from stock mlx-lm but "
            f"got {list(ours.shape)}: compare models with the same vocabulary"
        )
    n_rows = max(1, COMPARED_VALUES // stock.shape[1])
    pieces = [
        _piece_errors(stock[i : i + n_rows], ours[i : i + n_rows])
        for i in range(0, len(stock), n_rows)
    ]
    kl, equal, largest, squares, reference = map(
        np.concatenate, zip(*pieces, strict=True)
    )
    return LogitErrors(
        n_positions=len(kl),
        kl_mean=float(kl.mean()),
        kl_max=float(kl.max()),
        kl_max_position=int(kl.argmax()),
        top1_agreement=float(equal.mean()),
        max_error=float(largest.max()),
        rms_error=float(np.sqrt(squares.mean() / stock.shape[1])),
        relative_rms_error=float(np.sqrt(squares.sum() / reference.sum())),
        kl=kl.tolist(),
        equal_top1=equal.tolist(),
    )


def _piece_errors(stock: np.ndarray, ours: np.ndarray) -> tuple[np.ndarray, ...]:
    """Return KL, top-1 equality, largest error, squared error and squared reference.

    Each is ``[T]``.
    """
    p, q = stock.astype(np.float64), ours.astype(np.float64)
    log_p, log_q = _log_softmax(p), _log_softmax(q)
    return (
        (np.exp(log_p) * (log_p - log_q)).sum(axis=1),
        p.argmax(axis=1) == q.argmax(axis=1),
        abs(q - p).max(axis=1),
        np.square(q - p).sum(axis=1),
        np.square(p).sum(axis=1),
    )


def _log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max(axis=1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=1, keepdims=True))
