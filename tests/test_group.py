"""Several processes that share experts give one process's bits, or an error in all."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import types
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import product
from pathlib import Path

import commands
import mlx.core as mx
import mlx_lm
import pytest
import ranks
from mlx_lm.models.cache import make_prompt_cache
from tiny import (
    make_checkpoint,
    make_deepseek_v3,
    make_glm4_moe,
    make_gpt_oss,
    make_qwen3_moe,
)

import moeflux_mlx
from moeflux_mlx.calls.group import launched_group
from moeflux_mlx.cli import main
from moeflux_mlx.errors import ConfigError, ModelError
from moeflux_mlx.experts.files.pack import pack
from moeflux_mlx.experts.files.share import SharedExperts, share_of
from moeflux_mlx.experts.files.store import open_store
from moeflux_mlx.server import server

BIN = Path(sys.executable).parent
E, LAYERS = 7, {"plain": 3, "pack": 3, "hybrid": 4}
PROMPTS = ["def add(a, b):", "import", "x"]
SMALL, LARGE = ranks.SMALL, 1 << 30


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """A folder with models of seven experts per layer: plain, packed, and a hybrid."""
    folder = tmp_path_factory.mktemp("group")
    make_qwen3_moe(folder / "plain", num_experts=E, num_experts_per_tok=3)
    make_checkpoint(folder / "hybrid", num_experts=E)
    pack(folder / "plain", folder / "pack")
    return folder


@pytest.fixture(scope="module")
def alone(models) -> dict[str, dict]:
    """One process's results for each model."""
    outcome = {}
    for name in LAYERS:
        model, _ = moeflux_mlx.load(models / name, expert_memory=SMALL, native=False)
        outcome[name] = ranks.greedy(model)
    return outcome


def run(models: Path, n: int, work) -> list[dict]:
    folder = models / "found"
    for code, log in (ended := ranks.launch(n, folder, work)):
        assert code == 0, f"{log} {ended}"
    outcome = ranks.found(folder, n)
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()
    return outcome


@pytest.mark.sampled
@pytest.mark.parametrize("n", [2, 3])
def test_ranks_with_uneven_shares_give_one_ranks_bits_and_read_their_own(
    models, alone, n
):
    outcomes = run(models, n, ranks.generate)
    shares = [share_of(E, rank, n) for rank in range(n)]
    assert len({*map(len, shares)}) == 2 and sum(map(len, shares)) == E
    for name, n_layers in LAYERS.items():
        for memory, waits in product((SMALL, LARGE), (True, False)):
            found = [outcome[f"{name} {memory} {waits}"] for outcome in outcomes]
            # Each rank's own experts are requested, whether or not a call waits.
            waiting = [outcome[f"{name} {memory} True"] for outcome in outcomes]
            assert [one["hits"] for one in found] == [one["hits"] for one in waiting]
            assert len({one["random"] for one in found}) == 1
            for share, one in zip(shares, found, strict=True):
                assert {k: one[k] for k in ("tokens", "bits")} == alone[name]
                every = n_layers * len(share) * one["record"]
                if memory == LARGE:
                    assert one["bytes"] == one["before"] == every
                else:
                    assert one["before"] == 0
                    assert one["bytes"] == one["misses"] * one["record"] > 0
                    assert {expert for _, expert in one["read"]} <= {*share}


def test_ranks_that_divide_the_layers_give_one_ranks_bits(models, alone):
    make_deepseek_v3(models / "deepseek", num_hidden_layers=4)
    make_glm4_moe(models / "glm", num_hidden_layers=4)
    make_glm4_moe(models / "short", num_hidden_layers=3)
    make_gpt_oss(models / "oss")
    for name in "deepseek", "glm":
        model, _ = moeflux_mlx.load(models / name, expert_memory=LARGE, native=False)
        alone[name] = ranks.greedy(model)
    first, second = outcomes = run(models, 2, ranks.pipelined)
    for outcome in outcomes:
        for name in "plain", "pack", "hybrid", "deepseek", "glm":
            assert outcome[name] == alone[name], name
        assert outcome["planned"] == outcome["after"] == alone["pack"]
        assert outcome["divided"] == alone["pack"]["tokens"][:1]
        assert outcome["again"] == "no error"
        assert outcome["shard"].startswith("ModelError: [stream] ")
        assert outcome["compile"].startswith("ModelError: [pipeline] ")
        assert outcome["state"].startswith("StateError: [state] ")
        assert "whose layers mlx-lm divides but" in outcome["no pipeline"]
    block = "model.layers.{}.mlp.switch_mlp".format
    for name in "plain", "pack":
        # Rank 0 has the last layers.
        assert first[f"{name} blocks"] == [block(1), block(2)]
        assert second[f"{name} blocks"] == [block(0)]
    assert "in the layers of rank 1 but found none" in second["no experts"]
    assert first["no experts"].startswith("PeerError: ")
    assert second["fails"] == "ExpertStoreError: [reader] damaged"
    assert first["fails"].startswith("PeerError: [group] call: expected every rank")


