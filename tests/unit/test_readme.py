"""What README.md shows can be run: commands, configs, paths."""

import re
import shlex
from pathlib import Path

import pytest
import yaml

import main

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
# Names that stand for files of the reader's own.
PLACEHOLDERS = ("A.yaml", "B.yaml")
COMMAND = re.compile(r"main\.py ((?:fit|validate|test|predict) --config [^#`\n]*)")
NAMED_PATH = re.compile(
    r"(?:configs|docs|segalign|callbacks|lightning_modules|datamodules)/[\w./-]*"
)


def commands() -> list[list[str]]:
    return [shlex.split(line) for line in COMMAND.findall(README)]


def is_placeholder(command: list[str]) -> bool:
    return any(name in command for name in PLACEHOLDERS)


def parse(capsys, *arguments: str) -> dict:
    with pytest.raises(SystemExit) as ended:
        main.main([*arguments, "--print_config"])
    assert ended.value.code == 0, capsys.readouterr().err
    return yaml.safe_load(capsys.readouterr().out)


def test_there_are_commands_to_check():
    stages = {command[0] for command in commands() if not is_placeholder(command)}
    assert stages >= {"fit", "validate", "predict"}
    assert ["fit", "--config", "configs/quickstart.yaml"] in commands()


def test_placeholders_are_in_one_command():
    (command,) = (command for command in commands() if is_placeholder(command))
    assert command == shlex.split("fit --config A.yaml --config B.yaml --trainer.max_steps 50")


@pytest.mark.parametrize(
    "command", [each for each in commands() if not is_placeholder(each)], ids=" ".join
)
def test_commands_parse(capsys, monkeypatch, command):
    monkeypatch.chdir(ROOT)
    config = parse(capsys, *command)
    options = dict(zip(command[1::2], command[2::2], strict=True))
    if "--ckpt_path" in options:
        assert config["ckpt_path"] == options["--ckpt_path"]


def test_layers_and_overrides_parse(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    (command,) = (command for command in commands() if is_placeholder(command))
    files = {"A.yaml": "configs/scenes/align.yaml", "B.yaml": "configs/debug/tiny.yaml"}
    assert parse(capsys, *[files.get(word, word) for word in command])["trainer"]["max_steps"] == 50


def test_the_recipe_for_photographs_parses(capsys, tmp_path):
    (recipe,) = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)
    path = tmp_path / "photographs.yaml"
    path.write_text(recipe)
    config = parse(capsys, "fit", f"--config={path}")
    written = yaml.safe_load(recipe)
    for section in ("model", "data"):
        assert config[section]["class_path"] == written[section]["class_path"]
        for key, value in written[section]["init_args"].items():
            if not isinstance(value, dict):
                assert config[section]["init_args"][key] == value
    base, asked = (each["model"]["init_args"]["base"] for each in (config, written))
    assert base["class_path"] == asked["class_path"]
    assert base["init_args"].items() >= asked["init_args"].items()


def test_every_path_exists():
    named = {path.rstrip(".") for path in NAMED_PATH.findall(README)}
    assert {"configs/quickstart.yaml", "docs/data.md"} <= named
    assert sorted(path for path in named if not (ROOT / path).exists()) == []


def test_configs_named_beside_a_path_exist():
    for folder, names in re.findall(r"`(configs/[\w/]*/)[\w]+\.yaml`((?:, `\w+\.yaml`)+)", README):
        for name in re.findall(r"\w+\.yaml", names):
            assert (ROOT / folder / name).is_file()


def test_links_lead_somewhere():
    targets = re.findall(r"\]\((?!https?:)([^)#]+)\)", README)
    assert targets
    assert [target for target in targets if not (ROOT / target).exists()] == []
