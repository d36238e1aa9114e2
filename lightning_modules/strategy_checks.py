"""Which strategies training modules refuse."""

from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy, Strategy

from lightning_modules.sharded_strategy import ShardedStrategy
from segalign.errors import ConfigError


def check_strategy(strategy: Strategy) -> None:
    """Refuse strategies that shard weights in another way than the modules do.

    Lightning's FSDP gathers only what its wrapper calls, so that images made by a callback would
    come from shards; its ``ModelParallelStrategy`` writes checkpoints of its own format.

    Raises:
        ConfigError: If it is one of these.
    """
    is_other = isinstance(strategy, ModelParallelStrategy) and not isinstance(
        strategy, ShardedStrategy
    )
    if is_other or isinstance(strategy, FSDPStrategy):
        raise ConfigError(
            "expected `lightning_modules.sharded_strategy.ShardedStrategy` to shard weights; got "
            f"`{type(strategy).__name__}`; layer configs/base/fsdp.yaml instead of that setting"
        )
