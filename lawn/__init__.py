"""Logit Attenuating Weight Normalization (Gupta et al., arXiv 2108.05839)."""

from lawn.optim import AdamLAWN, LinearWarmupDecay, SGDLAWN

__all__ = ["AdamLAWN", "LinearWarmupDecay", "SGDLAWN"]
__version__ = "0.1.0"
