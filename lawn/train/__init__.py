"""The training loop and the run directory."""

from lawn.train.launch import check, train, train_many, train_together
from lawn.train.notice import Stopped

__all__ = ["Stopped", "check", "train", "train_many", "train_together"]
