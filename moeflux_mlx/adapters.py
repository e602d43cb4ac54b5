"""Load adapters trained by mlx-lm into a model whose experts may be streamed."""

from __future__ import annotations

import functools
from pathlib import Path

import mlx.nn as nn
from mlx_lm.tuner import utils as tuner

from .errors import ModelError, one_line_errors
from .experts.compute.switch import StreamedSwitch
from .experts.files.safetensors import read_header
from .saving.guard import put_everywhere
from .system.files import short

WEIGHTS, CONFIG = "adapters.safetensors", "adapter_config.json"
_LOAD_ADAPTERS = tuner.load_adapters


def put_adapters(model: nn.Module, path: str | Path) -> None:
    """Load the adapters of a directory into a model, as ``mlx_lm.load`` does.

    Raises:
        ModelError: a file is missing or belongs to another model, or an adapter adapts
            streamed experts.
    """
    directory = Path(path)
    for name in (CONFIG, WEIGHTS):
        if not (directory / name).is_file():
            raise ModelError(
                f"[adapters] {directory / name}: expected a file but found none: give "
                "a directory that mlx_lm.lora wrote"
            )
    with one_line_errors(f"[adapters] {directory}"):
        _refuse_streamed(model, directory / WEIGHTS)
        _LOAD_ADAPTERS(model, str(directory))
    vars(model)["adapters"] = directory
    # Evaluation mode, without dropout, as after loading.
    model.eval()


def has_adapters(model: nn.Module) -> bool:
    """Tell whether adapters change a model's output."""
    put = vars(model).get("adapters") is not None
    return put or any("lora_a" in module for module in model.modules())


def _refuse_streamed(model: nn.Module, weights: Path) -> None:
    switches = (m for m in model.modules() if isinstance(m, StreamedSwitch))
    streamed = tuple(f"{switch.path}." for switch in switches)
    names = [name for name in read_header(weights) if name.startswith(streamed)]
    found = sorted({name.rpartition(".")[0] for name in names})
    if found:
        more = f" and {len(found) - 3} more" if len(found) > 3 else ""
        raise ModelError(
            f"[adapters] {weights}: expected no adapters of routed experts, which are "
            f"read from files, but got {', '.join(map(short, found[:3]))}{more}: train "
            "with keys that name no routed expert, or fuse the adapters into the plain "
            "checkpoint and pack that"
        )


@functools.wraps(_LOAD_ADAPTERS)
def _load_adapters(model: nn.Module, adapter_path: str) -> nn.Module:
    weights = Path(adapter_path) / WEIGHTS
    streams = any(isinstance(module, StreamedSwitch) for module in model.modules())
    if streams and weights.is_file():
        _refuse_streamed(model, weights)
    return _LOAD_ADAPTERS(model, adapter_path)


# Without this, mlx-lm's commands would say that the model lacks these parameters.
put_everywhere("load_adapters", _LOAD_ADAPTERS, _load_adapters)
