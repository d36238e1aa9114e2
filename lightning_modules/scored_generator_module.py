"""What rewards say of the images that a module makes: validation, and scores for reports."""

import logging
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_modules.generator_module import GeneratorModule
from segalign.diffusion.made_images import MADE_IMAGES, MadeImages
from segalign.modes import evaluation_mode
from segalign.rewards.protocol import Reward, RewardSource
from segalign.rewards.scoring import finite_images, score_images
from segalign.types import CaptionBatch

_logger = logging.getLogger(__name__)


class ScoredGeneratorModule(GeneratorModule):
    """Base of modules whose images a reward scores, and others that are held out of training.

    Attributes:
        reward: The reward that is trained on.
        held_out: The others, by name.
    """

    reward: Reward
    held_out: dict[str, Reward]

    def load_rewards(self, reward: RewardSource, held_out: Mapping[str, RewardSource]) -> None:
        """Read the rewards; call it once, while the module is configured.

        Args:
            reward: What is trained on.
            held_out: What only watches, by names that `check_reward_names` has let pass.
        """
        self.reward = reward.load()
        self.held_out = {name: source.load() for name, source in held_out.items()}
        # Registered, so that moves and modes reach their networks.
        self.held_out_networks = nn.ModuleDict(
            {name: one for name, one in self.held_out.items() if isinstance(one, nn.Module)}
        )
        self._num_non_finite = torch.zeros(())

    @override
    def on_validation_epoch_start(self) -> None:
        self._num_non_finite = torch.zeros((), device=self.device)

    @override
    def validation_step(self, batch: CaptionBatch, batch_idx: int) -> dict[str, MadeImages]:
        """Generate images, and score them by the reward and by those that are held out."""
        images = self.predict_step(batch, batch_idx)
        valid = batch["valid"]
        self._num_non_finite += (valid & ~finite_images(images)).sum()
        for name, values in self.score_images(images, batch["captions"], valid).items():
            rows = valid & values.isfinite()
            mean = values[rows].mean() if rows.any() else values.new_zeros(())
            key = "val/reward_mean" if name == "reward" else f"val/{name}"
            self.log(key, mean, batch_size=int(rows.sum()), sync_dist=True)
        return {MADE_IMAGES: MadeImages(images, self.eval_seed, self.best_weights)}

    @override
    def on_validation_epoch_end(self) -> None:
        """Log how many images were not finite, and say so; means leave them out."""
        total = self.trainer.strategy.reduce(self._num_non_finite, reduce_op="sum")
        assert isinstance(total, Tensor)
        self.log("val/non_finite_images", total, rank_zero_only=False)
        if total and self.trainer.is_global_zero:
            _logger.warning(
                "%d images of the validation at step %d are not finite; means over rewards leave "
                "them out; train at a lower rate, or sample in float32",
                int(total),
                self.global_step,
            )

    def score_images(
        self, images: Tensor, captions: Sequence[str], valid: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Score images by the reward and by those that are held out; nothing is learnt.

        Crops are of the centre, and the precision is the trainer's, as in validation.

        Args:
            images: Float in [0, 1], ``(B, 3, H, W)``; rewards of images that are not finite are
                NaN.
            captions: ``B`` captions.
            valid: Which rows are no padding, bool ``(B,)``; None is all.

        Returns:
            ``(B,)`` each: ``reward``, ``held_out/NAME``, and ``reward/PART`` of both.
        """
        held_out = {f"held_out/{name}": reward for name, reward in self.held_out.items()}
        with evaluation_mode(self), self.precision_context():
            return score_images({"reward": self.reward} | held_out, images, captions, valid)
