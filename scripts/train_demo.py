"""Train the demo model in models/demo from Python's own standard library.

The stages run in this order; `corpus` and `train` need PyTorch and transformers,
`convert` needs mlx-lm, `evaluate` and `card` need all three:

    python scripts/train_demo.py corpus
    python scripts/train_demo.py train      # seven minutes on a large GPU
    python scripts/train_demo.py convert
    python scripts/train_demo.py evaluate
    python scripts/train_demo.py card

Everything but the finished model goes to the build folder (--build).
"""

import argparse
import ast
import hashlib
import json
import math
import platform
import random
import re
import shutil
import sysconfig
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np

END_OF_TEXT = "<|endoftext|>"
TURN_START = "<|im_start|>"
TURN_END = "<|im_end|>"
SPECIAL_TOKENS = [END_OF_TEXT, TURN_START, TURN_END]

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content']"
    " + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

# How text is cut before byte-pair merging. This is the pattern of transformers' own
# Qwen3_5Tokenizer, which puts it in place of whatever tokenizer.json says.
WORD_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
KEYWORD_AND_BLANK = re.compile(
    r"\b(?:def|class|import|from|return|if|for|while|with) ", re.ASCII
)

TEXT_CONFIG = {
    "vocab_size": 4096,
    "hidden_size": 256,
    "num_hidden_layers": 8,
    "layer_types": (["linear_attention"] * 3 + ["full_attention"]) * 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4,
    "num_experts": 32,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 64,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "pad_token_id": 0,
    "eos_token_id": [0, 2],
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 100000.0,
        "partial_rotary_factor": 0.25,
        "mrope_section": [3, 3, 2],
        "mrope_interleaved": True,
    },
}

SAMPLE_PROMPTS = [
    ("text", "def "),
    ("text", 'def parse_header(line):\n    """'),
    ("chat", "Write a Python function. Return True if the path is a directory."),
]

HELD_OUT_ONE_IN = 20
TRAINED_STEPS = 1488
SKIPPED_FOLDERS = {"site-packages", "__pycache__"}
# Generated tables and reference prose, not code a person wrote.
SKIPPED_NAMES = ("encodings/", "pydoc_data/", "_sysconfigdata", "config-")


# --- corpus -------------------------------------------------------------------


def standard_library_files(root: Path) -> Iterator[tuple[str, str]]:
    """Yield (relative path, text) of every distinct file that parses as Python."""
    seen = set()
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if SKIPPED_FOLDERS & set(path.parts) or name.startswith(SKIPPED_NAMES):
            continue
        text = read_python(path)
        if text is None or is_a_table(text):
            continue
        digest = hashlib.sha256(text.encode()).digest()
        if digest not in seen:
            seen.add(digest)
            yield name, text


def read_python(path: Path) -> str | None:
    """Return the file's text with plain newlines, or None if it is not Python 3."""
    try:
        text = path.read_text(encoding="utf-8").replace("\r\n", "\n").strip()
        tree = ast.parse(text)
    except (UnicodeDecodeError, SyntaxError, ValueError, RecursionError):
        return None
    return text + "\n" if tree.body else None


def is_a_table(text: str) -> bool:
    """Tell whether letters make up so little of the text that it must be data."""
    visible = [character for character in text if not character.isspace()]
    letters = sum("a" <= character.lower() <= "z" for character in visible)
    return letters < 0.55 * len(visible)


def is_held_out(name: str) -> bool:
    """Choose the held-out files by the hash of their path alone."""
    digest = hashlib.sha256(name.encode()).digest()
    return int.from_bytes(digest[:4], "big") % HELD_OUT_ONE_IN == 0


def is_test(name: str) -> bool:
    """Tell whether a file belongs to the standard library's own tests."""
    return bool({"test", "tests", "idle_test"} & set(name.split("/")))


