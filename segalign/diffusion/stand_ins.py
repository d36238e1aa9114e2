"""Other modules in the place of a network's own, for the duration of a block."""

import contextlib
from collections.abc import Iterator, Mapping

from torch import nn

# (parent, name of a child) -> module that stands in for the child.
Places = dict[tuple[nn.Module, str], nn.Module]


@contextlib.contextmanager
def standing_in(places: Mapping[tuple[nn.Module, str], nn.Module]) -> Iterator[None]:
    """Exchange children of modules; the network's own are back afterwards, whatever happens.

    Cheap enough for every call of a network: only references change.
    """
    own = {(parent, name): parent._modules[name] for parent, name in places}
    try:
        for (parent, name), module in places.items():
            parent._modules[name] = module
        yield
    finally:
        for (parent, name), child in own.items():
            parent._modules[name] = child
