"""The full-size models, built from configs alone: their sizes, and the FLOPs of their work.

On the meta device nothing is computed. The expected FLOPs are those of Stable Diffusion 1.5 at 512
pixels and 480 text tokens.
"""

import pytest
import torch

from benchmarks.full_size import StageOne, count_flops, flops_per_image, unet_call
from segalign.diffusion.model_sizes import random_parts
from segalign.formats.official_lora import official_targets

pytestmark = pytest.mark.numerics
META = torch.device("meta")
FORWARD = 0.837e12  # UNet forward of one sample


def count(module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.fixture(scope="module")
def stage():
    return StageOne.build("sd15", META)


def test_sizes_are_those_of_stable_diffusion_1_5():
    parts = random_parts("sd15", seed=0, device=META)
    assert count(parts.unet) == 859_520_964
    assert count(parts.vae) == 83_653_863
    assert count(parts.text_models.text_model) == 123_060_480


def test_sizes_are_those_of_stable_diffusion_xl():
    parts = random_parts("sdxl", seed=0, device=META)
    assert count(parts.unet) == 2_567_463_684
    assert count(parts.vae) == 83_653_863
    assert count(parts.text_models.text_model) == 123_060_480
    assert count(parts.text_models.text_model_2) == 694_659_840


def test_t5_large_and_its_adapter_have_their_size(stage):
    width, inner, layers, vocabulary, heads, buckets = 1024, 4096, 24, 32_128, 16, 32
    layer = 4 * width * width + 2 * width * inner + 2 * width
    assert count(stage.t5.model) == vocabulary * width + layers * layer + heads * buckets + width
    assert count(stage.t5.model) == 334_939_648
    assert count(stage.t5.adapter) == 21_254_528


def test_lora_has_the_official_targets_and_size(stage):
    trained = [p for p in stage.bundle.unet.parameters() if p.requires_grad]
    assert len(official_targets(stage.bundle.unet)) == 224
    assert len(trained) == 448
    assert sum(p.numel() for p in trained) == 28_291_072
    # Frozen parts in bfloat16 and trained ones in float32: 2.9 GB of weights.
    held = [p for part in stage.networks().values() for p in part.parameters()]
    assert sum(p.numel() * p.element_size() for p in held) == 2 * 1_401_174_955 + 4 * 49_545_600
    assert {p.dtype for p in stage.trained()} == {torch.float32}


def test_a_forward_takes_the_known_flops():
    unet = random_parts("sd15", seed=0, device=META).unet
    with torch.no_grad():
        for length, expected in ((480, FORWARD), (77, 0.803e12)):
            context = torch.empty(1, length, 768, device=META)
            flops, output = count_flops(lambda c=context: unet_call(unet, c))
            assert output.shape == (1, 4, 64, 64)
            assert flops == pytest.approx(expected, rel=0.005)


def test_lora_adds_the_known_factors(stage):
    unet = stage.bundle.unet
    context = torch.empty(1, 480, 768, device=META, dtype=torch.bfloat16)
    forward, output = count_flops(lambda: unet_call(unet, context))
    assert forward == pytest.approx(1.046 * FORWARD, rel=0.005)
    backward, _ = count_flops(lambda: output.float().sum().backward() or output)
    assert backward == pytest.approx(1.232 * FORWARD, rel=0.005)


def text_gradient() -> float:
    """FLOPs from all keys and values, with their LoRA, back to 480 tokens of width 768."""
    layers = 2 * [320, 640, 1280] + [1280] + 3 * [1280, 640, 320]
    return sum(2 * 2 * 480 * 768 * (width + 32) for width in layers)


def test_a_training_step_does_no_work_but_the_known(stage):
    flops = flops_per_image(stage)
    expected = {
        "VAE encode": 1.117e12,
        "CLIP, 12 segments of 20": 12 * 3.41e9,
        "T5, 240 tokens": 0.1506e12,
        "adapter forward": 10.19e9,
        "UNet forward with LoRA": 1.046 * FORWARD,
        # Beyond that of LoRA alone: the gradient of keys and values in the text, for the adapter.
        "UNet backward": 1.232 * FORWARD + text_gradient(),
        # Twice the forward, the first layer too: a norm before it learns.
        "adapter backward": 2 * 10.19e9,
    }
    assert flops.keys() == expected.keys()
    for name, value in expected.items():
        assert flops[name] == pytest.approx(value, rel=0.005), name
    assert sum(flops.values()) == pytest.approx(3.266e12, rel=0.005)
