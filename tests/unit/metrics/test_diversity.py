"""Diversity of a prompt's images and drift from the start, against sums written out."""

import json
import math
from itertools import combinations
from pathlib import Path

import pytest
import torch
from toy_evaluation import ToyGenerator, setting_of
from toy_weights import pixels_of

from segalign.errors import ConfigError, DataError
from segalign.evaluation.evaluator import Evaluator
from segalign.evaluation.image_metric import ImageBatch
from segalign.evaluation.start_images import StartImages
from segalign.metrics.diversity import Diversity
from segalign.metrics.drift import Drift
from segalign.metrics.perceptual.lpips import Lpips
from segalign.metrics.perceptual.stages import StageNet
from segalign.metrics.perceptual.tiny import TinyPerceptual

NUM, EACH = 5, 3


def batches(pixels, counted, start=None):
    """Cut images as the plan of three batches of six does, the last of them padded."""
    plan = setting_of(NUM, EACH, 6).plan
    for batch in plan.batches(0, 1):
        places = torch.tensor(batch.places)
        yield ImageBatch(
            places=places,
            counted=torch.tensor(batch.counted) & counted[places],
            rows=[{}] * 6,
            pixels=pixels[places],
            start_pixels=None if start is None else start[places],
        )


def measure(metric, pixels, counted=None, start=None):
    metric.start(setting_of(NUM, EACH, 6))
    everything = torch.ones(NUM * EACH, dtype=torch.bool)
    for batch in batches(pixels, everything if counted is None else counted, start):
        metric.update(batch)
    return metric.finish()


def naive(one: int, other: int, first, second) -> float:
    """Look at both images of a pair anew."""
    net = TinyPerceptual().load()
    return float(net.distance(net(first[one, None]), net(second[other, None])))


@pytest.fixture(scope="module")
def pixels() -> torch.Tensor:
    return pixels_of(NUM * EACH, 36, 36)


@pytest.fixture(scope="module")
def start() -> torch.Tensor:
    return pixels_of(NUM * EACH, 36, 36, seed=2)


def naive_diversity(images) -> list[float]:
    pairs = [
        [naive(p * EACH + i, p * EACH + j, images, images) for i, j in combinations(range(EACH), 2)]
        for p in range(NUM)
    ]
    return [math.fsum(one) / len(one) for one in pairs]


def test_diversity_is_the_mean_of_prompts_of_the_mean_of_pairs(pixels):
    found, expected = measure(Diversity(TinyPerceptual()), pixels), naive_diversity(pixels)
    assert found.values["lpips_diversity"] == pytest.approx(math.fsum(expected) / NUM, abs=1e-6)
    assert found.values["lpips_diversity"] > 0.01
    of_images = found.per_image["lpips_diversity"]
    assert of_images == pytest.approx([d for d in expected for _ in range(EACH)], abs=1e-6)
    assert not found.notes
    json.dumps([dict(found.protocol), dict(found.per_image)])


def test_an_image_is_looked_at_once_by_both_metrics(pixels, start, monkeypatch):
    seen, look = [], StageNet.look
    monkeypatch.setattr(
        StageNet, "look", lambda net, images: seen.append(images) or look(net, images)
    )
    setting = setting_of(NUM, EACH, 6)
    metrics = [Diversity(TinyPerceptual()), Drift(TinyPerceptual())]
    for metric in metrics:
        metric.start(setting)
    shown = list(batches(pixels, torch.ones(NUM * EACH, dtype=torch.bool), start))
    for batch in shown:
        for metric in metrics:
            metric.update(batch)
    expected = [images for batch in shown for images in (batch.pixels, batch.start_pixels)]
    assert len(seen) == len(expected) == 6
    assert all(one is other for one, other in zip(seen, expected, strict=True))


