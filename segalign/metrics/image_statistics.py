"""Statistics of single images: detail, edges, colour.

None of them knows the caption. A reward that is climbed too far shows in them as texture that
nobody asked for, or as blur; so they are compared with those of the model before training.

Dims: B images, H/W pixels.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Final

import torch
from torch import Tensor
from typing_extensions import override

from segalign.errors import ConfigError
from segalign.evaluation.image_metric import EvaluationSetting, Findings, ImageBatch, ImageMetric
from segalign.metrics.place_values import PlaceValues, means

# Of gamma-encoded red, green and blue, as BT.709 has them.
_LUMA: Final = (0.2126, 0.7152, 0.0722)
# Half of the Nyquist frequency, in cycles per pixel.
_HIGH: Final = 0.25


def luminance(images: Tensor) -> Tensor:
    """Weigh the channels of images ``(B, 3, H, W)``: ``0.2126 R + 0.7152 G + 0.0722 B``."""
    return torch.einsum("bchw,c->bhw", images, images.new_tensor(_LUMA))


def high_frequency(images: Tensor) -> Tensor:
    """Return the share of spectral power above half the Nyquist frequency, in [0, 1].

    With Y the luminance, h the product of two Hann windows and m the mean of Y weighed by h, the
    spectrum is that of ``h (Y - m)``: the window keeps the jump between opposite borders out of it.
    The share is the power where ``sqrt(f_x^2 + f_y^2) > 1/4`` cycles per pixel, by all of it.

    Args:
        images: In [0, 1], float64 ``(B, 3, H, W)``, of 4 pixels and more.

    Returns:
        ``(B,)``; 0 for an image of one luminance.
    """
    height, width = images.shape[-2:]
    window = torch.outer(*(_hann(size, images) for size in (height, width)))
    shades = luminance(images)
    middle = (shades * window).sum(dim=(1, 2), keepdim=True) / window.sum()
    power = torch.fft.fft2((shades - middle) * window).abs().square()
    rows, columns = (torch.fft.fftfreq(n, device=images.device) for n in (height, width))
    is_high = rows[:, None] ** 2 + columns[None, :] ** 2 > _HIGH**2
    total = power.sum(dim=(1, 2))
    # What is left of a flat image is rounding.
    is_flat = (shades - middle).abs().amax(dim=(1, 2)) < 1e-9
    share = (power * is_high).sum(dim=(1, 2)) / total.masked_fill(is_flat, 1)
    high: Tensor = share.masked_fill(is_flat, 0)
    return high


def sharpness(images: Tensor) -> Tensor:
    """Return the variance of the Laplacian of the luminance, ``(B,)``.

    The Laplacian of a pixel is the sum of its four neighbours less four times itself; pixels of the
    border have none. The variance is over an image's other pixels, divided by their number.
    """
    shades = luminance(images)
    neighbours = shades[:, :-2, 1:-1] + shades[:, 2:, 1:-1] + shades[:, 1:-1, :-2]
    laplacian = neighbours + shades[:, 1:-1, 2:] - 4 * shades[:, 1:-1, 1:-1]
    return laplacian.flatten(1).var(dim=1, correction=0)


def total_variation(images: Tensor) -> Tensor:
    """Return the mean absolute difference of neighbours across plus that of neighbours below.

    Means are over channels and pairs of neighbours, ``(B,)``.
    """
    across = (images[..., :, 1:] - images[..., :, :-1]).abs().flatten(1).mean(dim=1)
    below = (images[..., 1:, :] - images[..., :-1, :]).abs().flatten(1).mean(dim=1)
    return across + below


def saturation(images: Tensor) -> Tensor:
    """Return the mean over pixels of HSV's saturation, ``(max - min) / max``, 0 for black."""
    low, high = images.aminmax(dim=1)
    return ((high - low) / high.masked_fill(high == 0, 1)).flatten(1).mean(dim=1)


def clipped_share(images: Tensor) -> Tensor:
    """Return the share of channel values that are exactly 0 or 1, ``(B,)``."""
    return ((images == 0) | (images == 1)).double().flatten(1).mean(dim=1)


STATISTICS: Final[Mapping[str, Callable[[Tensor], Tensor]]] = MappingProxyType(
    {
        "high_frequency": high_frequency,
        "sharpness": sharpness,
        "total_variation": total_variation,
        "saturation": saturation,
        "clipped_share": clipped_share,
    }
)


class ImageStatistics(ImageMetric):
    """Means of the statistics above over all images that count, computed in float64."""

    name = "image_statistics"

    @override
    def start(self, setting: EvaluationSetting) -> None:
        self._num_images = setting.plan.num_images
        self._found = PlaceValues()

    @override
    def update(self, batch: ImageBatch) -> None:
        images = batch.pixels.double() / 255
        if min(images.shape[-2:]) < 4:
            raise ConfigError(
                "expected images of 4 pixels and more for statistics of images; got "
                f"{tuple(images.shape[-2:])}; remove the callback that asks for them"
            )
        columns = {name: statistic(images) for name, statistic in STATISTICS.items()}
        self._found.add(batch.places, batch.counted, columns)

    @override
    def finish(self) -> Findings:
        found = self._found.join(self._num_images)
        protocol = {
            "metric": self.name,
            "luminance": "BT.709 of encoded values",
            "high_frequency": "Hann window, above 1/4 cycle per pixel",
        }
        return Findings(means(found), protocol, per_image=found)


def _hann(size: int, like: Tensor) -> Tensor:
    return torch.hann_window(size, periodic=False, dtype=like.dtype, device=like.device)
