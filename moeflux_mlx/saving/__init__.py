"""Models saved whole, and what is refused before the first byte.

Imports: errors, calls, experts, experts.compute, experts.files, system.
"""
