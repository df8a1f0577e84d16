"""Loss flattening itself (paper section 2.2): the training loss's curvature and the noise of its minibatch gradients.

No matrix is formed: a product with one is a few passes over the samples, and eigenvalues come of such products.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vjp, vmap
from torch.overrides import TorchFunctionMode

from lawn.diagnostics.lanczos import top_eigenvalue

Weights = dict[str, Tensor]
Part = tuple[tuple[Tensor, ...], Tensor]  # inputs and labels of some samples

ROWS = 2**23  # numbers in the gradients of single samples held at a time by default: a CPU is slower with more


class LossSurface:
    """The training loss of `model` on m samples as a function of its P trainable weights, where these are at present.

    `loss(logits, labels)` is the mean of the samples' losses (of `lawn.losses` the `mean`), and the model is called as
    `model(*inputs)`, each of the `inputs` [m, ...], in eval mode: so no sample's logits depend on the others, and
    nothing is random. Weights, their gradients and the modes of the modules are left as they are. Vectors are flat
    [P], in the order of `model.parameters()`; a tied weight counts once, and of a parametrized one it is the
    parameters behind it that count.

    In float32 a probability within 1e-7 of 1 is 1: below that gradients and Hessians are rounding. For a loss that is
    flatter, give the model and the samples in float64.

    `chunk` samples at most are computed at a time: by default all of them in sums over the samples. In what needs
    each sample's own gradient [P] it is no more than make 2^23 numbers.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[[Tensor, Tensor], Tensor],
        inputs: Tensor | Sequence[Tensor],
        labels: Tensor,
        chunk: int | None = None,
    ) -> None:
        self._model, self._loss = model, loss
        self._inputs = (inputs,) if isinstance(inputs, Tensor) else tuple(inputs)
        self._labels = labels
        self._samples = len(labels)
        if not self._samples:
            raise ValueError("no samples")
        if not self._inputs or any(len(x) != self._samples for x in self._inputs):
            lengths = ", ".join(str(len(x)) for x in self._inputs) or "no"
            raise ValueError(f"{lengths} inputs for {self._samples} labels")
        if chunk is not None and chunk < 1:
            raise ValueError(f"chunk must be at least 1, not {chunk}")
        self._size = sum(w.numel() for w in self._weights().values())
        if not self._size:
            raise ValueError("the model has no trainable parameter")
        self._chunk = chunk or self._samples
        self._chunk_of_rows = min(self._chunk, max(1, ROWS // self._size))

    def gradient(self) -> Tensor:
        """The gradient of the training loss, [P]."""
        total = self._zero()
        with self._evaluation() as weights:
            for part in self._parts(self._chunk):
                total += self._share(part) * _derivative(self._mean(weights, part), weights)
        return total

    def hessian_vector(self, v: Tensor) -> Tensor:
        """The product of the training loss's Hessian H with v: [P] -> [P].

        Where the model has kinks (ReLU), H is that of the smooth piece on which the weights lie.
        """
        if v.shape != (self._size,):
            raise ValueError(f"a vector of shape {list(v.shape)} for {self._size} weights")
        total = self._zero()
        with self._evaluation() as weights:
            for part in self._parts(self._chunk):
                # Backward twice: unlike forward mode it is there for all of torch's layers.
                slope = _derivative(self._mean(weights, part), weights, differentiable=True)
                if slope.requires_grad:  # or it is constant
                    total += self._share(part) * _derivative(slope, weights, v.detach())
        return total

    def hessian_top(self, *, steps: int = 100, tolerance: float = 1e-4, seed: int = 0) -> float:
        """The largest (not the largest in size) eigenvalue of H, by `top_eigenvalue`."""
        return self._top(self.hessian_vector, steps, tolerance, seed)

    def gradient_covariance_trace(self, batch_size: int = 1) -> float:
        """Trace of the covariance of the gradient of a minibatch of B of the m samples, drawn without replacement.

        It is (m - B) / (B (m - 1)) tr Sigma, with Sigma = 1/m sum (g_i - g)(g_i - g)' over the samples' gradients g_i
        and their mean g; in units of loss^2 / weight^2.
        """
        scale = self._scale(batch_size)
        mean = self._split(self.gradient())
        total = torch.zeros((), dtype=torch.float64)
        with self._evaluation(differentiable=False) as weights:
            for inputs, labels in self._parts(self._chunk_of_rows):
                rows = vmap(grad(self._of_one), in_dims=(None, 0, 0))(weights, inputs, labels)
                total += sum((rows[name] - mean[name]).square().sum() for name in weights).cpu()
        return scale * total.item() / self._samples

    def escape(
        self,
        lr: float,
        batch_size: int,
        covariance: Literal["gradients", "hessians"] = "gradients",
        *,
        steps: int = 100,
        tolerance: float = 1e-4,
        seed: int = 0,
    ) -> float:
        """lambda_max{(I - lr H)^2 + lr^2 (m - B) / (B (m - 1)) Sigma}: above 1, SGD can escape from these weights.

        For SGD with learning rate lr on minibatches of B of the m samples (paper section 2.2; Wu et al. 2018, "How SGD
        selects the global minima in over-parameterized learning"). The two differ in what Sigma is:

        - "gradients", the paper's words: the covariance 1/m sum (g_i - g)(g_i - g)' of the samples' gradients. The sum
          of the two terms then depends on the units of weights and loss.
        - "hessians", Wu et al.'s: 1/m sum H_i^2 - H^2, the covariance of the samples' linearized gradients H_i x. With
          this alone do the terms have the same units; the sum is the mean of (I - lr H_B)^2 over all minibatches,
          the factor by which a step multiplies the squared distance from a minimum of all samples, at the most.

        It is below 1 only where H is positive definite and lr small enough: a direction in which the loss does not
        change has the factor 1, one of negative curvature -h has (1 + lr h)^2. In a model with more weights than
        samples compare the excess over 1, which is what flattening takes to 0. So it is the operator less I whose
        eigenvalue is computed: float32, and `tolerance`, resolve small excesses.

        A step of Lanczos' method takes two passes for H and one for the gradients; or a far slower one for the
        Hessians, with a few vectors [P] for each sample of a chunk.
        """
        noises = {"gradients": self._gradient_noise, "hessians": self._hessian_noise}
        if covariance not in noises:
            raise ValueError(f"covariance must be one of {', '.join(noises)}, not {covariance!r}")
        scale = self._scale(batch_size)
        noise = noises[covariance]()

        def excess(v: Tensor) -> Tensor:
            curved = self.hessian_vector(v)
            total = lr**2 * self.hessian_vector(curved) - 2 * lr * curved
            return total + lr**2 * scale * noise(v, curved) if scale else total

        return 1 + self._top(excess, steps, tolerance, seed)

    def _gradient_noise(self) -> Callable[[Tensor, Tensor], Tensor]:
        """Sigma's product with v, from J [m, P], the Jacobian of the samples' losses: 1/m J' (J v - g' v)."""
        mean = self.gradient()

        def product(v: Tensor, curved: Tensor) -> Tensor:
            total = self._zero()
            with self._evaluation() as weights:
                for inputs, labels in self._parts(self._chunk):
                    losses = vmap(self._of_logits)(functional_call(self._model, weights, inputs), labels)
                    # J' u is linear in u, and the derivative of v' J' u is J v: no gradient of a single sample.
                    u = torch.zeros_like(losses, requires_grad=True)
                    pulled = _derivative(losses, weights, u, differentiable=True)
                    (pushed,) = torch.autograd.grad(pulled, u, v, retain_graph=True)
                    total += _derivative(losses, weights, pushed - mean @ v)
            return total / self._samples

        return product

    def _hessian_noise(self) -> Callable[[Tensor, Tensor], Tensor]:
        """Sigma's product with v, from H_i and H v: 1/m sum H_i (H_i v - H v)."""

        def of_one(weights: Weights, v: Weights, mean: Weights, inputs: tuple[Tensor, ...], label: Tensor) -> Weights:
            curve = vjp(lambda w: grad(self._of_one)(w, inputs, label), weights)[1]
            (curved,) = curve(v)
            return curve({name: curved[name] - mean[name] for name in weights})[0]

        def product(v: Tensor, curved: Tensor) -> Tensor:
            total = self._zero()
            with self._evaluation(differentiable=False) as weights:
                for inputs, labels in self._parts(self._chunk_of_rows):
                    each = vmap(of_one, in_dims=(None, None, None, 0, 0))
                    rows = each(weights, self._split(v), self._split(curved), inputs, labels)
                    total += torch.cat([row.sum(0).flatten() for row in rows.values()])
            return total / self._samples

        return product

    def _top(self, operator: Callable[[Tensor], Tensor], steps: int, tolerance: float, seed: int) -> float:
        like = self._zero()
        return top_eigenvalue(
            operator,
            self._size,
            steps=steps,
            tolerance=tolerance,
            seed=seed,
            dtype=like.dtype,
            device=like.device,
        )

    def _mean(self, weights: Weights, part: Part) -> Tensor:
        inputs, labels = part
        return self._loss(functional_call(self._model, weights, inputs), labels)

    def _of_one(self, weights: Weights, inputs: tuple[Tensor, ...], label: Tensor) -> Tensor:
        return self._mean(weights, (tuple(x[None] for x in inputs), label[None]))

    def _of_logits(self, logits: Tensor, label: Tensor) -> Tensor:
        return self._loss(logits[None], label[None])

    def _weights(self) -> Weights:
        return {name: p.detach() for name, p in self._model.named_parameters() if p.requires_grad}

    def _zero(self) -> Tensor:
        return torch.cat([torch.zeros_like(w).flatten() for w in self._weights().values()])

    def _split(self, v: Tensor) -> Weights:
        weights = self._weights()
        parts = v.split([w.numel() for w in weights.values()])
        return {name: part.view(w.shape) for (name, w), part in zip(weights.items(), parts, strict=True)}

    def _parts(self, chunk: int) -> Iterator[Part]:
        yield from zip(
            zip(*(x.split(chunk) for x in self._inputs), strict=True), self._labels.split(chunk), strict=True
        )

    def _share(self, part: Part) -> float:
        return len(part[1]) / self._samples

    def _scale(self, batch_size: int) -> float:
        """Of the covariance of a minibatch's mean, relative to that of one sample."""
        if not 1 <= batch_size <= self._samples:
            raise ValueError(f"batch_size must be in 1..{self._samples}, the number of samples, not {batch_size}")
        if batch_size == self._samples:  # also where that is 1
            return 0.0
        return (self._samples - batch_size) / (batch_size * (self._samples - 1))

    @contextmanager
    def _evaluation(self, differentiable: bool = True) -> Iterator[Weights]:
        """The weights to call the model with, apart from its own so that those get no gradients; in eval mode."""
        modes = [(module, module.training) for module in self._model.modules()]
        weights = self._weights()
        self._model.eval()
        try:
            # torch.func differentiates by itself; torch.autograd would only keep what it does in memory.
            with torch.set_grad_enabled(differentiable), _RightSecondDerivatives():
                yield {name: w.requires_grad_(differentiable) for name, w in weights.items()}
        finally:
            for module, training in modes:  # one by one: some may have been in eval mode before
                module.training = training


class _RightSecondDerivatives(TorchFunctionMode):
    """Weight normalization in plain operations: the second derivative of torch's fused one is wrong."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch._weight_norm:
            direction, length, dim = args
            return direction * (length / torch.norm_except_dim(direction, 2, dim))
        return func(*args, **(kwargs or {}))


def _derivative(output: Tensor, weights: Weights, along: Tensor | None = None, differentiable: bool = False) -> Tensor:
    """The gradient of output' along by the weights, flat [P]; zero for weights that the output does not depend on."""
    parts = torch.autograd.grad(
        output, list(weights.values()), along, create_graph=differentiable, materialize_grads=True
    )
    return torch.cat([part.flatten() for part in parts])
