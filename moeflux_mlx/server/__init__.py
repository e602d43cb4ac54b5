"""``moeflux serve``: mlx-lm's server with our loader, metrics and a status page.

Imports: errors, device, drafts, experts.files, experts.pool, loading, memory, opening,
serving, system.
"""
