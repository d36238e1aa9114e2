"""A tiny generator, decoder and reward in float64, and the gradient of a step written out plainly.

Dims: B = 4 captions, latents (4, 4, 4), images (3, 32, 32).
"""

import copy
import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from diffusers import UNet2DConditionModel
from lightning.pytorch.loggers.logger import Logger
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset
from toy_scorer import toy_caption

from segalign.diffusion.bundle import DiffusionBundle
from segalign.diffusion.generator import TextToImage
from segalign.diffusion.lora import LoraSettings
from segalign.diffusion.model_sizes import draw_weights
from segalign.diffusion.pretrained import PretrainedModel
from segalign.diffusion.sampler import DDIMSampler
from segalign.diffusion.schedule import NoiseSchedule
from segalign.reward_tuning.settings import RewardStepSettings
from segalign.reward_tuning.step import RewardStep
from segalign.rewards.clip_reward import ClipReward
from segalign.rewards.common_direction import BatchDirection
from segalign.rewards.latent_loss import RewardObjective
from segalign.rewards.scorer_source import PretrainedScorer
from segalign.rng import counter_normal
from segalign.text.segmenter import SentenceSegmenter
from segalign.text.settings import TextEncoding

SEED, STEP, IDS, SIDE, OMEGA = 5, 3, [7, 3, 11, 4], 32, 0.3
CAPTIONS = ["A red fox sits. It is night.", "Two owls.", "A green house. A lake.", "Rain. Wind."]
OBJECTIVE = RewardObjective(scale=2.0)
LEVELS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


class ToyCodec(nn.Module):
    """Latents to images of which some pixels are outside [0, 1]."""

    def __init__(self, seed=3):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.first, self.last = nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(8, 3, 3, padding=1)
        self.double().requires_grad_(False)

    def encode(self, images):
        pooled = F.avg_pool2d(images, 8)
        return torch.cat([pooled, pooled[:, :1]], dim=1) - 0.5

    def decode(self, latents):
        wide = F.interpolate(torch.tanh(self.first(latents)), scale_factor=8)
        return 2 * self.last(wide) + 0.5

    def latent_shape(self, height, width):
        return 4, height // 8, width // 8


CODEC = ToyCodec()


@functools.cache
def base():
    """A network smaller yet than the tiny one, and the encoder of that one's text model."""
    unet = UNet2DConditionModel(
        sample_size=4, block_out_channels=(8,), layers_per_block=1, mid_block_type=None,
        down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",),
        cross_attention_dim=32, attention_head_dim=2, norm_num_groups=4,
    )  # fmt: skip
    draw_weights(unet, "unet", seed=0)
    return unet.double(), TextEncoding(token_budget=8).build(text_models())


@functools.cache
def text_models():
    models = PretrainedModel(init="random", size="tiny").load().text_models
    models.text_model.requires_grad_(False)
    return models


@functools.cache
def scorer():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        loaded = PretrainedScorer(model="tiny", init="random").load()
    loaded.model.double()
    return loaded


@functools.cache
def towers():
    return clip_reward().scorer


def clip_reward():
    direction = BatchDirection()
    return ClipReward(
        scorer(), segmenter=SentenceSegmenter(), common_direction=direction, omega=OMEGA
    )


def generator(kind="epsilon", unet=None):
    schedule = NoiseSchedule.from_config(LEVELS | {"prediction_type": kind})
    unet = unet or base()[0].requires_grad_(True)
    return TextToImage(
        unet, base()[1], CODEC, schedule, image_size=SIDE, mask_padding=False
    )  # fmt: skip


def with_lora():
    """A network whose adapters are at work, in float64 as its base."""
    unet = copy.deepcopy(base()[0])
    with torch.random.fork_rng():
        torch.manual_seed(6)
        LoraSettings(rank=2).add_to(unet)
        for name, weight in unet.double().named_parameters():
            if "lora_B" in name:
                nn.init.normal_(weight, std=0.3)
    return unet


def batch(valid=(True, True, True, True)):
    return {
        "sample_ids": torch.tensor(IDS),
        "captions": [c if ok else "" for c, ok in zip(CAPTIONS, valid, strict=True)],
        "valid": torch.tensor(valid),
        "epochs": torch.zeros(4, dtype=torch.int64),
        "metadata": [{}] * 4,
    }


