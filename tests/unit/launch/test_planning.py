"""Plans: every config through the parser of runs, ids, budget, and what run directories get."""

import dataclasses
import json
import os
import re
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest
import yaml

import main
from segalign.errors import ConfigError
from segalign.launch.command_lines import put_run_dir
from segalign.launch.forked_map import forked_map
from segalign.launch.plan import Plan, unique_runs
from segalign.launch.plan_table import plan_rows
from segalign.launch.planning import digest_configs, plan_is_stale, plan_study, prepare_run
from segalign.launch.points import RunPoint
from segalign.launch.running.recorded_config import check_recorded
from segalign.launch.running.run_folder import config_file, sweep_folder
from segalign.launch.running.run_spec import check_spec
from segalign.launch.running.run_state import RunState, RunStatus, write_state
from segalign.launch.study_file import load_study

WIDTH = "model.init_args.width"
MONITORED = "settings: {checkpoint.monitor: val/loss}\n"


@pytest.fixture(scope="module")
def resolve():
    return main.resolve_configs(["toy_house"])


@pytest.fixture
def study(toy_config, tmp_path):
    """Read a study over the toy config."""

    def read(text="", name="toy"):
        path = tmp_path / f"{name}.yaml"
        folders = f"folder: {tmp_path}/sweep\nruns_folder: {tmp_path}/runs"
        path.write_text(f"base: {toy_config}\n{folders}\n{text}")
        return load_study(path)

    return read


@pytest.fixture
def plan(study, resolve):
    def make(text="", **options):
        return plan_study(study(text), resolve, **options)

    return make


def ids(planned):
    return [run.run_id for run in planned.plan.runs]


GRID = f"grid: {{{WIDTH}: [4, 6]}}\nseeds: [0, 1]\n"


def test_a_plan_has_all_runs_with_their_configs(plan, tmp_path):
    planned = plan(f"{GRID}{MONITORED}stages: [fit, test]\ntest: {{checkpoint: best}}")
    assert [run.label for run in planned.plan.runs] == ["width=4"] * 2 + ["width=6"] * 2
    assert planned.plan.base_label == "width=4"
    assert len(set(ids(planned))) == 4
    for run in planned.plan.runs:
        assert re.fullmatch("[0-9a-f]{12}", run.run_id)
        assert run.directory == tmp_path / "runs" / run.run_id
        fit, test = planned.configs[run.run_id]["fit"], planned.configs[run.run_id]["test"]
        assert fit["run_dir"] == test["run_dir"] == str(run.directory)
        assert fit["seed_everything"] == fit["data"]["init_args"]["seed"] == run.seed
        assert str(fit["model"]["init_args"]["width"]) == run.levels["width"]
        assert (fit["ckpt_path"], test["ckpt_path"]) == ("auto", "best")
    assert planned.summary() == "4 runs: 2 variants, 2 seeds; 0 done already"


def test_settings_of_the_test_are_of_the_test_alone(plan):
    planned = plan("stages: [fit, test]\ntest: {settings: {trainer.limit_test_batches: 1}}")
    (configs,) = planned.configs.values()
    assert configs["fit"]["trainer"]["limit_test_batches"] is None
    assert configs["test"]["trainer"]["limit_test_batches"] == 1


def test_ids_are_of_configs_alone(plan, tmp_path, toy_config, monkeypatch):
    settings = "settings: {vars.a: 1, vars.b: 2, trainer.max_steps: 7}"
    expected = ids(plan(settings))
    assert ids(plan("settings: {trainer.max_steps: 7, vars.b: 2, vars.a: 1}")) == expected
    assert ids(plan("arms: {x: {trainer.max_steps: 7, vars.a: 1, vars.b: 2}}")) == expected
    layer = tmp_path / "layer.yaml"
    layer.write_text("vars: {b: 2, a: 1}\ntrainer: {max_steps: 7}\nrun_dir: elsewhere")
    assert ids(plan(f"arms: {{x: {{configs: {layer}}}}}")) == expected
    assert ids(plan(f"{settings}\nslurm: {{nodes: 2}}\nname: other")) == expected
    assert ids(plan(f"{settings}\narms: {{x: {{preemption.signal: USR1}}}}")) == expected
    monkeypatch.chdir(tmp_path)
    assert ids(plan(settings)) == expected


