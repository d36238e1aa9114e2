from collections import Counter

import pytest

from segalign.errors import ConfigError
from segalign.evaluation.plan import EvaluationPlan

PLANS = [(1, 1, 4), (5, 1, 4), (8, 1, 4), (7, 2, 4), (9, 3, 3), (13, 2, 6)]


@pytest.mark.parametrize("numbers", PLANS)
@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 7])
def test_each_place_counts_once_over_all_ranks(numbers, world_size):
    plan = EvaluationPlan(*numbers)
    counted = Counter(
        place
        for rank in range(world_size)
        for batch in plan.batches(rank, world_size)
        for place, counts in zip(batch.places, batch.counted, strict=True)
        if counts
    )
    assert counted == Counter(range(plan.num_images))


@pytest.mark.parametrize("numbers", PLANS)
@pytest.mark.parametrize("world_size", [2, 3, 7])
def test_all_ranks_make_equally_many_batches_of_equal_size(numbers, world_size):
    plan = EvaluationPlan(*numbers)
    per_rank = [list(plan.batches(rank, world_size)) for rank in range(world_size)]
    assert len({len(batches) for batches in per_rank}) == 1
    sizes = {len(batch.places) for batches in per_rank for batch in batches}
    assert sizes == {plan.batch_size}


@pytest.mark.parametrize("numbers", PLANS)
def test_own_images_add_up(numbers):
    plan = EvaluationPlan(*numbers)
    assert sum(plan.num_own(rank, 3) for rank in range(3)) == plan.num_images
    assert plan.num_own(0, 1) == plan.num_images


@pytest.mark.parametrize("numbers", PLANS)
def test_a_micro_batch_is_the_same_in_any_world(numbers):
    plan = EvaluationPlan(*numbers)
    alone = {batch.index: batch.places for batch in plan.batches(0, 1)}
    for world_size in (2, 3, 7):
        for rank in range(world_size):
            for batch in plan.batches(rank, world_size):
                assert alone[batch.index] == batch.places


def test_images_of_a_caption_are_made_together():
    plan = EvaluationPlan(7, 2, 4)
    for batch in plan.batches(0, 1):
        captions = [place // 2 for place in batch.places]
        assert captions[::2] == captions[1::2]
        assert [place % 2 for place in batch.places] == [0, 1] * 2


def test_images_of_a_caption_must_fit_a_batch():
    with pytest.raises(ConfigError, match=r"multiple of `images_per_caption` \(3\).* got 16"):
        EvaluationPlan(5, 3, 16)


def test_there_must_be_captions():
    with pytest.raises(ConfigError, match="expected captions"):
        EvaluationPlan(0)
