"""Directories with odd names, and directories that hold other things than files."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import mlx.core as mx
import pytest

import moeflux_mlx
from moeflux_mlx.cli import main
from moeflux_mlx.errors import ModelError

TOKENS = mx.array([[7, 31, 200]])
NAMES = ["[a]", "a*b", "a?b", "a b", "a\nb", "a\\b", "-a", "é", "[red]a[/red]"]
NAMES += [os.fsdecode(b"a\xffb"), "[/x] :smile:", "a\x1b]0;b\x07"]


@pytest.fixture(scope="module")
def logits(checkpoint):
    return moeflux_mlx.load(checkpoint)[0](TOKENS)


@pytest.mark.sampled
@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_a_directory_of_any_name_is_a_model(name, checkpoint, logits, tmp_path, capfd):
    plain = Path(shutil.copytree(checkpoint, tmp_path / name))
    packed = tmp_path / f"{name}-packed"
    assert main(["pack", str(plain), str(packed)]) == 0
    assert main(["verify", str(packed)]) == main(["inspect", str(plain)]) == 0
    shown = "".join(capfd.readouterr()).replace("\n", "")
    # Rich wraps a long name, and no escape sequence reaches the terminal.
    assert shown.isprintable() and (":smile:" in shown) == (":smile:" in name)
    for path, memory in ((plain, None), (plain, "3MB"), (packed, "3MB")):
        model, _ = moeflux_mlx.load(path, expert_memory=memory)
        assert mx.array_equal(model(TOKENS), logits)


@pytest.mark.parametrize("name", ["a\nb", "a\x1b[31mb", "a\u202eb"], ids=ascii)
@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_an_error_shows_nothing_of_a_name_that_moves_the_terminal(
    name, command, tmp_path, capfd
):
    (tmp_path / name).mkdir()
    assert main([command, str(tmp_path / name)]) in (1, 2)
    (line,) = capfd.readouterr().err.splitlines()
    assert line.isprintable() and str(tmp_path) in line
    with pytest.raises(ModelError) as caught:
        moeflux_mlx.load(tmp_path / name)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("name", ["[a]", os.fsdecode(b"a\xffb")], ids=ascii)
def test_mlx_lms_own_class_loads_from_a_directory_of_any_name(
    name, checkpoint, tmp_path
):
    path = Path(shutil.copytree(checkpoint, tmp_path / name))
    whole = moeflux_mlx.load(path, native=False)[0](TOKENS)
    streamed = moeflux_mlx.load(path, native=False, expert_memory="3MB")[0](TOKENS)
    assert mx.array_equal(whole, streamed)


def fifo(path: Path) -> None:
    os.mkfifo(path)


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def loop(path: Path) -> None:
    path.symlink_to(path)


FILES = ["config.json", "tokenizer.json", "tokenizer_config.json"]
FILES += ["generation_config.json", "model.safetensors", "model.safetensors.index.json"]
FILES += ["model-extra.safetensors", "special_tokens_map.json", "chat_template.jinja"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("kind", [fifo, device, loop], ids=lambda kind: kind.__name__)
def test_anything_but_a_file_ends_in_one_line_and_never_blocks(
    kind, name, checkpoint, tmp_path, capfd
):
    model = Path(shutil.copytree(checkpoint, tmp_path / "model"))
    (model / name).unlink(missing_ok=True)
    kind(model / name)
    commands = [["pack", str(model), str(tmp_path / "packed")]]
    if kind is not loop:
        # A broken link counts as a missing file, which may be valid.
        for options in ({}, {"expert_memory": "3MB"}, {"native": False}):
            with pytest.raises(ModelError, match=r"no file|file|config\.json"):
                moeflux_mlx.load(model, **options)
        commands += [["generate", "--model", str(model), "--prompt", "x"]]
    capfd.readouterr()
    for command in commands:
        assert main(command) == 2
        (line,) = capfd.readouterr().err.splitlines()
        assert line.startswith("moeflux: [") and name in line
    assert not (tmp_path / "packed").exists()
