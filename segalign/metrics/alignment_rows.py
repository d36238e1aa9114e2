"""What one reward says of the images of a rank, by their places.

Dims: B images of a micro-batch, E joint-embedding width.
"""

from typing import Any, Protocol

import torch
from torch import Tensor

from segalign.evaluation.image_metric import EvaluationSetting, ImageBatch
from segalign.metrics.denscore import SCALE, denscore_o, mean_direction
from segalign.metrics.reward_protocol import direction_protocol
from segalign.metrics.score_groups import mean
from segalign.metrics.scorer_features import FeatureRows, shared_features
from segalign.modes import evaluation_mode
from segalign.rewards.clip_reward import ClipReward
from segalign.rewards.common_direction import MIN_CORPUS, CorpusDirection
from segalign.rewards.direction_checks import check_direction, describe_text, text_digest
from segalign.rewards.protocol import Reward, without_chance
from segalign.rewards.scoring import score_images


class RewardRows(Protocol):
    """Rows of one reward.

    Attributes:
        known: By name, plain data for each image that counts, by its place.
    """

    known: dict[str, dict[int, Any]]

    @property
    def reward(self) -> Reward:
        """The reward."""
        ...

    def update(self, batch: ImageBatch) -> None:
        """Score a micro-batch."""
        ...

    def join(self) -> None:
        """Finish what needs all ranks, each of which must call it; `known` stays this rank's."""
        ...

    def protocol(self) -> dict[str, Any]:
        """Say what numbers depend on besides the reward."""
        ...

    def notes(self) -> list[str]:
        """Return what a reader must know."""
        ...


class PlainRows:
    """Scores of any reward.

    Args:
        name: Its name.
        reward: The reward.
    """

    def __init__(self, name: str, reward: Reward) -> None:
        self.name = name
        self.reward = reward
        self.known: dict[str, dict[int, Any]] = {}

    def update(self, batch: ImageBatch) -> None:
        """See ``RewardRows``."""
        reward: Any = self.reward
        module = reward if isinstance(reward, torch.nn.Module) else torch.nn.Identity()
        with torch.autocast(batch.pixels.device.type, enabled=False), evaluation_mode(module):
            scores = score_images(
                {self.name: self.reward}, batch.images, batch.captions, batch.counted
            )
        for name, found in scores.items():
            self._add(f"reward/{name}", batch, found.double().tolist())

    def join(self) -> None:
        """See ``RewardRows``: there is nothing to do."""

    def protocol(self) -> dict[str, Any]:
        """See ``RewardRows``."""
        return {}

    def notes(self) -> list[str]:
        """See ``RewardRows``."""
        return []

    def _add(self, name: str, batch: ImageBatch, found: list[Any]) -> None:
        rows = zip(batch.places.tolist(), batch.counted.tolist(), found, strict=True)
        known = self.known.setdefault(name, {})
        known.update({place: each for place, counted, each in rows if counted})


