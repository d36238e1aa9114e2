"""A run that is stopped and resumed ends bit for bit where an uninterrupted one does."""

import csv
import json
from pathlib import Path

import pytest
import torch
import toy_house

from segalign.run_directory import checkpoint_step, list_checkpoints, newest_checkpoint
from segalign.run_format import load_checkpoint

pytestmark = pytest.mark.e2e


def losses(run_dir: Path) -> dict[int, tuple]:
    """Read each batch's loss; of a batch that was repeated, all records must agree."""
    records: dict[int, tuple] = {}
    for line in (run_dir / "losses.jsonl").read_text().splitlines():
        record = json.loads(line)
        value = (record["step"], record["loss"], record["lr"])
        assert records.setdefault(record["batch"], value) == value
    return records


def assert_same_checkpoints(left: Path, right: Path) -> None:
    one, other = (load_checkpoint(newest_checkpoint(path)) for path in (left, right))
    for tree in (one, other):
        assert tree.pop("run_config")["seed_everything"] == 7
    assert_same(one, other, "")


def assert_same_training_state(left: Path, right: Path, *parts: str) -> None:
    """Compare all but Lightning's own counts: to it, an early stop ends an epoch."""
    one, other = (load_checkpoint(newest_checkpoint(path)) for path in (left, right))
    for part in ("optimizer_states", "lr_schedulers", "ema", "global_step", *parts):
        assert_same(one[part], other[part], part)


def assert_same(left, right, place: str) -> None:
    assert type(left) is type(right), place
    if isinstance(left, dict):
        assert left.keys() == right.keys(), place
        for key in left:
            assert_same(left[key], right[key], f"{place}.{key}")
    elif isinstance(left, list | tuple):
        assert len(left) == len(right), place
        for index, (one, other) in enumerate(zip(left, right, strict=True)):
            assert_same(one, other, f"{place}.{index}")
    elif isinstance(left, torch.Tensor):
        assert torch.equal(left, right), place
    else:
        assert left == right, place


