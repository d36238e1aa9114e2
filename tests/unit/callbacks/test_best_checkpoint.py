"""The checkpoint of the best value is kept, and best.json always names one that is there."""

import json
import logging
import shutil

import lightning.pytorch as pl
import pytest
import torch
from toy_house import ToyData, ToyModule

from callbacks import best_checkpoint, checkpoint
from callbacks.best_checkpoint import stored_weights
from callbacks.checkpoint import RunCheckpoint, SafetensorsCheckpointIO
from callbacks.ema import EMA
from segalign.errors import ConfigError
from segalign.run_directory import (
    checkpoint_path,
    checkpoint_step,
    list_checkpoints,
    newest_checkpoint,
    read_best,
)
from segalign.run_format import load_checkpoint, read_tensors

NAN, INF = float("nan"), float("inf")
BY_EPOCH = {"val_check_interval": 1.0, "check_val_every_n_epoch": 1}


class Scripted(ToyModule):
    """Logs a given value after each step, and remembers the weights of that moment."""

    def __init__(self, values):
        super().__init__()
        self.values, self.weights = values, {}

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", self.values.get(self.global_step, 0.0))
        self.weights[self.global_step] = self.head[1].weight.detach().clone()


def fit(run_dir, values, *, resume=False, callbacks=(), trainer=None, data=None, **settings):
    module = Scripted(values)
    options = {
        "max_steps": max(values),
        "val_check_interval": 2,
        "check_val_every_n_epoch": None,
        **(trainer or {}),
    }
    settings = {"monitor": "val/loss", "every_n_steps": 100, **settings}
    pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=run_dir,
        plugins=[SafetensorsCheckpointIO()],
        callbacks=[*callbacks, RunCheckpoint(**settings)],
        **options,
    ).fit(module, data or ToyData(), ckpt_path=newest_checkpoint(run_dir) if resume else None)
    return module


def steps(run_dir):
    return [checkpoint_step(path) for path in list_checkpoints(run_dir)]


def record(run_dir):
    return json.loads((run_dir / "checkpoints" / "best.json").read_text())


@pytest.mark.parametrize(
    ("mode", "values", "best"),
    [
        ("max", {0: 9.0, 2: 0.1, 4: 0.9, 6: 0.5, 8: 0.2}, 4),
        ("min", {0: -9.0, 2: 0.1, 4: 0.9, 6: -0.5, 8: 0.2}, 6),
        ("max", {2: NAN, 4: INF, 6: -3.0, 8: NAN}, 6),
        ("max", {2: 0.5, 4: 0.5, 6: 0.5, 8: 0.5}, 2),
    ],
)
def test_the_best_outlives_newer_ones(run_dir, mode, values, best):
    fit(run_dir, values, monitor_mode=mode, every_n_steps=1)
    assert steps(run_dir) == sorted({best, 7, 8})
    expected = {"step": best, "monitor": "val/loss", "value": values[best], "mode": mode}
    assert record(run_dir) == pytest.approx(expected)


def test_a_checkpoint_of_the_very_step_is_made_with_its_average(run_dir):
    module = fit(run_dir, {2: 0.1, 4: 0.9, 8: 0.2}, callbacks=[EMA()])
    assert steps(run_dir) == [4, 8]
    tree = load_checkpoint(checkpoint_path(run_dir, 4))
    assert tree["global_step"] == 4
    assert torch.equal(tree["state_dict"]["head.1.weight"], module.weights[4])
    assert tree["ema"]["num_updates"] == 4


def test_a_beaten_best_is_not_kept_any_longer(run_dir):
    fit(run_dir, {2: 0.5, 4: 0.2, 6: 0.9}, every_n_steps=1)
    assert steps(run_dir) == [5, 6]


@pytest.mark.parametrize(("later", "best"), [(0.5, 2), (0.95, 6)])
def test_the_best_value_survives_a_resume(run_dir, later, best):
    fit(run_dir, {2: 0.9, 4: 0.1})
    fit(run_dir, {6: later, 8: later}, resume=True)
    assert record(run_dir)["step"] == best
    assert best in steps(run_dir)


def test_another_monitor_starts_anew(run_dir, caplog):
    fit(run_dir, {2: 0.9, 4: 0.1})
    with caplog.at_level(logging.WARNING):
        fit(run_dir, {6: 0.5, 8: 0.4}, resume=True, monitor_mode="min")
    assert "by `val/loss` (max); the best by `val/loss` (min) starts anew" in caplog.text
    assert record(run_dir)["step"] == 8


