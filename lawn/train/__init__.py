"""Training runs, and run directories."""

from lawn.train.distributed import launched_by_torchrun
from lawn.train.launch import run, train
from lawn.train.multirun import train_many, train_vectorized
from lawn.train.prepare import prepare
from lawn.train.signals import Stopped
from lawn.train.submitit_jobs import report_submitit_jobs

__all__ = [
    "Stopped",
    "launched_by_torchrun",
    "prepare",
    "report_submitit_jobs",
    "run",
    "train",
    "train_many",
    "train_vectorized",
]
