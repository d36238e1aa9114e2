import pytest

from segalign.json_text import parse_json


def test_json_is_parsed():
    assert parse_json('{"a": [1, 2.5, null]}') == parse_json(b'{"a": [1, 2.5, null]}')


@pytest.mark.parametrize("content", ["", "{", b"\xff", "[" * 100_000, '{"a":' * 100_000])
def test_anything_else_is_a_value_error(content):
    with pytest.raises(ValueError):  # noqa: PT011 - of any text
        parse_json(content)
