"""Make checkpoints with large experts that take neither time nor disk space."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.models import qwen3_5_moe
from mlx_lm.utils import save_config
from tiny import TEXT_CONFIG, write_tokenizer

GROUP, BITS = 64, 4


def make_sparse_checkpoint(path: Path, **overrides: int) -> int:
    """Write a random 4-bit checkpoint; return the bytes of its experts.

    The experts' packed values are a hole in the file, so all are zero: an expert's
    output comes from its random biases.
    """
    text = {**TEXT_CONFIG, **overrides}
    config = {
        "model_type": "qwen3_5_moe",
        "architectures": ["Qwen3_5MoeForCausalLM"],
        "text_config": text,
        "eos_token_id": 0,
        "quantization": {"group_size": GROUP, "bits": BITS},
    }
    mx.random.seed(3)
    # Experts stay lazy: they are written below.
    model = qwen3_5_moe.Model(qwen3_5_moe.ModelArgs.from_dict(config))
    nn.quantize(
        model, GROUP, BITS, class_predicate=lambda p, m: hasattr(m, "to_quantized")
    )
    path.mkdir(parents=True)
    resident = {
        name: array.astype(mx.float32) if array.dtype != mx.uint32 else array
        for name, array in tree_flatten(model.parameters())
        if "switch_mlp" not in name
    }
    mx.save_safetensors(str(path / "model-resident.safetensors"), resident)
    n_bytes = _write_experts(path / "model-experts.safetensors", text)
    save_config(config, path / "config.json")
    write_tokenizer(path, text["vocab_size"])
    return n_bytes


def _write_experts(path: Path, text: dict) -> int:
    dim, width = text["hidden_size"], text["moe_intermediate_size"]
    shapes = {"gate_proj": (width, dim), "up_proj": (width, dim)}
    shapes["down_proj"] = (dim, width)
    header, offset = {}, 0
    for layer in range(text["num_hidden_layers"]):
        for projection, (n_out, n_in) in shapes.items():
            prefix = f"language_model.model.layers.{layer}.mlp.switch_mlp.{projection}"
            for part, dtype, n_columns, itemsize in (
                ("weight", "U32", n_in * BITS // 32, 4),
                ("scales", "BF16", n_in // GROUP, 2),
                ("biases", "BF16", n_in // GROUP, 2),
            ):
                shape = [text["num_experts"], n_out, n_columns]
                end = offset + int(np.prod(shape)) * itemsize
                header[f"{prefix}.{part}"] = {
                    "dtype": dtype,
                    "shape": shape,
                    "data_offsets": [offset, end],
                }
                offset = end
    encoded = json.dumps(header).encode()
    noise = np.random.default_rng(7).normal(0, 0.3, 1 << 20).astype(np.float32)
    bits = (noise.view(np.uint32) >> 16).astype(np.uint16).tobytes()
    with open(path, "wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        start = file.tell()
        for i, entry in enumerate(header.values()):
            begin, end = entry["data_offsets"]
            if entry["dtype"] == "BF16":
                file.seek(start + begin)
                # Tensors start at different offsets of the noise, so no two are equal.
                shifted = bits[2 * i :] + bits[: 2 * i]
                n_bytes = end - begin
                file.write((shifted * (n_bytes // len(bits) + 1))[:n_bytes])
        file.truncate(start + offset)
    return offset
