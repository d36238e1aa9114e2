"""SIGKILL at any moment costs at most the steps since the last checkpoint."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from segalign.run_directory import list_checkpoints, newest_checkpoint
from segalign.run_format import load_checkpoint

pytestmark = pytest.mark.e2e


class CommandServer:
    """Starts ``main.py`` commands in real processes without importing the stack each time."""

    def __init__(self, repository: Path):
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        environment["PYTHONPATH"] = os.pathsep.join(
            [str(repository), str(repository / "tests/toys")]
        )
        self.process = subprocess.Popen(
            [sys.executable, "-c", "import command_server; command_server.serve()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=repository,
        )

    def start(self, arguments: list[str], log: Path) -> int:
        self.process.stdin.write(json.dumps([arguments, str(log)]) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def wait(self) -> int:
        return int(self.process.stdout.readline())

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(timeout=60)
        self.process.stdout.close()


@pytest.fixture(scope="module")
def server():
    server = CommandServer(Path(__file__).parents[2])
    yield server
    server.close()


@pytest.fixture
def start(server, toy_config, tmp_path):
    """Start a fit of the toy into a run directory; returns the process id."""

    def start(run_dir: Path, *options: str) -> int:
        fixed = ["fit", "--allow_import=toy_house", f"--config={toy_config}", "--ckpt_path=auto"]
        return server.start([*fixed, f"--run_dir={run_dir}", *options], tmp_path / "log.txt")

    return start


def losses(run_dir: Path) -> dict[int, str]:
    records: dict[int, str] = {}
    for line in (run_dir / "losses.jsonl").read_text().splitlines():
        record = json.loads(line)
        assert records.setdefault(record["batch"], record["loss"]) == record["loss"]
    return records


def assert_ended_alike(straight: Path, broken: Path) -> None:
    assert losses(broken) == losses(straight)
    for name in ("model", "ema", "optimizer"):
        one, other = (
            (newest_checkpoint(run) / f"{name}.safetensors").read_bytes()
            for run in (straight, broken)
        )
        assert one == other, name
    assert load_checkpoint(newest_checkpoint(broken))["global_step"] == len(losses(straight))
    stale = [p.name for p in (broken / "checkpoints").iterdir() if p.name.startswith(".")]
    assert stale == []


def test_a_kill_in_mid_epoch_changes_nothing(server, start, tmp_path):
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    start(straight)
    assert server.wait() == 0, (tmp_path / "log.txt").read_text()
    start(broken, "--trainer.callbacks+=toy_house.Kill", "--trainer.callbacks.at_step=8")
    assert server.wait() == -signal.SIGKILL
    assert newest_checkpoint(broken).name == "step-00000005"
    start(broken)
    assert server.wait() == 0
    assert_ended_alike(straight, broken)


@pytest.mark.parametrize("at_sync", range(1, 18, 3))
def test_a_kill_while_saving_changes_nothing(server, start, tmp_path, at_sync):
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    start(straight)
    assert server.wait() == 0
    callback = "toy_house.KillWhileSaving"
    start(broken, f"--trainer.callbacks+={callback}", f"--trainer.callbacks.at_sync={at_sync}")
    assert server.wait() == -signal.SIGKILL
    start(broken)
    assert server.wait() == 0
    assert_ended_alike(straight, broken)


def test_kills_at_random_times_change_nothing(server, start, tmp_path, seed):
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    options = ["--trainer.max_steps=300"]
    start(straight, *options)
    begin = time.perf_counter()
    assert server.wait() == 0
    whole = time.perf_counter() - begin
    delays = random.Random(seed)
    kills = 0
    while kills < 5:
        process = start(broken, *options)
        time.sleep(delays.uniform(0.2, 0.9) * whole)
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
        code = server.wait()
        assert code in (0, -signal.SIGKILL), (tmp_path / "log.txt").read_text()
        if code == 0:
            break
        kills += 1
    assert kills > 0
    start(broken, *options)
    assert server.wait() == 0
    assert_ended_alike(straight, broken)
    assert len(list_checkpoints(broken)) == 2
