"""Find and check a model's directory, and build mlx-lm's model from it.

Imports: errors, config, engine, engine.executors, engine.lowering, experts,
experts.compute, experts.files, experts.pool, memory, streaming, system.
"""