def test_any_number_of_ranks_continues_from_a_state(models):
    model, _ = moeflux_mlx.load(models / "pack", expert_memory=SMALL, native=False)
    cache = make_prompt_cache(model)
    mx.eval(model(mx.array(ranks.PROMPT), cache=cache))
    moeflux_mlx.save_state(models / "one", model, cache, ranks.PROMPT[0])
    expected = ranks.follow(model, cache)
    cache = make_prompt_cache(model)
    mx.eval(model(mx.array([[1, 2]]), cache=cache))
    moeflux_mlx.save_state(models / "other", model, cache, [1, 2])
    first, second = outcomes = run(models, 2, partial(ranks.states, native=False))
    for outcome in outcomes:
        assert outcome["one"] == outcome["several"] == expected
        assert outcome["held again"] == outcome["held"] > 0
        assert "the same tokens of the state on every rank" in outcome["other"]
    for fails in "read", "write":
        assert first[fails].startswith("StateError: [state] cannot ")
        assert second[fails].startswith("PeerError: ")
    model, _ = moeflux_mlx.load(models / "pack", expert_memory=SMALL, native=False)
    assert ranks.continued(model, models / "several") == expected


def test_no_bit_changes_between_ranks(models):
    for outcome in run(models, 2, ranks.exact):
        for dtype, (found, expected) in outcome.items():
            assert found == expected, dtype


def test_a_failed_rank_ends_the_call_on_every_rank_but_no_later_call(models, alone):
    first, second = run(models, 2, partial(ranks.fail, native=False))
    told = "its own error says why"
    block = "model.layers.1.mlp.switch_mlp"
    assert second["damaged"].startswith("ExpertStoreError: [reader] ")
    assert f"{block}, counted from its 3 " in second["damaged"]
    for damaged in "damaged", "damaged, not waiting":
        assert second[damaged] == second["damaged"]
        assert first[damaged] == (
            f"PeerError: [group] {block}: expected every rank to go on but rank 1 "
            f"failed: {told}"
        )
    for outcome in first, second:
        for when in "mended", "after", "after all":
            assert outcome[when] == alone["pack"]
        same = "GroupError: [group] expected the same tokens on every rank but got "
        assert outcome["tokens"].startswith(f"{same}others, of shapes 1 x 3, 1 x 3")
        assert outcome["lengths"].startswith(f"{same}others, of shapes 1 x 3, 1 x 4")
        assert "block: expected every rank to choose the same" in outcome["choice"]
        assert "for row 2 not all chose" in outcome["choice"]
        assert "expected the sum of all ranks' numbers" in outcome["no sum"]
        assert "block 1: expected every rank" in outcome["choice, not waiting"]
        assert "expected no gradient" in outcome["grad"]
        assert "expected rows with values" in outcome["compile"]
        assert outcome["pipeline"].endswith("False and without a bound on memory")
        assert outcome["shard"] == "no error"
        assert outcome["native"] == "no error"
        for name in "mmap", "ahead", "optimistic", "auto", "group":
            assert outcome[name].startswith("ConfigError: ["), name
        assert "the same kind of memory bound" in outcome["bounds"]


def test_ranks_that_choose_other_experts_follow_rank_0(models, alone):
    for outcome in run(models, 2, partial(ranks.part, native=False)):
        assert "expected every rank to choose the same" in outcome.pop("no layer")
        for how, found in outcome.items():
            assert found == alone["pack"], how


def test_ranks_keep_to_their_own_memory_and_divide_a_prompt_alike(models, alone):
    outcomes = run(models, 2, ranks.bounded)
    assert [outcome["experts"] for outcome in outcomes] == [9, 12]
    for outcome in outcomes:
        assert outcome["bits"] == outcome["after"] == alone["pack"]["bits"]
        assert outcome["divided"] == alone["pack"]["tokens"][:1]
        assert outcome["asked"] == [5, 5, 5, 5, 4]
        # All ranks drop a kept prompt if one of them has no room.
        assert outcome["gave way"] and outcome["given way"] == outcome["divided"]
    first, second = (outcome["too little"] for outcome in outcomes)
    assert second == "BudgetError: [memory] too little"
    assert first.startswith(
        "PeerBudgetError: [group] call: expected every rank to go on"
    )


