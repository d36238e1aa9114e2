"""Tables of results: their columns, and what must not stand side by side."""

import math
import sys

import pytest

from segalign.errors import ConfigError, DataError
from segalign.evaluation.result import EvaluationResult, MetricResult
from segalign.evaluation.result_table import compare, headline, number


def result_of(name="a", metrics=None, **changes) -> EvaluationResult:
    fid = MetricResult(values={"fid": 20.125, "fid_std": 1.0}, protocol={"resize": "legacy"})
    settings = {
        "model": {"name": name}, "weights": "raw", "num_captions": 4, "images_per_caption": 1,
        "batch_size": 4, "eval_seed": 1, "prompts": "ab" * 32, "metrics": metrics or {"fid": fid},
        "num_counted": 4,
    }  # fmt: skip
    return EvaluationResult(**{**settings, **changes})


ALIGNMENT = MetricResult(
    values={
        "reward/hps": 0.27, "reward/hps/length/1-77": 0.3, "denscore/hps": 21.5,
        "denscore_o/hps": 33.25, "segment_score/hps/1": 0.2,
    },
    protocol={"rewards": {"hps": {"omega": 1.0}}},
)  # fmt: skip
OTHERS = {
    "kid": MetricResult(values={"kid": 0.00123456, "kid_std": 0.1}, protocol={}),
    "inception_score": MetricResult(values={"inception_score": math.nan}, protocol={}),
    "lpips_diversity": MetricResult(values={"lpips_diversity": 0.5}, protocol={}),
    "scene_facts": MetricResult(values={"attributes": 0.75, "shape": 0.5}, protocol={}),
    "vendi": MetricResult(values={"vendi": 3.25, "entropy": 1.0}, protocol={}),
}


def cells(markdown):
    lines = [line for line in markdown.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def test_columns_are_the_numbers_that_there_are():
    fid = result_of().metrics["fid"]
    first = result_of("a|b <c>", {"fid": fid})
    second = result_of("b", {**OTHERS, "alignment": ALIGNMENT})
    header, _, one, other = cells(compare([first, second]).to_markdown())
    assert header == [
        "model", "FID", "IS", "KID", "Denscore", "Denscore-O", "hps", "LPIPS div", "attributes",
        "vendi",
    ]  # fmt: skip
    assert one == ["a\\|b &lt;c>", "20.12", *["-"] * 8]
    assert other == ["b", "-", "-", "0.00123", "21.5", "33.25", "0.27", "0.5", "0.75", "3.25"]
    assert headline(first) == {"FID": 20.125}


def test_rewards_are_told_apart():
    values = {"denscore/hps": 20.0, "denscore/dense": 21.0, "reward/hps": 0.1}
    metrics = {"alignment": MetricResult(values=values, protocol={})}
    assert headline(result_of(metrics=metrics)) == {
        "Denscore (hps)": 20.0, "Denscore (dense)": 21.0, "hps": 0.1,
    }  # fmt: skip


def test_a_reward_that_is_called_like_a_metric_has_a_column_of_its_own():
    values = {
        "denscore/hps": 20.0, "reward/Denscore": 0.1, "reward/FID": 0.2, "reward/model": 0.3,
        "reward/images": 0.4, "reward/vendi": 0.5,
    }  # fmt: skip
    named = {"alignment": MetricResult(values=values, protocol={}), "vendi": OTHERS["vendi"]}
    result = result_of(metrics={**named, "fid": result_of().metrics["fid"]})
    assert headline(result) == {
        "FID": 20.125, "Denscore": 20.0, "reward/Denscore": 0.1, "reward/FID": 0.2,
        "reward/model": 0.3, "reward/images": 0.4, "vendi": 0.5, "vendi (2)": 3.25,
    }  # fmt: skip


def test_missing_images_are_shown():
    header, _, *rows = cells(compare([result_of(), result_of(num_counted=3)]).to_markdown())
    assert header[:2] == ["model", "images"]
    assert [row[1] for row in rows] == ["4", "3"]


def test_the_title_holds_the_digests():
    title = compare([result_of()]).title
    assert title == f"4 captions x 1, prompts abababababab, protocol {result_of().digest()[:12]}"
    others = compare([result_of(), result_of(metrics=OTHERS)]).title
    assert others.split()[-1] != title.split()[-1]


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"prompts": "cd" * 32}, "`prompts` abababab.* in a.json and cdcdcdcd.* in b.json"),
        ({"num_captions": 5}, "`num_captions` 4 in a.json and 5 in b.json"),
        ({"images_per_caption": 2}, "`images_per_caption` 1 in a.json and 2 in b.json"),
        (
            {"metrics": {"fid": MetricResult(values={}, protocol={"resize": "clean"})}},
            "`metrics.fid.resize` legacy in a.json and clean in b.json",
        ),
        (
            {"metrics": {"fid": MetricResult(values={}, protocol={"aa": 1, "resize": "clean"})}},
            "`metrics.fid.aa` missing in a.json and 1 in b.json",
        ),
    ],
)
def test_numbers_of_different_protocols_are_refused(changes, found):
    with pytest.raises(DataError, match=rf"^expected results of one protocol.* got {found}[^\n]*$"):
        compare([result_of(), result_of(**changes)], ["a.json", "b.json"])


def test_the_third_is_compared_with_the_one_that_has_the_metric():
    kid = {"kid": MetricResult(values={"kid": 1.0}, protocol={"subsets": 1})}
    other = {"kid": MetricResult(values={"kid": 1.0}, protocol={"subsets": 2})}
    with pytest.raises(DataError, match="subsets` 1 in result 2 and 2 in result 3"):
        compare([result_of(), result_of(metrics=kid), result_of(metrics=other)])


def test_seeds_and_micro_batches_may_differ():
    assert len(compare([result_of(), result_of(eval_seed=2, batch_size=2)]).rows) == 2


def test_no_result_is_no_table():
    with pytest.raises(ConfigError, match="at least one result"):
        compare([])


def test_numbers_are_short():
    shown = [number(value) for value in (None, math.nan, 20.1267, 0.0012345, -33.333, 12345.6, 0.0)]
    assert shown == ["-", "-", "20.13", "0.00123", "-33.33", "12346", "0"]


def test_a_table_needs_no_torch(repository):
    import subprocess

    code = "import sys, segalign.evaluation.result_table; print('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], cwd=repository, capture_output=True)
    assert found.stdout.strip() == b"False", found.stderr
