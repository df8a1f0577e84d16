"""What LAWN claims, measured (paper sections 1 and 2), and what weight decay does in its place."""

from lawn.diagnostics.equilibrium import equilibrium_angle, equilibrium_norm
from lawn.diagnostics.flattening import binary_margin, multiclass_margin, weight_norm

__all__ = ["binary_margin", "equilibrium_angle", "equilibrium_norm", "multiclass_margin", "weight_norm"]
