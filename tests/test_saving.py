"""A model whose experts are read from files is saved completely, or not at all."""

from __future__ import annotations

import copy
import json
import os
import shutil
import sys
from pathlib import Path

import mlx.core as mx
import mlx_lm
import pytest
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm import utils
from mlx_lm.utils import load, load_model, save, save_model
from tiny import make_checkpoint

import moeflux_mlx
from moeflux_mlx.errors import ExpertStoreError, ModelError
from moeflux_mlx.experts.files.pack import pack
from moeflux_mlx.experts.files.unpack import unpack
from moeflux_mlx.experts.pool.pool import POOL_ALIGNMENT
from moeflux_mlx.saving import whole

# Imported before any model of ours was loaded, as scripts do.
KEPT = getattr(save_model, "__wrapped__", save_model)

PROMPT = mx.array([[5, 6, 7]])
ROOT = Path(__file__).resolve().parents[1]
FAMILIES = [
    ("gpt_oss", 4, ["-d"]),
    ("gpt_oss", None, ["-q", "--q-group-size", "32"]),
    ("nemotron_h", 4, ["-d", "--dtype", "bfloat16"]),
]


@pytest.fixture(params=["streamed", "whole", "checkpoint", "mlx-lm"])
def streamed(request, checkpoint, packed):
    """Models whose experts are read from files, with all in memory or not."""
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


def arrays(path: Path) -> dict[str, mx.array]:
    """Return all tensors of a directory by name."""
    files = path.glob("model*.safetensors")
    return {name: x for file in files for name, x in mx.load(str(file)).items()}


def assert_same(one: dict[str, mx.array], other: dict[str, mx.array]) -> None:
    assert one.keys() == other.keys()
    for name, array in one.items():
        assert array.dtype == other[name].dtype
        assert mx.array_equal(array, other[name]), name


@pytest.mark.sampled
def test_save_model_writes_the_whole_model(streamed, checkpoint, tmp_path):
    streamed.language_model.model.norm.weight *= 2
    # Imported here by its name before there was a model of ours.
    save_model(tmp_path / "out", streamed)
    stock = mlx_lm.load(str(checkpoint))[0]
    stock.language_model.model.norm.weight *= 2
    utils.save_model(tmp_path / "stock", stock)
    assert_same(arrays(tmp_path / "out"), arrays(tmp_path / "stock"))
    names = [{p.name for p in (tmp_path / n).iterdir()} for n in ("out", "stock")]
    assert names[0] == names[1]
    index, expected = (
        json.loads((tmp_path / n / "model.safetensors.index.json").read_text())
        for n in ("out", "stock")
    )
    assert index["weight_map"] == expected["weight_map"]
    assert index["metadata"]["total_size"] == expected["metadata"]["total_size"]
    assert streamed(PROMPT).shape == (1, 3, 320)


def test_a_function_imported_before_the_model_writes_nothing(streamed, tmp_path):
    with pytest.raises(ModelError, match=r"\[save\] .* nothing is written: import it"):
        KEPT(tmp_path / "out", streamed)
    assert [*tmp_path.glob("out/*")] == []


def test_save_weights_writes_all_of_them(streamed, checkpoint, tmp_path):
    streamed.save_weights(str(tmp_path / "w.safetensors"))
    mlx_lm.load(str(checkpoint))[0].save_weights(str(tmp_path / "stock.safetensors"))
    files = (tmp_path / "w.safetensors", tmp_path / "stock.safetensors")
    assert_same(*(mx.load(str(file)) for file in files))
    assert len([*tmp_path.iterdir()]) == 2


def test_save_weights_writes_nothing_where_experts_cannot_go(streamed, tmp_path):
    with pytest.raises(ModelError, match=r"ends in \.safetensors"):
        streamed.save_weights(str(tmp_path / "w.npz"))
    layer = streamed.layers[0]
    for part in (streamed.language_model, layer, layer.mlp):
        with pytest.raises(ModelError, match=r"\[save\] .* save the model itself"):
            part.save_weights(str(tmp_path / "w.safetensors"))
        with pytest.raises(ModelError, match=r"\[save\] .* save the model itself"):
            utils.save_model(tmp_path, part)
    assert [*tmp_path.iterdir()] == []


