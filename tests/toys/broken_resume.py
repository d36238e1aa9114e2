"""Deliberately broken ways to go on with a run; each spoils the process that calls it."""

import itertools

import toy_resume
from lightning.pytorch.trainer.connectors.checkpoint_connector import _CheckpointConnector

from callbacks import checkpoint, unfinished_step
from callbacks.checkpoint import RunCheckpoint
from callbacks.ema import EMA
from callbacks.step_rng import StepRng
from callbacks.unfinished_step import UnfinishedStep
from datamodules import long_caption
from datamodules.long_caption import LongCaptionDataModule
from lightning_modules.training import TrainingModule
from segalign.data import reader
from segalign.rng import counter_normal


def _nothing(*arguments, **options):
    return None


def rng_not_seeded_by_step():
    """Lets dropout draw from wherever the global generator stands."""
    StepRng.on_train_batch_start = _nothing


def data_restarts_the_epoch():
    """Serves the data from its first sample on, whatever was served before."""
    long_caption.steps_served = lambda trainer: 0


def position_counts_own_samples():
    """Counts the position of the run in the samples of one rank instead of all."""
    begin = LongCaptionDataModule._begin_sequence

    def begin_sequence(self, plan):
        return begin(self, plan) // plan.world_size

    LongCaptionDataModule._begin_sequence = begin_sequence


def micro_batches_counted_on():
    """Lets Lightning count micro-batches on from those of another accumulation."""
    unfinished_step._begin_step_anew = _nothing


def optimizer_not_loaded():
    """Leaves the state of the optimizer in the checkpoint."""
    _CheckpointConnector.restore_optimizers = _nothing


def moments_not_loaded():
    """Loads the rates of the optimizer, and lets it gather its moments anew."""
    restore = _CheckpointConnector.restore_optimizers

    def restore_optimizers(self):
        restore(self)
        for optimizer in self.trainer.optimizers:
            optimizer.state.clear()

    _CheckpointConnector.restore_optimizers = restore_optimizers


def ema_not_loaded():
    """Begins a new average at the loaded weights."""
    EMA.on_load_checkpoint = _nothing


def schedule_not_loaded():
    """Begins the learning-rate schedule anew."""
    _CheckpointConnector.restore_lr_schedulers = _nothing


def validation_not_made_up():
    """Goes on with the next step where a validation was cut off."""
    UnfinishedStep.load = _nothing


def passes_not_kept():
    """Leaves the accounts of a validation to the next checkpoint."""
    checkpoint.passes_of = lambda trainer: {}


def end_noted_before_its_rows():
    """Notes the end of the training before the module has logged what belongs to it."""
    end, RunCheckpoint.on_fit_end = RunCheckpoint.on_train_end, _nothing

    def on_train_end(self, trainer, pl_module):
        end(self, trainer, pl_module)
        self._unfinished.note_ended(trainer, self._run_dir)

    RunCheckpoint.on_train_end = on_train_end


def step_logged_after_its_checkpoint():
    """Leaves the logging of a step to the loop, which comes to it after the checkpoint."""
    unfinished_step._log_step = _nothing


def text_totals_logged_at_the_next_step():
    """Logs the text of an epoch that is over at the step that a resumed run begins with."""
    log = TrainingModule._log_text_totals

    def log_text_totals(self, step=None, *, ended=False):
        log(self, ended=ended)

    TrainingModule._log_text_totals = log_text_totals


def noise_keyed_by_row():
    """Draws the noise of a sample by its row in the batch of its rank."""

    def by_row(purpose, rows, shape):
        return counter_normal(purpose, [(row,) for row in range(len(rows))], shape)

    toy_resume.counter_normal = by_row


def reads_up_to_its_place():
    """Reads from the first sample on and throws away what was served before, as streams do."""
    iterate = reader.IndexedShardReader.__iter__

    def read_all(self):
        start = int(self._start[0])
        self._start[0] = 0
        yield from itertools.islice(iterate(self), start * self._plan.batch_size, None)

    return [("__iter__", read_all)]


def changed_rates_are_undone():
    """Leaves the rate and schedule of the checkpoint in place, whatever the config says now."""
    from lightning_modules.changed_optimizer import ChangedOptimizer

    ChangedOptimizer.on_train_start = lambda self, trainer, module: None
