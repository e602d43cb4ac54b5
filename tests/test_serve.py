"""``moeflux serve``: a real server, real HTTP requests, beside stock mlx-lm."""

from __future__ import annotations

import dataclasses
import html
import json
import os
import re
import shutil
import socket
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import mlx_lm
import pytest
from commands import called, moeflux, running
from hostile import make_hostile
from serving_client import N_TOKENS, Client, read, serving, until
from test_security import with_own_tokenizer
from test_serving import damage
from tiny import make_checkpoint

from moeflux_mlx.cli.inspect import summarize
from moeflux_mlx.experts.files.pack import pack
from moeflux_mlx.experts.streaming.streamer import ExpertStreamer

TEXT, CHAT = "/v1/completions", "/v1/chat/completions"
PROMPTS = ["def add(a, b):", "import", "x"]


@pytest.fixture(scope="module")
def answers(checkpoint: Path) -> dict[str, str]:
    """Stock mlx-lm's greedy answers to each prompt, from the plain checkpoint."""
    model, tokenizer = mlx_lm.load(str(checkpoint))
    return {
        prompt: mlx_lm.generate(model, tokenizer, prompt, max_tokens=N_TOKENS)
        for prompt in PROMPTS
    }


def telling(args: list[str]) -> int:
    """Serve, and write the streamer's own counts to a file whenever it is removed."""
    told = Path(os.environ["TOLD"])
    # Searching all objects from a thread breaks tuples that the server is making.
    made: list[weakref.ref[ExpertStreamer]] = []
    original = ExpertStreamer.__init__

    def note(self: ExpertStreamer, *args: Any, **options: Any) -> None:
        original(self, *args, **options)
        made.append(weakref.ref(self))

    def tell() -> None:
        while True:
            if not told.exists() and (found := streamers()):
                (streamer,) = found
                counts = dataclasses.asdict(streamer.stats.total)
                counts |= {"slots": streamer.n_slots, "memory": streamer.memory_bytes}
                told.with_suffix(".part").write_text(json.dumps(counts))
                told.with_suffix(".part").rename(told)
            threading.Event().wait(0.05)

    def streamers() -> list[ExpertStreamer]:
        return [one for ref in [*made] if (one := ref()) is not None]

    ExpertStreamer.__init__ = note
    threading.Thread(target=tell, daemon=True).start()
    return called(args)


@pytest.fixture(scope="module")
def served(
    packed: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Client, Callable[[], dict]]]:
    """A server in the least memory, and a function that gives its streamer's counts."""
    folder = tmp_path_factory.mktemp("serve")
    told = folder / "told"
    memory = summarize(packed).minimum_bytes

    def counts() -> dict:
        told.unlink()
        return json.loads(until(lambda: told.exists() and told.read_text()))

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TOLD", str(told))
        args = packed, folder / "log", "--expert-memory", memory
        with serving(*args, call=telling) as client:
            until(told.exists)
            yield client, counts


@pytest.fixture
def client(served) -> Client:
    return served[0]


@pytest.mark.slow
def test_answers_are_those_of_stock_generation(client, answers):
    assert {prompt: client.complete(prompt) for prompt in PROMPTS} == answers
    with ThreadPoolExecutor(6) as threads:
        together = [*threads.map(client.complete, PROMPTS * 2)]
    assert together == [answers[prompt] for prompt in PROMPTS] * 2


@pytest.mark.slow
def test_a_streamed_answer_comes_in_pieces_that_join_to_the_same_text(client, answers):
    fields = dict(prompt=PROMPTS[0], max_tokens=N_TOKENS, temperature=0, stream=True)
    for options in ({}, {"include_usage": True}):
        answer = client.post(TEXT, {**fields, "stream_options": options})
        assert answer.status == 200 and answer.body.endswith(b"data: [DONE]\n\n")
        pieces = [e["choices"][0]["text"] for e in answer.events if e["choices"]]
        assert len(pieces) > 2 and "".join(pieces) == answers[PROMPTS[0]]
        used = [e["usage"]["completion_tokens"] for e in answer.events if "usage" in e]
        assert used == ([N_TOKENS] if options else [])


