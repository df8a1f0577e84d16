import torch

from lawn.train.epoch_state import Buffer


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
