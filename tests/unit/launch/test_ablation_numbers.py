"""The table of a study: what counts, what is missing, and what is refused."""

import math
from dataclasses import replace

import pytest
from toy_results import (
    metric,
    planned,
    scored_study,
    seen,
    study,
    write_curves,
    write_result,
)

from segalign.errors import ConfigError, DataError
from segalign.launch.findings.ablation_numbers import make_table
from segalign.launch.plan import Plan
from segalign.launch.running.run_state import RunStatus

SCORES = {"plain": [0.5, 0.7, 0.6], "better": [0.6, 0.81, 0.69]}
SCORE = "val/score"


def row(table, label):
    return next(one for one in table.rows if one.label == label)


def cell(table, label, name=SCORE):
    return row(table, label).cells[name]


def test_cells_are_means_with_intervals_and_paired_differences(tmp_path):
    table = make_table(*scored_study(tmp_path, SCORES))
    plain, better = cell(table, "plain"), cell(table, "better")
    assert plain.by_seed == {0: 0.5, 1: 0.7, 2: 0.6}
    assert plain.interval.mean == pytest.approx(0.6)
    assert plain.interval.half == pytest.approx(4.302653 * 0.1 / math.sqrt(3), rel=1e-6)
    assert plain.difference is None
    assert better.difference.mean == pytest.approx(0.1)
    assert better.difference.half == pytest.approx(4.302653 * 0.01 / math.sqrt(3), rel=1e-6)
    assert row(table, "better").num_done == 3
    assert table.unknown == {}


def test_no_variant_is_left_out(tmp_path):
    scores = {**SCORES, "third": [0.5, None, 0.4], "never": [None, None, None]}
    table = make_table(*scored_study(tmp_path, scores))
    assert [one.label for one in table.rows] == list(scores)
    assert (row(table, "third").num_done, row(table, "third").num_runs) == (2, 3)
    assert list(row(table, "third").missing) == ["seed 1: not started"]
    assert list(row(table, "never").missing) == ["seeds 0, 1, 2: not started"]
    assert cell(table, "never").interval is None
    assert cell(table, "never").difference is None
    assert "4 of 12 runs are not finished." in table.notes


def test_differences_are_over_seeds_that_both_have(tmp_path):
    scores = {"plain": [0.5, 0.7, None], "other": [None, 0.9, 0.1]}
    found = cell(make_table(*scored_study(tmp_path, scores)), "other")
    assert found.interval.num == 2
    assert (found.difference.num, found.difference.mean) == (1, pytest.approx(0.2))
    assert not found.difference.is_known


@pytest.mark.parametrize(
    ("status", "facts", "text"),
    [
        (RunStatus.FAILED, {"exit_code": 70, "reason": "no"}, "seed 0: failed (exit 70): no"),
        (RunStatus.FAILED, {"exit_code": 1}, "seed 0: failed (exit 1)"),
        (RunStatus.RUNNING, {"step": 3, "max_steps": 9}, "seed 0: still running, step 3 of 9"),
        (RunStatus.RUNNING, {}, "seed 0: still running"),
        (RunStatus.QUEUED, {}, "seed 0: waits in the queue"),
        (RunStatus.PENDING, {}, "seed 0: not started"),
        (RunStatus.DEAD, {}, "seed 0: died, can be resumed"),
        (RunStatus.CANCELLED, {}, "seed 0: cancelled"),
        (RunStatus.PREEMPTED, {}, "seed 0: stopped by a signal, can be resumed"),
    ],
)
def test_a_run_that_is_not_finished_says_why_and_does_not_count(tmp_path, status, facts, text):
    a_study, plan, observed = scored_study(tmp_path, SCORES)
    observed[3] = seen(observed[3].run, status, **facts)
    table = make_table(a_study, plan, observed)
    assert list(row(table, "better").missing) == [text]
    assert set(cell(table, "better").by_seed) == {1, 2}
    assert row(table, "better").runs[0].status is status


def test_a_pruned_run_counts_and_says_so(tmp_path):
    a_study, plan, observed = scored_study(tmp_path, SCORES)
    observed[3] = seen(observed[3].run, RunStatus.PRUNED)
    table = make_table(a_study, plan, observed)
    assert cell(table, "better").interval.num == 3
    assert list(row(table, "better").missing) == ["seed 0: pruned; its last values count"]


def test_values_that_are_not_finite_or_not_there_are_said_and_left_out(tmp_path):
    a_study, plan, observed = scored_study(tmp_path, {**SCORES, "bad": [math.nan, 0.5, 0.4]})
    write_curves(observed[7].run.directory, {"train/loss": {9: 1.0}})
    found = cell(make_table(a_study, plan, observed), "bad")
    assert found.interval.num == 1
    assert [math.isnan(value) for value in found.by_seed.values()] == [True, True, False]
    assert list(found.notes) == ["seed 0: nan, left out", "seed 1: not logged"]


def test_a_run_that_two_variants_share_counts_in_both(tmp_path):
    a_study, plan, observed = scored_study(tmp_path, SCORES)
    shared = [replace(run, label="alias") for run in plan.of("plain")]
    table = make_table(a_study, replace(plan, runs=[*plan.runs, *shared]), observed)
    assert cell(table, "alias").by_seed == cell(table, "plain").by_seed
    assert cell(table, "alias").difference.mean == 0.0
    assert not cell(table, "alias").difference.excludes_zero


