"""The YAML of a study, and what its mistakes are answered with."""

import math
import subprocess
import sys
from pathlib import Path

import pytest

from segalign.errors import ConfigError
from segalign.launch.gpu_hours import slurm_hours
from segalign.launch.study import Arm, MetricSpec, Range, SearchSettings
from segalign.launch.study_file import load_study
from segalign.launch.yaml_dialect import dump_line, read_yaml

DRTUNE = "{class_path: x.DRTune, init_args: {k: %d}}"
OMEGA = "model.init_args.reward.init_args.omega"


@pytest.fixture
def load(tmp_path):
    """Read a study of some text; its base is there."""
    base = tmp_path / "base.yaml"
    base.write_text("{}")

    def read(text, **options):
        path = tmp_path / "reweight.yaml"
        path.write_text(f"base: {base}\n{text}")
        return load_study(path, **options)

    return read


@pytest.fixture
def refused(load):
    def read(text, **options):
        with pytest.raises(ConfigError) as caught:
            load(text, **options)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    return read


def test_a_study_of_seeds_alone(load, tmp_path):
    study = load("")
    assert (study.name, study.seeds, study.stages) == ("reweight", (0,), ("fit",))
    assert study.base == (tmp_path / "base.yaml",)
    assert [arm.name for arm in study.arms] == ["base"]
    assert study.folder == Path.cwd() / "runs/sweeps/reweight"
    assert study.runs_folder == Path.cwd() / "runs/sweeps/runs"
    assert study.slurm is None


def test_everything_at_once(load, tmp_path):
    layer = tmp_path / "layer.yaml"
    layer.write_text("{}")
    study = load(f"""
name: other
settings: {{trainer.max_steps: 40}}
arms:
  plain:
  drtune: {{configs: [{layer}], model.init_args.k: 3}}
grid: {{{OMEGA}: [0.0, 0.3]}}
zip: [{{model.init_args.lr: [1e-4, 3e-5], trainer.val_check_interval: [5, 10]}}]
seeds: [0, 1, 2]
exclude: [{{omega: 0.0, arm: plain}}]
stages: [fit, test]
test: {{configs: [{layer}], settings: {{trainer.limit_test_batches: 2}}, checkpoint: best}}
metrics: [val/loss, {{name: test/fid, label: FID, mode: min}}, {{name: val/x, at: 40}}]
base_arm: plain, omega=0.3, lr+val_check_interval=0.0001/5
slurm: {{time: 24:00:00, gpus_per_node: 8, signal: USR2}}
budget: {{max_gpu_hours: 4000}}
plots: {{curves: [val/loss], pareto: [[val/loss, test/fid]]}}
report: {{prompts: 4}}
folder: somewhere
""")
    assert study.arms == (
        Arm(name="plain"),
        Arm(name="drtune", configs=(layer,), settings={"model.init_args.k": 3}),
    )
    assert [axis.label for axis in study.axes] == ["omega", "lr+val_check_interval"]
    assert [level.label for level in study.axes[1].levels] == ["0.0001/5", "3e-05/10"]
    assert study.axes[1].levels[1].settings["model.init_args.lr"] == 3e-5
    assert study.metrics == (
        MetricSpec(name="val/loss", label="val/loss", mode="min"),
        MetricSpec(name="test/fid", label="FID", mode="min"),
        MetricSpec(name="val/x", label="val/x", at=40),
    )
    assert study.test.checkpoint == "best"
    assert study.test.configs == (layer,)
    assert study.slurm.time == "24:00:00"
    assert study.slurm.signal == "USR2"
    assert study.max_gpu_hours == 4000.0
    assert [list(pair) for pair in study.plots.pareto] == [["val/loss", "test/fid"]]
    assert (study.report.prompts, study.report.images_of_each) == (4, 1)
    assert study.folder == Path.cwd() / "somewhere"


def test_the_command_line_replaces_base_and_folder(load, tmp_path):
    other = tmp_path / "other.yaml"
    other.write_text("{}")
    study = load("folder: a", base=[other], folder=tmp_path / "b")
    assert (study.base, study.folder) == ((other,), tmp_path / "b")


def test_folders_stay_where_they_are_seen_from_another_directory(load, tmp_path, monkeypatch):
    # A link stays a link: what it points to may move.
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    monkeypatch.chdir(tmp_path)
    study = load("folder: link/a\nruns_folder: link/r")
    assert (study.folder, study.runs_folder) == (tmp_path / "link/a", tmp_path / "link/r")
    assert load("", folder=Path("b")).folder == tmp_path / "b"