class SegmentRows(PlainRows):
    """Scores of a CLIP-type reward that scores segments: also of each segment, and Denscores.

    Args:
        name: Its name.
        reward: The reward.
        setting: The evaluation.
        direction: V of Denscore-O; None takes the corpus direction that the reward uses, or
            estimates V from the captions of the evaluation.

    Raises:
        DataError: If V is that of another scorer.
    """

    reward: ClipReward

    def __init__(
        self,
        name: str,
        reward: ClipReward,
        setting: EvaluationSetting,
        direction: CorpusDirection | None = None,
    ) -> None:
        super().__init__(name, reward)
        self.setting = setting
        self.images, self.captions = FeatureRows(), FeatureRows()
        self._encode = shared_features(reward, setting)
        if direction is not None:
            _check(direction, reward)
        elif isinstance(reward.common_direction, CorpusDirection):
            direction = reward.common_direction
        self.direction = direction

    def update(self, batch: ImageBatch) -> None:
        """See ``RewardRows``."""
        reward, rows = self.reward, torch.arange(len(batch.rows), device=batch.pixels.device)
        features = batch.once(self._encode)
        with (
            torch.no_grad(),
            torch.autocast(batch.pixels.device.type, enabled=False),
            evaluation_mode(reward),
            without_chance(reward),
        ):
            terms = reward.bind(batch.captions, batch.counted).score_features(features, rows)
            segments = reward.segment_features(batch.captions)
        pairs = zip(segments.split(), features, strict=True)
        scores = [(part @ image.to(part)).double().tolist() for part, image in pairs]
        for part, values in {"": terms.rewards, **terms.parts}.items():
            self._add(
                "/".join(["reward", self.name, *filter(None, [part])]), batch, values.tolist()
            )
        self._add(f"segment_scores/{self.name}", batch, scores)
        if self.setting.is_final:
            self._add(f"segment_spans/{self.name}", batch, self._spans(batch))
        self._keep(batch, features, segments.mean())

    def join(self) -> None:
        """Compute the Denscores of this rank's images."""
        scores = self.known.get(f"segment_scores/{self.name}", {})
        self.known[f"denscore/{self.name}"] = {p: SCALE * mean(one) for p, one in scores.items()}
        places, images = self.images.gather()
        numbers, captions = self.captions.gather()
        direction = self._direction(captions)
        if direction is None or not len(places):
            return
        owner = torch.searchsorted(numbers, places // self.setting.plan.images_per_caption)
        found = denscore_o(images, captions[owner], direction).tolist()
        ready = dict(zip(places.tolist(), found, strict=True))
        self.known[f"denscore_o/{self.name}"] = {place: ready[place] for place in scores}

    def protocol(self) -> dict[str, Any]:
        """Say where V of Denscore-O comes from."""
        if self.direction is not None:
            return {"denscore_o_direction": direction_protocol(self.direction)}
        number = self.setting.plan.num_captions
        estimate = {"kind": "captions of the evaluation", "num_captions": number}
        return {"denscore_o_direction": estimate}

    def notes(self) -> list[str]:
        """Warn of a V of few captions."""
        number = self.setting.plan.num_captions
        if self.direction is not None or number >= MIN_CORPUS:
            return []
        if number == 1:
            return [f"Denscore-O of `{self.name}` needs a common direction, or more captions"]
        estimated = f"V of Denscore-O of `{self.name}` is estimated from {number} captions"
        return [f"{estimated}; a file of {MIN_CORPUS} or more in `common_directions` is better"]

    def _spans(self, batch: ImageBatch) -> list[list[list[int]]]:
        pieces = [self.reward.scorer.pieces(caption) for caption in batch.captions]
        return [[[piece.start, piece.end] for piece in one] for one in pieces]

    def _keep(self, batch: ImageBatch, features: Tensor, captions: Tensor) -> None:
        """Keep what Denscore-O is made of: V is known only when all captions are."""
        places, per_caption = batch.places.tolist(), self.setting.plan.images_per_caption
        counted = batch.counted.tolist()
        kept = [place for place, is_counted in zip(places, counted, strict=True) if is_counted]
        self.images.add(kept, features[batch.counted])
        self.captions.add([place // per_caption for place in places], captions)

    def _direction(self, captions: Tensor) -> Tensor | None:
        """Return V in float64; None if there is one caption, which says nothing of others."""
        if self.direction is not None:
            return self.direction.direction.double().cpu()
        return mean_direction(captions) if len(captions) > 1 else None


def _check(direction: CorpusDirection, reward: ClipReward) -> None:
    """Refuse a direction of another scorer.

    Raises:
        DataError: If it is one.
    """
    scorer = reward.scorer
    direction(torch.zeros(1, scorer.width))
    # Casts change the digest, which is that of the weights as they were read.
    if next(scorer.parameters()).dtype == torch.float32:
        check_direction(direction, text_digest(scorer), describe_text(scorer.segmenter))
