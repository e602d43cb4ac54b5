"""Find the memory plan of a served model, whatever its class."""

from __future__ import annotations

import sys
from typing import Any


def keeper_of(model: Any) -> Any:
    """Return the keeper of a model's memory plan, or None without a bound."""
    return getattr(_owner(model), "keeper", None)


def plan_of(model: Any) -> Any:
    """Return a model's memory plan, or None if nothing bounds its process."""
    return getattr(_owner(model), "plan", None)


def least_of(model: Any, number: int) -> int:
    """Return the smallest of all processes' numbers; all of them must call this."""
    # A model of mlx-lm's class has calls, one of ours a runtime.
    owner = vars(model).get("calls", vars(model).get("runtime"))
    return number if owner is None else int(owner.together.least(number))


def bounds_of(model: Any) -> tuple[int, int]:
    """Return the size of a model's vocabulary and its maximum sequence length."""
    if (needs := getattr(model, "needs", None)) is not None:
        return needs.vocab_size, needs.most_tokens
    fields = dict(vars(getattr(model, "args", object)))
    fields |= fields.get("text_config") or {}
    names = "vocab_size", "max_position_embeddings"
    found = [fields.get(name) for name in names]
    vocab_size, most = (
        n if isinstance(n, int) and n > 0 else sys.maxsize for n in found
    )
    return vocab_size, most


def _owner(model: Any) -> Any:
    return getattr(model, "runtime", model)
