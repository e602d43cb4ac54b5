"""Compile every instantiation of every kernel as CUDA, where a compiler exists."""

from __future__ import annotations

import itertools
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import pytest

from moeflux_mlx.engine.executors.cuda import bound
from moeflux_mlx.engine.launch import KERNELS, prepare
from moeflux_mlx.engine.launch.prepared import Prepared
from moeflux_mlx.engine.metal import cuda, library

TYPES = {
    mx.float32: "float",
    mx.float16: "__half",
    mx.bfloat16: "__nv_bfloat16",
    mx.uint32: "unsigned int",
    mx.int32: "int",
    mx.bool_: "bool",
    mx.uint8: "unsigned char",
}
FAMILIES = sorted({kernel.metal.place.file for kernel in KERNELS.values()})
OPEN = "\nnamespace msl {\n"


def compiler() -> str | None:
    """Find nvcc in its usual places."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    places = [Path(home) / "bin/nvcc"] if home else []
    places += sorted(Path("/usr/local").glob("cuda*/bin/nvcc"), reverse=True)
    found = (str(path) for path in places if path.is_file())
    return shutil.which("nvcc") or next(found, None)


def samples(family: str) -> Iterator[Prepared]:
    """Prepare one launch of each instantiation in the registry's samples."""
    seen = set()
    for kernel in KERNELS.values():
        if kernel.metal.place.file != family:
            continue
        for dtype, sizes in itertools.product(kernel.dtypes, kernel.sizes):
            ready = prepare(kernel(*kernel.arguments(dtype, **sizes)))
            values = ready.instance.values
            key = kernel.name, tuple(values[p.name] for p in ready.kernel.template)
            if key not in seen:
                seen.add(key)
                yield ready


def translation_unit(family: str) -> str:
    """Return a family's kernels as the source that MLX would compile."""
    parts = ["#include <cuda_fp16.h>\n#include <cuda_bf16.h>\n"]
    seen: set[str] = set()
    for number, ready in enumerate(samples(family)):
        kernel = ready.kernel
        dialect, code = cuda.header(library(), kernel).rsplit(OPEN, 1)
        if not seen:
            parts.append(dialect)
        # Each kernel repeats its helpers, so each needs a namespace of its own.
        space = f"of_{kernel.name}"
        if kernel.name not in seen:
            seen.add(kernel.name)
            parts.append(f"namespace msl {{ namespace {space} {{\n{code}}}\n")
        names = [p.name for p in ready.instance.inputs]
        pairs = zip(names, bound(ready), strict=True)
        arguments = [f"const {TYPES[x.dtype]}* {name}" for name, x in pairs]
        outputs = zip(kernel.outputs, ready.output_dtypes, strict=True)
        arguments += [f"{TYPES[dtype]}* {p.name}" for p, dtype in outputs]
        call = cuda.body(ready.instance).replace("msl::", f"msl::{space}::", 1)
        header = f"__global__ void entry_{number}({', '.join(arguments)})"
        parts.append(f"{header} {{\n{call}\n}}\n")
    return "\n".join(parts)


@pytest.mark.slow
@pytest.mark.skipif(compiler() is None, reason="no nvcc found")
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_compiles(family, tmp_path):
    source = tmp_path / f"{Path(family).stem}.cu"
    source.write_text(translation_unit(family))
    options = ["-std=c++17", "-arch=compute_90a", "-ptx", "-o", str(tmp_path / "out")]
    # This still instantiates and checks every template, in a quarter of the time.
    options.append("-Ofc=max")
    done = subprocess.run(
        [compiler(), *options, str(source)], capture_output=True, text=True
    )
    errors = [line for line in done.stderr.splitlines() if "error" in line]
    assert (done.returncode, errors) == (0, [])
    assert (tmp_path / "out").read_text().count(".entry") > 0


@pytest.mark.sampled
@pytest.mark.parametrize("family", FAMILIES)
def test_every_instantiation_is_in_the_source(family):
    text, count = translation_unit(family), len(list(samples(family)))
    assert text.count("__global__") == count > 0
    # No Metal word is left that CUDA lacks.
    assert re.search(r"\b(threadgroup|device|constant|thread)\s|\[\[", text) is None
