"""Models saved whole, and models refused before the first byte.

Imports: errors, calls, experts, experts.compute, experts.files, system.
"""
