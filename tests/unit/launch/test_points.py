"""Which runs a study has, in which order, and what they are called."""

from pathlib import Path

import pytest

from segalign.launch.command_lines import setting_layers, stage_arguments
from segalign.launch.points import expand, layer_settings
from segalign.launch.study_file import load_study


@pytest.fixture
def points(tmp_path):
    base = tmp_path / "base.yaml"
    base.write_text("{}")

    def read(text):
        (tmp_path / "study.yaml").write_text(f"base: {base}\n{text}")
        return expand(load_study(tmp_path / "study.yaml"))

    return read


def labels(points):
    return list(dict.fromkeys(point.label for point in points))


def test_arms_then_grid_then_zip_then_seeds(points):
    found = points("""
arms: {one: {}, two: {a.z: 9}}
grid: {a.x: [1, 2], a.y: [3, 4]}
zip: [{a.u: [5, 6], a.v: [7, 8]}]
seeds: [4, 2]
""")
    assert len(found) == 2 * 4 * 2 * 2
    assert [point.seed for point in found[:4]] == [4, 2, 4, 2]
    assert labels(found)[:3] == [
        "one, x=1, y=3, u+v=5/7",
        "one, x=1, y=3, u+v=6/8",
        "one, x=1, y=4, u+v=5/7",
    ]
    assert found[-1].label == "two, x=2, y=4, u+v=6/8"
    assert found[-1].settings == {"a.z": 9, "a.x": 2, "a.y": 4, "a.u": 6, "a.v": 8}
    assert found[-1].levels == {"x": "2", "y": "4", "u+v": "6/8"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", ["base"]),
        ("grid: {a.x: [1, 2]}", ["x=1", "x=2"]),
        ("arms: {only: {}}", ["only"]),
        ("arms: {only: {}}\ngrid: {a.x: [1]}", ["only, x=1"]),
        ("arms: {base: {}, other: {}}\ngrid: {a.x: [1]}", ["base, x=1", "other, x=1"]),
        ("search: optuna\ngrid: {a.x: {low: 1e-5, high: 1e-3}}", ["x=1e-05", "x=0.001"]),
        ("search: optuna\ngrid: {a.x: {low: 1, high: 9}}", ["x=1", "x=9"]),
    ],
)
def test_variants_are_called_by_what_they_are(points, text, expected):
    assert labels(points(text)) == expected


@pytest.mark.parametrize(
    ("entries", "left"),
    [
        ("[{omega: 0.0, arm: a}]", ["a 1 0", "a 1 1", "b 0 0", "b 0 1", "b 1 0", "b 1 1"]),
        ("[{omega: [0, 1], seed: 1}]", ["a 0 0", "a 1 0", "b 0 0", "b 1 0"]),
        ("[{arm: a}, {seed: 0}]", ["b 0 1", "b 1 1"]),
        ("[{x.omega: 1}, {x.k: 3, seed: 0}]", ["a 0 0", "a 0 1", "b 0 1"]),
        ("[{omega: '0', seed: [0, 1]}, {arm: [a], seed: 1}]", ["a 1 0", "b 1 0", "b 1 1"]),
    ],
)
def test_runs_that_meet_all_conditions_of_an_entry_are_left_out(points, entries, left):
    found = points(f"""
arms: {{a: {{}}, b: {{x.k: 3}}}}
grid: {{x.omega: [0.0, 1.0]}}
seeds: [0, 1]
exclude: {entries}
""")
    assert [f"{p.arm} {p.levels['omega']} {p.seed}" for p in found] == left


def test_true_is_not_one(points):
    found = points("arms: {a: {x.k: 1}, b: {x.k: true}}\nexclude: [{x.k: true}]")
    assert labels(found) == ["a"]


def test_named_levels_are_excluded_by_name(points):
    found = points("grid: {x.k: {low: {a: 1}, high: {a: 2}}}".replace("low", "lo"))
    assert labels(found) == ["k=lo", "k=high"]
    found = points("grid: {x.k: {lo: {a: 1}, high: {a: 2}}}\nexclude: [{k: lo}]")
    assert labels(found) == ["k=high"]


def test_later_settings_win_and_come_last():
    assert list(layer_settings({"a": 1, "b": 2}, {"a": 3}).items()) == [("b", 2), ("a", 3)]


def test_settings_that_overlap_are_layered():
    assert setting_layers({"a.b": 1, "a.c": {"d": 2}, "e": "null"}) == [
        "{a: {b: 1, c: {d: 2}}, e: 'null'}"
    ]
    assert setting_layers({"a.b": {"c": 1, "d": 1}, "a.b.c": 2, "a.bc": 1}) == [
        "{a: {b: {c: 1, d: 1}}}",
        "{a: {b: {c: 2}, bc: 1}}",
    ]


def test_test_is_layered_over_the_run(tmp_path, points):
    layer = tmp_path / "layer.yaml"
    layer.write_text("{}")
    test = f"test: {{configs: {layer}, settings: {{a.x: 2}}}}"
    (point,) = points(f"settings: {{a.x: 1}}\nstages: [fit, test]\n{test}")
    study = load_study(tmp_path / "study.yaml")
    fit, test = (stage_arguments(study, point, stage) for stage in ("fit", "test"))
    base = f"--config={tmp_path / 'base.yaml'}"
    ends = ["--seed_everything=0", "--run_dir=__run_dir__"]
    assert fit == [base, "--config={a: {x: 1}}", *ends]
    assert test == [
        base,
        "--config={a: {x: 1}}",
        f"--config={layer}",
        "--config={a: {x: 2}}",
        *ends,
    ]


def test_configs_of_an_arm_come_after_the_base(tmp_path, points):
    layer = tmp_path / "layer.yaml"
    layer.write_text("{}")
    (point,) = points(f"arms: {{a: {{configs: {layer}}}}}")
    assert point.configs == (tmp_path / "base.yaml", Path(layer))
