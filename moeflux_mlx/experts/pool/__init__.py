"""Memory for experts: slots, which expert is in which, and who makes room.

Imports: errors, config, device, experts, experts.files, system.
"""
