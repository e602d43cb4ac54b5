"""Operations of Python and MLX on models give stock's answer, or a typed error."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import pytest
from mlx.utils import tree_flatten, tree_map
from mlx_lm.models.base import create_attention_mask
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_config
from test_door_pack import LEAST, write
from test_saving import adapters, arrays, assert_same
from tiny import make_checkpoint

import moeflux_mlx
from moeflux_mlx.errors import ConfigError, ModelError, MoefluxError
from moeflux_mlx.experts.compute.switch import StreamedSwitch
from moeflux_mlx.experts.files.pack import pack
from moeflux_mlx.experts.pool.pool import POOL_ALIGNMENT

ROOT = Path(__file__).resolve().parents[1]
TOKENS = mx.array([[5, 6, 7, 9]])
SMALL = POOL_ALIGNMENT + 9 * 20_000

# The directory, and the memory for experts.
KINDS = {
    "native resident": ("checkpoint", None),
    "native streamed": ("checkpoint", SMALL),
    "native pack": ("packed", SMALL),
    "door resident": ("door", None),
    "door streamed": ("door", LEAST),
    "door pack": ("door_pack", LEAST),
}
STREAMED = [kind for kind in KINDS if "resident" not in kind]


@pytest.fixture(scope="session")
def directories(checkpoint, packed, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "scripts"))
        door = write(tmp_path_factory.mktemp("door") / "plain", "qwen3_moe", 4)
    pack(door, door.with_name("packed"))
    own = {"checkpoint": checkpoint, "packed": packed}
    return {**own, "door": door, "door_pack": door.with_name("packed")}


@pytest.fixture
def pair(request, directories):
    """One of our kinds of models, and stock's model of the plain checkpoint."""
    name, memory = KINDS[request.param]
    plain = directories["door" if "door" in name else "checkpoint"]
    ours = moeflux_mlx.load(directories[name], expert_memory=memory)[0]
    assert (memory is not None) == any(
        isinstance(module, StreamedSwitch) for module in ours.modules()
    )
    return ours, mlx_lm.load(str(plain))[0]


def rows() -> mx.array:
    return mx.random.normal((1, 4, 64), key=mx.random.key(1))


def doubled(x: mx.array) -> mx.array:
    return 2 * x if x.ndim == 1 and x.dtype == mx.float32 else x


def layer_calls(model: Any) -> list[mx.array]:
    """Call each layer alone: with rows, then with more rows, a cache and a mask."""
    found = []
    for layer, cache in zip(model.layers, make_prompt_cache(model), strict=True):
        found.append(layer(rows()))
        mask = None
        if hasattr(layer, "self_attn"):
            mask = create_attention_mask(rows(), cache)
        found.append(layer(rows(), mask, cache))
        found.append(layer(rows()[:, :1], None, cache))
    return found


def updated(model: Any) -> mx.array:
    model.update(tree_map(doubled, model.parameters()))
    return model(TOKENS)


def loaded_weights(model: Any) -> mx.array:
    model.load_weights(tree_flatten(tree_map(doubled, model.parameters())))
    return model(TOKENS)


def unfrozen(model: Any) -> list[Any]:
    model.freeze()
    none = [*tree_flatten(model.trainable_parameters())]
    model.unfreeze()
    paths = dict(tree_flatten(model.trainable_parameters()))
    return [none, {p for p in paths if "switch_mlp" not in p}, model(TOKENS)]


def state(model: Any) -> list[Any]:
    mx.eval(model.state)
    found = dict(tree_flatten(model.state))
    return [found[p] for p in sorted(found) if "switch_mlp" not in p]


def parameters(model: Any) -> list[Any]:
    found = dict(tree_flatten(model.parameters()))
    return [found[p] for p in sorted(found) if "switch_mlp" not in p]


def without_matrices(paths: Any) -> list[str]:
    """Return paths without those of single expert matrices."""
    return [path for path in paths if ".switch_mlp." not in path]


