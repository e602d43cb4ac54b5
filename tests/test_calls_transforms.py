"""Every transformation of MLX on every kind of call gives stock's value or an error.

A transformation that stock mlx-lm cannot do ends in an error for both. No result may
differ from stock's.
"""

from __future__ import annotations

import contextlib
import gc
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.nn.utils import checkpoint as checkpointed
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model
from test_steps import Lazy, Traced
from tiny import make_checkpoint

from moeflux_mlx.calls.transforms import compiles, in_transformation, is_traced
from moeflux_mlx.engine.executors import EXECUTORS
from moeflux_mlx.engine.runtime import RunOptions
from moeflux_mlx.errors import BudgetError, ModelError
from moeflux_mlx.experts.files.pack import pack
from moeflux_mlx.experts.files.store import open_store
from moeflux_mlx.experts.pool.pool import POOL_ALIGNMENT
from moeflux_mlx.loading import model_classes

PROMPT = mx.array(np.random.RandomState(0).randint(1, 320, (1, 5)))
LAYERS = dict(num_hidden_layers=2, full_attention_interval=2)


@pytest.fixture(autouse=True)
def executors(monkeypatch):
    for executor in (Lazy, Traced):
        monkeypatch.setitem(EXECUTORS, executor.name, executor)


def checkpoint_of(tmp_path_factory, bits: int | None) -> Path:
    path = tmp_path_factory.mktemp("transforms") / "plain"
    make_checkpoint(path, bits=bits, **LAYERS)
    pack(path, path.with_name("packed"))
    return path


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    return checkpoint_of(tmp_path_factory, 4)


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> Path:
    return checkpoint_of(tmp_path_factory, None)


@cache
def stock_of(path: Path) -> nn.Module:
    return load_model(path)[0]


def load(path: Path, *, packed: bool = False, n_slots: int | None = None, **options):
    """Load a model that was never called, with ``n_slots`` slots for experts."""
    store = None
    if packed or n_slots is not None:
        store = open_store(path.with_name("packed") if packed else path)
    if n_slots is not None:
        stride = store.layout(0).stride
        options["expert_memory"] = POOL_ALIGNMENT + n_slots * stride
    opened = None if store is None else (lambda: store)
    options = RunOptions(open_experts=opened, directory=path, **options)
    return load_model(
        path.with_name("packed") if packed else path,
        model_config={"model_file": None},
        get_model_classes=lambda config: model_classes(config, options),
    )[0]


# Experts are parameters, all in the pool, or streamed.
WHOLE = {"packed": dict(packed=True), "packed-on": dict(packed=True, optimistic="on")}
STREAMED = {
    "streamed": dict(n_slots=5),
    "streamed-on": dict(n_slots=5, optimistic="on"),
    "packed-streamed": dict(packed=True, n_slots=5),
    "packed-traced": dict(packed=True, n_slots=5, executor="traced"),
    "packed-budget": dict(packed=True, memory=1 << 34),
}


@dataclass
class Case:
    """A model and the arguments of its call."""

    model: nn.Module
    stock: nn.Module
    n_tokens: int
    cached: bool

    def __call__(self, tokens: mx.array | None, rows: mx.array | None = None):
        tokens = self.tokens if tokens is None else tokens
        caches = None
        if self.cached:
            caches = make_prompt_cache(self.model)
            before = self.model(PROMPT + 1, cache=caches)
            mx.eval(before, [c.state for c in caches])
        return self.model(tokens, cache=caches, input_embeddings=rows)

    @property
    def tokens(self) -> mx.array:
        return PROMPT[:, : self.n_tokens]

    @property
    def rows(self) -> mx.array:
        return self.stock.language_model.model.embed_tokens(self.tokens)

    def loss(self, rows: mx.array | None = None) -> mx.array:
        return (self(None, rows) ** 2).mean()


def gradients_of_parameters(case: Case) -> Any:
    return nn.value_and_grad(case.model, lambda _: case.loss())(case.model)


