"""Watch a run for signs that it climbs its reward at the cost of its images."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import lightning.pytorch as pl
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.trainer.states import TrainerFn
from typing_extensions import override

from callbacks.image_metric import ImageMetricCallback
from callbacks.outcome_log import evaluation_folder
from segalign.evaluation.evaluator import Outcome
from segalign.evaluation.hacking_rule import HackingRule, Verdict
from segalign.evaluation.hacking_settings import HackingSettings
from segalign.evaluation.history import StepRecords
from segalign.evaluation.image_metric import ImageMetric
from segalign.evaluation.reading import Reading
from segalign.metrics.fixed_directions import clip_rewards
from segalign.metrics.image_similarity import ImageSimilarity
from segalign.metrics.image_statistics import ImageStatistics
from segalign.metrics.reward_means import RewardMetric, ScoreImages
from segalign.rewards.protocol import Reward

SUSPECTED = "reward_hacking_suspected"
_logger = logging.getLogger(__name__)


@runtime_checkable
class Rewarded(Protocol):
    """A module that scores images by the reward that it is trained on, and by others."""

    score_images: ScoreImages
    reward: Reward
    held_out: Mapping[str, Reward]


class OverfitMonitor(ImageMetricCallback):
    """Log what tells over-fitting from learning, and raise ``reward_hacking_suspected``.

    At every evaluation: the trained and the held-out rewards, how alike images of different
    captions are, how alike images are to the common direction of captions, sharpness and other
    statistics of images; with `callbacks.lpips.LPIPS` among the callbacks, diversity and drift are
    heard too. `segalign.evaluation.hacking_rule` says when a run is suspected: its evaluation then
    logs ``val/reward_hacking_suspected`` as 1 (else 0), and a warning says why.

    Args:
        stop: End the training when the run is suspected.
        rule: What is watched, and the thresholds; null are those set on the embedded benchmark.
    """

    def __init__(self, stop: bool = False, rule: HackingSettings | None = None) -> None:
        super().__init__()
        self.stop = stop
        self.rule = HackingRule(rule)
        self.verdict: Verdict | None = None
        self._is_checked = False

    @override
    def make_metrics(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule
    ) -> Sequence[ImageMetric]:
        metrics: list[ImageMetric] = [ImageStatistics()]
        if isinstance(pl_module, Rewarded):
            rewards = {
                "reward": pl_module.reward,
                **{f"held_out/{name}": one for name, one in pl_module.held_out.items()},
            }
            metrics.append(RewardMetric(pl_module.score_images, rewards))
            # One that embeds images and captions in one space; the trained one first.
            metrics += [ImageSimilarity(one) for one in clip_rewards(rewards).values()][:1]
        return metrics

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Go on from the last evaluation that came before this step.

        A checkpoint is taken before the validation of its step, so that it knows less than the run
        directory does.
        """
        if not trainer.global_step:
            return
        known: dict[str, Any] = {}
        if trainer.is_global_zero:
            states = _records(trainer).read()
            steps = [step for step in states if step <= trainer.global_step]
            known = states[steps[-1]] if steps else {}
        known = trainer.strategy.broadcast(known)
        if known:
            self.rule.load_state_dict(known)

    @override
    def on_outcome(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outcome: Outcome
    ) -> None:
        """Judge an evaluation of the training; every rank finds the same."""
        if trainer.state.fn != TrainerFn.FITTING:
            return
        if not self._is_checked and trainer.is_global_zero:
            self._warn_of_absent(outcome)
        self._is_checked = True
        self.verdict = self.rule.judge(_reading(trainer.global_step, outcome))
        for logger in trainer.loggers:
            logger.log_metrics(
                {f"val/{SUSPECTED}": float(self.verdict.suspected)}, step=trainer.global_step
            )
        if trainer.is_global_zero and not getattr(trainer, "fast_dev_run", False):
            _records(trainer).write(trainer.global_step, self.rule.state_dict())
        if self.verdict.is_new:
            self._say(trainer, self.verdict)
        if self.verdict.suspected and self.stop:
            trainer.should_stop = True

    def _warn_of_absent(self, outcome: Outcome) -> None:
        """Say what is to be watched, and cannot be."""
        watched, usual = self.rule.settings, HackingSettings()
        if watched.reward not in outcome.values:
            _logger.warning(
                "the over-fitting monitor will suspect nothing: there is no `%s`; it is for "
                "modules that are trained on a reward",
                watched.reward,
            )
        for field in ("diversity", "drift", "cross_prompt", "to_v"):
            name = getattr(watched, field)
            if name != getattr(usual, field) and name not in outcome.values:
                _logger.warning(
                    "the over-fitting monitor's `rule.%s` is `%s`, and there is none: known are %s",
                    field,
                    name,
                    ", ".join(sorted(outcome.values)),
                )

    def _say(self, trainer: pl.Trainer, verdict: Verdict) -> None:
        reasons = "; ".join(verdict.reasons)
        text = f"{SUSPECTED} at step {verdict.step}, since step {verdict.since}: {reasons}"
        if trainer.is_global_zero:
            _logger.warning("%s%s", text, "; the training ends" if self.stop else "")
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_text(SUSPECTED, text, verdict.step)

    @override
    def state_dict(self) -> dict[str, Any]:
        """Keep what later evaluations are held against."""
        return self.rule.state_dict()

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rule.load_state_dict(state_dict)


def _records(trainer: pl.Trainer) -> StepRecords:
    """Name the file of the rule's states."""
    return StepRecords(evaluation_folder(trainer) / "monitor.jsonl", "state")


def _reading(step: int, outcome: Outcome) -> Reading:
    per_image = {
        name: values
        for findings in outcome.findings.values()
        for name, values in findings.per_image.items()
    }
    per_caption = outcome.setting.plan.images_per_caption
    return Reading(step, outcome.values, per_image, per_caption)
