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
    return sum(range(6)) / 6 / 255


def test_before_and_after_are_means_over_the_first_captions(run_dir, offset, capsys):
    module, report = fit(run_dir, with_facts=False)
    before, after = report.figures["before"].values, report.figures["after"].values
    assert list(before) == ["reward", "reward/text_relevant", "held_out/darkness"]
    assert before["reward"] == pytest.approx(offset)
    assert after["reward"] == pytest.approx(75 / 255 + offset)
    assert after["held_out/darkness"] == pytest.approx(-75 / 255 - offset)
    assert [ids for ids, _ in module.calls] == 2 * [[0, 1, 2, 3], [4, 5]]
    assert "best" not in report.figures
    text = (run_dir / "report.md").read_text()
    assert "| measure | before | after | change (after - before) |" in text
    assert f"| reward | {offset:.4f} | {75 / 255 + offset:.4f} | +{75 / 255:.4f} |" in text
    assert "images of the first 6 validation captions" in text
    assert "Rewards before and after" in capsys.readouterr().out
    assert Image.open(run_dir / "report.png").size[0] > 500


@pytest.mark.parametrize("weights", ["raw", "ema", None])
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
    # In bytes, rounded; the average is of 0, 25, 50, halved at every step.
    expected = {"raw": 50, "ema": 31, None: 31}[weights] / 255
    assert report.best_step == 2
    assert report.figures["best"].values["reward"] == pytest.approx(expected + offset)
    assert module.shade.item() == pytest.approx(75 / 255)
    assert module.ema.weights["shade"].item() == pytest.approx(53.125 / 255)
    averaged = "raw" if weights == "raw" else "averaged"
    assert f"noise of seed 1234; {averaged} weights." in (run_dir / "report.md").read_text()
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
    assert report.figures["after"].values["reward"] == pytest.approx(75 / 255 + offset)
    assert len(module.calls) == 2


def test_a_resume_without_images_of_the_start_shows_what_there_is(run_dir, caplog):
    fit(run_dir, max_steps=2)
    (run_dir / "report.md").unlink()
    (run_dir / "report" / "before" / "00001.png").unlink()
    with caplog.at_level(logging.WARNING):
        _, report = fit(run_dir, max_steps=3, resume=True, with_facts=False)
    warned = [one.getMessage() for one in caplog.records if "no `before`" in one.getMessage()]
    folder = run_dir / "report" / "before"
    assert warned == [
        f"the report has no `before`: 1 of 6 images in `{folder}` are missing",
    ]
    assert set(report.figures) == {"after"}
    reward = report.figures["after"].values["reward"]
    text = (run_dir / "report.md").read_text()
    assert f"| reward | - | {reward:.4f} | - |" in text
    assert "| measure | before | after | change (after - before) |" in text


class Learning(Painter):
    """Its reward learns in training: images of the same weights are worth more later."""

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)

    def score_images(self, images, captions, valid=None):
        scores = super().score_images(images, captions)
        return {name: values + self.global_step for name, values in scores.items()}


def test_all_moments_are_scored_by_the_reward_of_the_end(run_dir, offset):
    data = Captions(10)
    _, report = fit(run_dir, module=Learning(data.samples))
    before, after = report.figures["before"], report.figures["after"]
    assert before.values == after.values
    assert before.values["reward"] == pytest.approx(3 + offset)
    assert torch.equal(before.pictures, after.pictures)


class Breaking(Painter):
    """The second image overflows; from the second step on, one more does."""

    def paint(self, captions, sample_ids):
        images = super().paint(captions, sample_ids).clone()
        for row, sample_id in enumerate(sample_ids):
            if sample_id == 1 or (sample_id == 4 and self.shade > 0.15):
                images[row, 0, :2] = torch.nan
        return images


def test_images_that_are_not_finite_are_left_out_and_counted(run_dir, caplog):
    data = Captions(10)
    with caplog.at_level(logging.WARNING):
        _, report = fit(run_dir, module=Breaking(data.samples))
    before, after = report.figures["before"], report.figures["after"]
    assert (before.num_non_finite, after.num_non_finite) == (1, 2)
    assert before.values["reward"] == pytest.approx((0 + 2 + 3 + 4 + 5) / 5 / 255)
    assert after.values["reward"] == pytest.approx(75 / 255 + (0 + 2 + 3 + 5) / 4 / 255)
    found = "1 of `before`, 2 of `after`"
    warned = [one.getMessage() for one in caplog.records if "not finite" in one.getMessage()]
    assert warned == [f"images of the report are not finite: {found}"]
    text = (run_dir / "report.md").read_text()
    assert f"Means of rewards leave out images that are not finite: {found}." in text


def test_rewards_that_are_nowhere_finite_have_no_mean(run_dir):
    class Overflowing(Painter):
        def score_images(self, images, captions, valid=None):
            scores = super().score_images(images, captions)
            return scores | {"reward": scores["reward"] * torch.nan}

    fit(run_dir, module=Overflowing(Captions(10).samples))
    assert "| reward | - | - | - |" in (run_dir / "report.md").read_text()


def test_padding_rows_are_told(run_dir):
    told = []

    class Telling(Painter):
        def score_images(self, images, captions, valid=None):
            told.append((len(captions), valid.tolist()))
            return super().score_images(images, captions)

    fit(run_dir, module=Telling(Captions(10).samples), max_steps=1)
    assert told == 2 * [(4, [True] * 4), (2, [True] * 2)]


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
