"""A process's memory: the plan before loading, who keeps to it, caches, who gives way.

Imports: errors, config, device, experts, experts.files, experts.pool,
experts.streaming, system.
"""
