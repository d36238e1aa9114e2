"""A finished model to evaluate: a run, an exported folder, or a pipeline of diffusers."""

from collections.abc import Sequence
from typing import Any, Literal

import lightning.pytorch as pl
from jsonargparse.typing import NonNegativeFloat, PositiveInt
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor
from typing_extensions import override

from lightning_modules.run_loading import load_module
from segalign.diffusion.generator import Weights
from segalign.diffusion.scheduler_sampler import SamplerName
from segalign.errors import ConfigError
from segalign.generation.any_generator import GeneratorOptions, OpenedGenerator, open_generator
from segalign.types import CaptionBatch

_FULL_PRECISION = "32-true"


class GeneratorEvaluation(pl.LightningModule):
    """Evaluate whatever makes images of captions; an ``ImageGenerator`` that learns nothing.

    What is evaluated is only read, and none of its weights belong to this module. Runs and exported
    folders make the very images of ``main.py generate``.

    Args:
        source: A run, a checkpoint (``RUN/checkpoints/best`` too), a folder of ``main.py export
            --format diffusers``, a folder of diffusers, or a hub id such as
            ``PixArt-alpha/PixArt-XL-2-512x512``. Pipelines are read from safetensors alone, without
            code of their own, and without safety checker and watermark. A name that begins with
            ``runs/``, ``models/``, ``exported/`` or ``data/`` is a folder's, never a hub id.
        weights: ``raw`` or ``ema`` of a run; null takes the averaged ones where the run keeps them.
        dtype: Precision; null is that of the weights of a run or exported folder, and float32 for
            pipelines. Autocast of ``trainer.precision`` is not used.
        sampler: ``ddim``, ``euler``, ``unipc`` or ``dpmpp``; null keeps the model's own. So do the
            settings below.
        num_inference_steps: Steps.
        guidance_scale: Factor of classifier-free guidance; 1 is off.
        height: Pixels, given together with ``width`` or not at all; for pipelines.
        width: Pixels; for pipelines.
        negative_prompt: What images shall not show; for pipelines with guidance.
        prior: Folder or hub id of the first stage, where ``source`` is a folder with the second
            alone, as of Kandinsky 2.2; for pipelines.
        arguments: Other arguments that the pipeline's call takes, plain values.
        eval_seed: Seeds the images that ``predict`` makes; metrics have a seed of their own.
    """

    def __init__(
        self,
        source: str,
        weights: Weights | None = None,
        dtype: Literal["float32", "bfloat16", "float16"] | None = None,
        sampler: SamplerName | None = None,
        num_inference_steps: PositiveInt | None = None,
        guidance_scale: NonNegativeFloat | None = None,
        height: PositiveInt | None = None,
        width: PositiveInt | None = None,
        negative_prompt: str | None = None,
        prior: str | None = None,
        arguments: dict[str, Any] | None = None,
        eval_seed: int = 1234,
    ) -> None:
        super().__init__()
        self.source = source
        self.options = GeneratorOptions(
            weights=weights,
            dtype=dtype,
            sampler=sampler,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            height=height,
            width=width,
            negative_prompt=negative_prompt,
            prior=prior,
            arguments=arguments or {},
        )
        self.eval_seed = eval_seed
        self._opened: OpenedGenerator | None = None

    @override
    def configure_callbacks(self) -> list[Any]:
        """Refuse trainers that cannot evaluate it, before anything is read.

        Raises:
            ConfigError: If it is asked to learn, or the trainer has a precision of its own.
        """
        if self.trainer.state.fn == TrainerFn.FITTING:
            raise ConfigError(
                "expected `test`, `validate` or `predict` for `GeneratorEvaluation`, which learns "
                "nothing; got `fit`. Choose a recipe that trains."
            )
        if self.trainer.precision != _FULL_PRECISION:
            raise ConfigError(
                f"expected `trainer.precision: {_FULL_PRECISION}` for an evaluation; got "
                f"`{self.trainer.precision}`. Set `model.init_args.dtype` instead."
            )
        return []

    @override
    def configure_model(self) -> None:
        """Open the model on this rank's device.

        Raises:
            ConfigError: If it is not there, or does not take the settings.
        """
        if self._opened is None:
            device = str(self.trainer.strategy.root_device)
            self._opened = open_generator(self.source, load_module, self.options, device=device)

    @property
    def opened(self) -> OpenedGenerator:
        """The model; there once the module is configured."""
        assert self._opened is not None, "the module is not configured"
        return self._opened

    @property
    def best_weights(self) -> Weights:
        """The chosen weights, or the averaged ones where the run keeps them."""
        return self.opened.best_weights

    def generate(
        self,
        captions: Sequence[str],
        sample_ids: Sequence[int],
        eval_seed: int | Sequence[int],
        weights: Weights = "raw",
    ) -> Tensor:
        """Make images in [0, 1], ``(B, 3, H, W)``: see ``ImageGenerator``."""
        return self.opened.generate(captions, sample_ids, eval_seed, weights)

    def description(self) -> dict[str, Any]:
        """Say what is evaluated, as plain data; the first call may read all files of the model."""
        return self.opened.description()

    def caption_cuts(self, captions: Sequence[str]) -> dict[str, dict[str, int]]:
        """Count captions that a pipeline cuts, by tokenizer, and log a line of it."""
        return self.opened.caption_cuts(captions)

    @override
    def test_step(self, batch: CaptionBatch, batch_idx: int) -> STEP_OUTPUT:
        """Do nothing: callbacks evaluate."""
        return None

    @override
    def validation_step(self, batch: CaptionBatch, batch_idx: int) -> STEP_OUTPUT:
        """Do nothing: callbacks evaluate."""
        return None

    @override
    def predict_step(self, batch: CaptionBatch, batch_idx: int) -> Tensor:
        return self.generate(
            batch["captions"], batch["sample_ids"].tolist(), self.eval_seed, self.best_weights
        )

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse weights that come another way.

        Raises:
            ConfigError: Always.
        """
        raise ConfigError(
            "expected no `--ckpt_path` for `GeneratorEvaluation`; what is evaluated is named by "
            "`--model.init_args.source`. Name the checkpoint there."
        )
