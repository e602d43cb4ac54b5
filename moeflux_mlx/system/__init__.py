"""Ground: the machine and its files.

Files that anybody may have written, folders that only this user can write, volumes and
their limits, child processes, memory pressure, messages on standard error, what mlx-lm
commands and Python's copying ask of a model.

Imports: errors, config.
"""
