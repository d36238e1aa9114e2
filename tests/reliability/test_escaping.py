"""Captions, names and labels stay text: in pages, in tables, in the names of files."""

import csv
import io
import re

import broken_security
import jinja2
import pytest
import torch
from browser import CHROMIUM, Browser
from html_page import Page
from toy_report import (
    caption_rows,
    observed_of,
    scene_images,
    scores_of,
    study_of,
    table_of,
    write_test,
)

from segalign.csv_text import plain_cell
from segalign.evaluation.result import EvaluationResult, MetricResult
from segalign.evaluation.result_page import ResultPage
from segalign.generation.contact_sheet import MarkedSegment, SheetEntry, render_sheet
from segalign.generation.image_folder import ImageJob
from segalign.generation.prompts import Prompt
from segalign.launch.findings.ablation_formats import (
    to_csv,
    to_latex,
    to_markdown,
    to_runs_csv,
)
from segalign.launch.findings.study_report import render_report

HOSTILE = (
    "<script>hit = 1</script>",
    "</script><script>hit = 1</script>",
    "</style><img src=x onerror='hit = 1'>",
    '" onerror="hit = 1" onload=\'hit = 1\'',
    "<svg/onload=hit=1><a href='javascript:hit=1'>",
    "{{ 7 * 7 }} {% raw %} ${hit = 1} `",
    "--> ]]> <!-- \u2028 \u2029 \u202e right to left \u2066",
    "../../etc/passwd \\..\\x C:\\con",
    "\ud800 \x01 \x7f",
)


def pages(folder) -> dict[str, str]:
    """Make each page with all hostile texts in all places that take text."""
    together = ". ".join(HOSTILE[:-1]) + ". It rains."
    sheet = [SheetEntry(text, [MarkedSegment(text, 3, 0, False)], [("0.png", text)])
             for text in HOSTILE[:-1]]  # fmt: skip
    cut = together.index(". ") + 2
    spans = [[0, cut], [cut, len(together)]]
    rows = [{"sample_id": 7, "caption": together, "metadata": {"x": together}}]
    scores = {"segment_scores/dense": [[0.25, 0.5]], "segment_spans/dense": [spans],
              "reward/dense": [0.2]}  # fmt: skip
    result = EvaluationResult(
        model={"name": together}, weights="raw", num_captions=1, images_per_caption=1,
        batch_size=1, eval_seed=1, prompts="ab" * 32, num_counted=1,
        metrics={"fid": MetricResult(values={"fid": 2.0}, protocol={"x": together},
                                     notes=(together,))},
    )  # fmt: skip
    study, plan = study_of(folder, ["plain", together], seeds=(0,), prompts=3)
    captions = [{**row, "caption": together} for row in caption_rows(3)]
    for label in plan.labels:
        directory = plan.of(label)[0].directory
        write_test(directory, captions, scores_of(captions), scene_images(3))
    observed = observed_of(plan)
    return {
        "images": render_sheet(sheet, {"checkpoint": together}, together),
        "result": ResultPage(result, rows, scores, {0: torch.zeros(3, 8, 8).byte()}).render(),
        "study": render_report(study, plan, observed, table_of(plan, observed), {}),
    }


def check_pages(folder) -> None:
    for name, html in pages(folder).items():
        page = Page(html)
        allowed = 1 if name == "study" else 0
        assert len(page.all("script")) == allowed, name
        handlers = [key for _, attrs in page.tags for key in attrs if key.startswith("on")]
        assert handlers == [], name
        links = [attrs.get(key) or "" for _, attrs in page.tags for key in ("href", "src")]
        assert not any(link.strip().lower().startswith("javascript") for link in links), name
        assert not any(tag in ("svg", "iframe", "object") for tag, _ in page.tags), name


def test_pages_hold_text_as_text(tmp_path):
    check_pages(tmp_path)


def test_pages_without_escaping_are_caught(tmp_path, monkeypatch):
    monkeypatch.setattr(jinja2.Environment, "__init__", jinja2.Environment.__init__)
    broken_security.escapes_nothing()
    with pytest.raises(AssertionError):
        check_pages(tmp_path)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
def test_no_script_of_a_caption_runs_in_a_browser(tmp_path):
    with Browser(tmp_path / "browser") as browser:
        for name, html in pages(tmp_path / "runs").items():
            path = tmp_path / f"{name}.html"
            path.write_text(html, encoding="utf-8")
            browser.show(path)
            assert browser.run("typeof hit") == "undefined", name


def test_tables_hold_names_as_text(tmp_path):
    labels = [*HOSTILE[:-1], "=cmd|' /C calc'!A0", "@SUM(1)", "+1", "-1|x"]
    _, plan = study_of(tmp_path, labels, seeds=(0,))
    table = table_of(plan, observed_of(plan))
    for text in (to_csv(table), to_runs_csv(table)):
        rows = list(csv.reader(io.StringIO(text)))
        assert len({len(row) for row in rows}) == 1
        assert not any(row[0].startswith(("=", "+", "-", "@")) for row in rows)
    markdown = to_markdown(table)
    rows = [line for line in markdown.split("\n") if line.startswith("|")]
    assert len(rows) == 2 + len(labels)
    assert len({len(re.findall(r"(?<!\\)\|", row)) for row in rows}) == 1
    assert "<s" not in markdown
    latex = to_latex(table)
    assert sum(line.endswith(r"\\") for line in latex.split("\n")) >= len(labels)


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@x", "\tx", "\rx"])
def test_no_cell_is_a_formula(text):
    assert plain_cell(text) == f"'{text}"
    assert plain_cell(f"a{text}") == f"a{text}"


@pytest.mark.parametrize("text", [*HOSTILE, "\0", "con", "x" * 5000])
def test_files_are_never_named_after_text(text):
    name = ImageJob(Prompt(3, text, label=text), seed=0).file
    assert re.fullmatch(r"[0-9a-z.-]{1,60}", name)


BROKEN = (broken_security.escapes_nothing,)
