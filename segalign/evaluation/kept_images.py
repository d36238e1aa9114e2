"""Images of the first captions, kept for people to look at.

Dims: H/W pixels.
"""

from torch import Tensor
from typing_extensions import override

from segalign.errors import ConfigError
from segalign.evaluation.image_metric import EvaluationSetting, Findings, ImageBatch, ImageMetric
from segalign.ranks import gather_objects


class KeptImages(ImageMetric):
    """Keeps the images of the first captions, and measures nothing.

    Args:
        num_captions: Captions whose images are kept.
        images_per_caption: The first so many images of each.

    Attributes:
        images: After ``finish``, uint8 ``(3, H, W)`` on the CPU by place, in the order of places,
            the same on every rank; without those that do not count.

    Raises:
        ConfigError: If none would be kept.
    """

    name = "kept_images"

    def __init__(self, num_captions: int = 16, images_per_caption: int = 4) -> None:
        if num_captions < 1 or images_per_caption < 1:
            raise ConfigError(
                "expected to keep images of at least 1 caption, at least 1 of each; got "
                f"{num_captions} and {images_per_caption}; raise them, or leave the page out"
            )
        self.num_captions = num_captions
        self.images_per_caption = images_per_caption
        self.images: dict[int, Tensor] = {}
        self._per_caption = 1
        self._is_wanted = True

    @override
    def start(self, setting: EvaluationSetting) -> None:
        """See ``ImageMetric``."""
        self.images = {}
        self._per_caption = setting.plan.images_per_caption
        self._is_wanted = setting.is_final

    @override
    def update(self, batch: ImageBatch) -> None:
        """Take what is kept out of a micro-batch."""
        if not self._is_wanted:
            return
        for row, place in enumerate(batch.places.tolist()):
            caption, number = divmod(place, self._per_caption)
            is_kept = caption < self.num_captions and number < self.images_per_caption
            if is_kept and bool(batch.counted[row]):
                # A copy: a view would keep the whole batch.
                self.images[place] = batch.pixels[row].cpu().clone()

    @override
    def finish(self) -> Findings:
        """Join the ranks."""
        found: dict[int, Tensor] = {}
        for part in gather_objects(self.images):
            found |= part
        self.images = {place: found[place] for place in sorted(found)}
        return Findings({}, {})
