import pickle

import pytest
import torch
from torchmetrics import Metric

from segalign.errors import DataError
from segalign.metrics.feature_sums import FeatureSums
from segalign.metrics.sum_metric import SumMetric


class Total(SumMetric):
    """Sums whole numbers; refuses to say an odd total."""

    def __init__(self, num_samples=10, **settings):
        super().__init__(**settings)
        self.add_ids("ids", num_samples)
        self.add_sum("total", 1, dtype=torch.float64)

    def update(self, values, sample_ids, counted):
        rows = self.new_rows("ids", sample_ids, counted)
        self.total = self.total + values[rows].sum()
        self.mark("ids", sample_ids[rows])

    def compute(self):
        if int(self.total) % 2:
            raise DataError("odd")
        return self.total


def batch(*values, counted=None, ids=None):
    ids = torch.tensor(values if ids is None else ids)
    counted = torch.ones(len(values)) > 0 if counted is None else torch.tensor(counted)
    return torch.tensor(values).double(), ids, counted


def test_a_sample_counts_once_and_padding_never():
    metric = Total()
    metric.update(*batch(3, 5, 3))
    metric.update(*batch(5, 9, 3, 8, counted=[True, False, True, True]))
    assert metric.compute() == 3 + 5 + 8
    metric.update(*batch(9, 1, counted=[True, True]))
    assert metric.compute() == 3 + 5 + 8 + 9 + 1


def test_new_rows_are_the_first_of_each_id():
    _, ids, counted = batch(4, 4, 2, 4, 2, counted=[False, True, True, True, True])
    assert Total().new_rows("ids", ids, counted).tolist() == [1, 2]


@pytest.mark.parametrize("wrong", [-1, 10])
def test_an_id_out_of_range_is_refused_unless_it_is_padding(wrong):
    metric = Total()
    with pytest.raises(DataError, match=f"ids below 10, .* got {wrong}"):
        metric.update(*batch(2, 2, ids=[0, wrong]))
    metric.update(*batch(2, 2, ids=[0, wrong], counted=[True, False]))
    assert metric.compute() == 2


def test_forward_returns_the_batch_and_adds_it_once():
    metric = Total()
    assert metric(*batch(2, 4)) == 6
    assert metric(*batch(4, 6)) == 10  # alone, both count; together, 4 has been counted
    assert metric.compute() == 12
    assert metric.update_count == 2


def test_forward_that_is_refused_changes_nothing():
    metric = Total()
    metric(*batch(2, 4))
    with pytest.raises(DataError, match="odd"):
        metric(*batch(7))
    assert metric.compute() == 6
    metric.update(*batch(7, 1))
    assert metric.compute() == 14


def test_reset_clone_and_pickle():
    metric = Total()
    metric.update(*batch(2, 4))
    copies = [metric.clone(), pickle.loads(pickle.dumps(metric))]
    metric.reset()
    assert metric.ids.sum() == 0
    for copy in copies:
        copy.update(*batch(4, 6))
        assert copy.compute() == 12
    metric.update(*batch(2))
    assert metric.compute() == 2


def test_merged_states_add_up_unless_both_counted_a_sample():
    first, second = Total(), Total()
    first.update(*batch(2, 4))
    second.update(*batch(6))
    first.merge_state(second)
    assert first.compute() == 12
    with pytest.raises(DataError, match="1 were by several, first 6"):
        second.merge_state(first)
    assert second.compute() == 6


def test_types_of_states_stay():
    metric = Total().half().float()
    metric.set_dtype(torch.float16)
    assert (metric.ids.dtype, metric.total.dtype) == (torch.int64, torch.float64)


def test_torchmetrics_loses_earlier_batches_when_a_forward_is_refused():
    class Plain(Metric):
        full_state_update = False

        def __init__(self):
            super().__init__()
            self.add_state("total", torch.zeros(()), dist_reduce_fx="sum")

        def update(self, value):
            self.total += value

        def compute(self):
            if self.total % 2:
                raise DataError("odd")
            return self.total

    metric = Plain()
    metric(2.0)
    with pytest.raises(DataError):
        metric(3.0)
    assert metric.total == 3  # the 2 is gone


def test_feature_sums_refuse_before_they_change_anything():
    metric = FeatureSums(3, 10)
    metric.update(torch.ones(2, 3), *batch(0, 1)[1:])
    before = metric.compute().tensors()
    bad = torch.tensor([[1.0, 2, 3], [1, torch.inf, 3]])
    with pytest.raises(DataError, match="in 1 of 2 rows, first in row 1"):
        metric.update(bad, *batch(2, 3)[1:])
    with pytest.raises(DataError, match="lower `grid_bits`"):
        metric.update(torch.full((2, 3), 1e6), *batch(2, 3)[1:])
    with pytest.raises(DataError, match=r"shape \(B, 3\); got \(2, 4\)"):
        metric.update(torch.ones(2, 4), *batch(2, 3)[1:])
    after = metric.compute().tensors()
    assert all(torch.equal(after[name], before[name]) for name in before)
    metric.update(bad, *batch(2, 3, counted=[True, False])[1:])
    assert metric.compute().num_samples == 3
