"""Experts on demand: the requests of each step, reads in flight, reading ahead.

Imports: errors, config, device, experts, experts.compute, experts.files, experts.pool,
system.
"""