def gradient_of_embeddings(case: Case) -> Any:
    return mx.grad(case.loss)(case.rows)


def vjp(case: Case) -> Any:
    out = mx.zeros((1, case.n_tokens, 320)) + 0.5
    return mx.vjp(lambda rows: case(None, rows), [case.rows], [out])


def with_norm(case: Case, weight: mx.array) -> mx.array:
    norm = case.model.language_model.model.norm
    before, norm.weight = norm.weight, weight
    try:
        return case(None)
    finally:
        norm.weight = before


def jvp_of_the_last_norm(case: Case) -> Any:
    weight = case.stock.language_model.model.norm.weight
    return mx.jvp(partial(with_norm, case), [weight], [mx.ones_like(weight)])


def jvp_of_embeddings(case: Case) -> Any:
    rows = case.rows
    return mx.jvp(lambda rows: case(None, rows), [rows], [mx.ones_like(rows)])


def vmap(case: Case) -> Any:
    both = mx.concatenate([case.tokens, case.tokens + 1])
    return mx.vmap(lambda tokens: case(tokens[None])[0])(both)


def compiled(case: Case) -> Any:
    return mx.compile(lambda tokens: case(tokens))(case.tokens)


def compiled_for_any_shape(case: Case) -> Any:
    return mx.compile(lambda rows: case(None, rows), shapeless=True)(case.rows)


def compiled_gradient(case: Case) -> Any:
    return mx.compile(mx.grad(case.loss))(case.rows)


def gradient_of_compiled(case: Case) -> Any:
    return mx.grad(mx.compile(case.loss))(case.rows)


def exported(case: Case, path: str) -> Any:
    mx.export_function(path, lambda tokens: case(tokens), case.tokens)
    return mx.import_function(path)(case.tokens)[0]


def checkpointed_loss(case: Case) -> Any:
    return mx.grad(mx.checkpoint(case.loss))(case.rows)


def checkpointed_model(case: Case) -> Any:
    call = checkpointed(case.model)
    loss = nn.value_and_grad(case.model, lambda _: (call(case.tokens) ** 2).mean())
    return loss(case.model)


# Whether arrays have values during a transformation.
WITH_VALUES = [
    gradients_of_parameters,
    gradient_of_embeddings,
    vjp,
    jvp_of_the_last_norm,
    jvp_of_embeddings,
    gradient_of_compiled,
    checkpointed_loss,
    checkpointed_model,
]
WITHOUT = [vmap, compiled, compiled_for_any_shape, compiled_gradient, exported]
CALLS = {"prompt": (5, False), "token": (1, False), "cached-token": (1, True)}
EXPECTED: dict[Any, Any] = {}

transforms = pytest.mark.parametrize(
    "transform", [*WITH_VALUES, *WITHOUT], ids=lambda f: f.__name__
)
# Valid combinations of checkpoint, options, mode and calls; the first has all.
WITH_EXPERTS = {
    **{f"eval-{call}": ("plain", {}, False, call) for call in CALLS},
    "train-dense-prompt": ("dense", {}, True, "prompt"),
    "eval-on-token": ("plain", dict(optimistic="on"), False, "token"),
    "eval-on-cached-token": ("plain", dict(optimistic="on"), False, "cached-token"),
    "train-traced-cached-token": (
        "plain",
        dict(executor="traced"),
        True,
        "cached-token",
    ),
}


def values(transform, case: Case, tmp_path: Path) -> dict[str, np.ndarray]:
    more = [str(tmp_path / "function.mlxfn")] if transform is exported else []
    found = transform(case, *more)
    flat = tree_flatten([found], destination={})
    return {name: np.array(x, np.float64) for name, x in flat.items()}


