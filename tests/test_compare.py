"""``moeflux compare`` runs stock mlx-lm and our models, each in its own process."""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
from pathlib import Path

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from mlx.utils import tree_flatten
from rich.console import Console
from tiny import make_checkpoint

from moeflux_mlx.cli import compare as command
from moeflux_mlx.errors import BudgetError, ConfigError, ModelError
from moeflux_mlx.experts.files.pack import pack
from moeflux_mlx.experts.files.packed import PackedExperts
from moeflux_mlx.measure.compare import (
    Comparison,
    Divergence,
    LogitErrors,
    Token,
    TokenAgreement,
    compare,
    load_stock,
    logit_errors,
    stacked_experts,
)

pytestmark = pytest.mark.usefixtures("forked_sides")
PROMPT = "def add(a, b):"
TEXT = "A text of more than one window, " * 20
N_TOKENS = 10


def run(*args: object) -> int:
    parser = argparse.ArgumentParser()
    command.add_parser(parser.add_subparsers())
    parsed = parser.parse_args(["compare", *map(str, args)])
    return parsed.run(parsed)


@pytest.fixture(scope="module")
def identical(checkpoint: Path) -> Comparison:
    """A plain checkpoint against itself, with a text."""
    return compare(checkpoint, PROMPT, max_tokens=N_TOKENS, text=TEXT)


