"""Compare a streamed model of each family with mlx-lm's own model in memory."""

from __future__ import annotations

import importlib
import itertools
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import families
import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model, quantize_model, save_config, save_model

from moeflux_mlx.errors import BudgetError
from moeflux_mlx.experts.files.pack import pack
from moeflux_mlx.experts.files.safetensors import load_arrays
from moeflux_mlx.experts.files.unpack import unpack
from moeflux_mlx.opening.stock_model import load_stock_lazily
from moeflux_mlx.streaming import stream

PROMPTS, BATCHES, N_GREEDY = (8, 100), (1, 3), 16
# None means unquantised.
BITS = (None, 4)
# A group size that divides every width of the tiny models.
GROUP_SIZE = 32


@dataclass(frozen=True)
class Outcome:
    """The result of one family in one form; ``why`` is empty if every bit agrees."""

    family: str
    bits: int | None
    n_blocks: int
    why: str
    packed: bool = False


def try_family(
    family: str,
    bits: int | None,
    *,
    forms: tuple[bool, ...] = (False, True),
    prompts: tuple[int, ...] = PROMPTS,
    n_greedy: int = N_GREEDY,
) -> list[Outcome]:
    """Compare mlx-lm's model with the model streamed through the fewest slots.

    Args:
        forms: stream the plain checkpoint (False), a pack of it (True), or both.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "plain"
        path.mkdir()
        try:
            write_model(path, family, bits)
            stock, _ = load_model(path)
            wanted = [*_runs(stock, prompts, n_greedy)]
            if not all(mx.isfinite(y).all().item() for run in wanted for y in run):
                raise ValueError("not a number")
        except Exception as error:
            why = f"stock: {_first_line(error)}"
            return [Outcome(family, bits, 0, why, packed) for packed in forms]
        outcomes = []
        for packed in forms:
            n_blocks, why = 0, ""
            try:
                model = stream_least(path, packed=packed)
                n_blocks = len(model.streamer.stats.snapshot().layers)
                why = _difference(model, wanted, prompts, n_greedy)
            except Exception as error:
                why = _first_line(error).replace(str(path), family)
            outcomes.append(Outcome(family, bits, n_blocks, why, packed))
        return outcomes


def _difference(
    model: nn.Module,
    wanted: list[list[mx.array]],
    prompts: tuple[int, ...],
    n_greedy: int,
) -> str:
    """Return the first run whose bits differ from the expected ones, or ''."""
    shapes = itertools.product(BATCHES, prompts)
    runs = _runs(model, prompts, n_greedy)
    for (n_seqs, n_tokens), stocks, ours in zip(shapes, wanted, runs, strict=True):
        if not all(map(mx.array_equal, stocks, ours)):
            return f"other bits: {n_seqs} x {n_tokens} tokens"
    return ""


def write_model(
    path: Path, family: str, bits: int | None, seed: int = 0, **sizes: int | None
) -> None:
    """Write a random float32 model in mlx-lm's format.

    Args:
        sizes: entries that replace those of the family's configuration.
    """
    mx.random.seed(seed)
    config = {**families.configuration(family), **sizes}
    module = importlib.import_module(f"mlx_lm.models.{family}")
    model = module.Model(module.ModelArgs.from_dict(config))
    model.update(tree_map(_random, model.parameters()))
    if bits is not None:
        predicate = getattr(model, "quant_predicate", None)
        model, config = quantize_model(
            model, config, GROUP_SIZE, bits, quant_predicate=predicate
        )
    save_model(path, model)
    save_config(config, path / "config.json")


def _random(x: mx.array) -> mx.array:
    """Add noise to ``x``, because constant routers and norms would hide mistakes."""
    if not mx.issubdtype(x.dtype, mx.floating):
        return x
    noise = 0.1 * mx.random.normal(x.shape)
    return x.astype(mx.float32) + (noise if x.ndim < 3 else 0)


def stream_least(path: Path, *, packed: bool = False) -> Any:
    """Stream a model with the minimum memory for experts: one slot."""
    if packed:
        path, plain = path.with_name("packed"), path
        pack(plain, path)
        _check_unpacked(plain, path)
    try:
        return stream(load_stock_lazily(path).model, path, expert_memory=1)
    except BudgetError as error:
        least = int(re.search(r"at least (\d+) bytes", str(error))[1])
    return stream(load_stock_lazily(path).model, path, expert_memory=least)


def _check_unpacked(plain: Path, packed: Path) -> None:
    """Raise ValueError unless a pack unpacks to its original checkpoint."""
    back = packed.with_name("back")
    unpack(packed, back)
    was, found = (
        {n: x for f in p.glob("model*.safetensors") for n, x in load_arrays(f).items()}
        for p in (plain, back)
    )
    same = was.keys() == found.keys() and all(
        x.dtype == found[n].dtype and mx.array_equal(x, found[n], equal_nan=True)
        for n, x in was.items()
    )
    if not same:
        raise ValueError("unpacked: other tensors")


def _runs(
    model: nn.Module, prompts: tuple[int, ...], n_greedy: int
) -> Iterator[list[mx.array]]:
    """Yield the logits of each batch of prompts, and of greedy tokens after it."""
    for n_seqs, n_tokens in itertools.product(BATCHES, prompts):
        key = mx.random.key(n_tokens)
        tokens = mx.random.randint(0, families.VOCAB, (n_seqs, n_tokens), key=key)
        cache = make_prompt_cache(model)
        logits = []
        for _ in range(n_greedy + 1):
            logits.append(model(tokens, cache=cache))
            mx.eval(logits[-1])
            tokens = logits[-1][:, -1:].argmax(axis=-1)
        yield logits


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


# The number of families that must work.
EXPECTED = 40
HEADER = """\
# Models

