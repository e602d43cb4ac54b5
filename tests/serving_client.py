"""A client for the server that a test runs."""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import pytest
from commands import running
from prometheus_client.parser import text_string_to_metric_families

N_TOKENS = 40


class Answer(NamedTuple):
    """An answer: its status, headers and body."""

    status: int
    headers: Any
    body: bytes

    @property
    def error(self) -> str:
        """The reason in an answer's error: one line."""
        text = json.loads(self.body)["error"]
        assert text and "\n" not in text
        return text

    @property
    def events(self) -> list[dict]:
        """The events of a stream, without the one that ends it."""
        lines = self.body.decode().split("\n\n")
        found = [line[6:] for line in lines if line.startswith("data: ")]
        return [json.loads(line) for line in found if line != "[DONE]"]


class Client:
    """One server's client."""

    def __init__(self, address: str):
        self.address, self.place = address, urlsplit(address).netloc

    def get(self, path: str, **headers: str) -> Answer:
        """Get a page."""
        return self._send("GET", path, None, headers)

    def post(self, path: str, body: bytes | dict, **headers: str) -> Answer:
        """Post a body: an object as JSON, or bytes unchanged."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        return self._send("POST", path, data, headers)

    def complete(self, prompt: str, **fields: Any) -> str:
        """Return the text that continues a prompt."""
        fields = {"max_tokens": N_TOKENS, "temperature": 0, **fields}
        answer = self.post("/v1/completions", {"prompt": prompt, **fields})
        assert answer.status == 200, answer.body
        return json.loads(answer.body)["choices"][0]["text"]

    def metrics(self) -> dict[str, float]:
        """Return every metric by its name and labels."""
        answer = self.get("/metrics")
        assert answer.status == 200
        return {
            sample.name + "".join(f"/{v}" for v in sample.labels.values()): sample.value
            for family in text_string_to_metric_families(answer.body.decode())
            for sample in family.samples
        }

    def settled(self) -> dict[str, float]:
        """Return the metrics once all requests are counted: answers arrive earlier."""

        def found() -> dict[str, float] | None:
            metrics = self.metrics()
            return metrics if metrics["moeflux_requests_open"] == 0 else None

        return until(found)

    def _send(self, method: str, path: str, data: Any, headers: dict) -> Answer:
        connection = http.client.HTTPConnection(self.place, timeout=120)
        with contextlib.closing(connection):
            names = {name.replace("_", "-"): v for name, v in headers.items()}
            connection.request(method, path, data, names)
            got = connection.getresponse()
            return Answer(got.status, got.headers, got.read())


@contextlib.contextmanager
def serving(
    model: Path, log: Path, *args: object, call: Callable | None = None
) -> Iterator[Client]:
    """Run ``moeflux serve``; yield a client once it answers."""
    words = ("serve", "--model", model, "--port", 0, *args)
    with running(log, *words, call=call) as process:
        while not (found := re.search(r"serving .* at (http\S+)\n", read(log))):
            if not process.is_alive():
                pytest.fail(f"the server ended: {read(log)}")
            time.sleep(0.05)
        yield Client(found[1])


def read(log: Path) -> str:
    """Return the log so far."""
    return log.read_text() if log.exists() else ""


def until(is_so: Callable[[], Any]) -> Any:
    """Wait for a true value and return it; fail the test after too long."""
    while not (found := is_so()):
        time.sleep(0.02)
    return found
