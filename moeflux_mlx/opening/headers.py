"""Fetch a hub model's headers into local files whose weights are holes."""

from __future__ import annotations

import contextlib
import fnmatch
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import hf_hub_url
from huggingface_hub.utils import (
    build_hf_headers,
    get_session,
    hf_raise_for_status,
)

from ..errors import ModelError
from ..experts.files.manifest import MANIFEST_NAME
from ..experts.files.safetensors import MAX_HEADER_BYTES
from . import hub
from .download import WEIGHTS, downloaded, weights_of
from .hub import SECONDS, file_sizes, hub_errors

# Files that describe a model's tensors and their storage.
DESCRIPTIONS = ("config.json", "generation_config.json", "*.safetensors.index.json")
# Size of the first request, which covers most headers.
FIRST_BYTES = 100_000
# Bound of the size of a description.
MOST_BYTES = 64 << 20
# A hub that sends fewer bytes per second is given up.
LEAST_RATE = 10_000


@contextlib.contextmanager
def model_headers(path_or_repo: str | Path) -> Iterator[Path]:
    """Yield a directory with a model's headers and file sizes.

    A local directory or a complete download is yielded itself. For another model on a
    hub, range requests fetch only configuration and headers.

    Raises:
        ModelError: there is no such model, or it has to be downloaded first.
    """
    if (here := local(path_or_repo)) is not None:
        yield here
    else:
        with tempfile.TemporaryDirectory(prefix="moeflux-headers-") as folder:
            with hub_errors("inspect", str(path_or_repo)):
                _fetch(str(path_or_repo), Path(folder))
            yield Path(folder)


def local(path_or_repo: str | Path) -> Path | None:
    """Return the directory of a model that needs no download."""
    try:
        if Path(path_or_repo).exists():
            return Path(path_or_repo)
    except (OSError, ValueError):
        pass
    return downloaded(str(path_or_repo))


def _fetch(repo: str, folder: Path) -> None:
    sizes = file_sizes(repo)
    if MANIFEST_NAME in sizes:
        raise ModelError(
            f"[inspect] {repo}: expected a plain checkpoint but got a pack, whose "
            f"checksums need its files: hf download {repo} first"
        )
    for name, size in sizes.items():
        if any(fnmatch.fnmatch(name, pattern) for pattern in DESCRIPTIONS):
            text = _range(repo, name, 0, min(size, MOST_BYTES))
            (folder / name).write_bytes(text)
    if not (folder / "config.json").exists():
        raise ModelError(f"[inspect] {repo}: expected a model with config.json")
    patterns = weights_of(folder)
    for name, size in sizes.items():
        if any(fnmatch.fnmatch(name, pattern) for pattern in patterns or [WEIGHTS]):
            _header(repo, name, size, folder / name)


def _header(repo: str, name: str, size: int, file: Path) -> None:
    """Write a file of the given size with the header, and a hole for the tensors."""
    begin = _range(repo, name, 0, min(size, FIRST_BYTES))
    length = 8 + int.from_bytes(begin[:8], "little")
    if len(begin) < 8 or length > min(size, MAX_HEADER_BYTES):
        raise ModelError(f"[inspect] {repo}: {name} is not a safetensors file")
    if length > len(begin):
        begin += _range(repo, name, len(begin), length)
    with file.open("wb") as out:
        out.write(begin[:length])
        out.truncate(size)


def _range(repo: str, name: str, start: int, end: int) -> bytes:
    """Fetch only the bytes of a file from ``start`` to ``end``."""
    url = hf_hub_url(repo, name, endpoint=hub.ENDPOINT)
    headers = {**build_hf_headers(), "range": f"bytes={start}-{end - 1}"}
    found = bytearray()
    until = time.monotonic() + SECONDS + end / LEAST_RATE
    with get_session().stream("GET", url, headers=headers, timeout=SECONDS) as answer:
        if answer.is_error:
            # The error quotes the body.
            answer.read()
        hf_raise_for_status(answer)
        # A server without range requests sends the file from its beginning.
        skip = 0 if answer.status_code == 206 else start
        for chunk in answer.iter_bytes():
            found += chunk
            if len(found) >= skip + end - start:
                break
            if time.monotonic() > until:
                raise ModelError(
                    f"[inspect] {repo}: expected {LEAST_RATE} bytes per second of "
                    f"{name} from {hub.ENDPOINT} but got only {len(found)} bytes"
                )
    if len(found) < skip + end - start:
        raise ModelError(f"[inspect] {repo}: {name} ends before byte {end}")
    return bytes(found[skip : skip + end - start])
