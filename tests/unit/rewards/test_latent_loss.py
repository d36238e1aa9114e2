"""Losses of latents: the plain composition's values and gradients; what fails is named."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from segalign.errors import ConfigError
from segalign.rewards.bound_reward import bind_reward
from segalign.rewards.clip_reward import ClipReward
from segalign.rewards.common_direction import BatchDirection
from segalign.rewards.latent_loss import LatentRewardLoss, RewardObjective
from segalign.rewards.mixture import RewardMixture, WeightedReward
from segalign.text.segmenter import SentenceSegmenter

CAPTIONS = ["A red fox sits. It is night.", "Two owls.", "A green house.", ""]
EXACT = {"rtol": 0, "atol": 1e-12}


class TinyDecoder(nn.Module):
    """Latents (2, 4, 4) to images (3, 16, 16), some pixels outside [0, 1]."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(3)
            self.first, self.last = nn.Conv2d(2, 8, 3, padding=1), nn.Conv2d(8, 3, 3, padding=1)
        self.double().requires_grad_(False)

    def forward(self, latents):
        wide = F.interpolate(torch.tanh(self.first(latents)), scale_factor=4)
        return self.last(wide) + 0.5


DECODE = TinyDecoder()


@pytest.fixture
def latents():
    drawn = torch.randn(4, 2, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return 2 * drawn


@pytest.fixture
def reward(make_hugging_face):
    scorer = make_hugging_face()
    scorer.model.double()
    direction = BatchDirection()
    return ClipReward(scorer, segmenter=SentenceSegmenter(), common_direction=direction, omega=0.3)


def brightness(images, captions):
    lengths = images.new_tensor([1.0 + len(caption) for caption in captions])
    return (images.square().mean(dim=(1, 2, 3)) * lengths).log()


def make(reward=brightness, **settings):
    weights = settings.pop("weights", torch.ones(4, dtype=torch.float64))
    objective = RewardObjective(scale=settings.pop("scale", 1.0), hinge=settings.pop("hinge", None))
    decode = settings.pop("decode", DECODE)
    return LatentRewardLoss(
        decode=decode, bound=bind_reward(reward, CAPTIONS), objective=objective, weights=weights,
        **settings,
    )  # fmt: skip


def differentiate(loss, latents, sizes=4):
    """Call a loss chunk by chunk; return losses and the gradient of their sum."""
    leaf = latents.detach().clone().requires_grad_()
    losses = torch.cat([loss(leaf[rows], rows) for rows in torch.arange(len(leaf)).split(sizes)])
    (gradient,) = torch.autograd.grad(losses.sum(), leaf)
    return losses.detach(), gradient


@pytest.mark.parametrize("hinge", [None, 0.2])
@pytest.mark.parametrize("sizes", [4, 3, 1])
def test_the_gradient_is_that_of_the_plain_composition(reward, latents, hinge, sizes):
    weights = torch.tensor([1.0, 0.5, 2.0, 0.25], dtype=torch.float64)

    def plain(leaf, rows):
        rewards = reward(DECODE(leaf).clamp(0, 1), CAPTIONS)
        losses = -3 * rewards if hinge is None else 3 * (hinge - rewards).clamp(min=0)
        return weights * losses

    expected, gradient = differentiate(plain, latents)
    loss = make(reward, weights=weights, scale=3.0, hinge=hinge)
    found, ours = differentiate(loss, latents, sizes)
    torch.testing.assert_close(found, expected, **EXACT)
    torch.testing.assert_close(ours, gradient, **EXACT)
    assert gradient.abs().max() > 1e-4
    outside = (DECODE(latents) - 0.5).abs() > 0.5
    assert 0.05 < outside.double().mean() < 0.95


@pytest.mark.parametrize("checkpoint", [False, True])
def test_the_gradient_passes_a_check_by_differences(latents, checkpoint):
    loss = make(checkpoint=checkpoint)
    rows = torch.tensor([2, 0])
    assert torch.autograd.gradcheck(
        lambda x: loss(x, rows), latents[:2].clone().requires_grad_(), atol=1e-7
    )


def saved_numbers(loss, latents):
    """Count the numbers that a call keeps for its backward pass."""
    kept = []
    hooks = torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: (kept.append(tensor.numel()), tensor)[1], lambda tensor: tensor
    )
    with hooks:
        loss(latents.detach().clone().requires_grad_(), torch.arange(4))
    return kept