@pytest.mark.parametrize(
    "text",
    ["settings: {trainer.max_steps: 13}", "seeds: [1]", "stages: [fit, test]",
     "arms: {x: {vars.more: 1}}"],
)  # fmt: skip
def test_other_configs_have_other_ids(plan, text):
    assert ids(plan(text)) != ids(plan())


def test_what_is_tested_is_part_of_the_id(plan):
    text = f"{MONITORED}stages: [fit, test]\ntest: {{checkpoint: %s}}"
    assert ids(plan(text % "best")) != ids(plan(text % "auto"))


def test_a_best_checkpoint_must_be_kept(plan):
    with pytest.raises(ConfigError, match=r"expected `checkpoint\.monitor`"):
        plan("stages: [fit, test]\ntest: {checkpoint: best}")


def test_the_run_directory_is_no_part_of_the_id(study, resolve):
    one = study()
    other = dataclasses.replace(one, runs_folder=Path("elsewhere"))
    first, second = plan_study(one, resolve), plan_study(other, resolve)
    assert ids(first) == ids(second)
    assert second.plan.runs[0].directory == Path("elsewhere") / ids(first)[0]


def test_a_plan_holds_from_any_directory(toy_config, tmp_path, resolve, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "toy.yaml"
    file.write_text(f"base: {toy_config}\nfolder: sweep\nruns_folder: runs\n")
    planned = plan_study(load_study(file), resolve)
    planned.plan.save(load_study(file).folder)
    monkeypatch.chdir("/")
    [run] = Plan.load(tmp_path / "sweep").runs
    assert run.directory == tmp_path / "runs" / run.run_id


def test_a_directory_inside_the_config_follows(study, resolve):
    planned = plan_study(study("settings: {data.init_args.root: '${run_dir}/data'}"), resolve)
    run = planned.plan.runs[0]
    root = planned.configs[run.run_id]["fit"]["data"]["init_args"]["root"]
    assert root == f"{run.directory}/data"
    assert put_run_dir([{"a": "__run_dir__/x"}, 3], "R") == [{"a": "R/x"}, 3]


def test_variants_that_coincide_share_a_directory(plan):
    planned = plan(f"arms: {{a: {{}}, b: {{{WIDTH}: 6}}}}")
    assert len(planned.plan.runs) == 2
    assert len(unique_runs(planned.plan.runs)) == len(planned.configs) == 1
    assert "1 run: 2 variants, 1 seed; 0 done already; 1 more coincide" in planned.summary()


def test_every_bad_arm_is_named_with_its_reason(plan):
    with pytest.raises(ConfigError) as caught:
        plan(f"""
arms:
  good: {{}}
  misspelt: {{model.init_args.widht: 3}}
  top: {{trainer.max_stepz: 3}}
  kind: {{{WIDTH}: many}}
  none: {{model.class_path: toy_house.Nope}}
seeds: [0, 1]
stages: [fit, test]
""")
    line = str(caught.value)
    assert "\n" not in line
    assert line.startswith("expected configs that fit; `misspelt`: `model`: Option 'widht' is not")
    assert "did you mean `width`?" in line
    assert re.search(r"`top`: .*'trainer.max_stepz'; did you mean `trainer.max_steps`\?", line)
    assert "`kind`: `model`: `width`: expected an integer above 0; got 'many'" in line
    assert re.search(r"`none`: .*toy_house.Nope", line)
    assert "good" not in line
    assert "(see" not in line


def test_one_reason_is_said_once(plan):
    with pytest.raises(ConfigError) as caught:
        plan("settings: {vars.b: '${vars.nope}'}\n" + GRID)
    assert "`width=4` and 1 more: expected `nope` to exist" in str(caught.value)
    assert str(caught.value).count("refers to it") == 1


def test_reasons_are_limited(plan):
    arms = ", ".join(f"a{k}: {{{WIDTH}: bad{k}}}" for k in range(7))
    with pytest.raises(ConfigError, match=r"`a3`: .*; and 3 more$") as caught:
        plan(f"arms: {{{arms}}}")
    assert "bad4" not in str(caught.value)


SLURM = 'slurm: {time: "02:30:00", nodes: 2, gpus_per_node: 4}\n'


def test_the_budget_is_of_runs_that_are_left(plan):
    planned = plan(GRID + SLURM)
    assert planned.gpu_hours == 4 * 2.5 * 8
    assert planned.summary().endswith("0 done already; at most 80 GPU-hours for the rest")
    for status, run in zip(["done", "pruned", "failed"], planned.plan.runs, strict=False):
        sweep_folder(run.directory).mkdir(parents=True)
        write_state(run.directory, RunState(status=RunStatus(status)))
    later = plan(f"{GRID}{SLURM}budget: {{max_gpu_hours: 40}}")
    assert later.gpu_hours == 40.0
    assert later.finished == set(ids(later)[:2])
    with pytest.raises(ConfigError, match=r"at most 39.9 GPU-hours .*; 2 runs .* may take 40\."):
        plan(f"{GRID}{SLURM}budget: {{max_gpu_hours: 39.9}}")


def test_a_searcher_makes_so_many_runs(plan):
    planned = plan(f"search: {{trials: 5}}\n{SLURM}grid: {{vars.lr: {{low: 1e-5, high: 1e-3}}}}")
    assert planned.gpu_hours == 5 * 20
    assert [run.levels for run in planned.plan.runs] == [{"lr": "1e-05"}, {"lr": "0.001"}]


def test_points_may_come_from_elsewhere(study, resolve):
    one = study("search: optuna\ngrid: {vars.lr: {low: 1e-5, high: 1e-3}}")
    point = RunPoint(
        label="trial 3", arm="base", levels={}, seed=0, configs=tuple(one.base),
        settings={"vars.lr": 3e-5}, trial=3,
    )  # fmt: skip
    planned = plan_study(one, resolve, [point])
    (run,) = planned.plan.runs
    assert (run.label, run.trial) == ("trial 3", 3)
    assert planned.configs[run.run_id]["fit"]["vars"]["lr"] == 3e-5


def test_workers_find_what_one_process_finds(study, resolve):
    one = study(f"grid: {{{WIDTH}: [2, 3, 4, 5]}}\nseeds: [0, 1]\nstages: [fit, test]")
    alone, together = (plan_study(one, resolve, num_workers=n) for n in (1, 2))
    assert alone.plan == together.plan
    assert alone.configs == together.configs


def test_the_plan_survives_its_file(plan, tmp_path):
    made = plan(GRID).plan
    made.save(tmp_path / "folder")
    assert Plan.load(tmp_path / "folder") == made


def test_later_changes_are_seen(study, resolve, tmp_path):
    layer = tmp_path / "layer.yaml"
    layer.write_text("vars: {a: 1}")
    text = f"arms: {{x: {{configs: {layer}}}}}"
    made = plan_study(study(text), resolve).plan
    assert not plan_is_stale(study(text), made)
    assert plan_is_stale(study(f"{text}\nseeds: [1]"), made)
    layer.write_text("vars: {a: 2}")
    assert plan_is_stale(study(text), made)
    layer.write_text("vars: {a: 1}")
    assert not plan_is_stale(study(text), made)


NASTY = """
settings:
  vars.tiny: 1e-05
  vars.list: [1e-7, true, null, 3]
  data.init_args.root: 'null'
  model.init_args.scale: 1e-5
  trainer.callbacks+: [{class_path: toy_house.Notes, init_args: {note: 'yes: {x} # é'}}]
"""


@pytest.mark.parametrize("stage", ["fit", "test"])
def test_a_prepared_config_is_read_back_as_it_was(plan, resolve, stage):
    planned = plan(NASTY + "stages: [fit, test]")
    (run,) = planned.plan.runs
    configs = planned.configs[run.run_id]
    prepare_run(run, configs, "toy")
    written = configs[stage]
    assert written["model"]["init_args"]["scale"] == 1e-5
    assert written["data"]["init_args"]["root"] == "null"
    assert resolve(stage, [f"--config={config_file(run.directory, stage)}"]) == written
    assert check_spec(run.directory).stages == ("fit", "test")


def test_a_prepared_run_runs(plan, capsys):
    settings = "{trainer.max_steps: 2, model.init_args.scale: 1e-5}"
    planned = plan(f"settings: {settings}\nstages: [fit, test]")
    (run,) = planned.plan.runs
    prepare_run(run, planned.configs[run.run_id], "toy")
    for stage in ("fit", "test"):
        file = config_file(run.directory, stage)
        assert main.main([stage, "--allow_import=toy_house", f"--config={file}"]) == 0
    check_recorded(run.directory, config_file(run.directory, "fit"))
    recorded = yaml.safe_load((run.directory / "config.yaml").read_text())
    assert recorded == planned.configs[run.run_id]["fit"]
    assert digest_configs({"fit": recorded}) == digest_configs(
        {"fit": planned.configs[run.run_id]["fit"]}
    )


def test_what_is_prepared_stays_untouched(plan):
    planned = plan()
    (run,) = planned.plan.runs
    configs = planned.configs[run.run_id]
    prepare_run(run, configs, "toy")
    folder = sweep_folder(run.directory)
    spec = json.loads((folder / "spec.json").read_text())
    assert spec == {
        "run_id": run.run_id, "study": "toy", "label": "base", "stages": ["fit"], "max_steps": 12,
    }  # fmt: skip
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    prepare_run(run, configs, "another study")
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    config_file(run.directory, "fit").write_text("torn")
    prepare_run(run, configs, "toy")
    assert yaml.safe_load(config_file(run.directory, "fit").read_text())["ckpt_path"] == "auto"


def test_a_directory_of_another_config_is_refused(plan):
    planned = plan()
    (run,) = planned.plan.runs
    prepare_run(run, planned.configs[run.run_id], "toy")
    other = dataclasses.replace(run, run_id="0123456789ab")
    with pytest.raises(ConfigError, match="it is that of config " + run.run_id):
        prepare_run(other, planned.configs[run.run_id], "toy")


def test_the_table_shows_what_differs(plan):
    planned = plan(
        f"arms: {{a: {{}}, b: {{model.init_args.scale: 2.0}}}}\n{GRID}base_arm: b, width=4"
    )
    table = plan_rows(planned)
    assert table.headings == ["variant", "settings", "seeds", "done"]
    assert table.rows == [
        ["a, width=4", "scale=1", "2", "0"],
        ["a, width=6", "scale=1", "2", "0"],
        ["b, width=4 (base)", "scale=2", "2", "0"],
        ["b, width=6", "scale=2", "2", "0"],
    ]


def in_a_new_process(code: str) -> None:
    """Run code where there are no threads, as other tests may leave some."""
    root = Path(__file__).parents[3]
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], cwd=root, check=True)


