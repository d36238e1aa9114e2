"""A searcher proposes runs, learns what becomes of them, and survives whatever stops it."""

import errno
import json
import logging
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import optuna
import pytest
import yaml

from segalign.errors import ConfigError, DataError, StorageError
from segalign.launch.plan import Plan, unique_runs
from segalign.launch.planning import prepare_run
from segalign.launch.running.observing import observe
from segalign.launch.running.run_state import RunState, RunStatus, write_state
from segalign.launch.searching import trial_storage
from segalign.launch.searching.search import OptunaSearch
from segalign.launch.searching.search_rounds import search_round
from segalign.launch.searching.trial_storage import read_trial
from segalign.launch.study import Arm, Axis, Level, MetricSpec, Range, SearchSettings, Study

LR = Axis(label="lr", keys=("optimizer.lr",), range=Range(low=1e-6, high=1e-2, log=True))
DEPTH = Axis(
    label="depth",
    keys=("model.depth", "model.width"),
    range=Range(low=1, high=8, is_integer=True),
)
ARMS = (Arm(name="plain"), Arm(name="worse", settings={"model.offset": 3.0}))


def levels(name: str, *values) -> Axis:
    key = f"model.{name}"
    made = tuple(Level(label=str(value), settings={key: value}) for value in values)
    return Axis(label=name, keys=(key,), levels=made)


@pytest.fixture
def study(tmp_path) -> Study:
    for name in ("study.yaml", "base.yaml"):
        (tmp_path / name).write_text("{}\n")
    return Study(
        name="toy",
        file=tmp_path / "study.yaml",
        base=(tmp_path / "base.yaml",),
        arms=ARMS,
        axes=(LR, DEPTH),
        seeds=(5, 6),
        metrics=(MetricSpec(name="val/score", label="score"),),
        search=SearchSettings(trials=24),
        folder=tmp_path / "toy",
        runs_folder=tmp_path / "runs",
    )


def resolve(stage, arguments):
    """Read the settings that the command line layers, as a parser would."""
    config = {}
    for argument in arguments:
        name, _, text = argument.partition("=")
        if name == "--seed_everything":
            config["seed"] = int(text)
        elif text.startswith("{"):
            for part, values in yaml.safe_load(text).items():
                config.setdefault(part, {}).update(values)
    return config


def score(config) -> float:
    """A hill: the best is lr 1e-4, depth 3 and the plain arm, and is 0."""
    distance = math.log10(float(config["optimizer"]["lr"])) + 4
    depth, offset = config["model"]["depth"], config["model"].get("offset", 0.0)
    return -(distance**2) - 0.1 * (depth - 3) ** 2 - offset


def end(run, value=None, status=RunStatus.DONE) -> None:
    if value is not None:
        (run.directory / "logs").mkdir(exist_ok=True)
        (run.directory / "logs" / "metrics.csv").write_text(f"step,val/score\n9,{value!r}\n")
    write_state(run.directory, RunState(status=status))


def play_round(study, plan=None, *, max_open=1, parse=resolve):
    """Do a round as the command does it, and return the plan and the new runs with configs."""
    observed = [] if plan is None else observe(unique_runs(plan.runs))
    planned, new = search_round(study, parse, plan, observed, max_open)
    for run in new:
        prepare_run(run, planned.configs[run.run_id], study.name)
    planned.plan.save(study.folder)
    return planned.plan, [(run, planned.configs[run.run_id]["fit"]) for run in new]


def play(study, *, max_open=1, parse=resolve, value=score) -> Plan:
    """Search until there is nothing left to propose."""
    plan = None
    while True:
        plan, new = play_round(study, plan, max_open=max_open, parse=parse)
        for run, config in new:
            end(run, value(config))
        if not new:
            return plan


def trials(study) -> list[optuna.trial.FrozenTrial]:
    return optuna.load_study(
        study_name=study.name,
        storage=trial_storage.open_storage(trial_storage.trial_storage(study)),
    ).trials


def states(study) -> list[str]:
    return [trial.state.name for trial in trials(study)]


# Proposing


