"""Where runs are started, and what a later command remembers of it."""

import pytest

from segalign.errors import ConfigError
from segalign.launch.launcher import Launcher


def test_a_first_command_must_say_where(tmp_path):
    with pytest.raises(ConfigError, match="expected `--local N` or `--slurm`"):
        Launcher.choose(tmp_path, None, None, None)


def test_later_commands_take_over_what_they_leave_open(tmp_path):
    first = Launcher.choose(tmp_path, "local", 3, ["toys"])
    first.save(tmp_path)
    assert Launcher.choose(tmp_path, None, None, None) == first
    assert first.options == ["--allow_import=toys"]


def test_a_later_command_wins(tmp_path):
    Launcher.choose(tmp_path, "local", 3, ["toys"]).save(tmp_path)
    later = Launcher.choose(tmp_path, "local", 5, ["others"])
    assert (later.num_parallel, later.allow_import) == (5, ("others",))
    assert Launcher.choose(tmp_path, "slurm", None, None).backend == "slurm"


def test_an_unreadable_memory_is_none(tmp_path):
    (tmp_path / "launch.json").write_text('{"backend": ')
    with pytest.raises(ConfigError, match="not been started"):
        Launcher.choose(tmp_path, None, None, None)
