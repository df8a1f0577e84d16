"""The three files of He et al. 2017: three users by hand, everything that can be wrong, and the released ML-1M."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lawn import metrics
from lawn.data.batching import Batching
from lawn.data.movielens import movielens1m
from lawn.data.pinterest import pinterest
from lawn.errors import ConfigError, DataError, UserError
from lawn.models.ncf import NCFMLP

TRAIN = "0\t0\t5\t10\n0\t1\t4\t20\n1\t2\t3\t5\n2\t3\t1\t7\n2\t0\t2\t6\n"
TEST = "0\t2\t5\t30\n1\t0\t4\t9\n2\t4\t4\t8\n"
NEGATIVE = "(0,2)\t3\t4\t5\n(1,0)\t1\t3\t5\n(2,4)\t1\t2\t5\n"


def write(root: Path, train: str = TRAIN, test: str = TEST, negative: str = NEGATIVE) -> None:
    (root / "tiny").mkdir(exist_ok=True)
    for part, text in (("train.rating", train), ("test.rating", test), ("test.negative", negative)):
        (root / "tiny" / f"tiny.{part}").write_text(text)


def load(root: Path, split: str = "test", candidates: int = 3):
    return pinterest(root, split, seed=0, negatives=1, candidates=candidates, prefix="tiny")


def notes(data) -> list[str]:
    return [warning for warning in data.warnings if "published" not in warning]


def test_by_hand(tmp_path):
    write(tmp_path)
    data = load(tmp_path)
    assert (data.num_users, data.num_items) == (3, 6)  # item 5 is only a candidate
    assert list(zip(data.users.tolist(), data.items.tolist(), strict=True)) == [(0, 0), (0, 1), (1, 2), (2, 0), (2, 3)]
    assert data.candidate_users.tolist() == [0, 1, 2]
    assert data.candidates.tolist() == [[2, 3, 4, 5], [0, 1, 3, 5], [4, 1, 2, 5]]
    assert notes(data) == []
    assert data.warnings[0] == "tiny: 3 users, published are 55187"
    assert load(tmp_path, candidates=2).candidates.tolist() == [[2, 3, 4], [0, 1, 3], [4, 1, 2]]


def test_val_by_hand(tmp_path):
    write(tmp_path)
    data = load(tmp_path, "val", candidates=2)
    assert list(zip(data.users.tolist(), data.items.tolist(), strict=True)) == [(0, 0), (1, 2), (2, 0)]
    assert data.candidate_users.tolist() == [0, 2]
    assert data.candidates[:, 0].tolist() == [1, 3]
    assert set(data.candidates[0, 1:].tolist()) <= {3, 4, 5}  # neither trained on nor the test item
    assert set(data.candidates[1, 1:].tolist()) <= {1, 2, 5}
    assert notes(data) == ["1 users have too few ratings and are not evaluated"]
    everything = load(tmp_path, "val", candidates=3)  # that there is
    assert [sorted(row) for row in everything.candidates[:, 1:].tolist()] == [[3, 4, 5], [1, 2, 5]]


def test_val_without_times_holds_out_at_random(tmp_path):
    train = "".join(f"{user}\t{item}\t1\t0\n" for user in range(3) for item in range(20))
    test = "".join(f"{user}\t20\t1\t0\n" for user in range(3))
    negative = "".join(f"({user},20)\t21\t22\n" for user in range(3))
    write(tmp_path, train, test, negative)
    one, two = (load(tmp_path, "val", candidates=2) for _ in range(2))
    assert torch.equal(one.candidates, two.candidates)
    assert one.candidates[:, 0].tolist() != [19, 19, 19]
    assert notes(one) == ["tiny: no user has ratings at different times, so a random one of each is held out"]


def test_what_is_handled_is_reported(tmp_path):
    write(
        tmp_path,
        train=TRAIN + "0\t1\t4\t20\n1\t0\t4\t9\n",  # a repeat, and a held-out pair
        negative="(0,2)\t3\t3\t3\n(1,0)\t0\t3\t5\n(2,4)\t1\t2\t5\n",  # repeats, and the held-out item itself
    )
    data = load(tmp_path)
    assert list(zip(data.users.tolist(), data.items.tolist(), strict=True)) == [(0, 0), (0, 1), (1, 2), (2, 0), (2, 3)]
    assert notes(data) == [
        "tiny: 1 repeated ratings of an item by the same user are left out",
        "tiny: 1 held-out ratings are in the training file too and left out there",
        "tiny: 1 users have their held-out item among their candidates; ignored there",
        "tiny: 2 candidates are repeated in their line; they count once",
    ]
    assert notes(load(tmp_path, candidates=1)) == notes(data)[:3]
    scores = torch.zeros(3, 4)
    scores[0, 1:] = 1  # the three candidates of user 0 are one item
    assert metrics.ranks(scores, data.candidates).tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    ("train", "test", "negative"),
    [
        ([(0, 0), (1, 0)], [(0, 1), (1, 2)], "(0,1)\t2\n(1,2)\t1\n"),  # held out: larger ids than in training
        ([(0, 0), (1, 0)], [(0, 2), (1, 1)], "(0,2)\t1\n(1,1)\t2\n"),  # candidates: larger ones
        ([(0, 3), (1, 1)], [(0, 1), (1, 2)], "(0,1)\t2\n(1,2)\t0\n"),  # candidates: smaller ones
    ],
)
def test_the_items_of_one_user_are_not_taken_for_those_of_another(tmp_path, train, test, negative):
    lines = ["".join(f"{user}\t{item}\t1\t1\n" for user, item in pairs) for pairs in (train, test)]
    write(tmp_path, *lines, negative)
    data = load(tmp_path, candidates=1)
    assert list(zip(data.users.tolist(), data.items.tolist(), strict=True)) == train
    assert notes(data) == []


def test_ties_in_time_are_reported(tmp_path):
    train = "".join(f"{user}\t{item}\t1\t{time}\n" for user in range(3) for item, time in ((0, 1), (1, 2), (2, 2)))
    test = "".join(f"{user}\t3\t1\t9\n" for user in range(3))
    negative = "".join(f"({user},3)\t4\n" for user in range(3))
    write(tmp_path, train, test, negative)
    data = load(tmp_path, "val", candidates=1)
    assert notes(data) == [
        "tiny: 3 of 3 users have several ratings at their latest time: the last in the file is held out"
    ]


def test_candidates_that_are_trained_on_are_reported(tmp_path):
    write(tmp_path, negative=NEGATIVE.replace("(0,2)\t3\t4\t5", "(0,2)\t0\t1\t5"))
    assert notes(load(tmp_path)) == ["tiny: 2 candidates are items that their user is trained on"]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"train": ""}, r"tiny.train.rating: empty"),
        ({"train": TRAIN[:-3]}, r"tiny.train.rating, line 5"),
        ({"test": "0\t2\t5\n"}, r"tiny.test.rating, line 1"),
        ({"negative": NEGATIVE.replace("(1,0)", "1,0")}, r"tiny.test.negative, line 2: want \(user,item\)"),
        ({"negative": NEGATIVE.replace("(1,0)", "(1,2)")}, r"tiny.test.negative, line 2: not the user and item"),
        ({"negative": NEGATIVE.replace("\t5\n(2", "\n(2")}, r"tiny.test.negative, line 2: 2 items .*line 1 has 3"),
        ({"negative": NEGATIVE.replace("\t3\t5", "\tx\t5")}, r"tiny.test.negative, line 2"),
        ({"negative": NEGATIVE.replace("\t3\t5", "\t-3\t5")}, r"tiny.test.negative, line 2"),
        ({"negative": NEGATIVE[:20]}, r"tiny.test.negative, line 2"),
        ({"negative": NEGATIVE.splitlines()[0] + "\n"}, r"tiny.test.negative: 1 lines, but 3 held-out"),
        ({"test": TEST + "0\t3\t5\t40\n", "negative": NEGATIVE + "(0,3)\t1\t4\t5\n"}, "line 4: a second held-out item"),
        ({"test": TEST + "3\t3\t5\t40\n", "negative": NEGATIVE + "(3,3)\t1\t4\t5\n"}, "line 4: user 3 has no line"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, files, message):
    write(tmp_path, **files)
    with pytest.raises(DataError, match=message) as error:
        load(tmp_path)
    assert "\n" not in str(error.value)


def test_absent_files_and_more_candidates_than_there_are(tmp_path):
    with pytest.raises(DataError, match=r"tiny.train.rating: not there; dataset.prefix is"):
        load(tmp_path)
    write(tmp_path)
    with pytest.raises(ConfigError, match=r"dataset.candidates=4: .*tiny.test.negative has 3 for each user"):
        load(tmp_path, candidates=4)


def renamed(text: str, user: int, item: int) -> str:
    """With u -> user * u and i -> item * i in a file of either form."""
    lines = []
    for line in text.splitlines():
        first, *others = line.split("\t")
        if first.startswith("("):
            u, i = map(int, first.strip("()").split(","))
            lines.append([f"({user * u},{item * i})", *(str(item * int(other)) for other in others)])
        else:
            lines.append([str(user * int(first)), str(item * int(others[0])), *others[1:]])
    return "".join("\t".join(line) + "\n" for line in lines)


@pytest.mark.parametrize("split", ["test", "val"])
def test_gaps_in_the_ids_have_no_effect(tmp_path, split):
    texts = TRAIN, TEST, NEGATIVE
    loaded = []
    for user, item in ((1, 1), (3, 10**9), (10**17, 2)):
        write(tmp_path, *(renamed(text, user, item) for text in texts))
        loaded.append(load(tmp_path, split, candidates=2))
    for other in loaded[1:]:
        assert other.fingerprint == loaded[0].fingerprint
        assert other.warnings == loaded[0].warnings
    assert (loaded[0].num_users, loaded[0].num_items) == (3, 6)


def test_users_are_named_as_in_the_file(tmp_path):
    write(tmp_path, *(renamed(text, 70, 5) for text in (TRAIN, TEST + TEST[-8:], NEGATIVE + NEGATIVE[-12:])))
    with pytest.raises(DataError, match=r"line 4: a second held-out item of user 140$"):
        load(tmp_path)
    write(tmp_path, *(renamed(text, 70, 5) for text in (TRAIN + "1\t3\t1\t4\n", TEST, NEGATIVE)))
    with pytest.raises(
        ConfigError, match=r"dataset.candidates=4: user 0 has only 3 items .*; take at most 3, or leave"
    ):
        load(tmp_path, "val", candidates=4)
    everything = "".join(f"1\t{item}\t1\t4\n" for item in range(1, 6))
    write(tmp_path, *(renamed(text, 70, 5) for text in (TRAIN + everything, TEST, NEGATIVE)))
    with pytest.raises(DataError, match=r"user 70 has interacted with all 6 items"):
        load(tmp_path, "val", candidates=1)


@given(st.data())
@settings(deadline=None, max_examples=200)
def test_damage_is_refused_or_changes_nothing_else(tmp_path_factory, data):
    """A byte is cut out, put in or changed, or the end is missing: one clear line, or data that can be trained on."""
    texts = {"train": TRAIN, "test": TEST, "negative": NEGATIVE}
    name = data.draw(st.sampled_from(sorted(texts)))
    text = bytearray(texts[name], "ascii")
    where = data.draw(st.integers(0, len(text) - 1))
    how, byte = (
        data.draw(st.sampled_from(["cut", "put", "change", "end"])),
        data.draw(st.sampled_from(b"\t\n(),-.0189x")),
    )
    text[where : None if how == "end" else where + (how != "put")] = b"" if how in ("cut", "end") else bytes([byte])
    root = tmp_path_factory.mktemp("fuzz")
    write(root, **{**texts, name: text.decode()})
    try:
        loaded = load(root)
    except UserError as error:
        line = str(error)
    else:
        line = None
    if line is not None:
        assert "\n" not in line
        return
    for ids, size in ((loaded.users, loaded.num_users), (loaded.candidates, loaded.num_items)):
        assert 0 <= int(ids.min()) <= int(ids.max()) < size < 100
    lines = TRAIN.count("\n") if name != "train" else text.count(b"\n")
    assert len(loaded.users) == lines or any("left out" in note for note in notes(loaded))
    next(loaded.train_batches(Batching(10), torch.Generator()))


def independent_hit_ratio(score, folder: Path) -> float:
    """HR@10 on the released files, with nothing of the project: a dict of scores for each line."""
    hits = lines = 0
    for line in (folder / "ml-1m.test.negative").read_text().splitlines():
        pair, *others = line.split("\t")
        user, item = map(int, pair.strip("()").split(","))
        scores = {other: score(user, other) for other in map(int, others) if other != item}
        mine = score(user, item)
        hits += sum(not value < mine for value in scores.values()) < 10
        lines += 1
    return 100 * hits / lines


@pytest.mark.data
def test_hit_ratios_on_the_released_candidates(data_dir):
    """A popularity ranker and an untrained network, ranked by the project and by twenty lines of Python."""
    data = movielens1m(data_dir, "test", seed=0, negatives=4, candidates=99, prefix="ml-1m")
    assert (data.num_users, data.num_items, len(data.users)) == (6040, 3706, 994_169)
    assert data.warnings == ["ml-1m: 156 users have their held-out item among their candidates; ignored there"]
    folder = data_dir / "ml-1m"
    counts = np.zeros(3706, int)
    for line in (folder / "ml-1m.train.rating").read_text().splitlines():
        counts[int(line.split("\t")[1])] += 1
    torch.manual_seed(0)
    network = NCFMLP(6040, 3706, factors=16, layers=3, init="torch")
    with torch.no_grad():
        users, items = data.candidate_users[:, None].expand_as(data.candidates).flatten(), data.candidates.flatten()
        table = network(users, items)
    popularity = torch.from_numpy(counts)[data.candidates]
    logits = dict(zip(zip(users.tolist(), items.tolist(), strict=True), table.tolist(), strict=True))
    for scores, score in (
        (popularity, lambda user, item: counts[item]),
        (table.view_as(data.candidates), lambda user, item: logits[user, item]),
    ):
        got = metrics.ranking_metrics(metrics.ranks(scores, data.candidates))["hr10"]
        assert got == pytest.approx(independent_hit_ratio(score, folder), abs=1e-9)
