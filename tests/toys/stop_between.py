"""A callback that ends a training in the middle of an optimizer step."""

from lightning.pytorch.callbacks import Callback


class StopBetween(Callback):
    """Ask for a stop after the first micro-batch of a step, as a limit of time may do."""

    def __init__(self, at_step: int):
        super().__init__()
        self.at_step = at_step

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if (trainer.global_step, batch_idx % trainer.accumulate_grad_batches) == (self.at_step, 0):
            trainer.should_stop = True
