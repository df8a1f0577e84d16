"""Time training under FSDP2 with LAWN against AdamW: python -m scripts.bench_fsdp [--rounds 20]

A transformer of 25 M parameters on two gloo ranks of this machine, with a thread each. The optimizers take turns, a
training step each in every round, so a drift of the machine's speed reaches all of them. Prints the median time of a
training step and of the optimizer's part of it, and what the optimizer takes more than AdamW, plain and fused, as a
share of a training step with AdamW; writes the same with hardware and versions to results/bench/fsdp-cpu.json and .md.
"""

import statistics
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn.functional import cross_entropy
from torch.optim import AdamW, Optimizer

from lawn import LAMBLAWN, LAWN, SGDLAWN, AdamLAWN
from scripts import bench

RANKS = 2
VOCABULARY, WIDTH, LAYERS, LENGTH = 6000, 512, 6, 64
Params = list[nn.Parameter]


class Transformer(nn.Module):
    """A language model of 25.0 M parameters."""

    def __init__(self, vocabulary: int, width: int, layers: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, width // 64, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
            for _ in range(layers)
        )
        self.head = nn.Linear(width, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1])
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x, src_mask=mask, is_causal=True)
        return self.head(x)


def lawn_adamw(params: Params) -> Optimizer:
    base = AdamW(params, weight_decay=0.0)
    LAWN(base, free_steps=0)
    return base


ADAMW, FUSED = "torch AdamW", "torch AdamW, fused"
OPTIMIZERS: dict[str, Callable[[Params], Optimizer]] = {
    ADAMW: lambda params: AdamW(params, weight_decay=0.0),
    FUSED: lambda params: AdamW(params, weight_decay=0.0, fused=True),
    "AdamLAWN": lambda params: AdamLAWN(params, free_steps=0),
    "AdamLAWN, fused=False": lambda params: AdamLAWN(params, free_steps=0, fused=False),
    "LAWN(torch AdamW)": lawn_adamw,
    "LAMBLAWN": lambda params: LAMBLAWN(params, free_steps=0),
    "SGDLAWN": lambda params: SGDLAWN(params, free_steps=0),
}


class Training:
    """Training steps of one optimizer on random tokens, the time of each optimizer's step, and its collectives."""

    def __init__(self, make: Callable[[Params], Optimizer], given: Namespace) -> None:
        torch.manual_seed(0)
        model = Transformer(given.vocabulary, given.width, given.layers)
        self.parameters = sum(p.numel() for p in model.parameters())
        mesh = init_device_mesh("cpu", (RANKS,))
        for layer in model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        self.model = model
        self.optimizer = make(list(model.parameters()))
        self.tokens = torch.randint(given.vocabulary, (given.batch_size, LENGTH + 1))
        self.optimizer_seconds: list[float] = []
        self.collectives = 0

    def step(self) -> float:
        """Seconds of a training step."""
        dist.barrier()
        start = time.perf_counter()
        self.optimizer.zero_grad()
        logits = self.model(self.tokens[:, :-1])
        cross_entropy(logits.flatten(0, 1), self.tokens[:, 1:].flatten()).backward()
        dist.barrier()  # so that a rank's wait for the other does not count as the optimizer's
        before = time.perf_counter()
        self.optimizer.step()
        dist.barrier()
        end = time.perf_counter()
        self.optimizer_seconds.append(end - before)
        return end - start

    def count_collectives(self) -> None:
        with CommDebugMode() as counts:
            self.optimizer.step()
        self.collectives = counts.get_total_counts()


def work(rank: int, folder: Path, given: Namespace) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=RANKS)
    trainings = {name: Training(make, given) for name, make in OPTIMIZERS.items()}
    found = bench.interleave({name: training.step for name, training in trainings.items()}, given.rounds, warm_up=2)
    rows = {}
    for name, training in trainings.items():
        training.count_collectives()
        rows[name] = {
            "parameters": training.parameters,
            "collectives": training.collectives,
            "step": found[name],
            "optimizer": training.optimizer_seconds[-given.rounds :],
        }
    torch.save(rows, folder / f"{rank}.pt")
    dist.destroy_process_group()


def added_share(row: bench.Row, base: bench.Row) -> float:
    """What the optimizer takes more than another, as a share of that one's training step: median of the rounds."""
    triples = zip(row["optimizer"], base["optimizer"], base["step"], strict=True)
    return round(statistics.median((own - other) / step for own, other, step in triples), 4)


def summary(row: bench.Row, rows: dict[str, bench.Row]) -> bench.Row:
    return {
        "parameters": row["parameters"],
        "collectives": row["collectives"],
        "step_seconds": round(statistics.median(row["step"]), 4),
        "optimizer_seconds": round(statistics.median(row["optimizer"]), 4),
        "added_share": added_share(row, rows[ADAMW]),
        "added_share_fused": added_share(row, rows[FUSED]),
    }


def measure(given: Namespace) -> dict[str, bench.Row]:
    with TemporaryDirectory() as folder:
        mp.start_processes(work, (Path(folder), given), nprocs=RANKS, start_method="spawn")
        rows = torch.load(Path(folder) / "0.pt", weights_only=True)
    return {name: summary(row, rows) for name, row in rows.items()}


COLUMNS: bench.Columns = {
    "a training step, s": lambda row: f"{row['step_seconds']:.3g}",
    "its optimizer, s": lambda row: f"{row['optimizer_seconds']:.3g}",
    "added to AdamW": lambda row: f"{100 * row['added_share']:+.1f} %",
    "added to fused AdamW": lambda row: f"{100 * row['added_share_fused']:+.1f} %",
    "collectives of the optimizer": lambda row: str(row["collectives"]),
}


def page(given: Namespace, rows: dict[str, bench.Row]) -> str:
    remarks = (
        f"A transformer of {rows[ADAMW]['parameters'] / 1e6:.1f} M parameters in float32, {given.batch_size} sequences "
        f"of {LENGTH} tokens on each of {RANKS} gloo ranks, which share this machine, with a thread each. LAWN's "
        "optimizers are in their constrained phase. What is added is the optimizer's time less that of AdamW in the "
        "same round, as a share of its whole training step."
    )
    return f"{remarks}\n\n{bench.table('optimizer', COLUMNS, rows)}"


def main() -> int:
    parser = bench.parser(__doc__, rounds=20)
    parser.set_defaults(device="cpu")
    parser.add_argument("--batch-size", type=int, default=8, help="sequences of each rank")
    for name, value in (("vocabulary", VOCABULARY), ("width", WIDTH), ("layers", LAYERS)):
        parser.add_argument(f"--{name}", type=int, default=value)
    given = parser.parse_args()
    if given.device != "cpu":
        parser.error("the ranks are processes of a CPU: --device=cpu")
    torch.set_num_threads(1)  # as in each rank; the page names the number
    title = f"Training under FSDP2 on {RANKS} ranks, medians of {given.rounds} rounds"
    return bench.main("fsdp", given, title, lambda: measure(given), partial(page, given))


if __name__ == "__main__":
    sys.exit(main())
