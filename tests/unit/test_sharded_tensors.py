"""Optimizers whose weights are sharded in part, on a mesh of one rank."""

import copy

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from segalign.sharded_tensors import weights_apart


@pytest.fixture
def weights(mesh):
    """Weights that are whole, sharded, and whole, with gradients."""
    made = [torch.arange(1.0, 4.0), torch.arange(4.0), torch.ones(2)]
    parameters = [nn.Parameter(tensor) for tensor in made]
    parameters[1] = nn.Parameter(distribute_tensor(made[1], mesh, [Shard(0)]))
    for parameter in parameters:
        parameter.grad = 0.1 * parameter.detach() - 0.2
    return parameters


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@pytest.mark.parametrize("how", ["foreach", "fused"])
def test_whole_and_sharded_weights_are_stepped_by_operations_on_many(weights, how):
    alone = [nn.Parameter(whole(weight.detach()).clone()) for weight in weights]
    for copied, weight in zip(alone, weights, strict=True):
        copied.grad = whole(weight.grad).clone()
    optimizer = torch.optim.AdamW(weights, lr=0.1, **{how: True})
    expected = torch.optim.AdamW(alone, lr=0.1, foreach=False)
    for _ in range(2):
        expected.step()
        with weights_apart(optimizer):
            optimizer.step()
    for weight, other in zip(weights, alone, strict=True):
        torch.testing.assert_close(whole(weight.detach()), other.detach())
    # A checkpoint has them in one group, in their order.
    ours, theirs = optimizer.state_dict(), expected.state_dict()
    assert ours["param_groups"][0]["params"] == theirs["param_groups"][0]["params"]
    for number, entries in theirs["state"].items():
        for name, value in entries.items():
            torch.testing.assert_close(whole(ours["state"][number][name]), value)


def test_groups_are_parted_for_the_block_alone_and_keep_their_settings(weights):
    optimizer = torch.optim.SGD(
        [{"params": weights[:2], "lr": 0.3}, {"params": weights[2:], "lr": 0.4}]
    )
    groups, before = optimizer.param_groups, copy.copy(optimizer.param_groups)

    def fail():
        with weights_apart(optimizer):
            lying = [(group["lr"], len(group["params"])) for group in optimizer.param_groups]
            assert lying == [(0.3, 1), (0.3, 1), (0.4, 1)]
            for group in optimizer.param_groups:
                group["counted"] = group.get("counted", 0) + 1
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert optimizer.param_groups is groups
    assert all(now is then for now, then in zip(groups, before, strict=True))
    assert [group["counted"] for group in groups] == [1, 1]
    assert [len(group["params"]) for group in groups] == [2, 1]
