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


REWARD_ROWS = {
    "**DRTune, omega 0.3**": "DRTune, omega 0.3",
    "DRaFT-1": "DRaFT-1",
    "DRaFT-LV": "DRaFT-LV",
    "AlignProp": "AlignProp",
    "ReFL": "ReFL",
    "DRTune, omega 0": "DRTune, omega 0",
    "DRTune, omega 1 (no decomposition)": "DRTune, omega 1",
}


@pytest.fixture(scope="module")
def reward():
    file = ROOT / "benchmarks" / "results" / "scenes_reward.json"
    return json.loads(file.read_text(encoding="utf-8"))


def mean_of(runs, when, key):
    return statistics.mean(run[when][key] for run in runs)


def test_reward_tuning_starts_with_headroom_and_uses_it(reward):
    runs = reward["results"]["DRTune, omega 0.3"]
    assert len(runs) == len(reward["seeds"]) == 3
    assert all(0.70 <= run["start"]["attributes"] <= 0.88 for run in runs)
    assert mean_of(runs, "gain", "attributes") >= 0.05
    assert min(run["gain"]["attributes"] for run in runs) > 0.04


@pytest.mark.parametrize("row", REWARD_ROWS)
def test_the_readme_shows_the_means_of_reward_tuning(reward, row):
    (cells,) = re.findall(rf"^\| {re.escape(row)} \|(.*)\|$", README, re.MULTILINE)
    runs = reward["results"][REWARD_ROWS[row]]
    gains = [mean_of(runs, "gain", key) for key in ("attributes", "shape", "attributes/past_77")]
    both = [mean_of(runs, when, "attributes") for when in ("start", "best")]
    assert [float(cell) for cell in cells.split("|")] == [round(x, 3) for x in (*both, *gains)]


def test_the_readme_has_the_cost_of_metrics():
    results = ROOT / "benchmarks" / "results"
    frechet = (results / "frechet.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| ([^|]+?) \| ([^|]+ \| [^|]+?) \|", frechet, re.MULTILINE))
    ours, sqrtm, eigvals = (
        next(cells for name, cells in rows.items() if part in name).split(" | ")
        for part in ("ours", "sqrtm", "eigvals")
    )
    assert float(sqrtm[1]) >= 3
    assert float(eigvals[1]) >= 4
    overhead = (results / "evaluation_overhead.md").read_text(encoding="utf-8")
    (share,) = re.findall(r"all together \|.*\| ([\d.]+)% \|", overhead)
    assert float(share) <= 5
    text = " ".join(README.split())
    assert f"takes {ours[0]} s on two CPU cores, {float(sqrtm[1]):.1f} times less" in text
    assert f"and {float(eigvals[1]):.1f} times less than torchmetrics" in text
    assert f"all metrics together take {share} % of the time" in text


def test_the_monitor_fires_where_the_readme_says():
    file = ROOT / "benchmarks" / "results" / "scenes_overfit.json"
    results = json.loads(file.read_text(encoding="utf-8"))
    fired = {arm: [run["fired_at"] is not None for run in runs] for arm, runs in results.items()}
    assert {arm: len(runs) for arm, runs in fired.items()} == dict.fromkeys(fired, 3)
    hacking = [one for arm, runs in fired.items() if arm.startswith("rate 1e-3") for one in runs]
    good = [one for arm, runs in fired.items() if arm.startswith("omega") for one in runs]
    assert all(hacking)
    assert not any(good)
    text = " ".join(README.split())
    assert f"in {len(hacking)} of {len(hacking)} runs at ten times the recipe's rate" in text
    assert f"in none of {len(good)} good ones" in text
