"""Work that one rank does for all."""

from collections.abc import Callable

import lightning.pytorch as pl

from segalign.ranks import together


def on_rank_zero(trainer: pl.Trainer, work: Callable[[], None]) -> None:
    """Do something on rank 0; where it fails, it fails on all ranks, so that none waits."""

    def work_or_wait() -> None:
        if trainer.is_global_zero:
            work()

    together(work_or_wait)
