from types import SimpleNamespace

import torch

from callbacks.step_rng import StepRng


def draw(seed=0, step=0, batch_idx=0, rank=0, accumulate=2):
    trainer = SimpleNamespace(
        global_step=step, global_rank=rank, accumulate_grad_batches=accumulate
    )
    StepRng(seed).on_train_batch_start(trainer, None, None, batch_idx)
    return torch.rand(()).item()


def test_draws_depend_on_the_counters_alone():
    torch.manual_seed(1)
    first = draw(step=5, batch_idx=10)
    torch.manual_seed(2)
    assert draw(step=5, batch_idx=10) == first
    assert draw(step=5, batch_idx=12) == first  # the same place within its step


def test_every_counter_counts():
    changes = [{}, {"seed": 1}, {"step": 1}, {"batch_idx": 1}, {"rank": 1}]
    assert len({draw(**change) for change in changes}) == len(changes)
