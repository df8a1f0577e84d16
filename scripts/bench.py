"""Shared code of the benchmarks: timing in turns, the machine's rates, and a page and a JSON file in results/bench/ on
what was measured, where and with what."""

import json
import statistics
import time
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from lawn.errors import UserError
from lawn.files import write_text
from lawn.output import echo_error
from lawn.train.provenance import environment
from lawn.train.throughput import synchronize
from lawn.train.trainer import Trainer

RESULTS = Path(__file__).resolve().parents[1] / "results" / "bench"
Row = dict[str, Any]
Columns = Mapping[str, Callable[[Row], str]]


def parser(description: str | None, rounds: int) -> ArgumentParser:
    made = ArgumentParser(description=description, formatter_class=RawDescriptionHelpFormatter)
    made.add_argument("--rounds", type=int, default=rounds)
    made.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    made.add_argument("--results", type=Path, default=RESULTS, help="folder for the page and the JSON file")
    return made


def interleave(measures: Mapping[str, Callable[[], float]], rounds: int, warm_up: int = 1) -> dict[str, list[float]]:
    """What each gives in every round, one after the other, so that a drift of the machine's speed reaches all."""
    given: dict[str, list[float]] = {name: [] for name in measures}
    for count in range(warm_up + rounds):
        for name, measure in measures.items():
            value = measure()
            if count >= warm_up:
                given[name].append(value)
    return given


def median_ratio(values: list[float], references: list[float]) -> float:
    """The median of the ratios within a round."""
    return statistics.median(a / b for a, b in zip(values, references, strict=True))


def seconds(work: Callable[[], object], device: torch.device) -> float:
    synchronize(device)
    start = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - start


def training_rate(run: Trainer, pause: Callable[[], bool] = lambda: False) -> float:
    """Samples a second in the training part of the run's next epoch, on the run's own clock."""
    before = run.seconds["train"]
    run.train_epoch(pause)
    return run.task.dataset.num_train / (run.seconds["train"] - before)


def memory_rate(device: torch.device, in_place: bool = False) -> float:
    """Bytes a second that the device reads and writes when it copies more than its caches hold, or changes it in place,
    where no line is read only to be overwritten: the best of three."""
    source, target = torch.ones(2, 2**28 if device.type == "cuda" else 2**25, device=device)
    best = min(seconds(lambda: target.mul_(1.0) if in_place else target.copy_(source), device) for _ in range(3))
    return 2 * target.nbytes / best


@contextmanager
def torch_defaults() -> Iterator[None]:
    """Number formats and convolutions as torch comes, for plain loops; a run sets them for the whole process."""
    convolutions = torch.backends.cudnn
    before = torch.get_float32_matmul_precision(), convolutions.allow_tf32, convolutions.benchmark
    try:
        torch.set_float32_matmul_precision("highest")
        convolutions.allow_tf32, convolutions.benchmark = True, False
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        convolutions.allow_tf32, convolutions.benchmark = before[1:]


def percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def table(what: str, columns: Columns, rows: Mapping[str, Row]) -> str:
    """A line for each row, under a column for its name and those given."""
    lines = [[what, *columns], ["---"] * (1 + len(columns))]
    lines += [[name, *(show(row) for show in columns.values())] for name, row in rows.items()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def write(name: str, given: Namespace, title: str, page: str, rows: Mapping[str, Row]) -> None:
    """NAME-DEVICE.md and .json; the page goes between the title and a line on hardware and versions."""
    device = torch.device(given.device)
    made = environment(device)
    machine = f"{made['cores']}-core {made['cpu']}" if device.type == "cpu" else made["device"]
    file = f"{name}-{device.type}"
    source = (
        f"{machine}, {made['threads']} threads; torch {made['packages']['torch']}; code {made['git']}"
        f"{' with uncommitted changes' if made['dirty'] else ''}. From [the JSON file]({file}.json)."
    )
    content = {"rounds": given.rounds, "rows": rows, "environment": made}
    write_text(given.results / f"{file}.json", json.dumps(content, indent=1) + "\n")
    write_text(given.results / f"{file}.md", f"# {title}\n\n{page}\n\n{source}\n")
    print(f"{title}\n{page}")


def main(
    name: str, given: Namespace, title: str, measure: Callable[[], Mapping[str, Row]], page: Callable[..., str]
) -> int:
    """Measure, and write the page made of it; the exit code: data that cannot be used is one line."""
    try:
        rows = measure()
    except UserError as error:
        return echo_error(error)
    write(name, given, title, page(rows), rows)
    return 0