def axis_of(load, text):
    (axis,) = load(text).axes
    return axis.label, [level.label for level in axis.levels]


@pytest.mark.parametrize(
    ("text", "label", "levels"),
    [
        (f"grid: {{{OMEGA}: [0.0, 0.30, 1]}}", "omega", ["0", "0.3", "1"]),
        (f"grid: {{{OMEGA}: [1e-5, 1.0e-4]}}", "omega", ["1e-05", "0.0001"]),
        (f"grid: {{{OMEGA}: [0.12345678, 0.12345679]}}", "omega", ["0.12345678", "0.12345679"]),
        (f"grid: {{{OMEGA}: {{none: 0.0, all: 1.0}}}}", "omega", ["none", "all"]),
        ("grid: {a.flag: [true, false, null]}", "flag", ["true", "false", "null"]),
        ("grid: {a.b.class_path: [x.y.One, x.z.Two]}", "b", ["One", "Two"]),
        ("grid: {a.b.class_path: [x.One, y.One]}", "b", ["x.One", "y.One"]),
        ("grid: {a.s: [{class_path: x.y.One}, {class_path: x.Two}]}", "s", ["One", "Two"]),
        (f"grid: {{a.s: [{DRTUNE % 1}, {DRTUNE % 3}]}}", "s", ["DRTune(k=1)", "DRTune(k=3)"]),
        ("grid: {a.betas: [[0.9, 0.99], [0.5, 0.9]]}", "betas", ["[0.9,0.99]", "[0.5,0.9]"]),
        ("grid: {data.init_args.seed: [1, 2]}", "data.seed", ["1", "2"]),
        ("zip: [{a.x: {small: 1, large: 2}, a.y: [3, 4]}]", "x+y", ["small", "large"]),
    ],
)
def test_axes_and_levels_have_short_labels(load, text, label, levels):
    assert axis_of(load, text) == (label, levels)


def test_labels_that_collide_take_more_of_their_keys(load):
    study = load("grid: {a.init_args.lr: [1, 2], b.init_args.lr: [1, 2], c.x: [1]}")
    assert [axis.label for axis in study.axes] == ["a.lr", "b.lr", "x"]