def expected(transform, path: Path, call, tmp_path: Path):
    """Stock mlx-lm's result; None where it raises an error."""
    key = transform, path, call
    if transform is exported:
        # Stock may evaluate nothing here, not even its cache's prompt.
        return expected(compiled, path, call, tmp_path)
    if key not in EXPECTED:
        stock = stock_of(path)
        EXPECTED[key] = None
        with contextlib.suppress(ValueError, RuntimeError, TypeError):
            EXPECTED[key] = values(transform, Case(stock, stock, *call), tmp_path)
    return EXPECTED[key]


def norm(arrays) -> float:
    return float(np.sqrt(sum((x**2).sum() for x in arrays)))


def check_same(got: dict, wanted: dict) -> None:
    """Compare all arrays, then each on the scale of all: some hold only rounding."""
    assert set(got) <= set(wanted) and got
    wanted = {name: wanted[name] for name in got}
    assert norm(wanted.values()) > 0
    off = {name: norm([got[name] - wanted[name]]) for name in got}
    assert norm(map(np.array, off.values())) < 1e-5 * norm(wanted.values())
    for name, x in wanted.items():
        assert off[name] <= 1e-4 * norm([x]) + 1e-7 * norm(wanted.values()), name


@pytest.mark.sampled
@pytest.mark.parametrize("form", WITH_EXPERTS)
@transforms
def test_a_model_with_its_experts_gives_stocks_values(
    form, transform, request, tmp_path
):
    checkpoint, options, trains, name = WITH_EXPERTS[form]
    plain, call = request.getfixturevalue(checkpoint), CALLS[name]
    wanted = expected(transform, plain, call, tmp_path)
    model = load(plain, **options)
    model.train(trains)
    case = Case(model, stock_of(plain), *call)
    for used in (False, True):
        if wanted is None:
            with pytest.raises((ValueError, RuntimeError, TypeError)):
                values(transform, case, tmp_path)
        else:
            got = values(transform, case, tmp_path)
            assert set(got) == set(wanted)
            check_same(got, wanted)
        # Ordinary calls before and between have no effect and are not affected.
        if not used:
            stock_logits = np.array(stock_of(plain)(PROMPT))
            assert np.allclose(np.array(model(PROMPT)), stock_logits, atol=1e-4)


def check_constants(transform, case, wanted, tmp_path, why):
    """Check stock's values, or a refusal with its reason; experts are no parameters."""
    if transform in WITHOUT:
        with pytest.raises(ModelError, match=rf"\[transform\] .* {why}"):
            values(transform, case, tmp_path)
    elif wanted is None:
        with pytest.raises((ValueError, RuntimeError, TypeError)):
            values(transform, case, tmp_path)
    else:
        # Experts are constants, so they have no gradient.
        check_same(values(transform, case, tmp_path), wanted)


@pytest.mark.sampled
@pytest.mark.parametrize("kind", WHOLE)
@transforms
def test_a_pack_in_memory_gives_stocks_values_or_refuses(
    plain, kind, transform, tmp_path
):
    call = CALLS["prompt" if kind == "packed" else "cached-token"]
    model = load(plain, **WHOLE[kind])
    case = Case(model, stock_of(plain), *call)
    wanted = expected(transform, plain, call, tmp_path)
    for _ in range(2):
        check_constants(transform, case, wanted, tmp_path, "from a pack")


@pytest.mark.sampled
@pytest.mark.parametrize("kind", STREAMED)
@transforms
def test_streamed_experts_give_stocks_values_or_refuse(
    plain, kind, transform, tmp_path
):
    model = load(plain, **STREAMED[kind])
    for call in CALLS.values():
        case = Case(model, stock_of(plain), *call)
        wanted = expected(transform, plain, call, tmp_path)
        check_constants(transform, case, wanted, tmp_path, "are streamed")
    logits = np.array(stock_of(plain)(PROMPT))
    assert np.allclose(np.array(model(PROMPT)), logits, atol=1e-4)


