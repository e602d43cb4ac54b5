"""Guard streamed models against incomplete saving and wrong division.

Streamed experts are not parameters, and mlx-lm saves the result of ``parameters()``. So
without this guard ``mlx_lm.convert``, ``mlx_lm.fuse`` and scripts would write a model
without experts.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm import utils

from ..calls.alone import OneAtATime
from ..errors import ModelError
from ..experts.compute.switch import PLAIN_FIRST
from ..experts.files.model_file import remove_model_file
from ..system.commands import refuse_quantisers, type_of_convert
from ..system.uncopied import Unpickled
from .whole import save_file, save_shards, store_of, switches_of

_SAVE_MODEL = utils.save_model
_DEQUANTIZE_MODEL = utils.dequantize_model
_SAVE_WEIGHTS, _APPLY = nn.Module.save_weights, nn.Module.apply
_SAVE = utils.save


def reads_experts(model: Any) -> bool:
    """Tell whether a model's experts are streamed."""
    return store_of(model) is not None or vars(model).get("streamer") is not None


def refuse_experts(weights: Iterable[str], block: str) -> None:
    """Raise ModelError if a weight belongs to streamed experts.

    Args:
        weights: names of weights.
        block: the attribute that holds a layer's experts.
    """
    for name in weights:
        if f".{block}." in name:
            raise ModelError(
                f"[weights] {name}: expected no experts' weights for a model that "
                "reads experts from files: change the checkpoint and pack it again"
            )


class GuardsSaving(Unpickled, nn.Module):
    """A base class for models whose experts may be streamed."""

    def update(self, parameters: Any, strict: bool = True) -> Any:  # type: ignore[override]
        """Replace parameters.

        Raises:
            ModelError: a parameter belongs to streamed experts, or all parameters
                change type, which would not reach the experts; nothing is replaced.
        """
        if switches := switches_of(self):
            given: dict[str, Any] = dict(tree_flatten(parameters))
            for name in given:
                if name.startswith(tuple(f"{path}." for path in switches)):
                    raise ModelError(
                        f"[weights] {name}: expected no weights of routed experts, "
                        f"which are read from files, nothing is changed: {PLAIN_FIRST}"
                    )
            own = dict(tree_flatten(self.parameters()))
            # Loading keeps the types of the files, which are those of the experts too.
            whole = len(given) == len(own) and not vars(self).get("is_loading")
            if whole and (dtype := type_of_convert()) is not None:
                for switch in switches.values():
                    switch.saved_dtype = dtype
            elif whole and _is_cast(own, given):
                raise _no_change("set_dtype")
        return super().update(parameters, strict)

    def load_weights(self, *arguments: Any, **options: Any) -> nn.Module:
        """Load weights of any type, as ``mlx.nn.Module`` does."""
        vars(self)["is_loading"] = True
        try:
            return super().load_weights(*arguments, **options)
        finally:
            del vars(self)["is_loading"]

    def parameters(self) -> Any:
        """Return all arrays except streamed experts.

        Raises:
            ModelError: mlx-lm is about to save a model without its experts.
        """
        refuse_saving_now(self)
        return super().parameters()

    def shard(self, group: mx.distributed.Group | None = None) -> None:
        """Do nothing, because loading has divided the model.

        Raises:
            ModelError: the model was not loaded with this process group.
        """
        check_division(self, group, pipeline=False)

    def leaf_modules(self) -> Any:
        """Return all modules without children, as ``mlx.nn.Module`` does.

        Raises:
            ModelError: a quantiser of mlx-lm would change experts that are in files.
        """
        self._refuse_quantisers()
        return super().leaf_modules()

    def apply_to_modules(self, apply_fn: Callable[[str, nn.Module], Any]) -> nn.Module:
        """Call a function on all modules, as ``mlx.nn.Module`` does.

        Raises:
            ModelError: a quantiser of mlx-lm would change experts that are in files.
        """
        self._refuse_quantisers()
        return super().apply_to_modules(apply_fn)

    def _refuse_quantisers(self) -> None:
        if reads_experts(self):
            refuse_quantisers()


def keep_whole(model: nn.Module) -> None:
    """Make every module of a model of ours refuse ``shard`` and ``pipeline``.

    The model itself keeps its own ``shard``.
    """
    for _, module in model.named_modules():
        for name in ("pipeline",) if module is model else ("shard", "pipeline"):
            if hasattr(type(module), name):
                module.__dict__[name] = refuse_division


