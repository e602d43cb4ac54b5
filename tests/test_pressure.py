"""The system's signals of low memory, and the experts that are evicted for it."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import mlx.core as mx
import pytest
from mlx_lm.models.cache import make_prompt_cache
from test_limits import V2, make_root

import moeflux_mlx
from moeflux_mlx import device
from moeflux_mlx.memory import relief
from moeflux_mlx.memory.relief import CALM_SECONDS, LOOK_SECONDS, STEP_SECONDS, Relief
from moeflux_mlx.system import pressure
from moeflux_mlx.system.pressure import Pressure, memory_pressure

NORMAL, WARNING, CRITICAL = Pressure
GROUPS = "sys/fs/cgroup"
SCARCE = "MemTotal:  800 kB\nMemAvailable:  100 kB\nSwapFree:  800 kB\n"
AMPLE = "MemTotal:  800 kB\nMemAvailable:  101 kB\n"
linux = pytest.mark.skipif(sys.platform != "linux", reason="these files are Linux's")


def stalls(some: object, full: object) -> str:
    rest = "avg60=99.00 avg300=99.00 total=123456"
    return f"some avg10={some} {rest}\nfull avg10={full} {rest}\n"


def group(path: str, left: int, text: str) -> dict[str, str]:
    """Return the files of a control group of 800 bytes with ``left`` bytes free."""
    folder = f"{GROUPS}/{path}"
    return {
        f"{folder}/memory.max": "800\n",
        f"{folder}/memory.current": f"{800 - left}\n",
        f"{folder}/memory.pressure": text,
    }


SYSTEM = "proc/pressure/memory"


@linux
@pytest.mark.parametrize(
    ("files", "expected"),
    [
        pytest.param({}, NORMAL, id="nothing-to-read"),
        pytest.param({SYSTEM: stalls("90.00", "90.00")}, NORMAL, id="not-short"),
        pytest.param(
            {SYSTEM: stalls("90.00", "90.00"), "proc/meminfo": AMPLE},
            NORMAL,
            id="stalls-with-memory-to-be-had",
        ),
        *(
            pytest.param(
                {SYSTEM: stalls(some, full), "proc/meminfo": SCARCE},
                expected,
                id=f"some-{some}-full-{full}",
            )
            for some, full, expected in [
                ("9.99", "9.99", NORMAL),
                ("10.00", "9.99", WARNING),
                ("10.00", "10.00", CRITICAL),
                ("100.00", "0.00", WARNING),
            ]
        ),
        pytest.param(
            group("a/b", 100, stalls("50.00", "0.00")), WARNING, id="own-group"
        ),
        pytest.param(
            group("a", 100, stalls("50.00", "50.00")), CRITICAL, id="group-above"
        ),
        pytest.param(
            group("a/b", 101, stalls("50.00", "50.00")), NORMAL, id="group-with-room"
        ),
        pytest.param(
            group("c", 0, stalls("50.00", "50.00")), NORMAL, id="another-group"
        ),
        pytest.param(
            {
                **group("a/b", 100, stalls("50.00", "0.00")),
                SYSTEM: stalls("50.00", "50.00"),
            },
            CRITICAL,
            id="the-worst-counts",
        ),
        *(
            pytest.param(
                {SYSTEM: text, "proc/meminfo": SCARCE}, NORMAL, id=f"nonsense-{i}"
            )
            for i, text in enumerate(
                ["", "some\n", "some avg10=\n", "some avg10=x avg60=1\n", "\0\xff" * 99]
            )
        ),
        pytest.param(
            {SYSTEM: stalls("50.00", "0.00"), "proc/meminfo": "MemTotal: many\n"},
            NORMAL,
            id="memory-nobody-counts",
        ),
    ],
)
def test_linux_reports_low_memory(files, expected, tmp_path):
    mounts = V2.format(top="/", at="/" + GROUPS)
    root = make_root(tmp_path, "0::/a/b\n", mounts, files)
    assert memory_pressure(root) is expected


@linux
def test_an_unreadable_file_means_no_pressure(tmp_path):
    root = make_root(tmp_path, "", "", {"proc/meminfo": SCARCE})
    (root / SYSTEM).mkdir(parents=True)
    assert memory_pressure(root) is NORMAL
    assert memory_pressure(tmp_path / "nowhere") is NORMAL


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (1, NORMAL),
        (2, WARNING),
        (4, CRITICAL),
        (3, NORMAL),
        (0, NORMAL),
        (None, NORMAL),
    ],
)
def test_macos_reports_low_memory_by_a_number(number, expected, monkeypatch):
    monkeypatch.setattr(pressure, "_macos_level", lambda: number)
    monkeypatch.setattr(sys, "platform", "darwin")
    assert memory_pressure() is expected


@linux
def test_a_system_without_that_number_reports_no_pressure():
    # Linux's library lacks this function, as a later macOS may.
    assert pressure._macos_level() is None
    assert pressure.level_of(None) is NORMAL


class Watched:
    """A pool's relief under a given pressure, at a given time."""

    def __init__(self, least: int = 6, wanted: int = 64):
        self.now, self.level, self.n_looks, self.wanted = 0.0, NORMAL, 0, wanted
        streamer = SimpleNamespace(
            least_slots=least, stays=False, rounded=lambda n_slots: n_slots
        )
        self.relief = Relief(streamer, self.pressure, lambda: self.now)

    def pressure(self) -> Pressure:
        self.n_looks += 1
        return self.level

    def slots(self, seconds: float, level: Pressure) -> list[int]:
        """Return the successive sizes in this many seconds of pressure."""
        self.level, end, sizes = level, self.now + seconds, []
        while self.now < end:
            changed = self.relief.look(self.wanted)
            if changed:
                sizes.append(self.relief.n_slots(self.wanted))
            self.now += LOOK_SECONDS / 4
        return sizes


