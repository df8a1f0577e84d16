"""Curvature and noise of the training loss, against the matrices themselves, sample by sample and batch by batch."""

import itertools
import math
from functools import partial

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize

from lawn import losses
from lawn.diagnostics import LossSurface
from lawn.diagnostics.curvature import ROWS
from lawn.models.ncf import NCFMLP

SHARP = {"steps": 1000, "tolerance": 0.0}  # as far as the number format goes


class Case:
    """A model with its samples, and the matrices of its loss by loops over them."""

    def __init__(self, model: nn.Module, loss, inputs: tuple[Tensor, ...], labels: Tensor) -> None:
        self.model, self.loss, self.inputs, self.labels = model.double().eval(), loss, inputs, labels

    def surface(self, chunk: int | None = None) -> LossSurface:
        return LossSurface(self.model, self.loss, self.inputs, self.labels, chunk)

    def weights(self) -> Tensor:
        return nn.utils.parameters_to_vector(p for p in self.model.parameters() if p.requires_grad).detach()

    def of(self, samples: list[int]):
        """The mean loss of these samples as a function of the flat weights."""
        named = {name: p for name, p in self.model.named_parameters() if p.requires_grad}

        def value(flat: Tensor) -> Tensor:
            parts = flat.split([p.numel() for p in named.values()])
            weights = {name: part.view_as(p) for (name, p), part in zip(named.items(), parts, strict=True)}
            logits = functional_call(self.model, weights, tuple(x[samples] for x in self.inputs))
            return self.loss(logits, self.labels[samples])

        return value

    def gradient(self, samples: list[int]) -> Tensor:
        weights = self.weights().requires_grad_()
        return torch.autograd.grad(self.of(samples)(weights), weights)[0]

    def hessian(self, samples: list[int]) -> Tensor:
        return torch.autograd.functional.hessian(self.of(samples), self.weights())

    @property
    def all(self) -> list[int]:
        return list(range(len(self.labels)))

    def sigma(self, covariance: str) -> Tensor:
        if covariance == "hessians":
            each = torch.stack([self.hessian([i]) for i in self.all])
            return (each @ each).mean(0) - each.mean(0) @ each.mean(0)
        rows = torch.stack([self.gradient([i]) for i in self.all])
        return torch.cov(rows.T, correction=0)

    def escape(self, lr: float, batch_size: int, covariance: str) -> float:
        m = len(self.labels)
        hessian = self.hessian(self.all)
        step = torch.eye(len(hessian), dtype=torch.float64) - lr * hessian
        noise = lr**2 * (m - batch_size) / (batch_size * (m - 1)) * self.sigma(covariance)
        return torch.linalg.eigvalsh(step @ step + noise)[-1].item()


def mlp(seed: int, samples: int = 6, loss=F.cross_entropy, bias: bool = True) -> Case:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 4, bias=bias), nn.ReLU(), nn.Linear(4, 3, bias=bias))
    return Case(model, loss, (torch.randn(samples, 3, dtype=torch.float64),), torch.randint(3, (samples,)))


def ncf(seed: int, samples: int = 5) -> Case:
    """Five samples are fewer than half the rows of the tables and nine are more: NCF computes them in two ways."""
    torch.manual_seed(seed)
    model = NCFMLP(5, 6, factors=2, layers=1, init="torch")
    ids = torch.randint(5, (samples,)), torch.randint(6, (samples,))
    labels = torch.randint(2, (samples,)).double()
    return Case(model, F.binary_cross_entropy_with_logits, ids, labels)


class Tied(nn.Module):
    """The layer between is the embedding's table again; users are embedded by torch's own module, with padding."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(4, 4, padding_idx=0)
        self.back = nn.Linear(4, 4, bias=False)
        self.back.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.back(self.table(ids).tanh())


def tied(seed: int) -> Case:
    torch.manual_seed(seed)
    return Case(Tied(), F.cross_entropy, (torch.randint(4, (6,)),), torch.randint(4, (6,)))


class Unit(nn.Module):
    """Rows of a length, as torch's weight normalization has them, in operations with right second derivatives."""

    def forward(self, lengths: Tensor, rows: Tensor) -> Tensor:
        return lengths * rows / rows.square().sum(1, keepdim=True).sqrt()

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        return weight.norm(dim=1, keepdim=True), weight