def modes(model: Any) -> list[bool]:
    found = [model.training, model.train().training, model.eval().training]
    return [*found, model.layers[0].training]


def requantized(model: Any) -> mx.array:
    nn.quantize(model, 32, 8)
    return model(TOKENS)


# Operations that give stock's answer for every kind of model.
ALIKE = {
    "a list of lists": lambda m: m([[5, 6, 7, 9]]),
    "lists of a batch": lambda m: m([[5, 6], [7, 9]]),
    "a shallow copy": lambda m: copy.copy(m)(TOKENS),
    "each layer": layer_calls,
    "an expert block": lambda m: [layer.mlp(rows()) for layer in m.layers],
    "its caches copied": lambda m: copied_caches(m, copy.deepcopy),
    "its caches pickled": lambda m: copied_caches(
        m, lambda c: pickle.loads(pickle.dumps(c))
    ),
    "its arguments pickled": lambda m: vars(pickle.loads(pickle.dumps(m.args))),
    "update": updated,
    "load_weights": loaded_weights,
    "freeze and unfreeze": unfrozen,
    "train and eval": modes,
    "state": state,
    "parameters": parameters,
    "named_modules": lambda m: without_matrices(p for p, _ in m.named_modules()),
    "children": lambda m: sorted(m.children()),
    "nn.quantize of what is quantised": requantized,
}


def copied_caches(model: Any, again: Any) -> mx.array:
    cache = make_prompt_cache(model)
    model(TOKENS, cache=cache)
    twin = again(cache)
    model(TOKENS[:, :1], cache=cache)
    return model(TOKENS[:, :2], cache=twin)


def agree(one: Any, other: Any) -> bool:
    if isinstance(one, mx.array):
        same = one.shape == other.shape and one.dtype == other.dtype
        # Our model sums in another order.
        return same and mx.allclose(one, other, rtol=1e-4, atol=1e-4).item()
    if isinstance(one, list):
        return len(one) == len(other) and all(map(agree, one, other))
    return one == other


@pytest.mark.sampled
@pytest.mark.parametrize("pair", KINDS, indirect=True)
def test_objects_are_as_stocks(pair):
    for name, operation in ALIKE.items():
        ours, stocks = (operation(model) for model in again(pair, name))
        assert agree(ours, stocks), name


def again(pair: tuple[Any, Any], name: str) -> tuple[Any, Any]:
    """Return models without the changes of earlier operations."""
    changed = ("update", "load_weights")
    if name in changed:
        # Keep the original parameters: later operations must find them again.
        for model in pair:
            model.__dict__.setdefault("own", model.parameters())
    else:
        for model in pair:
            if (own := model.__dict__.pop("own", None)) is not None:
                model.update(own)
    return pair


def cast(model: Any) -> mx.array:
    model.set_dtype(mx.float16)
    return model(TOKENS).astype(mx.float32)


def cast_by_update(model: Any) -> mx.array:
    half = tree_map(lambda x: x.astype(mx.float16), model.parameters())
    model.update(half)
    return model(TOKENS)


def cast_a_layer(model: Any) -> mx.array:
    model.layers[0].set_dtype(mx.float16)
    return model(TOKENS)


def experts_updated(model: Any) -> mx.array:
    block = {"gate_proj": {"weight": mx.zeros((8, 32, 8), mx.uint32)}}
    layers = [{"mlp": {"switch_mlp": block}}]
    tree: dict[str, Any] = {"model": {"layers": layers}}
    nested = hasattr(model, "language_model")
    model.update({"language_model": tree} if nested else tree, strict=False)
    return model(TOKENS)


