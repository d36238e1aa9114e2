"""Errors of light commands: one line that names the option, the value and the help to read."""

import importlib

import pytest

from segalign.errors import ConfigError

GENERATE = ["--checkpoint", "x", "--out", "y", "--prompt", "a"]


@pytest.mark.parametrize(
    ("command", "arguments", "expected"),
    [
        (
            "generate", [*GENERATE, "--steps", "0"],
            (
                "`steps`: Not of type PositiveInt: does not conform to restriction v>0; "
                "Given value: 0 (see `python main.py generate --help`)"
            ),
        ),
        (
            "import_weights", ["longsd"],
            ("the following arguments are required: adapter, lora, out "
            "(see `python main.py import longsd --help`)"),
        ),
        (
            "shards", ["encode", "a", "b", "--model", "m", "--tower", "3"],
            ("`tower`: Expected a typing.Literal[1, 2]. Got value: 3 "
            "(see `python main.py shards encode --help`)"),
        ),
    ],
    ids=["value", "required", "choice"],
)  # fmt: skip
def test_errors_are_one_line(command, arguments, expected):
    module = importlib.import_module(f"segalign.commands.{command}")
    load = [None] if command == "generate" else []
    with pytest.raises(ConfigError) as caught:
        module.run(arguments, *load)
    assert str(caught.value) == expected
