"""Logit Attenuating Weight Normalization (Gupta et al., arXiv 2108.05839)."""

from lawn.optim import LAMB, LAMBLAWN, LAWN, SGDLAWN, AdamLAWN, LAMBPlus, LinearWarmupDecay

__all__ = ["LAMB", "LAMBLAWN", "LAWN", "SGDLAWN", "AdamLAWN", "LAMBPlus", "LinearWarmupDecay"]
__version__ = "0.1.0"