def test_a_pool_shrinks_step_by_step_down_to_the_need_of_a_token(capsys):
    watched = Watched()
    assert watched.slots(10, NORMAL) == []
    assert watched.slots(STEP_SECONDS, WARNING) == [48]
    assert watched.slots(STEP_SECONDS, CRITICAL) == [24]
    assert watched.slots(10 * STEP_SECONDS, CRITICAL) == [12, 6]
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4
    assert lines[1] == (
        "moeflux: warning: the system is short of memory (critical), so experts "
        "give way: 24 of 48 stay in memory"
    )


def test_it_grows_back_slowly_once_the_system_is_calm(capsys):
    watched = Watched()
    watched.slots(10 * STEP_SECONDS, CRITICAL)
    assert watched.slots(CALM_SECONDS - 2 * LOOK_SECONDS, NORMAL) == []
    assert watched.slots(CALM_SECONDS, NORMAL) == [14]
    # A moment of pressure makes it wait again.
    assert watched.slots(LOOK_SECONDS, WARNING) == [10]
    assert watched.slots(CALM_SECONDS - 2 * LOOK_SECONDS, NORMAL) == []
    sizes = watched.slots(10 * CALM_SECONDS, NORMAL)
    assert sizes == sorted(sizes) and sizes[-1] == 64 and len(sizes) >= 6
    assert capsys.readouterr().err.splitlines()[-1].endswith("get theirs back")
    assert watched.slots(10 * CALM_SECONDS, NORMAL) == []


def test_the_system_is_checked_at_most_once_a_second():
    watched = Watched()
    watched.slots(20, WARNING)
    assert watched.n_looks == 20 / LOOK_SECONDS


@pytest.fixture
def hurried(monkeypatch):
    """A settable pressure, with checks and steps without a pause."""
    for name in ("LOOK_SECONDS", "STEP_SECONDS", "CALM_SECONDS"):
        monkeypatch.setattr(relief, name, 0.0)
    stated = SimpleNamespace(level=NORMAL)
    monkeypatch.setattr(device, "memory_pressure", lambda: stated.level)
    return stated


