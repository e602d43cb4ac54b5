"""``moeflux inspect --graph``: one layer's Ops, costs and planned memory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rich.filesize import decimal
from rich.table import Table

from ..engine.graph import Cost, planned_peak_bytes
from ..errors import ConfigError
from ..loading import load


@dataclass(frozen=True)
class OpRow:
    """One Op of the layer: variant, label and cost."""

    index: int
    variant: str
    label: str
    flops: int
    bytes: int
    ssd_bytes: int


@dataclass(frozen=True)
class GraphReport:
    """A layer's graph for one sequence of ``n_tokens``.

    ``planned_peak_bytes`` follows from the lifetimes of buffers and the Ops' scratch
    memory, ``measured_peak_bytes`` is MLX's peak when it runs Op by Op. Both exclude
    the inputs.
    """

    name: str
    layer: int
    n_tokens: int
    ops: list[OpRow]
    total: Cost
    n_buffers: int
    physical_buffer_count: int
    planned_peak_bytes: int
    measured_peak_bytes: int
    dump: str


def report(
    model_path: Path, expert_memory: int | None, layer: int, n_tokens: int
) -> GraphReport:
    """Build, run and describe one layer of a model.

    Args:
        expert_memory: bytes for experts, for a packed model.

    Raises:
        ConfigError: the layer does not exist, or ``n_tokens`` is below 1.
        ModelError: the directory is not a supported model.
    """
    if n_tokens < 1:
        raise ConfigError(f"[--tokens] expected at least 1 but got {n_tokens}")
    model, _ = load(model_path, expert_memory=expert_memory, native=True, lazy=True)
    layers = model.graph_layers
    if not 0 <= layer < len(layers):
        raise ConfigError(
            f"[--graph] expected a layer from 0 to {len(layers) - 1} but got {layer}"
        )
    sample = layers[layer].sample(n_tokens, model.engine.dtype)
    graph = sample.layer.graph
    rows = [
        OpRow(i, op.variant_name, op.label, *vars(op.cost()).values())
        for i, op in enumerate(graph)
    ]
    return GraphReport(
        name=graph.name,
        layer=layer,
        n_tokens=n_tokens,
        ops=rows,
        total=graph.cost(),
        n_buffers=len(graph.pool.infos),
        physical_buffer_count=graph.pool.physical_buffer_count,
        planned_peak_bytes=planned_peak_bytes(graph),
        measured_peak_bytes=sample.peak_bytes(model.runtime.executor),
        dump=graph.dump(),
    )


def report_table(report: GraphReport) -> Table:
    """Return a table with one Op per row, and totals and memory below."""
    title = f"layer {report.layer}: {report.name}, {report.n_tokens} tokens"
    table = Table("", "Op", "label", "MFLOP", "bytes", "from disk", title=title)
    for row in report.ops:
        table.add_row(
            str(row.index),
            row.variant,
            row.label,
            f"{row.flops / 1e6:.3f}",
            decimal(row.bytes),
            decimal(row.ssd_bytes) if row.ssd_bytes else "",
        )
    table.add_section()
    total = report.total
    flops = f"{total.flops / 1e6:.3f}"
    table.add_row(
        "", "total", "", flops, decimal(total.bytes), decimal(total.ssd_bytes)
    )
    planned, measured = report.planned_peak_bytes, report.measured_peak_bytes
    table.add_row("", "planned peak", "", "", decimal(planned), "")
    table.add_row("", "measured peak", "Op by Op", "", decimal(measured), "")
    counts = f"{report.physical_buffer_count} for {report.n_buffers}"
    table.add_row("", "physical buffers", "", "", counts, "")
    return table
