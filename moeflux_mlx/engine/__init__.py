"""The accelerator: models as graphs of Ops, lowered to launches, run by an executor.

Models and their blocks, a call from tokens to logits, and the runtime of a loaded
model.

Imports: errors, config, device, calls, engine.executors, engine.graph, engine.ops,
experts, experts.compute, experts.files, experts.pool, experts.streaming, memory,
saving, system, training.
"""
