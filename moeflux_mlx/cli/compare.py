"""``moeflux compare``: compare moeflux-mlx with stock mlx-lm on the same tokens."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from rich.filesize import decimal
from rich.table import Table

from ..errors import ConfigError
from ..experts.files.checkpoint import read_config
from ..experts.files.stock import has_own_class
from ..loading import find_model
from ..measure.compare import TOLERANCES, Comparison, Side, compare_each
from ..system.terminal import PlainConsole
from .arguments import check_output, integer, number, read_text
from .compare_page import budget_of, render, way_of
from .generate import add_native_flag, add_streaming_flags, streaming_options
from .inspect_summary import summarize
from .preflight import announce

DEFAULT_PROMPT = "def read_table(path):\n"
DEFAULT_TOKENS = 64
# Shares of all experts in memory, in per cent.
DEFAULT_BUDGETS = (100.0, 50.0, 25.0)
# Selects mlx-lm's own class instead of an executor.
STOCK_CLASS = "mlx-lm"


def add_parser(subparsers: Any) -> None:
    """Add ``compare`` with its flags."""
    text = "compare output, speed and memory with stock mlx-lm's"
    tolerances = ", ".join(
        f"{value:g} for {name}" for name, value in TOLERANCES.items()
    )
    parser = subparsers.add_parser(
        "compare",
        description=f"{text}; exits with 1 when the logits differ by more than the "
        "tolerance",
        help=text,
    )
    parser.add_argument("model", help="plain or packed model directory, or hub id")
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument("--prompt", help="text to continue")
    prompt.add_argument(
        "--prompt-file", type=Path, metavar="FILE", help="file with the text"
    )
    parser.add_argument(
        "--max-tokens",
        "-m",
        type=integer(1),
        default=DEFAULT_TOKENS,
        metavar="N",
        help="tokens to generate (default: %(default)s)",
    )
    parser.add_argument(
        "--text",
        type=Path,
        metavar="FILE",
        help="also measure both perplexities on a file",
    )
    parser.add_argument(
        "--dtype",
        choices=tuple(TOLERANCES),
        default="float32",
        help="cast both sides to float32 (default), or keep the model's types",
    )
    parser.add_argument(
        "--against",
        metavar="PATH",
        help="model that stock mlx-lm loads (default: MODEL; the experts of a pack are "
        "stacked again in memory)",
    )
    parser.add_argument(
        "--tolerance",
        type=number(),
        metavar="X",
        help=f"largest relative RMS error of the logits (default: {tolerances})",
    )
    parser.add_argument("--json", action="store_true", help="print JSON, not tables")
    parser.add_argument(
        "--html",
        type=Path,
        metavar="FILE",
        help="also write a page with both texts side by side, KL and top-1 by "
        "position, error by layer, and costs",
    )
    _add_matrix_flags(parser)
    add_streaming_flags(parser)
    add_native_flag(parser)
    parser.set_defaults(run=run)


def _add_matrix_flags(parser: argparse.ArgumentParser) -> None:
    ours = parser.add_argument_group("several comparisons")
    ours.add_argument(
        "--matrix",
        action="store_true",
        help="compare every executor with every budget; stock runs once",
    )
    ours.add_argument(
        "--executors",
        nargs="+",
        metavar="NAME",
        help=f"for --matrix: executors, or {STOCK_CLASS} for mlx-lm's own class "
        "(default: this machine's executor, if the model has a native class, and "
        f"{STOCK_CLASS})",
    )
    ours.add_argument(
        "--budgets",
        type=number(0, 100),
        nargs="+",
        metavar="PERCENT",
        help="for --matrix: share of experts in memory (default: "
        f"{' '.join(f'{budget:g}' for budget in DEFAULT_BUDGETS)})",
    )


def run(args: argparse.Namespace) -> int:
    """Run the comparisons; return 0 if all are within the tolerance, else 1."""
    check_output("--html", args.html)
    prompt = DEFAULT_PROMPT if args.prompt is None else args.prompt
    if args.prompt_file is not None:
        prompt = read_text("--prompt-file", args.prompt_file)
    text = None if args.text is None else read_text("--text", args.text)
    ways = _ways(args)
    announce(args.model, ways[0])
    found = []
    for result in compare_each(
        args.model,
        prompt,
        ways,
        max_tokens=args.max_tokens,
        text=text,
        against=args.against,
        dtype=args.dtype,
        tolerance=args.tolerance,
    ):
        found.append(result)
        if not args.json:
            _print(result)
    if args.html is not None:
        args.html.write_text(render(found), "utf-8", "replace")
    if args.json:
        fields = [result.to_json() for result in found]
        print(json.dumps(fields if args.matrix else fields[0], indent=2))
    return 0 if all(result.within_tolerance for result in found) else 1


def _ways(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the options of ``load`` for each requested comparison."""
    options = streaming_options(args)
    if not args.matrix:
        for flag in ("executors", "budgets"):
            if getattr(args, flag) is not None:
                raise ConfigError(f"[--{flag}] expected --matrix with it but got none")
        return [options]
    for flag in ("memory", "expert_memory", "executor", "native"):
        if options[flag] is not None:
            name = "no-native" if flag == "native" else flag.replace("_", "-")
            raise ConfigError(
                f"[--matrix] expected its own executors and budgets but got --{name}: "
                "use --executors and --budgets"
            )
    path = find_model(args.model)
    summary = summarize(path)
    budgets = [
        max(summary.minimum_bytes, round(summary.full_bytes * percent / 100))
        for percent in args.budgets or DEFAULT_BUDGETS
    ]
    names = args.executors or [STOCK_CLASS]
    if args.executors is None and has_own_class(read_config(path)):
        names = [None, STOCK_CLASS]
    return [
        {**options, **_executor_options(name), "expert_memory": budget}
        for name in names
        for budget in budgets
    ]


