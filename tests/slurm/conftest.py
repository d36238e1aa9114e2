"""A SLURM cluster of two fake nodes, started once for this folder."""

import contextlib
import os
import shutil
import subprocess
import time
from pathlib import Path

import psutil
import pytest

HERE = Path(__file__).parent
SCRIPT = HERE / "toy_cluster.sh"
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "squeue", "srun", "scontrol", "scancel")


def reason_to_skip() -> str | None:
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing:
        return f"SLURM is not installed: no {', '.join(missing)}"
    return None if os.geteuid() == 0 else "SLURM's daemons need root"


@pytest.fixture(scope="session")
def cluster(tmp_path_factory) -> Path:
    """The cluster's config file."""
    if reason := reason_to_skip():
        pytest.skip(reason)
    base = tmp_path_factory.mktemp("cluster")
    script = str(SCRIPT)
    started = subprocess.run([script, "start", base, "2"], capture_output=True, text=True)
    try:
        assert started.returncode == 0, started.stderr
        yield base / "slurm.conf"
    finally:
        subprocess.run([script, "stop", base], check=True)
    assert processes_with(f"SLURM_CONF={base}/slurm.conf") == []
    for name in ("slurmctld", "node1", "node2"):
        assert not (base / f"{name}.pid").exists(), name


@pytest.fixture
def _on_cluster(cluster, repository, monkeypatch):
    """Make the commands of this process, and its jobs, find cluster and project."""
    monkeypatch.setenv("SLURM_CONF", str(cluster))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    places = [str(repository), str(repository / "tests/toys")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(places))


def processes_with(variable: str) -> list[str]:
    """List processes of jobs, by a line of their environment."""
    found = []
    for process in psutil.process_iter():
        try:
            environment = process.environ()
            name, _, value = variable.partition("=")
            if "SLURM_JOB_ID" in environment and environment.get(name) == value:
                found.append(" ".join(process.cmdline()))
        except psutil.Error:
            continue
    return found


def wait_until(condition, seconds: float = 300.0):
    """Poll until a condition holds, on busy machines too."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture
def wait():
    return wait_until


@pytest.fixture
def send_signal():
    """Send USR1 to a job as the cluster does before it takes the nodes away.

    The supervisor gets it, and nobody else. For a task whose array has others that wait, scancel
    would send it again after five seconds, and so to the next life of the task.
    """

    def send(task: str) -> None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            subprocess.run(["scancel", "--batch", "--signal=USR1", task], check=True, timeout=3)

    return send


@pytest.fixture
def job_processes(cluster):
    """List what runs inside jobs of the cluster."""
    return lambda: processes_with(f"SLURM_CONF={cluster}")
