"""The door: stream the experts of any Mixture-of-Experts model of mlx-lm."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import mlx.core as mx
import mlx.nn as nn
from rich.filesize import decimal

from . import config, device, products, serving
from .calls.arguments import bounded, check_ids
from .calls.compiling import Compiled
from .calls.group import Group, begin_together, exchange_of, reached, ways_in_group
from .calls.measured_needs import MeasuredNeeds
from .calls.pipeline import PipelinedCalls, divide_alike
from .calls.shared import Calls
from .calls.ways import Ways, added_class
from .drafts import let_all_draft
from .errors import BudgetError, ModelError, MoefluxError, memory_errors
from .experts.compute.blank import BlankExperts
from .experts.compute.exchange import Exchange
from .experts.compute.switch import StreamedSwitch
from .experts.files.checkpoint import Checkpoint, read_config
from .experts.files.module_store import ModuleExperts, unchanged
from .experts.files.modules import RoutedBlock, find_blocks
from .experts.files.packed import is_packed
from .experts.files.packed_blocks import PackedBlocks
from .experts.files.store import ExpertStore, model_identity
from .experts.pool.budget import Amounts
from .experts.pool.policy import DEFAULT_POLICY, policy_factory
from .experts.pool.pool import pool_bytes
from .experts.streaming.access import expert_io as way_of_reading
from .experts.streaming.access import open_experts
from .experts.streaming.expert_pool import check_scope
from .experts.streaming.mapped import MappedExperts
from .experts.streaming.streamer import ExpertStreamer
from .experts.weights import has_values, kept_arrays
from .memory.caches import CACHE_STEP
from .memory.keeper import MemoryKeeper
from .memory.plan import MemoryPlan, own_bytes, plan_memory
from .memory.preflight import check_fits, unasked_expert_bytes
from .memory.relief import FreePool
from .memory.search import find_fastest
from .saving.guard import GuardsSaving, check_division, guard_saving, keep_whole
from .system.progress import Report, notice
from .training import TrainsUncompiled

M = TypeVar("M", bound=nn.Module)
# The token with which amounts of memory are tried; any token would do.
FIRST_TOKEN = 0


class StreamedPart(nn.Module):
    """Added by ``stream`` to each module above routed blocks: one call at a time."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        calls: Calls = self.__dict__["calls"]
        rows: bool = self.__dict__["gives_rows"]
        return calls.alone(calls.call, super().__call__, args, kwargs, gives_rows=rows)


class CheckedEmbedding(nn.Module):
    """Added by ``stream`` to every embedding: checks that ids are in its range."""

    def __call__(self, ids: mx.array) -> mx.array:
        n_rows: int = self.weight.shape[0]
        calls: Calls = self.__dict__["calls"]
        if not ids.size or (calls.looks_at(ids) and has_values(ids)):
            if ids.size:
                check_ids(ids, n_rows)
            return super().__call__(ids)
        move_inside, mark_outside = _bounding(n_rows)
        rows: mx.array = super().__call__(move_inside(ids))
        return mark_outside(ids[..., None], rows)


@functools.cache
def _bounding(
    n_rows: int,
) -> tuple[Compiled[[mx.array], mx.array], Compiled[[mx.array, mx.array], mx.array]]:
    """Return functions for ids and for the rows found: one launch each on a GPU.

    The first moves ids into the table. The second gives NaN for ids outside of it.
    """

    def move_inside(ids: mx.array) -> mx.array:
        return bounded(ids, n_rows)[0]

    def mark_outside(ids: mx.array, rows: mx.array) -> mx.array:
        inside = bounded(ids, n_rows)[1]
        return mx.where(inside, rows, mx.array(math.nan, rows.dtype))

    return Compiled(move_inside), Compiled(mark_outside)


