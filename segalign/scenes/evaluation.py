"""Scoring of a generator by the oracle: what its pictures show of what their captions state."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPTokenizer

from segalign.diffusion.bundle import DiffusionBundle
from segalign.diffusion.generator import TextToImage
from segalign.diffusion.sampler import DDIMSampler
from segalign.errors import ConfigError
from segalign.scenes.accuracy import FactRecord, accuracies, count_facts, fact_records
from segalign.scenes.grammar import FACT_KINDS
from segalign.scenes.oracle import read_scenes
from segalign.scenes.samples import SceneSample
from segalign.scenes.world import World, get_world
from segalign.text.settings import TextEncoding
from segalign.text.tokenizer import char_token_positions

Generate = Callable[[Sequence[str], Sequence[int]], Tensor]

NAMES = (
    "attributes",
    "attributes/past_77",
    "attributes/within_32",
    "attributes/within_77",
    "objects",
    *FACT_KINDS,
)


class SceneScore:
    """Counts of right facts, and of chance: the same captions against other captions' pictures.

    Args:
        world: World of the scenes.
        tokenizer: Places facts on token positions.
    """

    def __init__(self, world: World, tokenizer: CLIPTokenizer) -> None:
        self.world = world
        self.tokenizer = tokenizer
        self.counts: Counter[tuple[str, str]] = Counter()
        self.chance: Counter[tuple[str, str]] = Counter()

    def update(
        self, images: Tensor, captions: Sequence[str], metadata: Sequence[Mapping[str, Any]]
    ) -> None:
        """Add pictures.

        Args:
            images: Float in [0, 1], ``(B, 3, H, W)``.
            captions: ``B`` captions.
            metadata: Their metadata, with the facts that they state.
        """
        scenes = read_scenes(images, self.world).scenes
        records = [
            stated_facts(*row, self.tokenizer) for row in zip(captions, metadata, strict=True)
        ]
        others = scenes[1:] + scenes[:1]
        for facts, scene, other in zip(records, scenes, others, strict=True):
            self.counts.update(count_facts(facts, scene))
            if len(scenes) > 1:
                self.chance.update(count_facts(facts, other))

    def to_tensor(self) -> Tensor:
        """Return all counts as one int64 vector, to be summed over ranks."""
        return torch.tensor(
            [table[name, part] for table in (self.counts, self.chance) for name, part in _KEYS]
        )

    def load_tensor(self, vector: Tensor) -> None:
        """Replace all counts by those of `to_tensor`."""
        values = vector.long().tolist()
        self.counts = Counter(dict(zip(_KEYS, values[: len(_KEYS)], strict=True)))
        self.chance = Counter(dict(zip(_KEYS, values[len(_KEYS) :], strict=True)))

    def accuracies(self) -> dict[str, float]:
        """Return the accuracy in [0, 1] of every name that was counted."""
        return accuracies(+self.counts)

    def chance_accuracies(self) -> dict[str, float]:
        """Return what captions score against pictures of other captions."""
        return accuracies(+self.chance)


def stated_facts(
    caption: str, metadata: Mapping[str, Any], tokenizer: CLIPTokenizer
) -> list[FactRecord]:
    """Return the facts that a caption of scenes states, placed on its tokens.

    Raises:
        ConfigError: If it is another caption.
    """
    if "facts" not in metadata:
        raise ConfigError(
            "expected captions of scenes, with their facts, for the oracle; got others. "
            "Remove the scenes callbacks from `trainer.callbacks`."
        )
    positions = char_token_positions(caption, tokenizer)
    return fact_records(metadata["facts"], positions.tolist())


_KEYS = tuple((name, part) for name in NAMES for part in ("right", "all"))


def score_generator(
    generate: Generate,
    samples: Sequence[SceneSample],
    tokenizer: CLIPTokenizer,
    batch_size: int,
    advance: Callable[[int], None] | None = None,
) -> SceneScore:
    """Generate a picture for every sample's caption and score them all.

    Args:
        generate: ``(captions, sample_ids) -> images``.
        samples: Samples of one world.
        tokenizer: Places facts on token positions.
        batch_size: Pictures made at once; only the pairs of chance depend on it.
        advance: Told how many more captions are done.
    """
    score = SceneScore(get_world(samples[0].metadata["world"]), tokenizer)
    for start in range(0, len(samples), batch_size):
        rows = samples[start : start + batch_size]
        captions = [row.caption for row in rows]
        images = generate(captions, range(start, start + len(rows)))
        score.update(images, captions, [row.metadata for row in rows])
        if advance is not None:
            advance(len(rows))
    return score


def score_bundle(
    bundle: DiffusionBundle, text: TextEncoding, samples: Sequence[SceneSample]
) -> SceneScore:
    """Score a model as the benchmark does: 10 DDIM steps, guidance 2, one noise for all models.

    Args:
        bundle: The model.
        text: How it reads captions.
        samples: Samples of one world.
    """
    model = TextToImage(
        bundle.unet.eval(),
        text.build(bundle.text_models),
        bundle.codec,
        bundle.schedule,
        image_size=bundle.image_size,
        mask_padding=text.mask_padding,
    )
    sampler = DDIMSampler(num_inference_steps=10, guidance_scale=2.0)

    def generate(captions: Sequence[str], sample_ids: Sequence[int]) -> Tensor:
        return model.sample(captions, model.noise(sample_ids, 1234), sampler)

    return score_generator(generate, samples, bundle.text_models.tokenizer, batch_size=64)
