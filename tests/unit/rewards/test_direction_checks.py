"""A common direction serves the scorer, and the use of captions, that it was estimated with."""

import logging

import pytest
import torch
from transformers import CLIPConfig, CLIPModel

from segalign.errors import ConfigError, DataError
from segalign.formats.clip_scorer import ClipScorer, ImageSettings
from segalign.rewards.common_direction import BatchDirection, CorpusDirection, Provenance
from segalign.rewards.direction_checks import (
    check_batch_estimate,
    check_direction,
    describe_text,
    described_segmenter,
    text_digest,
)
from segalign.rewards.segment_scorer import SegmentScorer
from segalign.text.segmenter import SentenceSegmenter
from segalign.text.tokenizer import clip_tokenizer
from segalign.text.windows import WindowSegmenter

SENTENCES = 'segments {"name": "sentence"}'


class Letters:
    def split(self, caption):
        return []


def make_scorer(segmenter=None, seed=0):
    torch.manual_seed(seed)
    small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    text = {**small, "vocab_size": 49408, "num_attention_heads": 2, "eos_token_id": 49407}
    vision = {**small, "num_attention_heads": 2, "image_size": 8, "patch_size": 8}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=4))
    scorer = ClipScorer(model, clip_tokenizer(), ImageSettings(image_size=8))
    return SegmentScorer(scorer, segmenter=segmenter)


@pytest.fixture(scope="module")
def scorer():
    return make_scorer(SentenceSegmenter())


def direction(text=SENTENCES, digest="a" * 32, width=4):
    unit = torch.zeros(width)
    unit[0] = 1
    facts = Provenance(
        model="tiny", model_digest=digest, text=text, captions_digest="b", num_captions=600
    )
    return CorpusDirection(unit, facts)


def test_the_digest_is_of_the_text_side_alone(scorer):
    before = text_digest(scorer)
    assert text_digest(make_scorer()) == before
    changed = make_scorer()
    with torch.no_grad():
        changed.model.visual_projection.weight.add_(1)
        changed.model.vision_model.post_layernorm.weight.add_(1)
    assert text_digest(changed) == before


@pytest.mark.parametrize("name", ["text_projection.weight", "text_model.final_layer_norm.bias"])
def test_every_text_weight_counts(scorer, name):
    changed = make_scorer()
    with torch.no_grad():
        changed.model.get_parameter(name)[0].add_(1e-3)
    assert text_digest(changed) != text_digest(scorer)


def test_an_open_clip_model_has_a_digest_of_its_projection():
    from open_clip.model import CLIP

    from segalign.formats.open_clip_scorer import open_clip_scorer

    text = {"vocab_size": 49408, "width": 8, "heads": 2, "layers": 1}
    vision = {"image_size": 8, "patch_size": 8, "width": 8, "layers": 1, "head_width": 4}
    model = CLIP(4, vision, text)
    scorer = SegmentScorer(open_clip_scorer(model))
    before = text_digest(scorer)
    with torch.no_grad():
        model.text_projection[0, 0] += 1
    assert text_digest(scorer) != before


@pytest.mark.parametrize(
    ("segmenter", "text"),
    [
        (None, "whole"),
        (SentenceSegmenter(), SENTENCES),
        (WindowSegmenter(num_tokens=9), 'segments {"name": "window", "num_tokens": 9}'),
    ],
)
def test_uses_of_captions_are_described_and_built_again(segmenter, text):
    assert describe_text(segmenter) == text
    again = described_segmenter(text)
    assert type(again) is type(segmenter)
    assert describe_text(again) == text


def test_segmenters_from_elsewhere_are_named():
    text = describe_text(Letters())
    assert text.startswith("segments ")
    assert "Letters" in text
    with pytest.raises(DataError, match=r"by a segmenter of this package; got: .*must be one of"):
        described_segmenter(text)


@pytest.mark.parametrize("text", ["sentence, mean", "segments nonsense", ""])
def test_a_foreign_description_is_refused(text):
    with pytest.raises(DataError, match="expected a common direction of whole captions, or of"):
        described_segmenter(text)


def test_a_direction_fits_its_own_use(caplog):
    check_direction(direction(), "a" * 32, SENTENCES)
    check_direction(direction(), "a" * 32, describe_text(SentenceSegmenter()))
    assert not caplog.records


@pytest.mark.parametrize(
    ("estimated", "used", "cure"),
    [(SENTENCES, "whole", "--text whole"), ("whole", SENTENCES, "--text segments")],
)
def test_whole_captions_and_segments_are_not_mixed(estimated, used, cure):
    with pytest.raises(DataError) as caught:
        check_direction(direction(estimated), "a" * 32, used)
    message = str(caught.value)
    assert f"as they are scored ({used}); got one of {estimated}; estimate one" in message
    assert message.endswith(f"`python main.py direction estimate {cure}`")


def test_another_model_is_refused():
    with pytest.raises(DataError, match="of this model's text weights"):
        check_direction(direction(), "b" * 32, SENTENCES)


def test_another_segmenter_is_warned_of(caplog):
    with caplog.at_level(logging.WARNING):
        check_direction(direction(), "a" * 32, 'segments {"name": "clause"}')
    (record,) = caplog.records
    assert SENTENCES in record.getMessage()
    assert '{"name": "clause"}' in record.getMessage()


def test_estimates_of_batches_always_fit(caplog):
    check_direction(BatchDirection(), "any", "whole")
    assert not caplog.records


def test_a_global_batch_of_one_is_refused():
    with pytest.raises(ConfigError, match=r"at least 2 captions in a global batch .* got 1,"):
        check_batch_estimate(1)


@pytest.mark.parametrize(("num_captions", "num_warnings"), [(2, 1), (63, 1), (64, 0)])
def test_few_captions_are_warned_of(caplog, num_captions, num_warnings):
    with caplog.at_level(logging.WARNING):
        check_batch_estimate(num_captions)
    assert len(caplog.records) == num_warnings
