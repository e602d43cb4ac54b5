"""Estimate without a Mac whether M1 and M2 can run a launch."""

from __future__ import annotations

import math

from ...device import MAX_REGISTERS, THREADGROUP_REGISTERS
from .. import simulator
from ..launch import Launch, prepare
from ..simulator.registers import estimate
from .kernels import metal_kernel


def registers(launch: Launch) -> int:
    """Return the estimated registers of a thread of a launch.

    Raises:
        SimulatorError: the kernel does not compile.
    """
    ready = prepare(launch)
    kernel = metal_kernel(ready.instance, lines=True)
    source = simulator.written_source(kernel, ready.inputs, ready.options)
    return estimate(source, n_threads(launch))


def n_threads(launch: Launch) -> int:
    """Return the number of threads in a launch's threadgroup."""
    return math.prod(launch.threadgroup)


def fits(launch: Launch, n_registers: int) -> bool:
    """Return whether a threadgroup fits the registers of a core without spilling."""
    within = n_threads(launch) * n_registers <= THREADGROUP_REGISTERS
    return within and n_registers <= MAX_REGISTERS
