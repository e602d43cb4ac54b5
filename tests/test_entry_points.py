"""mlx-lm's own entry points on packs of our class and of mlx-lm's, beside stock.

docs/entry-points.md has a row for each entry point and names its tests.
"""

from __future__ import annotations

import gc
import importlib
import io
import json
import re
import sys
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx_lm
import pytest
from mlx_lm import utils
from mlx_lm.generate import generate_step, speculative_generate_step
from mlx_lm.models import cache as caches
from mlx_lm.sample_utils import make_logits_processors, make_sampler
from test_adapters import command
from test_door_pack import write
from test_saving import arrays, assert_alike, assert_same
from test_saving import command as strict_command

import moeflux_mlx
from moeflux_mlx.cli.inspect import summarize
from moeflux_mlx.errors import ModelError
from moeflux_mlx.experts.files.checkpoint import read_config
from moeflux_mlx.experts.files.pack import pack
from moeflux_mlx.experts.files.stock import has_own_class
from moeflux_mlx.experts.files.unpack import unpack

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "entry-points.md").read_text()
N_TOKENS = 6
QUANTISERS = ("awq", "dwq", "dynamic_quant", "gptq")


class Pair(NamedTuple):
    """A plain checkpoint, and its pack."""

    plain: Path
    packed: Path


@pytest.fixture(scope="module", params=["native", "door"])
def pair(request, checkpoint, packed, tmp_path_factory) -> Pair:
    if request.param == "native":
        return Pair(checkpoint, packed)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "scripts"))
        plain = write(tmp_path_factory.mktemp("door") / "plain", "olmoe", 4)
    pack(plain, plain.with_name("packed"))
    assert not has_own_class(read_config(plain))
    return Pair(plain, plain.with_name("packed"))


@pytest.fixture
def few(pair, monkeypatch) -> str:
    """Memory for a few experts, which mlx-lm's commands read from the environment."""
    memory = str(summarize(pair.packed).minimum_bytes * 2)
    monkeypatch.setenv("MOEFLUX_EXPERT_MEMORY", memory)
    return memory


def told(capsys, name: str, model: Path, *flags: object) -> str:
    """Return the output of one of mlx-lm's commands, without the model's name."""
    command(name, "--model", model, "--trust-remote-code", *flags)
    return capsys.readouterr().out.replace(str(model), "MODEL")


def test_generate_writes_stocks_text(pair, few, capsys):
    flags = ["--prompt", "hello", "-m", N_TOKENS, "--verbose", "False"]
    stock, ours = (told(capsys, "generate", path, *flags) for path in pair)
    assert ours == stock and stock.strip()


@pytest.mark.sampled
def test_chat_prints_the_text_of_stocks(pair, few, capsys, monkeypatch):
    spoken = []
    for path in pair:
        monkeypatch.setattr(sys, "stdin", io.StringIO("hello\nand then\nr\nhey\nq\n"))
        text = told(capsys, "chat", path, "-m", N_TOKENS, "--seed", 1)
        text = re.sub(r"\x1b\[[0-9;]*[A-Za-z]|\d+\.\d+ (tok/s|GB)", "", text)
        # Names of models differ in length, and so break lines at other places.
        spoken.append(re.sub(r"[\s─│╭╮╰╯]+", " ", text))
    assert spoken[0] == spoken[1] and "MODEL" in spoken[0]


@pytest.mark.sampled
def test_a_cached_prompt_continues_as_stocks(pair, few, capsys, tmp_path):
    texts = []
    for path in pair:
        file = tmp_path / f"{path.name}.safetensors"
        flags = ["--prompt-cache-file", file]
        told(capsys, "cache_prompt", path, *flags, "--prompt", "be brief")
        flags += ["--prompt", "hello", "-m", N_TOKENS, "--verbose", "False"]
        texts.append(told(capsys, "generate", path, *flags))
    assert texts[0] == texts[1] and texts[0].strip()


@pytest.mark.sampled
def test_perplexity_equals_stocks(pair, few, capsys, monkeypatch):
    """Replace only the command's data set, which is on a hub."""
    rows = mx.random.randint(0, 90, (4, 17), key=mx.random.key(1))
    perplexity = importlib.import_module("mlx_lm.perplexity")
    monkeypatch.setattr(perplexity, "load_data", lambda *_, **__: rows)
    found = []
    for path in pair:
        text = told(capsys, "perplexity", path, "--batch-size", 2)
        found.append(float(re.search(r"Perplexity: ([\d.]+)", text)[1]))
    assert found[1] == pytest.approx(found[0], rel=1e-4)