def test_a_metric_that_no_run_logs_leaves_the_others(tmp_path):
    metrics = (metric(SCORE), metric("val/scroe"))
    table = make_table(*scored_study(tmp_path, SCORES, metrics=metrics))
    (line,) = table.unknown.values()
    assert line == (
        "expected a metric that runs of `toy` log; no finished run has `val/scroe`: near it are "
        "`val/score`; correct `metrics`"
    )
    assert cell(table, "plain").interval is not None
    assert cell(table, "plain", "val/scroe").interval is None
    assert list(cell(table, "plain", "val/scroe").notes) == []


@pytest.mark.parametrize(
    ("options", "name", "cure"),
    [
        ({}, "test/fid", "add `test` to `stages`"),
        ({"at": "best"}, SCORE, "not at `best`; choose another `at`"),
        ({}, "zzz", "near it are `val/score`"),
    ],
)
def test_an_unknown_metric_says_what_to_do(tmp_path, options, name, cure):
    table = make_table(*scored_study(tmp_path, SCORES, metrics=(metric(name, **options),)))
    (line,) = table.unknown.values()
    assert cure in line


def test_a_metric_is_not_unknown_before_a_run_is_finished(tmp_path):
    a_study, plan, _ = scored_study(tmp_path, SCORES)
    assert [*make_table(a_study, plan, []).unknown] == []


def test_what_unfinished_runs_log_does_not_count(tmp_path):
    metrics = (metric("train/loss"),)
    a_study, plan, observed = scored_study(tmp_path, SCORES, metrics=metrics)
    write_curves(observed[0].run.directory, {"train/loss": {9: 1.0}})
    observed[0] = seen(observed[0].run, RunStatus.RUNNING)
    assert len([*make_table(a_study, plan, observed).unknown]) == 1
    observed[0] = seen(observed[0].run)
    assert [*make_table(a_study, plan, observed).unknown] == []


def test_a_metric_that_cannot_be_read_is_not_unknown(tmp_path):
    a_study, plan, observed = study_of_tests(tmp_path, {"a": {}})
    (plan.runs[0].directory / "evaluation" / "test" / "result.json").write_text("{")
    assert [*make_table(a_study, plan, observed).unknown] == []


def test_a_metric_named_twice_is_refused(tmp_path):
    metrics = (metric(SCORE), metric(SCORE, at="best"))
    with pytest.raises(ConfigError, match="`val/score` 2 times"):
        make_table(*scored_study(tmp_path, SCORES, metrics=metrics))


def study_of_tests(folder, protocols):
    runs = [planned(folder, label, 0) for label in protocols]
    for run, protocol in zip(runs, protocols.values(), strict=True):
        write_result(run.directory, {"fid": 2.0}, **protocol)
        write_curves(run.directory, {SCORE: {9: 0.5}})
    a_study = study(folder, metrics=(metric("test/fid", mode="min"), metric(SCORE)))
    plan = Plan(study="toy", base_label=runs[0].label, runs=runs)
    return a_study, plan, [seen(run) for run in runs]


def test_tests_of_one_protocol_are_compared(tmp_path):
    table = make_table(*study_of_tests(tmp_path, {"a": {"network": 1}, "b": {"network": 1}}))
    assert cell(table, "b", "test/fid").difference.mean == 0.0


def test_tests_of_two_protocols_are_refused_in_one_line_that_names_both(tmp_path):
    parts = study_of_tests(tmp_path, {"a": {"network": 1}, "b": {"network": 2}})
    with pytest.raises(DataError) as caught:
        make_table(*parts)
    line = str(caught.value)
    assert "\n" not in line
    directories = [str(run.directory) for run in parts[1].runs]
    assert all(text in line for text in (*directories, "test/fid", "network", "1", "2"))


def test_a_damaged_result_costs_its_cell_alone(tmp_path):
    a_study, plan, observed = study_of_tests(tmp_path, {"a": {}, "b": {}, "c": {}})
    file = plan.runs[1].directory / "evaluation" / "test" / "result.json"
    file.write_text("{")
    table = make_table(a_study, plan, observed)
    assert cell(table, "b", "test/fid").interval is None
    assert str(file) in cell(table, "b", "test/fid").notes[0]
    assert cell(table, "c", "test/fid").interval.mean == 2.0
    assert cell(table, "b", SCORE).interval.mean == 0.5
    assert table.unknown == {}


def test_notes_say_what_the_intervals_are(tmp_path):
    notes = make_table(*scored_study(tmp_path / "few", SCORES)).notes
    assert notes[0] == "95 % intervals over 3 paired seeds, Student's t."
    many = {f"v{number}": [0.1, 0.2] for number in range(6)}
    notes = make_table(*scored_study(tmp_path / "many", many)).notes
    assert notes[0] == (
        "95 % intervals over 2 paired seeds, Student's t; not corrected for several comparisons."
    )
    notes = make_table(*scored_study(tmp_path / "one", {"a": [0.1], "b": [0.2]})).notes
    assert notes[0] == "One seed for each variant: what chance does is not known."
