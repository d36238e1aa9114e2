"""Where a run stands, asked of its trainer: rank, accumulation, steps. None is a run of one."""

from lightning.pytorch import Trainer

from segalign.errors import ConfigError


def data_parallel_rank(trainer: Trainer | None) -> tuple[int, int]:
    """Return the number of data-parallel ranks and the place among them."""
    strategy = None if trainer is None else trainer.strategy
    ranks = getattr(strategy, "distributed_sampler_kwargs", None)
    return (1, 0) if ranks is None else (ranks["num_replicas"], ranks["rank"])


def batches_per_step(trainer: Trainer | None, accumulate: int) -> int:
    """Return how many batches of one rank an optimizer step consumes.

    Args:
        trainer: Its setting counts for modules that leave the optimizer to it.
        accumulate: The setting of the data, for modules that step their optimizer themselves.

    Raises:
        ConfigError: If the two settings contradict each other.
    """
    if trainer is None or not trainer.lightning_module.automatic_optimization:
        return accumulate
    expected = int(trainer.accumulate_grad_batches)
    if accumulate not in (1, expected):
        raise ConfigError(
            f"`data.accumulate` must be 1 or equal `trainer.accumulate_grad_batches` "
            f"({expected}); got {accumulate}; remove it"
        )
    return expected


def steps_served(trainer: Trainer) -> int:
    """Return the number of optimizer steps that the data sequence has served.

    A trainer that over-fits a few batches starts at the first step again and again.
    """
    is_repeating = getattr(trainer, "overfit_batches", 0) > 0
    return 0 if is_repeating else int(trainer.global_step)


def steps_taken(trainer: Trainer | None) -> int | None:
    """Return the number of whole optimizer steps of a run; None if nobody counts them."""
    return None if trainer is None else int(trainer.global_step)


def stage_name(trainer: Trainer | None) -> str:
    """Return what the trainer is doing: ``train``, ``validate``, ..."""
    stage = None if trainer is None else trainer.state.stage
    return "train" if stage is None else str(stage.value)


def is_on_gpu(trainer: Trainer | None) -> bool:
    """Tell whether batches go to a CUDA device."""
    return trainer is not None and trainer.strategy.root_device.type == "cuda"
