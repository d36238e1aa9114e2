"""What a common direction does to the scores of pairs of captions and images.

Dims: B batch, N pairs, E joint-embedding width.
"""

import csv
import io
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from typing import Final

import torch
from torch import Tensor

from segalign.data.manifest import Manifest
from segalign.data.order import BatchPlan, EpochOrder
from segalign.data.progress import show_progress
from segalign.data.reader import IndexedShardReader
from segalign.data.transforms import DecodeRow, Row
from segalign.errors import DataError
from segalign.rewards.common_direction import (
    CorpusDirection,
    Provenance,
    ShareStatistics,
    share_statistics,
)
from segalign.rewards.decomposition import text_irrelevant
from segalign.rewards.segment_scorer import SegmentScorer

PICTURE_NAME: Final = "direction.png"
MIN_PAIRS: Final = 2
_MAX_BATCH_NUMBERS: Final = 2**26  # of the images of a batch: 256 MiB
PART_NAMES: Final = {
    "plain": "plain score",
    "relevant": "text-relevant part",
    "irrelevant": "text-irrelevant part",
}


@dataclass(frozen=True, eq=False, kw_only=True)
class PairFeatures:
    """Features of pairs of captions and images.

    Attributes:
        sample_ids: Place of each pair in the shards.
        text: Features of the captions, float64 ``(N, E)``.
        image: Unit vectors of the images, float64 ``(N, E)``.
        set_aside: Number of samples that are no usable pair, by reason.
    """

    sample_ids: list[int]
    text: Tensor
    image: Tensor
    set_aside: dict[str, int]


def read_pairs(
    manifest: Manifest, scorer: SegmentScorer, *, num_pairs: int = 512, batch_size: int = 32
) -> PairFeatures:
    """Embed the first samples of shards.

    Args:
        manifest: What the shards hold: images, of any sizes, and captions.
        scorer: Embeds them.
        num_pairs: Samples to read, as far as there are so many.
        batch_size: Samples embedded at a time; fewer where images are large or differ in size.

    Raises:
        DataError: If fewer than two of them are usable pairs, or features are not finite.
    """
    total = min(num_pairs, manifest.num_samples)
    set_aside: Counter[str] = Counter()
    sample_ids: list[int] = []
    features: list[tuple[Tensor, Tensor]] = []
    with show_progress("scoring", total) as advance:
        rows = _usable_rows(manifest, total, set_aside, advance)
        for batch in _batches(rows, batch_size):
            sample_ids += [row["sample_id"] for row in batch]
            features.append(_embed(batch, scorer))
    if len(sample_ids) < MIN_PAIRS:
        raise DataError(
            f"expected at least {MIN_PAIRS} samples with a caption and one image in "
            f"`{manifest.folder}`; got {len(sample_ids)} among {total} "
            f"({counts_line(dict(sorted(set_aside.items())))}); give shards with images"
        )
    text, image = (torch.cat(column) for column in zip(*features, strict=True))
    if not (torch.isfinite(text).all() and torch.isfinite(image).all()):
        raise DataError(
            "expected finite features of the scorer; got NaN; look for NaN in the model's weights"
        )
    return PairFeatures(
        sample_ids=sample_ids, text=text, image=image, set_aside=dict(sorted(set_aside.items()))
    )


def _usable_rows(
    manifest: Manifest, count: int, set_aside: Counter[str], advance: Callable[[int], None]
) -> Iterator[Row]:
    """Decode the first samples one by one; count those that cannot be used."""
    order = EpochOrder(manifest.shard_sizes, shuffle=False)
    reader = IndexedShardReader(manifest, order, BatchPlan(global_batch_size=1))
    decode = DecodeRow("image")
    for sample_id in range(count):
        row = decode(reader.read_sample(sample_id))
        if row["valid"]:
            yield row
        else:
            set_aside[row["fault"]["reason"]] += 1
        advance(1)