def test_it_goes_uphill(study):
    play(study)
    values = [trial.value for trial in trials(study)]
    assert len(values) == 24
    first, last = values[:10], values[-10:]
    assert sum(last) / 10 > sum(first) / 10 + 2
    label, best = OptunaSearch(study).best()
    assert best == max(values) > -0.2
    assert label.startswith(f"trial {values.index(best)}: plain, lr=")


def test_it_goes_downhill_where_less_is_better(study):
    study = replace(study, metrics=(replace(study.metrics[0], mode="min"),))
    play(study, value=lambda config: -score(config))
    values = [trial.value for trial in trials(study)]
    assert sum(values[-10:]) / 10 < sum(values[:10]) / 10 - 2
    assert OptunaSearch(study).best()[1] == min(values) < 0.2


def test_points_are_within_the_space(study):
    search = OptunaSearch(study)
    points = search.ask(24)
    assert search.remaining() == 0
    assert search.ask(1) == []
    assert [point.trial for point in points] == list(range(24))
    assert {point.arm for point in points} == {"plain", "worse"}
    assert {point.seed for point in points} == {5}
    for point in points:
        lr, depth = point.settings["optimizer.lr"], point.settings["model.depth"]
        assert 1e-6 <= lr <= 1e-2
        assert isinstance(depth, int)
        assert 1 <= depth <= 8
        assert point.settings["model.width"] == depth
        assert ("model.offset" in point.settings) == (point.arm == "worse")
        assert point.levels == {"lr": f"{lr:.4g}", "depth": str(depth)}
        expected = f"trial {point.trial}: {point.arm}, lr={lr:.4g}, depth={depth}"
        assert point.label == expected
    # On a logarithmic scale: of a plain one, one in a hundred would be this small.
    assert sum(point.settings["optimizer.lr"] < 1e-4 for point in points) >= 6


def test_a_search_is_repeated_by_its_seed(study, tmp_path):
    def proposals(name, seed=0):
        settings = SearchSettings(trials=14, seed=seed)
        folders = {"folder": tmp_path / name, "runs_folder": tmp_path / f"{name}-runs"}
        return [run.label for run in play(replace(study, search=settings, **folders)).runs]

    first = proposals("a")
    assert len(set(first)) == 14
    assert proposals("b") == first
    assert not set(proposals("c", seed=1)) & set(first)


def test_levels_that_are_listed_are_chosen_by_name(study):
    study = replace(study, arms=(Arm(name="base"),), axes=(levels("kind", "a", "b", None),))
    points = OptunaSearch(study).ask(20)
    assert {point.label.partition(": ")[2] for point in points} == {
        "kind=a",
        "kind=b",
        "kind=None",
    }
    assert {point.settings["model.kind"] for point in points} == {"a", "b", None}


def test_what_is_excluded_is_not_proposed(study):
    axes = (levels("kind", "a", "b"), LR)
    exclude = ({"arm": "plain", "kind": "a"}, {"arm": "worse", "kind": "b"})
    study = replace(study, axes=axes, exclude=exclude)
    points = OptunaSearch(study).ask(20)
    assert len(points) == 20
    assert {(point.arm, point.levels["kind"]) for point in points} == {
        ("plain", "b"),
        ("worse", "a"),
    }
    # They do not count as trials.
    assert len(trials(study)) > 20


def test_only_so_many_runs_are_open(study):
    plan, new = play_round(study, max_open=3)
    assert len(new) == 3
    assert play_round(study, plan, max_open=3)[1] == []
    end(new[1][0], 0.5)
    assert len(play_round(study, plan, max_open=3)[1]) == 1


def test_the_base_is_the_first_trial_of_the_base_arm(study):
    study = replace(study, axes=(), search=SearchSettings(trials=6))
    plan = play(study, value=lambda config: 1.0)
    assert plan.base_label == plan.labels[0]
    for arm in ("plain", "worse"):
        again, _ = play_round(replace(study, base_arm=arm), plan)
        assert again.base_label == next(one for one in plan.labels if one.endswith(arm))


# Telling


