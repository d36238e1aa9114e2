"""FSDP2 for Lightning, with the same checkpoints as on one device."""

from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.optimizer import _optimizer_to_device
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from torch import nn
from torch.optim import Optimizer
from typing_extensions import override

from segalign.sharded_tensors import (
    gathered_tree,
    sharded_like,
    sharded_optimizer_state,
    weights_apart,
)
from segalign.trainable import trainable_state_dict


class ShardedStrategy(ModelParallelStrategy):
    """Share the samples over all ranks, and the weights that modules shard; on GPUs and CPUs.

    Checkpoints hold whole tensors, are written by the first rank, and are read back by any
    strategy on any number of ranks.

    Args:
        process_group_backend: Such as ``nccl`` or ``gloo``; null chooses by the device.
        timeout: How long a rank waits for the others.
    """

    def __init__(
        self,
        process_group_backend: str | None = None,
        timeout: timedelta = timedelta(minutes=30),
    ) -> None:
        super().__init__(
            tensor_parallel_size=1,
            save_distributed_checkpoint=False,
            process_group_backend=process_group_backend,
            timeout=timeout,
        )

    @property
    @override
    def restore_checkpoint_after_setup(self) -> bool:
        """As with other strategies: callbacks see a run's start after its weights are back."""
        return False

    @property
    @override
    def lightning_restore_optimizer(self) -> bool:
        return True

    @override
    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    @override
    def optimizer_step(
        self,
        optimizer: Optimizer,
        closure: Callable[[], Any],
        model: pl.LightningModule | nn.Module | None = None,
        **kwargs: Any,
    ) -> Any:
        """Step an optimizer, whole and sharded weights one after the other."""
        with weights_apart(optimizer):
            return super().optimizer_step(optimizer, closure, model, **kwargs)

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Gather what is trained, on all ranks; frozen weights are left out."""
        assert self.lightning_module is not None
        return self._gather(trainable_state_dict(self.lightning_module))

    @override
    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Gather the state of an optimizer, on all ranks."""
        return self._gather(Strategy.optimizer_state(self, optimizer))

    def _gather(self, tree: dict[str, Any]) -> dict[str, Any]:
        return dict(gathered_tree(tree))

    @override
    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None
    ) -> None:
        """Write a checkpoint on the first rank, by the plugin that writes all others."""
        Strategy.save_checkpoint(self, checkpoint, filepath, storage_options)

    @override
    def load_checkpoint(
        self, checkpoint_path: Any, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint, whole, on every rank."""
        return Strategy.load_checkpoint(self, checkpoint_path, weights_only)

    @override
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Cut stored weights as the module's are cut, and load them."""
        module = self.lightning_module
        assert module is not None
        own = module.state_dict()
        state = {
            name: sharded_like(tensor, own[name]) if name in own else tensor
            for name, tensor in checkpoint["state_dict"].items()
        }
        module.load_state_dict(state, strict=strict)

    @override
    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Cut stored states of optimizers as their weights are cut, and load them."""
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            optimizer.load_state_dict(sharded_optimizer_state(optimizer, state))
            _optimizer_to_device(optimizer, torch.device(self.root_device))
