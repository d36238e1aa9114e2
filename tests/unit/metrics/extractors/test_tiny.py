"""The tiny extractor: a function of its seed and the image alone; and passes leave no trace."""

import pytest
import torch
from torch import backends
from toy_weights import pixels_of

from segalign.metrics.extractors.protocol import exact_pass
from segalign.metrics.extractors.tiny import TinyExtractor


@pytest.mark.parametrize("size", [(1, 1), (36, 36), (64, 20)])
def test_any_size_gives_features_and_scores(size):
    features, logits = TinyExtractor(num_features=48, num_classes=7).load()(pixels_of(3, *size))
    assert (features.shape, logits.shape) == ((3, 48), (3, 7))
    assert features.isfinite().all()
    assert TinyExtractor(num_features=48).load().num_features == 48


def test_the_seed_alone_decides():
    pixels = pixels_of(2, 36, 36)
    expected = TinyExtractor(3).load()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    again = TinyExtractor(3).load()
    torch.testing.assert_close(again(pixels), expected(pixels), rtol=0, atol=0)
    assert torch.equal(before, torch.get_rng_state())
    assert again.protocol() == expected.protocol()
    assert again.protocol() != TinyExtractor(4).load().protocol()
    assert "tiny" in again.protocol()["name"]
    assert not torch.equal(TinyExtractor(4).load()(pixels).features, again(pixels).features)


def test_features_of_an_image_do_not_depend_on_the_batch():
    extractor, pixels = TinyExtractor().load(), pixels_of(5, 36, 36)
    whole = extractor(pixels).features
    # Kernels add in another order for another batch size.
    alone = extractor(pixels[2:3]).features
    torch.testing.assert_close(alone, whole[2:3], rtol=1e-4, atol=1e-5)
    assert whole.std(dim=0).mean() > 1e-2


def test_a_float_image_is_refused():
    with pytest.raises(ValueError, match="expected uint8 pixels"):
        TinyExtractor().load()(torch.zeros(1, 3, 8, 8))


def switches() -> list:
    cudnn, mkldnn = backends.cudnn, backends.mkldnn
    nodes = [backends.cuda.matmul, cudnn.conv, mkldnn.matmul, mkldnn.conv, cudnn, cudnn.rnn]
    return [node.fp32_precision for node in nodes]


def old_switches() -> list:
    return [
        torch.get_float32_matmul_precision(),
        backends.cuda.matmul.allow_tf32,
        backends.cudnn.allow_tf32,
    ]


@pytest.fixture
def _restored():
    old = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(old)


def stop_inside() -> None:
    with exact_pass(torch.device("cpu")):
        assert switches()[:4] == ["ieee"] * 4
        assert torch.get_float32_matmul_precision() == "highest"
        assert not backends.cuda.matmul.allow_tf32
        assert not torch.is_grad_enabled()
        raise ZeroDivisionError


@pytest.mark.usefixtures("_restored")
@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_a_pass_switches_off_tf32_and_puts_all_back(precision):
    torch.set_float32_matmul_precision(precision)
    before, old = switches(), old_switches()
    with pytest.raises(ZeroDivisionError):
        stop_inside()
    assert switches() == before
    assert old_switches() == old
    assert torch.is_grad_enabled()


def test_a_pass_works_where_only_the_new_switches_were_used():
    matmul = backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "tf32"
    try:
        with exact_pass(torch.device("cpu")):
            assert matmul.fp32_precision == "ieee"
        assert matmul.fp32_precision == "tf32"
    finally:
        matmul.fp32_precision = before


def test_autocast_is_off_inside():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with exact_pass(torch.device("cpu")):
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
