from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lawn.data.batching import Batching, shard

cases = st.tuples(st.integers(1, 60), st.integers(1, 25), st.none() | st.integers(1, 9), st.integers(1, 7))


@given(cases)
def test_ranks_take_an_epoch_apart_exactly(case):
    samples, batch_size, micro, world = case
    ranks = [list(Batching(batch_size, micro, rank, world).micro_batches(samples)) for rank in range(world)]
    taken = Counter(
        k
        for micro_batches in ranks
        for micro_batch in micro_batches
        if micro_batch.share
        for k in range(micro_batch.start, micro_batch.stop)
    )
    assert taken == Counter(range(samples))
    assert len({len(micro_batches) for micro_batches in ranks}) == 1
    updates: dict[int, list] = {}
    for micro_batches in ranks:
        for micro_batch in micro_batches:
            assert 1 <= micro_batch.stop - micro_batch.start <= (micro or batch_size)
            assert micro_batch.update.start <= micro_batch.start < micro_batch.stop <= micro_batch.update.stop
            assert range(samples)[micro_batch.update][micro_batch.within_update] == range(
                micro_batch.start, micro_batch.stop
            )
            updates.setdefault(micro_batch.update.start, []).append(micro_batch)
    assert len(updates) == Batching(batch_size).updates(samples)
    for micro_batches in updates.values():
        assert sum(micro_batch.share for micro_batch in micro_batches) == pytest.approx(1)
        sizes = {micro_batch.stop - micro_batch.start for micro_batch in micro_batches}
        assert max(sizes) - min(sizes) <= 1


@given(cases)
def test_each_update_of_a_rank_has_a_first_and_a_last_part(case):
    samples, batch_size, micro, world = case
    for rank in range(world):
        micro_batches = list(Batching(batch_size, micro, rank, world).micro_batches(samples))
        for before, micro_batch in zip([None, *micro_batches], [*micro_batches, None], strict=True):
            begins = before is None or micro_batch is None or before.update != micro_batch.update
            assert micro_batch is None or micro_batch.first == begins
            assert before is None or before.last == begins


@given(st.integers(1, 5), st.integers(1, 4), st.integers(1, 4))
def test_micro_batches_depend_on_their_number_alone(each, rounds, world):
    """One rank with as many micro_batches as several ranks have together has the same micro_batches."""
    size = each * rounds * world
    alone = [(micro_batch.start, micro_batch.stop) for micro_batch in Batching(size, each).micro_batches(3 * size)]
    shared = [
        (micro_batch.start, micro_batch.stop)
        for rank in range(world)
        for micro_batch in Batching(size, each, rank, world).micro_batches(3 * size)
    ]
    assert sorted(shared) == alone


@given(st.integers(0, 50), st.integers(1, 9))
def test_chunks(samples, world):
    shards = [range(samples)[shard(samples, rank, world)] for rank in range(world)]
    assert [k for some in shards for k in some] == list(range(samples))
    assert max(map(len, shards)) - min(map(len, shards)) <= 1
