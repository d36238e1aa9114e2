"""What the README claims of the benchmarks is what their result files say."""

import json
import re
import statistics
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
COLUMNS = ("R@1 C", "R@1 C_perp", "pairs past_77", "pairs within_77")
ROWS = {
    "the start, captions cut at 77": "start, whole",
    "the start, read in segments": "start, in segments",
    "trained on captions cut at 77": "whole text",
    "**trained on segments**": "segments",
}


@pytest.fixture(scope="module")
def preference():
    file = ROOT / "benchmarks" / "results" / "scenes_preference.json"
    return json.loads(file.read_text(encoding="utf-8"))


def mean(preference, arm, column):
    return statistics.mean(run[column] for run in preference["results"][arm])


def test_segments_beat_cut_captions_by_far(preference):
    assert len(preference["seeds"]) == 3
    assert all(len(preference["results"][arm]) == 3 for arm in ("segments", "whole text"))
    gap = mean(preference, "segments", COLUMNS[0]) - mean(preference, "whole text", COLUMNS[0])
    assert gap >= 0.30
    assert mean(preference, "segments", "pairs past_77") >= 0.85
    assert mean(preference, "whole text", "pairs past_77") < 0.55


@pytest.mark.parametrize("row", ROWS)
def test_the_readme_shows_the_means(preference, row):
    (cells,) = re.findall(rf"^\| {re.escape(row)} \|(.*)\|$", README, re.MULTILINE)
    shown = [float(cell.strip(" *")) for cell in cells.split("|")]
    expected = [round(mean(preference, ROWS[row], column), 3) for column in COLUMNS]
    assert shown == expected
