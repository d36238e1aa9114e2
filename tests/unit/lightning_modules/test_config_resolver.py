"""The parser of runs without a run: the same configs and refusals, and nothing else happens."""

import os
import random
import re
import sys
from pathlib import Path

import pytest
import torch
import yaml

import main
from lightning_modules import cli
from lightning_modules.config_resolver import ConfigResolver
from segalign.errors import ConfigError
from segalign.launch.yaml_dialect import dump_line, read_yaml

CONFIGS = Path(__file__).parents[3] / "configs"
REWARD = f"--config={CONFIGS / 'scenes' / 'reward.yaml'}"


@pytest.fixture(scope="module")
def resolve():
    return main.resolve_configs(["toy_house"])


@pytest.fixture(scope="module")
def forgetful():
    return ConfigResolver(main.run_parts(), ["toy_house"], remembers=False)


@pytest.fixture
def toy(resolve, toy_config):
    """Resolve the toy config with more layers and options."""

    def run(*options, stage="fit", resolver=resolve):
        return resolver(stage, [f"--config={toy_config}", *options])

    return run


@pytest.fixture
def refused(toy):
    def run(*options, **settings):
        with pytest.raises(ConfigError) as caught:
            toy(*options, **settings)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    return run


def test_a_run_records_the_same_config(toy, toy_command, run_dir):
    options = ["--vars.lr=1e-05", "--seed_everything=3", "--trainer.max_steps=1"]
    assert toy_command("fit", *options) == 0
    recorded = yaml.safe_load((run_dir / "config.yaml").read_text())
    assert toy(*options, f"--run_dir={run_dir}") == recorded
    assert recorded["model"]["init_args"]["optimizer"]["init_args"]["lr"] == 1e-5


@pytest.mark.parametrize(
    ("stage", "layer"),
    [("fit", None), ("test", "ablations/refl.yaml"), ("fit", "debug/scenes_hacking.yaml")],
)
def test_it_is_what_the_command_prints(resolve, capsys, stage, layer):
    layers = [] if layer is None else [f"--config={CONFIGS / layer}"]
    options = [REWARD, *layers, "--seed_everything=5", "--run_dir=__run_dir__"]
    with pytest.raises(SystemExit):
        main.main([stage, *options, "--print_config"])
    assert resolve(stage, options) == yaml.safe_load(capsys.readouterr().out)


def commands() -> list[tuple[str, list[str]]]:
    """List command lines that share parts, in no order."""
    strategies = ["k1", "refl", "draft_1", "no_decomposition"]
    found = [
        (
            stage,
            [
                REWARD,
                f"--config={CONFIGS / 'ablations' / name}.yaml",
                f"--config={{model: {{init_args: {{reward: {{init_args: {{omega: {omega}}}}}}}}}}}",
                f"--seed_everything={seed}",
            ],
        )
        for stage in ("fit", "test")
        for name in strategies
        for omega in (0.0, 1)
        for seed in (0, 1)
    ]
    random.Random(0).shuffle(found)
    return found[:8]


def test_remembered_parts_are_those_that_would_be_found_anew(resolve, forgetful):
    for stage, arguments in commands():
        assert resolve(stage, arguments) == forgetful(stage, arguments), arguments


def test_remembering_saves_work(resolve, monkeypatch):
    from jsonargparse import ArgumentParser

    calls = []
    original = ArgumentParser.validate
    monkeypatch.setattr(
        ArgumentParser, "validate", lambda *a, **k: (calls.append(1), original(*a, **k))[1]
    )
    arguments = [REWARD, "--seed_everything=77"]
    resolve("fit", arguments)
    calls.clear()
    resolve("fit", arguments)
    again = len(calls)
    calls.clear()
    ConfigResolver(main.run_parts(), remembers=False)("fit", arguments)
    assert again < len(calls) / 10


def test_what_is_remembered_cannot_be_changed_from_outside(toy):
    first = toy("--vars.x=1")
    first["model"]["init_args"]["optimizer"]["init_args"]["lr"] = "broken"
    first["trainer"]["callbacks"].clear()
    second = toy("--vars.x=1")
    assert second["model"]["init_args"]["optimizer"]["init_args"]["lr"] == 0.01
    assert len(second["trainer"]["callbacks"]) == 2


def test_the_environment_is_read_anew(toy, monkeypatch):
    layer = "--config={data: {init_args: {root: '${oc.env:TOY_ROOT}/x'}}}"
    for value in ("a", "b", "c"):
        monkeypatch.setenv("TOY_ROOT", value)
        assert toy(layer)["data"]["init_args"]["root"] == f"{value}/x"


