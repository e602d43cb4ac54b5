"""Consecutive Ops as one launch: what decoding one token is made of.

A launch costs some microseconds whatever it does, and a layer of one token is some twenty
Ops of which most do next to nothing. All groups here are of one token.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..graph.op import Op
from ..launch import quant
from ..ops.elementwise import ResidualAddNTokens
from ..ops.norm import RmsNormBf16NTokens
from ..ops.quant import MatvecNTokens
from .rows import form, kernel_form, parts
from .table import Run, Values, group


def _is_product(op: Op) -> bool:
    return (
        isinstance(op, MatvecNTokens)
        and op.n_tokens == 1
        and op.bias is None
        and kernel_form(op.weight)
    )


def _norm_and_products(ops: Sequence[Op]) -> int:
    """Count a norm and the products that read it and are quantised in one group size."""
    norm = ops[0]
    if not isinstance(norm, RmsNormBf16NTokens) or norm.n_tokens > 1:
        return 0
    n = 1
    for op in ops[1 : 1 + quant.MAX_PRODUCTS]:
        if not _is_product(op) or op.input != norm.out:
            break
        if op.weight.quantization.group_size != ops[1].weight.quantization.group_size:
            break
        n += 1
    return n if n > 1 else 0


@group("norm_matvecs", _norm_and_products)
def norm_matvecs(ops: Sequence[Op], run: Run, values: Values) -> Values:
    """Run a norm and up to four products with its row."""
    norm, *products = ops
    matrices = []
    for op in products:
        weight = values[op.weight]
        matrices.append((*parts(weight), form(weight)[0]))
    x, weight = values[norm.x], values[norm.weight]
    group_size = form(values[products[0].weight])[1]
    launch = quant.norm_matvecs(
        x.reshape(-1), weight.w, matrices, norm.eps, group_size
    )
    normed, *outs = run(launch)
    written = {norm.out: normed.reshape(x.shape)}
    for op, out in zip(products, outs, strict=False):
        written[op.output] = out.reshape(1, -1)
    return written


def _product_and_residual(ops: Sequence[Op]) -> int:
    if len(ops) < 2 or not _is_product(ops[0]):
        return 0
    add = ops[1]
    return 2 * (isinstance(add, ResidualAddNTokens) and add.a == ops[0].output)


@group("matvec_residual", _product_and_residual)
def matvec_residual(ops: Sequence[Op], run: Run, values: Values) -> Values:
    """Run a product that is added to the residual stream."""
    product, add = ops
    weight, residual = values[product.weight], values[add.b]
    launch = quant.matvec_residual(
        values[product.input].reshape(-1),
        *parts(weight),
        residual.reshape(-1),
        *form(weight),
    )
    return {add.out: run(launch)[0].reshape(residual.shape)}
