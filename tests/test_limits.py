"""Limits of memory: control groups, ulimits, the machine; and code that obeys them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from commands import python
from sparse import make_sparse_checkpoint

import moeflux_mlx
from moeflux_mlx import device, loading
from moeflux_mlx.errors import BudgetError, one_line_errors
from moeflux_mlx.system import limits

MIB = 1 << 20
linux = pytest.mark.skipif(sys.platform != "linux", reason="these limits are Linux's")


def make_root(root: Path, cgroup: str, mounts: str, files: dict[str, str]) -> Path:
    """Write a system's files about control groups below a directory."""
    proc = root / "proc/self"
    proc.mkdir(parents=True)
    (proc / "cgroup").write_text(cgroup)
    (proc / "mountinfo").write_text(mounts)
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


V1 = "14 31 0:32 {top} {at} rw,relatime - cgroup cgroup rw,memory\n"
V2 = "29 23 0:26 {top} {at} rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n"


@pytest.mark.parametrize(
    "cgroup, mounts, files, expected",
    [
        pytest.param(
            "0::/\n",
            V2.format(top="/", at="/sys/fs/cgroup"),
            {"sys/fs/cgroup/memory.max": "300\n"},
            [(300, 300)],
            id="v2-root",
        ),
        pytest.param(
            "0::/a.slice/b/c\n",
            V2.format(top="/", at="/sys/fs/cgroup"),
            {
                "sys/fs/cgroup/a.slice/memory.max": "700\n",
                "sys/fs/cgroup/a.slice/memory.current": "500\n",
                "sys/fs/cgroup/a.slice/memory.stat": "anon 300\nfile 150\n",
                "sys/fs/cgroup/a.slice/b/memory.max": "900\n",
                "sys/fs/cgroup/a.slice/b/memory.high": "800\n",
                "sys/fs/cgroup/a.slice/b/c/memory.max": "max\n",
            },
            [(800, 800), (700, 350)],
            id="v2-nested",
        ),
        pytest.param(
            "4:memory:/docker/x\n1:name=systemd:/\n",
            V1.format(top="/", at="/sys/fs/cgroup/memory"),
            {
                "sys/fs/cgroup/memory/docker/x/memory.limit_in_bytes": "400\n",
                "sys/fs/cgroup/memory/docker/x/memory.usage_in_bytes": "450\n",
                "sys/fs/cgroup/memory/docker/memory.limit_in_bytes": "9000\n",
            },
            [(400, 0), (9000, 9000)],
            id="v1-nested",
        ),
        pytest.param(
            "4:cpu,memory:/docker/x\n",
            V1.format(top="/docker/x", at="/sys/fs/cgroup/memory"),
            {"sys/fs/cgroup/memory/memory.limit_in_bytes": "400\n"},
            [(400, 400)],
            id="v1-mounted-in-a-container",
        ),
        pytest.param(
            "4:memory:/a\n0::/a\n",
            V1.format(top="/", at="/sys/fs/cgroup/memory")
            + V2.format(top="/", at="/sys/fs/cgroup/unified"),
            {
                "sys/fs/cgroup/memory/a/memory.limit_in_bytes": "400\n",
                "sys/fs/cgroup/unified/a/cgroup.procs": "1\n",
            },
            [(400, 400)],
            id="hybrid",
        ),
        pytest.param(
            "0::/../other\n",
            V2.format(top="/", at="/mnt/my\\040groups"),
            {"mnt/my groups/memory.max": "300\n"},
            [(300, 300)],
            id="outside-the-namespace-at-a-path-with-a-blank",
        ),
        pytest.param("0::/a\n", "", {}, [], id="nothing-mounted"),
        pytest.param(
            "7:cpu:/a\n",
            "14 31 0:32 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n",
            {"sys/fs/cgroup/cpu/a/memory.limit_in_bytes": "1\n"},
            [],
            id="another-controller",
        ),
    ],
)
def test_groups_are_found_at_every_level(cgroup, mounts, files, expected, tmp_path):
    root = make_root(tmp_path, cgroup, mounts, files)
    assert [tuple(group) for group in limits.groups(root)] == expected
    if expected:
        least, left = (min(numbers) for numbers in zip(*expected, strict=True))
        assert limits.memory_limit_bytes(root) == least
        assert limits.memory_left_bytes(root) == left


def test_a_system_without_groups_has_the_machines_memory(tmp_path):
    assert limits.memory_limit_bytes(tmp_path) == limits.machine_bytes() > 256 * MIB


