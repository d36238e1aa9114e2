"""A run is held by one process at a time, and by what it starts."""

import errno
import fcntl
import logging
import os
import subprocess
import sys

import pytest

from segalign.errors import StorageError
from segalign.launch.running.run_folder import LOCK_FILE, sweep_folder
from segalign.launch.running.run_lock import RunHeldError, is_locked, run_lock


def refuse_locks(monkeypatch, code):
    def flock(descriptor, operation):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", flock)


def test_one_at_a_time(run_dir):
    with run_lock(run_dir), pytest.raises(RunHeldError, match="running already") as raised:
        run_lock(run_dir).__enter__()
    assert raised.value.exit_code == 69
    assert "\n" not in str(raised.value)
    with run_lock(run_dir):
        pass


def test_a_child_that_outlives_its_supervisor_holds_the_lock(run_dir):
    with run_lock(run_dir) as inherited:
        sleeper = [sys.executable, "-c", "import sys; sys.stdin.read()"]
        child = subprocess.Popen(sleeper, stdin=subprocess.PIPE, pass_fds=inherited)
    assert is_locked(run_dir)
    child.kill()
    child.communicate()
    assert is_locked(run_dir) is False


def test_other_children_do_not_hold_it(run_dir):
    with run_lock(run_dir):
        sleeper = [sys.executable, "-c", "import sys; sys.stdin.read()"]
        child = subprocess.Popen(sleeper, stdin=subprocess.PIPE)
    assert is_locked(run_dir) is False
    child.kill()
    child.communicate()


def test_looking_holds_nobody_back(run_dir):
    assert is_locked(run_dir) is False
    with run_lock(run_dir):
        assert is_locked(run_dir)
    looker = os.open(sweep_folder(run_dir) / LOCK_FILE, os.O_RDONLY)
    fcntl.flock(looker, fcntl.LOCK_SH)
    assert is_locked(run_dir) is False
    os.close(looker)


def test_taking_it_waits_for_those_who_look(run_dir):
    with run_lock(run_dir):
        pass
    held = f"import fcntl, sys, time; file = open({str(sweep_folder(run_dir) / LOCK_FILE)!r})\n"
    held += "fcntl.flock(file, fcntl.LOCK_SH); print(flush=True); time.sleep(0.3)"
    looker = subprocess.Popen([sys.executable, "-c", held], stdout=subprocess.PIPE)
    looker.stdout.readline()
    with run_lock(run_dir):
        pass
    looker.communicate()


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP])
def test_a_file_system_without_locks_is_said(run_dir, monkeypatch, caplog, code):
    with run_lock(run_dir):
        pass
    refuse_locks(monkeypatch, code)
    with caplog.at_level(logging.WARNING), run_lock(run_dir) as inherited:
        assert list(inherited) == []
    assert "without locks" in caplog.text
    assert is_locked(run_dir) is None


def test_no_room_for_the_lock_is_one_line(run_dir, monkeypatch):
    def no_space(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    sweep_folder(run_dir).mkdir(parents=True)
    monkeypatch.setattr("segalign.launch.running.run_lock.make_directory", lambda path: None)
    monkeypatch.setattr(os, "open", no_space)
    with pytest.raises(StorageError, match="No space left"):
        run_lock(run_dir).__enter__()


@pytest.mark.parametrize("code", [errno.ESTALE, errno.EIO, errno.EPERM])
def test_a_file_server_that_is_away_is_one_line(run_dir, monkeypatch, code):
    refuse_locks(monkeypatch, code)
    with pytest.raises(StorageError, match="lock") as raised:
        run_lock(run_dir).__enter__()
    assert "\n" not in str(raised.value)
