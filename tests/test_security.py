"""A model's files are data: none is run, whatever its name or our working directory."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import mlx_lm
import pytest
from hostile import N_TEMPLATE_TRIES, Trap, make_hostile
from mlx_lm.utils import load_tokenizer

import moeflux_mlx
from moeflux_mlx.cli import main
from moeflux_mlx.engine import simulator
from moeflux_mlx.errors import ModelError
from moeflux_mlx.loading import plan_load
from moeflux_mlx.opening.tokenizer import open_tokenizer
from moeflux_mlx.system import children

PACKAGE = Path(moeflux_mlx.__file__).parent
MOEFLUX = Path(sys.executable).with_name("moeflux")
simulated = pytest.mark.skipif(
    not simulator.available(), reason="the simulator needs ziglang and pyelftools"
)


@pytest.fixture
def mark(tmp_path):
    """The file that exists once code of the model was run."""
    return tmp_path / "mark"


@pytest.fixture
def model(tmp_path, mark, monkeypatch):
    """A hostile model; every question whether to run its code is answered yes."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 99))
    return make_hostile(tmp_path / "model", mark)


def with_own_tokenizer(model: Path) -> Path:
    """Give the model an ordinary class of tokenizer, so that it loads."""
    file = model / "tokenizer_config.json"
    settings = {**json.loads(file.read_text()), "tokenizer_class": "TokenizersBackend"}
    file.write_text(json.dumps(settings))
    return model


def run_there(model: Path, *command: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        command, cwd=model, capture_output=True, text=True, input="y\n" * 99
    )


def test_each_trap_works_when_sprung_on_purpose(model, mark):
    run_there(model, sys.executable, "-c", "import xxhash")
    assert mark.read_text() == "xxhash"
    mark.unlink()
    with contextlib.suppress(Exception):
        mlx_lm.load(str(model), trust_remote_code=True)
    assert mark.read_text() == "custom_model"
    mark.unlink()
    with contextlib.suppress(Exception):
        load_tokenizer(model, {"trust_remote_code": True})
    assert "evil" in mark.read_text()
    mark.unlink()
    pickle.loads((model / "model.pt").read_bytes())
    assert mark.exists()
    assert isinstance(Trap(""), Trap)


@pytest.mark.parametrize("settings", [None, {}, {"trust_remote_code": None}])
def test_load_runs_nothing_of_a_model(settings, model, mark):
    for trial in (model, with_own_tokenizer(model)):
        moeflux_mlx.load(trial, tokenizer_config=settings, expert_memory="4MB")
        plan_load(trial, "4GB")
    assert not mark.exists()


def test_a_tokenizer_that_is_code_is_refused_by_name(model, mark):
    (model / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match=re.escape(f"[tokenizer] {model}")):
        moeflux_mlx.load(model, expert_memory="4MB")
    assert not mark.exists()


GENERATE = ["generate", "--prompt", "-", "-m", "3", "--expert-memory", "4MB", "--model"]
COMMANDS = {
    "generate": (0, GENERATE),
    "inspect": (0, ["inspect", "--memory", "4GB"]),
    "trace": (0, ["trace", "--prompt", "y", "-m", "2", "-o", "trace.npz"]),
    "profile": (0, ["profile", "--executor", "ops", "--repeats", "1"]),
    "chat": (0, ["chat", "-m", "1", "--expert-memory", "4MB", "--model"]),
    # Stock mlx-lm, our packer and our tuner are not involved.
    "compare": (2, ["compare", "--prompt", "y", "--max-tokens", "2"]),
    "tune": (2, ["tune", "--executor", "ops"]),
    "verify": (1, ["verify"]),
    "pack": (2, ["pack"]),
    "unpack": (2, ["unpack"]),
}


@pytest.mark.sampled
@pytest.mark.parametrize("own", [True, False], ids=["loads", "needs code"])
@pytest.mark.parametrize("name", COMMANDS)
def test_no_command_runs_anything_of_a_model(
    name, own, model, mark, tmp_path, monkeypatch
):
    if own:
        with_own_tokenizer(model)
    elif name == "compare":
        pytest.skip("its children would do what is tried with the other model")
    code, flags = COMMANDS[name]
    command = [*flags, str(model)]
    if name in ("pack", "unpack"):
        command.append(str(tmp_path / "packed"))
    monkeypatch.chdir(model)
    assert main(command) == code
    assert not mark.exists()


