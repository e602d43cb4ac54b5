"""Reports on a model before it is read: from local files, or from a hub's headers."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple

import huggingface_hub
import pytest
from sparse import make_sparse_checkpoint

from moeflux_mlx import device
from moeflux_mlx.cli import main
from moeflux_mlx.cli.inspect_summary import summarize
from moeflux_mlx.cli.preflight import announce, forecast
from moeflux_mlx.errors import BudgetError, ModelError
from moeflux_mlx.experts.pool.budget import Amounts
from moeflux_mlx.experts.pool.pool import POOL_ALIGNMENT
from moeflux_mlx.memory.forecast import Forecast, memory_bandwidth
from moeflux_mlx.opening.headers import FIRST_BYTES, model_headers
from moeflux_mlx.system.bandwidth import PIECE_BYTES, disk_bytes_per_second

LINE = "moeflux: before loading "


class Hub(NamedTuple):
    """A hub on loopback, with its settings and the bytes sent of each file."""

    sent: dict[str, int]
    settings: dict[str, bool]


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Path:
    """A plain model of 0.4 GB, mostly a hole, with long headers."""
    path = tmp_path_factory.mktemp("preflight") / "large"
    sizes = dict(hidden_size=512, moe_intermediate_size=512, num_experts=64)
    make_sparse_checkpoint(path, **sizes, num_hidden_layers=16)
    return path


@pytest.fixture
def hub(large, checkpoint, packed, monkeypatch, tmp_path) -> Iterator[Hub]:
    """Serve three models as huggingface_hub requests them."""
    models = {"me/large": large, "me/small": checkpoint, "me/pack": packed}
    sent: dict[str, int] = {}
    settings = {"ranges": True}

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            pass

        def do_GET(self):
            if match := re.match(r"/api/models/(\w+/\w+)/tree/main", self.path):
                folder = models.get(match[1])
                return self.answer(404, b"{}") if folder is None else self.list(folder)
            match = re.match(r"/(\w+/\w+)/resolve/main/([\w.-]+)$", self.path)
            return self.send(models[match[1]] / match[2])

        def list(self, folder: Path):
            files = [
                {"type": "file", "path": f.name, "size": f.stat().st_size, "oid": "0"}
                for f in sorted(folder.iterdir())
            ]
            self.answer(200, json.dumps(files).encode())

        def send(self, file: Path):
            size = file.stat().st_size
            asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers["range"])
            start, end = int(asked[1]), min(size, int(asked[2]) + 1)
            status = 206
            if not settings["ranges"]:
                status, start, end = 200, 0, min(size, 4 << 20)
            with file.open("rb") as opened:
                opened.seek(start)
                body = opened.read(end - start)
            sent[file.name] = sent.get(file.name, 0) + len(body)
            self.answer(status, body)

        def answer(self, status: int, body: bytes):
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            try:
                self.wfile.write(body)
            except OSError:
                self.close_connection = True

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    address = f"http://127.0.0.1:{server.server_address[1]}"
    monkeypatch.setattr("moeflux_mlx.opening.headers.ENDPOINT", address)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    yield Hub(sent, settings)
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.sampled
@pytest.mark.parametrize("ranges", [True, False], ids=["ranges", "no ranges"])
@pytest.mark.parametrize("name", ["large", "small"])
def test_headers_from_a_hub_give_the_report_of_the_files(
    name, ranges, hub, large, checkpoint
):
    hub.settings["ranges"] = ranges
    here = {"large": large, "small": checkpoint}[name]
    with model_headers(f"me/{name}") as path:
        found = summarize(path)
        assert {p.stat().st_blocks * 512 < 10 << 20 for p in path.iterdir()} == {True}
    assert not path.exists()
    told, known = dataclasses.asdict(found), dataclasses.asdict(summarize(here))
    of_headers = told.pop("files")
    assert all(known["files"][file] == size for file, size in of_headers.items())
    known.pop("files")
    assert told == known


def test_only_configuration_and_headers_are_requested(hub, large, capsys):
    assert main(["inspect", "me/large", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["expert_bytes"] > 0.4e9 and found["forecast"]["disk_bandwidth"] is None
    weights = {n: sent for n, sent in hub.sent.items() if n.endswith(".safetensors")}
    assert len(weights) == 2
    for name, n_sent in weights.items():
        with (large / name).open("rb") as file:
            header = 8 + int.from_bytes(file.read(8), "little")
        assert (
            n_sent == max(FIRST_BYTES, header)
            or n_sent == (large / name).stat().st_size
        )
    assert {*hub.sent} <= {"config.json", *weights}


def test_a_hub_without_the_model_ends_in_one_line(hub, capsys):
    assert main(["inspect", "me/none"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("moeflux: [inspect] expected a local directory or a hub id")


def test_a_pack_of_a_hub_is_refused_with_the_command(hub):
    with (
        pytest.raises(ModelError, match="hf download me/pack first"),
        model_headers("me/pack"),
    ):
        pass


def test_a_model_that_does_not_fit_is_reported_before_a_download(
    hub, monkeypatch, capfd
):
    monkeypatch.setattr(device, "left_bytes", lambda: 200_000_000)
    with pytest.raises(BudgetError, match=r"does not fit into 200\.0 MB.*--memory \d"):
        announce("me/large", {})
    assert main(["generate", "--model", "me/large", "--prompt", "hi"]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("moeflux: [load] me/large: 4") and "MOEFLUX_MEMORY=" in line
    announce("me/large", {"memory": "1GB"})
    assert "experts streamed, " in capfd.readouterr().err
    assert sum(hub.sent.values()) < 4 << 20


def test_inspect_reports_a_model_larger_than_memory(large, monkeypatch, capsys):
    monkeypatch.setattr(device, "left_bytes", lambda: 200_000_000)
    assert main(["inspect", str(large)]) == 0
    text = re.sub(r"[\s│]+", " ", capsys.readouterr().out)
    assert "does not fit into 200.0 MB" in text
    assert "stream the experts with --memory " in text and "tokens/s" not in text


COMMANDS = {
    "generate": ["--model", "{model}", "--prompt", "hi", "-m", "1"],
    "trace": ["{model}", "--prompt", "hi", "-m", "1", "-o", "{out}"],
    "chat": ["--model", "{model}"],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_commands_report_it_before_loading(
    name, packed, tmp_path, capfd, monkeypatch, budget
):
    monkeypatch.setattr("sys.stdin", io.StringIO())
    line = [w.format(model=packed, out=tmp_path / "out") for w in COMMANDS[name]]
    assert main([name, *line, "--expert-memory", budget]) == 0
    first = capfd.readouterr().err.splitlines()[0]
    assert first.startswith(f"{LINE}{packed}: ")
    assert re.search(r"experts streamed, \d+% of the experts in memory; ", first)


def test_a_model_that_loading_refuses_is_not_announced(packed, tmp_path, capfd):
    announce(packed, {"expert_memory": 1})
    announce(packed, {"memory": "much"})
    announce(tmp_path, {})
    announce("x" * 5000, {})
    assert capfd.readouterr().err == ""


def of(**changes) -> Forecast:
    """Forecast a model of 1 GB and 8 GB of experts, on a machine with round numbers."""
    given = dict(
        resident_bytes=10**9,
        expert_bytes=8 * 10**9,
        token_bytes=10**9,
        held_bytes=8 * 10**9,
        room_bytes=16 * 10**9,
        streams=False,
        memory_bandwidth=10e9,
        disk_bandwidth=2e9,
    )
    return Forecast(**{**given, **changes})


def test_the_arithmetic_is_bytes_over_bandwidth():
    whole = of()
    assert whole.fits and whole.token_seconds == pytest.approx(0.2)
    assert whole.first_token_seconds == pytest.approx(9 / 2 + 0.2)
    assert whole.speed() == "at most 5 tokens/s = 1 / ((1.0 GB + 1.0 GB) / 10.0 GB/s)"
    half = of(streams=True, held_bytes=4 * 10**9, room_bytes=6 * 10**9)
    assert not half.fits and half.missing == 0.5
    assert half.token_seconds == pytest.approx(0.2 + 0.5 / 2)
    assert half.first_token_seconds == pytest.approx(2 / 2 + 0.45)
    assert "50% x 1.0 GB / 2.0 GB/s" in half.speed()
    assert half.mode() == (
        "9.0 GB in all, does not fit into 6.0 GB: experts streamed, "
        "50% of the experts in memory"
    )


def test_unmeasured_speeds_are_not_invented():
    cold = of(streams=True, held_bytes=0, disk_bandwidth=None)
    assert cold.token_seconds is None and cold.first_token_seconds is None
    assert "a disk not measured yet" in cold.speed()
    assert "after reading 2.0 GB from disk" in cold.first_token()
    unknown = of(token_bytes=None)
    assert unknown.speed().startswith("unknown") and unknown.token_seconds is None
    assert of(room_bytes=None).mode() == "9.0 GB in all: all in memory"


def test_bandwidths_are_measured(tmp_path, packed):
    file = tmp_path / "file"
    file.write_bytes(os.urandom(3 * PIECE_BYTES + 5))
    assert disk_bytes_per_second(file, 2) > 1e6
    assert disk_bytes_per_second(packed / "config.json", 2) is None
    assert disk_bytes_per_second(tmp_path / "none", 2) is None
    assert memory_bandwidth() > 1e8
    assert memory_bandwidth() == memory_bandwidth()


def test_a_forecast_follows_the_given_memory(packed, checkpoint):
    summary = summarize(packed)
    slots = summary.full_bytes - POOL_ALIGNMENT
    held = [
        forecast(packed, summary, amounts).held_bytes
        for amounts in (
            Amounts(experts=POOL_ALIGNMENT + slots // 2),
            Amounts(process=1000),
            Amounts(process=10**10),
            Amounts(process=10**10, experts=POOL_ALIGNMENT + slots // 4),
            Amounts(),
        )
    ]
    whole = summary.expert_bytes
    assert held == [whole // 2, 0, whole, whole // 4, whole]
    plain = forecast(checkpoint, summarize(checkpoint), Amounts())
    assert not plain.streams and plain.missing == 0


@pytest.mark.parametrize(
    "name, options, flags",
    [
        ("plain", {"policy": "lru", "expert_io": "pread"}, ["policy", "expert-io"]),
        ("plain", {"scope": "layer", "read_ahead": "on"}, ["scope", "read-ahead"]),
        ("plain", {"scope": "global", "read_ahead": "auto"}, []),
        ("plain", {"policy": "lru", "expert_memory": "few"}, []),
        ("packed", {"policy": "lru", "expert_io": "pread"}, ["policy"]),
        ("packed", {"policy": "lru", "expert_memory": "few"}, []),
    ],
)
def test_options_without_effect_are_reported(
    name, options, flags, checkpoint, packed, budget, capfd
):
    if "expert_memory" in options:
        options = {**options, "expert_memory": budget}
    announce({"plain": checkpoint, "packed": packed}[name], options)
    said = [x for x in capfd.readouterr().err.splitlines() if "no effect" in x]
    assert len(said) == bool(flags)
    for line in said:
        assert [x.strip("-") for x in re.findall(r"--[\w-]+", line)][:-2] == flags
