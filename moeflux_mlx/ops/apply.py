"""Apply one Op to arrays outside a graph, with gradients."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import mlx.core as mx

from ..engine.graph.buffers import BufId
from ..engine.graph.op import Access, Op, WeightRef
from ..engine.graph.roles import ExpertBaseBuf
from ..experts.compute.resident import ResidentExperts
from ..experts.weights import ExpertWeights, Weight
from .checks import bound, check, nan_unless, weight

Function = Callable[..., Any]


def apply(op_type: type[Op], fields: Mapping[str, Any], **values: Any) -> Any:
    """Run one Op on arrays and return its output, or the tuple of its outputs.

    The default executor's kernel runs, if there is one. Gradients use the Op's
    reference; they reach arrays, weights and experts that are not quantised.

    Args:
        op_type: the Op.
        fields: the Op's numbers by field name.
        values: the Op's inputs by field name: arrays, weights (a ``Weight`` or a dense
            array), experts (``ExpertWeights`` or ``GraphExperts``); None for an absent
            optional input.

    Raises:
        Misfit: a value has another type or shape than the Op declares, or an index is
            out of range; names the field.
    """
    reads = [f.name for f in op_type.buffer_fields if f.access & Access.READ]
    given: dict[str, Any]
    given = {name: values.get(name) for name in (*reads, *op_type.weight_fields)}
    for name in op_type.weight_fields:
        if isinstance(given[name], mx.array):
            given[name] = Weight(given[name])
    for field in op_type.buffer_fields:
        if field.role is ExpertBaseBuf and isinstance(given[field.name], ExpertWeights):
            given[field.name] = ResidentExperts(given[field.name])
    op = _op(op_type, fields, given)
    check(op, given)
    bounded, inside = bound(op, given)
    executor = _executor()
    reference: Function = op.reference  # type: ignore[attr-defined]
    if executor.takes_host_arrays:
        outputs = reference(*bounded.values())
    else:
        kernel, inputs = executor.kernel(op), list(bounded.values())
        outputs = _differentiable(kernel, reference, inputs)
    return nan_unless(inside, outputs)


@functools.cache
def _executor() -> Any:
    from ..engine.executors import open_executor

    return open_executor()


def _op(op_type: type[Op], fields: Mapping[str, Any], given: Mapping[str, Any]) -> Any:
    """Make the Op, with numbered buffers that no pool holds."""
    operands: dict[str, Any] = {"label": op_type.__name__}
    for i, field in enumerate(op_type.buffer_fields):
        absent = field.optional and given.get(field.name) is None
        operands[field.name] = None if absent else BufId(i, field.role)
    for name in op_type.weight_fields:
        operands[name] = _ref(op_type, name, given[name])
    return op_type(**operands, **fields)


def _ref(op_type: type[Op], name: str, value: Any) -> WeightRef | None:
    optional = {f.name for f in dataclasses.fields(op_type) if f.default is None}  # type: ignore[arg-type]
    if value is None and name in optional:
        return None
    return WeightRef.of(name, weight(name, value))


def _differentiable(kernel: Function, reference: Function, values: list[Any]) -> Any:
    """Call ``kernel`` with the gradient of ``reference``."""
    arrays, rebuild = _flatten(values)

    @mx.custom_function
    def call(*flat: mx.array) -> Any:
        return kernel(*rebuild(flat))

    @call.vjp  # type: ignore[misc]
    def vjp(primals: Any, cotangents: Any, _outputs: Any) -> tuple[mx.array, ...]:
        primals = _as_list(primals)
        wanted = [i for i, x in enumerate(primals) if _is_float(x)]

        def of_floats(*floats: mx.array) -> Any:
            flat = list(primals)
            for i, x in zip(wanted, floats, strict=True):
                flat[i] = x
            return _floats(reference(*rebuild(flat)))

        grown = _floats(cotangents)
        _, found = mx.vjp(of_floats, [primals[i] for i in wanted], grown)
        gradients = [mx.zeros_like(x) for x in primals]
        for i, gradient in zip(wanted, found, strict=True):
            gradients[i] = gradient
        return tuple(gradients)

    return call(*arrays)


def _is_float(x: mx.array) -> bool:
    return mx.issubdtype(x.dtype, mx.floating)


def _floats(values: Any) -> list[mx.array]:
    return [x for x in _as_list(values) if _is_float(x)]


def _as_list(values: Any) -> list[mx.array]:
    """Return arrays as a list; MLX passes a single array without one."""
    return list(values) if isinstance(values, (tuple, list)) else [values]


def _flatten(
    values: Sequence[Any],
) -> tuple[list[mx.array], Callable[[Sequence[mx.array]], list[Any]]]:
    """Return the arrays in ``values``, and a function that puts others in their place.

    Arrays inside weights and dense experts count too.
    """
    arrays: list[mx.array] = []

    def visit(value: Any, take: Callable[[mx.array], mx.array]) -> Any:
        if isinstance(value, mx.array):
            return take(value)
        if isinstance(value, Weight) and value.in_pool is None:
            return value.mapped(lambda x: visit(x, take))
        # Quantised experts are constants: MLX has no gradient for gathered scales.
        if type(value) is ResidentExperts and not value.weights.gate.quantization:
            stacks = value.weights
            gate, up, down = (
                visit(x, take) for x in (stacks.gate, stacks.up, stacks.down)
            )
            return ResidentExperts(ExpertWeights(gate, up, down))
        return value

    def keep(x: mx.array) -> mx.array:
        arrays.append(x)
        return x

    for value in values:
        visit(value, keep)

    def rebuild(flat: Sequence[mx.array]) -> list[Any]:
        rest = iter(flat)
        return [visit(value, lambda _: next(rest)) for value in values]

    return arrays, rebuild
