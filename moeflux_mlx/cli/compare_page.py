"""The page of ``moeflux compare --html``: one self-contained file."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import Any

from rich.filesize import decimal

from .. import __version__, device
from ..measure.compare import Comparison, Side, Token
from .compare_style import STYLE

SAME_BITS = (
    "A budget decides when an expert is read, never which expert runs. So the output "
    "has the same bits at every budget of experts as with all experts in memory."
)
# Lower end of the logarithmic charts; smaller values are drawn at it.
LEAST = 1e-16


def render(found: Sequence[Comparison]) -> str:
    """Return the page of one comparison, or of several with the same reference."""
    first = found[0]
    parts = [_matrix(found), *(_comparison(c, alone=len(found) == 1) for c in found)]
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" \
content="default-src 'none'; style-src 'unsafe-inline'">
<title>{_text(first.model)} - moeflux compare</title>
<style>{STYLE}</style>
</head>
<body>
<header>
<h1>{_text(first.model)}</h1>
<p>moeflux-mlx {_text(__version__)} beside stock mlx-lm \
({_text(_mlx_lm())}, MLX {_text(device.mlx_version())}) on \
{_text(device.machine_name())}</p>
<p class="quiet">{_reference(first)}</p>
</header>
<main>
{"".join(parts)}
</main>
</body>
</html>
"""


def way_of(found: Comparison) -> str:
    """Name our side: an executor, or mlx-lm's own class."""
    return found.ours.executor or "mlx-lm's class"


def budget_of(found: Comparison) -> str:
    """Describe the memory of a comparison."""
    for name, words in (("memory", "process"), ("expert_memory", "experts")):
        if (given := found.options.get(name)) is not None:
            amount = decimal(given) if isinstance(given, int) else str(given)
            return f"{amount} for the {words}"
    return "no bound"


def _reference(found: Comparison) -> str:
    types = "both cast to float32" if found.dtype == "float32" else "types as stored"
    text = (
        f"{found.n_prompt_tokens} tokens of prompt, {found.tokens.n_tokens} generated"
    )
    other = "" if found.reference == found.model else f"; stock loads {found.reference}"
    return _text(f"{text} greedily; {types}{other}")


def _matrix(found: Sequence[Comparison]) -> str:
    """Return the section that compares executors and budgets."""
    rows = [
        [
            *(_text(f) for f in (way_of(c), budget_of(c))),
            f"{c.tokens.n_equal} of {c.tokens.n_tokens}",
            f"{c.logits.relative_rms_error:.1e}",
            f"{c.ours.prompt_tps:.1f}",
            f"{c.ours.generation_tps:.1f}",
            decimal(c.ours.peak_process_bytes),
            _share(c.ours.expert_hit_rate),
            f"<code>{_text(c.bits[:8])}</code>",
        ]
        for c in found
    ]
    stock = found[0].stock
    rows.insert(
        0,
        [
            "stock mlx-lm",
            "all in memory",
            "",
            "",
            f"{stock.prompt_tps:.1f}",
            f"{stock.generation_tps:.1f}",
            decimal(stock.peak_process_bytes),
            "",
            "",
        ],
    )
    head = (
        *("way", "memory", "equal tokens", "error of logits", "prompt tokens/s"),
        *("generated tokens/s", "peak of the process", "expert hits", "bits"),
    )
    table = _table(head, rows)
    if len(found) == 1:
        return _section("Quality at a budget", f"<p>{SAME_BITS}</p>")
    return _section(
        "Ways and budgets", f"<p>{SAME_BITS} {_bits(found)}</p>{table}", wide=True
    )


def _bits(found: Sequence[Comparison]) -> str:
    """Say for each executor whether its budgets gave the same bits in this run."""
    bits: dict[str, list[str]] = {}
    for c in found:
        bits.setdefault(way_of(c), []).append(c.bits)
    told = [
        f"{way}: {len(each)} budgets, "
        + ("the same bits." if len(set(each)) == 1 else "DIFFERENT bits.")
        for way, each in bits.items()
        if len(each) > 1
    ]
    return _text(" ".join(["In this run, over all logits:", *told]) if told else "")


def _comparison(found: Comparison, *, alone: bool) -> str:
    """Return one comparison; if there are several, in a block that folds."""
    parts = [_verdict(found), _tokens(found), _positions(found), _layers(found)]
    body = "".join([*parts, _cost(found)])
    if alone:
        return body
    title = _text(f"{way_of(found)}, {budget_of(found)}")
    return f'<details class="wide"><summary>{title}</summary>{body}</details>\n'


def _verdict(found: Comparison) -> str:
    good = found.within_tolerance
    word = '<b class="good">within</b>' if good else '<b class="bad">outside</b>'
    error = found.logits.relative_rms_error
    text = (
        f"<p>Relative RMS error of the logits {_number(error)}: {word} the tolerance "
        f"of {_number(found.tolerance)}.</p><p>{_divergence(found)}</p>"
    )
    return _section("Verdict", text)


def _divergence(found: Comparison) -> str:
    first = found.tokens.first_divergence
    if first is None:
        return f"All {found.tokens.n_tokens} tokens are equal."
    stock, ours = first.stock, first.ours
    return _text(
        f"First divergence at token {first.position}: stock {stock.text!r} "
        f"({stock.id}), ours {ours.text!r} ({ours.id})."
    )


def _tokens(found: Comparison) -> str:
    tokens = found.tokens
    first = tokens.first_divergence
    at = tokens.n_tokens if first is None else first.position
    sides = (("stock mlx-lm", tokens.stock), ("moeflux-mlx", tokens.ours))
    other = {"stock mlx-lm": tokens.ours, "moeflux-mlx": tokens.stock}
    boxes = "".join(
        f'<div><h3>{name}</h3><div class="text">'
        + "".join(_token(i, t, other[name][i], at) for i, t in enumerate(side))
        + "</div></div>"
        for name, side in sides
    )
    pair = f'<div class="pair">{boxes}</div>'
    return _section("Tokens side by side", pair, wide=True)


