"""Fusions of products with matrices: after a norm, and before the residual stream."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import mlx.core as mx

from ....experts.weights import Weight
from ...graph.op import JointRows, Op
from ...graph.rows import RowPart, whole
from ...launch import quant
from ...ops.elementwise import ResidualAddNTokens, SwigluFusedBatched
from ...ops.norm import RmsNormBf16NTokens
from ...ops.quant import MatvecNTokens
from ..registry import Run, Values, fusion
from ..rows import form, kernel_form, parts


def is_product(op: Op, *, with_bias: bool = False) -> bool:
    """Return whether an Op is a product of one token that kernels can run."""
    return (
        isinstance(op, MatvecNTokens)
        and op.n_tokens == 1
        and (with_bias or op.bias is None)
        and kernel_form(op.weight.quantization)
    )


def _reads(op: Op, x: Any) -> bool:
    """Return whether an Op is a product with ``x``, with or without a bias."""
    return is_product(op, with_bias=True) and op.input == x  # type: ignore[attr-defined]


def _is_dense(op: Any) -> bool:
    """Return whether an Op is a product of one token with a dense matrix."""
    one = isinstance(op, MatvecNTokens) and op.n_tokens == 1
    return one and op.weight.quantization is None


# The most rows of a dense matrix that our kernel multiplies. A larger one hides its
# launches, and MLX has tuned its product longer than we have.
MAX_DENSE = 1 << 14


def _takes_dense(op: Any) -> bool:
    """Return whether our kernels multiply a row by the dense matrix of an Op."""
    if not _is_dense(op) or op.in_dim % quant.DENSE_VALUES:
        return False
    joint = op.weight.joint
    return bool((joint.n_rows if joint else op.out_dim) <= MAX_DENSE)


def _norm_and_dense(ops: Sequence[Any]) -> int:
    """Count a norm, a dense product that reads it, and a quantised one if any."""
    norm = ops[0]
    if norm.n_tokens > 1:
        return 0
    n = 1
    kinds: list[bool] = []
    while len(kinds) < 2 and n < len(ops):
        same = _of_one_matrix(ops[n:], norm.out)
        if not same or _is_dense(same[0]) in kinds:
            break
        kinds.append(_is_dense(same[0]))
        n += len(same)
    return n if True in kinds else 0


def _of_one_matrix(ops: Sequence[Any], x: Any) -> list[Any]:
    """Return the leading products of ``x`` with one matrix that a kernel takes."""

    def reads(op: Any) -> bool:
        fits = _takes_dense(op) or is_product(op)
        return fits and op.input == x

    if not reads(ops[0]):
        return []
    n = _n_joint(ops, reads)
    return list(ops[: n or (ops[0].weight.joint is None)])


@fusion(
    "norm_dense_matvecs",
    (RmsNormBf16NTokens, MatvecNTokens),
    _norm_and_dense,
    joint=True,
)
def norm_dense_matvecs(ops: Sequence[Any], run: Run, values: Values) -> Values:
    """Run a norm and the products with it; return all as parts of one row."""
    norm, *products = ops
    dense, *packed = sorted(
        _by_matrix(products), key=lambda same: not _is_dense(same[0])
    )
    x, weight = values[norm.x], values[norm.weight.name].w
    product, group_size = None, quant.GROUP_SIZES[0]
    for same in packed:
        matrix = _matrix(same, values)
        bits, group_size = form(matrix)
        product = *parts(matrix), bits
    matrix, bias = _matrix(dense, values).w, _bias(dense, values, x.dtype)
    launch = quant.norm_dense_matvecs(
        x, weight, matrix, norm.eps, bias, product, group_size
    )
    (row,) = run(launch)
    sizes = [sum(op.out_dim for op in same) for same in (dense, *packed)]
    *starts, _ = quant.norm_row(norm.dim, sizes)
    out = _row_parts(row, starts, (dense, *packed))
    return {**out, norm.out: RowPart(row, starts[-1], norm.dim)}


def _by_matrix(products: Sequence[Any]) -> list[list[Any]]:
    """Return consecutive products in lists, one for each joint or single matrix."""
    names = [
        op.weight.joint.name if op.weight.joint else op.weight.name for op in products
    ]
    by_name: dict[str, list[Any]] = {}
    for name, op in zip(names, products, strict=True):
        by_name.setdefault(name, []).append(op)
    return [*by_name.values()]


def _matrix(products: Sequence[Any], values: Values) -> Weight:
    """Return the matrix that products share."""
    ref = products[0].weight
    found: Weight = values[ref.joint.name if ref.joint else ref.name]
    return found


def _row_parts(
    row: mx.array, starts: Sequence[int], products: Sequence[Sequence[Any]]
) -> dict[Any, RowPart]:
    """Return products as parts of a row; those of one matrix begin at its start."""
    out: dict[Any, RowPart] = {}
    for start, same in zip(starts, products, strict=False):
        for op in same:
            first = op.weight.joint.first if op.weight.joint else 0
            out[op.output] = RowPart(row, start + first, op.out_dim)
    return out


def _norm_and_products(ops: Sequence[Any]) -> int:
    """Count a norm and the products that read it, with one or two whole matrices."""
    norm = ops[0]
    if norm.n_tokens > 1:
        return 0
    n, first = 1, ops[1].weight
    matrices = itertools.islice(_matrices(ops[1:], norm.out), quant.MAX_PRODUCTS)
    for matrix in matrices:
        own = matrix[0].weight
        same_size = own.quantization.group_size == first.quantization.group_size
        if not same_size or own.dtype != first.dtype:
            break
        n += len(matrix)
    return n if n > 1 else 0


def _matrices(ops: Sequence[Any], x: Any) -> Iterator[list[Any]]:
    """Yield lists of the leading products with ``x``, one list for a joint matrix."""
    while ops and _reads(ops[0], x):
        joint = ops[0].weight.joint
        n = _n_joint(ops, lambda op: _reads(op, x))
        if joint is not None and not n:
            return
        yield list(ops[: n or 1])
        ops = ops[n or 1 :]


def _n_joint(ops: Sequence[Any], reads: Callable[[Any], bool]) -> int:
    """Return how many leading products make up a joint matrix; 0 for none.

    Args:
        reads: returns whether an Op is a product with the row of the first one.
    """
    joint, rows = ops[0].weight.joint, 0
    for n, op in enumerate(ops):
        own = op.weight.joint if reads(op) else None
        if joint is None or own != JointRows(joint.name, rows, joint.n_rows):
            return 0
        rows += op.out_dim
        if rows == joint.n_rows:
            return n + 1
    return 0


@fusion(
    "norm_matvecs",
    (RmsNormBf16NTokens, MatvecNTokens),
    _norm_and_products,
    takes_parts=True,
    joint=True,
)
def norm_matvecs(ops: Sequence[Any], run: Run, values: Values) -> Values:
    """Run a norm and the products with its output; return all as parts of one row."""
    norm, *products = ops
    x, weight = _beginning(values[norm.x]), values[norm.weight.name].w
    matrices, biases, parts_of = [], [], []
    for same in _matrices(products, norm.out):
        matrix = _matrix(same, values)
        group_size = form(matrix)[1]
        matrices.append((*parts(matrix), form(matrix)[0]))
        biases.append(_bias(same, values, x.dtype))
        parts_of.append(same)
    launch = quant.norm_matvecs(x, weight, matrices, norm.eps, group_size, biases)
    (row,) = run(launch)
    *starts, _ = quant.norm_row(norm.dim, [m[0].shape[0] for m in matrices])
    out = _row_parts(row, starts, parts_of)
    return {**out, norm.out: RowPart(row, starts[-1], norm.dim)}


def _beginning(x: Any) -> mx.array:
    """Return the row that values begin; a part that begins its row is not cut out."""
    row: mx.array = x.row if isinstance(x, RowPart) and x.start == 0 else whole(x)
    return row


def _norm_and_swiglu(ops: Sequence[Any]) -> int:
    """Count a norm, the two halves of a joint matrix, and their SwiGLU."""
    norm, gate, up, act, *later = ops
    halves = gate.out_dim == up.out_dim and (act.gate, act.up) == (
        gate.output,
        up.output,
    )
    joint = _n_joint(ops[1:3], lambda op: is_product(op) and op.input == norm.out)
    # The launch writes the activation alone.
    inner = {norm.out, gate.output, up.output}
    alone = not any(buf in inner for op in later for buf in op.reads)
    return 4 * (norm.n_tokens == 1 and halves and joint == 2 and alone)


@fusion(
    "norm_gate_up_swiglu",
    (RmsNormBf16NTokens, MatvecNTokens, MatvecNTokens, SwigluFusedBatched),
    _norm_and_swiglu,
    takes_parts=True,
    joint=True,
)
def norm_gate_up_swiglu(ops: Sequence[Any], run: Run, values: Values) -> Values:
    """Run a norm, two products with it and their SwiGLU."""
    norm, gate, _, act = ops
    x, weight, matrix = (
        _beginning(values[norm.x]),
        values[norm.weight.name].w,
        _matrix([gate], values),
    )
    given = x, weight, *parts(matrix), norm.eps, *form(matrix)
    return {act.out: run(quant.norm_gate_up_swiglu(*given))[0]}


def _bias(products: Sequence[Any], values: Values, dtype: mx.Dtype) -> Any:
    """Return the bias of the products with one matrix, or None."""
    ref = next((op.bias for op in products if op.bias is not None), None)
    if ref is None:
        return None
    bias: mx.array = values[ref.joint.name if ref.joint else ref.name].w
    return bias.astype(dtype)


def _dense_products(ops: Sequence[Any]) -> int:
    x = ops[0].input
    return _n_joint(ops, lambda op: _is_dense(op) and op.input == x)


@fusion(
    "mlx_products",
    (MatvecNTokens, MatvecNTokens),
    _dense_products,
    joint=True,
    kernels=(),
)
def dense_products(ops: Sequence[Any], _run: Run, values: Values) -> Values:
    """Multiply a row by a joint dense matrix; return all products as parts of one."""
    joint = ops[0].weight.joint
    x = values[ops[0].input]
    row = x @ values[joint.name].w.astype(x.dtype).T
    bias = _bias(ops, values, x.dtype)
    row = row if bias is None else row + bias
    parts_of = ((op, op.weight.joint.first, op.out_dim) for op in ops)
    return {op.output: RowPart(row, at, size) for op, at, size in parts_of}


def _dense_and_residual(ops: Sequence[Any]) -> int:
    return 2 * (_takes_dense(ops[0]) and ops[1].a == ops[0].output)


@fusion("dense_residual", (MatvecNTokens, ResidualAddNTokens), _dense_and_residual)
def dense_residual(ops: Sequence[Any], run: Run, values: Values) -> Values:
    """Run a dense product and its sum with the residual stream."""
    product, add = ops
    x, residual = values[product.input], values[add.b]
    bias = None if product.bias is None else values[product.bias.name].w.astype(x.dtype)
    matrix = values[product.weight.name].w
    return {add.out: run(quant.dense_residual(x, matrix, residual, bias))[0]}


def _product_and_residual(ops: Sequence[Any]) -> int:
    fits = is_product(ops[0], with_bias=True)
    return 2 * (fits and ops[1].a == ops[0].output)


@fusion("matvec_residual", (MatvecNTokens, ResidualAddNTokens), _product_and_residual)
def matvec_residual(ops: Sequence[Any], run: Run, values: Values) -> Values:
    """Run a product and its sum with the residual stream."""
    product, add = ops
    weight, x, residual = (
        values[product.weight.name],
        values[product.input],
        values[add.b],
    )
    bias = None if product.bias is None else values[product.bias.name].w
    given = x, *parts(weight), residual, *form(weight)
    launch = quant.matvec_residual(
        *given, None if bias is None else bias.astype(x.dtype)
    )
    return {add.out: run(launch)[0]}
