"""A process's memory: the plan made before loading, its enforcement, and the caches.

Imports: errors, config, device, experts, experts.files, experts.pool,
experts.streaming, system.
"""
