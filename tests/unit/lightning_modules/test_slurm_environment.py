"""Runs that ``srun`` has started find their ranks, or say in one line why they cannot."""

import os
import signal

import pytest

from lightning_modules.slurm_environment import SlurmEnvironment, first_node, slurm_environment
from segalign.errors import ConfigError

JOB = {
    "SLURM_JOB_ID": "1234567",
    "SLURM_JOB_NAME": "train",
    "SLURM_STEP_ID": "0",
    "SLURM_NTASKS": "4",
    "SLURM_NTASKS_PER_NODE": "2",
    "SLURM_NNODES": "2",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_NODELIST": "gpu[07-08]",
}


@pytest.fixture
def job(monkeypatch):
    """Be a task of a job."""

    def be(**changes: str | None) -> None:
        for name, value in {**JOB, **changes}.items():
            monkeypatch.delenv(name, raising=False)
            if value is not None:
                monkeypatch.setenv(name, value)
        monkeypatch.delenv("MASTER_ADDR", raising=False)

    return be


def test_without_a_job_there_is_no_environment(recwarn):
    assert slurm_environment() is None
    assert not recwarn.list  # a login node has `srun`, which is no reason to warn


def test_a_task_finds_its_rank_and_answers_no_signal(job):
    job()
    environment = slurm_environment()
    assert isinstance(environment, SlurmEnvironment)
    assert environment.auto_requeue is False
    assert (environment.global_rank(), environment.local_rank()) == (3, 1)
    assert environment.world_size() == 4
    environment.validate_settings(num_devices=2, num_nodes=2)


def test_other_launchers_in_a_job_have_their_way(job, monkeypatch):
    job()
    for name in ("RANK", "GROUP_RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RUN_ID"):
        monkeypatch.setenv(name, "0")
    assert slurm_environment() is None


def test_an_address_that_is_given_is_honoured(job, monkeypatch):
    job()
    monkeypatch.setenv("MASTER_ADDR", "10.0.0.1")
    assert slurm_environment().main_address == "10.0.0.1"


@pytest.mark.parametrize(
    ("lists", "expected"),
    [
        ({}, "gpu07"),
        ({"SLURM_JOB_NODELIST": "cpu3"}, "cpu3"),
        ({"SLURM_JOB_NODELIST": "cpu3", "SLURM_STEP_NODELIST": "cpu[4,6]"}, "cpu4"),
        ({"SLURM_NODELIST": None}, "127.0.0.1"),
    ],
)
def test_the_first_node_of_the_step_is_the_address(job, lists, expected):
    job(**lists)
    assert slurm_environment().main_address == expected
    assert os.environ["MASTER_ADDR"] == expected  # where PyTorch reads it


@pytest.mark.parametrize(
    ("nodes", "expected"),
    [
        ("host", "host"),
        ("host0 host1", "host0"),
        ("a1,b[1-3]", "a1"),
        ("gpu[07-09,12],cpu1", "gpu07"),
        ("gpu[3]", "gpu3"),
        ("rack[1-2]node[03-04].site", "rack1node03.site"),
    ],
)
def test_node_lists_are_read(nodes, expected):
    assert first_node(nodes) == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": None},
            "as `--ntasks-per-node`; got 2 tasks by `--ntasks` alone. Give sbatch, or srun,",
        ),
        ({"SLURM_STEP_ID": None}, "expected `srun` to start the 4 tasks .* Put `srun` in front"),
    ],
)
def test_tasks_that_cannot_work_together_are_refused(job, changes, message):
    job(**changes)
    with pytest.raises(ConfigError, match=message):
        slurm_environment()


@pytest.mark.parametrize(("devices", "nodes"), [(1, 2), (2, 1), (4, 1), (1, 1)])
def test_a_trainer_of_another_size_is_refused(job, devices, nodes):
    job()
    with pytest.raises(ConfigError) as refused:
        slurm_environment().validate_settings(devices, nodes)
    assert str(refused.value) == (
        f"expected one SLURM task for each device; got `trainer.devices` {devices} and "
        f"`trainer.num_nodes` {nodes}, but 4 tasks on 2 nodes, 2 on each. Set "
        "`--trainer.devices 2 --trainer.num_nodes 2`, or start it with "
        f"`srun --nodes={nodes} --ntasks-per-node={devices}`."
    )


def test_a_step_of_one_task_may_run_in_a_job_of_many(job):
    job(SLURM_NTASKS="1")
    slurm_environment().validate_settings(1, 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"SLURM_NTASKS_PER_NODE": None}, "got 4 tasks by `--ntasks` alone"),
        ({}, "Set `--trainer.devices 2 --trainer.num_nodes 2`"),
    ],
)
def test_a_command_ends_with_one_line(job, toy_command, capsys, changes, message):
    # One device and strategy `auto`: each task would train alone, in the same run directory.
    job(**changes)
    assert toy_command("fit") == 78
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert message in line


def test_a_run_in_a_job_leaves_signals_alone(job, toy_command):
    job(SLURM_NTASKS="1", SLURM_NTASKS_PER_NODE="1", SLURM_NNODES="1",
        SLURM_PROCID="0", SLURM_LOCALID="0", SLURM_NODEID="0")  # fmt: skip
    seen = {}
    original = signal.signal

    def record(number, handler):
        seen[number] = handler
        return original(number, handler)

    signal.signal = record
    try:
        assert toy_command("fit", "--trainer.max_steps=1") == 0
    finally:
        signal.signal = original
    assert signal.SIGTERM in seen  # Lightning's own, or this test would see nothing
    assert "_HandlersCompose" not in type(seen.get(signal.SIGUSR1)).__name__


def test_an_environment_of_the_config_is_kept(job, toy_command):
    job(SLURM_NTASKS="2", SLURM_NTASKS_PER_NODE=None)
    plugin = "lightning.fabric.plugins.environments.LightningEnvironment"
    assert toy_command("fit", f"--trainer.plugins={plugin}", "--trainer.max_steps=1") == 0
