"""Run one side's job, which ``process.run_job`` wrote to a file."""

import sys
from pathlib import Path

from .process import work

sys.exit(work(Path(sys.argv[1])))