def test_a_trial_is_told_once(study):
    plan, [(run, _)] = play_round(study)
    assert states(study) == ["RUNNING"]
    end(run, 0.25)
    journal = study.folder / "optuna.journal"
    search = OptunaSearch(study, plan)
    for _ in range(2):
        search.tell(observe(plan.runs))
    assert [(trial.state.name, trial.value) for trial in trials(study)] == [("COMPLETE", 0.25)]
    size = journal.stat().st_size
    OptunaSearch(study, plan).tell(observe(plan.runs))
    # Opening it notes that it has been opened, and nothing more.
    assert journal.read_bytes()[size:].count(b'"values"') == 0


@pytest.mark.parametrize(
    ("status", "state"),
    [
        (RunStatus.FAILED, "FAIL"),
        (RunStatus.PRUNED, "PRUNED"),
        (RunStatus.PREEMPTED, "RUNNING"),
        (RunStatus.CANCELLED, "RUNNING"),
    ],
)
def test_what_becomes_of_runs_is_told(study, status, state):
    plan, [(run, _)] = play_round(study)
    end(run, 0.5, status)
    plan, new = play_round(study, plan)
    assert states(study)[0] == state
    # What has not ended takes the place of a new one.
    assert len(new) == (state != "RUNNING")


@pytest.mark.parametrize("value", [None, math.nan, math.inf])
def test_a_run_without_a_finite_value_counts_as_failed(study, value, caplog):
    plan, [(run, _)] = play_round(study)
    end(run, value)
    with caplog.at_level(logging.WARNING, logger="segalign.launch.searching.search"):
        play_round(study, plan)
    assert states(study)[0] == "FAIL"
    (said,) = [one.getMessage() for one in caplog.records if one.name.startswith("segalign")]
    assert "`val/score`" in said
    assert "trial 0" in said


def test_a_failed_run_that_is_retried_counts_once(study):
    plan, [(run, _)] = play_round(study)
    end(run, None, RunStatus.FAILED)
    plan, _ = play_round(study, plan)
    end(run, 7.5)
    before = OptunaSearch(study, plan).remaining()
    for _ in range(2):
        plan, _ = play_round(study, plan)
    assert [trial.value for trial in trials(study)].count(7.5) == 1
    search = OptunaSearch(study, plan)
    assert search.best() == (run.label, 7.5)
    assert search.remaining() == before
    end(plan.runs[1], 0.5)
    plan, _ = play_round(study, plan)
    # The retry is trial 2.
    assert [one.trial for one in plan.runs] == [0, 1, 3]


def test_the_same_point_is_the_same_run(study):
    study = replace(study, axes=(levels("kind", 1, 2),), search=SearchSettings(trials=12))
    started = []

    def value(config):
        started.append(config)
        return float(config["model"]["kind"])

    plan = play(study, max_open=2, value=value)
    assert len(plan.runs) == 12
    assert len(started) == len(unique_runs(plan.runs)) == 4
    assert states(study) == ["COMPLETE"] * 12
    for run, trial in zip(plan.runs, trials(study), strict=True):
        assert trial.value == float(run.levels["kind"])


def test_the_same_point_is_started_once(study):
    study = replace(study, axes=(levels("kind", 1),), arms=ARMS[:1])
    study = replace(study, search=SearchSettings(trials=3))
    plan, [(run, _)] = play_round(study, max_open=3)
    assert [one.run_id for one in plan.runs] == [run.run_id] * 3
    end(run, 0.5)
    assert play_round(study, plan)[1] == []
    assert [trial.value for trial in trials(study)] == [0.5] * 3


def test_a_run_that_another_study_has_done_is_not_repeated(study, tmp_path):
    first = play(study)
    other = replace(study, folder=tmp_path / "other")
    plan, new = play_round(other)
    assert new == []
    assert [run.run_id for run in plan.runs] == [run.run_id for run in first.runs]
    assert [trial.value for trial in trials(other)] == [trial.value for trial in trials(study)]


# Being stopped


def test_what_was_asked_for_but_never_planned_is_proposed_again(study):
    lost = OptunaSearch(study).ask(2)
    plan, new = play_round(study, max_open=3)
    assert [run.label for run, _ in new][:2] == [point.label for point in lost]
    assert [run.trial for run in plan.runs] == [0, 1, 2]
    assert states(study) == ["RUNNING"] * 3


