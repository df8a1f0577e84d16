"""The training loop and the run directory."""

from lawn.train.launch import train

__all__ = ["train"]
