"""Wrong command lines: each ends in one line on standard error."""

from __future__ import annotations

import os
import shlex

import mlx.core as mx
import pytest
from mlx_lm.models.cache import make_prompt_cache
from tiny import make_checkpoint

import moeflux_mlx
from moeflux_mlx.cli import main

# {plain} and {packed} are models, the other names are not: see ``places``.
GENERATE = "generate --model {plain} --prompt hi -m 2 --temp 0"
PACKED = "generate --model {packed} --prompt hi -m 2 --temp 0"
LINES = {
    "": ["", "nothing", "--nothing", "generate extra", "'' ''"],
    "generate": [
        "",
        "--model",
        "--prompt x",
        "--model '' --prompt x",
        *(
            f"--model {m} --prompt x"
            for m in ("{none}", "{text}", "{folder}", "{fifo}")
        ),
        "--model {mem} --prompt x",
        "--model a/b/c --prompt x",
        f"--model {'x' * 5000} --prompt x",
        "--model {plain} --prompt '' --ignore-chat-template",
    ],
    GENERATE: [
        "--nope",
        "--mem 1GB --m",
        *(f"--max-tokens {n}" for n in ("x", "0", "-5", "1e9", "9" * 40)),
        *(f"--temp={n}" for n in ("x", "nan", "-1", "inf")),
        *(f"--top-p={n}" for n in ("nan", "2", "-0.1")),
        *(f"--min-p={n}" for n in ("nan", "3")),
        "--top-k -3",
        "--top-k 9999999999",
        "--min-p 0.1 --min-tokens-to-keep -3",
        "--xtc-probability nan",
        "--xtc-probability 0.5 --xtc-threshold 7",
        *(f"--seed={n}" for n in ("x", "-1", "9" * 30)),
        *(
            f"--memory={n}"
            for n in ("0", "-1", "1e400", "abc", "nan", "''", "1KB", "9" * 400)
        ),
        *(f"--expert-memory={n}" for n in ("0", "-3GB", "auto", "1")),
        "--memory 8GB --expert-memory 1",
        "--scope x",
        "--read-ahead x",
        "--expert-io x",
        "--expert-io mmap --expert-memory 9MB",
        *(f"--policy {n}" for n in ("x", "''", "lru:3", "pins:", "pins:{none}")),
        *(f"--policy pins:{n}" for n in ("{text}", "{fifo}", "{folder}", "{state}")),
        *(f"--executor {n}" for n in ("x", "''", "ops,metal")),
        "--image x",
        "--adapter-path {folder}",
        "--draft-model {none}",
        "--num-draft-tokens 0",
        *(f"--kv-bits={n}" for n in ("3", "0", "-1", "x")),
        "--kv-bits 4 --kv-group-size 0",
        "--kv-bits 4 --quantized-kv-start -1",
        "--max-kv-size 0",
        "--prefill-step-size 0",
        *(f"--save-state {n}" for n in ("{none}/x", "{folder}", "{text}/x", "''")),
        *(f"--load-state {n}" for n in ("{none}", "{folder}", "{fifo}", "{text}")),
        *(f"--load-state {n}" for n in ("{state}", "{mem}", "{trace}", "''")),
        "--load-state {state} --prompt-cache-file {state}",
        *(f"--prompt-cache-file {n}" for n in ("{none}", "{folder}", "{fifo}")),
        "--prompt-cache-file {text}",
        "--prompt-cache-file {plain}/model.safetensors",
        *(
            f"--chat-template-config '{n}'"
            for n in ("[]", "{{", "3", "null", '{{"tokenize":1}}', '{{"messages":1}}')
        ),
    ],
    PACKED: ["--expert-memory 1KB", "--memory 1MB"],
    "pack": [
        "",
        "{plain}",
        *(f"{{plain}} {n}" for n in ("{packed}", "{plain}", "{folder}", "{text}")),
        *(f"{{plain}} {n}" for n in ("{fifo}", "{text}/x", "''")),
        *(f"{n} {{none}}" for n in ("{none}", "{text}", "{folder}", "''")),
        *(f"{{plain}} {{none}} --alignment {n}" for n in ("0", "-1", "x", "3", "1e3")),
        "{plain} {none} --alignment " + "9" * 20,
    ],
    "unpack": [
        *("", "{packed}", "{packed} {none} --x"),
        *(f"{{packed}} {n}" for n in ("{plain}", "{packed}", "{folder}", "{text}")),
        *(f"{{packed}} {n}" for n in ("{fifo}", "{text}/x", "''")),
        *(f"{n} {{none}}" for n in ("{none}", "{text}", "{folder}", "{plain}", "''")),
    ],
    "verify": ["", "{plain}", "{none}", "{text}", "{folder}", "{fifo}", "{packed} --x"],
    "inspect": [
        *("", "{none}", "{text}", "{folder}", "''"),
        *(f"{{plain}} --graph {n}" for n in ("99", "-1", "x")),
        *(f"{{plain}} --graph 0 --tokens {n}" for n in ("0", "-4", "9" * 20)),
        *(f"{{packed}} --memory {n}" for n in ("x", "0", "nan", "1MB")),
    ],
    "compare": [
        "",
        "{none}",
        "{plain} --prompt ''",
        *(f"{{plain}} --prompt-file {n}" for n in ("{none}", "{folder}", "{fifo}")),
        *(f"{{plain}} --prompt-file {n}" for n in ("{bytes}", "{empty}", "/dev/zero")),
        *(f"{{plain}} --text {n}" for n in ("{none}", "{empty}", "{fifo}", "{mem}")),
        "{plain} --prompt a --prompt-file {text}",
        *(f"{{plain}} --max-tokens {n}" for n in ("0", "-1", "x")),
        *(f"{{plain}} --tolerance={n}" for n in ("x", "nan", "-1", "inf")),
        "{plain} --dtype x",
        "{plain} --against {none}",
        *("{plain} --html {folder}", "{plain} --html {none}/x", "{plain} --budgets 5"),
        *(f"{{plain}} --matrix {n}" for n in ("--budgets 101", "--memory 1GB")),
        "{plain} --matrix --no-native",
    ],
    "doctor": [
        *("--only nothing", "--only ''", "--x", "--executor ops", "--executor x"),
        "--executor sim --only nothing --record {folder}",
        "--executor sim --only 'rms*' --record {none}/x",
    ],
    "kernels": ["x", "--only x"],
    "profile": [
        *("", "{none}"),
        *(f"{{plain}} --context {n}" for n in ("-1", "x", "9" * 20)),
        *("{plain} --prefill -1", "{plain} --repeats 0"),
        *("{plain} --plot {text}", "{plain} --plot {none}/x.png"),
        *("{plain} --csv {none}/x", "{plain} --csv {folder}"),
    ],
    "tune": [
        *("", "{none}", "{plain} --executor x", "{plain} --executor ops"),
        *(f"{{plain}} --prompts {n}" for n in ("0", "-1", "x")),
        *("{plain} --context -1", "{plain} --repeats 0"),
        "{plain} --executor sim --file {folder}",
        "{plain} --executor sim --file {none}/x",
    ],
    "trace": [
        "{plain}",
        "{plain} --prompt x",
        *(f"{{plain}} --prompt x -o {n}" for n in ("{folder}", "{none}/x", "''")),
        "{plain} --prompt '' -o {none}",
        "{none} --prompt x -o {none}",
        *(
            f"{{plain}} --prompt-file {n} -o {{none}}"
            for n in ("{none}", "{folder}", "{fifo}", "{bytes}", "/dev/zero")
        ),
        *(
            f"{{plain}} --prompt x -o {{none}} {n}"
            for n in ("-m 0", "-m -1", "--temp=nan", "--temp=-1", "--seed=-1")
        ),
    ],
    "cachesim": [
        *("", "{none}", "{text}", "{folder}", "{fifo}", "{empty}", "{mem}"),
        "{plain}/model.safetensors",
        *("{trace} --policy x", "{trace} --policy pins:{text}", "{trace} --scope x"),
        *(f"{{trace}} --budgets {n}" for n in ("", "x", "0", "nan", "-1", "101")),
        *(f"{{trace}} --floor {n}" for n in ("-1", "x")),
        *("{trace} --plot {text}", "{trace} --plot {none}/x.png"),
        "{trace} --plot {folder}",
    ],
}
# Without --all, only the first lines of each command run.
N_FIRST = 3
ALL = [
    pytest.param(
        (text := f"{start} {line}".strip()),
        id=text[:60],
        marks=[pytest.mark.slow] if i >= N_FIRST else [],
    )
    for start, lines in LINES.items()
    for i, line in enumerate(lines)
]


