"""Run several ranks of one process group, forked from one that has its modules.

``launch`` runs a function of this file, or the command line, in each rank.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import importlib.util
import json
import os
import re
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.machinery import SourceFileLoader
from itertools import product
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import commands
import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import make_prompt_cache
from serving_client import Client

import moeflux_mlx
from moeflux_mlx.calls.group import launched_group
from moeflux_mlx.errors import BudgetError, ExpertStoreError, MoefluxError
from moeflux_mlx.experts.compute.exchange import Exchange

# Bytes in which a few of a tiny model's experts fit.
SMALL = (1 << 21) + (1 << 16)
PROMPT = [[1, 5, 9, 200, 17, 3, 44, 8] * 3]
SECONDS = 120


def launch(
    n: int,
    folder: Path,
    work: Callable[..., Any],
    words: Sequence[object] = (),
    text: str = "",
) -> list[tuple[int | None, str]]:
    """Run ``n`` ranks and wait for them; return their exit codes and output."""
    ended = []
    for process, log in start(n, folder, work, words, text):
        process.join(SECONDS)
        if process.exitcode is None:
            process.kill()
        ended.append((process.exitcode, log.read_text()))
    return ended


def start(
    n: int,
    folder: Path,
    work: Callable[..., Any],
    words: Sequence[object] = (),
    text: str = "",
) -> list[tuple[BaseProcess, Path]]:
    """Start ``n`` ranks; return each with the file that it prints to.

    Args:
        folder: where ``work`` reads its files and writes its result as ``N.json``.
        work: a function of an exchange and the folder, or of the ``words`` if given.
        text: the standard input of each rank.
    """
    folder.mkdir(exist_ok=True)
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(n)]
    hosts = [[f"127.0.0.1:{s.getsockname()[1]}"] for s in sockets]
    for one in sockets:
        one.close()
    hostfile = folder / "hosts.json"
    hostfile.write_text(json.dumps(hosts))
    (given := folder / "stdin").write_text(text)
    call = work if words else functools.partial(_called, work)
    started, before = [], dict(os.environ)
    for rank in range(n):
        log = folder / f"{rank}.log"
        log.write_text("")
        os.environ.update(MLX_RANK=str(rank), MLX_HOSTFILE=str(hostfile))
        arguments = ["ranks", *map(str, words or [folder])]
        started.append((commands._start(arguments, [given, log, log], call), log))
    os.environ.clear()
    os.environ.update(before)
    return started


def address(process: BaseProcess, log: Path) -> str:
    """Wait until a rank serves; return its address."""
    while not (found := re.search(r"serving .* at (http\S+)\n", log.read_text())):
        assert process.is_alive(), log.read_text()
        time.sleep(0.05)
    return found[1]


@contextlib.contextmanager
def serving(n: int, folder: Path, *words: object) -> Iterator[Client]:
    """Run ``moeflux serve`` in ``n`` ranks; check that they end without an error."""
    words = ("serve", "--port", 0, *words)
    started = start(n, folder, commands.called, words)
    first = started[0][0]
    try:
        yield Client(address(*started[0]))
    finally:
        first.terminate()
        for process, _ in started:
            process.join(SECONDS)
            process.kill()
    assert [process.exitcode for process, _ in started] == [0] * n


def mlx_lm(words: list[str]) -> int:
    """Run one of mlx-lm's commands."""
    mx.set_default_device(mx.cpu)
    sys.argv = words
    importlib.import_module(f"mlx_lm.{words[0]}").main()
    return 0


def found(folder: Path, n: int) -> list[dict[str, Any]]:
    """Return the result of each rank's ``work``."""
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(n)]


def _called(work: Callable[[Exchange, Path], dict[str, Any]], args: list[str]) -> int:
    mx.set_default_device(mx.cpu)
    group = launched_group()
    assert group is not None
    exchange, folder = Exchange(group), Path(args[0])
    outcome = work(exchange, folder)
    (folder / f"{exchange.rank}.json").write_text(json.dumps(outcome))
    # No rank may end while another still waits for its experts.
    exchange.first([0])
    return 0


def greedy(model: Any, n: int = 6) -> dict[str, Any]:
    """Return tokens, and the bits of the logits that chose them."""
    cache, tokens, bits = make_prompt_cache(model), [], hashlib.sha256()
    ids = mx.array(PROMPT)
    for _ in range(n):
        logits = np.array(model(ids, cache=cache).astype(mx.float32))
        bits.update(logits.tobytes())
        tokens.append(int(logits[0, -1].argmax()))
        ids = mx.array([[tokens[-1]]])
    return {"tokens": tokens, "bits": bits.hexdigest()}


