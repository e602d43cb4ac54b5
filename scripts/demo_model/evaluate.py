"""Measure held-out losses before and after quantisation, and draw samples."""

import argparse
import json
import math
from pathlib import Path

import mlx.core as mx
import numpy as np
import torch
from check_transformers import load_in_transformers
from mlx_lm import generate, load
from mlx_lm.sample_utils import make_sampler

from .model import held_out_loss, load_checkpoint
from .settings import TEXT_CONFIG, write_json

SAMPLE_PROMPTS = [
    ("text", "def "),
    ("text", 'def parse_header(line):\n    """'),
    ("chat", "Write a Python function. Return True if the path is a directory."),
]


def run(arguments: argparse.Namespace) -> None:
    """Measure held-out losses before and after quantisation, and draw samples."""
    build = arguments.build
    settings = json.loads((arguments.checkpoint / "training.json").read_text())
    row_tokens = int(settings["arguments"]["row_tokens"])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    quantised = load_in_transformers(arguments.model).to(device)
    original = load_checkpoint(arguments.checkpoint).to(device)
    facts = {
        "row_tokens": row_tokens,
        "max_rows": arguments.max_rows,
        "before": losses(original, build, row_tokens, arguments.max_rows),
        "after": losses(quantised, build, row_tokens, arguments.max_rows),
        "expert_shares": expert_shares(
            quantised, np.load(build / "held_out_library.npy")
        ),
        "samples": samples(arguments.model),
    }
    write_json(build / "evaluation.json", facts)
    print(json.dumps(facts, indent=2))


def losses(
    model, build: Path, row_tokens: int, max_rows: int
) -> dict[str, dict[str, float]]:
    """Measure both held-out parts in nats per token and bits per byte."""
    facts = json.loads((build / "corpus.json").read_text())["parts"]
    found = {}
    for part in ("held_out_library", "held_out_tests"):
        tokens = np.load(build / f"{part}.npy")
        nats = held_out_loss(model, tokens, row_tokens, max_rows, mixed=False)
        tokens_per_byte = facts[part]["tokens"] / facts[part]["bytes"]
        bits = nats / math.log(2) * tokens_per_byte
        found[part] = {"nats_per_token": nats, "bits_per_byte": bits}
    return found


def expert_shares(model, tokens: np.ndarray) -> dict[str, float]:
    """Return the smallest and largest share of one expert in one layer's choices."""
    device = next(model.parameters()).device
    rows = torch.from_numpy(tokens[: 16 * 512].astype(np.int64)).view(16, 512)
    with torch.no_grad():
        outputs = model(rows.to(device), use_cache=False, output_router_logits=True)
    shares = []
    for logits in outputs.router_logits:
        chosen = logits.topk(TEXT_CONFIG["num_experts_per_tok"], dim=-1).indices
        counts = torch.bincount(chosen.flatten(), minlength=logits.shape[-1])
        shares += (counts / chosen.numel()).tolist()
    return {"smallest": min(shares), "largest": max(shares)}


def samples(folder: Path) -> list[dict[str, str]]:
    """Return stock mlx-lm's continuations of fixed prompts at temperature 0.5."""
    model, tokenizer = load(str(folder))
    model.set_dtype(mx.float32)
    found = []
    for kind, prompt in SAMPLE_PROMPTS:
        tokens = tokenizer.encode(prompt)
        if kind == "chat":
            turns = [{"role": "user", "content": prompt}]
            tokens = tokenizer.apply_chat_template(turns, add_generation_prompt=True)
        mx.random.seed(1)
        sampler = make_sampler(temp=0.5, top_p=0.9)
        text = generate(model, tokenizer, tokens, max_tokens=90, sampler=sampler)
        found.append({"kind": kind, "prompt": prompt, "text": text})
    return found