class StreamedModel(GuardsSaving, TrainsUncompiled, StreamedPart):
    """Added by ``stream`` to a model's class: guards saving and loading of weights.

    ``plan`` and ``keeper`` are set if ``memory`` bounds the process.
    """

    streamer: ExpertStreamer | MappedExperts
    plan: MemoryPlan | None
    needs: MeasuredNeeds

    @functools.cached_property
    def identity(self) -> str:
        """A hash that identifies the model, equal for a checkpoint and its pack.

        Raises:
            ModelError, ExpertStoreError: the model's directory is gone.
        """
        return model_identity(self.__dict__["directory"])

    @property
    def keeper(self) -> MemoryKeeper | None:
        """The keeper that makes room for caches."""
        calls: Calls = self.__dict__["calls"]
        return calls.keeper

    def load_weights(
        self, file_or_weights: str | list[tuple[str, mx.array]], strict: bool = True
    ) -> nn.Module:
        """Load weights as ``mlx.nn.Module`` does, except those of routed experts.

        Raises:
            ModelError: a weight belongs to a streamed routed block.
        """
        weights = file_or_weights
        if isinstance(weights, str):
            weights = [*mx.load(weights).items()]  # type: ignore[union-attr, list-item]
        blocks: tuple[str, ...] = self.__dict__["routed_paths"]
        for name, _ in weights:
            if name.startswith(blocks):
                raise ModelError(
                    f"[weights] {name}: expected no weights of routed experts, which "
                    "are streamed: load the model without a bound on memory"
                )
        return super().load_weights(weights, strict)


@memory_errors("[stream]")
def stream(
    model: M,
    directory: str | Path,
    *,
    memory: int | str | None = None,
    expert_memory: int | str | None = None,
    scope: str = "global",
    policy: str | None = None,
    read_ahead: str = "auto",
    optimistic: str | None = None,
    expert_io: str | None = None,
    report: Report | None = None,
    group: Group | None = None,
    pipeline: bool = False,
) -> M:
    """Stream the experts of a model that mlx-lm loaded with ``lazy=True``.

    Every routed block is replaced before its weights are read, so they never take
    memory. The model's results keep their bits. With ``memory`` a few tokens are
    computed first, without experts, to measure the model's other memory.

    Args:
        model: changed in place, including its class; an error restores it.
        directory: the directory from which the model was loaded, or its pack.
        memory, expert_memory: see ``load``; the plan is printed.
        scope, policy, read_ahead, optimistic, expert_io: see ``load``.
        report: receives the progress of reading if all experts fit.
        group, pipeline: see ``load``.

    Returns:
        The model. Its ``streamer`` has the counts, its ``plan`` the memory.

    Raises:
        ModelError: there is no routed block, one cannot be streamed, or the weights are
            not the checkpoint's own tensors.
        ConfigError: an argument has an unusable value.
        BudgetError: not even one expert fits, or, without a bound, the other weights
            do not fit.
        ExpertStoreError: an expert could not be read.
        GroupError: another process ended or makes another call.
    """
    products.mend()
    directory = Path(directory)
    check_scope(scope)
    exchange = exchange_of(group, pipeline=pipeline)
    amounts = Amounts.read(memory, expert_memory)
    if exchange is not None:
        read_ahead, optimistic, expert_io = ways_in_group(
            read_ahead, optimistic, expert_io, amounts
        )
    ways = Ways(optimistic)
    io = way_of_reading(expert_io, gives_way=amounts.process is not None)
    make_policy = policy_factory(policy or config.policy() or DEFAULT_POLICY)
    with contextlib.ExitStack() as undo:
        backbone = None
        if pipeline and exchange is not None and group is not None:
            backbone = divide_alike(model, exchange, group, undo)
        blocks = _blocks_of(model)
        whole = backbone is None
        store = _open(model, blocks, directory, direct=io == "direct", whole=whole)
        undo.callback(store.close)
        calls = _install(model, blocks, ways, undo, exchange, backbone)
        own = reached(store, exchange if whole else None)
        opened = _Opening(model, blocks, calls, own, directory, amounts, scope)
        n_bytes, chosen = opened.expert_bytes()
        calls.streamer = streamer = open_experts(
            own,
            n_bytes,
            functools.partial(
                ExpertStreamer,
                own,
                n_bytes,
                scope=scope,
                policy=make_policy,
                chosen=chosen,
                read_ahead=read_ahead,
                runs_ahead=ways.runs_ahead,
                gives_way=opened.plan is not None or not device.has_own_memory(),
                stacks=not device.gathers_strided(),
                report=report,
                lock=calls.lock,
                holders=calls.holders,
            ),
            io=io,
            report=report,
        )
        if exchange is not None:
            begin_together(exchange, model, directory, amounts, pipeline=pipeline)
        # A lazy array can be evaluated only by its own thread, but any thread may call.
        mx.eval(kept_arrays(model))
        undo.pop_all()
    model.__dict__.update(
        streamer=streamer,
        plan=opened.plan,
        needs=opened.needs,
        directory=directory,
        store=store,
        group=group if exchange is not None else None,
        pipeline=backbone is not None,
    )
    if backbone is not None:
        backbone.__dict__["pipeline"] = functools.partial(
            check_division, model, pipeline=True
        )
    if opened.plan is None and isinstance(streamer, ExpertStreamer):
        calls.free_pool = FreePool(streamer)
    elif opened.plan is not None and isinstance(streamer, ExpertStreamer):
        notice(str(opened.plan))
        calls.keeper = MemoryKeeper(opened.plan, opened.needs, streamer)
        if amounts.fastest:
            notice(find_fastest(model, calls.keeper, streamer, [FIRST_TOKEN]))
    return model


