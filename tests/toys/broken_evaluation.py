"""Evaluations that training notices, and metrics that depend on who has seen what."""

import torch
from torch import distributed

from callbacks.image_evaluation import ImageEvaluation
from segalign.metrics import feature_sums


def moves_a_weight() -> None:
    """Leaves one weight of the model a little larger after every evaluation."""
    evaluate = ImageEvaluation.on_validation_epoch_end

    def evaluate_and_move(self, trainer, pl_module):
        evaluate(self, trainer, pl_module)
        with torch.no_grad():
            next(p for p in pl_module.parameters() if p.requires_grad).add_(1e-6)

    ImageEvaluation.on_validation_epoch_end = evaluate_and_move


def leaves_the_average_in() -> None:
    """Copies the average of the weights in for an evaluation, and never takes it out."""
    evaluate = ImageEvaluation.on_validation_epoch_end

    def evaluate_and_leave(self, trainer, pl_module):
        evaluate(self, trainer, pl_module)
        weights = dict(pl_module.named_parameters())
        with torch.no_grad():
            for name, average in pl_module.ema.weights.items():
                weights[name].copy_(average)

    ImageEvaluation.on_validation_epoch_end = evaluate_and_leave


def rounds_otherwise_on_a_rank() -> None:
    """Rounds features up on the second rank, and to the nearest on others."""
    to_grid = feature_sums.to_grid

    def to_grid_by_rank(features, bits):
        is_second = distributed.is_initialized() and distributed.get_rank() == 1
        return to_grid(features + is_second * 2.0 ** -(bits + 1), bits)

    feature_sums.to_grid = to_grid_by_rank
