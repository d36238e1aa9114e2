"""How well generated images fit their captions, by any rewards: by length, and by segment.

Dims: B images of a micro-batch, N images of the plan, n segments of a caption.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from typing_extensions import override

from segalign.errors import ConfigError
from segalign.evaluation.captions import CaptionRow
from segalign.evaluation.image_metric import EvaluationSetting, Findings, ImageBatch, ImageMetric
from segalign.metrics.alignment_rows import PlainRows, RewardRows, SegmentRows
from segalign.metrics.denscore import FORMULAS
from segalign.metrics.reward_protocol import reward_protocol
from segalign.metrics.score_groups import by_length, by_position, finite, mean, offsets
from segalign.metrics.scorer_features import load_reward
from segalign.ranks import gather_objects
from segalign.rewards.clip_reward import ClipReward
from segalign.rewards.common_direction import CorpusDirection
from segalign.rewards.protocol import Reward, RewardSource, check_reward_names
from segalign.text.tokenizer import clip_tokenizer, word_token_ids

SCORES: Final = ("reward", "denscore", "denscore_o")
_LENGTH: Final = "tokens of the CLIP tokenizer, start and end included"


class Alignment(ImageMetric):
    """Every reward as a metric of generated images.

    Each reward scores each image that counts against its own caption. Numbers, with NAME that of
    the reward:

    - ``reward/NAME``: mean over images; ``reward/NAME/PART`` of what it is made of.
    - ``denscore/NAME``, ``denscore_o/NAME``: Denscore and Denscore-O, see
      `segalign.metrics.denscore`, of CLIP-type rewards that score segments.
    - Of a final evaluation also each of them in the captions of a length, ``.../length/1-77``,
      ``78-154``, ``155-308``, ``over_308``, counted in tokens of CLIP, start and end included; and
      of rewards that score segments ``segment_score/NAME/1``, ``2-3``, ``4-7``, ``from_8``, the
      mean over segments by their number in the caption, and ``segment_offset/NAME/...``, the same
      after the mean of the caption's own segments is taken off, over captions of two or more.

    A final evaluation also tells of each image ``num_tokens``, the scores, ``segment_scores/NAME``
    and ``segment_spans/NAME``, the characters that each segment has in the caption.

    V of Denscore-O is that of ``common_directions``, or the corpus direction that the reward uses,
    or estimated from all captions of the evaluation, whether their images count or not. Means are
    sums in float64, rounded once, so that nothing depends on the number of ranks.

    Args:
        rewards: Settings of rewards by name, or rewards that have been read.
        common_directions: Files of V, as ``main.py direction estimate`` writes them, by the name of
            the reward.

    Raises:
        ConfigError: If there are no rewards, or a name cannot be.
    """

    name = "alignment"

    def __init__(
        self,
        rewards: Mapping[str, RewardSource | Reward],
        common_directions: Mapping[str, str] | None = None,
    ) -> None:
        if not rewards:
            raise ConfigError("expected at least one reward to measure alignment; got none")
        check_reward_names(rewards, "of an alignment metric")
        self.rewards = dict(rewards)
        self.common_directions = dict(common_directions or {})
        unknown = sorted({*self.common_directions} - {*self.rewards})
        if unknown:
            raise ConfigError(
                "expected `common_directions` of rewards that are measured; got one of "
                f"`{unknown[0]}`; known are {', '.join(f'`{name}`' for name in self.rewards)}"
            )
        self._setting: EvaluationSetting | None = None
        self._lengths: tuple[object, list[int]] = (None, [])
        self._rows: dict[str, RewardRows] = {}
        self._protocols: dict[int, tuple[Reward, dict[str, Any]]] = {}

    @override
    def start(self, setting: EvaluationSetting) -> None:
        """See ``ImageMetric``."""
        self._setting = setting
        self._rows = {name: self._make_rows(name, setting) for name in self.rewards}

    @override
    def update(self, batch: ImageBatch) -> None:
        """Score a micro-batch."""
        for rows in self._rows.values():
            rows.update(batch)

    @override
    def finish(self) -> Findings:
        """Join the ranks, and take means."""
        assert self._setting is not None
        per_image = self._per_image(self._setting)
        values = _values(per_image, is_final=self._setting.is_final)
        protocol = {
            "rewards": {
                name: {**self._protocol(rows.reward), **rows.protocol()}
                for name, rows in self._rows.items()
            },
            "length": _LENGTH,
            "formulas": FORMULAS,
        }
        notes = [
            f"{missing} scores of `{name}` are not finite, and left out of its mean"
            for name, scores in per_image.items()
            if name.startswith("reward/") and (missing := _num_lost(scores))
        ]
        if not self._setting.is_final:
            return Findings(values, protocol, notes=notes)
        notes += [note for rows in self._rows.values() for note in rows.notes()]
        return Findings(values, protocol, per_image, notes)

    def _make_rows(self, name: str, setting: EvaluationSetting) -> RewardRows:
        reward = load_reward(self.rewards[name], setting)
        given = self.common_directions.get(name)
        if isinstance(reward, ClipReward) and reward.scorer.segmenter is not None:
            direction = None if given is None else CorpusDirection.load(Path(given))
            return SegmentRows(name, reward, setting, direction)
        if given is not None:
            raise ConfigError(
                "expected `common_directions` of CLIP-type rewards that score segments; got one of "
                f"`{name}`, which is none; remove it, or set `text: segments`"
            )
        return PlainRows(name, reward)

    def _protocol(self, reward: Reward) -> dict[str, Any]:
        """Describe a reward; its weights are hashed once."""
        if id(reward) not in self._protocols:
            self._protocols[id(reward)] = (reward, reward_protocol(reward))
        return self._protocols[id(reward)][1]

    def _per_image(self, setting: EvaluationSetting) -> dict[str, list[Any]]:
        """Return what is known of each image, in the order of places; all ranks must call it."""
        own: dict[str, dict[int, Any]] = {}
        for rows in self._rows.values():
            rows.join()
            own |= rows.known
        merged: dict[str, dict[int, Any]] = {}
        for part in gather_objects(own):
            for name, known in part.items():
                merged.setdefault(name, {}).update(known)
        places = range(setting.plan.num_images)
        per_image = {name: [known.get(one) for one in places] for name, known in merged.items()}
        is_known = [any(one[place] is not None for one in per_image.values()) for place in places]
        if not setting.is_final:
            return per_image
        lengths, per_caption = self._count_tokens(setting.rows), setting.plan.images_per_caption
        num_tokens = [
            lengths[place // per_caption] if is_known[place] else None for place in places
        ]
        return {"num_tokens": num_tokens, **per_image}

    def _count_tokens(self, rows: Sequence[CaptionRow]) -> list[int]:
        """Count the tokens of captions, once for the same list."""
        if self._lengths[0] is not rows:
            tokenizer = clip_tokenizer()
            counts = [len(word_token_ids(row["caption"], tokenizer)) + 2 for row in rows]
            self._lengths = (rows, counts)
        return self._lengths[1]


def _values(per_image: Mapping[str, list[Any]], *, is_final: bool) -> dict[str, float]:
    """Take all means, in the order in which they are read."""
    values: dict[str, float] = {}
    scores = {name: one for name, one in per_image.items() if name.split("/")[0] in SCORES}
    for name, one in scores.items():
        if found := finite(one):
            values[name] = mean(found)
    if not is_final:
        return values
    for name, one in scores.items():
        groups = by_length(per_image["num_tokens"], one)
        values |= {f"{name}/{group}": mean(found) for group, found in groups.items()}
    for name, one in per_image.items():
        kind, _, reward = name.partition("/")
        if kind != "segment_scores":
            continue
        for what, rows in (("segment_score", one), ("segment_offset", offsets(one))):
            groups = by_position(rows)
            values |= {f"{what}/{reward}/{group}": mean(found) for group, found in groups.items()}
    return values


def _num_lost(scores: list[Any]) -> int:
    """Count scores that are there but not finite."""
    return sum(score is not None for score in scores) - len(finite(scores))
