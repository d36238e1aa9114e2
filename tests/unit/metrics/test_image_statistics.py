"""Statistics of images whose detail, edges and colours are known."""

import math

import pytest
import torch
from toy_evaluation import rows_of, setting_of

from segalign.errors import ConfigError
from segalign.evaluation.image_metric import ImageBatch
from segalign.metrics.image_statistics import (
    STATISTICS,
    ImageStatistics,
    clipped_share,
    high_frequency,
    luminance,
    saturation,
    sharpness,
    total_variation,
)

SIDE = 32


def grey(shades: torch.Tensor) -> torch.Tensor:
    return shades.double().expand(1, 3, *shades.shape[-2:])


def waves(frequency: float, angle: float = 0.0) -> torch.Tensor:
    places = torch.arange(SIDE).double()
    x, y = torch.meshgrid(places, places, indexing="ij")
    phase = 2 * math.pi * frequency * (math.cos(angle) * x + math.sin(angle) * y)
    return grey(0.5 + 0.4 * torch.cos(phase))


def test_white_is_one_and_green_is_the_lightest():
    colours = torch.eye(3).double().view(3, 3, 1, 1)
    assert luminance(colours).flatten().tolist() == [0.2126, 0.7152, 0.0722]
    assert luminance(torch.ones(1, 3, 2, 2).double()) == pytest.approx(1)


@pytest.mark.parametrize("angle", [0.0, math.pi / 4, math.pi / 2])
def test_power_is_high_above_half_the_nyquist_frequency_in_every_direction(angle):
    assert high_frequency(waves(0.15, angle)) < 1e-3
    assert high_frequency(waves(0.35, angle)) > 0.999


def test_shares_of_two_waves_are_those_of_their_squares():
    both = waves(0.125) + 0.5 * (waves(0.375) - 0.5)
    assert high_frequency(both) == pytest.approx(0.25 / 1.25, rel=1e-3)


def test_borders_that_do_not_meet_are_no_detail():
    ramp = torch.linspace(0, 1, SIDE).double().view(1, 1, SIDE, 1).expand(1, 3, SIDE, SIDE)
    assert high_frequency(ramp) < 1e-4


def test_flat_images_have_no_detail():
    flat = torch.tensor([0.0, 0.3, 1.0]).double().view(3, 1, 1, 1).expand(3, 3, SIDE, SIDE)
    assert high_frequency(flat).tolist() == [0, 0, 0]
    assert sharpness(flat).tolist() == pytest.approx([0, 0, 0], abs=1e-30)
    assert total_variation(flat).tolist() == [0, 0, 0]


def test_sharpness_of_one_light_pixel():
    image = torch.zeros(6, 6)
    image[2, 2] = 1
    # Of 16 inner pixels one is -4 and four are 1: mean 0, mean square 20 / 16.
    assert sharpness(grey(image)) == pytest.approx(20 / 16)


def test_total_variation_of_stripes_and_of_a_step():
    stripes = (torch.arange(8) % 2).float().expand(8, 8)
    assert total_variation(grey(stripes)).item() == 1
    step = (torch.arange(8) >= 4).float().view(8, 1).expand(8, 8)
    assert total_variation(grey(step)).item() == pytest.approx(1 / 7)


def test_saturation_is_that_of_hsv():
    colours = [[1, 0, 0], [0.5, 0.5, 0.5], [0, 0, 0], [0.8, 0.6, 0.4]]
    images = torch.tensor(colours).double().view(4, 3, 1, 1).expand(4, 3, 5, 5)
    assert saturation(images).tolist() == pytest.approx([1, 0, 0, 0.5])


def test_clipped_values_are_counted_by_channel():
    image = torch.full((1, 3, 2, 2), 0.5).double()
    image[0, 0] = 1
    image[0, 1, 0, 0] = 0
    assert clipped_share(image).item() == 5 / 12


def test_images_that_do_not_count_change_nothing():
    draw = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (4, 3, 8, 8), generator=draw, dtype=torch.uint8)
    metric = ImageStatistics()
    metric.start(setting_of(3, batch_size=4))
    counted = torch.tensor([True, True, False, False])
    metric.update(ImageBatch(torch.tensor([0, 2, 1, 1]), counted, rows_of(4), pixels))
    findings = metric.finish()
    for name, statistic in STATISTICS.items():
        first, third = statistic(pixels[:2].double() / 255).tolist()
        assert findings.per_image[name] == [first, None, third]
        assert findings.values[name] == pytest.approx((first + third) / 2, rel=1e-14)
    assert not any("num" in name for name in findings.protocol)


def test_an_evaluation_forgets_the_one_before():
    metric = ImageStatistics()
    for shade in (255, 128):
        metric.start(setting_of(1, batch_size=1))
        pixels = torch.full((1, 3, 8, 8), shade, dtype=torch.uint8)
        metric.update(ImageBatch(torch.tensor([0]), torch.tensor([True]), rows_of(1), pixels))
    assert metric.finish().values["clipped_share"] == 0


def test_images_too_small_for_a_laplacian_are_refused():
    metric = ImageStatistics()
    metric.start(setting_of(1, batch_size=1))
    pixels = torch.zeros(1, 3, 3, 8, dtype=torch.uint8)
    with pytest.raises(ConfigError, match=r"4 pixels and more .* got \(3, 8\)"):
        metric.update(ImageBatch(torch.tensor([0]), torch.tensor([True]), rows_of(1), pixels))
