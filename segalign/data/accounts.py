"""The accounts of a run over stages, ranks and attempts, and the limits that they are held to."""

import contextlib
import logging
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Final

from segalign.data.alarm import Alarm
from segalign.data.ledger import Ledger, describe, gather_stages, write_report
from segalign.data.limits import BadSampleLimits
from segalign.data.manifest import Manifest
from segalign.data.transforms import PADDING_ID
from segalign.errors import DataError
from segalign.ranks import own_rank, together, world_size
from segalign.types import CaptionBatch, PreferenceBatch

TRAIN: Final = "train"
_logger = logging.getLogger(__name__)


class RunAccounts:
    """Count on each rank what the stages of a run consume, and end it when too much is bad.

    The training counts all that it has consumed since its first attempt; what goes through the
    samples in order, such as a validation, counts its last pass. Counts of all ranks are brought
    together where all ranks come together: when a checkpoint is taken and when the run ends. From
    then on rank 0 has them, and the others count from nothing.

    A run may be stopped between two micro-batches of an optimizer step. What it keeps and reports
    then is as of the last whole step: whoever resumes it consumes all of the other once more.

    Args:
        limits: What ends a run.

    Attributes:
        stages: This rank's ledgers, by stage.
    """

    def __init__(self, limits: BadSampleLimits) -> None:
        self.stages: dict[str, Ledger] = {}
        self.limits = limits
        self._alarm = Alarm()
        self._shard_sizes: dict[str, dict[str, int]] = {}
        self._num_samples: dict[str, int] = {}
        self._last_ids: dict[str, int] = {}
        self._last_step: tuple[int, Ledger] | None = None
        self._later: dict[str, Ledger] = {}
        self._is_settled = False

    # Beginning

    def begin(self) -> None:
        """Open the accounts of a new run; every rank must call it."""
        self.stages = {}
        self._last_ids = {}
        self._last_step = None
        self._later = {}
        self._is_settled = False
        self._alarm.silence()

    def expect(self, stage: str, manifest: Manifest) -> None:
        """Say what a stage reads from."""
        self._shard_sizes[stage] = {shard.name: shard.num_samples for shard in manifest.shards}
        self._num_samples[stage] = manifest.num_samples

    def begin_training(self, position: int, kept: Mapping[str, Any] | None) -> None:
        """Open the accounts of the training sequence, unless they are open.

        Args:
            position: First position that this attempt consumes.
            kept: What ``state`` returned at this position in an earlier attempt; None if it left
                nothing, whose samples are then only counted as earlier.

        Raises:
            DataError: If what was kept makes no sense.
        """
        if TRAIN in self.stages:
            return
        num_samples = self._num_samples[TRAIN]
        restored = {**_restore(kept or {}), **self._later}
        train = restored.pop(TRAIN, None)
        if train is None or (train.num_samples, train.end_position) != (num_samples, position):
            self.stages[TRAIN] = Ledger(num_samples, first_position=position)
            return
        is_first = own_rank() == 0
        first_position = train.first_position
        self.stages[TRAIN] = (
            train if is_first else Ledger(num_samples, first_position=first_position)
        )
        for stage, ledger in restored.items() if is_first else ():
            if stage not in self.stages:
                self.stages[stage] = ledger
                self._last_ids[stage] = ledger.num_samples or 0

    def take_passes(self, kept: Mapping[str, Any]) -> None:
        """Let ``begin_training`` go on with ``passes`` that came after the state it is given.

        Counts that make no sense are left out: there is nothing that cannot do without them.
        """
        with contextlib.suppress(DataError):
            self._later = _restore({stage: kept[stage] for stage in kept if stage != TRAIN})

    # Counting

    def consume(self, batch: CaptionBatch | PreferenceBatch, stage: str, step: int) -> None:
        """Enter a batch and take its ``faults`` out.

        Args:
            batch: A batch that is just used.
            stage: What it is used for; ``train``, or a pass over the samples in order.
            step: Optimizer steps taken so far.

        Raises:
            DataError: If too many samples could not be read. With several ranks all raise it, at
                the next step.
        """
        faults = batch.pop("faults", [])
        ids, epochs = batch["sample_ids"].tolist(), batch["epochs"].tolist()
        self._is_settled = False
        if stage == TRAIN:
            self._alarm.raise_if_told(step)
        ledger = self._ledger(stage, ids)
        rows = (ids, epochs, batch["valid"].tolist(), faults)
        ledger.consume(*rows)
        if stage == TRAIN:
            self._ledger_of_step(step).consume(*rows)
        for fault in faults:
            _logger.warning("sample set aside: %s", describe(fault))
        sizes = self._shard_sizes.get(stage, {})
        excess = self.limits.find_excess(ledger, sizes, set(epochs) if faults else ())
        if excess is not None:
            self._alarm.tell(excess, step)

    def _ledger(self, stage: str, ids: list[int]) -> Ledger:
        """Return the ledger of a stage: a new one where a pass begins, as its ids only ascend."""
        if stage != TRAIN:
            real = [sample_id for sample_id in ids if sample_id != PADDING_ID]
            if real and real[0] <= self._last_ids.get(stage, -1):
                del self.stages[stage]
            self._last_ids[stage] = real[-1] if real else self._last_ids.get(stage, -1)
        return self.stages.setdefault(stage, Ledger(self._num_samples.get(stage)))

    def _ledger_of_step(self, step: int) -> Ledger:
        """Return what this rank has consumed for a step: nothing where it begins."""
        if self._last_step is None or self._last_step[0] != step:
            self._last_step = (step, Ledger(self._num_samples.get(TRAIN)))
        return self._last_step[1]

    # Keeping

    def settle(self, steps_taken: int | None = None) -> dict[str, Ledger]:
        """Bring the counts of all ranks together, which all must call.

        Args:
            steps_taken: Whole optimizer steps. What was consumed for another, which is under way,
                is left out, and stays with its rank. None leaves nothing out.

        Returns:
            The ledgers of all ranks together, by stage; on all ranks the same.
        """
        if steps_taken is None or (self._last_step and self._last_step[0] < steps_taken):
            self._last_step = None
        own = dict(self.stages)
        if self._last_step is not None:
            own[TRAIN] = own[TRAIN].without(self._last_step[1])
        merged = gather_stages(own)
        is_first = own_rank() == 0
        for stage, ledger in self.stages.items():
            empty = Ledger(ledger.num_samples, first_position=ledger.first_position)
            self.stages[stage] = merged[stage] if is_first else empty
        if self._last_step is not None:
            self.stages[TRAIN] = self.stages[TRAIN].merged([self._last_step[1]])
        return merged

    def state(self, steps_taken: int | None) -> dict[str, Any]:
        """Return plain values to go on counting from; every rank must call it.

        What is too much only over all ranks is seen here, and raised at the next step.

        Args:
            steps_taken: Whole optimizer steps; what was consumed for another is left out. None
                leaves nothing out.
        """
        merged = self.settle(steps_taken)
        excess = self._find_excess(merged)
        if excess is not None and TRAIN in self.stages:
            self._alarm.tell_later(excess, steps_taken or 0)
        return {stage: ledger.state() for stage, ledger in merged.items()}

    def passes(self) -> dict[str, Any]:
        """Return plain values of all but the training, for ``take_passes``; all ranks must call it.

        Every rank keeps its counts.
        """
        own = {stage: ledger for stage, ledger in self.stages.items() if stage != TRAIN}
        return {stage: ledger.state() for stage, ledger in gather_stages(own).items()}

    def close(
        self, folder: Path | None, position: int | None, steps_taken: int | None = None
    ) -> None:
        """Report and check the accounts of all ranks, which all must call.

        Args:
            folder: Where rank 0 writes the report; None writes none.
            position: Positions that the steps of the training have consumed.
            steps_taken: These steps; what was consumed for another, which the run was stopped in,
                is left out. None leaves nothing out.

        Raises:
            DataError: If the samples of whole steps are not those of the sequence, each once, or
                too many could not be read.
        """
        merged = self.settle(steps_taken)
        self._is_settled = True
        together(partial(_write, folder, merged))
        train = merged.get(TRAIN)
        if train is not None and train.end_position == position:
            train.check_identity()
        excess = self._find_excess(merged)
        if excess is not None:
            raise excess

    def close_after(self, error: BaseException, folder: Path | None) -> None:
        """Report after an error: the counts of all ranks if all have it, else those of this one."""
        if self._is_settled:
            return
        is_known_to_all = self._alarm.has_raised(error)
        stages = self.settle() if is_known_to_all else self.stages
        try:
            _write(folder, stages, is_partial=not is_known_to_all and world_size() > 1)
        except OSError as trouble:
            _logger.warning("no report of the data: %s", trouble)

    def _find_excess(self, merged: Mapping[str, Ledger]) -> DataError | None:
        for stage, ledger in merged.items():
            excess = self.limits.find_excess(ledger, self._shard_sizes.get(stage, {}))
            if excess is not None:
                return excess
        return None


def _restore(kept: Mapping[str, Any]) -> dict[str, Ledger]:
    try:
        return {stage: Ledger.from_state(state) for stage, state in kept.items()}
    except (AttributeError, LookupError, TypeError, ValueError) as err:
        raise DataError(
            f"expected the checkpoint's accounts of the data to be sound; got: {err!s:.100}; "
            "choose another checkpoint"
        ) from err


def _write(folder: Path | None, stages: dict[str, Ledger], *, is_partial: bool = False) -> None:
    if folder is not None and own_rank() == 0:
        write_report(folder, stages, is_partial=is_partial)
