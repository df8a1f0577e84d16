from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lawn.data.batching import Batching
from lawn.data.interactions import Interactions, NegativeSampler

pairs = st.integers(1, 5).flatmap(
    lambda users: st.integers(2, 9).flatmap(
        lambda items: st.tuples(
            st.just(users),
            st.just(items),
            st.lists(st.tuples(st.integers(0, users - 1), st.integers(0, items - 2)), min_size=1, max_size=30),
        )
    )
)


@given(pairs)
@settings(deadline=None)
def test_kth_unseen_lists_exactly_the_unseen_items(case):
    num_users, num_items, seen = case
    users, items = torch.tensor(seen).T
    sampler = NegativeSampler(users, items, num_users, num_items)
    for user in range(num_users):
        expected = [i for i in range(num_items) if (user, i) not in set(seen)]
        assert sampler.available[user] == len(expected)
        k = torch.arange(len(expected))
        assert sampler.kth(torch.full_like(k, user), k).tolist() == expected


def test_samples_are_uniform_over_the_unseen():
    sampler = NegativeSampler(torch.tensor([0, 0, 1]), torch.tensor([1, 3, 0]), 2, 6)
    drawn = sampler.sample(torch.zeros(10_000, dtype=torch.long), 4, torch.Generator().manual_seed(0)).flatten()
    counts = torch.bincount(drawn, minlength=6)
    assert counts[[1, 3]].tolist() == [0, 0]
    assert ((counts[[0, 2, 4, 5]] / 10_000 - 1).abs() < 0.05).all()  # five standard deviations


def test_what_each_user_has_interacted_with():
    """Of users in any order, one of them twice, one without any."""
    sampler = NegativeSampler(torch.tensor([0, 2, 0, 1]), torch.tensor([3, 2, 1, 0]), 4, 5)
    found = sampler.seen(torch.tensor([2, 0, 3, 1, 0]))
    assert found.nonzero().tolist() == [[0, 2], [1, 1], [1, 3], [3, 0], [4, 1], [4, 3]]


def small() -> Interactions:
    users, items = torch.tensor([0, 0, 1, 1, 2]), torch.tensor([0, 1, 2, 3, 4])
    candidates = torch.tensor([[5, 2, 3], [4, 0, 1]])
    return Interactions(users, items, torch.tensor([0, 1]), candidates, 3, 7, 4, [])


def test_an_epoch_has_every_positive_once_and_its_negatives():
    data = small()
    batches = [batch for _, batch in data.train_batches(Batching(8), torch.Generator().manual_seed(0))]
    assert [len(users) for users, _, _ in batches] == [8, 8, 8, 1]
    users, items, labels = (torch.cat(column) for column in zip(*batches, strict=True))
    positives = {(u, i) for u, i, y in zip(users.tolist(), items.tolist(), labels.tolist(), strict=True) if y == 1}
    seen = set(zip(data.users.tolist(), data.items.tolist(), strict=True))
    assert positives == seen
    assert labels.sum() == 5
    assert torch.bincount(users).tolist() == [10, 10, 5]
    drawn = {(u, i) for u, i, y in zip(users.tolist(), items.tolist(), labels.tolist(), strict=True) if y == 0}
    assert not drawn & seen


def test_the_generator_decides_the_epoch():
    def epoch(seed: int) -> list[torch.Tensor]:
        batches = [batch for _, batch in small().train_batches(Batching(4), torch.Generator().manual_seed(seed))]
        return [torch.cat(column) for column in zip(*batches, strict=True)]

    assert all(torch.equal(a, b) for a, b in zip(epoch(1), epoch(1), strict=True))
    assert not torch.equal(epoch(1)[1], epoch(2)[1])


@pytest.mark.parametrize("name", ["users", "items", "candidate_users", "candidates"])
def test_the_fingerprint_is_of_all_ids(name):
    data = small()
    assert replace(data, **{name: getattr(data, name).flip(0)}).fingerprint != data.fingerprint == small().fingerprint


def test_evaluation_keeps_every_user():
    batches = list(small().eval_batches(pairs=1))
    assert [users.tolist() for users, _ in batches] == [[0], [1]]
    assert torch.cat([candidates for _, candidates in batches]).tolist() == [[5, 2, 3], [4, 0, 1]]


def test_ranks_share_an_epoch_and_the_evaluation():
    (_, alone), *none = small().train_batches(Batching(25), torch.Generator().manual_seed(0))
    ((users, candidates),) = small().eval_batches()
    assert none == []
    for world in (2, 3):
        shared = [torch.zeros_like(column) for column in alone]
        for rank in range(world):
            for part, batch in small().train_batches(Batching(10, 4, rank, world), torch.Generator().manual_seed(0)):
                for whole, column in zip(shared, batch, strict=True):
                    whole[part.start : part.stop] = column
        assert all(map(torch.equal, shared, alone))
        parts = [batch for rank in range(world) for batch in small().eval_batches(rank, world)]
        assert torch.cat([some for some, _ in parts]).tolist() == users.tolist()
        assert torch.cat([some for _, some in parts]).tolist() == candidates.tolist()
