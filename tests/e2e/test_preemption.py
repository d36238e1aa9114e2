"""A signal stops a run after its step; resumed, it ends bit for bit as an uninterrupted one."""

import csv
import json
import re
import signal
from pathlib import Path

import pytest
from command_client import CommandServer
from run_comparison import assert_same_training, losses

from segalign.run_directory import list_checkpoints, newest_checkpoint, read_best
from segalign.run_format import load_checkpoint

pytestmark = pytest.mark.e2e

STOPPED = 85


@pytest.fixture(scope="module")
def server():
    server = CommandServer()
    yield server
    server.close()


class Fits:
    """Fits of the toy; every attempt's output is ``log``."""

    def __init__(self, server: CommandServer, config: Path, folder: Path):
        self.server, self.config, self.folder = server, config, folder
        self.log = folder / "log.txt"

    def start(self, run_dir: Path, *options: str) -> int:
        self.log.write_text("")
        fixed = ["--allow_import=toy_house", "--allow_import=toy_signals", "--ckpt_path=auto"]
        command = ["fit", *fixed, f"--config={self.config}", f"--run_dir={run_dir}", *options]
        return self.server.start(command, self.log)

    def run(self, run_dir: Path, *options: str) -> int:
        self.start(run_dir, *options)
        return self.server.wait()

    def stopped(self) -> str:
        """Return the one line that a stopped attempt has printed."""
        (line,) = [line for line in self.log.read_text().splitlines() if line[:4] == "stop"]
        assert "Traceback" not in self.log.read_text()
        return line


@pytest.fixture
def fits(server, toy_config, tmp_path):
    return Fits(server, toy_config, tmp_path)


@pytest.fixture(scope="module")
def straight(server, toy_config, tmp_path_factory):
    """Run the toy without an interruption, once for all tests with the same options."""
    done: dict[tuple[str, ...], Path] = {}

    def run(*options: str) -> Path:
        if options not in done:
            folder = tmp_path_factory.mktemp("straight")
            fits = Fits(server, toy_config, folder)
            assert fits.run(folder / "run", *options) == 0, fits.log.read_text()
            done[options] = folder / "run"
        return done[options]

    return run


def sending(number: int, at_step: int = 0, **settings) -> list[str]:
    """Send a signal while the step after ``at_step`` is taken, or at another moment."""
    name = signal.Signals(number).name.removeprefix("SIG")
    arguments = {"number": int(number), "at_step": at_step, **settings}
    return [
        f"--preemption.signal={name}",
        "--trainer.callbacks+=toy_signals.Signal",
        f"--trainer.callbacks.init_args={json.dumps(arguments)}",
    ]


def assert_ended_alike(broken: Path, straight: Path) -> None:
    assert_same_training(broken, straight)
    one, other = ((run / "logs" / "metrics.csv").read_text() for run in (broken, straight))
    assert one == other
    assert read_best(broken) == read_best(straight)


VALIDATING = (
    "--trainer.limit_val_batches=1.0",
    "--trainer.val_check_interval=4",
    "--trainer.check_val_every_n_epoch=null",
)


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM])
def test_a_signal_stops_after_the_step_and_changes_nothing(fits, straight, run_dir, number):
    assert fits.run(run_dir, *VALIDATING, *sending(number, 6)) == STOPPED
    path = run_dir / "checkpoints" / "step-00000007"
    assert fits.stopped() == (
        f"stopped: {number.name} came, and training ended after step 7, saved in `{path}`; "
        "go on with `--ckpt_path auto`"
    )
    assert newest_checkpoint(run_dir) == path
    assert max(losses(run_dir)) == 6
    assert fits.run(run_dir, *VALIDATING) == 0
    assert_ended_alike(run_dir, straight(*VALIDATING))


def test_a_checkpoint_of_the_step_is_not_written_twice(fits, straight, run_dir):
    assert fits.run(run_dir, *sending(signal.SIGUSR1, 4, times=3)) == STOPPED
    assert [path.name for path in list_checkpoints(run_dir)] == ["step-00000005"]
    assert len(re.findall("saved in", fits.stopped())) == 1
    assert fits.run(run_dir) == 0
    assert_ended_alike(run_dir, straight())


ACCUMULATING = (
    "--trainer.accumulate_grad_batches=3",
    "--trainer.limit_val_batches=1.0",
    "--trainer.val_check_interval=9",
    "--trainer.check_val_every_n_epoch=null",
)


