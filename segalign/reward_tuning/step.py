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
from segalign.reward_tuning.parts import PartOfBatch, cut_batch
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
from segalign.truncation.engine import Backward, GradientReport
from segalign.truncation.noise import CounterNoise
from segalign.truncation.penalty import OutputPenalty, ReferencePenalty, WithoutLora
from segalign.truncation.plan import TruncationPlan
from segalign.truncation.step_norms import StepObserver
from segalign.types import CaptionBatch


@dataclass(frozen=True, eq=False)
class StepReport:
    """What a step found, without gradient.

    Attributes:
        plan: What was trained.
        timesteps: Noise indices of the steps that ran, noisiest first.
        losses: Weighted losses of the images, ``(B,)``; 0 for rows that are not valid.
        renoised_losses: Those of their re-noised copies, ``(n, B)``.
        penalties: Penalties of the trained outputs, ``(B,)``, weighted.
        rewards: Of the images, rewards and their parts by name, ``(B,)`` each; with re-noised
            copies, also ``renoised``, the mean of their rewards.
        factors: By trained step, the factor of its output in the gradient.
        decoder_bias: How the gradient through the decoder compares with that through the model's
            own, for the first images of the batch; None if they are the same, or it was not asked.
        non_finite: Which rewards or penalties were not finite and of which rows, or None; a call,
            because looking waits for the device.
    """

    plan: TruncationPlan
    timesteps: tuple[int, ...]
    losses: Tensor
    renoised_losses: Tensor
    penalties: Tensor
    rewards: dict[str, Tensor]
    factors: dict[int, float]
    decoder_bias: DecoderBias | None
    non_finite: Callable[[], str | None]

    @property
    def totals(self) -> Tensor:
        """Sum of all that is differentiated of a sample, ``(B,)``: finite where all of it is."""
        return self.losses + self.renoised_losses.sum(0) + self.penalties


def _ignore_step(_step_index: int) -> None:
    """Take no notice of a trained step.

    Given where nobody looks, so that looking does not change what is computed at a time.
    """


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
        observer: StepObserver | None = None,
        compare_decoders: bool = False,
    ) -> StepReport:
        """Sample, score and back-propagate.

        Args:
            batch: ``B`` captions; the loss is the sum over valid rows divided by ``B``.
            text: Their conditioning.
            step: The optimizer step.
            backward: Replaces ``Tensor.backward``.
            observer: Looks at the gradient of each trained step. Where the batch is sampled in
                parts, it is restarted for the last and sees that alone; where calls hold several
                trained steps, it sees nothing.
            compare_decoders: Where another decoder is trained through, measure its bias.

        Returns:
            What was found. Values that are not finite are reported, not raised: other ranks wait.

        Raises:
            ConfigError: If a reward gives no gradient, or nothing is trained.
        """
        plan = self.settings.plan(self.seed, step)
        chain = Chain.of(self.settings.sampler, self.generator.schedule, plan)
        set_step(self.reward, step)
        weights = batch["valid"].to(self._dtype) / len(batch["valid"])
        make_loss = self._loss_maker(batch, weights)
        loss = make_loss(decode=self.decode)
        parts = self._cut(batch, text, weights)
        reports = []
        for part in parts:
            after_step: Callable[[int], None] = _ignore_step
            if observer is not None and part is parts[-1]:
                observer.restart()
                after_step = observer
            reports.append(self._run_part(part, chain, loss, step, backward, after_step))
        penalties = torch.cat([report.penalties for report in reports])
        return StepReport(
            plan=plan,
            timesteps=tuple(chain.timesteps),
            losses=torch.cat([report.losses for report in reports]),
            renoised_losses=torch.cat([report.renoised_losses for report in reports], dim=1),
            penalties=penalties,
            rewards=_rewards(loss, plan),
            factors=reports[0].factors,
            decoder_bias=self._decoder_bias(make_loss, reports[0]) if compare_decoders else None,
            non_finite=partial(_name_non_finite, loss, penalties, batch["valid"]),
        )

    def _loss_maker(self, batch: CaptionBatch, weights: Tensor) -> Callable[..., LatentRewardLoss]:
        """Bind the reward to the whole batch; what is made needs a decoder yet."""
        return partial(
            LatentRewardLoss,
            bound=bind_reward(self.reward, batch["captions"], counted=batch["valid"]),
            objective=self.settings.objective,
            weights=weights,
            checkpoint=self.settings.memory.checkpoint_decode,
            saturated=self.settings.saturated,
        )

    def _cut(
        self, batch: CaptionBatch, text: TextConditioning, weights: Tensor
    ) -> list[PartOfBatch]:
        """Cut the batch; the negative prompt is encoded once, where guidance is on."""
        negative = None
        if self.settings.sampler.guidance.scale != 1:
            with torch.no_grad():
                negative = self.generator.conditioner.encode_empty(1)
        size = self.settings.memory.rollout_batch_size
        return cut_batch(batch["sample_ids"].tolist(), text, negative, weights, size)

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
        denoiser = self._denoiser(part.text, part.negative, guidance)
        with self.rollout.denoiser(part.text, part.negative, guidance) as rollout:
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
            sample_ids=part.sample_ids,
            latent_shape=self.generator.codec.latent_shape(side, side),
            device=part.weights.device,
            dtype=self._dtype,
        )

    @property
    def _dtype(self) -> torch.dtype:
        """Number type of latents and losses: float32, or the network's where that is wider."""
        return torch.promote_types(self.generator.unet.dtype, torch.float32)


def _rewards(loss: LatentRewardLoss, plan: TruncationPlan) -> dict[str, Tensor]:
    """Collect rewards and parts of the images, and the rewards of their copies if there are any."""
    copies = {"renoised": loss.renoised()} if plan.num_renoised else {}
    return loss.collected() | copies


def _name_non_finite(loss: LatentRewardLoss, penalties: Tensor, valid: Tensor) -> str | None:
    """Say what was not finite, and for which rows; waits for the device."""
    found = [] if (named := loss.name_non_finite()) is None else [f"the reward: {named}"]
    rows = (valid & ~penalties.isfinite()).nonzero().flatten().tolist()
    if rows:
        found.append(f"the penalty for rows {rows}")
    return "; ".join(found) or None