@pytest.mark.sampled
@pytest.mark.parametrize("kind", [*STREAMED, "packed"])
def test_training_steps_work_uncompiled(plain, kind, tmp_path):
    model, call = load(plain, **{**STREAMED, **WHOLE}[kind]), CALLS["prompt"]
    case = Case(model, stock_of(plain), *call)
    wanted = expected(compiled_gradient, plain, call, tmp_path)
    model.train()
    try:
        assert not compiles()
        check_same(values(compiled_gradient, case, tmp_path), wanted)
    finally:
        model.eval()
    assert compiles()
    with pytest.raises(ModelError, match=r"call model\.train"):
        values(compiled_gradient, case, tmp_path)


def test_a_deleted_model_no_longer_counts_as_training(plain):
    model = load(plain, n_slots=5).train()
    assert not compiles()
    del model
    gc.collect()
    assert compiles()


def test_the_rows_below_the_logits_have_gradients_too(plain):
    grads = []
    for model in (stock_of(plain), load(plain)):
        backbone = model.language_model.model
        rows = stock_of(plain).language_model.model.embed_tokens(PROMPT)

        def loss(rows, backbone=backbone):
            return (backbone(PROMPT, input_embeddings=rows) ** 3).mean()

        grads.append({"rows": np.array(mx.grad(loss)(rows), np.float64)})
    check_same(*grads)


def test_a_gradient_with_respect_to_a_cache_equals_stocks(plain):
    grads = []
    for model in (stock_of(plain), load(plain)):
        caches = make_prompt_cache(model)
        mx.eval(model(PROMPT, cache=caches))
        state = mx.array(caches[0].cache[1])

        def loss(state, model=model, caches=caches):
            caches[0].cache[1] = state
            return (model(PROMPT[:, :1], cache=caches) ** 2).mean()

        grads.append({"state": np.array(mx.grad(loss)(state), np.float64)})
    check_same(*grads)


def test_experts_that_a_gradient_reads_stay_in_memory(plain):
    model = load(plain, packed=True)
    mx.eval(gradient_of_embeddings(Case(model, stock_of(plain), 5, False)))
    with pytest.raises(BudgetError, match=r"\[resize\] .* load the model again"):
        model.streamer.resize(5)


def test_training_learns_and_leaves_ordinary_calls_right(plain):
    model, stock = load(plain), load_model(plain)[0]
    for each in (model, stock):
        for _ in range(3):
            _, grads = nn.value_and_grad(each, lambda m: (m(PROMPT) ** 2).mean())(each)
            flat = tree_flatten(grads)
            weights = dict(tree_flatten(each.trainable_parameters()))
            each.load_weights([(k, weights[k] - 0.1 * g) for k, g in flat], False)
    assert np.allclose(np.array(model(PROMPT)), np.array(stock(PROMPT)), atol=1e-4)


@pytest.mark.parametrize("compiles", [True, False])
def test_a_traced_array_is_distinguished_from_one_with_values(compiles):
    constant, seen, within = mx.array([1.0, 2.0]), [], []

    def look(x):
        within.append(in_transformation())
        seen.append((is_traced([x]), is_traced([constant]), is_traced([constant, x])))
        return (x * constant).sum()

    x = mx.array([3.0, 4.0])
    if not compiles:
        mx.disable_compile()
    try:
        look(x)
        for transform in (mx.grad, mx.vmap, mx.value_and_grad):
            transform(look)(x if transform is not mx.vmap else x[None])
        mx.jvp(look, [x], [x])
        mx.vjp(look, [x], [mx.array(1.0)])
        mx.grad(mx.checkpoint(look))(x)
        assert mx.array_equal(mx.compile(lambda x: x + 1)(x), x + 1)
    finally:
        mx.enable_compile()
    assert not in_transformation()
    assert within == [False] + [True] * (len(seen) - 1)
    assert seen[0] == (False, False, False)
    assert all(found[0] and found[2] for found in seen[1:]) and len(seen) >= 7
    assert not any(found[1] for found in seen[1:6])
