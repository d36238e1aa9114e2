"""The one datamodule: image-caption, caption-only and preference-pair shards for every stage."""

from pathlib import Path
from typing import Any, cast

from jsonargparse.typing import ClosedUnitInterval, NonNegativeInt, PositiveInt
from lightning.pytorch import LightningDataModule

from datamodules.run_place import (
    batches_per_step,
    data_parallel_rank,
    is_on_gpu,
    stage_name,
    steps_served,
    steps_taken,
)
from segalign.data.accounts import TRAIN, RunAccounts
from segalign.data.limits import BadSampleLimits
from segalign.data.loaders import (
    Batch,
    BatchLoader,
    BatchSettings,
    SizedBatchLoader,
    eval_loader,
    open_shards,
    stream_loader,
    train_loader,
)
from segalign.data.manifest import Manifest
from segalign.data.order import BatchPlan
from segalign.data.preferences import require_preference
from segalign.data.scene_shards import ScenesShards
from segalign.data.sequence import SequenceState, check_same_sequence, sequence_state
from segalign.data.streaming import stream_urls
from segalign.data.transforms import Content
from segalign.errors import ConfigError

_ACCOUNTS = "accounts"


class LongCaptionDataModule(LightningDataModule):
    """Serve shards in an order that depends on (seed, epoch, position) alone.

    The training sequence never ends (``trainer.max_steps`` ends it) and is the same for any number
    of ranks, workers and accumulated batches. A resumed run continues it at
    ``global_step * global_batch_size``.

    Args:
        train_shards: Folder of shards with a manifest; or, with ``samples_per_epoch``, a folder,
            brace pattern or URL of shards without one.
        val_shards: Folder for validation and test.
        predict_shards: Folder whose captions are predicted; ``val_shards`` if it is not given.
        scenes: Make these shards of scenes first and train and validate on them.
        content: What a sample holds: an image and a caption, a caption alone, or two images with
            a caption and a preference. Training on pairs that are all ties is refused.
        global_batch_size: Samples of one optimizer step, over all ranks and accumulated batches.
        accumulate: Batches that one optimizer step consumes on each rank, for modules that step
            their optimizer themselves; others take ``trainer.accumulate_grad_batches``.
        val_batch_size: Samples of one validation batch over all ranks; None takes that of training.
        image_size: Side of the square images, in pixels: the short side is resized to it and the
            centre kept. None keeps the size, which must then be equal for all images.
        num_workers: Worker processes on each rank; 0 reads in the main process.
        seed: Seed of order and caption dropout.
        shuffle_window: Number of shards whose samples are mixed with each other.
        caption_dropout: Share of training captions replaced by the empty caption.
        limit_val_samples: Validate on the first so many samples only.
        samples_per_epoch: Length of an epoch of a stream without manifest.
        max_bad_fraction: Largest share of unreadable samples (of 300, while fewer were met); more
            end the run.
        max_bad_shard_fraction: The same of one shard of at least 20 samples, in one epoch.
        strict: End the run at the first unreadable sample.
        allow_pipe: Allow ``pipe:`` URLs, which run shell commands.
        report_dir: Where ``data_report.json`` is written; None writes none.
    """

    def __init__(
        self,
        *,
        train_shards: str | None = None,
        val_shards: str | None = None,
        predict_shards: str | None = None,
        scenes: ScenesShards | None = None,
        content: Content = "image",
        global_batch_size: PositiveInt = 32,
        accumulate: PositiveInt = 1,
        val_batch_size: PositiveInt | None = None,
        image_size: PositiveInt | None = None,
        num_workers: NonNegativeInt = 0,
        seed: int = 0,
        shuffle_window: PositiveInt = 8,
        caption_dropout: ClosedUnitInterval = 0.0,
        limit_val_samples: PositiveInt | None = None,
        samples_per_epoch: PositiveInt | None = None,
        max_bad_fraction: ClosedUnitInterval = 0.01,
        max_bad_shard_fraction: ClosedUnitInterval = 0.05,
        strict: bool = False,
        allow_pipe: bool = False,
        report_dir: str | None = None,
    ) -> None:
        super().__init__()
        if scenes is not None:
            scenes.check_use(content, other_shards=(train_shards, val_shards))
        self.train_shards = train_shards
        self.val_shards = val_shards
        self.predict_shards = predict_shards
        self.scenes = scenes
        self.content: Content = content
        self.global_batch_size = global_batch_size
        self.accumulate = accumulate
        self.val_batch_size = val_batch_size
        self.image_size = image_size
        self.num_workers = num_workers
        self.seed = seed
        self.shuffle_window = shuffle_window
        self.caption_dropout = caption_dropout
        self.limit_val_samples = limit_val_samples
        self.samples_per_epoch = samples_per_epoch
        self.allow_pipe = allow_pipe
        self.report_dir = report_dir
        self.train_manifest: Manifest | None = None
        limits = BadSampleLimits(max_bad_fraction, max_bad_shard_fraction, strict)
        self.accounts = RunAccounts(limits)
        self._restored: dict[str, Any] | None = None

    # Preparing

    def prepare_data(self) -> None:
        """Make the shards of scenes that are not there yet."""
        if self.scenes is not None:
            self.scenes.prepare()

    def setup(self, stage: str | None = None) -> None:
        """Open what is there; nothing is read yet."""
        if self.scenes is not None:
            self.train_shards = str(self.scenes.folder("train"))
            self.val_shards = str(self.scenes.folder("val"))
        if stage in (None, "fit"):
            self.accounts.begin()
            if self.samples_per_epoch is None:
                self.train_manifest = open_shards(Path(self._required("train_shards")))
                self.accounts.expect(TRAIN, self.train_manifest)
                if self.content == "preference":
                    require_preference(self.train_manifest)
            self._check_restored()

    def _required(self, setting: str) -> str:
        shards = getattr(self, setting)
        if not shards:
            raise ConfigError(
                f"`data.{setting}` must name a folder of shards; got none; set it or `data.scenes`"
            )
        return str(shards)

    # Loaders

    def train_dataloader(self) -> BatchLoader:
        """Return the endless sequence, from the run's position on."""
        plan = self._train_plan()
        if self.samples_per_epoch is not None:
            return self._stream_loader(plan, self.samples_per_epoch)
        if self.train_manifest is None:
            self.setup("fit")
        assert self.train_manifest is not None
        return train_loader(
            self.train_manifest,
            plan,
            self._batch_settings(self.content),
            seed=self.seed,
            start=lambda: self._begin_sequence(plan),
            shuffle_window=self.shuffle_window,
            caption_dropout=self.caption_dropout,
        )

    def _stream_loader(self, plan: BatchPlan, samples_per_epoch: int) -> BatchLoader:
        return stream_loader(
            stream_urls(self._required("train_shards"), allow_pipe=self.allow_pipe),
            plan,
            self._batch_settings(self.content),
            samples_per_epoch=samples_per_epoch,
            seed=self.seed,
            start=self._step() * plan.accumulate,
            caption_dropout=self.caption_dropout,
        )

    def _begin_sequence(self, plan: BatchPlan) -> int:
        """Return the micro-batch to start at, and open the accounts there."""
        kept = None if self._restored is None else self._restored.get(_ACCOUNTS)
        self.accounts.begin_training(self._step() * self.global_batch_size, kept)
        return self._step() * plan.accumulate

    def val_dataloader(self) -> SizedBatchLoader | list[SizedBatchLoader]:
        """Return every validation sample once; no loader if there are no validation shards."""
        self.setup("validate")
        if not self.val_shards:
            return []
        stages = ("validate", "sanity_check")
        return self._eval_loader(self.val_shards, self.content, self.limit_val_samples, stages)

    def test_dataloader(self) -> SizedBatchLoader:
        """Return every validation sample once, without a limit."""
        return self._eval_loader(self._required("val_shards"), self.content, None, ("test",))

    def predict_dataloader(self) -> SizedBatchLoader:
        """Return the captions to predict images for."""
        shards = self.predict_shards or self._required("val_shards")
        return self._eval_loader(shards, "caption", None, ("predict",))

    def _eval_loader(
        self, shards: str, content: Content, limit: int | None, stages: tuple[str, ...]
    ) -> SizedBatchLoader:
        size = self.val_batch_size
        if size is None:
            plan = self._train_plan()
            size = plan.batch_size * plan.world_size
        manifest, settings = open_shards(Path(shards)), self._batch_settings(content)
        for stage in stages:
            self.accounts.expect(stage, manifest)
        return eval_loader(manifest, self._plan(size, 1), settings, limit=limit)

    def _batch_settings(self, content: Content) -> BatchSettings:
        return BatchSettings(
            content=content,
            image_size=self.image_size,
            num_workers=self.num_workers,
            pin_memory=is_on_gpu(self.trainer),
        )

    # Place in the run: ranks, accumulation, steps

    def _train_plan(self) -> BatchPlan:
        return self._plan(self.global_batch_size, batches_per_step(self.trainer, self.accumulate))

    def _plan(self, global_batch_size: int, accumulate: int) -> BatchPlan:
        world_size, rank = data_parallel_rank(self.trainer)
        return BatchPlan(
            global_batch_size=global_batch_size,
            world_size=world_size,
            global_rank=rank,
            accumulate=accumulate,
        )

    def _step(self) -> int:
        """Return the number of optimizer steps that the sequence has served."""
        if self.trainer is None:
            return 0 if self._restored is None else int(self._restored["step"])
        return steps_served(self.trainer)

    def state_dict(self) -> dict[str, Any]:
        """Return the place in the sequence and the accounts up to it; all ranks must call it."""
        if self.train_manifest is None:
            return {}
        return {**self._place(), _ACCOUNTS: self.accounts.state(steps_taken(self.trainer))}

    def _place(self) -> SequenceState:
        assert self.train_manifest is not None
        place = (self._step(), self.global_batch_size)
        return sequence_state(self.train_manifest, *place, seed=self.seed)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the place in the sequence, which must be the same sequence as before."""
        self._restored = state_dict or None
        self._check_restored()

    def _check_restored(self) -> None:
        if self._restored is not None and self.train_manifest is not None:
            check_same_sequence(cast("SequenceState", self._restored), self._place())

    # Accounts

    def on_before_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Count the batch where a step consumes it, while it is still on the CPU."""
        self.consume(batch, stage_name(self.trainer))
        return batch

    def consume(self, batch: Batch, stage: str = "train") -> None:
        """Enter a batch into the accounts and take its ``faults`` out.

        Raises:
            DataError: If too many samples could not be read; with several ranks all raise it,
                at the next step.
        """
        self.accounts.consume(batch, stage, steps_taken(self.trainer) or 0)

    def teardown(self, stage: str | None = None) -> None:
        """Check and write the accounts of all ranks.

        Raises:
            DataError: If the samples of whole steps are not those of the sequence, each once, or
                too many could not be read.
        """
        position = self._step() * self.global_batch_size
        self.accounts.close(self._report_folder, position, steps_taken(self.trainer))

    def on_exception(self, exception: BaseException) -> None:
        """Write what this rank knows; the others may be gone."""
        self.accounts.close_after(exception, self._report_folder)

    @property
    def _report_folder(self) -> Path | None:
        return None if self.report_dir is None else Path(self.report_dir)
