"""mlx_lm.server serves a packed model: a real process, real HTTP requests."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import mlx_lm
import pytest

from moeflux_mlx.cli.inspect import summarize

PROMPTS = ["def add(a, b):", "import", "x"]
N_TOKENS = 40


@pytest.fixture(scope="module")
def answers(checkpoint: Path) -> dict[str, str]:
    """What stock mlx-lm says to each prompt, greedily, from the plain checkpoint."""
    model, tokenizer = mlx_lm.load(str(checkpoint))
    return {
        prompt: mlx_lm.generate(model, tokenizer, prompt, max_tokens=N_TOKENS)
        for prompt in PROMPTS
    }


@pytest.fixture(scope="module")
def server(packed: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of ``mlx_lm.server`` with the packed model in the least memory.

    Requests in one batch need more experts than it holds at a time.
    """
    port = free_port()
    command = [sys.executable, "-m", "mlx_lm", "server", "--trust-remote-code"]
    command += ["--model", str(packed), "--port", str(port)]
    memory = str(summarize(packed).minimum_bytes)
    log = tmp_path_factory.mktemp("server") / "log.txt"
    with log.open("w") as out:
        process = subprocess.Popen(
            command,
            stdout=out,
            stderr=subprocess.STDOUT,
            env={**os.environ, "MOEFLUX_EXPERT_MEMORY": memory},
        )
    try:
        wait_until_healthy(f"http://127.0.0.1:{port}", process, log)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def wait_until_healthy(address: str, process: subprocess.Popen, log: Path) -> None:
    while process.poll() is None:
        try:
            with urllib.request.urlopen(f"{address}/health") as answer:
                if answer.status == 200:
                    return
        except OSError:
            time.sleep(0.1)
    pytest.fail(f"the server ended with {process.returncode}:\n{log.read_text()}")


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


def test_requests_at_the_same_time_get_the_answers_they_get_alone(server, answers):
    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        together = list(pool.map(lambda prompt: complete(server, prompt), PROMPTS))
    assert together == [answers[prompt] for prompt in PROMPTS]
