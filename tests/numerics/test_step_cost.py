"""FLOPs of a step of reward fine-tuning: pieces, formula, and what the engine really does.

Expected figures are of Stable Diffusion 1.5 at 512 pixels with 480 text tokens, rank 32, and of the
image tower of CLIP-H, on the meta device. Tiny networks run on the CPU, their FLOPs counted too.
"""

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from segalign.diffusion.flop_count import count_flops
from segalign.diffusion.generator import TextToImage
from segalign.diffusion.guidance import Guidance
from segalign.diffusion.latents import PixelUnshuffleCodec
from segalign.diffusion.lora import LoraSettings
from segalign.diffusion.model_sizes import SCHEDULER_CONFIG
from segalign.diffusion.pretrained import PretrainedModel
from segalign.diffusion.rollout import Rollout, RolloutSettings
from segalign.diffusion.sampler import DDIMSampler
from segalign.diffusion.schedule import NoiseSchedule
from segalign.diffusion.step_cost import StepCost, achieved
from segalign.rewards.scorer_source import PretrainedScorer
from segalign.rewards.segment_scorer import SegmentScorer
from segalign.text.conditioning import TextConditioning, TextReport
from segalign.truncation.chain import Chain
from segalign.truncation.denoiser import GuidedDenoiser
from segalign.truncation.draft import DRaFTLV
from segalign.truncation.drtune import DRTune
from segalign.truncation.graph import GraphEngine
from segalign.truncation.penalty import ReferencePenalty, WithoutLora
from segalign.truncation.plan import TruncationPlan
from segalign.truncation.replay import ReplayEngine

pytestmark = pytest.mark.numerics
META = torch.device("meta")
TOLERANCE = 0.005
GUIDANCE = Guidance(scale=7.5)
# Three steps, of which the first and the last are trained.
PLAN = TruncationPlan(num_steps=3, train_steps=(0, 2), last_step=2, detach_input=True)
# On the meta device there are no values that could be checked.
REPLAY, RECORDED = ReplayEngine(check_finite=False), GraphEngine(check_finite=False)


class NoNoise:
    """Noise of a sample, without values of interest."""

    def __init__(self, shape, device):
        self.initial = lambda: torch.zeros(1, *shape, device=device)
        self.of_step = self.of_copy = lambda _: self.initial()


class Model:
    """A network with LoRA, a decoder, an image tower, and their cost."""

    def __init__(self, unet, decode, tower, shape, text_length, schedule):
        self.unet, self.decode, self.tower, self.shape = unet, decode, tower, shape
        self.text_size, self.schedule = (text_length, unet.config.cross_attention_dim), schedule
        self.cost = StepCost.measure(unet, shape, *self.text_size, decode=decode, reward=tower)

    def network(self, latents, timesteps, rows=None):
        text = torch.zeros(len(latents), *self.text_size, device=latents.device)
        return self.unet(latents, timesteps, encoder_hidden_states=text).sample

    def loss(self, latents, rows):
        # The counter does not follow a module whose input is a leaf.
        return self.tower(self.decode(latents + 0)).flatten(1).sum(dim=1)

    def denoiser(self, guidance, network=None):
        network = network or self.network
        return GuidedDenoiser(conditional=network, unconditional=network, guidance=guidance)

    def flops(self, engine, plan, guidance, network=None, **arguments):
        """Count what an engine does for one sample."""
        chain = Chain.of(DDIMSampler(num_inference_steps=plan.num_steps), self.schedule, plan)
        denoiser, noise = self.denoiser(guidance, network), NoNoise(self.shape, self.unet.device)
        with FlopCounterMode(display=False) as counter:
            engine.run(chain, denoiser, noise, self.loss, **arguments)
        return counter.get_total_flops()

    def expected(self, plan, guidance, **arguments):
        timesteps = DDIMSampler(num_inference_steps=plan.num_steps).timesteps(1000)
        return self.cost.for_plan(plan, guidance, timesteps, 1000, **arguments)


def small_unet(**config):
    """No attention: its kernels have other FLOPs on the meta device than elsewhere."""
    torch.manual_seed(0)
    kinds = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    sizes = {"block_out_channels": (8,), "layers_per_block": 1, "norm_num_groups": 4}
    unet = UNet2DConditionModel(
        **{**kinds, **sizes, "mid_block_type": None, "cross_attention_dim": 12, **config}
    )
    LoraSettings(rank=2).add_to(unet)
    return unet


@pytest.fixture(scope="module")
def full():
    bundle = PretrainedModel(init="random", size="sd15").load(META)
    LoraSettings(rank=32).add_to(bundle.unet)
    bundle.codec.vae.requires_grad_(False)
    with META:
        scorer = SegmentScorer(PretrainedScorer(model="vit-h-14", init="random").load())
    scorer.requires_grad_(False)
    decode, tower = bundle.codec.decode, scorer.image_features
    return Model(bundle.unet, decode, tower, (4, 64, 64), 480, bundle.schedule)


