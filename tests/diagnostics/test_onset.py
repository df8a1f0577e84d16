import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lawn.diagnostics import FlatteningOnset


def switch(
    margins: torch.Tensor, batch_size: int, epoch: int, threshold: float, state_at: int | None = None
) -> int | None:
    """The number of samples seen at the onset, of margins in the order of training; None where there is none."""
    onset = FlatteningOnset(epoch // batch_size, threshold)
    for k, batch in enumerate(margins.split(batch_size)):
        if k == state_at:
            state = onset.state_dict()
            onset = FlatteningOnset(epoch // batch_size, threshold)
            onset.load_state_dict(state)
        if onset.follow(batch):
            return k * batch_size + len(batch)
    return None


def test_by_hand():
    """Epochs of 100 samples: a check after every ten. The first check with a median of 2 is that of 120 to 130, the
    sixth one that of 170 to 180; with it the lower median of ten checks is 2."""
    margins = torch.zeros(300)
    margins[120:] = 2
    assert switch(margins, 1, 100, 2.0) == 180
    assert switch(margins, 1, 100, 2.1) is None
    margins[120:125] = 0  # half of a check: its lower median is 0
    assert switch(margins, 1, 100, 2.0) == 190


def test_a_peak_is_no_onset():
    margins = torch.zeros(300)
    margins[120:160] = 9
    assert switch(margins, 1, 100, 2.0) is None


@given(st.sampled_from([1, 2, 5, 10, 25, 50, 100, 200]), st.floats(-1, 4))
def test_the_batch_size_hardly_matters(batch_size, threshold):
    """Margins that grow from -1 to 4 over three epochs of 1,000 samples: the switch comes half an epoch after they
    cross the threshold, or at the end of the first epoch, to within two checks."""
    margins = torch.linspace(-1, 4, 3000)
    expected = max(1000.0, (threshold + 1) / 5 * 3000 + 500)
    found = switch(margins, batch_size, 1000, threshold)
    slack = 2 * max(100, batch_size)
    assert (expected > 3000 - slack) if found is None else (abs(found - expected) <= slack)


@given(st.integers(0, 30))
def test_a_state_in_between(at):
    margins = torch.linspace(0, 2, 620)
    assert switch(margins, 10, 310, 1.0, state_at=at) == switch(margins, 10, 310, 1.0) is not None


def test_not_a_number_is_no_onset():
    assert switch(torch.full((300,), math.nan), 10, 100, 1.0) is None


@pytest.mark.parametrize("batch_size", [1, 7, 100])
def test_never_before_the_end_of_the_first_epoch(batch_size):
    assert switch(torch.full((batch_size * 9,), 9.0), batch_size, batch_size * 3, 1.0) == batch_size * 3


def test_an_epoch_without_updates_is_refused():
    with pytest.raises(ValueError, match="at least 1, got 0"):
        FlatteningOnset(0)
    with pytest.raises(TypeError):
        FlatteningOnset(10.5)


def test_margins_of_another_shape_are_refused():
    onset = FlatteningOnset(updates_per_epoch=10)
    with pytest.raises(ValueError, match=r"a margin for each sample, got the shape \[4, 4\]"):
        onset.follow(torch.ones(4, 4))
    assert onset.updates == 0
