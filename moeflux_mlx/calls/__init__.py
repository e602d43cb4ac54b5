"""Calls of any model: arguments, turns, transformations, and access to experts.

Imports: errors, config, device, experts, experts.compute, experts.files, experts.pool,
experts.streaming, memory, system.
"""
