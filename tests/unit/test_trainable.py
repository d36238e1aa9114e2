import torch
from torch import nn

from segalign.trainable import trainable_parameters, trainable_state_dict


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.frozen = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).requires_grad_(False)
        self.trained = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
        self.mixed = nn.Linear(2, 2)
        self.mixed.bias.requires_grad_(False)
        self.register_buffer("counter", torch.zeros(()))
        self.register_buffer("scratch", torch.zeros(()), persistent=False)


def test_frozen_weights_and_their_buffers_are_left_out():
    assert sorted(trainable_state_dict(Net())) == [
        "counter",
        "mixed.weight",
        "trained.0.bias",
        "trained.0.weight",
        "trained.1.bias",
        "trained.1.num_batches_tracked",
        "trained.1.running_mean",
        "trained.1.running_var",
        "trained.1.weight",
    ]


def test_foreign_entries_of_a_given_state_are_kept():
    state = {"frozen.0.weight": torch.ones(1), "common_direction": torch.ones(3)}
    assert list(trainable_state_dict(Net(), state)) == ["common_direction"]


def test_tied_parameters_are_counted_once_but_saved_under_both_names():
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    net[1].weight = net[0].weight
    assert list(trainable_parameters(net)) == ["0.weight", "0.bias", "1.bias"]
    assert "1.weight" in trainable_state_dict(net)


def test_a_tied_frozen_weight_is_frozen_under_both_names():
    net = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    net[1].weight = net[0].weight
    net.requires_grad_(False)
    assert trainable_state_dict(net) == {}
