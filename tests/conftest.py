"""What every test shares: device markers and small checkpoints on disk."""

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
from families import write
from hypothesis import settings
from tiny import make_checkpoint

from moeflux_mlx import device
from moeflux_mlx.calls.transforms import compiles
from moeflux_mlx.cli.inspect import summarize
from moeflux_mlx.experts.files.pack import pack
from moeflux_mlx.measure.compare import process
from moeflux_mlx.system.pressure import Pressure

# Their assertions are to say as much as those of the tests that call them.
pytest.register_assert_rewrite("native_models")

NEEDS = {
    "metal": (mx.metal.is_available(), "needs Apple silicon with Metal"),
    "cuda": (mx.cuda.is_available(), "needs an NVIDIA GPU with MLX's CUDA backend"),
}


# No test is held to a time: machines are busy.
settings.register_profile("moeflux", deadline=None)
settings.load_profile("moeflux")

# What needs no GPU runs on the CPU, as it does where there is nothing else.
mx.set_default_device(mx.cpu)

# What was tuned on this machine decides nothing here, nor in processes started here.
os.environ["MOEFLUX_TUNING"] = "0"

# A shell has what it runs in the background ignore Ctrl-C, which tests press.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def calm_system(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the system short of no memory, whatever else runs here."""
    monkeypatch.setattr(device, "system_pressure", lambda: Pressure.NORMAL)


@pytest.fixture(autouse=True)
def pages_return(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Have the system take single pages back, whatever is here, except on GPUs."""
    if not any(map(request.node.get_closest_marker, NEEDS)):
        monkeypatch.setattr(device, "returns_pages", lambda: True)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the flag that has every test run."""
    every = "also run what is slow, and every case of tests that have many"
    parser.addoption("--all", action="store_true", help=every)


def pytest_collection_modifyitems(
    config: pytest.Config, items: list[pytest.Item]
) -> None:
    """Leave out what only ``--all`` runs; skip tests for a device that is not here."""
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
    """Leave what is loaded by now out of every later search for garbage.

    Several tests search, and thousands of collected tests make each search long.
    """
    gc.disable()
    found = yield
    gc.enable()
    gc.collect()
    gc.freeze()
    return found


def only_with_all(items: Iterable[pytest.Item]) -> Iterator[pytest.Item]:
    """Yield slow tests, and all cases but the first of those that are sampled."""
    begun = set()
    for item in items:
        test = item.nodeid.partition("[")[0]
        is_repeated = item.get_closest_marker("sampled") and test in begun
        if is_repeated or item.get_closest_marker("slow"):
            yield item
        begun.add(test)


@pytest.fixture(autouse=True)
def on_gpu_if_marked(request: pytest.FixtureRequest) -> Iterator[None]:
    """Run tests marked for a GPU there."""
    marked = any(map(request.node.get_closest_marker, NEEDS))
    with mx.stream(mx.gpu) if marked else contextlib.nullcontext():
        yield


@pytest.fixture(autouse=True)
def compiles_again() -> Iterator[None]:
    """Let go of models that were trained: MLX compiles nothing while there are some."""
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
    """The same model, packed: its experts can be streamed."""
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
    """What writes a checkpoint of a family's configuration once, and gives its path."""

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
