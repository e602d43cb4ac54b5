"""Check a configuration, alone and against the tensors, before a model is built."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from ...errors import ModelError
from .checkpoint import is_used
from .safetensors import TensorEntry

# MLX's quantisations; None stands for the mode's default.
BITS = (1, 2, 3, 4, 5, 6, 8)
GROUPS = (16, 32, 64, 128)
MODES = ("affine", "mxfp4", "mxfp8", "nvfp4")
LARGEST, LARGEST_FLOAT = 2**31 - 1, 1e30
# The prefixes of the text model in checkpoints, in any order.
PREFIX = re.compile(r"(?:language_model\.|model\.)*")

# A tensor's name without that prefix, and its shape when unpacked.
Expected = tuple[str, tuple[int, ...]]


class Configuration:
    """The text model's part of a ``config.json``; its errors name file and key."""

    def __init__(self, path: Path, fields: Mapping[str, Any]):
        self.path = path
        nested = fields.get("text_config", fields)
        if not isinstance(nested, dict):
            raise self.wrong("text_config", "an object", nested)
        self.fields = nested
        _check_quantization(self, fields)

    def wrong(self, key: str, expected: str, got: object) -> ModelError:
        """Return the error for a key with an unusable value."""
        shown = repr(got)
        shown = shown if len(shown) <= 80 else f"{shown[:77]}..."
        return ModelError(
            f"[{self.path}] expected {key} to be {expected} but got {shown}"
        )

    def check_given(self, args_type: type) -> None:
        """Check that all keys that mlx-lm's class requires are present.

        Raises:
            ModelError: a key is missing; names it.
        """
        for each in dataclasses.fields(args_type):
            missing = dataclasses.MISSING
            is_needed = each.default is missing and each.default_factory is missing
            if is_needed and each.name not in self.fields:
                raise ModelError(
                    f"[{self.path}] expected {each.name} but it is missing: copy it "
                    "from the publisher's configuration"
                )

    def check_counts(self, keys: Iterable[str]) -> None:
        """Raise unless the keys are positive ints or absent (the model's default)."""
        for key in keys:
            value = self.fields.get(key, 1)
            if type(value) is not int or not 1 <= value <= LARGEST:
                raise self.wrong(key, "a positive whole number", value)

    def check_number(
        self, key: str, value: Any, most: float = LARGEST_FLOAT, *, zero: bool = False
    ) -> None:
        """Raise unless a value is a positive number up to ``most``, or allowed zero."""
        is_number = type(value) in (int, float) and 0 <= value <= most
        if not is_number or not (value or zero):
            sign = "number of 0 or more" if zero else "positive number"
            raise self.wrong(key, f"a {sign} up to {most:g}", value)

    def check_indices(self, key: str) -> None:
        """Raise unless a value is a list of ints."""
        value = self.fields[key]
        numbers = isinstance(value, list) and all(type(n) is int for n in value)
        if not numbers:
            raise self.wrong(key, "a list of whole numbers", value)

    def check_multiple(self, key: str, value: int, of: str, divisor: int) -> None:
        """Raise unless ``value`` is a multiple of ``divisor``, the value of ``of``."""
        if value % divisor:
            raise self.wrong(key, f"a multiple of {of} ({divisor})", value)


def counts_of(args_type: type) -> list[str]:
    """Return the int keys of a configuration class."""
    fields = dataclasses.fields(args_type)
    return [f.name for f in fields if f.type in (int, "int")]


def check_tensors(
    config: Configuration,
    tensors: Mapping[str, TensorEntry],
    expected: Iterable[Expected],
    optional: Collection[str] = (),
) -> str | None:
    """Compare tensors' shapes with those that a configuration implies.

    Args:
        tensors: the files' tensors by name.
        expected: names without the text model's prefix, and shapes.
        optional: substrings of names that may be missing.

    Returns:
        The first expected name that is missing, or None.

    Raises:
        ModelError: a tensor has another shape; names the tensor and its file.
    """
    found = {
        PREFIX.sub("", name, count=1): entry
        for name, entry in tensors.items()
        if is_used(name)
    }
    for name, shape in expected:
        if (entry := found.get(name)) is None:
            if not any(part in name for part in optional):
                return name
            continue
        scales = found.get(f"{name.removesuffix('.weight')}.scales")
        shown = unpacked_shape(entry, scales, shape)
        if shown != shape:
            raise ModelError(
                f"[checkpoint] {entry.file}: expected {entry.name!r} to be "
                f"{list(shape)} as in {config.path} but got {list(shown)}"
            )
    return None


def unpacked_shape(
    entry: TensorEntry, scales: TensorEntry | None, expected: tuple[int, ...]
) -> tuple[int, ...]:
    """Return the shape of a matrix when unpacked to the expected number of columns.

    Raises:
        ModelError: MLX does not have the quantisation.
    """
    if scales is None or not entry.shape:
        return entry.shape
    columns = expected[-1]
    bits, rest = divmod(32 * entry.shape[-1], columns)
    groups = scales.shape[-1] if scales.shape else 0
    is_known = (
        entry.dtype == "U32"
        and not rest
        and bits in BITS
        and scales.shape[:-1] == entry.shape[:-1]
        and groups > 0
        and columns % groups == 0
        and columns // groups in GROUPS
    )
    if not is_known:
        raise ModelError(
            f"[checkpoint] {entry.file}: expected {entry.name!r} to be {columns} "
            f"columns in one of MLX's quantisations but got {entry.dtype} "
            f"{list(entry.shape)} with scales {list(scales.shape)}"
        )
    return (*entry.shape[:-1], columns)


def _check_quantization(config: Configuration, fields: Mapping[str, Any]) -> None:
    """Raise for quantisation tables with which mlx-lm would divide by zero."""
    table = fields.get("quantization")
    if table is None:
        table = fields.get("quantization_config") or config.fields.get(
            "quantization_config"
        )
        if table is None or table is False:
            return
        if not isinstance(table, dict) or "quant_method" not in table:
            raise config.wrong("quantization_config", "of a quant_method", table)
        return
    if not isinstance(table, dict):
        raise config.wrong("quantization", "an object", table)
    for key in ("bits", "group_size"):
        if key not in table:
            raise config.wrong("quantization", f"an object with {key}", table)
    _check_form(config, "quantization", table)
    for path, form in table.items():
        if isinstance(form, dict):
            _check_form(config, f"quantization[{path!r}]", form)


def _check_form(config: Configuration, key: str, form: Mapping[str, Any]) -> None:
    for name, choices in (("bits", BITS), ("group_size", GROUPS), ("mode", MODES)):
        value = form.get(name)
        if value is not None and (
            type(value) not in (int, str) or value not in choices
        ):
            raise config.wrong(f"{key}[{name!r}]", f"one of {choices}", value)
