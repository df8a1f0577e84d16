"""Time image training and its input pipelines: python -m scripts.bench_images [--rounds 5]

VGG-19 on images in CIFAR-10's form and ResNet-50 on JPEG files in ImageNet's folders, all generated: no download. In
turns, in every round: an epoch of a few updates of `run.py` (Adam-LAWN, constrained), the same epoch of a plain loop,
as many times the bare forward and backward pass, and a matrix product. The plain loop is a straightforward baseline: a
DataLoader with torchvision's transforms, the model as it is made, in fp32, torch's Adam. Then the input pipelines
alone, against the plain loop's DataLoader and the machine: copying memory for CIFAR, decoding the files for ImageNet.
Writes medians, and medians of the ratios within a round, with hardware and versions to
results/bench/images-DEVICE.json and .md.
"""

import copy
import statistics
import sys
import tempfile
from collections import deque
from collections.abc import Callable
from dataclasses import asdict
from itertools import starmap
from pathlib import Path
from typing import NamedTuple

import torch
from torch.nn import functional as F
from torch.utils.data import Dataset
from torchvision.datasets import ImageFolder

from lawn.compose import compose
from lawn.config import Config
from lawn.data.batching import Batching
from lawn.task import task_builder
from lawn.train.distributed import World
from lawn.train.throughput import peak_flops
from lawn.train.trainer import Trainer
from scripts import bench
from scripts.plain_images import WORKERS, Plain, discard, plain_cifar, plain_imagenet, plain_loader
from scripts.synthetic_images import CLASSES, HEIGHT, WIDTH, write_cifar, write_photos

RESNET_UPDATES = 4 * WORKERS  # the first batch is waited for: a small share of so many
BYTES = 3 * 32 * 32 * (1 + 4)  # CIFAR's augmentation reads an image as uint8 and writes it as float32


class Sizes(NamedTuple):
    """Large enough to fill the device, small enough for a round of seconds."""

    vgg_batch: int
    vgg_updates: int
    resnet_batch: int
    resnet_size: int  # side of a crop
    cifar_images: int


SIZES = {
    "cpu": Sizes(256, 2, 64, 64, 50_000),
    "cuda": Sizes(4096, 8, 256, 224, 50_000),
    "tiny": Sizes(8, 2, 4, 32, 32),  # for the tests
}


class ForwardBackward:
    """Forward and backward of a run's network, compiled, laid out and in number formats as there, and nothing else."""

    def __init__(self, run: Trainer, size: int) -> None:
        self.run = run
        self.model = copy.deepcopy(run.model).train()
        self.network = run.execution.compiled(self.model)
        images = torch.randn(run.batching.batch_size, 3, size, size, device=run.device)
        labels = torch.randint(CLASSES, (len(images),), device=run.device)
        self.images, self.labels = run.execution.to_memory_format((images, labels))

    def passes(self) -> None:
        """As many as an epoch has updates."""
        for _ in range(self.run.batching.updates(self.run.task.dataset.num_train)):
            self.model.zero_grad()
            with self.run.execution.autocast(self.run.device):
                loss = F.cross_entropy(self.network(self.images), self.labels)
            loss.backward()


def measure_training(config: Config, samples: Dataset, size: int, rounds: int, device: torch.device) -> bench.Row:
    task = task_builder(config)(device)
    loader = plain_loader(samples, config.train.batch_size, device)
    plain = Plain(copy.deepcopy(task.model), loader, device)  # a run lays out its own
    run = Trainer(config, task, World(device))
    bare, count, precision = ForwardBackward(run, size), task.dataset.num_train, run.execution.precision

    def plain_rate() -> float:
        with bench.torch_defaults():
            return count / bench.seconds(plain.epoch, device)

    found = bench.interleave(
        {
            "ours": lambda: bench.training_rate(run),
            "plain": plain_rate,
            "bare": lambda: count / bench.seconds(bare.passes, device),
            "peak": lambda: peak_flops.__wrapped__(device, precision),
        },
        rounds,
    )
    assert run.flops is not None  # it has trained
    return {
        **compared(found),
        "bare_images_per_second": round(statistics.median(found["bare"]), 1),
        "bare_share": round(bench.median_ratio(found["ours"], found["bare"]), 3),
        "peak_gflops": round(statistics.median(found["peak"]) / 1e9, 1),
        "flops_per_image": round(run.flops),
        "peak_share": round(run.flops * bench.median_ratio(found["ours"], found["peak"]), 3),
        "config": {
            **settings(config, size),
            "updates": run.batching.updates(count),
            "optim": config.optim.name,
            "execution": asdict(run.execution),
        },
    }


