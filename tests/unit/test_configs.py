"""Every file under configs/ is in this table, and parses."""

import contextlib
import io
import math
import pydoc
from pathlib import Path

import pytest
import torch
import yaml

import main
from lightning_modules.config_checks import check_config_files
from segalign.diffusion.lora import OFFICIAL_TARGETS
from segalign.diffusion.sampler import DDIMSampler

CONFIGS = Path(__file__).parents[2] / "configs"

# Recipes run alone. Fragments and deltas are parsed over the recipe named beside them; ablations
# over both reward recipes: here over longsd.yaml, end to end over scenes/reward.yaml.
RECIPES = (
    "denscore.yaml",
    "longsd.yaml",
    "longsd_align.yaml",
    "quickstart.yaml",
    "scenes/align.yaml",
    "scenes/generator.yaml",
    "scenes/held_out_scorer.yaml",
    "scenes/preference.yaml",
    "scenes/reward.yaml",
    "scenes/scorer.yaml",
)
# These measure finished models, and never train.
EVALUATIONS = ("evaluate.yaml",)
EVALUATION_LAYERS = {"scenes/metrics.yaml": "evaluate.yaml"}
ABLATIONS = (
    "ablations/alignprop.yaml",
    "ablations/draft_1.yaml",
    "ablations/draft_lv.yaml",
    "ablations/k1.yaml",
    "ablations/k10.yaml",
    "ablations/no_decomposition.yaml",
    "ablations/refl.yaml",
    "ablations/text_relevant_only.yaml",
)
LAYERS = {
    "longsd_lcm.yaml": "longsd.yaml",
    "scenes/reader.yaml": "scenes/scorer.yaml",
    "scenes/shapes.yaml": "scenes/generator.yaml",
    "base/ddp.yaml": "scenes/align.yaml",
    "base/fsdp.yaml": "scenes/align.yaml",
    "base/logging.yaml": "scenes/align.yaml",
    "base/metrics.yaml": "longsd.yaml",
    "base/slurm.yaml": "scenes/align.yaml",
    "base/trainer.yaml": "scenes/align.yaml",
    "debug/denscore_tiny.yaml": "denscore.yaml",
    "debug/longsd_align_tiny.yaml": "longsd_align.yaml",
    "debug/longsd_tiny.yaml": "longsd.yaml",
    "debug/overfit.yaml": "scenes/align.yaml",
    "debug/profile.yaml": "scenes/align.yaml",
    "debug/scenes_hacking.yaml": "scenes/reward.yaml",
    "debug/tiny.yaml": "scenes/align.yaml",
    "sweeps/layers/scenes_align.yaml": "scenes/align.yaml",
    "sweeps/layers/scenes_direction.yaml": "scenes/reward.yaml",
    "sweeps/layers/scenes_images.yaml": "scenes/reward.yaml",
    "sweeps/layers/scenes_reward.yaml": "scenes/reward.yaml",
    "sweeps/layers/sd15_images.yaml": "longsd.yaml",
}
# These are no configs but studies of them; test_sweep_configs.py plans them.
STUDIES = (
    "sweeps/directions.yaml",
    "sweeps/encoders.yaml",
    "sweeps/reweight.yaml",
    "sweeps/splitters.yaml",
    "sweeps/strategies.yaml",
)


def parse(capsys, *names: str, stage: str = "fit") -> dict:
    files = [f"--config={CONFIGS / name}" for name in names]
    with pytest.raises(SystemExit) as ended:
        main.main([stage, *files, "--print_config"])
    assert ended.value.code == 0
    return yaml.safe_load(capsys.readouterr().out)


def test_the_table_names_every_file():
    found = {path.relative_to(CONFIGS).as_posix() for path in CONFIGS.rglob("*.y*ml")}
    assert sorted(found) == sorted(
        [*RECIPES, *EVALUATIONS, *EVALUATION_LAYERS, *LAYERS, *ABLATIONS, *STUDIES]
    )


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("stage", ["fit", "validate"])
def test_recipes_parse(capsys, name, stage):
    config = parse(capsys, name, stage=stage)
    assert config["run_dir"].startswith("runs/")
    assert config["run_dir"] != "runs/default"
    assert config["trainer"]["use_distributed_sampler"] is False


@pytest.mark.parametrize("name", EVALUATIONS)
@pytest.mark.parametrize("stage", ["test", "validate", "predict"])
def test_evaluations_parse(capsys, name, stage):
    config = parse(capsys, name, stage=stage)
    assert config["run_dir"].startswith("runs/")
    assert config["trainer"]["use_distributed_sampler"] is False
    assert config["data"]["init_args"]["content"] == "caption"
    assert "python main.py test --config" in (CONFIGS / name).read_text().partition("\n\n")[0]
    check_config_files([CONFIGS / name], [])


@pytest.mark.parametrize(("name", "recipe"), EVALUATION_LAYERS.items())
def test_evaluation_layers_parse_over_a_recipe(capsys, name, recipe):
    config = parse(capsys, recipe, name, stage="test")
    own = yaml.safe_load((CONFIGS / name).read_text())["trainer"]["callbacks"]
    found = [one["class_path"] for one in config["trainer"]["callbacks"]]
    assert found == [one["class_path"] for one in own]
    check_config_files([CONFIGS / name], [])


@pytest.mark.parametrize(("name", "recipe"), LAYERS.items())
def test_layers_parse_over_a_recipe(capsys, name, recipe):
    config = parse(capsys, recipe, name)
    assert_holds(config, yaml.safe_load((CONFIGS / name).read_text()), name)


