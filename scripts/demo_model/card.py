"""Write the model card from the numbers that the other stages recorded."""

import argparse
import json

from .settings import HELD_OUT_ONE_IN, TEXT_CONFIG

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

The losses are measured in float32, in independent rows of {eval_rows}. The
weights kept are those of the best held-out loss on the library files{last}.
The settings were chosen among three by the same files, so that loss is a little
optimistic. Over 8192 held-out tokens, shares of one expert in one layer's choices
run from {smallest:.1%} to {largest:.1%}; {even:.1%} would be even.

## Make it again

```sh
{commands}
```

{duration}The corpus depends on the Python
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
ALL_ROWS_ARE_SLOW = "Without a GPU `evaluate` takes tens of minutes. "


def run(arguments: argparse.Namespace) -> None:
    """Write the model card from the numbers that the other stages recorded."""
    corpus = json.loads((arguments.build / "corpus.json").read_text())
    training = json.loads((arguments.checkpoint / "training.json").read_text())
    evaluation = json.loads((arguments.build / "evaluation.json").read_text())
    best = min(training["curve"], key=lambda point: point["held_out"])
    is_last = best["step"] == training["steps"]
    # An evaluation that does not name a limit measured all rows.
    max_rows = evaluation.get("max_rows", 0)
    bound = f", at most {max_rows} of each part, spread evenly over it"
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
        **training["arguments"],
        machine=arguments.machine,
        loss_rows=loss_rows(corpus["parts"], evaluation),
        eval_rows=f"{evaluation['row_tokens']} tokens{bound if max_rows else ''}",
        last=", which was the last step" if is_last else f" (step {best['step']})",
        even=1 / TEXT_CONFIG["num_experts"],
        **evaluation["expert_shares"],
        duration="" if max_rows else ALL_ROWS_ARE_SLOW,
        commands=command_lines(training, evaluation),
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


def command_lines(training: dict, evaluation: dict) -> str:
    """Write the commands that make the model again."""
    settings = training["arguments"]
    names = ("rows", "row_tokens", "learning_rate", "dropout", "weight_decay")
    flags = [f"--{name.replace('_', '-')} {settings[name]}" for name in names]
    lines = ["corpus", f"train {' '.join(flags[:3])} \\\n    {' '.join(flags[3:])}"]
    lines[1] += f" --max-steps {training['steps']}"
    bound = f" --max-rows {evaluation['max_rows']}" if "max_rows" in evaluation else ""
    lines += ["convert", f"evaluate{bound}", "card"]
    return "\n".join(f"python scripts/train_demo.py {line}" for line in lines)


def sample_block(sample: dict[str, str]) -> str:
    """Write one sample: the prompt, and what the model made of it."""
    prompt, text = sample["prompt"], sample["text"].rstrip()
    if sample["kind"] == "chat":
        return f"Chat: “{prompt}”\n\n```python\n{text}\n```"
    shown = prompt.replace("\n", "\\n")
    return f"Text after `{shown}`:\n\n```python\n{prompt}{text}\n```"
