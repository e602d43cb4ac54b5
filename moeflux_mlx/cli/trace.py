"""``moeflux trace``: record the experts that a model's routers choose."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.sample_utils import make_sampler
from rich.filesize import decimal

from ..errors import one_line
from ..loading import load
from ..measure import record_routing
from .arguments import check_output, integer, number, read_text
from .generate import add_native_flag, add_streaming_flags, streaming_options
from .preflight import announce


def add_parser(subparsers: Any) -> None:
    """Add ``trace`` with its flags."""
    text = "record which experts each layer chooses for each token of a run"
    parser = subparsers.add_parser("trace", description=text, help=text)
    parser.add_argument("model", help="plain or packed model directory, or hub id")
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", help="text to continue, without a chat template")
    prompt.add_argument("--prompt-file", type=Path, metavar="FILE")
    parser.add_argument(
        "--max-tokens",
        "-m",
        type=integer(1),
        default=256,
        metavar="N",
        help="tokens to generate (default: %(default)s)",
    )
    parser.add_argument(
        "--temp",
        type=number(),
        default=0.0,
        help="sampling temperature; 0 is greedy (default)",
    )
    parser.add_argument(
        "--seed", type=integer(0), default=0, help="for sampling (default: 0)"
    )
    parser.add_argument(
        "--output", "-o", type=Path, required=True, metavar="FILE", help="an .npz file"
    )
    add_streaming_flags(parser)
    add_native_flag(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Generate tokens and write the routing trace."""
    check_output("--output", args.output)
    text = _prompt(args)
    announce(args.model, streaming_options(args))
    model, tokenizer = load(args.model, **streaming_options(args))
    mx.random.seed(args.seed)
    trace = record_routing(
        model,
        tokenizer.encode(text),
        max_tokens=args.max_tokens,
        sampler=make_sampler(args.temp),
        eos_tokens=tokenizer.eos_token_ids,
    )
    trace.save(args.output)
    print(
        f"{one_line(str(args.output))}: {trace.n_tokens} tokens, "
        f"{trace.n_prompt_tokens} of them of the prompt, "
        f"{trace.top_k} of {trace.n_experts} experts in each of "
        f"{len(trace.layers)} layers, {decimal(args.output.stat().st_size)}"
    )
    return 0


def _prompt(args: argparse.Namespace) -> str:
    if args.prompt_file is None:
        return args.prompt
    return read_text("--prompt-file", args.prompt_file)