def parametrized(seed: int) -> Case:
    torch.manual_seed(seed)
    layer = nn.Linear(3, 4)
    parametrize.register_parametrization(layer, "weight", Unit())
    model = nn.Sequential(layer, nn.Tanh(), nn.Linear(4, 3))
    return Case(model, F.cross_entropy, (torch.randn(6, 3, dtype=torch.float64),), torch.randint(3, (6,)))


def frozen(seed: int) -> Case:
    case = mlp(seed)
    case.model[0].requires_grad_(False)
    return case


def image(seed: int) -> Case:
    """Convolution, batch norm with statistics of its own, dropout and pooling."""
    torch.manual_seed(seed)
    norm = nn.BatchNorm2d(2)
    model = nn.Sequential(nn.Conv2d(1, 2, 3), norm, nn.ReLU(inplace=True), nn.Dropout(), nn.MaxPool2d(2), nn.Flatten())
    model.append(nn.Linear(8, 3))
    model(torch.randn(9, 1, 6, 6))
    return Case(model, F.cross_entropy, (torch.randn(5, 1, 6, 6, dtype=torch.float64),), torch.randint(3, (5,)))


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.layer, self.head = kind(2, 2, batch_first=True), nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x)[0][:, -1])


def recurrent(kind: type[nn.RNNBase], seed: int) -> Case:
    torch.manual_seed(seed)
    return Case(Recurrent(kind), F.cross_entropy, (torch.randn(5, 3, 2, dtype=torch.float64),), torch.randint(3, (5,)))


def focal(seed: int) -> Case:
    return mlp(seed, loss=losses.focal(gamma=2.0).mean)


CASES = {
    "mlp": mlp,
    "ncf": ncf,
    "ncf, many": lambda seed: ncf(seed, samples=9),
    "tied": tied,
    "parametrized": parametrized,
    "frozen": frozen,
    "image": image,
    "focal": focal,
    "GRU": partial(recurrent, nn.GRU),
    "LSTM": partial(recurrent, nn.LSTM),
}
each_case = pytest.mark.parametrize("name", CASES)


def same(one: Tensor | float, other: Tensor | float) -> None:
    torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


@each_case
@pytest.mark.parametrize("chunk", [None, 4])
def test_gradient_and_hessian_are_those_of_the_loss(name, chunk):
    case = CASES[name](0)
    surface, hessian = case.surface(chunk), case.hessian(case.all)
    same(surface.gradient(), case.gradient(case.all))
    for k in range(3):
        v = torch.randn(len(hessian), generator=torch.Generator().manual_seed(k), dtype=torch.float64)
        same(surface.hessian_vector(v), hessian @ v)
    same(surface.hessian_top(**SHARP), torch.linalg.eigvalsh(hessian)[-1].item())


@each_case
@pytest.mark.parametrize("chunk", [None, 4])
def test_trace_is_that_of_the_samples_gradients(name, chunk):
    case = CASES[name](1)
    m = len(case.labels)
    trace = case.sigma("gradients").trace().item()
    for batch_size in (1, 3, m):
        expected = (m - batch_size) / (batch_size * (m - 1)) * trace
        same(case.surface(chunk).gradient_covariance_trace(batch_size), expected)


@each_case
@pytest.mark.parametrize(
    ("covariance", "lr", "batch_size", "chunk"), [("gradients", 0.3, 2, None), ("hessians", 20.0, 1, 4)]
)
def test_escape_is_the_matrices_largest_eigenvalue(name, covariance, lr, batch_size, chunk):
    case = CASES[name](2)
    computed = case.surface(chunk).escape(lr, batch_size, covariance, **SHARP)
    same(computed, case.escape(lr, batch_size, covariance))


