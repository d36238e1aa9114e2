"""Bound rewards: equal to the rewards they come from, whatever the chunks; texts read once."""

import pytest
import torch
from torch import nn

from segalign.errors import ConfigError, DataError
from segalign.rewards.aesthetic import AestheticReward, aesthetic_head
from segalign.rewards.bound_reward import RewardTerms, bind_reward
from segalign.rewards.clip_reward import ClipReward
from segalign.rewards.common_direction import BatchDirection, EmaDirection
from segalign.rewards.decomposition import reweight
from segalign.rewards.mixture import RewardMixture, WeightedReward
from segalign.rewards.protocol import check_batch
from segalign.text.segmenter import SentenceSegmenter

CAPTIONS = [
    "A red fox sits on a wall. It is night.", "Two owls.", "", "A green house. Rain falls.",
    "A dog.",
]  # fmt: skip
EXACT = {"rtol": 0, "atol": 1e-12}


class Counted(nn.Module):
    """An estimate of V that says how often it was asked."""

    def __init__(self, estimate):
        super().__init__()
        self.estimate, self.calls = estimate, 0

    def forward(self, features):
        self.calls += 1
        return self.estimate(features)


@pytest.fixture
def reward(make_hugging_face):
    return decomposed(make_hugging_face())


def decomposed(scorer, estimate=None):
    scorer.model.double()
    direction = Counted(estimate or BatchDirection())
    return ClipReward(
        scorer, segmenter=SentenceSegmenter(), common_direction=direction, omega=0.3, crop=17
    )


@pytest.fixture
def images():
    return torch.rand(5, 3, 24, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def brightness(images, captions):
    lengths = [len(caption) for caption in captions]
    return images.mean(dim=(1, 2, 3)) * images.new_tensor(lengths)


def mixed(reward, weight=-3.0):
    parts = {"text": WeightedReward(reward=reward, weight=0.5)}
    return RewardMixture(parts | {"bright": WeightedReward(reward=brightness, weight=weight)})


def whole(images):
    return torch.arange(len(images))


def in_chunks(bound, images, sizes):
    rows = whole(images).split(sizes)
    return [bound(images[chunk], chunk) for chunk in rows]


@pytest.mark.parametrize("has_direction", [True, False])
def test_a_whole_batch_is_the_reward(any_scorer, has_direction):
    images = torch.rand(5, 3, 24, 20, generator=torch.Generator().manual_seed(1))
    direction = BatchDirection() if has_direction else None
    reward = ClipReward(any_scorer, common_direction=direction, omega=0.3)
    found = bind_reward(reward, CAPTIONS)(images, whole(images))
    assert torch.equal(found.rewards, reward(images, CAPTIONS))
    assert set(found.parts) == (
        {"text_relevant", "text_irrelevant", "common_share"} if has_direction else set()
    )


@pytest.mark.parametrize("sizes", [5, 2, 1, [1, 4]])
def test_chunks_change_nothing(reward, images, sizes):
    """Of a batch's own V; the reward itself, called in chunks, gives other values."""
    expected = reward(images, CAPTIONS)
    bound = bind_reward(reward, CAPTIONS)
    asked = reward.common_direction.calls
    found = in_chunks(bound, images, sizes)
    assert reward.common_direction.calls == asked
    torch.testing.assert_close(torch.cat([t.rewards for t in found]), expected, **EXACT)
    at_once = bound(images, whole(images)).parts
    for name, values in at_once.items():
        torch.testing.assert_close(torch.cat([t.parts[name] for t in found]), values, **EXACT)
    plain = torch.cat([reward(images[i : i + 2], CAPTIONS[i : i + 2]) for i in (0, 2, 4)])
    assert (plain - expected).abs().max() > 1e-3


def test_rows_say_which_caption(reward, images):
    bound = bind_reward(mixed(reward), CAPTIONS)
    rows = torch.tensor([3, 0, 3])
    found = bound(images[:3], rows)
    for place, row in enumerate(rows.tolist()):
        one = bound(images[place : place + 1], torch.tensor([row]))
        torch.testing.assert_close(found.rewards[place], one.rewards[0], **EXACT)
    captions = [CAPTIONS[row] for row in rows]
    torch.testing.assert_close(found.parts["bright"], brightness(images[:3], captions), **EXACT)


def test_the_parts_are_those_of_the_score(reward, images):
    found = bind_reward(reward, CAPTIONS)(images.requires_grad_(), whole(images))
    expected = reward.score_parts(images, CAPTIONS)
    for name, values in found.parts.items():
        torch.testing.assert_close(values, getattr(expected, name), **EXACT)
        assert not values.requires_grad
    parts = found.parts
    weighted = parts["text_relevant"] + 0.3 * parts["text_irrelevant"]
    torch.testing.assert_close(found.rewards, weighted, **EXACT)


def test_an_average_learns_once_as_in_a_call(make_hugging_face, images):
    bound, plain = (decomposed(make_hugging_face(), EmaDirection(decay=0.5)) for _ in "ab")
    for reward in (bound, plain):
        reward.common_direction = reward.common_direction.estimate
    means = []
    for captions in (CAPTIONS, [*CAPTIONS[1:], "A storm."]):
        found = in_chunks(bind_reward(bound, captions), images, 2)
        expected = plain(images, captions)
        torch.testing.assert_close(torch.cat([t.rewards for t in found]), expected, **EXACT)
        means.append(plain.text_features(captions).mean(0))
    average = bound.common_direction.mean
    torch.testing.assert_close(average, (means[0] + means[1]) / 2, **EXACT)
    assert torch.equal(average, plain.common_direction.mean)
    bind_reward(bound.eval(), CAPTIONS[:2])
    assert torch.equal(bound.common_direction.mean, average)


def test_texts_are_read_and_images_encoded_once(reward, images, monkeypatch):
    read, encoded = [], []
    scorer = reward.scorer
    features, text = scorer.image_features, scorer.segment_features
    monkeypatch.setattr(scorer, "segment_features", lambda c: (read.append(c), text(c))[1])
    monkeypatch.setattr(
        scorer, "image_features", lambda x: (encoded.append(len(x)), features(x))[1]
    )
    bound = bind_reward(mixed(reward), CAPTIONS)
    in_chunks(bound, images, 2)
    assert (len(read), encoded) == (1, [2, 2, 1])


def test_the_gradient_is_exact(reward, images):
    bound = bind_reward(mixed(reward), CAPTIONS)
    rows = torch.tensor([4, 1])
    images = images[:2].clone().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: bound(x, rows).rewards, images, fast_mode=True, atol=1e-7
    )
    assert all(p.grad is None and not p.requires_grad for p in reward.parameters())


