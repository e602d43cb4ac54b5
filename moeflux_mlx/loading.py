"""Find, open and load models: packed directories, plain checkpoints, hub ids."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
from mlx_lm.utils import load_config, load_model

from . import config, device, products, serving
from .adapters import put_adapters
from .calls.group import (
    Group,
    begin_together,
    exchange_of,
    launched_group,
    ways_in_group,
)
from .engine.executors import lacks_kernels
from .engine.runtime import RunOptions
from .errors import ConfigError, memory_errors, one_line_errors
from .experts.files.checkpoint import read_config
from .experts.files.packed import PackedExperts, is_packed
from .experts.files.stock import departs, has_own_class
from .experts.files.store import open_store
from .experts.files.unchanged import Unchanged
from .experts.pool.budget import Amounts
from .experts.weights import leaves
from .memory.plan import MemoryPlan
from .memory.preflight import check_fits
from .memory.search import find_fastest
from .opening.download import check_kinds, find_model
from .opening.settings import check_settings
from .opening.stock_model import (
    door_classes,
    load_stock_lazily,
    load_through_door,
    takes_door,
)
from .opening.tokenizer import open_tokenizer
from .opening.weight_files import Reads, model_module, read_weights
from .saving.guard import keep_whole
from .streaming import plan_stream
from .system.commands import divides_data, is_to_be_saved, refuse_division_of_layers
from .system.files import short, spelled_plainly
from .system.progress import Report, byte_progress, notice


@memory_errors("[load]")
def load(
    path_or_hf_repo: str | Path,
    tokenizer_config: dict[str, Any] | None = None,
    model_config: dict[str, Any] | None = None,
    adapter_path: str | Path | None = None,
    lazy: bool = False,
    return_config: bool = False,
    revision: str | None = None,
    trust_remote_code: bool = False,
    *,
    memory: int | str | None = None,
    expert_memory: int | str | None = None,
    scope: str = "global",
    policy: str | None = None,
    executor: str | None = None,
    optimistic: str | None = None,
    read_ahead: str = "auto",
    expert_io: str | None = None,
    native: bool | None = None,
    group: Group | None = None,
    pipeline: bool = False,
) -> Any:
    """Load a model like ``mlx_lm.load``, with its experts streamed or as parameters.

    The experts of a pack are always streamed. Those of a plain checkpoint are streamed
    if ``memory`` or ``expert_memory`` bounds them.

    Args:
        path_or_hf_repo: a directory, or a Hugging Face Hub id to download.
        tokenizer_config, model_config, revision: as in ``mlx_lm.load``. A tokenizer's
            code runs only if ``tokenizer_config`` has ``trust_remote_code=True``.
        adapter_path: directory that ``mlx_lm.lora`` wrote.
        lazy: leave parameters unevaluated, and do not check whether they fit.
        return_config: also return the configuration.
        trust_remote_code: True is refused for a model with its own Python code, which
            never runs here.
        memory: bytes (``8000000000`` or ``"8GB"``) for the whole process. Experts get
            the rest, which shrinks as caches grow. The plan is printed on
            standard error. ``"auto"`` tries several amounts of up to 3/4 of the
            machine's memory for a few seconds and keeps the fastest.
        expert_memory: bytes for the experts alone. Without either amount,
            ``MOEFLUX_MEMORY`` and ``MOEFLUX_EXPERT_MEMORY`` apply, and without those
            the experts of a pack take up to 3/4 of the machine's memory.
        scope: ``"global"`` shares the expert slots between layers, ``"layer"`` gives
            each layer its own.
        policy: eviction policy: ``"lfu"``, ``"lru"``, ``"markov"``, or
            ``"pins:TRACE"`` with a file of ``moeflux trace`` (see ``policy_factory``);
            None uses the environment's policy, else ``"lfu"``.
        executor: name of the executor; None uses the environment's.
        optimistic: ``"auto"``, ``"on"`` or ``"off"``: let tokens run ahead of reading
            experts; None uses the environment's value.
        read_ahead: ``"on"``, ``"off"`` or ``"auto"``: read experts before a layer
            requests them; ``auto`` tries both for some tokens.
        expert_io: ``"mmap"`` maps the experts of a pack, ``"pread"`` reads them through
            the page cache, ``"direct"`` bypasses the page cache, which on Linux needs
            a pack. None uses the environment's value, else ``"auto"``: map on Metal if
            all of them fit, else ``"pread"``. Cutting a mapped file ends the process.
        native: True for our class of the model, False for mlx-lm's, with experts
            streamed if ``expert_memory`` bounds them; None prefers our class.
        group: process group of ``mx.distributed.init()``. Each rank reads a share of
            every layer's experts, and all ranks compute the rest. They must load the
            same model and make the same calls, with rank 0's random state. Amounts of
            memory are per rank. With adapters mlx-lm's class runs.
        pipeline: the ranks divide layers instead of experts, like mlx-lm's
            ``model.model.pipeline(group)``; mlx-lm's class runs.

    Returns:
        ``(model, tokenizer)``, or with ``return_config`` also the configuration.

    Raises:
        ModelError: the directory holds no model of a supported type; a checkpoint's
            experts are missing, truncated or in an unusable form; adapters belong to
            another model or adapt streamed experts.
        ExpertStoreError: files of a pack are missing, damaged or belong to another
            model, or a file cannot be read.
        BudgetError: ``memory`` or ``expert_memory`` cannot hold the needs of one token,
            or all the experts to be mapped; without either, the loaded weights exceed
            the memory that is left.
        ConfigError: an argument or environment variable has an unusable value.
        TraceError: the routing trace that ``policy`` names is unusable.
        GroupError: another rank failed, ended or loaded another model.
    """
    check_settings()
    products.mend()
    kinds: tuple[tuple[str, object, type | tuple[type, ...]], ...] = (
        ("tokenizer_config", tokenizer_config, dict),
        ("model_config", model_config, dict),
        ("adapter_path", adapter_path, (str, os.PathLike)),
        ("lazy", lazy, bool),
        ("return_config", return_config, bool),
        ("revision", revision, str),
        ("trust_remote_code", trust_remote_code, bool),
        ("native", native, bool),
        ("pipeline", pipeline, bool),
    )
    for name, value, kind in kinds:
        if value is not None and not isinstance(value, kind):
            wanted = kind.__name__ if isinstance(kind, type) else "path"
            raise ConfigError(f"[{name}] expected a {wanted} but got {short(value)}")
    options = RunOptions(
        None,
        memory,
        expert_memory,
        scope,
        policy,
        executor,
        optimistic,
        read_ahead,
        expert_io,
        give_way=serving.join(),
        group=group if exchange_of(group, pipeline=pipeline) else None,
        pipeline=pipeline,
    )
    path = find_model(path_or_hf_repo, revision)
    if trust_remote_code:
        _refuse_code(path)
    files = Unchanged(path)
    why = None if options.group is None else _why_stock_in_group(options, adapter_path)
    through_door = takes_door(path, native, model_config, why=why)
    load_it = _load_through_door if through_door else _load_our_own
    model, tokenizer, loaded = load_it(
        path, options, tokenizer_config, model_config, adapter_path, lazy
    )
    files.check()
    if not return_config:
        return model, tokenizer
    # The configuration of a saved model must not name a pack's Python file.
    loaded.pop("model_file", None)
    return model, tokenizer, loaded


def _why_stock_in_group(
    options: RunOptions, adapter_path: str | Path | None
) -> str | None:
    """Return why several ranks run mlx-lm's class of a model; None: they do not."""
    if options.pipeline:
        return "whose layers several ranks can divide"
    return None if adapter_path is None else "which several ranks can run with adapters"


