"""Studies under configs/sweeps plan through the parser of runs, over scenes and over SD-1.5."""

import re
import shlex
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

import main
from segalign.commands.sweep import build_parser
from segalign.launch.planning import PlannedStudy, plan_study
from segalign.launch.study import Study
from segalign.launch.study_file import load_study

ROOT = Path(__file__).parents[2]
FOLDER = Path("configs/sweeps")
NUM_VARIANTS = {"directions": 3, "encoders": 9, "reweight": 3, "splitters": 5, "strategies": 8}
OF_SCENES_ALONE = ("test/attributes", "test/attributes/past_77", "test/attributes/within_77")
# What logs the metrics of a test, and the names that follow from its own.
WITNESSES = {
    "callbacks.fid.FID": ("{name}",),
    "callbacks.lpips.LPIPS": ("{name}_diversity", "{name}_drift"),
}


class OneSeedPlans:
    """Plans one seed of each variant, once: others have the same config with another seed."""

    def __init__(self) -> None:
        self._resolve = main.resolve_configs([])
        self._known: dict[tuple[Path, Path], PlannedStudy] = {}

    def __call__(self, study: Study) -> PlannedStudy:
        key = (study.file, study.folder)
        if key not in self._known:
            one = replace(study, seeds=study.seeds[:1], max_gpu_hours=None)
            self._known[key] = plan_study(one, self._resolve)
        return self._known[key]


@pytest.fixture(scope="module")
def plan_of() -> OneSeedPlans:
    return OneSeedPlans()


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


def configs_of(plan: PlannedStudy, label: str) -> Mapping[str, Any]:
    return plan.configs[plan.plan.of(label)[0].run_id]


def header(name: str) -> str:
    text = (FOLDER / f"{name}.yaml").read_text()
    lines = text.partition("\nbase:")[0].splitlines()
    return " ".join(line.removeprefix("#").strip() for line in lines).replace("\\ ", "")


def swapped(name: str) -> Study:
    """Read a study with the base that its header shows for Stable Diffusion 1.5."""
    command = re.search(r"main\.py sweep (plan \S+(?: --\w+ \S+)+)", header(name))
    assert command is not None
    options = build_parser().parse_args(shlex.split(command[1])).plan
    assert options.study == f"{FOLDER}/{name}.yaml"
    assert options.folder == f"runs/sweeps/{name}_sd15"
    bases = [Path(path) for path in options.base]
    return load_study(Path(options.study), base=bases, folder=Path(options.folder))


def test_the_table_names_every_study():
    assert sorted(path.stem for path in FOLDER.glob("*.yaml")) == sorted(NUM_VARIANTS)


@pytest.mark.parametrize("name", NUM_VARIANTS)
def test_studies_plan_over_scenes(name, plan_of):
    study = load_study(FOLDER / f"{name}.yaml")
    plan = plan_of(study)
    assert len(plan.plan.runs) == NUM_VARIANTS[name]
    # No two variants are the same run, and the base is one of them.
    assert len(plan.configs) == NUM_VARIANTS[name]
    assert study.base_arm in plan.plan.labels
    assert len(study.seeds) >= 3
    check_metrics(study, plan, scenes=True)


@pytest.mark.parametrize("name", NUM_VARIANTS)
def test_studies_plan_over_stable_diffusion(name, plan_of):
    study = swapped(name)
    plan = plan_of(study)
    assert plan.plan.labels == plan_of(load_study(FOLDER / f"{name}.yaml")).plan.labels
    assert len(plan.configs) == NUM_VARIANTS[name]
    for configs in plan.configs.values():
        assert "scenes" not in str(configs["fit"]["model"])
        assert "tiny" not in str(configs["test"]["trainer"]["callbacks"])
    check_metrics(study, plan, scenes=False)