def test_checkpointing_keeps_the_latents_alone_and_changes_no_bit(reward, latents):
    plain, checked = (make(reward, checkpoint=checkpoint) for checkpoint in (False, True))
    for one, other in zip(
        differentiate(plain, latents), differentiate(checked, latents), strict=True
    ):
        assert torch.equal(one, other)
    for name, values in plain.collected().items():
        assert torch.equal(values, checked.collected()[name])
    images, hidden = 4 * 3 * 16 * 16, 4 * 8 * 16 * 16
    kept = [saved_numbers(make(checkpoint=checkpoint), latents) for checkpoint in (False, True)]
    assert hidden in kept[0]
    assert hidden not in kept[1]
    # The images themselves, which this reward squares, and no others for clamping.
    assert kept[1].count(images) == 1 < kept[0].count(images)


def test_pixels_outside_have_the_wanted_gradient(latents):
    found = {kind: differentiate(make(saturated=kind), latents) for kind in ("zero", "pass")}
    assert torch.equal(found["zero"][0], found["pass"][0])

    def straight(leaf, rows):
        images = DECODE(leaf)
        return -brightness(images + (images.clamp(0, 1) - images).detach(), CAPTIONS)

    torch.testing.assert_close(found["pass"][1], differentiate(straight, latents)[1], **EXACT)
    assert (found["pass"][1] - found["zero"][1]).norm() > 0.1 * found["zero"][1].norm()
    white = make(
        decode=lambda latents: 3 + latents.mean(1, keepdim=True).tanh().expand(-1, 3, -1, -1)
    )
    assert differentiate(white, latents)[1].eq(0).all()


def undefined(images, captions):
    """NaN, in values and gradients, where there is no caption."""
    lengths = images.new_tensor([len(caption) for caption in captions])
    return (images.mean(dim=(1, 2, 3)) * lengths - 1e-3).sqrt()


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("broken", [1.0, math.nan, math.inf])
def test_rows_without_weight_are_nothing(latents, checkpoint, broken):
    weights = torch.tensor([1.0, 1.0, 1.0, 0.0])
    loss = make(undefined, weights=weights, checkpoint=checkpoint)
    latents[3] *= broken
    losses, gradient = differentiate(loss, latents, 2)
    assert losses[3] == 0
    assert gradient[3].eq(0).all()
    alone = make(undefined)
    expected = differentiate(alone, latents[:3], 2)
    torch.testing.assert_close(losses[:3], expected[0], **EXACT)
    torch.testing.assert_close(gradient[:3], expected[1], **EXACT)
    assert loss.name_non_finite() is None
    assert loss.collected()["rewards"].isnan().tolist() == [False, False, False, True]


def test_a_call_of_rows_without_weight_alone_still_differentiates(latents):
    for reward in (undefined, brightness):
        loss = make(reward, weights=torch.zeros(4))
        losses, gradient = differentiate(loss, latents)
        assert losses.eq(0).all()
        assert gradient.eq(0).all()
        assert loss.collected()["rewards"].isnan().all()


def test_rewards_and_parts_are_collected(reward, latents):
    mixture = RewardMixture(
        {
            "text": WeightedReward(reward=reward),
            "bright": WeightedReward(reward=brightness, weight=0.5),
        }
    )
    loss = make(mixture)
    assert loss.collected()["rewards"].isnan().all()
    differentiate(loss, latents[:3], 2)
    images = DECODE(latents).clamp(0, 1)
    expected = bind_reward(mixture, CAPTIONS)(images, torch.arange(4))
    expected = {"rewards": expected.rewards, **expected.parts}
    found = loss.collected()
    assert found.keys() == expected.keys()
    assert {"text", "text/common_share", "bright"} < found.keys()
    for name, values in found.items():
        torch.testing.assert_close(values[:3], expected[name][:3], **EXACT)
        assert values[3].isnan()
        assert not values.requires_grad
    assert loss.renoised().isnan().all()