def test_the_script_measures_the_bytes_of_each_rank(models):
    outcomes = run(models, 2, ranks.bench)
    for kind in "native", "door":
        first, second = found = [outcome[kind] for outcome in outcomes]
        assert (first["tokens"], first["bits"]) == (second["tokens"], second["bits"])
        assert [one["experts"] for one in found] == [9, 12]
        assert {one["ranks"] for one in found} == {2}
        assert [one["rank"] for one in found] == [0, 1]
        for one in found:
            # Half of the larger share.
            assert one["held"] == 6 and one["device"] == "Device(cpu, 0)"
            assert min(one["tps"], one["prompt_tps"], one["exchange_us"]) > 0
            assert one["prompt_bytes"] + one["token_bytes"] > 0


def test_a_rank_that_ends_ends_the_others(models):
    (code, log), (other, _) = ranks.launch(
        2, models / "died", partial(ranks.die, native=False)
    )
    assert (code, other) == (2, 9)
    assert "GroupError: [group] expected 2 ranks but one of them ended" in log


def words(models: Path) -> list[object]:
    return [
        *("generate", "--model", models / "pack", "--prompt", "hello", "--temp", 1),
        *("--seed", 3, "-m", 8, "--ignore-chat-template", "--expert-memory", SMALL),
    ]


@pytest.mark.slow
def test_the_command_prints_the_text_of_one_process_once(models, capfd):
    assert main([*map(str, words(models)), "--no-native"]) == 0
    text = capfd.readouterr().out.partition("┏")[0]
    command = [BIN / "mlx.launch", "-n", "2", "--backend", "ring", "--python"]
    command += [sys.executable, "--", BIN / "moeflux", *words(models)]
    launched = subprocess.run(
        [*map(str, command)], stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    assert launched.returncode == 0, launched.stderr
    printed, _, table = launched.stdout.partition("┏")
    assert printed == text and len(text.strip()) > 3
    assert table.count("2, below: the first") == 1 and "┏" not in table[1:]


@pytest.mark.sampled
@pytest.mark.parametrize("call", [commands.called, ranks.mlx_lm])
def test_chats_of_ours_and_of_mlx_lm_share_the_experts(
    models, tmp_path, monkeypatch, call
):
    monkeypatch.setenv("MOEFLUX_EXPERT_MEMORY", str(SMALL))
    chat = ["chat", "--model", models / "pack", "--max-tokens", 6]
    chat += ["--trust-remote-code"] * (call is ranks.mlx_lm)
    (code, first), (other, second) = ranks.launch(
        2, tmp_path, call, chat, text="hello\nq\n"
    )
    assert (code, other) == (0, 0), first + second
    assert "6 tokens" in first and "bye" in first
    assert "tokens" not in second and "bye" not in second


@pytest.mark.slow
@pytest.mark.parametrize(
    "way",
    [
        ["--expert-memory", SMALL],
        ["--memory", "3GB"],
        ["--memory", "3GB", "--pipeline"],
    ],
    ids=["experts", "planned", "layers"],
)
def test_a_server_of_several_processes_answers_as_one_does(models, tmp_path, way):
    model, tokenizer = mlx_lm.load(str(models / "plain"))
    expected = [mlx_lm.generate(model, tokenizer, p, max_tokens=9) for p in PROMPTS]

    def complete(prompt: str) -> str:
        return client.complete(prompt, max_tokens=9)

    file = models / "pack" / "experts-001.bin"
    words = ("--model", models / "pack", *way)
    with ranks.serving(2, tmp_path, *words) as client:
        if SMALL in way:
            # No expert was read yet; rank 1's experts are in the second half.
            kept = file.read_bytes()
            half = len(kept) // 2
            file.write_bytes(kept[:half] + bytes(len(kept) - half))
            answer = client.post("/v1/completions", {"prompt": PROMPTS[0]})
            file.write_bytes(kept)
            assert answer.status == 500 and "but rank 1 failed" in answer.error
        assert [*map(complete, PROMPTS)] == expected
        with ThreadPoolExecutor(3) as threads:
            assert [*threads.map(complete, PROMPTS)] == expected
        assert client.post("/v1/completions", {"prompt": ""}).status == 400
        # A request with a seed is served alone.
        seeded = {"seed": 3, "temperature": 1.0, "max_tokens": 9}
        assert client.complete("x", **seeded) == client.complete("x", **seeded)
        assert complete(PROMPTS[1]) == expected[1]
    for rank in range(2):
        assert "Traceback" not in (tmp_path / f"{rank}.log").read_text()


@pytest.mark.slow
def test_a_server_ends_in_one_line_with_one_of_its_processes(models, tmp_path):
    words = ("serve", "--port", 0, "--model", models / "pack")
    started = ranks.start(2, tmp_path, commands.called, words)
    (first, log), (second, _) = started
    ranks.address(first, log)
    second.kill()
    first.join(ranks.SECONDS)
    assert first.exitcode == 1
    text = log.read_text()
    assert "[group] expected every process to serve but one ended" in text
    assert "Traceback" not in text


def test_a_connection_lost_in_mlx_lms_own_sums_is_named(monkeypatch, caplog):
    """A process may end before the first request, while mlx-lm adds up the seed."""
    generator = object.__new__(server.Generator)
    generator._loaded = threading.Event()
    generator.model_provider = types.SimpleNamespace(load_default=lambda: None)
    monkeypatch.setattr(server.guards, "kept_prompts", lambda _: None)

    def fail(_: object) -> None:
        raise RuntimeError(text)

    monkeypatch.setattr(server.stock.ResponseGenerator, "_generate", fail)
    text = "[ring] connection to a peer was lost"
    generator._generate()
    assert generator._generation_failed
    assert "[group] expected every process to serve but one ended" in caplog.text
    text = "[metal] another fault"
    with pytest.raises(RuntimeError, match="another fault"):
        generator._generate()


@pytest.mark.slow
def test_mlx_lms_training_divides_rows_and_not_the_model(models, tmp_path, monkeypatch):
    monkeypatch.setenv("MOEFLUX_EXPERT_MEMORY", str(LARGE))
    rows = [json.dumps({"text": f"def f{i}(a): return a + {i}"}) for i in range(8)]
    for name in "train", "valid", "test":
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows))
    words = ["lora", "--train", "--data", tmp_path, "--iters", 3, "--batch-size", 4]
    words += ["--num-layers", 1, "--val-batches", 1, "--trust-remote-code"]
    keys = ["self_attn.q_proj", "self_attn.v_proj"]
    lora = {"keys": keys, "rank": 4, "scale": 20.0, "dropout": 0.0}
    (tmp_path / "lora.yaml").write_text(json.dumps({"lora_parameters": lora}))
    words += ["--config", tmp_path / "lora.yaml"]
    adapters = {}
    for name in "plain", "pack":
        path = tmp_path / name
        ended = ranks.launch(
            2,
            tmp_path / f"{name} ranks",
            ranks.mlx_lm,
            [*words, "--model", models / name, "--adapter-path", path],
        )
        assert [code for code, _ in ended] == [0, 0], ended
        adapters[name] = mx.load(str(path / "adapters.safetensors"))
    assert adapters["plain"].keys() == adapters["pack"].keys() != set()
    for name, expected in adapters["plain"].items():
        assert mx.abs(expected).max() > 0
        assert mx.allclose(adapters["pack"][name], expected, rtol=1e-3, atol=1e-6)