def make_step(
    strategy, *, kind="epsilon", unet=None, reward=None, num_steps=4, scale=3.0, eta=0.0,
    objective=OBJECTIVE, penalty=None, reference=None, decode=None, sampler=None,
    **settings,
):  # fmt: skip
    sampler = sampler or DDIMSampler(
        num_inference_steps=num_steps, guidance_scale=scale, eta=eta
    )  # fmt: skip
    step_settings = RewardStepSettings(
        strategy=strategy, sampler=sampler, objective=objective, **settings
    )
    return RewardStep(
        generator(kind, unet), reward or clip_reward(), step_settings, seed=SEED, decode=decode,
        penalty=penalty, reference=reference,
    )  # fmt: skip


def run(step, data=None, optimizer_step=STEP, **arguments):
    """Run a step on fresh gradients; return those of trained weights by name, and the report."""
    data = data or batch()
    step.generator.unet.zero_grad(set_to_none=True)
    with torch.no_grad():
        text = step.generator.conditioner(data["captions"])
    report = step.run(data, text, optimizer_step, **arguments)
    return gradients(step.generator.unet), report


def gradients(unet):
    return {
        name: torch.zeros_like(weight) if weight.grad is None else weight.grad.clone()
        for name, weight in unet.named_parameters()
        if weight.requires_grad
    }


def largest_difference(ours, expected):
    """Largest relative difference in the L2 norm over the weights."""
    assert ours.keys() == expected.keys()
    assert all(gradient.norm() > 0 for gradient in expected.values())
    return max(
        ((ours[name] - expected[name]).norm() / expected[name].norm()).item() for name in expected
    )


class PlainRun:
    """A step as its equations have it: one recorded run of the whole batch.

    Args:
        step: The step that is written out; nothing of it is called.
        captions: Those of the batch.
        reference: Network calls ``(latents, timesteps, text) -> output``, for penalties.
    """

    def __init__(self, step, captions=CAPTIONS, reference=None):
        self.step, self.unet, self.reference = step, step.generator.unet, reference
        sampler = step.settings.sampler
        self.scale, self.eta = sampler.guidance_scale, sampler.eta
        self.timesteps = sampler.timesteps(1000)
        self.schedule = step.generator.schedule
        with torch.no_grad():
            self.text = base()[1](captions).prompt_embeds.double()
            self.empty = base()[1]([""] * len(captions)).prompt_embeds.double()
        self.captions, self.penalty = captions, torch.zeros((), dtype=torch.float64)

    def noise(self, purpose, *more):
        rows = [(SEED, STEP, sample, *more) for sample in IDS]
        return counter_normal(purpose, rows, (4, 4, 4)).double()

    def gradients(self, loss_of_images, kind=None, weight=0.0):
        """Differentiate the loss of the decoded images, and a penalty on trained outputs."""
        plan = self.step.settings.plan(SEED, STEP)
        latents = self.sample(plan, kind)
        self.latents = latents.detach()
        loss = loss_of_images(CODEC.decode(latents))
        self.unet.zero_grad(set_to_none=True)
        (loss + weight * self.penalty / len(plan.train_steps)).backward()
        return gradients(self.unet)

    def sample(self, plan, kind):
        levels = [float(self.schedule.alphas_cumprod[t]) for t in self.timesteps] + [1.0]
        latents = self.noise("rollout")
        for index, timestep in enumerate(self.timesteps):
            now, then = levels[index], levels[index + 1]
            injected = self.eta * ((1 - then) / (1 - now) * (1 - now / then)) ** 0.5
            alpha, sigma = now**0.5, (1 - now) ** 0.5
            onward = (1 - then - injected**2) ** 0.5 - then**0.5 * sigma / alpha
            seen = latents.detach()
            is_trained = index in plan.train_steps
            with torch.set_grad_enabled(is_trained):
                output = self.output(self.unet, seen, timestep, self.text)
                guided = output
                if self.scale != 1:
                    unguided = self.output(self.unet, seen, timestep, self.empty)
                    guided = unguided + self.scale * (output - unguided)
                noise = self.predicted_noise(guided, seen, alpha, sigma)
            if is_trained and kind is not None:
                self.penalise(kind, output, seen, timestep, self.scale * onward, injected)
            clean = (latents - sigma * noise) / alpha
            if index == plan.last_step:
                return clean
            latents = then**0.5 * clean + (1 - then - injected**2) ** 0.5 * noise
            latents = latents + injected * self.noise("rollout.step", index)
        raise AssertionError

    def output(self, unet, latents, timestep, text):
        timesteps = torch.full((len(latents),), timestep)
        return unet(latents, timesteps, encoder_hidden_states=text).sample

    def predicted_noise(self, output, latents, alpha, sigma):
        if self.schedule.prediction_type == "epsilon":
            return output
        if self.schedule.prediction_type == "v_prediction":
            return sigma * latents + alpha * output
        return (latents - alpha * output) / sigma

    def penalise(self, kind, output, latents, timestep, factor, injected):
        """Add the mean over the batch; ``factor`` is that of the output in the next latents."""
        with torch.no_grad():
            expected = self.reference(latents, timestep, self.text)
        squares = (output - expected).square().flatten(1)
        if kind == "l2":
            self.penalty = self.penalty + squares.mean(1).mean()
        elif injected:
            distances = factor**2 * squares.sum(1)  # between the means of two Gaussians
            self.penalty = self.penalty + (distances / (2 * injected**2)).mean()


