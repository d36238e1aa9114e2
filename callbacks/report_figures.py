"""What a report of before and after training has scored, on one rank and on all.

Dims: B images, P pictures, H/W pixels.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from callbacks.caption_rows import have_facts
from segalign.evaluation.captions import CaptionRow
from segalign.metrics.report_table import ReportTable
from segalign.pictures import to_bytes
from segalign.ranks import gather_objects
from segalign.scenes.evaluation import SceneScore
from segalign.scenes.world import get_world
from segalign.text.tokenizer import clip_tokenizer

# Names of the oracle's accuracies, and what the table calls them.
FACTS = {
    "attributes": "facts shown: attributes",
    "attributes/within_77": "facts shown: attributes within 77 tokens",
    "attributes/past_77": "facts shown: attributes past token 77",
    "objects": "facts shown: objects",
}


@dataclass(frozen=True, eq=False)
class Figures:
    """What one set of weights scores.

    Attributes:
        values: Means over the captions, by the table's names, in its order; over finite values,
            NaN if there are none.
        pictures: Of the first captions, uint8 ``(P, 3, H, W)``.
        num_non_finite: Images that are not finite: the means of rewards leave them out, facts are
            not shown by them.
    """

    values: dict[str, float]
    pictures: Tensor
    num_non_finite: int = 0


class RankFigures:
    """What one rank has scored, by the rows' places.

    Args:
        rows: All rows of the report.
        num_pictures: Prompts in its picture.
    """

    def __init__(self, rows: Sequence[CaptionRow], num_pictures: int) -> None:
        self.rows = rows
        self.num_pictures = num_pictures
        self.facts = _scene_score(rows)
        self.rewards: dict[int, dict[str, float]] = {}
        self.pictures: dict[int, Tensor] = {}
        self.num_non_finite = 0

    def add(self, places: Sequence[int], images: Tensor, rewards: dict[str, Tensor]) -> None:
        """Add a batch.

        Args:
            places: Places of its ``B`` rows; those of no row are padding.
            images: In [0, 1], ``(B, 3, H, W)``.
            rewards: ``(B,)`` each, by name.
        """
        own = [place for place in places if place < len(self.rows)]
        if not own:
            return
        host = {name: values.tolist() for name, values in rewards.items()}
        self.num_non_finite += int((~images[: len(own)].flatten(1).isfinite().all(dim=1)).sum())
        shown = images[: len(own)].nan_to_num().cpu()
        for index, place in enumerate(own):
            self.rewards[place] = {name: values[index] for name, values in host.items()}
            if place < self.num_pictures:
                self.pictures[place] = to_bytes(shown[index])
        if self.facts is not None:
            rows = [self.rows[place] for place in own]
            captions = [row["caption"] for row in rows]
            self.facts.update(shown, captions, [row["metadata"] for row in rows])

    def join(self) -> Figures:
        """Put all ranks' parts together, the same on each; every rank must call it.

        Means do not depend on how rows were shared out.
        """
        counts = None if self.facts is None else self.facts.to_tensor()
        parts: list[Any] = gather_objects(
            (self.rewards, self.pictures, self.num_non_finite, counts)
        )
        rewards = {place: row for part in parts for place, row in part[0].items()}
        pictures = {place: picture for part in parts for place, picture in part[1].items()}
        ordered = [rewards[place] for place in sorted(rewards)]
        values = {name: _finite_mean([row[name] for row in ordered]) for name in ordered[0]}
        if self.facts is not None:
            self.facts.load_tensor(torch.stack([part[3] for part in parts]).sum(0))
            found = self.facts.accuracies()
            values |= {label: found[name] for name, label in FACTS.items() if name in found}
        shown = torch.stack([pictures[place] for place in sorted(pictures)])
        return Figures(values, shown, sum(part[2] for part in parts))


def change_table(columns: dict[str, Figures | None]) -> ReportTable:
    """Make the table of a report.

    Args:
        columns: Figures by the headings ``before``, ``after`` and perhaps ``best``; None where
            there are none, which the last must have.
    """
    *_, last = columns
    trained = columns[last]
    assert trained is not None
    rows = []
    for name in trained.values:
        values = [math.nan if c is None else c.values.get(name, math.nan) for c in columns.values()]
        change = values[-1] - values[0]
        rows.append([name, *(_number(value, "") for value in values), _number(change, "+")])
    headings = ["measure", *columns, f"change ({last.split()[0]} - before)"]
    return ReportTable("Rewards before and after", headings, rows)


def _number(value: float, sign: str) -> str:
    return "-" if math.isnan(value) else f"{value:{sign}.4f}"


def _finite_mean(values: Sequence[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else math.nan


def _scene_score(rows: Sequence[CaptionRow]) -> SceneScore | None:
    if not have_facts(rows):
        return None
    return SceneScore(get_world(rows[0]["metadata"]["world"]), clip_tokenizer())
