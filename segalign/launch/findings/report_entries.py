"""Captions of a report, each with the images of all variants and their scores by segment."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from segalign.evaluation.heat import HeatScale, HeatSegment, heat_segments
from segalign.launch.findings.report_choice import Comparison, ShownCaption
from segalign.launch.findings.report_images import RunImages
from segalign.launch.findings.report_pictures import ReportPicture
from segalign.launch.study import MetricSpec
from segalign.metrics.score_groups import finite, mean

_SCORES: Final = "segment_scores/"
_SPANS: Final = "segment_spans/"
_TEST: Final = "test/"
# What is shown besides the metrics of the study; names that end so are of any reward.
_SHOWN: Final = ("reward/", "denscore/", "denscore_o/", "attributes", "attributes/past_77")


@dataclass(frozen=True, kw_only=True)
class Strip:
    """A reward's view of an image, segment by segment.

    Attributes:
        name: The reward.
        segments: Coloured segments.
        is_numbered: Whether they are those that the caption is cut into on the page.
    """

    name: str
    segments: Sequence[HeatSegment]
    is_numbered: bool

    @property
    def label(self) -> str:
        """All scores, for those who do not see colours."""
        return f"{self.name}: {', '.join(one.score for one in self.segments)}"


@dataclass(frozen=True, kw_only=True)
class ReportScore:
    """A score of an image.

    Attributes:
        name: What it is called.
        text: The score.
        difference: To the base variant's; empty if there is none.
    """

    name: str
    text: str
    difference: str


@dataclass(frozen=True, kw_only=True)
class ReportImage:
    """An image of a variant.

    Attributes:
        variant: Number of the variant.
        label: Its label.
        picture: The picture.
        scores: Its scores.
        strips: Scores of segments, the main reward first.
    """

    variant: int
    label: str
    picture: ReportPicture
    scores: Sequence[ReportScore]
    strips: Sequence[Strip]


@dataclass(frozen=True, kw_only=True)
class ReportEntry:
    """A caption.

    Attributes:
        number: Of the caption.
        title: What it is called.
        caption: Its text.
        pieces: The same, cut as the main reward does; empty if no reward scores segments.
        images: By the image's number, those of all variants.
        values: Scores by name, each a list by variant, as JSON.
    """

    number: int
    title: str
    caption: str
    pieces: Sequence[str]
    images: Mapping[int, Sequence[ReportImage]]
    values: str


class ReportEntries:
    """Puts the captions of a report together.

    Args:
        comparison: What is shown.
        metrics: Of the study, whose scores come first.
        pictures: By file.
        base_label: The variant that differences are to.
    """

    def __init__(
        self,
        comparison: Comparison,
        metrics: Sequence[MetricSpec],
        pictures: Mapping[Path, ReportPicture],
        base_label: str,
    ) -> None:
        self.comparison = comparison
        self.pictures = pictures
        self.base_label = base_label
        self.labels = list(comparison.variants)
        shown = [
            record
            for one in comparison.captions
            for image in one.numbers
            for record in self._records(one.caption, image).values()
        ]
        names = list(dict.fromkeys(name for record in shown for name in record))
        rewards = [n.removeprefix(_SCORES) for n in names if n.startswith(_SCORES)]
        # One scale for all variants, so that a colour means the same everywhere on the page.
        self.scales = {name: _scale(name, shown) for name in rewards}
        self.score_names = _score_names(names, metrics)
        self._decimals = {name: _decimals(name, shown) for name in self.score_names}

    @property
    def reward(self) -> str | None:
        """The main reward, whose segments captions are cut into; None if there is none."""
        return next(iter(self.scales), None)

    def all(self) -> list[ReportEntry]:
        """Put all captions together."""
        return [self._entry(one) for one in self.comparison.captions]

    def _entry(self, shown: ShownCaption) -> ReportEntry:
        first = next(iter(self._records(shown.caption, shown.numbers[0]).values()))
        spans = None if self.reward is None else first.get(_SPANS + self.reward)
        text = first["caption"]
        return ReportEntry(
            number=shown.caption,
            title=f"Caption {shown.caption}, sample {first['sample_id']}",
            caption=text,
            pieces=[text[start:end] for start, end in spans or ()],
            images={image: self._images(shown.caption, image, spans) for image in shown.numbers},
            values=json.dumps(self._values(shown)),
        )

    def _images(self, caption: int, image: int, spans: Any) -> list[ReportImage]:
        records = self._records(caption, image)
        base = records.get(self.base_label, {})
        return [
            ReportImage(
                variant=variant,
                label=label,
                picture=self.pictures[self._run(label).images[record["place"]]],
                scores=self._scores(record, base if label != self.base_label else {}),
                strips=self._strips(record, spans),
            )
            for variant, (label, record) in enumerate(records.items())
        ]

    def _scores(self, record: Mapping[str, Any], base: Mapping[str, Any]) -> list[ReportScore]:
        found = []
        for name, title in self.score_names.items():
            value, other = _number(record.get(name)), _number(base.get(name))
            if value is not None:
                digits = self._decimals[name]
                difference = "" if other is None else f"{value - other:+z.{digits}f}"
                text = f"{value:z.{digits}f}"
                found.append(ReportScore(name=title, text=text, difference=difference))
        return found

    def _strips(self, record: Mapping[str, Any], spans: Any) -> list[Strip]:
        strips = []
        for name, scale in self.scales.items():
            scores, own = record.get(_SCORES + name), record.get(_SPANS + name)
            if scores and own and len(scores) == len(own):
                segments = heat_segments(record["caption"], own, scores, scale)
                strips.append(Strip(name=name, segments=segments, is_numbered=own == spans))
        return strips

    def _values(self, shown: ShownCaption) -> dict[str, list[float | None]]:
        """Average each score over the images of a caption, by variant."""
        values: dict[str, list[float | None]] = {name: [] for name in self.score_names.values()}
        for label in self.labels:
            run = self._run(label)
            records = [run.records[run.place(shown.caption, image)] for image in shown.numbers]
            for name, title in self.score_names.items():
                found = finite(_number(record.get(name)) for record in records)
                values[title].append(mean(found) if found else None)
        return values

    def _records(self, caption: int, image: int) -> dict[str, Mapping[str, Any]]:
        return {
            label: run.records[run.place(caption, image)]
            for label, run in self.comparison.variants.items()
        }

    def _run(self, label: str) -> RunImages:
        return self.comparison.variants[label]


def _scale(name: str, records: Sequence[Mapping[str, Any]]) -> HeatScale:
    return HeatScale.of(
        score for record in records for score in finite(record.get(_SCORES + name) or ())
    )


def _decimals(name: str, records: Sequence[Mapping[str, Any]]) -> int:
    """Return the decimals that give the largest score of a name three digits, four from 1 on."""
    found = finite(_number(record.get(name)) for record in records)
    size = max(map(abs, found), default=0.0)
    digits = 3 if size >= 1 else 2
    return min(max(digits - math.floor(math.log10(size)), 0), 8) if size else digits


def _score_names(names: Sequence[str], metrics: Sequence[MetricSpec]) -> dict[str, str]:
    """Choose the scores that are shown: names, and what people call them."""
    wanted = {
        one.name.removeprefix(_TEST): one.label for one in metrics if one.name in _tests(names)
    }
    for name in names:
        start, slash, _ = name.partition("/")
        if name in _SHOWN or f"{start}{slash}" in _SHOWN:
            wanted.setdefault(name, name.removeprefix("reward/"))
    titles: dict[str, str] = {}
    for name, title in wanted.items():
        titles[name] = name if title in titles.values() else title
    return titles


def _tests(names: Sequence[str]) -> set[str]:
    return {_TEST + name for name in names}


def _number(value: Any) -> float | None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return next(iter(finite([value])), None) if is_number else None