@pytest.mark.sampled
def test_save_leaves_existing_files(streamed, packed, tmp_path):
    _, tokenizer, config = load(str(packed), trust_remote_code=True, return_config=True)
    (tmp_path / "kept").write_text("kept")
    save(tmp_path, packed, streamed, tokenizer, config)
    assert (tmp_path / "kept").read_text() == "kept"
    assert not (tmp_path / "moeflux_model.py").exists()
    assert mx.array_equal(logits(tmp_path), mlx_lm.load(str(tmp_path))[0](PROMPT))


@pytest.mark.parametrize("crashes", [False, True], ids=["error", "crash"])
def test_a_save_that_ends_between_files_never_leaves_parts_of_two_models(
    crashes, packed, tmp_path, monkeypatch
):
    monkeypatch.setattr(whole, "SHARD_BYTES", 220_000)
    model = moeflux_mlx.load(packed, expert_memory=POOL_ALIGNMENT + 9 * 20_000)[0]
    norm = model.language_model.model.norm
    first, out = tmp_path / "first", tmp_path / "out"
    save_model(first, model)
    norm.weight = norm.weight * 2
    save_model(tmp_path / "second", model)
    assert len([*first.glob("model-*")]) > 2
    before, after = arrays(first), arrays(tmp_path / "second")
    n_files, replace = len([*first.iterdir()]), os.replace
    for n_done in range(2 * n_files):
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(first, out)
        calls = []

        def interrupted(*args, n_done=n_done, calls=calls, **options):
            calls.append(args)
            if len(calls) == n_done + 1:
                raise KeyboardInterrupt
            replace(*args, **options)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", interrupted)
            if crashes:
                # A process that has ended puts nothing back and removes nothing.
                patch.setattr(whole, "_put_back", lambda *_: None)
                patch.setattr(whole, "_remove", lambda *_: None)
            with pytest.raises(KeyboardInterrupt):
                save_model(out, model)
        found = arrays(out)
        if not crashes:
            assert_same(found, before)
            assert {p.name for p in out.iterdir()} == {p.name for p in first.iterdir()}
        elif found.keys() == before.keys():
            whole_one = after if n_done > n_files else before
            assert_same(found, whole_one)
    save_model(out, model)
    assert_same(arrays(out), after)


def test_a_save_beside_other_weights_is_refused(packed, tmp_path):
    model = moeflux_mlx.load(packed)[0]
    shutil.copy(packed / "model.safetensors", tmp_path / "model-2.safetensors")
    with pytest.raises(ModelError, match=r"model-2\.safetensors', which mlx-lm would"):
        save_model(tmp_path, model)
    assert [p.name for p in tmp_path.iterdir()] == ["model-2.safetensors"]


