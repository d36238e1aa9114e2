import pytest
import torch
from torch import nn

from segalign.ema import TrainableEMA
from segalign.errors import ConfigError, DataError


def make_net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1))
    net[0].requires_grad_(False)
    return net


def shift(net: nn.Module, by: float) -> None:
    with torch.no_grad():
        for parameter in net[1].parameters():
            parameter += by


def test_only_trainable_tensors_are_averaged_in_float32():
    net = make_net().to(torch.bfloat16)
    ema = TrainableEMA(net)
    assert sorted(ema.weights) == ["1.bias", "1.weight"]
    assert {tensor.dtype for tensor in ema.weights.values()} == {torch.float32}


def test_constant_decay_matches_the_closed_form():
    net = make_net().double()
    ema = TrainableEMA(net, 0.9, warmup=False)
    start = net[1].weight.detach().clone()
    values = []
    for _ in range(20):
        shift(net, 1.0)
        values.append(net[1].weight.detach().clone())
        ema.update(net)
    expected = 0.9**20 * start
    for age, value in enumerate(reversed(values)):
        expected += 0.1 * 0.9**age * value
    # float32 averages of values up to 20: 20 updates at eps 6e-8 each.
    torch.testing.assert_close(ema.weights["1.weight"].double(), expected, rtol=1e-5, atol=1e-5)


def test_warm_up_schedule():
    ema = TrainableEMA(make_net(), 0.5)
    assert [ema.decay_at(n) for n in (0, 1, 8, 80)] == [1 / 10, 2 / 11, 0.5, 0.5]


def test_first_warm_up_updates_match_by_hand():
    net = make_net()
    ema = TrainableEMA(net, 0.999)
    start = net[1].bias.item()
    shift(net, 1.0)
    ema.update(net)
    first = 0.1 * start + 0.9 * (start + 1)
    assert ema.weights["1.bias"].item() == pytest.approx(first, abs=1e-6)
    shift(net, 1.0)
    ema.update(net)
    second = 2 / 11 * first + 9 / 11 * (start + 2)
    assert ema.weights["1.bias"].item() == pytest.approx(second, abs=1e-6)
    assert ema.num_updates == 2


def test_swapping_puts_averages_in_and_raw_weights_back():
    net = make_net()
    ema = TrainableEMA(net)
    shift(net, 3.0)
    raw = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    with ema.swapped(net):
        assert torch.equal(net[1].weight, ema.weights["1.weight"])
        assert not torch.equal(net[1].weight, raw["1.weight"])
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, raw[name])


def test_an_exception_leaves_raw_weights():
    net = make_net()
    ema = TrainableEMA(net)
    shift(net, 3.0)
    raw = net[1].weight.detach().clone()
    averages = ema.weights["1.weight"].clone()
    with pytest.raises(RuntimeError, match="stop"), ema.swapped(net):
        raise RuntimeError("stop")
    assert torch.equal(net[1].weight, raw)
    assert torch.equal(ema.weights["1.weight"], averages)


def test_state_comes_back_and_goes_on_identically():
    net = make_net()
    ema = TrainableEMA(net)
    for _ in range(3):
        shift(net, 0.1)
        ema.update(net)
    other = TrainableEMA(make_net(1))
    other.load_state_dict(ema.state_dict())
    shift(net, 0.1)
    ema.update(net)
    other.update(net)
    assert other.num_updates == ema.num_updates == 4
    for name, tensor in ema.weights.items():
        assert torch.equal(tensor, other.weights[name])


def test_averages_of_other_parameters_are_refused():
    ema = TrainableEMA(make_net())
    state = ema.state_dict()
    state["weights"]["1.extra"] = torch.ones(1)
    with pytest.raises(DataError, match=r"differing in `1\.extra`"):
        TrainableEMA(make_net()).load_state_dict(state)


@pytest.mark.parametrize("decay", [-0.1, 1.0, 2.0])
def test_decay_outside_its_range_is_refused(decay):
    with pytest.raises(ConfigError, match="decay"):
        TrainableEMA(make_net(), decay)


def test_nothing_to_average_is_refused():
    with pytest.raises(ConfigError, match="trainable parameters"):
        TrainableEMA(make_net().requires_grad_(False))
