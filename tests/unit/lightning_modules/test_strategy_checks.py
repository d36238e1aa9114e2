"""Strategies that shard weights in another way than the modules do are refused in one line."""

from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.strategies import (
    DDPStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
)

from lightning_modules.sharded_strategy import ShardedStrategy
from lightning_modules.strategy_checks import check_strategy
from lightning_modules.training import TrainingModule
from segalign.errors import ConfigError


@pytest.mark.parametrize("refused", [FSDPStrategy, ModelParallelStrategy])
def test_other_shards_are_refused_before_weights_are_read(refused):
    module = TrainingModule(torch.optim.SGD, None)
    module._trainer = SimpleNamespace(strategy=refused())
    with pytest.raises(ConfigError, match=rf"got `{refused.__name__}`; layer .*fsdp") as refusal:
        module.configure_callbacks()
    assert "\n" not in str(refusal.value)


def test_one_device_ddp_and_sharded_weights_are_let_pass():
    for allowed in (DDPStrategy(), ShardedStrategy(), SingleDeviceStrategy()):
        check_strategy(allowed)


@pytest.mark.parametrize("evaluation", ["validate_loop", "test_loop", "predict_loop"])
def test_inference_mode_is_refused_with_sharded_weights(evaluation):
    loops = ("validate_loop", "test_loop", "predict_loop")
    trainer = SimpleNamespace(
        **{name: SimpleNamespace(inference_mode=name == evaluation) for name in loops}
    )
    with pytest.raises(ConfigError, match=r"expected `trainer\.inference_mode: false` with"):
        ShardedStrategy().setup(trainer)
