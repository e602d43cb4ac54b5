"""Training of complete models, and the scripts on the page about training."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map, tree_unflatten
from mlx_lm.tuner.trainer import default_loss
from mlx_lm.utils import load_model
from test_calls_transforms import check_same
from tiny import make_checkpoint, make_qwen3_moe

import moeflux_mlx
from moeflux_mlx.errors import ModelError

ROOT = Path(__file__).resolve().parents[1]
IDS = mx.array(np.random.RandomState(0).randint(1, 300, (2, 9)))
LENGTHS = mx.array([[0, 8], [0, 6]])
HYBRID = {"num_hidden_layers": 2, "full_attention_interval": 2}
MAKERS: dict[str, Callable[..., Path]] = {
    "qwen3_moe": lambda path, bits=None: make_qwen3_moe(
        path, bits=bits, num_hidden_layers=2
    ),
    "qwen3_5_moe": lambda path, bits=None: make_checkpoint(path, bits=bits, **HYBRID),
}


def trained(model: Any, *, compiled: bool) -> tuple[list[float], dict[str, mx.array]]:
    """Train all of a model for three steps; return its losses and final logits."""
    model.train()
    optimizer = optim.SGD(learning_rate=0.02)
    gradient = nn.value_and_grad(model, default_loss)

    def step(ids: mx.array, lengths: mx.array) -> mx.array:
        (loss, _), grads = gradient(model, ids, lengths)
        optimizer.update(model, grads)
        return loss

    state = [model.state, optimizer.state]
    call = mx.compile(step, inputs=state, outputs=state) if compiled else step
    losses = []
    for _ in range(3):
        losses.append(call(IDS, LENGTHS).item())
        mx.eval(state)
    weights = dict(tree_flatten(model.trainable_parameters()))
    logits = model.eval()(IDS)
    return losses, {**weights, "logits": logits}


@pytest.mark.sampled
@pytest.mark.parametrize("form", MAKERS)
def test_a_whole_model_learns_as_stock(tmp_path, form):
    path = MAKERS[form](tmp_path / "model")
    losses, expected = trained(load_model(path)[0], compiled=True)
    assert losses[2] < losses[1] < losses[0]
    for executor in ("ops", "sim"):
        for compiled in (False, True):
            model, _ = moeflux_mlx.load(path, executor=executor)
            found_losses, found = trained(model, compiled=compiled)
            assert np.allclose(found_losses, losses, rtol=1e-5)
            assert found.keys() == expected.keys()
            for name, array in expected.items():
                off = mx.linalg.norm(found[name] - array)
                assert off <= 1e-5 * mx.linalg.norm(array), name


def mixed(model: Any) -> dict[str, np.ndarray]:
    """Return gradients of float32 parameters, of a loss computed in bfloat16."""
    masters = model.train().trainable_parameters()

    def loss(masters: Any) -> mx.array:
        model.update(tree_map(lambda x: x.astype(mx.bfloat16), masters))
        return default_loss(model, IDS, LENGTHS)[0].astype(mx.float32)

    value, found = mx.value_and_grad(loss)(masters)
    mx.eval(value, found)
    model.update(masters).eval()
    named = {"loss": value, **dict(tree_flatten(found))}
    assert {x.dtype for x in named.values()} == {mx.float32}
    return {name: np.array(x, np.float64) for name, x in named.items()}


WAYS: dict[str, dict[str, Any]] = {
    "resident": {},
    "streamed": {"expert_memory": "2200KB"},
    "planned": {"memory": "4GB"},
    "door": {"expert_memory": "2200KB", "native": False},
}


@pytest.mark.parametrize("form", MAKERS)
def test_mixed_precision_gives_stocks_gradients(tmp_path, form):
    path = MAKERS[form](tmp_path / "model", bits=4)
    wanted, exact = mixed(load_model(path)[0]), loss_in_float32(path)
    # This test compares the other precision.
    assert abs(wanted["loss"] - exact) > 1e-4
    for options in WAYS.values():
        check_same(mixed(moeflux_mlx.load(path, **options)[0]), wanted)


def with_scales(model: Any) -> dict[str, np.ndarray]:
    """Return gradients of all numbers, scales and biases of matrices included."""
    model.train().unfreeze()
    arrays = tree_flatten(model.parameters())
    floats = tree_unflatten(
        [a for a in arrays if mx.issubdtype(a[1].dtype, mx.floating)]
    )

    def loss(floats: Any) -> mx.array:
        model.update(floats)
        return default_loss(model, IDS, LENGTHS)[0]

    found = mx.grad(loss)(floats)
    mx.eval(found)
    model.update(floats)
    return {name: np.array(x, np.float64) for name, x in tree_flatten(found)}


@pytest.mark.parametrize("form", MAKERS)
def test_scales_of_quantised_matrices_have_stocks_gradients(tmp_path, form):
    """``mlx_lm.dwq`` trains them, also those of experts that are parameters."""
    path = MAKERS[form](tmp_path / "model", bits=4)
    wanted = with_scales(load_model(path)[0])
    for way, options in WAYS.items():
        found = with_scales(moeflux_mlx.load(path, **options)[0])
        check_same(found, wanted)
        if way == "resident":
            assert found.keys() == wanted.keys()


def second_derivative(model: Any) -> mx.array:
    norm = model.freeze().layers[0].input_layernorm
    kept = norm.weight

    def loss(weight: mx.array) -> mx.array:
        norm.weight = weight
        return model(IDS).square().mean()

    try:
        found = mx.grad(lambda weight: mx.grad(loss)(weight).sum())(kept)
        mx.eval(found)
    finally:
        norm.weight = kept
    return found


def test_a_second_derivative_is_stocks_or_refused(tmp_path):
    """Slots hold other experts by the time that it would need them."""
    path = MAKERS["qwen3_moe"](tmp_path / "model", bits=4)
    wanted = second_derivative(load_model(path)[0])
    for way, options in WAYS.items():
        model = moeflux_mlx.load(path, **options)[0]
        if way == "resident":
            assert mx.allclose(second_derivative(model), wanted, rtol=1e-4, atol=1e-7)
            continue
        before = model(IDS)
        with pytest.raises(ModelError, match=r"\[stream\] .* first derivative"):
            second_derivative(model)
        assert mx.allclose(model(IDS), before, atol=1e-5), way


def loss_in_float32(path: Path) -> float:
    return default_loss(load_model(path)[0], IDS, LENGTHS)[0].item()


@pytest.mark.slow
def test_the_scripts_in_the_docs_train_and_evaluate(monkeypatch, tmp_path, capsys):
    text = (ROOT / "docs" / "training.md").read_text()
    _, train, evaluate = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert train.count("\n") <= 40 and evaluate.count("\n") <= 30
    (tmp_path / "models").symlink_to(ROOT / "models")
    monkeypatch.chdir(tmp_path)
    exec(train, {})
    losses = [float(x) for x in re.findall(r"loss ([\d.]+)", capsys.readouterr().out)]
    assert len(losses) == 4 and losses[-1] < losses[0] / 2
    exec(evaluate, {})
    lines = re.findall(
        r"(.*), (\w+): perplexity ([\d.]+), (\d+)% right", capsys.readouterr().out
    )
    assert [line[1] for line in lines] == ["100MB", "4MB"] * 2
    before, same, after, alike = [line[2:] for line in lines]
    assert (before, after) == (same, alike)
    assert float(after[0]) < float(before[0]) / 10 and int(after[1]) > int(before[1])
