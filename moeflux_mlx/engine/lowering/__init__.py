"""From Ops to launches: the one table of the kernels that run each Op.

One module per family; in each, the preferred way of an Op stands first.

Imports: errors, config, device, engine.graph, engine.launch, engine.ops, experts,
system.
"""

from ..graph.op import REGISTRY
from . import attention, groups, latent, linear_attention, moe, rows
from .table import (
    GROUPS,
    MLX,
    PREFERRED,
    TABLE,
    Group,
    Usable,
    Way,
    any_kernel,
    choose,
    default_way,
    fused,
    groups_ahead,
    launched_by,
    lowered,
    ways,
)

_missing = sorted(set(REGISTRY) - {op.__name__ for op in TABLE})
if _missing:
    raise TypeError(f"[lowering] Ops without a kernel: {', '.join(_missing)}")

__all__ = [
    "GROUPS",
    "MLX",
    "PREFERRED",
    "TABLE",
    "Group",
    "Usable",
    "Way",
    "any_kernel",
    "attention",
    "choose",
    "default_way",
    "fused",
    "groups",
    "groups_ahead",
    "latent",
    "launched_by",
    "linear_attention",
    "lowered",
    "moe",
    "rows",
    "ways",
]
