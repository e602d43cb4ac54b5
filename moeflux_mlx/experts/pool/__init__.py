"""Memory for experts: the slots, their contents, and the eviction policies.

Imports: errors, config, device, experts, experts.files, system.
"""
