"""Calls of any model: arguments, turns, transformations, ways through routed blocks.

Imports: errors, config, device, experts, experts.compute, experts.files, experts.pool,
experts.streaming, memory, system.
"""
