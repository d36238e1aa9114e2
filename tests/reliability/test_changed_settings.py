"""A run goes on with changed settings only if it is told to, and records it."""

import json
import math
import re

import broken_checkpoints
import pytest

from segalign.run_directory import newest_checkpoint
from segalign.run_format import load_checkpoint

REFUSED = 78


@pytest.fixture
def fit(server, toy_config, tmp_path):
    """Run a fit of the toy; returns its exit code and output."""

    def fit(*options, broken=()):
        log = tmp_path / "log.txt"
        log.write_text("")
        arguments = ["fit", "--allow_import=toy_house", f"--config={toy_config}"]
        place = [f"--run_dir={tmp_path / 'run'}", "--ckpt_path=auto"]
        server.start([*arguments, *place, *options], log, broken=broken)
        return server.wait(), log.read_text()

    return fit


def check_changes(fit, run_dir, broken=()):
    code, output = fit("--trainer.max_steps=3")
    assert code == 0, output
    changed = ["--model.init_args.scale=2", "--trainer.max_steps=6"]
    code, output = fit(*changed, broken=broken)
    assert code == REFUSED, output
    (line,) = re.findall("^error: .*$", output, re.MULTILINE)
    assert "`model.init_args.scale` (1.0 -> 2.0)" in line
    allowed = "--checkpoint.allow_changes=[model.init_args.scale,model.init_args.width]"
    code, output = fit(*changed, allowed)
    assert code == 0, output
    for said in (
        "as allowed: `model.init_args.scale` (1.0 -> 2.0)",
        "names `model.init_args.width`, which has not changed",
    ):
        assert len(re.findall(re.escape(said), output)) == 1, output
    attempts = json.loads((run_dir / "run.json").read_text())["attempts"]
    assert [attempt["allowed_changes"] for attempt in attempts] == [
        [],
        ["model.init_args.scale", "model.init_args.width"],
    ]
    assert attempts[1]["checkpoint"].endswith("/step-00000003")
    assert attempts[1]["config"] == "config.attempt-2.yaml"
    for key in ("seed", "seeds", "versions", "git", "world_size", "host", "device"):
        assert key in attempts[1]


def test_a_changed_setting_is_refused_unless_it_is_named(fit, tmp_path):
    check_changes(fit, tmp_path / "run")


def test_a_changed_setting_is_caught_broken(fit, tmp_path):
    broken = ("broken_checkpoints.allows_any_change",)
    with pytest.raises(AssertionError):
        check_changes(fit, tmp_path / "run", broken)


def rates(run_dir):
    lines = (run_dir / "losses.jsonl").read_text().splitlines()
    return {record["step"]: record["lr"] for record in map(json.loads, lines)}


def check_rates(fit, run_dir, broken=()):
    """Train on with a longer schedule of another rate, as allowed: both take effect."""
    name = "segalign.lr_schedule.WarmupCosineLR"
    schedule = f"--model.init_args.lr_scheduler={name}"
    length = "--model.init_args.lr_scheduler.init_args.total_steps"
    code, output = fit("--trainer.max_steps=4", schedule, f"{length}=4")
    assert code == 0, output
    keys = ("optimizer.init_args.lr", "lr_scheduler.init_args.total_steps")
    allowed = ",".join(f"model.init_args.{key}" for key in keys)
    changed = [
        "--trainer.max_steps=8", schedule, f"{length}=8", "--model.init_args.optimizer.lr=0.5",
    ]  # fmt: skip
    code, output = fit(*changed, f"--checkpoint.allow_changes=[{allowed}]", broken=broken)
    assert code == 0, output
    # The rate is logged after the schedule's step: that of the next step.
    wanted = {step: 0.5 * (1 + math.cos(math.pi * step / 8)) / 2 for step in range(5, 9)}
    found = rates(run_dir)
    assert {step: found[step] for step in wanted} == pytest.approx(wanted), output


def test_an_allowed_rate_and_schedule_take_effect(fit, tmp_path):
    check_rates(fit, tmp_path / "run")


def test_a_rate_that_takes_no_effect_is_caught_broken(fit, tmp_path):
    with pytest.raises(AssertionError, match="approx"):
        check_rates(fit, tmp_path / "run", ("broken_resume.changed_rates_are_undone",))


def test_a_schedule_that_is_over_is_refused(fit):
    name = "torch.optim.lr_scheduler.OneCycleLR"
    schedule = [
        f"--model.init_args.lr_scheduler={name}",
        "--model.init_args.lr_scheduler.init_args.max_lr=0.1",
    ]
    length = "--model.init_args.lr_scheduler.init_args.total_steps"
    code, output = fit("--trainer.max_steps=6", *schedule, f"{length}=8")
    assert code == 0, output
    allowed = "--checkpoint.allow_changes=[model.init_args.lr_scheduler]"
    code, output = fit("--trainer.max_steps=9", *schedule, f"{length}=4", allowed)
    assert code == REFUSED, output
    assert re.findall("^error: expected a schedule that reaches step 6", output, re.MULTILINE)


def test_a_checkpoint_holds_what_resuming_takes_and_no_pickle(fit, tmp_path):
    schedule = {"class_path": "torch.optim.lr_scheduler.StepLR", "init_args": {"step_size": 2}}
    scheduled = f"--model.init_args.lr_scheduler={json.dumps(schedule)}"
    code, output = fit("--trainer.max_steps=3", scheduled)
    assert code == 0, output
    checkpoint = newest_checkpoint(tmp_path / "run")
    assert {path.name for path in checkpoint.iterdir()} == {
        "model.safetensors",
        "optimizer.safetensors",
        "ema.safetensors",
        "state.json",
        "meta.json",
    }
    for path in checkpoint.glob("*.json"):
        json.loads(path.read_bytes())
    tree = load_checkpoint(checkpoint)
    # Trained weights and their buffers, without the frozen encoder.
    assert sorted(tree["state_dict"]) == [
        "head.0.bias",
        "head.0.num_batches_tracked",
        "head.0.running_mean",
        "head.0.running_var",
        "head.0.weight",
        "head.1.bias",
        "head.1.weight",
    ]
    (optimizer,) = tree["optimizer_states"]
    assert {"step", "exp_avg", "exp_avg_sq"} <= optimizer["state"][0].keys()
    assert tree["ema"]["num_updates"] == 3
    assert tree["lr_schedulers"][0]["last_epoch"] == 3
    assert (tree["global_step"], tree["epoch"]) == (3, 0)
    assert {"loops", "validation_due", "run_config"} <= tree.keys()
    # All that is random is a function of the seed and the counters.
    assert tree["run_config"]["seed_everything"] == 7


BROKEN = (broken_checkpoints.allows_any_change,)