def test_a_mixture_names_its_parts(reward, images):
    mixture = mixed(reward)
    found = bind_reward(mixture, CAPTIONS)(images, whole(images))
    inner = ["text_relevant", "text_irrelevant", "common_share"]
    assert set(found.parts) == {"text", "bright", *(f"text/{name}" for name in inner)}
    assert torch.equal(found.rewards, mixture(images, CAPTIONS))
    for name, values in mixture.score_each(images, CAPTIONS).items():
        assert torch.equal(found.parts[name], values)


def test_other_rewards_are_called_with_the_rows_captions(images):
    images.requires_grad_()
    found = in_chunks(bind_reward(brightness, CAPTIONS), images, 2)
    rewards, expected = torch.cat([t.rewards for t in found]), brightness(images, CAPTIONS)
    assert torch.equal(rewards, expected)
    gradients = [torch.autograd.grad(each.sum(), images)[0] for each in (rewards, expected)]
    assert torch.equal(*gradients)
    assert found[0].parts == {}


@pytest.mark.parametrize("kind", ["mixture", "looks", "plain"])
def test_what_is_not_finite_is_handed_on_row_by_row(reward, make_hugging_face, images, kind):
    def plain(images, captions):
        check_batch(images, captions)
        return brightness(images, captions)

    if kind != "mixture":
        looks = AestheticReward(make_hugging_face(), aesthetic_head(12)).double()
        reward = looks if kind == "looks" else plain
    given = mixed(reward) if kind == "mixture" else reward
    expected = given(images, CAPTIONS)
    damaged = images.clone()
    damaged[1], damaged[3, 0, 2, 2] = torch.nan, torch.inf
    damaged.requires_grad_()
    found = bind_reward(given, CAPTIONS)(damaged, whole(images)).rewards
    assert found.isnan().tolist() == [False, True, False, True, False]
    others = torch.tensor([0, 2, 4])
    torch.testing.assert_close(found[others], expected[others], **EXACT)
    (gradient,) = torch.autograd.grad(found.sum(), damaged)
    assert gradient[others].isfinite().all()
    assert gradient[[0, 4]].flatten(1).norm(dim=1).min() > 0


def keep(*rows):
    return torch.tensor([row in rows for row in range(5)])


