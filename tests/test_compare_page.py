"""The page of ``moeflux compare --html``: its content, and its look in a browser."""

from __future__ import annotations

import argparse
import dataclasses
import html
import re
from pathlib import Path

import mlx.nn as nn
import numpy as np
import pytest
from browser import needs_browser, seen

import moeflux_mlx
from moeflux_mlx.cli import compare as command
from moeflux_mlx.cli.compare_page import SAME_BITS, render
from moeflux_mlx.cli.inspect import summarize
from moeflux_mlx.measure.compare import Comparison, compare_each, load_stock
from moeflux_mlx.measure.compare.layers import LAYER_TOKENS, layer_errors, layer_rows
from moeflux_mlx.measure.compare.metrics import Divergence, Token, TokenAgreement

pytestmark = pytest.mark.usefixtures("forked_sides")
PROMPT = "def add(a, b):"
N_TOKENS = 8


@pytest.fixture(scope="module")
def found(packed: Path, budget: str) -> list[Comparison]:
    """A comparison of one pack at two budgets and through mlx-lm's class."""
    ways = [{"expert_memory": budget}, {}, {"native": False}]
    return [*compare_each(packed, PROMPT, ways, max_tokens=N_TOKENS)]


@pytest.fixture(scope="module")
def diverging(found) -> Comparison:
    """A comparison with a different fourth token and one different top-1."""
    ours, stock = found[0], found[0].tokens.stock
    other = [*stock[:3], Token(999, "<b>&\n"), *stock[4:]]
    first = Divergence(3, stock[3], other[3])
    tokens = TokenAgreement(N_TOKENS, N_TOKENS - 1, first, stock, other)
    kl, equal = [*ours.logits.kl], [*ours.logits.equal_top1]
    kl[5], equal[5] = 0.25, False
    logits = dataclasses.replace(ours.logits, kl=kl, equal_top1=equal)
    return dataclasses.replace(ours, tokens=tokens, logits=logits)


@pytest.mark.slow
def test_every_budget_has_the_same_bits_and_each_way_its_own_errors(found):
    quarter, whole, stocks = found
    assert quarter.bits == whole.bits != stocks.bits
    assert quarter.ours.executor == "ops" and stocks.ours.executor is None
    assert quarter.layer_errors == whole.layer_errors
    assert len(quarter.layer_errors) == 4
    assert all(0 < error < 1e-5 for error in quarter.layer_errors)
    assert stocks.layer_errors == [0.0] * 4
    assert stocks.logits.kl_max == 0 and all(stocks.logits.equal_top1)
    assert len(quarter.logits.kl) == quarter.logits.n_positions
    assert [t.id for t in quarter.tokens.stock] == [t.id for t in quarter.tokens.ours]


def test_changed_weights_show_in_their_layer(checkpoint, packed, tmp_path):
    changed = moeflux_mlx.load(packed)[0]
    norm = changed.layers[2].input_layernorm
    norm.weight = norm.weight * 2
    sides = {"stock": load_stock(checkpoint), "ours": changed}
    files = {name: tmp_path / f"{name}.npz" for name in sides}
    tokens = [*range(1, LAYER_TOKENS + 9)]
    for name, model in sides.items():
        rows = layer_rows(model, tokens)
        assert [row.shape[0] for row in rows] == [LAYER_TOKENS] * 4
        np.savez(files[name], *rows)
    errors = layer_errors(files["stock"], files["ours"])
    assert max(errors[:2]) < 1e-5 and min(errors[2:]) > 1e-3
    np.savez(files["ours"], *rows[:3])
    assert layer_errors(files["stock"], files["ours"]) is None