def test_commands_for_one_process_say_so(models, tmp_path):
    for command in (
        ["pack", models / "plain", models / "again"],
        [*words(models), "--prompt", "-"],
        ["serve", "--model", models / "pack", "--port", 0, "--draft-model", "x"],
    ):
        for code, log in ranks.launch(2, tmp_path, commands.called, command):
            assert code == 2, log
            assert log.startswith("moeflux: [") and "expected" in log
            assert log.count("\n") == 1
    assert not (models / "again").exists()


def test_more_ranks_than_experts_are_refused(models):
    with open_store(models / "plain") as store:
        with pytest.raises(ModelError, match=r"at most 7 ranks.*but got 8"):
            SharedExperts(store, 0, 8)
        own = SharedExperts(store, 1, 3)
        assert [own.count(layer) for layer in own.layers] == [2, 2, 2]
        assert own.spans(0, 1) == store.spans(0, 3)


def test_a_process_launched_alone_has_no_group(models, tmp_path, monkeypatch, capfd):
    (hosts := tmp_path / "hosts").write_text("\n")
    monkeypatch.setenv("MLX_RANK", "0")
    monkeypatch.setenv("MLX_HOSTFILE", str(hosts))
    assert launched_group() is None
    assert main([*map(str, words(models))]) == 0
    assert "processes" not in capfd.readouterr().out


def test_a_group_of_one_is_none(models, alone):
    group = mx.distributed.init()
    model, _ = moeflux_mlx.load(
        models / "pack", expert_memory=SMALL, native=False, group=group
    )
    assert ranks.greedy(model) == alone["pack"]
    model.shard(group)
    with pytest.raises(ConfigError, match="group"):
        moeflux_mlx.load(models / "pack", group=3)
    with pytest.raises(ConfigError, match="several ranks but got one"):
        moeflux_mlx.load(models / "pack", group=group, pipeline=True)
