"""Commands that the documents show fit their parsers, and the files they name exist."""

import importlib
import re
import shlex
from pathlib import Path

import pytest

import main

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LIGHT = {**main.LIGHT_COMMANDS, **main.RUN_COMMANDS, **main.STUDY_COMMANDS}
COMMAND = re.compile(rf"main\.py ((?:{'|'.join(LIGHT)}) [^#`\n]*)")


def commands() -> list[tuple[str, str]]:
    found = []
    for path in DOCUMENTS:
        text = path.read_text(encoding="utf-8").replace("\\\n", " ")
        found += [(path.name, line) for line in COMMAND.findall(text)]
    return found


def test_every_command_is_shown_somewhere():
    assert {line.split()[0] for _, line in commands()} == set(LIGHT)


@pytest.mark.parametrize(("document", "line"), commands())
def test_commands_parse(document, line):
    name, *arguments = shlex.split(line)
    parser = importlib.import_module(LIGHT[name]).build_parser()
    assert parser.parse_args(arguments)


@pytest.mark.parametrize(
    "path",
    [
        path
        for document in DOCUMENTS
        for path in re.findall(
            r"`((?:configs|segalign|benchmarks)/[\w./-]+\.(?:py|yaml|md|json))`",
            document.read_text(encoding="utf-8"),
        )
    ],
)
def test_named_files_exist(path):
    assert (ROOT / path).is_file()