def exchange_of(model: Any) -> Exchange:
    """Return a model's connection to the other ranks."""
    owner = vars(model).get("calls", vars(model).get("runtime"))
    found: Exchange = owner.together.exchange
    return found


def said(call: Callable[[], Any]) -> str:
    """Return the message of the error that a call raises."""
    try:
        call()
    except MoefluxError as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def generate(exchange: Exchange, folder: Path) -> dict[str, Any]:
    """Run every model in the folder, streamed and in memory; return its reads too."""
    outcome = {}
    for path in sorted(
        p for p in folder.parent.iterdir() if p.is_dir() and p != folder
    ):
        for memory, waits in product((SMALL, 1 << 30), (True, False)):
            model, _ = moeflux_mlx.load(
                path, expert_memory=memory, native=False, group=exchange._group
            )
            exchange_of(model).waits = waits
            store, read = model.__dict__["store"], set()
            spans = store.spans

            def noted(layer, expert, spans=spans, read=read):
                read.add((layer, expert))
                return spans(layer, expert)

            store.spans = noted
            before = model.streamer.stats.total.read_bytes
            outcome[f"{path.name} {memory} {waits}"] = {
                **greedy(model),
                "before": before,
                "bytes": model.streamer.stats.total.read_bytes,
                "hits": model.streamer.stats.total.hits,
                "misses": model.streamer.stats.total.misses,
                "record": store.layout(store.layers[0]).record_bytes,
                "read": sorted(read),
                "random": mx.random.uniform().item(),
            }
    return outcome


