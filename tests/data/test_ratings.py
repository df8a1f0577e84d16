"""Rating files, and leave-one-out on a handful of ratings checked item by item."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lawn.data.ratings import Ratings, drop_repeats, hold_out_latest, leave_one_out, read_ratings
from lawn.errors import ConfigError, DataError
from tests.helpers import RATINGS, synthetic_ratings, write_ratings


def by_hand(tmp_path, split: str):
    write_ratings(tmp_path / "u.data", RATINGS)
    ratings = read_ratings(tmp_path / "u.data")
    return leave_one_out(ratings, split=split, seed=0, negatives=2, candidates=2, warnings=[])


def test_test_split_by_hand(tmp_path):
    data = by_hand(tmp_path, "test")
    assert (data.num_users, data.num_items) == (3, 6)
    train = list(zip(data.users.tolist(), data.items.tolist(), strict=True))
    assert train == [(0, 3), (0, 0), (0, 1), (1, 0), (1, 4), (2, 1)]  # by user, then time
    assert data.candidate_users.tolist() == [0, 1, 2]
    assert data.candidates[:, 0].tolist() == [2, 5, 5]  # of the two items at t=9 the later in the file
    unrated = [{4, 5}, {1, 2, 3}, {0, 2, 3, 4}]
    for row, allowed in zip(data.candidates[:, 1:].tolist(), unrated, strict=True):
        assert len(set(row)) == 2
        assert set(row) <= allowed
    assert data.warnings == []


def test_val_split_by_hand(tmp_path):
    data = by_hand(tmp_path, "val")
    train = list(zip(data.users.tolist(), data.items.tolist(), strict=True))
    assert train == [(0, 3), (0, 0), (1, 0), (2, 1)]  # no user's latest item: those are for the test
    assert data.candidate_users.tolist() == [0, 1]
    assert data.candidates[:, 0].tolist() == [1, 4]
    assert not set(data.candidates[0, 1:].tolist()) & {0, 1, 2, 3}  # nor is a test item a candidate
    assert data.warnings == ["1 users have too few ratings and are not evaluated"]


interactions = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 6), st.integers(0, 3)), min_size=1, max_size=30)


@given(interactions)
@settings(deadline=None)
def test_holding_out_keeps_every_rating_and_takes_the_latest(rows):
    ratings = Ratings(*np.array(rows).T)
    rest, held = hold_out_latest(ratings)
    assert sorted(zip(*map(np.ndarray.tolist, vars(rest.concatenate(held)).values()), strict=True)) == sorted(rows)
    for user, item, time in zip(held.users, held.items, held.times, strict=True):
        mine = [(t, place, i) for place, (u, i, t) in enumerate(rows) if u == user]
        assert len(mine) > 1
        assert max(mine)[::2] == (time, item)
    assert len(held) == sum(sum(u == user for u, _, _ in rows) > 1 for user in range(5))


@given(interactions)
@settings(deadline=None)
def test_of_repeated_ratings_the_latest_stays(rows):
    kept, notes = drop_repeats(Ratings(*np.array(rows).T))
    latest: dict[tuple[int, int], tuple[int, int]] = {}  # time, and place in the file
    for place, (u, i, t) in enumerate(rows):
        latest[u, i] = max((t, place), latest.get((u, i), (t, place)))
    expected = rows if len(rows) == len(latest) else [(u, i, t) for (u, i), (t, _) in latest.items()]
    assert sorted(zip(kept.users, kept.items, kept.times, strict=True)) == sorted(expected)
    assert (notes == []) == (len(rows) == len(latest))
    _, held = hold_out_latest(kept)
    for user, item in zip(held.users, held.items, strict=True):  # as if the others had not been in the file
        assert item == max((when, i) for (u, i), when in latest.items() if u == user)[1]


def test_too_many_candidates(tmp_path):
    write_ratings(tmp_path / "u.data", RATINGS)
    ratings = read_ratings(tmp_path / "u.data")
    with pytest.raises(ConfigError, match=r"dataset.candidates=3: user 10 has only 2 items"):
        leave_one_out(ratings, split="test", seed=0, negatives=1, candidates=3, warnings=[])


def test_nothing_to_hold_out(tmp_path):
    write_ratings(tmp_path / "u.data", [(1, 1, 1, 1), (2, 2, 1, 1)])
    with pytest.raises(DataError, match="nothing to hold out"):
        leave_one_out(read_ratings(tmp_path / "u.data"), split="test", seed=0, negatives=1, candidates=1, warnings=[])


def test_what_is_no_file_and_what_cannot_be_ranked_or_drawn(tmp_path):
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(DataError, match="not there, or no file"):
            read_ratings(path)
    (tmp_path / "unreadable").symlink_to("/proc/self/mem")  # even for root: its first byte is an error
    with pytest.raises(DataError, match=r"unreadable: cannot be read \(.*\); mend it or delete it"):
        read_ratings(tmp_path / "unreadable")
    write_ratings(tmp_path / "u.data", [(7, item, 1, item) for item in range(1, 6)])
    ratings = read_ratings(tmp_path / "u.data")
    with pytest.raises(DataError, match="user 7 has interacted with all 5 items"):
        leave_one_out(ratings, split="test", seed=0, negatives=1, candidates=1, warnings=[])
    write_ratings(tmp_path / "u.data", RATINGS)
    with pytest.raises(ConfigError, match=r"dataset.negatives=7: there are only 6 items"):
        leave_one_out(read_ratings(tmp_path / "u.data"), split="test", seed=0, negatives=7, candidates=1, warnings=[])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "empty"),
        (b"1\t2\t3\t4\n1\t2\t3\n", "line 2"),
        (b"1\t2\t3\t4\n1\t2\t3\t4\n1\t2", "line 3.*cut off"),
        (b"1\t2\t3\t4\n5\t6\t7\t8", "line 2.*cut off"),
        (b"1,2,3,4\n", "line 1"),
        (b"1::2::3::4\n", "line 1"),
        (b"1\t2\t3\t4\n1\t-2\t3\t4\n", "line 2"),
        (b"1\t2\tnan\t4\n", "line 1"),
        (b"1\t2\t0\t4\n", "line 1: want user, item, rating \\(1 or more\\)"),
        (b"1\t2\t4.5\t4\n", "line 1"),
        (b"\xff\xfe\x00\n", "line 1"),
        (b"1\t2\t3\t4\t5\n", "line 1"),
        (b"1\t2\t3\t4\n\n1\t2\t3\t4\n", "line 2"),
        (b"1\t99999999999999999999\t3\t4\n", "line 1"),
        (b"\xef\xbb\xbf1\t2\t3\t4\n", "line 1"),
        (b"user\titem\trating\ttime\n1\t2\t3\t4\n", "line 1"),
        (b"1\t2\t3\t4\n1\t2\t3\t4\n\n", "line 3"),
    ],
)
def test_damaged_files_are_named_with_the_line(tmp_path, text, message):
    path = tmp_path / "u.data"
    path.write_bytes(text)
    with pytest.raises(DataError, match=message) as error:
        read_ratings(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


HEADER = b"userId,movieId,rating,timestamp\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (HEADER, "empty"),
        (HEADER + b"1,2,0,4\n", "line 2: want user, item, rating \\(above 0\\) and time, numbers"),
        (HEADER + b"1,2,0.0,4\n", "line 2"),
        (HEADER + b"1,2,3.5,4\n1,2,.5,4\n", "line 3"),
        (HEADER + HEADER, "line 2"),
        (HEADER + b"1.5,2,3.5,4\n", "line 2"),
        (b"\xef\xbb\xbf" + HEADER, "line 1"),
        (b"movieId,userId,rating,timestamp\n1,2,3,4\n", "line 1"),
    ],
)
def test_damaged_files_with_decimals_are_named_with_the_line(tmp_path, text, message):
    (tmp_path / "ratings.csv").write_bytes(text)
    with pytest.raises(DataError, match=message):
        read_ratings(tmp_path / "ratings.csv", ",", "userId,movieId,rating,timestamp", fractions=True)


def test_decimals_and_a_header(tmp_path):
    (tmp_path / "ratings.csv").write_bytes(HEADER + b"7,20,0.5,964982703.25\r\n7,10,5.0,964982703\n")
    got = read_ratings(tmp_path / "ratings.csv", ",", "userId,movieId,rating,timestamp", fractions=True)
    assert (got.users.tolist(), got.items.tolist()) == ([7, 7], [20, 10])
    assert got.times.tolist() == [964982703.25, 964982703.0]


def test_equal_times_hold_out_random_items(tmp_path):
    """What is held out is drawn by the dataset's seed, a warning says so; the validation split knows the same test."""
    rows = [(user, item, 1, 5 + user) for user in range(1, 41) for item in range(user, user + 12)]
    write_ratings(tmp_path / "u.data", rows)
    ratings = read_ratings(tmp_path / "u.data")
    keys = {"negatives": 1, "candidates": 5, "warnings": []}
    one, two, other = (leave_one_out(ratings, split="test", seed=seed, **keys) for seed in (0, 0, 1))
    assert one.warnings == ["no user has ratings at different times, so a random one of each is held out"]
    assert one.candidates.tolist() == two.candidates.tolist()
    places = [data.candidates[:, 0] - data.candidate_users for data in (one, other)]  # of an item among its user's
    assert all(len(place.unique()) > 5 for place in places)
    assert not torch.equal(*places)
    val = leave_one_out(ratings, split="val", seed=0, **keys)
    pairs = {(u, i) for u, i in zip(val.users.tolist(), val.items.tolist(), strict=True)}
    assert not pairs & set(zip(one.candidate_users.tolist(), one.candidates[:, 0].tolist(), strict=True))


