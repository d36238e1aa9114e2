"""The gradient of one optimizer step of reward fine-tuning.

Sample without gradient, decode and score, and back-propagate to the trained steps, a part of the
batch after the other.

Dims: B batch, n samples of a part, c/h/w latents.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from segalign.diffusion.generator import TextToImage
from segalign.diffusion.guidance import Guidance
from segalign.diffusion.rollout import Rollout
from segalign.diffusion.tiny_decoder import DecoderBias, decoder_bias
from segalign.reward_tuning.settings import (
    PenaltySettings,
    RewardStepSettings,
    check_penalty,
    choose_engine,
)
from segalign.rewards.bound_reward import bind_reward
from segalign.rewards.latent_loss import LatentRewardLoss
from segalign.rewards.protocol import Reward, set_step
from segalign.text.conditioning import TextConditioning
from segalign.truncation.chain import Chain
from segalign.truncation.denoiser import GuidedDenoiser, RowNetwork, TextNetwork
from segalign.truncation.engine import Backward, GradientReport, row_chunks
from segalign.truncation.noise import CounterNoise
from segalign.truncation.penalty import OutputPenalty, ReferencePenalty, WithoutLora
from segalign.truncation.plan import TruncationPlan
from segalign.types import CaptionBatch


@dataclass(frozen=True, eq=False)
class StepReport:
    """What a step found, without gradient.

    Attributes:
        plan: What was trained.
        timesteps: Noise indices of the steps that ran, noisiest first.
        losses: Weighted losses of the objective, ``(B,)``; 0 for rows that are not valid.
        penalties: Penalties of the trained outputs, ``(B,)``, weighted.
        rewards: Rewards and their parts by name, ``(B,)`` each.
        factors: By trained step, the factor of its output in the gradient.
        decoder_bias: How the gradient through the decoder compares with that through the model's
            own, for the first images of the batch; None if they are the same, or it was not asked.
        non_finite: Which rewards were not finite and of which rows, or None; a call, because
            looking waits for the device.
    """

    plan: TruncationPlan
    timesteps: tuple[int, ...]
    losses: Tensor
    penalties: Tensor
    rewards: dict[str, Tensor]
    factors: dict[int, float]
    decoder_bias: DecoderBias | None
    non_finite: Callable[[], str | None]


@dataclass(frozen=True, eq=False)
class PartOfBatch:
    """The samples of a batch that are sampled at a time.

    Attributes:
        text: Their conditioning, ``n`` captions.
        sample_ids: int64 ``(n,)``.
        rows: Where they stand in the batch, int64 ``(n,)``.
        weights: Factors of their losses, ``(n,)``.
    """

    text: TextConditioning
    sample_ids: Tensor
    rows: Tensor
    weights: Tensor


def ignore_step(_step_index: int) -> None:
    """Take no notice of a trained step: see ``after_step``."""


class RewardStep:
    """Adds the gradient of a batch's mean loss to ``.grad`` of the generator's trained weights.

    Args:
        generator: The trained model.
        reward: What is maximised.
        settings: See ``RewardStepSettings``.
        seed: Seeds the trained steps and the noise of the rollouts.
        decode: From latents to images; None is the generator's own codec.
        penalty: Keeps trained outputs near those of the start; None does not.
        reference: The start, frozen; None is the generator without its adapters.
    """

    def __init__(
        self,
        generator: TextToImage,
        reward: Reward,
        settings: RewardStepSettings,
        *,
        seed: int,
        decode: Callable[[Tensor], Tensor] | None = None,
        penalty: PenaltySettings | None = None,
        reference: TextToImage | None = None,
    ) -> None:
        self.generator = generator
        self.reward = reward
        self.settings = settings
        self.seed = seed
        self.decode = decode or generator.codec.decode
        check_penalty(penalty, settings)
        self.penalty = penalty
        self.reference = reference
        self.rollout = Rollout(generator, settings.rollout)

    def run(
        self,
        batch: CaptionBatch,
        text: TextConditioning,
        step: int,
        *,
        backward: Backward | None = None,
        after_step: Callable[[int], None] = ignore_step,
        compare_decoders: bool = False,
    ) -> StepReport:
        """Sample, score and back-propagate.

        Args:
            batch: ``B`` captions; the loss is the sum over valid rows divided by ``B``.
            text: Their conditioning.
            step: The optimizer step.
            backward: Replaces ``Tensor.backward``.
            after_step: See ``GradientEngine``. Where the batch is sampled in parts, it sees the
                last part alone; where calls hold several trained steps, nothing.
            compare_decoders: Where another decoder is trained through, measure its bias.

        Returns:
            What was found. Values that are not finite are reported, not raised: other ranks wait.

        Raises:
            ConfigError: If a reward gives no gradient, or nothing is trained.
        """
        settings = self.settings
        plan = settings.plan(self.seed, step)
        chain = Chain.of(settings.sampler, self.generator.schedule, plan)
        set_step(self.reward, step)
        weights = batch["valid"].to(self._dtype) / len(batch["valid"])
        make_loss = partial(
            LatentRewardLoss,
            bound=bind_reward(self.reward, batch["captions"]),
            objective=settings.objective,
            weights=weights,
            checkpoint=settings.memory.checkpoint_decode,
            saturated=settings.saturated,
        )
        loss = make_loss(decode=self.decode)
        parts = [
            PartOfBatch(text.select(rows), batch["sample_ids"][rows], rows, weights[rows])
            for rows in row_chunks(len(weights), settings.memory.rollout_batch_size, weights.device)
        ]
        reports = [
            self._run_part(
                part, chain, loss, step, backward, after_step if part is parts[-1] else ignore_step
            )
            for part in parts
        ]
        return StepReport(
            plan=plan,
            timesteps=tuple(chain.timesteps),
            losses=torch.cat([report.losses for report in reports]),
            penalties=torch.cat([report.penalties for report in reports]),
            rewards=loss.collected(),
            factors=reports[0].factors,
            decoder_bias=self._decoder_bias(make_loss, reports[0]) if compare_decoders else None,
            non_finite=loss.name_non_finite,
        )

    def _decoder_bias(
        self, make_loss: Callable[..., LatentRewardLoss], report: GradientReport
    ) -> DecoderBias | None:
        """Compare decoders on as many images as are decoded at a time."""
        own = self.generator.codec.decode
        if self.decode == own:
            return None
        latents = report.latents[: self.settings.memory.decode_batch_size]
        rows = torch.arange(len(latents), device=latents.device)
        return decoder_bias(make_loss(decode=own), make_loss(decode=self.decode), latents, rows)

    def _run_part(
        self,
        part: PartOfBatch,
        chain: Chain,
        loss: LatentRewardLoss,
        step: int,
        backward: Backward | None,
        after_step: Callable[[int], None],
    ) -> GradientReport:
        settings, guidance = self.settings, self.settings.sampler.guidance
        engine = choose_engine(
            settings.engine, chain.plan, settings.memory, is_linear=settings.is_linear
        )
        negative = None
        if guidance.scale != 1:
            negative = self.generator.conditioner.encode_empty(len(part.rows))
        denoiser = self._denoiser(part.text, negative, guidance)
        with self.rollout.denoiser(part.text, negative, guidance) as rollout:
            return engine.run(
                chain,
                denoiser,
                self._noise(part, step),
                lambda latents, rows: loss(latents, part.rows[rows]),
                rollout=rollout,
                backward=backward,
                after_step=after_step if settings.memory.is_step_alone(len(part.rows)) else None,
                penalty=self._output_penalty(part, chain, denoiser),
            )

    def _denoiser(
        self, text: TextConditioning, negative: TextConditioning | None, guidance: Guidance
    ) -> GuidedDenoiser:
        predict = self.generator.predict
        return GuidedDenoiser(
            conditional=TextNetwork(predict, text),
            unconditional=None if negative is None else TextNetwork(predict, negative),
            guidance=guidance,
            num_timesteps=self.generator.schedule.num_timesteps,
        )

    def _output_penalty(
        self, part: PartOfBatch, chain: Chain, denoiser: GuidedDenoiser
    ) -> OutputPenalty | None:
        if self.penalty is None:
            return None
        generator = self.reference or self.generator
        network: RowNetwork = TextNetwork(generator.predict, part.text)
        if self.reference is None:
            network = WithoutLora(network, generator.unet)
        return ReferencePenalty.of(
            chain,
            denoiser,
            network,
            part.weights,
            weight=self.penalty.weight,
            kind=self.penalty.kind,
        )

    def _noise(self, part: PartOfBatch, step: int) -> CounterNoise:
        side = self.generator.image_size
        return CounterNoise(
            seed=self.seed,
            step=step,
            sample_ids=part.sample_ids.tolist(),
            latent_shape=self.generator.codec.latent_shape(side, side),
            device=part.weights.device,
            dtype=self._dtype,
        )

    @property
    def _dtype(self) -> torch.dtype:
        """Number type of latents and losses: float32, or the network's where that is wider."""
        return torch.promote_types(self.generator.unet.dtype, torch.float32)
