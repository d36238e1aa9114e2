import pytest
import torch
from toy_evaluation import setting_of
from toy_features import ToyExtractor, ToySource

from segalign.errors import ConfigError, DataError
from segalign.evaluation.image_metric import ImageBatch
from segalign.metrics.distribution_metrics import (
    FrechetImageMetric,
    InceptionScoreImageMetric,
    KernelImageMetric,
)
from segalign.metrics.feature_statistics import FeatureStatistics
from segalign.metrics.frechet import frechet_distance
from segalign.metrics.kernels import GaussianKernel, squared_distance
from segalign.metrics.reference_statistics import ReferenceStatistics

COUNT = 20
PIXELS = torch.randint(
    256, (2, COUNT, 3, 6, 6), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
)
MADE, REAL = PIXELS


class Reference:
    """Features of the real images, by the extractor itself or another."""

    def __init__(self, count=COUNT, rows=True, name=None, grid_bits=12):
        self.count, self.rows, self.name, self.grid_bits = count, rows, name, grid_bits

    def statistics(self, extractor, setting):
        features = extractor(REAL[: self.count]).features
        protocol = {**extractor.protocol(), **({"name": self.name} if self.name else {})}
        return ReferenceStatistics(
            FeatureStatistics.of(features, self.grid_bits),
            features if self.rows else None,
            {"extractor": protocol, "images": {"count": self.count}},
        )


def batches(setting):
    for planned in setting.plan.batches(0, 1):
        places, counted = torch.tensor(planned.places), torch.tensor(planned.counted)
        rows = [setting.rows[place] for place in planned.places]
        yield ImageBatch(places, counted, rows, MADE[places])


def evaluate(*metrics, setting=None, bad=()):
    setting = setting_of(COUNT, batch_size=8) if setting is None else setting
    for metric in metrics:
        metric.start(setting)
    for batch in batches(setting):
        for place in bad:
            batch.counted[batch.places == place] = False
        for metric in metrics:
            metric.update(batch)
    return [metric.finish() for metric in metrics]


def test_one_pass_serves_all_and_the_values_are_those_of_the_images():
    extractor = ToyExtractor()
    source = ToySource(extractor)
    metrics = [
        FrechetImageMetric("fid", source, Reference()),
        InceptionScoreImageMetric("inception_score", source, num_splits=2),
        KernelImageMetric("kid", source, Reference()),
        KernelImageMetric("cmmd", source, Reference(), kernel=GaussianKernel(), num_subsets=3,
                          subset_size=10),
    ]  # fmt: skip
    setting = setting_of(COUNT, batch_size=8)
    for metric in metrics:
        metric.start(setting)
    extractor.calls = 0
    for batch in batches(setting):
        for metric in metrics:
            metric.update(batch)
    assert extractor.calls == setting.plan.num_batches == 3
    found = {}
    for metric in metrics:
        found |= metric.finish().values
    made, real = extractor(MADE).features, extractor(REAL).features
    one, other = FeatureStatistics.of(real), FeatureStatistics.of(made)
    fid = frechet_distance(one.mean(), one.covariance(), other.mean(), other.covariance())
    assert found["fid"] == float(fid)
    assert found["kid"] == float(squared_distance(real, made, metrics[2].metric.kernel))
    assert set(found) == {
        "fid", "inception_score", "inception_score_std", "kid", "cmmd", "cmmd_std"
    }  # fmt: skip


def test_a_second_evaluation_starts_afresh():
    metric = FrechetImageMetric("fid", ToySource(ToyExtractor()), Reference())
    first, second = (evaluate(metric)[0] for _ in range(2))
    assert first.values == second.values


def test_protocols_say_what_was_measured():
    metrics = [
        FrechetImageMetric("fid", ToySource(ToyExtractor()), Reference(16, grid_bits=10)),
        InceptionScoreImageMetric("inception_score", ToySource(ToyExtractor()), ddof=1),
        KernelImageMetric("kid", ToySource(ToyExtractor()), Reference(16)),
    ]
    fid, score, kid = (findings.protocol for findings in evaluate(*metrics, bad=[3]))
    counts = [(one.get("num_real"), one.get("num_generated")) for one in (fid, score, kid)]
    assert counts == [(16, COUNT - 1), (None, COUNT - 1), (16, None)]
    assert all(one["extractor"] == ToyExtractor().protocol() for one in (fid, score, kid))
    assert fid["grid_bits"] == 10
    assert fid["reference"]["images"] == {"count": 16}
    assert (score["ddof"], score["num_splits"]) == (1, 10)
    assert kid["kernel"]["name"] == "polynomial"
    assert kid["subsets"] == "all images"


