"""The oracle as a metric of generated images: what they show of what their captions state."""

from collections import Counter
from typing import Any, Final

from typing_extensions import override

from segalign.errors import ConfigError
from segalign.evaluation.image_metric import EvaluationSetting, Findings, ImageBatch, ImageMetric
from segalign.ranks import gather_objects
from segalign.scenes.accuracy import FactRecord, accuracies, count_facts
from segalign.scenes.evaluation import stated_facts
from segalign.scenes.oracle import read_scenes
from segalign.scenes.world import Scene, World
from segalign.text.tokenizer import clip_tokenizer

_PER_IMAGE: Final = ("attributes", "attributes/past_77")

Counts = Counter[tuple[str, str]]


class SceneFacts(ImageMetric):
    """Share of the stated facts that images show, by kind and by place in the caption.

    Numbers, in [0, 1]: ``attributes`` (shapes, colours and sizes), ``attributes/within_32``,
    ``attributes/within_77``, ``attributes/past_77``, ``objects``, and each kind of fact; see
    `segalign.scenes.accuracy`. A final evaluation also gives ``chance/...``, what each caption
    scores against the image of the next caption that has one, whatever is made together; and of
    each image the share of its attributes.

    Args:
        world: World of the captions.
    """

    name = "scene_facts"

    def __init__(self, world: World) -> None:
        self.world = world
        self._setting: EvaluationSetting | None = None
        self._facts: list[list[FactRecord]] = []
        self._scenes: dict[int, Scene] = {}

    @override
    def start(self, setting: EvaluationSetting) -> None:
        """See ``ImageMetric``."""
        tokenizer = clip_tokenizer()
        if self._setting is None or self._setting.rows is not setting.rows:
            self._facts = [
                stated_facts(row["caption"], row["metadata"], tokenizer) for row in setting.rows
            ]
        worlds = {row["metadata"].get("world", self.world.name) for row in setting.rows}
        if worlds != {self.world.name}:
            raise ConfigError(
                f"expected captions of the world `{self.world.name}` for the oracle; got some of "
                f"`{min(worlds - {self.world.name})}`; set `world`"
            )
        self._setting, self._scenes = setting, {}

    @override
    def update(self, batch: ImageBatch) -> None:
        """Read a micro-batch."""
        size = self.world.image_size
        if batch.pixels.shape[2:] != (size, size):
            height, width = batch.pixels.shape[2:]
            raise ConfigError(
                f"expected images of {size} x {size} pixels, those of the world "
                f"`{self.world.name}`, for the oracle; got {width} x {height}; set `world`"
            )
        scenes = read_scenes(batch.images, self.world).scenes
        rows = zip(batch.places.tolist(), batch.counted.tolist(), scenes, strict=True)
        self._scenes.update({place: scene for place, counted, scene in rows if counted})

    @override
    def finish(self) -> Findings:
        """Join the ranks, and count."""
        setting = self._setting
        assert setting is not None
        seen: dict[int, Scene] = {}
        for part in gather_objects(self._scenes):
            seen |= part
        per_caption = setting.plan.images_per_caption
        counts = {p: count_facts(self._facts[p // per_caption], seen[p]) for p in sorted(seen)}
        total: Counts = sum(counts.values(), Counter())
        values = accuracies(total)
        protocol = {"world": self.world.name, "oracle": "nearest rendered template of each cell"}
        if not setting.is_final:
            return Findings(values, protocol)
        chance = accuracies(self._chance(seen, per_caption))
        values |= {f"chance/{name}": value for name, value in chance.items()}
        places = range(setting.plan.num_images)
        per_image = {name: [_share(counts.get(p), name) for p in places] for name in _PER_IMAGE}
        return Findings(values, protocol, per_image)

    def _chance(self, seen: dict[int, Scene], per_caption: int) -> Counts:
        """Count each caption's facts against the first image of the next caption."""
        first: dict[int, Scene] = {}
        for place in sorted(seen):
            first.setdefault(place // per_caption, seen[place])
        captions = list(first)
        others = captions[1:] + captions[:1]
        pairs = zip(captions, others, strict=True) if len(captions) > 1 else ()
        found = (count_facts(self._facts[one], first[other]) for one, other in pairs)
        return sum(found, Counter())


def _share(counts: Counts | None, name: str) -> Any:
    """Return the share of one image; None if it does not count or nothing is stated."""
    if counts is None or not counts[name, "all"]:
        return None
    return counts[name, "right"] / counts[name, "all"]
