"""Metal kernels on a CPU: compiled by clang, threads as fibers, accesses checked.

Its results are evidence, not proof: neither Apple's compiler nor its GPU takes part.

Imports: errors, device, engine.metal, system.
"""

from __future__ import annotations

from .call import call, written_source
from .compile import available, examine
from .program import Program

__all__ = ["Program", "available", "call", "examine", "written_source"]
