"""One optimizer step's gradient against the official LongAlign code (commit 61a1021), as numbers.

Golden G5: the official loops ran as published on tiny models, float32. The relative errors allowed
in the L2 norm, 1e-5 for forward values and 5e-5 for gradients, are the golden files' suggestion.
"""

import json
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file
from transformers import CLIPConfig, CLIPModel

from segalign.diffusion.guidance import Guidance
from segalign.diffusion.latents import VAECodec
from segalign.diffusion.lora import LoraSettings
from segalign.diffusion.sampler import DDIMSampler
from segalign.diffusion.schedule import NoiseSchedule
from segalign.formats.clip_scorer import ClipScorer, ImageSettings
from segalign.formats.official_lora import match_official_lora
from segalign.formats.peft_lora import fill_lora
from segalign.rewards.clip_reward import ClipReward
from segalign.rewards.common_direction import BatchDirection
from segalign.text.adapter import TextAdapter
from segalign.text.segmenter import OfficialSegmenter
from segalign.text.tokenizer import clip_tokenizer
from segalign.truncation.chain import Chain
from segalign.truncation.denoiser import GuidedDenoiser
from segalign.truncation.drtune import DRTune, LongAlign
from segalign.truncation.graph import GraphEngine
from segalign.truncation.replay import ReplayEngine

pytestmark = pytest.mark.numerics

GOLDEN = Path(__file__).parents[1] / "golden"
G5 = json.loads((GOLDEN / "g5_reward_loop.json").read_text())
FORWARD, GRADIENT = 1e-5, 5e-5
CAPTIONS = [
    "".join(
        s for s, i in zip(G5["caption_split"], G5["caption_index"], strict=True) if i == caption
    )
    for caption in (0, 1)
]
REPLAY = ReplayEngine(micro_batch_size=3)


def weights(name):
    return {key: tensor.float() for key, tensor in load_file(GOLDEN / name).items()}


@pytest.fixture(scope="module")
def golden():
    return load_file(GOLDEN / "g5_reward_loop.safetensors")


@pytest.fixture(scope="module")
def reward():
    stored = weights("scorer_clip.safetensors")
    name = "text_model.embeddings.token_embedding.weight"
    rows = stored.pop(f"{name}.rows")
    stored[name] = torch.zeros(49408, rows.shape[1])
    stored[name][stored.pop(f"{name}.ids").long()] = rows
    model = CLIPModel(CLIPConfig(**G5["scorer_config"]))
    assert not model.load_state_dict(stored, strict=False).unexpected_keys
    return ClipReward(
        ClipScorer(model, clip_tokenizer(), ImageSettings()),
        segmenter=OfficialSegmenter(),
        common_direction=BatchDirection(),
        omega=G5["reweight"],
        resize="bilinear",
    )


@pytest.fixture(scope="module")
def codec():
    vae = AutoencoderKL(**G5["vae_config"]).eval().requires_grad_(False)
    found = vae.load_state_dict(weights("vae_decoder.safetensors"), strict=False)
    assert not found.unexpected_keys
    assert all(name.startswith(("encoder.", "quant_conv.")) for name in found.missing_keys)
    return VAECodec(vae)


@pytest.fixture
def unet():
    unet = UNet2DConditionModel(**G5["unet_config"]).eval()
    unet.load_state_dict(weights("unet.safetensors"))
    return unet


@pytest.fixture(scope="module")
def contexts(golden):
    """Text features of the captions and of the empty caption: CLIP's, then T5's, adapted."""
    sizes = G5["adapter_config"]
    adapter = TextAdapter(sizes["in_dim"], sizes["int_dim"], sizes["out_dim"]).eval()
    adapter.load_state_dict(weights("adapter.safetensors"))
    with torch.no_grad():
        return [
            torch.cat([golden[f"{prefix}clip"], adapter(golden[f"{prefix}t5"])], dim=1)
            for prefix in ("", "uncond_")
        ]


class StoredNoise:
    """The noise that the official loop drew."""

    def __init__(self, golden):
        self.initial = lambda: golden["noise_init"]
        self.of_step = lambda index: golden["lcm4.step_noise"][index]


class RewardLoss:
    """The official loss, and what it went through.

    Its last term is a constant; a row's share of the mean is its own loss.
    """

    def __init__(self, codec, reward):
        self.codec, self.reward = codec, reward
        self.scores = self.images = None

    def __call__(self, latents, rows):
        self.latents = latents
        latents.register_hook(lambda gradient: setattr(self, "gradient", gradient))
        self.images = self.codec.decode(latents).clamp(0, 1)
        self.scores = self.reward(self.images, [CAPTIONS[row] for row in rows])
        constant = 0.09 * (1 - G5["reweight"])
        return ((1 - self.scores) * 0.5 - constant) / len(CAPTIONS)


