"""Weighted sums of rewards."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from segalign.errors import ConfigError, DataError
from segalign.rewards.bound_reward import BoundReward, RewardTerms, bind_reward, naming
from segalign.rewards.protocol import Reward, RewardSource, check_reward_names, set_step


@dataclass(frozen=True, kw_only=True)
class WeightedReward:
    """A reward's part in a mixture.

    Attributes:
        reward: The reward.
        weight: Its factor, finite; negative to punish.
    """

    reward: Reward
    weight: float = 1.0


class RewardMixture(nn.Module):
    """The weighted sum of several rewards, each of which is reported too.

    Args:
        parts: The rewards by name.

    Raises:
        ConfigError: See `check_parts`.
    """

    def __init__(self, parts: Mapping[str, WeightedReward]) -> None:
        super().__init__()
        check_parts(parts)
        self.weights = {name: part.weight for name, part in parts.items()}
        self.rewards = {name: part.reward for name, part in parts.items()}
        # Registered, so that moves and modes reach the networks.
        networks = {n: r for n, r in self.rewards.items() if isinstance(r, nn.Module)}
        self.networks = nn.ModuleDict(networks)
        self.step: int | None = 0

    def set_step(self, step: int | None) -> None:
        """Tell all rewards the optimizer step: see ``set_step`` of the protocol."""
        self.step = step
        for reward in self.rewards.values():
            set_step(reward, step)

    def forward(self, images: Tensor, captions: Sequence[str]) -> Tensor:
        """Score images: see ``Reward``."""
        return self.combine(self.score_each(images, captions))

    def bind(self, captions: Sequence[str], counted: Tensor | None = None) -> BoundReward:
        """Bind every reward to a batch of captions: see `bind_reward`.

        The parts are each reward's value by its name, unweighted, and its own parts as
        ``NAME/PART``. A reward of weight 0 is only reported: it is computed without gradient, and
        what it gives, be it NaN, changes nothing.

        Args:
            captions: ``B`` captions.
            counted: Which of them count, bool ``(B,)``; None is all.
        """
        bound = {
            name: bind_reward(
                reward, captions, name=name, is_rewarded=self.weights[name] != 0, counted=counted
            )
            for name, reward in self.rewards.items()
        }
        return _BoundMixture(self, bound)

    def score_each(self, images: Tensor, captions: Sequence[str]) -> dict[str, Tensor]:
        """Score images by every reward alone, unweighted, ``(B,)`` each.

        Raises:
            DataError: If a reward gives another number of scores.
        """
        scores = {}
        for name, reward in self.rewards.items():
            with naming(name):
                scores[name] = reward(images, captions)
            if scores[name].shape != (len(captions),):
                raise DataError(
                    f"expected {len(captions)} scores of the reward `{name}`; got shape "
                    f"{tuple(scores[name].shape)}; return one score for each image"
                )
        return scores

    def combine(self, scores: Mapping[str, Tensor]) -> Tensor:
        """Sum scores by name with the weights, ``(B,)``; those of weight 0 are left out."""
        weighted = [weight * scores[name] for name, weight in self.weights.items() if weight]
        if not weighted:
            return torch.zeros_like(next(iter(scores.values())))
        return torch.stack(weighted).sum(0)


@dataclass(frozen=True, eq=False)
class _BoundMixture:
    """A mixture whose rewards know their captions."""

    mixture: RewardMixture
    bound: Mapping[str, BoundReward]

    def __call__(self, images: Tensor, rows: Tensor) -> RewardTerms:
        terms = {}
        for name, bound in self.bound.items():
            is_rewarded = self.mixture.weights[name] != 0
            with torch.set_grad_enabled(torch.is_grad_enabled() and is_rewarded):
                terms[name] = bound(images, rows)
        parts = {}
        for name, each in terms.items():
            parts[name] = each.rewards.detach()
            parts |= {f"{name}/{part}": values for part, values in each.parts.items()}
        return RewardTerms(self.mixture.combine({n: t.rewards for n, t in terms.items()}), parts)


@dataclass(frozen=True, kw_only=True)
class MixturePart:
    """A reward's part in the settings of a mixture.

    Args:
        reward: The settings of the reward.
        weight: Its factor, finite; negative to punish.
    """

    reward: RewardSource
    weight: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """The weighted sum of several rewards, as a config names it.

    Args:
        parts: The rewards by the names that they are reported under.
    """

    parts: dict[str, MixturePart]

    def load(self) -> RewardMixture:
        """Read all rewards; see ``RewardSource``."""
        check_parts(self.parts)
        return RewardMixture(
            {
                name: WeightedReward(reward=part.reward.load(), weight=part.weight)
                for name, part in self.parts.items()
            }
        )


def check_parts(parts: Mapping[str, WeightedReward | MixturePart]) -> None:
    """Refuse a mixture that cannot be.

    Raises:
        ConfigError: If there is no part, a name cannot be, or a weight is not finite.
    """
    if not parts:
        raise ConfigError("expected at least one reward in a mixture; got none; name one")
    check_reward_names(parts, "in a mixture")
    for name, part in parts.items():
        if not isinstance(part, WeightedReward | MixturePart):
            raise ConfigError(
                f"expected a `MixturePart` or `WeightedReward` for the reward `{name}`; got "
                f"`{type(part).__name__}`; wrap the reward with its weight in one"
            )
        if not math.isfinite(part.weight):
            raise ConfigError(
                f"expected a finite weight of the reward `{name}`; got {part.weight}; change it"
            )
