"""Every file under configs/ is in this table, and parses."""

from pathlib import Path

import pytest
import yaml

import main
from lightning_modules.config_checks import check_config_files

CONFIGS = Path(__file__).parents[2] / "configs"

# Recipes run alone. Fragments and deltas are parsed over the recipe named beside them.
RECIPES = (
    "quickstart.yaml",
    "scenes/align.yaml",
    "scenes/generator.yaml",
    "scenes/scorer.yaml",
)
LAYERS = {
    "scenes/reader.yaml": "scenes/scorer.yaml",
    "scenes/shapes.yaml": "scenes/generator.yaml",
    "base/logging.yaml": "scenes/align.yaml",
    "base/trainer.yaml": "scenes/align.yaml",
    "debug/overfit.yaml": "scenes/align.yaml",
    "debug/profile.yaml": "scenes/align.yaml",
    "debug/tiny.yaml": "scenes/align.yaml",
}


def parse(capsys, *names: str, stage: str = "fit") -> dict:
    files = [f"--config={CONFIGS / name}" for name in names]
    with pytest.raises(SystemExit) as ended:
        main.main([stage, *files, "--print_config"])
    assert ended.value.code == 0
    return yaml.safe_load(capsys.readouterr().out)


def test_the_table_names_every_file():
    found = {path.relative_to(CONFIGS).as_posix() for path in CONFIGS.rglob("*.y*ml")}
    assert found == {*RECIPES, *LAYERS}
    assert len(found) == len(RECIPES) + len(LAYERS)


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("stage", ["fit", "validate"])
def test_recipes_parse(capsys, name, stage):
    config = parse(capsys, name, stage=stage)
    assert config["run_dir"].startswith("runs/")
    assert config["run_dir"] != "runs/default"
    assert config["trainer"]["use_distributed_sampler"] is False


@pytest.mark.parametrize(("name", "recipe"), LAYERS.items())
def test_layers_parse_over_a_recipe(capsys, name, recipe):
    config = parse(capsys, recipe, name)
    settings = yaml.safe_load((CONFIGS / name).read_text())
    for key, value in settings["trainer"].items():
        if not isinstance(value, dict) and not key.endswith("+"):
            assert config["trainer"][key] == value


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_tiny_delta_shrinks_every_recipe(capsys, recipe):
    config = parse(capsys, recipe, "debug/tiny.yaml")
    assert config["trainer"]["max_steps"] == 2
    assert config["run_dir"] == "runs/debug/tiny"
    assert config["checkpoint"]["overwrite"] is True


@pytest.mark.parametrize("name", [*RECIPES, *LAYERS])
def test_headers_give_the_command_and_no_file_nests_another(name):
    assert "python main.py fit --config" in (CONFIGS / name).read_text().partition("\n\n")[0]
    check_config_files([CONFIGS / name], [])