def assert_holds(config: dict, settings: dict, place: str) -> None:
    """Find all settings of a layer in a parsed config."""
    if "class_path" not in config:
        settings = settings.get("init_args", settings)  # a dataclass, printed without its name
    for key, value in settings.items():
        if key.endswith("+") or "${" in str(value):
            continue
        if isinstance(value, dict):
            assert_holds(config[key], value, f"{place}: {key}")
        elif not isinstance(value, list) or value == []:
            assert config[key] == value, f"{place}: {key}"


@pytest.fixture(scope="module")
def longsd() -> dict:
    """The parsed recipe, with which several tests compare."""
    printed = io.StringIO()
    with pytest.raises(SystemExit), contextlib.redirect_stdout(printed):
        main.main(["fit", f"--config={CONFIGS / 'longsd.yaml'}", "--print_config"])
    return yaml.safe_load(printed.getvalue())


@pytest.mark.parametrize("name", ABLATIONS)
def test_an_ablation_changes_one_thing_of_the_flagship(capsys, longsd, name):
    layer = yaml.safe_load((CONFIGS / name).read_text())
    (changed,) = layer["model"]["init_args"]
    config = parse(capsys, "longsd.yaml", name)
    ours, theirs = config["model"]["init_args"], longsd["model"]["init_args"]
    assert ours[changed] != theirs[changed]
    ours = ours | {changed: theirs[changed]}
    assert config | {"model": config["model"] | {"init_args": ours}} == longsd
    wanted = layer["model"]["init_args"][changed]
    if "class_path" in wanted:
        # No argument of the recipe's own class is left.
        strategy = pydoc.locate(wanted["class_path"])
        kept = config["model"]["init_args"][changed]["init_args"]
        assert strategy(**kept) == strategy(**wanted["init_args"])


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_tiny_delta_shrinks_every_recipe(capsys, recipe):
    config = parse(capsys, recipe, "debug/tiny.yaml")
    assert config["trainer"]["max_steps"] == 2
    assert config["run_dir"] == "runs/debug/tiny"
    assert config["checkpoint"]["overwrite"] is True


@pytest.mark.parametrize("name", ["debug/overfit.yaml", "debug/profile.yaml"])
def test_layers_without_validation_monitor_none(capsys, name):
    config = parse(capsys, "longsd.yaml", name)
    assert config["trainer"]["limit_val_batches"] == 0
    assert config["checkpoint"]["monitor"] is None


@pytest.mark.parametrize("name", [*RECIPES, *LAYERS, *ABLATIONS])
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


def test_longsd_has_the_settings_of_the_paper(longsd):
    trainer, model, data = (
        longsd["trainer"],
        longsd["model"]["init_args"],
        longsd["data"]["init_args"],
    )
    expected = {"max_steps": 3750, "precision": "bf16-mixed", "accumulate_grad_batches": 1}
    assert {key: trainer[key] for key in expected} == expected
    # The module clips and accumulates itself, and would refuse this.
    assert trainer["gradient_clip_val"] is None
    assert model["max_grad_norm"] == 0.3
    assert model["objective"] == {"scale": 0.5, "hinge": None}
    assert model["lora"]["rank"] == 32
    assert model["strategy"]["class_path"] == "segalign.truncation.drtune.LongAlign"
    expected = {"num_inference_steps": 50, "guidance_scale": 7.5, "spacing": "official", "eta": 0.0}
    assert {key: model["rollout_sampler"][key] for key in expected} == expected
    reward = model["reward"]["init_args"]
    expected = {"text": "segments", "omega": 0.3, "crop": 504, "resize": "bilinear"}
    assert {key: reward[key] for key in expected} == expected
    optimizer = model["optimizer"]["init_args"]
    expected = {"lr": 3e-5, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.01}
    assert {key: optimizer[key] for key in expected} == expected
    assert (data["content"], data["global_batch_size"]) == ("caption", 48)
    # What is monitored is not what is trained on.
    assert longsd["checkpoint"]["monitor"] == "val/held_out/clip_l"


def test_longsd_reads_captions_as_stage_1_does(capsys, longsd):
    one = parse(capsys, "longsd_align.yaml")["model"]["init_args"]
    two = longsd["model"]["init_args"]
    one["text"]["t5"]["train_adapter"] = False
    assert two["text"] == one["text"]
    assert two["lora"] == one["lora"]
    assert two["base"] == one["base"]


def test_the_lcm_layer_samples_and_trains_four_steps(capsys):
    config = parse(capsys, "longsd.yaml", "longsd_lcm.yaml")
    model = config["model"]["init_args"]
    assert model["sampler"] == model["rollout_sampler"]
    # Nothing of the scheduler in whose place it came.
    assert DDIMSampler(**model["sampler"]) == DDIMSampler(
        num_inference_steps=4, guidance_scale=1.0, spacing="trailing", eta=math.inf
    )
    assert model["strategy"]["init_args"]["num_train_steps"] == 4


def test_the_tiny_longsd_keeps_the_method(capsys, longsd):
    full = longsd
    tiny = parse(capsys, "longsd.yaml", "debug/longsd_tiny.yaml")
    assert tiny["trainer"]["precision"] == full["trainer"]["precision"]
    assert tiny["checkpoint"]["monitor"] == full["checkpoint"]["monitor"]
    ours, theirs = tiny["model"]["init_args"], full["model"]["init_args"]
    small = {"base", "text", "lora", "reward", "held_out", "rollout_sampler", "sampler"}
    for key in theirs.keys() - small:
        assert ours[key] == theirs[key]
    changed = {"model", "init", "crop"}
    for part in ("reward", "base"):
        one, other = (settings[part]["init_args"] for settings in (ours, theirs))
        for key in one.keys() - changed - {"size", "loras"}:
            assert one[key] == other[key]
    assert {**ours["text"], "t5": None} == {**theirs["text"], "t5": None}
