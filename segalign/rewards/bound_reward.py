"""A reward bound to a batch of captions: texts are read once, however the images are cut later.

Estimates of the common direction that follow the batches depend on all captions of a batch, so that
a reward called chunk by chunk is another reward. A bound one asks for the direction once.

Dims: B captions of the batch, M images of a call, H/W pixels.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from segalign.errors import ConfigError, DataError, SegalignError
from segalign.rewards.protocol import Reward, takes_counted


@dataclass(frozen=True, eq=False)
class RewardTerms:
    """Rewards of some images, and what they are made of.

    Attributes:
        rewards: ``(M,)``, higher is better. Carries gradient to the images.
        parts: What is reported beside them, by name, ``(M,)`` each, without gradient.
    """

    rewards: Tensor
    parts: dict[str, Tensor] = field(default_factory=dict)


class BoundReward(Protocol):
    """Scores images against the captions that it is bound to."""

    def __call__(self, images: Tensor, rows: Tensor) -> RewardTerms:
        """Score each image against its own caption.

        Args:
            images: Float, in [0, 1], ``(M, 3, H, W)``.
            rows: Which caption each has, int64 ``(M,)``, in [0, B).

        Returns:
            Rewards and their parts.
        """
        ...


def bind_reward(
    reward: Reward,
    captions: Sequence[str],
    *,
    name: str | None = None,
    is_rewarded: bool = True,
    counted: Tensor | None = None,
) -> BoundReward:
    """Bind a reward to a batch of captions.

    A reward with a method ``bind`` reads the texts now: all ranks must bind equally often, and a
    call asks nothing of other ranks. Its calls do not wait for the device either; values that are
    not finite are handed on. Any other reward is called with the captions of the rows; images that
    are not finite are zeros to it, and their rewards NaN. What such a reward raises nevertheless,
    it raises on its own rank, while others may wait.

    Args:
        reward: Any reward.
        captions: ``B`` captions.
        name: What errors call it; None is the name of its class.
        is_rewarded: Whether its gradient is used.
        counted: Which captions count where the reward learns from them, or compares them with each
            other, bool ``(B,)``; None is all. A ``bind`` without such an argument is not told.

    Returns:
        The bound reward. Its calls raise ``ConfigError`` if the values are not one for each image,
        or carry no gradient to images that need it, and ``DataError`` if images and rows do not
        fit.
    """
    binds: Any = getattr(reward, "bind", None)
    with naming(name):
        if binds is None:
            bound: BoundReward = _Unbound(reward, list(captions))
        else:
            bound = binds(captions, counted=counted) if takes_counted(binds) else binds(captions)
    shown = name or str(getattr(reward, "__name__", type(reward).__name__))
    return _Checked(bound, name, shown, is_rewarded)


@contextlib.contextmanager
def naming(name: str | None) -> Iterator[None]:
    """Say in errors for users which reward it was.

    Args:
        name: Its name in a mixture; None leaves errors alone.
    """
    try:
        yield
    except SegalignError as error:
        if name is None:
            raise
        raise type(error)(f"{error} (the reward `{name}`)") from error


@dataclass(frozen=True, eq=False)
class _Unbound:
    """A reward that reads the texts at each call, and never sees what is not finite."""

    reward: Reward
    captions: list[str]

    def __call__(self, images: Tensor, rows: Tensor) -> RewardTerms:
        finite = images.detach().isfinite().flatten(1).all(dim=1)
        seen = torch.where(finite[:, None, None, None], images, 0.0)
        rewards: Any = self.reward(seen, [self.captions[row] for row in rows.tolist()])
        # What has another form is refused by `_Checked`.
        if isinstance(rewards, Tensor) and rewards.shape == finite.shape:
            rewards = torch.where(finite.to(rewards.device), rewards, torch.nan)
        return RewardTerms(rewards)


@dataclass(frozen=True, eq=False)
class _Checked:
    """A bound reward whose values are looked at, without waiting for the device."""

    bound: BoundReward
    name: str | None
    shown: str
    is_rewarded: bool

    def __call__(self, images: Tensor, rows: Tensor) -> RewardTerms:
        _check_images(images, rows)
        with naming(self.name):
            terms = self.bound(images, rows)
        _check_values(terms.rewards, len(images), self.shown)
        if self.is_rewarded and images.requires_grad and torch.is_grad_enabled():
            self._check_gradient(terms.rewards, images)
        return terms

    def _check_gradient(self, rewards: Tensor, images: Tensor) -> None:
        if rewards.requires_grad and _leads_to(rewards, images):
            return
        found = "do not depend on the images" if rewards.requires_grad else "carry none"
        raise ConfigError(
            f"expected values of the reward `{self.shown}` with a gradient to the images; got "
            f"values that {found}; use a differentiable reward, or report it without training on it"
        )


def _check_images(images: Tensor, rows: Tensor) -> None:
    """Refuse what has no pairs of an image and a caption; ranges are not looked at."""
    if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
        raise DataError(
            f"expected float images (M, 3, H, W) for a reward; got {images.dtype} of shape "
            f"{tuple(images.shape)}; give RGB images in [0, 1]"
        )
    if rows.shape != (len(images),):
        raise DataError(
            f"expected one row for each of {len(images)} images; got shape {tuple(rows.shape)}; "
            "say which caption each image has"
        )


def _check_values(rewards: object, num_images: int, name: str) -> None:
    """Refuse what is not one value for each image."""
    if isinstance(rewards, Tensor) and rewards.shape == (num_images,):
        return
    found = f"`{type(rewards).__name__}`"
    if isinstance(rewards, Tensor):
        found = f"shape {tuple(rewards.shape)}"
    raise ConfigError(
        f"expected {num_images} values of the reward `{name}`; got {found}; "
        "return one value for each image"
    )


def _leads_to(values: Tensor, images: Tensor) -> bool:
    """Tell whether the record of values leads back to the images; nothing is differentiated."""
    wanted = get_gradient_edge(images).node
    waiting, seen = [get_gradient_edge(values).node], set()
    while waiting:
        node = waiting.pop()
        if node is wanted:
            return True
        if node not in seen:
            seen.add(node)
            waiting += [before for before, _ in node.next_functions if before is not None]
    return False