def test_torchs_weight_normalization_is_differentiated_twice():
    """Which torch itself gets wrong (`gradgradcheck` of `torch._weight_norm` fails)."""
    case = parametrized(0)
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 3)).double()
    model.load_state_dict(case.model.state_dict())
    surface, expected = LossSurface(model, case.loss, case.inputs, case.labels), case.surface()
    v = expected.gradient()
    same(surface.gradient(), v)
    same(surface.hessian_vector(v), expected.hessian_vector(v))
    same(surface.gradient_covariance_trace(), expected.gradient_covariance_trace())
    for covariance in ("gradients", "hessians"):
        same(surface.escape(0.3, 2, covariance, **SHARP), expected.escape(0.3, 2, covariance, **SHARP))


def test_least_squares_in_closed_form():
    """The loss 1/2m sum (x_i w - y_i)^2 has H = X'X / m wherever w is, and the gradients (x_i w - y_i) x_i."""
    torch.manual_seed(0)
    x, y = torch.randn(6, 4, dtype=torch.float64), torch.randn(6, 1, dtype=torch.float64)
    model = nn.Linear(4, 1, bias=False).double()
    surface = LossSurface(model, lambda logits, labels: F.mse_loss(logits, labels) / 2, x, y)
    hessian = x.T @ x / 6
    rows = (x @ model.weight.T.detach() - y) * x
    same(surface.gradient(), rows.mean(0))
    same(torch.stack([surface.hessian_vector(row) for row in torch.eye(4, dtype=torch.float64)]), hessian)
    same(surface.hessian_top(**SHARP), torch.linalg.eigvalsh(hessian)[-1].item())
    same(surface.gradient_covariance_trace(), rows.var(0, correction=0).sum().item())
    step = torch.eye(4, dtype=torch.float64) - 0.1 * hessian
    norms = x.square().sum(1)[:, None, None]
    sigma = (norms * x[:, :, None] * x[:, None]).mean(0) - hessian @ hessian  # H_i = x_i x_i', H_i^2 = |x_i|^2 H_i
    expected = torch.linalg.eigvalsh(step @ step + 0.01 * 4 / (2 * 5) * sigma)[-1].item()
    same(surface.escape(0.1, 2, "hessians", **SHARP), expected)
    assert expected < 1  # H is positive definite: SGD stays


def test_a_loss_that_is_linear_in_the_weights_has_no_curvature():
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    surface = LossSurface(nn.Linear(3, 1), lambda logits, labels: (logits[:, 0] * labels).mean(), x, torch.ones(5))
    assert not surface.hessian_vector(torch.ones(4)).any()
    assert surface.hessian_top() == 0
    assert surface.escape(0.1, 2, "hessians") == 1
    assert surface.escape(0.1, 2) > 1


@given(seed=st.integers(0, 1000), batch_size=st.integers(1, 5), kind=st.sampled_from([mlp, ncf]))
@settings(max_examples=15, deadline=None)
def test_trace_is_the_covariance_over_all_minibatches(seed, batch_size, kind):
    case = kind(seed, samples=5)
    batches = [list(batch) for batch in itertools.combinations(range(5), batch_size)]
    gradients = torch.stack([case.gradient(batch) for batch in batches])
    expected = gradients.var(0, correction=0).sum().item()
    same(case.surface().gradient_covariance_trace(batch_size), expected)


@given(seed=st.integers(0, 1000), batch_size=st.integers(1, 5), lr=st.floats(0.01, 10))
@settings(max_examples=3, deadline=None)
def test_escape_with_hessians_is_the_mean_squared_step_over_all_minibatches(seed, batch_size, lr):
    case = mlp(seed, samples=5)
    one = torch.eye(len(case.weights()), dtype=torch.float64)
    batches = [list(batch) for batch in itertools.combinations(range(5), batch_size)]
    squares = [torch.linalg.matrix_power(one - lr * case.hessian(batch), 2) for batch in batches]
    expected = torch.linalg.eigvalsh(torch.stack(squares).mean(0))[-1].item()
    same(case.surface().escape(lr, batch_size, "hessians", **SHARP), expected)


