"""``moeflux serve``: mlx-lm's server with our loader, metrics and a status page."""

from __future__ import annotations

import argparse
import logging
from types import SimpleNamespace
from typing import Any, NoReturn

from ..errors import ConfigError
from ..memory.cache_layouts import CACHE_BITS, CACHE_GROUPS
from .arguments import Parser, check_number, integer, number, one_of
from .generate import (
    add_native_flag,
    add_streaming_flags,
    check_division,
    division,
    streaming_options,
)
from .preflight import announce, check_template

# The usable ranges of mlx-lm's flags, which mlx-lm itself does not check.
NUMBERS = {
    "port": integer(0, 65535),
    "num_draft_tokens": integer(1, 1024),
    "temp": number(),
    "top_p": number(0, 1),
    "top_k": integer(0),
    "min_p": number(0, 1),
    "max_tokens": integer(1),
    "decode_concurrency": integer(1),
    "prefill_step_size": integer(1),
    "prompt_cache_size": integer(0),
    "prompt_cache_bytes": integer(0, 2**62),
    "kv_bits": one_of(*CACHE_BITS),
    "kv_group_size": one_of(*CACHE_GROUPS),
    "quantized_kv_start": integer(0),
}


def add_parser(subparsers: Any) -> None:
    """Add ``serve``. Its flags are added on use, because importing them is slow."""
    parser = subparsers.add_parser("serve", help="serve a model over HTTP")
    parser.late = _parser


def _parser(prog: str) -> Parser:
    parser = Parser(
        prog=prog,
        parents=[stock_parser()],
        conflict_handler="resolve",
        description=(
            "Serve a model over HTTP with OpenAI's API. The flags are those of "
            "mlx_lm.server and those below. /health and /metrics are for programs, / "
            "is a status page for people."
        ),
    )
    parser.add_argument(
        "--model", required=True, help="model directory or Hugging Face repository"
    )
    parser.add_argument(
        "--allowed-origins",
        type=lambda text: [origin for origin in text.split(",") if origin],
        default=[],
        metavar="ORIGINS",
        help="origins whose web pages may use this server, as https://a,https://b; * "
        "allows all (default: none)",
    )
    parser.add_argument(
        "--prompt-cache-bytes",
        type=_size,
        help="bytes for kept prompts (default: the memory plan's share for them)",
    )
    # Prompts run one at a time, so that an error belongs to one of them.
    parser.add_argument(
        "--prompt-concurrency",
        type=one_of(1),
        default=1,
        help="prompts run one at a time: only 1 is accepted",
    )
    add_streaming_flags(parser)
    add_native_flag(parser)
    parser.set_defaults(run=run, group=None)
    return parser


class _Made(Exception):
    """Stops mlx-lm's ``main`` when its parser is complete."""

    def __init__(self, parser: argparse.ArgumentParser):
        self.parser = parser


class _Kept(argparse.ArgumentParser):
    def parse_args(self, *_: Any, **__: Any) -> NoReturn:
        raise _Made(self)


def _size(text: str) -> int:
    """Parse bytes as mlx-lm does, which raises other errors than argparse reports."""
    from mlx_lm.utils import _parse_size

    try:
        return int(_parse_size(text))
    except (LookupError, ArithmeticError):
        raise argparse.ArgumentTypeError(
            f"expected bytes such as 8GB or 512MB but got {text!r}"
        ) from None


def stock_parser() -> argparse.ArgumentParser:
    """Return the parser that ``main`` of mlx-lm's server builds."""
    # Import late: it is slow, and loading a model checks whether this module is loaded
    # to see if the process is a server.
    from mlx_lm import server

    from ..server.replaced import replaced

    with replaced(server, argparse=SimpleNamespace(ArgumentParser=_Kept)):
        try:
            server.main()
        except _Made as made:
            return made.parser
    raise AssertionError("mlx_lm.server parsed no arguments")


def run(args: argparse.Namespace) -> int:
    """Serve until the process ends."""
    for name, parse in NUMBERS.items():
        if (value := getattr(args, name)) is not None:
            check_number(f"--{name.replace('_', '-')}", value, parse)
    if not isinstance(args.chat_template_args, dict):
        raise ConfigError("[serve] --chat-template-args: expected a JSON object")
    check_division("serve", args, "adapter_path", "draft_model")
    is_first = args.group is None or args.group.rank() == 0
    logging.basicConfig(
        level=args.log_level if is_first else logging.WARNING,
        format="%(asctime)s - %(levelname)s - %(message)s",
    )
    check_template(args.model, args.chat_template or None)
    announce(args.model, streaming_options(args))
    from ..server.server import serve

    return serve(args, {**streaming_options(args), **division(args)})
