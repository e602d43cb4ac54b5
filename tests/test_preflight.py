"""Reports on a model before it is read: from local files, or from a hub's headers."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import re
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

import huggingface_hub
import pytest
from sparse import make_sparse_checkpoint

from moeflux_mlx import device
from moeflux_mlx.cli import main
from moeflux_mlx.cli.inspect_summary import summarize
from moeflux_mlx.cli.preflight import announce, check_template, forecast
from moeflux_mlx.errors import BudgetError, ModelError
from moeflux_mlx.experts.pool.budget import Amounts
from moeflux_mlx.experts.pool.pool import POOL_ALIGNMENT
from moeflux_mlx.memory.forecast import Forecast, memory_bandwidth
from moeflux_mlx.opening.download import find_model
from moeflux_mlx.opening.headers import FIRST_BYTES, model_headers
from moeflux_mlx.system.bandwidth import PIECE_BYTES, disk_bytes_per_second

LINE = "moeflux: before loading "


class Hub(NamedTuple):
    """A hub on loopback, with its settings and the bytes sent of each file."""

    sent: dict[str, int]
    settings: dict[str, Any]


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
    settings: dict[str, Any] = {"ranges": True, "fault": None}

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            pass

        def do_GET(self):
            if (fault := settings["fault"]) is not None:
                return fault(self)
            if match := re.match(r"/api/models/(\w+/\w+)\?", self.path):
                folder = models.get(match[1])
                return self.answer(404, b"{}") if folder is None else self.list(folder)
            match = re.match(r"/(\w+/\w+)/resolve/main/([\w.-]+)$", self.path)
            return self.send(models[match[1]] / match[2])

        def list(self, folder: Path):
            files = [
                {"rfilename": f.name, "size": f.stat().st_size}
                for f in sorted(folder.iterdir())
            ]
            self.answer(200, json.dumps({"id": "me", "siblings": files}).encode())

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

        def answer(self, status: int, body: bytes, **headers: str):
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
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
    monkeypatch.setattr("moeflux_mlx.opening.hub.ENDPOINT", address)
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


def fall_silent(asked) -> None:
    """Answer too late."""
    time.sleep(0.4)
    asked.close_connection = True


def drip(asked) -> None:
    """Send a few bytes of many, each of them in time."""
    asked.send_response(200)
    asked.send_header("Content-Length", "1000")
    asked.end_headers()
    with contextlib.suppress(OSError):
        for _ in range(10):
            asked.wfile.write(b" ")
            time.sleep(0.05)
    asked.close_connection = True


def hang_up(asked) -> None:
    asked.close_connection = True
    asked.connection.shutdown(socket.SHUT_RDWR)


def of_files(fault: Callable[[Any], None]) -> Callable[[Any], None]:
    """Answer the list of files, and let only the files fail."""

    def answer(asked) -> None:
        if asked.path.startswith("/api/"):
            listed = [{"rfilename": "config.json", "size": 1000}]
            asked.answer(200, json.dumps({"id": "me", "siblings": listed}).encode())
        else:
            fault(asked)

    return answer


def gate(asked) -> None:
    asked.answer(403, b"{}", X_Error_Code="GatedRepo")


# What a hub does, and the words that its line holds.
FAULTS: dict[str, tuple[Callable[[Any], None], str]] = {
    "unauthorised": (lambda a: a.answer(401, b"{}"), "hf auth login"),
    "gated": (gate, "ask for access on http://127.0.0.1:"),
    "gated files": (of_files(gate), "ask for access on http://127.0.0.1:"),
    "down": (lambda a: a.answer(500, b"oh"), "answers with status 500"),
    "busy": (lambda a: a.answer(429, b"{}"), "answers with status 429"),
    "a login page": (lambda a: a.answer(200, b"<html>"), "not as a hub"),
    "silent": (fall_silent, "does not answer"),
    "silent files": (of_files(fall_silent), "does not answer"),
    "dripping files": (of_files(drip), "bytes per second of config.json"),
    "hanging up": (hang_up, "does not answer"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_hubs_fault_is_one_line_and_ends(fault, hub, monkeypatch, capfd):
    hub.settings["fault"], told = FAULTS[fault]
    for module in ("hub", "headers"):
        monkeypatch.setattr(f"moeflux_mlx.opening.{module}.SECONDS", 0.2)
    monkeypatch.setattr("moeflux_mlx.opening.headers.LEAST_RATE", 1e6)
    assert main(["inspect", "me/small"]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("moeflux: [inspect] ") and told in line
    if "files" not in fault:
        assert main(["generate", "--model", "me/small", "--prompt", "hi"]) == 2
        (line,) = capfd.readouterr().err.splitlines()
        assert line.startswith("moeflux: [load] ") and told in line


def test_a_hub_out_of_reach_is_one_line(monkeypatch, tmp_path, capfd):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("moeflux_mlx.opening.hub.ENDPOINT", "http://127.0.0.1:9")
    for command in (["inspect"], ["generate", "--prompt", "hi", "--model"]):
        assert main([*command, "me/small"]) == 2
        (line,) = capfd.readouterr().err.splitlines()
        assert "http://127.0.0.1:9 does not answer" in line


@pytest.mark.parametrize("name", ["small", "pack"])
def test_a_download_without_other_files_needs_no_hub(
    name, checkpoint, packed, monkeypatch, tmp_path
):
    """A download of mlx-lm or of ours lacks files that no model reads."""
    kept = pytest.importorskip("huggingface_hub._tree_cache")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("moeflux_mlx.opening.hub.ENDPOINT", "http://127.0.0.1:9")
    root, commit = tmp_path / f"models--me--{name}", "0" * 40
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text(commit)
    files = root / "snapshots" / commit
    shutil.copytree({"small": checkpoint, "pack": packed}[name], files)
    sizes = {file.name: file.stat().st_size for file in files.iterdir()}
    entries = {n: kept.TreeCacheEntry(size, "a" * 40) for n, size in sizes.items()}
    others = dict.fromkeys(("README.md", "extra.bin"), kept.TreeCacheEntry(9, "b" * 40))
    kept.write_tree_cache(str(root), commit, entries | others)
    with model_headers(f"me/{name}") as path:
        assert path == files
    assert find_model(f"me/{name}") == files
    (files / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="does not answer"):
        find_model(f"me/{name}")


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


BAD = "{% for m in messages %}\n{{ m "
TEMPLATES: dict[str, tuple[str, Any]] = {
    "text": ("tokenizer_config.json", BAD),
    "named": ("tokenizer_config.json", [{"name": "default", "template": BAD}]),
    "file": ("chat_template.jinja", BAD),
}


def write_template(model: Path, file: str, template: Any) -> None:
    """Give a model's tokenizer a template in one of its files."""
    if not file.endswith(".json"):
        (model / file).write_text(template)
        return
    fields = json.loads((model / file).read_text())
    (model / file).write_text(json.dumps({**fields, "chat_template": template}))


