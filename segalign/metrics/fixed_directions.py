"""A common direction that stays where it is while a run is watched.

An estimate that follows the batches of training moves under the images: scores of one image at two
steps differ, and before the first step each rank has its own batch's. So an evaluation takes one V
for the whole run: that of a corpus, if the reward has one, else the mean of its own captions.

Dims: d width of features.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from segalign.evaluation.captions import captions_digest
from segalign.evaluation.image_metric import EvaluationSetting
from segalign.metrics.denscore import mean_direction
from segalign.metrics.extractors.protocol import exact_pass
from segalign.rewards.batch_directions import KeepsPrecision
from segalign.rewards.clip_reward import ClipReward
from segalign.rewards.common_direction import CorpusDirection

_CAPTIONS_AT_ONCE = 64


def clip_rewards(rewards: Mapping[str, Any]) -> dict[str, ClipReward]:
    """List the CLIP-type rewards among rewards and the parts of mixtures.

    Args:
        rewards: Rewards by name.

    Returns:
        Them by name: a part of a mixture as ``NAME.networks.PART``.
    """
    return {
        ".".join(filter(None, (name, place))): part
        for name, reward in rewards.items()
        if isinstance(reward, nn.Module)
        for place, part in reward.named_modules()
        if isinstance(part, ClipReward)
    }


def fixed_direction(reward: ClipReward, setting: EvaluationSetting) -> Tensor:
    """Return V, unit vector, float64 ``(d,)``; captions are read once a run.

    Args:
        reward: The reward, on the device of the evaluation.
        setting: The evaluation; the same on every rank.

    Raises:
        DataError: If text features are not finite, or cancel out.
    """
    if isinstance(reward.common_direction, CorpusDirection):
        return reward.common_direction.direction.double()
    captions = [row["caption"] for row in setting.rows]
    asked = _Asked(reward, captions, captions_digest(setting.rows), setting.device)
    found: Tensor = setting.pool.load(_MeanOfCaptions(asked))
    return found


@contextlib.contextmanager
def held_directions(directions: Mapping[ClipReward, Tensor]) -> Iterator[None]:
    """Let rewards use given directions for the duration of a block."""
    before = {reward: reward.common_direction for reward in directions}
    try:
        for reward, direction in directions.items():
            reward.common_direction = _Held(direction)
        yield
    finally:
        for reward, estimate in before.items():
            reward.common_direction = estimate


class _Held(KeepsPrecision):
    """A direction that is given."""

    direction: Tensor

    def __init__(self, direction: Tensor) -> None:
        super().__init__()
        self.register_buffer("direction", direction, persistent=False)

    @override
    def forward(self, text_features: Tensor) -> Tensor:
        return self.direction.to(text_features)


@dataclass(frozen=True, eq=False)
class _Asked:
    """Whose direction is wanted; a pool tells sources apart by how their attributes are shown."""

    reward: ClipReward
    captions: Sequence[str]
    digest: str
    device: torch.device

    def __repr__(self) -> str:
        return f"<reward {id(self.reward)}, captions {self.digest}>"


class _MeanOfCaptions:
    def __init__(self, asked: _Asked) -> None:
        self.asked = asked

    def load(self) -> Tensor:
        asked = self.asked
        starts = range(0, len(asked.captions), _CAPTIONS_AT_ONCE)
        with exact_pass(asked.device):
            features = [
                asked.reward.text_features(asked.captions[start : start + _CAPTIONS_AT_ONCE]).cpu()
                for start in starts
            ]
        return mean_direction(torch.cat(features))
