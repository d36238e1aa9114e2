"""What a reward is.

Dims: B batch, H/W pixels.
"""

import contextlib
import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn
from typing_extensions import override

from segalign.errors import ConfigError, DataError, NonFiniteError

# Decoded images may overshoot [0, 1] a little; bytes, and [-1, 1], are elsewhere.
_SLACK = 0.5


class Reward(Protocol):
    """Scores images against their captions."""

    def __call__(self, images: Tensor, captions: Sequence[str]) -> Tensor:
        """Score each image against its own caption.

        Args:
            images: Float, in [0, 1], ``(B, 3, H, W)``. Carries gradient.
            captions: ``B`` captions.

        Returns:
            Rewards ``(B,)``, higher is better, unscaled; differentiable in the images.
        """
        ...


class RewardSource(Protocol):
    """The settings of a reward: what a config names. Making it is cheap and reads nothing."""

    # Any: the parser of configs accepts a narrower type for nothing else.
    def load(self) -> Any:
        """Read the weights and make the reward; each call makes another, which shares nothing.

        Returns:
            A ``Reward``.

        Raises:
            ConfigError: If a setting cannot work, or weights are not there.
            DataError: If weights are damaged or foreign.
        """
        ...


class FrozenReward(nn.Module):
    """A reward whose networks stay frozen and in evaluation mode, whatever a parent is told.

    ``parent.train()`` leaves them in evaluation mode. ``parent.requires_grad_()`` sets weights one
    by one, unseen from here; they are frozen again before they are used.
    """

    step: int | None = 0

    def networks(self) -> Iterable[nn.Module]:
        """List what is kept frozen: all children."""
        return self.children()

    def freeze(self) -> None:
        """Freeze the networks and put them in evaluation mode; call it before they are used."""
        for network in self.networks():
            network.requires_grad_(False)
            if any(module.training for module in network.modules()):
                network.eval()

    def set_step(self, step: int | None) -> None:
        """Take note of the optimizer step, on which random crops depend.

        Args:
            step: Optimizer steps so far; None leaves chance out: crops are of the centre.
        """
        self.step = step

    @override
    def train(self, mode: bool = True) -> Self:
        """Set the mode of everything but the networks."""
        super().train(mode)
        for network in self.networks():
            network.eval()
        return self

    @override
    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Leave the networks frozen."""
        super().requires_grad_(requires_grad)
        self.freeze()
        return self


def set_step(reward: Reward, step: int | None) -> None:
    """Tell a reward the optimizer step, if it wants to know; call it before each step's rewards.

    Args:
        reward: Any reward, also a mixture.
        step: Optimizer steps so far, the same on all ranks; None, for evaluation, leaves chance
            out: crops are of the centre.
    """
    tell: Callable[[int | None], None] | None = getattr(reward, "set_step", None)
    if tell is not None:
        tell(step)


@contextlib.contextmanager
def without_chance(reward: Reward) -> Iterator[None]:
    """Leave chance out of a reward for the duration of a block: see `set_step`.

    Its step returns afterwards: its attribute ``step``, or 0 if it has none.
    """
    before: int | None = getattr(reward, "step", 0)
    set_step(reward, None)
    try:
        yield
    finally:
        set_step(reward, before)


def check_reward_names(names: Iterable[str], where: str) -> None:
    """Refuse names that rewards cannot be registered or logged under.

    Args:
        names: The names.
        where: What the rewards belong to, for the error: ``in a mixture``.

    Raises:
        ConfigError: If one is empty, has dots or slashes, or is an attribute of a module.
    """
    taken = {*dir(nn.ModuleDict()), "rewards", "renoised"}
    for name in names:
        if not name or {".", "/"} & set(name) or name in taken:
            raise ConfigError(
                "expected a name without dots or slashes, other than `rewards`, `renoised` and "
                "PyTorch's own names of a module such as `items` or `type`, for a reward "
                f"{where}; got `{name}`; rename it"
            )


def takes_counted(call: Callable[..., object]) -> bool:
    """Tell whether a function or module has an argument ``counted``: which captions count.

    Args:
        call: The ``bind`` of a reward, or an estimate of the common direction.
    """
    function = call.forward if isinstance(call, nn.Module) else call
    try:
        return "counted" in inspect.signature(function).parameters
    except ValueError:  # Some built-in functions do not tell.
        return False


def check_batch(images: Tensor, captions: Sequence[str]) -> None:
    """Refuse what no reward can score; waits for the device.

    It raises on its own rank. A reward that calls it in training stops there while other ranks wait
    for it, so that those with a method ``bind`` leave it out there: see ``bind_reward``.

    Args:
        images: Should be float, in [0, 1], ``(B, 3, H, W)``.
        captions: Should be ``B`` captions.

    Raises:
        DataError: If shapes, number types or ranges are others.
        NonFiniteError: If an image is not finite.
    """
    if images.ndim != 4 or images.shape[1] != 3 or not len(images):
        raise DataError(
            f"expected images (B, 3, H, W) for a reward; got shape {tuple(images.shape)}; "
            "give a batch of RGB images"
        )
    if isinstance(captions, str) or len(captions) != len(images):
        found = "one text" if isinstance(captions, str) else f"{len(captions)} captions"
        raise DataError(
            f"expected one caption for each of {len(images)} images; got {found}; pair them"
        )
    if not images.is_floating_point():
        raise DataError(
            f"expected float images in [0, 1] for a reward; got {images.dtype}; divide bytes by 255"
        )
    # Both bounds in one transfer, for which a GPU is waited for.
    low, high = torch.stack(torch.aminmax(images.detach().float())).tolist()
    if not (math.isfinite(low) and math.isfinite(high)):
        raise NonFiniteError(
            "expected finite images for a reward; got NaN or infinity; see what made the images"
        )
    if low < -_SLACK or high > 1 + _SLACK:
        raise DataError(
            f"expected images in [0, 1] for a reward; got {low:.3g} to {high:.3g}; rescale them"
        )
