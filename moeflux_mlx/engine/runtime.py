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
from ..errors import ConfigError, ModelError
from ..experts.files.store import ExpertStore, model_identity
from ..experts.pool.budget import Amounts
from ..experts.pool.policy import DEFAULT_POLICY, policy_factory
from ..experts.streaming.access import expert_io, open_experts
from ..experts.streaming.mapped import MappedExperts
from ..experts.streaming.read_ahead import check_read_ahead
from ..experts.streaming.streamer import ExpertStreamer, check_scope
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
    """How a model is to run: which experts from where, in how much memory, and on what.

    ``open_experts`` opens the store that experts are streamed from; None: they are
    among the model's parameters. ``memory`` bounds the process, ``expert_memory`` the
    experts. ``optimistic``: whether tokens run ahead of reading experts, as
    ``config.optimistic`` has it; None takes the environment's choice. ``read_ahead``:
    whether experts are read before they are asked for: ``on``, ``off``, or ``auto``
    where that was measured to pay. ``expert_io`` is one of ``config.EXPERT_IO``.
    ``directory`` is where the model is from. ``give_way`` frees some memory that the
    model's caller keeps for later, and tells whether it did. ``group`` has the other
    processes that share the experts.
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
    _asked: Amounts | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        """Raise ConfigError or TraceError for wrong settings, before any is used."""
        check_scope(self.scope)
        check_read_ahead(self.read_ahead)
        if (self.memory, self.expert_memory) != (None, None):
            asked = Amounts.read(self.memory, self.expert_memory)
            object.__setattr__(self, "_asked", asked)
        for name in ("policy", "executor", "optimistic", "expert_io"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, str) or not value):
                raise ConfigError(f"[{name}] expected a name but got {value!r}")
        if self.policy is not None:
            policy_factory(self.policy)

    @property
    def amounts(self) -> Amounts:
        """The bounds in bytes, by the environment if none is given."""
        return self._asked or Amounts.read(None, None)


class Runtime(OneAtATime):
    """Everything that one loaded model needs besides its parameters."""

    def __init__(self, options: RunOptions):
        super().__init__()
        self.executor = open_executor(options.executor)
        self._optimistic = config.optimistic(options.optimistic)
        self.graphs: BuiltOnce[LayerGraph] = BuiltOnce(64)
        self.options = options
        self.amounts = options.amounts
        # Whether this is the ``reference`` of another one.
        self.is_reference = False
        self._reference: Runtime | None = None
        self.store: ExpertStore | None = None
        self.streamer: ExpertStreamer | MappedExperts | None = None
        self.keeper: MemoryKeeper | None = None
        self.free_pool: FreePool | None = None
        self.plan: MemoryPlan | None = None
        if options.open_experts is not None:
            self.store = options.open_experts()

    def open(self, needs: Needs, report: Report | None = None) -> None:
        """Plan memory if it is bounded, and take the experts' share; once.

        Args:
            report: hears how far reading has come where all experts fit.

        Raises:
            ConfigError: a bound is not an amount of bytes.
            BudgetError: the needs of one token do not fit.
            ExpertStoreError: an expert could not be read.
        """
        if self.store is None or self.streamer is not None:
            return
        options = self.options
        bounded = self.amounts.process is not None
        io = expert_io(options.expert_io, gives_way=bounded)
        self.plan = plan = self.plan or self.make_plan(needs)
        # Wrong names are errors even where experts are mapped and nothing is evicted.
        check_scope(options.scope)
        policy = policy_factory(options.policy or config.policy() or DEFAULT_POLICY)
        memory = plan.expert_bytes if plan else self.amounts.experts
        if memory is None:
            memory = unasked_expert_bytes(needs)
        stream = partial(
            ExpertStreamer,
            self.store,
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
            self.store, memory, stream, io=io, on_host=on_host, report=report
        )
        if not isinstance(self.streamer, ExpertStreamer):
            return
        if plan is not None:
            self.keeper = MemoryKeeper(plan, needs, self.streamer)
        else:
            self.free_pool = FreePool(self.streamer)

    def make_plan(self, needs: Needs) -> MemoryPlan | None:
        """Return the plan of a bounded process's memory; takes none of it."""
        if self.store is None or self.amounts.process is None:
            return None
        return plan_memory(
            self.amounts.process,
            needs,
            self.store,
            scope=self.options.scope,
            most_expert_bytes=self.amounts.experts,
        )

    def reference(self, *, has_values: bool) -> Runtime:
        """Return the same with Ops as MLX can transform them: references, all lazy.

        Args:
            has_values: False if the transformation's arrays stand for any values,
                as in a function that is compiled or exported.

        Raises:
            ModelError: experts come and go, so what MLX computes later would read
                others in their place; or MLX would write memory that many experts
                share as if it were one's own.
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
        """Let experts that no plan bounds give way where the system is short."""
        if self.free_pool is not None and not self.is_reference:
            self.free_pool.give_way(cache)

    def make_room(self, cache: list[Any], n_seqs: int, t: int, **options: Any) -> int:
        """Give the caches of a call room; see ``MemoryKeeper.make_room``.

        Returns:
            How many tokens are to be computed together: all of them without a plan.

        Raises:
            BudgetError: they do not fit, whatever gives way.
        """
        if self.keeper is None:
            return n_seqs * t
        give_way = self.options.give_way
        return make_room(self.keeper, give_way, cache, n_seqs, t, **options)

    @functools.cached_property
    def identity(self) -> str:
        """A hash that tells the model from any other, packed or not.

        Raises:
            ModelError: the model is from no directory, or that is gone.
        """
        if self.options.directory is None:
            raise ModelError("[model] expected a model that load() read from files")
        return model_identity(self.options.directory)

    @property
    def streaming(self) -> ExpertStreamer | None:
        """The streamer, while some experts are not in memory."""
        streamer = self.streamer
        if isinstance(streamer, ExpertStreamer) and not streamer.resident:
            return streamer
        return None

    @property
    def streams(self) -> bool:
        """Tell whether some experts are not in memory."""
        return self.streaming is not None

    @property
    def comes_and_goes(self) -> bool:
        """Tell whether experts are, or may come to be, read from files as needed."""
        return self.streams or self.keeper is not None

    @property
    def steps(self) -> bool:
        """Tell whether single tokens go through all layers without a read-back.

        That is where launches are worth a trace: elsewhere reading back costs nothing.
        """
        return self.runs_ahead if self.streams else self.traces_steps

    @property
    def traces_steps(self) -> bool:
        """Tell whether single tokens do so when all their experts are in memory."""
        return self.executor.compiles or self._optimistic == "on"

    @property
    def runs_ahead(self) -> bool:
        """Tell whether single tokens do so when experts may be missing."""
        return self.traces_steps and self._optimistic != "off"

    @contextlib.contextmanager
    def reading_ahead(self, *, one_token: bool) -> Iterator[ExpertStreamer | None]:
        """Give the streamer if a call, which is timed to find that out, reads ahead."""
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
        """Leave the streamer's tensors out of a checkpoint's weights."""
        streamed = self.store.tensor_names if self.store is not None else ()
        return {name: w for name, w in weights.items() if name not in streamed}

    def check_layers(self, routed: Collection[int]) -> None:
        """Raise ModelError unless the files have experts for every routed layer."""
        missing = set(routed) - set(self.store.layers if self.store else routed)
        if missing:
            raise ModelError(
                f"[experts] expected experts of layer {min(missing)} but the files "
                "have none: is a shard missing?"
            )
