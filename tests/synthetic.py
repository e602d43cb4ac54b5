"""Make checkpoints of stacked experts alone, in any form, for the expert store."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import mlx.core as mx
import numpy as np

from moeflux_mlx.experts.files.packed import PackedExperts
from moeflux_mlx.experts.files.safetensors import read_header
from moeflux_mlx.experts.weights import Quantization, Weight

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
AFFINE = Quantization(4, 32)

# One form for all projections, or one for each; None is dense.
Form = Mapping[str, Quantization | None] | Quantization | None


def write_checkpoint(
    path: Path,
    *,
    n_layers: int = 3,
    n_experts: int = 5,
    top_k: int = 2,
    hidden: int = 64,
    inner: int = 96,
    quantization: Form | list[Form] = AFFINE,
    dtype: mx.Dtype = mx.float32,
    n_shards: int = 1,
    seed: int = 0,
) -> Path:
    """Write random experts as mlx-lm does, and one resident tensor.

    A list in ``quantization`` gives a form for each layer.
    """
    mx.random.seed(seed)
    path.mkdir(parents=True)
    tensors = {"model.norm.weight": mx.random.normal((hidden,)).astype(dtype)}
    table: dict = {"group_size": 32, "bits": 4}
    for layer in range(n_layers):
        form = quantization[layer] if isinstance(quantization, list) else quantization
        for name in PROJECTIONS:
            q = form[name] if isinstance(form, Mapping) else form
            shape = (hidden, inner) if name == "down_proj" else (inner, hidden)
            stem = f"model.layers.{layer}.mlp.switch_mlp.{name}"
            dense = mx.random.normal((n_experts, *shape)).astype(dtype)
            for part, tensor in quantize(dense, q).items():
                tensors[f"{stem}.{part}"] = tensor
            if q is not None:
                table[stem] = vars(q)
    write_shards(path, tensors, n_shards)
    config = {
        "model_type": "qwen3_5_moe",
        "num_hidden_layers": n_layers,
        "num_experts": n_experts,
        "num_experts_per_tok": top_k,
        "quantization": table,
    }
    (path / "config.json").write_text(json.dumps(config))
    return path


def quantize(dense: mx.array, q: Quantization | None) -> dict[str, mx.array]:
    """Return the stored parts of a stack of matrices."""
    if q is None:
        return {"weight": dense}
    arrays = mx.quantize(dense, q.group_size, q.bits, mode=q.mode)
    return dict(zip(("weight", "scales", "biases"), arrays, strict=False))


def write_shards(path: Path, tensors: dict[str, mx.array], n_shards: int) -> None:
    """Write tensors into one file, or into several with an index."""
    if n_shards == 1:
        mx.save_safetensors(str(path / "model.safetensors"), tensors, {"format": "mlx"})
        return
    weight_map = {}
    for shard in range(n_shards):
        name = f"model-{shard + 1:05d}-of-{n_shards:05d}.safetensors"
        part = {k: tensors[k] for k in list(tensors)[shard::n_shards]}
        mx.save_safetensors(str(path / name), part, {"format": "mlx"})
        weight_map.update(dict.fromkeys(part, name))
    index = json.dumps({"metadata": {}, "weight_map": weight_map})
    (path / "model.safetensors.index.json").write_text(index)


def expert_bytes(checkpoint: Path, layer: int, expert: int) -> dict[str, bytes]:
    """Return the bytes of one expert's tensors, ``gate_proj.weight`` and so on."""
    found = {}
    for path in checkpoint.glob("model*.safetensors"):
        data = path.read_bytes()
        for name, entry in read_header(path).items():
            if f".layers.{layer}.mlp.switch_mlp." in name:
                n_bytes = entry.n_bytes // entry.shape[0]
                start = entry.offset + expert * n_bytes
                key = name.split(".switch_mlp.")[1]
                found[key] = data[start : start + n_bytes]
    return found


def slot_bytes(weight: Weight, slot: int) -> dict[str, bytes]:
    """Return a slot's arrays of one projection, by their names."""
    parts = {"weight": weight.w, "scales": weight.scales, "biases": weight.biases}
    return {
        part: np.array(array[slot].flatten().view(mx.uint8)).tobytes()
        for part, array in parts.items()
        if array is not None
    }


def record_bytes(store: PackedExperts, layer: int, expert: int) -> dict[str, bytes]:
    """Return one expert's tensors as they lie in the expert file."""
    data = store.path(layer).read_bytes()[store.offset(layer, expert) :]
    return {
        f"{t.projection}.{t.part}": data[t.offset : t.offset + t.n_bytes]
        for t in store.layout(layer).tensors
    }
