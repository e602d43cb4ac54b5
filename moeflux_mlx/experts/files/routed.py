"""Find the routed experts of a checkpoint by name, and lay out their records."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

from ...errors import ModelError
from ...system.files import short
from ..weights import Quantization
from .checkpoint import is_used
from .layout import (
    BIAS,
    DEFAULT_ALIGNMENT,
    GLOBAL_SCALE,
    PARTS,
    PROJECTIONS,
    ExpertLayout,
)
from .safetensors import DTYPE_BYTES, TensorEntry

# A tensor of all experts (switch_mlp.up_proj.weight, experts.down_proj) or of one
# (experts.7.up_proj.weight).
ROUTED = re.compile(
    r"(?P<path>(?:.*\.)?layers\.(?P<layer>\d+)\.\w+\."
    r"(?:switch_mlp|experts(?=\.(?P<expert>\d+)\.)|experts))"
    r"(?:\.\d+)?\.(?P<projection>[a-z]\w*)(?:\.(?P<part>\w+))?"
)
# Some publishers, such as MiniMax, use these names for a single expert's matrices.
OTHER_NAMES = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
# A matrix of the rows of gate_proj followed by those of up_proj.
FUSED = "gate_up_proj"
FUSED_HALVES = ("gate_proj", "up_proj")
OTHER_RELEASE = (
    "use a release of the model with experts in bfloat16, float16, float32 or one of "
    "MLX's quantisations"
)
FLOATS_OF_8_BITS = ("F8_E4M3", "F8_E5M2", "F8_E8M0")

DENSE_DTYPES = ("F32", "F16", "BF16")
AFFINE_BITS, AFFINE_GROUPS = (1, 2, 3, 4, 5, 6, 8), (32, 64, 128)
# Bits and group size of the modes with one-byte scales.
BYTE_SCALED = {"mxfp4": (4, 32), "mxfp8": (8, 32), "nvfp4": (4, 16)}


@dataclass(frozen=True)
class ExpertTensors:
    """One tensor of every expert of a layer, and its place in the checkpoint.

    ``entries`` is either one tensor for each expert, or one tensor of all experts. In
    that one an expert's bytes begin at ``first + expert * stride``. ``shape`` is that
    of one expert.
    """

    entries: tuple[TensorEntry, ...]
    n_experts: int
    shape: tuple[int, ...]
    first: int = 0
    stride: int = 0

    @property
    def dtype(self) -> str:
        """The elements' type, by its name in safetensors."""
        return self.entries[0].dtype

    @property
    def n_bytes(self) -> int:
        """Bytes of one expert's tensor."""
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]

    def locate(self, expert: int) -> tuple[TensorEntry, int]:
        """Return the tensor that holds an expert, and the expert's first byte in it."""
        if len(self.entries) == self.n_experts and not self.stride:
            return self.entries[expert], self.first
        return self.entries[0], self.first + expert * self.stride

    @property
    def is_half(self) -> bool:
        """Whether the entries hold another projection's rows too."""
        rows = self.entries[0].shape[-2]
        return rows != self.shape[0]

    def halves(self) -> tuple[ExpertTensors, ExpertTensors]:
        """Split each expert's rows into two halves; nothing is read."""
        shape = (self.shape[0] // 2, *self.shape[1:])
        second = self.first + self.n_bytes // 2
        first = ExpertTensors(
            self.entries, self.n_experts, shape, self.first, self.stride
        )
        return first, ExpertTensors(
            self.entries, self.n_experts, shape, second, self.stride
        )


@dataclass(frozen=True)
class RoutedLayer:
    """The experts of one MoE layer: their tensors by projection and part."""

    layer: int
    path: str
    tensors: dict[tuple[str, str], ExpertTensors]

    @property
    def n_experts(self) -> int:
        """Number of experts of the layer."""
        return next(iter(self.tensors.values())).n_experts

    def layout(self, config: dict, alignment: int = DEFAULT_ALIGNMENT) -> ExpertLayout:
        """Lay out one expert; the tensors' shapes give its bits and group size.

        Raises:
            ModelError: the shapes contradict each other, or MLX does not have the
                quantisation.
        """
        parts = {key: (t.dtype, t.shape) for key, t in self.tensors.items()}
        quantization = {p: self._quantization(p, config) for p in PROJECTIONS}
        for (_, part), tensors in self.tensors.items():
            if part == BIAS and tensors.dtype not in DENSE_DTYPES:
                raise _unusable(tensors.entries[0], f"one of {DENSE_DTYPES}")
        return ExpertLayout.build(parts, quantization, alignment)

    def _quantization(self, projection: str, config: dict) -> Quantization | None:
        weight = self.tensors[projection, "weight"]
        scales = self.tensors.get((projection, "scales"))
        biases = self.tensors.get((projection, "biases"))
        entry = weight.entries[0]
        # A matrix's inputs are the rows of the matrix before it: gate and up take the
        # hidden state (down's rows), down takes the activations (gate's rows).
        source = "gate_proj" if projection == "down_proj" else "down_proj"
        n_inputs = self.tensors[source, "weight"].shape[0]
        if scales is None:
            if weight.shape[1] != n_inputs:
                raise _unusable(entry, f"{n_inputs} columns")
            if weight.dtype not in DENSE_DTYPES or biases is not None:
                raise _unusable(entry, f"one of {DENSE_DTYPES}, or scales beside it")
            return None
        bits, bits_rest = divmod(32 * weight.shape[1], n_inputs)
        group_size, group_rest = divmod(n_inputs, scales.shape[1])
        if bits_rest or group_rest or weight.dtype != "U32" or not bits:
            raise _unusable(entry, f"packed rows of {n_inputs} values")
        found = Quantization(bits, group_size, _mode(scales, bits, group_size))
        self._check_named_mode(projection, found, config)
        if found.mode != "affine":
            if biases is not None:
                raise _unusable(biases.entries[0], f"no biases of {found.mode} scales")
            return found
        if bits not in AFFINE_BITS or group_size not in AFFINE_GROUPS:
            raise _unusable(entry, f"a known quantisation, not {found},")
        if biases is None or biases.shape != scales.shape:
            raise _unusable(entry, "biases beside its affine scales")
        if biases.dtype != scales.dtype:
            raise _unusable(biases.entries[0], f"{scales.dtype} as of its scales")
        return found

    def _check_named_mode(
        self, projection: str, found: Quantization, config: dict
    ) -> None:
        """Raise ModelError if ``config.json`` names another mode than the shapes."""
        entry = self.tensors[projection, "scales"].entries[0]
        table = config.get("quantization") or config.get("quantization_config")
        if not isinstance(table, dict):
            return
        modes = ("affine", *BYTE_SCALED)
        if (default := table.get("mode") or "affine") not in modes:
            raise _unusable(entry, f"a known quantisation, not {short(default)},")
        stem = self.path.removesuffix(".experts").removesuffix(".switch_mlp")
        names = (f"{stem}.switch_mlp.{projection}", f"{self.path}.{projection}")
        own = next((table[name] for name in names if name in table), None)
        named = own.get("mode") or "affine" if isinstance(own, dict) else found.mode
        if named != found.mode:
            raise _unusable(
                entry, f"mode {short(named)} as in config.json, not {found},"
            )


@dataclass
class _Found:
    """The tensors found for one layer, by expert; None: a tensor of all experts."""

    layer: int
    path: str
    entries: defaultdict[tuple[str, str], dict[int | None, TensorEntry]] = field(
        default_factory=lambda: defaultdict(dict)
    )

    def collect(self) -> RoutedLayer:
        """Return the layer; check that its tensors are complete and consistent."""
        experts = [e for part in self.entries.values() for e in part if e is not None]
        n_each = 1 + max(experts, default=-1)
        layer = RoutedLayer(self.layer, self.path, {})
        for (projection, part), entries in self.entries.items():
            rank = 1 if part == BIAS else 2
            tensors = self._tensors(f"{projection}.{part}", entries, n_each, rank)
            named = {projection: tensors}
            if projection == FUSED:
                if tensors.shape[0] % 2:
                    raise _unusable(tensors.entries[0], "an even number of rows")
                named = dict(zip(FUSED_HALVES, tensors.halves(), strict=True))
            for name, own in named.items():
                if (name, part) in layer.tensors:
                    raise _unusable(own.entries[0], f"one {name}.{part}, not two")
                layer.tensors[name, part] = own
        check_rows(layer)
        return layer

    def _tensors(
        self, name: str, entries: dict[int | None, TensorEntry], n_each: int, rank: int
    ) -> ExpertTensors:
        first = next(iter(entries.values()))
        columns = ", columns" if rank > 1 else ""
        if None in entries:
            if len(entries) > 1 or len(first.shape) != 1 + rank or 0 in first.shape:
                raise _unusable(first, f"one shape [experts, rows{columns}]")
            n_experts, *shape = first.shape
            stride = first.n_bytes // n_experts
            return ExpertTensors((first,), n_experts, tuple(shape), 0, stride)
        for expert in range(n_each):
            if expert not in entries:
                raise ModelError(f"[experts] {self.path}.{expert}.{name} is missing")
            entry = entries[expert]
            same = (entry.dtype, entry.shape) == (first.dtype, first.shape)
            if len(entry.shape) != rank or 0 in entry.shape or not same:
                form = f"{first.dtype} {list(first.shape)}"
                raise _unusable(entry, f"[rows{columns}] as of other experts, {form}")
        ordered = tuple(entries[expert] for expert in range(n_each))
        return ExpertTensors(ordered, n_each, first.shape)


def refuse_floats_of_8_bits(tensors: Mapping[str, TensorEntry]) -> None:
    """Raise ModelError for weights of 8-bit floats, which MLX cannot multiply."""
    for entry in tensors.values():
        if is_used(entry.name) and entry.dtype in FLOATS_OF_8_BITS:
            raise ModelError(
                f"[checkpoint] {entry.file}: expected weights that MLX can multiply "
                f"but got FP8 ({entry.name!r} is {entry.dtype}): {OTHER_RELEASE}"
            )


def routed_layers(tensors: Mapping[str, TensorEntry]) -> dict[int, RoutedLayer]:
    """Collect the experts of every MoE layer, by layer number.

    Experts may be stacked in one tensor ``[E, O, I]`` or have a tensor each. Gate and
    up may be fused.

    Raises:
        ModelError: there are none, some are missing, or their form is unknown.
    """
    found: dict[int, _Found] = {}
    refuse_floats_of_8_bits(tensors)
    for name, entry in tensors.items():
        if not is_used(name) or (match := ROUTED.fullmatch(name)) is None:
            continue
        number, projection = int(match["layer"]), match["projection"]
        projection = OTHER_NAMES.get(projection, projection)
        part = match["part"] or "weight"
        # No bias for fused matrices: families order its elements differently.
        parts = PARTS if projection == FUSED else (*PARTS, BIAS)
        if part == GLOBAL_SCALE:
            raise ModelError(
                f"[experts] {name!r} of {entry.file}: expected '{GLOBAL_SCALE}: true' "
                "for this matrix in config.json, where mlx-lm's converter writes it, "
                "but it is missing: add it to 'quantization'"
            )
        if projection not in (*PROJECTIONS, FUSED) or part not in parts:
            raise _unusable(entry, f"{PROJECTIONS} with {(*PARTS, BIAS)}")
        layer = found.setdefault(number, _Found(number, match["path"]))
        expert = None if match["expert"] is None else int(match["expert"])
        entries = layer.entries[projection, part]
        if layer.path != match["path"] or expert in entries:
            raise _unusable(entry, f"one stack of experts in layer {number}")
        entries[expert] = entry
    if not found:
        raise ModelError(
            "[experts] expected experts (layers.N.mlp.switch_mlp.* or .experts.*) but "
            "found none: this is not a Mixture-of-Experts model, or its experts have "
            "names that moeflux-mlx does not know"
        )
    return {number: layer.collect() for number, layer in sorted(found.items())}


def check_rows(layer: RoutedLayer) -> None:
    """Raise ModelError unless a layer's tensors agree in rows and experts."""
    for projection in PROJECTIONS:
        if (projection, "weight") not in layer.tensors:
            raise ModelError(f"[experts] {layer.path}.{projection}.weight is missing")
    for (projection, _), tensors in layer.tensors.items():
        n_rows = layer.tensors[projection, "weight"].shape[0]
        if tensors.shape[0] != n_rows:
            raise _unusable(tensors.entries[0], f"{n_rows} rows for each expert")
        if tensors.n_experts != layer.n_experts:
            raise _unusable(tensors.entries[0], f"{layer.n_experts} experts")
    gate, up = (layer.tensors[half, "weight"] for half in FUSED_HALVES)
    if up.shape[0] != gate.shape[0]:
        raise _unusable(up.entries[0], f"{gate.shape[0]} rows as of gate_proj")


def _mode(scales: ExpertTensors, bits: int, group_size: int) -> str:
    """Return the mode by mlx-lm's rule: only affine scales have a dense type."""
    if scales.dtype in DENSE_DTYPES:
        return "affine"
    for mode, form in BYTE_SCALED.items():
        if scales.dtype == "U8" and form == (bits, group_size):
            return mode
    raise _unusable(
        scales.entries[0],
        f"a known quantisation, not {bits} bits in groups of {group_size},",
    )


def _unusable(entry: TensorEntry, expected: str) -> ModelError:
    return ModelError(
        f"[experts] {entry.name!r} of {entry.file}: expected {expected} but got "
        f"{entry.dtype} {list(entry.shape)}: {OTHER_RELEASE}"
    )