def test_every_name_of_the_model_is_known_and_no_other_is_loaded(client, packed):
    models = json.loads(client.get("/v1/models").body)["data"]
    assert [model["id"] for model in models] == [str(packed)]
    names = (None, "default_model", str(packed), packed.name)
    assert len({client.complete("x", model=name, max_tokens=3) for name in names}) == 1
    other = str(packed.with_name("plain"))
    for field in ("model", "draft_model", "adapters"):
        for name in (other, "mlx-community/some-model", ""):
            answer = client.post(TEXT, {"prompt": "x", field: name})
            assert answer.status == 404 and f"[{field}]" in answer.error


# Invalid values of each field, which the error must name.
WRONG_FIELDS = {
    "max_tokens": ["9", 0, -1, True, 1.5, 10**6, 10**12, [1]],
    "max_completion_tokens": ["9", 0],
    "temperature": ["hot", -1, True, 1e9, 1e-300],
    "top_p": [2, -0.1, "x"],
    "min_p": [2, {}],
    "top_k": [-1, 1.0, 320, 10**9],
    "top_logprobs": [12, "x"],
    "xtc_probability": [2, "x"],
    "xtc_threshold": [-1],
    "repetition_penalty": [-1, "x", 1e30],
    "repetition_context_size": [-1, 2.5],
    "presence_penalty": ["x"],
    "frequency_penalty": ["x", 1e30],
    "num_draft_tokens": [0, 10**6],
    "seed": [-1, "x", 1.5],
    "logit_bias": [5, [1], {"x": 1}, {"1": "x"}, {"-1": 1}, {"320": 1}, {"1": 1e30}],
    "stop": [5, [5], [""], {"a": 1}],
    "stream": ["yes", 1],
    "stream_options": [5, {"include_usage": 1}],
    "logprobs": [1],
    "chat_template_kwargs": [5, {"chat_template": "x"}, {"tokenize": False}],
    "prompt": [None, 5, [1, 2], "", {}],
    "messages": [
        *([], "x", [5], [{}], [{"role": 5}], [{"role": "user", "content": 5}]),
        [{"role": "user", "content": [{"type": "image_url", "image_url": "http:x"}]}],
        [{"role": "user", "content": "x", "tool_calls": [5]}],
        [{"role": "user", "tool_calls": [{"function": {"arguments": "{"}}]}],
    ],
    "tools": ["x", [5]],
    "role_mapping": [5, {"a": 5}],
}
MESSAGES = [{"role": "user", "content": "x"}]
CHAT_FIELDS = ("messages", "tools", "role_mapping", "chat_template_kwargs")
WRONG_BODIES = [b"", b"{", b"[]", b"null", b'"x"', b"\xff\xfe", b"[" * 10**5]
WRONG_BODIES += [b'{"prompt": "x", "temperature": NaN}', b'{"top_k": 1' + b"0" * 9999]


def test_an_invalid_request_gets_a_status_and_a_reason_and_harms_no_other(
    client, answers
):
    before = client.settled()
    n_wrong = 0
    with ThreadPoolExecutor(1) as other:
        neighbour = other.submit(client.complete, PROMPTS[0])
        for field, values in WRONG_FIELDS.items():
            path = CHAT if field in CHAT_FIELDS else TEXT
            right = {"messages": MESSAGES} if path == CHAT else {"prompt": "x"}
            for value in values:
                body = {**right, "max_tokens": 2, field: value}
                answer = client.post(path, body)
                n_wrong += 1
                assert answer.status == 400, (field, value, answer.body)
                assert field in answer.error, (field, value, answer.error)
        for body in WRONG_BODIES:
            answer = client.post(TEXT, body)
            n_wrong += 1
            assert answer.status == 400 and "[body]" in answer.error, body[:40]
        assert neighbour.result() == answers[PROMPTS[0]]
    assert client.complete(PROMPTS[1]) == answers[PROMPTS[1]]
    after = client.settled()
    name = "moeflux_requests_total/400"
    assert after[name] - before.get(name, 0) == n_wrong


