from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lawn.data.batching import Batching, chunk

cases = st.tuples(st.integers(1, 60), st.integers(1, 25), st.none() | st.integers(1, 9), st.integers(1, 7))


@given(cases)
def test_ranks_take_an_epoch_apart_exactly(case):
    samples, batch_size, micro, world = case
    ranks = [list(Batching(batch_size, micro, rank, world).parts(samples)) for rank in range(world)]
    taken = Counter(k for parts in ranks for part in parts if part.share for k in range(part.start, part.stop))
    assert taken == Counter(range(samples))
    assert len({len(parts) for parts in ranks}) == 1
    updates: dict[int, list] = {}
    for parts in ranks:
        for part in parts:
            assert 1 <= part.stop - part.start <= (micro or batch_size)
            assert part.update.start <= part.start < part.stop <= part.update.stop
            assert range(samples)[part.update][part.within] == range(part.start, part.stop)
            updates.setdefault(part.update.start, []).append(part)
    assert len(updates) == Batching(batch_size).updates(samples)
    for parts in updates.values():
        assert sum(part.share for part in parts) == pytest.approx(1)
        sizes = {part.stop - part.start for part in parts}
        assert max(sizes) - min(sizes) <= 1


@given(cases)
def test_each_update_of_a_rank_has_a_first_and_a_last_part(case):
    samples, batch_size, micro, world = case
    for rank in range(world):
        parts = list(Batching(batch_size, micro, rank, world).parts(samples))
        for before, part in zip([None, *parts], [*parts, None], strict=True):
            begins = before is None or part is None or before.update != part.update
            assert part is None or part.first == begins
            assert before is None or before.last == begins


@given(st.integers(1, 5), st.integers(1, 4), st.integers(1, 4))
def test_parts_depend_on_their_number_alone(each, rounds, world):
    """One rank with as many parts as several ranks have together has the same parts."""
    size = each * rounds * world
    alone = [(part.start, part.stop) for part in Batching(size, each).parts(3 * size)]
    shared = [
        (part.start, part.stop) for rank in range(world) for part in Batching(size, each, rank, world).parts(3 * size)
    ]
    assert sorted(shared) == alone


@given(st.integers(0, 50), st.integers(1, 9))
def test_chunks(samples, world):
    chunks = [range(samples)[chunk(samples, rank, world)] for rank in range(world)]
    assert [k for some in chunks for k in some] == list(range(samples))
    assert max(map(len, chunks)) - min(map(len, chunks)) <= 1
