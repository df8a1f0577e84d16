"""Measurements of loss flattening, optimizer updates and the effect of weight decay."""

from lawn.diagnostics.curvature import LossSurface
from lawn.diagnostics.equilibrium import equilibrium_angle, equilibrium_norm
from lawn.diagnostics.flattening import binary_margin, multiclass_margin, weight_norm
from lawn.diagnostics.lanczos import top_eigenvalue
from lawn.diagnostics.onset import FlatteningOnset
from lawn.diagnostics.updates import UpdateMonitor

__all__ = [
    "FlatteningOnset",
    "LossSurface",
    "UpdateMonitor",
    "binary_margin",
    "equilibrium_angle",
    "equilibrium_norm",
    "multiclass_margin",
    "top_eigenvalue",
    "weight_norm",
]
