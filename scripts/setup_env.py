"""Make the repository's virtual environment with the MLX that fits this machine.

Only the standard library, and syntax that an old Python still parses: this file has
to run, and to say clearly what is missing, before anything is installed.
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
# mlx-lm needs this one.
OLDEST_PYTHON = (3, 11)
NEWER_NAMES = ["python3.13", "python3.12", "python3.11", "python3.14"]
# The first NVIDIA driver that runs programs built with CUDA 13.
OLDEST_CUDA_DRIVER = 580


def ensure_python():
    """Return if this Python can be used, else start again under one that can."""
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

    The environment is used again while pyproject.toml, the Python and the kind of
    MLX stay the same, and made afresh otherwise.
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
    """Say why this Python cannot make an environment with MLX, or return None."""
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
    """Return the major version of a working NVIDIA driver, None without one."""
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
    """Name the extra that brings MLX's library here: Metal needs none."""
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
    parts = [(ROOT / "pyproject.toml").read_text(), sys.version, str(ROOT), *mlx]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _is_new_enough(python):
    check = f"import sys; sys.exit(sys.version_info < {OLDEST_PYTHON})"
    return subprocess.run([python, "-c", check], stderr=subprocess.PIPE).returncode == 0


def _run(*command):
    # Not where it was started: Python looks there for modules first.
    done = subprocess.run(command, cwd=str(ROOT))
    if done.returncode:
        _fail("Failed with exit code {}: {}".format(done.returncode, " ".join(command)))


def _fail(message):
    print(message, file=sys.stderr)
    sys.exit(1)
