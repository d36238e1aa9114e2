"""What a step of reward fine-tuning logs."""

import torch
from lightning.pytorch.strategies import Strategy
from torch import Tensor

from segalign.reward_tuning.step import StepReport
from segalign.truncation.step_norms import StepGradientNorms


def step_means(report: StepReport, valid: Tensor, strategy: Strategy) -> dict[str, Tensor]:
    """Average what a step found over the valid rows of all ranks, by one collective.

    Args:
        report: What was found; the same names on all ranks.
        valid: Which rows count, bool ``(B,)``.
        strategy: Reduces over the ranks.

    Returns:
        Scalars of the images: ``loss`` and ``penalty`` of the objective, ``reward_mean``, and
        ``reward/PART``; of their re-noised copies ``reward/renoised``; NaN if no row is valid.
    """
    rows = {"loss": len(valid) * report.losses, "penalty": len(valid) * report.penalties}
    for name, values in report.rewards.items():
        rows["reward_mean" if name == "rewards" else f"reward/{name}"] = values
    sums = [torch.where(valid, values.double(), 0.0).sum() for values in rows.values()]
    total = strategy.reduce(torch.stack([*sums, valid.sum().double()]), reduce_op="sum")
    assert isinstance(total, Tensor)
    means = (total[:-1] / total[-1]).float()
    return dict(zip(rows, means, strict=True))


def gradient_figures(
    report: StepReport, norm: Tensor, norms: StepGradientNorms
) -> dict[str, Tensor | float]:
    """Describe the gradient.

    Its scale depends on the offset, which is the first trained step: it follows ``factor_sum``.

    Args:
        report: What was trained.
        norm: Norm of the whole gradient, before clipping.
        norms: What each trained step added on this rank, where it came alone: of the last part
            that was sampled.

    Returns:
        ``grad_norm``, ``offset``, ``factor_sum``, ``step_grad_norm/k`` for the k-th of the trained
        steps, and of a decoder in place of the model's ``decoder_bias/cosine`` and ``norm_ratio``.
    """
    figures: dict[str, Tensor | float] = {
        "grad_norm": norm,
        "offset": float(report.plan.train_steps[0]),
        "factor_sum": sum(abs(factor) for factor in report.factors.values()),
    }
    for place, index in enumerate(report.plan.train_steps):
        if index in norms.norms:
            figures[f"step_grad_norm/{place}"] = norms.norms[index]
    if (bias := report.decoder_bias) is not None:
        figures |= {
            "decoder_bias/cosine": bias.cosine.nanmean(),
            "decoder_bias/norm_ratio": bias.norm_ratio.nanmean(),
        }
    return figures
