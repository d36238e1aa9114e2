"""A signal to one rank stops all of them after the same step; so does one to the launching rank."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from command_client import CommandServer, free_port

from segalign.run_directory import newest_checkpoint

pytestmark = pytest.mark.distributed

STOPPED = 85
REPOSITORY = Path(__file__).parents[2]
VALIDATING = [
    "--trainer.limit_val_batches=1.0",
    "--trainer.val_check_interval=4",
    "--trainer.check_val_every_n_epoch=null",
]


@pytest.fixture
def config(tmp_path, toy_config):
    """The toy on two ranks."""
    layer = tmp_path / "two.yaml"
    layer.write_text("trainer: {devices: 2, strategy: ddp, callbacks: [callbacks.ema.EMA]}")
    return [f"--config={toy_config}", f"--config={layer}"]


def environment(**more: str) -> dict[str, str]:
    path = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tests" / "toys")])
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, **more}


def command(config: list[str], run_dir: Path, *options: str) -> list[str]:
    permissions = ["--allow_import=toy_house", "--allow_import=toy_signals"]
    fixed = [sys.executable, "main.py", "fit", *permissions, *config]
    return [*fixed, f"--run_dir={run_dir}", "--ckpt_path=auto", *options]


@pytest.fixture(scope="module")
def servers():
    """Two processes that run commands as two tasks of ``srun`` do."""
    shared = {
        "WORLD_SIZE": "2",
        "NODE_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    servers = [CommandServer(**shared, LOCAL_RANK=str(rank)) for rank in range(2)]
    yield servers
    for server in servers:
        server.close()


@pytest.fixture
def fit(servers, config, tmp_path):
    """Run a fit on both ranks; returns exit code and output of each."""

    def fit(run_dir: Path, *options: str) -> list[tuple[int, str]]:
        logs = [tmp_path / f"rank-{rank}.txt" for rank in range(2)]
        for server, log in zip(servers, logs, strict=True):
            log.write_text("")
            server.start(command(config, run_dir, *options)[2:], log)
        codes = [server.wait() for server in servers]
        return [(code, log.read_text()) for code, log in zip(codes, logs, strict=True)]

    return fit


def sending(**arguments) -> list[str]:
    return [
        "--preemption.signal=USR1",
        "--trainer.callbacks+=toy_signals.Signal",
        f"--trainer.callbacks.init_args={json.dumps({'number': int(signal.SIGUSR1), **arguments})}",
    ]


def assert_ended_alike(broken: Path, straight: Path) -> None:
    for name in ("model", "ema", "optimizer"):
        one, other = (newest_checkpoint(run) / f"{name}.safetensors" for run in (broken, straight))
        assert one.read_bytes() == other.read_bytes(), name
    one, other = ((run / "logs" / "metrics.csv").read_text() for run in (broken, straight))
    assert one == other


def test_a_signal_to_one_rank_stops_both_at_the_same_step(fit, tmp_path):
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    assert [code for code, _ in fit(straight, *VALIDATING)] == [0, 0]
    moments = [
        (sending(rank=1, at_step=5), 6),
        (sending(rank=1, at_step=8, moment="validation"), 8),
        (sending(rank=0, at_step=8, moment="validation_epoch_end"), 8),
        (sending(rank=1, moment="fit_start"), 8),
    ]
    for options, step in moments:
        found = fit(broken, *VALIDATING, *options)
        assert [code for code, _ in found] == [STOPPED, STOPPED], found
        lines = [re.findall("^stopped: .*$", output, re.MULTILINE) for _, output in found]
        assert lines[0] == lines[1], found
        assert len(lines[0]) == 1
        assert newest_checkpoint(broken).name == f"step-{step:08d}"
    assert [code for code, _ in fit(broken, *VALIDATING)] == [0, 0]
    assert_ended_alike(broken, straight)


def test_a_signal_to_the_rank_that_launches_the_others_ends_it_with_its_code(config, run_dir):
    # Ranks that end with a code of their own are no reason to kill the one that launched them.
    # The one that launched them looks at them every 5 s.
    slow = ["--trainer.callbacks+=toy_signals.SlowEnd", "--trainer.callbacks.init_args.seconds=8"]
    arguments = command(config, run_dir, *sending(at_step=3), *slow)
    ended = subprocess.run(
        arguments, cwd=REPOSITORY, env=environment(), capture_output=True, text=True, timeout=200
    )
    assert ended.returncode == STOPPED, ended.stderr
    assert newest_checkpoint(run_dir).name == "step-00000004"


def test_ranks_that_find_other_checkpoints_do_not_start(fit, servers, config, tmp_path):
    run_dir = tmp_path / "run"
    assert [code for code, _ in fit(run_dir, "--trainer.max_steps=2")] == [0, 0]
    said = (
        "error: expected all 2 ranks to find the same checkpoint; got `step-00000002` on 1 of "
        "them, first on rank 0, none on 1 of them, first on rank 1. "
    )
    # Rank 1 sees a directory as it was before there were checkpoints.
    logs = [tmp_path / "seen.txt", tmp_path / "unseen.txt"]
    for server, log, seen in zip(servers, logs, [run_dir, tmp_path / "old"], strict=True):
        server.start(command(config, seen, "--trainer.max_steps=4")[2:], log)
    assert [server.wait() for server in servers] == [65, 65]
    for log in logs:
        assert len(re.findall("^error: ", log.read_text(), re.MULTILINE)) == 1
        assert said in log.read_text()
        assert "Traceback" not in log.read_text()


def test_a_stopped_process_waits_for_no_worker(run_dir, toy_config):
    # Workers that load data have inherited the handler; the interpreter ends them by SIGTERM.
    options = ["--data=toy_signals.WorkerData", "--data.init_args.seed=7"]
    sent = [option.replace("USR1", "TERM") for option in sending(at_step=3)]
    sent[-1] = sent[-1].replace(str(int(signal.SIGUSR1)), str(int(signal.SIGTERM)))
    arguments = command([f"--config={toy_config}"], run_dir, *options, *sent)
    ended = subprocess.run(
        arguments, cwd=REPOSITORY, env=environment(), capture_output=True, text=True, timeout=120
    )
    assert ended.returncode == STOPPED, ended.stderr
    assert newest_checkpoint(run_dir).name == "step-00000004"
