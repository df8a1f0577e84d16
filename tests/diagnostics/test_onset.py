import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lawn.diagnostics import FlatteningOnset


def switch(margins: torch.Tensor, batch_size: int, threshold: float, state_at: int | None = None) -> int | None:
    """The number of samples seen at the onset, of an epoch of margins that goes on and on; None where there is none."""
    batches = margins.split(batch_size)
    onset = FlatteningOnset(len(batches), threshold)
    for k, batch in enumerate(batches):
        if k == state_at:
            state = onset.state_dict()
            onset = FlatteningOnset(len(batches), threshold)
            onset.load_state_dict(state)
        if onset.follow(batch):
            return k * batch_size + len(batch)
    return None


def test_by_hand():
    """Ten checks of ten samples each; the median, the lower one of the two in the middle, is 2 at the third."""
    margins = torch.zeros(100)
    margins[20:24] = 5
    margins[24:26] = 2
    assert switch(margins, 1, 2.0) == 30
    margins[25] = 1.9
    assert switch(margins, 1, 2.0) is None


@given(st.sampled_from([1, 2, 5, 10, 25, 50, 100]), st.floats(-1, 4))
def test_the_batch_size_hardly_matters(batch_size, threshold):
    """Margins that grow from -1 to 4 over 1,000 samples: the switch comes within a window of where they cross."""
    margins = torch.linspace(-1, 4, 1000)
    crossed = (threshold + 1) / 5 * 1000
    found = switch(margins, batch_size, threshold)
    if found is None:
        assert crossed > 900
    else:
        assert crossed <= found <= crossed + 150 + batch_size


@given(st.integers(0, 30))
def test_a_state_in_between(at):
    margins = torch.linspace(0, 2, 310)
    assert switch(margins, 10, 1.0, state_at=at) == switch(margins, 10, 1.0)


def test_not_a_number_is_no_onset():
    assert switch(torch.full((100,), math.nan), 10, 1.0) is None


@pytest.mark.parametrize("batch_size", [1, 7, 100])
def test_short_epochs_are_checked_at_every_update(batch_size):
    assert switch(torch.full((batch_size * 3,), 9.0), batch_size, 1.0) == batch_size