@pytest.fixture
def damaged(packed, tmp_path):
    """A pack with a flipped bit in its last expert."""
    copied = Path(shutil.copytree(packed, tmp_path / "damaged"))
    file = copied / "experts-003.bin"
    data = bytearray(file.read_bytes())
    data[7 * (len(data) // 8) + 5] ^= 1
    file.write_bytes(data)
    return copied


def test_a_damaged_expert_leaves_no_named_file(damaged, tmp_path):
    memory = POOL_ALIGNMENT + 9 * 20_000
    model = moeflux_mlx.load(damaged, expert_memory=memory)[0]
    for write in (
        lambda: utils.save_model(tmp_path / "out", model),
        lambda: model.save_weights(str(tmp_path / "out/w.safetensors")),
        lambda: command("convert", "--hf-path", damaged, "--mlx-path", tmp_path / "c"),
    ):
        with pytest.raises(ExpertStoreError, match="expert 7 of layer 3"):
            write()
        assert [p.name for p in tmp_path.iterdir()] == ["damaged"]


MORE = [[], ["--dequantize"], ["-q"], ["-d", "--dtype", "float16"]]
DENSE = [
    ["-q", "--q-group-size", "32"],
    ["-q", "--q-mode", "mxfp4", "--dtype", "bfloat16"],
    ["-q", "--q-group-size", "32", "--quant-predicate", "mixed_3_4"],
    ["--dtype", "bfloat16"],
]


@pytest.mark.sampled
@pytest.mark.parametrize("more", MORE)
def test_convert_of_a_pack_equals_that_of_the_checkpoint(
    checkpoint, packed, tmp_path, more
):
    for path, name in ((packed, "out"), (checkpoint, "stock")):
        command("convert", "--hf-path", path, "--mlx-path", tmp_path / name, *more)
    assert_alike(tmp_path / "out", tmp_path / "stock")


@pytest.mark.sampled
@pytest.mark.parametrize("more", DENSE)
def test_convert_of_a_dense_pack_is_the_checkpoints(dense_pack, tmp_path, more):
    for path, name in ((dense_pack, "out"), (dense_pack.parent / "plain", "stock")):
        command("convert", "--hf-path", path, "--mlx-path", tmp_path / name, *more)
    assert_alike(tmp_path / "out", tmp_path / "stock")


def assert_alike(one: Path, other: Path, call=logits) -> None:
    """Check that two directories hold the same checkpoint, also by ``call``."""
    assert_same(arrays(one), arrays(other))
    # There are eight experts.
    assert any(x.ndim == 3 and len(x) == 8 for x in arrays(one).values())
    assert {p.name for p in one.iterdir()} == {p.name for p in other.iterdir()}
    configs = [json.loads((p / "config.json").read_text()) for p in (one, other)]
    assert configs[0] == configs[1]
    experts = (x.dtype for n, x in arrays(one).items() if n.endswith("up_proj.weight"))
    # On a CPU, MLX's gathered products support no other type.
    if {mx.float16, mx.bfloat16}.isdisjoint(experts):
        models = (load_model(path)[0] for path in (one, other))
        assert mx.array_equal(*map(call, models))


@pytest.mark.parametrize("more", [[], ["--dequantize"]])
def test_fuse_of_a_pack_equals_that_of_the_checkpoint(
    checkpoint, packed, tmp_path, more
):
    adapter = adapters(tmp_path / "adapters")
    for path, name in ((packed, "out"), (checkpoint, "stock")):
        flags = ["--adapter-path", adapter, "--save-path", tmp_path / name, *more]
        command("fuse", "--model", path, *flags)
    assert_alike(tmp_path / "out", tmp_path / "stock")
    assert not mx.array_equal(logits(tmp_path / "out"), logits(checkpoint))


@pytest.mark.sampled
@pytest.mark.parametrize(("family", "bits", "more"), FAMILIES)
def test_convert_of_a_pack_of_mlx_lms_class_is_the_checkpoints(
    family, bits, more, tmp_path, monkeypatch
):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    from test_door_pack import write

    write(tmp_path / "plain", family, bits)
    pack(tmp_path / "plain", tmp_path / "packed")
    for name in ("plain", "packed"):
        out = tmp_path / f"{name}-out"
        command("convert", "--hf-path", tmp_path / name, "--mlx-path", out, *more)
    tokens = mx.array([[5, 6, 7]])
    outs = (tmp_path / f"{name}-out" for name in ("packed", "plain"))
    assert_alike(*outs, lambda model: model(tokens))


@pytest.mark.parametrize(
    ("name", "flags", "way"),
    [
        (
            "fuse",
            ["--export-gguf"],
            "'moeflux unpack PACK DIR' if it is a pack, and mlx_lm.fuse on the plain",
        ),
        ("quant.awq", [], "and mlx_lm.awq on the plain checkpoint"),
        ("quant.dwq", [], "and mlx_lm.dwq on the plain checkpoint"),
        ("quant.dynamic_quant", [], "and mlx_lm.dynamic_quant on the plain checkpoint"),
        ("quant.gptq", [], "and mlx_lm.gptq on the plain checkpoint"),
    ],
)
def test_commands_that_would_change_experts_end_before_writing(
    packed, tmp_path, monkeypatch, name, flags, way
):
    monkeypatch.chdir(tmp_path)
    # The data is on a hub, which tests do not contact.
    monkeypatch.setattr("mlx_lm.quant.dwq.load_data", lambda *_: ([], []))
    where = "--mlx-path" if name != "fuse" else "--save-path"
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ModelError, match=way):
        command(name, "--model", packed, where, tmp_path / "out", *flags)
    assert sorted(tmp_path.rglob("*")) == before


def test_weights_of_another_type_than_mlx_makes_are_loaded_and_converted(tmp_path):
    path, packed = tmp_path / "plain", tmp_path / "packed"
    pack(make_checkpoint(path, dtype=mx.bfloat16), packed)
    command("convert", "--hf-path", packed, "--mlx-path", tmp_path / "out")
    assert_same(arrays(tmp_path / "out"), arrays(path))
    for directory in (packed, path):
        model = moeflux_mlx.load(directory, expert_memory="3MB")[0]
        assert model(PROMPT).shape == (1, 3, 320)


@pytest.fixture(scope="session")
def dense_pack(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("dense")
    pack(make_checkpoint(folder / "plain", bits=None), folder / "packed")
    return folder / "packed"


def test_the_way_named_in_the_error_works(dense_pack, tmp_path):
    unpack(dense_pack, tmp_path / "plain")
    for path, name in ((tmp_path / "plain", "out"), (dense_pack.parent / "plain", "b")):
        flags = ["--mlx-path", tmp_path / name, "-q", "--q-group-size", "32"]
        command("convert", "--hf-path", path, *flags)
    assert_alike(tmp_path / "out", tmp_path / "b")


@pytest.mark.sampled
def test_a_dequantised_model_is_saved_and_not_called(streamed, checkpoint, tmp_path):
    stock = utils.dequantize_model(mlx_lm.load(str(checkpoint))[0])
    utils.save_model(tmp_path / "stock", stock)
    model = utils.dequantize_model(streamed)
    utils.save_model(tmp_path / "out", model)
    assert_same(arrays(tmp_path / "out"), arrays(tmp_path / "stock"))
    with pytest.raises(
        ModelError, match=r"\[dequantize\] expected a model to be saved"
    ):
        model(PROMPT)


def test_a_change_that_experts_did_not_follow_is_not_saved(streamed, tmp_path):
    kept = utils.dequantize_model.__wrapped__
    with pytest.raises(ModelError, match="quantised matrices besides experts"):
        utils.save_model(tmp_path / "out", kept(streamed))
    assert not (tmp_path / "out").exists()


def adapters(path: Path) -> Path:
    """Write adapters as ``mlx_lm.lora`` does, for a matrix of the last layer."""
    path.mkdir()
    lora = {"rank": 2, "scale": 1.0, "dropout": 0.0, "keys": ["self_attn.q_proj"]}
    config = {"fine_tune_type": "lora", "num_layers": 1, "lora_parameters": lora}
    (path / "adapter_config.json").write_text(json.dumps(config))
    name = "language_model.model.layers.3.self_attn.q_proj.lora_"
    arrays = {f"{name}a": mx.ones((64, 2)), f"{name}b": mx.full((2, 256), 0.1)}
    mx.save_safetensors(str(path / "adapters.safetensors"), arrays)
    return path


def command(name: str, *args) -> None:
    """Run one of mlx-lm's commands in this process, as its entry point does."""
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


@pytest.mark.sampled
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
