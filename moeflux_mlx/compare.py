"""Run the same tokens through stock mlx-lm and moeflux-mlx, and compare.

Each side runs in a process of its own, so that its speed and peak memory are its own.
They meet in temporary files: an .npz of tokens and figures, and float32 logits that
are compared a few rows at a time.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import _get_classes, load_model, load_tokenizer

from .errors import (
    BackendError,
    BudgetError,
    ConfigError,
    ExpertStoreError,
    ModelError,
    MoefluxError,
)
from .experts.packed import PackedExperts, is_packed
from .experts.pool import MLX_DTYPES
from .loading import find_model, load

# Relative RMS of logits. In bfloat16 one rounding is 2e-3 and a model makes hundreds.
TOLERANCES = {"float32": 1e-4, "model": 5e-2}

# Logits of one piece stay below 130 MB even with a vocabulary of 248 thousand.
PIECE_TOKENS = 128
# Perplexity starts afresh after as many tokens, as mlx_lm.perplexity does.
WINDOW_TOKENS = 512
COMPARED_VALUES = 1 << 22

ROUTED = re.compile(r"(?:.*\.)?layers\.(?P<layer>\d+)\.\w+\.switch_mlp")
KINDS = (BackendError, BudgetError, ConfigError, ExpertStoreError, ModelError)
FAILED = 2


@dataclass(frozen=True)
class Token:
    """A token id and its text."""

    id: int
    text: str


@dataclass(frozen=True)
class Divergence:
    """The first token, counted from 0, in which two continuations differ."""

    position: int
    stock: Token
    ours: Token


@dataclass(frozen=True)
class TokenAgreement:
    """How many of ``n_tokens`` greedy tokens are equal at their position."""

    n_tokens: int
    n_equal: int
    first_divergence: Divergence | None

    @property
    def share(self) -> float:
        """Equal tokens of all."""
        return self.n_equal / self.n_tokens


@dataclass(frozen=True)
class LogitErrors:
    """Our logits against stock's, both sides forced through stock's tokens.

    ``kl_mean`` and ``kl_max`` are KL(stock || ours) of a position in nats;
    ``relative_rms_error`` is relative to the RMS of stock's logits.
    """

    n_positions: int
    kl_mean: float
    kl_max: float
    kl_max_position: int
    top1_agreement: float
    max_error: float
    rms_error: float
    relative_rms_error: float


@dataclass(frozen=True)
class Side:
    """What one side cost, and its perplexity on the text if there was one.

    ``prompt_tps`` and ``generation_tps`` are tokens per second. The peaks were reached
    while loading and generating: ``peak_process_bytes`` of the whole process,
    ``peak_mlx_bytes`` of what MLX allocated, which is not all on a CPU.
    """

    prompt_tps: float
    generation_tps: float
    peak_process_bytes: int
    peak_mlx_bytes: int
    perplexity: float | None = None
    expert_hit_rate: float | None = None
    expert_read_bytes: int | None = None


@dataclass(frozen=True)
class Comparison:
    """Everything ``compare`` found; within tolerance when the relative RMS error is."""

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

    @property
    def within_tolerance(self) -> bool:
        """False also when an error is not a number."""
        return self.logits.relative_rms_error <= self.tolerance

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values; what is not a finite number becomes None."""
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
    scope: str = "global",
    executor: str | None = None,
) -> Comparison:
    """Compare moeflux-mlx with stock mlx-lm; each side runs in its own process.

    Needs ``8 * vocabulary * (prompt + max_tokens)`` bytes of temporary disk space.

    Args:
        model: plain or packed model, a directory or a hub id.
        prompt: text to continue greedily, past any end-of-text token.
        max_tokens: length of the continuation.
        text: what to measure the perplexity of both sides on.
        against: model that stock loads, by default ``model``; stock's experts are
            stacked in memory again when it is packed.
        dtype: ``float32`` casts both sides; ``model`` leaves each its own type.
        tolerance: largest relative RMS error, by default that of ``TOLERANCES``.
        memory, scope, executor: as for ``load``.

    Raises:
        ConfigError: an argument is not usable.
        ModelError: a model cannot be loaded, or the two do not belong together.
        ExpertStoreError: a pack is damaged, or ``memory`` is too small.
    """
    path, reference = find_model(model), find_model(against or model)
    _check_arguments(dtype, max_tokens)
    tokenizer = load_tokenizer(path)
    job = Job(
        side="stock",
        path=str(reference),
        prompt=_encode(tokenizer, prompt, 1, "prompt"),
        text=[] if text is None else _encode(tokenizer, text, 2, "text"),
        max_tokens=max_tokens,
        dtype=dtype,
    )
    with tempfile.TemporaryDirectory(prefix="moeflux-compare-") as directory:
        stock = _run(job, Path(directory))
        options = {"memory": memory, "scope": scope, "executor": executor}
        job = replace(
            job, side="ours", path=str(path), forced=stock.tokens, options=options
        )
        ours = _run(job, Path(directory))
        logits = logit_errors(stock.logits, ours.logits)
    return Comparison(
        model=str(model),
        reference=str(against or model),
        dtype=dtype,
        n_prompt_tokens=len(job.prompt),
        n_text_tokens=len(job.text),
        tokens=_agreement(stock.tokens, ours.tokens, tokenizer),
        logits=logits,
        stock=stock.side,
        ours=ours.side,
        tolerance=TOLERANCES[dtype] if tolerance is None else tolerance,
    )


