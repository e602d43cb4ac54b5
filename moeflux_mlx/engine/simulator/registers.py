"""Estimate the registers of a kernel's thread without a Mac.

The source is compiled for an AMD GPU, whose instructions and registers resemble
Apple's. The estimate agrees with published facts about two kernels of MLX: one fits
1024 threads, the other does not. Apple's compiler may need more or fewer registers;
only a Mac can tell.
"""

from __future__ import annotations

import re
from pathlib import Path

from ...errors import SimulatorError
from ...system import children
from . import compile as compiler

# A GPU with simdgroups of 32 threads, like Apple's.
_FLAGS = [
    *("-target", "amdgcn-amd-amdhsa", "-mcpu=gfx1100", "-nogpulib", "-nostdinc"),
    *("-std=c++17", "-O2", "-ffp-contract=fast", "-fno-math-errno", "-w"),
    *("-fno-exceptions", "-fno-rtti", "-Xclang", "-cl-single-precision-constant"),
    *("-mllvm", "-amdgpu-function-calls=false", "-D__MSL_REGISTERS", "-S"),
]
_IDS = """
__msl::Ids __ids(uint gx, uint gy, uint gz, uint sx, uint sy, uint sz) {
  __msl::Ids ids;
  uint in[3] = {__builtin_amdgcn_workitem_id_x(), __builtin_amdgcn_workitem_id_y(),
                __builtin_amdgcn_workitem_id_z()};
  uint at[3] = {__builtin_amdgcn_workgroup_id_x(), __builtin_amdgcn_workgroup_id_y(),
                __builtin_amdgcn_workgroup_id_z()};
  uint grid[3] = {gx, gy, gz}, size[3] = {sx, sy, sz};
  for (int d = 0; d < 3; ++d) {
    ids.in_group[d] = in[d];
    ids.group[d] = at[d];
    ids.group_size[d] = size[d];
    ids.grid[d] = grid[d];
    ids.position[d] = at[d] * size[d] + in[d];
    ids.n_groups[d] = grid[d] / size[d];
  }
  ids.lane = __msl::__msl_lane();
  ids.simdgroup = __builtin_amdgcn_readfirstlane(in[0] / 32);
  ids.index = 32 * ids.simdgroup + ids.lane;
  ids.n_simdgroups = size[0] * size[1] * size[2] / 32;
  return ids;
}
"""


def estimate(source: str, n_threads: int) -> int:
    """Return the registers that a thread of a source's only kernel would take.

    Spilled values count too.

    Args:
        source: the source that MLX writes for a call.
        n_threads: threads of a threadgroup.

    Raises:
        SimulatorError: the source does not compile.
    """
    text = _for_gpu(source, n_threads)

    def make(out: Path) -> None:
        out.write_text(str(_compiled(text, out.parent)))

    return int(compiler.cached("registers.txt", [text, *_FLAGS], make).read_text())


def _for_gpu(source: str, n_threads: int) -> str:
    text, (function,) = compiler.translated(source, "kernel.metal")
    buffers = [f"unsigned long b{i}" for i in range(function.n_buffers)]
    sizes = [f"uint {name}" for name in ("gx", "gy", "gz", "sx", "sy", "sz")]
    # Twelve such groups share 1536 registers per lane: 128 per thread, as on Apple's.
    group = f"amdgpu_flat_work_group_size(1, {max(256, n_threads)})"
    group += ", amdgpu_waves_per_eu(12, 16)"
    return "\n".join(
        (
            text,
            compiler.PROXIES,
            _IDS,
            f'extern "C" __attribute__((amdgpu_kernel, {group}))',
            f"void __estimate({', '.join(buffers + sizes)}) {{",
            "  __msl::Ids ids = __ids(gx, gy, gz, sx, sy, sz);",
            f"  {function.spelling}(",
            f"    {', '.join(compiler.arguments(function, 'b{}', 'ids.'))});",
            "}\n",
        )
    )


def _compiled(text: str, folder: Path) -> int:
    source, out = folder / "kernel.cpp", folder / "kernel.s"
    source.write_text(text)
    command = [str(compiler.zig()), "clang", *_FLAGS]
    command += ["-isystem", str(compiler.INCLUDE), "-o", str(out), str(source)]
    done = children.run(command, folder)
    if done.returncode:
        raise SimulatorError(f"[registers] {done.stderr.strip()}")
    assembly = out.read_text()
    found = {
        name: int(n)
        for name, n in re.findall(r"\.(vgpr_count|vgpr_spill_count):\s+(\d+)", assembly)
    }
    return found["vgpr_count"] + found["vgpr_spill_count"]
