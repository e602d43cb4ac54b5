"""Files from unknown authors are parsed within limits, or refused at once."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import struct

import pytest

from moeflux_mlx.errors import ModelError
from moeflux_mlx.experts.files.checkpoint import read_config
from moeflux_mlx.experts.files.safetensors import (
    header_bytes,
    parse_header,
    read_header,
)
from moeflux_mlx.system.files import (
    MOST_DEPTH,
    brief,
    open_file,
    parse_json,
    read_file,
    read_json,
    replacing,
    short,
)


@pytest.fixture(params=["FIFO", "directory", "socket", "device"])
def other(request, tmp_path):
    """A path that is not a regular file, with its kind."""
    path = tmp_path / "other"
    if request.param == "FIFO":
        os.mkfifo(path)
    elif request.param == "directory":
        path.mkdir()
    elif request.param == "socket":
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(path))
    else:
        path.symlink_to("/dev/zero")
    return path, request.param


def test_anything_but_a_file_is_an_error_at_once(other):
    path, kind = other
    with pytest.raises(OSError) as caught:
        open_file(path)
    # Sockets are refused by the system itself.
    if kind == "socket":
        assert caught.value.errno in (errno.ENXIO, errno.EOPNOTSUPP)
    else:
        assert caught.value.strerror == f"expected a regular file but got a {kind}"


def test_a_file_is_read_up_to_its_limit(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"[1,2]")
    assert read_file(path, 5) == b"[1,2]"
    assert read_json(path, 5) == [1, 2]
    with pytest.raises(ValueError, match="at most 4 bytes but got 5"):
        read_file(path, 4)
    # A sparse file has the stated size, and none of it is read.
    os.truncate(path, 1 << 40)
    with pytest.raises(ValueError, match=f"but got {1 << 40}"):
        read_json(path, 5)
    for missing in (tmp_path / "none", tmp_path / ("x" * 5000)):
        with pytest.raises(OSError):
            read_json(missing, 5)
    with pytest.raises(ValueError):
        read_json("nul\0", 5)


@pytest.mark.parametrize(
    ("text", "error"),
    [
        (b'{"a": 1, "a": 2}', "'a' is there twice"),
        (b"NaN", "finite number but got 'NaN'"),
        (b"[-Infinity]", "finite number"),
        (b"1e999", "finite number"),
        (b"9223372036854775808", "64 bits"),
        (b"[-9223372036854775809]", "64 bits"),
        (b"1" * 5000, "64 bits but got '1111"),
        (b"[" * 65 + b"]" * 65, "at most 64 levels"),
        (b'{"a":' * 64 + b"[]" + b"}" * 64, "at most 64 levels"),
        (b"[" * 200_000, "at most 64 levels"),
        (b'{"a":' * 200_000, "at most 64 levels"),
        (b"\xef\xbb\xbf{}", "BOM"),
        (b'"\xff"', "utf-8"),
        (b'"\xed\xa0\x80"', "utf-8"),
        (b"", "Expecting value"),
        (b"{} {}", "Extra data"),
        ("{}".encode("utf-16"), "utf-8"),
    ],
)
def test_invalid_json_is_a_value_error(text, error):
    with pytest.raises(ValueError, match=error):
        parse_json(text)


def test_valid_json_is_parsed_as_by_python():
    text = (
        '{"a": [1, -2.5, 1e3, true, null, "\\u00e9"], "b": {"c": -9223372036854775808}}'
    )
    assert parse_json(text) == parse_json(text.encode()) == json.loads(text)
    deep = b"[" * MOST_DEPTH + b"]" * MOST_DEPTH
    assert parse_json(deep) == json.loads(deep)
    loose = '{"a": 1, "a": [Infinity, 123456789012345678901234567890]}'
    assert parse_json(loose, exact=False) == json.loads(loose)
    for text in ("1" * 5000, "[" * 200_000, "[" * 65 + "]" * 65):
        with pytest.raises(ValueError, match="at most"):
            parse_json(text, exact=False)


def test_names_given_twice_are_found_among_many():
    names = ",".join(f'"{i}":0' for i in range(100_000))
    with pytest.raises(ValueError, match="'99999' is there twice"):
        parse_json("{" + names + ',"99999":0}')


def test_values_in_errors_are_shortened():
    for value in ("x" * 10**6, ["y" * 10**6] * 1000, {"a": {"b": [[[[1]]]]}}, 10**3999):
        assert len(short(value)) < 2500 and "\n" not in short(value)
    assert short("a\nb") == "'a\\nb'"
    assert brief(ValueError("a b")) == "a b"
    assert brief(ValueError("a\nb")) == "'a\\nb'"
    assert len(brief(ValueError("x" * 10**6))) < 400


@pytest.mark.parametrize("name", ["config.json"])
def test_a_model_directory_of_nonsense_is_named(tmp_path, other, name):
    path, _ = other
    (tmp_path / name).symlink_to(path)
    with pytest.raises(ModelError, match=name):
        read_config(tmp_path)


@pytest.mark.parametrize(
    "text", ["[" * 200_000, '{"a": ' + "9" * 5000 + "}", "\ufeff{}"]
)
def test_a_configuration_beyond_limits_is_named(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ModelError, match=r"cannot read .*config.json"):
        read_config(tmp_path)


def header(fields: object, n_bytes: int = 0) -> bytes:
    text = json.dumps(fields).encode() if not isinstance(fields, bytes) else fields
    return struct.pack("<Q", len(text)) + text + bytes(n_bytes)


def tensor(begin, end, shape=None, dtype="U8"):
    shape = [end - begin] if shape is None else shape
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"a": tensor(0, 8), "b": tensor(4, 12)}, "'a' and 'b' in bytes of their own"),
        ({"a": tensor(0, 12), "b": tensor(4, 8)}, "'a' and 'b' in bytes of their own"),
        ({"a": tensor(0, 8), "b": tensor(0, 8)}, "'a' and 'b' in bytes of their own"),
        ({"a": tensor(9, 17)}, "to end inside its"),
        ({"a": tensor(-1, 7)}, "dtype, shape and offsets"),
        ({"a": tensor(8, 0, [0])}, "0 bytes of 'a' .* but got -8"),
        ({"a": tensor(0, 4, [2, True, 2])}, "dtype, shape and offsets"),
        ({"a": tensor(0, 4, [1] * 17)}, "at most 16 axes of 'a' but got 17"),
        ({"a": tensor(0, 0, [2**62] * 16)}, "bytes of 'a'"),
        ({"a": tensor(0, 4, dtype="U9")}, "a known type"),
        ({"a": tensor(0, 4), "__metadata__": {"x": 3}}, "metadata of strings"),
        (b'{"a":' + b"[" * 100_000, "levels of nesting"),
        (b'{"a": 1, "a": 1}', "twice"),
    ],
)
def test_a_header_that_contradicts_itself_is_refused(tmp_path, fields, error):
    path = tmp_path / "model.safetensors"
    path.write_bytes(header(fields, 16))
    with pytest.raises(ModelError, match=error) as caught:
        read_header(path)
    assert str(path) in str(caught.value)


def test_tensors_side_by_side_are_read(tmp_path):
    path = tmp_path / "model.safetensors"
    fields = {"b": tensor(8, 16, [2], "F32"), "a": tensor(0, 8), "c": tensor(8, 8)}
    path.write_bytes(header({**fields, "__metadata__": {"k": "v"}}, 16))
    found = read_header(path)
    start = len(path.read_bytes()) - 16
    places = [(e.name, e.offset - start, e.n_bytes) for e in found.values()]
    assert places == [("a", 0, 8), ("c", 8, 0), ("b", 8, 8)]
    with open(path, "rb") as file:
        assert parse_header(path, file) == (found, {"k": "v"})
    with open(path, "rb") as file, pytest.raises(ModelError, match="of at most 20"):
        parse_header(path, file, 20)
    assert header_bytes([]) == header(b'{"__metadata__":{"format":"mlx"}} ' + b" " * 6)


def test_a_header_of_long_shapes_is_refused_before_they_are_multiplied(tmp_path):
    # Multiplying them took more than a minute.
    path = tmp_path / "model.safetensors"
    path.write_bytes(header({"t": tensor(0, 1, [2**62] * 240_000)}, 1))
    with pytest.raises(ModelError, match="at most 16 axes of 't' but got 240000"):
        read_header(path)


def test_a_file_is_replaced_atomically_and_for_its_owner_alone(tmp_path):
    path = tmp_path / "state"
    path.write_bytes(b"before")
    with replacing(path) as file:
        file.write(b"after")
        assert path.read_bytes() == b"before"
    assert path.read_bytes() == b"after"
    assert path.stat().st_mode & 0o777 == 0o600
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit, ValueError])
def test_an_error_leaves_the_old_file(tmp_path, kind):
    path = tmp_path / "state"
    path.write_bytes(b"before")
    with pytest.raises(kind), replacing(path) as file:
        file.write(b"half")
        raise kind
    assert path.read_bytes() == b"before" and list(tmp_path.iterdir()) == [path]


def test_the_partial_file_of_a_killed_process_is_removed_by_the_next_call(tmp_path):
    path = tmp_path / "state[1]"
    if not (child := os.fork()):
        with replacing(path) as file:
            file.write(b"half")
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".state[1].") and left.stat().st_mode & 0o77 == 0
    mine = tmp_path / ".state[1].part"
    mine.write_bytes(b"another's")
    with replacing(path) as first, replacing(path) as second:
        # A part that is still being written stays.
        first.write(b"first")
        second.write(b"second")
    assert path.read_bytes() == b"first"
    assert {p.name for p in tmp_path.iterdir()} == {path.name, mine.name}