@pytest.mark.slow
def test_evaluate_scores_a_task_as_stock(pair, few, capsys, tmp_path, monkeypatch):
    pytest.importorskip("lm_eval", reason="needs lm_eval, which brings PyTorch")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    questions = [
        {"q": "a word and", "choices": ["another", "one", "the"], "gold": 0},
        {"q": "some more of", "choices": ["it", "them all"], "gold": 1},
        {"q": "the end is", "choices": ["near", "far", "here", "x"], "gold": 2},
    ]
    Path("rows.json").write_text("\n".join(map(json.dumps, questions)))
    task = {
        "task": "choose",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.json")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{q}}",
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }
    # JSON is valid YAML.
    Path("choose.yaml").write_text(json.dumps(task))
    for path in pair:
        told(capsys, "evaluate", path, "--tasks", "choose.yaml", "--output-dir", "out")
    stock, ours = (json.loads(f.read_text()) for f in Path("out").iterdir())
    assert ours == stock and stock["choose"]["sample_len"] == len(questions)


@pytest.mark.parametrize("n_seqs", [1, 3])
def test_benchmark_ends_with_its_averages(pair, few, capsys, n_seqs):
    flags = ["-p", 9, "-g", 3, "-n", 1, "-b", n_seqs]
    speeds = r"Averages: prompt_tps=\d+\.\d+, generation_tps=\d+\.\d+"
    for path in pair:
        assert re.search(speeds, told(capsys, "benchmark", path, *flags))


@pytest.mark.slow
def test_lora_trains_and_tests_as_stock(pair, few, capsys, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    for name in ("train", "valid", "test"):
        lines = [json.dumps({"text": f"{name} {i} of some words"}) for i in range(4)]
        (data / f"{name}.jsonl").write_text("\n".join(lines))
    keys = {"rank": 4, "scale": 2.0, "dropout": 0.0, "keys": ["self_attn.q_proj"]}
    settings = {"lora_parameters": keys, "max_seq_length": 32, "optimizer": "sgd"}
    (tmp_path / "lora.yaml").write_text(json.dumps(settings))
    losses, learnt = [], []
    for path in pair:
        out = tmp_path / path.name
        flags = [
            *("--data", data, "--batch-size", 2, "-c", tmp_path / "lora.yaml"),
            *("--adapter-path", out, "--num-layers", 2),
        ]
        steps = ["--train", "--iters", 1, "--learning-rate", 0.1, "--test"]
        text = told(capsys, "lora", path, *flags, *steps)
        losses.append(re.findall(r"Test loss (\d+\.\d+)", text))
        learnt.append(mx.load(str(out / "adapters.safetensors")))
        gc.collect()
    assert losses[0] == losses[1] and len(losses[0]) == 1
    assert learnt[0].keys() == learnt[1].keys()
    for name, array in learnt[0].items():
        assert mx.allclose(array, learnt[1][name], atol=1e-5), name
        assert array.abs().max() > 0, "nothing was learnt"


@pytest.mark.parametrize("name", QUANTISERS)
def test_commands_that_read_every_expert_are_refused(pair, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("mlx_lm.quant.dwq.load_data", lambda *_: ([], []))
    with pytest.raises(ModelError, match=rf"moeflux unpack PACK DIR.*mlx_lm.{name}"):
        strict_command(
            f"quant.{name}", "--model", pair.packed, "--mlx-path", tmp_path / "out"
        )
    assert [*tmp_path.iterdir()] == []


# Options for small models: one group of 32 columns, and few trials.
OF_QUANTISERS = {
    "awq": ["--group-size", 32, "--n-grid", 2],
    "dwq": ["--group-size", 32, "--batch-size", 2],
    "dynamic_quant": ["--low-group-size", 32, "--high-group-size", 32],
    "gptq": ["--group-size", 32, "--fallback-group-size", 32],
}


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> Pair:
    """A dense checkpoint of a family that ``mlx_lm.awq`` supports, and its pack."""
    plain = tmp_path_factory.mktemp("dense") / "plain"
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "scripts"))
        write(plain, "deepseek_v2", q_lora_rank=None)
    pack(plain, plain.with_name("packed"))
    return Pair(plain, plain.with_name("packed"))


