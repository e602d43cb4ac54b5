"""Proofs of kernels before a model uses them: the lint, and trying each one.

Imports: errors, device, engine.executors, engine.launch, engine.metal, system.
"""
