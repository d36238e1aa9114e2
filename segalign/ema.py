"""Exponential moving average of the trainable weights, and of nothing else."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from segalign.errors import ConfigError, DataError
from segalign.sharded_tensors import copy_into, gathered_tree, local, sharded_like
from segalign.trainable import trainable_parameters


class TrainableEMA:
    """Float32 averages of a module's trainable parameters.

    Frozen weights are not copied, so with LoRA an average costs a few per cent of the model.
    Averages of sharded weights are sharded like them.

    Args:
        module: The module to follow; its parameters that require gradients now.
        decay: Upper bound of the decay, in [0, 1).
        warmup: Use ``min(decay, (1 + n) / (10 + n))`` at the n-th update, so that the first
            averages forget the initial weights quickly.

    Raises:
        ConfigError: If ``decay`` is outside [0, 1), or nothing is trainable.
    """

    def __init__(self, module: nn.Module, decay: float = 0.999, *, warmup: bool = True) -> None:
        if not 0 <= decay < 1:
            raise ConfigError(f"expected an EMA `decay` in [0, 1); got {decay}. Try 0.999.")
        self.decay = decay
        self.warmup = warmup
        self.num_updates = 0
        self.weights: dict[str, Tensor] = {
            name: parameter.detach().float().clone()
            for name, parameter in trainable_parameters(module).items()
        }
        if not self.weights:
            raise ConfigError(
                "expected a module with trainable parameters for an EMA; got none. "
                "Remove the EMA callback, or train something."
            )

    def decay_at(self, num_updates: int) -> float:
        """Return the decay of the update that follows ``num_updates`` earlier ones."""
        if not self.warmup:
            return self.decay
        return min(self.decay, (1 + num_updates) / (10 + num_updates))

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Move every average towards the current weight: e <- d e + (1 - d) w."""
        weight = 1 - self.decay_at(self.num_updates)
        for name, parameter in self._pairs(module):
            average = self._on(parameter.device, name)
            local(average).lerp_(local(parameter).float(), weight)
        self.num_updates += 1

    @contextlib.contextmanager
    def swapped(self, module: nn.Module) -> Iterator[None]:
        """Put the averages into the module for the duration of a block.

        The raw weights return bit for bit, also if the block raises.
        """
        raw = {name: p.detach().clone() for name, p in self._pairs(module)}
        try:
            self._fill(module, self.weights)
            yield
        finally:
            self._fill(module, raw)

    def state_dict(self) -> dict[str, Any]:
        """Return the averages (references) and the number of updates.

        If weights are sharded this is a collective, and the first rank alone gets them: whole.
        """
        return {"weights": gathered_tree(self.weights), "num_updates": self.num_updates}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over saved averages.

        Raises:
            DataError: If they belong to other parameters than this module trains.
        """
        weights: Mapping[str, Tensor] = state["weights"]
        shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
        expected = {name: tuple(tensor.shape) for name, tensor in self.weights.items()}
        if shapes != expected:
            differing = sorted(set(shapes.items()) ^ set(expected.items()))[0][0]
            raise DataError(
                f"expected EMA weights of the {len(expected)} trained tensors; got "
                f"{len(shapes)}, differing in `{differing}`. Use the config of the saved run."
            )
        for name, tensor in weights.items():
            own = self.weights[name]
            average = tensor.detach().to(own.device, torch.float32)
            self.weights[name] = sharded_like(average, own).clone()
        self.num_updates = int(state["num_updates"])

    def _pairs(self, module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
        for name, parameter in module.named_parameters():
            if name in self.weights:
                yield name, parameter

    def _on(self, device: torch.device, name: str) -> Tensor:
        if self.weights[name].device != device:
            self.weights[name] = self.weights[name].to(device)
        return self.weights[name]

    @torch.no_grad()
    def _fill(self, module: nn.Module, weights: Mapping[str, Tensor]) -> None:
        for name, parameter in self._pairs(module):
            copy_into(parameter, weights[name])
