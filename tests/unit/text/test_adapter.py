import json
import os
import pickle

import pytest
import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention import FeedForward
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from toy_t5 import toy_adapter

from segalign.errors import ConfigError, DataError, StorageError
from segalign.text.adapter import (
    TextAdapter,
    check_adapter_widths,
    load_adapter,
    save_adapter,
)

WEIGHTS = "diffusion_pytorch_model.safetensors"
PICKLE = "diffusion_pytorch_model.bin"


@pytest.fixture
def saved(tmp_path):
    """A saved adapter: its folder."""
    save_adapter(toy_adapter(), tmp_path / "saved")
    return tmp_path / "saved"


def same_weights(one, other):
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


def rewrite(folder, change):
    """Change the stored tensors."""
    tensors = load_file(folder / WEIGHTS)
    save_file(change(tensors), folder / WEIGHTS)


def to_pickle(folder):
    torch.save(load_file(folder / WEIGHTS), folder / PICKLE)
    (folder / WEIGHTS).unlink()


def one_line(error):
    message = str(error.value)
    return "\n" not in message and "expected" in message and ("; " in message or ". " in message)


def test_equals_its_formula():
    adapter = toy_adapter().double()
    x = torch.randn(2, 5, 32, dtype=torch.float64)

    def feed_forward(layer, x):
        value, gate = layer.net[0].proj(x).chunk(2, dim=-1)
        gelu = 0.5 * gate * (1 + torch.erf(gate / 2**0.5))
        return layer.net[2](value * gelu)

    def norm(layer, x):
        centred = x - x.mean(-1, keepdim=True)
        scale = (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        return centred / scale * layer.weight + layer.bias

    hidden = feed_forward(adapter.ff1, norm(adapter.norm1, x))
    expected = feed_forward(adapter.ff2, norm(adapter.norm2, hidden))
    torch.testing.assert_close(adapter(x), expected, rtol=1e-12, atol=1e-12)


def test_lavi_bridge_shape_has_its_parameters():
    with torch.device("meta"):
        adapter = TextAdapter(1024, 896, 768)
    # Two layer norms; GEGLU to twice 4d, then 4d to the width, with biases.
    first = 1024 * 8192 + 8192 + 4096 * 896 + 896 + 2 * 1024
    second = 896 * 7168 + 7168 + 3584 * 768 + 768 + 2 * 896
    count = sum(parameter.numel() for parameter in adapter.parameters())
    assert count == first + second == 21_254_528
    assert adapter(torch.zeros(2, 240, 1024, device="meta")).shape == (2, 240, 768)


def test_weights_are_float32_and_take_other_precisions():
    adapter = toy_adapter()
    assert {weight.dtype for weight in adapter.parameters()} == {torch.float32}
    for dtype in (torch.bfloat16, torch.float64):
        assert adapter(torch.zeros(1, 3, 32, dtype=dtype)).dtype == torch.float32


def test_dropout_is_off_unless_asked_for():
    x = torch.randn(1, 4, 32)
    plain, dropping = TextAdapter(32, 12, 16), TextAdapter(32, 12, 16, dropout=0.5)
    assert torch.equal(plain.train()(x), plain(x))
    assert not torch.equal(dropping.train()(x), dropping(x))


def test_round_trip_keeps_every_bit(saved):
    loaded = load_adapter(saved)
    assert same_weights(loaded, toy_adapter())
    assert not loaded.training
    assert all(weight.requires_grad for weight in loaded.parameters())


def test_half_precision_files_become_float32(saved):
    rewrite(saved, lambda tensors: {k: v.half() for k, v in tensors.items()})
    loaded = load_adapter(saved)
    assert {weight.dtype for weight in loaded.parameters()} == {torch.float32}
    expected = toy_adapter().half().float()
    assert same_weights(loaded, expected)


def test_files_are_the_official_ones(saved):
    assert sorted(path.name for path in saved.iterdir()) == ["config.json", WEIGHTS]
    config = json.loads((saved / "config.json").read_text())
    assert list(config) == ["_class_name", "_diffusers_version", "in_dim", "int_dim", "out_dim"]
    assert config["_class_name"] == "TextAdapter"
    assert [config[name] for name in ("in_dim", "int_dim", "out_dim")] == [32, 12, 16]
    with safe_open(saved / WEIGHTS, framework="pt") as file:
        # Some loaders refuse files that do not say so.
        assert file.metadata() == {"format": "pt"}


class DiffusersAdapter(ModelMixin, ConfigMixin):
    """A model of the same layout in diffusers' own terms."""

    @register_to_config
    def __init__(self, in_dim: int, int_dim: int, out_dim: int):
        super().__init__()
        self.ff1 = FeedForward(in_dim, int_dim)
        self.ff2 = FeedForward(int_dim, out_dim)
        self.norm1 = nn.LayerNorm(in_dim)
        self.norm2 = nn.LayerNorm(int_dim)


def test_diffusers_reads_what_we_write_and_we_read_what_it_writes(saved, tmp_path):
    theirs = DiffusersAdapter.from_pretrained(saved, low_cpu_mem_usage=False)
    assert same_weights(theirs, toy_adapter())
    theirs.save_pretrained(tmp_path / "safe")
    assert same_weights(load_adapter(tmp_path / "safe"), theirs)
    theirs.save_pretrained(tmp_path / "pickled", safe_serialization=False)
    assert (tmp_path / "pickled" / PICKLE).is_file()
    assert same_weights(load_adapter(tmp_path / "pickled"), theirs)


@pytest.mark.parametrize("place", ["adapter", "t5_unet/adapter", "s28750_adapter"])
def test_sub_folders_of_the_releases_are_found(tmp_path, place):
    save_adapter(toy_adapter(), tmp_path / place)
    save_adapter(toy_adapter(1), tmp_path / "llama2_unet" / "adapter")
    assert same_weights(load_adapter(str(tmp_path)), toy_adapter())


def test_several_adapters_need_a_choice(tmp_path):
    save_adapter(toy_adapter(), tmp_path / "s1_adapter")
    save_adapter(toy_adapter(), tmp_path / "s2_adapter")
    with pytest.raises(ConfigError, match=r"one adapter.*`s1_adapter`, `s2_adapter`") as error:
        load_adapter(tmp_path)
    assert one_line(error)


@pytest.mark.parametrize("prefix", ["module.", "adapter.", "module.adapter."])
def test_prefixes_of_wrappers_are_taken_off(saved, prefix):
    rewrite(saved, lambda tensors: {prefix + k: v for k, v in tensors.items()})
    assert same_weights(load_adapter(saved), toy_adapter())


def test_a_folder_with_content_is_not_overwritten(saved):
    with pytest.raises(ConfigError, match="new or empty folder"):
        save_adapter(toy_adapter(1), saved)
    assert same_weights(load_adapter(saved), toy_adapter())


def test_a_failed_save_leaves_nothing(tmp_path, monkeypatch):
    def full_disk(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("segalign.text.adapter.save_file", full_disk)
    with pytest.raises(StorageError, match="No space left"):
        save_adapter(toy_adapter(), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


class Bomb:
    """A pickle that would make a folder when executed."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


def test_a_checkpoint_with_code_is_refused_and_never_run(saved, tmp_path):
    (saved / WEIGHTS).unlink()
    torch.save({"norm1.weight": Bomb(tmp_path / "exploded")}, saved / PICKLE)
    with pytest.raises(DataError, match=r"`posix.mkdir`, which could run code") as error:
        load_adapter(saved)
    assert one_line(error)
    assert not (tmp_path / "exploded").exists()
    # The file is live: whoever unpickles it does run the code.
    torch.load(saved / PICKLE, weights_only=False)
    assert (tmp_path / "exploded").is_dir()


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_bare_pickle_with_code_is_refused_and_never_run(saved, tmp_path, protocol):
    (saved / WEIGHTS).unlink()
    bomb = pickle.dumps({"norm1.weight": Bomb(tmp_path / "exploded")}, protocol)
    (saved / PICKLE).write_bytes(bomb)
    with pytest.raises(DataError, match="expected the 12 tensors of a text adapter") as error:
        load_adapter(saved)
    assert one_line(error)
    assert not (tmp_path / "exploded").exists()
    pickle.loads(bomb)
    assert (tmp_path / "exploded").is_dir()


def test_safetensors_are_preferred_to_a_pickle(saved):
    (saved / PICKLE).write_bytes(b"never read")
    assert same_weights(load_adapter(saved), toy_adapter())


def without(name):
    return lambda tensors: {k: v for k, v in tensors.items() if k != name}


def replaced(name, tensor):
    return lambda tensors: {**tensors, name: tensor}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("ff2.net.2.bias"), r"none named `ff2.net.2.bias` \(1 missing\)"),
        (replaced("ff3.weight", torch.zeros(2)), r"an unexpected `ff3.weight` \(1 in all\)"),
        (
            replaced("ff1.net.2.weight", torch.zeros(12, 64)),
            r"`ff1.net.2.weight` of shape \(12, 64\), where `config.json` says \(12, 128\)",
        ),
        (
            replaced("norm1.weight", torch.tensor([torch.nan, *[1.0] * 31])),
            "other things than finite",
        ),
        (replaced("norm1.weight", torch.ones(32, dtype=torch.int64)), "other things than finite"),
        (lambda _: {}, r"none named `ff1.net.0.proj.bias` \(12 missing\)"),
    ],
)
@pytest.mark.parametrize("pickled", [False, True])
def test_other_tensors_are_refused(saved, change, message, pickled):
    rewrite(saved, change)
    if pickled:
        to_pickle(saved)
    with pytest.raises(DataError, match=message) as error:
        load_adapter(saved)
    assert one_line(error)


@pytest.mark.parametrize(
    "content",
    [[torch.zeros(2)], {"a": 1}, {1: torch.zeros(2)}, {"a": torch.zeros(2, device="meta")}],
)
def test_pickles_of_other_things_are_refused(saved, content):
    (saved / WEIGHTS).unlink()
    torch.save(content, saved / PICKLE)
    with pytest.raises(DataError, match="expected the 12 tensors of a text adapter"):
        load_adapter(saved)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("name", [WEIGHTS, PICKLE])
@pytest.mark.parametrize("content", [b"", b"\x80\x04junk", b"<html>not found</html>"])
def test_damaged_files_are_refused(saved, name, content):
    (saved / WEIGHTS).unlink()
    (saved / name).write_bytes(content)
    with pytest.raises(DataError, match=name) as error:
        load_adapter(saved)
    assert one_line(error)


@pytest.mark.parametrize(
    "config",
    [
        "not json",
        "[1]",
        "{}",
        '{"in_dim": 32, "int_dim": 12}',
        '{"in_dim": 32, "int_dim": 12, "out_dim": -16}',
        '{"in_dim": 32, "int_dim": 12, "out_dim": "16"}',
        '{"in_dim": 1e3, "int_dim": 12, "out_dim": 16}',
        '{"in_dim": 1000000000000000000, "int_dim": 12, "out_dim": 16}',
    ],
)
def test_other_configs_are_refused(saved, config):
    (saved / "config.json").write_text(config)
    with pytest.raises(DataError, match=r"config\.json") as error:
        load_adapter(saved)
    assert one_line(error)


def test_missing_files_are_named(saved, tmp_path):
    (saved / WEIGHTS).unlink()
    with pytest.raises(ConfigError, match=WEIGHTS) as error:
        load_adapter(saved)
    assert one_line(error)
    (saved / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"no `config\.json`") as error:
        load_adapter(saved)
    assert one_line(error)
    with pytest.raises(ConfigError, match=r"the text adapter at `.*nowhere`") as error:
        load_adapter(tmp_path / "nowhere")
    assert one_line(error)


def test_a_hub_id_that_is_not_there_says_what_to_download(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ConfigError, match="shihaozhao/LaVi-Bridge") as error:
        load_adapter("shihaozhao/LaVi-Bridge")
    assert one_line(error)


def test_another_width_is_refused_with_both_numbers():
    adapter = toy_adapter()
    check_adapter_widths(adapter, t5_width=32, generator_width=16)
    with pytest.raises(ConfigError, match=r"input width 1024.*got 32") as error:
        check_adapter_widths(adapter, t5_width=1024)
    assert one_line(error)
    with pytest.raises(ConfigError, match=r"output width 768.*got 16") as error:
        check_adapter_widths(adapter, t5_width=32, generator_width=768)
    assert one_line(error)