@pytest.fixture(scope="module")
def perturbed(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pack of the same model, with another last norm."""
    directory = tmp_path_factory.mktemp("perturbed")
    plain = directory / "plain"
    shutil.copytree(checkpoint, plain)
    file = plain / "model.safetensors"
    weights = mx.load(str(file))
    name = next(name for name in weights if name.endswith("model.norm.weight"))
    weights[name] = weights[name] + mx.random.normal(weights[name].shape)
    mx.eval(weights)
    mx.save_safetensors(str(file), weights, {"format": "mlx"})
    pack(plain, directory / "packed")
    return directory / "packed"


@pytest.mark.slow
def test_the_same_weights_give_the_same_tokens_and_distributions(identical):
    assert identical.within_tolerance
    assert identical.tokens.n_tokens == identical.tokens.n_equal == N_TOKENS
    assert identical.tokens.share == 1
    assert identical.tokens.first_divergence is None
    logits = identical.logits
    assert logits.n_positions == len(PROMPT) + N_TOKENS - 1
    assert logits.top1_agreement == 1
    assert abs(logits.kl_mean) <= logits.kl_max < 1e-8
    assert logits.relative_rms_error < 1e-4


@pytest.mark.slow
def test_both_sides_score_a_text_as_stock_does(identical, checkpoint):
    stock, ours = identical.stock.perplexity, identical.ours.perplexity
    model, tokenizer = mlx_lm.load(str(checkpoint))
    tokens = tokenizer.encode(TEXT)
    assert identical.n_text_tokens == len(tokens)
    total, n_scored = 0.0, 0
    for start in range(0, len(tokens), 512):
        window = mx.array(tokens[start : start + 512])
        logits = model(window[None, :-1])[0]
        scores = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        chosen = mx.take_along_axis(scores, window[1:, None], axis=-1)
        total, n_scored = total + float(chosen.sum()), n_scored + chosen.size
    assert stock == pytest.approx(np.exp(-total / n_scored), rel=1e-4)
    assert ours == pytest.approx(stock, rel=1e-4)


def test_each_side_reports_its_own_speed_and_memory(identical):
    for side in (identical.stock, identical.ours):
        assert side.prompt_tps > 0
        assert side.generation_tps > 0
        # The size of an interpreter that has imported MLX and mlx-lm.
        assert side.peak_process_bytes > 30 * 2**20
        assert side.peak_mlx_bytes > 0


@pytest.mark.slow
def test_a_streamed_pack_agrees_with_its_own_experts_stacked_again(
    packed, budget, capsys, tmp_path
):
    flags = ["--prompt", PROMPT, "-m", N_TOKENS, "--expert-memory", budget]
    assert run(packed, *flags, "--json", "--html", tmp_path / "page.html") == 0
    found = json.loads(capsys.readouterr().out)
    assert "Tokens side by side" in (tmp_path / "page.html").read_text()
    assert found.keys() == {
        *(field.name for field in dataclasses.fields(Comparison)),
        "within_tolerance",
    }
    assert found["reference"] == found["model"] == str(packed)
    tokens = found["tokens"]
    assert tokens.pop("stock") == tokens.pop("ours") != []
    assert tokens == {
        "n_tokens": N_TOKENS,
        "n_equal": N_TOKENS,
        "first_divergence": None,
        "share": 1.0,
    }
    assert found["logits"].keys() == {f.name for f in dataclasses.fields(LogitErrors)}
    assert found["within_tolerance"] is True
    assert found["stock"]["expert_hit_rate"] is None
    assert 0 < found["ours"]["expert_hit_rate"] < 1
    assert found["ours"]["expert_read_bytes"] > 0
    assert found["ours"]["perplexity"] is None


@pytest.mark.slow
def test_other_weights_exit_with_1_and_show_the_first_divergence(
    perturbed, checkpoint, capsys
):
    flags = ["--against", checkpoint, "--prompt", PROMPT, "--max-tokens", N_TOKENS]
    assert run(perturbed, *flags, "--json") == 1
    found = json.loads(capsys.readouterr().out)
    assert found["within_tolerance"] is False
    assert found["logits"]["relative_rms_error"] > found["tolerance"] == 1e-4
    assert found["logits"]["kl_max"] > 1e-3
    first = found["tokens"]["first_divergence"]
    assert 0 <= first["position"] <= found["tokens"]["n_equal"] < N_TOKENS
    assert first["stock"]["id"] != first["ours"]["id"]
    stock = mlx_lm.load(str(checkpoint))
    text = mlx_lm.generate(*stock, PROMPT, max_tokens=first["position"] + 1)
    assert text.endswith(first["stock"]["text"])


def test_the_tables_name_the_divergence_and_only_measured_figures(identical):
    first = Divergence(4, Token(7, "a"), Token(9, "b"))
    tokens = TokenAgreement(10, 5, first, [], [])
    result = dataclasses.replace(identical, tokens=tokens)
    console = Console(width=100)
    with console.capture() as printed:
        console.print(command.output_table(result), command.cost_table(result))
    for words in ("5 of 10 (50.0%)", "token 4: stock 7 'a', ours 9 'b'", "perplexity"):
        assert words in printed.get()
    assert "expert cache hits" not in printed.get()


@pytest.mark.parametrize("bits", [4, 8, None], ids=lambda bits: f"{bits}bit")
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=str)
def test_experts_stacked_again_are_the_checkpoints_bit_for_bit(tmp_path, bits, dtype):
    plain = make_checkpoint(tmp_path / "plain", bits=bits, dtype=dtype, num_experts=5)
    pack(plain, tmp_path / "packed")
    weights = mx.load(str(plain / "model.safetensors"))
    with PackedExperts.open(tmp_path / "packed") as store:
        for layer in store.layers:
            for name, found in stacked_experts(store, layer):
                end = f"layers.{layer}.mlp.switch_mlp.{name}"
                (expected,) = [w for key, w in weights.items() if key.endswith(end)]
                assert found.dtype == expected.dtype
                assert mx.array_equal(found, expected)


def test_stock_from_a_pack_is_stock_from_the_checkpoint(checkpoint, packed):
    plain = dict(tree_flatten(load_stock(checkpoint).parameters()))
    stacked = dict(tree_flatten(load_stock(packed).parameters()))
    assert plain.keys() == stacked.keys()
    assert all(mx.array_equal(plain[name], stacked[name]) for name in plain)


def test_logit_errors_follow_their_definitions(monkeypatch):
    random = np.random.default_rng(1)
    stock = random.normal(size=(7, 11)).astype(np.float32)
    ours = stock + random.normal(size=(7, 11)).astype(np.float32) / 8
    monkeypatch.setattr(
        "moeflux_mlx.measure.compare.metrics.COMPARED_VALUES", 22
    )  # 4 chunks
    found = logit_errors(stock, ours)
    p, q = (np.exp(x) / np.exp(x).sum(1, keepdims=True) for x in (stock, ours))
    kl = (p * np.log(p / q)).sum(1)
    error = ours - stock
    assert found.n_positions == 7
    assert found.kl_mean == pytest.approx(kl.mean(), rel=1e-4)
    assert found.kl_max == pytest.approx(kl.max(), rel=1e-4)
    assert found.kl_max_position == kl.argmax()
    assert found.top1_agreement == (stock.argmax(1) == ours.argmax(1)).mean()
    assert found.max_error == pytest.approx(abs(error).max(), rel=1e-4)
    rms = np.sqrt(np.square(error).mean())
    assert found.rms_error == pytest.approx(rms, rel=1e-4)
    relative = rms / np.sqrt(np.square(stock).mean())
    assert found.relative_rms_error == pytest.approx(relative, rel=1e-4)


def test_a_result_of_nan_is_outside_every_tolerance(identical):
    stock = np.ones((2, 3), np.float32)
    logits = logit_errors(stock, np.array([[1, np.nan, 1], [1, 1, 1]], np.float32))
    result = dataclasses.replace(identical, logits=logits, tolerance=1e9)
    assert not result.within_tolerance
    fields = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert fields["logits"]["relative_rms_error"] is None


@pytest.mark.slow
def test_a_too_small_budget_is_reported_by_its_side(packed):
    with pytest.raises(BudgetError, match=r"\[memory\] expected at least"):
        compare(packed, PROMPT, max_tokens=1, memory="1KB")


def test_a_reference_without_a_model_is_refused(checkpoint, tmp_path):
    with pytest.raises(ModelError, match=str(tmp_path)):
        compare(checkpoint, PROMPT, against=tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "abacus"}')
    with pytest.raises(ModelError, match=rf"mlx-lm cannot load {tmp_path}"):
        load_stock(tmp_path)


def test_models_of_different_vocabularies_are_refused():
    with pytest.raises(ModelError, match="vocabulary"):
        logit_errors(np.ones((2, 3), np.float32), np.ones((2, 4), np.float32))


@pytest.mark.parametrize(
    "options",
    [{"dtype": "float8"}, {"max_tokens": 0}, {"text": "x"}, {"prompt": ""}],
    ids=lambda options: next(iter(options)),
)
def test_an_unusable_argument_is_refused_before_any_run(checkpoint, options):
    options = {"prompt": PROMPT, **options}
    with pytest.raises(ConfigError, match=r"\[compare\]"):
        compare(checkpoint, **options)
