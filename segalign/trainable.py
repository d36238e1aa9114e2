"""What of a module is learnt: its trainable parameters and the buffers that belong to them."""

from collections.abc import Iterator, Mapping

from torch import Tensor, nn


def trainable_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that require gradients, by name; tied ones once."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def trainable_state_dict(
    module: nn.Module, state: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Return a state dict without frozen weights.

    Kept are trainable parameters, and the persistent buffers of submodules that are not wholly
    frozen. So a frozen text encoder or VAE adds nothing to a checkpoint.

    Args:
        module: Any module.
        state: Filter these entries instead of ``module.state_dict()``; entries that are neither
            parameters nor buffers of the module are kept.
    """
    frozen = frozenset(_frozen_names(module))
    entries = module.state_dict() if state is None else state
    return {name: tensor for name, tensor in entries.items() if name not in frozen}


def _frozen_names(module: nn.Module) -> Iterator[str]:
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if not parameter.requires_grad:
            yield name
    for prefix, submodule in module.named_modules(remove_duplicate=False):
        parameters = list(submodule.parameters())
        if parameters and not any(p.requires_grad for p in parameters):
            for name, _ in submodule.named_buffers(prefix=prefix, remove_duplicate=False):
                yield name