@pytest.mark.parametrize("case", range(N_TEMPLATE_TRIES))
def test_a_chat_template_cannot_leave_its_sandbox(case, model, mark):
    tokenizer = open_tokenizer(with_own_tokenizer(model))
    message = [{"role": "user", "content": str(case)}]
    try:
        text = tokenizer.apply_chat_template(message, tokenize=False)
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
    assert not mark.exists()
    assert re.search("Security|Undefined|unsafe|has no attribute|^$|not.*defined", text)


def test_a_model_type_is_no_path_to_a_file(model, mark):
    config = json.loads((model / "config.json").read_text())
    for name in (f"../../{model.name}/evil", str(model / "evil"), "evil", ".evil"):
        (model / "config.json").write_text(json.dumps({**config, "model_type": name}))
        with pytest.raises(ModelError):
            moeflux_mlx.load(with_own_tokenizer(model), expert_memory="4MB")
    assert not mark.exists()


@pytest.mark.slow
def test_the_command_started_in_a_models_folder_imports_nothing_from_it(model, mark):
    config = json.loads((with_own_tokenizer(model) / "config.json").read_text())
    del config["model_file"]
    (model / "config.json").write_text(json.dumps(config))
    flags = ["--prompt", "y", "--max-tokens", "2"]
    done = run_there(model, str(MOEFLUX), "compare", ".", *flags)
    assert not mark.exists()
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@simulated
def test_the_compiler_is_not_looked_for_in_the_working_directory(model, mark):
    flags = ["--executor", "sim", "--only", "residual_add"]
    done = run_there(model, str(MOEFLUX), "doctor", *flags)
    assert not mark.exists()
    assert "1 of 1 kernels agree" in done.stdout, done.stderr


@pytest.mark.slow
def test_python_m_imports_nothing_of_ours_from_the_working_directory(model, mark):
    """Python itself searches it for its own library, which we cannot change."""
    for path in model.glob("*.py"):
        if path.stem in sys.stdlib_module_names or path.stem == "moeflux_mlx":
            path.unlink()
    done = run_there(
        model, sys.executable, "-m", "moeflux_mlx.cli", "kernels", "--json"
    )
    assert not mark.exists()
    assert "residual_add" in done.stdout, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("flag", ["1", ""], ids=["safe path", "as Python 3.10"])
def test_a_child_does_not_import_from_the_working_directory(
    flag, model, mark, monkeypatch
):
    arguments = ["moeflux_mlx.engine.simulator", "no-such-file"]
    if flag:
        monkeypatch.chdir(model)
        done = children.run_module(*arguments)
    else:
        script = f"import sys; sys.argv[1:] = {arguments}\n{children._BOOT}"
        done = run_there(model, sys.executable, "-c", script)
    assert not mark.exists()
    assert "no-such-file" in done.stdout + done.stderr


@pytest.mark.parametrize("key", ["tool_parser_type", "chat_template_type"])
def test_a_name_of_a_parser_is_no_path_to_a_file(key, model, mark):
    file = with_own_tokenizer(model) / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    for name in (str(model / "evil"), "../evil", "..evil", "evil"):
        file.write_text(json.dumps({**settings, key: name}))
        with pytest.raises(ModelError, match=r"\[tokenizer\]"):
            open_tokenizer(model)
    assert not mark.exists()


def test_one_function_starts_every_child():
    """A new place that starts a child must show that the working directory is safe."""
    found = {
        str(path.relative_to(PACKAGE))
        for path in PACKAGE.rglob("*.py")
        if re.search(
            r"subprocess\.(run|Popen(?!\[)|call|check)|os\.(system|exec|spawn|popen|fork)"
            r"|import multiprocessing|sys\.executable|ProcessPool",
            path.read_text(),
        )
    }
    assert found == {"system/children.py"}
    assert os.path.isabs(sys.executable)