def metrics(run_dir: Path) -> list[dict[str, str]]:
    with (run_dir / "logs" / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


VARIANTS = {
    "plain": "{}",
    "accumulation": "trainer: {accumulate_grad_batches: 3}",
    "schedule": """
model:
  init_args:
    lr_scheduler: {class_path: torch.optim.lr_scheduler.CosineAnnealingLR, init_args: {T_max: 12}}
""",
    "milestones": """
model:
  init_args:
    lr_scheduler:
      class_path: torch.optim.lr_scheduler.MultiStepLR
      init_args: {milestones: [3, 7, 7, 10]}
trainer: {gradient_clip_val: 0.5}
""",
    "validation": """
trainer: {limit_val_batches: 1.0, val_check_interval: 4, check_val_every_n_epoch: null}
""",
    "validation_at_checkpoint": """
trainer: {limit_val_batches: 1.0, val_check_interval: 5, check_val_every_n_epoch: null}
""",
    "accumulation_and_validation": """
trainer:
  accumulate_grad_batches: 2
  limit_val_batches: 1.0
  val_check_interval: 6
  check_val_every_n_epoch: null
""",
}


@pytest.mark.parametrize("variant", list(VARIANTS))
@pytest.mark.parametrize("stop", ["max_steps", "should_stop"])
def test_resume_equals_a_straight_run(toy_command, tmp_path, variant, stop):
    layer = tmp_path / "variant.yaml"
    layer.write_text(VARIANTS[variant])
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    assert toy_command("fit", f"--run_dir={straight}", configs=(layer,)) == 0
    interruption = (
        ["--trainer.max_steps=7"]
        if stop == "max_steps"
        else ["--trainer.callbacks+=toy_house.Stop", "--trainer.callbacks.at_step=7"]
    )
    options = [f"--run_dir={broken}", "--ckpt_path=auto"]
    assert toy_command("fit", *options, *interruption, configs=(layer,)) == 0
    assert checkpoint_step(newest_checkpoint(broken)) == 7
    assert toy_command("fit", *options, configs=(layer,)) == 0
    assert losses(broken) == losses(straight)
    assert_same_training_state(broken, straight, "state_dict")
    if stop == "max_steps":
        assert_same_checkpoints(straight, broken)
        assert metrics(broken) == metrics(straight)


def test_a_stop_between_two_micro_batches_repeats_their_step(toy_command, tmp_path):
    layer = tmp_path / "variant.yaml"
    layer.write_text(VARIANTS["accumulation"])
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    assert toy_command("fit", f"--run_dir={straight}", configs=(layer,)) == 0
    options = [f"--run_dir={broken}", "--ckpt_path=auto", "--allow_import=stop_between"]
    stop = ["--trainer.callbacks+=stop_between.StopBetween", "--trainer.callbacks.at_step=7"]
    assert toy_command("fit", *options, *stop, configs=(layer,)) == 0
    assert checkpoint_step(newest_checkpoint(broken)) == 7
    assert len(losses(broken)) == 3 * 7 + 1
    assert toy_command("fit", *options, configs=(layer,)) == 0
    assert losses(broken) == losses(straight)
    # But for the running statistics of the toy's batch norm, which have seen a batch twice.
    assert_same_training_state(broken, straight)


def test_other_micro_batches_make_whole_steps(toy_command, run_dir):
    # Three micro-batches lie behind it, which are no whole step of four.
    assert toy_command("fit", "--trainer.max_steps=3") == 0
    before = losses(run_dir)
    options = ["--ckpt_path=auto", "--trainer.max_steps=6"]
    assert toy_command("fit", *options, "--trainer.accumulate_grad_batches=4") == 0
    steps = {batch: record[0] for batch, record in losses(run_dir).items() if batch not in before}
    assert steps == {batch: (batch + 1) // 4 for batch in range(12, 24)}


def test_a_finished_run_has_nothing_left_to_do(toy_command, run_dir):
    assert toy_command("fit", "--ckpt_path=auto") == 0
    before = (run_dir / "losses.jsonl").read_text()
    assert toy_command("fit", "--ckpt_path=auto") == 0
    assert (run_dir / "losses.jsonl").read_text() == before
    assert len(metrics(run_dir)) == 12


def test_the_newest_two_checkpoints_and_only_trained_weights_are_kept(toy_command, run_dir):
    assert toy_command("fit", "--checkpoint.every_n_steps=3") == 0
    assert [checkpoint_step(path) for path in list_checkpoints(run_dir)] == [9, 12]
    tree = load_checkpoint(newest_checkpoint(run_dir))
    assert not [name for name in tree["state_dict"] if name.startswith("encoder")]
    assert "hyper_parameters" not in tree
    assert tree["run_config"]["model"]["class_path"] == "toy_house.ToyModule"


def test_a_damaged_checkpoint_is_passed_over(toy_command, run_dir, tmp_path):
    straight = tmp_path / "straight"
    assert toy_command("fit", f"--run_dir={straight}") == 0
    assert toy_command("fit", "--trainer.max_steps=11") == 0
    assert [checkpoint_step(path) for path in list_checkpoints(run_dir)] == [10, 11]
    model = list_checkpoints(run_dir)[-1] / "model.safetensors"
    model.write_bytes(model.read_bytes()[:-1])
    assert toy_command("fit", "--ckpt_path=auto") == 0
    assert losses(run_dir) == losses(straight)
    assert [checkpoint_step(path) for path in list_checkpoints(run_dir)] == [10, 12]
    assert (run_dir / "checkpoints" / "step-00000011.damaged").is_dir()


def test_a_new_run_does_not_mix_with_an_old_one(toy_command, run_dir, capsys):
    assert toy_command("fit", "--trainer.max_steps=5") == 0
    assert toy_command("fit", "--trainer.max_steps=3") == 78
    assert "holds `step-00000005`. Go on with `--ckpt_path auto`" in capsys.readouterr().err
    assert toy_command("fit", "--trainer.max_steps=3", "--checkpoint.overwrite=true") == 0
    assert [checkpoint_step(path) for path in list_checkpoints(run_dir)] == [3]
    assert [row["step"] for row in metrics(run_dir)] == ["0", "1", "2"]


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_evaluation_reads_a_checkpoint_and_logs_beside_the_training(toy_command, run_dir, stage):
    assert toy_command("fit") == 0
    before = metrics(run_dir)
    assert toy_command(stage, "--ckpt_path=auto", "--trainer.limit_val_batches=1.0") == 0
    assert metrics(run_dir) == before
    if stage != "predict":
        assert (run_dir / "logs" / stage / "metrics.csv").exists()


def test_the_config_beats_what_a_checkpoint_stores(toy_command, run_dir):
    assert toy_command("fit") == 0
    options = ["--ckpt_path=auto", "--trainer.limit_val_batches=1.0"]
    values = []
    for scale in (1, 3):
        assert toy_command("validate", *options, f"--model.init_args.scale={scale}") == 0
        with (run_dir / "logs" / "validate" / "metrics.csv").open(newline="") as file:
            values.append(float(list(csv.DictReader(file))[-1]["val/loss"]))
    assert values[1] == pytest.approx(3 * values[0])


def test_weights_of_another_model_are_refused(toy_command, tmp_path, monkeypatch, capsys):
    assert toy_command("fit") == 0
    configure_model = toy_house.ToyModule.configure_model

    def configure_larger_model(self):
        configure_model(self)
        self.other = torch.nn.Linear(1, 1, bias=False)

    monkeypatch.setattr(toy_house.ToyModule, "configure_model", configure_larger_model)
    assert toy_command("fit", "--ckpt_path=auto") == 65
    assert "differing in `other.weight`" in capsys.readouterr().err
    plain = tmp_path / "plain.yaml"
    plain.write_text("trainer: {callbacks: []}")
    without_average = "--checkpoint.allow_changes=[trainer.callbacks.EMA]"
    assert toy_command("fit", "--ckpt_path=auto", without_average, configs=(plain,)) == 78
    assert "1 are missing, `other.weight` first" in capsys.readouterr().err


@pytest.fixture
def refusal(toy_command, run_dir, capsys):
    """Run a fit that must be refused before it writes anything; returns the line it prints."""

    def run(*options: str) -> str:
        before = {path: path.stat().st_mtime_ns for path in run_dir.rglob("*") if path.is_file()}
        capsys.readouterr()
        assert toy_command("fit", *options) == 78
        after = {path: path.stat().st_mtime_ns for path in run_dir.rglob("*") if path.is_file()}
        assert after == before
        line = capsys.readouterr().err.splitlines()[-1]
        assert line.startswith("error: expected ")
        return line

    return run


ONE_CYCLE = """
model:
  init_args:
    lr_scheduler:
      class_path: torch.optim.lr_scheduler.OneCycleLR
      init_args: {max_lr: 0.01, total_steps: "${trainer.max_steps}"}
"""


@pytest.mark.parametrize(
    ("options", "changed"),
    [
        (["--trainer.max_steps=8"], "lr_scheduler.init_args.total_steps` (3 -> 8)."),
        (["--model.init_args.width=7"], "changed: `model.init_args.width` (6 -> 7)."),
        (["--model=toy_house.LargerModule"], "`model.class_path` (toy_house.ToyModule -> "),
    ],
)
def test_changed_settings_are_not_ignored(toy_command, refusal, tmp_path, options, changed):
    layer = tmp_path / "one_cycle.yaml"
    layer.write_text(ONE_CYCLE)
    first = ["--ckpt_path=auto", f"--config={layer}", "--trainer.max_steps=3"]
    assert toy_command("fit", *first) == 0
    line = refusal(*first, *options)
    assert changed in line
    assert line.endswith("or start over here with `--checkpoint.overwrite true`.")


def test_overwriting_starts_over_with_changed_settings(toy_command, run_dir):
    assert toy_command("fit", "--ckpt_path=auto", "--trainer.max_steps=6") == 0
    changed = ["--ckpt_path=auto", "--model.init_args.width=7", "--checkpoint.overwrite=true"]
    assert toy_command("fit", *changed, "--trainer.max_steps=3") == 0
    assert [checkpoint_step(path) for path in list_checkpoints(run_dir)] == [3]
    assert [row["step"] for row in metrics(run_dir)] == ["0", "1", "2"]


def test_settings_that_leave_the_sequence_alone_may_change(toy_command, run_dir):
    assert toy_command("fit", "--trainer.max_steps=3") == 0
    changed = ["--trainer.log_every_n_steps=2", "--data.init_args.root=elsewhere"]
    assert toy_command("fit", "--ckpt_path=auto", "--trainer.max_steps=4", *changed) == 0
    assert checkpoint_step(newest_checkpoint(run_dir)) == 4


@pytest.fixture
def rewound(toy_command, run_dir):
    """Train to step 4 with checkpoints 2 and 4; returns the options that go back to step 2."""
    assert toy_command("fit", "--trainer.max_steps=4", "--checkpoint.every_n_steps=2") == 0
    return [f"--ckpt_path={run_dir}/checkpoints/step-00000002", "--checkpoint.every_n_steps=1"]


def test_going_back_does_not_mix_two_runs(toy_command, refusal, run_dir, rewound):
    line = refusal(*rewound)
    assert "expected `step-00000002` to be the newest checkpoint" in line
    assert "holds `step-00000004` too" in line
    options = ["--checkpoint.overwrite=true", "--trainer.max_steps=3"]
    assert toy_command("fit", *rewound, *options) == 0
    assert [checkpoint_step(path) for path in list_checkpoints(run_dir)] == [2, 3]


def test_another_run_does_not_go_on_among_checkpoints(
    toy_command, refusal, run_dir, rewound, tmp_path
):
    other = [f"--ckpt_path={run_dir}", f"--run_dir={tmp_path}/other"]
    assert toy_command("fit", other[1], "--trainer.max_steps=2") == 0
    line = refusal(*other)
    assert "to go on from `" in line
    assert "other` holds `step-00000002` of another run" in line
    options = ["--checkpoint.overwrite=true", "--trainer.max_steps=5"]
    assert toy_command("fit", *other, *options) == 0
    assert [checkpoint_step(path) for path in list_checkpoints(tmp_path / "other")] == [5]
    assert [checkpoint_step(path) for path in list_checkpoints(run_dir)] == [2, 4]


def test_a_refused_new_run_leaves_no_record(toy_command, refusal, run_dir):
    assert toy_command("fit", "--trainer.max_steps=2") == 0
    assert "holds `step-00000002`. Go on with" in refusal("--trainer.max_steps=3")
    assert len(json.loads((run_dir / "run.json").read_text())["attempts"]) == 1
    assert not (run_dir / "config.attempt-2.yaml").exists()