def measure_input(
    config: Config, samples: Dataset, peak: Callable[[], float], rounds: int, device: torch.device
) -> dict[str, list[float]]:
    """Images a second of ours and of the plain loader, and what `peak` gives."""
    dataset, batching = task_builder(config)(device).dataset, Batching(config.train.batch_size)
    generator, loader = torch.Generator(device), plain_loader(samples, batching.batch_size, device)

    def ours() -> None:
        deque(dataset.train_batches(batching, generator), maxlen=0)

    def plain() -> None:
        deque((images.to(device) for images, _ in loader), maxlen=0)

    def rate(epoch: Callable[[], None]) -> float:
        return dataset.num_train / bench.seconds(epoch, device)

    return bench.interleave({"ours": lambda: rate(ours), "plain": lambda: rate(plain), "peak": peak}, rounds)


def settings(config: Config, size: int) -> dict[str, object]:
    return {
        "batch_size": config.train.batch_size,
        "image_size": size,
        "workers": config.dataset.workers,
        "plain_workers": WORKERS,
    }


def compared(found: dict[str, list[float]]) -> bench.Row:
    return {
        "images_per_second": round(statistics.median(found["ours"]), 1),
        "plain_images_per_second": round(statistics.median(found["plain"]), 1),
        "ratio": round(bench.median_ratio(found["ours"], found["plain"]), 2),
    }


def cifar_input(config: Config, root: Path, rounds: int, device: torch.device) -> bench.Row:
    found = measure_input(config, plain_cifar(root), lambda: bench.memory_rate(device), rounds, device)
    copied = statistics.median(found["peak"]) / 1e9
    return {
        **compared(found),
        "peak": f"copying memory, {copied:.1f} GB/s",
        "copy_gb_per_second": round(copied, 2),
        "bytes_per_image": BYTES,
        "peak_share": round(BYTES * bench.median_ratio(found["ours"], found["peak"]), 3),
        "config": settings(config, 32),
    }


def imagenet_input(config: Config, root: Path, size: int, rounds: int, device: torch.device) -> bench.Row:
    files = ImageFolder(str(root / "imagenet" / "train"), discard)
    decoder = plain_loader(files, config.train.batch_size, device)

    def decoding() -> float:
        return len(files) / bench.seconds(lambda: deque(decoder, maxlen=0), device)

    found = measure_input(config, plain_imagenet(root, size), decoding, rounds, device)
    decoded = statistics.median(found["peak"])
    return {
        **compared(found),
        "peak": f"decoding alone, {decoded:,.0f} images/s",
        "decoding_images_per_second": round(decoded, 1),
        "bytes_per_file": round(statistics.mean(Path(path).stat().st_size for path, _ in files.samples)),
        "peak_share": round(bench.median_ratio(found["ours"], found["peak"]), 3),
        "config": settings(config, size),
    }


def execution(row: bench.Row) -> str:
    chosen = row["config"]["execution"]
    layout = "channels last" if chosen["channels_last"] else "channels first"
    return f"{chosen['precision']}, {layout}, compile {chosen['compile']}"


