"""Gradients clipped by their common norm, and averaged over ranks by one collective per type."""

import math

import pytest
import torch
from torch import distributed, nn
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from segalign.gradients import average_gradients, clip_gradient_values, clip_gradients


def weight(gradient, dtype=torch.float32):
    parameter = nn.Parameter(torch.zeros(len(gradient), dtype=dtype))
    parameter.grad = torch.tensor(gradient, dtype=dtype)
    return parameter


def weights():
    """Of norm sqrt(9 + 16 + 144) = 13; one has no gradient."""
    return [weight([3.0, 4.0]), nn.Parameter(torch.zeros(2)), weight([12.0])]


@pytest.mark.parametrize(("max_norm", "factor"), [(None, 1.0), (26.0, 1.0), (6.5, 0.5)])
def test_long_gradients_are_scaled_down_together(max_norm, factor):
    parameters = weights()
    assert clip_gradients(parameters, max_norm).item() == 13
    for parameter, gradient in zip(parameters, ([3.0, 4.0], None, [12.0]), strict=True):
        if gradient is None:
            assert parameter.grad is None
        else:
            expected = factor * torch.tensor(gradient)
            torch.testing.assert_close(parameter.grad, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_has_no_finite_norm(value):
    assert not clip_gradients([weight([1.0]), weight([value, 1.0])], None).isfinite()
    assert clip_gradients([nn.Parameter(torch.zeros(1))], 1.0).item() == 0


def test_each_element_is_bounded_on_its_own():
    parameters = [weight([3.0, -4.0, 0.5]), nn.Parameter(torch.zeros(2)), weight([math.nan])]
    clip_gradient_values(parameters, 1.0)
    assert parameters[0].grad.tolist() == [1.0, -1.0, 0.5]
    assert parameters[1].grad is None
    assert parameters[2].grad.isnan().all()


def test_one_rank_keeps_its_gradients():
    parameters = weights()
    average_gradients(parameters)
    assert parameters[0].grad.tolist() == [3.0, 4.0]


@pytest.fixture
def collectives(monkeypatch):
    """Two ranks, of which the other has gradients of 1 everywhere; the flat tensors are kept."""
    seen = []

    def add_other_rank(flat):
        seen.append(flat.clone())
        flat += 1

    monkeypatch.setattr(distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(distributed, "all_reduce", add_other_rank)
    return seen


def test_ranks_are_averaged_by_one_collective_for_each_number_type(collectives):
    wide = weight([7.0], torch.float64)
    parameters = [*weights(), wide]
    average_gradients(parameter for parameter in parameters)
    assert [flat.tolist() for flat in collectives] == [[3.0, 4.0, 12.0], [7.0]]
    assert parameters[0].grad.tolist() == [2.0, 2.5]
    assert parameters[1].grad is None
    assert parameters[2].grad.tolist() == [6.5]
    assert wide.grad.tolist() == [4.0]
    assert wide.grad.dtype == torch.float64


def test_gradients_keep_their_shapes(collectives):
    parameter = nn.Parameter(torch.zeros(2, 3))
    parameter.grad = torch.arange(6.0).view(2, 3)
    average_gradients([parameter])
    torch.testing.assert_close(parameter.grad, (torch.arange(6.0).view(2, 3) + 1) / 2)


def test_sharded_gradients_are_left_alone_but_clipped_with_the_others(mesh, monkeypatch):
    sharded = nn.Parameter(distribute_tensor(torch.zeros(2), mesh, [Shard(0)]))
    sharded.grad = distribute_tensor(torch.tensor([3.0, 4.0]), mesh, [Shard(0)])
    whole = weight([12.0])
    calls = []
    monkeypatch.setattr(distributed, "all_reduce", calls.append)
    average_gradients([sharded, whole])
    assert [flat.tolist() for flat in calls] == [[12.0]]
    monkeypatch.undo()
    norm = clip_gradients([sharded, whole], 6.5)
    assert not isinstance(norm, DTensor)
    assert norm.item() == 13
    gradient = torch.cat([sharded.grad.full_tensor(), whole.grad])
    torch.testing.assert_close(gradient, torch.tensor([1.5, 2.0, 6.0]), rtol=1e-6, atol=0)