class PassesOver(nn.Module):
    """A model that does not call its last layer."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(9, 4)
        self.layers = [nn.Linear(4, 4) for _ in range(3)]

    def __call__(self, tokens, cache=None):
        return self.layers[1](self.layers[0](self.embedding(tokens)))


def test_a_model_that_skips_a_layer_has_no_rows():
    model = PassesOver()
    assert layer_rows(model, [1, 2]) == []
    model.layers = model.layers[:2]
    rows = layer_rows(model, [1, 2])
    assert [row.shape for row in rows] == [(2, 4)] * 2
    assert {type(layer) for layer in model.layers} == {nn.Linear}


@pytest.mark.slow
def test_models_of_different_widths_have_no_error_by_layer(found):
    without = dataclasses.replace(found[0], layer_errors=None)
    assert "do not have the same layers" in render([without])


@pytest.mark.slow
def test_the_page_loads_nothing_and_shows_nothing_as_code(diverging):
    page = render(
        [dataclasses.replace(diverging, model="<img src=x onerror=alert(1)>")]
    )
    body = page.split("</style>")[1]
    assert "&lt;img src=x onerror=alert(1)&gt;" in body and "<img" not in page
    assert not re.search(r"https?:|url\(|src=[\"']|<script|@import|<link", page)
    assert "default-src &#39;none&#39;" in page or "default-src 'none'" in page
    assert page.count(SAME_BITS) == 1


@pytest.mark.slow
def test_the_first_divergence_is_marked_on_both_sides(diverging):
    page = render([diverging])
    marks = re.findall(r"<mark[^>]*>(.*?)</mark>", page, re.DOTALL)
    text = [html.unescape(re.sub("<.*?>", "", mark)) for mark in marks]
    stock, ours = diverging.tokens.first_divergence.stock, "<b>&\u21b5\n"
    assert text == [stock.text.replace("\n", "\u21b5\n"), ours]
    assert "First divergence at token 3" in html.unescape(page)
    assert re.search(r"position 5: KL 2\.50e-01, top-1 DIFFERS", page)
    assert page.count('class="off"') == 1


@pytest.mark.slow
def test_a_matrix_says_whether_its_budgets_gave_the_same_bits(found):
    page = html.unescape(render(found))
    assert "ops: 2 budgets, the same bits." in page
    broken = [found[0], dataclasses.replace(found[1], bits="0" * 32)]
    assert "ops: 2 budgets, DIFFERENT bits." in html.unescape(render(broken))


def parsed(*args: object) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    command.add_parser(parser.add_subparsers())
    return parser.parse_args(["compare", *map(str, args)])


def test_a_matrix_is_every_executor_with_every_budget(packed):
    flags = ["--matrix", "--budgets", 0, 100, "--executors", "ops", "mlx-lm"]
    ways = command._ways(parsed(packed, *flags))
    summary = summarize(packed)
    budgets = [summary.minimum_bytes, summary.full_bytes]
    assert [way["expert_memory"] for way in ways] == budgets * 2
    assert [(way["executor"], way["native"]) for way in ways] == [
        *[("ops", None)] * 2,
        *[(None, False)] * 2,
    ]
    assert len(command._ways(parsed(packed, "--matrix"))) == 6


LOOK = """
  const box = e => e.getBoundingClientRect();
  const marks = [...d.querySelectorAll("mark")].map(box);
  return {
    over: d.documentElement.scrollWidth - w.innerWidth,
    beside: marks[1].left - marks[0].right,
    tall: [...d.querySelectorAll("svg")].map(s => box(s).height),
    bars: [...d.querySelectorAll("svg")].map(s => s.querySelectorAll("rect").length),
    drawn: [...d.querySelectorAll("rect")].every(r => box(r).height > 0),
    small: Math.min(...[...d.querySelectorAll("p, td, th, .text")].map(
      e => parseFloat(w.getComputedStyle(e).fontSize))),
    loaded: w.performance.getEntriesByType("resource").length,
  };
"""


@pytest.mark.slow
@needs_browser
def test_a_browser_shows_the_page_on_a_phone_and_on_a_desk(diverging, tmp_path):
    for place in seen(render([diverging]), (360, 1280), LOOK, tmp_path):
        assert place["over"] <= 0, "the page is wider than the screen"
        assert place["beside"] > 0, "the two texts do not stand side by side"
        assert place["bars"] == [diverging.logits.n_positions, 4]
        assert min(place["tall"]) > 100 and place["drawn"]
        assert place["small"] >= 12
        assert place["loaded"] == 0
