"""The denoising loss on data, beside a reward: it keeps the model to the look of real images."""

import torch
from torch import Tensor

from segalign.diffusion.generator import TextToImage
from segalign.errors import ConfigError
from segalign.losses.denoising_objective import DenoisingObjective
from segalign.truncation.engine import Backward, row_chunks
from segalign.types import CaptionBatch


def denoising_gradient(
    generator: TextToImage,
    objective: DenoisingObjective,
    batch: CaptionBatch,
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
    for rows in row_chunks(len(valid), batch_size, valid.device):
        captions = [batch["captions"][row] for row in rows.tolist()]
        with torch.no_grad():
            text = generator.conditioner(captions)
            latents = generator.codec.encode(batch["images"][rows])
        counters = [
            (step, int(batch["epochs"][row]), int(batch["sample_ids"][row]))
            for row in rows.tolist()
        ]
        losses = objective.losses(generator.predict, generator.schedule, latents, text, counters)
        losses = weight * torch.where(valid[rows], losses, 0.0)
        backward(losses.sum() / len(valid), False)
        found.append(losses.detach())
    return torch.cat(found)