@given(seed=st.integers(0, 1000))
@example(seed=229)
@settings(max_examples=3, deadline=None)
def test_large_logits_flatten_the_loss(seed):
    """A homogeneous classifier that is right about all samples, with ever larger weights."""
    case = mlp(seed, samples=4, bias=False)
    logits = case.model(*case.inputs).detach()
    case.labels = logits.argmax(1)
    best, second = logits.topk(2).values.T
    assume((best - second).min() > 1e-3)  # no unit may be on
    measured = []
    for margin in (1.0, 20.0, 80.0):
        scale = math.sqrt(margin / (best - second).min().item())  # the logits are of degree 2
        larger = {name: scale * p for name, p in case.model.state_dict().items()}
        scaled = mlp(seed, bias=False)
        scaled.model.load_state_dict(larger)
        surface = LossSurface(scaled.model, F.cross_entropy, case.inputs, case.labels)
        top, trace = surface.hessian_top(**SHARP), surface.gradient_covariance_trace()
        measured.append((top, trace, *(surface.escape(0.1, 2, c, **SHARP) - 1 for c in ("gradients", "hessians"))))
    for numbers in zip(*measured, strict=True):
        _, large, largest = numbers
        assert largest <= large + 1e-15  # both may be 0 but for the rounding of 1 + excess
        assert abs(largest) <= 1e-12


@given(seed=st.integers(0, 1000), lr=st.floats(1e-9, 1e-4), kind=st.sampled_from([mlp, ncf]))
@settings(max_examples=3, deadline=None)
def test_a_learning_rate_of_nothing_does_not_escape(seed, lr, kind):
    surface = kind(seed).surface()
    bound = 10 * lr * surface.hessian_vector(surface.gradient()).norm().item() + 100 * lr
    for covariance in ("gradients", "hessians"):
        assert 1 <= surface.escape(lr, 2, covariance, **SHARP) + 1e-15 <= 1 + bound
        assert surface.escape(0.0, 2, covariance) == 1


def test_the_model_is_not_changed():
    case = image(0)
    case.model.train()
    case.model[1].eval()  # frozen statistics
    case.model[0].bias.requires_grad_(False)
    for p in case.model.parameters():
        p.grad = torch.ones_like(p)
    state = {name: value.clone() for name, value in case.model.state_dict().items()}
    surface = case.surface(chunk=4)
    measures = (
        surface.gradient,
        lambda: surface.hessian_vector(surface.gradient()),
        surface.gradient_covariance_trace,
        lambda: surface.escape(0.1, 2),
        lambda: surface.escape(0.1, 2, "hessians"),
    )
    for measure in measures:
        with torch.no_grad():
            first = measure()
        same(measure(), first)  # no dropout, and whether or not gradients are on
        assert not isinstance(first, Tensor) or not first.requires_grad
    assert [module.training for module in case.model.modules()] == [True, True, False, *[True] * 5]
    for name, p in case.model.named_parameters():
        assert p.requires_grad == (name != "0.bias")
        assert p.grad.eq(1).all()
    for name, value in case.model.state_dict().items():
        assert value.equal(state[name])


def test_the_mode_is_restored_after_an_error():
    model = nn.Linear(3, 2)
    with pytest.raises(RuntimeError):
        LossSurface(model, F.cross_entropy, torch.zeros(4, 5), torch.zeros(4, dtype=torch.long)).gradient()
    assert model.training


def test_the_weights_are_those_of_the_moment():
    case = mlp(0)
    surface = case.surface()
    before = surface.hessian_top()
    with torch.no_grad():
        case.model[0].weight.mul_(2)
    assert surface.hessian_top(**SHARP) != before
    same(surface.hessian_top(**SHARP), torch.linalg.eigvalsh(case.hessian(case.all))[-1].item())


@pytest.mark.parametrize("name", ["mlp", "ncf"])
def test_float32_is_close_to_float64(name):
    case = CASES[name](3)
    exact = case.surface()
    expected = exact.hessian_top(), exact.gradient_covariance_trace(), exact.escape(0.1, 2) - 1
    case.model.float()
    numbers = [x.float() if x.is_floating_point() else x for x in (*case.inputs, case.labels)]
    surface = LossSurface(case.model, case.loss, numbers[:-1], numbers[-1])
    assert surface.gradient().dtype == surface.hessian_vector(surface.gradient()).dtype == torch.float32
    computed = surface.hessian_top(), surface.gradient_covariance_trace(), surface.escape(0.1, 2) - 1
    assert all(isinstance(number, float) for number in computed)
    assert computed == pytest.approx(expected, rel=1e-4)


