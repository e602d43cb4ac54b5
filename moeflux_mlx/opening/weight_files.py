"""Check a model's files before building the model, and choose its weights."""

from __future__ import annotations

import contextlib
import copy
import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..engine.blocks import ROUTED
from ..errors import ModelError
from ..experts.files.checkpoint import Checkpoint
from ..experts.files.checkpoint_store import CheckpointExperts, find_routed
from ..experts.files.configuration import Configuration
from ..experts.files.packed import is_packed
from ..experts.files.routed import RoutedLayer, refuse_floats_of_8_bits
from ..experts.files.safetensors import load_arrays
from ..experts.files.store import ExpertStore

# Maps the weights that mlx-lm read from files to those of the model.
Reads = Callable[[dict[str, mx.array]], dict[str, mx.array]]


def read_weights(
    path: Path, changes: dict[str, Any], store: ExpertStore | None
) -> Reads:
    """Check a model's files and configuration; return a function that maps weights.

    Args:
        changes: entries that replace those of ``config.json``.
        store: the open experts, if they are streamed.

    Raises:
        ModelError: a file is missing or damaged, or the configuration does not match
            the tensors.
    """
    with _opened(path, store) as checkpoint:
        fields = {**copy.deepcopy(checkpoint.config), **changes}
        check_model(checkpoint, fields)
        name = getattr(model_module(fields.get("model_type")), "ROUTED", ROUTED)
        routed = {}
        if store is None and not is_packed(path):
            routed = find_routed(checkpoint)
        chosen = {n: checkpoint.tensors[n].file for n in checkpoint.twice}

    def reads(weights: dict[str, mx.array]) -> dict[str, mx.array]:
        # For a tensor in several files, mlx-lm keeps that of the last file.
        files = {file: load_arrays(file) for file in set(chosen.values())}
        found = {**weights, **{name: files[f][name] for name, f in chosen.items()}}
        for layer in routed.values():
            if not _is_known_to_mlx_lm(layer, name):
                _stack(found, layer, name)
        return found

    return reads


def check_model(checkpoint: Checkpoint, fields: dict[str, Any]) -> None:
    """Compare a configuration with a checkpoint's tensors.

    Raises:
        ModelError: there is no class for the model type, a value is unusable, or a
            tensor is missing or has another shape.
    """
    module = model_module(fields.get("model_type"))
    refuse_floats_of_8_bits(checkpoint.tensors)
    config = Configuration(checkpoint.directory / "config.json", fields)
    if (name := module.check(config, checkpoint.tensors)) is not None:
        raise checkpoint.missing(f"expected {name!r} but no file has it")


def model_module(model_type: object) -> Any:
    """Return the module with the class of a model type.

    Raises:
        ModelError: moeflux-mlx has no class for this type.
    """
    name = f"moeflux_mlx.models.{model_type}"
    if isinstance(model_type, str) and model_type.isidentifier():
        try:
            module = importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name != name:
                raise
        else:
            if hasattr(module, "Model"):
                return module
    raise ModelError(f"[load] expected a supported model type but got {model_type!r}")


@contextlib.contextmanager
def _opened(path: Path, store: ExpertStore | None) -> Iterator[Checkpoint]:
    """Yield the store's open files, or open them temporarily."""
    if isinstance(store, CheckpointExperts):
        yield store.checkpoint
        return
    with Checkpoint.open(path) as checkpoint:
        yield checkpoint


def _is_known_to_mlx_lm(layer: RoutedLayer, name: str) -> bool:
    """Tell whether mlx-lm renames and splits these tensors itself.

    Args:
        name: mlx-lm's name of the block of routed experts.
    """
    stacked = all(len(t.entries) == 1 and t.stride for t in layer.tensors.values())
    names = {t.entries[0].name for t in layer.tensors.values()}
    plain = layer.path.endswith(f".{name}")
    fused = all(
        name.endswith(("experts.gate_up_proj", "experts.down_proj")) for name in names
    )
    return stacked and (plain or fused)


def _stack(weights: dict[str, mx.array], layer: RoutedLayer, name: str) -> None:
    """Stack the tensors of a layer's experts under mlx-lm's names."""
    stem = layer.path.removesuffix(".experts").removesuffix(".switch_mlp")
    parts = {}
    for (projection, part), tensors in layer.tensors.items():
        arrays = [weights[entry.name] for entry in tensors.entries]
        whole = arrays[0] if tensors.stride else mx.stack(arrays)
        if tensors.is_half:
            first = tensors.first // tensors.n_bytes * tensors.shape[0]
            whole = whole[:, first : first + tensors.shape[0]]
        parts[f"{stem}.{name}.{projection}.{part}"] = whole
    for tensors in layer.tensors.values():
        for entry in tensors.entries:
            weights.pop(entry.name, None)
    weights.update(parts)
