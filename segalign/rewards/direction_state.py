"""What rewards have learnt of the common direction: the part of a run's state that is theirs."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from segalign.rewards.batch_directions import EmaDirection
from segalign.rewards.protocol import Reward


def direction_state(reward: Reward) -> dict[str, Any]:
    """Collect the moving averages of a reward, also of a mixture's parts, by their places."""
    return {name: one.state_dict() for name, one in _learnt(reward).items()}


def load_direction_state(reward: Reward, state: Mapping[str, Any]) -> None:
    """Put back what `direction_state` collected; averages that it does not have start anew."""
    for name, one in _learnt(reward).items():
        if name in state:
            one.load_state_dict(state[name])


def _learnt(reward: Reward) -> dict[str, EmaDirection]:
    if not isinstance(reward, nn.Module):
        return {}
    return {name: one for name, one in reward.named_modules() if isinstance(one, EmaDirection)}
