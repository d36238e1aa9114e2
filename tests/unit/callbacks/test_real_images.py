"""Which real images generated ones are compared with."""

from types import SimpleNamespace

import pytest

from callbacks.fid import FID
from callbacks.inception_score import InceptionScore
from callbacks.kid import CMMD, KID
from callbacks.real_images import real_images
from segalign.metrics.extractors.tiny import TinyExtractor


def trainer_with(tmp_path, *callbacks):
    data = SimpleNamespace(val_shards=str(tmp_path / "shards"), image_size=512)
    return SimpleNamespace(
        datamodule=data, default_root_dir=str(tmp_path), callbacks=list(callbacks)
    )


def test_shards_are_cropped_as_the_datamodule_does(tmp_path):
    for reference in (None, str(tmp_path)):
        found = real_images(trainer_with(tmp_path), reference, None, None)
        assert (found.path, found.image_size) == (reference or str(tmp_path / "shards"), 512)
    assert real_images(trainer_with(tmp_path), None, 256, None).image_size == 256


def test_a_file_has_its_own_size_unless_one_is_asked_for(tmp_path):
    (tmp_path / "named_without_ending").touch()
    for name in ("real.safetensors", "named_without_ending"):
        path = str(tmp_path / name)
        assert real_images(trainer_with(tmp_path), path, None, None).image_size is None
        assert real_images(trainer_with(tmp_path), path, 512, None).image_size == 512


@pytest.mark.parametrize(
    ("other", "expected"), [(KID, True), (CMMD, True), (InceptionScore, False)]
)
def test_a_frechet_distance_needs_no_rows_unless_another_callback_does(tmp_path, other, expected):
    fid = FID(TinyExtractor())
    trainer = trainer_with(tmp_path, fid, other(TinyExtractor()))
    (metric,) = fid.make_metrics(trainer, None)
    assert metric.reference.keep_rows is expected
    (metric,) = KID(TinyExtractor()).make_metrics(trainer_with(tmp_path), None)
    assert metric.reference.keep_rows
