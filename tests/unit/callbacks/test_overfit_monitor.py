"""The monitor hears every evaluation of a training, says why, and survives a resume."""

import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
from lightning.pytorch.trainer.states import TrainerFn
from toy_evaluation import setting_of

from callbacks.overfit_monitor import SUSPECTED, OverfitMonitor
from segalign.evaluation.evaluator import Outcome
from segalign.evaluation.hacking_settings import HackingSettings

# Reward and sharpness by step: the reward climbs, and from step 20 on the images are noise.
SHARPNESS = {0: 1.0, 10: 1.5, 20: 5.0, 30: 6.0, 40: 7.0}


class Logger:
    def __init__(self):
        self.logged = []

    def log_metrics(self, metrics, step):
        self.logged.append((step, metrics[f"val/{SUSPECTED}"]))


def make_trainer(folder: Path, step: int, fn=TrainerFn.FITTING):
    return SimpleNamespace(
        state=SimpleNamespace(fn=fn),
        global_step=step,
        is_global_zero=True,
        fast_dev_run=False,
        default_root_dir=str(folder),
        loggers=[Logger()],
        strategy=SimpleNamespace(broadcast=lambda value: value),
        should_stop=False,
    )


def outcome_at(step: int, **changes) -> Outcome:
    values = {"monitor/reward": 0.1 + step / 100, "sharpness": SHARPNESS[step], **changes}
    return Outcome(setting_of(), values, {}, 5, 0, [], 1.0, 0.1)


def watch(folder, steps, monitor=None, **settings):
    monitor = monitor or OverfitMonitor(**settings)
    trainers = []
    for step in steps:
        trainers.append(make_trainer(folder, step))
        monitor.on_outcome(trainers[-1], None, outcome_at(step))
    return monitor, trainers


def logged(trainers):
    return dict(pair for trainer in trainers for pair in trainer.loggers[0].logged)


def test_it_suspects_after_two_evaluations_with_a_reason(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        monitor, trainers = watch(tmp_path, SHARPNESS)
    assert logged(trainers) == {0: 0.0, 10: 0.0, 20: 0.0, 30: 1.0, 40: 1.0}
    (said,) = [one.getMessage() for one in caplog.records if SUSPECTED in one.getMessage()]
    assert f"{SUSPECTED} at step 30, since step 20: detail is off: `sharpness` 1 to 6" in said
    assert monitor.verdict.suspected
    assert not any(trainer.should_stop for trainer in trainers)


def test_it_ends_the_training_if_it_shall(tmp_path):
    _, trainers = watch(tmp_path, SHARPNESS, stop=True)
    assert [trainer.should_stop for trainer in trainers] == [False, False, False, True, True]


def test_the_thresholds_are_arguments(tmp_path):
    monitor, _ = watch(tmp_path, SHARPNESS, rule=HackingSettings(max_detail=10.0))
    assert not monitor.verdict.suspected


def test_a_resumed_run_is_suspected_when_the_whole_one_is(tmp_path):
    _, whole = watch(tmp_path / "whole", SHARPNESS)
    first, _ = watch(tmp_path / "run", [0, 10])
    # Taken before the validation of its step: it does not know of step 20.
    checkpoint = first.state_dict()
    watch(tmp_path / "run", [20, 30], monitor=first)
    second = OverfitMonitor()
    second.load_state_dict(checkpoint)
    second.on_train_start(make_trainer(tmp_path / "run", 20), None)
    _, resumed = watch(tmp_path / "run", [30, 40], monitor=second)
    expected = logged(whole)
    assert logged(resumed) == {step: expected[step] for step in (30, 40)}


def test_without_the_file_the_checkpoint_counts(tmp_path):
    first, _ = watch(tmp_path / "first", [0, 10, 20])
    second = OverfitMonitor()
    second.load_state_dict(first.state_dict())
    second.on_train_start(make_trainer(tmp_path / "elsewhere", 20), None)
    _, resumed = watch(tmp_path / "elsewhere", [30], monitor=second)
    assert logged(resumed) == {30: 1.0}


def test_a_new_run_starts_anew(tmp_path):
    watch(tmp_path, SHARPNESS)
    monitor = OverfitMonitor()
    monitor.on_train_start(make_trainer(tmp_path, 0), None)
    _, trainers = watch(tmp_path, [0, 10, 20], monitor=monitor)
    assert logged(trainers) == {0: 0.0, 10: 0.0, 20: 0.0}


@pytest.mark.parametrize("fn", [TrainerFn.VALIDATING, TrainerFn.TESTING])
def test_only_trainings_are_judged(tmp_path, fn):
    monitor = OverfitMonitor()
    monitor.on_outcome(make_trainer(tmp_path, 0, fn), None, outcome_at(0))
    assert monitor.verdict is None


def test_what_cannot_be_watched_is_said_once(tmp_path, caplog):
    monitor = OverfitMonitor(rule=HackingSettings(reward="monitor/other", drift="nothing"))
    with caplog.at_level(logging.WARNING):
        watch(tmp_path, [0, 10], monitor=monitor)
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2
    assert "there is no `monitor/other`" in said[0]
    assert "`rule.drift` is `nothing`, and there is none: known are monitor/reward" in said[1]
