"""What the README shows of the shipped studies is what their result files say."""

import csv
import re
from pathlib import Path

import pytest

from segalign.launch.findings.intervals import mean_interval

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "studies"
STUDIES = sorted(path.stem for path in (ROOT / "configs" / "sweeps").glob("*.yaml"))
NUMBER = r"-?[\d.]+"


def table(text: str) -> dict[str, dict[str, str]]:
    """Read the first Markdown table of a text: cells by variant and heading."""
    rows = re.findall(r"^\|(.*)\|$", text, re.MULTILINE)
    cells = [[cell.strip() for cell in row.split("|")] for row in rows]
    return {row[0]: dict(zip(cells[0], row, strict=True)) for row in cells[2:]}


def shown(study: str) -> dict[str, dict[str, str]]:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    section = readme.partition(f"**`{study}`: ")[2].partition("**\n")[0]
    lines = section.split("\n\n")
    return table(next(part for part in lines if part.startswith("|")))


@pytest.fixture(params=STUDIES)
def study(request):
    return request.param


def test_every_study_has_its_results(study):
    assert (RESULTS / f"{study}.md").is_file()
    assert (RESULTS / f"{study}.csv").is_file()


def test_the_readme_shows_their_cells(study):
    stored = table((RESULTS / f"{study}.md").read_text(encoding="utf-8"))
    found = shown(study)
    assert list(found) == list(stored)
    for variant, cells in found.items():
        assert len(cells) > 2
        assert cells.items() <= stored[variant].items()


def test_cells_are_of_the_runs(study):
    """Means and half intervals come from the values of single runs."""
    stored = table((RESULTS / f"{study}.md").read_text(encoding="utf-8"))
    values: dict[str, list[float]] = {}
    with (RESULTS / f"{study}.csv").open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            if row["metric"] == "test/attributes":
                values.setdefault(row["variant"], []).append(float(row["value"]))
    assert len(values) == len(stored)
    for variant, cells in stored.items():
        of_runs = mean_interval(values[variant.removesuffix(" (base)")])
        mean, half = re.match(rf"({NUMBER}) ± ({NUMBER})", cells["facts ↑"]).groups()
        assert float(mean) == pytest.approx(of_runs.mean, abs=6e-4)
        assert float(half) == pytest.approx(of_runs.half, abs=6e-4)
