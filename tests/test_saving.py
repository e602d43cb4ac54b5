"""A model without its experts is never saved, copied or changed as if it were whole."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path

import mlx.core as mx
import mlx_lm
import pytest
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm import utils
from mlx_lm.utils import load, save, save_model

import moeflux_mlx
from moeflux_mlx.errors import ModelError
from moeflux_mlx.experts.pool import POOL_ALIGNMENT

# Taken before any model of ours was loaded, as scripts do.
KEPT = getattr(save_model, "__wrapped__", save_model)

PROMPT = mx.array([[5, 6, 7]])


@pytest.fixture(params=["streamed", "whole", "checkpoint", "mlx-lm"])
def streamed(request, checkpoint, packed):
    """Models whose experts are read from files, all in memory or not."""
    if request.param == "mlx-lm":
        return mlx_lm.load(str(packed), trust_remote_code=True)[0]
    path = checkpoint if request.param == "checkpoint" else packed
    memory = None if request.param == "whole" else POOL_ALIGNMENT + 9 * 20_000
    return moeflux_mlx.load(path, expert_memory=memory)[0]


@pytest.fixture
def resident(checkpoint):
    return moeflux_mlx.load(checkpoint)[0]


def logits(path_or_model) -> mx.array:
    model = path_or_model
    if not callable(model):
        model = mlx_lm.load(str(path_or_model))[0]
    return model(PROMPT)


@pytest.mark.parametrize("save_it", [utils.save_model, save_model, KEPT])
def test_save_model_writes_nothing_of_a_streamed_model(streamed, tmp_path, save_it):
    with pytest.raises(ModelError, match=r"\[save\] .* nothing is written"):
        save_it(tmp_path / "out", streamed)
    assert [*tmp_path.glob("out/*")] == []
    assert streamed(PROMPT).shape == (1, 3, 320)


@pytest.mark.parametrize("name", ["w.safetensors", "w.npz"])
def test_save_weights_writes_nothing_of_a_streamed_model(streamed, tmp_path, name):
    with pytest.raises(ModelError, match="nothing is written"):
        streamed.save_weights(str(tmp_path / name))
    assert [*tmp_path.iterdir()] == []


def test_save_leaves_what_was_there(streamed, packed, tmp_path):
    tokenizer = load(str(packed), trust_remote_code=True)[1]
    (tmp_path / "kept").write_text("kept")
    with pytest.raises(ModelError, match="nothing is written"):
        save(tmp_path, packed, streamed, tokenizer, {})
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


@pytest.mark.parametrize("more", [[], ["-q"], ["--dequantize"], ["--dtype", "float16"]])
def test_convert_of_a_pack_makes_no_directory(packed, tmp_path, more):
    out = tmp_path / "out"
    with pytest.raises(ModelError, match="nothing is written"):
        command("convert", "--hf-path", packed, "--mlx-path", out, *more)
    assert not out.exists()


@pytest.mark.parametrize("more", [[], ["--dequantize"]])
def test_fuse_of_a_pack_makes_no_directory(packed, tmp_path, more):
    out = tmp_path / "out"
    adapter = adapters(tmp_path / "adapters")
    more = ["--adapter-path", adapter, "--save-path", out, *more]
    with pytest.raises(ModelError, match="nothing is written"):
        command("fuse", "--model", packed, *more)
    assert not out.exists()


def adapters(path: Path) -> Path:
    """Write what ``mlx_lm.lora`` leaves: a matrix of the last layer is adapted."""
    path.mkdir()
    lora = {"rank": 2, "scale": 1.0, "dropout": 0.0, "keys": ["self_attn.q_proj"]}
    config = {"fine_tune_type": "lora", "num_layers": 1, "lora_parameters": lora}
    (path / "adapter_config.json").write_text(json.dumps(config))
    name = "language_model.model.layers.3.self_attn.q_proj.lora_a"
    arrays = {name: mx.ones((64, 2))}
    mx.save_safetensors(str(path / "adapters.safetensors"), arrays)
    return path


def command(name: str, *args) -> None:
    """Run a command of mlx-lm in this process, as its entry point does."""
    main = __import__(f"mlx_lm.{name}", fromlist=["main"])
    main = main if callable(main) else sys.modules[f"mlx_lm.{name}"].main
    argv = [f"mlx_lm.{name}", *map(str, args), "--trust-remote-code"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", argv)
        main()


def test_a_model_with_its_experts_is_saved_whole(resident, checkpoint, tmp_path):
    expected, tokenizer = mlx_lm.load(str(checkpoint))
    config = utils.load_config(checkpoint)
    save(tmp_path / "saved", checkpoint, resident, tokenizer, config, False)
    names = {name for name, _ in tree_flatten(expected.parameters())}
    saved = mx.load(str(tmp_path / "saved/model.safetensors"))
    assert set(saved) == names and any("switch_mlp" in name for name in names)
    assert mx.array_equal(logits(tmp_path / "saved"), expected(PROMPT))
    resident.save_weights(str(tmp_path / "weights.safetensors"))
    assert set(mx.load(str(tmp_path / "weights.safetensors"))) == names


def test_parameters_stay_there_for_counting(streamed):
    found = dict(tree_flatten(streamed.parameters()))
    assert found and not any("switch_mlp" in name for name in found)
    assert set(dict(tree_flatten(streamed.trainable_parameters()))) <= set(found)


@pytest.mark.parametrize("change", ["update", "load_weights"])
def test_weights_for_streamed_experts_are_refused_not_dropped(
    streamed, checkpoint, change
):
    weights = mx.load(str(checkpoint / "model.safetensors"))
    expected = logits(streamed)
    with pytest.raises(ModelError, match=r"\[weights\] .*switch_mlp"):
        if change == "update":
            streamed.update(tree_unflatten([*weights.items()]), strict=False)
        else:
            streamed.load_weights([*weights.items()], strict=False)
    assert mx.array_equal(logits(streamed), expected)


def test_a_layer_called_by_itself_reads_its_experts(streamed, checkpoint):
    rows = mx.random.normal((1, 3, 64), key=mx.random.key(3))
    stock = mlx_lm.load(str(checkpoint))[0]
    for layer, own in zip(stock.layers, streamed.layers, strict=True):
        assert mx.allclose(own.mlp(rows), layer.mlp(rows), atol=1e-5)


def test_a_copy_of_a_streamed_model_is_refused(streamed):
    with pytest.raises(ModelError, match="load it a second time"):
        copy.deepcopy(streamed)


@pytest.mark.parametrize("used", [False, True])
def test_a_copy_of_a_resident_model_has_weights_of_its_own(resident, used):
    expected = logits(resident) if used else None
    twin = copy.deepcopy(resident)
    for model in (twin, resident):
        assert expected is None or mx.array_equal(model(PROMPT), expected)
    norm = twin.language_model.model.norm
    norm.weight = norm.weight * 2
    assert mx.allclose(twin(PROMPT), 2 * resident(PROMPT), atol=1e-4)
