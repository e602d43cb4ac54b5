"""Run ``moeflux`` as ``python -m moeflux_mlx.cli``."""

import sys

from . import main

sys.exit(main())