def test_unsupported_http_gets_a_status(client, answers):
    assert client.post("/v1/nothing", {}).status == 404
    assert client.get("/../../etc/passwd").status == 404
    assert client.get("/v1/models/etc").status == 200
    assert client.post(TEXT, b"{}", Content_Length="-5").status == 400
    assert client.post(TEXT, b"{}", Content_Length=str(10**12)).status == 413
    assert client.post(TEXT, b"{}", Content_Length="x").status == 400
    host, port = client.place.split(":")
    for raw in (b"\0\1\2\r\n\r\n", b"POST " + TEXT.encode() + b" HTTP/1.0\r\n\r\n"):
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(raw)
            assert re.search(rb"4\d\d", connection.recv(9999))
    assert client.complete(PROMPTS[1]) == answers[PROMPTS[1]]


def test_a_foreign_web_page_is_answered_only_if_allowed(client, packed):
    own = {"Origin": client.address}
    assert client.get("/health", **own).status == 200
    for headers in ({"Origin": "http://evil.example"}, {"Host": "evil.example"}):
        for answer in (
            client.get("/", **headers),
            client.get("/metrics", **headers),
            client.post(TEXT, {"prompt": "x", "max_tokens": 1}, **headers),
        ):
            assert answer.status == 403 and min(headers) in answer.error
            assert answer.headers["Access-Control-Allow-Origin"] is None


def test_metrics_are_the_streamers_own_counts(served, answers):
    client, counts = served
    for prompt in PROMPTS:
        assert client.complete(prompt) == answers[prompt]
    before, own = client.settled(), counts()
    n_prompt = len(PROMPTS[0])
    text = client.complete(PROMPTS[0] + "\n", max_tokens=7)
    found, then = client.settled(), counts()
    assert text and then["misses"] > own["misses"] > 0
    for metrics, kept in ((before, own), (found, then)):
        for name in ("hits", "misses", "read_ahead", "read_bytes", "second_tries"):
            assert metrics[f"moeflux_expert_{name}_total"] == kept[name]
        for name in ("read_seconds", "wait_seconds"):
            assert metrics[f"moeflux_expert_{name}_total"] == pytest.approx(kept[name])
        assert metrics["moeflux_expert_slots"] == kept["slots"]
        assert metrics["moeflux_expert_memory_bytes"] == kept["memory"]

    def grown(name: str) -> float:
        return found[f"moeflux_{name}"] - before.get(f"moeflux_{name}", 0)

    assert grown("requests_total/200") == 1
    assert grown("tokens_total/generation") == 7
    read_tokens = grown("tokens_total/prompt"), grown("tokens_total/kept_prompt")
    assert sum(read_tokens) == n_prompt + 1 and read_tokens[1] > 0
    assert found["moeflux_requests_open"] == found["moeflux_queue_length"] == 0
    assert found["moeflux_prompt_cache_bytes"] > 0
    assert found["moeflux_mlx_peak_bytes"] >= found["moeflux_mlx_active_bytes"] > 0
    assert json.loads(client.get("/health").body) == {"status": "ok"}


def test_waiting_requests_are_counted_and_reported(client):
    """One of them has a seed, so nobody shares a batch with it."""
    long = {"prompt": "x", "max_tokens": 60, "stream": True, "temperature": 0}

    def waits() -> bool:
        found = client.metrics()
        return found["moeflux_requests_open"] >= 3 and found["moeflux_queue_length"] > 0

    with ThreadPoolExecutor(4) as threads:
        bodies = [{**long, "seed": seed} for seed in range(4)]
        sent = [threads.submit(client.post, TEXT, body) for body in bodies]
        until(waits)
        assert all(one.result().body.endswith(b"[DONE]\n\n") for one in sent)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_hangs_up_ends_its_own_request_only(client, answers, stream):
    hung_up, made = "moeflux_requests_total/499", "moeflux_tokens_total/generation"
    before = client.settled()
    body = {"prompt": "x", "max_tokens": 4000, "stream": stream, "temperature": 0}
    data = json.dumps(body).encode()
    host, port = client.place.split(":")
    head = f"POST {TEXT} HTTP/1.0\r\nHost: {client.place}\r\n".encode()
    head += f"Content-Length: {len(data)}\r\n\r\n".encode()
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(head + data)
        until(lambda: client.metrics()[made] > before[made] + 2)
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(head + data[:5])
    assert client.complete(PROMPTS[1]) == answers[PROMPTS[1]]
    until(lambda: client.metrics().get(hung_up, 0) == before.get(hung_up, 0) + 2)
    until(lambda: client.metrics()["moeflux_requests_open"] == 0)
    assert client.metrics()[made] - before[made] < 4000


