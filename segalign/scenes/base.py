"""The benchmark's base model: a stand-in for Stable Diffusion 1.5 that fits in the repository.

It was trained on captions of at most 77 tokens, and has never seen more.
"""

from dataclasses import dataclass

from transformers import CLIPModel

from segalign.diffusion.bundle import DiffusionBundle
from segalign.diffusion.latents import PixelUnshuffleCodec
from segalign.diffusion.schedule import NoiseSchedule
from segalign.scenes.models import (
    SCHEDULER_CONFIG,
    UNSHUFFLE_FACTOR,
    generator_unet,
    scorer_model,
)
from segalign.scenes.weights import fill_weights, read_weights
from segalign.scenes.world import get_world
from segalign.text.text_models import TextModels
from segalign.text.tokenizer import clip_tokenizer

GENERATOR_PREFIXES = ("unet.",)
TEXT_PREFIXES = ("conditioner.tower.text_model.", "scorer.model.text_model.", "model.text_model.")
SCORER_PREFIXES = ("scorer.model.", "model.")
# The scorer after preference training: a file of its own beside the base's.
PREFERENCE = "preference_scorer"


@dataclass(frozen=True, kw_only=True)
class ScenesBase:
    """The scenes model, as shipped, from runs, or untrained.

    Args:
        world: World of the images; the shipped weights are of ``3x3``.
        generator: ``shipped``, ``random``, or a run (or checkpoint) of the diffusion module whose
            network is used, averaged weights preferred.
        text_model: ``shipped``, ``random``, or a run that trained a text model.
    """

    world: str = "3x3"
    generator: str = "shipped"
    text_model: str = "shipped"

    def load(self) -> DiffusionBundle:
        """Build the model and read its weights.

        Raises:
            ConfigError: If the world or a run does not exist.
            DataError: If weights are missing or of another network.
        """
        world = get_world(self.world)
        unet = generator_unet(world)
        state = read_weights(self.generator, "generator", GENERATOR_PREFIXES, self.world)
        if state is not None:
            fill_weights(unet, state, self.generator)
        text_model = scorer_model(world).text_model
        state = read_weights(self.text_model, "text_model", TEXT_PREFIXES, self.world)
        if state is not None:
            fill_weights(text_model, state, self.text_model)
        return DiffusionBundle(
            unet=unet,
            text_models=TextModels(text_model=text_model, tokenizer=clip_tokenizer()),
            codec=PixelUnshuffleCodec(UNSHUFFLE_FACTOR),
            schedule=NoiseSchedule.from_config(SCHEDULER_CONFIG),
            image_size=world.image_size,
        )


def load_scorer(world: str, source: str) -> CLIPModel:
    """Build the scorer and read its weights (``shipped``, ``preference``, ``random`` or a run)."""
    model = scorer_model(get_world(world))
    part, source = (PREFERENCE, "shipped") if source == "preference" else ("scorer", source)
    state = read_weights(source, part, SCORER_PREFIXES, world)
    if state is not None:
        # Training keeps the temperature one-dimensional, as sharding wants it.
        scale = {k: v.reshape(()) for k, v in state.items() if k == "logit_scale"}
        fill_weights(model, state | scale, source)
    return model