RATES: bench.Columns = {
    "images/s": lambda row: f"{row['images_per_second']:,.0f}",
    "plain loop": lambda row: f"{row['plain_images_per_second']:,.0f}",
    "ratio": lambda row: f"{row['ratio']:.1f}",
}
TRAINING: bench.Columns = {
    **RATES,
    "share of bare forward + backward": lambda row: bench.percent(row["bare_share"]),
    "of the matmul rate": lambda row: bench.percent(row["peak_share"]),
    "matmul GFLOP/s": lambda row: f"{row['peak_gflops']:,.0f}",
    "how it runs": execution,
}
INPUT: bench.Columns = {
    **RATES,
    "share of the machine's rate": lambda row: bench.percent(row["peak_share"]),
    "reference": lambda row: row["peak"],
}
REMARKS = """Training is an epoch of `run.py` with Adam-LAWN, constrained, input included. The plain loop is a
DataLoader with torchvision's transforms and a worker for each core, fp32, channels first, torch's Adam; of the input
pipelines its DataLoader alone. Bare is the same network as it runs here, on random tensors: no data, no optimizer. For
a CIFAR image {cifar:,} bytes have to be read and written. Images are generated, the JPEG files {width} x {height} of
{kilobytes:.0f} KB on average."""


def measure(
    root: Path, sizes: Sizes, rounds: int, device: torch.device
) -> tuple[dict[str, bench.Row], dict[str, bench.Row]]:
    """The rows of training and those of the input pipelines."""
    write_cifar(root, sizes.cifar_images)
    write_photos(root, RESNET_UPDATES * sizes.resnet_batch)
    # As many epochs as make the choices of a long run, none of them evaluated; constrained from the first update.
    common = ("optim=adam_lawn", "optim.free_epochs=0", "train.epochs=1000", "eval.every=1000", f"data_dir={root}")
    cifar = (*common, "dataset=cifar10", f"train.batch_size={sizes.vgg_batch}")
    imagenet = (*common, "dataset=imagenet", f"train.batch_size={sizes.resnet_batch}", f"dataset.workers={WORKERS}")
    limit, size = sizes.vgg_updates * sizes.vgg_batch, sizes.resnet_size
    vgg, resnet, whole = starmap(
        compose, [(*cifar, f"dataset.limit={limit}"), (*imagenet, f"dataset.image_size={size}"), cifar]
    )
    of_cifar, of_photos = f"32 px, batch {sizes.vgg_batch:,}", f"{size} px, batch {sizes.resnet_batch:,}"
    training = {
        f"VGG-19, {of_cifar}": measure_training(vgg, plain_cifar(root, limit), 32, rounds, device),
        f"ResNet-50, {of_photos}": measure_training(resnet, plain_imagenet(root, size), size, rounds, device),
    }
    inputs = {
        f"CIFAR-10, {of_cifar}": cifar_input(whole, root, rounds, device),
        f"ImageNet folders, {of_photos}": imagenet_input(resnet, root, size, rounds, device),
    }
    return training, inputs


def main() -> int:
    parser = bench.parser(__doc__, rounds=5)
    parser.add_argument("--sizes", choices=SIZES, help="of batches and crops; default: those that fit the device")
    given = parser.parse_args()
    device = torch.device(given.device)
    with tempfile.TemporaryDirectory() as folder:
        training, inputs = measure(Path(folder), SIZES[given.sizes or device.type], given.rounds, device)
    (kilobytes,) = (row["bytes_per_file"] / 1e3 for row in inputs.values() if "bytes_per_file" in row)
    remarks = REMARKS.format(cifar=BYTES, width=WIDTH, height=HEIGHT, kilobytes=kilobytes)
    tables = bench.table("training", TRAINING, training), bench.table("input pipeline", INPUT, inputs)
    title = f"Training on images: medians of {given.rounds} rounds"
    bench.write("images", given, title, "\n\n".join([*tables, remarks]), training | inputs)
    return 0


if __name__ == "__main__":
    sys.exit(main())
