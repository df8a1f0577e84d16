"""The training loop and the run directory."""

from lawn.train.loop import train

__all__ = ["train"]
