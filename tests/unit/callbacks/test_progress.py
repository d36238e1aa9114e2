import lightning.pytorch as pl
import pytest
from toy_house import ToyData, ToyModule

from callbacks.progress import StepProgressBar


class Breaks(ToyModule):
    def training_step(self, batch, batch_idx):
        if self.global_step == 2:
            raise ZeroDivisionError
        return super().training_step(batch, batch_idx)


class Watch(pl.Callback):
    """Note what the bar shows, after every batch."""

    def __init__(self, bar):
        super().__init__()
        self.bar, self.seen = bar, []

    def on_train_batch_end(self, *_):
        self.seen.append((self.bar.train_progress_bar.n, self.bar.train_progress_bar.total))


def fit(tmp_path, seconds, module=ToyModule, **settings):
    bar = StepProgressBar(seconds)
    watch = Watch(bar)
    trainer = pl.Trainer(
        accelerator="cpu",
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        callbacks=[bar, watch],
        **settings,
    )
    trainer.fit(module(), ToyData())
    return watch.seen


def test_optimizer_steps_are_counted_over_an_endless_loader(tmp_path, capsys):
    seen = fit(tmp_path, 0.0, max_steps=3, accumulate_grad_batches=2)
    assert seen == [(0, 3), (1, 3), (1, 3), (2, 3), (2, 3), (3, 3)]
    assert "3/3" in capsys.readouterr().out


def test_the_bar_moves_by_the_clock(tmp_path, capsys):
    seen = fit(tmp_path, 1000.0, max_steps=4)
    assert [number for number, _ in seen] == [1, 1, 1, 1]
    assert "4/4" in capsys.readouterr().out


def test_a_bar_that_is_cut_off_ends_its_line(tmp_path, capsys):
    with pytest.raises(ZeroDivisionError):
        fit(tmp_path, 0.0, Breaks, max_steps=9)
    out = capsys.readouterr().out
    assert "2/9" in out
    assert out.endswith("\n")