COPY = r"\[copy\] .* load it a second time"
PICKLE = r"\[pickle\] .* load the model again where it is needed"
UNPACK = "'moeflux unpack PACK DIR'"
# Operations that are refused where experts are read from files.
REFUSED = {
    "a deep copy": (copy.deepcopy, COPY),
    "a deep copy of its streamer": (lambda m: copy.deepcopy(m.streamer), COPY),
    "a deep copy of a layer": (lambda m: copy.deepcopy(m.layers[0]), COPY),
    "a deep copy of a block": (lambda m: copy.deepcopy(m.layers[0].mlp), COPY),
    "pickle": (pickle.dumps, PICKLE),
    "pickle of its streamer": (lambda m: pickle.dumps(m.streamer), PICKLE),
    "pickle of a layer": (lambda m: pickle.dumps(m.layers[0]), PICKLE),
    "set_dtype": (cast, UNPACK),
    "set_dtype by update": (cast_by_update, UNPACK),
    "set_dtype of a layer": (cast_a_layer, UNPACK),
    "apply": (lambda m: m.apply(lambda x: x * 0), UNPACK),
    "update of experts": (experts_updated, r"\[weights\] .*switch_mlp"),
    "an expert's weight": (
        lambda m: m.layers[0].mlp.switch_mlp.gate_proj.weight,
        r"\[stream\] .*layers\.0\.mlp\.switch_mlp\.gate_proj",
    ),
    "ragged tokens": (lambda m: m([[5, 6], [7]]), "rows of one length"),
    "flat tokens": (lambda m: m([5, 6]), r"integer ids \[B, T\]"),
}


# Ways to divide a model that mlx-lm's classes have, in a group of two.
PAIR_OF_RANKS = SimpleNamespace(size=lambda: 2, rank=lambda: 0)
DIVIDED = {
    "its shard": lambda m: m.shard(PAIR_OF_RANKS),
    "pipeline": lambda m: getattr(m, "language_model", m).model.pipeline(PAIR_OF_RANKS),
}


@pytest.mark.parametrize("pair", ["native resident", "door streamed"], indirect=True)
def test_only_loading_divides_models(pair):
    ours, stock = pair
    before = ours(TOKENS)
    for name, divide in DIVIDED.items():
        with pytest.raises(ModelError, match=r"\[stream\] .*load\(group=\)") as caught:
            divide(ours)
        assert "\n" not in str(caught.value), name
        assert mx.array_equal(ours(TOKENS), before), name
    # A single process is divided already.
    ours.shard(mx.distributed.init())
    stock.shard(mx.distributed.init())
    assert agree(ours(TOKENS), stock(TOKENS))


@pytest.mark.sampled
@pytest.mark.parametrize("pair", STREAMED, indirect=True)
def test_operations_that_experts_from_files_lack_are_refused(pair):
    model, _ = pair
    before = model(TOKENS)
    for name, (operation, message) in REFUSED.items():
        with pytest.raises(MoefluxError, match=message) as caught:
            operation(model)
        assert "\n" not in str(caught.value), name
        assert mx.array_equal(model(TOKENS), before), name


@pytest.mark.parametrize("pair", ["native resident", "door resident"], indirect=True)
def test_a_resident_model_is_changed_as_stocks(pair):
    for change in (copy.deepcopy, requantized, cast_a_layer):
        results = [change(model) for model in pair]
        if change is copy.deepcopy:
            results = [model(TOKENS) for model in results]
        assert agree(*results)
    ours, stocks = pair
    stocks.set_dtype(mx.float16)
    if isinstance(ours, type(stocks)) and hasattr(ours, "language_model"):
        # On a CPU our model computes in float32, with the weights' rounded values.
        stocks.set_dtype(mx.float32)
    assert agree(cast(ours), stocks(TOKENS).astype(mx.float32))


def test_pickling_our_own_class_names_another_way_to_save_it(directories):
    ours, _ = moeflux_mlx.load(directories["checkpoint"])
    with pytest.raises(ModelError, match=r"\[pickle\] .*mlx_lm\.utils\.save_model"):
        pickle.dumps(ours)
    door, _ = moeflux_mlx.load(directories["checkpoint"], native=False)
    again = pickle.loads(pickle.dumps(door))
    assert mx.array_equal(again(TOKENS), door(TOKENS))