def plan_stream(
    model: nn.Module, directory: Path, memory: int | str, *, scope: str = "global"
) -> MemoryPlan:
    """Return the plan that ``stream`` would make for ``memory``; read no matrix.

    Args:
        model: see ``stream``; it is restored afterwards.

    Raises:
        ModelError, ConfigError, BudgetError, ExpertStoreError: see ``stream``.
    """
    check_scope(scope)
    blocks, amounts = _blocks_of(model), Amounts.read(memory, None)
    with contextlib.ExitStack() as undo:
        store = _open(model, blocks, directory, direct=False)
        undo.callback(store.close)
        calls = _install(model, blocks, Ways(), undo)
        opened = _Opening(
            model, blocks, calls, store, directory, amounts, scope, reads=False
        )
        opened.expert_bytes()
    assert opened.plan is not None
    return opened.plan


def _blocks_of(model: nn.Module) -> list[RoutedBlock]:
    if isinstance(model, StreamedModel):
        raise ModelError("[stream] expected a model whose experts are not streamed yet")
    if blocks := find_blocks(model):
        return blocks
    kind = type(model)
    raise ModelError(
        f"[stream] expected routed experts in {kind.__module__}.{kind.__name__} "
        "but found none: load it with mlx_lm.load"
    )


@dataclass
class _Opening:
    """Finds the memory for a model's experts before they are read.

    ``reads``: measure the model with its weights, which will be read anyway.
    """

    model: nn.Module
    blocks: list[RoutedBlock]
    calls: Calls
    store: ExpertStore
    directory: Path
    amounts: Amounts
    scope: str
    reads: bool = True
    plan: MemoryPlan | None = None

    def __post_init__(self) -> None:
        self._blank = BlankExperts(self.store)
        self.needs = MeasuredNeeds(
            self.model,
            self.calls,
            self._blank,
            self.store,
            read_config(self.directory),
            self.blocks,
            reads=self.reads and self.amounts.process is not None,
        )

    def expert_bytes(self) -> tuple[int | None, int]:
        """Return the bytes for experts, and the number that a token chooses.

        None stands for three quarters of the machine's memory.

        Raises:
            BudgetError: the needs of one token do not fit.
            ModelError: the model cannot be called to measure its needs.
        """
        if self.amounts.process is None:
            return self._unplanned(), self._chosen()
        self.plan = self._planned(self.amounts.process)
        return self.plan.expert_bytes, self._blank.most_chosen

    def _unplanned(self) -> int | None:
        if self.amounts.experts is not None:
            return self.amounts.experts
        # Fail before anything is read.
        check_fits(self.directory, self.model)
        try:
            return unasked_expert_bytes(self.needs)
        except Exception:
            # The model takes no tokens.
            return None

    def _chosen(self) -> int:
        try:
            # The call is lazy and computes nothing.
            with self.calls.reaching(self._blank):
                self.model(mx.array([[FIRST_TOKEN]]))
        except Exception:
            # The model takes no tokens, so assume the least.
            return 1
        return self._blank.most_chosen

    def _planned(self, budget_bytes: int) -> MemoryPlan:
        try:
            self._check_weights(budget_bytes)
            return plan_memory(
                budget_bytes,
                self.needs,
                self.store,
                scope=self.scope,
                most_expert_bytes=self.amounts.experts,
            )
        except MoefluxError:
            raise
        except Exception as error:
            raise ModelError(
                f"[memory] expected a model that takes tokens and caches but got "
                f"{error!r}: bound the experts alone with expert_memory"
            ) from error

    def _check_weights(self, budget_bytes: int) -> None:
        """Raise BudgetError if the weights alone exceed the budget."""
        needs, layers = self.needs, self.store.layers
        n_pools = 1 if self.scope == "global" else len(layers)
        layouts = [self.store.layout(layer) for layer in layers]
        parts = {
            "process": own_bytes() + device.PROCESS_GROWTH_BYTES,
            "weights": needs.resident_bytes(False),
            "caches": needs.cache_state_bytes + CACHE_STEP * needs.cache_row_bytes,
            f"{n_pools} experts": pool_bytes(layouts, n_pools),
        }
        if (least := sum(parts.values())) > budget_bytes:
            taken = ", ".join(f"{decimal(n)} {what}" for what, n in parts.items())
            raise BudgetError(
                f"[memory] expected at least {least} bytes ({decimal(least)}: {taken}) "
                f"plus some scratch memory but got {budget_bytes}"
            )


