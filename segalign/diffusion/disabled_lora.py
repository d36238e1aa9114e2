"""The network without its adapters, for the duration of a block."""

import contextlib
from collections.abc import Iterator

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from segalign.errors import ConfigError


@contextlib.contextmanager
def disabled_lora(model: nn.Module) -> Iterator[None]:
    """Call a network as if it had no adapters; afterwards, also after an error, it is as before.

    Inside, adapter weights ask for no gradient: PEFT switches both. A graph that was recorded
    before keeps its gradients, if it is differentiated after the block.

    Args:
        model: Network whose adapters PEFT or diffusers has added.

    Raises:
        ConfigError: If it has none.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, BaseTunerLayer)]
    if not layers:
        raise ConfigError(
            f"expected a network with adapters; got `{type(model).__name__}` without. Train it "
            "with LoRA, or give a frozen copy as reference."
        )
    was_disabled = [layer.disable_adapters for layer in layers]
    # PEFT asks gradients of all active adapters when it enables them again, also of frozen ones.
    asked = [(weight, weight.requires_grad) for layer in layers for weight in layer.parameters()]
    try:
        for layer in layers:
            layer.enable_adapters(False)
        yield
    finally:
        for layer, disabled in zip(layers, was_disabled, strict=True):
            layer.enable_adapters(not disabled)
        for weight, requires_grad in asked:
            weight.requires_grad_(requires_grad)
