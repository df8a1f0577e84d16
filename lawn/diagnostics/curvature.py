"""Curvature of the training loss and noise of its minibatch gradients (paper section 2.2).

Matrices are never formed. Products with them take a few passes over the samples, and eigenvalues are computed from
such products.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from lawn.diagnostics.lanczos import top_eigenvalue
from lawn.optim import sums
from lawn.optim.checks import check_shapes_known
from lawn.optim.modes import evaluating

Weights = dict[str, Tensor]
Batch = tuple[tuple[Tensor, ...], Tensor]  # inputs and labels

ROWS = 2**23  # maximal number of elements of per-sample gradients at a time; larger numbers are slower on a CPU


class LossSurface:
    """The training loss on m samples as a function of a model's P trainable parameters, at their present values.

    The model is called as `model(*inputs)` in eval mode, so that the logits of a sample do not depend on others and are
    deterministic. Parameters, gradients and the modes of modules do not change. Vectors are flat [P], in the order of
    `model.parameters()`. A tied parameter counts once; of a parametrized weight the underlying parameters count.

    In float32 a probability within 1e-7 of 1 rounds to 1, and gradients and Hessians of smaller losses are rounding
    errors. For flatter losses pass the model and the samples in float64. Of a model with torch's recurrent layers,
    covariances are computed sample by sample, which is slow. Batch normalization without running statistics uses those
    of the samples that it is given, so results depend on `chunk`, and covariances are of samples normalized one by one.

    Args:
        model: model whose trainable parameters are the variables.
        loss: mean loss of logits and labels, such as `mean` of a `lawn.losses.Loss`. It has to be a mean over all
            samples given: with class weights or ignored labels the means of chunks do not add up.
        inputs: one input [m, ...] of the model or several.
        labels: labels [m, ...].
        chunk: maximal number of samples that are evaluated at a time; None for all. Fewer are used where per-sample
            gradients would have more than 2^23 elements.

    Raises:
        ValueError: if there are no samples, the numbers of inputs and labels differ, `chunk` is less than 1, or the
            model has no trainable parameter, or a lazy module that has no weights yet.

    References:
        Gupta et al. 2021, section 2.2, [arXiv:2108.05839](https://arxiv.org/abs/2108.05839).

    Examples:
        >>> import torch
        >>> from lawn.diagnostics import LossSurface
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> inputs, labels = torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.zeros(2, 1)
        >>> surface = LossSurface(model, torch.nn.functional.mse_loss, inputs, labels)
        >>> round(surface.hessian_top(), 4)
        4.0
        >>> surface.hessian_vector(torch.tensor([1.0, 1.0]))
        tensor([4., 1.])
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[[Tensor, Tensor], Tensor],
        inputs: Tensor | Sequence[Tensor],
        labels: Tensor,
        chunk: int | None = None,
    ) -> None:
        check_shapes_known(model)
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
        self._row_chunk = min(self._chunk, max(1, ROWS // self._size))

    def gradient(self) -> Tensor:
        """Compute the gradient of the training loss.

        Returns:
            The gradient [P].
        """
        total = self._zero()
        with self._evaluation() as weights:
            for batch in self._batches(self._chunk):
                total += self._fraction(batch) * _derivative(self._mean_loss(weights, batch), weights)
        return total

    def hessian_vector(self, v: Tensor) -> Tensor:
        """Compute the product of the training loss's Hessian H with a vector.

        For a piecewise smooth model (ReLU), H is the Hessian of the piece that contains the parameters.

        Args:
            v: vector [P].

        Returns:
            The product H v [P].

        Raises:
            ValueError: if `v` has another shape.
        """
        if v.shape != (self._size,):
            raise ValueError(f"a vector of shape {list(v.shape)} for {self._size} weights")
        total = self._zero()
        with self._evaluation() as weights:
            for batch in self._batches(self._chunk):
                # Double backward, because not all of torch's layers support forward mode.
                gradient = _derivative(self._mean_loss(weights, batch), weights, differentiable=True)
                if gradient.requires_grad:  # otherwise it is constant
                    total += self._fraction(batch) * _derivative(gradient, weights, v.detach())
        return total

    def hessian_top(self, *, steps: int = 100, tolerance: float = 1e-4, seed: int = 0) -> float:
        """Compute the largest (algebraic) eigenvalue of H with `top_eigenvalue`.

        Args:
            steps: maximal number of steps.
            tolerance: relative tolerance of the residual.
            seed: seed of the start vector.

        Returns:
            The eigenvalue, in units of loss / weight^2.
        """
        return self._top(self.hessian_vector, steps, tolerance, seed)

    def gradient_covariance_trace(self, batch_size: int = 1) -> float:
        """Compute the trace of the covariance of minibatch gradients.

        For minibatches of B of the m samples, drawn without replacement, it is (m - B) / (B (m - 1)) tr Sigma with
        Sigma = 1/m sum (g_i - g)(g_i - g)', where g_i are the gradients of the samples and g is their mean.

        Args:
            batch_size: number B of samples in a minibatch.

        Returns:
            The trace, in units of loss^2 / weight^2.

        Raises:
            ValueError: if `batch_size` is not in 1..m.
        """
        scale, gradient = self._scale(batch_size), self.gradient()
        total = torch.zeros((), dtype=torch.float64, device="cpu")
        if self._is_recurrent:
            for single in self._singles():
                total += (single.gradient() - gradient).square().sum().cpu()
            return scale * total.item() / self._samples
        mean = self._split(gradient)
        with self._evaluation(differentiable=False) as weights:
            for inputs, labels in self._batches(self._row_chunk):
                rows = vmap(grad(self._sample_loss), in_dims=(None, 0, 0))(weights, inputs, labels)
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
        """Compute the escape criterion of SGD, lambda_max{(I - lr H)^2 + lr^2 (m - B) / (B (m - 1)) Sigma}.

        SGD with learning rate lr on minibatches of B of the m samples can escape from the present parameters if the
        criterion exceeds 1. The paper and Wu et al. define Sigma differently:

        - "gradients" (the paper): the covariance 1/m sum (g_i - g)(g_i - g)' of the gradients of samples. The sum of
          both terms then depends on the units of weights and loss.
        - "hessians" (Wu et al.): 1/m sum H_i^2 - H^2, the covariance of the linearized gradients H_i x of samples. Both
          terms then have the same units, and the sum is the mean of (I - lr H_B)^2 over all minibatches. Its largest
          eigenvalue bounds the factor by which a step multiplies the squared distance from a common minimum of all
          samples.

        The criterion is below 1 only if H is positive definite and lr is small enough: it is 1 for a direction in which
        the loss is constant, and (1 + lr h)^2 for one of negative curvature -h. For a model with more weights than
        samples compare the excess over 1, which converges to 0 when the loss flattens. The eigenvalue is computed for
        the matrix minus I, so that float32 and `tolerance` resolve small excesses.

        A Lanczos step takes two passes for H and one for the gradients. The pass for the Hessians is much slower and
        needs a few vectors [P] for each sample of a chunk.

        Args:
            lr: learning rate.
            batch_size: number B of samples in a minibatch.
            covariance: "gradients" or "hessians".
            steps: maximal number of Lanczos steps.
            tolerance: relative tolerance of the residual.
            seed: seed of the start vector.

        Returns:
            The criterion, without unit.

        Raises:
            ValueError: if `batch_size` is not in 1..m, or `covariance` is unknown.

        References:
            - Gupta et al. 2021, section 2.2, [arXiv:2108.05839](https://arxiv.org/abs/2108.05839).
            - Wu et al. 2018, "How SGD selects the global minima in over-parameterized learning", NeurIPS.
        """
        noises = {"gradients": self._gradient_noise, "hessians": self._hessian_noise}
        if covariance not in noises:
            raise ValueError(f"covariance must be one of {', '.join(noises)}, not {covariance!r}")
        scale = self._scale(batch_size)
        noise = noises[covariance]()

        def excess(v: Tensor) -> Tensor:
            hv = self.hessian_vector(v)
            total = lr**2 * self.hessian_vector(hv) - 2 * lr * hv
            return total + lr**2 * scale * noise(v, hv) if scale else total

        return 1 + self._top(excess, steps, tolerance, seed)

    def _gradient_noise(self) -> Callable[[Tensor, Tensor], Tensor]:
        """Return Sigma v = 1/m J' (J v - g' v) as a function of v and H v; J [m, P] is the Jacobian of the losses."""
        mean = self.gradient()

        def product(v: Tensor, hv: Tensor) -> Tensor:
            total = self._zero()
            with self._evaluation() as weights:
                for inputs, labels in self._batches(self._chunk):
                    losses = vmap(self._loss_of_logits)(functional_call(self._model, weights, inputs), labels)
                    # J' u is linear in u, and the derivative of v' J' u is J v, so no per-sample gradient is needed.
                    u = torch.zeros_like(losses, requires_grad=True)
                    vjp_of_u = _derivative(losses, weights, u, differentiable=True)
                    (jvp_of_v,) = torch.autograd.grad(vjp_of_u, u, v, retain_graph=True)
                    total += _derivative(losses, weights, jvp_of_v - sums.dot(mean, v))
            return total / self._samples

        return product

    def _hessian_noise(self) -> Callable[[Tensor, Tensor], Tensor]:
        """Return Sigma v = 1/m sum H_i (H_i v - H v) as a function of v and H v."""
        if self._is_recurrent:
            singles = list(self._singles())
            return lambda v, hv: (
                sum((single.hessian_vector(single.hessian_vector(v) - hv) for single in singles), self._zero())
                / self._samples
            )

        def sample_product(
            weights: Weights, v: Weights, hv: Weights, inputs: tuple[Tensor, ...], label: Tensor
        ) -> Weights:
            multiply = vjp(lambda w: grad(self._sample_loss)(w, inputs, label), weights)[1]
            (sample_hv,) = multiply(v)
            return multiply({name: sample_hv[name] - hv[name] for name in weights})[0]

        def product(v: Tensor, hv: Tensor) -> Tensor:
            total = self._zero()
            with self._evaluation(differentiable=False) as weights:
                for inputs, labels in self._batches(self._row_chunk):
                    batched = vmap(sample_product, in_dims=(None, None, None, 0, 0))
                    rows = batched(weights, self._split(v), self._split(hv), inputs, labels)
                    total += torch.cat([row.sum(0).flatten() for row in rows.values()])
            return total / self._samples

        return product

    @property
    def _is_recurrent(self) -> bool:
        """Whether the model has torch's recurrent layers, which vmap cannot evaluate."""
        return any(isinstance(module, nn.RNNBase) for module in self._model.modules())

    def _singles(self) -> Iterator["LossSurface"]:
        """The loss surface of each sample."""
        for inputs, labels in self._batches(1):
            yield LossSurface(self._model, self._loss, inputs, labels)

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

    def _mean_loss(self, weights: Weights, batch: Batch) -> Tensor:
        inputs, labels = batch
        return self._loss(functional_call(self._model, weights, inputs), labels)

    def _sample_loss(self, weights: Weights, inputs: tuple[Tensor, ...], label: Tensor) -> Tensor:
        return self._mean_loss(weights, (tuple(x[None] for x in inputs), label[None]))

    def _loss_of_logits(self, logits: Tensor, label: Tensor) -> Tensor:
        return self._loss(logits[None], label[None])

    def _weights(self) -> Weights:
        return {name: p.detach() for name, p in self._model.named_parameters() if p.requires_grad}

    def _zero(self) -> Tensor:
        return torch.cat([torch.zeros_like(w).flatten() for w in self._weights().values()])

    def _split(self, v: Tensor) -> Weights:
        weights = self._weights()
        pieces = v.split([w.numel() for w in weights.values()])
        return {name: piece.view(w.shape) for (name, w), piece in zip(weights.items(), pieces, strict=True)}

    def _batches(self, chunk: int) -> Iterator[Batch]:
        yield from zip(
            zip(*(x.split(chunk) for x in self._inputs), strict=True), self._labels.split(chunk), strict=True
        )

    def _fraction(self, batch: Batch) -> float:
        return len(batch[1]) / self._samples

    def _scale(self, batch_size: int) -> float:
        """Return the covariance of a minibatch's mean gradient relative to that of one sample."""
        if not 1 <= batch_size <= self._samples:
            raise ValueError(f"batch_size must be in 1..{self._samples}, the number of samples, not {batch_size}")
        if batch_size == self._samples:  # the formula would be 0 / 0 for one sample
            return 0.0
        return (self._samples - batch_size) / (batch_size * (self._samples - 1))

    @contextmanager
    def _evaluation(self, differentiable: bool = True) -> Iterator[Weights]:
        """Yield detached weights for calls of the model, which is in eval mode meanwhile."""
        weights = self._weights()
        # torch.func does not need autograd, which would only store its operations. Only the plain attention has second
        # derivatives.
        attention = sdpa_kernel(SDPBackend.MATH)
        with evaluating(self._model), torch.set_grad_enabled(differentiable), _DecomposedWeightNorm(), attention:
            yield {name: w.requires_grad_(differentiable) for name, w in weights.items()}


class _DecomposedWeightNorm(TorchFunctionMode):
    """Decomposes weight normalization, since the second derivative of torch's fused operation is wrong."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch._weight_norm:
            direction, length, dim = args
            return direction * (length / torch.norm_except_dim(direction, 2, dim))
        return func(*args, **(kwargs or {}))


def _derivative(output: Tensor, weights: Weights, vector: Tensor | None = None, differentiable: bool = False) -> Tensor:
    """Compute the gradient [P] of output' vector; zero for weights that do not affect the output."""
    gradients = torch.autograd.grad(
        output, list(weights.values()), vector, create_graph=differentiable, materialize_grads=True
    )
    return torch.cat([gradient.flatten() for gradient in gradients])
