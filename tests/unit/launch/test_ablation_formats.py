"""The table of a study as Markdown, CSV, LaTeX and in a terminal."""

import csv
import io
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console
from toy_results import metric, scored_study, seen

from segalign.launch.findings.ablation_formats import (
    to_csv,
    to_latex,
    to_markdown,
    to_rich,
    to_runs_csv,
)
from segalign.launch.findings.ablation_numbers import make_table
from segalign.launch.findings.ablation_text import column_decimals
from segalign.launch.running.run_state import RunStatus

TESTS = Path(__file__).parents[2]
NASTY = r"a|b_c $5 & 100% #1 {x} ~ ^ <i> [y](z) `w` \n *"
SCORES = {
    "plain": [0.861, 0.873, 0.885],
    "better": [0.892, 0.908, 0.912],
    "worse": [0.8, 0.82, None],
    "never": [None, None, None],
}


def table_of(folder, scores=None, **options):
    return make_table(*scored_study(folder, scores or SCORES, **options))


def markdown_rows(text):
    lines = [line for line in text.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    return {one[0]: one[1:] for one in cells}


def latex_rows(text):
    lines = [line for line in text.splitlines() if line.startswith("    ") and "&" in line]
    return [re.split(r"(?<!\\)&", line) for line in lines]


def printed(table, width=120):
    console = Console(width=width, record=True, file=io.StringIO(), force_terminal=True)
    console.print(to_rich(table))
    return console.export_text()


def test_markdown_shows_means_intervals_and_differences(tmp_path):
    rows = markdown_rows(to_markdown(table_of(tmp_path)))
    assert rows["variant"] == ["score ↑", "runs"]
    # 4.30265 times the deviations 0.012, 0.0105830 and, of differences, 0.004, over the root of 3
    assert rows["plain (base)"] == ["0.873 ± 0.030", "3/3"]
    assert rows["better"] == [r"0.904 ± 0.026 (+0.031 ± 0.010)\*", "3/3"]


def test_missing_runs_are_dashes_and_footnotes(tmp_path):
    text = to_markdown(table_of(tmp_path))
    rows = markdown_rows(text)
    assert rows["worse [1]"][0].startswith("0.810 ± 0.127, n=2 (-0.057 ± 0.051)")
    assert rows["worse [1]"][1] == "2/3"
    assert rows["never [2]"] == ["pending", "0/3"]
    assert "- [1] worse: seed 2: not started\n" in text
    assert "- [2] never: seeds 0, 1, 2: not started\n" in text
    assert "- 4 of 12 runs are not finished.\n" in text


def test_a_difference_over_fewer_pairs_says_over_how_many(tmp_path):
    scores = {"plain": [0.5, 0.6, None], "other": [0.7, 0.9, 0.8]}
    rows = markdown_rows(to_markdown(table_of(tmp_path, scores)))
    assert rows["other"][0] == "0.80 ± 0.25 (+0.25 ± 0.64, n=2)"


def test_the_star_is_for_intervals_that_exclude_zero_alone(tmp_path):
    scores = {"plain": [0.5, 0.6], "sure": [0.7, 0.81], "unsure": [0.5, 0.9], "same": [0.5, 0.6]}
    rows = markdown_rows(to_markdown(table_of(tmp_path, scores)))
    starred = [name for name, cells in rows.items() if cells[0].endswith(r"\*")]
    assert starred == ["sure"]


def test_one_seed_has_no_interval(tmp_path):
    text = to_markdown(table_of(tmp_path, {"plain": [0.5], "other": [0.61234]}))
    assert markdown_rows(text)["other"][0] == "0.6123 (+0.1123)"
    assert "\\*" not in text
    assert "values of one seed" in text


def test_arrows_point_to_the_better_side(tmp_path):
    metrics = (metric("val/score"), metric("val/loss", mode="min"))
    table = table_of(tmp_path, metrics=metrics)
    assert markdown_rows(to_markdown(table))["variant"][:2] == ["score ↑", "loss ↓ [1]"]
    assert r"score $\uparrow$ & loss $\downarrow$\textsuperscript{1}" in to_latex(table)


def test_an_unknown_metric_is_a_column_of_dashes_with_one_footnote(tmp_path):
    table = table_of(tmp_path, metrics=(metric("val/score"), metric("val/scroe")))
    text = to_markdown(table)
    columns = [cells[1] for cells in list(markdown_rows(text).values())[2:]]
    assert set(columns) == {"-", "pending"}
    assert text.count("no finished run has `val/scroe`") == 1


@pytest.mark.parametrize(
    ("scores", "decimals"),
    [
        ([[0.861, 0.873, 0.885]], 3),  # +- 0.030
        ([[24.1, 25.3, 26.5]], 1),  # +- 3.0
        ([[1000.0, 1100.0, 1200.0]], 0),  # +- 248
        ([[0.5], [0.25]], 4),
        ([[12.3456789]], 2),
        ([[3e-7, 3.1e-7]], 8),
        ([[1.0, 1.0]], 3),
        ([[0.0, 0.0]], 0),
        ([[None]], 0),
        ([[0.1, 0.2], [0.1, 0.100001]], 4),
    ],
)
def test_numbers_have_as_many_digits_as_they_are_worth(tmp_path, scores, decimals):
    table = table_of(tmp_path, {f"v{number}": one for number, one in enumerate(scores)})
    assert column_decimals(table, "val/score") == decimals


def test_a_difference_that_rounds_to_nothing_has_no_minus(tmp_path):
    rows = markdown_rows(to_markdown(table_of(tmp_path, {"a": [0.5, 0.7], "b": [0.4999, 0.7]})))
    assert rows["b"][0].endswith("(+0.000 ± 0.001)")


def test_failed_runs_are_counted_and_named(tmp_path):
    study, plan, observed = scored_study(tmp_path, {"a": [0.5, 0.6], "b": [None, None]})
    observed = [one for one in observed if one.run.label == "a"]
    observed += [seen(run, RunStatus.FAILED) for run in plan.of("b")]
    table = make_table(study, plan, observed)
    rows = markdown_rows(to_markdown(table))
    assert rows["b [1]"] == ["failed", "0/2, 2 failed"]
    (line,) = [r for r in csv.DictReader(io.StringIO(to_csv(table))) if r["variant"] == "b"]
    assert (line["num_failed"], line["mean"], line["num"]) == ("2", "", "0")


def test_csv_has_the_statistics_of_the_table(tmp_path):
    table = table_of(tmp_path, {"a": [0.5, 0.7, 0.9], "b": [0.6, 0.9, 1.2]})
    first, second = csv.DictReader(io.StringIO(to_csv(table)))
    assert (first["variant"], first["is_base"], first["difference"]) == ("a", "True", "")
    assert float(second["mean"]) == pytest.approx(0.9)
    assert float(second["difference"]) == pytest.approx(0.2)
    # Student's t of two degrees of freedom is 4.303.
    assert float(second["difference_high"]) == pytest.approx(0.2 + 4.3027 * 0.1 / 3**0.5, rel=1e-4)
    assert (second["num_runs"], second["num_done"], second["difference_num"]) == ("3", "3", "3")


def test_csv_of_runs_is_one_exact_line_for_each_run_and_metric(tmp_path):
    scores = {"plain": [1 / 3, math.nan], 'odd, "one"': [0.5, None]}
    rows = list(csv.DictReader(io.StringIO(to_runs_csv(table_of(tmp_path, scores)))))
    assert list(rows[0]) == [
        "variant", "is_base", "seed", "run_id", "status", "metric", "mode", "at", "value",
    ]  # fmt: skip
    assert [(one["variant"], one["seed"], one["status"]) for one in rows] == [
        ("plain", "0", "done"),
        ("plain", "1", "done"),
        ('odd, "one"', "0", "done"),
        ('odd, "one"', "1", "pending"),
    ]
    assert float(rows[0]["value"]) == 1 / 3
    assert [one["value"] for one in rows[1:]] == ["nan", "0.5", ""]
    assert [one["is_base"] for one in rows] == ["True", "True", "False", "False"]
    assert rows[0]["run_id"] == "plain-0"


def test_latex_shows_the_same_numbers(tmp_path):
    text = to_latex(table_of(tmp_path))
    rows = {row[0].strip(): [cell.strip() for cell in row[1:]] for row in latex_rows(text)}
    assert rows["better"][0] == r"$0.904 \pm 0.026$ ($+0.031 \pm 0.010$)$^{*}$"
    assert rows[r"never\textsuperscript{2}"][0] == "pending"
    assert all(rule in text for rule in (r"\toprule", r"\midrule", r"\bottomrule"))
    assert "\\begin{tabular}{lrr}" in text


def test_latex_escapes_whatever_a_label_holds(tmp_path):
    a_study, plan, observed = scored_study(tmp_path, {"plain": [0.5], NASTY: [0.6]})
    text = to_latex(make_table(a_study, plan, observed))
    label = latex_rows(text)[2][0].strip()
    assert label == (
        r"a\textbar{}b\_c \$5 \& 100\% \#1 \{x\} \textasciitilde{} \textasciicircum{} "
        r"\textless{}i\textgreater{} {[}y{]}(z) \textasciigrave{}w\textasciigrave{} "
        r"\textbackslash{}n *"
    )
    assert all(len(row) == 3 for row in latex_rows(text))
    balance = [text.count(sign) - text.count(f"\\{sign}") for sign in "{}"]
    assert balance[0] == balance[1]


def test_markdown_escapes_whatever_a_label_holds(tmp_path):
    markdown_it = pytest.importorskip("markdown_it")
    text = to_markdown(table_of(tmp_path, {"plain": [0.5], NASTY: [0.6]}))
    page = markdown_it.MarkdownIt("commonmark").enable(["table"]).render(text)
    cells = re.findall(r"<td[^>]*>(.*?)</td>", page)
    assert len(cells) == 6
    shown = cells[3].replace("&amp;", "&").replace("&lt;", "<").replace("&gt;", ">")
    assert shown == NASTY


def test_a_reason_cannot_break_a_table(tmp_path):
    a_study, plan, observed = scored_study(tmp_path, SCORES)
    reason = "no | room\n| x | y |\n" + "long " * 100
    observed[3] = seen(observed[3].run, RunStatus.FAILED, exit_code=75, reason=reason)
    table = make_table(a_study, plan, observed)
    assert len(markdown_rows(to_markdown(table))) == 6
    (line,) = [one for one in to_markdown(table).splitlines() if "exit 75" in one]
    assert line.endswith("...")
    assert len(line) < 300
    assert "no | room | x | y | long" in printed(table)


def test_a_terminal_shows_every_number_and_note(tmp_path):
    table = table_of(tmp_path, {**SCORES, "[bold]x[/bold]": [0.5, 0.6, 0.55]})
    text = printed(table)
    pieces = ("0.873 ± 0.030", "(+0.031 ± 0.010)*", "never [2]", "[bold]x[/bold]", "plain (base)")
    notes = ("[1] worse: seed 2: not started", "4 of 15 runs")
    assert all(piece in text for piece in (*pieces, *notes))


def test_a_narrow_terminal_cuts_no_number(tmp_path):
    table = table_of(tmp_path, {"plain": [0.861, 0.873], "a long name of it": [0.892, 0.908]})
    assert "(+0.033 ± 0.025)*" in printed(table, width=50)
    assert "…" not in printed(table, width=26)


def test_tables_need_no_torch(tmp_path):
    code = (
        "import sys; from pathlib import Path; from toy_results import scored_study\n"
        "from segalign.launch.findings.ablation_numbers import make_table\n"
        "from segalign.launch.findings.ablation_formats import to_markdown, to_csv\n"
        "from segalign.launch.findings.ablation_formats import to_latex, to_rich\n"
        "table = make_table(*scored_study(Path(sys.argv[1]), {'a': [0.5, 0.6], 'b': [0.7, 0.8]}))\n"
        "text = to_markdown(table); to_csv(table); to_latex(table); to_rich(table)\n"
        "assert '0.55' in text\n"
        "print(sorted({'torch', 'numpy', 'matplotlib', 'lightning'} & set(sys.modules)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": f"{TESTS / 'toys'}:{TESTS.parent}"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "[]"