def test_free_memory_counts_swap_and_droppable_pages(tmp_path):
    root = make_root(tmp_path, "", "", {})
    text = "MemTotal: 9 kB\nMemFree: 1 kB\nMemAvailable: 5 kB\nSwapFree: 2 kB\n"
    (root / "proc/meminfo").write_text(text)
    assert limits.memory_left_bytes(root) == 7 * 1024


ULIMITS = {"-d": "RLIMIT_DATA", "-v": "RLIMIT_AS"}


def under_ulimit(ulimit: str, code: str, *arguments: str | Path):
    """Run Python under a limit of bash's ``ulimit``, in KiB."""
    flag, n_kib = ulimit.split()
    limit = f"""\
import resource
resource.setrlimit(resource.{ULIMITS[flag]}, 2 * ({int(n_kib) * 1024},))
"""
    return python("-c", limit + code, *arguments)


@pytest.mark.slow
@linux
@pytest.mark.parametrize("ulimit", ["-v 3000000", "-d 1500000"])
def test_ulimits_bound_the_default_amount_of_memory(ulimit):
    code = "from moeflux_mlx import device; print(device.physical_memory_bytes())"
    done = under_ulimit(ulimit, code)
    assert done.returncode == 0, done.stderr
    assert 200 * MIB < int(done.stdout) < 1024 * int(ulimit.split()[1])


ALLOCATE = """
import sys
import mlx.core as mx
from moeflux_mlx.system import limits
from moeflux_mlx.errors import BudgetError, one_line_errors
from moeflux_mlx.experts.pool.pool import aligned_rows

left = limits.memory_left_bytes()
for share in map(float, sys.argv[1:]):
    try:
        rows = aligned_rows(int(share * left) >> 20, 1 << 20)
    except BudgetError as error:
        print(error)
    else:
        print("got", rows.nbytes)
"""


@pytest.mark.slow
@linux
@pytest.mark.parametrize("ulimit", ["-v 3000000", "-d 1500000"])
def test_unavailable_memory_is_an_error_not_a_signal(ulimit):
    done = under_ulimit(ulimit, ALLOCATE, "0.99999", "1.01", "2", "1000", "0.3")
    assert done.returncode == 0, done
    *refused, had = done.stdout.splitlines()
    assert len(refused) == 4 and had.startswith("got "), done
    assert all(line.startswith("[pool] cannot allocate ") for line in refused)


def test_an_allocation_beyond_any_machine_is_refused():
    for n_bytes in (1 << 50, 1 << 70):
        with pytest.raises(BudgetError, match=r"^\[pool\] cannot allocate \d+ bytes"):
            device.check_allocation(n_bytes, "pool")


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> tuple[Path, int]:
    """A plain model with 1.7 GB of experts, most of them a hole in the file."""
    path = tmp_path_factory.mktemp("limits") / "large"
    sizes = dict(hidden_size=1024, moe_intermediate_size=1024, num_experts=256)
    return path, make_sparse_checkpoint(path, **sizes, num_hidden_layers=4)


GENERATE = """
import sys
from moeflux_mlx.cli import main
fixed = "--prompt hi --max-tokens 2 --temp 0 --ignore-chat-template --verbose False"
sys.exit(main(["generate", *fixed.split(), "--model", *sys.argv[1:]]))
"""


@pytest.mark.slow
@linux
def test_a_model_that_does_not_fit_is_refused_unread_and_runs_as_advised(large):
    path, n_bytes = large
    assert n_bytes > 1.7e9
    done = under_ulimit("-d 1200000", GENERATE, path)
    assert done.returncode == 2, done
    assert done.stderr.count("\n") == 1, done.stderr
    assert f"[load] {path}: expected 1." in done.stderr
    bound = done.stderr.partition("--memory ")[2].split()[0]
    done = under_ulimit("-d 1200000", GENERATE, path, "--memory", bound)
    assert done.returncode == 0, done.stderr
    unlimited = python("-c", GENERATE, path, "--memory", bound)
    assert done.stdout.strip() and done.stdout == unlimited.stdout