def test_accumulated_steps_are_taken_to_their_end(fits, straight, run_dir):
    assert fits.run(run_dir, *ACCUMULATING, *sending(signal.SIGUSR1, 5)) == STOPPED
    assert newest_checkpoint(run_dir).name == "step-00000006"
    assert len(losses(run_dir)) == 18
    assert fits.run(run_dir, *ACCUMULATING) == 0
    assert_ended_alike(run_dir, straight(*ACCUMULATING))


# The step of the stop is 8, with a validation and no checkpoint of its own, or 12, the last one.
MONITORED = (*VALIDATING, "--checkpoint.monitor=val/loss", "--checkpoint.monitor_mode=min")
EVERY_4 = (*VALIDATING, "--checkpoint.every_n_steps=4")


@pytest.mark.parametrize("options", [VALIDATING, MONITORED, EVERY_4], ids=["", "best", "saved"])
@pytest.mark.parametrize(
    ("at_step", "moment", "is_validated"),
    [
        (7, "step", False),
        (8, "validation", False),
        (8, "validation_epoch_end", True),
        (11, "step", False),
        (12, "validation", False),
        (12, "validation_epoch_end", True),
    ],
)
def test_a_validation_that_was_cut_off_is_made_up_for(
    fits, straight, run_dir, options, at_step, moment, is_validated
):
    sent = sending(signal.SIGUSR1, at_step, moment=moment)
    assert fits.run(run_dir, *options, *sent) == STOPPED, fits.log.read_text()
    step = at_step + (moment == "step")
    assert fits.stopped().startswith(f"stopped: SIGUSR1 came, and training ended after step {step}")
    assert newest_checkpoint(run_dir).name == f"step-{step:08d}"
    header, *rows = (run_dir / "logs" / "metrics.csv").read_text().splitlines()
    place = header.split(",").index("val/loss")
    validated = [int(row.split(",")[0]) + 1 for row in rows if row.split(",")[place]]
    assert validated == list(range(4, step + is_validated, 4))
    assert fits.run(run_dir, *options) == 0
    assert_ended_alike(run_dir, straight(*options))
    ended = (run_dir / "logs" / "metrics.csv").read_text()
    assert fits.run(run_dir, *options) == 0
    assert (run_dir / "logs" / "metrics.csv").read_text() == ended


def test_a_validation_that_was_cut_off_twice_is_made_up_for_once(fits, straight, run_dir):
    sent = sending(signal.SIGUSR1, 8, moment="validation")
    for _ in range(2):
        assert fits.run(run_dir, *VALIDATING, *sent) == STOPPED
        assert load_checkpoint(newest_checkpoint(run_dir))["validation_due"] is True
    assert fits.run(run_dir, *VALIDATING) == 0
    assert_ended_alike(run_dir, straight(*VALIDATING))


def test_a_killed_validation_is_made_up_for_too(fits, straight, run_dir):
    arguments = {"number": int(signal.SIGKILL), "at_step": 8, "moment": "validation"}
    kill = ["--trainer.callbacks+=toy_signals.Signal", f"--trainer.callbacks.init_args={arguments}"]
    assert fits.run(run_dir, *EVERY_4, *kill) == -signal.SIGKILL
    assert newest_checkpoint(run_dir).name == "step-00000008"
    assert fits.run(run_dir, *EVERY_4) == 0
    assert_ended_alike(run_dir, straight(*EVERY_4))


def test_a_signal_before_the_first_step_costs_nothing(fits, straight, run_dir):
    sent = sending(signal.SIGUSR1, moment="fit_start")
    assert fits.run(run_dir, *sent) == STOPPED
    assert "SIGUSR1 came before step 1, and there is nothing new to save; go" in fits.stopped()
    assert list_checkpoints(run_dir) == []
    assert fits.run(run_dir) == 0
    assert_ended_alike(run_dir, straight())


def test_a_signal_without_a_setting_ends_a_run_as_ever(fits, run_dir):
    unset = [*sending(signal.SIGUSR1, 6), "--preemption.signal=null"]
    assert fits.run(run_dir, *unset) == -signal.SIGUSR1
    assert newest_checkpoint(run_dir).name == "step-00000005"


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_workers_that_load_data_outlive_the_signal(fits, straight, run_dir, number):
    workers = ["--data=toy_signals.WorkerData", "--data.init_args.seed=7"]
    group = ["--trainer.callbacks+=toy_signals.Group"]
    sent = sending(number, 6, to_group=True)
    assert fits.run(run_dir, *workers, *group, *sent) == STOPPED, fits.log.read_text()
    assert newest_checkpoint(run_dir).name == "step-00000007"
    assert "DataLoader" not in fits.log.read_text()
    assert fits.run(run_dir, *workers) == 0
    assert losses(run_dir) == losses(straight())