def test_ranges_are_for_a_searcher(load, refused):
    text = "grid: {a.lr: {low: 1e-5, high: 1e-3, log: true}, a.k: {low: 1, high: 9}}"
    study = load(f"search: optuna\n{text}")
    assert [axis.range for axis in study.axes] == [
        Range(low=1e-5, high=1e-3, log=True),
        Range(low=1, high=9, is_integer=True),
    ]
    assert study.search == SearchSettings()
    assert "axis `lr`; got a range; add `search: optuna`" in refused(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gird: {}", "got `gird`; did you mean `grid`?"),
        ("a: [1\nb: 2", "reweight.yaml`, line"),
        ("seeds: [0]\nseeds: [1]", "line 3; got: the key `seeds` is there twice"),
        ("arms: {a: {}, a: {x.y: 1}}", "the key `a` is there twice"),
        ("name: a/b", "`name`; got `a/b`"),
        ("settings: [1]", "`settings`; got `[1]`"),
        ("settings: {run_dir: x}", "got `run_dir`; each run gets its own"),
        ("settings: {seed_everything: 1}", "list seeds under `seeds`"),
        ("settings: {trainer..max_steps: 1}", "got `trainer..max_steps`"),
        ("arms: {}", "`arms`; got none"),
        ("arms: {a: 3}", "arm `a`; got `3`"),
        ("arms: {true: {}}", "got `True`; quote it"),
        ("arms: {a: {config: x.yaml}}", "arm `a`; got `config`; layer files with `configs`"),
        ("arms: {a: {configs: [nowhere.yaml]}}", "arm `a`, `configs`; got `nowhere.yaml`"),
        (f"arms: {{a: {{{OMEGA}: 1}}}}\ngrid: {{{OMEGA}: [0, 1]}}", "arm `a`; got `model.init"),
        ("grid: {}", "`grid`; got nothing"),
        ("grid: {a.x: []}", "`grid`, axis `a.x`; got nothing"),
        ("grid: {a.x: {on: 1}}", "axis `a.x`; got `True`; quote it"),
        ("grid: {a.x: 3}", "axis `a.x`; got `3`"),
        ("grid: {a.x: [1, 1]}", "axis `a.x`; got `1` twice"),
        ("grid: {a.x: {class_path: b.C, init_args: {}}}", "axis `a.x`; got one class"),
        ("grid: {a.x: [1, 2]}\nzip: [{a.x: [1, 2]}]", "got `a.x` twice"),
        ("zip: [{a.x: [1, 2], a.y: [1]}]", "axis `x+y`; got 2 of `a.x`, 1 of `a.y`"),
        ("zip: []", "`zip`; got nothing"),
        ("zip: [{}]", "keys in each group in"),
        ("search: optuna\ngrid: {a.x: {low: 2, high: 1}}", "axis `a.x`; got 2 and 1"),
        ("search: optuna\ngrid: {a.x: {low: 0, high: 1, log: true}}", "above 0 where `log`"),
        ("search: optuna\ngrid: {a.x: {low: 0, hihg: 1, high: 1}}", "did you mean `high`?"),
        ("search: opttuna", "`search`; "),
        ("search: {trials: 0}", "`trials` of at least 1"),
        ("seeds: []", "`seeds`; got nothing"),
        ("seeds: 3", "a list such as `[0, 1, 2]`"),
        ("seeds: [0, 1, 0]", "got 0 twice"),
        ("seeds: [0, -1]", "got `-1`"),
        ("seeds: [0, true]", "got `True`"),
        ("seeds: [0.5]", "got `0.5`"),
        ("exclude: [{}]", "an empty one would match all runs"),
        ("exclude: [{sed: 0}]", "entry 1 of `exclude`; got `sed`; did you mean `seed`?"),
        ("seeds: [0, 1]\nexclude: [{seed: 2}]", "of `seed` in"),
        ("seeds: [0, 1]\nexclude: [{seed: [0, 2]}]", "got `2`; known: 0, 1"),
        ("arms: {a: {}, b: {}}\nexclude: [{arm: c}]", "got `c`; known: a, b"),
        (
            "arms: {a: {}, b: {}}\nseeds: [0, 1]\nexclude: [{arm: a, seed: 0}, {seed: 0, arm: a}]",
            "entry 2 of `exclude`; got `{'seed': 0, 'arm': 'a'}`",
        ),
        ("seeds: [0, 1]\nexclude: [{seed: [0, 1]}]", "runs that are left in"),
        (
            "arms: {a: {}, b: {}}\nexclude: [{arm: a}, {seed: 0, arm: a}]",
            "entry 2 of `exclude`; got `a`",
        ),
        (f"grid: {{{OMEGA}: [0, 1]}}\nexclude: [{{omega: 0.5}}]", "got `0.5`; known: 0, 1"),
        ("arms: {a: {}, b: {}}\nbase_arm: aa", "got `aa`; did you mean `a`?"),
        ("arms: {one: {}, two: {}}\nbase_arm: xyz", "known: one, two"),
        ("stages: [test]", "`stages`; got `['test']`"),
        ("test: {checkpoint: best}", "the stage `test`, because `test:` says how"),
        ("stages: [fit, test]\ntest: {checkpoint: worst}", "`test`; "),
        ("stages: [fit, test]\ntest: {setings: {}}", "did you mean `settings`?"),
        ("metrics: [loss]", "`metrics`; got `loss`"),
        ("metrics: [test/fid]", "write `stages: [fit, test]`"),
        ("metrics: [{label: x}]", "add `name`"),
        ("metrics: [{name: val/x, mode: low}]", "`val/x`; "),
        ("metrics: [{name: val/x, at: first}]", "`val/x`; "),
        (
            "metrics: [val/x, {name: val/x, at: best, label: y}]",
            "each metric once in `",
        ),
        ("metrics: [val/x, val/x]", "`metrics`; got `val/x` twice; remove"),
        ("slurm: {gpus: 8}", "did you mean `gpus_per_node`?"),
        ("slurm: {nodes: many}", "`nodes`: expected an integer (int); got many"),
        ("search: {prune: 2}", "`prune`: expected true or false (bool); got 2"),
        ("plots: {curves: 3}", "`curves`: expected a list; got 3"),
        ("grid: {vars.a: {low: 0.1}}", "axis `vars.a`; got no `high`; write both"),
        ("grid: {vars.a: {high: 2, log: true}}", "axis `vars.a`; got no `low`; write both"),
        ("grid: {vars.a: {low: 0.1, hihg: 1}}", "`vars.a`; got `hihg`; did you mean `high`?"),
        ("grid: {vars.a: {low: 0.1, high: 1, logg: true}}", "got `logg`; did you mean `log`?"),
        ("slurm: {nodes: 0}", "`nodes` of at least 1 in"),
        ("slurm: {time: tomorrow}", "`slurm`; got `tomorrow`"),
        ("budget: {max_gpu_hours: 1}", "`slurm` with `time` and `gpus_per_node`"),
        ("slurm: {gpus_per_node: 1}\nbudget: {max_gpu_hours: x}", "got `x`"),
        ("budget: {hours: 1}", "got `hours`"),
        ("plots: {pareto: [[val/a]]}", "`plots`; "),
        ("plots: {pareto: [[val/a, val/b]]}", "`plots`; got `val/a`; list it under `metrics`"),
        (
            "metrics: [val/aa, val/bb]\nplots: {pareto: [[val/aa, val/bbb]]}",
            "`plots`; got `val/bbb`; did you mean `val/bb`?",
        ),
        ("report: {images_of_each: 0}", "`images_of_each` from 1"),
        ("folder: 3", "`folder`; got `3`"),
    ],
)
def test_a_mistake_is_one_line_with_its_place(refused, text, message):
    line = refused(text)
    assert message in line
    assert "reweight.yaml`" in line