def test_the_status_page_shows_the_server_and_nothing_of_its_clients(
    packed, tmp_path, answers
):
    name = "<b>&\"'<script>"
    model = Path(shutil.copytree(packed, tmp_path / name))
    with serving(model, tmp_path / "log") as client:
        assert client.complete(PROMPTS[0]) == answers[PROMPTS[0]]
        client.post(TEXT, {"prompt": "x", "model": "<img src=x onerror=alert(1)>"})
        found = client.settled()
        answer = client.get("/")
    page = answer.body.decode()
    assert answer.status == 200
    assert answer.headers["Content-Type"] == "text/html; charset=utf-8"
    assert answer.headers["Content-Security-Policy"].startswith("default-src 'none'")
    assert html.escape(name) in page and "answers requests" in page
    body = page.split("</style>")[1]
    tags = {*re.findall(r"<([a-z0-9]+)", body)}
    known = "body|header|main|section|h1|h2|p|span|b|dl|dt|dd|meter|ol|li"
    assert tags <= {*known.split("|")}
    assert "&lt;img src=x onerror=alert(1)&gt;" in page
    assert not re.search(r"https?:|url\(|src=[\"']|<script|@import", body)
    asked = found["moeflux_expert_hits_total"] + found["moeflux_expert_misses_total"]
    assert f"of {asked:,.0f}" in page and "404" in page


def test_nothing_that_a_model_brings_is_run(tmp_path):
    mark = tmp_path / "mark"
    model = with_own_tokenizer(make_hostile(tmp_path / "model", mark))
    other = make_hostile(tmp_path / "other", mark)
    args = model, tmp_path / "log", "--expert-memory", "4MB"
    with serving(*args) as client:
        assert client.post(CHAT, {"messages": MESSAGES, "max_tokens": 2}).status == 200
        for field in ("model", "draft_model", "adapters"):
            assert client.post(TEXT, {"prompt": "x", field: str(other)}).status == 404
        assert client.get("/").status == 200
    assert not mark.exists()


@pytest.mark.slow
def test_a_damaged_expert_ends_the_requests_that_need_it(packed, answers, tmp_path):
    model = Path(shutil.copytree(packed, tmp_path / "model"))
    memory = summarize(packed).minimum_bytes
    args = model, tmp_path / "log", "--expert-memory", memory
    with serving(*args) as client:
        places = [(layer, expert) for layer in range(4) for expert in range(8)]
        for place in places:
            damage(model, *place)
        body = {"prompt": PROMPTS[1], "max_tokens": 5, "temperature": 0}
        answer = client.post(TEXT, body)
        assert answer.status == 500
        assert "expert " in answer.error and str(model) in answer.error
        event = client.post(TEXT, {**body, "stream": True}).events[-1]
        assert "expert " in event["error"]
        assert client.get("/health").status == 200
        assert client.settled()["moeflux_requests_total/500"] == 2
        for place in places:
            damage(model, *place)
        assert {prompt: client.complete(prompt) for prompt in PROMPTS} == answers


@pytest.mark.slow
def test_kept_prompts_are_in_the_plan_and_a_request_too_large_fails_alone(tmp_path):
    plain = make_checkpoint(
        tmp_path / "plain",
        num_key_value_heads=4,
        head_dim=512,
        full_attention_interval=2,
        max_position_embeddings=1 << 20,
    )
    pack(plain, tmp_path / "packed")
    stock, tokenizer = mlx_lm.load(str(plain))
    args = tmp_path / "packed", tmp_path / "log", "--memory", "340MB"
    with serving(*args) as client:
        limit = client.metrics()["moeflux_prompt_cache_limit_bytes"]
        assert 0 < limit < 340e6
        for i in range(5):
            client.complete(f"{i} " + "word " * 200, max_tokens=2)
            found = client.metrics()
            assert 0 < found["moeflux_prompt_cache_bytes"] <= limit
            assert found["moeflux_process_bytes"] <= 340e6
        assert found["moeflux_prompt_cache_prompts"] < 5
        answer = client.post(TEXT, {"prompt": "word " * 2500, "max_tokens": 2})
        assert answer.status == 503 and "[memory]" in answer.error
        text = mlx_lm.generate(stock, tokenizer, "x", max_tokens=N_TOKENS)
        assert client.complete("x") == text


