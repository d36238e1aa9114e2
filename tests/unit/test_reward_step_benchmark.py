"""The benchmark of reward fine-tuning runs, and its two steps have the same gradient."""

import json

import pytest

from benchmarks import reward_step


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    reward_step.main(["--quick", "--results", str(folder)])
    return folder


@pytest.fixture
def found(results):
    return json.loads((results / "reward_step.json").read_text())


def test_our_gradient_is_that_of_the_official_step(found):
    assert found["gradients"]["relative_l2"] <= 1e-4
    assert found["gradients"]["cosine"] == pytest.approx(1, abs=1e-6)
    assert found["gradients"]["norm"] > 0


def test_every_change_is_measured_alone(found, results):
    assert found["removals"].keys() == {"official", *reward_step.REMOVALS}
    assert found["added_mib_by_k"].keys() == {"replay", "graph, checkpointed", "graph"}
    text = (results / "reward_step.md").read_text()
    assert all(f"| {name} |" in text for name in (*reward_step.REMOVALS, "official", "ours"))


def test_changes_differ_from_the_official_step_in_one_thing():
    setting = reward_step.SETTINGS["quick"]
    official = vars(reward_step.OFFICIAL)
    for name, make in reward_step.REMOVALS.items():
        changed = [k for k, value in vars(make(setting)).items() if value != official[k]]
        assert len(changed) == 1, name
