"""The three-file format of He et al. 2017, in which most of the literature shares its splits.

PREFIX.train.rating and PREFIX.test.rating have user, item, rating and time on each line, separated by tabs; line k of
PREFIX.test.negative has `(user,item)` of line k of the second and the items it is ranked against. Ids are any numbers.
"""

import io
from pathlib import Path

import numpy as np

from lawn.data.download import download
from lawn.data.interactions import Interactions
from lawn.data.ratings import (
    Ratings,
    count_ties,
    count_warnings,
    draw_candidates,
    drop_repeats,
    hold_out_latest,
    make_interactions,
    naming_file,
    ordered_in_time,
    read_lines,
    read_ratings,
    renumber,
    sort_by_time,
)
from lawn.errors import ConfigError, DataError

URL = "https://raw.githubusercontent.com/hexiangnan/neural_collaborative_filtering/master/Data"
RELEASED = ("ml-1m", "pinterest-20")  # the prefixes that are there


def he2017(
    root: Path,
    prefix: str,
    split: str,
    *,
    seed: int,
    negatives: int,
    candidates: int,
    published: dict[str, int],
) -> Interactions:
    """Read `root`/PREFIX/PREFIX.*; downloads those of He et al. if they are missing.

    split="test" uses the held-out items and candidates of the files. split="val" removes them, holds out the latest
    item of the training file (a random one if no user has ratings at different times) and draws `candidates`, both by
    `seed`.
    """
    train_path, test_path, listed_path = (
        _fetch(root / prefix / f"{prefix}.{part}", prefix in RELEASED)
        for part in ("train.rating", "test.rating", "test.negative")
    )
    train, test = read_ratings(train_path), read_ratings(test_path)
    listed = _read_candidates(listed_path, test)
    (train_users, test_users), user_ids = renumber(train.users, test.users)
    (train_items, test_items, listed), item_ids = renumber(train.items, test.items, listed)
    train, test = Ratings(train_users, train_items, train.times), Ratings(test_users, test_items, test.times)
    size = len(user_ids), len(item_ids)
    warnings = count_warnings(prefix, published, train, test)
    train, notes = _clean(train, test)
    _check_users(test_path, train, test, user_ids)
    if split == "val":
        everything = train.concatenate(test)
        train, untimed = ordered_in_time(train, seed)
        train, held = hold_out_latest(train)
        listed = draw_candidates(everything, held, size, candidates, seed, user_ids)
        notes += untimed + count_ties(train, held)
    else:
        if candidates > listed.shape[1]:
            raise ConfigError(f"dataset.candidates={candidates}: {listed_path} has {listed.shape[1]} for each user")
        train, held = sort_by_time(train), test
        listed, more = _once(listed[:, :candidates], test)
        notes += more + _trained(listed, train, test)
    warnings += [f"{prefix}: {note}" for note in notes]
    with naming_file(train_path):
        return make_interactions(train, held, listed, size, negatives, warnings, user_ids)


def _fetch(path: Path, released: bool) -> Path:
    if not path.exists():
        if not released:
            raise DataError(f"{path}: not there; dataset.prefix is the first part of the names of three such files")
        download(f"{URL}/{path.name}", path, None, f"put {path.name} from there into {path.parent}")
    return path


def _read_candidates(path: Path, test: Ratings) -> np.ndarray:
    """The candidates of each held-out rating, int64 [len(test), C]."""
    text = read_lines(
        path,
        rb"\(N,N\)(?:\tN)++".replace(b"N", rb"\d{1,18}+"),
        "(user,item) and the items to rank it against, separated by tabs",
    )
    lines = text.translate(bytes.maketrans(b",", b"\t"), delete=b"()\r").splitlines()
    widths = [line.count(b"\t") for line in lines]
    for number, width in enumerate(widths, 1):
        if width != widths[0]:
            raise DataError(f"{path}, line {number}: {width - 1} items to rank against, line 1 has {widths[0] - 1}")
    if len(lines) != len(test):
        raise DataError(f"{path}: {len(lines)} lines, but {len(test)} held-out ratings")
    table = np.loadtxt(io.BytesIO(b"\n".join(lines)), dtype=np.int64, delimiter="\t", ndmin=2, comments=None)
    for number in 1 + np.flatnonzero((table[:, 0] != test.users) | (table[:, 1] != test.items))[:1]:
        raise DataError(f"{path}, line {number}: not the user and item of that line of the held-out ratings")
    return table[:, 2:]


def _check_users(path: Path, train: Ratings, test: Ratings, user_ids: np.ndarray) -> None:
    """Raises DataError unless every held-out user has training ratings and one held-out item."""
    first = np.unique(test.users, return_index=True)[1]
    for index in np.setdiff1d(np.arange(len(test)), first)[:1]:
        raise DataError(f"{path}, line {index + 1}: a second held-out item of user {user_ids[test.users[index]]}")
    for index in np.flatnonzero(~np.isin(test.users, train.users))[:1]:
        user = user_ids[test.users[index]]
        raise DataError(f"{path}, line {index + 1}: user {user} has no line of its own in the training file")


def _clean(train: Ratings, test: Ratings) -> tuple[Ratings, list[str]]:
    """The training ratings without repeats and held-out pairs, and notes on what was removed."""
    train, notes = drop_repeats(train)
    stride = train.concatenate(test).size[1]
    leaked = np.isin(train.users * stride + train.items, test.users * stride + test.items)
    if leaked.any():
        notes.append(f"{leaked.sum()} held-out ratings are in the training file too and left out there")
    return train[~leaked], notes


def _once(listed: np.ndarray, test: Ratings) -> tuple[np.ndarray, list[str]]:
    """Count repeated candidates once: the held-out item, which is not ranked against itself, replaces the others."""
    order = listed.argsort(axis=1, kind="stable")
    ranked = np.take_along_axis(listed, order, axis=1)
    repeated = np.zeros_like(listed, bool)
    np.put_along_axis(repeated, order[:, 1:], ranked[:, 1:] == ranked[:, :-1], axis=1)
    own = listed == test.items[:, None]
    notes = []
    if own.any():
        notes.append(f"{own.any(axis=1).sum()} users have their held-out item among their candidates; ignored there")
    if (repeated & ~own).any():
        notes.append(f"{(repeated & ~own).sum()} candidates are repeated in their line; they count once")
    return np.where(repeated, test.items[:, None], listed), notes


def _trained(listed: np.ndarray, train: Ratings, test: Ratings) -> list[str]:
    """A note on candidates that the user is trained on, as when files of two splits are mixed."""
    stride = 1 + max(listed.max(), train.items.max())
    count = np.isin(test.users[:, None] * stride + listed, train.users * stride + train.items).sum()
    return [f"{count} candidates are items that their user is trained on"] if count else []