def load_draft(path_or_hf_repo: str, tokenizer_config: dict[str, Any]) -> Any:
    """Load a draft model and its tokenizer; the experts of a pack are streamed.

    Raises:
        MoefluxError: see ``load``.
    """
    path = find_model(path_or_hf_repo)
    if is_packed(path):
        return load(path, tokenizer_config)
    with one_line_errors(f"[draft] {path}"):
        return mlx_lm.load(str(path), tokenizer_config)[:2]


def _load_through_door(
    path: Path,
    options: RunOptions,
    tokenizer_config: dict[str, Any] | None,
    model_config: dict[str, Any] | None,
    adapter_path: str | Path | None,
    lazy: bool,
) -> tuple[nn.Module, Any, dict[str, Any]]:
    """Load mlx-lm's class of a model."""
    # Before the memory plan, because the tokenizer takes memory too.
    eos = {**load_config(path), **(model_config or {})}.get("eos_token_id")
    tokenizer = open_tokenizer(path, tokenizer_config, eos)
    model, loaded = load_through_door(
        path, options, lazy=lazy, model_config=model_config
    )
    if adapter_path is not None:
        put_adapters(model, adapter_path)
        if not lazy:
            mx.eval(model.parameters())
    return model, tokenizer, loaded


def _load_our_own(
    path: Path,
    options: RunOptions,
    tokenizer_config: dict[str, Any] | None,
    model_config: dict[str, Any] | None,
    adapter_path: str | Path | None,
    lazy: bool,
) -> tuple[nn.Module, Any, dict[str, Any]]:
    """Load our class of a model."""
    amounts, exchange = options.amounts, exchange_of(options.group)
    if exchange is not None:
        ahead, optimistic, io = ways_in_group(
            options.read_ahead, options.optimistic, options.expert_io, amounts
        )
        options = replace(
            options, read_ahead=ahead, optimistic=optimistic, expert_io=io
        )
    with _built(path, options, model_config) as (model, loaded):
        _tell_departure(loaded)
        if lacks_kernels(options.executor):
            notice(
                "kernels: MLX's operations run instead, because none of ours was found "
                "right on this GPU: run moeflux doctor once, or load with native=False"
            )
        if adapter_path is not None:
            put_adapters(model, adapter_path)
        if not lazy and amounts == Amounts():
            check_fits(path, model)
        # Before the memory plan, because the tokenizer takes memory too.
        eos = loaded.get("eos_token_id")
        tokenizer = open_tokenizer(path, tokenizer_config, eos)
        with byte_progress() as report:
            model.runtime.open(model.needs, report)
            if not lazy:
                _read_parameters(model, report)
        if exchange is not None:
            begin_together(exchange, model, path, amounts, pipeline=False)
            keep_whole(model)
    if (plan := model.runtime.plan) is not None:
        notice(str(plan))
        if model.runtime.amounts.fastest:
            prompt = tokenizer.encode("The") or [0]
            runtime = model.runtime
            notice(find_fastest(model, runtime.keeper, runtime.streamer, prompt))
    return model, tokenizer, loaded


