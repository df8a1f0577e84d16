"""What LAWN claims, measured (paper sections 1 and 2)."""

from lawn.diagnostics.curvature import LossSurface, top_eigenvalue
from lawn.diagnostics.flattening import binary_margin, multiclass_margin, weight_norm
from lawn.diagnostics.onset import FlatteningOnset
from lawn.diagnostics.updates import UpdateMonitor

__all__ = [
    "FlatteningOnset",
    "LossSurface",
    "UpdateMonitor",
    "binary_margin",
    "multiclass_margin",
    "top_eigenvalue",
    "weight_norm",
]
