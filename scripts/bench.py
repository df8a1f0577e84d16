"""What the benchmarks share: a page and a JSON file in results/bench/ on what was measured, where and with what."""

import json
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from pathlib import Path
from typing import Any

import torch

from lawn.files import write_text
from lawn.train.record import environment

RESULTS = Path(__file__).resolve().parents[1] / "results" / "bench"


def parser(description: str | None, rounds: int) -> ArgumentParser:
    made = ArgumentParser(description=description, formatter_class=RawDescriptionHelpFormatter)
    made.add_argument("--rounds", type=int, default=rounds)
    made.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    made.add_argument("--results", type=Path, default=RESULTS, help="folder for the page and the JSON file")
    return made


def table(columns: list[str], rows: list[list[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def write(name: str, given: Namespace, title: str, page: str, rows: dict[str, Any]) -> None:
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