def load_stock(path: str | Path) -> nn.Module:
    """Load mlx-lm's own class, everything in memory, also from a packed directory.

    Raises:
        ModelError: mlx-lm cannot load it.
        ExpertStoreError: the pack is damaged.
    """
    path = Path(path)
    try:
        if not is_packed(path):
            return load_model(path)[0]
        with PackedExperts.open(path) as store:
            return load_model(
                path,
                # The class named by model_file is ours.
                model_config={"model_file": None},
                get_model_classes=lambda config: _stock_classes(config, store),
            )[0]
    except (ValueError, FileNotFoundError) as error:
        if isinstance(error, MoefluxError):
            raise
        raise ModelError(f"[compare] mlx-lm cannot load {path}: {error}") from error


def stacked_experts(store: PackedExperts, layer: int) -> Iterator[tuple[str, mx.array]]:
    """Yield one layer's tensors as mlx-lm stores them, ``[E, ...]``, by name."""
    layout = store.layout(layer)
    shape = (store.n_experts, layout.stride)
    records = np.memmap(store.path(layer), np.uint8, "r", shape=shape)
    for spec in layout.tensors:
        own = np.ascontiguousarray(records[:, spec.offset : spec.offset + spec.n_bytes])
        stacked = mx.array(own).view(MLX_DTYPES[spec.dtype])
        name = f"{spec.projection}.{spec.part}"
        yield name, stacked.reshape(store.n_experts, *spec.shape)


def logit_errors(stock: np.ndarray, ours: np.ndarray) -> LogitErrors:
    """Compare logits ``[T, V]`` of two sides, float32, a few rows at a time.

    Raises:
        ModelError: the shapes differ, so the vocabularies do.
    """
    if stock.shape != ours.shape:
        raise ModelError(
            f"[compare] expected logits {list(stock.shape)} as of stock mlx-lm but got "
            f"{list(ours.shape)}: the models do not have the same vocabulary"
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
    )


def _piece_errors(stock: np.ndarray, ours: np.ndarray) -> tuple[np.ndarray, ...]:
    """Return KL, top-1 equality, largest error, sums of squares, all ``[T]``."""
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


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(v) for key, v in value.items()}
    return None if isinstance(value, float) and not np.isfinite(value) else value


def _check_arguments(dtype: str, max_tokens: int) -> None:
    if dtype not in TOLERANCES:
        raise ConfigError(
            f"[compare] dtype expected one of {list(TOLERANCES)} but got {dtype!r}"
        )
    if max_tokens < 1:
        raise ConfigError(
            f"[compare] expected at least 1 token to generate but got {max_tokens}"
        )