def _open(
    model: nn.Module,
    blocks: list[RoutedBlock],
    directory: Path,
    *,
    direct: bool,
    whole: bool = True,
) -> ModuleExperts | PackedBlocks:
    if is_packed(directory):
        return PackedBlocks.open_for(directory, blocks, direct=direct, whole=whole)
    with Checkpoint.kept(directory) as checkpoint:
        sources = unchanged(checkpoint, getattr(model, "sanitize", None))
        store = ModuleExperts(blocks, checkpoint, sources)
        if direct:
            store.bypass_cache()
    return store


def _install(
    model: nn.Module,
    blocks: list[RoutedBlock],
    ways: Ways,
    undo: contextlib.ExitStack,
    exchange: Exchange | None = None,
    backbone: nn.Module | None = None,
) -> Calls:
    """Replace the model's routed blocks, and extend the modules above them.

    Args:
        backbone: has this rank's layers if layers are divided instead of experts.
    """
    alone: Callable[..., mx.array]
    if backbone is None:
        calls = Calls(model, serving.join(), ways, exchange)
        alone = calls.alone
    else:
        calls = piped = PipelinedCalls(model, backbone, serving.join(), ways, exchange)
        exchange, alone = None, piped.block
    for number, block in enumerate(blocks):
        undo.callback(_put_back, model, block, block.parts)
        source = functools.partial(calls.source, number)
        switch = StreamedSwitch(block, source, alone, lambda: ways.token, exchange)
        undo.callback(switch.slot_block.let_go)
        calls.holders.add(switch.slot_block)
        _replace(model, block.path, switch)
    owners = {_owner(block.path) for block in blocks}
    rows_of = next(iter(owners)) if len(owners) == 1 else ()
    for path in {owner[:n] for owner in owners for n in range(len(owner) + 1)}:
        part = _at(model, path)
        if isinstance(part, nn.Module):
            undo.callback(setattr, part, "__class__", type(part))
            added = StreamedModel if part is model else StreamedPart
            part.__class__ = added_class(added, type(part))
            part.__dict__.update(calls=calls, gives_rows=path == rows_of)
    for _, module in model.named_modules():
        if isinstance(module, nn.Embedding | nn.QuantizedEmbedding):
            undo.callback(setattr, module, "__class__", type(module))
            module.__class__ = added_class(CheckedEmbedding, type(module))
            module.__dict__["calls"] = calls
    ways.watch(model, blocks, undo)
    model.__dict__["routed_paths"] = tuple(f"{block.path}." for block in blocks)
    guard_saving()
    let_all_draft()
    keep_whole(model)
    return calls


def _put_back(
    model: nn.Module, block: RoutedBlock, parts: dict[tuple[str, str], mx.array]
) -> None:
    for (name, part), array in parts.items():
        block.module[name][part] = array
    _replace(model, block.path, block.module)


def _owner(path: str) -> tuple[str, ...]:
    """Return the path of the module whose list of layers contains a block."""
    names = path.split(".")
    numbers = [place for place, name in enumerate(names) if name.isdigit()]
    return tuple(names[: max(0, numbers[0] - 1)]) if numbers else ()


def _at(model: nn.Module, path: Iterable[str]) -> Any:
    place: Any = model
    for step in path:
        place = place[int(step)] if isinstance(place, list) else place[step]
    return place


def _replace(model: nn.Module, path: str, block: nn.Module) -> None:
    """Put a block at a path such as ``model.layers.3.mlp.switch_mlp``."""
    *parents, name = path.split(".")
    place = _at(model, parents)
    if isinstance(place, list):
        place[int(name)] = block
    else:
        place[name] = block


__all__ = ["StreamedModel", "StreamedPart", "stream"]
