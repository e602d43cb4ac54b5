"""A model's directory: found, checked, and mlx-lm's own model built of it.

Imports: errors, config, engine, engine.executors, engine.lowering, experts,
experts.files, experts.pool, memory, streaming, system.
"""