def _encode(tokenizer: Any, text: str, n_least: int, name: str) -> list[int]:
    tokens = list(tokenizer.encode(text))
    if len(tokens) < n_least:
        raise ConfigError(
            f"[compare] {name} expected at least {n_least} tokens but got {len(tokens)}"
        )
    return tokens


def _agreement(stock: list[int], ours: list[int], tokenizer: Any) -> TokenAgreement:
    differing = [i for i, (a, b) in enumerate(zip(stock, ours, strict=True)) if a != b]
    first = None
    if differing:
        at = differing[0]
        tokens = [Token(t, tokenizer.decode([t])) for t in (stock[at], ours[at])]
        first = Divergence(at, *tokens)
    return TokenAgreement(len(stock), len(stock) - len(differing), first)


def _stock_classes(config: dict[str, Any], store: PackedExperts) -> tuple[type, type]:
    model_class, args_class = _get_classes(config)

    def sanitize(self: nn.Module, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        weights = model_class.sanitize(self, weights)
        return {**weights, **dict(_routed_weights(self, store))}

    return type("Model", (model_class,), {"sanitize": sanitize}), args_class


def _routed_weights(
    model: nn.Module, store: PackedExperts
) -> Iterator[tuple[str, mx.array]]:
    for path, _ in model.named_modules():
        if found := ROUTED.fullmatch(path):
            for name, array in stacked_experts(store, int(found["layer"])):
                yield f"{path}.{name}", array


@dataclass(frozen=True)
class Job:
    """What one side is to do; ``forced`` are stock's tokens, for the other side."""

    side: str
    path: str
    prompt: list[int]
    text: list[int]
    max_tokens: int
    dtype: str
    forced: list[int] | None = None
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class _Measured:
    side: Side
    tokens: list[int]
    logits: np.ndarray


def _run(job: Job, directory: Path) -> _Measured:
    """Do a job in a process of its own and read what it left."""
    path = directory / f"{job.side}.json"
    path.write_text(json.dumps(asdict(job)))
    command = [sys.executable, "-m", "moeflux_mlx.compare", str(path)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise _failure(job, done)
    with np.load(path.with_suffix(".npz")) as arrays:
        found = {name: arrays[name].tolist() for name in arrays.files}
    tokens, n_vocabulary = found.pop("tokens"), found.pop("n_vocabulary")
    rows = np.memmap(path.with_suffix(".logits"), np.float32, "r")
    return _Measured(Side(**found), tokens, rows.reshape(-1, n_vocabulary))


def _failure(job: Job, done: subprocess.CompletedProcess[str]) -> MoefluxError:
    if done.returncode == FAILED and done.stdout.strip():
        name, message = json.loads(done.stdout.splitlines()[-1])
        return {kind.__name__: kind for kind in KINDS}.get(name, ModelError)(message)
    if done.returncode < 0:
        why = f"signal {-done.returncode} ended it; is there enough memory?"
    else:
        why = (done.stderr.strip().splitlines() or ["no message"])[-1]
    return ModelError(f"[compare] {job.side} with {job.path}: {why}")


def _worker(path: Path) -> int:
    """Do the job described in a file; the results get its name."""
    job = Job(**json.loads(path.read_text()))
    try:
        measure(job, path)
    except (MoefluxError, OSError) as error:
        print(json.dumps([type(error).__name__, str(error)]))
        return FAILED
    return 0


def measure(job: Job, path: Path) -> None:
    """Load and run one side, writing ``path`` as .npz and .logits."""
    model = _load(job)
    greedy(model, job.prompt[:1], 2)  # one-time costs are not speed
    streamer = getattr(model, "streamer", None)
    if streamer is not None:
        streamer.stats.reset()
    tokens, prompt_tps, generation_tps = greedy(model, job.prompt, job.max_tokens)
    found: dict[str, Any] = {
        "tokens": tokens,
        "prompt_tps": prompt_tps,
        "generation_tps": generation_tps,
        "peak_process_bytes": peak_process_bytes(),
        "peak_mlx_bytes": mx.get_peak_memory(),
    }
    if streamer is not None:
        counters = streamer.stats.total
        found["expert_hit_rate"] = counters.hit_rate
        found["expert_read_bytes"] = counters.read_bytes
    with path.with_suffix(".logits").open("wb") as file:
        found["n_vocabulary"] = _force(model, job.prompt, job.forced or tokens, file)
    if job.text:
        found["perplexity"] = perplexity(model, job.text)
    np.savez(path.with_suffix(".npz"), **found)


def _load(job: Job) -> nn.Module:
    if job.side == "stock":
        model = load_stock(job.path)
    else:
        model = load(job.path, **job.options)[0]
    if job.dtype == "float32":
        model.set_dtype(mx.float32)
    return model


def greedy(
    model: nn.Module, prompt: Sequence[int], max_tokens: int
) -> tuple[list[int], float, float]:
    """Return ``(tokens, prompt tokens/s, generated tokens/s)``, not stopping at an end.

    The first token belongs to the prompt's time; alone, generation has speed 0.
    """
    tokens, times = [], [time.perf_counter()]
    for token, _ in generate_step(mx.array(list(prompt)), model, max_tokens=max_tokens):
        tokens.append(int(token))
        times.append(time.perf_counter())
    generating = times[-1] - times[1]
    speed = (len(tokens) - 1) / generating if generating else 0.0
    return tokens, len(prompt) / (times[1] - times[0]), speed


def _force(
    model: nn.Module, prompt: list[int], continuation: list[int], file: BinaryIO
) -> int:
    """Write the logits of every position as generation computes them; return V."""
    pieces = [prompt[i : i + PIECE_TOKENS] for i in range(0, len(prompt), PIECE_TOKENS)]
    pieces += [[token] for token in continuation[:-1]]
    for logits in _logits(model, pieces):
        np.array(logits).tofile(file)
    return int(logits.shape[-1])


def _logits(model: nn.Module, pieces: list[list[int]]) -> Iterator[mx.array]:
    """Yield float32 logits ``[T, V]`` of each piece of one sequence."""
    cache = make_prompt_cache(model)
    for piece in pieces:
        logits = model(mx.array([piece]), cache=cache)[0].astype(mx.float32)
        mx.eval(logits, [c.state for c in cache])
        yield logits


def perplexity(model: nn.Module, tokens: Sequence[int]) -> float:
    """Return exp of the mean negative log-likelihood of ``tokens``.

    Windows of ``WINDOW_TOKENS`` are scored on their own, without their first token.
    """
    total, n_scored = 0.0, 0
    for start in range(0, len(tokens) - 1, WINDOW_TOKENS):
        window = list(tokens[start : start + WINDOW_TOKENS])
        total += log_likelihood(model, window)
        n_scored += len(window) - 1
    return float(np.exp(-total / n_scored))


def log_likelihood(model: nn.Module, tokens: list[int]) -> float:
    """Return the sum of log-probabilities (nats) of all tokens after the first."""
    starts = range(0, len(tokens) - 1, PIECE_TOKENS)
    pieces = [tokens[:-1][i : i + PIECE_TOKENS] for i in starts]
    total = 0.0
    for start, logits in zip(starts, _logits(model, pieces), strict=True):
        targets = mx.array(tokens[start + 1 : start + 1 + len(logits)])
        chosen = mx.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
        total += float((chosen - mx.logsumexp(logits, axis=-1)).sum())
    return total


def peak_process_bytes() -> int:
    """Return the most memory this process has had resident."""
    try:
        # Unlike ru_maxrss, it does not start at the size of the parent process.
        status = Path("/proc/self/status").read_text()
        return int(re.search(r"VmHWM:\s*(\d+) kB", status)[1]) * 1024  # type: ignore[index]
    except (OSError, TypeError):
        import resource

        # Linux counts in KiB, macOS in bytes.
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


if __name__ == "__main__":
    sys.exit(_worker(Path(sys.argv[1])))
