"""Every file under configs/ is in this table, and parses."""

from pathlib import Path

import pytest
import torch
import yaml

import main
from lightning_modules.config_checks import check_config_files
from segalign.diffusion.lora import OFFICIAL_TARGETS

CONFIGS = Path(__file__).parents[2] / "configs"

# Recipes run alone. Fragments and deltas are parsed over the recipe named beside them.
RECIPES = (
    "denscore.yaml",
    "longsd_align.yaml",
    "quickstart.yaml",
    "scenes/align.yaml",
    "scenes/generator.yaml",
    "scenes/held_out_scorer.yaml",
    "scenes/preference.yaml",
    "scenes/scorer.yaml",
)
LAYERS = {
    "scenes/reader.yaml": "scenes/scorer.yaml",
    "scenes/shapes.yaml": "scenes/generator.yaml",
    "base/logging.yaml": "scenes/align.yaml",
    "base/trainer.yaml": "scenes/align.yaml",
    "debug/denscore_tiny.yaml": "denscore.yaml",
    "debug/longsd_align_tiny.yaml": "longsd_align.yaml",
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


def test_the_flagship_has_the_settings_of_the_paper(capsys):
    config = parse(capsys, "longsd_align.yaml")
    trainer, model, data = (
        config["trainer"],
        config["model"]["init_args"],
        config["data"]["init_args"],
    )
    expected = {"max_steps": 28750, "gradient_clip_val": 0.3, "precision": "bf16-mixed"}
    assert {key: trainer[key] for key in expected} == expected
    assert model["optimizer"] == {
        "class_path": "torch.optim.AdamW",
        "init_args": {
            **model["optimizer"]["init_args"],
            "lr": 3e-5, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.01,
        },
    }  # fmt: skip
    assert model["lora"]["rank"] == 32
    assert model["lora"]["target_modules"] == OFFICIAL_TARGETS
    assert model["base"]["init_args"]["dtype"] == "bfloat16"
    text = model["text"]
    assert (text["context"], text["token_budget"], text["t5"]["token_budget"]) == (
        "clip+t5",
        240,
        240,
    )
    assert text["t5"]["attend_to_padding"] is True
    assert text["mask_padding"] is False
    assert data["global_batch_size"] == 192
    assert data["image_size"] == 512
    assert data["caption_dropout"] == 0.1


def test_the_flagship_warms_up_over_2000_steps_and_stays(capsys):
    schedule = parse(capsys, "longsd_align.yaml")["model"]["init_args"]["lr_scheduler"]
    assert schedule["class_path"] == "torch.optim.lr_scheduler.LinearLR"
    settings = {**schedule["init_args"], "total_iters": 20, "start_factor": 1 / 20}
    assert schedule["init_args"]["total_iters"] == 2000
    assert schedule["init_args"]["start_factor"] == 1 / 2000
    optimizer = torch.optim.AdamW([torch.zeros(1, requires_grad=True)], lr=3e-5)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, **settings)
    rates = []
    for _ in range(30):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    assert rates[0] == pytest.approx(3e-5 / 20)
    assert rates == sorted(rates)
    assert rates[20:] == pytest.approx([3e-5] * 10)


def test_the_tiny_flagship_keeps_the_method(capsys):
    full = parse(capsys, "longsd_align.yaml")
    tiny = parse(capsys, "longsd_align.yaml", "debug/longsd_align_tiny.yaml")
    assert tiny["trainer"]["precision"] == full["trainer"]["precision"]
    assert tiny["trainer"]["gradient_clip_val"] == full["trainer"]["gradient_clip_val"]
    ours, theirs = tiny["model"]["init_args"], full["model"]["init_args"]
    assert ours["optimizer"] == theirs["optimizer"]
    assert ours["base"]["init_args"]["dtype"] == "bfloat16"
    changed = {"model", "init", "adapter"}
    assert {**ours["text"], "t5": None} == {**theirs["text"], "t5": None}
    for key in theirs["text"]["t5"].keys() - changed:
        assert ours["text"]["t5"][key] == theirs["text"]["t5"][key]


def test_denscore_has_the_settings_of_pickscore(capsys):
    config = parse(capsys, "denscore.yaml")
    trainer, model = config["trainer"], config["model"]["init_args"]
    expected = {"max_steps": 4000, "gradient_clip_val": 1.0, "precision": "bf16-mixed"}
    assert {key: trainer[key] for key in expected} == expected
    assert model["optimizer"]["init_args"]["lr"] == 3e-6
    schedule = model["lr_scheduler"]
    assert schedule["class_path"].endswith("WarmupLinearLR")
    assert schedule["init_args"] == {"total_steps": 4000, "warmup_steps": 500}
    assert config["data"]["init_args"]["global_batch_size"] == 128
    assert model["text"] == "segments"
    losses = {name for name, weight in model["objective"].items() if weight and "width" not in name}
    assert losses == {"pairwise", "segment_contrastive"}


def test_the_tiny_denscore_keeps_the_method(capsys):
    full = parse(capsys, "denscore.yaml")["model"]["init_args"]
    tiny = parse(capsys, "denscore.yaml", "debug/denscore_tiny.yaml")["model"]["init_args"]
    assert tiny["scorer"]["init_args"]["init"] == "random"
    for key in full.keys() - {"scorer", "lr_scheduler"}:
        assert tiny[key] == full[key]