def run(engine, unet, contexts, loss, golden, chain, scale):
    def network(context):
        def call(latents, timesteps, rows=None):
            text = context if rows is None else context[rows]
            return unet(latents, timesteps, encoder_hidden_states=text).sample

        return call

    denoiser = GuidedDenoiser(
        conditional=network(contexts[0]),
        unconditional=network(contexts[1]),
        guidance=Guidance(scale=scale),
    )
    return engine.run(chain, denoiser, StoredNoise(golden), loss)


def chain_of(case, strategy, sampler):
    """Take the official's trained timesteps: the plan of the step that draws them."""
    schedule = NoiseSchedule.from_config(G5["scheduler_config"])
    timesteps = sampler.timesteps(schedule.num_timesteps)
    expected = tuple(timesteps.index(t) for t in G5["cases"][case]["time_bp"])
    plans = (strategy.plan(sampler.num_inference_steps, 0, step) for step in range(500))
    return Chain.of(sampler, schedule, next(p for p in plans if p.train_steps == expected))


def relative_error(ours, golden):
    return ((ours - golden).norm() / golden.norm()).item()


def check_case(case, report, loss, gradients, golden):
    """Compare whatever is stored of a case."""
    described = G5["cases"][case]
    assert relative_error(report.latents, golden[f"{case}.pred_x_0_latent"]) < FORWARD
    assert relative_error(report.losses.sum(), golden[f"{case}.loss"].sum()) < FORWARD
    assert (loss.scores - golden[f"{case}.score"]).abs().max() < 1e-6
    if f"{case}.image" in golden:
        assert relative_error(loss.images, golden[f"{case}.image"]) < FORWARD
    at_decoder = loss.gradient * G5["vae_config"]["scaling_factor"]
    assert relative_error(at_decoder, golden[f"{case}.vae_in_grad"]) < GRADIENT
    assert gradients.keys() == described["grad_norms"].keys()
    total = described["total_grad_norm"]
    for name, norm in described["grad_norms"].items():
        # A few biases only shift what a normalisation takes away: rounding alone, so absolute.
        assert gradients[name].norm().item() == pytest.approx(norm, rel=GRADIENT, abs=1e-7 * total)
    stored = [name for name in golden if name.startswith(f"{case}.grad.")]
    assert stored
    for name in stored:
        ours = gradients[name.removeprefix(f"{case}.grad.")]
        assert relative_error(ours, golden[name]) < GRADIENT
    found = torch.stack([gradient.norm() for gradient in gradients.values()]).norm().item()
    assert found == pytest.approx(total, rel=GRADIENT)


@pytest.mark.parametrize(
    ("case", "engine"),
    [
        ("full.rs0", REPLAY),
        ("full.rs3", REPLAY),
        ("full.rs9", REPLAY),
        ("full.rs0", GraphEngine()),
    ],
    ids=["first-replay", "fourth-replay", "last-replay", "first-graph"],
)
def test_gradients_of_all_weights(unet, contexts, codec, reward, golden, case, engine):
    """For the first, fourth and last of the ten offsets."""
    seen = []
    unet.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    loss = RewardLoss(codec, reward)
    chain = chain_of(case, LongAlign(), DDIMSampler(num_inference_steps=50))
    report = run(engine, unet, contexts, loss, golden, chain, G5["guidance"])
    gradients = {name: weight.grad for name, weight in unet.named_parameters()}
    check_case(case, report, loss, gradients, golden)
    for name in (name for name in golden if name.startswith(f"{case}.x_in_step")):
        # Two calls a step: with the captions, and without.
        assert relative_error(seen[2 * int(name[-2:])], golden[name]) < FORWARD


def test_gradients_of_a_lora(unet, contexts, codec, reward, golden):
    loss = RewardLoss(codec, reward)
    unet.requires_grad_(False)
    pairs = match_official_lora(list(load_file(GOLDEN / "lora_g5_g8.safetensors").values()), unet)
    LoraSettings(rank=G5["lora_rank"]).add_to(unet)
    fill_lora(unet, pairs)
    chain = chain_of("lora.rs3", LongAlign(), DDIMSampler(num_inference_steps=50))
    report = run(REPLAY, unet, contexts, loss, golden, chain, G5["guidance"])
    gradients = {
        name.replace("lora_A.default", "lora_down").replace("lora_B.default", "lora_up"): w.grad
        for name, w in unet.named_parameters()
        if w.requires_grad
    }
    check_case("lora.rs3", report, loss, gradients, golden)


@pytest.mark.parametrize("engine", [REPLAY, GraphEngine()], ids=["replay", "graph"])
def test_gradients_of_the_four_step_loop(unet, contexts, codec, reward, golden, engine):
    """Consistency sampling: no guidance, every clean prediction noised anew, all steps trained."""
    loss = RewardLoss(codec, reward)
    sampler = DDIMSampler(num_inference_steps=4, eta=float("inf"))
    chain = chain_of("lcm4", DRTune(num_train_steps=4), sampler)
    report = run(engine, unet, contexts, loss, golden, chain, scale=1.0)
    gradients = {name: weight.grad for name, weight in unet.named_parameters()}
    check_case("lcm4", report, loss, gradients, golden)
