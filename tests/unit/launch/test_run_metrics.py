"""Numbers of runs, read from logs and results that runs leave."""

import math

import pytest
from toy_results import metric, write_curves, write_log, write_result

from segalign.errors import DataError
from segalign.launch.findings.run_metrics import RunNumbers, read_curve, read_metric
from segalign.run_directory import BestRecord, checkpoints_directory, write_best

# Validations after 100, 200 and 300 optimizer steps, which the log numbers from 0.
SCORES = {99: 0.5, 199: 0.9, 299: 0.7}


@pytest.fixture
def run(tmp_path):
    write_curves(tmp_path, {"val/score": SCORES, "train/loss": {9: 2.0, 199: 1.5, 309: 1.0}})
    return tmp_path


def set_best(run, step):
    checkpoints_directory(run).mkdir(exist_ok=True)
    write_best(run, BestRecord(step, "val/other", 1.0, "max"))


def test_the_last_value_is_of_the_last_row_that_has_it(run):
    assert read_metric(run, metric("val/score")) == 0.7
    assert read_metric(run, metric("train/loss")) == 1.0


def test_a_value_at_the_best_checkpoint(run):
    assert read_metric(run, metric("val/score", at="best")) is None
    set_best(run, 200)
    assert read_metric(run, metric("val/score", at="best")) == 0.9
    set_best(run, 150)
    assert read_metric(run, metric("val/score", at="best")) is None


def test_a_value_at_a_step(run):
    assert read_metric(run, metric("val/score", at=100)) == 0.5
    assert read_metric(run, metric("val/score", at=150)) is None


def test_a_step_is_that_after_so_many_updates_even_if_every_row_is_there(tmp_path):
    write_curves(tmp_path, {"val/score": {98: 0.1, 99: 0.2, 100: 0.3}})
    assert read_metric(tmp_path, metric("val/score", at=100)) == 0.2


def test_a_callback_that_counts_by_itself_is_found_too(tmp_path):
    write_curves(tmp_path, {"val/suspected": {100: 1.0}})
    assert read_metric(tmp_path, metric("val/suspected", at=100)) == 1.0


def test_what_is_not_there_is_none(run, tmp_path):
    for name in ("val/nothing", "test/score"):
        assert read_metric(run, metric(name)) is None
    assert read_metric(tmp_path / "never", metric("val/score")) is None
    assert read_curve(tmp_path / "never", "val/score") == {}


def test_nan_stays_nan(run):
    write_curves(run, {"val/score": {99: 0.5, 199: math.nan}})
    assert math.isnan(read_metric(run, metric("val/score")))


def test_a_curve_is_by_step(run):
    assert read_curve(run, "val/score") == SCORES
    assert list(read_curve(run, "train/loss")) == [9, 199, 309]


@pytest.mark.parametrize("cut", ["399,0,0.8", "399,0,0.8,", "399", "\x00\xff"])
def test_a_row_that_a_kill_has_cut_off_is_left_out(tmp_path, cut):
    write_curves(tmp_path, {"val/score": SCORES})
    file = tmp_path / "logs" / "metrics.csv"
    with file.open("ab") as log:
        log.write(cut.encode("latin-1"))
    assert read_metric(tmp_path, metric("val/score")) == 0.7


def test_rows_without_numbers_are_left_out(tmp_path):
    file = tmp_path / "logs" / "metrics.csv"
    file.parent.mkdir()
    file.write_text("step,epoch,val/score\n9,0,0.5\nx,0,0.6\n19,0,high\n29,0\nnan,0,0.7\n")
    assert read_curve(tmp_path, "val/score") == {9: 0.5}


@pytest.mark.parametrize("text", ["", "\n", "a,b\n1,2\n"])
def test_an_empty_log_has_nothing(tmp_path, text):
    file = tmp_path / "logs" / "metrics.csv"
    file.parent.mkdir()
    file.write_text(text)
    assert RunNumbers(tmp_path).names() == []


def test_a_test_is_read_from_its_result(run):
    write_result(run, {"fid": 12.5, "fid/past_77": math.nan})
    assert read_metric(run, metric("test/fid")) == 12.5
    assert math.isnan(read_metric(run, metric("test/fid/past_77")))
    assert read_metric(run, metric("test/score")) is None


def test_a_test_without_images_is_read_from_its_log(run):
    rows = [{"step": 0, "test/pair_accuracy": 0.6}, {"step": 0, "test/pair_accuracy": 0.8}]
    write_log(run / "logs" / "test" / "metrics.csv", rows)
    assert read_metric(run, metric("test/pair_accuracy")) == 0.8
    assert RunNumbers(run).protocol("test/pair_accuracy") is None


def test_a_test_that_was_repeated_is_read_from_its_last_row(run):
    values = {0: 0.6, 300: 0.7}
    rows = [{"step": step, "test/pair_accuracy": value} for step, value in values.items()]
    write_log(run / "logs" / "test" / "metrics.csv", rows)
    assert read_metric(run, metric("test/pair_accuracy")) == 0.7
    write_log(
        run / "logs" / "test" / "metrics.csv", [*rows, {**rows[0], "test/pair_accuracy": 0.9}]
    )
    assert read_metric(run, metric("test/pair_accuracy")) == 0.9


def test_training_and_test_are_apart(run):
    write_log(run / "logs" / "test" / "metrics.csv", [{"step": 0, "val/score": 0.1}])
    write_result(run, {"val/score": 0.2})
    assert read_metric(run, metric("val/score")) == 0.7


def test_a_protocol_is_all_that_a_number_depends_on(run):
    write_result(run, {"fid": 12.5}, extractor="tiny")
    protocol = RunNumbers(run).protocol("test/fid")
    assert protocol == {
        "prompts": "abc",
        "num_captions": 4,
        "images_per_caption": 1,
        "fid": {"metric": "frechet", "extractor": "tiny"},
    }
    assert RunNumbers(run).protocol("val/score") is None


def test_names_are_all_that_can_be_asked_for(run):
    write_result(run, {"fid": 12.5})
    write_log(run / "logs" / "test" / "metrics.csv", [{"step": 0, "test/loss": 1.0, "other": 2}])
    names = RunNumbers(run).names()
    assert set(names) == {"train/loss", "val/score", "test/fid", "test/loss"}
    assert all(read_metric(run, metric(name)) is not None for name in names)


def test_a_damaged_result_is_one_line_and_training_is_read_all_the_same(run):
    write_result(run, {"fid": 1.0}).write_text('{"format": 1')
    with pytest.raises(DataError, match=r"result\.json") as caught:
        read_metric(run, metric("test/fid"))
    assert "\n" not in str(caught.value)
    assert read_metric(run, metric("val/score")) == 0.7
    assert RunNumbers(run).protocol("val/score") is None
