import numpy as np
import pytest

from lawn.data import movielens
from lawn.data.movielens import leave_one_out, movielens100k, read_ratings
from lawn.errors import ConfigError, DataError
from tests.helpers import synthetic_ratings, write_ratings

# Three users, six items. Users and items of the file are 10, 20, 30 and 1 to 6.
#   user 10: item 1 at t=5, item 2 at t=9, item 3 at t=9 (later in the file), item 4 at t=1
#   user 20: item 6 at t=3, item 5 at t=2, item 1 at t=1
#   user 30: item 2 at t=7, item 6 at t=8
ROWS = [
    (10, 1, 5, 5), (20, 6, 4, 3), (10, 2, 3, 9), (30, 2, 3, 7), (10, 3, 3, 9), (20, 5, 1, 2), (10, 4, 2, 1),
    (30, 6, 1, 8), (20, 1, 1, 1),
]  # fmt: skip


def by_hand(tmp_path, split: str):
    write_ratings(tmp_path / "u.data", ROWS)
    users, items, times = read_ratings(tmp_path / "u.data")
    return leave_one_out(users, items, times, split=split, seed=0, negatives=2, candidates=2, warnings=[])


def test_test_split_by_hand(tmp_path):
    data = by_hand(tmp_path, "test")
    assert (data.num_users, data.num_items) == (3, 6)
    train = sorted(zip(data.users.tolist(), data.items.tolist(), strict=True))
    assert train == [(0, 0), (0, 1), (0, 3), (1, 0), (1, 4), (2, 1)]
    assert data.candidate_users.tolist() == [0, 1, 2]
    assert data.candidates[:, 0].tolist() == [2, 5, 5]  # of the two items at t=9 the later in the file
    unrated = [{4, 5}, {1, 2, 3}, {0, 2, 3, 4}]
    for row, allowed in zip(data.candidates[:, 1:].tolist(), unrated, strict=True):
        assert len(set(row)) == 2
        assert set(row) <= allowed
    assert data.warnings == []


def test_val_split_by_hand(tmp_path):
    data = by_hand(tmp_path, "val")
    train = sorted(zip(data.users.tolist(), data.items.tolist(), strict=True))
    assert train == [(0, 0), (0, 3), (1, 0), (2, 1), (2, 5)]  # user 2 has too few ratings: trained on, not evaluated
    assert data.candidate_users.tolist() == [0, 1]
    assert data.candidates[:, 0].tolist() == [1, 4]
    assert data.warnings == ["1 users have too few ratings and are not evaluated"]


def test_candidates_are_the_same_for_every_run_seed_and_differ_by_dataset_seed(tmp_path):
    write_ratings(tmp_path / "ml-100k" / "u.data", synthetic_ratings())
    one, two, other = (
        movielens100k(tmp_path, "test", seed=seed, negatives=4, candidates=50).candidates for seed in (0, 0, 1)
    )
    assert one.tolist() == two.tolist() != other.tolist()


def test_deviating_counts_are_a_warning(tmp_path):
    write_ratings(tmp_path / "ml-100k" / "u.data", ROWS)
    warnings = movielens100k(tmp_path, "test", seed=0, negatives=1, candidates=1).warnings
    assert warnings == [
        "ml-100k: 3 users, published are 943",
        "ml-100k: 6 items, published are 1682",
        "ml-100k: 9 ratings, published are 100000",
    ]


def test_too_many_candidates(tmp_path):
    write_ratings(tmp_path / "ml-100k" / "u.data", ROWS)
    with pytest.raises(ConfigError, match=r"dataset.candidates=3: some user has only 2 items"):
        movielens100k(tmp_path, "test", seed=0, negatives=1, candidates=3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "empty"),
        (b"1\t2\t3\t4\n1\t2\t3\n", "line 2"),
        (b"1\t2\t3\t4\n1\t2\t3\t4\n1\t2", "line 3"),
        (b"1\t2\t3\t4\n5\t6\t7\t8", "line 2: cut off"),
        (b"1,2,3,4\n", "line 1"),
        (b"1\t2\t3\t4\n1\t-2\t3\t4\n", "line 2"),
        (b"1\t2\tnan\t4\n", "line 1"),
        (b"\xff\xfe\x00\n", "line 1"),
        (b"1\t2\t3\t4\t5\n", "line 1"),
        (b"1\t99999999999999999999\t3\t4\n", "line 1"),
    ],
)
def test_damaged_files_are_named_with_the_line(tmp_path, text, message):
    path = tmp_path / "u.data"
    path.write_bytes(text)
    with pytest.raises(DataError, match=message) as error:
        read_ratings(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_absent_and_offline(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError("no route to host")

    monkeypatch.setattr("torchvision.datasets.utils.download_url", refuse)
    with pytest.raises(DataError, match=r"cannot download .*put ml-100k.zip from there, or its u.data, into"):
        movielens100k(tmp_path, "test", seed=0, negatives=4, candidates=99)
    assert list((tmp_path / "ml-100k").iterdir()) == []


def test_the_archive_is_read_and_a_bad_one_named(tmp_path):
    from zipfile import ZipFile

    folder = tmp_path / "ml-100k"
    folder.mkdir()
    write_ratings(tmp_path / "source", synthetic_ratings())
    with ZipFile(folder / "ml-100k.zip", "w") as archive:
        archive.write(tmp_path / "source", "ml-100k/u.data")
        archive.writestr("../escape", "x")
    assert movielens100k(tmp_path, "test", seed=0, negatives=4, candidates=20).num_users == 30
    assert not (tmp_path / "escape").exists()
    (folder / "u.data").unlink()
    (folder / "ml-100k.zip").write_bytes(b"not a zip")
    with pytest.raises(DataError, match=r"ml-100k.zip: .*delete it"):
        movielens100k(tmp_path, "test", seed=0, negatives=4, candidates=20)


@pytest.mark.data
def test_real_counts(data_dir):
    data = movielens100k(data_dir, "test", seed=0, negatives=4, candidates=99)
    assert data.warnings == []
    assert (data.num_users, data.num_items, len(data.users)) == (943, 1682, 100_000 - 943)
    users, items, times = read_ratings(data_dir / "ml-100k" / "u.data")
    for user in (0, 41, 942):  # the held-out item is one of the latest, and no candidate was rated
        rated = items[users == user]
        assert data.candidates[user, 0].item() in items[(users == user) & (times == times[users == user].max())]
        assert not np.isin(data.candidates[user, 1:].numpy(), rated).any()
        assert len(set(data.candidates[user].tolist())) == 100
    assert movielens.PUBLISHED["ratings"] == len(users)