def test_workers_outlive_what_ends_the_job_before_the_run_has_ended(fits, straight, run_dir):
    workers = ["--data=toy_signals.WorkerData", "--data.init_args.seed=7"]
    group = ["--trainer.callbacks+=toy_signals.Group"]
    sent = sending(signal.SIGUSR1, 6, to_group=True)
    # What this callback does before the next step comes after the answer to the first signal.
    later = {"number": int(signal.SIGTERM), "at_step": 7, "to_group": True}
    ending = [
        "--trainer.callbacks+=toy_signals.Signal",
        f"--trainer.callbacks.init_args={json.dumps(later)}",
        "--trainer.callbacks+=toy_signals.Wait",
        f"--trainer.callbacks.init_args={json.dumps({'at_step': 7, 'seconds': 0.5})}",
    ]
    assert fits.run(run_dir, *workers, *group, *sent, *ending) == STOPPED, fits.log.read_text()
    assert "saved in" in fits.stopped()
    assert fits.run(run_dir, *workers) == 0
    assert losses(run_dir) == losses(straight())


def real_recipe(run_dir: Path, *callbacks: dict) -> list[str]:
    """Compose a fit of the flagship's reward recipe, tiny, with images at every validation."""
    configs = Path(__file__).parents[2] / "configs"
    scenes = {"world": "2x2", "num_train": 6, "num_val": 4, "root": str(run_dir.parent / "scenes")}
    averaged = {"class_path": "callbacks.ema.EMA"}
    images = {
        "class_path": "callbacks.image_evaluation.ImageEvaluation",
        "init_args": {"num_captions": 2, "images_per_caption": 2, "batch_size": 2},
    }
    monitor = {"class_path": "callbacks.overfit_monitor.OverfitMonitor"}
    return [
        "fit", f"--config={configs / 'longsd.yaml'}",
        f"--config={configs / 'debug' / 'longsd_tiny.yaml'}",
        "--allow_import=toy_signals", "--ckpt_path=auto", f"--run_dir={run_dir}",
        f"--data.init_args.scenes={json.dumps(scenes)}", "--trainer.max_steps=4",
        "--trainer.limit_val_batches=2", "--data.init_args.val_batch_size=2",
        f"--trainer.callbacks={json.dumps([averaged, images, monitor, *callbacks])}",
        "--data.init_args.global_batch_size=2", "--checkpoint.every_n_steps=3",
        "--checkpoint.overwrite=false", "--preemption.signal=USR1",
    ]  # fmt: skip


def logged(run_dir: Path) -> list[dict[str, str]]:
    """Read all that was logged, but for the speed."""
    with (run_dir / "logs" / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) > 4
    return [{name: row[name] for name in row if "per_second" not in name} for row in rows]


def test_a_real_recipe_goes_on_after_stops_in_steps_and_in_validations(server, tmp_path):
    log = tmp_path / "log.txt"
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    server.start(real_recipe(straight), log)
    assert server.wait() == 0, log.read_text()
    for at_step, moment in [(0, "step"), (2, "validation"), (2, "step"), (4, "validation")]:
        arguments = {"number": int(signal.SIGUSR1), "at_step": at_step, "moment": moment}
        sent = {"class_path": "toy_signals.Signal", "init_args": arguments}
        server.start(real_recipe(broken, sent), log)
        assert server.wait() == STOPPED, log.read_text()
    server.start(real_recipe(broken), log)
    assert server.wait() == 0, log.read_text()
    for name in ("model", "ema", "optimizer", "extra"):
        one, other = (newest_checkpoint(run) / f"{name}.safetensors" for run in (broken, straight))
        assert one.read_bytes() == other.read_bytes(), name
    assert logged(broken) == logged(straight)
    for name in ("evaluation/history.jsonl", "evaluation/monitor.jsonl"):
        assert (broken / name).read_text() == (straight / name).read_text(), name
    assert read_best(broken) == read_best(straight)