def _executor_options(name: str | None) -> dict[str, Any]:
    return {"native": False} if name == STOCK_CLASS else {"executor": name}


def _print(result: Comparison) -> None:
    console = PlainConsole(highlight=False)
    console.print(output_table(result))
    console.print(cost_table(result))
    sign = "within" if result.within_tolerance else "outside"
    console.print(
        f"relative RMS error {result.logits.relative_rms_error:.2e}: {sign} the "
        f"tolerance of {result.tolerance:.2e}"
    )
    if result.departs and not result.within_tolerance:
        console.print(
            f"possible cause: {result.departs}; --no-native runs mlx-lm's class"
        )


def output_table(result: Comparison) -> Table:
    """Return a table of the differences between the two outputs."""
    tokens, logits = result.tokens, result.logits
    table = Table("output", f"{result.model} ({result.dtype})")
    table.add_row("ours", f"{way_of(result)}, {budget_of(result)}")
    table.add_row(
        "equal tokens", f"{tokens.n_equal} of {tokens.n_tokens} ({tokens.share:.1%})"
    )
    table.add_row("first divergence", _divergence(result))
    table.add_section()
    table.add_row("compared positions", str(logits.n_positions))
    table.add_row("equal top-1", f"{logits.top1_agreement:.1%}")
    table.add_row("KL mean", f"{logits.kl_mean:.2e}")
    table.add_row("KL max", f"{logits.kl_max:.2e} at {logits.kl_max_position}")
    table.add_row("logit error max", f"{logits.max_error:.2e}")
    table.add_row("logit error RMS", f"{logits.rms_error:.2e}")
    table.add_row("relative RMS error", f"{logits.relative_rms_error:.2e}")
    return table


def _divergence(result: Comparison) -> str:
    first = result.tokens.first_divergence
    if first is None:
        return "none"
    stock, ours = first.stock, first.ours
    return (
        f"token {first.position}: stock {stock.id} {stock.text!r}, "
        f"ours {ours.id} {ours.text!r}"
    )


def cost_table(result: Comparison) -> Table:
    """Return a table of the speed, memory and perplexity of both sides."""
    table = Table("", "stock mlx-lm", "moeflux-mlx")
    columns = zip(_cost(result.stock), _cost(result.ours), strict=True)
    for (name, stock), (_, ours) in columns:
        if stock or ours:
            table.add_row(name, stock, ours)
    return table


def _cost(side: Side) -> list[tuple[str, str]]:
    ppl, hits, read = side.perplexity, side.expert_hit_rate, side.expert_read_bytes
    return [
        ("prompt tokens/s", f"{side.prompt_tps:.1f}"),
        ("generated tokens/s", f"{side.generation_tps:.1f}"),
        ("peak memory of the process", decimal(side.peak_process_bytes)),
        ("peak memory of MLX", decimal(side.peak_mlx_bytes)),
        ("perplexity", "" if ppl is None else f"{ppl:.6g}"),
        ("expert cache hits", "" if hits is None else f"{hits:.1%}"),
        ("bytes read while generating", "" if read is None else decimal(read)),
    ]
