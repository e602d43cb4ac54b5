"""Add the policy of CONTRIBUTING.md for real: streaming with it gives the same bits."""

from __future__ import annotations

import re
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from test_policy import trace_of
from tiny import make_checkpoint

import moeflux_mlx
from moeflux_mlx.errors import ConfigError
from moeflux_mlx.experts.pool import policy
from moeflux_mlx.experts.pool.policy import PoolShape
from moeflux_mlx.experts.pool.pool import POOL_ALIGNMENT
from moeflux_mlx.measure.cachesim import simulate

PAGE = Path(__file__).resolve().parents[1] / "CONTRIBUTING.md"


@pytest.fixture
def fifo(monkeypatch):
    """Register the page's class as the page says."""
    source = re.search(r"```python\n(class FIFO.*?)```", PAGE.read_text(), re.DOTALL)
    assert source and '`"fifo": FIFO` to `POLICIES`' in PAGE.read_text()
    names = dict(vars(policy))
    exec(compile(source[1], str(PAGE), "exec"), names)
    monkeypatch.setitem(policy.POLICIES, "fifo", names["FIFO"])
    return names["FIFO"]


def test_the_pages_policy_evicts_the_oldest_expert(fifo):
    made = policy.policy_factory("fifo")(PoolShape(n_layers=2, n_experts=4, n_slots=3))
    for key in (5, 1, 6):
        made.admit(key // 4, key)
    made.use(1, [5, 5, 5])
    assert made.victim(0, range(2), keep=()) == 5
    assert made.victim(0, [0], keep=()) == 1
    made.forget(1, 5)
    assert made.victim(0, range(2), keep={1}) == 6


def test_a_model_streamed_with_it_gives_the_bits_of_a_resident_one(fifo, tmp_path):
    plain = make_checkpoint(tmp_path / "plain", seed=3)
    tokens = mx.array([[3, 1, 4, 1, 5, 9, 2, 6]])
    whole, _ = moeflux_mlx.load(plain)
    probe, _ = moeflux_mlx.load(plain, expert_memory="1GB")
    memory = POOL_ALIGNMENT + 6 * probe.streamer.slot_bytes
    few, _ = moeflux_mlx.load(plain, expert_memory=memory, policy="fifo")
    same = mx.array_equal(few(tokens), probe(tokens))
    assert same and few.streamer.stats.total.misses > 6
    assert mx.allclose(few(tokens), whole(tokens), rtol=1e-4, atol=1e-5)


def test_cachesim_replays_it(fifo):
    rng = np.random.default_rng(0)
    chosen = np.stack([rng.permutation(5)[:2] for _ in range(90)]).reshape(30, 3, 2)
    policies = {"fifo": policy.policy_factory("fifo")}
    best, found = simulate(trace_of(chosen.astype(np.int16)), policies, [0.6])
    assert (found.policy, found.n_slots) == ("fifo", 9)
    assert 0 < found.hit_rate <= best.hit_rate < 1


def test_an_unknown_policy_names_the_existing_ones():
    with pytest.raises(ConfigError, match="lru, lfu, markov, pins:TRACE"):
        policy.policy_factory("fifo")


def test_the_page_names_values_where_they_are_defined():
    named = re.findall(r"((?:`\w+` or )?`\w+`) in `([\w/]+\.py)`", PAGE.read_text())
    assert len(named) >= 4
    for names, file in named:
        source = (PAGE.parent / file).read_text()
        for name in re.findall(r"\w{3,}", names):
            assert re.search(rf"^{name}\b.* = ", source, re.MULTILINE), (name, file)
