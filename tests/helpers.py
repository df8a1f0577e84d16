import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import numpy as np
import torch
from PIL import Image

from lawn.composition import compose_many
from lawn.config import Config
from lawn.data.interactions import Interactions
from lawn.data.movielens import movielens1m
from lawn.data.ratings import Ratings, read_ratings, renumber

torch.set_num_threads(1)
ROOT = Path(__file__).resolve().parents[1]


# What makes a run of the `tiny_data` of conftest.py small.
RECOMMENDERS = ("dataset.candidates=20", "model.factors=4", "train.batch_size=200")
FIXTURES = {
    "cifar10": ("train.batch_size=30", "dataset.limit=30"),
    "cifar100": ("train.batch_size=30", "dataset.limit=30"),
    "imagenet": ("dataset.image_size=32", "dataset.workers=0", "train.batch_size=6"),
    "movielens100k": RECOMMENDERS,
    "movielens1m": RECOMMENDERS,
    "pinterest": RECOMMENDERS,
}


def compose(*overrides: str) -> Config:
    """The config of these overrides; Hydra composes each choice of members once."""
    return compose_many(*overrides).checked


def run(*arguments: str, script: str = "run.py", **environment: str) -> subprocess.CompletedProcess[str]:
    """The real command in its own process."""
    command = [sys.executable, str(ROOT / script), *arguments]
    variables = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=variables, timeout=300)


PAUSE = """
import importlib.util, os, sys, time
from pathlib import Path

module, _, path = os.environ["PAUSE_AT"].partition(":")
folder = Path(__file__).parent

def pause():
    (folder / f"reached-{os.getpid()}").touch()
    while not (folder / "go").exists():
        time.sleep(0.01)

class Finder:
    def find_spec(self, name, *_):
        if name != module:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        load = spec.loader.exec_module

        def exec_module(loaded):
            if not path:
                pause()
            load(loaded)
            *owners, last = path.split(".")
            owner = loaded
            for part in owners:
                owner = getattr(owner, part)
            if path:
                original = getattr(owner, last)

                def paused(*arguments, **options):
                    pause()
                    return original(*arguments, **options)

                setattr(owner, last, paused)

        spec.loader.exec_module = exec_module
        return spec

sys.meta_path.insert(0, Finder())
"""


class Paused:
    """The real command in a process group of its own. It waits wherever it comes to `place`, a module that is imported
    or a `module:function` that is called, in any of its processes, until `go`."""

    def __init__(self, folder: Path, place: str, *arguments: str, **options: Any) -> None:
        self._folder = folder
        folder.mkdir()
        (folder / "sitecustomize.py").write_text(PAUSE)
        environment = {"OMP_NUM_THREADS": "1", "PAUSE_AT": place, "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"}
        streams: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "run.py"), *arguments],
            cwd=ROOT,
            env={**os.environ, **environment},
            text=True,
            start_new_session=True,
            **{**streams, **options},
        )

    def reached(self, processes: int = 1) -> None:
        """Wait until so many have come to the place."""
        end = monotonic() + 120
        while len(list(self._folder.glob("reached-*"))) < processes:
            assert self.process.poll() is None, self.process.communicate()
            assert monotonic() < end, "waited too long"
            sleep(0.01)

    def send(self, number: int) -> None:
        """A signal to the whole group, as a terminal and Slurm send it."""
        os.killpg(self.process.pid, number)
        sleep(0.1)

    def go(self) -> tuple[int, str, str]:
        """Exit code and output."""
        (self._folder / "go").touch()
        out, err = self.process.communicate(timeout=120)
        return self.process.returncode, out, err


# Three users, six items. Users and items of the file are 10, 20, 30 and 1 to 6.
#   user 10: item 1 at t=5, item 2 at t=9, item 3 at t=9 (later in the file), item 4 at t=1
#   user 20: item 6 at t=3, item 5 at t=2, item 1 at t=1
#   user 30: item 2 at t=7, item 6 at t=8
RATINGS = [
    (10, 1, 5, 5), (20, 6, 4, 3), (10, 2, 3, 9), (30, 2, 3, 7), (10, 3, 3, 9), (20, 5, 1, 2), (10, 4, 2, 1),
    (30, 6, 1, 8), (20, 1, 1, 1),
]  # fmt: skip


def write_ratings(path: Path, rows: Sequence[tuple[float, ...]], separator: str = "\t") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(separator.join(map(str, row)) + "\n" for row in rows))


def write_three_files(folder: Path, prefix: str, ratings: Ratings, test: Interactions) -> None:
    """What He et al. would have released for `ratings` and the candidates of `test`."""
    held = set(zip(test.candidate_users.tolist(), test.candidates[:, 0].tolist(), strict=True))
    parts: dict[str, list[str]] = {"train.rating": [], "test.rating": [], "test.negative": []}
    (users,), (items,) = renumber(ratings.users)[0], renumber(ratings.items)[0]
    rows = zip(users.tolist(), items.tolist(), ratings.times.tolist(), strict=True)
    for user, item, time in sorted(rows, key=lambda row: row[0]):
        parts["test.rating" if (user, item) in held else "train.rating"].append(f"{user}\t{item}\t1\t{time}\n")
    for user, (item, *others) in zip(test.candidate_users.tolist(), test.candidates.tolist(), strict=True):
        parts["test.negative"].append("\t".join([f"({user},{item})", *map(str, others)]) + "\n")
    for part, lines in parts.items():
        (folder / f"{prefix}.{part}").write_text("".join(lines))


def synthetic_ratings(users: int = 30, items: int = 150, each: int = 12) -> list[tuple[int, int, int, int]]:
    """Every user likes items near its own number; in the form of MovieLens-100k's u.data."""
    rows = []
    for user in range(1, users + 1):
        for k in range(each):
            rows.append((user, (3 * user + 7 * k * k) % items + 1, 1 + k % 5, 880_000_000 + 100 * k + user % 7))
    rows += [(1, item, 3, 870_000_000) for item in range(1, items + 1) if item % 3 == 0]
    return list({(u, i): (u, i, r, t) for u, i, r, t in rows}.values())


def write_folders(root: Path, classes: int = 3, each: int = 4) -> None:
    """ImageNet's folders with noise of 50 x 40 pixels, in every mode that JPEG has."""
    rng = np.random.default_rng(0)
    for part in ("train", "val"):
        for c in range(classes):
            folder = root / "imagenet" / part / f"n{c:08d}"
            folder.mkdir(parents=True)
            for k in range(each):
                image = Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8))
                image.convert(("RGB", "L", "CMYK")[k % 3]).save(folder / f"{k}.JPEG")


def write_cifar(folder: Path, train: int = 60, test: int = 20) -> None:
    """CIFAR's two files with noise, and the ten labels in turn."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for part, count in (("train", train), ("test", test)):
        images = rng.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
        np.savez(folder / f"{part}.npz", images=images, labels=np.arange(count) % 10)


def write_tiny_data(folder: Path) -> None:
    """Every dataset but the digits, with a few samples."""
    write_cifar(folder / "cifar10")
    write_cifar(folder / "cifar100")
    write_folders(folder)
    write_ratings(folder / "ml-100k" / "u.data", synthetic_ratings())
    write_ratings(folder / "ml-1m" / "ratings.dat", synthetic_ratings(), "::")
    test = movielens1m(folder, "test", seed=0, negatives=4, candidates=20)
    for prefix in ("ml-1m", "pinterest-20"):
        (folder / prefix).mkdir(exist_ok=True)
        write_three_files(folder / prefix, prefix, read_ratings(folder / "ml-1m" / "ratings.dat", "::"), test)
