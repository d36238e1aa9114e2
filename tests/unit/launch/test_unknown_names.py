"""Names that no run has logged are told in one line, where they are asked for and at the end."""

import pytest
from toy_results import metric, scored_study, seen

from segalign.errors import ConfigError
from segalign.launch import looking, showing
from segalign.launch.findings.unknown_names import unknown_curves, unknown_now
from segalign.launch.running.run_state import RunStatus
from segalign.launch.study import PlotSettings

SCORES = {"plain": [0.5, 0.6]}


def curves_study(folder, *names):
    return scored_study(folder, SCORES, plots=PlotSettings(curves=names))


def test_a_curve_that_nobody_has_logged_is_told(tmp_path):
    a_study, _, observed = curves_study(tmp_path, "val/score", "val/scroe", "test/score")
    lines = unknown_curves(a_study, observed)
    assert list(lines) == ["val/scroe", "test/score"]
    assert lines["val/scroe"].endswith(
        "no finished run has `val/scroe`: near it are `val/score`; correct `plots.curves`"
    )
    assert lines["test/score"].endswith("curves are of training: name `train/...` or `val/...`")


def test_no_curve_is_unknown_before_a_run_is_finished(tmp_path):
    a_study, _, observed = curves_study(tmp_path, "val/scroe")
    running = [seen(one.run, RunStatus.RUNNING) for one in observed]
    assert unknown_curves(a_study, running) == {}
    assert unknown_now(a_study, running) == []


@pytest.mark.parametrize("names", [["val/score", "val/scroe"], ["val/scroe"]])
@pytest.mark.parametrize("kind", ["plots", "page"])
def test_plot_and_report_end_with_the_unknown_curve(tmp_path, monkeypatch, kind, names):
    a_study, plan, observed = curves_study(tmp_path, *names)
    monkeypatch.setattr(showing, "look", lambda study: (plan, observed))
    write = {"plots": lambda: showing.write_plots(a_study, "png")}.get(
        kind, lambda: showing.write_page(a_study)
    )
    with pytest.raises(ConfigError, match="`val/scroe`: near it are `val/score`"):
        write()
    written = a_study.folder / ("plots/curves.png" if kind == "plots" else "report.html")
    assert written.exists() == (kind == "page" or "val/score" in names)


def test_status_tells_of_a_metric_that_no_finished_run_has(tmp_path, monkeypatch, capsys):
    metrics = (metric("val/score"), metric("val/scroe"), metric("val/scoer"))
    a_study, plan, observed = scored_study(tmp_path, SCORES, metrics=metrics)
    monkeypatch.setattr(looking, "look", lambda study: (plan, observed))
    looking.show_status(a_study)
    (line,) = (one for one in capsys.readouterr().out.splitlines() if one.startswith("note"))
    assert "no finished run has `val/scroe`" in line
    assert line.endswith("correct `metrics` (and 1 more)")
    running = [seen(one.run, RunStatus.RUNNING) for one in observed]
    monkeypatch.setattr(looking, "look", lambda study: (plan, running))
    looking.show_status(a_study)
    assert "note: " not in capsys.readouterr().out
