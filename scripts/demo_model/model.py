"""The model in PyTorch: build it, measure it, save it, load it."""

import shutil
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as functional
from huggingface_hub import save_torch_state_dict
from safetensors.torch import load_file
from transformers import Qwen3_5MoeForCausalLM, Qwen3_5MoeTextConfig

from .settings import TEXT_CONFIG, write_json


def build_model(device: str):
    """Build the randomly initialised model in float32."""
    torch.manual_seed(0)
    config = Qwen3_5MoeTextConfig(**TEXT_CONFIG, use_cache=False)
    return Qwen3_5MoeForCausalLM(config).to(device)


def parameter_counts(model) -> dict[str, int]:
    """Count all parameters and those one token uses (one embedding row, top-k)."""
    total = active = 0
    share = TEXT_CONFIG["num_experts_per_tok"] / TEXT_CONFIG["num_experts"]
    for name, value in model.named_parameters():
        total += value.numel()
        if ".experts." in name:
            active += round(value.numel() * share)
        elif "embed_tokens" in name:
            active += value.shape[1]
        else:
            active += value.numel()
    return {"total": total, "active": active}


def next_token_loss(logits, targets, reduction: str = "mean"):
    """Return the cross entropy in nats."""
    return functional.cross_entropy(
        logits.float().flatten(0, 1), targets.flatten(), reduction=reduction
    )


def held_out_loss(
    model, tokens: np.ndarray, row_tokens: int, max_rows: int = 0, mixed: bool = True
) -> float:
    """Return nats per token over the stream, cut into independent rows.

    At most `max_rows` rows, spread evenly over the stream, are measured; 0 means all.
    On a GPU `mixed` computes in bfloat16 where training does.
    """
    device = next(model.parameters()).device
    n_rows = (len(tokens) - 1) // row_tokens
    stream = torch.from_numpy(tokens.astype(np.int64))
    inputs = stream[: n_rows * row_tokens].view(n_rows, row_tokens)
    targets = stream[1 : n_rows * row_tokens + 1].view(n_rows, row_tokens)
    if 0 < max_rows < n_rows:
        chosen = np.linspace(0, n_rows - 1, max_rows).astype(np.int64)
        inputs, targets, n_rows = inputs[chosen], targets[chosen], max_rows
    total = 0.0
    mixed = mixed and device.type == "cuda"
    model.eval()
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=mixed):
        for first in range(0, n_rows, 32):
            few = slice(first, first + 32)
            logits = model(inputs[few].to(device), use_cache=False).logits
            total += next_token_loss(logits, targets[few].to(device), "sum").item()
    model.train()
    return total / (n_rows * row_tokens)


def save_checkpoint(model, tokenizer_folder: Path, folder: Path) -> None:
    """Save a Hugging Face checkpoint in bfloat16 shards, A_log in float32."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {
        name: value.to(torch.float32 if name.endswith("A_log") else torch.bfloat16)
        for name, value in model.state_dict().items()
    }
    save_torch_state_dict(state, folder, max_shard_size="14MB", metadata={})
    config = {
        "architectures": ["Qwen3_5MoeForCausalLM"],
        "model_type": "qwen3_5_moe",
        "dtype": "bfloat16",
        "eos_token_id": TEXT_CONFIG["eos_token_id"],
        "pad_token_id": TEXT_CONFIG["pad_token_id"],
        "tie_word_embeddings": TEXT_CONFIG["tie_word_embeddings"],
        "text_config": TEXT_CONFIG
        | {
            "model_type": "qwen3_5_moe_text",
            "dtype": "bfloat16",
            "full_attention_interval": 4,
            "hidden_act": "silu",
            "attention_bias": False,
            "norm_topk_prob": True,
        },
    }
    write_json(folder / "config.json", config)
    generation = {"eos_token_id": [0, 2], "pad_token_id": 0, "do_sample": True}
    write_json(folder / "generation_config.json", generation)
    for file in tokenizer_folder.iterdir():
        shutil.copy(file, folder)


def load_checkpoint(folder: Path):
    """Load the unquantised checkpoint's bfloat16 weights, computing in float32."""
    state = {}
    for shard in sorted(folder.glob("*.safetensors")):
        state |= {name: value.float() for name, value in load_file(shard).items()}
    model = build_model("cpu")
    model.load_state_dict(state)
    return model
