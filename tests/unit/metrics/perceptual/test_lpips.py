"""LPIPS by the route of files: the distances of torchmetrics, each image looked at once."""

import json
from itertools import permutations
from pathlib import Path

import pytest
import torch
from torchmetrics.functional.image.lpips import _LPIPS
from torchvision import models
from toy_weights import drawn_state, pixels_of, write_weights
from transformers.initialization import no_init_weights

from segalign.errors import ConfigError, DataError
from segalign.metrics.perceptual import lpips
from segalign.metrics.perceptual.lpips import BACKBONES, Lpips
from segalign.metrics.perceptual.tiny import TinyPerceptual

NETS = ("alex", "vgg", "squeeze")
_BUILD = {"alex": models.alexnet, "vgg": models.vgg16, "squeeze": models.squeezenet1_1}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Backbones as torchvision's files are; classifiers are cut, which are nine tenths of them."""
    folder, made = tmp_path_factory.mktemp("lpips"), {}
    for net in NETS:
        with torch.device("meta"):
            network = _BUILD[net](weights=None)
            network.classifier = torch.nn.ModuleList([torch.nn.Linear(4, 2)])
        made[net] = write_weights(drawn_state(network), folder / f"{net}.pth")
    return made


def naive_net(net: str, file: Path) -> _LPIPS:
    """The network of torchmetrics with the same weights."""
    with no_init_weights():
        naive = _LPIPS(pretrained=True, net=net, pnet_rand=True)
    state = torch.load(file, weights_only=True)
    slices = [getattr(naive.net, name) for name in dir(naive.net) if name.startswith("slice")]
    if net == "squeeze":
        slices = list(naive.net.slices)
    for part in slices:
        for name, layer in part.named_children():
            prefix = f"features.{name}."
            own = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
            layer.load_state_dict(own)
    return naive.eval()


@pytest.mark.numerics
@pytest.mark.parametrize(
    ("net", "size"),
    [("alex", (36, 36)), ("alex", (64, 48)), ("vgg", (36, 36)), ("squeeze", (36, 64))],
)
def test_distances_are_those_of_torchmetrics(files, net, size):
    ours, naive = Lpips(net, str(files[net])).load(), naive_net(net, files[net])
    pixels = pixels_of(3, *size)
    seen = ours(pixels)
    pairs = list(permutations(range(3), 2))
    firsts, seconds = (torch.tensor(column) for column in zip(*pairs, strict=True))
    found = ours.distance([s[firsts] for s in seen], [s[seconds] for s in seen])
    images = pixels.float() / 255
    with torch.no_grad():
        expected = naive(images[firsts], images[seconds], normalize=True).flatten()
        one_by_one = [naive(images[i, None], images[j, None], normalize=True) for i, j in pairs]
    assert found.dtype == torch.float64
    assert (expected > 1e-3).all(), "the images must differ"
    torch.testing.assert_close(found, expected.double(), rtol=0, atol=1e-6)
    alone = torch.cat(one_by_one).flatten().double()
    torch.testing.assert_close(found, alone, rtol=0, atol=1e-6)
    assert torch.equal(ours.distance(seen, seen), torch.zeros(3, dtype=torch.float64))


def test_a_pass_leaves_no_trace_and_is_the_same_under_autocast(files):
    before = torch.get_rng_state()
    net, pixels = Lpips("alex", str(files["alex"])).load(), pixels_of(2, 36, 36)
    seen = net(pixels)
    first, second = [s[:1] for s in seen], [s[1:] for s in seen]
    expected = net.distance(first, second)
    net.network.train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        again = net(pixels)
        assert torch.equal(net.distance(first, second), expected)
    assert all(torch.equal(one, other) for one, other in zip(seen, again, strict=True))
    assert torch.equal(before, torch.get_rng_state())


def test_the_protocol_names_both_files(files, monkeypatch):
    protocol = Lpips("alex", str(files["alex"])).load().protocol()
    json.dumps(protocol)
    assert protocol["verified"] is False
    assert protocol["heads"] == BACKBONES["alex"].heads_sha256
    published = lpips.PublishedFile("weights", "x/alex.pth", protocol["weights"])
    fields = {**vars(BACKBONES["alex"]), "published": published}
    monkeypatch.setitem(BACKBONES, "alex", lpips.Backbone(**fields))
    assert Lpips("alex", str(files["alex"])).load().protocol()["verified"] is True


@pytest.mark.parametrize("net", NETS)
def test_published_digests_are_those_of_the_names(net):
    published = BACKBONES[net].published
    assert published.sha256[:8] in published.cached().name
    assert len(published.sha256) == 64


def test_the_heads_of_torchmetrics_are_the_published_ones(files):
    for net in NETS:
        protocol = Lpips(net, str(files[net])).load().protocol()
        assert protocol["heads"] == BACKBONES[net].heads_sha256


def test_absent_and_foreign_weights_are_refused(files, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(DataError, match=r"the weights of AlexNet in .*alexnet-owt-7be5be79\.pth"):
        Lpips().load()
    with pytest.raises(DataError, match=r"the weights of AlexNet in .*; got .*key"):
        Lpips("alex", str(files["vgg"])).load()
    heads = write_weights({"lin0.model.1.weight": torch.ones(1, 64, 1, 1)}, tmp_path / "heads.pth")
    with pytest.raises(DataError, match=r"the heads of LPIPS in .*others than 5"):
        Lpips("alex", str(files["alex"]), heads=str(heads)).load()
    with pytest.raises(DataError, match=r"the heads of LPIPS in .*no such file"):
        Lpips("alex", str(files["alex"]), heads=str(tmp_path / "none.pth")).load()
    with pytest.raises(ConfigError, match="`net` to be"):
        Lpips("resnet")


@pytest.mark.parametrize("net", NETS)
def test_images_too_small_are_refused_and_can_be_resized(files, net):
    side = BACKBONES[net].min_side
    loaded = Lpips(net, str(files[net])).load()
    assert all(stage.isfinite().all() for stage in loaded(pixels_of(1, side, side)))
    with pytest.raises(ConfigError, match=f"at least {side} pixels .* set its `resize`"):
        loaded(pixels_of(1, side - 1, 64))
    with pytest.raises(ConfigError, match=f"`resize` of at least {side}"):
        Lpips(net, resize=side - 1)
    resized = Lpips(net, str(files[net]), resize=side + 5).load()
    seen = resized(pixels_of(2, 12, 12))
    assert resized.distance([s[:1] for s in seen], [s[1:] for s in seen]) > 0
    assert resized.protocol()["input_size"] == side + 5


def test_the_tiny_one_is_named_and_a_function_of_its_seed():
    before = torch.get_rng_state()
    one, same, other = (TinyPerceptual(seed).load() for seed in (1, 1, 2))
    assert torch.equal(before, torch.get_rng_state())
    assert one.protocol() == same.protocol() != other.protocol()
    assert "tiny" in one.protocol()["name"]
    for size in ((2, 2), (36, 36), (64, 20)):
        seen = one(pixels_of(2, *size))
        first, second = [s[:1] for s in seen], [s[1:] for s in seen]
        distance = one.distance(first, second)
        assert 0 < float(distance) <= 2
        assert torch.equal(one.distance(second, first), distance)
        assert torch.equal(distance, same.distance(first, second))
