"""Save whole models, or refuse to before the first byte.

Imports: errors, calls, experts, experts.compute, experts.files, system.
"""
