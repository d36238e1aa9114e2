"""Scenes as the tiny base draws them, described by what the oracle reads in them.

Dims: N images of a block, H/W pixels.
"""

import hashlib
from random import Random
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from segalign.data.sources import Members, to_json, to_png
from segalign.diffusion.generator import TextToImage
from segalign.diffusion.sampler import DDIMSampler
from segalign.errors import ConfigError
from segalign.pictures import to_bytes
from segalign.rng import counter_seed, counter_uniform
from segalign.scenes.base import ScenesBase
from segalign.scenes.grammar import CaptionLength, caption_sentences, join_sentences
from segalign.scenes.oracle import read_scenes
from segalign.scenes.samples import SceneSample, describe, make_sample
from segalign.scenes.weights import shipped_folder
from segalign.scenes.world import Scene, get_world
from segalign.text.settings import TextEncoding

BLOCK_SIZE: Final = 64
"""Images of one call of the generator; it decides nothing but the last bits of a pixel."""
_WORLD: Final = "3x3"
_MIN_STEPS, _MAX_STEPS = 4, 10
_MIN_GUIDANCE, _MAX_GUIDANCE = 1.0, 4.0


class SceneGenerator:
    """Draw scenes with the shipped generator, at varied guidance and numbers of steps.

    All images of a block share both; caption and starting noise are each image's own. Nothing is
    read before the first block.
    """

    def __init__(self) -> None:
        self._model: TextToImage | None = None

    def images(self, seed: int, indices: list[int], block: int) -> Tensor:
        """Draw one image for the short caption of each sample.

        Args:
            seed: Names the stream of samples.
            indices: ``N`` positions in the stream.
            block: Number of the block, which decides guidance and steps.

        Returns:
            uint8 ``(N, 3, H, W)``.
        """
        model = self._load()
        captions = [make_sample(_WORLD, seed, i, length="short").caption for i in indices]
        sampler = block_sampler(seed, block)
        noise = model.noise(indices, counter_seed("generated scenes", seed))
        return to_bytes(model.sample(captions, noise, sampler))

    def _load(self) -> TextToImage:
        if self._model is None:
            base = ScenesBase(world=_WORLD).load()
            text = TextEncoding(kind="truncated", mask_padding=True)
            self._model = TextToImage(
                base.unet.eval(),
                text.build(base.text_models),
                base.codec,
                base.schedule,
                image_size=base.image_size,
                mask_padding=text.mask_padding,
            )
        return self._model


class GeneratedSceneSource:
    """Rendered scenes, and a share of scenes that the shipped generator draws: a ``Source``.

    A drawn picture is captioned anew by the scene that the oracle reads in it, so its caption and
    facts hold whatever the generator got wrong. A rendered one is that of `make_sample`. Which of
    the two a sample is depends on its index and on nothing else.

    Args:
        count: Number of samples.
        seed: Names the stream, >= 0.
        start: First index of the stream, >= 0.
        share: Share of drawn pictures, in [0, 1].
        length: Length class of the captions.

    Raises:
        ConfigError: If ``count`` is not positive or ``share`` is no share.
    """

    def __init__(
        self,
        count: int,
        *,
        seed: int = 0,
        start: int = 0,
        share: float = 0.5,
        length: CaptionLength = "short",
    ) -> None:
        if count < 1 or not 0 <= share <= 1:
            raise ConfigError(
                f"expected at least one scene and a share in [0, 1]; got {count} and {share}; "
                "change `count` or `share`"
            )
        self._count = count
        self._seed = seed
        self._start = start
        self._share = share
        self._length: CaptionLength = length
        self._generator = SceneGenerator()
        self._block: tuple[int, dict[int, SceneSample]] = (-1, {})

    def __len__(self) -> int:
        return self._count

    def settings(self) -> dict[str, Any]:
        """See ``Source``; the weights stand for the generator, a sample for the rest."""
        digest = hashlib.sha256(make_sample(_WORLD, self._seed, self._start).image.tobytes())
        for part in ("generator", "text_model"):
            digest.update((shipped_folder() / f"{part}.safetensors").read_bytes())
        return {
            "kind": "generated-scenes",
            "count": self._count,
            "seed": self._seed,
            "start": self._start,
            "share": self._share,
            "length": self._length,
            "content": digest.hexdigest(),
        }

    def origin(self, index: int) -> str:
        """See ``Source``."""
        return f"scene {self._start + index}"

    def members(self, index: int) -> Members:
        """See ``Source``."""
        sample = self.sample(index)
        fields = {"caption": sample.caption, **sample.metadata}
        return [("png", to_png(sample.image)), ("json", to_json(fields))]

    def sample(self, index: int) -> SceneSample:
        """Make one sample; those that the generator draws are made in blocks, and kept."""
        place = self._start + index
        if not self._is_drawn(place):
            return make_sample(_WORLD, self._seed, place, length=self._length)
        number = place // BLOCK_SIZE
        if self._block[0] != number:
            self._block = (number, self._draw_block(number))
        return self._block[1][place]

    def _is_drawn(self, place: int) -> bool:
        return counter_uniform("drawn scene", self._seed, place) < self._share

    def _draw_block(self, number: int) -> dict[int, SceneSample]:
        """Draw the whole block, wherever the source starts and ends, so that pixels agree."""
        places = range(number * BLOCK_SIZE, (number + 1) * BLOCK_SIZE)
        drawn = [place for place in places if self._is_drawn(place)]
        images = self._generator.images(self._seed, drawn, number)
        sampler = block_sampler(self._seed, number)
        reading = read_scenes(images.float() / 255, get_world(_WORLD))
        return {
            place: self._describe(place, image, scene, distance, sampler)
            for place, image, scene, distance in zip(
                drawn, images, reading.scenes, reading.distances.tolist(), strict=True
            )
        }

    def _describe(
        self, place: int, image: Tensor, scene: Scene, distance: float, sampler: DDIMSampler
    ) -> SceneSample:
        """Caption a drawn picture by the scene that the oracle reads."""
        wording = Random(counter_seed(f"caption/{self._length}", self._seed, place))  # noqa: S311
        sentences = caption_sentences(scene, get_world(_WORLD), wording, self._length)
        caption, facts = join_sentences(sentences)
        pixels: NDArray[np.uint8] = image.permute(1, 2, 0).numpy()
        drawn = {
            "steps": sampler.num_inference_steps,
            "guidance": round(sampler.guidance_scale, 3),
            "distance": round(distance, 4),
        }
        return SceneSample(pixels, caption, {**describe(_WORLD, scene, facts), "drawn": drawn})


def block_sampler(seed: int, block: int) -> DDIMSampler:
    """Draw the steps (4 to 10) and the guidance (1 to 4) of a block of a stream."""
    steps = counter_uniform("drawn steps", seed, block)
    guidance = counter_uniform("drawn guidance", seed, block)
    return DDIMSampler(
        num_inference_steps=_MIN_STEPS + int(steps * (_MAX_STEPS - _MIN_STEPS + 1)),
        guidance_scale=_MIN_GUIDANCE + guidance * (_MAX_GUIDANCE - _MIN_GUIDANCE),
    )
