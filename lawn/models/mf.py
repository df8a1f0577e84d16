"""Matrix factorization with biases, trained on samples (Rendle et al. 2020)."""

from typing import Any

import torch
from torch import Tensor, nn


class MF(nn.Module):
    """Scores pairs of users and items by the dot product of their embeddings, plus biases.

    The score of user u and item i is b + b_u + b_i + p_u . q_i. Biases start at zero, embeddings are drawn from a
    normal distribution. All parameters of a sample are regularized with it, so those of frequent users and items are
    regularized more.

    Args:
        num_users: number of users.
        num_items: number of items.
        factors: number of dimensions of an embedding.
        init_std: standard deviation of the initial embeddings.
        regularization: coefficient of half the squared norm of a sample's parameters, which is added to its loss.

    References:
        Rendle et al. 2020, "Neural Collaborative Filtering vs. Matrix Factorization Revisited",
        [arXiv:2005.09683](https://arxiv.org/abs/2005.09683). Their embedding dimension counts the bias as a factor.
    """

    def __init__(
        self, num_users: int, num_items: int, *, factors: int, init_std: float = 0.1, regularization: float = 0.0
    ) -> None:
        super().__init__()
        self.regularization = regularization
        self.user = nn.Embedding(num_users, factors)
        self.item = nn.Embedding(num_items, factors)
        for embedding in (self.user, self.item):
            nn.init.normal_(embedding.weight, std=init_std)
        self.user_bias = nn.Parameter(torch.zeros(num_users))
        self.item_bias = nn.Parameter(torch.zeros(num_items))
        self.bias = nn.Parameter(torch.zeros(()))

    def forward(self, users: Tensor, items: Tensor, with_penalty: bool = False) -> Any:
        """Compute logits [B] of users [B] and items [B], `with_penalty` also the mean of their regularization terms."""
        p, q = self.user.weight.index_select(0, users), self.item.weight.index_select(0, items)
        by_user, by_item = self.user_bias.index_select(0, users), self.item_bias.index_select(0, items)
        logits = (p * q).sum(dim=1) + by_user + by_item + self.bias
        if not with_penalty:
            return logits
        squares = sum((part.square().sum() for part in (p, q, by_user, by_item)), len(users) * self.bias.square())
        return logits, (0.5 * self.regularization / len(users)) * squares

    def all_scores(self, users: Tensor) -> Tensor:
        """Compute the logits [B, items] of users [B] and all items."""
        by_user = self.user_bias[users, None] + self.bias
        return torch.addmm(self.item_bias, self.user.weight[users], self.item.weight.T) + by_user
