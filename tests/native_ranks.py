"""The work of several ranks that share the experts of a native model."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import mlx.core as mx
import ranks
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.tuner.utils import linear_to_lora_layers
from stated_gpu import stated_gpu

import moeflux_mlx
from moeflux_mlx.engine.native import NativeModel
from moeflux_mlx.errors import BudgetError
from moeflux_mlx.experts.compute.exchange import Exchange

LARGE = 1 << 30
# Bytes in which about half of a rank's wider experts fit.
FEW = (1 << 21) + (12 << 14)
# Two sequences of one length.
BATCH = [[1, 5, 9, 200], [7, 3, 4, 11]]
# How ranks get their experts: bytes for these, and whether layers wait for other ranks.
WAYS = {"streamed": (ranks.SMALL, True), "resident, late checks": (LARGE, False)}


def texts(model: Any) -> dict[str, Any]:
    """Return the tokens and bits of one sequence, and the tokens of a batch."""
    cache, ids, batch = make_prompt_cache(model), mx.array(BATCH), []
    for _ in range(2):
        batch.append(model(ids, cache=cache)[:, -1].argmax(axis=-1).tolist())
        ids = mx.array(batch[-1])[:, None]
    return {**ranks.greedy(model, 3), "batch": batch}


def on_the_device(model: Any) -> None:
    """Let single tokens run on MLX's arrays without a read-back, as on a GPU."""
    model.runtime._optimistic = "on"


def generate(
    exchange: Exchange,
    folder: Path,
    *,
    names: Sequence[str],
    executor: str = "ops",
) -> dict[str, Any]:
    """Run models in every way; return the share of experts that was read too."""
    outcome = {}
    for name in names:
        for way, (memory, waits) in WAYS.items():
            model, _ = moeflux_mlx.load(
                folder.parent / name,
                expert_memory=memory,
                executor=executor,
                group=exchange._group,
            )
            assert isinstance(model, NativeModel)
            ranks.exchange_of(model).waits = waits
            if not waits:
                on_the_device(model)
            found = texts(model)
            counts = model.streamer.stats.total
            outcome[f"{name} {way}"] = {
                **found,
                "experts": len(model.streamer.experts),
                "requests": counts.hits + counts.misses,
                "misses": counts.misses,
                "steps": model.runtime.steps,
            }
    return outcome


def on_a_stated_gpu(exchange: Exchange, folder: Path) -> dict[str, Any]:
    """Run on a stated GPU, with our kernels and with MLX's operations."""
    outcome = {}
    with stated_gpu("cuda"):
        for executor, memory in product(("cuda", "ops"), (FEW, LARGE)):
            model, _ = moeflux_mlx.load(
                folder.parent / "wide",
                expert_memory=memory,
                executor=executor,
                group=exchange._group,
            )
            streams = not model.streamer.resident
            outcome[f"{executor}, streams: {streams}"] = logits_of(model)
    return outcome


def logits_of(model: Any) -> list[Any]:
    """Return the logits of prompts of several lengths and of a token after each."""
    found = []
    for n in (1, 2, 5, 30):
        cache, ids = make_prompt_cache(model), mx.arange(1, n + 1)[None] * 7
        found += [model(x, cache=cache).tolist() for x in (ids, mx.array([[5]]))]
    return found


def bounded(exchange: Exchange, folder: Path) -> dict[str, Any]:
    """Run with other amounts of memory on each rank, and with too little on one."""
    outcome: dict[str, Any] = {}
    model, _ = moeflux_mlx.load(
        folder.parent / "pack",
        memory=(2 if exchange.rank else 3) << 30,
        group=exchange._group,
    )
    keeper, asked = model.runtime.keeper, []
    make_room, run = keeper.make_room, model.runtime.together.run
    outcome["whole"] = ranks.greedy(model)

    def room(cache: Any, n_seqs: int, t: int, **options: Any) -> int:
        found = make_room(cache, n_seqs, t, **options)
        return min(found, 5 * n_seqs) if exchange.rank else found

    def counted(call: Any, states: Any) -> Any:
        asked.append(states is None)
        return run(call, states)

    keeper.make_room, model.runtime.together.run = room, counted
    outcome["divided"] = ranks.greedy(model, 1)["tokens"]
    outcome["chunks"] = [*asked]

    def refuse(*_: Any, **__: Any) -> int:
        raise BudgetError("[memory] too little")

    keeper.make_room = refuse if exchange.rank else room
    outcome["too little"] = ranks.said(lambda: model(mx.array(ranks.PROMPT)))
    keeper.make_room = make_room
    outcome["after"] = ranks.greedy(model)
    return outcome


def refused(exchange: Exchange, folder: Path) -> dict[str, Any]:
    """Ask for calls that ranks cannot make together."""
    load = functools.partial(
        moeflux_mlx.load, folder.parent / "pack", group=exchange._group
    )
    model, _ = load()
    x = mx.random.normal((1, 3, 64), key=mx.random.key(1))

    def loss(x: mx.array) -> mx.array:
        return model.model(None, input_embeddings=x).sum()

    outcome = {"grad": ranks.said(lambda: mx.eval(mx.grad(loss)(x)))}
    compiled = mx.compile(model)
    outcome["compile"] = ranks.said(lambda: compiled(mx.array(ranks.PROMPT)))
    outcome["layers"] = ranks.said(lambda: model.model.pipeline(exchange._group))
    outcome["shard"] = ranks.said(lambda: model.shard(exchange._group))
    # The block of a layer, without graphs, exchanges rows too.
    block = model.layers[0].mlp
    outcome["block"] = block(x).tolist()
    linear_to_lora_layers(model, 1, {"rank": 2, "scale": 1.0, "dropout": 0.0})
    outcome["module"] = ranks.said(lambda: model(mx.array(ranks.PROMPT)))
    return outcome
