"""Find the routed experts of an mlx-lm checkpoint and lay out their records."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from ..errors import ModelError
from ..weights import Quantization
from .layout import DEFAULT_ALIGNMENT, PARTS, PROJECTIONS, ExpertLayout
from .safetensors import TensorEntry

STACKED = re.compile(
    r"(?P<path>(?:.*\.)?layers\.(?P<layer>\d+)\.\w+\.switch_mlp)"
    r"\.(?P<projection>\w+)\.(?P<part>\w+)"
)
CONVERT = "convert it with mlx_lm.convert first"


@dataclass(frozen=True)
class RoutedLayer:
    """The stacked tensors ``[E, ...]`` of one MoE layer by projection and part."""

    layer: int
    path: str
    tensors: dict[tuple[str, str], TensorEntry]

    @property
    def n_experts(self) -> int:
        """How many experts the tensors are stacked from."""
        return self.tensors["gate_proj", "weight"].shape[0]

    def layout(self, config: dict, alignment: int = DEFAULT_ALIGNMENT) -> ExpertLayout:
        """Lay out one expert; bits and group follow from the tensors' shapes.

        Raises:
            ModelError: shapes that do not belong together.
        """
        parts = {key: (t.dtype, t.shape[1:]) for key, t in self.tensors.items()}
        quantization = {p: self._quantization(p, config) for p in PROJECTIONS}
        return ExpertLayout.build(parts, quantization, alignment)

    def _quantization(self, projection: str, config: dict) -> Quantization | None:
        weight = self.tensors[projection, "weight"]
        scales = self.tensors.get((projection, "scales"))
        # One projection's inputs are another one's outputs.
        source = "gate_proj" if projection == "down_proj" else "down_proj"
        n_inputs = self.tensors[source, "weight"].shape[1]
        if scales is None:
            if weight.shape[2] != n_inputs:
                raise _unusable(weight, f"{n_inputs} columns but got {weight.shape[2]}")
            return None
        bits, bits_rest = divmod(32 * weight.shape[2], n_inputs)
        group_size, group_rest = divmod(n_inputs, scales.shape[2])
        if bits_rest or group_rest or weight.dtype != "U32" or not bits:
            raise _unusable(weight, f"packed rows of {n_inputs} values")
        mode = _mode(f"{self.path}.{projection}", config)
        if mode == "affine" and (projection, "biases") not in self.tensors:
            raise _unusable(weight, "biases beside its affine scales")
        return Quantization(bits, group_size, mode)


def routed_layers(tensors: Mapping[str, TensorEntry]) -> dict[int, RoutedLayer]:
    """Collect the stacked experts of every MoE layer, by layer number.

    Raises:
        ModelError: there are none, or not in the form mlx-lm writes.
    """
    layers: dict[int, RoutedLayer] = {}
    for name, entry in tensors.items():
        if (found := STACKED.fullmatch(name)) is None:
            continue
        number, projection, part = (
            int(found["layer"]),
            found["projection"],
            found["part"],
        )
        if projection not in PROJECTIONS or part not in PARTS:
            raise _unusable(entry, f"{PROJECTIONS} with {PARTS}")
        layer = layers.setdefault(number, RoutedLayer(number, found["path"], {}))
        if layer.path != found["path"]:
            raise _unusable(entry, f"one stack of experts in layer {number}")
        layer.tensors[projection, part] = entry
    if not layers:
        raise ModelError(
            "[pack] expected stacked experts (layers.N.mlp.switch_mlp.*) but found "
            f"none: if this is a Mixture-of-Experts model, {CONVERT}"
        )
    for layer in layers.values():
        _check_stack(layer)
    return dict(sorted(layers.items()))


def _check_stack(layer: RoutedLayer) -> None:
    for projection in PROJECTIONS:
        if (projection, "weight") not in layer.tensors:
            raise ModelError(f"[pack] {layer.path}.{projection}.weight is missing")
    for (projection, _), entry in layer.tensors.items():
        rows = layer.tensors[projection, "weight"].shape[:2]
        if len(entry.shape) != 3 or 0 in entry.shape or entry.shape[:2] != rows:
            raise _unusable(entry, f"shape [experts, rows, columns] with {rows}")
        if entry.shape[0] != layer.n_experts:
            raise _unusable(entry, f"{layer.n_experts} experts")


def _mode(path: str, config: dict) -> str:
    table = config.get("quantization") or config.get("quantization_config")
    if not isinstance(table, dict):
        return "affine"
    own = table.get(path)
    return str((own if isinstance(own, dict) else table).get("mode", "affine"))


def _unusable(entry: TensorEntry, expected: str) -> ModelError:
    return ModelError(
        f"[pack] {entry.name!r} of {entry.file}: expected {expected} but got "
        f"{entry.dtype} {list(entry.shape)}; {CONVERT} or use a model of that form"
    )
