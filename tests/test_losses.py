import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torchvision.ops import sigmoid_focal_loss

from lawn import losses

GAMMAS = (0.5, 2.0, 5.0)
seeds = st.integers(0, 9999)


def case(seed: int, classes: int = 5, count: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = 4 * torch.randn(count, classes, generator=generator, dtype=torch.float64)
    return logits, torch.randint(classes, (count,), generator=generator)


def binary_case(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    logits, labels = case(seed, 2)
    return logits[:, 1] - logits[:, 0], labels.double()


@given(seed=seeds, smoothing=st.floats(0, 0.9))
@settings(deadline=None)
def test_label_smoothing_by_its_definition(seed, smoothing):
    logits, labels = case(seed)
    target = (1 - smoothing) * F.one_hot(labels, 5) + smoothing / 5
    expected = -(target * logits.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(losses.label_smoothing(smoothing=smoothing)(logits, labels), expected)


@pytest.mark.parametrize(
    ("multiclass", "binary"),
    [
        (losses.cross_entropy(), losses.bce()),
        (losses.label_smoothing(smoothing=0.05), losses.binary_label_smoothing(smoothing=0.05)),
        (losses.flooding(level=0.8), losses.binary_flooding(level=0.8)),
        *((losses.focal(gamma=g), losses.binary_focal(gamma=g)) for g in GAMMAS),
    ],
)
@given(seed=seeds)
@settings(deadline=None, max_examples=25)
def test_a_binary_loss_is_that_of_two_classes(multiclass, binary, seed):
    logits, labels = case(seed, classes=2)
    torch.testing.assert_close(binary(logits[:, 1] - logits[:, 0], labels.double()), multiclass(logits, labels))


@given(seed=seeds, gamma=st.sampled_from(GAMMAS))
@settings(deadline=None)
def test_focal_by_its_definition_and_by_torchvision(seed, gamma):
    logits, labels = case(seed)
    p = logits.softmax(1).gather(1, labels[:, None])[:, 0]
    torch.testing.assert_close(losses.focal(gamma=gamma)(logits, labels), -((1 - p) ** gamma * p.log()).mean())
    score, label = binary_case(seed)
    expected = sigmoid_focal_loss(score, label, alpha=-1, gamma=gamma, reduction="mean")
    torch.testing.assert_close(losses.binary_focal(gamma=gamma)(score, label), expected)


def test_focal_without_gamma_is_cross_entropy():
    logits, labels = case(0)
    torch.testing.assert_close(losses.focal(gamma=0.0)(logits, labels), F.cross_entropy(logits, labels))


@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("size", [0.0, 1.0, 30.0, 200.0, 1e4])
def test_focal_has_gradients_where_p_is_0_or_1_in_float32(gamma, size):
    """Every gradient is finite, and that of a hopeless sample is still cross entropy's."""
    for sign in (-1, 1):
        score = torch.tensor([sign * size], requires_grad=True)
        losses.binary_focal(gamma=gamma)(score, torch.ones(1)).backward()
        logits = torch.tensor([[sign * size, 0.0, 0.0]], requires_grad=True)
        losses.focal(gamma=gamma)(logits, torch.tensor([0])).backward()
        assert score.grad.isfinite().all()
        assert logits.grad.isfinite().all()
        if sign * size <= -30:
            assert score.grad.item() == pytest.approx(-1, abs=1e-3)
            assert logits.grad[0, 0].item() == pytest.approx(-1, abs=1e-3)


def test_flooding_turns_the_gradient_below_the_level():
    logits, labels = case(0)
    plain = F.cross_entropy(logits, labels).item()
    assert losses.flooding(level=plain + 0.3)(logits, labels).item() == pytest.approx(plain + 0.6)
    assert losses.flooding(level=plain - 0.3)(logits, labels).item() == pytest.approx(plain)
    gradients = []
    for level in (plain - 0.3, plain + 0.3):
        x = logits.clone().requires_grad_()
        losses.flooding(level=level)(x, labels).backward()
        gradients.append(x.grad)
    torch.testing.assert_close(gradients[0], -gradients[1])


def test_by_hand():
    """p = 3/4 for the label: -log p, and 1/16 of it at gamma 2."""
    score, label = torch.tensor([math.log(3)]), torch.ones(1)
    assert losses.bce()(score, label).item() == pytest.approx(-math.log(0.75))
    assert losses.binary_focal(gamma=2.0)(score, label).item() == pytest.approx(-math.log(0.75) / 16)
    smoothed = -(0.975 * math.log(0.75) + 0.025 * math.log(0.25))
    assert losses.binary_label_smoothing(smoothing=0.05)(score, label).item() == pytest.approx(smoothed)


@pytest.mark.parametrize(
    "loss",
    [losses.bce(), losses.binary_label_smoothing(smoothing=0.1), losses.binary_focal(gamma=2.0)],
    ids=["bce", "label_smoothing", "focal"],
)
def test_binary_losses_refuse_a_column_of_logits(loss):
    """Broadcasting would pair each logit with all labels."""
    for logits, labels in (((4, 1), (4,)), ((4,), (4, 1))):
        with pytest.raises(ValueError, match=r"\[4, 1\]"):
            loss(torch.zeros(logits), torch.ones(labels))
