"""Totals of lost text: by epoch of the sample, over ranks, handed out once."""

import lightning.pytorch as pl
import torch
from stop_between import StopBetween
from torch.utils.data import DataLoader
from toy_non_finite import LineModule, Rows

from lightning_modules.text_totals import TextTotals
from segalign.text.conditioning import TextReport

ONE = {"num_captions": 1, "num_segments": 2, "cut_segments": 1, "kept_tokens": 9}


def report(*dropped: int) -> TextReport:
    rows = len(dropped)
    return TextReport(
        num_segments=(2,) * rows,
        cut_segments=(1,) * rows,
        dropped_tokens=dropped,
        kept_tokens=(9,) * rows,
    )


def alone(counts, operation):
    return counts


def test_an_epoch_is_handed_out_once_it_is_over():
    totals = TextTotals()
    totals.add(report(5, 7), [0, 0], [True, True])
    totals.commit()
    assert totals.flush(alone) == {}
    totals.add(report(1, 100), [0, 1], [True, True])
    totals.commit()
    over = totals.flush(alone)
    assert set(over) == {0}
    assert over[0]["dropped_tokens"] == 13
    assert over[0]["num_captions"] == 3
    assert totals.flush(alone) == {}
    rest = totals.flush(alone, ended=True)
    assert rest == {1: {**ONE, "dropped_tokens": 100}}
    assert totals.flush(alone, ended=True) == {}


def test_invalid_rows_do_not_count():
    totals = TextTotals()
    totals.add(report(5, 7), [0, 0], [True, False])
    totals.commit()
    assert totals.flush(alone, ended=True) == {0: {**ONE, "dropped_tokens": 5}}


def test_ranks_are_summed_and_agree_on_what_is_over():
    """The other rank is one epoch ahead: it has seen epochs 1 and 2, this rank 0 and 1."""
    totals = TextTotals()
    totals.add(report(5, 7), [0, 1], [True, True])
    totals.commit()
    other = {1: [1, 2, 1, 9, 11], 2: [1, 2, 1, 9, 13]}
    epochs = iter(range(3))

    def reduce(counts, operation):
        if operation == "max":
            assert counts.tolist() == [0, 1]
            return counts.new_tensor([0, 2])
        epoch = next(epochs)
        return counts + counts.new_tensor(other.get(epoch, [0] * 5))

    over = totals.flush(reduce)
    assert {epoch: row["dropped_tokens"] for epoch, row in over.items()} == {0: 5, 1: 18}
    assert totals.state_dict() == {"2": [1, 2, 1, 9, 13]}


def test_a_resumed_run_goes_on_counting():
    straight, first, second = TextTotals(), TextTotals(), TextTotals()
    for totals in (straight, first):
        totals.add(report(5), [0], [True])
        totals.commit()
        totals.flush(alone)
    second.load_state_dict(first.state_dict())
    for totals in (straight, second):
        totals.add(report(6), [0], [True])
        totals.commit()
    assert second.flush(alone, ended=True) == straight.flush(alone, ended=True)


def test_what_a_step_under_way_has_added_does_not_count_yet():
    totals = TextTotals()
    totals.add(report(5), [0], [True])
    totals.commit()
    totals.add(report(6), [0], [True])  # of a step that the run is stopped in
    assert totals.flush(alone) == {}
    assert totals.state_dict() == {"0": [1, 2, 1, 9, 5]}
    assert totals.flush(alone, ended=True) == {0: {**ONE, "dropped_tokens": 5}}
    totals.commit()
    assert totals.flush(alone, ended=True) == {}


class Reads(LineModule):
    """Takes every row for a caption of the first epoch."""

    def training_step(self, batch, batch_idx):
        self.report_text(report(5, 7), batch | {"epochs": torch.zeros(2, dtype=torch.long)})
        return super().training_step(batch, batch_idx)


class Keeps(pl.Callback):
    """What a checkpoint at the end of a training holds of its text."""

    def on_train_end(self, trainer, pl_module):
        checkpoint = {}
        pl_module.on_save_checkpoint(checkpoint)
        self.kept = checkpoint["text_totals"]


def test_a_run_stopped_in_the_middle_of_a_step_keeps_whole_steps():
    keeps = Keeps()
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=9,
        accumulate_grad_batches=2,
        callbacks=[StopBetween(3), keeps],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Reads(torch.optim.SGD), DataLoader(Rows(0, 0), batch_size=None))
    assert trainer.global_step == 3
    assert trainer.fit_loop.total_batch_idx == 6  # a seventh batch had begun the fourth step
    num_captions = 3 * 2 * 2
    assert keeps.kept == {"0": [num_captions * one for one in (1, 2, 1, 9, 6)]}