@pytest.mark.parametrize("estimate", [BatchDirection, EmaDirection])
@pytest.mark.parametrize("is_told", [True, False], ids=["told", "counted-for"])
def test_captions_that_do_not_count_change_no_direction(
    make_hugging_face, images, estimate, is_told
):
    """Whether the estimate knows of them, or is only given the others."""
    reward, alone, plain = (decomposed(make_hugging_face(), estimate()) for _ in "abc")
    if is_told:
        for one in (reward, alone):
            one.common_direction = one.common_direction.estimate
    rows = torch.tensor([0, 3])
    captions = [CAPTIONS[row] for row in rows]
    mixture = mixed(reward)
    found = bind_reward(mixture, CAPTIONS, counted=keep(0, 3))(images[rows], rows)
    expected = bind_reward(mixed(alone), captions)(images[rows], torch.arange(2))
    for name, values in expected.parts.items():
        torch.testing.assert_close(found.parts[name], values, **EXACT)
    torch.testing.assert_close(found.rewards, expected.rewards, **EXACT)
    everything = bind_reward(mixed(plain), CAPTIONS)(images[rows], rows)
    assert (everything.rewards - expected.rewards).abs().max() > 1e-3


def test_if_all_captions_count_nothing_changes(reward, images):
    found = bind_reward(reward, CAPTIONS, counted=keep(*range(5)))(images, whole(images))
    assert torch.equal(found.rewards, reward(images, CAPTIONS))


@pytest.mark.parametrize("estimate", [BatchDirection(refuse_single=True), EmaDirection()])
def test_a_batch_of_which_nothing_counts_is_finite(make_hugging_face, images, estimate):
    reward = decomposed(make_hugging_face())
    reward.common_direction = estimate
    found = bind_reward(reward, CAPTIONS, counted=keep())(images, whole(images))
    assert found.rewards.isfinite().all()
    assert all(values.isfinite().all() for values in found.parts.values())


def test_a_bind_that_knows_nothing_of_counting_is_called_without(images):
    class Plain:
        def bind(self, captions):
            return lambda images, rows: RewardTerms(images.mean(dim=(1, 2, 3)) + len(captions))

    parts = {"plain": WeightedReward(reward=Plain(), weight=2.0)}
    for given, factor in ((Plain(), 1), (RewardMixture(parts), 2)):
        found = bind_reward(given, CAPTIONS, counted=keep(1))(images, whole(images))
        expected = factor * (images.mean(dim=(1, 2, 3)) + 5)
        torch.testing.assert_close(found.rewards, expected, **EXACT)


class Watched:
    """A reward without a finite value, which says whether it was recorded."""

    def __init__(self):
        self.recorded = []

    def __call__(self, images, captions):
        values = (images.mean(dim=(1, 2, 3)) - 2).sqrt()
        self.recorded.append(values.requires_grad)
        return values


def test_a_part_of_weight_0_is_only_reported(images):
    odd, images = Watched(), images.requires_grad_()
    parts = {"bright": WeightedReward(reward=brightness, weight=-3.0)}
    mixture = RewardMixture(parts | {"odd": WeightedReward(reward=odd, weight=0.0)})
    found = bind_reward(mixture, CAPTIONS)(images, whole(images))
    assert odd.recorded == [False]
    assert found.parts["odd"].isnan().all()
    expected = -3 * brightness(images, CAPTIONS)
    assert torch.equal(found.rewards, expected)
    assert torch.equal(mixture(images, CAPTIONS), expected)
    gradients = [torch.autograd.grad(each.sum(), images)[0] for each in (found.rewards, expected)]
    assert torch.equal(*gradients)


def test_a_mixture_without_weight_is_0_and_trains_nothing(images):
    mixture = RewardMixture({"odd": WeightedReward(reward=Watched(), weight=0.0)})
    bound = bind_reward(mixture, CAPTIONS)
    assert not bound(images, whole(images)).rewards.any()
    with pytest.raises(ConfigError, match="with a gradient to the images; got values that carry n"):
        bound(images.requires_grad_(), whole(images))