def exact(exchange: Exchange, folder: Path) -> dict[str, Any]:
    """Exchange rows whose bits must not change; return them as integers."""
    outcome: dict[str, Any] = {}
    for dtype, words in ("float32", np.uint32), ("bfloat16", np.uint16):
        n = np.iinfo(words).max
        # -0.0, NaN, subnormals and arbitrary bits.
        bits = np.array([[n // 2 + 1, n, n - 1, 1], [0, 3, n // 3, n // 2]], words)

        def make(places, bits=bits, dtype=dtype):
            return mx.array(bits[places]).view(getattr(mx, dtype))

        ids, own = np.array([0, 1]), exchange.own(2)
        like = 4, getattr(mx, dtype)
        rows = exchange.rows("block", ids, own, like, make)
        assert rows.dtype == like[1]
        view = np.array(rows.view(mx.uint32 if dtype == "float32" else mx.uint16))
        outcome[dtype] = [view.tolist(), bits.tolist()]
    return outcome


def bounded(exchange: Exchange, folder: Path) -> dict[str, Any]:
    """Run with less memory on one rank, then with too little for a prompt."""
    outcome = {}
    gib = 1 << 30
    model, _ = moeflux_mlx.load(
        folder.parent / "pack",
        memory=2 * gib if exchange.rank else 3 * gib,
        native=False,
        group=exchange._group,
    )
    outcome["experts"] = model.plan.n_experts
    outcome["bits"] = greedy(model)["bits"]
    calls = model.__dict__["calls"]
    make_room = calls.keeper.make_room
    asked = []

    def room(cache, n_seqs, t, **options):
        found = make_room(cache, n_seqs, t, **options)
        return min(found, 5 * n_seqs) if exchange.rank else found

    def run(call, bound, t, states, own=calls._run):
        asked.append(t)
        return own(call, bound, t, states)

    calls.keeper.make_room, calls._run = room, run
    outcome["divided"] = greedy(model, 1)["tokens"]
    outcome["asked"] = [*asked]

    def refuse(*_, **__):
        raise BudgetError("[memory] too little")

    calls.keeper.make_room = refuse if exchange.rank else room
    outcome["too little"] = said(lambda: model(mx.array(PROMPT)))

    def give_way() -> bool:
        calls.keeper.make_room = room
        outcome["gave way"] = True
        return True

    calls._give_way = give_way
    outcome["given way"] = greedy(model, 1)["tokens"]
    calls.keeper.make_room = make_room
    outcome["after"] = greedy(model)["bits"]
    return outcome


def bench(exchange: Exchange, folder: Path) -> dict[str, Any]:
    """Measure as ``scripts/bench_distributed`` does."""
    script = Path(__file__).resolve().parents[1] / "scripts" / "bench_distributed"
    name = "bench_distributed"
    loader = SourceFileLoader(name, str(script))
    spec = importlib.util.spec_from_loader(name, loader)
    assert spec is not None
    loader.exec_module(module := importlib.util.module_from_spec(spec))
    words = ["--rounds", "1", "--prompt", "8", "--tokens", "3", "--model"]
    args = module.parse_arguments([*words, str(folder.parent / "pack")])
    table = module.Table(*"abcde", *module.COLUMNS)
    outcomes = {kind: module.measured(args, 50, kind) for kind in module.CLASSES}
    for outcome in outcomes.values():
        module.add_rows(table, 50, [outcome])
    assert table.row_count == 2
    return outcomes


def states(exchange: Exchange, folder: Path, *, native: bool) -> dict[str, Any]:
    """Save a state, load it and another one, and let one rank fail."""
    load = functools.partial(
        moeflux_mlx.load, folder.parent / "pack", native=native, group=exchange._group
    )
    model, _ = load(expert_memory=SMALL)
    outcome: dict[str, Any] = {"one": continued(model, folder.parent / "one")}
    cache, path = make_prompt_cache(model), folder.parent / "several"
    mx.eval(model(mx.array(PROMPT), cache=cache))
    streamer = model.streamer
    outcome["held"] = len(streamer.held)
    moeflux_mlx.save_state(path, model, cache, PROMPT[0])
    model, _ = load(expert_memory=SMALL)
    outcome["several"] = continued(model, path)
    outcome["held again"] = len(model.streamer.held)
    elsewhere = path if exchange.rank else folder / "none"
    outcome["read"] = said(lambda: moeflux_mlx.load_state(elsewhere, model))
    place = path if exchange.rank else folder / "no" / "place"
    outcome["write"] = said(
        lambda: moeflux_mlx.save_state(place, model, cache, PROMPT[0])
    )
    other = path if exchange.rank else folder.parent / "other"
    outcome["other"] = said(lambda: moeflux_mlx.load_state(other, model))
    return outcome


def continued(model: Any, path: Path) -> list[int]:
    """Return the tokens that follow a state."""
    state = moeflux_mlx.load_state(path, model)
    assert state.tokens == PROMPT[0]
    return follow(model, state.cache)


def follow(model: Any, cache: list[Any]) -> list[int]:
    """Return the tokens that follow the tokens in the caches."""
    ids, tokens = mx.array([[7]]), []
    for _ in range(4):
        tokens.append(int(model(ids, cache=cache)[0, -1].argmax()))
        ids = mx.array([[tokens[-1]]])
    return tokens


def pipelined(exchange: Exchange, folder: Path) -> dict[str, Any]:
    """Run models with divided layers; let one rank fail, then continue."""
    outcome: dict[str, Any] = {}
    group = exchange._group
    load = functools.partial(moeflux_mlx.load, group=group, pipeline=True)
    for name in "plain", "pack", "hybrid", "deepseek", "glm":
        model, _ = load(folder.parent / name, expert_memory=SMALL)
        outcome[name] = greedy(model)
        store = model.__dict__["store"]
        outcome[f"{name} blocks"] = [store.name(layer) for layer in store.layers]
    model, _ = load(folder.parent / "pack", memory="4GB")
    outcome["planned"] = greedy(model)
    calls = model.__dict__["calls"]
    make_room = calls.keeper.make_room
    if exchange.rank:
        calls.keeper.make_room = lambda *args, **options: min(
            make_room(*args, **options), 5
        )
    outcome["divided"] = greedy(model, 1)["tokens"]
    calls.keeper.make_room = make_room
    model, _ = load(folder.parent / "pack", expert_memory=SMALL)

    def damaged() -> Any:
        raise ExpertStoreError("[reader] damaged")

    switch = model.layers[-1].mlp.switch_mlp
    kept = switch._source
    if exchange.rank == 1:
        switch._source = damaged
    outcome["fails"] = said(lambda: greedy(model, 1))
    switch._source = kept
    outcome["after"] = greedy(model)
    outcome["compile"] = said(lambda: mx.compile(model)(mx.array(PROMPT)))
    outcome["again"] = said(lambda: model.model.pipeline(group))
    outcome["shard"] = said(lambda: model.shard(group))
    outcome["state"] = said(
        lambda: moeflux_mlx.save_state(folder / f"{exchange.rank}.state", model, [], [])
    )
    outcome["no experts"] = said(lambda: load(folder.parent / "short"))
    outcome["no pipeline"] = said(lambda: load(folder.parent / "oss"))
    return outcome


def die(exchange: Exchange, folder: Path, *, native: bool) -> dict[str, Any]:
    """End rank 1 in the middle of a call."""
    model, _ = moeflux_mlx.load(
        folder.parent / "pack", native=native, group=exchange._group
    )
    greedy(model, 1)
    if exchange.rank == 1:
        os._exit(9)
    try:
        greedy(model, 1)
    except MoefluxError as error:
        print(f"{type(error).__name__}: {error}", flush=True)
        os._exit(2)
    return {}


def part(exchange: Exchange, folder: Path, *, native: bool) -> dict[str, Any]:
    """Let rank 1 choose other experts than rank 0, in every layer or in the last."""
    outcome, n = {}, 3 if native else 6
    load = functools.partial(
        moeflux_mlx.load, folder.parent / "pack", native=native, group=exchange._group
    )
    for name, places in {"all": slice(None), "last": slice(-1, None)}.items():
        model, _ = load()
        own = exchange_of(model)
        gates = [layer.mlp.gate for layer in model.layers[places]]
        if exchange.rank == 1:
            for gate in gates:
                gate.weight = -gate.weight
        for own.waits in (True, False):
            outcome[f"{name} {own.waits}"] = greedy(model, n)
    if not native:
        block = model.layers[-1].mlp
        outcome["no layer"] = said(lambda: apart(model, block))
    # Rank 0 has all of its experts in memory, rank 1 has few.
    model, _ = load(expert_memory=(1 << 30) if exchange.rank == 0 else SMALL)
    if exchange.rank == 1:
        model.layers[1].mlp.gate.weight = -model.layers[1].mlp.gate.weight
    exchange_of(model).waits = False
    outcome["other memory"] = greedy(model, n)
    return outcome


def apart(model: Any, block: Any) -> None:
    """Call a routed block directly, without its layer."""
    calls = model.__dict__["calls"]
    x = mx.random.normal((1, 3, 64), key=mx.random.key(1))
    calls._run(lambda cache: block(x), SimpleNamespace(args=(None,), kwargs={}), 3, [])


def choose_late(exchange: Exchange) -> None:
    """Let ranks choose the same experts in one block and others in the next."""
    rows = mx.zeros((3, 4))
    with exchange.together(defers=True):
        for number in range(2):
            ids = mx.array([0, 1, 2 + number * exchange.rank])
            exchange.masked(f"block {number}", ids, range(1), rows, lambda n: None)


def messages(exchange: Exchange, mine: bool) -> dict[str, Any]:
    """Exchange rows of other experts, and check marks that were not added."""
    outcome: dict[str, Any] = {}
    outcome["choice"] = said(
        lambda: exchange.rows(
            "block",
            np.array([0, 1, 2 + mine]),
            range(0),
            (4, mx.float32),
            lambda places: mx.zeros((len(places), 4)),
        )
    )
    own_marks = np.array([[1, 1, 0], [2, 4, 0]], np.uint32)
    outcome["no sum"] = said(
        lambda: exchange._check("block", np.array([0, 1]), own_marks)
    )
    outcome["choice, not waiting"] = said(lambda: choose_late(exchange))
    return outcome


def fail(exchange: Exchange, folder: Path, *, native: bool) -> dict[str, Any]:
    """Let one rank fail in every way; check the results after each failure."""
    outcome, group = {}, exchange._group
    path = folder.parent / "pack"
    load = functools.partial(moeflux_mlx.load, path, native=native, group=group)
    mine = exchange.rank == 1
    model, _ = load(expert_memory=SMALL)

    def call(ids, model=model):
        return said(lambda: mx.eval(model(mx.array(ids))))

    # Rank 1 alone writes, and all ranks wait for it.
    file = path / "experts-001.bin"
    kept = file.read_bytes()
    exchange.first([0])
    if mine:
        file.write_bytes(kept[: len(kept) // 2] + bytes(len(kept) - len(kept) // 2))
    exchange.first([0])
    own = exchange_of(model)
    outcome["damaged"] = call(PROMPT)
    own.waits = False
    outcome["damaged, not waiting"] = call(PROMPT)
    own.waits = True
    if mine:
        file.write_bytes(kept)
    exchange.first([0])
    outcome["mended"] = greedy(model)
    outcome["tokens"] = call([[1, 2, 3 + mine]])
    outcome["lengths"] = call([[1, 2, 3, 4][: 3 + mine]])
    outcome["after"] = greedy(model)
    if not native:
        outcome |= messages(exchange, mine)
    outcome["grad"] = said(
        lambda: mx.eval(
            mx.grad(lambda x: model.model(None, input_embeddings=x).sum())(
                mx.ones((1, 3, 64))
            )
        )
    )
    outcome["compile"] = said(lambda: mx.compile(model)(mx.array(PROMPT)))
    outcome["pipeline"] = said(lambda: model.model.pipeline(group))
    outcome["shard"] = said(lambda: model.shard(group))
    for name, options in {
        "native": {"native": True},
        "mmap": {"expert_io": "mmap"},
        "ahead": {"read_ahead": "on"},
        "optimistic": {"optimistic": "on"},
        "auto": {"memory": "auto"},
        "group": {"group": 2},
    }.items():
        outcome[name] = said(lambda options=options: load(**options))
    kind = {"memory": "4GB"} if mine else {"expert_memory": "2GB"}
    outcome["bounds"] = said(lambda: load(**kind))
    outcome["after all"] = greedy(model)
    return outcome
