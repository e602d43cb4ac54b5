"""Formats: checkpoints and packs, which bytes of them an expert is, and reading those.

Imports: errors, device, experts, system.
"""
