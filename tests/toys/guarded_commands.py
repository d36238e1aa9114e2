"""Run many commands in one process that records whatever reaches beyond its folder.

An audit hook cannot be removed, so that this is for a process of its own: ``run`` is given to
``CommandServer`` as what is broken before the command that is then never run.
"""

import contextlib
import functools
import importlib
import io
import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

ORDERS = "GUARDED_ORDERS"
RESOLVE = "@resolve"
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
# Events of a program being started, or code being taken from a file.
_EXECUTING = {
    "marshal.loads", "os.exec", "os.posix_spawn", "os.spawn", "os.startfile",
    "os.system", "pickle.find_class", "pty.spawn", "socket.bind", "socket.connect",
    "socket.getaddrinfo", "socket.gethostbyname", "subprocess.Popen",
}  # fmt: skip
# Events of a file system's change, and which of their arguments are paths.
_CHANGING = {
    "os.chmod": 1, "os.chown": 1, "os.link": 2, "os.mkdir": 1, "os.remove": 1, "os.rename": 2,
    "os.rmdir": 1, "os.symlink": 2, "os.truncate": 1, "os.utime": 1, "shutil.rmtree": 1,
}  # fmt: skip


class Guard:
    """Notes events beyond what a command may do.

    Args:
        folder: Where it may write.
        known_programs: What it may start.
    """

    def __init__(self, folder: Path, known_programs: tuple[str, ...] = ("git", "uname")) -> None:
        self.folders = (str(folder.resolve()), "/dev/null", "/dev/shm/torch_", "/proc/self")
        self.known_programs = known_programs
        self.events: list[str] = []
        self.is_on = False

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.is_on:
            return
        self.is_on = False  # what the guard itself does is no event
        try:
            if self._reaches_out(event, arguments):
                self.events.append(f"{event}{arguments!r:.200}")
        finally:
            self.is_on = True

    def _reaches_out(self, event: str, arguments: tuple[Any, ...]) -> bool:
        if event == "open":
            path, _, flags = arguments
            is_written = bool(isinstance(flags, int) and flags & _WRITING)
            return is_written and not self._is_inside(path)
        if event in _CHANGING:
            return not all(map(self._is_inside, arguments[: _CHANGING[event]]))
        if event == "subprocess.Popen":
            return Path(os.fsdecode(arguments[0])).name not in self.known_programs
        if event == "marshal.loads":
            return not _is_import()
        if event == "exec":
            return _is_hostile(arguments[0], self.folders[0])
        if event == "ctypes.dlopen":
            return str(arguments[0]).startswith(self.folders[0])
        return event in _EXECUTING

    def _is_inside(self, path: Any) -> bool:
        if isinstance(path, int):
            return True
        real = os.path.realpath(os.fsdecode(path))
        return "__pycache__" in real or real.startswith(self.folders)


def _is_import() -> bool:
    """Tell whether the import system is at work."""
    frame = sys._getframe(3)
    return frame.f_code.co_filename.startswith("<frozen importlib")


def _is_hostile(code: Any, folder: str) -> bool:
    """Tell whether code that is executed comes from a hostile file, or names what it would make."""
    name = getattr(code, "co_filename", "")
    return name.startswith(folder) or "HOSTILE" in repr(getattr(code, "co_consts", ""))


def run_one(arguments: list[str]) -> int:
    """Run a command, or as ``@module.function`` a function that takes paths."""
    import main
    from segalign.error_boundary import run_guarded

    if arguments[0] == RESOLVE:
        return run_guarded(lambda: bool(_resolver(arguments[1])("fit", arguments[2:])) - 1)
    if not arguments[0].startswith("@"):
        return main.main(arguments)
    module, _, function = arguments[0][1:].rpartition(".")
    called = getattr(importlib.import_module(module), function)
    return run_guarded(lambda: bool(called(*map(Path, arguments[1:]))) * 0)


@functools.cache
def _resolver(allow_import: str) -> Any:
    """Open the parser of runs, which takes longer than to read a config."""
    import main

    return main.resolve_configs(allow_import.split(","))


def run() -> None:
    """Run the commands of a file of orders; write what each did, and end the process."""
    orders = json.loads(Path(os.environ[ORDERS]).read_text())
    folder = Path(orders["folder"])
    sys.dont_write_bytecode = True
    os.chdir(folder)
    guard = Guard(folder)
    sys.addaudithook(guard)
    found = []
    for name, arguments in orders["commands"]:
        guard.events.clear()
        printed = io.StringIO()
        code: Any = None
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            started = time.monotonic()
            guard.is_on = True
            try:
                code = run_one(arguments)
            except SystemExit as error:
                code = error.code
            except Exception:  # noqa: BLE001 - whatever it is, the next command is tried
                traceback.print_exc()
            guard.is_on = False
        seconds = time.monotonic() - started
        found.append([name, code, printed.getvalue(), list(guard.events), seconds])
    Path(orders["found"]).write_text(json.dumps(found))
    os._exit(0)
