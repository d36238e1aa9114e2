"""Behaves as ``main.py`` does towards supervisors and controllers, without PyTorch.

::

    toy_program.py fit|test --config FILE     one stage
    toy_program.py sweep execute RUN          its supervisor, the real one
    toy_program.py control FOLDER N           a controller, the real one, of all runs in a folder

A stage takes its settings from its config, JSON: ``steps`` of ``seconds`` each, with a checkpoint
and a row of metrics after each; ``answer`` says what it does at the end (see `_answer`). It writes
what it did into ``RUN/events``, and ``RUN/doubled`` if another process is at the same run.
"""

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

HEARTBEAT = 0.3
# Outlives what it can; its argument tells it from the processes of others.
WORKER = """
import pathlib, signal, sys, time
run_dir = pathlib.Path(sys.argv[1])
signal.signal(signal.SIGTERM, lambda *told: (run_dir / "worker_was_told").touch())
(run_dir / "worker_is_ready").touch()
time.sleep(600)
"""


def main(argv):
    command = argv[0]
    if command == "sweep":
        return execute(argv[2:])
    if command == "control":
        return control(Path(argv[1]), int(argv[2]))
    return stage(command, argv[1:])


def execute(argv):
    from segalign.error_boundary import run_guarded
    from segalign.launch.running.execute import execute_run

    options = [word.removeprefix("--option=") for word in argv[1:]]
    attempts = [int(word.partition("=")[2]) for word in options if word.startswith("--attempt=")]
    options = [word for word in options if not word.startswith("--attempt=")]
    if "--broken-supervisor" in options:
        raise RuntimeError("the supervisor is broken")
    return run_guarded(
        lambda: execute_run(
            Path(argv[0]),
            (sys.executable, __file__),
            options=options,
            attempt=attempts[0] if attempts else None,
            heartbeat_seconds=HEARTBEAT,
            grace_seconds=float(os.environ.get("TOY_GRACE", "2")),
        )
    )


def control(folder, num_parallel):
    from segalign.error_boundary import run_guarded
    from segalign.launch.running.local_controller import run_local

    runs = planned(folder)
    program = (sys.executable, __file__)

    def show(observed):
        sys.stdout.write(f"{observed.run.run_id} {observed.status}\n")
        sys.stdout.flush()

    def work():
        run_local(runs, program, num_parallel=num_parallel, on_change=show)
        return 0

    return run_guarded(work)


def planned(folder):
    """Describe all runs in a folder."""
    from segalign.launch.plan import PlannedRun

    return [
        PlannedRun(
            run_id=path.name, label=path.name, arm="", levels={}, seed=0, directory=path
        )
        for path in sorted(folder.iterdir())
    ]  # fmt: skip


def prepare(run_dir, stages=("fit",), **settings):
    """Write what ``sweep run`` writes before it starts a run; settings are those of all stages."""
    sweep = run_dir / "sweep"
    sweep.mkdir(parents=True)
    spec = {"run_id": run_dir.name, "study": "toy", "label": run_dir.name, "stages": stages}
    (sweep / "spec.json").write_text(json.dumps({**spec, "max_steps": settings.get("steps", 3)}))
    for name in stages:
        config = {"run_dir": str(run_dir), **settings, **settings.get(name, {})}
        (sweep / f"{name}.yaml").write_text(json.dumps(config))
    return run_dir


def stage(name, argv):
    settings = json.loads(Path(argv[argv.index("--config") + 1]).read_text())
    run_dir = Path(settings["run_dir"])
    note(run_dir, f"begin {name}")
    only_one(run_dir)
    if any(variable.startswith("SLURM_") for variable in os.environ):
        note(run_dir, "a task of a cluster")
    if settings.get("worker"):
        subprocess.Popen([sys.executable, "-c", WORKER, str(run_dir)])
    if settings.get("ignores_sigterm"):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if name == "fit":
        train(run_dir, settings)
    answer(run_dir, settings.get("answer", "done"))
    note(run_dir, f"end {name}")
    return 0


def only_one(run_dir):
    file = (run_dir / "busy").open("a")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        (run_dir / "doubled").touch()
        sys.exit("error: two at the same run")
    os.set_inheritable(file.fileno(), False)
    # Open until this process ends.
    main.busy = file


def train(run_dir, settings):
    checkpoints = run_dir / "checkpoints"
    checkpoints.mkdir(exist_ok=True)
    (run_dir / "logs").mkdir(exist_ok=True)
    for step in range(len(list(checkpoints.iterdir())), settings.get("steps", 3)):
        time.sleep(settings.get("seconds", 0.05))
        new = not (run_dir / "logs/metrics.csv").exists()
        with (run_dir / "logs/metrics.csv").open("a") as file:
            file.write(("step,epoch,loss\r\n" if new else "") + f"{step},0,0.5\r\n")
        (checkpoints / f"step-{step + 1:08d}").mkdir()


def answer(run_dir, what):
    """Do what the settings say: ``done``, an exit code, ``KILL``, ``raise``, or a list by attempt.

    The last of a list holds for all further attempts.
    """
    if isinstance(what, list):
        events = (run_dir / "events").read_text().splitlines()
        count = sum(line.startswith("begin") for line in events)
        what = what[min(count, len(what)) - 1]
    if what == "done":
        return
    note(run_dir, f"answer {what}")
    if what == "raise":
        raise RuntimeError("the toy is broken")
    if isinstance(what, int):
        word = "stopped" if what in (85, 86) else "error"
        sys.stderr.write(f"{word}: the toy ends with {what}.\n")
        sys.exit(what)
    os.kill(os.getpid(), signal.Signals[f"SIG{what}"])
    time.sleep(10)


def note(run_dir, text):
    """Append a line at once, so that lines of several processes do not mix."""
    descriptor = os.open(run_dir / "events", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(descriptor, f"{text}\n".encode())
    os.close(descriptor)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
