"""Ratings as implicit feedback with leave-one-out evaluation (He et al. 2017; paper section 4.3)."""

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from lawn.data.interactions import Interactions, Unseen
from lawn.data.published import deviations
from lawn.errors import ConfigError, DataError


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Put the file in front of what is found wrong with its contents."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{path}: {error}") from error


@dataclass(frozen=True)
class Ratings:
    """Who had to do with what, and when: int64 [N] each, ids from 0. How good a rating was does not matter."""

    users: np.ndarray
    items: np.ndarray
    times: np.ndarray

    def __len__(self) -> int:
        return len(self.users)

    def __getitem__(self, index: np.ndarray) -> "Ratings":
        return Ratings(self.users[index], self.items[index], self.times[index])

    def and_also(self, other: "Ratings") -> "Ratings":
        mine, others = vars(self).values(), vars(other).values()
        return Ratings(*(np.concatenate(pair) for pair in zip(mine, others, strict=True)))

    @property
    def size(self) -> tuple[int, int]:
        """Numbers of users and items that the ids call for."""
        return int(self.users.max()) + 1, int(self.items.max()) + 1


def read_lines(path: Path, line: bytes, wanted: str) -> bytes:
    """The bytes of a text file whose every line matches `line`, a pattern without groups that can backtrack.

    Raises DataError that names the file, and the first line that is not as `wanted` says.
    """
    if not path.is_file():
        raise DataError(f"{path}: not there, or no file")
    text = path.read_bytes()
    if not text:
        raise DataError(f"{path}: empty")
    whole = re.match(rb"(?:" + line + rb"\r?\n)*+", text)
    assert whole is not None  # it matches no line too
    if whole.end() < len(text):
        number = text.count(b"\n", 0, whole.end()) + 1
        found, newline, _ = text[whole.end() :].partition(b"\n")
        cut = "" if newline else " (cut off before the end of the line)"
        raise DataError(f"{path}, line {number}: want {wanted}, found {found[:60]!r}{cut}; mend it or delete it")
    return text


def read_table(path: Path, separator: str = "\t") -> np.ndarray:
    """User, item, rating and time of each line, int64 [N, 4]. Raises DataError that names file and line."""
    number, between = rb"\d{1,18}+", re.escape(separator).encode()
    text = read_lines(
        path,
        between.join([number, number, rb"[1-9]\d{0,17}+", number]),
        f"user, item, rating (1 or more) and time, whole numbers separated by {separator!r}",
    )
    plain = text.replace(separator.encode(), b"\t")
    return np.loadtxt(io.BytesIO(plain), dtype=np.int64, delimiter="\t", ndmin=2, comments=None)


def read_ratings(path: Path, separator: str = "\t") -> Ratings:
    """A rating file whose ids are any numbers: they become 0, 1, ... in their order."""
    table = read_table(path, separator)
    users, items = (np.unique(table[:, column], return_inverse=True)[1].reshape(-1) for column in (0, 1))
    return Ratings(users, items, table[:, 3])


def by_time(ratings: Ratings) -> Ratings:
    """Sorted by user, then time; ties in time stay in the order of the file."""
    return ratings[np.lexsort((ratings.times, ratings.users))]


def drop_repeats(ratings: Ratings) -> tuple[Ratings, list[str]]:
    """Keep the latest of several ratings of an item by the same user; a warning counts the others."""
    latest_first = by_time(ratings)[np.arange(len(ratings))[::-1]]
    pairs = latest_first.users * (ratings.items.max() + 1) + latest_first.items
    _, kept = np.unique(pairs, return_index=True)
    dropped = len(ratings) - len(kept)
    if not dropped:
        return ratings, []
    return latest_first[np.sort(kept)[::-1]], [f"{dropped} repeated ratings of an item by the same user are left out"]


def hold_out_latest(ratings: Ratings) -> tuple[Ratings, Ratings]:
    """All but the latest rating of each user, and these; of users with a single rating nothing is held out.

    Of a user's ratings at the same time the last in the file is the latest. Both results are sorted by user and time.
    """
    ordered = by_time(ratings)
    last = np.append(ordered.users[1:] != ordered.users[:-1], True)
    single = np.bincount(ordered.users)[ordered.users] == 1
    held = last & ~single
    return ordered[~held], ordered[held]


def leave_one_out(
    ratings: Ratings, *, split: str, seed: int, negatives: int, candidates: int, warnings: list[str]
) -> Interactions:
    """Hold out the latest item of every user and rank it among `candidates` items without a rating.

    split="val" puts the latest item aside altogether and holds out the latest of the others. Candidates are drawn
    once by `seed`, without repetition, among the items that the user has no rating for at all; training negatives
    among those without a training rating, so the held-out item can be one, as in He et al.'s code.
    """
    ratings, repeated = drop_repeats(ratings)
    train, held = hold_out_latest(ratings)
    if split == "val":
        train, held = hold_out_latest(train)
    listed = draw_candidates(ratings, held, ratings.size, candidates, seed)
    return bind(train, held, listed, ratings.size, negatives, warnings + repeated)


def draw_candidates(seen: Ratings, held: Ratings, size: tuple[int, int], count: int, seed: int) -> np.ndarray:
    """For each held-out rating `count` items, without repetition, that its user has no rating in `seen` for."""
    unseen = Unseen(torch.from_numpy(seen.users), torch.from_numpy(seen.items), *size)
    available = unseen.available.numpy()[held.users]
    if count > available.min(initial=count):
        raise ConfigError(f"dataset.candidates={count}: some user has only {available.min()} items without a rating")
    rng = np.random.default_rng(seed)
    ranks = [rng.choice(int(total), count, replace=False) for total in available]
    users = torch.from_numpy(held.users)[:, None].expand(-1, count)
    return unseen.kth(users, torch.from_numpy(np.array(ranks, np.int64).reshape(-1, count))).numpy()


def bind(
    train: Ratings,
    held: Ratings,
    candidates: np.ndarray,
    size: tuple[int, int],
    negatives: int,
    warnings: list[str],
) -> Interactions:
    """Interactions to train on and to rank. Users of whom nothing is held out are trained on; a warning counts them."""
    if negatives > size[1]:
        raise ConfigError(f"dataset.negatives={negatives}: there are only {size[1]} items")
    if not len(held):
        raise DataError("no user has enough ratings: there is nothing to hold out")
    without = len(np.setdiff1d(train.users, held.users))
    if without:
        warnings = [*warnings, f"{without} users have too few ratings and are not evaluated"]
    return Interactions(
        users=torch.from_numpy(train.users),
        items=torch.from_numpy(train.items),
        candidate_users=torch.from_numpy(held.users),
        candidates=torch.from_numpy(np.concatenate([held.items[:, None], candidates], axis=1)),
        num_users=size[0],
        num_items=size[1],
        negatives=negatives,
        warnings=warnings,
    )


def count_warnings(name: str, published: dict[str, int], *ratings: Ratings) -> list[str]:
    """A line for each of users, items and ratings that are not as many as were published."""
    found = {
        "users": len(np.unique(np.concatenate([r.users for r in ratings]))),
        "items": len(np.unique(np.concatenate([r.items for r in ratings]))),
        "ratings": sum(map(len, ratings)),
    }
    return deviations(name, found, published)
