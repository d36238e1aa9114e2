"""Pictures of a study: what is in them, and that any study can be drawn."""

import io
import itertools
import math
import random
from dataclasses import replace

import pytest
from PIL import Image
from toy_results import metric, planned, scored_study, seen, study, write_curves

from segalign.errors import ConfigError
from segalign.launch.findings.ablation_numbers import make_table
from segalign.launch.findings.curve_plots import mean_curve
from segalign.launch.findings.main_effects import main_effect
from segalign.launch.findings.pareto_plots import pareto_front, pareto_points
from segalign.launch.findings.study_plots import draw_study
from segalign.launch.findings.variant_styles import plot_text, spread, variant_styles
from segalign.launch.plan import Plan
from segalign.launch.running.run_state import RunStatus
from segalign.launch.study import Arm, Axis, Level, PlotSettings, Range

SCORE, LOSS = "val/score", "val/loss"
LEVELS = ("0.0", "0.3", "1.0")


def effect_of(arm, level, seed):
    """Score without noise: arms, levels and seeds add up."""
    return {"plain": 0.5, "drtune": 0.6}[arm] + 0.1 * float(level) + 0.01 * seed


def grid_study(folder, arms=("plain", "drtune"), missing=(), **options):
    """Make a study of arms by omega by two seeds, with two metrics."""
    runs, observed = [], []
    for arm, level, seed in itertools.product(arms, LEVELS, (0, 1)):
        run = planned(folder, f"{arm}, omega={level}", seed, {"omega": level})
        run = replace(run, arm=arm)
        runs.append(run)
        if (arm, level, seed) in missing:
            continue
        value = effect_of(arm, level, seed)
        curve = {step: value * step / 29 for step in (9, 19, 29)}
        write_curves(run.directory, {SCORE: curve, LOSS: {29: 1 - value}})
        observed.append(seen(run))
    levels = [Level(label=level, settings={}) for level in LEVELS]
    a_study = study(
        folder,
        arms=[Arm(name=arm) for arm in arms],
        axes=[Axis(label="omega", keys=["model.omega"], levels=levels)],
        metrics=(metric(SCORE), metric(LOSS, mode="min")),
        plots=PlotSettings(pareto=[(SCORE, LOSS)]),
        **options,
    )
    plan = Plan(study="toy", base_label=runs[0].label, runs=runs)
    return a_study, plan, observed


def drawn(a_study, plan, observed):
    table = make_table(a_study, plan, observed)
    return draw_study(a_study, plan, table, observed)


def texts(figure):
    return [text.get_text() for text in figure.findobj(lambda one: hasattr(one, "get_text"))]


def test_a_study_with_a_grid_has_all_pictures(tmp_path):
    plots = drawn(*grid_study(tmp_path))
    assert list(plots) == ["curves", "main_effects", "differences", "pareto-val_score-val_loss"]
    assert all(plot.stem == stem for stem, plot in plots.items())
    assert len({plot.alt for plot in plots.values()}) == 4
    assert [axes.get_title() for axes in plots["curves"].figure.axes] == [SCORE, LOSS]
    for stem in ("curves", "pareto-val_score-val_loss"):
        assert "1  plain, omega=0.0 (base)" in texts(plots[stem].figure)


def test_pictures_are_files_of_three_kinds_with_the_same_bytes(tmp_path):
    plots = drawn(*grid_study(tmp_path))
    for suffix, start in (("png", b"\x89PNG"), ("pdf", b"%PDF"), ("svg", b"<?xml")):
        contents = [plot.to_bytes(suffix) for plot in plots.values()]
        assert all(content.startswith(start) for content in contents)
        assert [plot.to_bytes(suffix) for plot in plots.values()] == contents
    picture = Image.open(io.BytesIO(plots["curves"].to_bytes()))
    assert picture.width > 500


def test_a_study_that_has_not_begun_has_no_pictures(tmp_path):
    a_study, plan, _ = grid_study(tmp_path, missing=set())
    empty = [replace(run, directory=tmp_path / "none" / run.run_id) for run in plan.runs]
    assert drawn(a_study, replace(plan, runs=empty), []) == {}


