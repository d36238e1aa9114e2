"""Ways to handle numbers that are not finite that do not hold, for tests that must catch them."""

import torch

import callbacks.ema
import segalign.skipped_steps
from callbacks.non_finite import NonFiniteSteps
from lightning_modules import reward_finetuning, training
from lightning_modules.step_samples import StepSamples
from segalign.errors import NonFiniteError


def each_rank_decides_alone():
    """Looks at this rank's own numbers only."""
    finish = training.TrainingModule.finish_reduction

    def finish_alone(self):
        reduce = self.trainer.strategy.reduce
        self.trainer.strategy.reduce = lambda found, reduce_op: found * self.trainer.world_size
        finish(self)
        self.trainer.strategy.reduce = reduce

    training.TrainingModule.finish_reduction = finish_alone
    segalign.skipped_steps.gather_objects = lambda own: [own]


def one_rank_raises():
    """Ends at the first bad loss, on the rank that has it."""
    add = StepSamples.add

    def add_or_raise(self, losses, batch):
        if not losses.isfinite().all():
            raise NonFiniteError("expected finite losses; got NaN")
        add(self, losses, batch)

    StepSamples.add = add_or_raise


def gradients_of_zero():
    """Steps with a gradient of zero, which moves moments and weights."""

    def fill(trained, *, are_scaled=False):
        for weight in trained.values():
            weight.grad = torch.zeros_like(weight)

    training.drop_gradients = fill


def gradients_are_kept():
    """Says that a step is skipped, and takes it."""
    training.drop_gradients = lambda trained, *, are_scaled=False: None


def only_losses_are_looked_at():
    """Takes any gradient of a finite loss."""
    training.clip_gradients = lambda weights, bound: torch.zeros(())


def only_gradients_are_looked_at():
    """Trusts a finite gradient, whatever the loss is."""
    add = StepSamples.add
    StepSamples.add = lambda self, losses, batch: add(self, torch.zeros_like(losses), batch)


def the_average_moves():
    """Averages the weights once more after a step that was skipped."""
    callbacks.ema.is_left_out = lambda module: False


def the_direction_moves():
    """Keeps what a reward has learnt of the common direction in a step that was skipped."""
    reward_finetuning.load_direction_state = lambda reward, state: None


def nothing_is_counted():
    """Skips for ever."""
    segalign.skipped_steps.SkipCounter.too_many = lambda self: None


def counts_are_not_stored():
    """Starts to count anew when a run is resumed."""
    NonFiniteSteps.state_dict = lambda self: {}
    NonFiniteSteps.load_state_dict = lambda self, state: None


def the_first_rank_ends_alone():
    """Raises on the first rank, and lets the others go on."""
    count = NonFiniteSteps._count

    def count_on_first(self, trainer, skipped):
        try:
            count(self, trainer, skipped)
        except NonFiniteError:
            if trainer.is_global_zero:
                raise

    NonFiniteSteps._count = count_on_first


def repeated_lines_stay():
    """Leaves lines of the log of steps that a resumed run takes once more."""
    import callbacks.non_finite

    callbacks.non_finite.forget_from = lambda path, step: None