@pytest.fixture(scope="module")
def small():
    decode, tower = nn.Conv2d(4, 3, 3).requires_grad_(False), nn.Conv2d(3, 5, 3)
    tower.requires_grad_(False)
    unet = small_unet()
    return Model(unet, decode, tower, (4, 8, 8), 5, NoiseSchedule.from_config(SCHEDULER_CONFIG))


def test_the_pieces_are_those_of_stable_diffusion(full):
    cost = full.cost
    assert cost.forward == pytest.approx(0.837e12, rel=TOLERANCE)
    assert cost.lora == pytest.approx(1.046, rel=TOLERANCE)
    assert cost.backward == pytest.approx(1.232, rel=TOLERANCE)
    assert cost.decode / cost.forward == pytest.approx(6.05, abs=0.01)
    assert cost.reward / cost.forward == pytest.approx(0.81, abs=0.01)


def add_pairs(weight, pairs):
    """Merge without autocast, which the meta device does not know."""
    for up, down in pairs:
        weight = weight + (up.flatten(1) @ down.flatten(1)).view_as(weight)
    return weight


def test_a_replayed_step_does_what_the_formula_says(full, monkeypatch):
    """With the rollout as runs have it: merged adapters, guidance in pairs."""
    monkeypatch.setattr("segalign.diffusion.merged_lora.add_pairs", add_pairs)
    by_hand = full.cost.per_sample([2, 2, 2], [2, 2], merged=True, recompute=True)
    assert full.expected(PLAN, GUIDANCE, merged=True, recompute=True) == by_hand
    embeds = torch.empty(1, *full.text_size, device=META)
    text = TextConditioning(embeds, embeds[..., 0] > 0, None, TextReport((), (), (), ()))
    generator = TextToImage(
        full.unet, None, None, full.schedule, image_size=512, mask_padding=False
    )
    rollout = Rollout(generator, RolloutSettings(merge_lora=True))
    with rollout.denoiser(text, text, GUIDANCE) as lean:
        found = full.flops(REPLAY, PLAN, GUIDANCE, rollout=lean)
    assert found == pytest.approx(by_hand, rel=TOLERANCE)


def test_a_hidden_forward_would_be_seen(small):
    """One call of the network too many is ten times the tolerance, here and at full size."""

    def twice(latents, timesteps, rows=None):
        if not torch.is_grad_enabled() and not calls:
            calls.append(small.network(latents, timesteps))
        return small.network(latents, timesteps)

    calls = []
    expected = small.expected(PLAN, GUIDANCE, merged=False, recompute=True)
    found = small.flops(REPLAY, PLAN, GUIDANCE, twice)
    assert calls
    extra = small.cost.lora * small.cost.forward
    assert extra / expected > 5 * TOLERANCE
    assert found - expected == pytest.approx(extra, rel=1e-6)


@pytest.mark.parametrize(
    ("strategy", "guidance"),
    [
        (DRTune(num_train_steps=2), GUIDANCE),
        (DRTune(num_train_steps=2), Guidance(scale=1.0)),
        (DRTune(num_train_steps=2), Guidance(scale=3.0, interval=(300, 800))),
        (DRTune(num_train_steps=2), Guidance(scale=0.0)),
        (DRTune(num_train_steps=3, early_stop=3), GUIDANCE),
        (DRaFTLV(num_renoised=2), GUIDANCE),
    ],
    ids=["drtune", "no guidance", "guidance interval", "no prompt", "early stop", "re-noised"],
)
def test_a_plan_costs_what_the_engine_does(small, strategy, guidance):
    plans = (strategy.plan(4, seed=0, step=step) for step in range(50))
    stops_early = getattr(strategy, "early_stop", 0) > 0
    plan = next(plan for plan in plans if plan.scores_final != stops_early)
    expected = small.expected(plan, guidance, merged=False, recompute=True)
    assert small.flops(REPLAY, plan, guidance) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("scale", [7.5, 0.0])
def test_a_penalty_costs_the_reference(small, scale):
    guidance = Guidance(scale=scale)
    penalty = ReferencePenalty(
        reference=WithoutLora(small.network, small.unet),
        row_weights=torch.ones(1),
        kind="l2",
        step_scale=torch.ones(1000),
    )
    expected = small.expected(PLAN, guidance, merged=False, recompute=True, penalty=True)
    found = small.flops(REPLAY, PLAN, guidance, penalty=penalty)
    assert found == pytest.approx(expected, rel=1e-6)
    assert expected > small.expected(PLAN, guidance, merged=False, recompute=True)


