import pickle

import numpy as np
import pytest

from segalign.data.order import BatchPlan, EpochOrder
from segalign.errors import ConfigError

SIZES = [5, 1, 0, 7, 3, 4]
GOLDEN = [11, 9, 10, 2, 1, 8, 0, 3, 6, 4, 7, 5]  # first computed with NumPy 2


def epoch_ids(order: EpochOrder, epoch: int) -> list[int]:
    start = epoch * order.num_samples
    located = [order.locate(p) for p in range(start, start + order.num_samples)]
    assert {found for found, _ in located} == {epoch}
    return [sample_id for _, sample_id in located]


@pytest.mark.parametrize("window", [1, 2, 100])
def test_every_epoch_is_another_permutation(window):
    order = EpochOrder(SIZES, seed=3, shuffle_window=window)
    epochs = [epoch_ids(order, epoch) for epoch in range(4)]
    assert all(sorted(ids) == list(range(20)) for ids in epochs)
    assert len({tuple(ids) for ids in epochs}) == 4


def test_order_is_a_function_of_seed_and_position_alone():
    order = EpochOrder(SIZES, seed=3, shuffle_window=2)
    straight = [order.locate(position) for position in range(200)]
    fresh = pickle.loads(pickle.dumps(EpochOrder(SIZES, seed=3, shuffle_window=2)))
    jumps = np.random.default_rng(0).permutation(200)
    assert all(fresh.locate(int(position)) == straight[position] for position in jumps)
    other = EpochOrder(SIZES, seed=4, shuffle_window=2)
    assert [other.locate(position) for position in range(20)] != straight[:20]


def test_order_does_not_change_with_versions():
    order = EpochOrder([4, 4, 4], seed=1, shuffle_window=2)
    assert epoch_ids(order, 0) == GOLDEN


def test_windows_hold_whole_shards():
    order = EpochOrder([10] * 8, seed=0, shuffle_window=2)
    ids = epoch_ids(order, 0)
    for start in range(0, 80, 20):
        assert len({sample_id // 10 for sample_id in ids[start : start + 20]}) == 2


def test_unshuffled_is_manifest_order():
    order = EpochOrder(SIZES, shuffle=False)
    assert epoch_ids(order, 2) == list(range(20))


def test_far_positions_cost_no_more():
    order = EpochOrder([1000] * 1000, seed=0)
    epoch, sample_id = order.locate(10**15 + 7)
    assert epoch == 10**9
    assert 0 <= sample_id < 10**6


@pytest.mark.parametrize(("world_size", "accumulate"), [(1, 1), (2, 1), (1, 3), (2, 2), (3, 4)])
def test_plans_of_all_ranks_make_one_sequence(world_size, accumulate):
    positions = []
    for micro_batch in range(3 * accumulate):
        for rank in range(world_size):
            plan = BatchPlan(
                global_batch_size=24,
                world_size=world_size,
                global_rank=rank,
                accumulate=accumulate,
            )
            positions += plan.positions(micro_batch)
    assert positions == list(range(72))


def test_workers_take_batches_in_turn():
    plan = BatchPlan(global_batch_size=2)
    shares = [
        list(plan.micro_batches(start=5, stop=12, worker=worker, num_workers=3))
        for worker in range(3)
    ]
    assert shares == [[5, 8, 11], [6, 9], [7, 10]]


def test_global_batch_size_that_does_not_divide():
    message = r"`global_batch_size` must be a multiple of ranks x accumulation \(3 x 2\); got 32"
    with pytest.raises(ConfigError, match=message):
        BatchPlan(global_batch_size=32, world_size=3, accumulate=2)


def test_shuffle_window_must_be_positive():
    with pytest.raises(ConfigError, match="`shuffle_window` must be at least 1 shard; got 0"):
        EpochOrder([1], shuffle_window=0)
