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
from lawn.data.interactions import Interactions, Unseen
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
    """Who had to do with what, and when: int64 [N] each. How good a rating was does not matter.

    Ids are those of the file until `numbered` has made them count from 0.
    """

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


def read_lines(path: Path, line: bytes, wanted: str, header: bytes = b"") -> bytes:
    """The bytes of a text file whose every line matches `line`, a pattern without groups that can backtrack; of a first
    line that is `header` they begin after it.

    Raises DataError that names the file, and the first line that is not as `wanted` says.
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
    assert whole is not None  # it matches no line too
    if whole.end() < len(text):
        number = text.count(b"\n", 0, whole.end()) + 1
        found, newline, _ = text[whole.end() :].partition(b"\n")
        cut = "" if newline else " (cut off before the end of the line)"
        raise DataError(f"{path}, line {number}: want {wanted}, found {found[:60]!r}{cut}; mend it or delete it")
    return text[start:]


def read_ratings(path: Path, separator: str = "\t", header: str = "", fractions: bool = False) -> Ratings:
    """A file with user, item, rating and time on each line, with the ids that stand there.

    `header` is a first line that may be there. With `fractions`, ratings and times may have decimals; times are
    float64 then. Raises DataError that names the file and the line.
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


def numbered(*ids: np.ndarray) -> tuple[list[np.ndarray], np.ndarray]:
    """Any numbers as 0, 1, ... in their order, the same for all arrays [...]; and what each of these was [n]."""
    different, places = np.unique(np.concatenate([each.ravel() for each in ids]), return_inverse=True)
    parts = np.split(places.reshape(-1), np.cumsum([each.size for each in ids])[:-1])
    return [part.reshape(each.shape) for part, each in zip(parts, ids, strict=True)], different


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


def ordered_in_time(ratings: Ratings, seed: int) -> tuple[Ratings, list[str]]:
    """The same, with random times by `seed` where the times tell no user's ratings apart; a warning says so."""
    ordered = by_time(ratings)
    if ((np.diff(ordered.users) == 0) & (np.diff(ordered.times) != 0)).any():
        return ratings, []
    times = np.random.default_rng(seed).permutation(len(ratings))
    note = "no user has ratings at different times, so a random one of each is held out"
    return Ratings(ratings.users, ratings.items, times), [note]


def hold_out_latest(ratings: Ratings) -> tuple[Ratings, Ratings]:
    """All but the latest rating of each user, and these; of users with a single rating nothing is held out.

    Of a user's ratings at the same time the last in the file is the latest. Both results are sorted by user and time.
    """
    ordered = by_time(ratings)
    last = np.append(ordered.users[1:] != ordered.users[:-1], True)
    single = np.bincount(ordered.users)[ordered.users] == 1
    held = last & ~single
    return ordered[~held], ordered[held]


def count_ties(rest: Ratings, held: Ratings) -> list[str]:
    """A warning where for most users the file's order, not the time, says which of the ratings is `held`."""
    last = np.flatnonzero(np.append(rest.users[1:] != rest.users[:-1], True))
    before = last[np.searchsorted(rest.users[last], held.users)]
    tied = int((rest.times[before] == held.times).sum())
    if 2 * tied <= len(held):
        return []
    return [f"{tied} of {len(held)} users have several ratings at their latest time: the last in the file is held out"]


def leave_one_out(
    ratings: Ratings, *, split: str, seed: int, negatives: int, candidates: int, warnings: list[str]
) -> Interactions:
    """Hold out the latest item of every user and rank it among `candidates` items without a rating.

    split="val" puts the latest item aside altogether and holds out the latest of the others. Candidates are drawn
    once by `seed`, without repetition, among the items that the user has no rating for at all; training negatives
    among those without a training rating, so the held-out item can be one, as in He et al.'s code. Where the times of
    the file tell no user's ratings apart, `seed` draws what is held out.
    """
    (users,), user_ids = numbered(ratings.users)
    (items,), _ = numbered(ratings.items)
    ratings, notes = drop_repeats(Ratings(users, items, ratings.times))
    ratings, untimed = ordered_in_time(ratings, seed)
    train, held = hold_out_latest(ratings)
    if split == "val":
        train, held = hold_out_latest(train)
    listed = draw_candidates(ratings, held, ratings.size, candidates, seed, user_ids)
    warnings = [*warnings, *notes, *untimed, *count_ties(train, held)]
    return bind(train, held, listed, ratings.size, negatives, warnings, user_ids)


def draw_candidates(
    seen: Ratings, held: Ratings, size: tuple[int, int], count: int, seed: int, user_ids: np.ndarray
) -> np.ndarray:
    """For each held-out rating `count` items, without repetition, that its user has no rating in `seen` for."""
    unseen = Unseen(torch.from_numpy(seen.users), torch.from_numpy(seen.items), *size)
    _refuse_full(unseen, user_ids)
    available = unseen.available.numpy()[held.users]
    if count > available.min(initial=count):
        user, most = user_ids[held.users[available.argmin()]], available.min()
        raise ConfigError(
            f"dataset.candidates={count}: user {user} has only {most} items without a rating; take at most {most}, "
            "or leave the user out of the file"
        )
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
    user_ids: np.ndarray,
) -> Interactions:
    """Interactions to train on and to rank. Users of whom nothing is held out are trained on; a warning counts them.

    `user_ids` are what the users are called in the file [users], for errors.
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
    _refuse_full(data.unseen, user_ids)
    return data


def _refuse_full(unseen: Unseen, user_ids: np.ndarray) -> None:
    for user in (unseen.available < 1).nonzero().flatten()[:1].tolist():
        raise DataError(
            f"user {user_ids[user]} has interacted with all {unseen.count[user]} items: there is none to rank against; "
            "leave the user out"
        )


def count_warnings(name: str, published: dict[str, int], *ratings: Ratings) -> list[str]:
    """A line for each of users, items and ratings that are not as many as were published."""
    found = {
        "users": len(np.unique(np.concatenate([r.users for r in ratings]))),
        "items": len(np.unique(np.concatenate([r.items for r in ratings]))),
        "ratings": sum(map(len, ratings)),
    }
    return count_mismatches(name, found, published)
