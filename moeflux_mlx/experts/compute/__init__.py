"""Routed blocks that run on slots, and experts that are in memory for good.

Imports: errors, device, experts, experts.files, experts.pool, system.
"""
