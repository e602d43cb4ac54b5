"""Refuse a model that does not fit before loading it, and name a command that works."""

from __future__ import annotations

from pathlib import Path

import mlx.nn as nn
from rich.filesize import decimal

from .. import device
from ..errors import BudgetError
from ..experts.pool.budget import most_bytes
from ..experts.weights import leaves
from .plan import Needs

# Without a memory bound, leave room for a prompt of one of mlx-lm's chunks.
UNASKED_TOKENS = 2048


def check_fits(path: Path, model: nn.Module) -> None:
    """Raise BudgetError unless a model's parameters fit into the free memory.

    Args:
        path: the model's directory, for the message.
        model: the model with unevaluated parameters; only their shapes are used.
    """
    left = device.left_bytes()
    parameters = sum(array.nbytes for array in leaves(model.parameters()))
    if left is None or parameters <= left:
        return
    bound = f"{most_bytes() / 1e9:.2g}GB"
    raise BudgetError(
        f"[load] {path}: expected {decimal(parameters)} of free memory for the weights "
        f"but got {decimal(left)} of {decimal(device.physical_memory_bytes())}: stream "
        f'the experts with --memory {bound} (in Python memory="{bound}", for mlx-lm '
        f"MOEFLUX_MEMORY={bound})"
    )


def unasked_expert_bytes(needs: Needs) -> int:
    """Return the default bound on experts in bytes.

    It is 3/4 of the process's memory, or less: parameters, caches and scratch, which
    are allocated later, must fit too.
    """
    left = device.left_bytes()
    if left is None:
        return most_bytes()
    others = needs.resident_bytes(False) + device.PROCESS_GROWTH_BYTES
    others += needs.cache_state_bytes + UNASKED_TOKENS * needs.cache_row_bytes
    others += needs.scratch_bytes(UNASKED_TOKENS, UNASKED_TOKENS)
    return max(1, min(most_bytes(), left - others))
