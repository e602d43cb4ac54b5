"""Transformations and training of models with streamed experts give stock's values."""

from __future__ import annotations

import contextlib
import threading
from functools import cache, partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.tuner import trainer
from mlx_lm.tuner.utils import linear_to_lora_layers
from mlx_lm.utils import load_model
from test_calls_transforms import (
    WITH_VALUES,
    WITHOUT,
    Case,
    check_same,
    exported,
    jvp_of_the_last_norm,
    vjp,
)

from moeflux_mlx.errors import ModelError
from moeflux_mlx.experts.files.modules import find_blocks
from moeflux_mlx.opening.stock_model import load_stock_lazily
from moeflux_mlx.streaming import stream

ROOT = Path(__file__).resolve().parents[1]
VOCAB = 128
TOKENS = mx.array(np.random.RandomState(0).randint(1, VOCAB, (2, 6)))
LORA = {"rank": 4, "scale": 2.0, "dropout": 0.0}


@pytest.fixture(scope="module", autouse=True)
def scripts():
    """Make the scripts' modules importable."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "scripts"))
        yield


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Tiny models on disk, by family and bits."""
    import family_trials

    @cache
    def write(family: str, bits: int | None) -> Path:
        path = tmp_path_factory.mktemp("training") / f"{family}-{bits}"
        path.mkdir()
        family_trials.write_model(path, family, bits)
        return path

    return write


def both(path: Path) -> tuple[nn.Module, nn.Module]:
    """Return stock's model with frozen experts, and ours with a single slot."""
    import family_trials

    stock, ours = load_model(path)[0], family_trials.stream_least(path)
    assert ours.streamer.n_slots == 1
    for block in find_blocks(stock):
        block.module.freeze()
    mx.eval(ours.parameters())
    return stock, ours


def loss(model: nn.Module) -> mx.array:
    return nn.losses.cross_entropy(model(TOKENS[:, :-1]), TOKENS[:, 1:]).mean()


def flat(grads: Any) -> dict[str, np.ndarray]:
    return {n: np.array(x, np.float64) for n, x in tree_flatten(grads)}


FAMILIES = ["qwen3_moe", "gpt_oss", "deepseek_v3"]


@pytest.mark.sampled
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("trains", [True, False])
def test_gradients_of_trainable_parameters_equal_stocks(written, family, bits, trains):
    found = []
    for model in both(written(family, bits)):
        model.train(trains)
        value, grads = nn.value_and_grad(model, loss)(model)
        found.append({"loss": np.array(value, np.float64), **flat(grads)})
    stocks, ours = found
    assert set(ours) == set(stocks)
    router = [] if bits else ["router" if family == "gpt_oss" else "mlp.gate"]
    for part in ("self_attn", "layernorm", *router):
        assert any(part in name for name in ours), part
    for name, wanted in stocks.items():
        off = np.linalg.norm(ours[name] - wanted)
        assert off <= 1e-5 * np.linalg.norm(wanted) + 1e-9, name


def with_adapters(model: nn.Module, keys: list[str]) -> nn.Module:
    """Freeze a model except for its adapters, whose second factors are nonzero."""
    mx.random.seed(5)
    model.freeze()
    linear_to_lora_layers(model, 2, {**LORA, "keys": keys})
    for name, x in tree_flatten(model.trainable_parameters()):
        noise = 0.1 * mx.random.normal(x.shape, key=mx.random.key(len(name)))
        model.load_weights([(name, x + noise)], strict=False)
    return model.train()