def test_autocast_leaves_no_v_in_the_text_relevant_part(make_hugging_face):
    reward = ClipReward(make_hugging_face(), common_direction=BatchDirection(), omega=0.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        texts = bind_reward(reward, CAPTIONS).bound.texts
        images = torch.rand(5, 3, 24, 20).requires_grad_()
        found = bind_reward(reward, CAPTIONS)(images, whole(images))
        assert torch.equal(found.rewards, reward(images, CAPTIONS))
    plain = texts.parts["text_relevant"] + texts.parts["text_irrelevant"]
    direction = BatchDirection()(plain)
    assert (texts.weighted @ direction).abs().max() < 1e-6
    torch.testing.assert_close(texts.weighted, reweight(plain, direction, 0.0))
    assert found.rewards.dtype == torch.float32


def blind(images, captions):
    return images.new_ones(len(images))


class Foreign(nn.Module):
    """Its values carry gradient, to its own weights alone."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, images, captions):
        return self.weight * images.detach().mean(dim=(1, 2, 3))


NO_GRADIENT = (
    "^expected values of the reward `{}` with a gradient to the images; got values that {};"
)


@pytest.mark.parametrize(
    ("other", "name", "found"),
    [(blind, "blind", "carry none"), (Foreign(), "Foreign", "do not depend on the images")],
)
def test_a_reward_without_gradient_is_named(images, other, name, found):
    rows = whole(images)
    with pytest.raises(ConfigError, match=NO_GRADIENT.format(name, found)):
        bind_reward(other, CAPTIONS)(images.requires_grad_() * 1, rows)
    parts = {"bright": WeightedReward(reward=brightness), "odd": WeightedReward(reward=other)}
    with pytest.raises(ConfigError, match=NO_GRADIENT.format("odd", found)) as refusal:
        bind_reward(RewardMixture(parts), CAPTIONS)(images, rows)
    assert "(the reward" not in str(refusal.value)
    # Without gradient, or without weight, nothing is missing.
    bind_reward(other, CAPTIONS)(images.detach(), rows)
    with torch.no_grad():
        bind_reward(other, CAPTIONS)(images, rows)
    parts["odd"] = WeightedReward(reward=other, weight=0.0)
    assert bind_reward(RewardMixture(parts), CAPTIONS)(images, rows).rewards.requires_grad


@pytest.mark.parametrize(
    ("other", "found"),
    [
        (lambda images, captions: images.mean(), r"shape \(\)"),
        (lambda images, captions: images.mean(dim=(2, 3)), r"shape \(5, 3\)"),
        (lambda images, captions: 0.5, "`float`"),
    ],
    ids=["scalar", "channels", "number"],
)
def test_values_of_another_shape_are_named(images, other, found):
    with pytest.raises(ConfigError, match=f"^expected 5 values of the reward .*; got {found};"):
        bind_reward(other, CAPTIONS)(images, whole(images))
    mixture = RewardMixture({"odd": WeightedReward(reward=other)})
    with pytest.raises(ConfigError, match=f"^expected 5 values of the reward `odd`; got {found};"):
        bind_reward(mixture, CAPTIONS)(images, whole(images))


def test_errors_of_a_part_name_it(reward, images):
    reward.scorer.model.text_projection.weight.data.fill_(torch.nan)
    with pytest.raises(DataError, match=r"^expected finite text .* dtype \(the reward `text`\)$"):
        mixed(reward)(images, CAPTIONS)
    with pytest.raises(DataError, match=r"dtype$"):
        reward(images, CAPTIONS)


def test_texts_that_are_not_finite_are_handed_on(reward, images):
    # One rank that raised here would let the others wait.
    reward.scorer.model.text_projection.weight.data.fill_(torch.nan)
    found = bind_reward(mixed(reward), CAPTIONS)(images, whole(images))
    assert found.rewards.isnan().all()
    assert found.parts["text"].isnan().all()


@pytest.mark.parametrize(
    ("images", "rows", "message"),
    [
        (torch.rand(2, 1, 8, 8), torch.arange(2), r"got torch.float32 of shape \(2, 1, 8, 8\)"),
        (torch.ones(2, 3, 8, 8).byte(), torch.arange(2), "got torch.uint8"),
        (
            torch.rand(2, 3, 8, 8),
            torch.arange(1),
            r"one row for each of 2 images; got shape \(1,\)",
        ),
    ],
    ids=["grey", "bytes", "rows"],
)
def test_images_without_a_row_are_refused(images, rows, message):
    with pytest.raises(DataError, match=message):
        bind_reward(brightness, CAPTIONS)(images, rows)


@pytest.mark.parametrize("name", ["a/b", "rewards", "", "items", "keys"])
def test_names_that_would_clash_are_refused(name):
    with pytest.raises(ConfigError, match=f"slashes, other than `rewards`.*; got `{name}`;"):
        RewardMixture({name: WeightedReward(reward=brightness)})
