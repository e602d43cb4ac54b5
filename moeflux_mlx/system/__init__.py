"""The machine and this process.

Untrusted files, private folders, volumes, limits and pressure of memory, child
processes, messages on standard error, and the detection of mlx-lm's commands.

Imports: errors, config.
"""
