"""Experts on demand: what a step asks for, what is on its way, what to read ahead.

Imports: errors, config, device, experts, experts.compute, experts.files, experts.pool,
system.
"""
