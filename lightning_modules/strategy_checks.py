"""Which strategies training modules refuse, and what else a strategy asks of the trainer."""

import lightning.pytorch as pl
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy

from lightning_modules.sharded_strategy import ShardedStrategy
from segalign.errors import ConfigError


def check_strategy(trainer: pl.Trainer) -> None:
    """Refuse strategies that shard weights in another way than the modules do.

    Lightning's FSDP gathers only what its wrapper calls, so that images made by a callback would
    come from shards; its ``ModelParallelStrategy`` writes checkpoints of its own format.

    Raises:
        ConfigError: If it is one of these, or if evaluations with sharded weights would run in
            inference mode, whose tensors cannot be gathered.
    """
    strategy = trainer.strategy
    if isinstance(strategy, ShardedStrategy):
        _check_inference_mode(trainer)
    elif isinstance(strategy, ModelParallelStrategy | FSDPStrategy):
        raise ConfigError(
            "expected `lightning_modules.sharded_strategy.ShardedStrategy` to shard weights; got "
            f"`{type(strategy).__name__}`; layer configs/base/fsdp.yaml instead of that setting"
        )


def _check_inference_mode(trainer: pl.Trainer) -> None:
    loops = (trainer.validate_loop, trainer.test_loop, trainer.predict_loop)
    if any(loop.inference_mode for loop in loops):
        raise ConfigError(
            "expected `trainer.inference_mode: false` with sharded weights; got true; set it, "
            "or layer configs/base/fsdp.yaml, which does"
        )