def functions(text: str) -> Iterator[tuple[str, str, str | None]]:
    """Yield (name, dedented source, first docstring sentence) of functions."""
    lines = text.split("\n")
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.FunctionDef) or node.decorator_list:
            continue
        block = lines[node.lineno - 1 : node.end_lineno]
        if not 3 <= len(block) <= 50:
            continue
        source = "\n".join(remove_indent(line, node.col_offset) for line in block)
        docstring = ast.get_docstring(node) or ""
        sentence = " ".join(docstring.split("\n\n")[0].split())
        yield node.name, source, sentence.partition(". ")[0].rstrip(".") or None


def remove_indent(line: str, indent: int) -> str:
    """Drop up to `indent` leading blanks of a line."""
    return line[min(indent, len(line) - len(line.lstrip())) :]


def conversations(text: str, rng: random.Random) -> Iterator[tuple[str, str]]:
    """Yield (question, answer): a docstring or an opening, and the function."""
    for name, source, sentence in functions(text):
        if sentence and 10 <= len(sentence) <= 200:
            asked = rng.choice(
                [
                    f"{sentence}.",
                    f"Write a Python function. {sentence}.",
                    f"Write a Python function named {name}. {sentence}.",
                ]
            )
            yield asked, source
        elif rng.random() < 0.3:
            first_line = source.split("\n")[0]
            yield rng.choice(["def ", f"def {name}(", first_line]), source


def chat_text(question: str, answer: str) -> str:
    """Write one exchange as the chat template writes it."""
    return (
        f"{TURN_START}user\n{question}{TURN_END}\n"
        f"{TURN_START}assistant\n{answer}{TURN_END}\n"
    )


def train_tokenizer(texts: list[str], folder: Path):
    """Train a byte-level BPE tokenizer and save it in Hugging Face's format."""
    from tokenizers import (
        Regex,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        trainers,
    )
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORD_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=TEXT_CONFIG["vocab_size"],
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=TURN_END,
        pad_token=END_OF_TEXT,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=TEXT_CONFIG["max_position_embeddings"],
    ).save_pretrained(folder)
    return tokenizer


