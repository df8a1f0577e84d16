"""MovieLens-100k as implicit feedback with leave-one-out evaluation (He et al. 2017; paper section 4.3)."""

import io
from pathlib import Path

import numpy as np
import torch

from lawn.data.fetch import download, extract
from lawn.data.interactions import Interactions, Unseen
from lawn.errors import ConfigError, DataError

URL = "https://files.grouplens.org/datasets/movielens/ml-100k.zip"
MD5 = "0e33842e24a9c977be4e0107933c0723"
PUBLISHED = {"users": 943, "items": 1682, "ratings": 100_000}


def movielens100k(root: Path, split: str, *, seed: int, negatives: int, candidates: int) -> Interactions:
    """Reads `root`/ml-100k/u.data; downloads it when it is not there."""
    path = root / "ml-100k" / "u.data"
    if not path.exists():
        archive = path.with_name("ml-100k.zip")
        if not archive.exists():
            download(URL, archive, MD5, f"put ml-100k.zip from there, or its u.data, into {path.parent}")
        extract(archive, "ml-100k/u.data", path)
    users, items, times = read_ratings(path)
    found = {"users": len(np.unique(users)), "items": len(np.unique(items)), "ratings": len(users)}
    warnings = [
        f"ml-100k: {found[what]} {what}, published are {PUBLISHED[what]}"
        for what in PUBLISHED
        if found[what] != PUBLISHED[what]
    ]
    return leave_one_out(
        users, items, times, split=split, seed=seed, negatives=negatives, candidates=candidates, warnings=warnings
    )


def read_ratings(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Users, items (ids from 0, in order of the file's ids) and timestamps of a tab-separated rating file.

    Raises DataError that names file and line for anything but four integers on each line.
    """
    text = path.read_bytes()
    if not text.strip():
        raise DataError(f"{path}: empty; delete it to download it again")
    try:
        table = np.loadtxt(io.BytesIO(text), dtype=np.int64, delimiter="\t", ndmin=2, comments=None)
        well_formed = table.shape[1] == 4 and table.min() >= 0
    except ValueError:
        well_formed = False
    if not well_formed:
        lines = enumerate(text.split(b"\n"), 1)
        number, line = next(((i, line) for i, line in lines if line and not _is_rating(line)), (1, b""))
        raise DataError(
            f"{path}, line {number}: want user, item, rating and timestamp separated by tabs, found {line[:60]!r}; "
            "delete the file to download it again"
        )
    if not text.endswith(b"\n"):
        raise DataError(
            f"{path}, line {len(table)}: cut off before the end of the line; delete it to download it again"
        )
    users, items = (np.unique(table[:, column], return_inverse=True)[1].reshape(-1) for column in (0, 1))
    return users, items, table[:, 3]


def _is_rating(line: bytes) -> bool:
    fields = line.strip().split(b"\t")
    return len(fields) == 4 and all(f.isdigit() and len(f) < 19 for f in fields)


def leave_one_out(
    users: np.ndarray,
    items: np.ndarray,
    times: np.ndarray,
    *,
    split: str,
    seed: int,
    negatives: int,
    candidates: int,
    warnings: list[str],
) -> Interactions:
    """Hold out the latest item of every user (ties in time: the one later in the file), rank it among `candidates`.

    split="val" removes the latest item altogether and holds out the second-latest. Candidates are drawn once by
    `seed`, without repetition, among the items that the user has no rating for at all; training negatives among
    those without a training rating, so the held-out item can be one, as in He et al.'s code.
    Users with fewer ratings than the split needs are trained on and not evaluated; a warning counts them.
    """
    order = np.lexsort((np.arange(len(users)), times, users))  # by user, then time, then place in the file
    users, items = users[order], items[order]
    counts = np.bincount(users)
    age = counts[users] - 1 - (np.arange(len(users)) - (np.cumsum(counts) - counts)[users])  # 0: the latest
    held = {"test": 0, "val": 1}[split]
    evaluated = np.flatnonzero(counts > held + 1)
    if len(evaluated) < len(counts):
        warnings = [*warnings, f"{len(counts) - len(evaluated)} users have too few ratings and are not evaluated"]
    if not len(evaluated):
        raise DataError(f"no user has more than {held + 1} ratings: there is nothing to hold out")
    in_evaluated = counts[users] > held + 1
    train = (age > held) | ~in_evaluated
    targets = items[(age == held) & in_evaluated]

    num_users, num_items = len(counts), int(items.max()) + 1
    everything = Unseen(torch.from_numpy(users), torch.from_numpy(items), num_users, num_items)
    fewest = int(everything.available[evaluated].min())
    if candidates > fewest:
        raise ConfigError(f"dataset.candidates={candidates}: some user has only {fewest} items without a rating")
    rng = np.random.default_rng(seed)
    ranks = np.stack([rng.choice(int(everything.available[u]), candidates, replace=False) for u in evaluated])
    drawn = everything.kth(torch.from_numpy(evaluated)[:, None].expand(-1, candidates), torch.from_numpy(ranks))
    return Interactions(
        users=torch.from_numpy(users[train]),
        items=torch.from_numpy(items[train]),
        candidate_users=torch.from_numpy(evaluated),
        candidates=torch.cat([torch.from_numpy(targets)[:, None], drawn], dim=1),
        num_users=num_users,
        num_items=num_items,
        negatives=negatives,
        warnings=warnings,
    )
