"""Result files: strict JSON there and back, and what is no result."""

import json
import math

import pytest

from segalign.errors import DataError
from segalign.evaluation.result import EvaluationResult, FailedImage, MetricResult, plain


def result_of(**changes) -> EvaluationResult:
    fid = MetricResult(
        values={"fid": 20.125, "fid_std": math.nan},
        protocol={"resize": "legacy", "extractor": {"layer": "pool", "sizes": (1, 2)}},
        notes=("few images",),
    )
    settings = {
        "model": {"name": "longSD", "step": 3},
        "weights": "ema",
        "num_captions": 4,
        "images_per_caption": 2,
        "batch_size": 4,
        "eval_seed": 1234,
        "prompts": "ab" * 32,
        "metrics": {"fid": fid},
        "num_counted": 7,
        "failures": (FailedImage(place=3, caption="A <fox>", error="out of memory"),),
        "versions": {"torch": "2"},
        "created": "2026-01-01T00:00:00+00:00",
        "seconds": 1.5,
    }
    return EvaluationResult(**{**settings, **changes})


def refuse(constant):
    raise AssertionError(constant)


def test_the_file_is_strict_json_and_comes_back(tmp_path):
    path = tmp_path / "result.json"
    result = result_of()
    result.save(path)
    content = json.loads(path.read_text(), parse_constant=refuse)
    assert content["metrics"]["fid"]["values"] == {"fid": 20.125, "fid_std": None}
    assert content["digest"] == result.digest()
    found = EvaluationResult.load(path)
    assert found.to_json() == result.to_json()
    assert math.isnan(found.values["fid_std"])
    assert found.failures == result.failures
    assert found.name == "longSD"


def test_the_digest_is_of_what_numbers_depend_on():
    digest = result_of().digest()
    same = {"eval_seed": 5, "batch_size": 8, "weights": "raw", "model": {"name": "x"}, "seconds": 9}
    for name, value in same.items():
        assert result_of(**{name: value}).digest() == digest, name
    other = MetricResult(values={"fid": 20.125}, protocol={"resize": "clean"})
    for name, value in {
        "prompts": "cd" * 32, "num_captions": 5, "images_per_caption": 1,
        "metrics": {"fid": other},
    }.items():  # fmt: skip
        assert result_of(**{name: value}).digest() != digest, name


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[:-9],
        lambda text: "[]",
        lambda text: text.replace('"format": 1', '"format": 2'),
        lambda text: text.replace("legacy", "clean"),
        lambda text: text.replace('"weights"', '"wights"'),
        lambda text: text.replace('"fid": 20.125', '"fid": "many"'),
    ],
)
def test_what_is_no_result_is_refused_on_one_line(tmp_path, damage):
    path = tmp_path / "result.json"
    path.write_text(damage(result_of().to_json()))
    with pytest.raises(DataError, match=r"^expected the result of an evaluation in `[^\n]*$"):
        EvaluationResult.load(path)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(DataError, match="No such file"):
        EvaluationResult.load(tmp_path / "result.json")


def test_only_plain_data_can_be_written():
    assert plain({1: (math.inf, True, None, "x")}) == {"1": [None, True, None, "x"]}
    with pytest.raises(TypeError, match="got `set`"):
        plain({"a": [{1}]})
