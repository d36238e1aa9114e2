"""Inception by the route of a file: torch-fidelity's numbers, and nothing but weights is read."""

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from toy_weights import SIDES, drawn_state, pixels_of, write_weights

from segalign.errors import ConfigError, DataError
from segalign.metrics.extractors import inception
from segalign.metrics.extractors.inception import InceptionExtractor, InceptionNetwork, InceptionV3


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("inception")
    with torch.device("meta"):
        network = InceptionNetwork()
    state = drawn_state(network)
    names = ("weights.pth", "weights.safetensors")
    return {name.partition(".")[2]: write_weights(state, folder / name) for name in names}


@pytest.fixture(scope="module")
def legacy(files) -> InceptionExtractor:
    return InceptionV3(str(files["pth"])).load()


@pytest.fixture(scope="module")
def clean(files) -> InceptionExtractor:
    return InceptionV3(str(files["safetensors"]), resize="clean").load()


@pytest.fixture(scope="module")
def reference(files) -> FeatureExtractorInceptionV3:
    return FeatureExtractorInceptionV3(
        "reference", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(files["pth"])
    )


@pytest.mark.numerics
@pytest.mark.parametrize("size", SIDES)
def test_features_and_scores_are_those_of_torch_fidelity(reference, legacy, size):
    pixels = pixels_of(2, *size)
    features, logits = legacy(pixels)
    expected_features, expected_logits = reference(pixels)
    assert features.shape == (2, 2048) == (2, legacy.num_features)
    assert logits.shape == (2, 1008)
    assert features.std(dim=0).mean() > 1e-2, "the images must differ"
    torch.testing.assert_close(features, expected_features, rtol=0, atol=0)
    torch.testing.assert_close(logits, expected_logits, rtol=0, atol=0)


def test_clean_sees_what_pil_makes(clean):
    pixels = pixels_of(1, 64, 48)
    channels = pixels[0].numpy().astype(np.float32)
    resized = [
        np.asarray(Image.fromarray(plane).resize((299, 299), Image.Resampling.BICUBIC))
        for plane in channels
    ]
    images = torch.from_numpy(np.stack(resized)).clamp(0, 255)[None]
    with torch.no_grad():
        expected = clean.network(images)[0]
    torch.testing.assert_close(clean(pixels).features, expected, rtol=0, atol=0)


def test_both_files_hold_one_network_and_resizing_matters(legacy, clean):
    square, other = pixels_of(1, 299, 299), pixels_of(1, 64, 64)
    torch.testing.assert_close(legacy(square), clean(square), rtol=1e-4, atol=1e-4)
    assert (legacy(other).features - clean(other).features).abs().max() > 1e-3
    assert legacy.protocol()["resize"] == "legacy"
    assert clean.protocol()["resize"] == "clean"
    assert legacy.protocol()["weights"] != clean.protocol()["weights"], "digests are of files"


def test_unknown_weights_say_so(files, caplog: pytest.LogCaptureFixture, monkeypatch):
    with caplog.at_level(logging.WARNING):
        loaded = InceptionV3(str(files["pth"])).load()
    assert loaded.protocol()["verified"] is False
    assert "is not the published file" in caplog.text
    monkeypatch.setattr(
        inception,
        "PUBLISHED",
        inception.PublishedFile("weights", "x/y.pth", loaded.protocol()["weights"]),
    )
    caplog.clear()
    assert InceptionV3(str(files["pth"])).load().protocol()["verified"] is True
    assert not caplog.text


def test_the_published_digest_is_that_of_the_name():
    assert inception.PUBLISHED.cached().name == "weights-inception-2015-12-05-6726825d.pth"
    assert inception.PUBLISHED.sha256.startswith("6726825d")
    assert len(inception.PUBLISHED.sha256) == 64


def test_absent_weights_say_where_to_get_them(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(DataError, match=r"hub.checkpoints.weights-inception.*no such file") as err:
        InceptionV3().load()
    assert "\n" not in str(err.value)
    for word in ("download http", "`TORCH_HOME`", "`weights`", "`download: true`"):
        assert word in str(err.value)
    with pytest.raises(DataError, match=r"nothing\.pth`; got no such file"):
        InceptionV3(str(tmp_path / "nothing.pth")).load()


def test_the_cache_of_torch_hub_is_looked_into(files, tmp_path: Path, monkeypatch, legacy):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    place = inception.PUBLISHED.cached()
    place.parent.mkdir(parents=True)
    place.symlink_to(files["pth"])
    assert InceptionV3().load().protocol() == legacy.protocol()


def test_weights_of_another_network_are_refused(tmp_path: Path):
    state = drawn_state(torch.nn.Conv2d(3, 4, 3))
    path = write_weights(state, tmp_path / "other.safetensors")
    with pytest.raises(DataError, match=r"weights of Inception in .*Missing key"):
        InceptionV3(str(path)).load()


def test_an_unknown_resize_is_refused():
    with pytest.raises(ConfigError, match="`legacy` or `clean`; got `area`"):
        InceptionV3(resize="area")


def test_a_pass_is_the_same_under_all_that_training_switches_on(legacy):
    pixels = pixels_of(1, 36, 36)
    expected = legacy(pixels)
    legacy.network.train()
    before = torch.get_rng_state()
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.inference_mode():
        found = legacy(pixels)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert not found.features.requires_grad
    assert torch.equal(before, torch.get_rng_state())


def test_loading_draws_no_random_numbers_and_ignores_the_default_type(files, legacy):
    before, pixels = torch.get_rng_state(), pixels_of(1, 36, 36)
    torch.set_default_dtype(torch.bfloat16)
    try:
        loaded = InceptionV3(str(files["pth"])).load()
        found = loaded(pixels)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(before, torch.get_rng_state())
    torch.testing.assert_close(found, legacy(pixels), rtol=0, atol=0)
