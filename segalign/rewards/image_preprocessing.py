"""From images in [0, 1] to the input of a CLIP image tower, differentiably.

Dims: B batch, H/W pixels, S side of the tower's input.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from segalign.errors import ConfigError
from segalign.formats.clip_scorer import ImageSettings
from segalign.formats.clip_scorer import ResizeFilter as ResizeFilter
from segalign.rng import counter_uniform


class ImagePreprocessing(nn.Module):
    """Crop if asked, resize, make square, normalise.

    Args:
        settings: What the model's own pipeline does.
        resize: Another filter than the model's; the official rewards use ``bilinear``. With
            antialiasing.
        crop: Side of a square that is cut out of the images first, at one random place for the
            whole batch; the official rewards cut 504 of 512 pixels, against artefacts of blocks.
            None cuts nothing.
        seed: With the step, decides the place of the random crop; without a step (None) it is the
            centre.
    """

    def __init__(
        self,
        settings: ImageSettings,
        *,
        resize: ResizeFilter | None = None,
        crop: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.settings = settings
        self.resize: ResizeFilter = resize or settings.resize
        self.crop = crop
        self.seed = seed
        self.step: int | None = 0
        self._normalisations: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def forward(self, images: Tensor) -> Tensor:
        """Map images in [0, 1], ``(B, 3, H, W)``, to ``(B, 3, S, S)``.

        Raises:
            ConfigError: If the images are smaller than the crop.
        """
        if self.crop is not None:
            top, left = self.crop_place(*images.shape[-2:])
            images = images[..., top : top + self.crop, left : left + self.crop]
        images = self._to_square(images)
        mean, std = self._normalisation(images.device, images.dtype).unbind()
        return (images - mean) / std

    def crop_place(self, height: int, width: int) -> tuple[int, int]:
        """Draw the top left corner of the crop: a function of (seed, step) alone.

        Without a step, which is evaluation, it is that of the centre.
        """
        assert self.crop is not None
        if min(height, width) < self.crop:
            raise ConfigError(
                f"expected images of at least {self.crop} pixels for the reward's `crop`; got "
                f"{width} x {height}; set `crop` to null or lower it"
            )
        if self.step is None:
            return (height - self.crop) // 2, (width - self.crop) // 2
        draws = [counter_uniform("reward crop", self.seed, self.step, axis) for axis in range(2)]
        rooms = (height - self.crop + 1, width - self.crop + 1)
        top, left = (int(draw * room) for draw, room in zip(draws, rooms, strict=True))
        return top, left

    def _normalisation(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Return mean and deviation, ``(2, 3, 1, 1)``; copied to each device once.

        They are no buffer: a module cast to bfloat16 would round them.
        """
        if (device, dtype) not in self._normalisations:
            # A tensor of inference mode would be of no use to gradients later.
            with torch.inference_mode(False):
                values = [self.settings.mean, self.settings.std]
                made = torch.tensor(values, dtype=dtype, device=device).view(2, 3, 1, 1)
            self._normalisations[device, dtype] = made
        return self._normalisations[device, dtype]

    def _to_square(self, images: Tensor) -> Tensor:
        """Resize, and cut the centre or fill up where an image is no square."""
        side = self.settings.image_size
        height, width = images.shape[-2:]
        size = self._resized(height, width)
        if size != (height, width):
            images = F.interpolate(images, size, mode=self.resize, antialias=True)
        if self.settings.fit == "pad":
            rooms = [side - size[1], side - size[0]]
            return F.pad(images, [part for room in rooms for part in (room // 2, room - room // 2)])
        top, left = (self._half(length - side) for length in size)
        return images[..., top : top + side, left : left + side]

    def _resized(self, height: int, width: int) -> tuple[int, int]:
        """Compute height and width after resizing."""
        side, fit = self.settings.image_size, self.settings.fit
        if fit == "squash":
            return side, side
        if fit == "pad":
            long = max(height, width)
            return round(side * height / long), round(side * width / long)
        short = min(height, width)
        return side * height // short, side * width // short

    def _half(self, margin: int) -> int:
        """Halve what is cut."""
        return margin // 2 if self.settings.round_half == "down" else round(margin / 2)