def test_curves_are_those_that_the_study_names(tmp_path):
    a_study, plan, observed = grid_study(tmp_path)
    named = replace(a_study, plots=PlotSettings(curves=[LOSS]))
    plots = drawn(named, plan, observed)
    assert [axes.get_title() for axes in plots["curves"].figure.axes] == [LOSS]
    assert not [stem for stem in plots if stem.startswith("pareto")]


def test_a_mean_curve_is_at_common_steps_with_its_interval():
    curves = [{1: 1.0, 2: 2.0, 3: 5.0}, {1: 2.0, 2: 4.0}, {1: 3.0, 2: math.nan, 3: 1.0}]
    assert list(mean_curve(curves)) == [1]
    found = mean_curve(curves)[1]
    assert (found.mean, found.num) == (2.0, 3)
    assert found.half == pytest.approx(4.302653 / math.sqrt(3))
    assert mean_curve([]) == {}


def test_a_run_that_is_not_finished_does_not_move_the_mean(tmp_path):
    a_study, plan, observed = scored_study(tmp_path, {"plain": [0.5, 0.6, 0.7, 0.1]})
    observed[3] = seen(observed[3].run, RunStatus.FAILED)
    (axes,) = drawn(a_study, plan, observed)["curves"].figure.axes
    ends = {round(float(line.get_ydata()[-1]), 6) for line in axes.lines}
    assert 0.6 in ends  # the mean of the three
    assert 0.1 in ends  # the fourth, by itself
    assert not ends & {0.5, 0.7}  # a band stands for them
    assert len(axes.collections) == 1


def test_two_seeds_are_thin_lines_without_a_band(tmp_path):
    a_study, plan, observed = scored_study(tmp_path, {"plain": [0.5, 0.7]})
    (axes,) = drawn(a_study, plan, observed)["curves"].figure.axes
    ends = [round(float(line.get_ydata()[-1]), 6) for line in axes.lines]
    assert {0.5, 0.6, 0.7} <= set(ends)
    assert not axes.collections


def test_a_main_effect_is_the_mean_over_all_else(tmp_path):
    a_study, plan, observed = grid_study(tmp_path)
    table = make_table(a_study, plan, observed)
    omega = main_effect(plan, table, SCORE, "omega")
    assert list(omega.levels) == list(LEVELS)
    for level, found in omega.levels.items():
        seeds = [0.55 + 0.1 * float(level) + 0.01 * seed for seed in (0, 1)]
        assert found.mean == pytest.approx(sum(seeds) / 2)
        assert found.num == 2
        assert found.half == pytest.approx(12.706205 * 0.01 / 2, rel=1e-6)
    arm = main_effect(plan, table, SCORE, "arm")
    means = {name: found.mean for name, found in arm.levels.items()}
    assert means["drtune"] - means["plain"] == pytest.approx(0.1)
    assert (arm.num_blocks, arm.num_left_out) == (3, 0)


def test_a_main_effect_compares_like_with_like_where_runs_are_missing(tmp_path):
    missing = {("drtune", "1.0", 0)}
    a_study, plan, observed = grid_study(tmp_path, missing=missing)
    table = make_table(a_study, plan, observed)
    arm = main_effect(plan, table, SCORE, "arm")
    means = {name: found.mean for name, found in arm.levels.items()}
    assert means["drtune"] - means["plain"] == pytest.approx(0.1)
    assert (arm.num_blocks, arm.num_left_out) == (2, 1)
    omega = main_effect(plan, table, SCORE, "omega")
    assert (omega.num_blocks, omega.num_left_out) == (1, 1)
    assert omega.levels["1.0"].mean == pytest.approx(0.605)


