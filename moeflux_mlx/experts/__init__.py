"""The core: experts on disk and in slots, and routed blocks that compute with them.

The core knows nothing of graphs, Ops or kernels. A model of mlx-lm needs only the core.

Imports: nothing of ours.
"""