def test_pairs_and_prompts_with_uncounted_images_are_left_out(pixels):
    counted = torch.ones(NUM * EACH, dtype=torch.bool)
    counted[[1, 3, 5]] = False  # of the first prompt one is missing, of the second two
    found = measure(Diversity(TinyPerceptual()), pixels, counted)
    expected = naive_diversity(pixels)
    expected[0] = naive(0, 2, pixels, pixels)
    kept = [expected[0], *expected[2:]]
    assert found.values["lpips_diversity"] == pytest.approx(math.fsum(kept) / 4, abs=1e-6)
    assert found.protocol == measure(Diversity(TinyPerceptual()), pixels).protocol
    of_images = found.per_image["lpips_diversity"]
    assert [place for place, value in enumerate(of_images) if value is None] == [1, 3, 4, 5]
    assert found.notes == [
        "lpips_diversity: 1 captions are left out, of which fewer than two images count"
    ]
    nothing = measure(Diversity(TinyPerceptual()), pixels, torch.zeros_like(counted))
    assert nothing.values == {}
    assert set(nothing.per_image["lpips_diversity"]) == {None}
    assert "5 captions are left out" in nothing.notes[0]


def test_one_image_a_caption_is_refused_before_anything_is_made():
    generator = ToyGenerator()
    with pytest.raises(ConfigError, match=r"`images_per_caption` of at least 2 .* got 1"):
        Evaluator(setting_of(), [Diversity(TinyPerceptual())]).run(generator)
    assert not generator.calls


def test_absent_weights_are_refused_before_anything_is_made(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    generator = ToyGenerator()
    for metric in (Diversity(Lpips()), Drift(Lpips())):
        with pytest.raises(DataError, match="the weights of AlexNet"):
            Evaluator(setting_of(4, 2), [metric]).run(generator)
    assert not generator.calls


def test_drift_is_the_mean_distance_to_the_start(pixels, start):
    counted = torch.ones(NUM * EACH, dtype=torch.bool)
    counted[4] = False
    found = measure(Drift(TinyPerceptual()), pixels, counted, start)
    each = [naive(place, place, pixels, start) for place in range(NUM * EACH)]
    kept = [value for place, value in enumerate(each) if place != 4]
    drift = math.fsum(kept) / len(kept)
    assert found.values["lpips_drift"] == pytest.approx(drift, abs=1e-6)
    assert found.per_image["lpips_drift"][4] is None
    assert found.per_image["lpips_drift"][5:] == pytest.approx(each[5:], abs=1e-6)
    of_start = naive_diversity(start)
    of_start[1] = naive(3, 5, start, start)
    ratio = drift / (math.fsum(of_start) / NUM)
    assert found.values["lpips_drift_ratio"] == pytest.approx(ratio, abs=1e-4)
    assert "num_images" not in found.protocol


def test_at_the_start_there_is_no_drift_and_without_it_no_value(pixels):
    found = measure(Drift(TinyPerceptual()), pixels, start=pixels)
    assert found.values == {"lpips_drift": 0.0, "lpips_drift_ratio": 0.0}
    without = measure(Drift(TinyPerceptual()), pixels)
    assert (without.values, without.per_image) == ({}, {})
    assert without.notes == [
        "lpips_drift: has no value; no images from before training were kept to compare with"
    ]


def test_a_second_evaluation_forgets_the_first(pixels, start):
    for metric in (Diversity(TinyPerceptual()), Drift(TinyPerceptual())):
        measure(metric, start, start=pixels)
        again = measure(metric, pixels, start=start)
        assert again == measure(type(metric)(TinyPerceptual()), pixels, start=start)


def test_the_evaluator_shows_both_all_they_need(tmp_path: Path):
    metrics = [Diversity(TinyPerceptual(), name="tiny_diversity"), Drift(TinyPerceptual())]
    evaluator = Evaluator(setting_of(5, 2), metrics, StartImages(tmp_path / "start"))
    first = evaluator.run(ToyGenerator(), keep_as_start=True)
    assert first.values["lpips_drift"] == 0
    second = evaluator.run(ToyGenerator(bad_captions=["caption 3"]))
    assert second.values["lpips_drift"] == 0
    assert 0 < second.values["tiny_diversity"] != first.values["tiny_diversity"]
    assert "1 captions are left out" in second.notes[0]
