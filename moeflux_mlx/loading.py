"""Find, open and load models: packed directories, plain checkpoints, hub ids."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.utils import _download, load_config, load_model, load_tokenizer

from . import config
from .door import load_through_door, takes_door
from .errors import ModelError
from .executors.base import leaves
from .experts.budget import Amounts
from .experts.packed import PackedExperts, is_packed
from .experts.store import open_store
from .memory import MemoryPlan
from .pool_search import find_fastest
from .progress import Report, byte_progress, notice
from .runtime import RunOptions


def load(
    path_or_repo: str | Path,
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
    lazy: bool = False,
    revision: str | None = None,
    model_config: dict[str, Any] | None = None,
    tokenizer_config: dict[str, Any] | None = None,
) -> tuple[nn.Module, Any]:
    """Load a model, its experts streamed or among its parameters.

    Experts of a packed directory are always streamed, those of a plain checkpoint if
    ``memory`` or ``expert_memory`` bounds them.

    Args:
        path_or_repo: a directory, or a Hugging Face Hub id to download.
        memory: bytes (``8000000000`` or ``"8GB"``) that the process takes in all:
            experts get what the rest leaves, less as caches grow. The plan is printed
            on standard error. ``"auto"`` tries several amounts of up to 3/4 of the
            machine's memory for a few seconds and takes the fastest.
        expert_memory: bytes that bound the experts alone, whatever else is taken. With
            neither, ``MOEFLUX_MEMORY`` and ``MOEFLUX_EXPERT_MEMORY`` say it, or else a
            packed model's experts take up to 3/4 of the machine's memory.
        scope: ``"global"`` shares the expert slots between layers, ``"layer"`` gives
            each layer its own.
        policy: which experts stay in memory: ``"lfu"``, ``"lru"``, ``"markov"``, or
            ``"pins:TRACE"`` with a file of ``moeflux trace`` (see ``policy_factory``);
            None takes the environment's choice, else ``"lfu"``.
        executor: name of the executor; None takes the environment's choice.
        optimistic: ``"auto"``, ``"on"`` or ``"off"``: whether tokens run ahead of
            reading experts; None takes the environment's choice.
        read_ahead: ``"on"``, ``"off"`` or ``"auto"``: whether experts are read before
            a layer asks for them; ``auto`` tries both for some tokens.
        expert_io: ``"mmap"`` maps the experts of a packed directory; ``"pread"`` reads
            them into memory through the page cache, ``"direct"`` past it, for which
            they must be packed on Linux. None takes the environment's choice, else
            ``"auto"``: mapped on Metal where all of them fit, else ``"pread"``. A
            mapped file that is cut ends the process.
        native: True for our own class of the model, False for mlx-lm's, its experts
            streamed if ``expert_memory`` bounds them; None takes our own where there
            is one.
        lazy: leave parameters unevaluated.
        revision, model_config, tokenizer_config: as in ``mlx_lm.load``.

    Returns:
        ``(model, tokenizer)`` as ``mlx_lm.load`` returns them.

    Raises:
        ModelError: the directory is not a model, or not one of a supported type; a
            checkpoint's experts are missing, truncated or of no usable form.
        ExpertStoreError: a pack's files are missing, damaged or of another model; a
            file cannot be read.
        BudgetError: ``memory`` or ``expert_memory`` cannot hold what one token needs,
            or all the experts that are to be mapped.
        ConfigError: an argument has no usable value.
        TraceError: the recording that ``policy`` names is not usable.
    """
    path = find_model(path_or_repo, revision)
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
    )
    if takes_door(path, native):
        model, loaded = load_through_door(
            path, options, lazy=lazy, model_config=model_config
        )
        eos = loaded.get("eos_token_id")
        return model, load_tokenizer(path, tokenizer_config, eos_token_ids=eos)
    with _built(path, options, model_config) as (model, loaded):
        # Before memory is planned: it takes some too.
        eos = loaded.get("eos_token_id")
        tokenizer = load_tokenizer(path, tokenizer_config, eos_token_ids=eos)
        with byte_progress() as report:
            model.runtime.open(model.needs, report)
            if not lazy:
                _read_parameters(model, report)
    if (plan := model.runtime.plan) is not None:
        notice(str(plan))
        if model.runtime.amounts.fastest:
            notice(find_fastest(model, tokenizer))
    return model, tokenizer


def plan_load(
    path_or_repo: str | Path, memory: int | str, *, scope: str = "global"
) -> MemoryPlan:
    """Return what ``load`` with this ``memory`` would take it for; loads nothing.

    Raises:
        ModelError, ExpertStoreError, BudgetError: as ``load``.
    """
    path = find_model(path_or_repo)
    options = RunOptions(None, memory, scope=scope)
    with _built(path, options) as (model, loaded):
        load_tokenizer(path, eos_token_ids=loaded.get("eos_token_id"))
        plan = model.runtime.make_plan(model.needs)
        model.runtime.store.close()
    assert plan is not None
    return plan


@contextlib.contextmanager
def _built(
    path: Path, options: RunOptions, model_config: dict[str, Any] | None = None
) -> Iterator[tuple[nn.Module, dict[str, Any]]]:
    """Build a model without reading weights; an error in here closes its files."""
    amounts = Amounts.read(options.memory, options.expert_memory)
    streams = amounts != Amounts() or is_packed(path)
    # Opened first: mlx-lm's own errors do not say which file or expert is at fault.
    direct = config.expert_io(options.expert_io) == "direct"
    store = open_store(path, direct=direct) if streams else None
    opened = (lambda: store) if store is not None else None
    options = replace(options, open_experts=opened, directory=path)
    try:
        yield load_model(
            path,
            lazy=True,
            # A packed directory's model_file names the very class that is loaded here.
            model_config={**(model_config or {}), "model_file": None},
            get_model_classes=lambda config: model_classes(config, options),
        )
    except BaseException:
        if store is not None:
            store.close()
        raise


def _read_parameters(model: nn.Module, report: Report) -> None:
    parameters = leaves(model.parameters())
    total, done = sum(array.nbytes for array in parameters), 0
    for array in parameters:
        mx.eval(array)
        done += array.nbytes
        report("reading weights", done, total)


def find_model(path_or_repo: str | Path, revision: str | None = None) -> Path:
    """Return the local directory of a model, downloading a hub id.

    Raises:
        ModelError: there is no model at the path, or the hub has none of that id.
    """
    path = Path(path_or_repo)
    if not path.exists():
        path = _from_hub(str(path_or_repo), revision)
    if not (path / "config.json").is_file():
        raise ModelError(f"[load] {path}: expected a model directory with config.json")
    return path


def _from_hub(repo: str, revision: str | None) -> Path:
    patterns = ["*.json", "*.safetensors", "*.py", "*.txt", "*.jinja", "*.bin"]
    try:
        return _download(repo, revision, allow_patterns=patterns)
    except Exception as error:
        raise ModelError(
            f"[load] expected a local directory or a hub id but got {repo!r}: {error}"
        ) from error


def model_classes(config: dict[str, Any], options: RunOptions) -> tuple[type, type]:
    """Return ``(Model, ModelArgs)`` for a configuration, bound to ``options``.

    Raises:
        ModelError: moeflux-mlx has no model class of that type.
    """
    model_type = config.get("model_type")
    try:
        module = importlib.import_module(f"moeflux_mlx.models.{model_type}")
    except ModuleNotFoundError as error:
        if error.name != f"moeflux_mlx.models.{model_type}":
            raise
        raise ModelError(
            f"[load] expected a supported model type but got {model_type!r}"
        ) from error
    bound = type("Model", (module.Model,), {"options": options})
    return bound, module.ModelArgs


def pack_classes(model_file: str) -> tuple[type, type]:
    """Return the classes of the packed directory that ``model_file`` lies in.

    Stock mlx-lm commands reach a packed model through this with
    ``--trust-remote-code``; memory and executor come from the environment.
    """
    directory = Path(model_file).resolve().parent
    direct = config.expert_io() == "direct"
    opened = partial(PackedExperts.open, directory, direct=direct)
    options = RunOptions(opened, directory=directory)
    return model_classes(load_config(directory), options)
