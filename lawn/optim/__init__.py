"""LAWN optimizers. Pure torch: nothing here imports the rest of the project."""

from lawn.optim.adam_lawn import AdamLAWN
from lawn.optim.base import LAWNOptimizer
from lawn.optim.schedule import LinearWarmupDecay
from lawn.optim.sgd_lawn import SGDLAWN

__all__ = ["SGDLAWN", "AdamLAWN", "LAWNOptimizer", "LinearWarmupDecay"]