@pytest.mark.parametrize(
    ("family", "router"), [("qwen3_moe", "mlp.gate"), ("gpt_oss", "mlp.router")]
)
def test_adapters_learn_as_in_stock(written, family, router):
    keys = ["self_attn.q_proj", "self_attn.v_proj", router]
    losses, weights, first = [], [], []
    for model in both(written(family, 4)):
        model = with_adapters(model, keys)
        step, optimizer = nn.value_and_grad(model, loss), optim.Adam(0.01)
        for i in range(3):
            value, grads = step(model)
            if i == 0:
                first.append(flat(grads))
            optimizer.update(model, grads)
            mx.eval(model.parameters(), optimizer.state)
            losses.append(value.item())
        weights.append(flat(model.trainable_parameters()))
    assert np.allclose(losses[:3], losses[3:], rtol=1e-5) and losses[2] < losses[0]
    assert len(weights[0]) == 12 and set(first[1]) == set(first[0]) == set(weights[0])
    for name, wanted in first[0].items():
        off = np.linalg.norm(first[1][name] - wanted)
        assert np.linalg.norm(wanted) > 0 and off <= 1e-5 * np.linalg.norm(wanted), name
    for name, wanted in weights[0].items():
        assert np.allclose(weights[1][name], wanted, rtol=1e-3, atol=1e-4), name


def test_by_default_adapters_are_of_everything_but_routed_experts(written):
    stock, ours = both(written("qwen3_moe", 4))
    names = []
    for model in (stock, ours):
        linear_to_lora_layers(model, 2, LORA)
        names.append(
            {n for n, m in model.named_modules() if "LoRA" in type(m).__name__}
        )
    routed = {name for name in names[0] if "switch_mlp" in name}
    assert routed and names[1] == names[0] - routed


def test_adapters_of_routed_experts_are_refused_by_name(written, tmp_path):
    stock, ours = both(written("qwen3_moe", 4))
    linear_to_lora_layers(stock, 2, LORA)
    adapters = dict(tree_flatten(stock.trainable_parameters()))
    file = str(tmp_path / "adapters.safetensors")
    mx.save_safetensors(file, adapters)
    linear_to_lora_layers(ours, 2, LORA)
    with pytest.raises(ModelError, match=r"switch_mlp\.\w+\.lora_\w: .* streamed"):
        ours.load_weights(file, strict=False)
    others = {n: x for n, x in adapters.items() if "switch_mlp" not in n}
    ours.load_weights([*others.items()], strict=False)


def test_checkpointed_layers_give_the_same_gradients(written, monkeypatch):
    found = []
    for model in both(written("qwen3_moe", None)):
        kind = type(model.layers[0])
        with monkeypatch.context() as patch:
            patch.setattr(kind, "__call__", kind.__call__)
            trainer.grad_checkpoint(model.layers[0])
            found.append(flat(nn.value_and_grad(model, loss)(model)[1]))
    assert set(found[0]) == set(found[1])
    check_same(found[1], found[0])


def test_experts_are_read_again_in_the_backward_pass_and_not_kept(written):
    _, ours = both(written("qwen3_moe", 4))
    stats = ours.streamer.stats
    mx.eval(loss(ours))
    forward = stats.total.misses
    mx.eval(nn.value_and_grad(ours, loss)(ours))
    assert stats.total.misses >= 2 * forward + forward // 2 > 0
    assert ours.streamer.n_slots == 1


@pytest.mark.parametrize("n_slots", [1, 12])
def test_other_threads_may_call_while_one_differentiates(written, n_slots):
    """Parameters stay unchanged, though mlx swaps those of a model in training."""
    path = written("qwen3_moe", None)
    stock, ours = both(path)
    if n_slots > 1:
        # A layer's experts then fit together, and are requested at once.
        memory = ours.streamer.memory_bytes + (n_slots - 1) * ours.streamer.slot_bytes
        ours = stream(load_stock_lazily(path).model, path, expert_memory=memory)
        mx.eval(ours.parameters())
    assert ours.streamer.n_slots == n_slots
    rows = stock.model.embed_tokens(TOKENS)

    def gradient(model: nn.Module) -> dict[str, np.ndarray]:
        def of_rows(rows: mx.array) -> mx.array:
            return model(None, input_embeddings=rows).square().mean()

        return {"rows": np.array(mx.grad(of_rows)(rows + 0), np.float64)}

    wanted, logits = gradient(stock), np.array(stock(TOKENS[:1]))
    same: list[bool] = []

    def call() -> None:
        for _ in range(6):
            same.append(np.array_equal(np.array(ours(TOKENS[:1] + 0)), logits))

    threads = [threading.Thread(target=call) for _ in range(2)]
    for thread in threads:
        thread.start()
    for _ in range(6):
        check_same(gradient(ours), wanted)
    for thread in threads:
        thread.join()
    assert same == [True] * 12


