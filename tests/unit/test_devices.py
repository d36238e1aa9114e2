"""Choosing a device."""

import pytest
import torch

from segalign.devices import choose_device
from segalign.errors import ConfigError


def test_a_device_that_is_there():
    assert choose_device("cpu") == torch.device("cpu")
    assert choose_device(None).type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("name", ["abacus", "meta", "cuda:99", "hpu", "mkldnn", "", "x" * 999])
def test_others_are_one_short_line(name, recwarn):
    with pytest.raises(ConfigError, match="expected a device of this machine") as caught:
        choose_device(name)
    assert len(str(caught.value)) < 150
    assert not recwarn.list
