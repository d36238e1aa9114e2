"""The lean network of a rollout without gradient: the same output, for less time.

Dims: B batch, c/h/w latents.
"""

import contextlib
import copy
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from segalign.diffusion.generator import TextToImage
from segalign.diffusion.guidance import Guidance
from segalign.diffusion.guided_text import GuidedText
from segalign.diffusion.linear_steps import Denoiser
from segalign.diffusion.merged_lora import MergedLora
from segalign.diffusion.stand_ins import standing_in
from segalign.diffusion.text_cache import TextCache
from segalign.errors import ConfigError
from segalign.sharding import is_sharded, kept_whole
from segalign.text.conditioning import TextConditioning

Compilation = Literal["none", "regional", "full"]
# (latents (M, c, h, w), timestep, text of M captions) -> output (M, c, h, w), without gradient.
_Call = Callable[[Tensor, int, TextConditioning], Tensor]
# Blocks of one class share their compiled code, once for each shape and gradient mode.
_MOST_VARIANTS = 128


@dataclass(frozen=True, kw_only=True)
class RolloutSettings:
    """How the network is called where no gradient is needed. None of it changes the output.

    Args:
        compile: ``regional`` compiles the transformer and residual blocks, for calls with gradient
            too; ``full`` compiles the network whole, for rollouts alone: slower to start.
        compile_backend: Backend of ``torch.compile``.
        merge_lora: Merge low-rank adapters for each rollout, in a copy of the weights they change.
            Null merges where the base weights are float32; true does so in lower precision too,
            which rounds small updates away.
        cache_text: Keep keys and values of the text over the steps, for one and the same time of
            computing them; they take 2 numbers per text token and channel of each cross-attention.
            Does nothing, as merging, where weights are sharded.
        pair_guidance: Call the network once for the captions and the negative prompt.
    """

    compile: Compilation = "none"
    compile_backend: str = "inductor"
    merge_lora: bool | None = None
    cache_text: bool = False
    pair_guidance: bool = True

    def __post_init__(self) -> None:
        """Check the choice of compilation."""
        if self.compile not in get_args(Compilation):
            known = ", ".join(f"`{option}`" for option in get_args(Compilation))
            raise ConfigError(
                f"`compile` must be one of {known}; got {self.compile!r}. Choose one."
            )


class OpenRollout:
    """The lean network, bound to a batch of captions.

    Args:
        denoise: ``(latents (B, c, h, w), timestep) -> guided output (B, c, h, w)``.
        forget: Gives the memory of merged weights, known texts and gathered weights back.
    """

    def __init__(self, denoise: Denoiser, forget: Callable[[], None]) -> None:
        self._denoise: Denoiser | None = denoise
        self._forget = forget

    def __call__(self, latents: Tensor, timestep: int) -> Tensor:
        """Call the network without gradient.

        Raises:
            RuntimeError: If it is released, or its block has ended.
        """
        if self._denoise is None:
            raise RuntimeError("expected a call before the rollout's release; it is released")
        return self._denoise(latents, timestep)

    def release(self) -> None:
        """Give its memory back before the block ends: there are no further calls."""
        if self._denoise is not None:
            self._denoise = None
            self._forget()


