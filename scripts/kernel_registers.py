#!/usr/bin/env python3
"""Estimate every kernel's registers, and whether M1 and M2 would accept its launch.

The estimate compiles Metal's source for another GPU. Each kernel is compiled with the
values of its samples, of its large size, and of published widths. The exit code is 1 if
a launch does not fit.

Usage: python scripts/kernel_registers.py [--only PATTERN]
"""

from __future__ import annotations

import argparse
import fnmatch
import sys
from collections.abc import Iterator
from typing import Any

import mlx.core as mx

from moeflux_mlx.device import THREADGROUP_REGISTERS
from moeflux_mlx.engine.executors.registers import fits, n_threads, registers
from moeflux_mlx.engine.launch import KERNELS, Kernel, Launch, prepare

EXPERT = dict(k=8, bits=4, g=64, s=0)
FLOATS = dict(k=4, bits=4, g=32, s=0, floats=1, bias=1)
# Sizes of Qwen3.5, Qwen3.6 and gpt-oss in decoding, and the largest sizes that kernels
# allow.
PUBLISHED: dict[str, tuple[dict[str, Any], ...]] = {
    "gated_delta_decode": tuple(
        dict(b=1, hk=1, hv=2, dk=dk, dv=128, w=4, s=0) for dk in (128, 256)
    ),
    "sdpa_decode": tuple(
        dict(b=1, h=1, per=per, s=70, d=d) for per, d in ((8, 128), (8, 256), (12, 256))
    ),
    "sdpa_decode_parts": tuple(
        dict(b=1, h=1, per=per, s=70, d=d, at=66)
        for per, d in ((8, 64), (8, 128), (8, 256), (16, 256))
    ),
    "rms_norm_bf16_fused_n_tokens": tuple(
        dict(t=1, d=d, s=0) for d in (2048, 3072, 4096, 8192, 16384)
    ),
    "rms_norm_sum_sq": tuple(dict(t=1, d=d, s=0) for d in (2048, 4096, 1 << 16)),
    "experts_gate_up_swiglu": (
        dict(i=2048, n=512, **EXPERT),
        dict(i=2880, n=2880, clipped=1, **FLOATS),
    ),
    "experts_down_rows": (
        dict(n=512, d=2048, **EXPERT),
        dict(n=2880, d=2880, **FLOATS),
    ),
    "experts_down_sum": (
        dict(n=512, d=2048, **EXPERT),
        dict(n=2880, d=2880, **FLOATS),
    ),
    "experts_route_gate_up": (
        dict(e=256, i=2048, n=512, **EXPERT),
        dict(e=512, i=2048, n=512, **EXPERT),
        dict(e=32, i=2880, n=64, clipped=1, **FLOATS),
    ),
    "experts_down_combine": (
        dict(n=512, f=512, d=2048, shared_bits=4, **EXPERT),
        dict(n=2880, f=0, d=2880, shared_bits=4, **FLOATS),
    ),
    "dequant_matvec_4bit_v4": (dict(i=2048, o=8192, g=64, s=0),),
    "dequant_matvec_4bit_v3": (dict(i=512, o=2048, g=64, s=0),),
    "matvec_residual": (dict(i=4096, o=2048, bits=4, g=64, s=0),),
    "norm_gate_up_swiglu": (dict(i=7168, o=18432, g=64, s=0),),
}
# Launches with too many registers, and the reason why they are accepted.
EXCUSED = {
    "mla_q_prime_4bit": "may spill there: tuning times it beside MLX's product",
    "mla_out_per_head_4bit": "may spill there: tuning times it beside MLX's product",
    "gated_delta_net_chunkwise": "a Mac takes the sequential form unless tuned",
}


def launches(kernel: Kernel) -> Iterator[Launch]:
    """Yield the launches to examine, each source once."""
    seen = set()
    wide = mx.bfloat16 if mx.bfloat16 in kernel.dtypes else kernel.dtypes[0]
    sizes = [(kernel.dtypes[0], each) for each in kernel.sizes]
    sizes += [(wide, each) for each in PUBLISHED.get(kernel.name, ())]
    for dtype, each in (*sizes, (wide, kernel.large)):
        launch = kernel(*kernel.arguments(dtype, **each))
        form = prepare(launch).instance, launch.threadgroup
        if form not in seen:
            seen.add(form)
            yield launch


def main() -> int:
    """Print a line for every launch; return 1 if one does not fit."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="*", metavar="PATTERN")
    args = parser.parse_args()
    names = fnmatch.filter(KERNELS, args.only)
    if not names:
        parser.error(f"--only: expected kernels but {args.only!r} names none")
    bad = 0
    print(f"{'kernel':<34} {'threads':>7} {'registers':>9} {'allowed':>7}  template")
    for name in names:
        for launch in launches(KERNELS[name]):
            n = registers(launch)
            verdict = "" if fits(launch, n) else f"  {EXCUSED.get(name, 'TOO MANY')}"
            bad += verdict.endswith("TOO MANY")
            threads, allowed = n_threads(launch), THREADGROUP_REGISTERS // n
            template = " ".join(f"{k}={v}" for k, v in launch.template.items())
            print(f"{name:<34} {threads:>7} {n:>9} {allowed:>7}  {template}{verdict}")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