@pytest.mark.slow
@pytest.mark.parametrize("name", QUANTISERS)
def test_quantisers_change_an_unpacked_model_as_the_original(
    dense, tmp_path, monkeypatch, name
):
    """Replace only the commands' data sets, which are on a hub."""
    rows = mx.random.randint(1, 90, (4, 17), key=mx.random.key(1))
    module = importlib.import_module(f"mlx_lm.quant.{name}")
    pairs = [(row, 0) for row in rows.tolist()]
    found = (pairs, pairs) if name == "dwq" else rows
    monkeypatch.setattr(module, "load_data", lambda *_, **__: found)
    monkeypatch.chdir(tmp_path)
    unpack(dense.packed, tmp_path / "unpacked")
    for path in (dense.plain, tmp_path / "unpacked"):
        out = tmp_path / f"{path.name}-out"
        flags = ["--model", path, "--mlx-path", out, *OF_QUANTISERS[name]]
        strict_command(f"quant.{name}", *flags)
    ours, stocks = tmp_path / "unpacked-out", tmp_path / "plain-out"
    assert_same(arrays(ours), arrays(stocks))
    pack(ours, tmp_path / "packed")
    again, _ = moeflux_mlx.load(tmp_path / "packed", expert_memory="2200kB")
    stock, _ = mlx_lm.load(str(stocks))
    assert mx.array_equal(again(rows), stock(rows))


def test_quantisers_refuse_a_model_whose_experts_are_in_files(pair, few):
    """As functions they would otherwise change everything except the experts."""
    dwq, dynamic, gptq = (
        importlib.import_module(f"mlx_lm.quant.{name}") for name in QUANTISERS[1:]
    )
    model, _ = moeflux_mlx.load(pair.packed)
    before = model(mx.array([[5, 6]]))
    for quantise in (
        lambda: dwq.dwq_quantize(model, *[None] * 7),
        lambda: dynamic.estimate_sensitivities(model, [], 4, 32, 5, 32),
        lambda: gptq.gptq_quantize(model, [], 4, 32, 6, 32),
    ):
        with pytest.raises(ModelError, match=r"moeflux unpack PACK DIR.*mlx_lm\."):
            quantise()
    assert mx.array_equal(model(mx.array([[5, 6]])), before)


@pytest.mark.parametrize("loader", ["sharded_load", "pipeline_load"])
def test_loaders_that_divide_a_model_work_alone_or_refuse(pair, few, loader):
    """Another test runs them in several processes."""
    tokens, trusted = mx.array([[5, 6, 7]]), {"trust_remote_code": True}
    if loader == "sharded_load":
        model, _ = utils.sharded_load(str(pair.packed), **trusted)
        stock, _ = utils.load(str(pair.plain))
        assert mx.allclose(model(tokens), stock(tokens), atol=1e-4)
        with pytest.raises(ModelError, match="moeflux chat --pipeline"):
            utils.sharded_load(str(pair.packed), mx.distributed.init(), **trusted)
    else:
        # Stock's own refusal: this loader takes no ``trust_remote_code``.
        with pytest.raises(ValueError, match="trust_remote_code=True"):
            utils.pipeline_load(str(pair.packed))


@pytest.fixture
def models(pair, few) -> tuple[Any, Any, Any]:
    """Stock's model, ours from mlx-lm's own ``load``, and the tokenizer."""
    stock, tokenizer = utils.load(str(pair.plain))
    ours, _ = utils.load(
        str(pair.packed), {"trust_remote_code": True}, trust_remote_code=True
    )
    assert ours.streamer is not None
    return stock, ours, tokenizer


@pytest.mark.sampled
def test_streams_of_text_equal_stocks(models):
    stock, ours, tokenizer = models
    options = {
        "max_tokens": N_TOKENS,
        "sampler": make_sampler(0.8, top_p=0.9),
        "logits_processors": make_logits_processors(repetition_penalty=1.2),
    }
    found = []
    for model in (stock, ours):
        mx.random.seed(3)
        parts = mlx_lm.stream_generate(model, tokenizer, "hello", **options)
        found.append([(part.token, part.text) for part in parts])
    assert found[0] == found[1] and found[0]
    texts = [
        mlx_lm.generate(m, tokenizer, "hello", max_tokens=N_TOKENS) for m in models[:2]
    ]
    assert texts[0] == texts[1]


def test_batches_equal_stocks(models):
    stock, ours, tokenizer = models
    prompts = [[7], [1, 2, 3], [9, 8, 7, 6, 5]]
    options = {"max_tokens": N_TOKENS, "return_token_ids": True}
    expected, found = (
        mlx_lm.batch_generate(model, tokenizer, prompts, **options).token_ids
        for model in (stock, ours)
    )
    assert found == expected