def _tell_departure(config: dict[str, Any]) -> None:
    if (where := departs(config)) is not None:
        notice(
            f"model class: our own {config.get('model_type')}, which follows "
            f"transformers, not mlx-lm, in {where}; native=False selects mlx-lm's"
        )


def _refuse_code(path: Path) -> None:
    name = read_config(path).get("model_file")
    if name is not None and not is_packed(path):
        raise ConfigError(
            f"[trust_remote_code] {path}: expected a model with a class in mlx-lm or "
            f"moeflux-mlx but got one with its own {short(name)}, which is not run "
            "here: load it with mlx_lm.load"
        )


def plan_load(
    path_or_repo: str | Path, memory: int | str, *, scope: str = "global"
) -> MemoryPlan:
    """Return the plan that ``load`` would make for ``memory``, without loading.

    A model of mlx-lm's class is measured without its matrices.

    Raises:
        ModelError, ExpertStoreError, BudgetError, ConfigError: see ``load``.
    """
    check_settings()
    options = RunOptions(None, memory, scope=scope)
    path = find_model(path_or_repo)
    # The plan must include the memory of the tokenizer.
    brings_tokenizer = any(path.glob("tokenizer*"))
    if takes_door(path, None):
        if brings_tokenizer:
            open_tokenizer(path)
        return plan_stream(load_stock_lazily(path).model, path, memory, scope=scope)
    with _built(path, options) as (model, loaded):
        if brings_tokenizer:
            open_tokenizer(path, eos_token_ids=loaded.get("eos_token_id"))
        plan = model.runtime.make_plan(model.needs)
        model.runtime.store.close()
    assert plan is not None
    return plan


def check_loadable(directory: Path) -> None:
    """Raise the errors of loading a checkpoint without reading weights.

    Raises:
        ModelError, ExpertStoreError: see ``load``.
    """
    check_kinds(directory)
    options = RunOptions(expert_memory=1, executor="ops")
    with _built(directory, options) as (model, _):
        model.runtime.store.close()


