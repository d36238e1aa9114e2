"""CLIP-type rewards against transformers' own forward, float64 autograd, and their identities."""

import pytest
import torch
from torch import nn

from segalign.errors import ConfigError, DataError, NonFiniteError
from segalign.formats.clip_scorer import ImageSettings
from segalign.rewards.aesthetic import AestheticReward, aesthetic_head
from segalign.rewards.clip_reward import ClipReward
from segalign.rewards.common_direction import EmaDirection
from segalign.rewards.decomposition import common_share
from segalign.rewards.image_preprocessing import ImagePreprocessing
from segalign.rewards.mixture import RewardMixture, WeightedReward
from segalign.rewards.protocol import set_step
from segalign.text.segmenter import SentenceSegmenter

CAPTIONS = ["A red fox sits on a wall. It is night. The moon shines.", "Two owls."]


@pytest.fixture
def scorer(make_hugging_face):
    return make_hugging_face()


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


def test_the_gradient_through_the_preprocessing_is_exact(scorer):
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


def test_rewards_share_nothing(make_hugging_face, images):
    first, second = ClipReward(make_hugging_face()), ClipReward(make_hugging_face())
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


@pytest.mark.parametrize("is_mixed", [False, True])
def test_the_step_moves_the_crop(scorer, is_mixed):
    reward = ClipReward(scorer, crop=17)
    looks = AestheticReward(scorer, aesthetic_head(12), crop=17, seed=1)
    rewards = {"text": reward, "looks": looks, "plain": lambda images, captions: images.mean()}
    mixture = RewardMixture({n: WeightedReward(reward=one) for n, one in rewards.items()})
    told = (mixture,) if is_mixed else rewards.values()
    places = set()
    for step in range(20):
        for one in told:
            set_step(one, step)
        parts = [each.scorer.preprocessing for each in (reward, looks)]
        assert [part.step for part in parts] == [step, step]
        places.add(parts[0].crop_place(24, 20))
    assert len(places) > 5


def test_looking_at_parts_teaches_nothing(scorer, images):
    """Logs leave the moving average alone, before there is one and after."""
    logged, plain = (ClipReward(scorer, common_direction=EmaDirection(), omega=0.3) for _ in "ab")
    for captions in (CAPTIONS, CAPTIONS[::-1], ["One dog.", "Rain."]):
        logged.score_parts(images, ["A storm.", "Two."])
        assert torch.equal(logged(images, captions), plain(images, captions))
    assert torch.equal(logged.common_direction.mean, plain.common_direction.mean)


def test_evaluation_starts_no_average(scorer, images):
    reward = ClipReward(scorer, common_direction=EmaDirection(), omega=0.3).eval()
    reward(images, CAPTIONS)
    assert not len(reward.common_direction.mean)


def test_images_smaller_than_the_crop_are_refused(scorer, images):
    with pytest.raises(ConfigError, match="at least 504 pixels for the reward's `crop`; got 20 x"):
        ClipReward(scorer, crop=504)(images, CAPTIONS)


def test_text_features_that_are_not_finite_are_refused(scorer, images):
    scorer.model.text_projection.weight.data.fill_(torch.nan)
    with pytest.raises(DataError, match="expected finite text features of the scorer; got NaN"):
        ClipReward(scorer)(images, CAPTIONS)


def test_parts_need_a_direction(scorer, images):
    with pytest.raises(ValueError, match="expected a common direction; the reward has none"):
        ClipReward(scorer).score_parts(images, CAPTIONS)


def test_image_features_that_are_not_finite_are_refused(scorer, images):
    scorer.model.visual_projection.weight.data.fill_(torch.nan)
    with pytest.raises(DataError, match="expected finite image features of the scorer; got NaN"):
        ClipReward(scorer)(images, CAPTIONS)


@pytest.mark.parametrize(
    ("images", "captions", "error", "message"),
    [
        (torch.rand(3, 20, 20), CAPTIONS, DataError, "got shape (3, 20, 20)"),
        (torch.rand(2, 1, 20, 20), CAPTIONS, DataError, "got shape (2, 1, 20, 20)"),
        (torch.rand(1, 3, 20, 20), CAPTIONS, DataError, "each of 1 images; got 2 captions"),
        (torch.rand(2, 3, 20, 20), CAPTIONS[0], DataError, "got one text"),
        (torch.ones(2, 3, 20, 20).byte(), CAPTIONS, DataError, "got torch.uint8; divide"),
        (torch.ones(2, 3, 20, 20) * 255, CAPTIONS, DataError, "got 255 to 255; rescale"),
        (-torch.ones(2, 3, 20, 20), CAPTIONS, DataError, "got -1 to -1; rescale"),
        (torch.full((2, 3, 20, 20), torch.nan), CAPTIONS, NonFiniteError, "finite images"),
    ],
    ids=["one", "grey", "number", "text", "bytes", "to_255", "negative", "nan"],
)
def test_what_cannot_be_scored_is_refused(scorer, images, captions, error, message):
    reward = ClipReward(scorer, common_direction=direction)
    for score in (reward, reward.segment_scores, reward.score_parts):
        with pytest.raises(error) as refusal:
            score(images, captions)
        assert message in str(refusal.value)
        assert "\n" not in str(refusal.value)


def test_segment_scores_need_no_direction(any_scorer, images):
    reward = ClipReward(any_scorer, segmenter=SentenceSegmenter())
    scores = reward.segment_scores(images, CAPTIONS)
    assert [len(one) for one in scores] == [3, 1]
    torch.testing.assert_close(torch.stack([s.mean() for s in scores]), reward(images, CAPTIONS))
    decomposed = ClipReward(
        any_scorer, segmenter=SentenceSegmenter(), common_direction=direction, omega=0.0
    )
    for one, other in zip(scores, decomposed.segment_scores(images, CAPTIONS), strict=True):
        torch.testing.assert_close(one, other)


def test_a_parent_cannot_train_a_reward(any_scorer, images):
    direction = EmaDirection()
    reward = ClipReward(any_scorer, common_direction=direction)
    parent = nn.ModuleDict({"reward": reward, "own": nn.Linear(1, 1)}).train()
    assert direction.training
    assert not any(module.training for module in reward.scorer.modules())
    parent.requires_grad_(True)
    reward.scorer.model.train()
    reward(images.requires_grad_(True), CAPTIONS).sum().backward()
    assert not any(module.training for module in reward.scorer.modules())
    assert all(not p.requires_grad and p.grad is None for p in reward.parameters())
    reward.requires_grad_(True)
    assert not any(p.requires_grad for p in reward.parameters())
    assert images.grad.abs().sum() > 0


def test_the_temperature_and_the_width_are_the_models(any_scorer):
    any_scorer.model.logit_scale.data.fill_(3.0)
    scorer = ClipReward(any_scorer).scorer
    assert scorer.logit_scale.tolist() == [3.0]
    assert scorer.width == scorer.text_features(["an owl"]).shape[1] == 12


@pytest.mark.parametrize(("cleaning", "same"), [(None, False), ("none", False), ("ftfy", True)])
def test_texts_of_hugging_face_models_are_not_cleaned_unless_asked(scorer, cleaning, same):
    reward = ClipReward(scorer, cleaning=cleaning)
    curly, straight = reward.text_features(["a \u201cred\u201d owl", 'a "red" owl'])
    assert torch.equal(curly, straight) is same
