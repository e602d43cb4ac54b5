"""Run the scripts as a user runs them."""

from __future__ import annotations

import argparse
import csv
import dataclasses
import importlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType, SimpleNamespace

import commands
import mlx.core as mx
import numpy as np
import pytest
from conftest import only_with_all
from stated_gpu import stated_gpu

from moeflux_mlx import device
from moeflux_mlx.engine.executors import open_executor
from moeflux_mlx.engine.launch import KERNELS
from moeflux_mlx.measure.timing import Timing

ROOT = Path(__file__).resolve().parent.parent
OLD_PYTHONS = ["python3.10", "python3.9", "python3.8", "python3.7", "python3.6"]


def run(*command: str | Path, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        env={**os.environ, **env},
    )


@pytest.mark.slow
def test_a_geometry_is_measured_and_written(tmp_path, monkeypatch, capsys):
    """This is tiny, on the CPU, where stock's bfloat16 is imprecise: relax the gate."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    bench = importlib.import_module("bench_geometry")
    tiny = dict(
        bench.GEOMETRIES["qwen3.6-35b-a3b"],
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        head_dim=64,
        linear_num_value_heads=4,
        linear_num_key_heads=2,
        linear_key_head_dim=64,
        linear_value_head_dim=64,
        num_experts=16,
        moe_intermediate_size=64,
        shared_expert_intermediate_size=64,
        vocab_size=512,
    )
    monkeypatch.setitem(bench.GEOMETRIES, "tiny", tiny)
    parser = argparse.ArgumentParser()
    for name in ("--repeats", "--decode-tokens"):
        parser.add_argument(name, type=int, default=2)
    bench.add_arguments(parser)
    rows = tmp_path / "rows.csv"
    flags = ["--geometry", "tiny", "--executor", "ops", "--context", "9"]
    profile = tmp_path / "profile.csv"
    flags += ["--prefill", "5", "--profile", str(profile)]
    args = parser.parse_args([*flags, "--csv", str(rows)])
    monkeypatch.setattr(bench, "MAX_RATIO", 0)
    with monkeypatch.context() as patch:
        patch.setattr(device, "most_matrices", lambda *_: 7)
        assert bench.main(args) == 1 and not rows.exists()
    # A CPU has no such limit at this size, so stock has the same error in parts.
    said = re.findall(r"(stock|stock in parts) ([\d.]+e-\d+)", capsys.readouterr().out)
    assert [name for name, _ in said] == ["stock", "stock in parts"]
    assert said[0][1] == said[1][1]
    monkeypatch.setattr(bench, "MAX_RATIO", 1.5)
    assert bench.main(args) == 0
    stock, ours = csv.DictReader(rows.read_text().splitlines())
    assert (stock["side"], ours["side"]) == ("stock", "ops")
    assert float(stock["decode_ratio"]) == 1
    assert float(ours["decode_tokens_per_s"]) > 0
    assert float(ours["prefill_tokens_per_s"]) > 0
    assert stock["prefill_tokens_per_s"] == ""
    graphs = [row["graph"] for row in csv.DictReader(profile.read_text().splitlines())]
    assert graphs[0] == "embed" and graphs[-1] == "remainder"


# Smaller than published, with widths that the kernels of the published shapes take.
SMALL = dict(
    vocab_size=512,
    hidden_size=256,
    intermediate_size=128,
    moe_intermediate_size=128,
    n_routed_experts=16,
    num_experts=16,
    num_local_experts=16,
)


@pytest.mark.parametrize(
    ("geometry", "by_layer", "n_others", "n_views"),
    [
        ("qwen3-30b-a3b", "8 8", 2, 8),
        ("qwen3-next-80b-a3b", "6 6 6 9", 2, 11),
        ("glm-4.5-air", "7 8", 2, 8),
        ("deepseek-v3", "10 11", 3, 8),
        ("minimax-m2", "8 8", 2, 8),
        ("gpt-oss-120b", "8 8", 3, 9),
    ],
)
def test_the_hosts_work_for_a_token_is_counted(
    geometry, by_layer, n_others, n_views, monkeypatch, capsys
):
    """MLX's own operations beside launches are few: each costs as much as a launch."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    geometries = importlib.import_module("bench_geometry")
    host = importlib.import_module("bench_host")
    config = geometries.cut({**geometries.MORE_GEOMETRIES[geometry], **SMALL}, 2)
    how = {"context": 600, "repeats": 1, "shows": True}
    stock, ours = host.measure(geometry, config, **how)
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:]]
    assert len(names) == ours["operations"]
    assert sum(name in KERNELS for name in names) == ours["launches"]
    assert ours["by_layer"] == by_layer
    assert ours["without_views"] - ours["launches"] <= n_others
    assert ours["operations"] - ours["without_views"] <= n_views
    assert ours["without_views"] < stock["without_views"]
    assert ours["host_us"] > 0
    assert device.on_cpu()


