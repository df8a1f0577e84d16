"""The training loop and the run directory."""

from lawn.train.launch import check, train, train_many, train_together

__all__ = ["check", "train", "train_many", "train_together"]
