"""One page of a result: numbers, plots, and images whose captions are coloured by their scores.

The page needs no network and no script, and refers to nothing outside it.

Dims: H/W pixels.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from torch import Tensor

from segalign.evaluation.captions import CaptionRow
from segalign.evaluation.heat import HeatScale, HeatSegment, heat_segments
from segalign.evaluation.page_pictures import SMALL_SIDE, data_uri, encode_images
from segalign.evaluation.result import EvaluationResult, short
from segalign.evaluation.result_table import headline, number
from segalign.generation.image_folder import printable
from segalign.metrics.score_groups import finite, mean

TEMPLATE: Final = "result_page.html.jinja"
_SCORES, _SPANS = "segment_scores/", "segment_spans/"


@dataclass(frozen=True)
class Strip:
    """A reward's view of an image, segment by segment.

    Attributes:
        name: The reward.
        segments: Coloured segments.
        mean: Of their scores.
    """

    name: str
    segments: Sequence[HeatSegment]
    mean: str

    @property
    def label(self) -> str:
        """All scores, for those who do not see colours."""
        return f"{self.name}: {', '.join(one.score for one in self.segments)}"


@dataclass(frozen=True)
class PageImage:
    """An image of the page.

    Attributes:
        src: The picture as data.
        alt: What it is.
        is_small: Whether it is enlarged without smoothing.
        scores: Its scores, for people.
        segments: Its caption, coloured; empty if no reward scores segments.
        strips: Of the other rewards.
    """

    src: str
    alt: str
    is_small: bool
    scores: Mapping[str, str]
    segments: Sequence[HeatSegment]
    strips: Sequence[Strip]


@dataclass(frozen=True)
class PageEntry:
    """A caption with its images."""

    number: int
    title: str
    caption: str
    images: Sequence[PageImage]


class ResultPage:
    """Puts a page together.

    Args:
        result: The numbers.
        rows: All captions of the evaluation.
        per_image: What metrics say of each image, by name; those of
            `segalign.metrics.alignment.Alignment` are shown.
        images: The images that are shown, uint8 ``(3, H, W)`` by place.
        plots: PNGs by what they show.
        reward: The reward that captions are coloured by; None is the first that scores segments.
    """

    def __init__(
        self,
        result: EvaluationResult,
        rows: Sequence[CaptionRow],
        per_image: Mapping[str, Sequence[Any]],
        images: Mapping[int, Tensor],
        plots: Mapping[str, bytes] = MappingProxyType({}),
        reward: str | None = None,
    ) -> None:
        self.result = result
        self.rows = rows
        self.per_image = per_image
        self.images = dict(sorted(images.items()))
        self.plots = plots
        self.names = [n.removeprefix(_SCORES) for n in per_image if n.startswith(_SCORES)]
        self.reward = reward if reward in self.names else next(iter(self.names), None)
        self._scales = {name: self._scale(name) for name in self.names}

    def render(self) -> str:
        """Write the page.

        Returns:
            HTML that holds no text of a caption, a model or an error unescaped.
        """
        environment = Environment(
            loader=FileSystemLoader(Path(__file__).parent),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        result = self.result
        page = environment.get_template(TEMPLATE).render(
            title=f"Evaluation of {result.name}",
            facts=self._facts(),
            warnings=self._warnings(),
            headline={name: number(value) for name, value in headline(result).items()},
            notes=[note for one in result.metrics.values() for note in one.notes],
            plots=[{"src": data_uri(png), "alt": alt} for alt, png in self.plots.items()],
            legend=self._legend(),
            entries=self._entries(),
            failures=result.failures,
            metrics=self._metrics(),
        )
        return printable(page)

    def _facts(self) -> dict[str, str]:
        result = self.result
        return {
            "weights": result.weights,
            "captions": str(result.num_captions),
            "images of each": str(result.images_per_caption),
            "seed": str(result.eval_seed),
            "prompts": short(result.prompts),
            "protocol": short(result.digest()),
            "made": result.created or "-",
        }

    def _warnings(self) -> list[str]:
        found = {
            "could not be made": len(self.result.failures),
            "are not finite": self.result.num_non_finite,
        }
        total = self.result.num_captions * self.result.images_per_caption
        text = "{} of {} images {}; no number counts them."
        return [text.format(count, total, what) for what, count in found.items() if count]

    def _metrics(self) -> "dict[str, _Shown]":
        return {
            name: _Shown(
                {key: number(value) for key, value in one.values.items()},
                json.dumps(one.protocol, indent=2, ensure_ascii=False),
            )
            for name, one in self.result.metrics.items()
        }

    def _scale(self, name: str) -> HeatScale:
        shown = (self._known(_SCORES + name, place) or () for place in self.images)
        return HeatScale.of(score for scores in shown for score in finite(scores))

    def _legend(self) -> dict[str, Any] | None:
        if self.reward is None:
            return None
        return {"name": self.reward, "steps": self._scales[self.reward].labels()}

    def _entries(self) -> list[PageEntry]:
        encoded = encode_images(self.images)
        per_caption = self.result.images_per_caption
        captions = dict.fromkeys(place // per_caption for place in self.images)
        return [
            PageEntry(
                caption,
                f"Caption {caption}, sample {self.rows[caption]['sample_id']}",
                self.rows[caption]["caption"],
                [self._image(p, encoded[p]) for p in self.images if p // per_caption == caption],
            )
            for caption in captions
        ]

    def _image(self, place: int, png: bytes) -> PageImage:
        strips = {n: strip for n in self.names if (strip := self._strip(n, place)) is not None}
        own = strips.pop(self.reward) if self.reward in strips else None
        scores = {
            name.removeprefix("reward/"): number(value)
            for name in self.per_image
            if name.startswith("reward/") and (value := self._known(name, place)) is not None
        }
        return PageImage(
            data_uri(png),
            f"image {place % self.result.images_per_caption}",
            min(self.images[place].shape[1:]) < SMALL_SIDE,
            scores,
            own.segments if own else [],
            list(strips.values()),
        )

    def _strip(self, name: str, place: int) -> Strip | None:
        scores, spans = self._known(_SCORES + name, place), self._known(_SPANS + name, place)
        if scores is None or spans is None:
            return None
        caption = self.rows[place // self.result.images_per_caption]["caption"]
        segments = heat_segments(caption, spans, scores, self._scales[name])
        found = finite(scores)
        return Strip(name, segments, f"{mean(found):.3f}" if found else "-")

    def _known(self, name: str, place: int) -> Any:
        rows = self.per_image.get(name)
        return None if rows is None else rows[place]


@dataclass(frozen=True)
class _Shown:
    """A metric, for people."""

    values: Mapping[str, str]
    protocol: str
