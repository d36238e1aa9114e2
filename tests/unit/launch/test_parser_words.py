"""What the parser says, in users' words."""

import pytest

from segalign.launch.parser_words import plain_words


@pytest.mark.parametrize(
    ("said", "rewritten"),
    [
        ("`a`: Expected a <class 'float'>. Got value: many",
         "`a`: expected a number (float); got many"),
        ("`a`: Expected a <class 'float'>; Expected a <class 'int'>; Given value: foo",
         "`a`: expected a number (float); expected an integer (int); got foo"),
        ("`w`: Not of type PositiveInt: invalid literal for int() with base 10: 'many'",
         "`w`: expected an integer above 0; got 'many'"),
        ("`w`: Not of type PositiveFloat: could not convert string to float: 'many'",
         "`w`: expected a number above 0; got 'many'"),
        ("`w`: Not of type PositiveInt: value=0 does not conform to restriction v>0",
         "`w`: expected an integer above 0: value=0 does not conform to restriction v>0"),
        ("`m`: Expected a typing.Literal['max', 'min']; Given value: up",
         "`m`: expected one of 'max', 'min'; got up"),
        ("`c`: Expected a <class 'collections.abc.Sequence'>; Given value: 3",
         "`c`: expected a list; got 3"),
        ("Expected a <class 'toys.Odd'>. Got value: 1", "expected Odd; got 1"),
        ("no such option 'Expected'", "no such option 'Expected'"),
    ],
)  # fmt: skip
def test_types_are_named_as_people_name_them(said, rewritten):
    assert plain_words(said) == rewritten
