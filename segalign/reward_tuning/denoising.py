"""The denoising loss on data, beside a reward: it keeps the model to the look of real images."""

import torch
from torch import Tensor

from segalign.diffusion.generator import TextToImage
from segalign.errors import ConfigError
from segalign.losses.denoising_objective import DenoisingObjective
from segalign.text.conditioning import TextConditioning
from segalign.truncation.engine import Backward, row_ranges
from segalign.types import CaptionBatch


def denoising_gradient(
    generator: TextToImage,
    objective: DenoisingObjective,
    batch: CaptionBatch,
    text: TextConditioning,
    step: int,
    *,
    weight: float,
    batch_size: int | None,
    backward: Backward,
) -> Tensor:
    """Add the gradient of a batch's denoising loss to ``.grad``.

    Args:
        generator: The trained model.
        objective: The loss.
        batch: ``B`` captions with images; the loss is the sum over valid rows divided by ``B``.
        text: Their conditioning.
        step: The optimizer step, of which the draws depend.
        weight: Factor of the loss.
        batch_size: Samples at a time; None is all.
        backward: Back-propagates a scalar.

    Returns:
        Losses times the factor, ``(B,)``, without gradient; 0 for rows that are not valid.

    Raises:
        ConfigError: If there are no images.
    """
    if "images" not in batch:
        raise ConfigError(
            "expected images for `diffusion_weight`; got captions alone; set `data.content` to "
            "`image`, or the weight to 0"
        )
    valid, found = batch["valid"], []
    epochs, sample_ids = batch["epochs"].tolist(), batch["sample_ids"].tolist()
    for rows in row_ranges(len(valid), batch_size):
        part = slice(rows.start, rows.stop)
        with torch.no_grad():
            latents = generator.codec.encode(batch["images"][part])
        losses = objective.losses(
            generator.predict,
            generator.schedule,
            latents,
            text.select(torch.arange(rows.start, rows.stop, device=valid.device)),
            [(step, epochs[row], sample_ids[row]) for row in rows],
        )
        losses = weight * torch.where(valid[part], losses, 0.0)
        backward(losses.sum() / len(valid), False)
        found.append(losses.detach())
    return torch.cat(found)
