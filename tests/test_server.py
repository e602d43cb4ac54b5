"""mlx_lm.server serves a packed model: a real process, real HTTP requests."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import mlx_lm
import pytest
from commands import interpreted, running
from tiny import make_checkpoint

from moeflux_mlx.cli.inspect import summarize
from moeflux_mlx.experts.files.pack import pack

PROMPTS = ["def add(a, b):", "import", "x"]
N_TOKENS = 40


@pytest.fixture(scope="module")
def answers(checkpoint: Path) -> dict[str, str]:
    """Stock mlx-lm's greedy answers to each prompt, from the plain checkpoint."""
    model, tokenizer = mlx_lm.load(str(checkpoint))
    return {
        prompt: mlx_lm.generate(model, tokenizer, prompt, max_tokens=N_TOKENS)
        for prompt in PROMPTS
    }


@pytest.fixture(scope="module")
def server(packed: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of ``mlx_lm.server`` with the packed model in the least memory.

    Requests in one batch need more experts than fit at a time.
    """
    memory = str(summarize(packed).minimum_bytes)
    log = tmp_path_factory.mktemp("server") / "log.txt"
    with served(packed, log, MOEFLUX_EXPERT_MEMORY=memory) as address:
        yield address


@contextlib.contextmanager
def served(model: Path, log: Path, **variables: str) -> Iterator[str]:
    """Run ``mlx_lm.server``; yield its address once it is healthy."""
    port = free_port()
    with running(log, *command(model, port), call=interpreted, **variables) as process:
        address = f"http://127.0.0.1:{port}"
        wait_until_healthy(address, process, log)
        yield address


def command(model: Path, port: int) -> list[object]:
    words = ["-m", "mlx_lm", "server", "--trust-remote-code"]
    return [*words, "--model", model, "--port", port]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def wait_until_healthy(address: str, process: BaseProcess, log: Path) -> None:
    while process.is_alive():
        try:
            with urllib.request.urlopen(f"{address}/health") as answer:
                if answer.status == 200:
                    return
        except OSError:
            time.sleep(0.1)
    pytest.fail(f"the server ended with {process.exitcode}:\n{log.read_text()}")


def post(address: str, path: str, **body: Any) -> bytes:
    request = urllib.request.Request(
        address + path,
        json.dumps({"max_tokens": N_TOKENS, "temperature": 0, **body}).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=120) as answer:
        return answer.read()


def complete(address: str, prompt: str) -> str:
    answer = json.loads(post(address, "/v1/completions", prompt=prompt))
    return answer["choices"][0]["text"]


@pytest.mark.slow
def test_a_completion_equals_stock_generation(server, answers):
    assert {prompt: complete(server, prompt) for prompt in PROMPTS} == answers


def test_a_streamed_completion_arrives_in_pieces_that_join_to_the_same_text(
    server, answers
):
    body = post(server, "/v1/completions", prompt=PROMPTS[0], stream=True)
    lines = [line for line in body.decode().splitlines() if line.startswith("data: ")]
    assert lines.pop() == "data: [DONE]"
    pieces = [json.loads(line[6:])["choices"][0]["text"] for line in lines]
    assert len(pieces) > 2
    assert "".join(pieces) == answers[PROMPTS[0]]


def test_a_chat_answer_continues_the_templated_conversation(server, checkpoint):
    messages = [{"role": "user", "content": "hello"}]
    answer = json.loads(post(server, "/v1/chat/completions", messages=messages))
    model, tokenizer = mlx_lm.load(str(checkpoint))
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    expected = mlx_lm.generate(model, tokenizer, prompt, max_tokens=N_TOKENS)
    assert answer["choices"][0]["message"]["content"] == expected


@pytest.mark.slow
def test_requests_at_the_same_time_get_the_answers_they_get_alone(server, answers):
    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        together = list(pool.map(lambda prompt: complete(server, prompt), PROMPTS))
    assert together == [answers[prompt] for prompt in PROMPTS]


def refused(address: str, **body: Any) -> tuple[int, str]:
    """Return the status and message of a completion that must fail."""
    with pytest.raises(urllib.error.HTTPError) as caught:
        post(address, "/v1/completions", **body)
    return caught.value.code, json.loads(caught.value.read())["error"]


@pytest.mark.slow
def test_failed_requests_get_a_reason_and_harm_no_other(
    checkpoint, packed, answers, tmp_path
):
    model = Path(shutil.copytree(packed, tmp_path / "model"))
    memory = str(summarize(packed).minimum_bytes)
    with served(model, tmp_path / "log", MOEFLUX_EXPERT_MEMORY=memory) as address:
        assert complete(address, PROMPTS[0]) == answers[PROMPTS[0]]
        status, message = refused(address, prompt="")
        assert 400 <= status < 500 and "[prompt] expected at least one token" in message
        for wrong in ({"stop": [1]}, {"stop": 5}, {"logit_bias": {"1": "x"}}):
            assert 400 <= refused(address, prompt="x", **wrong)[0] < 600
        # The answer's text, sent as a prompt, is a prompt like any other.
        once = json.loads(post(address, "/v1/completions", prompt="x", max_tokens=1))
        complete(address, "x" + once["choices"][0]["text"])
        whole = {file: file.read_bytes() for file in model.glob("experts-*.bin")}
        for file in whole:
            os.truncate(file, 0)
        status, message = refused(address, prompt=PROMPTS[1])
        assert status == 500 and "expert " in message and str(model) in message
        body = post(address, "/v1/completions", prompt=PROMPTS[1], stream=True)
        assert "expert " in json.loads(body.decode().split("data: ")[1])["error"]
        for file, data in whole.items():
            file.write_bytes(data)
        assert {prompt: complete(address, prompt) for prompt in PROMPTS} == answers


@pytest.mark.slow
def test_long_chats_are_evicted_and_one_too_long_fails_alone(tmp_path):
    plain = make_checkpoint(
        tmp_path / "plain",
        num_key_value_heads=4,
        head_dim=512,
        full_attention_interval=2,
        max_position_embeddings=1 << 20,
    )
    pack(plain, tmp_path / "packed")
    stock, tokenizer = mlx_lm.load(str(plain))
    log = tmp_path / "log"
    chats = [f"{i} " + "word " * 250 for i in range(6)]
    with served(tmp_path / "packed", log, MOEFLUX_MEMORY="340MB") as address:
        for chat in chats:
            post(address, "/v1/completions", prompt=chat, max_tokens=2)
        status, message = refused(address, prompt="word " * 1500, max_tokens=2)
        assert status == 503 and "[memory]" in message
        answer = json.loads(post(address, "/v1/completions", prompt="x"))
        text = mlx_lm.generate(stock, tokenizer, "x", max_tokens=N_TOKENS)
        assert answer["choices"][0]["text"] == text
    kept = re.findall(r"Prompt Cache: (\d+) sequences", log.read_text())
    assert int(kept[-1]) < len(chats)


@pytest.mark.slow
def test_an_unusable_setting_ends_the_server_with_its_name(packed, tmp_path):
    log, words = tmp_path / "log", command(packed, free_port())
    much = {"MOEFLUX_EXPERT_MEMORY": "much"}
    with running(log, *words, call=interpreted, **much) as process:
        process.join(120)
        assert process.exitcode not in (0, None)
    assert "[MOEFLUX_EXPERT_MEMORY] expected bytes" in log.read_text()
