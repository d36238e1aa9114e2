"""Images made once while training, for all metrics; training does not notice."""

import json
import logging
import random

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from tiny_run import model_settings
from toy_evaluation import Recorder

from callbacks.ema import EMA
from callbacks.image_evaluation import ImageEvaluation
from callbacks.image_metric import ImageMetricCallback
from datamodules.long_caption import LongCaptionDataModule
from lightning_modules.run_loading import build_module
from segalign.data.scene_shards import ScenesShards
from segalign.errors import ConfigError, DataError


class RecorderCallback(ImageMetricCallback):
    def __init__(self):
        super().__init__()
        self.outcomes = []

    def make_metrics(self, trainer, pl_module):
        return [Recorder()]

    def on_outcome(self, trainer, pl_module, outcome):
        (recorder,) = self.metrics(trainer, pl_module)
        self.outcomes.append((trainer.global_step, outcome, list(recorder.batches)))


class Losses(Callback):
    def __init__(self):
        self.values = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.values.append(outputs["loss"].item())


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    root = tmp_path_factory.mktemp("scenes")
    made = ScenesShards(world="2x2", num_train=24, num_val=6, root=str(root))
    made.prepare()
    return made


def make_trainer(run_dir, callbacks, **settings):
    return pl.Trainer(
        **{
            "accelerator": "cpu",
            "max_steps": 4,
            "val_check_interval": 2,
            "limit_val_batches": 1,
            "num_sanity_val_steps": 0,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": run_dir,
            "callbacks": callbacks,
            **settings,
        }
    )


def fit(run_dir, shards, callbacks, **settings):
    torch.manual_seed(0)
    module = build_module(model_settings(text={"token_budget": 160}))
    data = LongCaptionDataModule(scenes=shards, global_batch_size=6)
    losses = Losses()
    trainer = make_trainer(run_dir, [*callbacks, losses], **settings)
    trainer.fit(module, data)
    return trainer, module, losses.values


def evaluation(**settings):
    return ImageEvaluation(**{"num_captions": 5, "batch_size": 4, **settings})


