"""Number and time of evaluations by label."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class LabelStats:
    """The number of waits under a label, and their nanoseconds in all."""

    count: int = 0
    wait_ns: int = 0


class Stats:
    """Waits by label."""

    def __init__(self) -> None:
        self._labels: dict[str, LabelStats] = {}

    def add(self, label: str, wait_ns: int) -> None:
        """Count one wait of ``wait_ns`` nanoseconds under ``label``."""
        stats = self._labels.setdefault(label, LabelStats())
        stats.count += 1
        stats.wait_ns += wait_ns

    def snapshot(self) -> dict[str, LabelStats]:
        """Return a copy that later evaluations do not change."""
        return {k: LabelStats(v.count, v.wait_ns) for k, v in self._labels.items()}

    def reset(self) -> None:
        """Drop all counts."""
        self._labels.clear()

    def table(self) -> str:
        """Return a table of labels, the slowest first, with shares in percent."""
        rows = sorted(self._labels.items(), key=lambda kv: -kv[1].wait_ns)
        total = sum(v.wait_ns for _, v in rows) or 1
        lines = [
            f"{'label':<40} {'count':>8} {'total ms':>10} {'mean us':>10} {'%':>6}"
        ]
        lines += [
            f"{label:<40} {s.count:>8} {s.wait_ns / 1e6:>10.2f} "
            f"{s.wait_ns / s.count / 1e3:>10.1f} {100 * s.wait_ns / total:>6.1f}"
            for label, s in rows
        ]
        return "\n".join(lines)
