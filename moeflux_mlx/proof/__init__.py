"""Checks of kernels before a model uses them: the lint, and runs of each kernel.

Imports: errors, device, engine.executors, engine.launch, engine.metal, system.
"""
