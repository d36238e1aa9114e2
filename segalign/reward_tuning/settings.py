"""Settings of a reward fine-tuning step."""

from dataclasses import dataclass, field
from typing import Literal

from segalign.diffusion.clipped_sampler import ClippedSampler
from segalign.diffusion.rollout import RolloutSettings
from segalign.diffusion.sampler import DDIMSampler
from segalign.diffusion.scheduler_sampler import Sampler
from segalign.errors import ConfigError
from segalign.rewards.latent_loss import RewardObjective, Saturated
from segalign.truncation.drtune import DRTune
from segalign.truncation.engine import GradientEngine, check_sizes
from segalign.truncation.graph import GraphEngine
from segalign.truncation.penalty import PenaltyKind, check_penalty_settings
from segalign.truncation.plan import TruncationPlan, TruncationStrategy
from segalign.truncation.replay import ReplayEngine

EngineName = Literal["auto", "replay", "graph"]


@dataclass(frozen=True, kw_only=True)
class PenaltySettings:
    """Keep the trained outputs near those of a reference.

    Over adapters it is the network without them, else the network that the run started from.

    Args:
        kind: ``l2``, the mean squared difference; or ``kl``, the divergence of the sampler's
            steps, for samplers that inject noise.
        weight: Factor, at least 0; the penalty is a mean over the trained steps.

    Raises:
        ConfigError: If a setting is out of its range.
    """

    kind: PenaltyKind = "l2"
    weight: float = 1.0

    def __post_init__(self) -> None:
        """Check the settings."""
        check_penalty_settings(self.kind, self.weight)


@dataclass(frozen=True, kw_only=True)
class StepMemory:
    """What is computed at a time: less memory for smaller numbers, the same gradient.

    Args:
        rollout_batch_size: Samples of a rank that are sampled at a time; null samples all.
        replay_batch_size: Pairs of a sample and a trained step in one replayed call; null is the
            number of samples. Of the graph engine: samples that are recorded at a time.
        decode_batch_size: Images that are decoded and scored at a time; null is all.
        checkpoint_decode: Decode again in the backward pass instead of keeping activations.
        checkpoint_steps: The same for trained steps of the graph engine; replay keeps none.

    Raises:
        ConfigError: If a size is below 1.
    """

    rollout_batch_size: int | None = None
    replay_batch_size: int | None = None
    decode_batch_size: int | None = None
    checkpoint_decode: bool = False
    checkpoint_steps: bool = True

    def __post_init__(self) -> None:
        """Check the sizes."""
        check_sizes(
            rollout_batch_size=self.rollout_batch_size,
            replay_batch_size=self.replay_batch_size,
            decode_batch_size=self.decode_batch_size,
        )

    def is_step_alone(self, num_samples: int) -> bool:
        """Tell whether a replayed call holds pairs of one trained step alone."""
        return self.replay_batch_size is None or self.replay_batch_size <= num_samples


def choose_engine(
    name: EngineName, plan: TruncationPlan, memory: StepMemory, *, is_linear: bool
) -> GradientEngine:
    """Choose the engine of a plan; values that are not finite are the caller's to find.

    Args:
        name: ``auto`` is exact replay where it serves the plan and the sampler, else the graph.
        plan: What is trained in this step.
        memory: Sizes of its batches.
        is_linear: Whether the sampler is linear in the network's outputs.

    Raises:
        ConfigError: If ``replay`` is asked for and cannot serve them.
    """
    can_replay = plan.replayable and is_linear
    if name == "replay" and not can_replay:
        cause = (
            "comes with a sampler that clips, or guidance that is rescaled"
            if plan.replayable
            else "attaches inputs"
        )
        raise ConfigError(
            f"expected a strategy that `engine: replay` can serve; got one that {cause}; set "
            "`engine` to `graph`, or leave it out"
        )
    if name != "graph" and can_replay:
        return ReplayEngine(
            micro_batch_size=memory.replay_batch_size,
            loss_batch_size=memory.decode_batch_size,
            check_finite=False,
        )
    return GraphEngine(
        checkpoint=memory.checkpoint_steps,
        micro_batch_size=memory.replay_batch_size,
        loss_batch_size=memory.decode_batch_size,
        check_finite=False,
    )


# Optimizer steps that tell a strategy of the last step alone from one that drew it by chance.
_PEEKED_STEPS = 16


@dataclass(frozen=True, kw_only=True)
class RewardStepSettings:
    """How a step samples, what it trains and what it computes at a time.

    Args:
        strategy: Which sampling steps are trained.
        sampler: How images are sampled for training; one that is linear, or that clips.
        objective: From rewards to losses.
        engine: ``auto`` replays wherever that is exact.
        memory: Batches and checkpointing.
        rollout: Merged adapters, cached text and compilation of the steps without gradient.
        saturated: Gradient of pixels outside [0, 1].

    Raises:
        ConfigError: If the strategy does not fit the sampler's number of steps.
    """

    strategy: TruncationStrategy = field(default_factory=DRTune)
    sampler: Sampler
    objective: RewardObjective = field(default_factory=RewardObjective)
    engine: EngineName = "auto"
    memory: StepMemory = field(default_factory=StepMemory)
    rollout: RolloutSettings = field(default_factory=RolloutSettings)
    saturated: Saturated = "zero"

    def __post_init__(self) -> None:
        """Find out early what no step could do."""
        plan = self.plan(0, 0)
        choose_engine(self.engine, plan, self.memory, is_linear=self.is_linear)

    def plan(self, seed: int, step: int) -> TruncationPlan:
        """Decide what an optimizer step trains."""
        return self.strategy.plan(self.sampler.num_inference_steps, seed, step)

    @property
    def is_linear(self) -> bool:
        """Whether the images are linear in the network's outputs, guidance included."""
        return not (isinstance(self.sampler, ClippedSampler) or self.sampler.guidance.rescale)


def check_penalty(penalty: PenaltySettings | None, settings: RewardStepSettings) -> None:
    """Refuse a divergence where there is none: without noise, and at the last step.

    Raises:
        ConfigError: If the sampler injects no noise, is not linear, or the strategy never trains
            another step.
    """
    if penalty is None or penalty.kind != "kl":
        return
    sampler = settings.sampler
    if not (settings.is_linear and isinstance(sampler, DDIMSampler) and sampler.eta > 0):
        raise ConfigError(
            "expected DDIM with `eta` > 0, and guidance without `rescale`, for a penalty of kind "
            f"`kl`; got {sampler}; raise `eta`, or use kind `l2`"
        )
    plans = [settings.plan(0, step) for step in range(_PEEKED_STEPS)]
    if all(plan.train_steps == (plan.last_step,) for plan in plans):
        raise ConfigError(
            "expected a strategy that trains steps with injected noise for a penalty of kind `kl`; "
            f"got `{type(settings.strategy).__name__}`, which trains the last one alone; use kind "
            "`l2`"
        )