def test_few_images_are_refused_before_the_start_or_noted():
    extractor = ToyExtractor(width=4)
    small = setting_of(4, batch_size=4)
    with pytest.raises(ConfigError, match=r"generated images than features \(4\).*got 4; .*true`"):
        FrechetImageMetric("fid", ToySource(extractor), Reference()).start(small)
    assert extractor.calls == 0
    with pytest.raises(ConfigError, match=r"expected more real images .* got 3"):
        evaluate(FrechetImageMetric("fid", ToySource(extractor), Reference(3)))
    allowing = FrechetImageMetric("fid", ToySource(extractor), Reference(3), allow_few_images=True)
    (findings,) = evaluate(allowing, setting=small)
    assert [note[:30] for note in findings.notes] == [
        "fid: expected more generated i", "fid: expected more real images"
    ]  # fmt: skip
    with pytest.raises(ConfigError, match="at least 30 generated images for `kid`; got 20"):
        evaluate(
            KernelImageMetric(
                "kid", ToySource(extractor), Reference(), num_subsets=2, subset_size=30
            )
        )


def test_where_images_that_failed_leave_too_few_a_note_stands_for_the_value():
    source = ToySource(ToyExtractor())
    fid, kid, score = evaluate(
        FrechetImageMetric("fid", source, Reference()),
        KernelImageMetric("kid", source, Reference(), num_subsets=2, subset_size=5),
        InceptionScoreImageMetric("is", source),
        bad=range(16),
    )
    assert (fid.values, kid.values) == ({}, {})
    (note,) = fid.notes
    assert note.startswith("fid: expected more generated images than features (4), so that")
    assert note.endswith("got 4; so there is no value; add images, or set `allow_few_images: true`")
    assert fid.protocol["num_generated"] == 4
    assert kid.notes[0].startswith("kid: no value; expected at least 5 images on each side")
    assert {*score.values} == {"is", "is_std"}


def test_a_distance_of_few_images_needs_two_on_each_side():
    source = ToySource(ToyExtractor())
    few = FrechetImageMetric("fid", source, Reference(), allow_few_images=True)
    (findings,) = evaluate(few, bad=range(18))
    assert [*findings.values] == ["fid"]
    (findings,) = evaluate(few, bad=range(19))
    assert findings.values == {}
    assert findings.notes[0].endswith("got 1; so there is no value; add images")
    (findings,) = evaluate(few)
    assert findings.notes == []


def test_a_lost_image_changes_the_protocol_of_what_depends_on_the_number_alone():
    source = ToySource(ToyExtractor())

    def protocols(**lost):
        metrics = [
            KernelImageMetric("kid", source, Reference()),
            KernelImageMetric("biased", source, Reference(), estimator="biased"),
            FrechetImageMetric("fid", source, Reference()),
            InceptionScoreImageMetric("is", source),
        ]
        return [findings.protocol for findings in evaluate(*metrics, **lost)]

    changed = [one != other for one, other in zip(protocols(), protocols(bad=[3]), strict=True)]
    assert changed == [False, True, True, True]


def test_a_reference_of_another_extractor_is_refused():
    for kind in (FrechetImageMetric, KernelImageMetric):
        with pytest.raises(DataError, match='`name` is "clean" in one and "toy"'):
            evaluate(kind("x", ToySource(ToyExtractor()), Reference(name="clean")))
    with pytest.raises(ConfigError, match="hold sums alone; make them again, with rows"):
        evaluate(KernelImageMetric("kid", ToySource(ToyExtractor()), Reference(rows=False)))


def test_a_score_needs_a_classifier():
    with pytest.raises(ConfigError, match="with a classifier for `is`; `toy` has none"):
        evaluate(InceptionScoreImageMetric("is", ToySource(ToyExtractor(classes=None))))


def test_empty_splits_are_noted():
    (findings,) = evaluate(
        InceptionScoreImageMetric("is", ToySource(ToyExtractor()), num_splits=99)
    )
    assert "99 splits are empty and left out" in findings.notes[0]
