"""Shared by every test: device markers and small checkpoints on disk."""

from __future__ import annotations

import contextlib
import functools
import gc
import os
import signal
import subprocess
from collections.abc import Callable, Generator, Iterable, Iterator
from pathlib import Path

import mlx.core as mx
import pytest
from commands import python
from hypothesis import settings
from native_family_table import write
from tiny import make_checkpoint

from moeflux_mlx import device
from moeflux_mlx.calls.transforms import compiles
from moeflux_mlx.cli.inspect import summarize
from moeflux_mlx.experts.files.pack import pack
from moeflux_mlx.measure.compare import process
from moeflux_mlx.system.pressure import Pressure

# Have pytest explain assertions of helpers as it explains those of tests.
pytest.register_assert_rewrite("native_models")

NEEDS = {
    "metal": (mx.metal.is_available(), "needs Apple silicon with Metal"),
    "cuda": (mx.cuda.is_available(), "needs an NVIDIA GPU with MLX's CUDA backend"),
}


# No test has a deadline: machines are busy.
settings.register_profile("moeflux", deadline=None)
settings.load_profile("moeflux")

# Tests that need no GPU run on the CPU, as on a machine without a GPU.
mx.set_default_device(mx.cpu)

# This machine's tuning file must not affect tests or the processes they start.
os.environ["MOEFLUX_TUNING"] = "0"

# A shell lets background jobs ignore Ctrl-C, but tests send it.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def calm_system(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretend that the system has enough memory, whatever else runs here."""
    monkeypatch.setattr(device, "system_pressure", lambda: Pressure.NORMAL)


@pytest.fixture(autouse=True)
def pages_return(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pretend that the system takes back single pages, except on GPUs."""
    if not any(map(request.node.get_closest_marker, NEEDS)):
        monkeypatch.setattr(device, "returns_pages", lambda: True)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the flag that runs every test."""
    every = "also run what is slow, and every case of tests that have many"
    parser.addoption("--all", action="store_true", help=every)


def pytest_collection_modifyitems(
    config: pytest.Config, items: list[pytest.Item]
) -> None:
    """Leave out tests that need ``--all``; skip tests for an absent device."""
    named = any("::" in word for word in config.args)
    if not (config.getoption("--all") or named):
        left_out = set(only_with_all(items))
        config.hook.pytest_deselected(items=[i for i in items if i in left_out])
        items[:] = [item for item in items if item not in left_out]
    for item in items:
        for marker, (is_here, reason) in NEEDS.items():
            if not is_here and item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Exclude all objects made so far from later garbage collections.

    Several tests collect garbage, and thousands of collected tests make that slow.
    """
    gc.disable()
    found = yield
    gc.enable()
    gc.collect()
    gc.freeze()
    return found


# The memory of the interpreter as tests of plans state it.
OWN_BYTES = 100 << 20


def hold_own_bytes(monkeypatch) -> None:
    """Pretend that the interpreter's memory is constant: that of the tests grows."""
    for name in ("moeflux_mlx.memory.plan", "moeflux_mlx.streaming"):
        monkeypatch.setattr(f"{name}.own_bytes", lambda: OWN_BYTES)
    monkeypatch.setattr("moeflux_mlx.device.process_bytes", lambda: None)


def only_with_all(items: Iterable[pytest.Item]) -> Iterator[pytest.Item]:
    """Yield slow tests and, for each sampled test, all cases but the first."""
    begun = set()
    for item in items:
        test = item.nodeid.partition("[")[0]
        is_repeated = item.get_closest_marker("sampled") and test in begun
        if is_repeated or item.get_closest_marker("slow"):
            yield item
        begun.add(test)


@pytest.fixture(autouse=True)
def on_gpu_if_marked(request: pytest.FixtureRequest) -> Iterator[None]:
    """Run tests marked for a GPU on the GPU."""
    marked = any(map(request.node.get_closest_marker, NEEDS))
    with mx.stream(mx.gpu) if marked else contextlib.nullcontext():
        yield


@pytest.fixture(autouse=True)
def compiles_again() -> Iterator[None]:
    """Free trained models: MLX compiles nothing while one exists."""
    yield
    if not compiles():
        gc.collect()


@pytest.fixture(scope="module")
def forked_sides() -> Iterator[None]:
    """Fork each side of a comparison from a process that has imported mlx-lm."""

    def run_module(module: str, *args: str) -> subprocess.CompletedProcess[str]:
        return python("-m", module, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(process, "run_module", run_module)
        yield


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain mlx-lm checkpoint: random, 4-bit, float32."""
    return make_checkpoint(tmp_path_factory.mktemp("models") / "plain")


@pytest.fixture(scope="session")
def packed(checkpoint: Path) -> Path:
    """The same model as a pack, whose experts can be streamed."""
    path = checkpoint.with_name("packed")
    pack(checkpoint, path)
    return path


@pytest.fixture(scope="session")
def budget(packed: Path) -> str:
    """Memory for a quarter of the packed model's experts."""
    summary = summarize(packed)
    least, full = summary.minimum_bytes, summary.full_bytes
    return str(least + (full - least) // 4)


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """A function that writes a family's configuration once, and returns the path."""

    @functools.cache
    def write_once(family: str, config: str) -> Path:
        return write(tmp_path_factory.mktemp(family) / config, family, config)

    return write_once


@pytest.fixture
def plain(request: pytest.FixtureRequest, written: Callable[[str, str], Path]) -> Path:
    """A checkpoint of the family and configuration that a test asks for."""
    return written(*request.param)


@pytest.fixture
def plain_packed(plain: Path) -> Path:
    """The same model, packed."""
    path = plain.with_name("packed")
    if not path.exists():
        pack(plain, path)
    return path
