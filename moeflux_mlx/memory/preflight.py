"""Say before loading that a model does not fit, and name the command that would do."""

from __future__ import annotations

from pathlib import Path

import mlx.nn as nn
from rich.filesize import decimal

from .. import device
from ..errors import BudgetError
from ..experts.pool.budget import most_bytes
from ..experts.weights import leaves
from .plan import Needs

# Where nobody bounds memory there is room for a prompt of one of mlx-lm's chunks.
UNASKED_TOKENS = 2048


def check_fits(path: Path, model: nn.Module) -> None:
    """Raise BudgetError unless a model's parameters fit into the memory that is left.

    Args:
        path: the model's directory, for the message.
        model: its parameters not evaluated yet: shapes alone count.
    """
    left = device.left_bytes()
    parameters = sum(array.nbytes for array in leaves(model.parameters()))
    if left is None or parameters <= left:
        return
    bound = f"{most_bytes() / 1e9:.2g}GB"
    raise BudgetError(
        f"[load] {path}: expected {decimal(parameters)} of memory for what is loaded "
        f"whole but this process can take {decimal(left)} more of "
        f"{decimal(device.physical_memory_bytes())}: stream the experts with --memory "
        f'{bound} (in Python memory="{bound}", for mlx-lm MOEFLUX_MEMORY={bound})'
    )


def unasked_expert_bytes(needs: Needs) -> int:
    """Return the bytes that experts may take where nobody bounds them.

    That is 3/4 of what this process may hold, but no more than is left beside
    parameters, caches and scratch, which come later.
    """
    left = device.left_bytes()
    if left is None:
        return most_bytes()
    others = needs.resident_bytes(False) + device.PROCESS_GROWTH_BYTES
    others += needs.cache_state_bytes + UNASKED_TOKENS * needs.cache_row_bytes
    others += needs.scratch_bytes(UNASKED_TOKENS, UNASKED_TOKENS)
    return max(1, min(most_bytes(), left - others))
