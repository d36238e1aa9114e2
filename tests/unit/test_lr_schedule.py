"""The schedule in closed form, for any number of steps."""

import pytest
import torch

from segalign.lr_schedule import WarmupCosineLR, WarmupLinearLR


def rates(total_steps, warmup_steps, kind=WarmupCosineLR):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    schedule = kind(optimizer, total_steps, warmup_steps)
    values = []
    for _ in range(total_steps):
        values.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    return values, schedule.get_last_lr()[0]


def test_warm_up_then_half_a_cosine():
    values, last = rates(8, 4)
    assert values == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.0, 1.7071068, 1.0, 0.2928932])
    assert last == pytest.approx(0)


def test_warm_up_then_a_straight_line():
    values, last = rates(8, 4, WarmupLinearLR)
    assert values == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.0, 1.5, 1.0, 0.5])
    assert last == pytest.approx(0)


@pytest.mark.parametrize("total_steps", [1, 2, 20, 50, 51])
def test_short_runs_work(total_steps):
    values, last = rates(total_steps, 50)
    assert 0 < max(values) <= 2
    assert last == pytest.approx(0)
