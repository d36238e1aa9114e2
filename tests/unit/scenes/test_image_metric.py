"""The oracle as a metric of generated images."""

import pytest
import torch
from toy_alignment import measure
from toy_evaluation import setting_of

from segalign.errors import ConfigError
from segalign.scenes.evaluation import SceneScore
from segalign.scenes.image_metric import SceneFacts
from segalign.scenes.samples import make_sample
from segalign.scenes.world import get_world
from segalign.text.tokenizer import clip_tokenizer

WORLD = get_world("2x2")
SAMPLES = [make_sample("2x2", 5, number, length="long") for number in range(6)]


def scenes_setting(batch_size=4, **changes):
    rows = [
        {"sample_id": number, "caption": one.caption, "metadata": one.metadata}
        for number, one in enumerate(SAMPLES)
    ]
    return setting_of(6, 2, batch_size, rows=rows, **changes)


def drawn(place):
    """The first image of a caption is right, the second shows the next caption's scene."""
    sample = SAMPLES[(place // 2 + place % 2) % 6]
    return torch.tensor(sample.image).permute(2, 0, 1)


@pytest.fixture(scope="module")
def found():
    return measure(SceneFacts(WORLD), scenes_setting(), pixels=drawn)


def test_accuracies_are_those_of_the_score(found):
    score = SceneScore(WORLD, clip_tokenizer())
    images = torch.stack([drawn(place) for place in range(12)]) / 255
    captions = [SAMPLES[place // 2].caption for place in range(12)]
    score.update(images, captions, [SAMPLES[place // 2].metadata for place in range(12)])
    expected = score.accuracies()
    assert {name: found.values[name] for name in expected} == expected
    assert 0.5 < expected["attributes"] < 1
    assert "attributes/past_77" in expected


def test_chance_is_the_next_captions_image(found):
    score = SceneScore(WORLD, clip_tokenizer())
    images = torch.stack([drawn(place) for place in range(0, 12, 2)]) / 255
    score.update(images, [one.caption for one in SAMPLES], [one.metadata for one in SAMPLES])
    for name, value in score.chance_accuracies().items():
        assert found.values[f"chance/{name}"] == value
    # What is made together does not matter.
    assert measure(SceneFacts(WORLD), scenes_setting(6), pixels=drawn) == found


def test_every_image_has_its_share(found):
    shares = found.per_image["attributes"]
    assert shares[::2] == [1.0] * 6
    assert all(share < 1 for share in shares[1::2])
    lost = measure(SceneFacts(WORLD), scenes_setting(), lost={1, 4}, pixels=drawn)
    assert [place for place, one in enumerate(lost.per_image["attributes"]) if one is None] == [
        1,
        4,
    ]
    assert lost.values["attributes"] != found.values["attributes"]


def test_training_gets_no_chance():
    found = measure(SceneFacts(WORLD), scenes_setting(is_final=False), pixels=drawn)
    assert not any(name.startswith("chance") for name in found.values)
    assert found.per_image == {}


def test_what_the_oracle_cannot_read_is_refused():
    with pytest.raises(ConfigError, match="expected captions of scenes"):
        SceneFacts(WORLD).start(setting_of(3))
    with pytest.raises(ConfigError, match=r"captions of the world `3x3`.* got some of `2x2`"):
        SceneFacts(get_world("3x3")).start(scenes_setting())
    with pytest.raises(ConfigError, match=r"images of 24 x 24 pixels.* got 30 x 30"):
        measure(SceneFacts(WORLD), scenes_setting(), pixels=lambda _: torch.zeros(3, 30, 30).byte())