def check_division(
    model: nn.Module, group: mx.distributed.Group | None, *, pipeline: bool
) -> None:
    """Refuse to divide a model in another way than loading has.

    Raises:
        ModelError: as ``refuse_division``.
    """
    asked = mx.distributed.init() if group is None else group
    own: Any = vars(model).get("group")
    is_divided = own is not None and vars(model)["pipeline"] == pipeline
    if asked.size() != (own.size() if is_divided else 1):
        refuse_division()


def refuse_division(*_arguments: Any, **_options: Any) -> None:
    """Refuse to divide a model of our own class, or one with streamed experts.

    Raises:
        ModelError: always; the message names the alternatives.
    """
    raise ModelError(
        "[stream] expected a model of mlx-lm's class with its experts among its "
        "parameters but got one of our own class, or one that reads them from files: "
        "divide the experts between processes with load(group=), or load a plain "
        "checkpoint with native=False and without a bound on memory"
    )


def refuse_saving_now(model: Any) -> None:
    """Raise ModelError if the caller is mlx-lm's original ``save_model``."""
    frame = sys._getframe(2)
    if frame.f_code is _SAVE_MODEL.__code__ and reads_experts(model):
        raise ModelError(
            "[save] expected the mlx_lm.utils.save_model that moeflux_mlx installs but "
            "got the original, nothing is written: import it after moeflux_mlx"
        )


@functools.wraps(_SAVE_MODEL)
def _save_model(save_path: Any, model: Any, **options: Any) -> None:
    if not switches_of(model):
        _SAVE_MODEL(save_path, model, **options)
        return
    _check_forms(model)
    save_shards(model, Path(save_path))


@functools.wraps(_SAVE)
def _save(dst_path: Any, *arguments: Any, **options: Any) -> None:
    _SAVE(dst_path, *arguments, **options)
    # mlx-lm copies all Python files, but a whole model must not have a pack's.
    remove_model_file(Path(dst_path))


@functools.wraps(_SAVE_WEIGHTS)
def _save_weights(self: nn.Module, file: str) -> None:
    if not switches_of(self):
        _SAVE_WEIGHTS(self, file)
        return
    _check_forms(self)
    save_file(self, Path(file))


@functools.wraps(_APPLY)
def _apply(self: nn.Module, *arguments: Any, **options: Any) -> nn.Module:
    if switches_of(self):
        raise _no_change("apply")
    return _APPLY(self, *arguments, **options)


def _is_cast(own: dict[str, Any], new: dict[str, Any]) -> bool:
    """Tell whether parameters would change type."""
    return any(
        name in own and array.dtype != own[name].dtype for name, array in new.items()
    )


def _no_change(part: str) -> ModelError:
    return ModelError(
        f"[{part}] expected experts among the parameters that are to be changed but "
        f"they are read from files, nothing is changed: {PLAIN_FIRST}"
    )


@functools.wraps(_DEQUANTIZE_MODEL)
def _dequantize_model(model: nn.Module) -> nn.Module:
    switches = switches_of(model)
    model = _DEQUANTIZE_MODEL(model)
    for switch in switches.values():
        switch.dequantize()
    if switches and (calls := _calls_of(model)) is not None:
        calls.refuse(
            "[dequantize] expected a model to be saved but got a call of it: its "
            f"experts are dequantised only as they are written: {PLAIN_FIRST}"
        )
    return model


def _calls_of(model: nn.Module) -> OneAtATime | None:
    found = vars(model).get("runtime", vars(model).get("calls"))
    return found if isinstance(found, OneAtATime) else None


def _check_forms(model: nn.Module) -> None:
    """Raise ModelError if only the experts are quantised.

    Then the other matrices were dequantised in a way that did not reach the experts.
    """
    switches = switches_of(model).values()
    if not any(form for switch in switches for form in switch.saved_forms.values()):
        return
    quantized = nn.QuantizedLinear, nn.QuantizedEmbedding
    if not any(isinstance(module, quantized) for module in model.modules()):
        raise ModelError(
            "[save] expected quantised matrices besides experts but got none, nothing "
            f"is written: {PLAIN_FIRST}"
        )


def guard_saving() -> None:
    """Make mlx-lm and MLX save streamed models completely, or not at all."""
    nn.Module.save_weights = _save_weights  # type: ignore[method-assign]
    nn.Module.apply = _apply  # type: ignore[method-assign]
    put_everywhere("save", _SAVE, _save)
    put_everywhere("save_model", _SAVE_MODEL, _save_model)
    put_everywhere("dequantize_model", _DEQUANTIZE_MODEL, _dequantize_model)


def put_everywhere(
    name: str, stock: Callable[..., Any], ours: Callable[..., Any]
) -> None:
    """Replace a function in every module that has imported it under its name."""
    for module in [*sys.modules.values()]:
        if getattr(module, "__dict__", {}).get(name) is stock:
            setattr(module, name, ours)
