"""Any text-to-image pipeline of diffusers as an image generator.

Dims: B images, H/W pixels.
"""

import contextlib
import functools
import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any, Self

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from segalign.diffusion.generator import Weights
from segalign.diffusion.scheduler_sampler import SamplerName
from segalign.errors import ConfigError
from segalign.generation.caption_cuts import count_caption_cuts
from segalign.generation.pipeline_call import CallSettings, call_arguments
from segalign.generation.pipeline_files import PipelineFiles, find_pipeline
from segalign.generation.pipeline_loading import load_pipeline, quiet_libraries
from segalign.rng import counter_seed

_logger = logging.getLogger(__name__)
# What is said elsewhere in a description.
_SAMPLER_SETTINGS = ("num_inference_steps", "guidance_scale")


class PipelineGenerator:
    """Makes images with a pipeline; an ``ImageGenerator``.

    All noise of an image, of every stage and step, is drawn on the CPU by a generator of its own,
    seeded by ``counter_seed("generate", eval_seed, sample_id)``. So the noise does not depend on
    the batch, the rank or the device. Pixels are the same bits where the batch has the same shape
    and the image the same place in it, on the same kind of device; else they are equal to rounding.
    An evaluation keeps shape and place on any number of devices. In float32 a pipeline of Stable
    Diffusion starts from the very noise that runs and exported folders start from.

    Schedulers that draw noise by themselves, as ``DPMSolverSDEScheduler`` does, take no generator.
    Their noise is seeded by all seeds and sample ids of the batch: it repeats with the same batch.

    Args:
        pipeline: The pipeline, in evaluation mode.
        settings: How it is called.
        files: Where it was loaded from.

    Raises:
        ConfigError: If the pipeline does not take the settings.
    """

    best_weights: Weights = "raw"

    def __init__(
        self, pipeline: DiffusionPipeline, settings: CallSettings, files: PipelineFiles
    ) -> None:
        self.pipeline = pipeline
        self.files = files
        self.arguments = call_arguments(pipeline, settings)
        self._given = settings.given()
        self._has_told_of_cuts = False

    @classmethod
    def load(
        cls,
        source: str,
        settings: CallSettings,
        *,
        prior: str | None = None,
        dtype: torch.dtype = torch.float32,
        sampler: SamplerName | None = None,
        device: torch.device | str = "cpu",
    ) -> Self:
        """Load a pipeline.

        Args:
            source: Folder or hub id; see `find_pipeline`.
            settings: How it is called.
            prior: Folder or hub id of the first of two stages, where ``source`` is the second.
            dtype: Precision of the weights and of all that is computed.
            sampler: The scheduler, by the names of our samplers; None takes the model's own.
            device: Where it is put.

        Raises:
            ConfigError: If it cannot be loaded, or does not take the settings.
        """
        files = find_pipeline(source, prior)
        generator = cls(load_pipeline(files, dtype=dtype, sampler=sampler), settings, files)
        generator.pipeline.to(device)
        return generator

    def generate(
        self,
        captions: Sequence[str],
        sample_ids: Sequence[int],
        eval_seed: int | Sequence[int],
        weights: Weights = "raw",
    ) -> Tensor:
        """Make images in [0, 1], ``(B, 3, H, W)``: see ``ImageGenerator``.

        Raises:
            ConfigError: If averaged weights are asked for: a pipeline holds one set. If images
                have another size than was asked for.
        """
        if weights != "raw":
            raise ConfigError(
                f"expected `weights: raw` for `{self.files.name}`, which holds one set of weights; "
                f"got `{weights}`. Leave it out."
            )
        if not self._has_told_of_cuts:
            self.caption_cuts(captions)
        seeds = [eval_seed] * len(sample_ids) if isinstance(eval_seed, int) else eval_seed
        generators = [
            torch.Generator().manual_seed(counter_seed("generate", seed, sample_id))
            for seed, sample_id in zip(seeds, sample_ids, strict=True)
        ]
        # Some schedulers draw noise of their own, and ask no generator.
        own_seed = counter_seed("generate call", *seeds, *sample_ids)
        with quiet_libraries(), torch.no_grad(), _seeded(self.pipeline.device, own_seed):
            # Not "pt", which leaves images of Kandinsky 2.2 in [-1, 1].
            images = self.pipeline(
                prompt=list(captions),
                generator=generators,
                output_type="np",
                **self._call(len(captions)),
            ).images
        pixels = torch.as_tensor(images, dtype=torch.float32).permute(0, 3, 1, 2)
        self._check_size(pixels)
        return pixels.contiguous().to(self.pipeline.device)

    def _check_size(self, images: Tensor) -> None:
        """Refuse images ``(B, 3, H, W)`` of another size than was asked for."""
        wanted = (self._given.get("height"), self._given.get("width"))
        found = tuple(images.shape[-2:])
        if wanted not in ((None, None), found):
            raise ConfigError(
                f"expected images of {wanted[0]} x {wanted[1]} pixels of `{self.files.name}`, as "
                f"`height` and `width` say; it makes {found[0]} x {found[1]}. Set a size that it "
                "can make."
            )

    def _call(self, batch_size: int) -> dict[str, Any]:
        """Return the arguments of a call: those that were given, and what is pinned."""
        pinned = {"clean_caption": self.arguments.get("clean_caption")}
        call = {name: value for name, value in pinned.items() if value is not None} | self._given
        negative = call.get("negative_prompt")
        return call if negative is None else {**call, "negative_prompt": [negative] * batch_size}

    def caption_cuts(self, captions: Sequence[str]) -> dict[str, dict[str, int]]:
        """Count the captions that the text encoders do not read to the end, and log a line of it.

        Args:
            captions: All captions of an evaluation. ``generate`` alone looks at its batches, and
                tells once.

        Returns:
            By tokenizer: ``context`` in tokens, ``num_cut`` and ``num_captions``.
        """
        counts = count_caption_cuts(self.pipeline, self.arguments, captions)
        cut = [
            f"{one.num_cut} of {one.num_captions} at the {one.context} tokens of `{name}`"
            for name, one in counts.items()
            if one.num_cut
        ]
        if cut:
            self._has_told_of_cuts = True
            _logger.warning("captions are cut by `%s`: %s", self.files.name, "; ".join(cut))
        return {name: asdict(one) for name, one in counts.items()}

    @functools.cached_property
    def digest(self) -> str:
        """Digest of all files that were loaded, read at the first use."""
        return self.files.digest()

    def description(self) -> dict[str, Any]:
        """Say what makes the images, as plain data; reads all files for their digest, once."""
        parts = self.pipeline.components
        rest = {k: v for k, v in self.arguments.items() if k not in _SAMPLER_SETTINGS}
        networks = [part for part in parts.values() if isinstance(part, nn.Module)]
        dtypes = {str(weight.dtype) for part in networks for weight in part.parameters()}
        return {
            "kind": "pipeline",
            "name": self.files.name,
            "revision": self.files.revision,
            "classes": {
                "pipeline": type(self.pipeline).__name__,
                **{name: type(part).__name__ for name, part in parts.items() if part is not None},
            },
            "digest": self.digest,
            "weights": None,
            "dtype": "+".join(sorted(name.removeprefix("torch.") for name in dtypes)),
            "sampler": {
                "name": type(parts["scheduler"]).__name__,
                **{name: self.arguments.get(name) for name in _SAMPLER_SETTINGS},
            },
            "arguments": rest,
            "safety_checker": False,
            "watermark": False,
        }


@contextlib.contextmanager
def _seeded(device: torch.device, seed: int) -> Iterator[None]:
    """Seed PyTorch's own generators, of the CPU and of one device, for the duration of a block."""
    is_gpu = device.type == "cuda"
    with torch.random.fork_rng([device] if is_gpu else []):
        torch.default_generator.manual_seed(seed)
        if is_gpu:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield
