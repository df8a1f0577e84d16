import hashlib

import numpy as np
import pytest
import torch

from lawn.data.movielens import MD5, PUBLISHED, movielens, movielens1m, movielens100k
from lawn.data.ratings import read_ratings
from lawn.errors import DataError
from tests.helpers import RATINGS, synthetic_ratings, write_ratings, write_three_files

OPTIONS = {"seed": 0, "negatives": 4, "candidates": 20}


def test_candidates_are_the_same_for_every_run_seed_and_differ_by_dataset_seed(tmp_path):
    write_ratings(tmp_path / "ml-100k" / "u.data", synthetic_ratings())
    one, two, other = (
        movielens100k(tmp_path, "test", seed=seed, negatives=4, candidates=50).candidates for seed in (0, 0, 1)
    )
    assert one.tolist() == two.tolist() != other.tolist()


def test_deviating_counts_are_a_warning(tmp_path):
    write_ratings(tmp_path / "ml-100k" / "u.data", RATINGS)
    warnings = movielens100k(tmp_path, "test", seed=0, negatives=1, candidates=1).warnings
    assert warnings == [
        "ml-100k: 3 users, published are 943",
        "ml-100k: 6 items, published are 1682",
        "ml-100k: 9 ratings, published are 100000",
    ]


def test_repeated_ratings_are_reported(tmp_path):
    write_ratings(tmp_path / "ml-100k" / "u.data", [*RATINGS, (10, 1, 4, 0)])
    data = movielens100k(tmp_path, "test", seed=0, negatives=1, candidates=1)
    assert len(data.users) == len(RATINGS) - 3
    assert data.warnings[-1] == "1 repeated ratings of an item by the same user are left out"


@pytest.mark.parametrize("rows", [RATINGS, synthetic_ratings()])
@pytest.mark.parametrize("split", ["test", "val"])
def test_movielens1m_is_the_same_from_ratings_and_from_three_files(tmp_path, rows, split):
    write_ratings(tmp_path / "ml-1m" / "ratings.dat", rows, "::")
    options = {"seed": 0, "negatives": 4, "candidates": 2}
    one = movielens1m(tmp_path, split, **options)
    test = movielens1m(tmp_path, "test", **options)
    write_three_files(tmp_path / "ml-1m", "ml-1m", read_ratings(tmp_path / "ml-1m" / "ratings.dat", "::"), test)
    other = movielens1m(tmp_path, split, prefix="ml-1m", **options)
    assert (one.num_users, one.num_items) == (other.num_users, other.num_items)
    for name in ("users", "items", "candidate_users", "candidates"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name
    assert one.warnings == other.warnings


def test_any_version_is_read_by_its_form(tmp_path):
    """The same ratings as u.data, ratings.dat with half stars, and ratings.csv with a header and decimal times."""
    rows = synthetic_ratings()
    write_ratings(tmp_path / "ml-100k" / "u.data", rows)
    write_ratings(tmp_path / "ml-10M100K" / "ratings.dat", [(u, i, r - 0.5, t) for u, i, r, t in rows], "::")
    write_ratings(tmp_path / "ml-latest-small" / "ratings.csv", [(u, i, r / 2, float(t)) for u, i, r, t in rows], ",")
    path = tmp_path / "ml-latest-small" / "ratings.csv"
    path.write_text("userId,movieId,rating,timestamp\n" + path.read_text())
    for split in ("test", "val"):
        expected = movielens100k(tmp_path, split, **OPTIONS)
        for name in ("ml-100k/u.data", "ml-10M100K/ratings.dat", "ml-latest-small/ratings.csv"):
            data = movielens(tmp_path, split, path=name, **OPTIONS)
            assert data.fingerprint == expected.fingerprint
            assert data.warnings == []
    with pytest.raises(DataError, match=r"ml-25m/ratings.csv: not there, or no file; dataset.path is"):
        movielens(tmp_path, "test", path="ml-25m/ratings.csv", **OPTIONS)


def test_absent_and_offline(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError("no route to host")

    monkeypatch.setattr("torchvision.datasets.utils.download_url", refuse)
    with pytest.raises(DataError, match=r"cannot download .*put ml-100k.zip from there, or its u.data, into"):
        movielens100k(tmp_path, "test", **OPTIONS)
    with pytest.raises(DataError, match=r"cannot download .*put ml-1m.zip from there, or its ratings.dat, into"):
        movielens1m(tmp_path, "test", **OPTIONS)
    with pytest.raises(DataError, match=r"cannot download .*put ml-1m.train.rating from there into"):
        movielens1m(tmp_path, "test", prefix="ml-1m", **OPTIONS)
    assert list(tmp_path.iterdir()) == []


def test_the_archive_is_read_and_a_bad_one_named(tmp_path, monkeypatch):
    from zipfile import ZipFile

    folder = tmp_path / "ml-100k"
    folder.mkdir()
    write_ratings(tmp_path / "source", synthetic_ratings())
    with ZipFile(folder / "ml-100k.zip", "w") as archive:
        archive.write(tmp_path / "source", "ml-100k/u.data")
        archive.writestr("../escape", "x")
    content = (folder / "ml-100k.zip").read_bytes()
    monkeypatch.setitem(MD5, "ml-100k", hashlib.md5(content).hexdigest())
    assert movielens100k(tmp_path, "test", **OPTIONS).num_users == 30
    assert not (tmp_path / "escape").exists()
    (folder / "u.data").unlink()
    for damaged in (b"not a zip", content[:-1], content[:200] + b"!" + content[201:]):
        (folder / "ml-100k.zip").write_bytes(damaged)
        with pytest.raises(DataError, match=r"ml-100k.zip: not the published file .*delete it"):
            movielens100k(tmp_path, "test", **OPTIONS)
    with ZipFile(folder / "ml-100k.zip", "w") as archive:
        archive.write(tmp_path / "source", "elsewhere/u.data")
    monkeypatch.setitem(MD5, "ml-100k", hashlib.md5((folder / "ml-100k.zip").read_bytes()).hexdigest())
    with pytest.raises(DataError, match=r"ml-100k.zip: .*no item named.*delete it"):
        movielens100k(tmp_path, "test", **OPTIONS)
    assert not (folder / "u.data").exists()


@pytest.mark.data
def test_real_movielens100k(data_dir):
    data = movielens100k(data_dir, "test", seed=0, negatives=4, candidates=99)
    assert data.warnings == []
    assert (data.num_users, data.num_items, len(data.users)) == (943, 1682, 100_000 - 943)
    ratings = read_ratings(data_dir / "ml-100k" / "u.data")
    for user in (0, 41, 942):  # the held-out item is one of the latest, and no candidate was rated
        mine = ratings[ratings.users == 1 + user]
        assert 1 + data.candidates[user, 0].item() in mine.items[mine.times == mine.times.max()]
        assert not np.isin(1 + data.candidates[user, 1:].numpy(), mine.items).any()
        assert len(set(data.candidates[user].tolist())) == 100
    assert PUBLISHED["ml-100k"]["ratings"] == len(ratings)