def test_a_trial_that_was_drawn_in_part_does_not_count(study):
    OptunaSearch(study)
    storage = trial_storage.open_storage(trial_storage.trial_storage(study))
    optuna.load_study(study_name="toy", storage=storage).ask({})
    plan = play(study)
    assert [run.trial for run in plan.runs] == list(range(1, 25))
    assert states(study) == ["FAIL"] + ["COMPLETE"] * 24


def test_a_lost_plan_is_made_again(study):
    plan = play(study)
    again, new = play_round(study, None)
    assert new == []
    assert again.runs == plan.runs


def test_a_line_that_was_cut_off_is_dropped(study):
    plan, _ = play_round(study)
    journal = study.folder / "optuna.journal"
    whole = journal.read_bytes()
    journal.write_bytes(whole + b'{"op_code":6,"trial_')
    play_round(study, plan, max_open=2)
    assert journal.read_bytes().startswith(whole)
    assert states(study) == ["RUNNING"] * 2


def test_another_file_is_left_as_it_is(study, tmp_path):
    notes = tmp_path / "notes.txt"
    notes.write_text("first\nlast")
    study = replace(study, search=SearchSettings(storage=str(notes)))
    with pytest.raises(DataError, match=r"expected trials of Optuna at .*notes.txt"):
        OptunaSearch(study)
    assert notes.read_text() == "first\nlast"


# Storages


def test_trials_may_be_in_a_database(study, tmp_path):
    url = f"sqlite:///{tmp_path}/trials.db"
    study = replace(study, search=SearchSettings(trials=3, storage=url))
    assert len(play(study).runs) == 3
    assert (tmp_path / "trials.db").is_file()
    assert not (study.folder / "optuna.journal").exists()
    assert states(study) == ["COMPLETE"] * 3


def test_a_password_is_not_shown(study):
    url = "sqlite://user:secret@host/missing/folder/trials.db"
    with pytest.raises((StorageError, DataError, ConfigError)) as caught:
        OptunaSearch(replace(study, search=SearchSettings(storage=url)))
    assert "secret" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_place_that_cannot_be_written_is_one_line(study, tmp_path):
    study = replace(study, search=SearchSettings(storage=str(tmp_path)))
    with pytest.raises(StorageError, match="it cannot be used"):
        play_round(study)


def test_a_full_disk_is_one_line(study, monkeypatch):
    plan, _ = play_round(study)

    backend = optuna.storages.journal.JournalFileBackend
    write = backend.append_logs

    def full(self, logs):
        if "datetime_start" in logs[0]:  # a new trial
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, logs)

    monkeypatch.setattr(backend, "append_logs", full)
    with pytest.raises(StorageError, match="No space left on device") as caught:
        play_round(study, plan, max_open=2)
    assert "\n" not in str(caught.value)


# Pruning


def test_pruned_searches_hand_their_runs_a_callback_and_a_trial(study, tmp_path):
    settings = {"trainer.callbacks+": {"class_path": "callbacks.ema.EMA"}}
    study = replace(study, settings=settings, search=SearchSettings(trials=2, prune=True))
    plan, new = play_round(study, max_open=2)
    for number, (run, config) in enumerate(new):
        assert [one["class_path"] for one in config["trainer"]["callbacks+"]] == [
            "callbacks.ema.EMA",
            "callbacks.optuna_pruning.OptunaPruning",
        ]
        assert config["trainer"]["callbacks+"][1]["init_args"] == {
            "search": "toy",
            "monitor": "val/score",
        }
        record = read_trial(run.directory)
        assert record.number == number
        assert record.storage == str(study.folder / "optuna.journal")
    # Neither the trial's number nor the folder decides which run it is.
    elsewhere = replace(study, folder=tmp_path / "elsewhere", runs_folder=tmp_path / "others")
    assert [run.run_id for run, _ in play_round(elsewhere, max_open=2)[1]] == [
        run.run_id for run in plan.runs
    ]


def test_other_searches_add_nothing_to_their_runs(study):
    _, [(run, config)] = play_round(study)
    assert "trainer" not in config
    assert read_trial(run.directory) is None


