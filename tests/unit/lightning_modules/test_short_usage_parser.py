import pytest
from jsonargparse import ArgumentParser

from lightning_modules.short_usage_parser import ShortUsageParser, unknown_key
from segalign.commands.parsing import summarise
from segalign.errors import ConfigError


def test_noise_is_dropped_and_nesting_joined():
    message = """Parser key "model":
  Does not validate against any of the Union subtypes
  Subtypes: [<class 'X'>, <class 'NoneType'>]
  Errors:
    - Parser key "width":
        Not of type PositiveInt: -4 does not conform to restriction v>0 (see `x --help`)
    - Expected a <class 'NoneType'>
  Given value type: <class 'dict'>
  Given value: {'class_path': 'y'}"""
    expected = "`model`: `width`: Not of type PositiveInt: -4 does not conform to restriction v>0"
    assert summarise(message) == expected


def test_a_given_value_is_kept_only_if_it_is_news():
    assert summarise("Expected a <class 'int'>\nGiven value: abc") == (
        "Expected a <class 'int'>; Given value: abc"
    )
    assert summarise("Problem with 'a.B'\nGiven value: a.B") == "Problem with 'a.B'"


@pytest.mark.parametrize(
    ("entry", "advice"),
    [("*", "--allow_import mine"), ("mine", "--allow_import mine"), ("os", "could run any code")],
)
def test_a_denied_import_says_what_to_do(entry, advice):
    message = f"Importing 'mine.X' is not allowed, denied by the '{entry}' entry of the list. Add."
    assert advice in summarise(message)
    assert "allowlist" not in summarise(message)


@pytest.mark.parametrize(
    ("message", "key"),
    [
        ("unrecognized arguments: --a.b 4", "a.b"),
        ("unrecognized arguments: --a.b=4", "a.b"),
        ("Subcommand 'fit' does not accept option 'a.b'", "a.b"),
        ("something else", None),
    ],
)
def test_unknown_keys_are_recognised(message, key):
    assert unknown_key(message) == key


def make_parser(**kwargs) -> ArgumentParser:
    parser = ShortUsageParser(prog="main.py [options] fit", **kwargs)
    parser.add_argument("--trainer.max_steps", type=int, default=1)
    parser.known_keys = ["trainer.max_steps"]
    return parser


def test_an_error_is_a_config_error_with_a_suggestion(capsys):
    with pytest.raises(ConfigError) as caught:
        make_parser().parse_args(["--trainer.max_stepz", "3"])
    assert str(caught.value) == (
        "unrecognized arguments: --trainer.max_stepz 3; did you mean `trainer.max_steps`? "
        "(see `python main.py fit --help`)"
    )
    assert capsys.readouterr() == ("", "")


def test_the_file_of_an_unknown_key_is_named(tmp_path):
    parser = make_parser()
    parser.config_files = [tmp_path / "a.yaml", tmp_path / "b.yaml"]
    for path, text in zip(parser.config_files, ["x: 1", "trainer: {max_stepz: 1}"], strict=True):
        path.write_text(text)
    with pytest.raises(ConfigError, match=r"in `.*b\.yaml`; did you mean"):
        parser.error("Subcommand 'fit' does not accept option 'trainer.max_stepz'")


def test_link_targets_are_remembered():
    parser = make_parser()
    parser.add_argument("--source", type=int)
    parser.link_arguments("source", "trainer.max_steps")
    assert parser.link_targets == ["trainer.max_steps"]


def test_a_short_name_where_a_class_belongs_is_explained():
    message = """Parser key "text.segmenter":
  - Expected a path but sentence either not accessible or invalid
  - Does not validate against any of the Union subtypes
  Subtypes: [<class 'segalign.text.segmenter.Segmenter'>, <class 'NoneType'>]
  Errors:
    - Expected a dot import path string: sentence
    - Expected a <class 'NoneType'>
  Given value type: <class 'str'>
  Given value: sentence"""
    expected = "expected a class path `package.module.Class`, or settings; got `sentence`"
    assert summarise(message) == f"`text.segmenter`: {expected}"
