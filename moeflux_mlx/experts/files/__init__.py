"""File formats: checkpoints and packs, where an expert's bytes are, and their readers.

Imports: errors, device, experts, system.
"""
