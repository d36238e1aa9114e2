import pytest
import torch

from segalign.errors import DataError
from segalign.formats.lora_pairs import lora_rank, merge_lora, plain_layers


def dense_update(up, down, weight):
    """Write the update out by its definition."""
    if weight.dim() == 2:
        return up @ down
    return torch.einsum("or,rikl->oikl", up[:, :, 0, 0], down)


def test_merge_adds_up_times_down(unet, make_pairs):
    pairs = make_pairs(unet)
    before = {path: unet.get_submodule(path).weight.clone() for path in pairs}
    merge_lora(unet, pairs, scale=0.5)
    for path, (up, down) in pairs.items():
        expected = before[path] + 0.5 * dense_update(up, down, before[path])
        torch.testing.assert_close(unet.get_submodule(path).weight, expected, rtol=0, atol=1e-6)


def test_merge_changes_no_other_weight(unet, make_unet, make_pairs):
    pairs = make_pairs(unet)
    merge_lora(unet, pairs)
    untouched = make_unet().state_dict()
    changed = {
        name.removesuffix(".weight")
        for name, tensor in unet.state_dict().items()
        if not torch.equal(tensor, untouched[name])
    }
    assert changed == set(pairs)


def test_merge_under_peft_layers_changes_their_base(peft_unet, make_unet, make_pairs):
    pairs = make_pairs(peft_unet)
    plain = make_unet()
    for unet in (plain, peft_unet):
        merge_lora(unet, pairs)
    layers = plain_layers(peft_unet)
    assert all(torch.equal(layers[p].weight, plain.get_submodule(p).weight) for p in pairs)


def test_small_updates_survive_in_bfloat16_when_summed_first(unet, make_pairs):
    """Sixty-four updates of 1/1000 each round away one by one, but not together."""
    unet.bfloat16()
    path = "mid_block.resnets.0.conv1"
    weight = unet.get_submodule(path).weight
    weight.fill_(1.0)
    up, down = make_pairs(unet)[path]
    tiny = {path: (torch.full_like(up, 1e-3), torch.full_like(down, 1 / 3))}
    merge_lora(unet, [tiny] * 64)
    assert torch.equal(weight, torch.full_like(weight, 1.064))


def test_weights_keep_float64(unet, make_pairs):
    unet.double()
    pairs = {path: (up.double(), down.double()) for path, (up, down) in make_pairs(unet).items()}
    path = min(pairs)
    before = unet.get_submodule(path).weight.clone()
    merge_lora(unet, pairs)
    added = unet.get_submodule(path).weight - before
    torch.testing.assert_close(added, dense_update(*pairs[path], before), rtol=0, atol=1e-15)


def test_layers_of_another_network_change_nothing(unet, make_pairs):
    pairs = make_pairs(unet)
    before = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    wrong = [
        {"nowhere": next(iter(pairs.values()))},
        {min(pairs): (torch.ones(8, 3), torch.ones(3, 5))},
    ]
    for other, message in zip(wrong, ["has no layer `nowhere`", r"at layer `down"], strict=True):
        with pytest.raises(DataError, match=message):
            merge_lora(unet, [pairs, other])
    assert all(torch.equal(tensor, before[name]) for name, tensor in unet.state_dict().items())


def test_rank_of_nothing():
    with pytest.raises(DataError, match="got no layers"):
        lora_rank({})
