"""How often a scorer prefers the image that people prefer.

Dims: B batch of pairs, R ways to score, G buckets, n segments of a caption.
"""

from collections.abc import Sequence
from typing import Any, Final, TypedDict

import torch
from torch import Tensor
from torchmetrics import Metric
from typing_extensions import override

from segalign.errors import DataError
from segalign.metrics.pair_buckets import BUCKETS, SEGMENT_GROUPS, segment_group

# A win counts two half points, a tie of the model one: whole numbers, so that sums are exact.
_FULL: Final = 2


class PairResult(TypedDict):
    """What pair accuracy found; NaN where nothing was counted.

    Attributes:
        accuracy: Float64 ``(R, G)``, by way to score and ``BUCKETS``.
        num_pairs: Pairs of each bucket, int64 ``(G,)``.
        segment_accuracy: Accuracy of segments that score alone, float64, by ``SEGMENT_GROUPS``.
        num_segments: Segments of each group, int64.
        num_left_out: Pairs without a preference, int64.
    """

    accuracy: Tensor
    num_pairs: Tensor
    segment_accuracy: Tensor
    num_segments: Tensor
    num_left_out: Tensor


class PairAccuracy(Metric):
    """Share of pairs whose preferred image has the higher score.

    A pair of equal scores counts one half. Pairs with preference (0.5, 0.5) are left out, and
    counted. The states are sums of whole numbers, exact over ranks.

    Args:
        num_ways: R.
        settings: Those of ``torchmetrics.Metric``.
    """

    full_state_update = False
    higher_is_better = True
    points: Tensor
    num_pairs: Tensor
    segment_points: Tensor
    num_segments: Tensor
    num_left_out: Tensor

    def __init__(self, num_ways: int, **settings: Any) -> None:
        super().__init__(**settings)
        shapes = {
            "points": (num_ways, len(BUCKETS)),
            "num_pairs": (len(BUCKETS),),
            "segment_points": (len(SEGMENT_GROUPS),),
            "num_segments": (len(SEGMENT_GROUPS),),
            "num_left_out": (1,),
        }
        for state, shape in shapes.items():
            self.add_state(state, torch.zeros(shape, dtype=torch.int64), dist_reduce_fx="sum")

    @override
    def update(
        self,
        scores: Tensor,
        preference_probs: Tensor,
        valid: Tensor,
        buckets: Sequence[Sequence[str]],
        segment_scores: Sequence[Tensor],
    ) -> None:
        """Count a batch.

        Args:
            scores: Of both images in each way, ``(B, 2, R)``.
            preference_probs: See ``PreferenceBatch``.
            valid: Rows to count, bool ``(B,)``.
            buckets: Buckets of each pair, out of ``BUCKETS``.
            segment_scores: Of each pair, those of both images by each segment, ``(n, 2)``.

        Raises:
            DataError: If a score is not finite.
        """
        sign, kept = _preferred_sign(preference_probs.cpu()), valid.cpu()
        self.num_left_out += int((kept & (sign == 0)).sum())
        rows = (kept & (sign != 0)).nonzero().flatten().tolist()
        if not rows:
            return
        found = half_points(scores.detach().cpu()[rows], sign[rows, None])
        members = torch.tensor([[name in buckets[row] for name in BUCKETS] for row in rows])
        self.points += (found.T @ members.long()).to(self.points.device)
        self.num_pairs += members.sum(dim=0).to(self.num_pairs.device)
        for row in rows:
            alone = half_points(segment_scores[row].detach().cpu(), sign[row])
            groups = torch.tensor([segment_group(place) for place in range(len(alone))]).long()
            counts = torch.bincount(groups, minlength=len(SEGMENT_GROUPS))
            points = torch.zeros_like(counts).index_add(0, groups, alone)
            self.num_segments += counts.to(self.num_segments.device)
            self.segment_points += points.to(self.segment_points.device)

    @override
    def compute(self) -> PairResult:
        """Return accuracies.

        Raises:
            DataError: If no pair has a preference.
        """
        if not int(self.num_pairs[0]):
            raise DataError(
                "expected pairs with a preference; got none, and "
                f"{int(self.num_left_out)} ties; evaluate other pairs"
            )
        return PairResult(
            accuracy=self.points.cpu().double() / (_FULL * self.num_pairs.cpu()),
            num_pairs=self.num_pairs.cpu(),
            segment_accuracy=self.segment_points.cpu().double() / (_FULL * self.num_segments.cpu()),
            num_segments=self.num_segments.cpu(),
            num_left_out=self.num_left_out.cpu(),
        )


def half_points(scores: Tensor, sign: Tensor) -> Tensor:
    """Give 2 where the preferred image scores higher, 1 where both score the same, else 0.

    Args:
        scores: ``(..., 2)`` or ``(B, 2, R)``; the dimension of 2 is the second.
        sign: 1 if the first image is preferred, -1 if the second is.

    Returns:
        int64, without that dimension.

    Raises:
        DataError: If a score is not finite.
    """
    if not torch.isfinite(scores).all():
        raise DataError(
            "expected finite scores of both images; got NaN or infinity; check the scorer's "
            "weights and dtype"
        )
    return 1 + ((scores[:, 0] - scores[:, 1]).sign() * sign).long()


def _preferred_sign(preference_probs: Tensor) -> Tensor:
    """Return 1 where the first image is preferred, -1 where the second is, 0 for ties, ``(B,)``."""
    return (preference_probs[:, 0] - preference_probs[:, 1]).sign()