@contextlib.contextmanager
def _built(
    path: Path, options: RunOptions, model_config: dict[str, Any] | None = None
) -> Iterator[tuple[nn.Module, dict[str, Any]]]:
    """Build a model without reading weights; an error closes its files."""
    bounded = options.amounts != Amounts()
    streams = bounded or is_packed(path) or options.group is not None
    # Open the store first: mlx-lm's errors name neither the file nor the expert.
    direct = config.expert_io(options.expert_io) == "direct"
    store = open_store(path, direct=direct) if streams else None
    opened = (lambda: store) if store is not None else None
    options = replace(options, open_experts=opened, directory=path)
    # A pack's model_file names the class that is loaded here.
    changes = {**(model_config or {}), "model_file": None}
    try:
        reads = read_weights(path, changes, store)
        with one_line_errors(f"[load] {path}"), spelled_plainly(path) as plain:
            built = load_model(
                plain,
                lazy=True,
                model_config=changes,
                get_model_classes=lambda config: model_classes(config, options, reads),
            )
        # Building a model draws lazy random numbers; this frees their graph.
        mx.eval(mx.random.state)
        yield built
    except BaseException:
        if store is not None:
            store.close()
        raise


def _read_parameters(model: nn.Module, report: Report) -> None:
    parameters = leaves(model.parameters())
    total, done = sum(array.nbytes for array in parameters), 0
    if device.left_bytes() is not None:
        device.check_allocation(total, "load")
    for array in parameters:
        mx.eval(array)
        done += array.nbytes
        report("reading weights", done, total)


def model_classes(
    config: dict[str, Any], options: RunOptions, reads: Reads | None = None
) -> tuple[type, type]:
    """Return ``(Model, ModelArgs)`` for a configuration, bound to ``options``.

    Args:
        reads: transforms the weights of the files before the model renames them.

    Raises:
        ModelError: moeflux-mlx has no model class of this type.
    """
    module = model_module(config.get("model_type"))

    class Model(module.Model):  # type: ignore[misc, name-defined]
        def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
            found = weights if reads is None else reads(weights)
            return cast(dict[str, mx.array], super().sanitize(found))

    Model.options = options
    return Model, module.ModelArgs


def saved_plainly(model: type, arguments: type) -> tuple[type, type]:
    """Return a pack's classes with a configuration that omits the pack's Python file.

    mlx-lm saves this configuration with the whole model, which is no pack.
    """

    class Arguments(arguments):  # type: ignore[misc, valid-type]
        @classmethod
        def from_dict(cls, params: dict[str, Any]) -> Any:
            params.pop("model_file", None)
            return super().from_dict(params)

    return model, Arguments


def pack_classes(model_file: str) -> tuple[type, type]:
    """Return the classes of the pack that contains ``model_file``.

    Stock mlx-lm's commands call this for a pack with ``--trust-remote-code``. Memory
    and executor come from the environment.
    """
    saves = is_to_be_saved()
    directory = Path(model_file).resolve().parent
    # Join first, so that a server whose model fails to load ends.
    give_way = serving.join()
    check_settings()
    products.mend()
    options = RunOptions(directory=directory, give_way=give_way)
    found = load_config(directory)
    refuse_division_of_layers()
    group = None if saves or divides_data() else launched_group()
    if group is not None or not has_own_class(found):
        return saved_plainly(
            *door_classes(
                directory,
                found,
                reads=not saves,
                group=group,
            )
        )
    _tell_departure(found)
    direct = config.expert_io() == "direct"
    opened = partial(PackedExperts.open, directory, direct=direct)
    options = replace(options, open_experts=opened)
    bound, arguments = model_classes(found, options)

    class Model(bound):  # type: ignore[misc, valid-type]
        """Refuses a model that does not fit at loading, not at the first call."""

        def load_weights(self, *args: Any, **kwargs: Any) -> nn.Module:
            super().load_weights(*args, **kwargs)
            if saves:
                return self
            if options.amounts == Amounts():
                check_fits(directory, self)
            if self.runtime.make_plan(self.needs) is None:
                self.runtime.open(self.needs)
            return self

    return saved_plainly(Model, arguments)
