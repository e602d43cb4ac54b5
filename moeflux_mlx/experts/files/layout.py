"""The record layout: where each tensor of an expert is in its record."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property

from ...errors import ConfigError, ExpertStoreError
from ...system.files import short
from ..weights import Quantization
from .safetensors import DTYPE_BYTES, MAX_RANK

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
PARTS = ("weight", "scales", "biases")
# A projection's bias, one value for each row; not the quantisation's ``biases``.
BIAS = "bias"
# A scale of an expert's whole matrix, beside those of its groups.
GLOBAL_SCALE = "global_scale"
# All arrays that a projection of mlx-lm can have.
ALL_PARTS = (*PARTS, BIAS, GLOBAL_SCALE)
# Kernels load up to 16 bytes at a time.
TENSOR_ALIGNMENT = 16
# Apple's page size, and a multiple of every disk's logical block.
DEFAULT_ALIGNMENT = 16 * 1024

PartShapes = Mapping[tuple[str, str], tuple[str, tuple[int, ...]]]


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of one expert, at ``offset`` of the record, without an expert axis."""

    projection: str
    part: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    n_bytes: int


@dataclass(frozen=True)
class ExpertLayout:
    """The record of one expert: ``[gate w|s|b, up w|s|b, down w|s|b]``.

    A block with other projections has those instead. ``quantization`` has one entry for
    each of ``projections``; None means dense. Records begin ``stride`` bytes apart,
    which is a multiple of ``alignment``.
    """

    tensors: tuple[TensorSpec, ...]
    quantization: tuple[Quantization | None, ...]
    alignment: int = DEFAULT_ALIGNMENT

    @classmethod
    def build(
        cls,
        parts: PartShapes,
        quantization: Mapping[str, Quantization | None],
        alignment: int = DEFAULT_ALIGNMENT,
    ) -> ExpertLayout:
        """Lay out one expert's tensors.

        Args:
            parts: each tensor's ``(dtype, shape)``, without an expert axis.
            quantization: by projection, in the record's order.
            alignment: bytes; ``stride`` is a multiple of it.

        Raises:
            ConfigError: ``alignment`` is not a power of two of at least 16.
        """
        check_alignment(alignment)
        tensors: list[TensorSpec] = []
        end = 0
        for projection in quantization:
            for part in ALL_PARTS:
                if (projection, part) not in parts:
                    continue
                dtype, shape = parts[projection, part]
                offset = _round_up(end, TENSOR_ALIGNMENT)
                n_bytes = math.prod(shape) * DTYPE_BYTES[dtype]
                end = offset + n_bytes
                tensors.append(
                    TensorSpec(projection, part, dtype, tuple(shape), offset, n_bytes)
                )
        return cls(tuple(tensors), tuple(quantization.values()), alignment)

    @cached_property
    def projections(self) -> tuple[str, ...]:
        """Names of the projections, in the record's order."""
        return tuple(dict.fromkeys(t.projection for t in self.tensors))

    @property
    def is_biased(self) -> bool:
        """Whether projections have biases."""
        return any(t.part == BIAS for t in self.tensors)

    @cached_property
    def record_bytes(self) -> int:
        """Bytes of one record, without padding."""
        last = self.tensors[-1]
        return last.offset + last.n_bytes

    @cached_property
    def stride(self) -> int:
        """Bytes from the start of one record to the start of the next."""
        return _round_up(self.record_bytes, self.alignment)

    def to_json(self) -> dict:
        """Return the layout as plain JSON values."""
        return {
            "alignment": self.alignment,
            "quantization": {
                projection: None if q is None else asdict(q)
                for projection, q in zip(
                    self.projections, self.quantization, strict=True
                )
            },
            "tensors": [
                {
                    "projection": t.projection,
                    "part": t.part,
                    "dtype": t.dtype,
                    "shape": list(t.shape),
                    "offset": t.offset,
                }
                for t in self.tensors
            ],
        }

    @classmethod
    def from_json(cls, fields: dict) -> ExpertLayout:
        """Rebuild a layout, and check that ``build`` gives the same offsets.

        Raises:
            ExpertStoreError: a field is missing, has a wrong type or is inconsistent.
        """
        try:
            parts = {
                (t["projection"], t["part"]): (t["dtype"], _shape(t["shape"]))
                for t in fields["tensors"]
            }
            quantization = {
                p: None if q is None else Quantization(**q)
                for p, q in fields["quantization"].items()
            }
            layout = cls.build(parts, quantization, fields["alignment"])
            offsets = [t["offset"] for t in fields["tensors"]]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ExpertStoreError(
                f"[layout] expected a record layout but got {short(error)}"
            ) from error
        if {(p, "weight") for p in quantization} - parts.keys() or not parts:
            raise ExpertStoreError("[layout] expected a weight of every projection")
        if [t.offset for t in layout.tensors] != offsets:
            raise ExpertStoreError(
                f"[layout] expected offsets {[t.offset for t in layout.tensors]} "
                f"but got {short(offsets)}"
            )
        return layout


def check_alignment(alignment: int) -> None:
    """Raise ConfigError unless ``alignment`` is a power of two of at least 16."""
    if (
        type(alignment) is not int
        or alignment < TENSOR_ALIGNMENT
        or alignment & (alignment - 1)
    ):
        raise ConfigError(
            "[alignment] expected a power of two of at least "
            f"{TENSOR_ALIGNMENT} bytes but got {alignment!r}"
        )


def _shape(values: list) -> tuple[int, ...]:
    # A hostile shape of many large sizes would make their product very slow.
    if len(values) > MAX_RANK or any(type(n) is not int or n < 1 for n in values):
        raise ValueError(f"shape {short(values)}")
    return tuple(values)


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