def check_metrics(study: Study, plan: PlannedStudy, *, scenes: bool) -> None:
    """Find who logs each metric of the test."""
    for configs in plan.configs.values():
        logged = metrics_of_test(configs["test"]["trainer"]["callbacks"])
        wanted = {metric.name for metric in study.metrics if metric.name.startswith("test/")}
        assert wanted - logged <= set(() if scenes else OF_SCENES_ALONE)
        assert any(
            one["class_path"] == "callbacks.evaluation_report.EvaluationReport"
            for one in configs["test"]["trainer"]["callbacks"]
        )


def metrics_of_test(callbacks: list[dict[str, Any]]) -> set[str]:
    found = set()
    for one in callbacks:
        settings = one.get("init_args") or {}
        patterns = WITNESSES.get(one["class_path"], ())
        found |= {f"test/{pattern.format(name=settings.get('name'))}" for pattern in patterns}
        if one["class_path"] == "callbacks.alignment.TextAlignment":
            found |= {f"test/reward/{reward}" for reward in settings["rewards"]}
        if one["class_path"] == "callbacks.alignment.SceneFacts":
            found |= set(OF_SCENES_ALONE)
    return found


@pytest.mark.parametrize("name", NUM_VARIANTS)
def test_headers_ask_a_question_and_show_the_commands(name):
    text = header(name)
    assert "?" in text
    assert f"python main.py sweep run configs/sweeps/{name}.yaml --local 2" in text
    assert re.search(r"Hardware: two CPU cores, (about |\d+ to )?\d+ minutes", text)
    assert "Expected: " in text


def test_refl_draws_late_steps_of_either_sampler(plan_of):
    label = "ReFL, num_train_steps=own"
    for study in (load_study(FOLDER / "strategies.yaml"), swapped("strategies")):
        model = configs_of(plan_of(study), label)["fit"]["model"]["init_args"]
        num_steps = model["rollout_sampler"].get("init_args", model["rollout_sampler"])
        last = num_steps["num_inference_steps"] - 1
        first_drawn = model["strategy"]["init_args"]["first_step"]
        assert model["strategy"]["init_args"]["last_step"] == last
        assert 0.7 * last < first_drawn < last


def test_the_number_of_trained_steps_reaches_the_strategies_that_have_one(plan_of):
    plan = plan_of(load_study(FOLDER / "strategies.yaml"))
    for label in plan.plan.labels:
        arm, _, number = label.partition(", num_train_steps=")
        strategy = configs_of(plan, label)["fit"]["model"]["init_args"]["strategy"]["init_args"]
        assert strategy.get("num_train_steps") == (None if number == "own" else int(number))
        assert (number == "own") == (arm not in ("DRTune", "DRaFT"))


def test_padding_is_seen_where_its_policy_is_studied(plan_of):
    plan = plan_of(load_study(FOLDER / "encoders.yaml"))
    for configs in plan.configs.values():
        assert configs["fit"]["model"]["init_args"]["text"]["mask_padding"] is False


def test_all_directions_have_one_omega_and_one_scorer(plan_of):
    plan = plan_of(load_study(FOLDER / "directions.yaml"))
    rewards = [
        one["fit"]["model"]["init_args"]["reward"]["init_args"] for one in plan.configs.values()
    ]
    assert {(one["omega"], one["weights"]) for one in rewards} == {(0.3, "shipped")}
    kinds = {one["common_direction"]["class_path"].rpartition(".")[2] for one in rewards}
    assert kinds == {"CorpusEstimate", "EmaEstimate", "BatchEstimate"}


def test_the_file_of_the_document_can_be_planned(tmp_path):
    text = (ROOT / "docs" / "sweeps.md").read_text()
    example = re.search(r"```yaml\n(.*?)```", text, re.DOTALL)
    assert example is not None
    file = tmp_path / "reweight.yaml"
    file.write_text(example[1])
    study = load_study(file)
    plan = plan_study(replace(study, search=None, max_gpu_hours=None), main.resolve_configs([]))
    assert study.base_arm in plan.plan.labels
    keys = set(re.findall(r"^(\w+):", example[1], re.MULTILINE))
    known = {field.name for field in fields(Study)} - {"file", "axes", "max_gpu_hours"}
    assert keys == known | {"grid", "zip", "budget"}
