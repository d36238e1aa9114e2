from pathlib import Path

import pytest
import yaml

from segalign.errors import ConfigError
from segalign.yaml_errors import check_size, yaml_errors

FILE = Path("x.yaml")
ODD = ["!!int x", "!!float x", "!!timestamp x", "!!bool x", "!!int ''", "2001-99-99", "[" * 20_000]


@pytest.mark.parametrize("text", ODD)
def test_values_that_are_not_of_their_tag_are_told(text):
    message = r"^expected plain YAML in `x.yaml`; got .*Correct"
    with pytest.raises(ConfigError, match=message), yaml_errors(FILE):
        yaml.safe_load(text)


def laughing(levels):
    lines = [f"l{n}: &l{n} [{', '.join([f'*l{n - 1}'] * 9)}]" for n in range(1, levels)]
    return yaml.safe_load("\n".join(["l0: &l0 [x]", *lines]))


@pytest.mark.parametrize("content", [laughing(30), yaml.safe_load("&x [*x]")])
def test_aliases_that_never_end_are_refused(content):
    with pytest.raises(ConfigError, match="more than 1,000,000 values"):
        check_size(content, FILE)


def test_aliases_are_welcome():
    check_size(laughing(5), FILE)
    check_size(yaml.safe_load("a: &a {b: 1}\nc: {<<: *a}\nd: *a"), FILE)
