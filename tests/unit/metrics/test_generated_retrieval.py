"""Retrieval of generated images: who is found, in which gallery, and by whom."""

import pytest
import torch
from toy_alignment import alignment_setting, brightness, measure, toy_clip_reward, toy_pixels

from segalign.errors import ConfigError
from segalign.metrics.generated_retrieval import GeneratedRetrieval
from segalign.metrics.retrieval import Retrieval


@pytest.fixture(scope="module")
def reward():
    return toy_clip_reward()


def direct(reward, setting, places, **options):
    """Rank the images of some places, all at once."""
    per_caption = setting.plan.images_per_caption
    captions = [setting.rows[place // per_caption]["caption"] for place in places]
    images = torch.stack([toy_pixels(place) for place in places]) / 255
    metric = Retrieval(1, **options)
    metric.update(
        torch.tensor(places),
        captions,
        reward.image_features(images),
        reward.text_features(captions).unsqueeze(1),
        torch.ones(len(places), dtype=torch.bool),
    )
    return metric.compute()["recall"]


def test_the_first_image_of_each_caption_is_ranked(reward):
    setting = alignment_setting(12)
    found = measure(GeneratedRetrieval(reward), setting)
    recall = direct(reward, setting, list(range(0, 24, 2)))
    assert found.values == {
        "retrieval/r_at_1": recall[0, 0, 0, 0], "retrieval/r_at_5": recall[0, 0, 0, 1],
        "retrieval/r_at_10": recall[0, 0, 0, 2],
        "retrieval/r_at_1_image_to_text": recall[0, 0, 1, 0],
        "retrieval/r_at_5_image_to_text": recall[0, 0, 1, 1],
        "retrieval/r_at_10_image_to_text": recall[0, 0, 1, 2],
        "retrieval/r_at_1_text_relevant": recall[1, 0, 0, 0],
    }  # fmt: skip
    assert 0 < found.values["retrieval/r_at_5"] < 1
    assert found.protocol["gallery_size"] == 12


def test_galleries_and_images_that_do_not_count(reward):
    setting = alignment_setting(12)
    found = measure(GeneratedRetrieval(reward, gallery_size=4), setting, lost={4, 5, 7})
    places = [0, 2, *range(6, 24, 2)]
    recall = direct(reward, setting, places, gallery_size=4)
    assert found.values["retrieval/r_at_1"] == recall[0, 0, 0, 0]
    assert "retrieval/r_at_5" not in found.values  # every image is among five of four
    assert (found.protocol["gallery_size"], found.protocol["num_galleries"]) == (4, 2)
    assert "3 images of a last gallery" in found.notes[1]
    assert found.protocol["missing_captions"] == [2]


def test_galleries_that_have_moved_up_are_another_protocol(reward):
    lost = ((), {4}, {6}, {5})  # nothing, a first image, another one, and a second image
    protocols = [
        measure(GeneratedRetrieval(reward, 4), alignment_setting(12), lost=one).protocol
        for one in lost
    ]
    assert protocols[0] == protocols[3] != protocols[1] != protocols[2] != protocols[0]


def test_too_few_images_that_count_are_told(reward):
    found = measure(GeneratedRetrieval(reward, 8), alignment_setting(9), lost={0, 2, 4})
    assert found.values == {}
    assert found.notes == ["no retrieval: a gallery needs 8 images, and 6 count"]


def test_what_cannot_be_is_refused(reward):
    with pytest.raises(ConfigError, match="at least 8 captions"):
        GeneratedRetrieval(reward, 8).start(alignment_setting(7))
    with pytest.raises(ConfigError, match="`gallery_size` to be at least 2"):
        GeneratedRetrieval(reward, 1)
    with pytest.raises(ConfigError, match="a CLIP-type reward for retrieval"):
        GeneratedRetrieval(brightness).start(alignment_setting())
