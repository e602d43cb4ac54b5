"""Hold a configuration against the tensors it is of, before anything is built of it."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from ...errors import ModelError
from .checkpoint import is_used
from .safetensors import TensorEntry

# The forms that MLX can store a matrix in; None takes the mode's own.
BITS = (1, 2, 3, 4, 5, 6, 8)
GROUPS = (16, 32, 64, 128)
MODES = ("affine", "mxfp4", "mxfp8", "nvfp4")
LARGEST, LARGEST_FLOAT = 2**31 - 1, 1e30
# How checkpoints name the text model, in any order.
PREFIX = re.compile(r"(?:language_model\.|model\.)*")

# A tensor's name below the text model, and its shape as it is once unpacked.
Expected = tuple[str, tuple[int, ...]]


class Configuration:
    """The text part of a ``config.json``, whose checks name the file and the key."""

    def __init__(self, path: Path, fields: Mapping[str, Any]):
        self.path = path
        nested = fields.get("text_config", fields)
        if not isinstance(nested, dict):
            raise self.wrong("text_config", "an object", nested)
        self.fields = nested
        _check_quantization(self, fields)

    def wrong(self, key: str, expected: str, got: object) -> ModelError:
        """Return the error that a key has an unusable value."""
        shown = repr(got)
        shown = shown if len(shown) <= 80 else f"{shown[:77]}..."
        return ModelError(
            f"[{self.path}] expected {key} to be {expected} but got {shown}"
        )

    def check_given(self, args_type: type) -> None:
        """Refuse a configuration without the entries that mlx-lm's class requires.

        Raises:
            ModelError: a key is missing; names it.
        """
        for each in dataclasses.fields(args_type):
            missing = dataclasses.MISSING
            is_needed = each.default is missing and each.default_factory is missing
            if is_needed and each.name not in self.fields:
                raise ModelError(
                    f"[{self.path}] expected {each.name} but there is none: add it, as "
                    "the model's publisher has it"
                )

    def check_counts(self, keys: Iterable[str]) -> None:
        """Refuse values that are no count; absent keys have the model's own default."""
        for key in keys:
            value = self.fields.get(key, 1)
            if type(value) is not int or not 1 <= value <= LARGEST:
                raise self.wrong(key, "a positive whole number", value)

    def check_number(
        self, key: str, value: Any, most: float = LARGEST_FLOAT, *, zero: bool = False
    ) -> None:
        """Refuse all but positive numbers up to ``most``; ``zero`` may be allowed."""
        is_number = type(value) in (int, float) and 0 <= value <= most
        if not is_number or not (value or zero):
            sign = "number of 0 or more" if zero else "positive number"
            raise self.wrong(key, f"a {sign} up to {most:g}", value)

    def check_indices(self, key: str) -> None:
        """Refuse a value that is no list of whole numbers."""
        value = self.fields[key]
        numbers = isinstance(value, list) and all(type(n) is int for n in value)
        if not numbers:
            raise self.wrong(key, "a list of whole numbers", value)

    def check_multiple(self, key: str, value: int, of: str, divisor: int) -> None:
        """Refuse a count that another one does not divide."""
        if value % divisor:
            raise self.wrong(key, f"a multiple of {of} ({divisor})", value)


def counts_of(args_type: type) -> list[str]:
    """Return the keys of a configuration class that are whole numbers."""
    fields = dataclasses.fields(args_type)
    return [f.name for f in fields if f.type in (int, "int")]


def check_tensors(
    config: Configuration,
    tensors: Mapping[str, TensorEntry],
    expected: Iterable[Expected],
    optional: Collection[str] = (),
) -> str | None:
    """Hold tensors against the shapes that a configuration gives them.

    Args:
        tensors: by their names in files.
        expected: names below the text model, whatever files put before them.
        optional: parts of names that files may leave out.

    Returns:
        The first name that no file has, if there is one.

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
    """Return the shape of a matrix once it is unpacked to the expected columns.

    Raises:
        ModelError: it is quantised in a way that MLX does not have.
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
    """Refuse tables that mlx-lm would follow to a division by zero."""
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
