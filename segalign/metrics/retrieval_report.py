"""Tables and picture of retrieval: by text embedding, by number of segments, both ways."""

from collections.abc import Iterator
from typing import Final

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from segalign.metrics.report_files import Report
from segalign.metrics.report_table import ReportTable
from segalign.metrics.retrieval import (
    CUTOFFS,
    DIRECTIONS,
    TEXT_PARTS,
    RetrievalResult,
    chance_recall,
)
from segalign.metrics.text_readings import AVERAGE, SINGLE, TextReadings

_LABELS: Final = {"C": "C", "C_perp": "C⊥"}
_COLOURS: Final = {"C": "#7f7f7f", "C_perp": "#1f77b4"}
_WORDS: Final = {"text_to_image": "text to image", "image_to_text": "image to text"}


class RetrievalTables:
    """Read a retrieval result by names.

    Args:
        result: What ``Retrieval`` computed.
        readings: What was ranked.
        source: Where V comes from, in words.
    """

    def __init__(self, result: RetrievalResult, readings: TextReadings, source: str) -> None:
        self.result = result
        self.readings = readings
        self.source = source

    def recall(self, part: str, reading: str, direction: str, cutoff: int) -> float:
        """Return one number, in [0, 1]."""
        place = (
            TEXT_PARTS.index(part),
            self.readings.names.index(reading),
            DIRECTIONS.index(direction),
            CUTOFFS.index(cutoff),
        )
        return float(self.result["recall"][place])

    def report(self) -> Report:
        """Make the report ``retrieval``."""
        tables = [self._by_embedding()]
        if self.readings.max_segments:
            tables += [self._by_segments(direction) for direction in DIRECTIONS]
        tables += [self._all_cutoffs(direction) for direction in DIRECTIONS]
        return Report("retrieval", self._facts(), tables, list(self._records()), self._figure())

    def _count(self, name: str) -> int:
        return int(self.result[name])  # type: ignore[literal-required]

    def _facts(self) -> str:
        size, galleries = self._count("gallery_size"), self._count("num_galleries")
        what = "one gallery" if galleries == 1 else f"{galleries} galleries"
        return (
            f"Retrieval in {what} of {size} images with their captions "
            f"({self._count('num_left_out')} samples left out, {self._count('num_captions')} "
            f"distinct captions in all). C⊥ is the text-relevant part; V is {self.source}. "
            f"Chance: R@1 {chance_recall(1, size):.4f}."
        )

    def _by_embedding(self) -> ReportTable:
        """Set out R@1 as the paper's table of text embeddings does."""
        names = [name for name in self.readings.names if name in (SINGLE, AVERAGE)]
        headings = [f"{_WORDS[direction]}, {name}" for direction in DIRECTIONS for name in names]
        rows = [
            [_LABELS[part]]
            + [_share(self.recall(part, name, way, 1)) for way in DIRECTIONS for name in names]
            for part in TEXT_PARTS
        ]
        return ReportTable("R@1 by text embedding", ["text embedding", *headings], rows)

    def _by_segments(self, direction: str) -> ReportTable:
        """Set out R@1 against the number of segments that are averaged."""
        numbers = [*map(str, self.readings.max_segments), "all"]
        rows = [[_LABELS[part], *map(_share, self._curve(part, direction))] for part in TEXT_PARTS]
        title = f"R@1 {_WORDS[direction]}, average of at most so many segments"
        return ReportTable(title, ["text embedding", *numbers], rows)

    def _all_cutoffs(self, direction: str) -> ReportTable:
        rows = [
            [_LABELS[part], name]
            + [_share(self.recall(part, name, direction, cutoff)) for cutoff in CUTOFFS]
            for part in TEXT_PARTS
            for name in self.readings.names
        ]
        size = self._count("gallery_size")
        rows.append(["chance", "", *(_share(chance_recall(cutoff, size)) for cutoff in CUTOFFS)])
        headings = ["text embedding", "reading", *(f"R@{cutoff}" for cutoff in CUTOFFS)]
        return ReportTable(f"Recall {_WORDS[direction]}", headings, rows)

    def _records(self) -> Iterator[dict[str, object]]:
        facts = {name: self._count(name) for name in ("gallery_size", "num_galleries")}
        facts |= {name: self._count(name) for name in ("num_samples", "num_left_out")}
        for part in TEXT_PARTS:
            for reading in self.readings.names:
                for direction in DIRECTIONS:
                    for cutoff in CUTOFFS:
                        yield {
                            "text_embedding": part,
                            "reading": reading,
                            "direction": direction,
                            "k": cutoff,
                            "recall": self.recall(part, reading, direction, cutoff),
                            "chance": chance_recall(cutoff, facts["gallery_size"]),
                            **facts,
                            "num_captions": self._count("num_captions"),
                            "common_direction": self.source,
                        }

    def _curve(self, part: str, direction: str) -> list[float]:
        """Return R@1 against the number of segments, all of them last."""
        names = [name for name in self.readings.names if name != SINGLE]
        return [self.recall(part, name, direction, 1) for name in names]

    def _figure(self) -> Figure:
        has_curves = bool(self.readings.max_segments)
        figure = Figure(figsize=(10 if has_curves else 5, 3.8), layout="constrained")
        axes = figure.subplots(1, 2 if has_curves else 1, squeeze=False, sharey=True)[0]
        self._draw_bars(axes[0])
        if has_curves:
            self._draw_curves(axes[1])
        size = self._count("gallery_size")
        figure.suptitle(f"Text to image, R@1 of {size}", fontsize=11)
        return figure

    def _draw_bars(self, axes: Axes) -> None:
        names = [name for name in self.readings.names if name in (SINGLE, AVERAGE)]
        for index, part in enumerate(TEXT_PARTS):
            places = [place + 0.4 * (index - 0.5) for place in range(len(names))]
            heights = [self.recall(part, name, DIRECTIONS[0], 1) for name in names]
            bars = axes.bar(places, heights, 0.38, color=_COLOURS[part], label=_LABELS[part])
            axes.bar_label(bars, fmt="%.3f", fontsize=8)
        axes.set_xticks(range(len(names)), names)
        axes.set_ylabel("R@1")
        self._finish(axes)

    def _draw_curves(self, axes: Axes) -> None:
        numbers = [*map(str, self.readings.max_segments), "all"]
        for part in TEXT_PARTS:
            axes.plot(
                range(len(numbers)),
                self._curve(part, DIRECTIONS[0]),
                marker="o",
                color=_COLOURS[part],
                label=_LABELS[part],
            )
        axes.set_xticks(range(len(numbers)), numbers)
        axes.set_xlabel("segments averaged, at most")
        self._finish(axes)

    def _finish(self, axes: Axes) -> None:
        chance = chance_recall(1, self._count("gallery_size"))
        axes.axhline(chance, color="black", linestyle=":", linewidth=1, label="chance")
        # Room for the legend above the highest possible value.
        axes.set_ylim(0, 1.2)
        axes.set_yticks([0, 0.2, 0.4, 0.6, 0.8, 1])
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8, ncols=3, loc="upper left")


def _share(value: float) -> str:
    return f"{value:.4f}"
