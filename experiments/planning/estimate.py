"""Estimates of run times, from the recorded pace of similar runs."""

from bisect import insort
from collections.abc import Iterable
from datetime import timedelta
from statistics import median

import torch

from experiments.record import Record
from experiments.records import Store
from lawn.config import Config

Kind = tuple[str, str, int]  # dataset, model and batch size


def kind_of(config: Config) -> Kind:
    return config.dataset.name, config.model.name, config.train.batch_size


class RuntimeEstimate:
    """Estimates run times from the recorded seconds per epoch of the same dataset, model and batch size.

    A batch size without records is estimated by the nearest one with records. With `hardware`, only the records of
    devices whose name contains this text count; without, those of CPUs on a machine without a GPU, and of GPUs on
    others, unless there are none.
    """

    def __init__(self, store: Store, hardware: str = "") -> None:
        self._hardware = hardware.lower()
        self._gpu = torch.cuda.is_available()
        self._seen: dict[Kind, list[float]] = {}
        self._elsewhere: dict[Kind, list[float]] = {}  # on the other kind of device
        for record in store.all():
            self.add(record)

    def add(self, record: Record) -> None:
        config = record.config
        kind = config["dataset"]["name"], config["model"]["name"], config["train"]["batch_size"]
        here = bool(self._hardware) or (record.environment["device"] != "cpu") == self._gpu
        if self._hardware in record.hardware.lower():
            insort((self._seen if here else self._elsewhere).setdefault(kind, []), record.seconds_per_epoch)

    def seconds_per_epoch(self, kind: Kind) -> float | None:
        """The median of similar records; None if there is none."""
        *model, size = kind
        for seen in (self._seen, self._elsewhere):
            if batch_sizes := [other[2] for other in seen if [*other[:2]] == model]:
                nearest = min(batch_sizes, key=lambda other: max(other, size) / min(other, size))
                return median(seen[kind[0], kind[1], nearest])
        return None

    def seconds(self, configs: Iterable[Config]) -> float | None:
        """The seconds of these runs one after the other; None if there is no similar record of one of them."""
        return self.total((kind_of(config), config.train.epochs) for config in configs)

    def total(self, epochs: Iterable[tuple[Kind, int]]) -> float | None:
        """The seconds of so many epochs of each kind; None if there is no similar record of one of them."""
        total = 0.0
        for kind, count in epochs:
            pace = self.seconds_per_epoch(kind)
            if pace is None:
                return None
            total += pace * count
        return total


def duration(seconds: float | None) -> str:
    return "unknown" if seconds is None else str(timedelta(seconds=round(seconds)))
