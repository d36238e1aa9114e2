"""Does a scorer find a generated image by its caption, and the caption by the image?

Dims: B images of a micro-batch, E joint-embedding width.
"""

from typing import Final

import torch
from torch import Tensor
from typing_extensions import override

from segalign.errors import ConfigError
from segalign.evaluation.image_metric import EvaluationSetting, Findings, ImageBatch, ImageMetric
from segalign.metrics.retrieval import (
    CUTOFFS,
    DIRECTIONS,
    TEXT_PARTS,
    Retrieval,
    RetrievalResult,
    chance_recall,
)
from segalign.metrics.reward_protocol import reward_protocol
from segalign.metrics.scorer_features import load_reward, shared_features
from segalign.modes import evaluation_mode
from segalign.ranks import gather_objects
from segalign.rewards.clip_reward import ClipReward
from segalign.rewards.common_direction import CorpusDirection
from segalign.rewards.protocol import Reward, RewardSource

_SUFFIXES: Final = {"text_to_image": "", "image_to_text": "_image_to_text"}


class GeneratedRetrieval(ImageMetric):
    """Retrieval of generated images by their captions, the first image of each caption.

    Numbers, in [0, 1]: ``retrieval/r_at_1``, ``r_at_5``, ``r_at_10`` from text to image, as far as
    galleries are larger; the same with ``_image_to_text``; and ``retrieval/r_at_1_text_relevant``
    by the text-relevant part of the captions. Captions are read as the reward reads them. See
    `segalign.metrics.retrieval.Retrieval` for galleries, ties, equal captions and exactness.

    A caption whose image does not count is left out, and all later ones move up in the galleries:
    so the protocol tells the numbers of missing captions.

    Args:
        scorer: Settings of a CLIP-type reward, or one that has been read; neither its omega nor its
            ``renormalize`` matters.
        gallery_size: Images of a gallery, consecutive in the order of captions; a last one that is
            not full is left out. None ranks all in one. Chance is k over it.

    Raises:
        ConfigError: If a gallery is less than two images.
    """

    name = "retrieval"

    def __init__(self, scorer: RewardSource | Reward, gallery_size: int | None = None) -> None:
        self.scorer = scorer
        self.gallery_size = gallery_size
        self._setting: EvaluationSetting | None = None
        self._reward: ClipReward | None = None
        self._metric = Retrieval(1, gallery_size=gallery_size)
        self._protocol: dict[str, object] = {}

    @override
    def start(self, setting: EvaluationSetting) -> None:
        """See ``ImageMetric``."""
        needed = self.gallery_size or 2
        if setting.plan.num_captions < needed:
            raise ConfigError(
                f"expected at least {needed} captions for retrieval among generated images; got "
                f"{setting.plan.num_captions}; evaluate more, or lower `gallery_size`"
            )
        reward = load_reward(self.scorer, setting)
        if not isinstance(reward, ClipReward):
            raise ConfigError(
                "expected a CLIP-type reward for retrieval, which compares images and captions; "
                f"got `{type(reward).__name__}`; name one such as `segalign.rewards.zoo.ClipH`"
            )
        if reward is not self._reward:
            self._protocol = reward_protocol(reward)
        self._reward, self._setting = reward, setting
        self._encode = shared_features(reward, setting)
        self._metric = Retrieval(
            1, gallery_size=self.gallery_size, common_direction=_direction_of(reward)
        )
        self._ranked: list[int] = []

    @override
    def update(self, batch: ImageBatch) -> None:
        """Encode a micro-batch."""
        assert self._setting is not None
        assert self._reward is not None
        images = batch.once(self._encode)
        with (
            torch.no_grad(),
            torch.autocast(batch.pixels.device.type, enabled=False),
            evaluation_mode(self._reward),
        ):
            texts = self._reward.segment_features(batch.captions).mean()
        per_caption = self._setting.plan.images_per_caption
        is_first = (batch.places % per_caption == 0) & batch.counted.cpu()
        ids = batch.places // per_caption
        self._metric.update(ids, batch.captions, images, texts.unsqueeze(1), is_first)
        self._ranked += ids[is_first].tolist()

    @override
    def finish(self) -> Findings:
        """Rank all images."""
        assert self._setting is not None
        assert self._reward is not None
        direction = _describe_direction(self._reward)
        ranked = {number for part in gather_objects(self._ranked) for number in part}
        numbers = range(self._setting.plan.num_captions)
        protocol = {
            "scorer": self._protocol,
            "common_direction": direction,
            "missing_captions": [number for number in numbers if number not in ranked],
        }
        num_ranked, needed = len(ranked), self.gallery_size or 2
        if num_ranked < needed:
            note = f"no retrieval: a gallery needs {needed} images, and {num_ranked} count"
            return Findings({}, {**protocol, "gallery_size": self.gallery_size}, notes=[note])
        found: RetrievalResult = self._metric.compute()
        size = int(found["gallery_size"])
        left_out = int(found["num_left_out"])
        notes = [f"R@1 among {size} generated images; chance is {chance_recall(1, size):.4f}"]
        if left_out:
            notes.append(f"{left_out} images of a last gallery that is not full are not ranked")
        return Findings(
            _values(found["recall"], size),
            {**protocol, "gallery_size": size, "num_galleries": int(found["num_galleries"])},
            notes=notes if self._setting.is_final else (),
        )


def _describe_direction(reward: ClipReward) -> str:
    """Say where V of the text-relevant part comes from."""
    is_given = _direction_of(reward) is not None
    return "of the scorer" if is_given else "estimated from the ranked captions"


def _direction_of(reward: ClipReward) -> Tensor | None:
    direction = reward.common_direction
    return direction.direction.cpu() if isinstance(direction, CorpusDirection) else None


def _values(recall: Tensor, gallery_size: int) -> dict[str, float]:
    """Name what is reported of recalls by part, reading, direction and cutoff."""
    values = {
        f"retrieval/r_at_{cutoff}{suffix}": recall[0, 0, DIRECTIONS.index(way), number].item()
        for way, suffix in _SUFFIXES.items()
        for number, cutoff in enumerate(CUTOFFS)
        if cutoff < gallery_size
    }
    part = TEXT_PARTS.index("C_perp")
    values["retrieval/r_at_1_text_relevant"] = recall[part, 0, 0, 0].item()
    return values
