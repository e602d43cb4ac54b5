"""Plot the profile of a step, or the hit rates of policies."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from .cachesim import OPTIMUM, Outcome
from .profile import Profile, Row

MAX_BARS = 40
BAR_INCHES, MARGIN_INCHES, WIDTH_INCHES = 0.28, 1.6, 11.0
CURVES_INCHES = 6.0


def check_plot(path: Path) -> None:
    """Check, before anything is measured, that a plot can be written to a file.

    Raises:
        ConfigError: matplotlib is missing, or cannot write files of this type.
    """
    figure = _figure(MARGIN_INCHES)
    suffix = path.suffix.lstrip(".").lower()
    known = figure.canvas.get_supported_filetypes()
    if suffix not in known:
        names = ", ".join(f".{name}" for name in known)
        raise ConfigError(f"[--plot] {path}: expected a name that ends in {names}")


def save_plot(profile: Profile, path: Path) -> None:
    """Draw a bar for each row: its microseconds in a whole step, and its GB/s.

    Raises:
        ConfigError: matplotlib is missing.
    """
    rows = profile.largest_first()
    bars = [(_name(r), r.us_per_step, _note(profile, r)) for r in rows[:MAX_BARS]]
    if rest := rows[MAX_BARS:]:
        us = sum(row.us_per_step for row in rest)
        bars.append((f"{len(rest)} smaller kinds", us, ""))
    if profile.remainder_us > 0:
        bars.append(("remainder", profile.remainder_us, "between steps, and the host"))
    figure = _figure(MARGIN_INCHES + BAR_INCHES * len(bars))
    axes = figure.add_subplot()
    names, widths, notes = zip(*bars, strict=True)
    colors = ["tab:gray" if n == "remainder" else "tab:blue" for n in names]
    drawn = axes.barh(range(len(bars)), widths, color=colors)
    axes.bar_label(drawn, notes, padding=4, fontsize=8)
    axes.set_yticks(range(len(bars)), names, fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.45, y=0.01)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel(
        f"us of a whole step, end to end {profile.whole_us:,.0f} us "
        f"(copy bandwidth: {profile.copy_gbps:,.0f} GB/s)"
    )
    axes.set_title(profile.title, fontsize=10, loc="left")
    figure.savefig(path)


def save_hit_rates(outcomes: Sequence[Outcome], title: str, path: Path) -> None:
    """Plot each policy's steady hit rate against the share of experts in memory.

    Raises:
        ConfigError: matplotlib is missing.
    """
    figure = _figure(CURVES_INCHES)
    axes = figure.add_subplot()
    for policy in dict.fromkeys(outcome.policy for outcome in outcomes):
        points = sorted(
            (100 * outcome.share, 100 * outcome.steady_hit_rate)
            for outcome in outcomes
            if outcome.policy == policy
        )
        style = {"color": "black", "linestyle": "--"} if policy == OPTIMUM else {}
        axes.plot(*zip(*points, strict=True), marker="o", label=policy, **style)
    axes.set_xlabel("% of experts in memory")
    axes.set_ylabel("% hits, second half of the generated tokens")
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_ylim(0, 100)
    axes.legend()
    axes.set_title(title, fontsize=10, loc="left")
    figure.savefig(path)


def _figure(height_inches: float) -> Any:
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError(
            "[--plot] expected matplotlib: pip install 'moeflux-mlx[plot]'"
        ) from error
    # Ignore matplotlib settings in the working directory: they are not the user's own.
    if Path(matplotlib.matplotlib_fname()).resolve().parent == Path.cwd():
        matplotlib.rcdefaults()
    size = (WIDTH_INCHES, height_inches)
    return Figure(figsize=size, dpi=150, layout="constrained")


def _name(row: Row) -> str:
    labels = list(row.labels)
    if len(labels) > 3:
        labels = [labels[0], f"{len(labels) - 2} more", labels[-1]]
    graph = row.graph.removesuffix(" attention layer")
    return f"{graph}: {' + '.join(labels)}" if graph not in labels else graph


def _note(profile: Profile, row: Row) -> str:
    note = f"{row.us_per_step:,.1f} us, {row.count} x {row.us:,.1f}"
    return f"{note}, {row.gbps:,.1f} GB/s ({row.gbps / profile.copy_gbps:.0%})"
