"""What a source of samples gives: fields of a sample's JSON, or why there is none."""

import json

import pytest

from segalign.data.faults import SampleFault


def fields(source, index):
    return json.loads(dict(source.members(index))["json"])


def faults(source) -> list[str]:
    found = []
    for index in range(len(source)):
        with pytest.raises(SampleFault) as caught:
            source.members(index)
        found.append(caught.value.reason)
    return found
