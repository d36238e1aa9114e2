"""The inception score, exact over ranks.

Dims: B rows, c classes, K splits.

Reference: arXiv 1606.03498: exp of the mean KL divergence between p(y|x) and its mean p(y).
"""

from typing import Any, Final, Literal, TypedDict

import torch
from torch import Tensor
from typing_extensions import override

from segalign.errors import DataError
from segalign.metrics.feature_statistics import check_finite
from segalign.metrics.fixed_point import check_value_sums, from_whole, to_whole
from segalign.metrics.sum_metric import SumMetric
from segalign.rng import counter_seed

_NUM_SPLITS: Final = 10


class InceptionScoreResult(TypedDict):
    """What the inception score found.

    Attributes:
        mean: Mean of the scores of splits, float64.
        std: Their standard deviation, float64.
        num_empty_splits: Splits without a sample, which are left out, int64.
        num_samples: Samples counted, int64.
    """

    mean: Tensor
    std: Tensor
    num_empty_splits: Tensor
    num_samples: Tensor


class InceptionScore(SumMetric):
    """Inception score, mean and standard deviation over splits.

    The split of a sample is a hash of its id, so that it depends neither on order nor on ranks, and
    no random number is drawn. Splits differ a little in size. Of each, sums of p and p log p are
    kept, as whole numbers of 2^-40.

    Args:
        num_classes: Number of classes, c.
        num_samples: Ids of samples are below it.
        num_splits: K; the score grows with the size of splits, so never compare different ones.
        ddof: The deviation's divisor is K - ddof; torch-fidelity's is 0, torchmetrics' 1.
        settings: Those of ``torchmetrics.Metric``.

    Raises:
        DataError: If there are too many samples for exact sums, about 4 million divided by log c.
    """

    higher_is_better = True
    ids: Tensor
    counts: Tensor
    probabilities: Tensor
    negentropy: Tensor

    def __init__(
        self,
        num_classes: int,
        num_samples: int,
        *,
        num_splits: int = _NUM_SPLITS,
        ddof: Literal[0, 1] = 0,
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        # |sum p log p| is at most log c, and p at most 1.
        check_value_sums(max(float(torch.tensor(num_classes).log()), 1.0), num_samples)
        self.num_splits = num_splits
        self.ddof = ddof
        self.add_ids("ids", num_samples)
        self.add_sum("counts", num_splits)
        self.add_sum("probabilities", num_splits, num_classes)
        self.add_sum("negentropy", num_splits)

    @override
    def update(self, logits: Tensor, sample_ids: Tensor, counted: Tensor) -> None:
        """Add a batch; all is computed on the CPU in float64, whatever the device of the logits.

        Args:
            logits: Scores before the softmax, ``(B, c)``.
            sample_ids: int64 ``(B,)``.
            counted: Rows to count, bool ``(B,)``.

        Raises:
            DataError: If counted logits are not finite; nothing is changed.
        """
        rows = self.new_rows("ids", sample_ids, counted)
        ids = sample_ids.cpu()[rows]
        new = logits.detach()[rows.to(logits.device)].cpu().double()
        check_finite(new)
        p, log_p = new.softmax(dim=1), new.log_softmax(dim=1)
        owner = torch.tensor([split_of(number, self.num_splits) for number in ids.tolist()])
        owner = owner.to(torch.int64)  # of no rows, too
        # Rounded term by term, so that not even the order of classes matters.
        for name, whole in (
            ("counts", torch.ones_like(owner)),
            ("probabilities", to_whole(p)),
            ("negentropy", to_whole(p * log_p).sum(dim=1)),
        ):
            state: Tensor = getattr(self, name)
            setattr(self, name, state.index_add(0, owner.to(state.device), whole.to(state.device)))
        self.mark("ids", ids)

    @override
    def compute(self) -> InceptionScoreResult:
        """Return mean and standard deviation over splits that have samples.

        Raises:
            DataError: If there is no sample.
        """
        kept = (self.counts > 0).cpu()
        if not kept.any():
            raise DataError("expected images for an inception score; got none; add images")
        counts = self.counts.cpu()[kept].double()
        marginal = from_whole(self.probabilities.cpu()[kept]) / counts[:, None]
        negentropy = from_whole(self.negentropy.cpu()[kept]) / counts

        def moments() -> Tensor:
            scores = (negentropy - torch.xlogy(marginal, marginal).sum(dim=1)).exp()
            deviation = (scores - scores.mean()).square().sum() / (len(scores) - self.ddof)
            return torch.stack([scores.mean(), deviation.sqrt()])

        mean, std = self.computed_once(moments, count=2)
        return {
            "mean": mean,
            "std": std,
            "num_empty_splits": (~kept).sum(),
            "num_samples": self.counts.cpu().sum(),
        }


def split_of(sample_id: int, num_splits: int) -> int:
    """Return the split that a sample belongs to."""
    return counter_seed("inception score split", sample_id) % num_splits
