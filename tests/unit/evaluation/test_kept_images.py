"""Images that are kept for people."""

import pytest
import torch
from toy_alignment import alignment_setting, measure, toy_pixels

from segalign.errors import ConfigError
from segalign.evaluation.kept_images import KeptImages


def test_the_first_images_of_the_first_captions_are_kept():
    metric = KeptImages(num_captions=3, images_per_caption=2)
    found = measure(metric, alignment_setting(7, images_per_caption=4, batch_size=8), lost={5})
    assert [*metric.images] == [0, 1, 4, 8, 9]
    assert all(torch.equal(image, toy_pixels(place)) for place, image in metric.images.items())
    assert (found.values, found.protocol) == ({}, {})
    assert metric.images[0].untyped_storage().nbytes() == 3 * 20 * 20


def test_a_second_evaluation_starts_anew():
    metric = KeptImages(2)
    measure(metric, alignment_setting(4, 1))
    measure(metric, alignment_setting(1, 1))
    assert [*metric.images] == [0]


def test_nothing_to_keep_is_refused():
    with pytest.raises(ConfigError, match="at least 1 caption"):
        KeptImages(0)
