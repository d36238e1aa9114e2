"""How far images have moved from those that the model made before training.

Dims: B images of a micro-batch.
"""

import torch
from typing_extensions import override

from segalign.evaluation.image_metric import EvaluationSetting, Findings, ImageBatch, ImageMetric
from segalign.metrics.diversity import prompt_diversity, prompts_of
from segalign.metrics.metric_protocol import weight_notes
from segalign.metrics.perceptual.protocol import PerceptualNet, PerceptualSource
from segalign.metrics.place_values import PlaceValues
from segalign.metrics.value_mean import ValueMean


class Drift(ImageMetric):
    """Mean perceptual distance to the image of the same caption and noise before training.

    Where captions have several images, its ratio to the diversity of the images before training is
    found too: at 1, an image is as far from its start as another sample would be.

    Args:
        network: The perceptual distance.
        name: Names the metric and its value; the ratio's is followed by ``_ratio``.
    """

    def __init__(self, network: PerceptualSource, name: str = "lpips_drift") -> None:
        self.network = network
        self.name = name

    @override
    def start(self, setting: EvaluationSetting) -> None:
        """Forget earlier images, and read the network.

        Raises:
            ConfigError: If the network cannot be made.
            DataError: If its weights are missing, damaged or foreign.
        """
        self._per_prompt = setting.plan.images_per_caption
        self._num_images = setting.plan.num_images
        self._net: PerceptualNet = setting.pool.load(self.network).to(setting.device)
        self._drift = ValueMean(setting.plan.num_images)
        self._start_diversity = ValueMean(setting.plan.num_captions)
        self._columns = PlaceValues()

    @override
    def update(self, batch: ImageBatch) -> None:
        """Compare images with those of the start, if there are such."""
        if batch.start_pixels is None:
            return
        now = batch.once(self._net)
        is_start = batch.start_pixels is batch.pixels
        before = now if is_start else self._net(batch.start_pixels)
        distances = self._net.distance(now, before)
        start_counted = batch.counted
        if batch.start_finite is not None:
            start_counted = start_counted & batch.start_finite
        self._drift.update(distances, batch.places, start_counted)
        self._columns.add(batch.places, start_counted, {self.name: distances})
        if self._per_prompt > 1:
            found = prompt_diversity(self._net, before, start_counted, self._per_prompt)
            prompts = prompts_of(batch, self._per_prompt)
            self._start_diversity.update(found.values, prompts, found.has_pair)

    @override
    def finish(self) -> Findings:
        """Join the ranks."""
        columns = self._columns.join(self._num_images)
        notes = weight_notes(self.name, self._net.protocol())
        num_images, drift = _join(self._drift)
        num_prompts, start_diversity = _join(self._start_diversity)
        values = {}
        if num_images:
            values[self.name] = drift
        else:
            notes.append(
                f"{self.name}: has no value; no images from before training were kept to compare "
                "with"
            )
        if num_prompts and start_diversity > 0:
            values[f"{self.name}_ratio"] = drift / start_diversity
        protocol = {
            "metric": "drift from the start",
            "images_per_caption": self._per_prompt,
            "network": self._net.protocol(),
        }
        return Findings(values, protocol, columns, notes)


def _join(mean: ValueMean) -> tuple[int, float]:
    """Return how many values all ranks have, and their mean; every rank must call it.

    A rank may have shown no image, because none of its own could be made.
    """
    if not mean.update_called:
        none = torch.zeros(0, dtype=torch.int64)
        mean.update(none.double(), none, none.bool())  # torchmetrics warns of metrics not updated
    result = mean.compute()
    return int(result["num_samples"]), float(result["mean"])
