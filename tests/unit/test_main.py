import subprocess
import sys
import time

import pytest

import main


def run_light(repository, *arguments):
    code = (
        "import sys, main; code = main.main(sys.argv[1:]); "
        "print(sorted({'torch', 'lightning', 'numpy'} & set(sys.modules)), file=sys.stderr); "
        "sys.exit(code)"
    )
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=repository,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_help_lists_every_command_without_heavy_imports(repository, arguments):
    start = time.perf_counter()
    done = run_light(repository, *arguments)
    assert time.perf_counter() - start < 1
    assert done.returncode == 0
    assert done.stderr.strip() == "[]"
    for command in (*main.LIGHTNING_COMMANDS, *main.STUDY_COMMANDS, *main.LIGHT_COMMANDS):
        assert f"\n  {command} " in done.stdout


def test_an_unknown_command_lists_the_known_ones(capsys):
    assert main.main(["frobnicate"]) == 78
    error = capsys.readouterr().err
    assert error.startswith("error: expected a command, one of fit, ")
    assert "got `frobnicate`" in error
    assert error.count("\n") == 1


def test_light_commands_get_their_arguments_and_return_their_code(monkeypatch, tmp_path):
    (tmp_path / "light_command.py").write_text("def run(argv):\n    return len(argv)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(main.LIGHT_COMMANDS, "light", "light_command")
    assert main.main(["light", "a", "b"]) == 2
    assert main.main(["light"]) == 0


def test_the_entry_point_is_short(repository):
    assert len((repository / "main.py").read_text().splitlines()) <= 80
