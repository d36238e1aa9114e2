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

LOOPS = ("validate_loop", "test_loop", "predict_loop")


@pytest.mark.parametrize("refused", [FSDPStrategy, ModelParallelStrategy])
def test_other_shards_are_refused_before_weights_are_read(refused):
    module = TrainingModule(torch.optim.SGD, None)
    module._trainer = SimpleNamespace(strategy=refused())
    with pytest.raises(ConfigError, match=rf"got `{refused.__name__}`; layer .*fsdp") as refusal:
        module.configure_callbacks()
    assert "\n" not in str(refusal.value)


def test_one_device_ddp_and_sharded_weights_are_let_pass():
    for allowed in (DDPStrategy(), ShardedStrategy(), SingleDeviceStrategy()):
        loops = dict.fromkeys(LOOPS, SimpleNamespace(inference_mode=False))
        check_strategy(SimpleNamespace(strategy=allowed, **loops))


@pytest.mark.parametrize("evaluation", LOOPS)
def test_inference_mode_is_refused_with_sharded_weights_before_weights_are_read(evaluation):
    loops = {name: SimpleNamespace(inference_mode=name == evaluation) for name in LOOPS}
    module = TrainingModule(torch.optim.SGD, None)
    module._trainer = SimpleNamespace(strategy=ShardedStrategy(), **loops)
    with pytest.raises(ConfigError, match=r"expected `trainer\.inference_mode: false` with"):
        module.configure_callbacks()
    module._trainer.strategy = DDPStrategy()
    module.configure_callbacks()
