"""CLIP-type rewards against transformers' own forward, float64 autograd, and their identities."""

import pytest
import torch
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

from segalign.errors import ConfigError, DataError
from segalign.formats.clip_scorer import ClipScorer, ImageSettings
from segalign.rewards.clip_reward import ClipReward
from segalign.rewards.decomposition import common_share
from segalign.rewards.image_preprocessing import ImagePreprocessing
from segalign.text.segmenter import SentenceSegmenter
from segalign.text.tokenizer import clip_tokenizer

CAPTIONS = ["A red fox sits on a wall. It is night. The moon shines.", "Two owls."]


def make_scorer() -> ClipScorer:
    torch.manual_seed(0)
    text = {
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "vocab_size": 49408,
        "num_attention_heads": 2, "bos_token_id": 49406, "eos_token_id": 49407,
    }  # fmt: skip
    vision = {
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "image_size": 16,
        "num_attention_heads": 2, "patch_size": 8,
    }  # fmt: skip
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)
    return ClipScorer(CLIPModel(config), clip_tokenizer(), ImageSettings(image_size=16))


@pytest.fixture(scope="module")
def scorer():
    return make_scorer()


@pytest.fixture
def images():
    return torch.rand(2, 3, 24, 20, generator=torch.Generator().manual_seed(1))


def direction(text_features):
    unit = torch.zeros(text_features.shape[-1])
    unit[0] = 1
    return unit


def test_a_short_caption_scores_as_in_transformers(scorer, images):
    pixels = ImagePreprocessing(scorer.image_settings)(images)
    tokens = scorer.tokenizer(["Two owls.", "A fox."], padding=True, return_tensors="pt")
    with torch.no_grad():
        theirs = scorer.model(**tokens, pixel_values=pixels)
    expected = (theirs.image_embeds * theirs.text_embeds).sum(-1)
    torch.testing.assert_close(ClipReward(scorer)(images, ["Two owls.", "A fox."]), expected)


@pytest.mark.parametrize("size", [(24, 20), (16, 16), (40, 17), (9, 30)], ids=str)
def test_preprocessing_is_that_of_clip(size):
    images = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(2))
    processor = CLIPImageProcessor(
        size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}, do_rescale=False
    )
    theirs = processor(images, return_tensors="pt")["pixel_values"]
    ours = ImagePreprocessing(ImageSettings(image_size=16))(images)
    assert ours.shape == theirs.shape
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_the_gradient_through_the_preprocessing_is_exact():
    scorer = make_scorer()
    scorer.model.double()
    reward = ClipReward(
        scorer, segmenter=SentenceSegmenter(), common_direction=direction, omega=0.3, crop=20
    )
    images = torch.rand(1, 3, 22, 21, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x: reward(x, CAPTIONS[:1]), images, fast_mode=True, atol=1e-7
    )


def test_the_score_is_the_mean_of_the_segments_scores(scorer, images):
    reward = ClipReward(scorer, segmenter=SentenceSegmenter())
    alone = ClipReward(scorer)
    image = images[:1]
    each = [alone(image, [text]) for text in reward.split(CAPTIONS[0])]
    assert len(each) == 3
    torch.testing.assert_close(reward(image, CAPTIONS[:1]), torch.stack(each).mean(0))
    assert reward.text_features(CAPTIONS)[0].norm() < 0.999
    unit = ClipReward(scorer, segmenter=SentenceSegmenter(), renormalize=True)
    torch.testing.assert_close(unit.text_features(CAPTIONS).norm(dim=1), torch.ones(2))


def test_a_segment_beyond_the_context_is_cut_further(scorer):
    reward = ClipReward(scorer, segmenter=SentenceSegmenter())
    pieces = reward.split("a red fox and " * 40)
    assert len(pieces) == 3
    assert "".join(pieces) == "a red fox and " * 40
    one, other = (reward.text_features(["a red fox and " * 40 + end]) for end in ("day.", "night."))
    assert not torch.equal(one, other)


def test_the_parts_sum_to_the_score(scorer, images):
    reward = ClipReward(scorer, segmenter=SentenceSegmenter(), common_direction=direction)
    parts = reward.score_parts(images, CAPTIONS)
    plain = ClipReward(scorer, segmenter=SentenceSegmenter())(images, CAPTIONS)
    torch.testing.assert_close(parts.text_relevant + parts.text_irrelevant, plain)
    reweighted = ClipReward(
        scorer, segmenter=SentenceSegmenter(), common_direction=direction, omega=0.3
    )(images, CAPTIONS)
    torch.testing.assert_close(reweighted, parts.text_relevant + 0.3 * parts.text_irrelevant)
    features = reward.text_features(CAPTIONS)
    torch.testing.assert_close(parts.common_share, common_share(features, direction(features)))
    assert [len(scores) for scores in parts.segment_scores] == [3, 1]
    torch.testing.assert_close(torch.stack([s.mean() for s in parts.segment_scores]), plain)


def test_only_the_images_get_gradients(scorer, images):
    reward = ClipReward(scorer)
    reward(images.requires_grad_(True), CAPTIONS).sum().backward()
    assert images.grad.abs().sum() > 0
    assert all(not p.requires_grad and p.grad is None for p in reward.parameters())
    assert not any(module.training for module in reward.scorer.modules())


def test_rewards_share_nothing(images):
    first, second = ClipReward(make_scorer()), ClipReward(make_scorer())
    before = second(images, CAPTIONS)
    with torch.no_grad():
        for weight in first.scorer.model.parameters():
            weight.mul_(2)
    first(images, CAPTIONS)
    assert torch.equal(second(images, CAPTIONS), before)


def test_the_random_crop_is_a_function_of_seed_and_step():
    def places(seed):
        preprocessing = ImagePreprocessing(ImageSettings(), crop=504, seed=seed)
        for preprocessing.step in range(200):
            yield preprocessing.crop_place(512, 512)

    drawn = list(places(0))
    assert drawn == list(places(0))
    assert drawn != list(places(1))
    assert {row for row, _ in drawn} == {column for _, column in drawn} == set(range(9))


def test_images_smaller_than_the_crop_are_refused(scorer, images):
    with pytest.raises(ConfigError, match="at least 504 pixels for the reward's `crop`; got 20 x"):
        ClipReward(scorer, crop=504)(images, CAPTIONS)


def test_text_features_that_are_not_finite_are_refused(images):
    scorer = make_scorer()
    scorer.model.text_projection.weight.data.fill_(torch.nan)
    with pytest.raises(DataError, match="expected finite text features of the scorer; got NaN"):
        ClipReward(scorer)(images, CAPTIONS)


def test_parts_need_a_direction(scorer, images):
    with pytest.raises(ValueError, match="expected a common direction; the reward has none"):
        ClipReward(scorer).score_parts(images, CAPTIONS)