def _token(i: int, token: Token, other: Token, first: int) -> str:
    """Return a token: the first difference is marked, later ones are underlined."""
    text = _text(token.text).replace("\n", '<i class="quiet">&#8629;</i>\n')
    tip = _text(f"token {i}, id {token.id}")
    if i == first:
        return f'<mark title="{tip}, first divergence">{text}</mark>'
    kind = "t differs" if token.id != other.id else "t"
    return f'<span class="{kind}" title="{tip}">{text}</span>'


def _positions(found: Comparison) -> str:
    logits = found.logits
    values = [
        (f"position {i}: KL {kl:.2e}, top-1 {'equal' if same else 'DIFFERS'}", kl, same)
        for i, (kl, same) in enumerate(zip(logits.kl, logits.equal_top1, strict=True))
    ]
    text = (
        f"<p>KL(stock || ours) mean {_number(logits.kl_mean)}, maximum "
        f"{_number(logits.kl_max)} at position {logits.kl_max_position}. The "
        "likeliest token is the same at "
        f"{logits.top1_agreement:.1%} of {logits.n_positions} positions; red bars are "
        "the others.</p>"
    )
    ends = ("position 0", f"{logits.n_positions - 1}")
    return _section("KL and top-1 by position", text + _chart(values, ends), wide=True)


def _layers(found: Comparison) -> str:
    errors = found.layer_errors
    if errors is None:
        return _section(
            "Error by layer", "<p>The two models do not have the same layers.</p>"
        )
    values = [(f"layer {i}: {e:.2e}", e, True) for i, e in enumerate(errors)]
    text = (
        "<p>Relative RMS error of each layer's output, on the first tokens of the "
        f"prompt: {_number(errors[0])} after the first, {_number(errors[-1])} after "
        "the last.</p>"
    )
    ends = ("layer 0", f"{len(errors) - 1}")
    return _section("Error by layer", text + _chart(values, ends), wide=True)


def _chart(values: list[tuple[str, float, bool]], ends: tuple[str, str]) -> str:
    """Draw bars on a logarithmic scale, with their values as tooltips.

    Labels are outside the picture, because the picture stretches to any width.
    """
    if not any(value for _, value, _ in values):
        return '<p class="quiet">No difference anywhere, so there is no chart.</p>'
    shown = [max(LEAST, v) if math.isfinite(v) else 1.0 for _, v, _ in values]
    low = math.floor(math.log10(min(shown)))
    high = math.ceil(math.log10(max(shown)))
    low = min(low, high - 1)
    bars = []
    for i, (text, value, good) in enumerate(values):
        height = 100 * (math.log10(shown[i]) - low) / (high - low)
        height = max(1.0, height) if value else 1.0
        kind = "" if good else ' class="off"'
        bars.append(
            f'<rect{kind} x="{i + 0.1:g}" y="{100 - height:.1f}" width="0.8" '
            f'height="{height:.1f}"><title>{_text(text)}</title></rect>'
        )
    picture = (
        f'<svg viewBox="0 0 {len(values)} 100" preserveAspectRatio="none" '
        f'role="img">{"".join(bars)}</svg>'
    )
    top, ground = f"1e{high}", f"&#8804; 1e{low}"
    scale = f'<div class="scale"><span>{top}</span><span>{ground}</span></div>'
    feet = "".join(f"<span>{_text(end)}</span>" for end in ends)
    picture += f'<p class="feet">{feet}</p>'
    return f'<div class="chart">{scale}<div>{picture}</div></div>'


def _cost(found: Comparison) -> str:
    sides = [_costs(found.stock), _costs(found.ours)]
    rows = [
        [name, stock, ours]
        for (name, stock), (_, ours) in zip(*sides, strict=True)
        if stock or ours
    ]
    table = _table(("", "stock mlx-lm", "moeflux-mlx"), rows)
    return _section("Speed, memory, hits", table, wide=True)


def _costs(side: Side) -> list[tuple[str, str]]:
    ppl, read = side.perplexity, side.expert_read_bytes
    return [
        ("prompt, tokens/s", f"{side.prompt_tps:.1f}"),
        ("generated, tokens/s", f"{side.generation_tps:.1f}"),
        ("peak memory of the process", decimal(side.peak_process_bytes)),
        ("peak memory of MLX", decimal(side.peak_mlx_bytes)),
        ("experts found in memory", _share(side.expert_hit_rate)),
        ("read while generating", "" if read is None else decimal(read)),
        ("perplexity of the text", "" if ppl is None else f"{ppl:.6g}"),
    ]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table of HTML cells; a wide table scrolls within the page."""
    top = "".join(f'<th scope="col">{name}</th>' for name in head)
    body = "".join(
        f'<tr><th scope="row">{row[0]}</th>'
        + "".join(f"<td>{cell}</td>" for cell in row[1:])
        + "</tr>"
        for row in rows
    )
    table = f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div class="scroll" tabindex="0">{table}</div>'


def _section(title: str, body: str, *, wide: bool = False) -> str:
    kind = ' class="wide"' if wide else ""
    return f"<section{kind}><h2>{title}</h2>{body}</section>\n"


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def _number(value: float) -> str:
    """Return a number that does not break across lines."""
    return f'<span class="number">{value:.2e}</span>'


def _mlx_lm() -> str:
    from mlx_lm import __version__ as version

    return str(version)


def _text(value: Any) -> str:
    """Escape a value for HTML."""
    return escape(str(value), quote=True)