def plain_rewards(images, captions=CAPTIONS):
    """Score images by segments, the part along the mean text weighed less."""
    clip = towers()
    with torch.no_grad():
        split = [clip.text_features(clip.split(caption)) for caption in captions]
        texts = torch.stack([segments.mean(0) for segments in split])
        common = F.normalize(texts.mean(0), dim=0)
        texts = texts - (1 - OMEGA) * (texts @ common)[:, None] * common
    return (clip.image_features(images) * texts).sum(1)


def plain_loss(images):
    """Minus twice the mean reward of clamped images."""
    return -2 * plain_rewards(images.clamp(0, 1)).mean()


@dataclass(frozen=True)
class TinyBase:
    """The tiny network in float32, its text model and decoder: the base of a module.

    Args:
        dtype: Precision of the network.
    """

    dtype: torch.dtype = torch.float32

    def load(self):
        unet = copy.deepcopy(base()[0]).requires_grad_(True).to(self.dtype)
        schedule = NoiseSchedule.from_config(LEVELS)
        return DiffusionBundle(unet, text_models(), ToyCodec().float(), schedule, SIDE)


@dataclass(frozen=True)
class ClipSource:
    """The tiny reward in float32.

    Args:
        direction: Makes the estimate of the common direction.
    """

    direction: Callable[[], nn.Module] = BatchDirection

    def load(self):
        own = scorer()._replace(model=copy.deepcopy(scorer().model).float())
        return ClipReward(
            own, segmenter=SentenceSegmenter(), common_direction=self.direction(), omega=OMEGA
        )


@dataclass(frozen=True)
class Known:
    """A source of something that is there already."""

    found: Any

    def load(self):
        return self.found


class Brightness(nn.Module):
    """The mean of an image; notes the gradient mode of its calls."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()), requires_grad=False)
        self.calls = []

    def forward(self, images, captions):
        self.calls.append((torch.is_grad_enabled(), images.requires_grad))
        return self.scale * images.mean(dim=(1, 2, 3))


class CaptionStream(IterableDataset):
    """An endless stream of batches: other captions in each, the same in every run."""

    def __init__(self, first, valid, images):
        self.first, self.valid, self.images = first, valid, images

    def __iter__(self):
        for number in itertools.count(self.first):
            yield self.batch(number)

    def batch(self, number):
        ids = [4 * number + row for row in range(len(self.valid))]
        captions = [toy_caption(row) if ok else "" for row, ok in zip(ids, self.valid, strict=True)]
        made = {
            "sample_ids": torch.tensor(ids),
            "captions": captions,
            "valid": torch.tensor(self.valid),
            "epochs": torch.zeros(len(ids), dtype=torch.int64),
            "metadata": [{}] * len(ids),
        }
        if self.images:
            made["images"] = counter_normal("toy images", [(row,) for row in ids], (3, 32, 32))
        return made


class Captions(pl.LightningDataModule):
    """Batches that depend on the optimizer step alone; further attributes are its settings."""

    def __init__(self, valid=(True,) * 3, *, images=False, **settings):
        super().__init__()
        self.valid, self.images = valid, images
        vars(self).update(settings)

    def train_dataloader(self):
        stream = CaptionStream(self.trainer.global_step, self.valid, self.images)
        return DataLoader(stream, batch_size=None)

    def val_dataloader(self):
        stream = CaptionStream(50, (True, True, False), self.images)
        return DataLoader([stream.batch(50)], batch_size=None)


class Recorder(Logger):
    """Keeps what is logged, by step."""

    def __init__(self):
        super().__init__()
        self.rows = []

    name, version = "recorder", 0

    def log_metrics(self, metrics, step=None):
        self.rows.append({"step": step, **metrics})

    def log_hyperparams(self, *_args, **_settings):
        pass

    def of(self, name):
        return [row[name] for row in self.rows if name in row]
