"""Create the repository's virtual environment with the MLX for this machine.

This file uses the standard library and syntax that an old Python can parse, because it
must run and report missing parts before anything is installed.
"""

import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
STAMP = VENV / "installed.json"
# The oldest Python that mlx-lm supports.
OLDEST_PYTHON = (3, 11)
NEWER_NAMES = ["python3.13", "python3.12", "python3.11", "python3.14"]
# The first NVIDIA driver that runs programs built with CUDA 13.
OLDEST_CUDA_DRIVER = 580


def ensure_python():
    """Return if this Python is usable, otherwise restart with one that is."""
    if sys.version_info >= OLDEST_PYTHON:
        return
    for name in NEWER_NAMES:
        path = shutil.which(name)
        if path and _is_new_enough(path):
            os.execv(path, [path, *sys.argv])
    needed = ".".join(map(str, OLDEST_PYTHON))
    _fail(
        f"Python {needed} or newer is needed, but this is {platform.python_version()} "
        "and no newer one was found.\nInstall one (from python.org, your package "
        "manager or Homebrew) and run this again."
    )


def ensure_environment(groups):
    """Install the package in ``.venv`` with optional ``groups``; return its Python.

    The environment is reused while the Python, the kind of MLX and the parts of
    pyproject.toml that decide what is installed stay the same, and is created again
    otherwise.
    """
    mlx = _mlx_extra()
    fingerprint = _fingerprint(mlx)
    wanted = {*groups, *mlx}
    have = _installed_extras(fingerprint)
    python = str(VENV / "bin" / "python")
    if have is None:
        _make_venv()
    elif wanted <= have:
        return python
    extras = sorted(wanted | (have or set()))
    print("Installing moeflux-mlx [{}]".format(", ".join(extras)), flush=True)
    project = "{}[{}]".format(ROOT, ",".join(extras))
    _run(python, "-m", "pip", "install", "--quiet", "--editable", project)
    STAMP.write_text(json.dumps({"fingerprint": fingerprint, "extras": extras}))
    return python


def venv_problem():
    """Return why this Python cannot create an environment with MLX, or None."""
    if sys.platform == "darwin" and platform.machine() != "arm64":
        return (
            "MLX needs Apple silicon and a native Python, but this one runs as "
            f"{platform.machine()}."
        )
    if sys.platform not in ("darwin", "linux"):
        return f"MLX runs on macOS and Linux (on Windows, in WSL), not {sys.platform}."
    try:
        import ensurepip  # noqa: F401
    except ImportError:
        version = "{}.{}".format(*sys.version_info)
        return (
            f"{sys.executable} cannot make virtual environments: its module ensurepip "
            "is missing. On Debian and Ubuntu it comes with\n"
            f"    sudo apt install python{version}-venv"
        )
    return None


def nvidia_driver():
    """Return the major version of a working NVIDIA driver, or None."""
    smi = shutil.which("nvidia-smi")
    if smi:
        query = [smi, "--query-gpu=driver_version", "--format=csv,noheader"]
        answer = subprocess.run(query, capture_output=True)
        found = re.match(r"(\d+)\.", answer.stdout.decode(errors="replace"))
        if found:
            return int(found.group(1))
    try:
        version = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        return None
    found = re.search(r"\s(\d{3,})\.\d+", version)
    return int(found.group(1)) if found else None


def _mlx_extra():
    """Return the extra with MLX's library for this machine; Metal needs none."""
    if sys.platform == "darwin":
        return []
    driver = nvidia_driver()
    if driver is not None and driver < OLDEST_CUDA_DRIVER:
        print(f"CUDA 13 needs driver {OLDEST_CUDA_DRIVER}, this is {driver}: using CPU")
    return ["cuda" if (driver or 0) >= OLDEST_CUDA_DRIVER else "cpu"]


def _make_venv():
    problem = venv_problem()
    if problem:
        _fail(problem)
    print(f"Making a virtual environment in {VENV}", flush=True)
    _run(sys.executable, "-m", "venv", "--clear", str(VENV))


def _installed_extras(fingerprint):
    try:
        stamp = json.loads(STAMP.read_text())
    except (OSError, ValueError):
        return None
    return set(stamp["extras"]) if stamp["fingerprint"] == fingerprint else None


def _fingerprint(mlx):
    # An older Python has no tomllib, and gets no further than ensure_python.
    import tomllib

    text = (ROOT / "pyproject.toml").read_text()
    try:
        tables = tomllib.loads(text)
        setuptools = tables["tool"]["setuptools"]
        text = json.dumps([tables["build-system"], tables["project"], setuptools])
    except (ValueError, KeyError):
        # pip will say why it cannot install this.
        pass
    parts = [text, sys.version, str(ROOT), *mlx]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _is_new_enough(python):
    check = f"import sys; sys.exit(sys.version_info < {OLDEST_PYTHON})"
    return subprocess.run([python, "-c", check], stderr=subprocess.PIPE).returncode == 0


def _run(*command):
    # Run in ROOT, because Python searches the working directory for modules first.
    done = subprocess.run(command, cwd=str(ROOT))
    if done.returncode:
        _fail("Failed with exit code {}: {}".format(done.returncode, " ".join(command)))


def _fail(message):
    print(message, file=sys.stderr)
    sys.exit(1)
