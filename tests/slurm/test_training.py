"""Training on two nodes: to its end, and to the same end when it is preempted on its way."""

import json
import sys
from pathlib import Path

import pytest
import yaml

from segalign.launch.plan import PlannedRun
from segalign.launch.running.run_folder import attempt_log, config_file, sweep_folder
from segalign.launch.running.run_state import RunStatus, read_state
from segalign.launch.slurm.slurm_jobs import queued_runs, submit
from segalign.launch.study import SlurmSettings, Study
from segalign.run_directory import newest_checkpoint

pytestmark = [pytest.mark.slurm, pytest.mark.usefixtures("_on_cluster")]

STEPS = 12
HELD_STEP = 7
RANKS = (0, 1)


def make_run(study: Study, name: str, toy_config: Path, *callbacks: dict) -> PlannedRun:
    """Prepare the toy, recorded on every rank."""
    directory = study.runs_folder / name
    sweep_folder(directory).mkdir(parents=True)
    config = yaml.safe_load(toy_config.read_text())
    recorded = [{"class_path": "callbacks.ema.EMA"}, {"class_path": "toy_crash.RankLossRecorder"}]
    config["trainer"] |= {"callbacks": [*recorded, *callbacks], "strategy": "ddp"}
    config |= {"run_dir": str(directory), "ckpt_path": "auto"}
    config_file(directory, "fit").write_text(yaml.safe_dump(config))
    spec = {"run_id": name, "study": "toy", "label": "base", "stages": ["fit"], "max_steps": STEPS}
    (sweep_folder(directory) / "spec.json").write_text(json.dumps(spec))
    return PlannedRun(run_id=name, label="base", arm="base", levels={}, seed=7, directory=directory)


def losses(run: PlannedRun, rank: int) -> dict[int, str]:
    found: dict[int, str] = {}
    for line in (run.directory / f"losses-{rank}.jsonl").read_text().splitlines():
        record = json.loads(line)
        assert found.setdefault(record["batch"], record["loss"]) == record["loss"]
    return found


def log(run: PlannedRun, attempt: int) -> str:
    return attempt_log(run.directory, attempt).read_text()


def test_two_ranks_train_to_the_end_and_to_the_same_end_when_preempted(
    tmp_path, toy_config, repository, wait, send_signal, job_processes
):
    study = Study(
        name="toy",
        file=tmp_path / "toy.yaml",
        base=(),
        # Names of toy nodes do not resolve.
        slurm=SlurmSettings(
            time="10", nodes=2, signal_seconds=30, setup=["export MASTER_ADDR=127.0.0.1"]
        ),
        folder=tmp_path / "toy",
        runs_folder=tmp_path / "runs",
    )
    marker = tmp_path / "held"
    hold = {
        "class_path": "toy_crash.HoldOnce",
        "init_args": {"at_step": HELD_STEP, "marker": str(marker)},
    }
    straight = make_run(study, "straight", toy_config)
    broken = make_run(study, "broken", toy_config, hold)
    program = (sys.executable, str(repository / "main.py"))
    options = ["--allow_import=toy_house", "--allow_import=toy_crash"]
    job = submit(study, [broken, straight], program, options)
    wait(lambda: all(Path(f"{marker}-{rank}").exists() for rank in RANKS))
    send_signal(f"{job.job_id}_0")
    wait(lambda: not queued_runs(study.folder))

    states = [read_state(run.directory) for run in (straight, broken)]
    assert [state.status for state in states] == [RunStatus.DONE] * 2, log(broken, 1)
    assert [state.attempt for state in states] == [1, 2]
    assert f"stopped: SIGUSR1 came, and training ended after step {HELD_STEP}" in log(broken, 1)
    assert f"SLURM job {job.job_id}_0 is back in the queue" in log(broken, 1)
    for rank in RANKS:
        assert len(losses(straight, rank)) == STEPS
        assert losses(broken, rank) == losses(straight, rank)
    # Dropout differs between ranks, so that equal losses show that both are there.
    assert losses(straight, 0) != losses(straight, 1)
    for name in ("model", "ema", "optimizer"):
        one, other = (
            (newest_checkpoint(run.directory) / f"{name}.safetensors").read_bytes()
            for run in (straight, broken)
        )
        assert one == other, name
    wait(lambda: not job_processes())