def test_nothing_happens_besides(toy, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(123)
    state = torch.random.get_rng_state()
    opened = ConfigResolver(main.run_parts(), ["toy_house"])
    toy("--run_dir=made", "--seed_everything=99", resolver=opened)
    assert list(tmp_path.iterdir()) == []
    assert torch.equal(torch.random.get_rng_state(), state)
    assert "PL_GLOBAL_SEED" not in os.environ
    assert capfd.readouterr() == ("", "")


def test_nothing_is_built(toy, monkeypatch):
    import toy_house

    def fail(*args, **kwargs):
        raise AssertionError("built")

    monkeypatch.setattr(toy_house.LossRecorder, "__init__", fail)
    monkeypatch.setattr(cli.SegalignCLI, "instantiate_trainer", fail)
    toy()


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--config={trainer: {max_stepz: 3}}", "'trainer.max_stepz'; did you mean `trainer.max_s"),
        ("--config={model: {init_args: {widht: 3}}}", "'widht' is not accepted"),
        ("--config={model: {init_args: {widht: 3}}}", "; did you mean `width`?"),
        ("--config={model: {init_args: {width: -3}}}", "`width`: Not of type PositiveInt: -3"),
        ("--config={trainer: {max_steps: many}}", "`trainer.max_steps`: Expected a <class 'int'>"),
        ("--config={model: {class_path: toy_house.Nope}}", "no attribute 'Nope'"),
        ("--config={model: {class_path: os.system}}", "could run any code"),
        ("--config={data: {class_path: mine.Data}}", "--allow_import mine"),
        ("--config={vars: {a: '${vars.nope}'}}", "because `vars.a` refers to it"),
        ("--config={vars: {a: '${nope:1}'}}", "nope"),
        ("--config={trainer: {max_steps: -1}}", "the training data never end"),
        ("--config=nowhere.yaml", "nowhere.yaml"),
        ("--trainer.max_stepz=3", "did you mean `trainer.max_steps`?"),
    ],
)
def test_what_a_run_refuses_is_refused_in_its_words(refused, option, message):
    assert message in refused(option)


def test_a_mistake_in_a_file_is_located(refused, tmp_path):
    path = tmp_path / "layer.yaml"
    path.write_text("trainer: {max_stepz: 3}")
    assert "in `" + str(path) in refused(f"--config={path}")
    (tmp_path / "other.yaml").write_text("{}")
    path.write_text("config: other.yaml")
    assert "no `config` key" in refused(f"--config={path}")


def test_permission_is_not_remembered(toy, toy_config):
    toy()
    strict = ConfigResolver(main.run_parts())
    with pytest.raises(ConfigError, match="--allow_import toy_house"):
        strict("fit", [f"--config={toy_config}"])


def test_refusals_do_not_spoil_what_comes_after(toy, refused, forgetful):
    before = toy("--vars.y=1")
    refused("--config={model: {init_args: {width: -3}}}")
    refused("--trainer.max_stepz=3")
    assert toy("--vars.y=1") == before == toy("--vars.y=1", resolver=forgetful)


@pytest.mark.parametrize(
    "text",
    ["1e-4", "1.0e-4", "1e5", "-.5", ".inf", "3", "1_000", "0x10", "0b1", "010", "0o10", "yes",
     "off", "null", "~", "text", "'12'", "1e", "1.2.3", "[1e-4, yes]", "{a: 1e-4}"],
)  # fmt: skip
def test_values_of_studies_mean_what_they_mean_in_config_files(toy, tmp_path, text):
    path = tmp_path / "layer.yaml"
    path.write_text(f"vars: {{k: {text}}}")
    value = read_yaml(path, "a file")["vars"]["k"]
    in_file = toy(f"--config={path}")["vars"]["k"]
    as_setting = toy(f"--config={dump_line({'vars': {'k': value}})}")["vars"]["k"]
    assert (as_setting, type(as_setting)) == (in_file, type(in_file))
    if "'" not in text:
        assert (value, type(value)) == (in_file, type(in_file))


@pytest.mark.parametrize("text", ["null", "yes", "12", "a: b", "{x: 1}", "#c", "", " a ", "- a"])
def test_text_stays_text_where_text_is_wanted(toy, text):
    layer = {"data": {"init_args": {"root": text}}}
    assert toy(f"--config={dump_line(layer)}")["data"]["init_args"]["root"] == text


def test_lists_are_appended_to_by_layers(toy):
    layer = {"trainer": {"callbacks+": [{"class_path": "toy_house.Notes"}]}}
    found = toy(f"--config={dump_line(layer)}")["trainer"]["callbacks"]
    assert [one["class_path"].rpartition(".")[2] for one in found] == [
        "EMA",
        "LossRecorder",
        "Notes",
    ]


def test_a_long_layer_is_no_path(toy):
    text = "x" * 5000
    assert toy(f"--config={dump_line({'vars': {'k': text}})}")["vars"]["k"] == text


def test_the_command_line_of_this_process_does_not_matter(toy, monkeypatch):
    expected = toy()
    monkeypatch.setattr(sys, "argv", ["main.py", "sweep", "plan", "study.yaml"])
    assert toy() == expected
    assert re.fullmatch(r"\w+", expected["model"]["class_path"].partition(".")[0])