def test_every_validation_and_the_start_are_evaluated(run_dir, shards, capsys):
    watch = RecorderCallback()
    trainer, *_ = fit(run_dir, shards, [evaluation(), watch])
    assert [step for step, *_ in watch.outcomes] == [0, 2, 4]
    assert trainer.callback_metrics["val/seen"] == 5
    lines = (run_dir / "evaluation" / "history.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 2, 4]
    assert (run_dir / "evaluation" / "curves.png").is_file()
    assert "evaluation/curves.png" in capsys.readouterr().out.replace("\n", "")


def test_later_images_are_compared_with_those_of_the_start(run_dir, shards):
    watch = RecorderCallback()
    fit(run_dir, shards, [evaluation(), watch])
    first, *later = [batches for *_, batches in watch.outcomes]
    for batches in later:
        for before, now in zip(first, batches, strict=True):
            assert torch.equal(now.start_pixels, before.pixels)
    assert not torch.equal(later[-1][0].pixels, first[0].pixels)


class StrayDraws(Callback):
    """Make the loss depend on every global generator, as dropout does; nothing seeds a step."""

    def on_train_start(self, trainer, pl_module):
        def disturb(unet, arguments):
            if not torch.is_grad_enabled():
                return arguments
            noise = random.random() + np.random.rand()  # noqa: NPY002
            return (torch.nn.functional.dropout(arguments[0], 0.1) + 0.01 * noise, *arguments[1:])

        pl_module.unet.register_forward_pre_hook(disturb)


def test_training_does_not_notice(run_dir, shards):
    random.seed(0), np.random.seed(0)  # noqa: NPY002
    alone = fit(run_dir / "alone", shards, [StrayDraws(), EMA()])[2]
    random.seed(0), np.random.seed(0)  # noqa: NPY002
    watchers = [evaluation(), RecorderCallback()]
    watched = fit(run_dir / "watched", shards, [StrayDraws(), *watchers, EMA()])[2]
    assert watched == alone


def test_training_does_not_notice_that_captions_are_read(run_dir, shards):
    watch = evaluation(at_start=False)
    watch._evaluate = lambda *_, **__: pytest.fail("nothing is evaluated before the first step")
    trainer = make_trainer(run_dir, [watch, RecorderCallback()])
    trainer.datamodule = LongCaptionDataModule(scenes=shards, global_batch_size=6)
    trainer.datamodule.setup("fit")
    module = build_module(model_settings(text={"token_budget": 160}))
    before = torch.get_rng_state()
    watch._check(trainer, module)
    assert len(watch._rows) == 5
    assert torch.equal(torch.get_rng_state(), before)


def test_nothing_of_it_is_in_the_module(run_dir, shards):
    _, module, _ = fit(run_dir, shards, [evaluation(), RecorderCallback()])
    assert {name.partition(".")[0] for name in module.state_dict()} <= {
        "unet",
        "text_models",
        "conditioner",
    }


@pytest.mark.parametrize("weights", ["raw", "ema", None])
def test_the_weights_are_those_that_are_asked_for(run_dir, shards, weights, monkeypatch):
    watch = RecorderCallback()
    fit(run_dir, shards, [EMA(), evaluation(weights=weights), watch], max_steps=2)
    (recorder,) = watch._metrics
    assert recorder.setting.weights == (weights or "ema")


def test_test_logs_under_its_own_name(run_dir, shards):
    watch = RecorderCallback()
    trainer, module, _ = fit(run_dir, shards, [evaluation(), watch])
    trainer.test(module, LongCaptionDataModule(scenes=shards, global_batch_size=6), verbose=False)
    assert trainer.callback_metrics["test/seen"] == 5
    assert watch._metrics[0].setting.is_final


def test_a_note_is_said_once(run_dir, shards, caplog):
    with caplog.at_level(logging.WARNING):
        fit(run_dir, shards, [evaluation(), RecorderCallback()])
    assert [record.getMessage() for record in caplog.records].count("look at this") == 1


class Absent(Recorder):
    """Its network is not there."""

    def start(self, setting):
        raise DataError("expected a file of weights; got none")


@pytest.mark.parametrize("stage", ["fit", "validate", "test"])
def test_what_is_missing_is_found_before_the_first_batch(run_dir, shards, stage):
    class AbsentCallback(RecorderCallback):
        def make_metrics(self, trainer, pl_module):
            return [Absent()]

        def on_train_batch_start(self, *_):
            pytest.fail("a batch has been trained on")

        on_validation_batch_start = on_test_batch_start = on_train_batch_start

    trainer = make_trainer(run_dir, [evaluation(at_start=False), AbsentCallback()])
    module = build_module(model_settings(text={"token_budget": 160}))
    data = LongCaptionDataModule(scenes=shards, global_batch_size=6)
    with pytest.raises(DataError, match="expected a file of weights"):
        getattr(trainer, stage)(module, datamodule=data)


def test_a_second_evaluation_is_refused(run_dir, shards):
    with pytest.raises(ConfigError, match=r"expected one `.*ImageEvaluation`.* got 2\."):
        fit(run_dir, shards, [evaluation(), evaluation(eval_seed=2), RecorderCallback()])


def test_a_metric_without_images_is_refused(run_dir, shards):
    with pytest.raises(ConfigError, match=r"expected `callbacks.image_evaluation.ImageEvaluation`"):
        fit(run_dir, shards, [RecorderCallback()])


def test_captions_must_come_from_somewhere(run_dir):
    module = build_module(model_settings(text={"token_budget": 160}))
    trainer = make_trainer(run_dir, [evaluation()])
    trainer.datamodule = None
    with pytest.raises(ConfigError, match=r"neither `data.val_shards` nor `shards`"):
        evaluation()._shards(trainer)
    del module
