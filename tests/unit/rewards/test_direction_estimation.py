"""Directions of shards: the very mean, whatever the batches; bad captions counted, not used."""

import pytest
import torch
import webdataset
from transformers import CLIPConfig, CLIPModel

from segalign.data.caption_stream import CaptionStream
from segalign.data.loaders import open_shards
from segalign.data.manifest import index_shards
from segalign.errors import DataError
from segalign.formats.clip_scorer import ClipScorer, ImageSettings
from segalign.rewards import common_direction, direction_estimation
from segalign.rewards.common_direction import CorpusDirection
from segalign.rewards.direction_checks import text_digest
from segalign.rewards.direction_estimation import (
    CaptionFeatures,
    check_corpus,
    estimate_direction,
)
from segalign.rewards.segment_scorer import SegmentScorer
from segalign.text.segmenter import SentenceSegmenter
from segalign.text.tokenizer import clip_tokenizer

CAPTIONS = [
    f"A red cat number {i}. " + "It rains, and the sky is grey. " * (i % 3) for i in range(30)
]
BAD = {4: "", 11: "  ", 17: "nul\0"}


@pytest.fixture(scope="module")
def stream(tmp_path_factory):
    """Three shards, in which three captions are unusable."""
    folder = tmp_path_factory.mktemp("shards")
    pattern = str(folder / "x-%d.tar")
    with webdataset.ShardWriter(pattern, maxcount=11, verbose=0) as writer:
        for number, caption in enumerate(CAPTIONS):
            writer.write({"__key__": f"{number:03d}", "txt": BAD.get(number, caption)})
    index_shards(folder)
    return CaptionStream(open_shards(folder))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    text = {**small, "vocab_size": 49408, "num_attention_heads": 2, "eos_token_id": 49407}
    vision = {**small, "num_attention_heads": 2, "image_size": 8, "patch_size": 8}
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)
    # In float64, so that a mean has twelve digits.
    return CLIPModel(config).double().requires_grad_(False)


@pytest.fixture
def small_corpora(monkeypatch):
    """Let a few captions be enough."""
    for module in (common_direction, direction_estimation):
        monkeypatch.setattr(module, "MIN_CORPUS", 8)


def scorer(model, segmenter=None):
    parts = ClipScorer(model, clip_tokenizer(), ImageSettings(image_size=8))
    return SegmentScorer(parts, segmenter=segmenter)


@pytest.mark.parametrize("segmenter", [None, SentenceSegmenter()], ids=["whole", "segments"])
@pytest.mark.parametrize("batch_size", [1, 7, 64])
@pytest.mark.usefixtures("small_corpora")
def test_the_stream_gives_the_mean_of_all(stream, model, segmenter, batch_size):
    own = scorer(model, segmenter)
    estimated = estimate_direction(CaptionFeatures(stream, own, batch_size=batch_size), "tiny")
    usable = [caption for number, caption in enumerate(CAPTIONS) if number not in BAD]
    features = own.segment_features([caption.strip() for caption in usable]).mean()
    mean = features.mean(dim=0)
    assert (estimated.direction - mean / mean.norm()).abs().max() < 1e-12
    assert estimated.mean_norm == pytest.approx(mean.norm().item(), abs=1e-12)
    shares = features @ estimated.direction
    assert estimated.shares.mean == pytest.approx(estimated.mean_norm, abs=1e-12)
    assert estimated.shares.std == pytest.approx(shares.std().item(), abs=1e-12)
    assert estimated.set_aside == {"caption_empty": 2, "caption_nul": 1}
    assert estimated.provenance.num_captions == 27
    assert estimated.provenance.text.partition(" ")[0] == ("segments" if segmenter else "whole")


@pytest.mark.usefixtures("small_corpora")
def test_provenance_comes_back_and_tells_captions_apart(stream, model, tmp_path):
    own = scorer(model)
    some = estimate_direction(CaptionFeatures(stream, own, limit=20), "tiny")
    path = tmp_path / "v.safetensors"
    some.for_use().save(path)
    loaded = CorpusDirection.load(path)
    assert loaded.provenance == some.provenance
    assert loaded.provenance.model_digest == text_digest(own)
    assert loaded.provenance.num_captions == 17
    torch.testing.assert_close(loaded.direction, some.direction.float())
    digests = {
        estimate_direction(
            CaptionFeatures(stream, own, limit=limit, batch_size=size), ""
        ).provenance.captions_digest
        for limit, size in ((20, 3), (20, 64), (None, 64))
    }
    assert len(digests) == 2
    assert some.provenance.captions_digest in digests


def test_few_captions_are_refused_before_they_are_read(stream, model):
    with pytest.raises(
        DataError, match=r"at least 512 captions .* got 30 samples of `[^`]*`; give"
    ):
        check_corpus(stream.folder, len(stream))


def test_bad_captions_do_not_make_up_the_number(stream, model, monkeypatch):
    for module in (common_direction, direction_estimation):
        monkeypatch.setattr(module, "MIN_CORPUS", 28)
    with pytest.raises(DataError, match=r"3 of them .* \(caption_empty: 2, caption_nul: 1\)"):
        estimate_direction(CaptionFeatures(stream, scorer(model)), "tiny")


def test_features_that_are_not_finite_name_their_sample(stream, model):
    class Broken(SegmentScorer):
        def text_features(self, texts):
            features = super().text_features(texts)
            features[[i for i, text in enumerate(texts) if "number 9" in text]] = torch.nan
            return features

    parts = ClipScorer(model, clip_tokenizer(), ImageSettings(image_size=8))
    with pytest.raises(DataError, match="got NaN for sample 9 of"):
        list(CaptionFeatures(stream, Broken(parts), batch_size=4).read("reading"))


def test_long_captions_come_in_small_batches(stream, model, monkeypatch):
    monkeypatch.setattr(direction_estimation, "_MAX_BATCH_CHARS", 100)
    sizes = [len(batch) for batch in CaptionFeatures(stream, scorer(model)).read("reading")]
    assert sum(sizes) == 27
    assert max(sizes) < 6
