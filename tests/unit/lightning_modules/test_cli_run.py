"""What a run gets besides its model and data."""

import functools
import json
from argparse import Namespace
from pathlib import Path

import lightning.pytorch as pl
import pytest
import toy_house
import yaml
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch import distributed

import main
from callbacks.checkpoint import RunCheckpoint, SafetensorsCheckpointIO
from callbacks.image_writer import ImageWriter
from callbacks.progress import StepProgressBar
from callbacks.run_config import RunConfigWriter
from callbacks.run_loggers import RunCSVLogger
from callbacks.step_rng import StepRng
from callbacks.tensorboard_log import RunTensorBoardLogger
from lightning_modules import cli
from segalign.errors import PreemptedError


@pytest.fixture
def cli_of(toy_command, monkeypatch):
    """Run a command without training; returns what would have trained."""
    seen = Namespace()
    monkeypatch.setattr(
        cli.SegalignCLI, "_run_subcommand", lambda self, _: setattr(seen, "cli", self)
    )

    def run(*options, stage="fit"):
        assert toy_command(stage, *options) == 0
        return seen.cli

    return run


@pytest.fixture
def trainer_of(cli_of):
    return lambda *options, stage="fit": cli_of(*options, stage=stage).trainer


def kinds(objects):
    return [type(each) for each in objects]


def test_every_run_has_its_parts(trainer_of, run_dir):
    trainer = trainer_of("--trainer.enable_progress_bar=true")
    for kind in (RunConfigWriter, StepRng, StepProgressBar, RunCheckpoint):
        assert kinds(trainer.callbacks).count(kind) == 1
    assert isinstance(trainer.strategy.checkpoint_io, SafetensorsCheckpointIO)
    assert kinds(trainer.loggers) == [RunTensorBoardLogger, RunCSVLogger]
    assert {logger.log_dir for logger in trainer.loggers} == {str(run_dir / "logs")}
    assert Path(trainer.default_root_dir) == run_dir
    assert trainer._accelerator_connector.use_distributed_sampler is False


def test_the_progress_bar_can_be_switched_off(trainer_of):
    assert StepProgressBar not in kinds(trainer_of().callbacks)


@pytest.mark.parametrize("configured", [False, True])
def test_predicted_images_are_written(trainer_of, monkeypatch, configured):
    monkeypatch.setattr(toy_house.ToyModule, "generate", lambda self: None, raising=False)
    writer = ["--trainer.callbacks+=callbacks.image_writer.ImageWriter"] if configured else []
    assert kinds(trainer_of(*writer, stage="predict").callbacks).count(ImageWriter) == 1
    assert kinds(trainer_of(stage="validate").callbacks).count(ImageWriter) == 0


def test_modules_without_images_predict_without_a_writer(trainer_of):
    assert kinds(trainer_of(stage="predict").callbacks).count(ImageWriter) == 0


def test_predictions_are_not_kept_in_memory(toy_command, monkeypatch):
    kept = []
    predict = pl.Trainer.predict

    @functools.wraps(predict)
    def keep(*arguments, **settings):
        kept.append(predict(*arguments, **settings))

    monkeypatch.setattr(pl.Trainer, "predict", keep)
    assert toy_command("predict") == 0
    assert toy_command("predict", "--return_predictions=true") == 0
    assert kept[0] is None
    assert len(kept[1]) == 2


@pytest.mark.parametrize(
    ("logger", "expected"),
    [
        ("false", []),
        ("true", [RunTensorBoardLogger, RunCSVLogger]),
        (
            "{class_path: lightning.pytorch.loggers.CSVLogger, init_args: {save_dir: x}}",
            [CSVLogger, RunTensorBoardLogger, RunCSVLogger],
        ),
        (
            "[{class_path: lightning.pytorch.loggers.TensorBoardLogger, init_args: {save_dir: x}}]",
            [TensorBoardLogger, RunCSVLogger],
        ),
    ],
)
def test_configured_loggers_are_kept(trainer_of, logger, expected):
    assert kinds(trainer_of(f"--trainer.logger={logger}").loggers) == expected


def test_strict_is_short_for_a_setting_of_the_data(cli_of):
    data = "--data=datamodules.long_caption.LongCaptionDataModule"
    for words, expected in ([], False), (["--strict"], True), (["--strict", "--data.seed=1"], True):
        assert cli_of(data, *words).datamodule.accounts.limits.strict is expected


def test_a_real_run_leaves_its_record(toy_command, toy_config, run_dir):
    assert toy_command("fit", "--trainer.max_steps=2") == 0
    (attempt,) = json.loads((run_dir / "run.json").read_text())["attempts"]
    assert attempt["config_sources"] == [str(toy_config)]
    assert attempt["command"][:3] == ["main.py", "fit", "--allow_import=toy_house"]
    assert attempt["seed"] == 7
    config = yaml.safe_load((run_dir / "config.yaml").read_text())
    assert config["trainer"]["max_steps"] == 2
    assert config["model"]["init_args"]["optimizer"]["init_args"]["lr"] == 0.01
    assert sorted(path.name for path in run_dir.iterdir()) == [
        "checkpoints",
        "config.yaml",
        "logs",
        "losses.jsonl",
        "run.json",
    ]


def test_the_recorded_config_runs_again_and_evaluates(toy_command, run_dir, capsys):
    assert toy_command("fit", "--trainer.max_steps=2") == 0
    arguments = ["--allow_import=toy_house", f"--config={run_dir}/config.yaml"]
    options = [f"--ckpt_path={run_dir}", "--trainer.limit_val_batches=1.0"]
    assert main.main(["validate", *arguments, *options]) == 0
    assert "val/loss" in capsys.readouterr().out


def test_a_quick_development_run_leaves_nothing(toy_command, run_dir):
    assert toy_command("fit", "--trainer.fast_dev_run=true") == 0
    assert [path.name for path in run_dir.iterdir()] == ["losses.jsonl"]


def test_a_value_on_a_link_target_is_refused(toy_command, tmp_path, monkeypatch, capsys):
    original = cli.SegalignCLI.add_arguments_to_parser

    def with_link(self, parser):
        original(self, parser)
        parser.link_arguments("data.init_args.seed", "model.init_args.width")

    monkeypatch.setattr(cli.SegalignCLI, "add_arguments_to_parser", with_link)
    layer = tmp_path / "layer.yaml"
    layer.write_text("model: {init_args: {width: 3}}")
    assert toy_command("fit", configs=(layer,)) == 78
    assert "`model.init_args.width` not to be set" in capsys.readouterr().err


class Explode(Callback):
    def on_train_start(self, trainer, pl_module):
        raise ZeroDivisionError


class Stop(Callback):
    def on_train_start(self, trainer, pl_module):
        assert distributed.is_initialized()
        raise PreemptedError("a signal came")


@pytest.mark.parametrize(("start", "code"), [(None, 0), (Stop.on_train_start, 85)])
def test_ranks_part_before_the_interpreter_is_torn_down(toy_command, monkeypatch, start, code):
    if start is not None:
        monkeypatch.setattr(toy_house.LossRecorder, "on_train_start", start)
    assert toy_command("fit", "--trainer.strategy=ddp", "--trainer.max_steps=1") == code
    assert not distributed.is_initialized()


def test_programming_errors_keep_their_traceback(toy_command, monkeypatch):
    monkeypatch.setattr(toy_house.LossRecorder, "on_train_start", Explode.on_train_start)
    with pytest.raises(ZeroDivisionError):
        toy_command("fit")
