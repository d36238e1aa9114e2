"""What a run of reward fine-tuning refuses before its first step, or at a caption."""

from collections.abc import Iterable

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from lightning_modules.sharded_strategy import ShardedStrategy
from segalign.errors import ConfigError, DataError
from segalign.rewards.protocol import Reward
from segalign.rewards.zoo import check_global_batch
from segalign.types import CaptionBatch

_MAX_NAMED = 5


def check_trainer(trainer: pl.Trainer) -> None:
    """Refuse trainer settings that are for modules whose optimizer Lightning steps.

    Raises:
        ConfigError: If there is one, or numbers are of half precision.
    """
    if trainer.state.fn != TrainerFn.FITTING:
        return
    if trainer.gradient_clip_val:
        raise ConfigError(
            "expected gradients of reward fine-tuning to be clipped by the module; got "
            f"`trainer.gradient_clip_val` {trainer.gradient_clip_val}; set "
            "`model.init_args.max_grad_norm` instead"
        )
    if trainer.accumulate_grad_batches != 1:
        raise ConfigError(
            "expected one batch for each step of reward fine-tuning; got "
            f"`trainer.accumulate_grad_batches` {trainer.accumulate_grad_batches}; leave it out, "
            "and set `model.init_args.memory.rollout_batch_size` to sample the batch in parts"
        )
    if not isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy | ShardedStrategy):
        raise ConfigError(
            "expected a single device, `trainer.strategy: ddp` or sharded weights for reward "
            f"fine-tuning; got `{type(trainer.strategy).__name__}`; use `ddp` or layer "
            "configs/base/fsdp.yaml: with LoRA there is little to shard"
        )
    if trainer.precision in ("16-mixed", "16-true"):
        raise ConfigError(
            "expected a precision with the range of float32 for reward fine-tuning; got "
            f"`trainer.precision` {trainer.precision}; use `bf16-mixed` or `32-true`"
        )


def check_trained(names: Iterable[str]) -> None:
    """Refuse to train what the gradient of a reward does not reach.

    Args:
        names: Names of the trained weights in the module.

    Raises:
        ConfigError: If one is not of the denoising network.
    """
    if others := [name for name in names if not name.startswith("unet.")]:
        raise ConfigError(
            f"expected the denoising network alone to be trained by a reward; got `{others[0]}`; "
            "set `text.t5.train_adapter` to false"
        )


def check_data(trainer: pl.Trainer, reward: Reward, *, wants_images: bool) -> None:
    """Refuse data settings that do not fit reward fine-tuning.

    Args:
        trainer: Its datamodule may have settings that are looked at.
        reward: The reward that is trained on.
        wants_images: Whether the data's images are used.

    Raises:
        ConfigError: If one does not fit.
    """
    data = trainer.datamodule  # type: ignore[attr-defined]
    if getattr(data, "accumulate", 1) != 1:
        raise ConfigError(
            "expected one batch for each step of reward fine-tuning; got `data.accumulate` "
            f"{data.accumulate}; leave it out, and set `model.init_args.memory.rollout_batch_size`"
        )
    if getattr(data, "caption_dropout", 0.0):
        raise ConfigError(
            "expected whole captions for reward fine-tuning; got `data.caption_dropout` "
            f"{data.caption_dropout}; set it to 0: an empty caption has no reward"
        )
    if wants_images and getattr(data, "content", "image") != "image":
        raise ConfigError(
            "expected images for `diffusion_weight`; got data of content "
            f"`{data.content}`; set `data.content` to `image`, or the weight to 0"
        )
    if (size := getattr(data, "global_batch_size", None)) is not None:
        check_global_batch(reward, size)


def blank_captions(batch: CaptionBatch) -> Tensor:
    """Find captions without text, which no reward can judge: bool ``(B,)``."""
    is_blank = torch.tensor([not caption.strip() for caption in batch["captions"]])
    return batch["valid"] & is_blank.to(batch["valid"].device)


def without_blank(losses: Tensor, batch: CaptionBatch) -> Tensor:
    """Make the losses ``(B,)`` of blank captions NaN, which ends the step on all ranks."""
    return losses.masked_fill(blank_captions(batch), torch.nan)


def blank_captions_error(batch: CaptionBatch) -> DataError | None:
    """Make the error that names a batch's blank captions; None if there are none."""
    blank = batch["sample_ids"][blank_captions(batch)].tolist()
    if not blank:
        return None
    return DataError(
        f"expected captions with text for a reward; got blank ones for samples "
        f"{', '.join(map(str, blank[:_MAX_NAMED]))}{', ...' if len(blank) > _MAX_NAMED else ''}; "
        "leave them out when packing the shards"
    )