def test_lost_weights_have_no_curvature():
    case = mlp(0)
    with torch.no_grad():
        case.model[0].weight.fill_(torch.nan)
    surface = case.surface()
    measured = surface.hessian_top(), surface.gradient_covariance_trace(), surface.escape(0.1, 2)
    assert all(math.isnan(number) for number in measured)


def test_rows_of_a_large_model_are_computed_in_parts():
    torch.manual_seed(0)
    model = NCFMLP(ROWS // 8, 10, factors=1, layers=1, init="torch")
    ids = torch.randint(ROWS // 8, (20,)), torch.randint(10, (20,))
    args = model, F.binary_cross_entropy_with_logits, ids, torch.ones(20)
    assert LossSurface(*args).gradient_covariance_trace() == pytest.approx(
        LossSurface(*args, chunk=2).gradient_covariance_trace(), rel=1e-5
    )


def test_what_cannot_be_is_refused():
    model, x, y = nn.Linear(3, 2), torch.zeros(4, 3), torch.zeros(4, dtype=torch.long)
    surface = LossSurface(model, F.cross_entropy, x, y)
    for batch_size in (0, -1, 5):
        with pytest.raises(ValueError, match=r"batch_size must be in 1..4"):
            surface.gradient_covariance_trace(batch_size)
        with pytest.raises(ValueError, match=r"batch_size must be in 1..4"):
            surface.escape(0.1, batch_size)
    with pytest.raises(ValueError, match="covariance must be one of gradients, hessians"):
        surface.escape(0.1, 1, "both")
    with pytest.raises(ValueError, match=r"a vector of shape \[7\] for 8 weights"):
        surface.hessian_vector(torch.zeros(7))
    with pytest.raises(ValueError, match="no samples"):
        LossSurface(model, F.cross_entropy, x[:0], y[:0])
    with pytest.raises(ValueError, match="4, 3 inputs for 4 labels"):
        LossSurface(model, F.cross_entropy, (x, x[:3]), y)
    with pytest.raises(ValueError, match="no inputs for 4 labels"):
        LossSurface(model, F.cross_entropy, (), y)
    with pytest.raises(ValueError, match="chunk must be at least 1"):
        LossSurface(model, F.cross_entropy, x, y, chunk=0)
    with pytest.raises(ValueError, match="no trainable parameter"):
        LossSurface(nn.Linear(3, 2).requires_grad_(False), F.cross_entropy, x, y)
    assert LossSurface(model, F.cross_entropy, x[:1], y[:1]).gradient_covariance_trace() == 0


def test_attention_has_second_derivatives():
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(4, 2, 4, batch_first=True)
    x, y = torch.randn(3, 2, 4), torch.randn(3, 2, 4)
    surface = LossSurface(model, F.mse_loss, x, y)
    v = torch.randn(sum(p.numel() for p in model.parameters()))
    product = surface.hessian_vector(v)
    before = nn.utils.parameters_to_vector(model.parameters()).detach()
    sides = []
    for step in (1e-2, -1e-2):
        nn.utils.vector_to_parameters(before + step * v, model.parameters())
        sides.append(surface.gradient())
    torch.testing.assert_close(product, (sides[0] - sides[1]) / 2e-2, rtol=0.05, atol=0.02)


@pytest.mark.filterwarnings("ignore:the eigenvalue:UserWarning")
def test_the_first_step_is_the_rayleigh_quotient_of_a_start_vector():
    """The seed is that of the vector; the Hessian has the eigenvalues 1 and 4."""
    inputs, labels = torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.zeros(2, 1)
    surface = LossSurface(nn.Linear(2, 1, bias=False), F.mse_loss, inputs, labels)
    quotients = {surface.hessian_top(steps=1, seed=seed) for seed in range(3)}
    assert len(quotients) == 3
    assert all(1 < quotient < 3.99 for quotient in quotients)
    assert len({surface.escape(0.1, 1, steps=1, seed=seed) for seed in range(3)}) == 3
