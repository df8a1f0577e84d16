"""LAWN optimizers. They depend on torch only and import nothing else of this project."""

from lawn.optim.adam_lawn import AdamLAWN
from lawn.optim.attenuation import attenuate_logits, output_layer
from lawn.optim.base import LAWNOptimizer
from lawn.optim.hoffer import bound_norms, release
from lawn.optim.lamb import LAMB, LAMBLAWN, LAMBPlus
from lawn.optim.norms import NonFiniteError
from lawn.optim.schedule import LinearWarmup, LinearWarmupDecay
from lawn.optim.sgd_lawn import SGDLAWN
from lawn.optim.wrapper import LAWN

__all__ = [
    "LAMB",
    "LAMBLAWN",
    "LAWN",
    "SGDLAWN",
    "AdamLAWN",
    "LAMBPlus",
    "LAWNOptimizer",
    "LinearWarmup",
    "LinearWarmupDecay",
    "NonFiniteError",
    "attenuate_logits",
    "bound_norms",
    "output_layer",
    "release",
]