def test_further_calls_are_of_copies_and_leave_the_image_its_own(latents):
    loss = make(brightness, weights=torch.tensor([1.0, 1.0, 1.0, 0.0]))
    differentiate(loss, latents, 2)
    images, others = loss.collected()["rewards"], [latents.flip(0), latents.roll(1, 0)]
    copies = [brightness(DECODE(other).clamp(0, 1), CAPTIONS) for other in others]
    for other in others:
        loss(other[:2], torch.arange(2))
    found = loss.collected()
    assert found.keys() == {"rewards"}
    torch.testing.assert_close(found["rewards"], images, **EXACT, equal_nan=True)
    mean = (copies[0] + copies[1]) / 2
    torch.testing.assert_close(loss.renoised()[:2], mean[:2], **EXACT)
    assert loss.renoised()[2:].isnan().all()
    loss(latents[2:], torch.tensor([2, 3]))
    assert loss.renoised().isnan().tolist() == [False, False, False, True]


def test_a_copy_that_is_not_finite_is_named_too(reward, latents):
    def odd(images, captions):
        return images.mean(dim=(1, 2, 3)) / scale[0]

    scale = [1.0]
    parts = {"text": WeightedReward(reward=reward), "odd": WeightedReward(reward=odd)}
    loss = make(RewardMixture(parts))
    loss(latents[:3], torch.arange(3))
    scale[0] = 0.0
    loss(latents[:2], torch.arange(1, 3))
    assert loss.collected()["rewards"][:3].isfinite().all()
    assert loss.name_non_finite() == "`odd` for rows [1, 2]"


@pytest.mark.parametrize("checkpoint", [False, True])
def test_a_call_does_not_wait_for_the_device(reward, latents, checkpoint, monkeypatch):
    """Whatever looks at numbers would; the plain reward's checks do."""

    def wait(*_):
        raise AssertionError("waits for the device")

    loss = make(RewardMixture({"text": WeightedReward(reward=reward)}), checkpoint=checkpoint)
    for name in ("item", "tolist", "__bool__", "__int__", "__float__", "nonzero", "cpu"):
        monkeypatch.setattr(torch.Tensor, name, wait)
    differentiate(loss, latents, 2)
    loss.collected()
    with pytest.raises(AssertionError, match="waits"):
        reward(torch.rand(4, 3, 16, 16, dtype=torch.float64), CAPTIONS)
    with pytest.raises(AssertionError, match="waits"):
        loss.name_non_finite()


def test_what_is_not_finite_is_named(reward, latents):
    parts = {"text": WeightedReward(reward=reward), "root": WeightedReward(reward=undefined)}
    loss = make(RewardMixture(parts))
    loss(latents[:3], torch.arange(3))
    assert loss.name_non_finite() is None
    loss(latents[3:], torch.tensor([3]))
    assert loss.name_non_finite() == "`root` for rows [3]"
    alone = make(undefined)
    alone(latents, torch.arange(4))
    assert alone.name_non_finite() == "`rewards` for rows [3]"


def test_a_reward_is_named_for_all_its_parts(reward, latents):
    reward.scorer.model.visual_projection.weight.data.fill_(torch.nan)
    parts = {"bright": WeightedReward(reward=brightness), "text": WeightedReward(reward=reward)}
    loss = make(RewardMixture(parts))
    loss(latents[:2], torch.arange(2))
    assert loss.collected()["text/text_relevant"][:2].isnan().all()
    assert loss.name_non_finite() == "`text` for rows [0, 1]"


def test_images_that_are_not_finite_are_named_before_rewards(reward, latents):
    parts = {"text": WeightedReward(reward=reward), "root": WeightedReward(reward=undefined)}
    loss = make(RewardMixture(parts))
    latents[1], latents[2, 0, 0, 0] = torch.nan, torch.nan
    losses = loss(latents, torch.arange(4))
    assert losses.isfinite().tolist() == [True, False, False, False]
    expected = "the decoded images for rows [1, 2]; `root` for rows [3]"
    assert loss.name_non_finite() == expected


