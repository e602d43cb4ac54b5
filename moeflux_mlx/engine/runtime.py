"""The runtime of one loaded model: executor, experts, memory."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx

from .. import config, device
from ..calls.alone import OneAtATime
from ..calls.group import exchange_of, reached
from ..calls.together import Together
from ..errors import ConfigError, ModelError
from ..experts.files.store import ExpertStore, model_identity
from ..experts.pool.budget import Amounts
from ..experts.pool.policy import DEFAULT_POLICY, policy_factory
from ..experts.streaming.access import expert_io, open_experts
from ..experts.streaming.expert_pool import check_scope
from ..experts.streaming.mapped import MappedExperts
from ..experts.streaming.read_ahead import check_read_ahead
from ..experts.streaming.streamer import ExpertStreamer
from ..memory.keeper import MemoryKeeper, make_room
from ..memory.plan import MemoryPlan, Needs, plan_memory
from ..memory.preflight import unasked_expert_bytes
from ..memory.relief import FreePool
from ..system.progress import Report
from .executors import open_executor
from .executors.ops import LazyOpsExecutor
from .model import BuiltOnce, LayerGraph


@dataclass(frozen=True)
class RunOptions:
    """How to run a model: where its experts come from, how much memory, which executor.

    Args:
        open_experts: opens the store that experts are streamed from; None: they are
            among the model's parameters.
        memory: bound of the process, in bytes or as text.
        expert_memory: bound of the experts.
        optimistic: whether tokens run ahead of reading experts, as in
            ``config.optimistic``; None takes the environment's choice.
        read_ahead: whether experts are read before a router requests them: ``on``,
            ``off``, or ``auto``, where it was measured to pay.
        expert_io: one of ``config.EXPERT_IO``.
        directory: the model's directory.
        give_way: frees memory that the model's caller keeps for later; returns whether
            it freed any.
        group: the process group that shares the experts, or with ``pipeline`` the
            layers.
    """

    open_experts: Callable[[], ExpertStore] | None = None
    memory: int | str | None = None
    expert_memory: int | str | None = None
    scope: str = "global"
    policy: str | None = None
    executor: str | None = None
    optimistic: str | None = None
    read_ahead: str = "auto"
    expert_io: str | None = None
    directory: Path | None = None
    give_way: Callable[[], bool] | None = None
    group: mx.distributed.Group | None = None
    pipeline: bool = False
    _given: Amounts | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        """Raise ConfigError or TraceError for invalid settings."""
        check_scope(self.scope)
        check_read_ahead(self.read_ahead)
        if (self.memory, self.expert_memory) != (None, None):
            given = Amounts.read(self.memory, self.expert_memory)
            object.__setattr__(self, "_given", given)
        for name in ("policy", "executor", "optimistic", "expert_io"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, str) or not value):
                raise ConfigError(f"[{name}] expected a name but got {value!r}")
        if self.policy is not None:
            policy_factory(self.policy)

    @property
    def amounts(self) -> Amounts:
        """The bounds in bytes; those of the environment if none is given."""
        return self._given or Amounts.read(None, None)


class Runtime(OneAtATime):
    """Everything that one loaded model needs besides its parameters."""

    def __init__(self, options: RunOptions):
        super().__init__()
        self.executor = open_executor(options.executor)
        self._optimistic = config.optimistic(options.optimistic)
        # One graph per kind of layer and of call; new lengths of prompts drop old ones.
        self.graphs: BuiltOnce[LayerGraph] = BuiltOnce(64)
        self.options = options
        self.amounts = options.amounts
        # Whether ``reference`` of another runtime returned this one.
        self.is_reference = False
        self._reference: Runtime | None = None
        self.store: ExpertStore | None
        self._own_store: ExpertStore | None
        self.streamer: ExpertStreamer | MappedExperts | None = None
        self.keeper: MemoryKeeper | None = None
        self.free_pool: FreePool | None = None
        self.plan: MemoryPlan | None = None
        exchange = None if options.pipeline else exchange_of(options.group)
        self.together = Together(exchange)
        # All experts, and those of this rank.
        self.store = self._own_store = None
        if options.open_experts is not None:
            self.store = options.open_experts()
            self._own_store = reached(self.store, exchange)

    def open(self, needs: Needs, report: Report | None = None) -> None:
        """Plan bounded memory and allocate the experts' share; later calls do nothing.

        Args:
            report: is told the progress of reading if all experts fit.

        Raises:
            ConfigError: a bound is not an amount of bytes.
            BudgetError: one token does not fit.
            ExpertStoreError: an expert could not be read.
        """
        if self._own_store is None or self.streamer is not None:
            return
        options = self.options
        bounded = self.amounts.process is not None
        io = expert_io(options.expert_io, gives_way=bounded)
        self.plan = plan = self.plan or self.make_plan(needs)
        # Invalid names are errors even where experts are mapped and never evicted.
        check_scope(options.scope)
        policy = policy_factory(options.policy or config.policy() or DEFAULT_POLICY)
        memory = plan.expert_bytes if plan else self.amounts.experts
        if memory is None:
            memory = unasked_expert_bytes(needs)
        stream = partial(
            ExpertStreamer,
            self._own_store,
            memory,
            scope=options.scope,
            policy=policy,
            read_ahead=options.read_ahead,
            runs_ahead=self.runs_ahead,
            gives_way=bounded or not device.has_own_memory(),
            evaluate=partial(self.executor.wait, "routing"),
            report=report,
            lock=self.lock,
            holders=self.holders,
        )
        on_host = self.executor.takes_host_arrays and device.prefers_host_arrays()
        self.streamer = open_experts(
            self._own_store, memory, stream, io=io, on_host=on_host, report=report
        )
        if not isinstance(self.streamer, ExpertStreamer):
            return
        if plan is not None:
            self.keeper = MemoryKeeper(plan, needs, self.streamer)
        else:
            self.free_pool = FreePool(self.streamer)

    def make_plan(self, needs: Needs) -> MemoryPlan | None:
        """Return the plan of a bounded process's memory; allocate nothing."""
        if self._own_store is None or self.amounts.process is None:
            return None
        return plan_memory(
            self.amounts.process,
            needs,
            self._own_store,
            scope=self.options.scope,
            most_expert_bytes=self.amounts.experts,
        )

    def reference(self, *, has_values: bool) -> Runtime:
        """Return a runtime whose Ops MLX can transform: lazy references.

        Args:
            has_values: False if the transformation's arrays have no values, as in a
                function that is compiled or exported.

        Raises:
            ModelError: experts may be evicted before MLX computes the result; or a pack
                is mapped, and MLX would write to memory that experts share.
        """
        if self.comes_and_goes or (self.streamer is not None and not has_values):
            why = "streamed" if self.comes_and_goes else "read from a pack"
            raise ModelError(
                "[transform] expected experts among the parameters but got a call "
                f"under mx.compile, mx.vmap or the like while experts are {why}: call "
                "model.train() first to train, or load a plain checkpoint without a "
                "memory budget"
            )
        if self._reference is None:
            self._reference = copy.copy(self)
            self._reference.is_reference = True
            self._reference.executor = LazyOpsExecutor()
            self._reference.graphs = BuiltOnce(64)
            self._reference._optimistic = "off"
        self._reference.streamer = self.streamer
        if isinstance(self.streamer, ExpertStreamer):
            self.streamer.stay()
        return self._reference

    def give_way(self, cache: list[Any]) -> None:
        """Shrink experts that no plan bounds if the system is short of memory."""
        if self.free_pool is not None and not self.is_reference:
            self.free_pool.give_way(cache)

    def make_room(self, cache: list[Any], n_seqs: int, t: int, **options: Any) -> int:
        """Make room for the caches of a call; see ``MemoryKeeper.make_room``.

        Returns:
            The number of tokens to compute together: all of them without a plan.

        Raises:
            BudgetError: they do not fit, even with the fewest experts.
        """
        if self.keeper is None:
            return n_seqs * t
        alone = self.together.exchange is None
        give_way = self.options.give_way if alone else None
        return make_room(self.keeper, give_way, cache, n_seqs, t, **options)

    @functools.cached_property
    def identity(self) -> str:
        """A hash that identifies the model, the same packed or not.

        Raises:
            ModelError: the model has no directory, or that was removed.
        """
        if self.options.directory is None:
            raise ModelError("[model] expected a model that load() read from files")
        return model_identity(self.options.directory)

    @property
    def streaming(self) -> ExpertStreamer | None:
        """The streamer, if some experts are not in memory; else None."""
        streamer = self.streamer
        if isinstance(streamer, ExpertStreamer) and not streamer.resident:
            return streamer
        return None

    @property
    def streams(self) -> bool:
        """Return whether some experts are not in memory."""
        return self.streaming is not None

    @property
    def comes_and_goes(self) -> bool:
        """Return whether experts are streamed, or may be once caches grow."""
        return self.streams or self.keeper is not None

    @property
    def steps(self) -> bool:
        """Return whether single tokens pass through all layers without a read-back.

        This pays where launches are compiled; elsewhere a read-back costs nothing.
        """
        return self.runs_ahead if self.streams else self.compiles_steps

    @property
    def compiles_steps(self) -> bool:
        """Return ``steps`` for the case that all experts are in memory."""
        return self.executor.compiles or self._optimistic == "on"

    @property
    def runs_ahead(self) -> bool:
        """Return ``steps`` for the case that experts may be missing."""
        # Layers with missing experts wait for other ranks, so they cannot run ahead.
        alone = self.together.exchange is None
        return self.compiles_steps and self._optimistic != "off" and alone

    @contextlib.contextmanager
    def reading_ahead(self, *, one_token: bool) -> Iterator[ExpertStreamer | None]:
        """Yield the streamer if a call reads ahead; its time decides on later ones."""
        if (streamer := self.streaming) is None or not one_token:
            yield None
            return
        yield streamer if streamer.read_ahead.begin() else None
        streamer.read_ahead.end()

    def __deepcopy__(self, memo: dict[int, Any]) -> Runtime:
        if self.store is not None:
            raise ModelError(
                "[copy] expected a model with its experts among its parameters but got "
                "one that reads them from files: load it a second time"
            )
        return Runtime(self.options)

    def without_streamed(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """Return a checkpoint's weights without the tensors of streamed experts."""
        streamed = self.store.tensor_names if self.store is not None else ()
        return {name: w for name, w in weights.items() if name not in streamed}

    def check_layers(self, routed: Collection[int]) -> None:
        """Raise ModelError if the files lack the experts of a routed layer."""
        missing = set(routed) - set(self.store.layers if self.store else routed)
        if missing:
            raise ModelError(
                f"[experts] expected experts of layer {min(missing)} but the files "
                "have none: is a shard missing?"
            )
