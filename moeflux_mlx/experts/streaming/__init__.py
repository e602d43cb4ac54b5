"""Experts on demand: requests of a step, reads on their way, reading ahead.

Imports: errors, config, device, experts, experts.compute, experts.files, experts.pool,
system.
"""
