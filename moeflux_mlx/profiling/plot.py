"""Draw a profile: what of a step goes where."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import ConfigError
from .profile import Profile, Row

MAX_BARS = 40
BAR_INCHES, MARGIN_INCHES, WIDTH_INCHES = 0.28, 1.6, 11.0


def check_plot(path: Path) -> None:
    """Check that a plot can be drawn into a file, before anything is measured.

    Raises:
        ConfigError: matplotlib is missing, or it writes no files of that kind.
    """
    figure = _figure(1)
    suffix = path.suffix.lstrip(".").lower()
    known = figure.canvas.get_supported_filetypes()
    if suffix not in known:
        names = ", ".join(f".{name}" for name in known)
        raise ConfigError(f"[--plot] {path}: expected a file of {names}")


def save_plot(profile: Profile, path: Path) -> None:
    """Draw one bar a kind of step, microseconds of a whole step, with its GB/s.

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
    figure = _figure(len(bars))
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


def _figure(n_bars: int) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError(
            "[--plot] expected matplotlib: pip install 'moeflux-mlx[plot]'"
        ) from error
    height = MARGIN_INCHES + BAR_INCHES * n_bars
    return Figure(figsize=(WIDTH_INCHES, height), dpi=150, layout="constrained")


def _name(row: Row) -> str:
    labels = list(row.labels)
    if len(labels) > 3:
        labels = [labels[0], f"{len(labels) - 2} more", labels[-1]]
    graph = row.graph.removesuffix(" attention layer")
    return f"{graph}: {' + '.join(labels)}" if graph not in labels else graph


def _note(profile: Profile, row: Row) -> str:
    note = f"{row.us_per_step:,.1f} us, {row.count} x {row.us:,.1f}"
    return f"{note}, {row.gbps:,.1f} GB/s ({row.gbps / profile.copy_gbps:.0%})"
