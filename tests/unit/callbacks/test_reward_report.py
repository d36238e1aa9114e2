"""The report of reward fine-tuning: before, after and best, on the first validation captions."""

import logging

import lightning.pytorch as pl
import pytest
import torch
from PIL import Image
from toy_house import ToyModule
from toy_reward import Captions, Painter

from callbacks.checkpoint import RunCheckpoint, SafetensorsCheckpointIO
from callbacks.ema import EMA
from callbacks.reward_report import ImageScorer, RewardReport
from segalign.errors import ConfigError
from segalign.run_directory import newest_checkpoint

FACTS = "facts shown: attributes"


def fit(run_dir, *, max_steps=3, count=10, values=None, report=None, resume=False, **settings):
    data = Captions(count, with_facts=settings.pop("with_facts", True))
    module = settings.pop("module", None) or Painter(data.samples, values)
    report = report or RewardReport(num_captions=6, num_pictures=2, batch_size=4)
    callbacks = [*settings.pop("callbacks", []), report]
    pl.Trainer(
        accelerator="cpu",
        max_steps=max_steps,
        val_check_interval=1,
        num_sanity_val_steps=0,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=run_dir,
        plugins=[SafetensorsCheckpointIO()],
        callbacks=[*callbacks, RunCheckpoint(**settings)],
    ).fit(module, data, ckpt_path=newest_checkpoint(run_dir) if resume else None)
    return module, report


@pytest.fixture
def offset():
    """Mean of the offsets of the first six captions."""
    return sum(range(6)) / 6 / 1000


def test_before_and_after_are_means_over_the_first_captions(run_dir, offset, capsys):
    module, report = fit(run_dir, with_facts=False)
    before, after = report.figures["before"].values, report.figures["after"].values
    assert list(before) == ["reward", "reward/text_relevant", "held_out/darkness"]
    assert before["reward"] == pytest.approx(offset)
    assert after["reward"] == pytest.approx(0.3 + offset)
    assert after["held_out/darkness"] == pytest.approx(-0.3 - offset)
    assert [ids for ids, _ in module.calls] == 2 * [[0, 1, 2, 3], [4, 5]]
    assert "best" not in report.figures
    text = (run_dir / "report.md").read_text()
    assert "| measure | before | after | change (after - before) |" in text
    assert f"| reward | {offset:.4f} | {0.3 + offset:.4f} | +0.3000 |" in text
    assert "images of the first 6 validation captions" in text
    assert "Rewards before and after" in capsys.readouterr().out
    assert Image.open(run_dir / "report.png").size[0] > 500


@pytest.mark.parametrize("weights", ["raw", "ema"])
def test_the_best_checkpoint_is_scored_and_the_weights_return(run_dir, offset, weights):
    report = RewardReport(num_captions=6, num_pictures=2, weights=weights)
    module, report = fit(
        run_dir,
        values={1: 0.1, 2: 0.9, 3: 0.2},
        monitor="val/held_out",
        report=report,
        callbacks=[EMA(decay=0.5, warmup=False)],
        with_facts=False,
    )
    # The average of 0, 0.1, 0.2, halved at every step.
    expected = {"raw": 0.2, "ema": 0.125}[weights]
    assert report.best_step == 2
    assert report.figures["best"].values["reward"] == pytest.approx(expected + offset)
    assert module.shade.item() == pytest.approx(0.3)
    assert module.ema.weights["shade"].item() == pytest.approx(0.2125)
    text = (run_dir / "report.md").read_text()
    assert "| measure | before | after | best (step 2) | change (best - before) |" in text
    assert f"| +{expected:.4f} |" in text
    assert "has the maximum of `val/held_out`" in text


def test_a_best_that_is_the_last_is_not_scored_twice(run_dir):
    module, report = fit(run_dir, values={3: 0.9}, monitor="val/held_out")
    assert report.best_step == 3
    assert report.figures["best"] is report.figures["after"]
    assert len(module.calls) == 4


def test_facts_of_scenes_are_counted(run_dir):
    _, report = fit(run_dir, max_steps=4)
    before, after = report.figures["before"].values, report.figures["after"].values
    names = [name for name in after if name.startswith(FACTS)]
    assert names == [FACTS, f"{FACTS} within 77 tokens", f"{FACTS} past token 77"]
    assert after["facts shown: objects"] == 1
    assert all(after[name] == 1 > before[name] for name in names)
    assert f"| {FACTS} past token 77 | " in (run_dir / "report.md").read_text()


def test_before_survives_a_resume(run_dir, offset):
    _, first = fit(run_dir, max_steps=2)
    (run_dir / "report.md").unlink()
    module, report = fit(run_dir, max_steps=3, resume=True)
    assert report.figures["before"].values == first.figures["before"].values
    assert torch.equal(report.figures["before"].pictures, first.figures["before"].pictures)
    assert report.figures["after"].values["reward"] == pytest.approx(0.3 + offset)
    assert len(module.calls) == 2


def test_a_finished_run_shows_its_report_or_makes_it_up(run_dir, capsys):
    fit(run_dir)
    text = (run_dir / "report.md").read_text()
    module, _ = fit(run_dir, resume=True)
    assert module.calls == []
    assert "This run was finished before." in capsys.readouterr().out
    (run_dir / "report.md").unlink()
    fit(run_dir, resume=True)
    assert (run_dir / "report.md").read_text() == text


def test_figures_of_a_later_start_are_said_to_be(run_dir, caplog):
    fit(run_dir, max_steps=2, report=pl.Callback())
    with caplog.at_level(logging.WARNING):
        fit(run_dir, max_steps=3, resume=True)
    assert "`before` is of step 2, not 0" in caplog.text


def test_wrong_modules_and_data_are_refused(run_dir):
    assert isinstance(Painter([]), ImageScorer)
    with pytest.raises(ConfigError, match="generates and scores images; got `ToyModule`"):
        RewardReport().on_train_start(pl.Trainer(logger=False), ToyModule())
    with pytest.raises(ConfigError, match="expected validation captions"):
        fit(run_dir, count=0)
