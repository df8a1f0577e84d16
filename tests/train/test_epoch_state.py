from dataclasses import replace

import torch
from torch import nn

from lawn.train.distributed import World
from lawn.train.epoch_state import Buffer, EpochState, load_epoch_state

CPU = torch.device("cpu")


def test_numbers_are_added_where_room_was_made():
    numbers = Buffer(torch.tensor([1.0, 2.0]))
    numbers.reserve(6)
    place = numbers.values.data_ptr()
    numbers.add(torch.tensor([3.0, 4.0]))
    numbers.add(torch.tensor(5.0))
    assert numbers.values.tolist() == [1, 2, 3, 4, 5]
    assert len(numbers) == 5
    numbers.reserve(3)
    assert numbers.values.data_ptr() == place
    numbers.reserve(7)
    assert numbers.values.tolist() == [1, 2, 3, 4, 5]


def test_the_states_of_two_ranks_on_other_numbers_of_ranks():
    """What each has added counts once; both have drawn batches of their own for batch norm."""
    states = []
    for losses, margins, mean in (([0.5, 0.25], [1.0, 2.0], 4.0), ([1.0, 0.75], [3.0], 8.0)):
        state = EpochState.begin(0.1, CPU, torch.tensor([7.0]))
        state.reserve(2, 3)
        state.losses.add(torch.tensor(losses))
        state.margins.add(torch.tensor(margins))
        model = nn.BatchNorm1d(1)
        nn.init.constant_(model.running_mean, mean)
        nn.init.constant_(model.num_batches_tracked, 2)
        states.append(state.state_dict(model, CPU))
    drawn = torch.get_rng_state()
    torch.rand(1)
    model, same = nn.BatchNorm1d(1), World(CPU, rank=1, size=2)
    loaded = load_epoch_state(states, model, same)
    assert (loaded.losses.values.tolist(), loaded.margins.values.tolist()) == ([1.0, 0.75], [3.0])
    assert model.running_mean.item() == 8
    loaded.restore_generators(CPU)
    assert torch.equal(torch.get_rng_state(), drawn)
    expected = {0: ([1.5, 1.0], [1.0, 2.0, 3.0]), 1: ([0.0, 0.0], []), 2: ([0.0, 0.0], [])}
    for world in (World(CPU), *(replace(same, rank=rank, size=3) for rank in range(3))):
        loaded = load_epoch_state(states, model, world)
        assert (loaded.losses.values.tolist(), loaded.margins.values.tolist()) == expected[world.rank]
        assert (loaded.lr, loaded.updates, loaded.generator_states) == (0.1, 2, [])
        assert loaded.gradients is not None
        assert loaded.gradients.tolist() == [7]
        assert (model.running_mean.item(), model.num_batches_tracked.item()) == (6, 2)
