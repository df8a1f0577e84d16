"""Algorithm 1 of the paper line by line, as a reference for tests of the optimizers."""

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class ReferenceLAWN:
    """LAWN with the update rule of SGD, Adam or LAMB, without weight decay.

    Weights with two or more dimensions are constrained after `free_steps` steps. For LAMB the trust ratio ||w|| / ||r||
    multiplies the update r after its projection.

    Attributes:
        rule: "sgd", "adam" or "lamb".
        weights: float64 tensors, replaced in each step.
        lr: learning rate.
        free_steps: number of steps before the switch.
        betas: decay rates of the moments.
        eps: added to the square root of the second moment.
        momentum: heavy-ball coefficient of SGD.
        t: number of steps so far.
        m: first moments or momentum buffers.
        v: second moments.
        c: fixed norms; None for free weights.
    """

    rule: str
    weights: list[Tensor]
    lr: float
    free_steps: int
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-6
    momentum: float = 0.9
    t: int = 0
    m: list[Tensor] = field(default_factory=list)
    v: list[Tensor] = field(default_factory=list)
    c: list[Tensor | None] = field(default_factory=list)

    def step(self, grads: list[Tensor]) -> None:
        """Update all weights.

        Args:
            grads: gradient of each weight.
        """
        if self.t == 0:
            self.m = [torch.zeros_like(w) for w in self.weights]
            self.v = [torch.zeros_like(w) for w in self.weights]
            self.c = [None for _ in self.weights]
        if self.t == self.free_steps:
            self.c = [w.norm() if w.ndim >= 2 and w.numel() > 1 else None for w in self.weights]
        self.t += 1
        for i, g in enumerate(grads):
            w, c = self.weights[i], self.c[i]
            if c is not None:
                g = g - w * (w * g).sum() / c**2  # line 4
            if self.rule == "sgd":
                self.m[i] = self.momentum * self.m[i] + g
                r = self.m[i]
            else:
                beta1, beta2 = self.betas
                self.m[i] = beta1 * self.m[i] + (1 - beta1) * g  # line 5
                self.v[i] = beta2 * self.v[i] + (1 - beta2) * g**2  # line 6
                m_hat = self.m[i] / (1 - beta1**self.t)  # line 7
                v_hat = self.v[i] / (1 - beta2**self.t)
                r = m_hat / (v_hat.sqrt() + self.eps)  # line 8
            if c is not None:
                r = r - w * (w * r).sum() / c**2  # line 9
            if self.rule == "lamb":
                r = r * w.norm() / r.norm()
            w = w - self.lr * r  # line 10
            if c is not None:
                w = w * c / w.norm()  # line 11
            self.weights[i] = w
