"""Tool calls, reasoning and streams of ``moeflux serve``, beside stock's server."""

from __future__ import annotations

import contextlib
import itertools
import json
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from commands import running
from serving_client import Client, serving, until
from tiny import make_checkpoint
from tokenizers import Tokenizer

from moeflux_mlx.cli.inspect import summarize
from moeflux_mlx.experts.files.pack import pack

CHAT = "/v1/chat/completions"
# Each is one token, which a bias makes the model choose.
CALL = '<tool_call>{"name":"add","arguments":{"a":1}}</tool_call>'
BROKEN = '<tool_call>{"name":</tool_call>'
THOUGHT = "because</think>done"
WORDS = ["<think>", "</think>", "<tool_call>", "</tool_call>", CALL, BROKEN, THOUGHT]
TEMPLATE = (
    "{% for m in messages %}{{ m['content'] }}{% if m.tool_calls %}<tool_call>"
    "{% for tool_call in m.tool_calls %}{{ tool_call.name }}{% endfor %}{% endif %}\n"
    "{% endfor %}{% if think %}<think>{% endif %}"
)
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {}}}]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> tuple[Path, Path]:
    """A plain model with complete calls and thoughts as tokens, and its pack."""
    folder = tmp_path_factory.mktemp("talking")
    plain = make_checkpoint(folder / "plain")
    tokenizer = Tokenizer.from_file(str(plain / "tokenizer.json"))
    tokenizer.add_tokens(WORDS)
    tokenizer.save(str(plain / "tokenizer.json"))
    file = plain / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    file.write_text(json.dumps({**settings, "chat_template": TEMPLATE}))
    pack(plain, folder / "packed")
    return plain, folder / "packed"


@pytest.fixture(scope="module")
def token(models) -> dict[str, int]:
    tokenizer = Tokenizer.from_file(str(models[0] / "tokenizer.json"))
    return {word: tokenizer.token_to_id(word) for word in WORDS}


def stock_server(args: list[str]) -> int:
    """Run mlx-lm's own server, with nothing of ours."""
    from mlx_lm import server

    sys.argv = ["mlx_lm.server", *args]
    server.main()
    return 0


@contextlib.contextmanager
def stock_serving(model: Path, log: Path) -> Iterator[Client]:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    words = "--model", model, "--port", port
    client = Client(f"http://127.0.0.1:{port}")

    def answers() -> bool:
        with contextlib.suppress(OSError):
            return client.get("/health").status == 200
        return False

    with running(log, *words, call=stock_server):
        until(answers)
        yield client


@pytest.fixture(scope="module")
def both(models, tmp_path_factory) -> Iterator[tuple[Client, Client]]:
    """Clients of our server, in the least memory, and of stock's."""
    folder = tmp_path_factory.mktemp("logs")
    plain, packed = models
    memory = summarize(packed).minimum_bytes
    ours = serving(packed, folder / "ours", "--expert-memory", memory)
    with ours as client, stock_serving(plain, folder / "stock") as stock:
        yield client, stock


def told_by_both(both, **fields: Any) -> tuple[Any, Any]:
    """Return both servers' answers to a conversation that neither has kept.

    Stock's generating thread dies if it has kept all of a prompt.
    """
    opening = {"role": "user", "content": f"{next(_numbers)} x"}
    messages = [opening, *fields.pop("messages", [])]
    ours, stock = (told(client, messages=messages, **fields) for client in both)
    return ours, stock


_numbers = itertools.count()


def told(client: Client, **fields: Any) -> Any:
    """Return an answer, complete or streamed, without fields that always differ."""
    body = {"temperature": 0, **fields}
    answer = client.post(CHAT, body)
    assert answer.status == 200, answer.body
    found = answer.events if fields.get("stream") else [json.loads(answer.body)]
    for event in found:
        for name in ("id", "created", "system_fingerprint", "model"):
            event.pop(name)
        for choice in event["choices"]:
            for said in (choice.get("message", {}), choice.get("delta", {})):
                for call in said.get("tool_calls", []):
                    assert call.pop("id")
    return found


def said(events: list[dict], what: str) -> Any:
    parts = [c.get("message") or c.get("delta") for e in events for c in e["choices"]]
    found = [part[what] for part in parts if part.get(what)]
    return "".join(found) if what != "tool_calls" else [c for f in found for c in f]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("n_tokens", [1, 3])
def test_tool_calls_equal_stocks(both, token, stream, n_tokens):
    fields = dict(tools=TOOLS, stream=stream, max_tokens=n_tokens)
    fields["logit_bias"] = {token[CALL]: 1000}
    ours, stock = told_by_both(both, **fields)
    assert ours == stock
    calls = said(ours, "tool_calls")
    assert len(calls) == n_tokens
    wanted = {"name": "add", "arguments": '{"a": 1}'}
    assert all(call["function"] == wanted for call in calls)


@pytest.mark.parametrize("stream", [False, True])
def test_reasoning_equals_stocks(both, token, stream):
    fields = dict(stream=stream, max_tokens=1, logit_bias={token[THOUGHT]: 1000})
    fields["chat_template_kwargs"] = {"think": True}
    ours, stock = told_by_both(both, **fields)
    assert ours == stock
    assert said(ours, "reasoning") == "because" and said(ours, "content") == "done"


@pytest.mark.parametrize("stream", [False, True])
def test_a_broken_tool_call_harms_no_other_request(both, token, stream):
    fields = dict(tools=TOOLS, stream=stream, max_tokens=2)
    fields["logit_bias"] = {token[BROKEN]: 1000}
    ours, stock = told_by_both(both, **fields)
    assert ours == stock and said(ours, "tool_calls") == []


def test_all_fields_of_an_answer_equal_stocks(both):
    for fields in (
        dict(max_tokens=6, logprobs=True, top_logprobs=3),
        dict(max_tokens=6, stop=["!", "zz"]),
        dict(max_tokens=6, repetition_penalty=1.3, presence_penalty=0.5),
        dict(max_tokens=6, seed=3, temperature=1.0, top_k=20, top_p=0.9),
        dict(max_tokens=6, stream=True, stream_options={"include_usage": True}),
        dict(max_tokens=4, messages=[{"role": "system", "content": "be"}, *HISTORY]),
        dict(max_tokens=4, logit_bias={"5": -3.5}, min_p=0.1),
    ):
        ours, stock = told_by_both(both, **fields)
        assert rounded(ours) == rounded(stock), fields


HISTORY = [
    {"role": "user", "content": [{"type": "text", "text": "one"}]},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"function": {"name": "add", "arguments": '{"a": 1}'}}],
    },
    {"role": "tool", "content": "2"},
    {"role": "user", "content": "two"},
]


def rounded(value: Any) -> Any:
    """Return an answer whose floats may differ in the last bits."""
    if isinstance(value, dict):
        return {name: rounded(v) for name, v in value.items()}
    if isinstance(value, list):
        return [rounded(v) for v in value]
    return pytest.approx(value, abs=1e-4) if isinstance(value, float) else value
