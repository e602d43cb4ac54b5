"""``moeflux cachesim``: simulate eviction policies on recorded routing."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.filesize import decimal
from rich.table import Table

from ..experts.pool.policy import POLICIES, POLICY_FORMS, policy_factory
from ..experts.pool.routing_trace import RoutingTrace
from ..measure import check_plot, save_hit_rates
from ..measure.cachesim import OPTIMUM, Outcome, simulate
from ..system.terminal import PlainConsole
from .arguments import check_output, integer, number

BUDGETS = (75.0, 50.0, 37.5, 25.0, 18.75, 12.5)


def add_parser(subparsers: Any) -> None:
    """Add ``cachesim`` with its flags."""
    text = "replay a routing trace with every eviction policy and budget"
    parser = subparsers.add_parser("cachesim", description=text, help=text)
    parser.add_argument("trace", type=Path, help="file written by moeflux trace")
    parser.add_argument(
        "--policy",
        action="append",
        metavar="NAME",
        help=f"{POLICY_FORMS}; may be repeated (default: {' and '.join(POLICIES)})",
    )
    parser.add_argument(
        "--budgets",
        type=number(0, 100),
        nargs="+",
        default=BUDGETS,
        metavar="PERCENT",
        help="share of experts in memory (default: "
        f"{' '.join(f'{budget:g}' for budget in BUDGETS)})",
    )
    parser.add_argument(
        "--scope",
        choices=("global", "layer"),
        default="global",
        help="layers share all slots (global) or get equal shares (layer)",
    )
    parser.add_argument(
        "--floor",
        type=integer(0),
        metavar="N",
        help="slots that other layers cannot take from a layer (default: those of one "
        "token, or half of an even share)",
    )
    parser.add_argument(
        "--segments",
        type=integer(1),
        default=1,
        metavar="N",
        help="buffers of the pool; only layers of one buffer share slots (default: 1; "
        "up to 8 on devices that take back whole buffers only)",
    )
    parser.add_argument(
        "--read-ahead",
        action="store_true",
        help="also read the experts that the next layer's router predicts",
    )
    parser.add_argument(
        "--plot",
        type=Path,
        metavar="FILE",
        help="also plot the hit rates, as .png or .svg",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Replay the routing trace, print the table and draw the curves."""
    check_output("--plot", args.plot)
    if args.plot:
        check_plot(args.plot)
    trace = RoutingTrace.load(args.trace)
    policies = {name: policy_factory(name) for name in args.policy or POLICIES}
    shares = [budget / 100 for budget in args.budgets]
    found = simulate(
        trace,
        policies,
        shares,
        scope=args.scope,
        floor=args.floor,
        read_ahead=args.read_ahead,
        n_segments=args.segments,
    )
    title = (
        f"{trace.model_type}, {trace.top_k} of {trace.n_experts} experts in "
        f"{len(trace.layers)} layers, {trace.n_prompt_tokens} prompt tokens and "
        f"{trace.n_tokens - trace.n_prompt_tokens} generated, scope {args.scope}"
    )
    PlainConsole(highlight=False).print(hits_table(found, title))
    if args.plot:
        save_hit_rates(found, title, args.plot)
    return 0


def hits_table(found: Sequence[Outcome], title: str) -> Table:
    """Return a table of hit rates by budget beside the optimum."""
    caption = (
        "hits: requested experts that were in memory; steady: second half of the "
        "generated tokens; all: from empty slots; the optimum reads nothing ahead"
    )
    table = Table(title=title, caption=caption)
    table.add_column("experts\nin memory", justify="right")
    table.add_column("policy", overflow="fold")
    for name in ("hits\nsteady", "of the\noptimum's", "hits\nall", "of the\noptimum's"):
        table.add_column(name, justify="right")
    table.add_column("read per token\nsteady", justify="right")
    for outcome in found:
        if outcome.policy == OPTIMUM:
            best = outcome
            table.add_section()
        table.add_row(
            f"{outcome.n_slots} ({outcome.share:.2%})",
            outcome.policy,
            f"{outcome.steady_hit_rate:.1%}",
            _ratio(outcome.steady_hit_rate, best.steady_hit_rate),
            f"{outcome.hit_rate:.1%}",
            _ratio(outcome.hit_rate, best.hit_rate),
            decimal(round(outcome.bytes_per_token)),
        )
    return table


def _ratio(hit_rate: float, best: float) -> str:
    return f"{hit_rate / best:.1%}" if best else "-"
