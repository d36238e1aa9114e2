"""Write predicted images, one file for each caption of a shard."""

import json
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from PIL import Image
from torch import Tensor
from typing_extensions import override

from segalign.atomic import make_directory, storage_errors
from segalign.pictures import to_uint8
from segalign.types import CaptionBatch


class ImageWriter(Callback):
    """Write ``predictions/XXXXXXXX.png`` and a line of ``captions-rank-R.jsonl`` per caption.

    A file is named after the sample's position in the manifest, never after text from the data.

    Args:
        folder: Folder below the run directory.
    """

    def __init__(self, folder: str = "predictions") -> None:
        super().__init__()
        self.folder = folder

    @override
    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Make the folder, and start this rank's list of captions anew."""
        make_directory(self._folder(trainer))
        with storage_errors(self._captions(trainer)):
            self._captions(trainer).write_text("")

    @override
    def on_predict_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Tensor,
        batch: CaptionBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Write the valid rows of one batch."""
        lines: list[dict[str, Any]] = []
        for row, sample_id in enumerate(batch["sample_ids"].tolist()):
            if batch["valid"][row]:
                name = f"{sample_id:08d}.png"
                with storage_errors(self._folder(trainer) / name):
                    Image.fromarray(to_uint8(outputs[row])).save(self._folder(trainer) / name)
                lines.append({"file": name, "caption": batch["captions"][row]})
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        with (
            storage_errors(self._captions(trainer)),
            self._captions(trainer).open("a", encoding="utf-8") as file,
        ):
            file.write(text)

    def _folder(self, trainer: pl.Trainer) -> Path:
        return Path(trainer.default_root_dir) / self.folder

    def _captions(self, trainer: pl.Trainer) -> Path:
        return self._folder(trainer) / f"captions-rank-{trainer.global_rank}.jsonl"
