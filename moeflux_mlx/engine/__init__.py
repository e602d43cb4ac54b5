"""The accelerator: models as graphs of Ops, lowered to launches, run by an executor.

This folder holds the blocks of models, the forward pass from tokens to logits, and the
runtime of a loaded model.

Imports: errors, config, device, drafts, calls, engine.executors, engine.graph,
engine.lowering, engine.ops, experts, experts.compute, experts.files, experts.pool,
experts.streaming, memory, saving, system, training.
"""
