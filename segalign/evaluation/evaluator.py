"""One pass over the images of an evaluation, for all metrics.

Dims: B images of a micro-batch, N images of the plan, H/W pixels.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from segalign.diffusion.generator import ImageGenerator
from segalign.errors import ConfigError
from segalign.evaluation.attempts import attempt
from segalign.evaluation.image_metric import EvaluationSetting, Findings, ImageBatch, ImageMetric
from segalign.evaluation.observation import observing
from segalign.evaluation.pixels import to_pixels
from segalign.evaluation.plan import PlannedBatch
from segalign.evaluation.result import FailedImage
from segalign.evaluation.start_images import StartImages
from segalign.ranks import gather_objects, own_rank, together, world_size
from segalign.rng import counter_seed


@dataclass(frozen=True)
class Outcome:
    """What an evaluation has found, the same on every rank but for the times.

    Attributes:
        setting: What was made.
        values: All metrics' values by name, and ``non_finite_images``.
        findings: What each metric says, by the metric's name; empty if no image counts.
        num_counted: Images that count.
        num_non_finite: Images with pixels that are not finite; they do not count.
        failures: Images that could not be made, by place; they do not count either.
        making_seconds: This rank's time for making images.
        metric_seconds: This rank's time for all else.
    """

    setting: EvaluationSetting
    values: Mapping[str, float]
    findings: Mapping[str, Findings]
    num_counted: int
    num_non_finite: int
    failures: Sequence[FailedImage]
    making_seconds: float
    metric_seconds: float

    @property
    def notes(self) -> list[str]:
        """What a reader must know, a line each."""
        return [note for findings in self.findings.values() for note in findings.notes]


class Evaluator:
    """Makes every image once and shows it to all metrics; training sees nothing of it.

    Args:
        setting: What is made.
        metrics: Who looks; their names differ.
        start: Images of the model before training, if they were kept.
        bears_failures: Note images that the model raises an error for, or that leave [0, 1], and go
            on with the others; impossible where images are made by several ranks together. What
            all of a rank's first micro-batch fail with in the same words is not borne.

    Raises:
        ConfigError: If two metrics have one name.
    """

    def __init__(
        self,
        setting: EvaluationSetting,
        metrics: Sequence[ImageMetric],
        start: StartImages | None = None,
        *,
        bears_failures: bool = False,
    ) -> None:
        names = [metric.name for metric in metrics]
        repeated = next((name for name in names if names.count(name) > 1), None)
        if repeated is not None:
            raise ConfigError(
                f"expected metrics of different names in an evaluation; got `{repeated}` twice. "
                "Give one of them another `name`, or remove it."
            )
        self.setting = setting
        self.metrics = metrics
        self.start = start
        self.bears_failures = bears_failures
        self._clock = _Clock(setting.device)

    def run(
        self,
        generator: ImageGenerator,
        advance: Callable[[int], None] = lambda _: None,
        *,
        keep_as_start: bool = False,
    ) -> Outcome:
        """Make the images and measure them; every rank must call it.

        An error on one rank ends it on all of them, when they have made their own images; but ranks
        that make images together, as of a sharded model, wait for one that has failed.

        Args:
            generator: The model.
            advance: Told of how many images this rank has made.
            keep_as_start: Store the images as those of the start.

        Raises:
            ConfigError: If a metric cannot measure this evaluation; nothing is made then. If a
                setting of the model lets every caption fail.
            DataError: If images leave [0, 1] and that is not borne, or something a metric needs is
                missing.
            SegalignError: If a library has failed on another rank.
        """
        with observing():
            self.start_metrics()
            self._clock.lap("metrics")
            own = together(
                lambda: self._measure(generator, advance, keep_as_start=keep_as_start), is_long=True
            )
            counts = _Counts.joined(gather_objects(own))
            if keep_as_start and self.start is not None:
                self._finish_start(self.start)
            findings = {m.name: m.finish() for m in self.metrics} if counts.counted else {}
            self._clock.lap("metrics")
        return self._outcome(findings, counts)

    def start_metrics(self) -> None:
        """Start all metrics, as ``run`` does; every rank must call it.

        Raises:
            ConfigError: If a metric cannot measure this evaluation.
            DataError: If something a metric needs is missing.
        """
        with observing():
            for metric in self.metrics:
                together(partial(metric.start, self.setting))

    def _measure(
        self, generator: ImageGenerator, advance: Callable[[int], None], *, keep_as_start: bool
    ) -> "_Counts":
        """Show all of this rank's images to the metrics, and count them."""
        counts = _Counts()
        for turn, planned in enumerate(self.setting.plan.batches(own_rank(), world_size())):
            images = self._make(generator, planned, counts, is_first=turn == 0)
            self._clock.lap("making")
            if images is not None:
                self._show(images, planned, counts, keep_as_start=keep_as_start)
            advance(sum(planned.counted))
            self._clock.lap("metrics")
        return counts

    def _show(
        self, images: Tensor, planned: PlannedBatch, counts: "_Counts", *, keep_as_start: bool
    ) -> None:
        finite = images.flatten(1).isfinite().all(dim=1)
        wanted = [
            counted and place not in counts.failures
            for place, counted in zip(planned.places, planned.counted, strict=True)
        ]
        is_counted = torch.tensor(wanted, device=images.device)
        batch = self._batch(planned, images, is_counted & finite, is_start=keep_as_start)
        if keep_as_start and self.start is not None and any(planned.counted):
            self.start.store(planned.index, batch.pixels, finite)
        for metric in self.metrics:
            metric.update(batch)
        counts.counted += int(batch.counted.sum())
        counts.non_finite += int((is_counted & ~finite).sum())

    def _finish_start(self, start: StartImages) -> None:
        """Record that the start is whole; no rank goes on before."""
        together(lambda: start.finish(self.setting) if own_rank() == 0 else None)

    def _make(
        self, generator: ImageGenerator, planned: PlannedBatch, counts: "_Counts", *, is_first: bool
    ) -> Tensor | None:
        """Make a micro-batch; None, or NaN in rows, where that fails and failures are borne."""
        per_caption, seed = self.setting.plan.images_per_caption, self.setting.eval_seed
        rows = [self.setting.rows[place // per_caption] for place in planned.places]
        captions = [row["caption"] for row in rows]
        wanted = (
            captions,
            [row["sample_id"] for row in rows],
            [image_seed(seed, place % per_caption) for place in planned.places],
            self.setting.weights,
        )
        if not self.bears_failures:
            return generator.generate(*wanted)
        images, failures = attempt(generator, *wanted, is_first=is_first)
        for failure in failures:
            if planned.counted[failure.row]:
                text = f"{failure.error}: {failure.message}".removesuffix(": ")
                counts.failures[planned.places[failure.row]] = text
        return images

    def _batch(
        self, planned: PlannedBatch, images: Tensor, counted: Tensor, *, is_start: bool
    ) -> ImageBatch:
        per_caption = self.setting.plan.images_per_caption
        pixels = to_pixels(torch.where(counted.view(-1, 1, 1, 1), images, 0))
        start, start_finite = (pixels, counted) if is_start else (None, None)
        if not is_start and self.start is not None:
            start, start_finite = (one.to(pixels.device) for one in self.start.read(planned.index))
        return ImageBatch(
            places=torch.tensor(planned.places),
            counted=counted,
            rows=[self.setting.rows[place // per_caption] for place in planned.places],
            pixels=pixels,
            start_pixels=start,
            start_finite=start_finite,
        )

    def _outcome(self, findings: Mapping[str, Findings], counts: "_Counts") -> Outcome:
        values = {name: value for one in findings.values() for name, value in one.values.items()}
        per_caption = self.setting.plan.images_per_caption
        return Outcome(
            setting=self.setting,
            values={**values, "non_finite_images": float(counts.non_finite)},
            findings=findings,
            num_counted=counts.counted,
            num_non_finite=counts.non_finite,
            failures=[
                FailedImage(
                    place=place,
                    caption=self.setting.rows[place // per_caption]["caption"],
                    error=error,
                )
                for place, error in sorted(counts.failures.items())
            ],
            making_seconds=self._clock.seconds["making"],
            metric_seconds=self._clock.seconds["metrics"],
        )


@dataclass
class _Counts:
    """What has become of a rank's images: how many count, are not finite; errors by place."""

    counted: int = 0
    non_finite: int = 0
    failures: dict[int, str] = field(default_factory=dict)

    @classmethod
    def joined(cls, parts: Sequence["_Counts"]) -> "_Counts":
        """Add up those of all ranks."""
        failures = {place: error for one in parts for place, error in one.failures.items()}
        counted = sum(one.counted for one in parts)
        return cls(counted, sum(one.non_finite for one in parts), failures)


def image_seed(eval_seed: int, index: int) -> int:
    """Seed the noise of a caption's ``index``-th image; the first has the evaluation's own seed."""
    return eval_seed if index == 0 else counter_seed("image of a caption", eval_seed, index)


class _Clock:
    """Adds up time by what it was spent on; waits for the device, which images cost far more of."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds = {"making": 0.0, "metrics": 0.0}
        self._last = time.perf_counter()

    def lap(self, what: str) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        self.seconds[what] += now - self._last
        self._last = now
