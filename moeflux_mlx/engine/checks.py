"""Checks of a family's configuration, before anything is built."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import mlx.nn as nn
from mlx_lm.models.rope_utils import initialize_rope

from ..errors import ModelError
from ..experts.files.configuration import Configuration, check_tensors, counts_of
from ..experts.files.safetensors import TensorEntry
from .blocks import ROUTED
from .layer import LayerForm, expected_tensors
from .rotation import rotation


def read_arguments(
    config: Configuration,
    args_type: Any,
    *,
    unused: Collection[str] = (),
    optional: Iterable[str] = (),
    indices: Iterable[str] = (),
) -> Any:
    """Return mlx-lm's arguments of a configuration, once its counts are valid.

    Args:
        args_type: mlx-lm's class of arguments.
        unused: integers that may have any value.
        optional: counts that may be null or absent.
        indices: keys of lists of integers.

    Raises:
        ModelError: an entry is missing or invalid; names the key.
    """
    config.check_given(args_type)
    config.check_counts(key for key in counts_of(args_type) if key not in unused)
    config.check_counts(k for k in optional if config.fields.get(k) is not None)
    for key in indices:
        config.check_indices(key)
    return args_type.from_dict(copy.deepcopy(config.fields))


def missing_tensor(
    config: Configuration,
    tensors: Mapping[str, TensorEntry],
    args: Any,
    forms: Iterable[LayerForm],
    routed: str = ROUTED,
) -> str | None:
    """Return a tensor of the forms that no file has, if there is one.

    Args:
        tensors: a checkpoint's tensors by name.
        args: mlx-lm's arguments of the text model.
        routed: the name of experts, which files may store in another form.

    Raises:
        ModelError: a tensor has another shape.
    """
    expected = expected_tensors(args, forms)
    return check_tensors(config, tensors, expected, optional=(routed,))


def lacks_of_yarn(config: Mapping[str, Any]) -> str | None:
    """Return the key of YaRN in which mlx-lm differs from transformers, if any."""
    scaling = config.get("rope_scaling") or {}
    if not isinstance(scaling, dict):
        return "rope_scaling"
    kind = scaling.get("type") or scaling.get("rope_type", "default")
    mscales = [bool(scaling.get(key)) for key in ("mscale", "mscale_all_dim")]
    if kind == "default":
        return "mscale_all_dim without YaRN" if any(mscales) else None
    if kind != "yarn":
        return "rope_scaling"
    # mlx-lm has one default for a missing entry, transformers another.
    if "original_max_position_embeddings" not in scaling:
        return "YaRN without original_max_position_embeddings"
    if mscales[0] != mscales[1]:
        return "YaRN with one mscale"
    if scaling.get("attention_factor") is not None:
        return "attention_factor"
    return "truncate" if scaling.get("truncate") is False else None


def lacks_of_rope(
    config: Mapping[str, Any],
    keys: Iterable[str] = ("rope_scaling", "rope_parameters"),
) -> str | None:
    """Return the key of rotary positions other than mlx-lm's plain ones, if any."""
    for key in keys:
        found = config.get(key) or {}
        named = isinstance(found, dict)
        kinds = {found[k] for k in ("type", "rope_type") if k in found} if named else {}
        if not named or not {"default"}.issuperset(kinds):
            return key
    return None


def check_numbers(
    config: Configuration,
    args: Any,
    experts_key: str = "num_experts",
    *,
    grouped: bool = True,
) -> None:
    """Refuse invalid numbers of a text model that no shape of a weight confirms.

    Args:
        args: mlx-lm's arguments, made of the configuration.
        experts_key: the key of the number of experts.
        grouped: several query heads share a key head.

    Raises:
        ModelError: a number is invalid; names the key.
    """
    if args.max_position_embeddings is not None:
        config.check_number("max_position_embeddings", args.max_position_embeddings)
    config.check_number("rms_norm_eps", args.rms_norm_eps, zero=True)
    config.check_number("rope_theta", args.rope_theta)
    n_experts = getattr(args, experts_key)
    if not 1 <= args.num_experts_per_tok <= n_experts:
        expected = f"from 1 to {experts_key} ({n_experts})"
        raise config.wrong("num_experts_per_tok", expected, args.num_experts_per_tok)
    if grouped:
        heads = "num_attention_heads", "num_key_value_heads"
        check_shared_heads(config, args, *heads)


def check_rope(
    config: Configuration,
    key: str,
    make: Callable[[], nn.Module],
    *,
    pairs: bool = False,
) -> None:
    """Refuse rotary positions that kernels cannot compute.

    Args:
        key: the configuration's key of their type.
        make: makes mlx-lm's module of them.
        pairs: as in ``rotation``.

    Raises:
        ModelError: they depend on the length, or mlx-lm lacks their type.
    """
    try:
        rotation(make(), pairs=pairs)
    except (ModelError, RuntimeError, MemoryError):
        # The device failed, not the configuration.
        raise
    except Exception as error:
        known = "those of a rope_type that mlx-lm has"
        told = f"{type(error).__name__}: {error}"
        raise config.wrong(key, known, told) from error


def check_shared_heads(
    config: Configuration, args: Any, heads: str, kv_heads: str
) -> None:
    """Raise ModelError unless heads are a multiple of the heads that they share."""
    config.check_multiple(
        heads, getattr(args, heads), kv_heads, getattr(args, kv_heads)
    )


def check_partial_rope(config: Configuration, args: Any, key: str) -> None:
    """Refuse invalid rotary positions of a part of each head's channels.

    Args:
        args: mlx-lm's arguments, made of the configuration.
        key: the configuration's key of their type.

    Raises:
        ModelError: the part is no share of a head, or ``check_rope`` refuses them.
    """
    share, longest = args.partial_rotary_factor, args.max_position_embeddings
    config.check_number("partial_rotary_factor", share, 1)
    scaling = copy.deepcopy(args.rope_scaling)
    how = int(args.head_dim * share), args.rope_theta, False, scaling, longest
    check_rope(config, key, lambda: initialize_rope(*how))
