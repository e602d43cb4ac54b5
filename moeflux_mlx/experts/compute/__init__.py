"""Routed blocks that compute on slots, and the sources of their experts.

Imports: errors, device, experts, experts.files, experts.pool, system.
"""
