"""Waits are told from work, the watch ends with its run, and forks inherit none of it."""

import faulthandler
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from callbacks import hang_watch as hang_watch_module
from segalign import hang_watcher
from segalign.errors import StorageError
from segalign.hang_watcher import HANG_EXIT_CODE, HangWatcher
from segalign.last_resort import LastResort
from segalign.stillness import Stillness, place_of

REPOSITORY = Path(__file__).parents[3]


def place(number: int):
    return ((test_slow_loops_move_and_polling_ones_do_not.__code__, number),)


def looks(stillness: Stillness, numbers, start: float = 0.0) -> list[float]:
    return [stillness.look(start + time, 0, place(at)) for time, at in enumerate(numbers, 1)]


def test_slow_loops_move_and_polling_ones_do_not():
    assert looks(Stillness(0.0, 9.0), range(5)) == [0.0] * 5
    assert looks(Stillness(0.0, 9.0), [7, 7, 7]) == [0.0, 1.0, 2.0]
    # Waiting for something in a loop: a few places, again and again.
    assert looks(Stillness(0.0, 9.0), [1, 2, 3, 1, 2, 3, 3, 2]) == [0, 0, 0, 1, 2, 3, 4, 5]
    # Work that repeats itself is at more places than one can wait at.
    assert looks(Stillness(0.0, 9.0), [*range(9), *range(9)]) == [0.0] * 18


