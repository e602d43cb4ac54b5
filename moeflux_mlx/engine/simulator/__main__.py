"""``python -m moeflux_mlx.engine.simulator FILE.metal ...``: compile Metal files."""

from __future__ import annotations

import sys
from pathlib import Path

from ...errors import SimulatorError
from .program import Program


def main(paths: list[str]) -> int:
    """Compile each file and list its kernels; return 1 if one does not compile."""
    failed = False
    for path in paths:
        try:
            program = Program.of_file(Path(path))
        except (OSError, SimulatorError) as error:
            print(f"{path}: {error}", file=sys.stderr)
            failed = True
            continue
        print(f"{path}: {len(program.kernels)} kernels can be run as they stand")
        for name in program.kernels:
            print(f"  {name}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
