"""The training loop and the run directory."""

from lawn.train.launch import train, train_many, train_together

__all__ = ["train", "train_many", "train_together"]