def test_a_map_in_copies_of_this_process():
    in_a_new_process("""
        import os
        from segalign.launch.forked_map import forked_map
        assert forked_map(lambda n: (n * n, os.getpid()), [3], 2) == [(9, os.getpid())]
        found = forked_map(lambda n: (n * n, os.getpid()), list(range(9)), 3)
        assert [value for value, _ in found] == [n * n for n in range(9)]
        assert len({pid for _, pid in found}) == 4
        assert forked_map(lambda n: n, [], 2) == []
    """)


def test_a_process_with_threads_is_not_copied():
    stop = threading.Event()
    thread = threading.Thread(target=stop.wait)
    thread.start()
    try:
        assert set(forked_map(lambda _: os.getpid(), list(range(9)), 3)) == {os.getpid()}
    finally:
        stop.set()
        thread.join()


def test_errors_of_copies_are_raised_here():
    in_a_new_process("""
        import os
        from segalign.launch.forked_map import forked_map

        def fail(number):
            if number == 5:
                raise KeyError("five")
            if number == 6:
                os._exit(1)

        for items, kind in ((list(range(6)), KeyError), ([0, 0, 6, 6], RuntimeError)):
            try:
                forked_map(fail, items, 2)
            except kind:
                continue
            raise AssertionError(kind)
    """)