class Rollout:
    """Calls a generator's network for rollouts, and leaves the network as it is.

    Make one for a run: compiled code is kept from rollout to rollout.

    Args:
        generator: Network, noise levels and treatment of padding.
        settings: What is done for speed. ``regional`` compiles the network's blocks in place here,
            for good.
    """

    def __init__(self, generator: TextToImage, settings: RolloutSettings) -> None:
        self.settings = settings
        self._generator = _compiled(generator, settings)
        self._lora = MergedLora(generator.unet, settings.merge_lora)
        self._cache = TextCache(generator.unet) if settings.cache_text else None
        self._is_open = False

    @contextlib.contextmanager
    def denoiser(
        self, positive: TextConditioning, negative: TextConditioning | None, guidance: Guidance
    ) -> Iterator[OpenRollout]:
        """Bind the network to a batch of captions for the duration of a block.

        Between calls the network is unchanged, so that calls with gradient can come in between;
        its weights must not change before the end of the block.

        Args:
            positive: Conditioning of the ``B`` captions.
            negative: That of the negative prompt, ``B`` rows; needed where guidance is on.
            guidance: Scale, interval and rescaling.

        Yields:
            ``(latents (B, c, h, w), timestep) -> guided output (B, c, h, w)``, without gradient:
            that of `TextToImage.predict` and `Guidance.combine`, up to rounding. Its ``release``
            ends it early.

        Raises:
            ConfigError: If guidance is on and there is no negative prompt.
            RuntimeError: If the denoiser is called after the block, or blocks are nested.
        """
        if self._is_open:
            raise RuntimeError("expected one rollout at a time; another is open; leave it first")
        self._is_open = True
        try:
            with contextlib.ExitStack() as held:
                held.callback(self._forget)
                held.enter_context(kept_whole(self._generator.unet))
                # Nothing here holds on to it: what is released is gone before the block ends.
                yield OpenRollout(self._bind(positive, negative, guidance), held.close)
        finally:
            self._is_open = False

    def _forget(self) -> None:
        """Give the memory of merged weights and known texts back."""
        self._lora.release()
        if self._cache is not None:
            self._cache.forget()

    def _bind(
        self, positive: TextConditioning, negative: TextConditioning | None, guidance: Guidance
    ) -> Denoiser:
        text = self._prepare(positive, negative, guidance)
        call = self._network_call(text)
        return _guided(call, text, guidance, self._generator.schedule.num_timesteps)

    def _prepare(
        self, positive: TextConditioning, negative: TextConditioning | None, guidance: Guidance
    ) -> GuidedText:
        if guidance.scale != 1 and negative is None:
            raise ConfigError(
                f"expected a negative prompt for guidance of {guidance.scale}; got none. "
                "Give `negative`, or set the scale to 1."
            )
        with torch.no_grad():
            return GuidedText.prepare(
                positive,
                None if guidance.scale == 1 else negative,
                dtype=self._generator.unet.dtype,
                masked=self._generator.mask_padding,
                paired=self.settings.pair_guidance,
            )

    def _network_call(self, text: GuidedText) -> "_Call":
        """Merge adapters; return the network's call, which caches the text the first time."""
        places = self._lora.fill()
        # A sharded projection cannot be called but by its block.
        is_known = self._cache is None or is_sharded(self._generator.unet)
        if self._cache is not None and not is_known:
            places |= self._cache.places(places)

        def call(latents: Tensor, timestep: int, conditioning: TextConditioning) -> Tensor:
            nonlocal is_known
            if not self._is_open:
                raise RuntimeError("expected a call inside the rollout's block; it has ended")
            timesteps = torch.full((len(latents),), timestep, device=latents.device)
            # Never inference mode: its tensors cannot be replayed, and sharded weights refuse it.
            with torch.no_grad(), standing_in(places):
                if not is_known:
                    # At the first call, under whatever autocast the calls are made.
                    self._learn(text)
                    is_known = True
                return self._generator.predict(latents, timesteps, conditioning)

        return call

    def _learn(self, text: GuidedText) -> None:
        """Project the text in all cross-attentions."""
        cache = cast("TextCache", self._cache)
        if text.pair is not None:
            cache.learn(text.pair.prompt_embeds, text.positive.prompt_embeds)
            return
        cache.learn(text.positive.prompt_embeds)
        if text.negative is not None:
            cache.learn(text.negative.prompt_embeds)


def _guided(call: _Call, text: GuidedText, guidance: Guidance, num_timesteps: int) -> Denoiser:
    """Guide a call: both prompts at once where they are joined, one after the other elsewhere."""
    positive, pair = _bound(call, text.positive), text.pair
    if text.negative is not None:
        return guidance.denoiser(positive, _bound(call, text.negative), num_timesteps)

    def denoise(latents: Tensor, timestep: int) -> Tensor:
        if pair is None or not guidance.is_active(timestep, num_timesteps):
            return positive(latents, timestep)
        both = call(torch.cat([latents, latents]), timestep, pair)
        return guidance.combine(*both.chunk(2))

    return denoise


def _bound(call: _Call, text: TextConditioning) -> Denoiser:
    return lambda latents, timestep: call(latents, timestep, text)


def _compiled(generator: TextToImage, settings: RolloutSettings) -> TextToImage:
    """Compile as the settings say; return the generator to call."""
    options: dict[str, Any] = {"backend": settings.compile_backend}
    if "recompile_limit" in inspect.signature(torch.compile).parameters:
        options["recompile_limit"] = _MOST_VARIANTS
    if settings.compile == "full":
        generator = copy.copy(generator)
        generator.unet = torch.compile(generator.unet, **options)
    if settings.compile == "regional":
        for block in generator.unet.modules():
            if isinstance(block, BasicTransformerBlock | ResnetBlock2D):
                _compile_once(block, options)
    return generator


def _compile_once(block: nn.Module, options: dict[str, Any]) -> None:
    if block._compiled_call_impl is None:
        block.compile(**options)