def _batches(rows: Iterator[Row], batch_size: int) -> Iterator[list[Row]]:
    """Group neighbours with images of one size, few of them where these are large."""
    for shape, group in groupby(rows, key=lambda row: row["image"].shape):
        count = max(1, min(batch_size, _MAX_BATCH_NUMBERS // shape.numel()))
        while batch := list(islice(group, count)):
            yield batch


@torch.no_grad()
def _embed(rows: Sequence[Row], scorer: SegmentScorer) -> tuple[Tensor, Tensor]:
    """Embed captions and images of one size, float64 ``(B, E)`` each, on the CPU."""
    images = torch.stack([row["image"] for row in rows])
    image = scorer.image_features(images.to(next(scorer.parameters()).device))
    text = scorer.segment_features([row["caption"] for row in rows]).mean()
    return text.double().cpu(), image.double().cpu()


@dataclass(frozen=True)
class MatrixNumbers:
    """How well a matrix of scores, captions by images, tells pairs from others.

    Attributes:
        diagonal: Mean score of the pairs.
        off_diagonal: Mean score of all others.
        text_to_image: Share of captions whose own image scores highest (R@1), ties lost.
        image_to_text: Share of images whose own caption scores highest.
    """

    diagonal: float
    off_diagonal: float
    text_to_image: float
    image_to_text: float


def matrix_numbers(scores: Tensor) -> MatrixNumbers:
    """Compute the numbers of a matrix ``(N, N)`` with N >= 2, captions by images."""
    own = scores.diagonal()
    count = len(own)
    others = scores.masked_fill(torch.eye(count, dtype=torch.bool), -torch.inf)
    return MatrixNumbers(
        own.mean().item(),
        ((scores.sum() - own.sum()) / (count * (count - 1))).item(),
        (own > others.amax(dim=1)).double().mean().item(),
        (own > others.amax(dim=0)).double().mean().item(),
    )


@dataclass(frozen=True, eq=False, kw_only=True)
class DirectionReport:
    """Scores of pairs, taken apart along a common direction.

    Attributes:
        provenance: Where the direction comes from.
        sample_ids: Place of each pair in the shards.
        set_aside: Number of samples that are no usable pair, by reason.
        shares: Common shares of the captions, float64 ``(N,)``.
        statistics: Of the shares.
        parts: Matrices ``(N, N)``, captions by images, by the names of ``PART_NAMES``.
    """

    provenance: Provenance
    sample_ids: list[int]
    set_aside: dict[str, int]
    shares: Tensor
    statistics: ShareStatistics
    parts: dict[str, Tensor]


def take_apart(pairs: PairFeatures, direction: CorpusDirection) -> DirectionReport:
    """Score all captions against all images, and split the scores: the two parts sum to the plain.

    Raises:
        DataError: If the direction has another width than the features.
    """
    common = direction(pairs.text)
    statistics, shares = share_statistics([pairs.text], common)
    plain = pairs.text @ pairs.image.T
    irrelevant = text_irrelevant(pairs.text, common) @ pairs.image.T
    return DirectionReport(
        provenance=direction.provenance,
        sample_ids=pairs.sample_ids,
        set_aside=pairs.set_aside,
        shares=shares,
        statistics=statistics,
        parts={"plain": plain, "relevant": plain - irrelevant, "irrelevant": irrelevant},
    )


def scores_table(report: DirectionReport) -> str:
    """Write the numbers of the three matrices as a Markdown table."""
    count = len(report.shares)
    head = [
        f"{count} x {count}",
        "pairs",
        "others",
        "R@1 text to image",
        "R@1 image to text",
    ]
    rows = [head]
    for key, name in PART_NAMES.items():
        numbers = matrix_numbers(report.parts[key])
        # Rounded first, and no zero is negative.
        means = [f"{round(n, 4) + 0.0:+.4f}" for n in (numbers.diagonal, numbers.off_diagonal)]
        recalls = [f"{value:.3f}" for value in (numbers.text_to_image, numbers.image_to_text)]
        rows.append([name, *means, *recalls])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "| "
        + " | ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True))
        + " |"
        for row in rows
    ]
    rule = "| " + " | ".join("-" * width for width in widths) + " |"
    return "\n".join([lines[0], rule, *lines[1:]])


def shares_line(statistics: ShareStatistics) -> str:
    """Write the statistics of common shares on one line."""
    return (
        f"mean {statistics.mean:.4f}, std {statistics.std:.4f}, "
        f"5 % {statistics.low:.4f}, 95 % {statistics.high:.4f}"
    )


def counts_line(counts: Mapping[str, int]) -> str:
    """Write counts by name on one line."""
    return ", ".join(f"{name}: {count:,}" for name, count in counts.items()) or "none"


def report_page(report: DirectionReport, *, direction_file: str, shards: str) -> str:
    """Write the report as Markdown; it shows the picture beside it."""
    facts = report.provenance
    return f"""# Common direction of {facts.model}

- direction: `{direction_file}`, of {facts.num_captions:,} captions ({facts.captions_digest})
- text weights: {facts.model_digest}
- captions are embedded: {facts.text}
- pairs: {len(report.shares):,} of `{shards}`; set aside: {counts_line(report.set_aside)}
- common share of their captions: {shares_line(report.statistics)}

{scores_table(report)}

Rows of a matrix are captions, columns images. The parts sum to the plain score; R@1 is the share of
rows, or columns, whose own pair scores highest, and 1 / {len(report.shares)} by chance.

![Common shares, and the three matrices of some pairs]({PICTURE_NAME})
"""


def shares_csv(report: DirectionReport) -> str:
    """Write each pair's common share and scores as CSV."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["sample", "common_share", "score", "text_relevant", "text_irrelevant"])
    own = [report.parts[key].diagonal().tolist() for key in PART_NAMES]
    for row in zip(report.sample_ids, report.shares.tolist(), *own, strict=True):
        writer.writerow([row[0], *(f"{value:.6f}" for value in row[1:])])
    return text.getvalue()