class DoorCase(Case):
    """A model of mlx-lm and the arguments of its call."""

    def __call__(self, tokens: mx.array | None, rows: mx.array | None = None):
        tokens = self.tokens if tokens is None else tokens
        caches = None
        if self.cached:
            caches = make_prompt_cache(self.model)
            before = self.model(TOKENS[1:], cache=caches)
            mx.eval(before, [c.state for c in caches])
        return self.model(tokens, cache=caches, input_embeddings=rows)

    @property
    def rows(self) -> mx.array:
        return self.stock.model.embed_tokens(self.tokens)

    @property
    def tokens(self) -> mx.array:
        return TOKENS[:1, : self.n_tokens]


def vjp_of_embeddings(case: Case) -> Any:
    out = mx.zeros((1, case.n_tokens, VOCAB)) + 0.5
    return mx.vjp(lambda rows: case(None, rows), [case.rows], [out])


def with_norm(case: Case, weight: mx.array) -> mx.array:
    norm = case.model.model.norm
    before, norm.weight = norm.weight, weight
    try:
        return case(None)
    finally:
        norm.weight = before


def jvp_of_norm(case: Case) -> Any:
    weight = case.stock.model.norm.weight
    return mx.jvp(partial(with_norm, case), [weight], [mx.ones_like(weight)])


OWN = {vjp: vjp_of_embeddings, jvp_of_the_last_norm: jvp_of_norm}
TRANSFORMS = [OWN.get(f, f) for f in (*WITH_VALUES, *WITHOUT)]
CALLS = {"prompt": (5, False), "token": (1, False), "cached-token": (1, True)}


def values(transform, case: Case, tmp_path: Path) -> dict[str, np.ndarray]:
    more = [str(tmp_path / "function.mlxfn")] if transform is exported else []
    return flat([transform(case, *more)])


@pytest.fixture(scope="module")
def bounded(written) -> dict[bool, tuple[nn.Module, nn.Module]]:
    """Stock's model and ours, with a bound on all memory or on experts alone.

    Unquantised, because stock then has more derivatives.
    """
    path = written("qwen3_moe", None)
    stock, _ = both(path)
    ours = stream(load_model(path, lazy=True)[0], path, memory="4GB")
    ours.keeper.limit(1)
    return {False: both(written("qwen3_moe", 4)), True: (stock, ours)}


@pytest.mark.sampled
@pytest.mark.parametrize("memory", [False, True], ids=["experts", "memory"])
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("transform", TRANSFORMS, ids=lambda f: f.__name__)
def test_a_transformation_gives_stocks_value_or_a_typed_error(
    bounded, transform, call, memory, tmp_path
):
    stock, ours = bounded[memory]
    wanted = None
    with contextlib.suppress(ValueError, RuntimeError, TypeError):
        wanted = values(transform, DoorCase(stock, stock, *CALLS[call]), tmp_path)
    case = DoorCase(ours, stock, *CALLS[call])
    if transform in WITHOUT:
        with pytest.raises(ModelError, match=r"\[stream\]"):
            values(transform, case, tmp_path)
    elif wanted is None:
        with pytest.raises((ModelError, ValueError, RuntimeError, TypeError)):
            values(transform, case, tmp_path)
    else:
        check_same(values(transform, case, tmp_path), wanted)
    assert mx.array_equal(ours(TOKENS), stock(TOKENS))