@pytest.mark.parametrize("fields", [{}, {"seed": 1}], ids=["batch", "alone"])
def test_a_second_turn_computes_only_new_tokens(client, checkpoint, fields):
    """Linear attention's states cannot be trimmed, so prompts are kept per turn."""
    first = [{"role": "user", "content": f"one {fields} " * 9}]
    more = {"role": "assistant", "content": "two"}, {"role": "user", "content": "three"}

    def told(messages: list[dict], **fields: object) -> tuple[str, int, int]:
        fields = {"max_tokens": 4, "temperature": 0, **fields}
        answer = client.post(CHAT, {"messages": messages, **fields})
        found, used = json.loads(answer.body), json.loads(answer.body)["usage"]
        n_kept = used["prompt_tokens_details"]["cached_tokens"]
        text = found["choices"][0]["message"]["content"]
        return text, used["prompt_tokens"], n_kept

    _, n_first, _ = told(first, **fields)
    text, n_second, n_kept = told([*first, *more], **fields)
    assert n_second > n_kept >= n_first - 1
    assert n_second - n_kept <= len("\ntwo\nthree\n") + 1
    model, tokenizer = mlx_lm.load(str(checkpoint))
    prompt = tokenizer.apply_chat_template([*first, *more], add_generation_prompt=True)
    assert text == mlx_lm.generate(model, tokenizer, prompt, max_tokens=4)


def test_every_flag_of_stocks_server_is_there():
    done = moeflux("serve", "--help")
    assert done.returncode == 0
    from moeflux_mlx.cli.serve import stock_parser

    flags = {flag for a in stock_parser()._actions for flag in a.option_strings}
    assert "--prompt-cache-bytes" in flags
    for flag in flags | {"--memory", "--policy", "--no-native"}:
        assert f"{flag} " in done.stdout or f"{flag}]" in done.stdout


@pytest.mark.parametrize(
    "args",
    [
        ["--model", "{none}"],
        ["--model", "{packed}", "--memory", "1MB"],
        ["--model", "{packed}", "--port", "70000"],
        ["--model", "{packed}", "--port", "0", "--host", "192.0.2.1"],
        ["--model", "{packed}", "--temp", "nan"],
        ["--model", "{packed}", "--prompt-cache-bytes", "1TB"],
        ["--model", "{packed}", "--chat-template-args", "[]"],
        ["--model", "{packed}", "--pipeline"],
        ["--model", "{packed}", "--prompt-concurrency", "8"],
        ["--model", "{packed}", "--draft-model", "{none}"],
        ["--model", "{packed}", "--policy", "x"],
        [],
    ],
)
def test_a_server_that_cannot_start_says_why_in_one_line(
    args, checkpoint, packed, tmp_path
):
    places = {"none": tmp_path / "none", "packed": packed, "plain": checkpoint}
    done = moeflux("serve", *(arg.format(**places) for arg in args))
    *_, line = done.stderr.splitlines()
    assert done.returncode == 2 and re.match(r"moeflux: \[[-\w]+\] ", line), done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_draft_changes_no_answer_and_no_turn_after_it(packed, answers, tmp_path):
    """The draft is another pack, and kept prompts have the caches of both."""
    flags = "--draft-model", packed, "--num-draft-tokens", 3
    with serving(packed, tmp_path / "log", *flags) as client:
        for _ in range(2):
            assert {prompt: client.complete(prompt) for prompt in PROMPTS} == answers
        first = PROMPTS[0] + answers[PROMPTS[0]]
        more = client.complete(first)
    with serving(packed, tmp_path / "log2") as client:
        assert client.complete(first) == more


def test_an_address_that_is_in_use_is_named(client, packed):
    port = client.place.split(":")[1]
    done = moeflux("serve", "--model", packed, "--port", port)
    assert done.returncode == 2 and f"127.0.0.1:{port}" in done.stderr


def test_a_server_that_is_terminated_ends_at_once_and_well(packed, tmp_path):
    log = tmp_path / "log"
    with running(log, "serve", "--model", packed, "--port", 0) as process:
        until(lambda: "serving" in read(log))
    assert process.exitcode == 0 and "Traceback" not in read(log)
