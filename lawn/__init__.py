"""Logit Attenuating Weight Normalization (Gupta et al., arXiv 2108.05839)."""

from lawn.optim import SGDLAWN, AdamLAWN, LinearWarmupDecay

__all__ = ["SGDLAWN", "AdamLAWN", "LinearWarmupDecay"]
__version__ = "0.1.0"