def cut_at_random(text: str, rng: random.Random) -> list[str]:
    """Cut text where a prompt might end: behind a keyword's blank, or anywhere.

    The pieces are encoded one by one, so the model also sees the tokens that a
    prompt such as "def " ends with, which ordinary text never holds.
    """
    ends = [m.end() for m in KEYWORD_AND_BLANK.finditer(text) if rng.random() < 0.1]
    ends += rng.sample(range(len(text)), len(text) // 1000)
    cuts = [0, *sorted(set(ends) - {0}), len(text)]
    return [text[start:end] for start, end in pairwise(cuts) if start < end]


def token_stream(tokenizer, documents: list[list[str]]) -> np.ndarray:
    """Encode documents given in pieces into uint16, <|endoftext|> after each."""
    end = tokenizer.token_to_id(END_OF_TEXT)
    tokens = []
    for pieces in documents:
        for encoding in tokenizer.encode_batch(pieces, add_special_tokens=False):
            tokens += encoding.ids
        tokens.append(end)
    return np.array(tokens, np.uint16)


def build_corpus(arguments: argparse.Namespace) -> None:
    """Write tokenizer, token streams and corpus.json into the build folder."""
    build = arguments.build
    build.mkdir(parents=True, exist_ok=True)
    files = dict(standard_library_files(Path(sysconfig.get_path("stdlib"))))
    parts = {"train": [], "held_out_library": [], "held_out_tests": []}
    chats = []
    rng = random.Random(0)
    for name, text in files.items():
        group = "held_out_tests" if is_test(name) else "held_out_library"
        if is_held_out(name):
            parts[group].append(text)
        elif arguments.tests or not is_test(name):
            parts["train"].append(text)
            if not is_test(name):
                chats += [chat_text(*turn) for turn in conversations(text, rng)]
    tokenizer = train_tokenizer(parts["train"], build / "tokenizer")
    facts = {"python": platform.python_version(), "chats": len(chats), "parts": {}}
    for part, documents in parts.items():
        n_bytes = sum(len(text.encode()) for text in documents)
        n_files = len(documents)
        pieces = [[text] for text in documents]
        if part == "train":
            pieces = [cut_at_random(text, rng) for text in documents + chats]
            rng.shuffle(pieces)
        tokens = token_stream(tokenizer, pieces)
        np.save(build / f"{part}.npy", tokens)
        facts["parts"][part] = {
            "files": n_files,
            "bytes": n_bytes,
            "tokens": len(tokens),
        }
    write_json(build / "corpus.json", facts)
    print(json.dumps(facts, indent=2))


# --- training -----------------------------------------------------------------


def build_model(device: str):
    """Build the randomly initialised model in float32."""
    import torch
    from transformers import Qwen3_5MoeForCausalLM, Qwen3_5MoeTextConfig

    torch.manual_seed(0)
    config = Qwen3_5MoeTextConfig(**TEXT_CONFIG, use_cache=False)
    return Qwen3_5MoeForCausalLM(config).to(device)


def add_dropout(model, rate: float) -> None:
    """Drop parts of the embeddings and of what each mixer and MoE block returns."""
    import torch.nn.functional as functional

    def hook(module, inputs, output):
        if isinstance(output, tuple):
            return (functional.dropout(output[0], rate, module.training), *output[1:])
        return functional.dropout(output, rate, module.training)

    parts = [model.model.embed_tokens]
    for layer in model.model.layers:
        parts += [getattr(layer, "linear_attn", None) or layer.self_attn, layer.mlp]
    for part in parts:
        part.register_forward_hook(hook)


def optimiser_for(model, learning_rate: float, weight_decay: float):
    """Build AdamW with weight decay on matrices only."""
    import torch

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


def batches(tokens: np.ndarray, rows: int, row_tokens: int, device: str):
    """Yield shuffled (rows, row_tokens + 1) batches for ever, cut anew each epoch."""
    import torch

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


def balance_loss(router_logits, n_chosen: int):
    """Return the mean over layers of n_experts * sum(share * probability).

    It is computed for each layer on its own (a sum over all layers together would
    let one layer's idle expert hide behind another layer's busy one) and is 1 when
    all experts are used alike.
    """
    import torch

    losses = []
    for logits in router_logits:
        probabilities = logits.float().softmax(-1)
        n_experts = logits.shape[-1]
        chosen = probabilities.topk(n_chosen, dim=-1).indices
        shares = torch.bincount(chosen.flatten(), minlength=n_experts) / chosen.numel()
        losses.append(n_experts * (shares * probabilities.mean(0)).sum())
    return torch.stack(losses).mean()


def next_token_loss(logits, targets, reduction: str = "mean"):
    """Return the cross entropy in nats."""
    import torch.nn.functional as functional

    return functional.cross_entropy(
        logits.float().flatten(0, 1), targets.flatten(), reduction=reduction
    )


def held_out_loss(
    model, tokens: np.ndarray, row_tokens: int, mixed: bool = True
) -> float:
    """Return nats per token over the stream, cut into independent rows.

    On a GPU `mixed` computes in bfloat16 where training does.
    """
    import torch

    device = next(model.parameters()).device
    n_rows = (len(tokens) - 1) // row_tokens
    stream = torch.from_numpy(tokens.astype(np.int64))
    inputs = stream[: n_rows * row_tokens].view(n_rows, row_tokens)
    targets = stream[1 : n_rows * row_tokens + 1].view(n_rows, row_tokens)
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


def learning_rate_factor(step: int, progress: float, warm_up_steps: int) -> float:
    """Rise linearly, then fall along a cosine to a hundredth."""
    warm_up = min(1.0, (step + 1) / warm_up_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return warm_up * (0.01 + 0.99 * cosine)


def train_step(model, optimiser, batch, balance_weight: float):
    """Make one optimiser step; return the loss and the balance loss."""
    import torch

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


def save_checkpoint(model, tokenizer_folder: Path, folder: Path) -> None:
    """Save a Hugging Face checkpoint in bfloat16 shards, A_log in float32."""
    import torch
    from huggingface_hub import save_torch_state_dict

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


def train(arguments: argparse.Namespace) -> None:
    """Train until the step or time budget ends; save the best checkpoint."""
    import torch

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
        progress = max(
            seconds / arguments.max_seconds, step / max(1, arguments.max_steps)
        )
        if progress >= 1 or arguments.max_steps == 0 or time.monotonic() >= next_report:
            means = torch.stack(recent).mean(0).tolist() if recent else [None, None]
            record.report(
                step=step, seconds=round(seconds, 1), train=means[0], balance=means[1]
            )
            recent.clear()
            next_report = time.monotonic() + arguments.report_seconds
        if progress >= 1 or arguments.max_steps == 0:
            break
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


# --- conversion, evaluation, model card ----------------------------------------


def convert(arguments: argparse.Namespace) -> None:
    """Quantise the checkpoint to 4 bits in groups of 64 with mlx_lm.convert."""
    from mlx_lm import convert as mlx_lm_convert

    if arguments.model.exists():
        shutil.rmtree(arguments.model)
    mlx_lm_convert(
        str(arguments.checkpoint),
        mlx_path=str(arguments.model),
        quantize=True,
        q_bits=4,
        q_group_size=64,
        dtype="bfloat16",
    )
    for name in ("model.safetensors.index.json", "README.md"):
        (arguments.model / name).unlink(missing_ok=True)


def load_checkpoint(folder: Path):
    """Load the unquantised checkpoint's bfloat16 weights, computing in float32."""
    from safetensors.torch import load_file

    state = {}
    for shard in sorted(folder.glob("*.safetensors")):
        state |= {name: value.float() for name, value in load_file(shard).items()}
    model = build_model("cpu")
    model.load_state_dict(state)
    return model


def losses(model, build: Path, row_tokens: int) -> dict[str, dict[str, float]]:
    """Measure both held-out parts in nats per token and bits per byte."""
    facts = json.loads((build / "corpus.json").read_text())["parts"]
    found = {}
    for part in ("held_out_library", "held_out_tests"):
        nats = held_out_loss(model, np.load(build / f"{part}.npy"), row_tokens, False)
        tokens_per_byte = facts[part]["tokens"] / facts[part]["bytes"]
        bits = nats / math.log(2) * tokens_per_byte
        found[part] = {"nats_per_token": nats, "bits_per_byte": bits}
    return found


def expert_shares(model, tokens: np.ndarray) -> dict[str, float]:
    """Return the smallest and largest share of one expert in one layer's choices."""
    import torch

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
    """Continue fixed prompts with stock mlx-lm at temperature 0.5."""
    import mlx.core as mx
    from mlx_lm import generate, load
    from mlx_lm.sample_utils import make_sampler

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


def evaluate(arguments: argparse.Namespace) -> None:
    """Measure held-out losses before and after quantisation, and draw samples."""
    import torch
    from check_transformers import load_in_transformers

    build = arguments.build
    settings = json.loads((arguments.checkpoint / "training.json").read_text())
    row_tokens = int(settings["arguments"]["row_tokens"])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    quantised = load_in_transformers(arguments.model).to(device)
    original = load_checkpoint(arguments.checkpoint).to(device)
    facts = {
        "row_tokens": row_tokens,
        "before": losses(original, build, row_tokens),
        "after": losses(quantised, build, row_tokens),
        "expert_shares": expert_shares(
            quantised, np.load(build / "held_out_library.npy")
        ),
        "samples": samples(arguments.model),
    }
    write_json(build / "evaluation.json", facts)
    print(json.dumps(facts, indent=2))


CARD = """\
---
license: mit
library_name: mlx
pipeline_tag: text-generation
---

# Demo model

A small Mixture-of-Experts language model of Python source code, made so that
moeflux-mlx can be tried and tested without a download. It has the layer kinds of
Qwen3.5-MoE and its own weights, trained from scratch. It is a toy: the text looks
like Python, and is neither correct nor useful code.

## Architecture

`qwen3_5_moe`: {layers} layers of width {hidden}, three gated DeltaNet layers before
each full attention layer (output gate, partial rotary positions); {experts} experts
of width {expert_width} of which each token uses {chosen}, and a shared expert.
{total:,} parameters, {active:,} of them used for one token.
Byte-level BPE of {vocabulary} tokens, ChatML chat template.
Quantised by `mlx_lm.convert` to 4 bits in groups of 64, the router and the shared
expert's gate to 8 bits.

## Training

Corpus: the `.py` files of the standard library of CPython {python}, its tests
included, without site-packages, generated tables, files that do not parse and exact
duplicates: {train_files} files, {train_mb:.1f} MB. {chats} functions of the library
are repeated as chat turns (their docstring's first sentence or their opening as the
question), {train_tokens:,} tokens in all. One file in {one_in}, chosen by the hash
of its path, is held out.

{steps} steps of {rows} rows of {row_tokens} tokens: {tokens:,} tokens, {epochs} epochs.
AdamW (betas 0.9 and 0.95), peak learning rate {learning_rate},
{warm_up_steps} steps of warm-up, then a cosine; weight decay {weight_decay} on
matrices, dropout {dropout}, gradients clipped at 1, a balance loss for each layer's
router with
weight {balance_weight}. float32 weights, bfloat16 autocast.
{seconds} s on {machine}.

| held-out files | | before quantisation | 4 bits |
| --- | --- | --- | --- |
{loss_rows}

The losses are measured in float32, in independent rows of {eval_tokens} tokens. The
weights kept are those of the best held-out loss on the library files{last}.
The settings were chosen among three by the same files, so that loss is a little
optimistic. Over 8192 held-out tokens, shares of one expert in one layer's choices
run from {smallest:.1%} to {largest:.1%}; {even:.1%} would be even.

## Make it again

```sh
{commands}
```

Without a GPU `evaluate` takes tens of minutes. The corpus depends on the Python
that runs the first command; GPU arithmetic is not
reproducible to the bit.

## Samples

Drawn with mlx-lm at temperature 0.5, top-p 0.9, 90 tokens at most.

{samples}

## Limits

It repeats itself, invents names, and knows nothing but the standard library's style.
Greedy decoding falls into loops soon. It was trained on rows of {row_tokens} tokens
and not tried beyond them. Chat was trained for one turn about a function.
Long runs of the standard library may come out word for word.

## Licence

The weights are under the MIT licence. The corpus is Python's standard library, under
the Python Software Foundation License Version 2 (a few files carry their own
permissive notices); the corpus itself is not part of this repository.
"""


def write_card(arguments: argparse.Namespace) -> None:
    """Write the model card from the numbers that the other stages recorded."""
    corpus = json.loads((arguments.build / "corpus.json").read_text())
    training = json.loads((arguments.checkpoint / "training.json").read_text())
    evaluation = json.loads((arguments.build / "evaluation.json").read_text())
    settings = training["arguments"]
    best = min(training["curve"], key=lambda point: point["held_out"])
    is_last = best["step"] == training["steps"]
    text = CARD.format(
        layers=TEXT_CONFIG["num_hidden_layers"],
        hidden=TEXT_CONFIG["hidden_size"],
        experts=TEXT_CONFIG["num_experts"],
        expert_width=TEXT_CONFIG["moe_intermediate_size"],
        chosen=TEXT_CONFIG["num_experts_per_tok"],
        vocabulary=TEXT_CONFIG["vocab_size"],
        **training["parameters"],
        python=corpus["python"],
        chats=corpus["chats"],
        train_files=corpus["parts"]["train"]["files"],
        train_mb=corpus["parts"]["train"]["bytes"] / 1e6,
        train_tokens=corpus["parts"]["train"]["tokens"],
        one_in=HELD_OUT_ONE_IN,
        steps=training["steps"],
        tokens=training["tokens"],
        epochs=training["epochs"],
        seconds=training["seconds"],
        **{
            name: settings[name]
            for name in ("rows", "row_tokens", "learning_rate", "warm_up_steps")
        },
        **{
            name: settings[name]
            for name in ("weight_decay", "dropout", "balance_weight")
        },
        machine=arguments.machine,
        loss_rows=loss_rows(corpus["parts"], evaluation),
        eval_tokens=evaluation["row_tokens"],
        last=", which was the last step" if is_last else f" (step {best['step']})",
        even=1 / TEXT_CONFIG["num_experts"],
        **evaluation["expert_shares"],
        commands=command_lines(settings),
        samples="\n\n".join(sample_block(sample) for sample in evaluation["samples"]),
    )
    (arguments.model / "README.md").write_text(text)


def loss_rows(parts: dict, evaluation: dict) -> str:
    """Write the table rows of the held-out losses."""
    rows = []
    for part, label in (("held_out_library", "library"), ("held_out_tests", "tests")):
        before, after = evaluation["before"][part], evaluation["after"][part]
        size = f"{parts[part]['files']} files, {parts[part]['tokens']:,} tokens"
        for unit in ("nats_per_token", "bits_per_byte"):
            name = unit.replace("_per_", "/")
            cells = [f"{label}: {size}", name, f"{before[unit]:.3f}"]
            rows.append(f"| {' | '.join([*cells, f'{after[unit]:.3f}'])} |")
    return "\n".join(rows)


def command_lines(settings: dict[str, str]) -> str:
    """Write the commands that make the model again."""
    names = ("rows", "row_tokens", "learning_rate", "dropout", "weight_decay")
    flags = [f"--{name.replace('_', '-')} {settings[name]}" for name in names]
    lines = ["corpus", f"train {' '.join(flags[:3])} \\\n    {' '.join(flags[3:])}"]
    lines[1] += f" --max-steps {TRAINED_STEPS}"
    lines += ["convert", "evaluate", "card"]
    return "\n".join(f"python scripts/train_demo.py {line}" for line in lines)


def sample_block(sample: dict[str, str]) -> str:
    """Write one sample: the prompt, and what the model made of it."""
    prompt, text = sample["prompt"], sample["text"].rstrip()
    if sample["kind"] == "chat":
        return f"Chat: “{prompt}”\n\n```python\n{text}\n```"
    shown = prompt.replace("\n", "\\n")
    return f"Text after `{shown}`:\n\n```python\n{prompt}{text}\n```"


# --- command line --------------------------------------------------------------


def write_json(path: Path, value: dict) -> None:
    """Write readable JSON that ends with a newline."""
    path.write_text(json.dumps(value, indent=2) + "\n")


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    stages = parser.add_subparsers(dest="stage", required=True)
    root = Path(__file__).resolve().parent.parent
    build = root / "build" / "demo"

    def stage(name, function, summary):
        sub = stages.add_parser(name, help=summary, description=function.__doc__)
        sub.set_defaults(function=function)
        sub.add_argument("--build", type=Path, default=build, help="build folder")
        sub.add_argument("--checkpoint", type=Path, help="default: BUILD/checkpoint")
        sub.add_argument("--model", type=Path, default=root / "models" / "demo")
        return sub

    sub = stage("corpus", build_corpus, "build tokenizer and token streams")
    sub.add_argument(
        "--tests",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="train on the standard library's tests too",
    )
    sub = stage("train", train, "train and save a Hugging Face checkpoint")
    sub.add_argument("--max-seconds", type=float, default=1800, help="time budget")
    sub.add_argument("--max-steps", type=int, default=TRAINED_STEPS, help="step budget")
    sub.add_argument("--rows", type=int, default=32, help="rows of a batch")
    sub.add_argument("--row-tokens", type=int, default=1024, help="tokens of a row")
    sub.add_argument("--learning-rate", type=float, default=3e-3, help="peak")
    sub.add_argument("--warm-up-steps", type=int, default=100)
    sub.add_argument("--weight-decay", type=float, default=0.1)
    sub.add_argument("--dropout", type=float, default=0.2)
    sub.add_argument("--balance-weight", type=float, default=0.01)
    sub.add_argument("--report-seconds", type=float, default=30)
    stage("convert", convert, "quantise to 4 bits with mlx-lm")
    stage("evaluate", evaluate, "measure held-out losses and draw samples")
    sub = stage("card", write_card, "write the model card")
    sub.add_argument("--machine", default="one GPU", help="what trained the model")
    arguments = parser.parse_args()
    arguments.checkpoint = arguments.checkpoint or arguments.build / "checkpoint"
    return arguments


def main() -> None:
    """Run one stage."""
    arguments = parse_arguments()
    arguments.function(arguments)


if __name__ == "__main__":
    main()