@pytest.mark.parametrize("native", [True, False])
def test_streamed_dense_experts_are_not_quantised(native, tmp_path):
    path = make_checkpoint(tmp_path / "plain", bits=None)
    model, _ = moeflux_mlx.load(path, expert_memory="3MB", native=native)
    before = model(TOKENS)
    with pytest.raises(ModelError, match=rf"\[quantize\] .*gate_proj: .*{UNPACK}"):
        nn.quantize(model, 32, 4)
    assert mx.array_equal(model(TOKENS), before)
    # A predicate that skips experts has all other layers quantised.
    nn.quantize(model, 32, 8, class_predicate=lambda _, m: isinstance(m, nn.Linear))
    stock = mlx_lm.load(str(path))[0]
    nn.quantize(stock, 32, 8, class_predicate=lambda _, m: isinstance(m, nn.Linear))
    assert mx.allclose(model(TOKENS), stock(TOKENS), atol=1e-4)


@pytest.mark.sampled
@pytest.mark.parametrize("name", ["checkpoint", "packed", "door", "door_pack"])
@pytest.mark.parametrize("memory", [None, "4MB"])
def test_load_accepts_the_arguments_of_mlx_lms_load(
    directories, name, memory, tmp_path
):
    path = directories[name]
    plain = directories[name.replace("_pack", "").replace("packed", "checkpoint")]
    change = {"max_position_embeddings": 99}
    options = {"return_config": True, "lazy": True, "trust_remote_code": True}
    ours = moeflux_mlx.load(path, {}, change, **options, expert_memory=memory)
    stocks = mlx_lm.load(str(plain), {}, change, **options)
    assert ours[2] == stocks[2] and ours[2]["max_position_embeddings"] == 99
    assert ours[1].encode("abc") == stocks[1].encode("abc")
    assert agree(ours[0](TOKENS), stocks[0](TOKENS))
    assert len(moeflux_mlx.load(path_or_hf_repo=path, expert_memory=memory)) == 2


def test_load_puts_adapters_in_their_place_of_the_signature(directories, tmp_path):
    adapter = adapters(tmp_path / "adapters")
    for path, memory in ((directories["packed"], SMALL), (directories["packed"], None)):
        ours = moeflux_mlx.load(path, {}, None, str(adapter), expert_memory=memory)[0]
        stock = mlx_lm.load(str(directories["checkpoint"]), {}, None, str(adapter))[0]
        assert agree(ours(TOKENS), stock(TOKENS))


def test_the_results_of_load_are_saved_as_a_complete_model(directories, tmp_path):
    path = directories["door_pack"]
    model, tokenizer, config = moeflux_mlx.load(
        path, return_config=True, expert_memory=LEAST
    )
    mlx_lm.utils.save(tmp_path / "out", path, model, tokenizer, config)
    assert_same(arrays(tmp_path / "out"), arrays(directories["door"]))
    assert load_config(tmp_path / "out") == load_config(directories["door"])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tokenizer_config", []),
        ("model_config", "x"),
        ("lazy", 1),
        ("return_config", "yes"),
        ("revision", 3),
        ("trust_remote_code", None.__class__),
    ],
)
def test_load_names_an_argument_of_a_wrong_type(directories, name, value):
    with pytest.raises(ConfigError, match=rf"\[{name}\] expected a"):
        moeflux_mlx.load(directories["checkpoint"], **{name: value})


def test_a_models_own_code_is_not_run_and_that_is_reported(directories, tmp_path):
    path = make_checkpoint(tmp_path / "own")
    config = (path / "config.json").read_text()
    (path / "config.json").write_text(config.replace("{", '{"model_file": "m.py",', 1))
    (path / "m.py").write_text("raise SystemExit('ran')")
    with pytest.raises(ConfigError, match=r"its own 'm.py', which is not run here"):
        moeflux_mlx.load(path, trust_remote_code=True)
