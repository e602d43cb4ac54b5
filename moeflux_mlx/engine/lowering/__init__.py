"""From Ops to launches: the registry of the ways to run each Op.

Each family has a module, in which the preferred way of an Op comes first.

Imports: errors, config, device, engine.graph, engine.launch, engine.ops, experts,
experts.compute, system.
"""

from ..graph.op import REGISTRY
from . import attention, fusions, latent, linear_attention, moe, rows
from .registry import (
    FUSIONS,
    MLX,
    PREFERRED,
    WAYS,
    Fusion,
    Usable,
    Way,
    any_kernel,
    choose,
    default_way,
    fused,
    fusions_ahead,
    launched_by,
    lowered,
    ways,
)

_missing = sorted(set(REGISTRY) - {op.__name__ for op in WAYS})
if _missing:
    raise TypeError(f"[lowering] Ops without a kernel: {', '.join(_missing)}")

__all__ = [
    "FUSIONS",
    "MLX",
    "PREFERRED",
    "WAYS",
    "Fusion",
    "Usable",
    "Way",
    "any_kernel",
    "attention",
    "choose",
    "default_way",
    "fused",
    "fusions",
    "fusions_ahead",
    "latent",
    "launched_by",
    "linear_attention",
    "lowered",
    "moe",
    "rows",
    "ways",
]