@pytest.fixture(scope="module")
def places(checkpoint, packed, tmp_path_factory):
    """Paths by name: models, files of ours, and other things."""
    top = tmp_path_factory.mktemp("places")
    (top / "text").write_text("nonsense\n")
    (top / "bytes").write_bytes(b"\xff\xfe\0" * 9)
    (top / "empty").touch()
    (top / "folder").mkdir()
    os.mkfifo(top / "fifo")
    other = moeflux_mlx.load(make_checkpoint(top / "other", seed=1))[0]
    cache = make_prompt_cache(other)
    other(mx.array([[1, 2, 3]]), cache=cache)
    moeflux_mlx.save_state(top / "state", other, cache, [1, 2, 3])
    trace = ["-m", "4", "--prompt", "hello", "--output", str(top / "trace")]
    assert main(["trace", str(checkpoint), *trace]) == 0
    names = ("text", "bytes", "empty", "folder", "fifo", "none", "state", "trace")
    found = {name: str(top / name) for name in names}
    # A plain file that nobody can read, not even root.
    mem = "/proc/self/mem" if os.path.exists("/proc/self/mem") else found["none"]
    return {**found, "plain": str(checkpoint), "packed": str(packed), "mem": mem}


@pytest.mark.parametrize("line", ALL)
def test_a_wrong_command_line_ends_in_one_line(line, places, capfd, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    code = main(shlex.split(line.format(**places)))
    lines = capfd.readouterr().err.splitlines()
    lines = [line for line in lines if not line.startswith("moeflux: before loading ")]
    assert code in (1, 2)
    assert len(lines) == 1 and lines[0].startswith("moeflux: ["), lines
    assert "Traceback" not in lines[0] and "MOEFLUX_TRACEBACK" not in lines[0]
    assert not os.path.exists(places["none"])
