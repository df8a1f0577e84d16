"""Implicit feedback on the device: positives, fresh negatives for every epoch, held-out candidates."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from lawn.data.batching import Batching, MicroBatch, shard
from lawn.data.fingerprint import Fingerprint, checksum


@dataclass
class Interactions:
    """Leave-one-out data on one device; user and item ids count from 0.

    Shapes: users and items int64 [N], the training positives; candidates int64 [U, 1 + C], the held-out item of
    each evaluated user first and then the items it is ranked against; candidate_users int64 [U].
    """

    users: Tensor
    items: Tensor
    candidate_users: Tensor
    candidates: Tensor
    num_users: int
    num_items: int
    negatives: int
    warnings: list[str]

    def __post_init__(self) -> None:
        self.sampler = NegativeSampler(self.users, self.items, self.num_users, self.num_items)

    @property
    def num_train(self) -> int:
        """Training samples of one epoch: positives and their negatives."""
        return len(self.users) * (1 + self.negatives)

    def to(self, device: torch.device) -> "Interactions":
        moved = ("users", "items", "candidate_users", "candidates")
        return replace(self, **{name: getattr(self, name).to(device) for name in moved})

    def train_batches(
        self, batching: Batching, generator: torch.Generator
    ) -> Iterator[tuple[MicroBatch, tuple[Tensor, Tensor, Tensor]]]:
        """One epoch in random order: users, items and labels (1.0 positive, 0.0 negative)."""
        negatives = self.sampler.sample(self.users, self.negatives, generator)
        items = torch.cat([self.items[:, None], negatives], dim=1)
        # One number for user, item and label, so that the random order is read from memory only once.
        samples = (self.users[:, None] << 32) | (items << 1)
        samples[:, 0] |= 1
        samples = samples.flatten()
        order = torch.randperm(self.num_train, generator=generator, device=items.device, dtype=torch.int32)
        for micro_batch in batching.micro_batches(self.num_train):
            sample = samples.index_select(0, order[micro_batch.start : micro_batch.stop])
            yield micro_batch, (sample >> 32, (sample >> 1) & 0x7FFFFFFF, (sample & 1).float())

    def eval_batches(self, rank: int = 0, world_size: int = 1, pairs: int = 2**18) -> Iterator[tuple[Tensor, Tensor]]:
        """The users [B] of a rank and their candidates [B, 1 + C], about `pairs` of a user and an item in a batch."""
        users = max(1, pairs // self.candidates.shape[1])
        mine = shard(len(self.candidates), rank, world_size)
        yield from zip(self.candidate_users[mine].split(users), self.candidates[mine].split(users), strict=True)

    def is_trained_on(self, users: Tensor) -> Tensor:
        """Whether each item is a training interaction of each of `users` [B]: bool [B, items]."""
        return self.sampler.seen(users)

    @cached_property
    def fingerprint(self) -> Fingerprint:
        return {
            "users": self.num_users,
            "items": self.num_items,
            "training interactions": len(self.users),
            "held out": len(self.candidates),
            "checksum": checksum(self.users, self.items, self.candidate_users, self.candidates),
        }

    def statistics(self) -> dict[str, object]:
        def spread(ids: Tensor, size: int) -> str:
            counts = ids.bincount(minlength=size)
            return f"{counts.min()} to {counts.max()}, median {counts.median()}"

        return {
            "users": self.num_users,
            "items": self.num_items,
            "training interactions": len(self.users),
            "held out": len(self.candidates),
            "candidates": self.candidates.shape[1] - 1,
            "density": f"{100 * len(self.users) / (self.num_users * self.num_items):.2f} %",
            "training interactions of a user": spread(self.users, self.num_users),
            "training interactions of an item": spread(self.items, self.num_items),
        }


class NegativeSampler:
    """Draws items that a user has not interacted with, uniformly and without rejection.

    Sorted by user and item, let p_0 < p_1 < ... be the items of one user. Below p_j lie p_j - j unseen items, so the
    k-th unseen item (from 0) is k + #{j : p_j - j <= k}, one binary search away. Shifting each user's values by
    user * num_items + user puts all users into one sorted array.
    """

    def __init__(self, users: Tensor, items: Tensor, num_users: int, num_items: int) -> None:
        self.stride, self.num_items = num_items + 1, num_items
        pairs = torch.unique(users * num_items + items)  # sorted, without duplicates
        owner, item = pairs // num_items, pairs % num_items
        self.count = torch.bincount(owner, minlength=num_users)
        self.start = self.count.cumsum(0) - self.count
        rank = torch.arange(len(pairs), device=pairs.device) - self.start[owner]
        self._items = item
        self.keys = owner * self.stride + item - rank
        self.available = num_items - self.count

    def sample(self, users: Tensor, count: int, generator: torch.Generator) -> Tensor:
        """`count` independent uniform draws for each of `users` [N]: [N, count]."""
        bits = torch.randint(2**31, (len(users), count), generator=generator, device=users.device)
        return self.kth(users[:, None], (bits * self.available[users][:, None]) >> 31)

    def seen(self, users: Tensor) -> Tensor:
        """Whether each of `users` [B] has interacted with each item: bool [B, items]."""
        counts = self.count[users]
        row = torch.arange(len(users), device=users.device).repeat_interleave(counts)
        first = self.start[users] - (counts.cumsum(0) - counts)
        result = torch.zeros(len(users), self.num_items, dtype=torch.bool, device=users.device)
        result[row, self._items[first[row] + torch.arange(len(row), device=users.device)]] = True
        return result

    def kth(self, users: Tensor, k: Tensor) -> Tensor:
        """The k-th unseen item (from 0) of each user; needs k < available[user]. Shapes are broadcast."""
        below = torch.searchsorted(self.keys, users * self.stride + k, right=True)
        return k + below - self.start[users]
