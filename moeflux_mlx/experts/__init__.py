"""The core: experts on disk, in slots, and as a routed block computes with them.

Knows nothing of graphs, Ops or kernels: a model of mlx-lm needs no more than this.

Imports: nothing of ours.
"""
