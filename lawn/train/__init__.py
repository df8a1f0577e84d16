"""The training loop and the run directory."""

from lawn.train.launch import check, run, train
from lawn.train.many import train_many, train_together
from lawn.train.notice import Stopped
from lawn.train.ranks import started_by_torchrun
from lawn.train.submitted import reported

__all__ = ["Stopped", "check", "reported", "run", "started_by_torchrun", "train", "train_many", "train_together"]
