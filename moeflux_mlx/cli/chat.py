"""``moeflux chat``: mlx-lm's chat and flags with our loader."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
from mlx_lm import chat as stock
from mlx_lm.generate import stream_generate

from ..errors import MoefluxError
from ..loading import load
from ..memory.caches import PutBackOnFailure
from ..server.replaced import replaced
from .arguments import check_number
from .generate import (
    NUMBERS,
    add_native_flag,
    add_streaming_flags,
    check_division,
    division,
    streaming_options,
)
from .preflight import announce, check_template


def add_parser(subparsers: Any) -> None:
    """Add ``chat`` with every flag of ``mlx_lm.chat`` and ours."""
    parser = subparsers.add_parser(
        "chat",
        parents=[stock.setup_arg_parser()],
        conflict_handler="resolve",
        description="Chat with a model, with the flags of mlx_lm.chat and those below.",
        help="chat with a model",
    )
    # mlx-lm's default model has no experts to stream, so --model has no default here.
    parser.add_argument(
        "--model", required=True, help="model directory or Hugging Face repository"
    )
    add_streaming_flags(parser)
    add_native_flag(parser)
    parser.set_defaults(run=run, group=None)


def run(args: argparse.Namespace) -> int:
    """Chat until the user ends it."""
    for name in NUMBERS.keys() & vars(args).keys():
        if (value := getattr(args, name)) is not None:
            check_number(f"--{name.replace('_', '-')}", value, NUMBERS[name])
    check_division("chat", args, "adapter_path")

    def opened(
        path: str,
        *,
        adapter_path: str | None,
        tokenizer_config: dict[str, Any],
        trust_remote_code: bool,
    ) -> tuple[Any, Any]:
        check_template(path)
        announce(path, streaming_options(args))
        return load(
            path,
            **streaming_options(args),
            adapter_path=adapter_path,
            tokenizer_config=tokenizer_config,
        )

    def shared(
        path: str, *groups: mx.distributed.Group | None, trust_remote_code: bool
    ) -> tuple[Any, Any]:
        return load(path, **streaming_options(args), **division(args))

    parsed = SimpleNamespace(parse_args=lambda: args)
    with replaced(
        stock,
        load=opened,
        sharded_load=shared,
        setup_arg_parser=lambda: parsed,
        stream_generate=_turn,
    ):
        try:
            stock.main()
        except EOFError:
            print()
    return 0


def _turn(
    model: Any, tokenizer: Any, prompt: Any, *, prompt_cache: list[Any], **options: Any
) -> Iterator[Any]:
    """Generate an answer. An error restores the conversation before the question."""
    try:
        with PutBackOnFailure(prompt_cache):
            yield from stream_generate(
                model, tokenizer, prompt, prompt_cache=prompt_cache, **options
            )
    except MoefluxError as error:
        print(f"moeflux: {error}: the question is forgotten", file=sys.stderr)
