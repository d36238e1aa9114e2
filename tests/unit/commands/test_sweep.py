"""The command line of studies."""

import pytest

from segalign.commands import sweep
from segalign.errors import ConfigError, DataError


def no_parser(allow_import):
    raise AssertionError("the parser of runs is not wanted")


def refused(*arguments: str) -> str:
    with pytest.raises(ConfigError) as raised:
        sweep.run(list(arguments), no_parser, ("python", "main.py"))
    message = str(raised.value)
    assert "\n" not in message
    return message


def test_a_sub_command_is_expected():
    assert "one of plan, run, status" in refused()


def test_unknown_options_are_one_line():
    assert "--locale" in refused("run", "study.yaml", "--locale", "2")


@pytest.mark.parametrize("number", ["0", "-1", "two"])
def test_a_number_of_runs_at_a_time_is_positive(number):
    assert "local" in refused("run", "study.yaml", "--local", number)


def test_here_or_there():
    assert "got both" in refused("run", "study.yaml", "--local", "2", "--slurm")


def test_retry_wants_to_know_which():
    assert "--failed" in refused("retry", "study.yaml")


def test_execute_wants_one_run_or_a_file():
    assert "run directory or `--runs-file`" in refused("execute")
    assert "run directory or `--runs-file`" in refused("execute", "runs/a", "--runs-file", "b")
    assert "`--task`" in refused("execute", "--runs-file", "b")


def test_execute_hands_everything_on(monkeypatch):
    seen = {}

    def execute_run(run_dir, program, **settings):
        seen.update(settings, run_dir=str(run_dir), program=program)
        return 85

    monkeypatch.setattr("segalign.launch.running.execute.execute_run", execute_run)
    arguments = ["execute", "runs/a", "--launcher", "srun --export='A B'"]
    arguments += ["--option=--allow_import=toys", "--option=--trainer.devices=2"]
    assert sweep.run([*arguments, "--preempting-signal", "USR1"], no_parser, ("p", "m")) == 85
    assert seen == {
        "run_dir": "runs/a",
        "program": ("p", "m"),
        "launcher": ["srun", "--export=A B"],
        "options": ["--allow_import=toys", "--trainer.devices=2"],
        "preempting_signal": "USR1",
        "max_requeues": 20,
    }


def test_execute_hands_a_task_on(monkeypatch):
    seen = {}

    def run_task(runs_file, task, program, **settings):
        seen.update(settings, runs_file=str(runs_file), task=task)
        return 0

    monkeypatch.setattr("segalign.launch.slurm.slurm_task.run_task", run_task)
    arguments = ["execute", "--runs-file", "jobs/001.runs", "--task", "0", "--runs-per-task", "3"]
    assert sweep.run(arguments, no_parser, ("p", "m")) == 0
    assert (seen["runs_file"], seen["task"], seen["runs_per_task"]) == ("jobs/001.runs", 0, 3)


@pytest.mark.parametrize("arguments", [("retry", "--failed"), ("resume",)])
def test_what_was_never_started_is_told_before_where_to_start_it(tmp_path, arguments):
    (tmp_path / "base.yaml").touch()
    study = tmp_path / "study.yaml"
    study.write_text(f"base: {tmp_path}/base.yaml\nfolder: {tmp_path}/folder\n")
    command, *options = arguments
    with pytest.raises(DataError, match=r"expected the plan .* has been started .*; got none"):
        sweep.run([command, str(study), *options], no_parser, ("python", "main.py"))