def test_a_best_that_is_gone_is_forgotten_with_a_warning(run_dir, caplog):
    fit(run_dir, {2: 0.9, 4: 0.1})
    shutil.rmtree(checkpoint_path(run_dir, 2))
    with caplog.at_level(logging.WARNING):
        fit(run_dir, {6: 0.5, 8: 0.4}, resume=True)
    assert "ignoring `best.json`: " in caplog.text
    assert record(run_dir)["step"] == 6


def test_starting_over_forgets_the_best(run_dir):
    fit(run_dir, {2: 0.9, 4: 0.1})
    fit(run_dir, {2: NAN, 4: NAN}, overwrite=True)
    assert steps(run_dir) == [4]
    assert read_best(run_dir) is None


class Killed(BaseException):
    pass


@pytest.mark.parametrize("place", ["before the record", "before pruning"])
def test_a_kill_leaves_a_best_that_is_there(run_dir, monkeypatch, place):
    fit(run_dir, {2: 0.5, 4: 0.1})
    module, name = (
        (best_checkpoint, "write_best") if "record" in place else (checkpoint, "prune_checkpoints")
    )

    def die(*arguments):
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(module, name, die)
        with pytest.raises(Killed):
            fit(run_dir, {6: 0.9, 8: 0.1}, resume=True)
    assert checkpoint_path(run_dir, 6).is_dir()
    assert checkpoint_path(run_dir, record(run_dir)["step"]).is_dir()
    fit(run_dir, {8: 0.7}, resume=True)
    assert record(run_dir)["step"] in steps(run_dir)


def test_a_monitor_that_is_never_logged_names_those_that_are(run_dir):
    with pytest.raises(ConfigError, match=r"got `val/reward`\. .* `train/loss`, `val/loss`\.$"):
        fit(run_dir, {8: 0.1}, monitor="val/reward")
    assert steps(run_dir) == []


class NoData(ToyData):
    def val_dataloader(self):
        return []


@pytest.mark.parametrize(
    ("trainer", "data", "reason"),
    [
        ({"limit_val_batches": 0}, ToyData, "leaves it out"),
        (BY_EPOCH, ToyData, "training data that never end"),
        ({}, NoData, "there are no validation data"),
    ],
)
def test_a_run_without_validation_is_refused(run_dir, trainer, data, reason):
    with pytest.raises(ConfigError, match=f"`checkpoint.monitor` .* none: .*{reason}"):
        fit(run_dir, {4: 0.9}, trainer=trainer, data=data())


def test_a_refusal_comes_before_anything_is_deleted(run_dir):
    fit(run_dir, {2: 0.9})
    with pytest.raises(ConfigError):
        fit(run_dir, {2: 0.9}, trainer={"limit_val_batches": 0}, overwrite=True)
    assert steps(run_dir) == [2]


def test_validating_in_the_middle_of_a_step_is_refused(run_dir):
    trainer = {"accumulate_grad_batches": 2, "val_check_interval": 3}
    with pytest.raises(ConfigError, match=r"multiple of `accumulate_grad_batches` \(2\)"):
        fit(run_dir, {8: 0.9}, trainer=trainer)


def test_no_checkpoint_is_made_in_the_middle_of_a_step(run_dir, monkeypatch, caplog):
    # Modules that step their optimizer themselves may do so at any batch.
    monkeypatch.setattr(best_checkpoint.BestValue, "check_schedule", lambda *arguments: None)
    trainer = {"accumulate_grad_batches": 2, "val_check_interval": 3}
    fit(run_dir, {1: 0.9, 3: 0.5, 4: 0.9, 6: 0.1}, trainer=trainer)
    assert "a step was under way" in caplog.text
    assert record(run_dir)["step"] == 3


def test_no_finite_value_is_said(run_dir, caplog):
    with caplog.at_level(logging.WARNING):
        fit(run_dir, {2: NAN})
    assert "no validation ended with a finite `val/loss`" in caplog.text


@pytest.mark.parametrize("weights", ["raw", "ema"])
def test_stored_weights_come_and_go(run_dir, weights):
    module = fit(run_dir, {2: 0.9, 8: 0.1}, callbacks=[EMA()])
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    path = checkpoint_path(run_dir, 2)
    expected = read_tensors(path / "model.safetensors")
    if weights == "ema":
        expected |= read_tensors(path / "ema.safetensors")

    def look_and_die():
        with stored_weights(module, path, weights):
            for name, tensor in expected.items():
                assert torch.equal(module.state_dict()[name], tensor)
            raise Killed

    assert not torch.equal(expected["head.1.weight"], before["head.1.weight"])
    with pytest.raises(Killed):
        look_and_die()
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