def test_a_study_that_is_not_there(tmp_path):
    with pytest.raises(ConfigError, match=r"the file of a study at `.*none.yaml`; got: No such"):
        load_study(tmp_path / "none.yaml")


def test_a_base_is_needed(tmp_path):
    path = tmp_path / "study.yaml"
    path.write_text("seeds: [0]")
    with pytest.raises(ConfigError, match="`base`, the configs of all runs"):
        load_study(path)
    with pytest.raises(ConfigError, match=r"`--base`; got `nowhere.yaml`"):
        load_study(path, base=[Path("nowhere.yaml")])


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-4", 1e-4), ("1.0e-4", 1e-4), ("1e5", 1e5), ("0.1", 0.1), ("3", 3), ("-3", -3),
     ("yes", True), ("null", None), ("~", None), (".inf", math.inf), ("1_000", 1000),
     ("0x10", 16), ("08:00:00", "08:00:00"), ("24:00:00", "24:00:00"), ("'12'", "12"),
     ("2020-01-01", "2020-01-01"), ("[1e-4, a]", [1e-4, "a"])],
)  # fmt: skip
def test_scalars_mean_what_they_mean_in_configs(tmp_path, text, value):
    path = tmp_path / "a.yaml"
    path.write_text(f"k: {text}")
    found = read_yaml(path, "a file")["k"]
    assert (found, type(found)) == (value, type(value))


def test_text_that_looks_like_something_else_is_quoted(tmp_path):
    texts = ["null", "1e-4", "yes", "12", "24:00:00", "{x: 1}", "#c", "", " a ", "a\nb"]
    line = dump_line({"k": texts})
    assert "\n" not in line
    assert "'1e-4'" in line
    (tmp_path / "a.yaml").write_text(line)
    assert read_yaml(tmp_path / "a.yaml", "a file") == {"k": texts}


@pytest.mark.parametrize(
    ("text", "hours"),
    [("30", 0.5), ("30:30", 30.5 / 60), ("08:00:00", 8), ("2-0", 48), ("1-12:30", 36.5),
     ("1-12:30:36", 36.51), ("UNLIMITED", math.inf), ("soon", None), ("", None)],
)  # fmt: skip
def test_time_limits_are_read_as_sbatch_reads_them(text, hours):
    assert slurm_hours(text) == (None if hours is None else pytest.approx(hours))


def test_reading_a_study_imports_no_torch(repository):
    code = (
        "import sys; import segalign.launch.study_file, segalign.launch.planning; "
        "import segalign.launch.plan_table; print('torch' in sys.modules, 'numpy' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=repository, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["False", "False"]


def test_levels_may_be_called_as_the_ends_of_a_range(load):
    loaded = load("grid: {vars.a: {low: {b: 1}, high_noise: {b: 2}}}")
    assert [level.label for level in loaded.axes[0].levels] == ["low", "high_noise"]
