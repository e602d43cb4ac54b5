"""Find the routed blocks of a model that mlx-lm built."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models.switch_layers import (
    QuantizedSwitchLinear,
    SwitchGLU,
    SwitchLinear,
    SwitchMLP,
)

from ...errors import ModelError
from ..weights import Quantization
from .layout import ALL_PARTS

# The known calls, which use expert ids only to index these matrices.
KNOWN_CALLS = {
    SwitchGLU.__call__: ("gate_proj", "up_proj", "down_proj"),
    SwitchMLP.__call__: ("fc1", "fc2"),
}
PROJECTION = (SwitchLinear, QuantizedSwitchLinear)


@dataclass(frozen=True)
class RoutedBlock:
    """A routed block of a model: mlx-lm's ``module`` at ``path``."""

    path: str
    module: nn.Module

    @property
    def projections(self) -> dict[str, nn.Module]:
        """The block's projections by attribute name."""
        return projections_of(self.module)

    @property
    def parts(self) -> dict[tuple[str, str], mx.array]:
        """The arrays of all experts by projection and part, unevaluated."""
        return {
            (name, part): module[part]
            for name, module in self.projections.items()
            for part in ALL_PARTS
            if module.get(part) is not None
        }

    @property
    def quantization(self) -> dict[str, Quantization | None]:
        """Each projection's quantisation; None: dense."""
        return {name: _quantization(m) for name, m in self.projections.items()}


def quantize_as_stored(
    module: nn.Module, quantization: Mapping[str, Quantization | None]
) -> None:
    """Quantise a block's projections as in the files, without reading any weights.

    Args:
        quantization: by projection; None: dense.
    """
    for name, form in quantization.items():
        if form is not None:
            dense = module[name]
            module[name] = dense.to_quantized(form.group_size, form.bits, form.mode)


def find_blocks(model: nn.Module) -> list[RoutedBlock]:
    """Return the routed blocks of a model in layer order.

    A single expert matrix among other weights is not a block, and is not streamed.

    Raises:
        ModelError: a block's class has an unknown call, its experts are not mlx-lm's
            projections, or it is at two paths; names the block.
    """
    found: dict[int, RoutedBlock] = {}
    for path, module in model.named_modules():
        if not _is_block(path, module):
            continue
        first = found.setdefault(id(module), RoutedBlock(path, module))
        if first.path != path:
            raise ModelError(
                f"[stream] {path}: expected a routed block of its own but got that of "
                f"{first.path}: load the model with all experts in memory"
            )
    return sorted(found.values(), key=lambda block: by_number(block.path))


def projections_of(module: nn.Module) -> dict[str, nn.Module]:
    """Return the children with one matrix for each expert."""
    children = module.children().items()
    return {name: m for name, m in children if isinstance(m, PROJECTION)}


def _is_known(projection: object) -> bool:
    """Tell whether a projection is mlx-lm's, with mlx-lm's own call."""
    calls = [kind.__call__ for kind in PROJECTION]
    return isinstance(projection, PROJECTION) and type(projection).__call__ in calls


def _is_block(path: str, module: nn.Module) -> bool:
    names = KNOWN_CALLS.get(type(module).__call__)
    if names is not None:
        for name in names:
            if not _is_known(module.get(name)):
                raise ModelError(
                    f"[stream] {path}.{name}: expected a SwitchLinear with mlx-lm's "
                    f"call but got {type(module.get(name)).__name__}: stream the model "
                    "before you change it, or load it with all experts in memory"
                )
        return True
    projections = projections_of(module)
    made_of_them = projections and not _with_parameters(module) - projections.keys()
    if made_of_them or isinstance(module, (SwitchGLU, SwitchMLP)):
        kind = type(module)
        raise ModelError(
            f"[stream] {path}: expected SwitchGLU or SwitchMLP but got "
            f"{kind.__module__}.{kind.__name__} with a call of its own, whose experts "
            "cannot be streamed: load the model with all experts in memory"
        )
    return False


def _with_parameters(module: nn.Module) -> set[str]:
    """Return the attributes that are parameters or contain some."""
    return {path.split(".")[0] for path in dict(tree_flatten(module.parameters()))}


def _quantization(module: nn.Module) -> Quantization | None:
    if isinstance(module, QuantizedSwitchLinear):
        return Quantization(module.bits, module.group_size, module.mode)
    return None


def by_number(path: str) -> list[tuple[int, str]]:
    """Return a sort key for paths that compares their numbers by value."""
    parts = re.split(r"\.", path)
    return [(int(p), "") if p.isdigit() else (-1, p) for p in parts]
