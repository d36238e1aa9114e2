"""How much images of the same prompt differ from each other.

Dims: B images of a micro-batch, P prompts in it, n images of each.
"""

from itertools import combinations
from typing import NamedTuple

import torch
from torch import Tensor
from typing_extensions import override

from segalign.errors import ConfigError
from segalign.evaluation.image_metric import EvaluationSetting, Findings, ImageBatch, ImageMetric
from segalign.metrics.metric_protocol import weight_notes
from segalign.metrics.perceptual.protocol import PerceptualNet, PerceptualSource
from segalign.metrics.place_values import PlaceValues
from segalign.metrics.value_mean import ValueMean


class PromptDiversity(NamedTuple):
    """Diversity of each prompt of a micro-batch.

    Attributes:
        values: Mean distance of its pairs, float64 ``(P,)``; 0 without a pair.
        has_pair: Whether it has a pair of which both images count, bool ``(P,)``.
    """

    values: Tensor
    has_pair: Tensor


class Diversity(ImageMetric):
    """Mean over prompts of the mean perceptual distance of pairs of a prompt's images.

    Each image is looked at once. A pair with an image that does not count is left out, and so is a
    prompt without a pair.

    Args:
        network: The perceptual distance.
        name: Names the metric and its value.

    Reference: arXiv 1912.01865 (StarGAN v2).
    """

    def __init__(self, network: PerceptualSource, name: str = "lpips_diversity") -> None:
        self.network = network
        self.name = name

    @override
    def start(self, setting: EvaluationSetting) -> None:
        """Forget earlier images, and read the network.

        Raises:
            ConfigError: If captions have one image each, or the network cannot be made.
            DataError: If its weights are missing, damaged or foreign.
        """
        self._per_prompt = setting.plan.images_per_caption
        if self._per_prompt < 2:
            raise ConfigError(
                "expected `images_per_caption` of at least 2 for the diversity of a prompt's "
                f"images; got {self._per_prompt}; raise it, or remove `{self.name}`"
            )
        self._num_images = setting.plan.num_images
        self._net: PerceptualNet = setting.pool.load(self.network).to(setting.device)
        self._mean = ValueMean(setting.plan.num_captions)
        self._columns = PlaceValues()

    @override
    def update(self, batch: ImageBatch) -> None:
        """Compare the images of each prompt."""
        found = prompt_diversity(self._net, batch.once(self._net), batch.counted, self._per_prompt)
        self._mean.update(found.values, prompts_of(batch, self._per_prompt), found.has_pair)
        of_images, has_pair = (part.repeat_interleave(self._per_prompt) for part in found)
        counted = batch.counted & has_pair.to(batch.counted.device)
        self._columns.add(batch.places, counted, {self.name: of_images})

    @override
    def finish(self) -> Findings:
        """Join the ranks."""
        result, columns = self._mean.compute(), self._columns.join(self._num_images)
        num_prompts = int(result["num_samples"])
        num_left_out = self._num_images // self._per_prompt - num_prompts
        notes = weight_notes(self.name, self._net.protocol())
        if num_left_out:
            notes.append(
                f"{self.name}: {num_left_out} captions are left out, of which fewer than two "
                "images count"
            )
        return Findings(
            values={self.name: float(result["mean"])} if num_prompts else {},
            protocol={
                "metric": "same-prompt diversity",
                "images_per_caption": self._per_prompt,
                "network": self._net.protocol(),
            },
            per_image=columns,
            notes=notes,
        )


def prompt_diversity(
    net: PerceptualNet, features: list[Tensor], counted: Tensor, per_prompt: int
) -> PromptDiversity:
    """Average d(x_i, x_j) over pairs i < j of a prompt's images of which both count.

    Args:
        net: The distance.
        features: What it has seen of the images, those of a prompt beside each other, ``(B, ...)``.
        counted: Which images count, bool ``(B,)``.
        per_prompt: n.
    """
    firsts = torch.arange(0, len(counted), per_prompt)
    total = torch.zeros(len(firsts), dtype=torch.float64)
    num_pairs = torch.zeros(len(firsts), dtype=torch.int64)
    is_counted = counted.cpu()
    for i, j in combinations(range(per_prompt), 2):
        one, other = ([stage[k::per_prompt] for stage in features] for k in (i, j))
        is_whole = is_counted[firsts + i] & is_counted[firsts + j]
        total += torch.where(is_whole, net.distance(one, other).cpu(), 0)
        num_pairs += is_whole
    return PromptDiversity(total / num_pairs.clamp(min=1), num_pairs > 0)


def prompts_of(batch: ImageBatch, per_prompt: int) -> Tensor:
    """Number the captions of a micro-batch as the plan does, int64 ``(P,)``."""
    return batch.places[::per_prompt] // per_prompt
