"""From images in [0, 1] to the input of a CLIP image tower, differentiably.

Dims: B batch, H/W pixels, S side of the tower's input.
"""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from segalign.errors import ConfigError
from segalign.formats.clip_scorer import ImageSettings
from segalign.rng import counter_uniform

ResizeFilter = Literal["bicubic", "bilinear"]


class ImagePreprocessing(nn.Module):
    """Crop if asked, resize the short side, crop the centre, normalise.

    Args:
        settings: The tower's input size, mean and deviation.
        resize: Filter, with antialiasing. CLIP's own is ``bicubic``; the official rewards use
            ``bilinear``.
        crop: Side of a square that is cut out of the images first, at one random place for the
            whole batch; the official rewards cut 504 of 512 pixels, against artefacts of blocks.
            None cuts nothing.
        seed: With the step, decides the place of the random crop.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        settings: ImageSettings,
        *,
        resize: ResizeFilter = "bicubic",
        crop: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.settings = settings
        self.resize = resize
        self.crop = crop
        self.seed = seed
        self.step = 0
        for name, values in (("mean", settings.mean), ("std", settings.std)):
            self.register_buffer(name, torch.tensor(values).view(3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Map images in [0, 1], ``(B, 3, H, W)``, to ``(B, 3, S, S)``.

        Raises:
            ConfigError: If the images are smaller than the crop.
        """
        if self.crop is not None:
            top, left = self.crop_place(*images.shape[-2:])
            images = images[..., top : top + self.crop, left : left + self.crop]
        images = self._to_square(images)
        return (images - self.mean.to(images)) / self.std.to(images)

    def crop_place(self, height: int, width: int) -> tuple[int, int]:
        """Draw the top left corner of the crop: a function of (seed, step) alone."""
        assert self.crop is not None
        if min(height, width) < self.crop:
            raise ConfigError(
                f"expected images of at least {self.crop} pixels for the reward's `crop`; got "
                f"{width} x {height}; set `crop` to null or lower it"
            )
        draws = [counter_uniform("reward crop", self.seed, self.step, axis) for axis in range(2)]
        rooms = (height - self.crop + 1, width - self.crop + 1)
        top, left = (int(draw * room) for draw, room in zip(draws, rooms, strict=True))
        return top, left

    def _to_square(self, images: Tensor) -> Tensor:
        """Resize the short side to S, and cut the centre."""
        side = self.settings.image_size
        height, width = images.shape[-2:]
        short = min(height, width)
        size = (side * height // short, side * width // short)
        if size != (height, width):
            images = F.interpolate(images, size, mode=self.resize, antialias=True)
        top, left = (size[0] - side) // 2, (size[1] - side) // 2
        return images[..., top : top + side, left : left + side]