def test_a_cut_of_latent_attention_is_built_with_routers_that_choose(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    bench = importlib.import_module("bench_geometry")
    sinks = bench.cut(bench.MORE_GEOMETRIES["gpt-oss-120b"], 3)
    assert len(sinks["layer_types"]) == sinks["num_hidden_layers"] == 3
    tiny = dict(
        bench.MORE_GEOMETRIES["deepseek-v3"],
        hidden_size=128,
        intermediate_size=128,
        moe_intermediate_size=64,
        num_attention_heads=2,
        q_lora_rank=64,
        kv_lora_rank=64,
        qk_rope_head_dim=32,
        qk_nope_head_dim=64,
        v_head_dim=64,
        n_routed_experts=16,
        num_experts_per_tok=4,
        vocab_size=256,
    )
    config = bench.cut(tiny, 2)
    assert config["first_k_dense_replace"] == 1
    models = bench.build(config, "ops")
    assert models["ops"].layers[1].mlp.gate.weight.any()
    off = bench.errors(models, config)
    assert 0 < off["ops"] < 1e-5 < off["stock"]
    rows = [cache.offset for cache in bench.primed(models["ops"], 9)]
    assert rows == [9, 9]


@pytest.mark.parametrize("clear", [True, False])
def test_routers_can_be_made_to_choose_clearly(monkeypatch, clear):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    bench = importlib.import_module("bench_geometry")
    published = bench.MORE_GEOMETRIES["qwen3-next-80b-a3b"]
    small = {**published, **SMALL, "num_experts": 128}
    config = bench.cut({**small, "shared_expert_intermediate_size": 128}, 4)
    models = bench.build(config, "ops", clear=clear)
    exact, k = bench.in_float32(models["stock"], config), config["num_experts_per_tok"]
    gaps = []
    for router in bench.routers(exact):
        inputs = bench.router_inputs(exact, router, config)
        matrix = mx.dequantize(
            router.weight, router.scales, router.biases, **bench.form(router)
        )
        logits = -np.sort(-(inputs @ np.array(matrix).T), axis=-1)
        gaps.append((logits[:, k - 1] - logits[:, k]).min() / logits.std())
    assert len(gaps) == 4
    assert min(gaps) > 0.5 if clear else min(gaps) < 0.01


@pytest.mark.slow
def test_with_a_lead_rounding_chooses_the_same_experts(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    bench = importlib.import_module("bench_geometry")
    published = bench.MORE_GEOMETRIES["qwen3-next-80b-a3b"]
    heads = {"linear_num_value_heads": 8, "linear_num_key_heads": 4}
    heads |= {"num_attention_heads": 4, "num_key_value_heads": 1}
    small = {**published, **SMALL, **heads, "num_experts": 512}
    config = bench.cut({**small, "shared_expert_intermediate_size": 128}, 4)
    with stated_gpu("cuda"):
        off, unclear = (
            bench.errors(bench.build(config, "cuda", clear=clear), config)["cuda"]
            for clear in (True, False)
        )
    assert off < 0.02 < 0.03 < unclear


TINY_EXPERTS = dict(n_experts=12, k=4, dim=128, width=64)
TINY_DELTA = dict(hk=1, hv=2, d=32)
# Families of scripts/bench_kernels at sizes that the simulator runs quickly.
TINY = {
    "matvec": [dict(n_out=24, n_in=128)],
    "norm": [dict(n_out=24, n_in=128)],
    "residual": [dict(n_out=24, n_in=128)],
    "experts": [TINY_EXPERTS],
    "routed": [TINY_EXPERTS],
    "attention": [dict(n_rows=70, heads=8, kv=2, d=64)],
    "copy": [dict(heads=1, d=32)],
    "delta": [dict(t=t, b=b, **TINY_DELTA) for t, b in ((1, 1), (1, 3), (19, 1))],
    "delta_layer": [dict(taps=4, **TINY_DELTA)],
    "product": [dict(t=33, n_out=40, n_in=64)],
    "gather": [dict(t=9, **TINY_EXPERTS)],
}


def loaded(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Return a script as a module."""
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.syspath_prepend(ROOT / "scripts")
    loader = SourceFileLoader(name.partition(".")[0], str(ROOT / "scripts" / name))
    spec = importlib.util.spec_from_loader(loader.name, loader)
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look up their module here.
    monkeypatch.setitem(sys.modules, loader.name, module)
    loader.exec_module(module)
    return module


@pytest.fixture
def bench(monkeypatch) -> ModuleType:
    """scripts/bench_kernels, rotating through only two sets of weights."""
    module = loaded("bench_kernels", monkeypatch)
    monkeypatch.setattr(module, "MAX_TURNS", 2)
    monkeypatch.setattr(module, "CHOICES", 2)
    mx.random.seed(0)
    return module


def slightly_off(step):
    return lambda x, i: [1.01 * y for y in step(x, i)]


@pytest.mark.sampled
@pytest.mark.parametrize("family", TINY)
def test_all_sides_of_a_timed_case_compute_the_same(bench, monkeypatch, family):
    """This uses float32: MLX's bfloat16 is imprecise on the CPU."""
    monkeypatch.setattr(bench, "DTYPE", mx.float32)
    monkeypatch.setattr(bench, "LIMIT", 1e-5)
    assert set(TINY) == set(bench.FAMILIES)
    make, _ = bench.FAMILIES[family]
    for sizes in TINY[family]:
        case = make(open_executor("sim").run, **sizes)
        assert bench.wrong(case) == {}
        *others, (last, ours) = case.sides.items()
        if not others:
            continue
        sides = {**case.sides, last: slightly_off(ours)}
        assert set(bench.wrong(dataclasses.replace(case, sides=sides))) == {last}


@pytest.mark.slow
def test_kernels_are_timed_and_written_beside_the_ceilings(
    bench, monkeypatch, tmp_path
):
    families = {
        name: (bench.FAMILIES[name][0], TINY[name]) for name in ("norm", "delta")
    }
    monkeypatch.setattr(bench, "FAMILIES", families)
    monkeypatch.setattr(bench, "ROUNDS", 1)
    monkeypatch.setattr(bench, "gpu_executor", lambda: "sim")
    monkeypatch.setattr(bench, "ceilings", lambda: (4e9, 2e12))
    monkeypatch.delattr(mx.fast, "gated_delta_update", raising=False)
    path = tmp_path / "rows.csv"
    assert bench.main(["--csv", str(path), "--only", "n*"]) == 0
    mlx, ours = csv.DictReader(path.read_text().splitlines())
    assert (mlx["side"], ours["side"]) == ("mlx", "norm_matvecs")
    assert ours["against"] == "mlx" and float(mlx["x_mlx"]) == 1
    ratio = float(mlx["us"]) / float(ours["us"])
    assert float(ours["x_mlx"]) == pytest.approx(ratio)
    assert float(ours["of_copy"]) == pytest.approx(float(ours["GBps"]) / 4)
    assert (ours["copy_GBps"], ours["bf16_TFLOPps"]) == ("4.0", "2.0")
    assert ours["host_hidden"] in ("yes", "no")
    assert all(ours.values())
    # Without an operation of MLX, mlx-lm's loop counts as MLX's.
    assert bench.main(["--csv", str(path), "--only", "delta"]) == 0
    rows = list(csv.DictReader(path.read_text().splitlines()))
    assert {row["against"] for row in rows} == {"mlx-lm"}


def test_a_step_is_timed_as_its_length_asks(bench, monkeypatch):
    asked = []

    class Scripted:
        def __init__(self, hidden: bool):
            self.hidden = hidden

        def time(self, works):
            asked.append(len(works))
            return Timing(1e-6, self.hidden)

    monkeypatch.setattr(bench, "QUEUED", (4, 2, 1))
    timers = [Scripted(False), Scripted(True), Scripted(True)]
    case = bench.Case("copy", 3 * [mx.ones(64)], {}, 1)

    def timed(seconds: float) -> tuple[Timing, list[int]]:
        chains: list[int] = []

        def chained(works):
            chains.append(len(works))
            return Timing(seconds, True)

        monkeypatch.setattr(bench, "chained", chained)
        return bench.time_side(timers, case, lambda x, _: [x + 1]), chains

    assert timed(1e-5) == (Timing(1e-6, True), [1, 1])
    assert asked == [3, 2]
    assert timed(6e-3) == (Timing(6e-3, True), [1, 1, *bench.ROUNDS * [3]])
    assert timed(9.0) == (Timing(9.0, True), [1, 1])
    assert asked == [3, 2]


def test_ceilings_are_measured(bench):
    copy, bf16 = bench.ceilings(n_bytes=1 << 20, width=64)
    assert copy > 0 and bf16 > 0


def test_chained_steps_follow_one_another(bench):
    seen = []

    def step(x, i):
        seen.append((x, i))
        return [x + 1]

    start = mx.ones(64)
    works = [bench.Work(lambda x, i=i: step(x, i), [start]) for i in range(3)]
    assert bench.chained(works).seconds > 0
    assert [i for _, i in seen] == [0, 1, 2]
    assert seen[0][0] is start and seen[1][0] is not start


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A copy of the files that setup needs, without an environment."""
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def old_python() -> str | None:
    """Find a Python older than the package supports that really starts."""
    found = filter(None, map(shutil.which, OLD_PYTHONS))
    return next((p for p in found if run(p, "-c", "").returncode == 0), None)


def test_an_old_python_is_refused_with_the_needed_version(clone):
    python = old_python()
    if python is None:
        pytest.skip("no Python older than 3.11 on this machine")
    python = run(python, "-c", "import sys; print(sys.executable)").stdout.strip()
    done = run(python, clone / "scripts" / "test", PATH=str(clone))
    assert done.returncode == 1
    assert done.stderr.startswith("Python 3.11 or newer is needed, but this is 3.")
    assert not (clone / ".venv").exists()


def test_a_python_without_ensurepip_is_refused_with_the_package_to_install(clone):
    missing = clone / "missing"
    missing.mkdir()
    (missing / "ensurepip.py").write_text("raise ImportError('not packaged')")
    done = run(sys.executable, clone / "scripts" / "demo", PYTHONPATH=str(missing))
    assert done.returncode == 1
    assert "sudo apt install python3." in done.stderr
    assert "Traceback" not in done.stderr
    assert not (clone / ".venv").exists()


def test_an_environment_of_the_same_project_is_used_again(clone):
    code = """
import json, setup_env
mlx = setup_env._mlx_extra()
stamp = {"fingerprint": setup_env._fingerprint(mlx), "extras": ["test", *mlx]}
setup_env.VENV.mkdir()
setup_env.STAMP.write_text(json.dumps(stamp))
print(setup_env.ensure_environment(["test"]))
with (setup_env.ROOT / "pyproject.toml").open("a") as file:
    print("[tool.other]", file=file, flush=True)
    print(setup_env.ensure_environment(["test"]))
    print("[project.urls]\\nHome = 'https://home'", file=file, flush=True)
    print(setup_env._installed_extras(setup_env._fingerprint(mlx)))
"""
    done = run(sys.executable, "-c", code, PYTHONPATH=str(clone / "scripts"))
    python = str(clone / ".venv" / "bin" / "python")
    assert done.stdout.splitlines() == [python, python, "None"], done.stderr


@pytest.mark.slow
def test_a_failed_install_is_not_taken_for_a_finished_one(clone):
    (clone / "pyproject.toml").write_text("not a project")
    done = run(sys.executable, clone / "scripts" / "demo")
    assert done.returncode == 1
    assert "Failed with exit code" in done.stderr
    assert (clone / ".venv" / "bin" / "python").exists()
    assert not (clone / ".venv" / "installed.json").exists()


@pytest.mark.slow
def test_the_demo_packs_once_and_again_when_the_model_changes(
    checkpoint, budget, tmp_path, monkeypatch
):
    model = tmp_path / "models" / "demo"
    shutil.copytree(checkpoint, model)
    monkeypatch.chdir(tmp_path)
    command = ["-m", "moeflux_mlx.cli.demo", "--max-tokens", 5]
    command += ["--prompt", "def sum", "--expert-memory", budget]

    def demo() -> tuple[str, set[str]]:
        done = commands.python(*command)
        assert done.returncode == 0, done.stderr
        return done.stdout, {pack.name for pack in (tmp_path / "build").iterdir()}

    text, packs = demo()
    assert "def sum" in text
    assert "expert cache hits" in text
    assert len(packs) == 1
    assert demo()[1] == packs
    (model / "generation_config.json").write_text("{}")
    assert len(demo()[1]) == 2


def copy_mlx_without_library(target: Path) -> None:
    """Arrange files as plain ``pip install mlx`` does on Linux: without ``libmlx``."""
    source = Path(mx.__file__).parent
    shutil.copytree(source, target / "mlx", ignore=shutil.ignore_patterns("lib"))


def test_import_without_an_mlx_library_names_the_extra_to_install(tmp_path):
    copy_mlx_without_library(tmp_path)
    paths = os.pathsep.join([str(tmp_path), str(ROOT)])
    done = run(sys.executable, "-c", "import moeflux_mlx", PYTHONPATH=paths)
    last = done.stderr.splitlines()[-1]
    assert last.startswith("moeflux_mlx.errors.BackendError: [backend] expected an MLX")
    if sys.platform == "linux":
        assert "pip install 'moeflux-mlx[cpu]'" in last
        assert "pip install 'moeflux-mlx[cuda]'" in last


@pytest.mark.slow
def test_a_test_for_an_absent_device_skips_with_a_reason(tmp_path):
    for path in (ROOT / "tests").glob("*.py"):
        if not path.name.startswith("test_"):
            shutil.copy(path, tmp_path)
    (tmp_path / "test_device.py").write_text(
        "import pytest\n"
        "@pytest.mark.metal\ndef test_on_metal(): pass\n"
        "@pytest.mark.cuda\ndef test_on_cuda(): pass\n"
    )
    report = run(sys.executable, "-m", "pytest", "-rs", tmp_path).stdout
    metal, cuda = mx.metal.is_available(), mx.cuda.is_available()
    assert ("needs Apple silicon with Metal" in report) != metal
    assert ("needs an NVIDIA GPU with MLX's CUDA backend" in report) != cuda


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_the_reader_is_measured_beside_a_loop_in_c(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    raw = importlib.import_module("streaming_raw")
    monkeypatch.setattr(raw, "RECORD_BYTES", 16_384)
    monkeypatch.setattr(raw, "N_CACHED", 33)
    parser = argparse.ArgumentParser()
    raw.add_arguments(parser)
    csv_file = tmp_path / "raw.csv"
    flags = ["--size", "1500KB", "--repeats", "2", "--threads", "3"]
    places = ["--csv", str(csv_file), "--directory", str(tmp_path)]
    assert raw.run(parser.parse_args([*flags, *places])) == 0
    with open(csv_file, newline="") as file:
        rows = list(csv.DictReader(file))
    sources = {row["source"] for row in rows}
    assert sources >= {"direct", "cached"}
    assert len(rows) == 2 * 2 * len({(row["source"], row["case"]) for row in rows})
    assert {row["side"] for row in rows} == {"ours", "C"}
    assert all(float(row["gbps"]) > 0 for row in rows)
    assert list(tmp_path.iterdir()) == [csv_file]


def test_without_all_slow_tests_and_further_cases_are_left_out():
    marks = {"slow": ["b", "c[1]"], "sampled": ["d[1]", "d[2]", "e"]}

    def item(name: str) -> SimpleNamespace:
        return SimpleNamespace(
            nodeid=f"tests/test_x.py::{name}",
            get_closest_marker=lambda mark: name in marks[mark],
        )

    items = list(map(item, ["a", "b", "c[0]", "c[1]", "d[1]", "d[2]", "e"]))
    left_out = [i.nodeid.partition("::")[2] for i in only_with_all(items)]
    assert left_out == ["b", "c[1]", "d[2]"]


@pytest.mark.parametrize(
    "name", ["bench_kernels", "mutate_kernels", "kernel_registers.py", "bench_commit"]
)
def test_a_pattern_that_names_nothing_is_an_error(name, capsys, monkeypatch):
    script = loaded(name, monkeypatch)
    monkeypatch.setattr(sys, "argv", [name, "--only", "no_such*"])
    with pytest.raises(SystemExit) as ended:
        script.main()
    assert ended.value.code == 2 and "--only: expected" in capsys.readouterr().err


@pytest.mark.slow
def test_kernels_are_timed_in_turns_with_those_of_another_tree(bench, tmp_path):
    """The other tree is this one's copy, with one side of another name."""
    for name in ("moeflux_mlx", "models", "kernels"):
        (tmp_path / name).symlink_to(ROOT / name)
    text = (ROOT / "scripts" / "bench_kernels").read_text()
    (tmp_path / "scripts").mkdir()
    there = tmp_path / "scripts" / "bench_kernels"
    there.write_text(text.replace('"sdpa_decode": whole', '"renamed": whole'))
    few = {"MAX_TURNS": 2, "ROUNDS": 1}
    turns = importlib.import_module("kernel_turns")
    cases = [(name, TINY[name][0]) for name in ("norm", "attention")]
    rows = list(turns.compare(str(tmp_path), cases, "sim", 2, few))
    sides = ["norm_matvecs", "sdpa_decode_parts + join"]
    assert [row["side"] for row in rows] == sides
    for row in rows:
        assert 0 < row["least_ratio"] <= row["ratio"] <= row["largest_ratio"]
        assert row["us"] > 0 and row["us_there"] > 0
    timings = [({"us": 2.0, "hidden": True}, {"us": 4.0, "hidden": n}) for n in (1, 0)]
    assert turns.figures(timings)["ratio"] == 0.5
    assert turns.figures(timings)["host_hidden"] == "no"


@pytest.mark.slow
def test_instructions_of_launches_are_compared_with_those_of_another_tree(monkeypatch):
    """Compiling is NVIDIA's; the sources, and telling them apart, are ours."""
    code = loaded("cuda_code", monkeypatch)
    here = code.sources(ROOT, "norm")
    ((_, side, kernel, number),) = here
    assert (side, kernel, number) == ("norm_matvecs", "norm_matvecs", 0)
    ((key, text),) = here.items()
    assert text.count('extern "C" __global__ void entry(') == 1
    assert "msl::norm_matvecs<" in text
    listed = ["/*0010*/ MOV R1, c[0x0][0x28] ;", ".L_1:", "/*0020*/ EXIT ;"]
    taken = [m[1] for m in map(code.INSTRUCTION.match, listed) if m]
    assert taken == ["MOV R1, c[0x0][0x28] ", "EXIT "]
    assert code.PARAMETER.sub("parameter", taken[0]) == "MOV R1, parameter "
    made = {text: ("A", "B", "C"), "other": ("A", "D", "C")}
    monkeypatch.setattr(code, "instructions", made.__getitem__)
    rows = [code.row(key, text, there) for there in ({key: text}, {key: "other"}, {})]
    assert [(r["there"], r["changed"]) for r in rows] == [
        ("same", 0),
        ("other", 2),
        ("new", 3),
    ]


def test_calls_of_installed_packages_do_not_count_as_the_projects(monkeypatch):
    own_file = loaded("measure_house", monkeypatch).own_file
    assert (
        own_file("/a/moeflux_mlx/ops/apply.py", Path("/a"))
        == "moeflux_mlx/ops/apply.py"
    )
    installed = "/a/.venv/lib/python3.11/site-packages/numpy/core/fromnumeric.py"
    for name in (installed, "/b/moeflux_mlx/state.py", "<string>"):
        assert own_file(name, Path("/a")) == ""


@pytest.fixture
def commit(monkeypatch) -> ModuleType:
    """scripts/bench_commit."""
    return loaded("bench_commit", monkeypatch)


def test_two_trees_are_compared_by_medians_of_pairs(commit, tmp_path):
    def pair(n: int, **here: float) -> object:
        old = commit.Figures(1e-6, 2e-6, None, 0)
        return commit.Pair("token", n, old, old._replace(**here))

    pairs = [pair(i, cpu=i * 1e-6, wall=4e-6) for i in range(1, 6)]
    heading, row = commit.table(pairs)
    assert dict(zip(heading, row, strict=True)) == {
        "": "token",
        "CPU ratio": "3.00",
        "middle half": "2.00 - 4.00",
        "time ratio": "2.00",
        "CPU us": "1 3",
        "us": "2 4",
        "reads": "",
        "waits": "0.00 0.00",
    }
    assert pair(1, waits=1.0).ratio("waits") == float("inf")
    commit.write_csv(tmp_path / "pairs.csv", pairs)
    rows = list(csv.DictReader((tmp_path / "pairs.csv").read_text().splitlines()))
    found = [float(row["here_cpu"]) for row in rows]
    assert found == pytest.approx([p.here.cpu for p in pairs])
    assert rows[0]["commit_reads"] == ""


@pytest.mark.slow
def test_two_trees_take_turns_at_prompts_and_reads(commit):
    work = ["prompt, all experts", "reads, at once"]
    pairs = list(commit.measure(ROOT, work, rounds=1, turns=1))
    assert [pair.work for pair in pairs] == work
    for pair in pairs:
        assert pair.here.cpu > 0 and pair.commit.wall > 0
        if pair.work == work[1]:
            assert pair.here.reads in (None, 1.0)


def test_a_tree_that_fails_says_why(commit, tmp_path, capsys):
    (tmp_path / "scripts").mkdir()
    with commit.side(tmp_path) as run, pytest.raises(SystemExit, match="'prompt, x'"):
        run("prompt, x")
    assert "FileNotFoundError" in capsys.readouterr().err


def test_another_token_is_told_with_the_lead_of_the_largest_logit(monkeypatch):
    module = loaded("bench_distributed", monkeypatch)
    first = {"tokens": [1, 2, 3], "leads": [0.5, 0.01, 1.0]}
    assert module.other_tokens(first, first) == ""
    told = module.other_tokens(first, {"tokens": [1, 4, 3], "leads": [0.5, 0.02, 1.0]})
    assert "in 1 of 3 steps" in told and "up to 0.02 standard" in told
    assert "by 0.5 at the median" in told
