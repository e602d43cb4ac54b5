"""Ask a hub about a model: every fault is one line, and no request waits for ever."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator

from huggingface_hub import HfApi, constants, errors

from ..errors import ModelError

ENDPOINT = constants.ENDPOINT
# Time in which a hub must begin to answer; its library alone would wait for ever.
SECONDS = 10.0


def file_sizes(repo: str, revision: str | None = None) -> dict[str, int]:
    """Return the sizes in bytes of a model's files, without those in folders."""
    found = HfApi(endpoint=ENDPOINT).model_info(
        repo, revision=revision, files_metadata=True, timeout=SECONDS
    )
    files = {file.rfilename: file.size for file in found.siblings or ()}
    return {n: size for n, size in files.items() if "/" not in n and size is not None}


@contextlib.contextmanager
def hub_errors(part: str, repo: str) -> Iterator[None]:
    """Turn a hub's errors into one line that begins with ``part``.

    Raises:
        ModelError: with the hub's error as its cause.
    """
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    # Its warnings about repeated requests would be printed before our line.
    logger.setLevel(logging.ERROR)
    try:
        yield
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(
            f"[{part}] expected a local directory or a hub id but got {repo!r}: "
            f"{_told(repo, error)}"
        ) from error
    finally:
        logger.setLevel(level)


def _told(repo: str, error: Exception) -> str:
    """Say in words why a hub did not give a model."""
    if isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__:
        return _told(repo, error.__cause__)  # type: ignore[arg-type]
    # Versions of huggingface_hub use different libraries with these names.
    kinds = {kind.__name__ for kind in type(error).__mro__}
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.GatedRepoError):
        return (
            f"the hub gives its files only to some users: ask for access on "
            f"{ENDPOINT}/{repo}, then run hf auth login"
        )
    if isinstance(error, errors.RepositoryNotFoundError) or status == 401:
        return (
            f"{ENDPOINT} shows no such model: check its name, and for a private one "
            "run hf auth login"
        )
    if isinstance(error, errors.OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set, and the model is not downloaded completely"
    told = " ".join(str(error).split()) or type(error).__name__
    if "TransportError" in kinds:
        return f"{ENDPOINT} does not answer, and the model is not downloaded: {told}"
    if isinstance(error, json.JSONDecodeError):
        return f"{ENDPOINT} answers, but not as a hub: {told}"
    if status is not None and not isinstance(error, errors.RevisionNotFoundError):
        return f"{ENDPOINT} answers with status {status}: {told}"
    return told