def test_ties_in_time_for_most_users_are_a_warning(tmp_path):
    """As days do. The last in the file is held out, as where it is open for a few."""
    rows = [(user, item, 1, item // 3) for user in range(1, 6) for item in range(user, user + 9)]
    write_ratings(tmp_path / "u.data", rows)
    keys = {"seed": 0, "negatives": 1, "candidates": 1, "warnings": []}
    data = leave_one_out(read_ratings(tmp_path / "u.data"), split="test", **keys)
    note = "3 of 5 users have several ratings at their latest time: the last in the file is held out"
    assert data.warnings == [note]
    assert data.candidates[:, 0].tolist() == [8, 9, 10, 11, 12]
    write_ratings(tmp_path / "half", [row for row in rows if row[0] < 3])
    assert leave_one_out(read_ratings(tmp_path / "half"), split="test", **keys).warnings == []


def test_line_ends_and_ids_make_no_difference(tmp_path):
    def read(name: str, rows: list[tuple[int, int, int, int]], end: str = "\n"):
        (tmp_path / name).write_text("".join("\t".join(map(str, row)) + end for row in rows), newline="")
        ratings = read_ratings(tmp_path / name)
        return leave_one_out(ratings, split="test", seed=0, negatives=2, candidates=20, warnings=[])

    rows = synthetic_ratings()
    plain = read("plain", rows)
    for other in (
        read("crlf", rows, "\r\n"),
        read("from 0", [(u - 1, i - 1, r, t) for u, i, r, t in rows]),
        read("gaps", [(3 * u, 10**12 + 7 * i, r, t) for u, i, r, t in rows]),
    ):
        assert other.fingerprint == plain.fingerprint
        assert torch.equal(other.candidates, plain.candidates)


@given(st.data(), st.sampled_from(["\t", "::"]))
@settings(deadline=None, max_examples=200)
def test_a_damaged_byte_is_found_or_does_no_harm(tmp_path_factory, data, separator):
    """One byte is cut out, put in or changed: the file is refused by line, or has the numbers that it seems to."""
    rows = data.draw(st.lists(st.tuples(*[st.integers(1, 10**6)] * 4), min_size=1, max_size=5))
    text = bytearray("".join(separator.join(map(str, row)) + "\n" for row in rows), "ascii")
    where = data.draw(st.integers(0, len(text) - 1))
    how, byte = data.draw(st.sampled_from(["cut", "put", "change"])), data.draw(st.integers(0, 255))
    text[where : where + (how != "put")] = b"" if how == "cut" else bytes([byte])
    path = tmp_path_factory.mktemp("fuzz") / "ratings"
    path.write_bytes(text)
    expected = []
    try:
        for line in bytes(text).decode("ascii").removesuffix("\n").split("\n"):
            fields = line.removesuffix("\r").split(separator)
            if not (len(fields) == 4 and all(f.isdigit() and len(f) < 19 for f in fields) and fields[2][0] != "0"):
                raise ValueError
            expected.append([int(f) for f in fields])
        if not text.endswith(b"\n"):
            raise ValueError
    except ValueError:
        with pytest.raises(DataError, match=r"line \d|empty"):
            read_ratings(path, separator)
    else:
        got = read_ratings(path, separator)
        assert got.times.tolist() == [row[3] for row in expected]
        assert got.users.tolist() == [row[0] for row in expected]
        assert got.items.tolist() == [row[1] for row in expected]