def test_a_part_is_named_where_its_reward_is_finite(latents):
    class Odd:
        def bind(self, captions):
            def call(images, rows):
                values = images.mean(dim=(1, 2, 3))
                return type(
                    "Terms", (), {"rewards": values, "parts": {"inner": values.detach() / 0}}
                )()

            return call

    loss = make(RewardMixture({"odd": WeightedReward(reward=Odd())}))
    loss(latents[:2], torch.arange(2))
    assert loss.name_non_finite() == "`odd/inner` for rows [0, 1]"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rewards_see_float32_whatever_the_latents(latents, dtype):
    seen = []

    def watched(images, captions):
        seen.append((images.dtype, images.min().item() >= 0, images.max().item() <= 1))
        return brightness(images, captions)

    decoder = TinyDecoder().to(dtype)
    weights = torch.tensor([1.0, 1.0, 0.0, 1.0])
    loss = make(watched, decode=decoder, weights=weights, saturated="pass")
    losses, gradient = differentiate(loss, latents.to(dtype))
    assert seen == [(torch.float32, True, True)]
    assert losses.dtype == torch.float32
    assert gradient.dtype == dtype
    assert gradient[[0, 1, 3]].flatten(1).norm(dim=1).min() > 0
    assert {v.dtype for v in loss.collected().values()} == {torch.float32}


@pytest.mark.parametrize("checkpoint", [False, True])
def test_autocast(make_hugging_face, latents, checkpoint):
    reward = ClipReward(make_hugging_face(), common_direction=BatchDirection(), omega=0.3)
    latents, decoder = latents.float(), TinyDecoder().float()
    expected = differentiate(make(reward, decode=decoder, weights=torch.ones(4)), latents)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = make(reward, decode=decoder, weights=torch.ones(4), checkpoint=checkpoint)
        losses, gradient = differentiate(loss, latents)
    assert losses.dtype == gradient.dtype == torch.float32
    assert not torch.equal(losses, expected[0])
    torch.testing.assert_close(losses, expected[0], rtol=0, atol=0.03)
    # bfloat16 keeps 8 bits.
    assert F.cosine_similarity(gradient.flatten(), expected[1].flatten(), dim=0) > 0.95


def test_a_decoder_without_gradient_is_refused(latents):
    loss = make(decode=lambda latents: DECODE(latents.detach()))
    with pytest.raises(ConfigError, match=r"^expected a decoder with a gradient to the latents; "):
        loss(latents.requires_grad_(), torch.arange(4))


def test_a_part_without_gradient_is_named_at_the_first_call(latents):
    parts = {
        "bright": WeightedReward(reward=brightness),
        "rounded": WeightedReward(
            reward=lambda images, captions: images.round().detach().sum((1, 2, 3))
        ),
    }
    with pytest.raises(
        ConfigError, match=r"^expected values of the reward `rounded` with a gradient"
    ):
        make(RewardMixture(parts))(latents.requires_grad_(), torch.arange(4))


def test_the_hinge_leaves_good_images_alone():
    rewards = torch.tensor([0.1, 0.5, 0.7, math.nan], requires_grad=True)
    losses = RewardObjective(scale=2.0, hinge=0.5).losses(rewards)
    assert losses[:3].tolist() == pytest.approx([0.8, 0.0, 0.0])
    assert losses[3].isnan()
    (gradient,) = torch.autograd.grad(losses[:3].sum(), rewards)
    assert gradient[:3].tolist() == [-2.0, 0.0, 0.0]
    assert RewardObjective(scale=2.0).losses(rewards)[:3].tolist() == pytest.approx(
        [-0.2, -1.0, -1.4]
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scale": 0.0}, "expected a `scale` of the reward above 0; got 0.0;"),
        ({"scale": -1.0}, "above 0; got -1.0;"),
        ({"scale": math.inf}, "above 0; got inf;"),
        ({"hinge": math.nan}, "expected a finite `hinge` of the reward; got nan;"),
    ],
)
def test_objectives_that_cannot_be_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        RewardObjective(**settings)
