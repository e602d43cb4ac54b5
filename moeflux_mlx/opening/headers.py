"""Fetch a hub model's headers into local files whose weights are holes."""

from __future__ import annotations

import contextlib
import fnmatch
import tempfile
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import HfApi, constants, hf_hub_url, snapshot_download
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import build_hf_headers, get_session

from ..errors import ModelError
from ..experts.files.manifest import MANIFEST_NAME
from ..experts.files.safetensors import MAX_HEADER_BYTES
from .download import WEIGHTS, is_complete, weights_of

ENDPOINT = constants.ENDPOINT
# Files that describe a model's tensors and their storage.
DESCRIPTIONS = ("config.json", "generation_config.json", "*.safetensors.index.json")
# Size of the first request, which covers most headers.
FIRST_BYTES = 100_000
# Bound of the size of a description.
MOST_BYTES = 64 << 20
SECONDS = 10.0


@contextlib.contextmanager
def model_headers(path_or_repo: str | Path) -> Iterator[Path]:
    """Yield a directory with a model's headers and file sizes.

    A local directory or a complete download is yielded itself. For another model on a
    hub, range requests fetch only configuration and headers.

    Raises:
        ModelError: there is no such model, or it has to be downloaded first.
    """
    if _exists(path_or_repo):
        yield Path(path_or_repo)
    elif (kept := downloaded(str(path_or_repo))) is not None:
        yield kept
    else:
        with tempfile.TemporaryDirectory(prefix="moeflux-headers-") as folder:
            try:
                _fetch(str(path_or_repo), Path(folder))
            except ModelError:
                raise
            except Exception as error:
                told = " ".join(str(error).split())
                raise ModelError(
                    "[inspect] expected a local directory or a hub id but got "
                    f"{str(path_or_repo)!r}: {told}"
                ) from error
            yield Path(folder)


def is_local(path_or_repo: str | Path) -> bool:
    """Tell whether a model needs no download."""
    return _exists(path_or_repo) or downloaded(str(path_or_repo)) is not None


def _exists(path_or_repo: str | Path) -> bool:
    try:
        return Path(path_or_repo).exists()
    except (OSError, ValueError):
        return False


def downloaded(repo: str) -> Path | None:
    """Return a model's directory in the hub's cache if it is complete."""
    try:
        path = Path(snapshot_download(repo, local_files_only=True))
    except Exception:
        return None
    return path if (path / "config.json").exists() and is_complete(path) else None


def _fetch(repo: str, folder: Path) -> None:
    api = HfApi(endpoint=ENDPOINT)
    sizes = {
        entry.path: entry.size
        for entry in api.list_repo_tree(repo)
        if isinstance(entry, RepoFile) and "/" not in entry.path
    }
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
    url = hf_hub_url(repo, name, endpoint=ENDPOINT)
    headers = {**build_hf_headers(), "range": f"bytes={start}-{end - 1}"}
    found = bytearray()
    with get_session().stream("GET", url, headers=headers, timeout=SECONDS) as answer:
        answer.raise_for_status()
        # A server without range requests sends the file from its beginning.
        skip = 0 if answer.status_code == 206 else start
        for chunk in answer.iter_bytes():
            found += chunk
            if len(found) >= skip + end - start:
                break
    if len(found) < skip + end - start:
        raise ModelError(f"[inspect] {repo}: {name} ends before byte {end}")
    return bytes(found[skip : skip + end - start])
