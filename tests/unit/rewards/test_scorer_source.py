"""Where training starts: weights of a folder, or networks without any."""

import open_clip
import pytest
import torch
from open_clip.model import CLIP

from segalign.errors import ConfigError
from segalign.formats.clip_scorer import save_clip_scorer
from segalign.rewards.scorer_source import PretrainedScorer
from segalign.rewards.segment_scorer import SegmentScorer


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


def test_vit_h_14_is_as_large_as_open_clips():
    """open_clip's own model, built on no memory; its docs say 986.11 M, 632.08 M of the images."""
    with torch.device("meta"):
        ours = PretrainedScorer(model="vit-h-14", init="random").load()
        theirs = CLIP(**open_clip.get_model_config("ViT-H-14"))
    assert count(ours.model) == count(theirs) == 986_109_441
    images = count(ours.model.vision_model) + count(ours.model.visual_projection)
    assert images == count(theirs.visual)
    assert ours.image_settings.image_size == theirs.visual.image_size[0] == 224
    assert ours.width == 1024


def test_a_random_scorer_works_and_trains():
    scorer = PretrainedScorer(model="tiny", init="random").load()
    assert all(parameter.requires_grad for parameter in scorer.model.parameters())
    both = SegmentScorer(scorer)
    texts = both.text_features(["A fox.", "A much longer text about another fox. " * 9])
    images = both.image_features(torch.rand(3, 3, 40, 40))
    assert (texts.shape, images.shape) == ((2, 32), (3, 32))
    assert texts[0].dot(texts[1]) < 0.9999


def test_pretrained_weights_are_read(tmp_path):
    scorer = PretrainedScorer(model="tiny", init="random").load()
    save_clip_scorer(scorer, tmp_path / "scorer")
    loaded = PretrainedScorer(model=str(tmp_path / "scorer")).load()
    for name, weight in scorer.model.state_dict().items():
        assert weight.equal(loaded.model.state_dict()[name]), name
    assert loaded.image_settings.image_size == 32


def test_a_missing_folder_and_an_unknown_size_are_one_line(tmp_path):
    with pytest.raises(ConfigError, match=r"^[^\n]*no_such_folder[^\n]*$"):
        PretrainedScorer(model=str(tmp_path / "no_such_folder")).load()
    message = (
        r"^expected a size among `vit-h-14`, `tiny` for `init: random`; got `laion/CLIP`[^\n]*$"
    )
    with pytest.raises(ConfigError, match=message):
        PretrainedScorer(model="laion/CLIP", init="random").load()
