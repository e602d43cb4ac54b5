"""The status page of a server: HTML that loads nothing from elsewhere."""

from __future__ import annotations

import base64
import hashlib
import time
from html import escape
from typing import Any

from rich.filesize import decimal

from .. import __version__
from .metrics import Now

# Seconds until the browser reloads the page.
REFRESH_SECONDS = 5

STYLE = """
:root { color-scheme: light dark; --line: #8886; --quiet: #666; --good: #1f7a3d;
  --bad: #b3261e }
@media (prefers-color-scheme: dark) {
  :root { --quiet: #a0a0a0; --good: #5fc27e; --bad: #f28b82 } }
* { box-sizing: border-box }
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 62rem;
  padding: 1.5rem 1rem }
h1 { font-size: 1.4rem; margin: 0 }
h2 { font-size: 1rem; margin: 0 0 .5rem }
p { margin: .25rem 0; overflow-wrap: anywhere }
.quiet { color: var(--quiet) }
.good { color: var(--good) }
.bad { color: var(--bad) }
main { display: grid; gap: 1rem; margin-top: 1.25rem;
  grid-template-columns: repeat(auto-fit, minmax(min(20rem, 100%), 1fr)) }
section { border: 1px solid var(--line); border-radius: .5rem; padding: .9rem 1rem;
  min-width: 0 }
section.wide { grid-column: 1 / -1 }
dl { display: grid; grid-template-columns: auto 1fr; gap: .15rem 1rem; margin: 0 }
dt { color: var(--quiet) }
dd { margin: 0; text-align: right; font-variant-numeric: tabular-nums;
  overflow-wrap: anywhere }
meter { width: 100%; height: .9rem; margin: 0 0 .5rem }
ol { list-style: none; margin: 0; padding: 0 }
li { border-top: 1px solid var(--line); padding: .4rem 0; overflow-wrap: anywhere }
li:first-child { border-top: 0 }
"""

# The page loads nothing, and no other page may embed it.
_DIGEST = base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()
POLICY = (
    f"default-src 'none'; style-src 'sha256-{_DIGEST}'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'"
)

Rows = list[tuple[str, str]]


def render(generator: Any) -> tuple[int, bytes]:
    """Return the present page."""
    now = Now.of(generator)
    state = ("good", "answers requests") if now.is_healthy else ("bad", "cannot answer")
    sections = [
        _section("Memory", _memory(now), _meter(now.process_bytes, now.budget_bytes)),
        _section("Experts", *_experts(now)),
        _section("Requests", _requests(now)),
        _section("Kept prompts", *_prompts(now)),
        _failures(now),
    ]
    text = f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="refresh" content="{REFRESH_SECONDS}">
<title>{_text(generator.cli_args.model)} - moeflux</title>
<style>{STYLE}</style>
</head>
<body>
<header>
<h1>moeflux <span class="{state[0]}">{state[1]}</span></h1>
<p>{_text(generator.cli_args.model)}</p>
<p class="quiet">moeflux-mlx {_text(__version__)}, up for \
{_text(_duration(time.time() - now.record.started))}</p>
</header>
<main>
{"".join(sections)}
</main>
</body>
</html>
"""
    return 200, text.encode("utf-8", "replace")


def _memory(now: Now) -> Rows:
    budget = "none" if now.budget_bytes is None else decimal(now.budget_bytes)
    return [
        ("budget", budget),
        ("process", decimal(now.process_bytes)),
        ("arrays of MLX", decimal(now.active_bytes)),
        ("most arrays so far", decimal(now.peak_bytes)),
    ]


def _experts(now: Now) -> tuple[Rows, str]:
    if (experts := now.experts) is None:
        return [("experts", "all in memory, as parameters")], ""
    rows = [
        ("in memory at most", f"{now.n_slots:,} of {now.n_experts:,}"),
        ("memory for them", decimal(now.expert_bytes)),
        ("found in memory", f"{experts.hit_rate:.1%} of {_requested(experts):,}"),
        ("read", decimal(experts.read_bytes)),
        ("time reading", f"{experts.read_seconds:.1f} s of threads"),
    ]
    return rows, _meter(now.n_slots, now.n_experts)


def _requested(experts: Any) -> int:
    return int(experts.hits + experts.misses)


def _requests(now: Now) -> Rows:
    record = now.record
    return [
        ("open", f"{record.n_open:,}"),
        ("waiting in the queue", f"{now.n_queued:,}"),
        *((f"ended with {status}", f"{n:,}") for status, n in record.ended().items()),
        ("tokens read", f"{record.prompt_tokens:,}"),
        ("tokens from kept prompts", f"{record.cached_tokens:,}"),
        ("tokens generated", f"{record.generated_tokens:,}"),
    ]


def _prompts(now: Now) -> tuple[Rows, str]:
    most = now.most_prompt_bytes
    rows = [
        ("prompts", f"{now.n_prompts:,}"),
        ("memory", decimal(now.prompt_bytes)),
        ("at most", "not bounded" if most is None else decimal(most)),
    ]
    return rows, _meter(now.prompt_bytes, most)


def _section(title: str, rows: Rows, bar: str = "") -> str:
    items = "".join(f"<dt>{_text(k)}</dt><dd>{_text(v)}</dd>" for k, v in rows)
    return f"<section><h2>{_text(title)}</h2>{bar}<dl>{items}</dl></section>\n"


def _meter(value: int, most: int | None) -> str:
    if not most:
        return ""
    return f'<meter min="0" max="{int(most)}" value="{int(value)}"></meter>'


def _failures(now: Now) -> str:
    items = "".join(
        f'<li><span class="quiet">{_clock(f.when)}</span> '
        f'<b class="bad">{int(f.status)}</b> {_text(f.text)}</li>'
        for f in now.record.recent()
    )
    body = f"<ol>{items}</ol>" if items else '<p class="quiet">none</p>'
    return f'<section class="wide"><h2>Recent errors</h2>{body}</section>\n'


def _clock(when: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(when))


def _duration(seconds: float) -> str:
    minutes, hours = int(seconds) // 60, int(seconds) // 3600
    if hours >= 48:
        return f"{hours // 24} days"
    if hours:
        return f"{hours} h {minutes % 60} min"
    return f"{minutes} min" if minutes else f"{int(seconds)} s"


def _text(value: object) -> str:
    """Escape a value for HTML."""
    return escape(str(value), quote=True)
