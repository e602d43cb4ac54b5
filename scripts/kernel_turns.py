"""Times kernels of the working tree and of a commit in turns, for bench_kernels.

Each tree has a process, which makes the cases and times its own launches when it is
asked. Only one process works at a time, and MLX's own operations are left out.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from commits import ROOT, import_from, script, unpacked

# A case: its family in bench_kernels, and its sizes.
Sizes = tuple[str, Mapping[str, int]]


class Timed:
    """A process that times the launches of one tree.

    Args:
        tree: a folder with the files of a commit.
        executor: the name of its executor.
        constants: values of bench_kernels that differ from its own.
    """

    def __init__(self, tree: Path, executor: str, constants: Mapping[str, Any]):
        command = [sys.executable, __file__, str(tree), executor, json.dumps(constants)]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)

    def ask(self, *request: Any) -> Any:
        """Return the answer to a request; SystemExit if the process ended."""
        to, back = self._process.stdin, self._process.stdout
        assert to and back
        print(json.dumps(request), file=to, flush=True)
        answer = back.readline()
        if not answer:
            raise SystemExit("bench_kernels: a tree's process ended; see its message")
        return json.loads(answer)

    def __enter__(self) -> Timed:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()


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
    given = executor, constants or {}
    with (
        unpacked(commit) as tree,
        Timed(ROOT, *given) as here,
        Timed(tree, *given) as there,
    ):
        for case in cases:
            name = here.ask("make", *case)
            there.ask("make", *case)
            times: list[tuple[dict[str, Any], dict[str, Any]]] = []
            for turn in range(rounds):
                order = (here, there) if turn % 2 == 0 else (there, here)
                found = {side: side.ask("time") for side in order}
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
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    serve(Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3]))