PROMPT, N_TOKENS = list(range(1, 40)), 24
LEVELS = [NORMAL, WARNING, CRITICAL, CRITICAL, CRITICAL, *[NORMAL] * 10]


def decode(model, stated=None):
    """Return greedy tokens with their logits, and the experts in memory at each."""
    cache, found, sizes = make_prompt_cache(model), [], []
    tokens = PROMPT
    for i in range(N_TOKENS):
        if stated is not None:
            stated.level = LEVELS[i % len(LEVELS)]
        logits = model(mx.array([tokens]), cache=cache)[0, -1]
        tokens = [int(mx.argmax(logits))]
        found.append(logits.tolist())
        sizes.append(model.streamer.n_slots)
    return found, sizes


@pytest.mark.sampled
@pytest.mark.parametrize("native", [None, False], ids=["ours", "mlx-lm"])
@pytest.mark.parametrize(
    "bound", [{"memory": "1GB"}, {"expert_memory": "1GB"}], ids=["plan", "no-plan"]
)
def test_logits_stay_the_same_while_experts_are_evicted(packed, hurried, native, bound):
    expected, held = decode(moeflux_mlx.load(packed, native=native, **bound)[0])
    model = moeflux_mlx.load(packed, native=native, **bound)[0]
    most, least = model.streamer.n_slots, model.streamer.least_slots
    found, sizes = decode(model, hurried)
    assert held == [most] * N_TOKENS
    assert found == expected
    assert min(sizes) < most / 4 and min(sizes) >= least
    assert sizes[len(LEVELS) - 1] == most
    assert sizes[1] == int(most * 3 / 4)


@pytest.mark.parametrize("native", [None, False], ids=["ours", "mlx-lm"])
def test_segments_are_replaced_in_steps_where_only_they_give_memory_back(
    packed, hurried, native, monkeypatch
):
    monkeypatch.setattr(device, "returns_pages", lambda: False)
    options = {"expert_memory": "1GB", "native": native}
    expected, _ = decode(moeflux_mlx.load(packed, **options)[0])
    model = moeflux_mlx.load(packed, **options)[0]
    streamer, most = model.streamer, model.streamer.n_slots
    found, sizes = decode(model, hurried)
    assert found == expected
    assert min(sizes) < most / 2 and sizes[1] == int(most * 3 / 4)
    assert sizes[len(LEVELS) - 1] == most
    eighths = {n * most // 8 for n in range(9)}
    assert eighths.union([streamer.least_slots]) >= set(sizes)
    taken = streamer.n_slots * streamer.slot_bytes + streamer.slack_bytes
    assert streamer.memory_bytes == taken


def test_a_long_call_without_caches_evicts_experts_before_it_begins(packed, hurried):
    model = moeflux_mlx.load(packed, expert_memory="1GB")[0]
    most = model.streamer.n_slots
    expected = model(mx.array([PROMPT])).tolist()
    hurried.level = CRITICAL
    assert model(mx.array([PROMPT])).tolist() == expected
    assert model.streamer.n_slots == most // 2


def test_experts_that_a_gradient_reads_stay(packed, hurried):
    model = moeflux_mlx.load(packed, expert_memory="1GB")[0]
    most = model.streamer.n_slots
    model.streamer.stay()
    hurried.level = CRITICAL
    found, sizes = decode(model)
    assert sizes == [most] * N_TOKENS and len(found) == N_TOKENS


def test_low_system_memory_does_not_concern_a_gpu_with_its_own_memory(monkeypatch):
    monkeypatch.setattr(device, "system_pressure", lambda: CRITICAL)
    monkeypatch.setattr(mx.cuda, "is_available", lambda: True)
    assert device.memory_pressure() is CRITICAL
    monkeypatch.setattr(device, "on_cpu", lambda: False)
    assert device.memory_pressure() is NORMAL
