"""Train the model and save its best weights as a Hugging Face checkpoint."""

import argparse
import json
import math
import time

import numpy as np
import torch
import torch.nn.functional as functional

from .model import (
    build_model,
    held_out_loss,
    next_token_loss,
    parameter_counts,
    save_checkpoint,
)
from .settings import TEXT_CONFIG, write_json


def run(arguments: argparse.Namespace) -> None:
    """Train until the step or time budget ends; save the best checkpoint."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_float32_matmul_precision("high")
    model = build_model(device)
    add_dropout(model, arguments.dropout)
    build = arguments.build
    optimiser = optimiser_for(model, arguments.learning_rate, arguments.weight_decay)
    row_tokens = arguments.row_tokens
    stream = np.load(build / "train.npy")
    source = batches(stream, arguments.rows, row_tokens, device)
    record = Record(model, np.load(build / "held_out_library.npy"), row_tokens)
    step, recent = 0, []
    started = next_report = time.monotonic()
    while True:
        seconds = time.monotonic() - started
        done = seconds >= arguments.max_seconds or step >= arguments.max_steps
        if done or time.monotonic() >= next_report:
            means = torch.stack(recent).mean(0).tolist() if recent else [None, None]
            record.report(
                step=step, seconds=round(seconds, 1), train=means[0], balance=means[1]
            )
            recent.clear()
            next_report = time.monotonic() + arguments.report_seconds
        if done:
            break
        progress = max(seconds / arguments.max_seconds, step / arguments.max_steps)
        factor = learning_rate_factor(step, progress, arguments.warm_up_steps)
        for group in optimiser.param_groups:
            group["lr"] = arguments.learning_rate * factor
        recent.append(
            train_step(model, optimiser, next(source), arguments.balance_weight)
        )
        step += 1
    model.load_state_dict(record.best_state)
    save_checkpoint(model, build / "tokenizer", arguments.checkpoint)
    n_tokens = step * arguments.rows * row_tokens
    facts = {
        "arguments": {k: str(v) for k, v in vars(arguments).items() if k != "stage"},
        "steps": step,
        "seconds": round(seconds),
        "tokens": n_tokens,
        "epochs": round(n_tokens / len(stream), 2),
        "parameters": parameter_counts(model),
        "curve": record.curve,
    }
    write_json(arguments.checkpoint / "training.json", facts)


class Record:
    """Follow the held-out loss and keep the best weights."""

    def __init__(self, model, tokens: np.ndarray, row_tokens: int):
        self.model, self.tokens, self.row_tokens = model, tokens, row_tokens
        self.curve: list[dict] = []
        self.best_loss, self.best_state = math.inf, None

    def report(self, **facts) -> None:
        """Measure the held-out loss, print it with the given facts, keep the best."""
        loss = held_out_loss(self.model, self.tokens, self.row_tokens)
        self.curve.append(facts | {"held_out": round(loss, 4)})
        print(json.dumps(self.curve[-1]), flush=True)
        if loss < self.best_loss:
            self.best_loss = loss
            state = self.model.state_dict()
            self.best_state = {name: v.detach().clone() for name, v in state.items()}


def train_step(model, optimiser, batch, balance_weight: float):
    """Make one optimiser step; return the loss and the balance loss."""
    with torch.autocast(batch.device.type, torch.bfloat16):
        outputs = model(
            batch[:, :-1].contiguous(), use_cache=False, output_router_logits=True
        )
        loss = next_token_loss(outputs.logits, batch[:, 1:])
    balance = balance_loss(outputs.router_logits, TEXT_CONFIG["num_experts_per_tok"])
    (loss + balance_weight * balance).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimiser.step()
    optimiser.zero_grad(set_to_none=True)
    return torch.stack([loss.detach(), balance.detach()])


def balance_loss(router_logits, n_chosen: int):
    """Return the mean over layers of n_experts * sum(share * probability).

    It is 1 if all experts are used equally. Each layer has its own loss, because in a
    sum over all layers a busy expert of one layer would hide an idle one of another.
    """
    losses = []
    for logits in router_logits:
        probabilities = logits.float().softmax(-1)
        n_experts = logits.shape[-1]
        chosen = probabilities.topk(n_chosen, dim=-1).indices
        shares = torch.bincount(chosen.flatten(), minlength=n_experts) / chosen.numel()
        losses.append(n_experts * (shares * probabilities.mean(0)).sum())
    return torch.stack(losses).mean()


def learning_rate_factor(step: int, progress: float, warm_up_steps: int) -> float:
    """Rise linearly, then fall along a cosine to a hundredth."""
    warm_up = min(1.0, (step + 1) / warm_up_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return warm_up * (0.01 + 0.99 * cosine)


def batches(tokens: np.ndarray, rows: int, row_tokens: int, device: str):
    """Yield shuffled batches (rows, row_tokens + 1) forever.

    Each epoch cuts the stream into rows at other places.
    """
    rng = np.random.default_rng(0)
    stream = torch.from_numpy(tokens.astype(np.int64)).to(device)
    offsets = torch.arange(row_tokens + 1, device=device)
    while True:
        phase = rng.integers(row_tokens)
        starts = np.arange(phase, len(tokens) - row_tokens - 1, row_tokens)
        rng.shuffle(starts)
        for first in range(0, len(starts) - rows + 1, rows):
            chosen = torch.from_numpy(starts[first : first + rows]).to(device)
            yield stream[chosen[:, None] + offsets]


def optimiser_for(model, learning_rate: float, weight_decay: float):
    """Build AdamW with weight decay on matrices only."""
    decayed = [p for p in model.parameters() if p.ndim >= 2 and p.shape[1] > 1]
    others = [p for p in model.parameters() if p.ndim < 2 or p.shape[1] == 1]
    return torch.optim.AdamW(
        [
            {"params": decayed, "weight_decay": weight_decay},
            {"params": others, "weight_decay": 0.0},
        ],
        lr=learning_rate,
        betas=(0.9, 0.95),
        fused=torch.cuda.is_available(),
    )


def add_dropout(model, rate: float) -> None:
    """Apply dropout to the embeddings and to the output of each mixer and MoE block."""

    def hook(module, inputs, output):
        if isinstance(output, tuple):
            return (functional.dropout(output[0], rate, module.training), *output[1:])
        return functional.dropout(output, rate, module.training)

    parts = [model.model.embed_tokens]
    for layer in model.model.layers:
        parts += [getattr(layer, "linear_attn", None) or layer.self_attn, layer.mlp]
    for part in parts:
        part.register_forward_hook(hook)
