"""Published models as sparse files, with their shapes and sizes but without data.

Usage: scripts/real_sizes.py [--macs] [NAME ...]

Print the results of ``moeflux inspect --memory 32GB`` as Markdown tables or, with
``--macs``, the README's table of models that fit Macs. The configurations are those of
the published ``config.json`` files. Tensors have the names, shapes and types of
mlx-lm's converter at 4 bits; gpt-oss has its own mxfp4.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.utils import _get_classes

from moeflux_mlx.cli.inspect import ModelSummary, summarize
from moeflux_mlx.errors import BudgetError
from moeflux_mlx.experts.files.safetensors import TensorEntry, header_bytes
from moeflux_mlx.experts.weights import DTYPE_NAMES
from moeflux_mlx.loading import plan_load
from moeflux_mlx.memory import plan as plans
from moeflux_mlx.memory.plan import MemoryPlan

MEMORY = "32GB"
AFFINE = {"group_size": 64, "bits": 4, "mode": "affine"}
MXFP4 = {"group_size": 32, "bits": 4, "mode": "mxfp4"}
DEEPSEEK_V3 = {
    "model_type": "deepseek_v3",
    "vocab_size": 129280,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "n_shared_experts": 1,
    "n_routed_experts": 256,
    "num_experts_per_tok": 8,
    "routed_scaling_factor": 2.5,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "norm_topk_prob": True,
    "n_group": 8,
    "topk_group": 4,
    "first_k_dense_replace": 3,
    "moe_layer_freq": 1,
    "max_position_embeddings": 163840,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "attention_bias": False,
}
MODELS: dict[str, dict[str, Any]] = {
    "Qwen3-30B-A3B": {
        "model_type": "qwen3_moe",
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "norm_topk_prob": True,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "max_position_embeddings": 40960,
        "tie_word_embeddings": False,
    },
    "Qwen3-Next-80B-A3B": {
        "model_type": "qwen3_next",
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 5120,
        "moe_intermediate_size": 512,
        "shared_expert_intermediate_size": 512,
        "num_hidden_layers": 48,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "head_dim": 256,
        "num_experts": 512,
        "num_experts_per_tok": 10,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "norm_topk_prob": True,
        "linear_num_value_heads": 32,
        "linear_num_key_heads": 16,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "linear_conv_kernel_dim": 4,
        "full_attention_interval": 4,
        "partial_rotary_factor": 0.25,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e7,
        "max_position_embeddings": 262144,
        "tie_word_embeddings": False,
    },
    "gpt-oss-120b": {
        "model_type": "gpt_oss",
        "vocab_size": 201088,
        "hidden_size": 2880,
        "intermediate_size": 2880,
        "num_hidden_layers": 36,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "num_local_experts": 128,
        "num_experts_per_tok": 4,
        "sliding_window": 128,
        "layer_types": ["sliding_attention", "full_attention"] * 18,
        "rms_norm_eps": 1e-5,
        "rope_theta": 150000,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 32.0,
            "original_max_position_embeddings": 4096,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            # The published value is False, which mlx-lm's class gets wrong.
            "truncate": True,
        },
        "max_position_embeddings": 131072,
        "quantization": MXFP4,
    },
    "GLM-4.5-Air": {
        "model_type": "glm4_moe",
        "vocab_size": 151552,
        "hidden_size": 4096,
        "intermediate_size": 10944,
        "moe_intermediate_size": 1408,
        "num_hidden_layers": 46,
        "num_attention_heads": 96,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "n_routed_experts": 128,
        "n_shared_experts": 1,
        "num_experts_per_tok": 8,
        "first_k_dense_replace": 1,
        "routed_scaling_factor": 1.0,
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": True,
        "use_qk_norm": False,
        "attention_bias": True,
        "partial_rotary_factor": 0.5,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        "rope_scaling": None,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": False,
    },
    "DeepSeek-V3": DEEPSEEK_V3,
    "Kimi-K2": {
        **DEEPSEEK_V3,
        "model_type": "kimi_k2",
        "vocab_size": 163840,
        "num_attention_heads": 64,
        "num_key_value_heads": 64,
        "n_routed_experts": 384,
        "routed_scaling_factor": 2.827,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "max_position_embeddings": 131072,
        "rope_theta": 50000.0,
    },
    "MiniMax-M2": {
        "model_type": "minimax_m2",
        "vocab_size": 200064,
        "hidden_size": 3072,
        "intermediate_size": 1536,
        "num_hidden_layers": 62,
        "num_attention_heads": 48,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "rotary_dim": 64,
        "num_local_experts": 256,
        "num_experts_per_tok": 8,
        "shared_intermediate_size": 0,
        "scoring_func": "sigmoid",
        "use_qk_norm": True,
        "rms_norm_eps": 1e-6,
        "rope_theta": 5e6,
        "max_position_embeddings": 196608,
        "tie_word_embeddings": False,
    },
}


def write_sparse(path: Path, name: str) -> int:
    """Write a model's directory and return its number of parameters."""
    config = {"quantization": AFFINE, **MODELS[name]}
    model_class, arguments = _get_classes(config)
    model = model_class(arguments.from_dict(config))
    n_parameters = sum(array.size for _, array in tree_flatten(model.parameters()))
    quantize(model, config["quantization"], model)
    entries, offset = [], 0
    file = path / "model.safetensors"
    for parameter, array in tree_flatten(model.parameters()):
        dtype = mx.bfloat16 if array.dtype == mx.float32 else array.dtype
        n_bytes = array.size * dtype.size
        shape, kind = tuple(array.shape), DTYPE_NAMES[dtype]
        entries.append(TensorEntry(file, parameter, kind, shape, offset, n_bytes))
        offset += n_bytes
    header = header_bytes(entries)
    file.write_bytes(header)
    os.truncate(file, len(header) + offset)
    (path / "config.json").write_text(json.dumps(config))
    return n_parameters


