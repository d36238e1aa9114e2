import pytest

from segalign.errors import DataError
from segalign.metrics.metric_protocol import check_same_protocol, protocol_digest

PROTOCOL = {
    "metric": "frechet_distance",
    "extractor": {"name": "inception", "layer": "2048", "resize": {"kind": "legacy", "size": 299}},
    "num_real": 5000,
    "crop": None,
}


def test_the_order_of_fields_does_not_matter():
    turned = dict(reversed(PROTOCOL.items()))
    check_same_protocol(PROTOCOL, turned, "two numbers")
    assert protocol_digest(PROTOCOL) == protocol_digest(turned)


def test_the_first_field_that_differs_is_named_with_both_values():
    other = {**PROTOCOL, "num_real": 1000}
    other["extractor"] = {**PROTOCOL["extractor"], "resize": {"kind": "clean", "size": 299}}
    with pytest.raises(DataError) as caught:
        check_same_protocol(PROTOCOL, other, "two numbers")
    assert str(caught.value) == (
        'expected one protocol for two numbers; `extractor.resize.kind` is "legacy" in one and '
        '"clean" in the other; make both with the same settings'
    )
    assert protocol_digest(PROTOCOL) != protocol_digest(other)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_real": "5000"}, '`num_real` is 5000 in one and "5000"'),
        ({"jpeg": True}, "`jpeg` is nothing in one and true"),
        ({"extractor": {}}, '`extractor.name` is "inception" in one and nothing'),
    ],
)
def test_types_and_absent_fields_differ_too(change, message):
    with pytest.raises(DataError, match=message):
        check_same_protocol(PROTOCOL, {**PROTOCOL, **change}, "two numbers")


def test_a_tuple_is_the_list_that_a_file_makes_of_it():
    check_same_protocol({"mean": (0.5, 0.5)}, {"mean": [0.5, 0.5]}, "two numbers")
