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

A small Mixture-of-Experts language model of Python source code. With it you can try
and test moeflux-mlx without a download. It has Qwen3.5-MoE's kinds of layers, and
weights that were trained from scratch. It is a toy: its text looks like Python, but is
neither correct nor useful code.

## Architecture

`qwen3_5_moe`: {layers} layers of width {hidden}. Three gated DeltaNet layers precede
each full attention layer, which has an output gate and partial rotary positions.
A layer has {experts} experts of width {expert_width}, of which each token uses
{chosen}, and a shared expert. A token uses {active:,} of the {total:,} parameters.

The tokenizer is a byte-level BPE of {vocabulary} tokens with the ChatML template.
`mlx_lm.convert` quantised the weights to 4 bits in groups of 64, and the router and the
shared expert's gate to 8 bits.

## Training

The corpus is the `.py` files of CPython {python}'s standard library with its tests:
{train_files} files, {train_mb:.1f} MB. Left out are site-packages, generated tables,
duplicates, and files that do not parse. {chats} functions of the library occur a second
time as chat turns. The question is the first sentence of the docstring or the beginning
of the function, and the answer is the function. In all these are
{train_tokens:,} tokens.
One file in {one_in} is held out, chosen by the hash of its path.

Training took {steps} steps of {rows} rows of {row_tokens} tokens: {tokens:,} tokens,
{epochs} epochs. The optimiser is AdamW with betas 0.9 and 0.95, a peak learning rate of
{learning_rate}, {warm_up_steps} steps of warm-up, then a cosine, and a weight decay of
{weight_decay} on matrices. Dropout is {dropout}, gradients are clipped at 1, and each
layer's router has a balance loss of weight {balance_weight}. Weights are float32, with
autocast to bfloat16.
It took {seconds} s on {machine}.

| held-out files | | before quantisation | 4 bits |
| --- | --- | --- | --- |
{loss_rows}

The losses are measured in float32, in independent rows of {eval_rows}. The published
weights had the best held-out loss on the library files{last}.
The same files decided between three settings, so that loss is a little optimistic. Over
8192 held-out tokens, an expert's share of its layer's choices is between
{smallest:.1%} and {largest:.1%}; an even share is {even:.1%}.

## Make it again

```sh
{commands}
```

{duration}The corpus depends on the
Python that runs the first command. Two runs on a GPU do not give the same bits.

## Samples

mlx-lm generated them at temperature 0.5 and top-p 0.9, with at most 90 tokens.

{samples}

## Limits

The model repeats itself, invents names, and knows only the standard library's style.
Greedy decoding soon loops. The model was trained on rows of {row_tokens} tokens
and was not tried with longer ones. Its chats have one turn, about one function.
Its text may repeat long passages of the standard library word for word.

## Licence

The weights have the MIT licence. The corpus is Python's standard library, which has
the Python Software Foundation License Version 2; a few of its files have permissive
notices of their own. The corpus is not part of this repository.
"""
ALL_ROWS_ARE_SLOW = "Without a GPU `evaluate` takes tens of minutes. "


def run(arguments: argparse.Namespace) -> None:
    """Write the model card from the recorded numbers."""
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
        last=", at the last step" if is_last else f", at step {best['step']}",
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
    """Write one sample: the prompt, and the model's text."""
    prompt, text = sample["prompt"], sample["text"].rstrip()
    if sample["kind"] == "chat":
        return f"Chat: “{prompt}”\n\n```python\n{text}\n```"
    shown = prompt.replace("\n", "\\n")
    return f"Text after `{shown}`:\n\n```python\n{prompt}{text}\n```"
