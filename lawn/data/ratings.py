"""Ratings as implicit feedback with leave-one-out evaluation (He et al. 2017; paper section 4.3)."""

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from lawn.data.download import count_mismatches
from lawn.data.interactions import Interactions, NegativeSampler
from lawn.errors import ConfigError, DataError


@contextmanager
def naming_file(path: Path) -> Iterator[None]:
    """Prefix the DataErrors of the body with the file."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{path}: {error}") from error


@dataclass(frozen=True)
class Ratings:
    """Users, items and times of interactions: int64 [N] each. The values of the ratings are not used.

    Ids are those of the file until `renumber` makes them count from 0.
    """

    users: np.ndarray
    items: np.ndarray
    times: np.ndarray

    def __len__(self) -> int:
        return len(self.users)

    def __getitem__(self, index: np.ndarray) -> "Ratings":
        return Ratings(self.users[index], self.items[index], self.times[index])

    def concatenate(self, other: "Ratings") -> "Ratings":
        mine, others = vars(self).values(), vars(other).values()
        return Ratings(*(np.concatenate(pair) for pair in zip(mine, others, strict=True)))

    @property
    def size(self) -> tuple[int, int]:
        """The numbers of users and items, from the largest ids."""
        return int(self.users.max()) + 1, int(self.items.max()) + 1


def read_lines(path: Path, line: bytes, wanted: str, header: bytes = b"") -> bytes:
    """The bytes of a text file, after its optional `header`. Every line has to match `line`, a pattern that must not
    backtrack.

    Raises DataError that names the file and the first line that does not match; `wanted` describes the pattern.
    """
    if not path.is_file():
        raise DataError(f"{path}: not there, or no file; put it there")
    try:
        text = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); mend it or delete it") from error
    above = re.match(re.escape(header) + rb"\r?\n", text) if header else None
    start = above.end() if above else 0
    if len(text) == start:
        raise DataError(f"{path}: empty; mend it or delete it")
    whole = re.compile(rb"(?:" + line + rb"\r?\n)*+").match(text, start)
    assert whole is not None  # it matches zero lines too
    if whole.end() < len(text):
        number = text.count(b"\n", 0, whole.end()) + 1
        found, newline, _ = text[whole.end() :].partition(b"\n")
        cut = "" if newline else " (cut off before the end of the line)"
        raise DataError(f"{path}, line {number}: want {wanted}, found {found[:60]!r}{cut}; mend it or delete it")
    return text[start:]


def read_ratings(path: Path, separator: str = "\t", header: str = "", fractions: bool = False) -> Ratings:
    """Read a file with user, item, rating and time on each line, after an optional `header`.

    With `fractions`, ratings and times may have decimals, and times are float64. Raises DataError that names the file
    and the line.
    """
    number, between = rb"\d{1,18}+", re.escape(separator).encode()
    decimals = rb"(?:\.\d{1,18}+)?+" if fractions else b""
    rating = rb"(?![0.]++" + between + rb")" + number + decimals if fractions else rb"[1-9]\d{0,17}+"
    text = read_lines(
        path,
        between.join([number, number, rating, number + decimals]),
        f"user, item, rating ({'above 0' if fractions else '1 or more'}) and time, "
        f"{'' if fractions else 'whole '}numbers separated by {separator!r}",
        header.encode(),
    )
    columns = {"user": np.int64, "item": np.int64, "time": np.float64 if fractions else np.int64}
    plain = io.BytesIO(text.replace(separator.encode(), b"\t"))
    table = np.loadtxt(plain, dtype=list(columns.items()), delimiter="\t", usecols=(0, 1, 3), ndmin=1, comments=None)
    return Ratings(*(np.ascontiguousarray(table[name]) for name in columns))


def renumber(*ids: np.ndarray) -> tuple[list[np.ndarray], np.ndarray]:
    """Replace ids by their ranks 0, 1, ..., jointly for all arrays; also returns the sorted ids [n]."""
    different, places = np.unique(np.concatenate([each.ravel() for each in ids]), return_inverse=True)
    parts = np.split(places.reshape(-1), np.cumsum([each.size for each in ids])[:-1])
    return [part.reshape(each.shape) for part, each in zip(parts, ids, strict=True)], different


def sort_by_time(ratings: Ratings) -> Ratings:
    """Sorted by user, then time; ties in time stay in the order of the file."""
    return ratings[np.lexsort((ratings.times, ratings.users))]


def drop_repeats(ratings: Ratings) -> tuple[Ratings, list[str]]:
    """Keep the latest of several ratings of an item by the same user; a warning counts the others."""
    latest_first = sort_by_time(ratings)[np.arange(len(ratings))[::-1]]
    pairs = latest_first.users * (ratings.items.max() + 1) + latest_first.items
    _, kept = np.unique(pairs, return_index=True)
    dropped = len(ratings) - len(kept)
    if not dropped:
        return ratings, []
    return latest_first[np.sort(kept)[::-1]], [f"{dropped} repeated ratings of an item by the same user are left out"]


def ordered_in_time(ratings: Ratings, seed: int) -> tuple[Ratings, list[str]]:
    """The ratings; with random times drawn by `seed`, and a warning, if no user has ratings at different times."""
    ordered = sort_by_time(ratings)
    if ((np.diff(ordered.users) == 0) & (np.diff(ordered.times) != 0)).any():
        return ratings, []
    times = np.random.default_rng(seed).permutation(len(ratings))
    note = "no user has ratings at different times, so a random one of each is held out"
    return Ratings(ratings.users, ratings.items, times), [note]


def hold_out_latest(ratings: Ratings) -> tuple[Ratings, Ratings]:
    """Split off the latest rating of each user who has more than one; returns the others and the split-off ratings.

    Among ratings at the same time, the last in the file is the latest. Both results are sorted by user and time.
    """
    ordered = sort_by_time(ratings)
    last = np.append(ordered.users[1:] != ordered.users[:-1], True)
    single = np.bincount(ordered.users)[ordered.users] == 1
    held = last & ~single
    return ordered[~held], ordered[held]


def count_ties(rest: Ratings, held: Ratings) -> list[str]:
    """A warning if, for most users, the order of the file and not the time decides which rating is `held`."""
    last = np.flatnonzero(np.append(rest.users[1:] != rest.users[:-1], True))
    before = last[np.searchsorted(rest.users[last], held.users)]
    tied = int((rest.times[before] == held.times).sum())
    if 2 * tied <= len(held):
        return []
    return [f"{tied} of {len(held)} users have several ratings at their latest time: the last in the file is held out"]


def leave_one_out(
    ratings: Ratings, *, split: str, seed: int, negatives: int, candidates: int, warnings: list[str]
) -> Interactions:
    """Hold out the latest item of every user, to be ranked among `candidates` items without a rating.

    split="val" removes the latest item and holds out the latest of the others. Candidates are drawn once by `seed`,
    without repetition, among the items that the user has not rated at all. Training negatives are drawn among the
    items without a training rating, so the held-out item can be one, as in the code of He et al. If no user has
    ratings at different times, `seed` draws the held-out items.
    """
    (users,), user_ids = renumber(ratings.users)
    (items,), _ = renumber(ratings.items)
    ratings, notes = drop_repeats(Ratings(users, items, ratings.times))
    ratings, untimed = ordered_in_time(ratings, seed)
    train, held = hold_out_latest(ratings)
    if split == "val":
        train, held = hold_out_latest(train)
    listed = draw_candidates(ratings, held, ratings.size, candidates, seed, user_ids)
    warnings = [*warnings, *notes, *untimed, *count_ties(train, held)]
    return make_interactions(train, held, listed, ratings.size, negatives, warnings, user_ids)


def draw_candidates(
    seen: Ratings, held: Ratings, size: tuple[int, int], count: int, seed: int, user_ids: np.ndarray
) -> np.ndarray:
    """For each held-out rating, `count` different items that its user has not rated in `seen`."""
    sampler = NegativeSampler(torch.from_numpy(seen.users), torch.from_numpy(seen.items), *size)
    _refuse_full(sampler, user_ids)
    available = sampler.available.numpy()[held.users]
    if count > available.min(initial=count):
        user, most = user_ids[held.users[available.argmin()]], available.min()
        raise ConfigError(
            f"dataset.candidates={count}: user {user} has only {most} items without a rating; take at most {most}, "
            "or leave the user out of the file"
        )
    rng = np.random.default_rng(seed)
    ranks = [rng.choice(int(total), count, replace=False) for total in available]
    users = torch.from_numpy(held.users)[:, None].expand(-1, count)
    return sampler.kth(users, torch.from_numpy(np.array(ranks, np.int64).reshape(-1, count))).numpy()


def make_interactions(
    train: Ratings,
    held: Ratings,
    candidates: np.ndarray,
    size: tuple[int, int],
    negatives: int,
    warnings: list[str],
    user_ids: np.ndarray,
) -> Interactions:
    """The dataset of these ratings. Users without a held-out rating are trained on; a warning counts them.

    `user_ids` are the ids of the users in the file [users], for error messages.
    """
    if negatives > size[1]:
        raise ConfigError(f"dataset.negatives={negatives}: there are only {size[1]} items")
    if not len(held):
        raise DataError("no user has enough ratings: there is nothing to hold out")
    without = len(np.setdiff1d(train.users, held.users))
    if without:
        warnings = [*warnings, f"{without} users have too few ratings and are not evaluated"]
    data = Interactions(
        users=torch.from_numpy(train.users),
        items=torch.from_numpy(train.items),
        candidate_users=torch.from_numpy(held.users),
        candidates=torch.from_numpy(np.concatenate([held.items[:, None], candidates], axis=1)),
        num_users=size[0],
        num_items=size[1],
        negatives=negatives,
        warnings=warnings,
    )
    _refuse_full(data.sampler, user_ids)
    return data


def _refuse_full(sampler: NegativeSampler, user_ids: np.ndarray) -> None:
    for user in (sampler.available < 1).nonzero().flatten()[:1].tolist():
        raise DataError(
            f"user {user_ids[user]} has interacted with all {sampler.count[user]} items: there is none to rank "
            "against; leave the user out"
        )


def count_warnings(name: str, published: dict[str, int], *ratings: Ratings) -> list[str]:
    """A warning for each of the numbers of users, items and ratings that differs from the published one."""
    found = {
        "users": len(np.unique(np.concatenate([r.users for r in ratings]))),
        "items": len(np.unique(np.concatenate([r.items for r in ratings]))),
        "ratings": sum(map(len, ratings)),
    }
    return count_mismatches(name, found, published)