# Bad input


def parse_plain_alone(stage, arguments):
    config = resolve(stage, arguments)
    if "offset" in config["model"]:
        raise ConfigError("expected known keys; got `model.offset`")
    return config


def test_points_that_do_not_fit_are_left_out(study, caplog):
    study = replace(study, search=SearchSettings(trials=8))
    with caplog.at_level(logging.WARNING, logger="segalign.launch.searching.search_rounds"):
        plan = play(study, parse=parse_plain_alone)
    assert len(plan.runs) == 8
    assert {run.arm for run in plan.runs} == {"plain"}
    said = [one.getMessage() for one in caplog.records if one.name.startswith("segalign")]
    assert said
    assert all("worse" in one and "`model.offset`" in one for one in said)
    assert states(study).count("FAIL") == len(said)


@pytest.mark.parametrize("fitting", [3, 4])
def test_points_that_fit_may_be_rare(study, fitting):
    asked = []

    def parse(stage, arguments):
        asked.append(arguments)
        if len(asked) % fitting:
            raise ConfigError("expected another value")
        return resolve(stage, arguments)

    plan, new = play_round(study, max_open=8, parse=parse)
    assert len(new) == len(plan.runs) == 8
    assert states(study) == (["FAIL"] * (fitting - 1) + ["RUNNING"]) * 8


def test_points_before_the_first_that_fits_are_left_out_too(study):
    asked = []

    def parse(stage, arguments):
        asked.append(arguments)
        if len(asked) < 3:
            raise ConfigError("expected another value")
        return resolve(stage, arguments)

    play_round(study, parse=parse)
    assert states(study) == ["FAIL", "FAIL", "RUNNING"]


def test_if_nothing_fits_no_trial_is_spent(study):
    def refuse(stage, arguments):
        raise ConfigError("expected known keys")

    with pytest.raises(ConfigError, match="expected known keys"):
        play_round(study, parse=refuse)
    assert "FAIL" not in states(study)
    assert len(play(study).runs) == 24


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"metrics": ()}, "expected a metric for the searcher"),
        (
            {
                "metrics": (MetricSpec(name="train/loss", label="loss"),),
                "search": SearchSettings(prune=True),
            },
            "expected a metric of validation",
        ),
        ({"arms": ARMS[:1], "axes": ()}, "expected something to search"),
    ],
)
def test_a_study_that_cannot_be_searched_is_refused(study, change, message):
    with pytest.raises(ConfigError, match=message) as caught:
        play_round(replace(study, **change))
    assert "\n" not in str(caught.value)
    assert not study.folder.exists()


@pytest.mark.parametrize(
    "change",
    [
        {"axes": (LR,)},
        {"arms": (*ARMS, Arm(name="third"))},
        {"metrics": (MetricSpec(name="val/other", label="other"),)},
        {"metrics": (MetricSpec(name="val/score", label="score", mode="min"),)},
    ],
)
def test_another_space_is_refused(study, change):
    plan, _ = play_round(study)
    with pytest.raises(ConfigError, match="they have changed since"):
        play_round(replace(study, **change), plan)


def test_lost_trials_are_refused(study):
    plan, _ = play_round(study)
    (study.folder / "optuna.journal").unlink()
    with pytest.raises(DataError, match="expected trial 0 of the plan"):
        play_round(study, plan)


def test_without_optuna_it_says_what_to_install(study, monkeypatch):
    def missing(name):
        raise ImportError(f"No module named '{name}'")

    monkeypatch.setattr(trial_storage.importlib, "import_module", missing)
    with pytest.raises(ConfigError, match=r'pip install "segalign\[optuna\]"'):
        play_round(study)


def test_studies_without_a_searcher_import_no_optuna():
    code = (
        "import sys; import segalign.launch.searching.search_rounds;"
        "assert not {'optuna', 'torch', 'lightning', 'numpy'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[3])


def test_the_journal_is_plain_text(study):
    play_round(study)
    lines = (study.folder / "optuna.journal").read_text().splitlines()
    assert all("op_code" in json.loads(line) for line in lines)