@pytest.mark.parametrize("command", ["generate", "chat", "serve"])
@pytest.mark.parametrize("form", TEMPLATES)
def test_a_template_that_is_none_is_refused_before_loading(
    form, command, checkpoint, tmp_path, capfd
):
    model = Path(shutil.copytree(checkpoint, tmp_path / "model"))
    write_template(model, *TEMPLATES[form])
    assert main([command, "--model", str(model)]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"moeflux: [chat template] {model / TEMPLATES[form][0]}: ")
    assert "line 2: " in line


def test_only_the_template_in_use_is_checked(checkpoint, tmp_path, capfd):
    model = Path(shutil.copytree(checkpoint, tmp_path / "model"))
    write_template(model, "tokenizer_config.json", BAD)
    flags = ["--model", str(model), "--prompt", "hi", "-m", "1"]
    assert main(["generate", *flags, "--ignore-chat-template"]) == 0
    assert main(["serve", "--model", str(model), "--chat-template", "{% if"]) == 2
    assert "[chat template] --chat-template: " in capfd.readouterr().err
    write_template(model, "chat_template.jinja", "{{ raise_exception('no') }}")
    check_template(model)
    (model / "chat_template.jinja").unlink()
    write_template(model, "tokenizer_config.json", 5)
    check_template(model)


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
