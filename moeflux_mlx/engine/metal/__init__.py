"""Metal source as text: declarations, kernel signatures, instances, CUDA.

Imports: errors.
"""

from .instance import Instance
from .library import Library, library
from .signature import Attribute, Input, MetalKernel, Output, Scalar, TemplateParameter

__all__ = [
    "Attribute",
    "Input",
    "Instance",
    "Library",
    "MetalKernel",
    "Output",
    "Scalar",
    "TemplateParameter",
    "library",
]