def test_a_level_that_has_no_run_yet_is_left_out_of_its_effect(tmp_path):
    missing = {(arm, "1.0", seed) for arm in ("plain", "drtune") for seed in (0, 1)}
    a_study, plan, observed = grid_study(tmp_path, missing=missing)
    effect = main_effect(plan, make_table(a_study, plan, observed), SCORE, "omega")
    assert list(effect.levels) == ["0.0", "0.3"]
    assert effect.num_blocks == 2


def test_an_axis_of_one_level_has_no_effect(tmp_path):
    a_study, plan, observed = scored_study(tmp_path, {"plain": [0.5, 0.7]})
    table = make_table(a_study, plan, observed)
    assert main_effect(plan, table, SCORE, "arm") is None


@pytest.mark.parametrize(
    ("modes", "front"),
    [
        (("max", "max"), ["b", "c"]),
        (("max", "min"), ["a", "c"]),
        (("min", "max"), ["a", "b"]),
        (("min", "min"), ["a"]),
    ],
)
def test_the_front_goes_by_the_modes(tmp_path, modes, front):
    means = {"a": (1.0, 1.0), "b": (2.0, 5.0), "c": (3.0, 3.0), "d": (2.5, 3.0)}
    runs = [planned(tmp_path, label, 0) for label in means]
    for run in runs:
        x, y = means[run.label]
        write_curves(run.directory, {SCORE: {9: x}, LOSS: {9: y}})
    pair = tuple(metric(name, mode=mode) for name, mode in zip((SCORE, LOSS), modes, strict=True))
    plan = Plan(study="toy", base_label="a", runs=runs)
    table = make_table(study(tmp_path, metrics=pair), plan, [seen(run) for run in runs])
    assert pareto_front(pareto_points(table, pair), pair) == front


def test_a_pair_that_is_no_metric_is_refused_in_one_line(tmp_path):
    a_study, plan, observed = grid_study(tmp_path)
    wrong = replace(a_study, plots=PlotSettings(pareto=[(SCORE, "test/fid")]))
    with pytest.raises(ConfigError, match=r"got `test/fid`; add it to `metrics`") as caught:
        drawn(wrong, plan, observed)
    assert "\n" not in str(caught.value)


def test_full_points_are_differences_whose_interval_excludes_zero(tmp_path):
    scores = {"plain": [0.5, 0.6], "sure": [0.7, 0.81], "unsure": [0.5, 0.9], "never": [None, None]}
    figure = drawn(*scored_study(tmp_path, scores))["differences"].figure
    points = [line for line in figure.axes[0].lines if line.get_marker() == "o"]
    assert [point.get_markerfacecolor() == "white" for point in points] == [False, True]
    assert "no number" in texts(figure)
    names = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert names == ["2  sure", "3  unsure", "4  never"]


def test_what_a_searcher_drew_is_drawn_over_its_range(tmp_path):
    runs = [planned(tmp_path, f"lr={lr}", 0, {"lr": lr}) for lr in ("0.001", "0.0001", "1e-05")]
    runs = [replace(run, arm="base") for run in runs]
    for score, run in enumerate(runs):
        write_curves(run.directory, {SCORE: {9: float(score)}})
    axis = Axis(label="lr", keys=["lr"], range=Range(low=1e-5, high=1e-3, log=True))
    a_study = study(tmp_path, axes=[axis])
    plan = Plan(study="toy", base_label=runs[0].label, runs=runs)
    plots = drawn(a_study, plan, [seen(run) for run in runs])
    (axes,) = plots["samples"].figure.axes
    assert axes.get_xscale() == "log"
    assert list(axes.lines[0].get_xdata()) == [1e-3, 1e-4, 1e-5]
    assert list(axes.lines[0].get_ydata()) == [0.0, 1.0, 2.0]
    assert "main_effects" not in plots


