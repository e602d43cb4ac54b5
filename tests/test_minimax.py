"""The minimax of our own equals mlx-lm's."""

from __future__ import annotations

import mlx.core as mx
import mlx_lm
import pytest
from mlx_lm.models.cache import make_prompt_cache
from native_models import (
    UNGATED_LAYER,
    adapt,
    assert_mlx_lms_class_serves,
    assert_refused,
    edit_config,
    launches,
    least,
    load,
    of,
    relative_rms,
    simulated,
    tokens,
)
from tiny import make_minimax

from moeflux_mlx.errors import ModelError
from moeflux_mlx.experts.files.pack import pack

ODD = "e9-k3-heads3-tied"


@of("minimax", "e8-k2")
def test_what_mlx_lms_modules_compute_goes_on_with_its_caches(plain):
    """Adapters are run by modules, whose calls have a mask before their caches."""
    models, found = (mlx_lm.load(str(plain))[0], load(plain)), []
    for model in models:
        adapt(model)
        cache = make_prompt_cache(model)
        mx.eval(model(tokens(7), None, cache))
        found.append(model(tokens(2, seed=5), cache=cache))
    assert relative_rms(found[1], found[0]) < 1e-5
    with pytest.raises(ModelError, match=r"\[mask\] expected None"):
        models[1](tokens(7), mx.array(1))


@pytest.mark.slow
@simulated
def test_a_token_takes_eight_launches_a_layer(tmp_path):
    path = make_minimax(tmp_path / "model", group_size=64, intermediate_size=64)
    names = launches(load(path, executor="sim", optimistic="on"))
    route = UNGATED_LAYER.index("experts_route_gate_up")
    layer = UNGATED_LAYER.copy()
    layer[route] = "experts_noaux_gate_up"
    assert names[1:17] == 2 * layer


@pytest.fixture
def copied(tmp_path):
    return make_minimax(tmp_path / "copy")


@pytest.mark.sampled
@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_scaling"),
        ({"scoring_func": "softmax"}, "scoring_func"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"attn_type_list": [0, 1]}, "attn_type_list"),
        ({"qk_norm_type": "per_head"}, "qk_norm_type"),
    ],
)
def test_what_it_does_not_do_mlx_lms_class_does(copied, changes, why, capsys):
    edit_config(copied, **changes)
    assert_mlx_lms_class_serves(copied, why, capsys)


def test_the_publishers_name_is_the_same_class(copied):
    expected = load(copied)(tokens(9))
    edit_config(copied, model_type="minimax_m2", attn_type_list=[1, 1])
    assert mx.array_equal(load(copied)(tokens(9)), expected)


MATRICES = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}


def as_published(path):
    """Have each expert's matrices be tensors of their own, under other names."""
    weights = mx.load(str(path / "model.safetensors"))
    for name in [name for name in weights if ".switch_mlp." in name]:
        block, matrix = name.removesuffix(".weight").split(".switch_mlp.")
        for expert, array in enumerate(weights.pop(name)):
            weights[f"{block}.experts.{expert}.{MATRICES[matrix]}.weight"] = array
    mx.save_safetensors(str(path / "model.safetensors"), weights)
    (path / "model.safetensors.index.json").unlink()
    return path


def test_experts_may_be_named_as_published(tmp_path):
    path = make_minimax(tmp_path / "published", bits=None)
    expected = load(path)(tokens(9))
    pack(as_published(path), tmp_path / "packed")
    assert relative_rms(mlx_lm.load(str(path))[0](tokens(9)), expected) < 1e-5
    for source in (path, tmp_path / "packed"):
        for bound in ({}, {"expert_memory": least(path)}):
            assert mx.array_equal(load(source, **bound)(tokens(9)), expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rotary_dim": ...}, "rotary_dim but it is missing"),
        ({"rotary_dim": 64}, "rotary_dim to be a positive number up to 32"),
        ({"rotary_dim": 7}, r"\[rope\].*7 channels"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok|8 experts per token"),
        ({"num_key_value_heads": 4}, "k_proj.weight.* to be .128, 64"),
        ({"head_dim": 0}, "head_dim"),
        ({"rope_theta": 0}, "rope_theta"),
    ],
)
def test_a_configuration_that_is_not_of_the_files_is_refused(copied, changes, message):
    edit_config(copied, **changes)
    assert_refused(copied, message)