def test_a_recorded_step_recomputes_nothing_without_checkpoints(small):
    expected = small.expected(PLAN, GUIDANCE, merged=False)
    assert small.flops(RECORDED, PLAN, GUIDANCE) == pytest.approx(expected, rel=1e-6)
    assert expected < small.expected(PLAN, GUIDANCE, merged=False, recompute=True)


@pytest.mark.parametrize(
    ("merged", "recompute", "steps", "trained", "calls", "extra", "in_f"),
    [
        (False, True, 50, 5, 2, 2.23, 137.5),
        (False, True, 50, 5, 2, 0, 135.3),
        (True, True, 50, 5, 2, 0, 129.9),
        (False, False, 50, 5, 2, 0, 124.8),
        (False, True, 25, 5, 2, 0, 82.6),
        (False, True, 8, 2, 1, 0, 19.9),
    ],
)
def test_the_formula_gives_known_steps(merged, recompute, steps, trained, calls, extra, in_f):
    """Published configurations with LoRA on all layers, in units of F; the extra is avoidable."""
    cost = StepCost(forward=2.0, lora=1.054, backward=1.25, decode=2 * 6.05, reward=2 * 0.81)
    found = cost.per_sample(
        [calls] * steps, [calls] * trained, merged=merged, recompute=recompute
    )  # fmt: skip
    assert found / cost.forward + extra == pytest.approx(in_f, abs=0.1)


def test_measuring_leaves_the_run_alone():
    unet = small_unet(in_channels=12, out_channels=12)
    scorer = SegmentScorer(PretrainedScorer(model="tiny", init="random").load())
    unet.train()
    weights = [*unet.named_parameters(), *scorer.named_parameters()]
    before = [(weight.detach().clone(), weight.requires_grad) for _, weight in weights]
    random = torch.get_rng_state()
    cost = StepCost.measure(
        unet,
        (12, 16, 16),
        5,
        12,
        decode=PixelUnshuffleCodec(2).decode,
        reward=[scorer.image_features] * 2,
    )
    after = [*unet.named_parameters(), *scorer.named_parameters()]
    for (_, weight), (_, same), (value, trained) in zip(after, weights, before, strict=True):
        assert weight is same
        assert torch.equal(weight, value)
        assert weight.requires_grad == trained
        assert weight.grad is None
    assert unet.training
    assert torch.equal(torch.get_rng_state(), random)
    # Pixels are moved, and that is all; both towers count.
    assert cost.decode == 0
    image = torch.empty(1, 3, 32, 32, device=META, requires_grad=True)
    once = count_flops(scorer.image_features, image, backward=False)
    assert cost.reward > 3 * once > 0


def test_recomputation_is_left_out():
    unet, latents = small_unet(), torch.empty(1, 4, 8, 8, device=META)
    expected = StepCost.measure(unet, (4, 8, 8), 5, 12)
    unet.enable_gradient_checkpointing()
    assert StepCost.measure(unet, (4, 8, 8), 5, 12) == expected
    vae = PretrainedModel(init="random", size="tiny").load(META).codec.requires_grad_(False)
    latents.requires_grad_()
    expected = count_flops(vae.decode, latents, backward=True)
    vae.vae.enable_gradient_checkpointing()
    assert count_flops(vae.decode, latents, backward=True) == expected
    assert vae.vae.decoder.gradient_checkpointing


def test_a_network_without_lora_is_trained_whole():
    """Two matrix products backward for each forward, but for the input's own gradient."""
    layer = nn.Linear(6, 7, bias=False)
    rows = torch.empty(5, 6, device=META)
    assert count_flops(layer, rows, backward=False) == 2 * 5 * 6 * 7
    assert count_flops(layer, rows, backward=True) == 2 * 5 * 6 * 7
    assert count_flops(layer, rows.requires_grad_(), backward=True) == 2 * 2 * 5 * 6 * 7
    twice = count_flops(lambda x: layer(layer(x).mT @ x), rows, backward=False, networks=[layer])
    assert twice == 2 * 5 * 6 * 7 + 2 * 7 * 5 * 6 + 2 * 7 * 6 * 7


def test_sdxl_conditions_are_given():
    unet = small_unet(
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=30,
    )
    unet.delete_adapters("default")
    unet.requires_grad_(True)
    cost = StepCost.measure(unet, (4, 8, 8), 5, 12)
    assert cost.lora == 1
    assert 1 < cost.backward < 2


def test_a_reward_needs_images():
    with pytest.raises(ValueError, match="expected a decoder"):
        StepCost.measure(small_unet(), (4, 8, 8), 5, 12, reward=nn.Identity())


def test_work_and_time_give_the_share_of_the_peak():
    assert achieved(6e12, 2.0, 10e12) == (3.0, 0.3)
    assert achieved(6e12, 2.0) == (3.0, None)
