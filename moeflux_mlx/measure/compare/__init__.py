"""Run the same tokens through stock mlx-lm and moeflux-mlx, and compare the results.

Each side runs in a process of its own, so that speed and peak memory are measured
separately. The processes write temporary files: an .npz of tokens and figures, and
float32 logits, which are compared a few rows at a time.

Imports: errors, experts, experts.files, loading, memory, opening, system.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from xxhash import xxh3_128_hexdigest

from ...errors import ConfigError
from ...experts.files.checkpoint import read_config
from ...experts.files.stock import departs
from ...loading import find_model
from ...opening.stock_model import takes_door
from ...opening.tokenizer import open_tokenizer
from .layers import layer_errors
from .measurement import (
    Job,
    greedy,
    log_likelihood,
    measure,
    peak_process_bytes,
    perplexity,
)
from .metrics import (
    Divergence,
    LogitErrors,
    Token,
    TokenAgreement,
    agreement,
    logit_errors,
)
from .process import Side, run_job
from .reference import load_stock, stacked_experts

# Relative RMS errors of logits. One rounding to bfloat16 is 2e-3, and a model rounds
# hundreds of times.
TOLERANCES = {"float32": 1e-4, "model": 5e-2}


@dataclass(frozen=True)
class Comparison:
    """The result of ``compare``.

    ``options`` are the given options of ``load`` for our side. ``layer_errors`` has the
    relative RMS error of each layer's output for the first tokens of the prompt; None
    if the two sides have different layers. ``bits`` is a hash of our logits: if it is
    equal in two comparisons, all our logits are equal bit by bit.
    """

    model: str
    reference: str
    dtype: str
    n_prompt_tokens: int
    n_text_tokens: int
    tokens: TokenAgreement
    logits: LogitErrors
    stock: Side
    ours: Side
    tolerance: float
    options: dict[str, Any]
    layer_errors: list[float] | None
    bits: str
    # The feature in which our class follows transformers and mlx-lm's does not.
    departs: str | None = None

    @property
    def within_tolerance(self) -> bool:
        """Whether the relative RMS error is within the tolerance; False for NaN."""
        return self.logits.relative_rms_error <= self.tolerance

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values; infinite numbers and NaN become None."""
        fields = asdict(self)
        fields["tokens"]["share"] = self.tokens.share
        return _finite({**fields, "within_tolerance": self.within_tolerance})


def compare(
    model: str | Path,
    prompt: str,
    *,
    max_tokens: int = 64,
    text: str | None = None,
    against: str | Path | None = None,
    dtype: str = "float32",
    tolerance: float | None = None,
    memory: int | str | None = None,
    expert_memory: int | str | None = None,
    scope: str = "global",
    policy: str | None = None,
    read_ahead: str = "auto",
    expert_io: str | None = None,
    executor: str | None = None,
    native: bool | None = None,
) -> Comparison:
    """Compare moeflux-mlx with stock mlx-lm; each side runs in its own process.

    This needs ``8 * vocabulary * (prompt + max_tokens)`` bytes of temporary disk space.

    Args:
        model: plain or packed model, a directory or a hub id.
        prompt: text to continue greedily, past any end-of-text token.
        max_tokens: length of the continuation in tokens.
        text: text for both sides' perplexity; None: do not measure it.
        against: the model that stock loads, by default ``model``; the experts of a pack
            are stacked in memory again.
        dtype: ``float32`` casts both sides; ``model`` keeps each model's type.
        tolerance: largest relative RMS error; default: ``TOLERANCES[dtype]``.
        memory, expert_memory, scope, policy, read_ahead, expert_io, executor, native:
            as for ``load``.

    Raises:
        ConfigError: an argument has no usable value.
        ModelError: a model cannot be loaded, or the two have different vocabularies.
        ExpertStoreError: a pack is damaged, or ``memory`` is too small.
    """
    options = {
        "memory": memory,
        "expert_memory": expert_memory,
        "scope": scope,
        "policy": policy,
        "read_ahead": read_ahead,
        "expert_io": expert_io,
        "executor": executor,
        "native": native,
    }
    (found,) = compare_each(
        model,
        prompt,
        [options],
        max_tokens=max_tokens,
        text=text,
        against=against,
        dtype=dtype,
        tolerance=tolerance,
    )
    return found


def compare_each(
    model: str | Path,
    prompt: str,
    ways: Sequence[Mapping[str, Any]],
    *,
    max_tokens: int = 64,
    text: str | None = None,
    against: str | Path | None = None,
    dtype: str = "float32",
    tolerance: float | None = None,
) -> Iterator[Comparison]:
    """Yield a comparison for each way to load our side; stock runs once.

    Args:
        ways: options of ``load`` for each comparison.
        model, prompt, max_tokens, text, against, dtype, tolerance: as for ``compare``.

    Raises:
        ConfigError, ModelError, ExpertStoreError: as ``compare``.
    """
    path, reference = find_model(model), find_model(against or model)
    _check_arguments(dtype, max_tokens)
    tokenizer = open_tokenizer(path)
    job = Job(
        side="stock",
        path=str(reference),
        prompt=_encode(tokenizer, prompt, 1, "prompt"),
        text=[] if text is None else _encode(tokenizer, text, 2, "text"),
        max_tokens=max_tokens,
        dtype=dtype,
    )
    with tempfile.TemporaryDirectory(prefix="moeflux-compare-") as directory:
        stock = run_job(job, Path(directory))
        job = replace(job, side="ours", path=str(path), forced=stock.tokens)
        for way in ways:
            ours = run_job(replace(job, options=dict(way)), Path(directory))
            own = not takes_door(path, way.get("native"), told=False)
            yield Comparison(
                model=str(model),
                reference=str(against or model),
                dtype=dtype,
                n_prompt_tokens=len(job.prompt),
                n_text_tokens=len(job.text),
                tokens=agreement(stock.tokens, ours.tokens, tokenizer),
                logits=logit_errors(stock.logits, ours.logits),
                stock=stock.side,
                ours=ours.side,
                tolerance=TOLERANCES[dtype] if tolerance is None else tolerance,
                options={k: v for k, v in way.items() if v is not None},
                layer_errors=layer_errors(stock.layers, ours.layers),
                bits=xxh3_128_hexdigest(ours.logits.data),
                departs=departs(read_config(path)) if own else None,
            )


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(v) for key, v in value.items()}
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value


def _check_arguments(dtype: str, max_tokens: int) -> None:
    if dtype not in TOLERANCES:
        raise ConfigError(
            f"[compare] expected dtype to be one of {list(TOLERANCES)} but got "
            f"{dtype!r}"
        )
    if max_tokens < 1:
        raise ConfigError(
            f"[compare] expected at least 1 token to generate but got {max_tokens}"
        )


def _encode(tokenizer: Any, text: str, n_least: int, name: str) -> list[int]:
    tokens = list(tokenizer.encode(text))
    if len(tokens) < n_least:
        raise ConfigError(
            f"[compare] expected a {name} of at least {n_least} tokens but got "
            f"{len(tokens)}"
        )
    return tokens


__all__ = [
    "TOLERANCES",
    "Comparison",
    "Divergence",
    "Job",
    "LogitErrors",
    "Side",
    "Token",
    "TokenAgreement",
    "compare",
    "compare_each",
    "greedy",
    "load_stock",
    "log_likelihood",
    "logit_errors",
    "measure",
    "peak_process_bytes",
    "perplexity",
    "stacked_experts",
]