@pytest.mark.slow
@linux
@pytest.mark.parametrize("memory", ["auto", "4GB"])
def test_address_space_that_is_too_small_ends_in_one_line(large, memory):
    done = under_ulimit("-v 1000000", GENERATE, large[0], "--memory", memory)
    *told, _ = done.stderr.splitlines()
    assert done.returncode == 2 and len(told) <= 1, done
    assert all(line.startswith("moeflux: before loading ") for line in told)
    assert "[memory] expected at least " in done.stderr
    assert "that ulimit leaves beside the stacks of" in done.stderr


GROW = """
import resource, sys
import mlx.core as mx
import moeflux_mlx
from mlx_lm.models.cache import make_prompt_cache
from moeflux_mlx.errors import BudgetError, one_line_errors

path, kind, field, room = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
used = int(open("/proc/self/statm").read().split()[field]) * resource.getpagesize()
most = used + (room << 20)
resource.setrlimit(getattr(resource, kind), (most, most))
kept = []
try:
    model, _ = moeflux_mlx.load(path, memory="4GB")
    while len(kept) < 10_000:
        cache = make_prompt_cache(model)
        mx.eval(model(mx.array([[1, 2]]), cache=cache))
        for c in cache:
            if hasattr(c, "offset"):
                shape = (*c.keys.shape[:2], 2048, c.keys.shape[3])
                c.keys, c.values = mx.ones(shape), mx.ones(shape)
                mx.eval(c.keys, c.values)
        kept.append(cache)
except BudgetError as error:
    print(len(kept), error)
"""


@pytest.mark.slow
@linux
@pytest.mark.parametrize(
    "kind, field, room, least",
    [
        ("RLIMIT_DATA", 5, 10, 0),
        ("RLIMIT_DATA", 5, 60, 0),
        ("RLIMIT_DATA", 5, 400, 1),
        ("RLIMIT_AS", 0, 100, 0),
    ],
)
def test_a_budget_beyond_a_ulimit_ends_in_its_error(large, kind, field, room, least):
    done = python("-c", GROW, large[0], kind, field, room)
    assert done.returncode == 0, done
    n_kept, _, message = done.stdout.partition(" ")
    assert int(n_kept) >= least and message.startswith(("[memory]", "[pool]")), done


def test_a_model_that_does_not_fit_is_refused_unless_its_user_knows_better(
    checkpoint, packed, monkeypatch
):
    monkeypatch.setattr(device, "left_bytes", lambda: 1000)
    for path in (checkpoint, packed):
        with pytest.raises(BudgetError) as caught:
            moeflux_mlx.load(path)
        assert str(caught.value).startswith(f"[load] {path}: expected ")
        assert "of free memory" in str(caught.value) and "--memory " in str(
            caught.value
        )
        for asked in ({"lazy": True}, {"memory": "1GB"}, {"expert_memory": "1GB"}):
            if path == packed and "lazy" in asked:
                continue
            model, _ = moeflux_mlx.load(path, **asked)
            assert model.runtime.streamer is None or model.runtime.streamer.n_slots


def test_unbounded_experts_leave_memory_for_the_rest(packed, monkeypatch):
    """With little memory left, the default streams into the remaining memory."""
    model, _ = moeflux_mlx.load(packed)
    needs, slot = model.needs, model.streamer.slot_bytes
    assert model.streamer.resident
    others = needs.resident_bytes(False) + device.PROCESS_GROWTH_BYTES
    others += needs.cache_state_bytes + 2048 * needs.cache_row_bytes
    others += needs.scratch_bytes(2048, 2048)
    left = others + model.streamer.slack_bytes + 5 * slot
    monkeypatch.setattr(device, "left_bytes", lambda: left)
    assert moeflux_mlx.load(packed)[0].streamer.n_slots == 5


@pytest.mark.slow
@linux
def test_compare_refuses_a_model_that_stock_cannot_hold(large):
    code = "import sys; from moeflux_mlx.cli import main; sys.exit(main(sys.argv[1:]))"
    done = under_ulimit("-d 1200000", code, "compare", large[0])
    assert done.returncode == 2 and "--memory" in done.stderr, done
    assert done.stderr.count("\n") == 1


def test_an_impossible_allocation_is_an_error_of_ours(tmp_path, monkeypatch):
    def nothing(*_):
        raise MemoryError

    told = pytest.raises(BudgetError, match=r"^\[memory\] \[load\] x: this process")
    with told, one_line_errors("[load] x"):
        nothing()
    monkeypatch.setattr(loading, "find_model", nothing)
    with pytest.raises(BudgetError, match=r"^\[memory\] \[load\]: .* raise its limit"):
        moeflux_mlx.load(tmp_path)
