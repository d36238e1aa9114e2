"""Images of the model as it was before training, kept for comparison at equal captions and noise.

A file for each micro-batch of the plan, which is the same for any number of ranks.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from segalign.atomic import make_directory, write_bytes_atomic, write_text_atomic
from segalign.errors import DataError
from segalign.evaluation.captions import captions_digest
from segalign.evaluation.image_metric import EvaluationSetting
from segalign.json_text import parse_json
from segalign.run_format import read_tensors

_RECORD = "start.json"


class StartImages:
    """A folder of images of the start.

    Args:
        folder: Where they are, or will be.
        made_by: How the model makes images, in words: other steps, or another size, are other
            images.
    """

    def __init__(self, folder: Path, made_by: str = "") -> None:
        self.folder = folder
        self.made_by = made_by

    def describe(self, setting: EvaluationSetting) -> dict[str, Any]:
        """Return what decides which images are stored, plain data."""
        plan = setting.plan
        return {
            "captions": captions_digest(setting.rows),
            "images_per_caption": plan.images_per_caption,
            "batch_size": plan.batch_size,
            "eval_seed": setting.eval_seed,
            "made_by": self.made_by,
        }

    def is_of(self, setting: EvaluationSetting) -> bool:
        """Tell whether the folder holds all images of this very evaluation."""
        try:
            record = parse_json((self.folder / _RECORD).read_bytes())
        except (OSError, ValueError):
            return False
        return bool(record == self.describe(setting)) and all(
            self._file(index).is_file() for index in range(setting.plan.num_batches)
        )

    def store(self, index: int, pixels: Tensor, finite: Tensor) -> None:
        """Write a micro-batch, whole or not at all.

        Args:
            index: Its number in the plan.
            pixels: uint8 ``(B, 3, H, W)``.
            finite: Which images were finite, bool ``(B,)``.
        """
        make_directory(self.folder)
        tensors = {"pixels": pixels.cpu().contiguous(), "finite": finite.cpu()}
        write_bytes_atomic(self._file(index), save(tensors))

    def finish(self, setting: EvaluationSetting) -> None:
        """Record that all ranks have stored what is theirs; one rank calls it."""
        make_directory(self.folder)
        write_text_atomic(self.folder / _RECORD, json.dumps(self.describe(setting), indent=1))

    def read(self, index: int) -> tuple[Tensor, Tensor]:
        """Read what ``store`` wrote of a micro-batch.

        Raises:
            DataError: If it is missing or damaged.
        """
        tensors = read_tensors(self._file(index))
        pixels, finite = tensors.get("pixels"), tensors.get("finite")
        kinds = [None if one is None else (one.dtype, one.ndim) for one in (pixels, finite)]
        if pixels is None or finite is None or kinds != [(torch.uint8, 4), (torch.bool, 1)]:
            raise DataError(
                f"expected images of the start in `{self._file(index)}`; got something else; "
                "delete the folder, and drift from the start is left out"
            )
        return pixels, finite

    def _file(self, index: int) -> Path:
        return self.folder / f"batch-{index:05d}.safetensors"
