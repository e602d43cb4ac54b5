"""Times kernels of the working tree and of a commit in turns, for bench_kernels.

Each tree has a process, which makes the cases and times its own launches when it is
asked. Only one process works at a time, and MLX's own operations are left out.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from commits import ROOT, asked, import_from, script, unpacked

# A case: its family in bench_kernels, and its sizes.
Sizes = tuple[str, Mapping[str, int]]


def compare(
    commit: str,
    cases: Sequence[Sizes],
    executor: str,
    rounds: int,
    constants: Mapping[str, Any] | None = None,
) -> Iterator[dict[str, Any]]:
    """Yield a row for each side of ours that both trees have.

    ``us`` and ``us_there`` are medians over the rounds, ``ratio`` is the median of each
    round's ratio: above 1, the working tree is slower.

    Args:
        commit: a commit, or a folder with its files.
        rounds: how often each tree times a case; they begin in turns.
    """
    given = executor, json.dumps(constants or {})
    with (
        unpacked(commit) as tree,
        asked(__file__, str(ROOT), *given) as here,
        asked(__file__, str(tree), *given) as there,
    ):
        for case in cases:
            make = json.dumps(("make", *case))
            name, _ = here(make), there(make)
            times: list[tuple[dict[str, Any], dict[str, Any]]] = []
            for turn in range(rounds):
                order = (here, there) if turn % 2 == 0 else (there, here)
                found = {side: side(json.dumps(["time"])) for side in order}
                times.append((found[here], found[there]))
            for side in times[0][0]:
                if side in times[0][1]:
                    pairs = [(ours[side], theirs[side]) for ours, theirs in times]
                    yield {"case": name, "side": side, **figures(pairs)}


def figures(pairs: Sequence[tuple[Any, Any]]) -> dict[str, Any]:
    """Return the figures of a side from each round's two timings."""
    ratios = [ours["us"] / theirs["us"] for ours, theirs in pairs]
    hidden = all(timing["hidden"] for pair in pairs for timing in pair)
    return {
        "us": statistics.median(ours["us"] for ours, _ in pairs),
        "us_there": statistics.median(theirs["us"] for _, theirs in pairs),
        "ratio": statistics.median(ratios),
        "least_ratio": min(ratios),
        "largest_ratio": max(ratios),
        "host_hidden": "yes" if hidden else "no",
    }


def serve(tree: Path, executor: str, constants: Mapping[str, Any]) -> None:
    """Answer requests from standard input: ("make", family, sizes) and ("time",)."""
    # Keep other output out of the answers.
    answers, sys.stdout = sys.stdout, sys.stderr
    import_from(tree)
    os.chdir(tree)
    bench: Any = script(tree / "scripts" / "bench_kernels")
    vars(bench).update(constants)
    run_by = bench.open_executor(executor)
    timers = [bench.timer_for(run_by, bench.ROUNDS, n) for n in bench.QUEUED]
    case: Any = None
    for line in sys.stdin:
        what, *given = json.loads(line)
        answer: Any
        if what == "make":
            family, sizes = given
            make, _ = bench.FAMILIES[family]
            case = None
            case = make(run_by.run, **sizes)
            answer = case.name
        else:
            ours = {n: s for n, s in case.sides.items() if not n.startswith("mlx")}
            timings = {n: bench.time_side(timers, case, s) for n, s in ours.items()}
            answer = {
                # A queue that took no longer than its links alone has no time.
                name: {"us": 1e6 * max(t.seconds, 1e-9), "hidden": t.is_hidden}
                for name, t in timings.items()
            }
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    serve(Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3]))
