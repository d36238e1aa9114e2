import math

from segalign.evaluation.history import History


def test_steps_are_read_in_order(tmp_path):
    history = History(tmp_path / "sub" / "history.jsonl")
    assert history.read() == {}
    history.write(0, {"fid": 3.0})
    history.write(20, {"fid": 2.0, "kid": 0.5})
    assert history.read() == {0: {"fid": 3.0}, 20: {"fid": 2.0, "kid": 0.5}}


def test_going_back_forgets_what_came_later(tmp_path):
    history = History(tmp_path / "history.jsonl")
    for step in (0, 10, 20):
        history.write(step, {"fid": float(step)})
    history.write(10, {"fid": 7.0})
    assert history.read() == {0: {"fid": 0.0}, 10: {"fid": 7.0}}


def test_values_that_are_not_finite_stay_so(tmp_path):
    history = History(tmp_path / "history.jsonl")
    history.write(1, {"fid": math.inf})
    assert "Infinity" not in history.path.read_text()
    assert math.isnan(history.read()[1]["fid"])


def test_foreign_lines_are_passed_over(tmp_path):
    path = tmp_path / "history.jsonl"
    path.write_text('{"step": 1, "values": {"fid": 1}}\nnonsense\n{"step": "x"}\n[]\n')
    assert History(path).read() == {1: {"fid": 1}}