def test_many_variants_show_the_base_and_the_best(tmp_path):
    scores = {f"v{number:02}": [0.01 * number] for number in range(30)}
    a_study, plan, observed = scored_study(tmp_path, scores)
    table = make_table(a_study, plan, observed)
    assert list(variant_styles(table)) == ["v00", *(f"v{number}" for number in range(19, 30))]
    worse = replace(a_study, metrics=(metric(SCORE, mode="min"),))
    best = list(variant_styles(make_table(worse, plan, observed)))
    assert best == [f"v{number:02}" for number in range(12)]
    assert drawn(a_study, plan, observed)["curves"].to_bytes()


def test_styles_tell_twelve_variants_apart(tmp_path):
    scores = {f"v{number}": [0.1] for number in range(12)}
    styles = variant_styles(make_table(*scored_study(tmp_path, scores))).values()
    assert len({(style.colour, style.dash) for style in styles}) == 12
    assert [style.number for style in styles] == list(range(1, 13))
    assert [style.is_base for style in styles] == [True] + [False] * 11


@pytest.mark.parametrize(
    "label", ["_hidden", "$5 and $6", r"\frac{", "a $ b", r"$\frac{$", "x" * 150, " "]
)
def test_any_label_can_be_drawn(tmp_path, label, recwarn):
    a_study, plan, observed = scored_study(tmp_path, {"plain": [0.5, 0.6], label: [0.7, 0.8]})
    for plot in drawn(a_study, plan, observed).values():
        assert plot.to_bytes()
        assert any(plot_text(label).strip() in text for text in texts(plot.figure))
    assert [str(one.message) for one in recwarn] == []


def test_values_that_are_not_finite_can_be_drawn(tmp_path, recwarn):
    scores = {"plain": [math.nan, 0.6], "other": [math.inf, math.nan], "third": [0.5, 0.5]}
    plots = drawn(*scored_study(tmp_path, scores))
    assert [plot.to_bytes()[:4] for plot in plots.values()] == [b"\x89PNG"] * len(plots)
    assert [str(one.message) for one in recwarn] == []


def test_places_are_spread_and_keep_their_order():
    places = [0.5, 0.51, 0.1, 0.52, 1.2, -0.3]
    moved = spread(places, 0.05)
    order = sorted(range(6), key=places.__getitem__)
    ordered = [moved[index] for index in order]
    assert all(b - a >= 0.05 - 1e-12 for a, b in itertools.pairwise(ordered))
    assert min(moved) >= 0
    assert max(moved) <= 1
    assert moved[2] == pytest.approx(0.1)
    assert (moved[0], moved[1], moved[3]) == pytest.approx((0.46, 0.51, 0.56))
    assert spread([], 0.1) == []


def test_spread_places_stay_in_the_plot_whatever_they_are():
    draws = random.Random(0)
    for _ in range(50):
        moved = sorted(spread([draws.gauss(0.9, 0.2) for _ in range(12)], 0.045))
        assert all(b - a >= 0.045 - 1e-9 for a, b in itertools.pairwise(moved))
        assert moved[0] >= -1e-9
        assert moved[-1] <= 1 + 1e-9


def test_long_labels_are_broken_and_cut():
    text = plot_text("word " * 60)
    lines = text.split("\n")
    assert len(lines) == 3
    assert max(map(len, lines)) <= 38
    assert text.endswith("...")


@pytest.mark.parametrize(
    ("scores", "caption"),
    [
        ({"plain": [0.5], "other": [0.6]}, "single runs of each variant"),
        ({"plain": [0.5, 0.6], "other": [0.6]}, "mean of each variant; thin lines are single runs"),
        ({"plain": [0.5, 0.6, 0.7]}, "mean of each variant and its 95 % band over seeds"),
        (
            {"plain": [0.5, 0.6, 0.7], "other": [0.6]},
            "mean of each variant and its 95 % band over seeds; thin lines are single runs",
        ),
    ],
)
def test_captions_of_curves_speak_of_bands_where_there_are_some(tmp_path, scores, caption):
    plots = drawn(*scored_study(tmp_path, scores))
    assert plots["curves"].alt == f"{SCORE} over training: {caption}"
    (axes,) = plots["curves"].figure.axes
    assert bool(axes.collections) == ("band" in caption)