def test_events_move_a_run_that_is_always_seen_at_the_same_place():
    stillness = Stillness(0.0, 9.0)
    assert [stillness.look(now, now // 2, place(1)) for now in (1, 2, 3, 4)] == [0, 0, 1, 0]
    assert stillness.moved_at == 4


def test_a_process_that_was_suspended_has_not_hung():
    stillness = Stillness(0.0, 5.0)
    stillness.look(1.0, 0, place(1))
    assert stillness.look(6.0, 0, place(1)) == 5.0
    assert stillness.look(1000.0, 0, place(1)) == 0.0


def test_a_place_names_the_line_and_its_callers():
    waiting, go = threading.Event(), threading.Event()

    def wait():
        waiting.set()
        go.wait()

    thread = threading.Thread(target=wait)
    thread.start()
    waiting.wait()
    found = place_of(thread.ident)
    go.set()
    thread.join()
    assert wait.__code__ in [code for code, _ in found]
    assert place_of(thread.ident) == ()


def run(program: str, tmp_path: Path, seconds: float = 60) -> subprocess.CompletedProcess[str]:
    """Run a program in a process of its own."""
    return subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )


WATCH = """
import multiprocessing, os, subprocess, sys, time
from pathlib import Path
from types import SimpleNamespace
from segalign import hang_watcher
from segalign.hang_watcher import HangWatcher
folder = Path(sys.argv[1]) / "logs"
watcher = HangWatcher(folder, attempt="this", rank=0, world_size=1, seconds=0.4)
"""


def test_a_hang_leaves_stacks_a_note_and_one_line(tmp_path):
    program = WATCH + "def wait_here():\n    time.sleep(60)\nwatcher.start()\n"
    ended = run(program + "watcher.note('a step', 3)\nwait_here()", tmp_path)
    assert ended.returncode == HANG_EXIT_CODE
    stacks = (tmp_path / "logs" / "hang-rank-0.txt").read_text()
    assert "in wait_here" in stacks
    assert "last event: a step at step 3, " in stacks
    assert "rank 0 of 1, process " in stacks
    assert stacks.startswith("nothing has moved here for 0 s\n")
    told = json.loads((tmp_path / "logs" / "hang.json").read_text())
    assert (told["attempt"], told["rank"], told["seconds"]) == ("this", 0, 0.4)
    assert "in wait_here" in ended.stderr
    (line,) = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    assert line == (
        f"error: expected the run to move within 0.4 s; on rank 0 nothing has moved since "
        f"{told['since']}; the stacks of 1 of 1 ranks are in `{tmp_path}/logs/hang-rank-*.txt`. "
        "See there what waits for what; go on with `--ckpt_path auto`; a longer "
        "`hang_watch.seconds` bears with slower work"
    )


def test_a_held_interpreter_ends_by_the_timer(tmp_path):
    program = "import re\nwatcher.start()\nre.match('(a+)+$', 'a' * 100 + 'b')"
    ended = run(WATCH + program, tmp_path)
    assert ended.returncode == 1
    assert "<module>" in (tmp_path / "logs" / "hang-rank-0.txt").read_text()


def test_a_full_disk_or_a_lost_directory_keeps_nobody_from_ending(tmp_path):
    program = "import shutil\nwatcher.start()\nshutil.rmtree(folder)\ntime.sleep(60)"
    ended = run(WATCH + program, tmp_path)
    assert ended.returncode == HANG_EXIT_CODE
    assert "the stacks of 0 of 1 ranks" in ended.stderr
    assert "in <module>" in ended.stderr


def test_children_are_asked_for_their_stacks_and_ended(tmp_path):
    program = """
def load():
    time.sleep(60)
watcher.start()
child = multiprocessing.get_context("fork").Process(target=load, name="loader")
child.start()
print(child.pid, flush=True)
time.sleep(60)
"""
    ended = run(WATCH + program, tmp_path)
    assert ended.returncode == HANG_EXIT_CODE
    stacks = (tmp_path / "logs" / "hang-rank-0.txt").read_text()
    assert "in load" in stacks.partition("child loader, ")[2]
    with pytest.raises(ProcessLookupError):
        wait_for_end(int(ended.stdout))


def wait_for_end(process: int) -> None:
    """Wait for a process that is nobody's child any more; raises when it is gone."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        os.kill(process, 0)
        if " Z" in Path(f"/proc/{process}/stat").read_text():
            raise ProcessLookupError
        time.sleep(0.02)


def test_forked_children_are_not_watched_and_end_as_ever(tmp_path):
    # Without care, the child would wait for ever for a timer that it has not got.
    program = """
watcher.start()
child = os.fork()
if child == 0:
    time.sleep(1)
    sys.exit(7)
started = time.monotonic()
while not (ended := os.waitpid(child, os.WNOHANG))[0] and time.monotonic() < started + 30:
    watcher.note("waiting", 0)
    time.sleep(0.01)
print(os.waitstatus_to_exitcode(ended[1]))
watcher.stop()
"""
    ended = run(WATCH + program, tmp_path)
    assert (ended.returncode, ended.stdout) == (0, "7\n"), ended.stderr


def test_another_rank_that_hangs_ends_a_rank_that_moves(tmp_path):
    program = """
watcher = HangWatcher(folder, attempt="this", rank=1, world_size=2, seconds=2)
watcher.start()
(folder / "hang.json").write_text('{"attempt": "this", "rank": 0, "since": "noon"}')
while True:
    watcher.note("a step", 3)
    time.sleep(0.01)
"""
    ended = run(WATCH + program, tmp_path)
    assert ended.returncode == HANG_EXIT_CODE
    assert "on rank 0 nothing has moved since noon; the stacks of 1 of 2 ranks" in ended.stderr
    stacks = (tmp_path / "logs" / "hang-rank-1.txt").read_text()
    assert stacks.startswith("another rank waits for too long\n")


def test_a_rank_ends_some_time_after_the_one_that_started_it(tmp_path):
    program = """
hang_watcher._ORPHAN_SECONDS = 0.2
if os.fork() == 0:
    sys.stdout.close()
    launcher = os.getppid()
    watcher = HangWatcher(
        folder, attempt="this", rank=1, world_size=2, seconds=5, launcher=launcher
    )
    watcher.start()
    (folder / "pid").write_text(str(os.getpid()))
    time.sleep(60)
while not (folder / "pid").exists():
    time.sleep(0.01)
os._exit(0)
"""
    started = time.monotonic()
    ended = run(WATCH + program, tmp_path)  # until all have closed stderr
    assert time.monotonic() - started < 50
    assert "error: expected process " in ended.stderr
    assert ", which has started rank 1, to live; it has ended." in ended.stderr


def test_a_stopped_watch_leaves_nothing(tmp_path):
    before = {thread.name for thread in threading.enumerate()}
    watcher = HangWatcher(tmp_path / "logs", attempt="this", rank=0, world_size=1, seconds=100)
    watcher.start()
    assert [path.name for path in (tmp_path / "logs").iterdir()] == ["hang-rank-0.txt"]
    assert {thread.name for thread in threading.enumerate()} - before == {"hang watch"}
    watcher.stop()
    assert list((tmp_path / "logs").iterdir()) == []
    assert {thread.name for thread in threading.enumerate()} == before


def test_what_an_earlier_attempt_has_left_is_removed_or_ignored(tmp_path):
    for name in ("hang.json", "hang-rank-0.txt", "hang-rank-1.txt", "hang-rank-7.txt"):
        (tmp_path / name).write_text("{}")
    second = HangWatcher(tmp_path, attempt="this", rank=1, world_size=2, seconds=100)
    second.start()
    assert (tmp_path / "hang.json").exists()
    assert second._told() is None
    first = HangWatcher(tmp_path, attempt="this", rank=0, world_size=2, seconds=100)
    first.start()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "hang-rank-0.txt",
        "hang-rank-1.txt",
    ]
    first.stop()
    second.stop()


OTHER_ATTEMPT = """
watcher.start()
program = (
    "import sys, time; from pathlib import Path; from segalign.hang_watcher import HangWatcher; "
    "HangWatcher(Path(sys.argv[1]), attempt='other', rank=0, world_size=1, seconds=0.4).start(); "
    "time.sleep(60)"
)
other = subprocess.Popen([sys.executable, "-c", program, str(folder)])
while other.poll() is None:
    watcher.note("a step", 3)
    time.sleep(0.01)
assert (folder / "hang.json").exists()
ended = time.monotonic()
while time.monotonic() < ended + 1:
    watcher.note("a step", 4)
    time.sleep(0.01)
watcher.stop()
print(other.returncode)
"""


def test_another_attempt_that_hangs_in_the_same_folder_ends_nobody_else(tmp_path):
    ended = run(WATCH + OTHER_ATTEMPT, tmp_path)
    assert (ended.returncode, ended.stdout) == (0, f"{HANG_EXIT_CODE}\n"), ended.stderr
    stacks = (tmp_path / "logs" / "hang-rank-0.txt").read_text()
    assert "<module>" in stacks  # of the one that hung


def test_a_stopped_watch_leaves_the_file_of_another_attempt(tmp_path):
    first = HangWatcher(tmp_path, attempt="this", rank=0, world_size=1, seconds=100)
    first.start()
    (tmp_path / "hang-rank-0.txt").unlink()
    (tmp_path / "hang-rank-0.txt").touch()
    first.stop()
    assert (tmp_path / "hang-rank-0.txt").exists()


def test_a_first_rank_that_comes_late_keeps_the_note_of_its_own_attempt(tmp_path):
    (tmp_path / "hang.json").write_text('{"attempt": "this", "rank": 1, "since": "noon"}')
    watcher = HangWatcher(tmp_path, attempt="this", rank=0, world_size=2, seconds=100)
    watcher._clean()
    assert watcher._told() == (1, "noon")


def test_a_directory_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "logs").write_text("a file")
    with pytest.raises(StorageError, match="expected to be able to write"):
        HangWatcher(tmp_path / "logs", attempt="this", rank=0, world_size=1, seconds=100).start()


def test_the_timer_stops_with_its_owner(tmp_path):
    with (tmp_path / "stacks").open("wb") as file:
        timer = LastResort(file.fileno())
        timer.stop()
        timer.put_off(0.2)
        timer.put_off(100)
        time.sleep(0.3)
        timer.stop()
    assert (tmp_path / "stacks").read_bytes() == b""
    faulthandler.cancel_dump_traceback_later()


class Recorder:
    """Stands in for a watcher."""

    made: list["Recorder"]

    def __init__(self, folder, **settings):
        self.folder, self.settings, self.said = folder, settings, []
        self.made.append(self)

    def start(self):
        self.said.append("start")

    def note(self, name, step):
        self.said.append((name, step))

    def stop(self):
        self.said.append("stop")


@pytest.fixture
def made(monkeypatch):
    monkeypatch.setattr(Recorder, "made", [], raising=False)
    monkeypatch.setattr(hang_watch_module, "HangWatcher", Recorder)
    return Recorder.made


def test_a_run_is_watched_from_its_setup_to_its_end(made, toy_command, run_dir):
    assert toy_command("fit", "--trainer.max_steps=2", "--trainer.limit_val_batches=1") == 0
    (recorder,) = made
    assert recorder.folder == run_dir / "logs"
    assert len(recorder.settings.pop("attempt")) == 32
    assert recorder.settings == {"rank": 0, "world_size": 1, "seconds": 1500, "launcher": None}
    assert recorder.said[0] == "start"
    assert ("the start of a training batch", 0) in recorder.said
    assert ("the end of a training batch", 1) in recorder.said
    assert ("a checkpoint", 2) in recorder.said
    assert recorder.said[-1] == "stop"
    assert recorder.said.count("stop") == 1


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_evaluations_are_watched_too_in_folders_of_their_own(made, toy_command, run_dir, stage):
    assert toy_command(stage, "--trainer.limit_val_batches=2") == 0
    (recorder,) = made
    assert recorder.folder == run_dir / "logs" / stage
    noted = [item for item in recorder.said if isinstance(item, tuple)]
    assert len(noted) == 4, noted
    assert recorder.said[-1] == "stop"


def test_an_exception_ends_the_watch(made, toy_command, tmp_path):
    arguments = {"at_step": 1, "marker": str(tmp_path / "marker")}
    failing = ["--allow_import=toy_crash", "--trainer.callbacks+=toy_crash.FailOnce"]
    with pytest.raises(RuntimeError, match="told to fail"):
        toy_command("fit", *failing, f"--trainer.callbacks.init_args={arguments}")
    assert made[0].said[-1] == "stop"


@pytest.mark.parametrize("setting", ["--hang_watch.seconds=null", "--trainer.fast_dev_run=true"])
def test_a_run_may_do_without(made, toy_command, setting):
    assert toy_command("fit", "--trainer.max_steps=1", setting) == 0
    assert made == []


@pytest.mark.parametrize(
    ("parent", "is_launcher"),
    [
        (["python", "-X", "dev", "main.py", "fit", "--seed=1"], True),
        (["bash", "start.sh"], False),
        (["python", "main.py", "fit", "--seed=2"], False),
        (None, False),
    ],
)
def test_a_launcher_is_the_parent_that_runs_the_same_command(monkeypatch, parent, is_launcher):
    own = ["/bin/python", "/there/main.py", "fit", "--seed=1"]

    def process(number):
        if number is not None and parent is None:
            raise psutil.NoSuchProcess(number)
        return SimpleNamespace(cmdline=lambda: own if number is None else parent)

    monkeypatch.setattr(hang_watch_module.psutil, "Process", process)
    monkeypatch.setattr(sys, "argv", own[1:])
    assert hang_watch_module._launcher() == (os.getppid() if is_launcher else None)


def test_systems_without_such_signals_ask_no_children(monkeypatch, tmp_path):
    monkeypatch.setattr(hang_watcher, "_ASK", None)
    watcher = HangWatcher(tmp_path, attempt="this", rank=0, world_size=1, seconds=100)
    watcher.start()
    watcher.stop()
    assert list(tmp_path.iterdir()) == []