`scripts/try_families` runs every Mixture-of-Experts module of mlx-lm {version} as a
tiny random model in float32. mlx-lm runs it with every expert in memory, and
`moeflux_mlx.stream` runs it with memory for a single expert, from the checkpoint that
mlx-lm's converter writes and from a pack of it. Prompts have {prompts} tokens, batches
{batches} sequences, and {n_greedy} greedy tokens follow. *Same* means that every
logit has the same bits on the CPU.

| module | routed blocks | unquantised | 4 bits | packed | packed, 4 bits |
|---|---|---|---|---|---|
"""


def line(outcome: Outcome) -> str:
    """Return an outcome as a line of text."""
    form = "unquantised" if outcome.bits is None else f"{outcome.bits} bits"
    form += ", packed" if outcome.packed else ""
    return f"{outcome.family:20} {form:20} {outcome.why or 'same'}"


def n_working(outcomes: list[Outcome]) -> int:
    """Return the number of families that work in every form."""
    names = {outcome.family for outcome in outcomes}
    return len(names - {outcome.family for outcome in outcomes if outcome.why})


def document(outcomes: list[Outcome]) -> str:
    """Return the table of all outcomes as Markdown."""
    rows = []
    for _, group in itertools.groupby(outcomes, lambda outcome: outcome.family):
        forms = {(outcome.packed, outcome.bits): outcome for outcome in group}
        first = forms[False, None]
        cells = [
            forms[packed, bits].why.replace("|", "/") or "same"
            for packed in (False, True)
            for bits in BITS
        ]
        rows.append(f"| {first.family} | {first.n_blocks} | {' | '.join(cells)} |\n")
    header = HEADER.format(
        version=metadata.version("mlx-lm"),
        prompts=_listed(PROMPTS),
        batches=_listed(BATCHES),
        n_greedy=N_GREEDY,
    )
    total = f"\n{n_working(outcomes)} of {len(rows)} work.\n"
    return header + "".join(rows) + total


def _listed(numbers: tuple[int, ...]) -> str:
    return " and ".join(map(str, numbers))
