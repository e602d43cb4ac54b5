"""A kernel not verified on this machine is skipped, and the next way is used."""

from __future__ import annotations

import dataclasses

import mlx.core as mx
import pytest
from mlx_lm.models.cache import make_prompt_cache
from op_cases import KERNEL_SPECS, SPECS

import moeflux_mlx
from moeflux_mlx.engine import lowering, simulator
from moeflux_mlx.engine.executors.verified import fingerprint, records, without_words
from moeflux_mlx.engine.launch import KERNELS
from moeflux_mlx.engine.launch.check import relative_error
from moeflux_mlx.engine.lowering import FUSIONS, MLX, WAYS, registry
from moeflux_mlx.engine.metal import Library, cuda, library

simulated = pytest.mark.skipif(
    not simulator.available(), reason="the simulator needs ziglang and pyelftools"
)
OPS = [spec.build().op for spec in (*SPECS, *KERNEL_SPECS)]
FIRST = {ways[0].name for ways in WAYS.values()}
TOGETHER = {group.name for group in FUSIONS if group.kernels}


@pytest.mark.parametrize("executor", ["metal", "cuda", "sim"])
def test_the_first_way_with_usable_kernels_is_chosen(executor):
    n_passed = 0
    for op in OPS:
        bad: set[str] = set()
        while (
            way := lowering.choose(op, executor, lambda n, b=bad: n not in b)
        ).kernels:
            assert not bad & set(way.kernels)
            # One unverified kernel is enough to skip a way.
            bad.add(way.kernels[len(bad) % len(way.kernels)])
            n_passed += 1
        assert way.name in (MLX, "mlx_dequantize")
    assert n_passed > len(OPS) // 2


def test_the_environment_may_choose_an_unverified_way(monkeypatch):
    op = next(op for op in OPS if op.variant_name == "ResidualAddNTokens")
    only = "ResidualAddNTokens=residual_add_n_tokens"
    assert lowering.choose(op, "metal", lambda name: False).name == MLX
    monkeypatch.setenv("MOEFLUX_LOWERING", only)
    found = lowering.choose(op, "metal", lambda name: False)
    assert found.name == "residual_add_n_tokens"


# Ways that launch no kernel, but differ from the Op's reference.
BY_MLX = ("mlx_dequantize", "mlx_expanded", "mlx_products")


def test_ways_and_groups_name_kernels_that_are_there():
    each = [*FUSIONS, *(way for ways in WAYS.values() for way in ways)]
    for found in each:
        assert set(found.kernels) <= set(KERNELS)
        assert found.name in found.kernels or found.name in BY_MLX


def test_every_kernel_has_a_shipped_record_of_its_present_code(tmp_path, monkeypatch):
    """Recording some kernels on another machine once dropped all others."""
    # Without records of this machine's own.
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    known = records()
    assert [name for name in KERNELS if not any(r.holds(name) for r in known)] == []


def test_a_record_speaks_of_a_kernel_with_the_same_numbers_compiled_in(monkeypatch):
    for name, executor in (("qmm_t", "metal"), ("bf16_matvec", "cuda")):
        before = fingerprint(name, executor)
        assert before == fingerprint(name, executor)
        fewer = KERNELS[name].fixed - {"n_out"}
        changed = dataclasses.replace(KERNELS[name], fixed=fewer)
        monkeypatch.setitem(KERNELS, name, changed)
        assert fingerprint(name, executor) != before


def test_a_comment_in_a_kernel_makes_no_record_stale(tmp_path):
    ours = library()
    for path in ours.folder.glob("*.*"):
        lines = path.read_text().splitlines()
        if path.suffix in (".metal", ".h"):
            # A backslash must be the last character of its line.
            said = [x if x.endswith("\\") else f"{x} // why, ({{" for x in lines]
            lines = ["/* new", "*/", *("\n".join(said).splitlines())]
        (tmp_path / path.name).write_text("\n".join(lines) + "\n")
    commented = Library(tmp_path)
    for name in KERNELS:
        assert commented.fingerprint(name) == ours.fingerprint(name)
        texts = [cuda.header(each, each[name]) for each in (commented, ours)]
        assert texts[0] == texts[1]


LAUNCH = '''
def launch(x, n):
    """Give the launch of x.

    # No comment, but words.
    """
    # Why.
    name = "# not a comment"  # Why not.

    return Launch(name, (n, 1, 1))
'''


def test_words_in_a_launch_make_no_record_stale_and_code_does():
    before = without_words(LAUNCH)
    assert before == (
        'def launch(x, n):\n    name = "# not a comment"\n'
        "    return Launch(name, (n, 1, 1))"
    )
    other = LAUNCH.replace("Give the", "Return the\n\n   ").replace("# Why.", "")
    assert other != LAUNCH and without_words(other) == before
    for code in ("# not a comment", "(n, 1, 1)"):
        changed = LAUNCH.replace(code, code.replace("n", "m"))
        assert without_words(changed) != before


def logits(model) -> mx.array:
    """Return the logits of a prompt and of two tokens after it."""
    tokens = mx.array([[5, 9, 300, 17, 4, 8, 2]])
    cache = make_prompt_cache(model)
    parts = [model(tokens[:, i:j], cache=cache) for i, j in ((0, 5), (5, 6), (6, 7))]
    return mx.concatenate(parts, axis=1)


@pytest.mark.sampled
@simulated
@pytest.mark.parametrize(
    "bad",
    [set(), TOGETHER, TOGETHER | FIRST, set(KERNELS)],
    ids=["none", "together", "first", "all"],
)
def test_a_model_without_some_kernels_gives_the_same(bad, checkpoint, monkeypatch):
    model = moeflux_mlx.load(checkpoint, executor="sim")[0]
    executor, launched = model.runtime.executor, []
    executor.usable = lambda name: name not in bad
    executor.on_launch = launched.append
    outside = []

    def watched(group):
        def call(ops, run, values):
            before = len(launched)
            result = group.call(ops, run, values)
            outside.extend(set(launched[before:]) - set(group.kernels))
            return result

        return dataclasses.replace(group, call=call)

    monkeypatch.setattr(registry, "FUSIONS", [*map(watched, FUSIONS)])
    got = logits(model)
    expected = logits(moeflux_mlx.load(checkpoint, executor="ops")[0])
    assert relative_error(got, expected) < 1e-5
    assert not set(launched) & bad
    assert bool(launched) == (bad != set(KERNELS))
    assert outside == []
    if not bad:
        # Those of other families, and of streamed experts.
        others = {"moe_softmax_topk", "attention_inputs_ungated", "mla_inputs"}
        others |= {"norm_dense_matvecs", "dense_residual", "experts_noaux_gate_up"}
        others |= {"attention_inputs_append", "mla_inputs_append"}
        others |= {"norm_gate_up_swiglu"}
        assert set(launched) >= TOGETHER - others
