"""Parameters as Ops see them: joined matrices of one input, and noticed changes."""

from __future__ import annotations

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache
from native_models import greedy, least
from tiny import make_checkpoint, make_gpt_oss

import moeflux_mlx
from moeflux_mlx.engine import simulator

pytestmark = pytest.mark.skipif(
    not simulator.available(), reason="the simulator needs ziglang and pyelftools"
)
SHARED = "mlp.shared_expert.gate_proj+mlp.shared_expert.up_proj"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("parameters"))


@pytest.fixture
def model(checkpoint):
    return moeflux_mlx.load(checkpoint, executor="sim")[0]


def parameters(module):
    return dict(tree_flatten(module.parameters()))


def test_matrices_of_one_input_are_one_and_parameters_its_rows(model):
    layer = model.graph_layers[0]
    before = {name: mx.array(x) for name, x in parameters(layer.module).items()}
    joint = layer.weights.bind(mx.float32)[SHARED]
    gate, up = (layer.module.mlp.shared_expert[f"{n}_proj"] for n in ("gate", "up"))
    for part, key in (("w", "weight"), ("scales", "scales"), ("biases", "biases")):
        rows = mx.concatenate([gate[key], up[key]])
        assert mx.array_equal(getattr(joint, part), rows)
    ref = layer.weights.refs["mlp.shared_expert.up_proj"]
    assert (ref.joint.name, ref.joint.first) == (SHARED, gate.weight.shape[0])
    assert ref.joint.n_rows == joint.w.shape[0]
    after = parameters(layer.module)
    assert set(after) == set(before)
    assert all(mx.array_equal(after[name], before[name]) for name in before)


@pytest.mark.slow
def test_a_replaced_parameter_is_in_the_joint_matrix_and_in_the_next_token(model):
    def logits():
        cache = make_prompt_cache(model)
        model(mx.array([[3]]), cache=cache)
        return model(mx.array([[5]]), cache=cache)

    before, layer = logits(), model.graph_layers[0]
    weights = layer.weights.bind(mx.float32)
    assert layer.weights.bind(mx.float32) is weights
    up = layer.module.mlp.shared_expert.up_proj
    up.scales = 2 * up.scales
    n = layer.module.mlp.shared_expert.gate_proj.weight.shape[0]
    assert mx.array_equal(layer.weights.bind(mx.float32)[SHARED].scales[n:], up.scales)
    assert not mx.allclose(logits(), before, atol=1e-4)
    up.scales = up.scales / 2
    assert mx.allclose(logits(), before, rtol=1e-5, atol=1e-6)


def test_nothing_is_joined_while_a_model_trains(model):
    layer = model.graph_layers[0]
    model.train()
    assert not any("+" in name for name in layer.weights.bind(mx.float32))
    assert all(ref.joint is None for ref in layer.weights.refs.values())
    model.eval()
    assert SHARED in layer.weights.bind(mx.float32)


@pytest.mark.slow
def test_dense_matrices_of_one_input_are_multiplied_as_one(tmp_path, monkeypatch):
    path = make_gpt_oss(
        tmp_path / "dense", bits=None, num_hidden_layers=2, layer_types=None
    )
    few, whole = (
        moeflux_mlx.load(path, executor="sim", **memory)[0]
        for memory in ({"expert_memory": least(path)}, {})
    )
    joint = "self_attn.q_proj+self_attn.k_proj+self_attn.v_proj"
    layer = whole.graph_layers[0]
    attention, bound = layer.module.self_attn, layer.weights.bind(mx.float32)
    for name, key in ((joint, "weight"), (f"{joint}.bias", "bias")):
        rows = [attention[f"{part}_proj"][key] for part in "qkv"]
        assert mx.array_equal(bound[name].w, mx.concatenate(rows))
    logits, _ = greedy(whole, 1, 2)
    assert mx.array_equal(greedy(few, 1, 2)[0], logits)
    names = [
        call.label for graph in whole.runtime.graphs.values() for call in graph.calls
    ]
    begin = "+".join(["RmsNormBf16NTokens", *3 * ["MatvecNTokens"]])
    assert sum(name.startswith(begin) for name in names) == 2
    monkeypatch.setenv("MOEFLUX_FUSE", "0")
    alone = moeflux_mlx.load(path, executor="sim")[0]
    assert mx.allclose(greedy(alone, 1, 2)[0], logits, rtol=1e-4, atol=1e-5)