def quantize(model: nn.Module, form: dict[str, Any], stock: nn.Module) -> None:
    """Quantise as published: mxfp4 for experts only, else as stock's class allows."""
    allowed = getattr(stock, "quant_predicate", None) or (lambda path, module: True)

    def predicate(path: str, module: nn.Module) -> Any:
        if not hasattr(module, "to_quantized"):
            return False
        if module.weight.shape[-1] % form["group_size"]:
            return False
        if form["mode"] == "mxfp4":
            return ".experts." in path
        return allowed(path, module)

    nn.quantize(model, **form, class_predicate=predicate)


def line(name: str, summary: ModelSummary, n_parameters: int) -> str:
    """Return a row of the table."""
    cells = [
        name,
        f"{n_parameters / 1e9:.1f} B",
        f"{summary.n_moe_layers} x {summary.n_experts}, {summary.top_k} a token",
        f"{summary.resident_bytes / 1e9:.2f} GB",
        f"{summary.expert_bytes / 1e9:.1f} GB",
        f"{summary.bytes_per_expert / 1e6:.2f} MB",
        f"{summary.token_bytes / 1e9:.2f} GB",
    ]
    return f"| {' | '.join(cells)} |\n"


def plan_line(name: str, plan: MemoryPlan) -> str:
    """Return a row of the table of plans."""
    cells = [
        name,
        f"{plan.resident_bytes / 1e9:.2f} GB",
        f"{plan.cache_bytes / 1e6:.0f} MB",
        f"{plan.scratch_bytes / 1e9:.2f} GB",
        f"{plan.expert_bytes / 1e9:.1f} GB",
        f"{plan.n_slots} of {plan.n_experts}",
        f"{plan.context_tokens}",
    ]
    return f"| {' | '.join(cells)} |\n"


TABLE = """
## Published sizes

`moeflux inspect` gives these figures for sparse files with the models' published shapes
at 4 bits in groups of 64 (gpt-oss: experts in mxfp4, all else in bfloat16), which
`scripts/real_sizes.py` writes. *Cold* is the number of bytes that a token reads if no
expert is in memory.

| model | parameters | experts | resident | experts' bytes | one expert | cold |
|---|---|---|---|---|---|---|
"""
PLANS = f"""
`moeflux inspect --memory {MEMORY} DIR` makes this plan for them on a CPU: weights,
caches of the first 256 tokens, scratch memory for a prompt of 2048, and experts in the
rest. It uses headers and `config.json` and reads no matrix. *Context* is the number of
tokens for which one sequence has room when experts are released for its cache.

| model | weights | caches | scratch | experts | experts in memory | context |
|---|---|---|---|---|---|---|
"""


# Memory of Macs in GB, and the share of it that the table gives to a process. macOS and
# other programs take the rest; Metal recommends a similar share.
MACS = (8, 16, 24, 32, 48, 64, 96, 128)
MAC_SHARE = 2 / 3
# Memory of Python, MLX and this package. A fixed number, because measurements vary.
PROCESS_BYTES = 500 << 20


def mac_table(names: list[str]) -> str:
    """Return a Markdown table of the share of experts that each Mac holds."""
    head = "".join(f" {n} GB |" for n in MACS)
    lines = [
        f"| model at 4 bits | on disk |{head}\n| --- |{' ---: |' * (len(MACS) + 1)}"
    ]
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            write_sparse(Path(folder), name)
            n_bytes = sum(file.stat().st_size for file in Path(folder).iterdir())
            cells = [held(folder, round(n * 1e9 * MAC_SHARE)) for n in MACS]
        lines.append(f"| {' | '.join([name, f'{n_bytes / 1e9:.0f} GB', *cells])} |")
    return "\n".join(lines) + "\n"


def held(folder: str, memory: int) -> str:
    """Return the share of experts in the plan for a Mac, or "no".

    The plan is the package's plan for a GPU, on which matrices are not unpacked.
    """
    with (
        mock.patch.object(plans, "own_bytes", lambda: PROCESS_BYTES),
        mock.patch.object(plans, "affords_unpacked", lambda *_: False),
    ):
        try:
            plan = plan_load(folder, memory)
        except BudgetError:
            return "no"
    share = plan.n_slots / plan.n_experts
    return "all" if share == 1 else f"{share:.0%}"


def table(names: list[str]) -> str:
    """Return the tables of the named models as Markdown."""
    rows, plans = [], []
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            n_parameters = write_sparse(Path(folder), name)
            rows.append(line(name, summarize(Path(folder)), n_parameters))
            plans.append(plan_line(name, plan_load(folder, MEMORY)))
    return TABLE + "".join(rows) + PLANS + "".join(plans)


if __name__ == "__main__":
    mx.set_default_device(mx.cpu)
    asked = [name for name in sys.argv[1:] if name != "--macs"] or [*MODELS]
    print(mac_table(asked) if "--macs" in sys.argv else table(asked))
