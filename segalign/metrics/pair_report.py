"""Tables and picture of pair accuracy: by length, by place of the fact, by segment."""

from collections.abc import Iterator, Sequence
from typing import Final

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from segalign.metrics.pair_accuracy import PairResult
from segalign.metrics.pair_buckets import (
    ALL,
    BUCKETS,
    FACT_PLACES,
    FACT_SEGMENTS,
    LENGTHS,
    SEGMENT_GROUPS,
)
from segalign.metrics.report_files import Report
from segalign.metrics.report_table import ReportTable

_LABELS: Final = {"C": "C", "C_perp": "C⊥"}
_WORDS: Final = {
    ALL: "all",
    **{name: f"{name[7:].replace('_', ' ')} tokens" for name in LENGTHS},
    FACT_PLACES[0]: "fact within 77",
    FACT_PLACES[1]: "fact across 77",
    FACT_PLACES[2]: "fact past 77",
    **{
        name: f"fact in segment {group}"
        for name, group in zip(FACT_SEGMENTS, SEGMENT_GROUPS, strict=True)
    },
}
_COLOURS: Final = ("#7f7f7f", "#1f77b4", "#c7c7c7", "#aec7e8")
_ALONE: Final = "one segment alone"


class PairTables:
    """Read a pair result by names.

    Args:
        result: What ``PairAccuracy`` computed.
        ways: The ways to score: part of the text, reading.
        source: Where V comes from, in words; None where no way needs it.
    """

    def __init__(
        self, result: PairResult, ways: Sequence[tuple[str, str]], source: str | None
    ) -> None:
        self.result = result
        self.ways = list(ways)
        self.source = source

    def accuracy(self, way: tuple[str, str], bucket: str) -> float:
        """Return one number, in [0, 1]; NaN where the bucket is empty."""
        return float(self.result["accuracy"][self.ways.index(way), BUCKETS.index(bucket)])

    def num_pairs(self, bucket: str) -> int:
        """Return how many pairs a bucket holds."""
        return int(self.result["num_pairs"][BUCKETS.index(bucket)])

    def buckets(self) -> list[str]:
        """Name the buckets that hold pairs."""
        return [bucket for bucket in BUCKETS if self.num_pairs(bucket)]

    def report(self) -> Report:
        """Make the report ``pair_accuracy``."""
        tables = [self._by_bucket(), self._by_segment()]
        records = list(self._records())
        return Report("pair_accuracy", self._facts(), tables, records, self._figure())

    def _facts(self) -> str:
        text = (
            f"Accuracy on {self.num_pairs(ALL)} preference pairs "
            f"({int(self.result['num_left_out'])} ties left out); equal scores count one half; "
            "chance is 0.5."
        )
        return text if self.source is None else f"{text} C⊥: V is {self.source}."

    def _names(self) -> list[str]:
        return [f"{_LABELS[part]}, {reading}" for part, reading in self.ways]

    def _by_bucket(self) -> ReportTable:
        rows = [
            [
                _WORDS[bucket],
                str(self.num_pairs(bucket)),
                *(f"{self.accuracy(way, bucket):.4f}" for way in self.ways),
            ]
            for bucket in self.buckets()
        ]
        return ReportTable("Pair accuracy", ["pairs", "number", *self._names()], rows)

    def _by_segment(self) -> ReportTable:
        rows = [
            [group, str(number), f"{accuracy:.4f}"] for group, number, accuracy in self._alone()
        ]
        title = "Accuracy of single segments, each scoring alone"
        return ReportTable(title, ["segment", "segments counted", "C"], rows)

    def _alone(self) -> Iterator[tuple[str, int, float]]:
        """Yield the groups of segments that hold any: name, number, accuracy."""
        numbers = self.result["num_segments"].tolist()
        accuracies = self.result["segment_accuracy"].tolist()
        for group, number, accuracy in zip(SEGMENT_GROUPS, numbers, accuracies, strict=True):
            if number:
                yield group, number, accuracy

    def _records(self) -> Iterator[dict[str, object]]:
        for part, reading in self.ways:
            for bucket in self.buckets():
                yield {
                    "text_embedding": part,
                    "reading": reading,
                    "bucket": bucket,
                    "accuracy": self.accuracy((part, reading), bucket),
                    "count": self.num_pairs(bucket),
                }
        for group, number, accuracy in self._alone():
            yield {
                "text_embedding": "C",
                "reading": _ALONE,
                "bucket": f"segment/{group}",
                "accuracy": accuracy,
                "count": number,
            }

    def _figure(self) -> Figure:
        alone = list(self._alone())
        buckets = self.buckets()
        widths = [len(buckets), len(alone)]
        size = (max(7.0, 0.95 * sum(widths) + 1.5), 4.2)
        figure = Figure(figsize=size, layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True, width_ratios=widths)
        width = 0.8 / len(self.ways)
        for index, (way, name) in enumerate(zip(self.ways, self._names(), strict=True)):
            places = [
                place + width * (index - (len(self.ways) - 1) / 2) for place in range(widths[0])
            ]
            heights = [self.accuracy(way, bucket) for bucket in buckets]
            left.bar(places, heights, 0.95 * width, color=_COLOURS[index], label=name)
        labels = [f"{_WORDS[bucket]}\n({self.num_pairs(bucket)})" for bucket in buckets]
        _finish(left, labels, "pairs (number)", "accuracy")
        left.legend(frameon=False, fontsize=8, ncols=len(self.ways), loc="upper left")
        right.bar(range(len(alone)), [accuracy for *_, accuracy in alone], 0.6, color=_COLOURS[1])
        labels = [f"{group}\n({number})" for group, number, _ in alone]
        _finish(right, labels, f"{_ALONE} (number)", "")
        return figure


def _finish(axes: Axes, labels: Sequence[str], title: str, ylabel: str) -> None:
    axes.set_xticks(range(len(labels)), labels, fontsize=8, rotation=40, ha="right")
    axes.axhline(0.5, color="black", linestyle=":", linewidth=1)
    axes.set_ylim(0, 1.2)  # with room for the legend above 1
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1])
    axes.set_xlabel(title, fontsize=9)
    axes.set_ylabel(ylabel)
    axes.spines[["top", "right"]].set_visible(False)
