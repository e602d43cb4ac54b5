"""Have streamed models saved whole, and keep them from being divided as if they were.

Experts that are read from files are not among a model's parameters, and mlx-lm saves
what ``parameters()`` returns: ``mlx_lm.convert``, ``mlx_lm.fuse`` and scripts would
write a model without experts.
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
from ..system.commands import type_of_convert
from ..system.uncopied import Unpickled
from .whole import save_file, save_shards, store_of, switches_of

_SAVE_MODEL = utils.save_model
_DEQUANTIZE_MODEL = utils.dequantize_model
_SAVE_WEIGHTS, _APPLY = nn.Module.save_weights, nn.Module.apply
_SAVE = utils.save


def reads_experts(model: Any) -> bool:
    """Tell whether a model's experts are read from files, and no parameters."""
    return store_of(model) is not None or vars(model).get("streamer") is not None


def refuse_experts(weights: Iterable[str], block: str) -> None:
    """Raise ModelError if any of weights by name is of experts read from files.

    None of a streamed model's parameters takes it.

    Args:
        block: the attribute that has a layer's experts.
    """
    for name in weights:
        if f".{block}." in name:
            raise ModelError(
                f"[weights] {name}: expected no experts' weights for a model that "
                "reads experts from files: change the checkpoint and pack it again"
            )


class GuardsSaving(Unpickled, nn.Module):
    """The base of a model's class if its experts may be read from files."""

    def update(self, parameters: Any, strict: bool = True) -> Any:  # type: ignore[override]
        """Replace parameters.

        Raises:
            ModelError: some are of streamed experts, or all of them are to be of other
                types, which experts do not hear of; nothing is replaced.
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
            # Weights of files come with their types, those of experts too.
            whole = len(given) == len(own) and not vars(self).get("is_loading")
            if whole and (dtype := type_of_convert()) is not None:
                for switch in switches.values():
                    switch.saved_dtype = dtype
            elif whole and _is_cast(own, given):
                raise _no_change("set_dtype")
        return super().update(parameters, strict)

    def load_weights(self, *arguments: Any, **options: Any) -> nn.Module:
        """Load weights as ``mlx.nn.Module`` does, of whatever types they are."""
        vars(self)["is_loading"] = True
        try:
            return super().load_weights(*arguments, **options)
        finally:
            del vars(self)["is_loading"]

    def parameters(self) -> Any:
        """Return all arrays; streamed experts are none, so these are not to be saved.

        Raises:
            ModelError: mlx-lm is about to save a model without its experts.
        """
        refuse_saving_now(self)
        return super().parameters()


def keep_whole(model: nn.Module) -> None:
    """Have every part of a streamed model refuse to be divided as its class would.

    Whether the whole one is divided between processes, its own ``shard`` knows.
    """
    for _, module in model.named_modules():
        for name in ("pipeline",) if module is model else ("shard", "pipeline"):
            if hasattr(type(module), name):
                module.__dict__[name] = refuse_division


def check_division(
    model: nn.Module, group: mx.distributed.Group | None, *, pipeline: bool
) -> None:
    """Refuse to divide a streamed model in another way than loading has.

    Raises:
        ModelError: as ``refuse_division``.
    """
    asked = mx.distributed.init() if group is None else group
    own = vars(model)["group"]
    is_divided = own is not None and vars(model)["pipeline"] == pipeline
    if asked.size() != (own.size() if is_divided else 1):
        refuse_division()


def refuse_division(*_arguments: Any, **_options: Any) -> None:
    """Refuse to divide a model that reads experts from files.

    Raises:
        ModelError: names the class that divides it.
    """
    raise ModelError(
        "[stream] expected a model with its experts among its parameters but got one "
        "that reads them from files: divide the experts between processes with "
        "load(group=), or load it without a bound on memory"
    )


def refuse_saving_now(model: Any) -> None:
    """Raise ModelError if mlx-lm's own ``save_model`` asks: a script has kept that."""
    frame = sys._getframe(2)
    if frame.f_code is _SAVE_MODEL.__code__ and reads_experts(model):
        raise ModelError(
            "[save] expected mlx_lm.utils.save_model as it is since moeflux_mlx was "
            "imported but got it as it was before, nothing is written: import it again"
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
    # It takes along all code: that of a pack is nothing to a whole model.
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
    """Tell whether parameters are to be of other types."""
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
    """Raise ModelError where only experts are quantised, but not by the model's files.

    Then somebody has dequantised all else in a way that experts do not hear of.
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
    """Have mlx-lm and MLX save models with experts from files whole, or not at all."""
    nn.Module.save_weights = _save_weights  # type: ignore[method-assign]
    nn.Module.apply = _apply  # type: ignore[method-assign]
    put_everywhere("save", _SAVE, _save)
    put_everywhere("save_model", _SAVE_MODEL, _save_model)
    put_everywhere("dequantize_model", _DEQUANTIZE_MODEL, _dequantize_model)


def put_everywhere(
    name: str, stock: Callable[..., Any], ours: Callable[..., Any]
) -> None:
    """Replace a function in all modules that have imported it by its name."""
    for module in [*sys.modules.values()]:
        if getattr(module, "__dict__", {}).get(name) is stock:
            setattr(module, name, ours)