def test_prompt_caches_are_kept_and_fetched_as_stocks(models, tmp_path):
    rows = []
    for model in models[:2]:
        cache = caches.make_prompt_cache(model)
        mx.eval(model(mx.array([[5, 6, 7]]), cache=cache))
        file = str(tmp_path / f"{len(rows)}.safetensors")
        caches.save_prompt_cache(file, cache, {"who": "me"})
        fetched, said = caches.load_prompt_cache(file, return_metadata=True)
        assert said == {"who": "me"}
        rows.append(model(mx.array([[8, 9]]), cache=fetched))
        if caches.can_trim_prompt_cache(fetched):
            assert caches.trim_prompt_cache(fetched, 2) == 2
            again = model(mx.array([[8, 9]]), cache=fetched)
            assert mx.allclose(again, rows[-1], atol=1e-4)
    assert mx.allclose(*rows, atol=1e-4)


def test_steps_with_a_draft_equal_stocks(models):
    """The draft is the plain model, which guesses every token."""
    stock, ours, _ = models
    prompt = mx.array([5, 6, 7])
    expected = [int(t) for t, _ in generate_step(prompt, stock, max_tokens=N_TOKENS)]
    steps = speculative_generate_step(
        prompt, ours, stock, num_draft_tokens=2, max_tokens=N_TOKENS
    )
    found = [(int(token), drafted) for token, _, drafted in steps]
    assert [token for token, _ in found] == expected
    assert [drafted for _, drafted in found] == [True, True, False] * 2


def test_convert_writes_the_whole_model(pair, tmp_path):
    for path, name in ((pair.packed, "out"), (pair.plain, "stock")):
        mlx_lm.convert(str(path), str(tmp_path / name), trust_remote_code=True)
    logits = lambda model: model(mx.array([[5, 6]]))  # noqa: E731
    assert_alike(tmp_path / "out", tmp_path / "stock", logits)


def test_parameter_counts_exclude_streamed_experts(models):
    stock, ours, _ = models
    assert 0 < utils.get_total_parameters(ours) < utils.get_total_parameters(stock)
    # The remaining parameters, such as norms and routers, have more bits than experts.
    assert utils.compute_bits_per_weight(ours) > utils.compute_bits_per_weight(stock)


# The page.

ROW = re.compile(r"^\| `([\w.]+)`(?:, `[\w.]+`)* \|(.*)\|$", re.MULTILINE)
CELL = re.compile(r"works(: .+)?|refused: .+|not tried(: .+)?|loads no model")
TEST = re.compile(r"`(tests/\w+\.py)(?:::(\w+))?`")


def rows() -> dict[str, list[str]]:
    """Return the cells of the page's rows by each name in the first cell."""
    found = {}
    for line in PAGE.splitlines():
        if match := ROW.match(line):
            cells = [cell.strip() for cell in match[2].split("|")]
            for name in re.findall(r"`([\w.]+)`", line.split("|")[1]):
                assert name not in found, name
                found[name] = cells
    return found


def test_the_page_has_every_command_of_the_installed_mlx_lm():
    scripts = metadata.distribution("mlx-lm").entry_points
    commands = {s.name for s in scripts if s.group == "console_scripts"} - {"mlx_lm"}
    assert {name for name in rows() if name in commands} == commands
    assert len(commands) == 17


def test_the_page_has_every_public_name_of_mlx_lm_and_of_its_caches():
    public = {*mlx_lm.__all__} - {"__version__"}
    # Functions that users may call with a model or with its caches.
    public |= {
        name
        for name in vars(caches)
        if re.search(r"prompt_cache$", name) and not name.startswith("_")
    }
    listed = {name.rsplit(".", 1)[-1] for name in rows()}
    assert public <= listed
    for name in rows():
        module, _, attribute = name.rpartition(".")
        if module and not module.startswith("mlx_lm"):
            assert hasattr(importlib.import_module(f"mlx_lm.{module}"), attribute), name


@pytest.mark.parametrize("name", rows())
def test_a_row_has_valid_cells_and_names_existing_tests(name):
    cells = rows()[name]
    assert len(cells) == 4
    for cell in cells[:3]:
        assert CELL.fullmatch(cell), cell
    shown = TEST.findall(cells[3])
    claims = [cell for cell in cells[:3] if cell.startswith(("works", "refused"))]
    assert bool(shown) or not claims, "who says works or refused names a test"
    for file, test in shown:
        text = (ROOT / file).read_text()
        assert not test or re.search(rf"^def {test}\(", text, re.MULTILINE), test


def test_the_version_on_the_page_is_the_one_that_is_installed():
    assert f"mlx-lm {mlx_lm.__version__}" in PAGE
    assert moeflux_mlx.__version__
