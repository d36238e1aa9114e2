"""Mean cosines by sums are those of all pairs, and V stays where it is."""

from itertools import product

import pytest
import torch
from torch.nn import functional as F
from toy_evaluation import setting_of
from toy_scorer import toy_caption, toy_scorer

from segalign.evaluation.image_metric import ImageBatch
from segalign.metrics.extractors.tiny import TinyExtractor
from segalign.metrics.image_similarity import ImageSimilarity
from segalign.rewards.batch_directions import EmaDirection
from segalign.rewards.clip_reward import ClipReward
from segalign.rewards.common_direction import CorpusDirection, Provenance

FACTS = Provenance(model="m", model_digest="0", text="whole", captions_digest="0", num_captions=9)
COUNTED = [True, True, False, True, True, True, True, False]


def reward_with(direction=None) -> ClipReward:
    return ClipReward(toy_scorer()._parts, common_direction=direction)


def setting_with_captions(images_per_caption: int):
    rows = [
        {"sample_id": i, "caption": toy_caption(i), "metadata": {}}
        for i in range(8 // images_per_caption)
    ]
    return setting_of(len(rows), images_per_caption, batch_size=4, rows=rows)


def draw_pixels() -> torch.Tensor:
    draw = torch.Generator().manual_seed(3)
    return torch.randint(256, (8, 3, 16, 16), generator=draw, dtype=torch.uint8)


def measure(metric, setting, counted=COUNTED):
    metric.start(setting)
    per_caption = setting.plan.images_per_caption
    for start in (4, 0):  # in any order
        places = torch.arange(start, start + 4)
        rows = [setting.rows[place // per_caption] for place in places.tolist()]
        is_counted = torch.tensor(counted)[places]
        metric.update(ImageBatch(places, is_counted, rows, draw_pixels()[places]))
    return metric.finish()


def mean_over_pairs(features, per_caption: int, is_same: bool) -> float:
    kept = [i for i, counted in enumerate(COUNTED) if counted]
    pairs = [
        features[i] @ features[j]
        for i, j in product(kept, kept)
        if i != j and (i // per_caption == j // per_caption) == is_same
    ]
    return (sum(pairs) / len(pairs)).item()


@pytest.mark.parametrize("per_caption", [1, 2, 4])
def test_means_are_those_of_all_pairs(per_caption):
    reward = reward_with()
    findings = measure(ImageSimilarity(reward), setting_with_captions(per_caption))
    with torch.no_grad():
        features = F.normalize(reward.image_features(draw_pixels() / 255).double(), dim=-1)
    crossing = mean_over_pairs(features, per_caption, is_same=False)
    assert findings.values["cross_prompt_similarity"] == pytest.approx(crossing, abs=1e-10)
    if per_caption == 1:
        assert "same_prompt_similarity" not in findings.values
    else:
        within = mean_over_pairs(features, per_caption, is_same=True)
        assert findings.values["same_prompt_similarity"] == pytest.approx(within, abs=1e-10)


class Spoilt:
    """An extractor that fails for some images."""

    def __init__(self, value: float, rows):
        self.value, self.rows = value, list(rows)

    def load(self):
        return self

    def to(self, device):
        return self

    def protocol(self):
        return {"name": "spoilt"}

    def __call__(self, pixels):
        found = TinyExtractor().load()(pixels)
        bad = (pixels.flatten(1)[:, None] == draw_pixels()[self.rows].flatten(1)).all(-1).any(1)
        found.features[bad, 0] = self.value
        return found


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_features_that_are_not_finite_are_left_out_and_noted(value):
    setting = setting_with_captions(2)
    findings = measure(ImageSimilarity(Spoilt(value, [0, 2, 5])), setting)
    lost = [i not in (0, 2, 5) and counted for i, counted in enumerate(COUNTED)]
    sound = measure(ImageSimilarity(Spoilt(value, [])), setting, lost)
    assert findings.values == sound.values
    assert abs(findings.values["cross_prompt_similarity"]) <= 1
    # One of the three was not to count at all.
    assert findings.notes == [
        "image_similarity: 2 images are left out, whose features are not finite"
    ]
    assert sound.notes == []
    fewer = measure(ImageSimilarity(Spoilt(value, [])), setting)
    assert findings.protocol == sound.protocol == fewer.protocol
    nothing = measure(ImageSimilarity(Spoilt(value, range(8))), setting)
    assert nothing.values == {}


def test_images_of_one_caption_have_no_others():
    setting = setting_with_captions(4)
    counted = [True] * 4 + [False] * 4
    values = measure(ImageSimilarity(reward_with()), setting, counted).values
    assert values.keys() == {"same_prompt_similarity", "image_to_v_similarity"}


def test_equal_images_are_alike():
    metric, setting = ImageSimilarity(reward_with()), setting_with_captions(2)
    metric.start(setting)
    rows = [setting.rows[0]] * 2 + [setting.rows[1]] * 2
    pixels = draw_pixels()[:1].expand(4, 3, 16, 16)
    metric.update(ImageBatch(torch.arange(4), torch.ones(4) > 0, rows, pixels))
    values = metric.finish().values
    assert values["cross_prompt_similarity"] == pytest.approx(1, abs=1e-10)
    assert values["same_prompt_similarity"] == pytest.approx(1, abs=1e-10)


def test_v_is_that_of_the_corpus():
    direction = F.normalize(torch.arange(12.0) - 4, dim=0)
    reward = reward_with(CorpusDirection(direction, FACTS))
    findings = measure(ImageSimilarity(reward), setting_with_captions(1))
    with torch.no_grad():
        cosines = reward.image_features(draw_pixels() / 255) @ direction
    expected = [
        c if counted else None for c, counted in zip(cosines.tolist(), COUNTED, strict=True)
    ]
    found = findings.per_image["image_to_v_similarity"]
    assert [value is None for value in found] == [not counted for counted in COUNTED]
    assert [v for v in found if v is not None] == pytest.approx(
        [v for v in expected if v is not None], abs=1e-6
    )


def test_v_is_that_of_the_captions_however_an_average_moves():
    moving = EmaDirection()
    reward = reward_with(moving)
    setting = setting_with_captions(1)
    metric = ImageSimilarity(reward)
    first = measure(metric, setting)
    moving.train()(F.normalize(torch.randn(5, 12, generator=torch.Generator().manual_seed(1))))
    before = moving.mean.clone()
    second = measure(metric, setting)
    assert second.values == first.values
    assert torch.equal(moving.mean, before)
    with torch.no_grad():
        texts = reward.text_features([row["caption"] for row in setting.rows]).double()
        direction = F.normalize(texts.mean(dim=0), dim=0)
        cosines = reward.image_features(draw_pixels() / 255).double() @ direction
    expected = cosines[torch.tensor(COUNTED)].mean().item()
    assert first.values["image_to_v_similarity"] == pytest.approx(expected, abs=1e-6)
    assert first.protocol["encoder"]["common_direction"] == "captions of the evaluation"


def test_captions_are_read_once_a_run(monkeypatch):
    reward, setting = reward_with(), setting_with_captions(1)
    read = []
    plain = reward.text_features
    monkeypatch.setattr(reward, "text_features", lambda texts: read.append(1) or plain(texts))
    for _ in range(3):
        measure(ImageSimilarity(reward), setting)
    assert len(read) == 1


def test_an_extractor_has_no_v_and_values_may_have_a_suffix():
    metric = ImageSimilarity(TinyExtractor(), name="tiny_similarity", suffix="/tiny")
    findings = measure(metric, setting_with_captions(2))
    assert findings.values.keys() == {"cross_prompt_similarity/tiny", "same_prompt_similarity/tiny"}
    assert findings.protocol["encoder"]["name"].startswith("tiny random network")
    features = TinyExtractor().load()(draw_pixels()).features.double()
    crossing = mean_over_pairs(F.normalize(features, dim=-1), 2, is_same=False)
    assert findings.values["cross_prompt_similarity/tiny"] == pytest.approx(crossing, abs=1e-10)
