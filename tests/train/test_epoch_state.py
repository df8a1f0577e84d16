import torch

from lawn.train.epoch_state import Numbers


def test_numbers_are_added_where_room_was_made():
    numbers = Numbers(torch.tensor([1.0, 2.0]))
    numbers.reserve(6)
    place = numbers.all.data_ptr()
    numbers.add(torch.tensor([3.0, 4.0]))
    numbers.add(torch.tensor(5.0))
    assert numbers.all.tolist() == [1, 2, 3, 4, 5]
    assert len(numbers) == 5
    numbers.reserve(3)
    assert numbers.all.data_ptr() == place
    numbers.reserve(7)
    assert numbers.all.tolist() == [1, 2, 3, 4, 5]
