"""Neural collaborative filtering with a multilayer perceptron (He et al. 2017)."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lawn.models.lookup import look_up, relu_of_sum

MAX_PARTS, PART_ROWS = 64, 200  # of a batch on a GPU; more parts, or shorter ones, are not faster
CPU_ROWS = 10_000  # of a batch, for each thread, that go through all layers together, as a CPU's caches hold them;
# not with larger tables, as the gradient of each part is one of whole tables


class NCFMLP(nn.Module):
    """Scores pairs of users and items: concatenated embeddings, hidden ReLU layers of halving width and one logit.

    The last hidden layer has `factors` units and each layer before it twice as many as its successor. Each embedding
    has factors * 2^(layers - 1) dimensions. Without biases the network is positively homogeneous in each layer.

    Args:
        num_users: number of users.
        num_items: number of items.
        factors: number of units of the last hidden layer.
        layers: number of hidden layers.
        init: "he2017" draws embeddings with standard deviation 0.01 and hidden weights by Glorot's uniform rule, with
            zero biases; "torch" keeps torch's defaults.
        bias: whether the layers have biases.
    """

    def __init__(
        self, num_users: int, num_items: int, *, factors: int, layers: int, init: str, bias: bool = True
    ) -> None:
        super().__init__()
        width = factors * 2**layers
        self.user = nn.Embedding(num_users, width // 2)
        self.item = nn.Embedding(num_items, width // 2)
        hidden: list[nn.Module] = []
        for _ in range(layers):
            hidden += [nn.Linear(width, width // 2, bias=bias), nn.ReLU(inplace=True)]
            width //= 2
        self.hidden = nn.Sequential(*hidden)
        self.score = nn.Linear(width, 1, bias=bias)
        if init == "he2017":
            for embedding in (self.user, self.item):
                nn.init.normal_(embedding.weight, std=0.01)
            for layer in self.hidden:
                if isinstance(layer, nn.Linear):
                    nn.init.xavier_uniform_(layer.weight)
            nn.init.kaiming_uniform_(self.score.weight, a=1, nonlinearity="sigmoid")
            for layer in self.modules():
                if isinstance(layer, nn.Linear) and layer.bias is not None:
                    nn.init.zeros_(layer.bias)

    def forward(self, users: Tensor, items: Tensor) -> Tensor:
        """Compute logits [B] of users [B] and items [B]."""
        first = self._first(len(users))
        rows = CPU_ROWS * torch.get_num_threads()
        if users.device.type == "cpu" and self._table_rows <= rows < len(users):
            parts = zip(users.split(rows), items.split(rows), strict=True)
            return torch.cat([self._rest(first(*part)) for part in parts])
        return self._rest(first(users, items))

    def _rest(self, x: Tensor) -> Tensor:
        return self.score(self.hidden[1:](x)).squeeze(1)

    def _first(self, batch_size: int) -> Callable[[Tensor, Tensor], Tensor]:
        """Return what computes the first hidden layer, before its ReLU, of users and items of the batch.

        A linear layer of a concatenation is the sum of two linear layers. If the batch is larger than the embedding
        tables, it is faster to apply these to the tables and to index the results; gradients are equal up to rounding.
        `index_select` has a faster backward pass on the CPU than an embedding.
        """
        first = self.hidden[0]
        assert isinstance(first, nn.Linear)
        if self._table_rows > 2 * batch_size:
            by_user, by_item = self.user.weight, self.item.weight
            return lambda u, i: first(torch.cat([by_user.index_select(0, u), by_item.index_select(0, i)], dim=1))
        for_users, for_items = first.weight.chunk(2, dim=1)
        by_user, by_item = F.linear(self.user.weight, for_users), F.linear(self.item.weight, for_items, first.bias)
        return lambda u, i: by_user.index_select(0, u).add_(by_item.index_select(0, i))

    @property
    def _table_rows(self) -> int:
        return self.user.num_embeddings + self.item.num_embeddings

    def all_scores(self, users: Tensor) -> Tensor:
        """Compute the logits [B, items] of users [B] and all items."""
        first = self.hidden[0]
        assert isinstance(first, nn.Linear)
        for_users, for_items = first.weight.chunk(2, dim=1)
        by_user = F.linear(self.user.weight[users], for_users)
        by_item = F.linear(self.item.weight, for_items, first.bias)
        return self.score(self.hidden[1:](by_user[:, None] + by_item)).squeeze(2)

    def forward_vectorized(self, weights: dict[str, Tensor], users: Tensor, items: Tensor) -> Tensor:
        """Compute the logits of R networks of this architecture at once, with as many kernels as one `forward`.

        Args:
            weights: parameters [R, ...] by name.
            users: users [R, B].
            items: items [R, B].

        Returns:
            Logits [R, B].
        """
        for_users, for_items = weights["hidden.0.weight"].chunk(2, dim=2)
        by_user, by_item, bias = weights["user.weight"], weights["item.weight"], weights.get("hidden.0.bias")
        if self._table_rows <= 2 * users.shape[1]:
            by_user, by_item = affine(by_user, for_users, None), affine(by_item, for_items, bias)
            x = relu_of_sum(by_user, by_item, users, items)
        else:
            x = affine(look_up(by_user, users), for_users, bias)
            x = torch.baddbmm(x, look_up(by_item, items), for_items.mT).relu_()
        for name in [f"hidden.{k}" for k in range(2, len(self.hidden), 2)] + ["score"]:
            x = affine(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"), relu=name != "score")
        return x.squeeze(2)


def affine(x: Tensor, weights: Tensor, biases: Tensor | None, relu: bool = False) -> Tensor:
    """A linear layer of each run: x [R, B, n], weights [R, m, n] and biases [R, m] to [R, B, m].

    On a GPU the batch is several smaller ones with the same weights: the gradient of a weight is a sum over the batch,
    and one multiprocessor adds each part of it.
    """
    runs, rows, width = x.shape
    if x.is_cuda and (parts := batch_parts(rows)) > 1:
        x, weights = x.reshape(runs * parts, rows // parts, width), weights.repeat_interleave(parts, dim=0)
        biases = None if biases is None else biases.repeat_interleave(parts, dim=0)
    y = torch.bmm(x, weights.mT) if biases is None else torch.baddbmm(biases[:, None], x, weights.mT)
    if relu:
        y = y.relu_()  # a view would be copied in the backward pass
    return y.view(runs, rows, -1)


def batch_parts(rows: int) -> int:
    """The number of equal parts of a batch, or of a table, whose sums a GPU adds side by side."""
    return max(n for n in range(1, MAX_PARTS + 1) if rows % n == 0 and (n == 1 or rows // n >= PART_ROWS))
