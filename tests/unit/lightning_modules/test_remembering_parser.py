"""Parts of configs that are found once: when they are recalled, and when they must not be."""

import contextvars
from collections import OrderedDict
from pathlib import Path

import pytest
from jsonargparse.typing import PositiveInt, path_type

from lightning_modules.remembering_parser import RememberingParser, remembering
from segalign.errors import ConfigError


@pytest.fixture
def parser():
    made = RememberingParser()
    made.add_argument("--numbers", type=list[int], default=[0])
    made.add_argument("--size", type=PositiveInt, default=1)
    made.add_argument("--file", type=path_type("fr") | None, default=None)
    return made


@pytest.fixture
def memory():
    found = OrderedDict()
    with remembering(found):
        yield found


def test_the_same_is_found_once(parser, memory):
    first = parser.parse_object({"numbers": [1]})
    known = len(memory)
    assert parser.parse_object({"numbers": [1]}) == first
    assert len(memory) == known
    parser.parse_object({"numbers": [2]})
    assert len(memory) > known


def test_what_is_recalled_is_ones_own(parser, memory):
    for _ in range(3):
        found = parser.parse_object({"numbers": [1]})
        assert found.numbers == [1]
        found.numbers.append(2)
        parser.get_defaults().numbers.append(3)
    assert parser.get_defaults().numbers == [0]


def test_types_are_told_apart(parser, memory):
    assert parser.parse_object({"size": 1}).size == 1
    with pytest.raises(ConfigError, match="size"):
        parser.parse_object({"size": True})
    with pytest.raises(ConfigError, match="size"):
        parser.parse_object({"size": 1.5})


def test_mistakes_are_found_each_time(parser, memory):
    for _ in range(2):
        with pytest.raises(ConfigError, match="size"):
            parser.parse_object({"size": -1})


def test_other_parsers_find_for_themselves(parser, memory):
    other = RememberingParser()
    other.add_argument("--numbers", type=list[float])
    assert parser.parse_object({"numbers": [1]}).numbers == [1]
    assert isinstance(other.parse_object({"numbers": [1]}).numbers[0], float)


def test_paths_depend_on_the_working_directory(parser, memory, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "a.txt").write_text("")
    monkeypatch.chdir(tmp_path / "here")
    assert Path(str(parser.parse_object({"file": "a.txt"}).file)).name == "a.txt"
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="file"):
        parser.parse_object({"file": "a.txt"})


def test_the_state_of_the_library_is_part_of_the_question(parser, memory):
    variable = contextvars.ContextVar("a setting of the library")
    parser.parse_object({"numbers": [1]})
    known = len(memory)
    token = variable.set("other")
    parser.parse_object({"numbers": [1]})
    variable.reset(token)
    assert len(memory) > known


def test_nothing_is_kept_outside_the_block(parser):
    memory = OrderedDict()
    with remembering(memory):
        parser.parse_object({"numbers": [1]})
    known = len(memory)
    assert known > 0
    parser.parse_object({"numbers": [2]})
    assert len(memory) == known


def test_the_memory_is_bounded(parser, memory, monkeypatch):
    monkeypatch.setattr("lightning_modules.remembering_parser._NUM_REMEMBERED", 5)
    for number in range(20):
        assert parser.parse_object({"numbers": [number]}).numbers == [number]
    assert len(memory) == 5


def test_the_environment_is_no_part_of_the_question_so_it_is_asked_anew(memory, monkeypatch):
    parser = RememberingParser(parser_mode="omegaconf+")
    parser.add_argument("--name", type=str)
    for value in ("one", "two", "three"):
        monkeypatch.setenv("TOY_NAME", value)
        assert parser.parse_object({"name": "${oc.env:TOY_NAME}"}).name == value
