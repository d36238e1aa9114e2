"""The whole loop on scenes through main.py, each command fed by the one before."""

import json
import os
from pathlib import Path

import pytest
from PIL import Image
from safetensors.torch import load_file

import main
from segalign.evaluation.result import EvaluationResult
from segalign.evaluation.result_files import RESULT_FILE
from segalign.run_directory import newest_checkpoint, read_best

pytestmark = pytest.mark.e2e

CONFIGS = Path(__file__).parents[2] / "configs"
NUM = 12
QUIET = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
TWO_STEPS = [
    "--trainer.max_steps=2",
    "--trainer.val_check_interval=2",
    "--trainer.limit_val_batches=1",
    "--trainer.accelerator=cpu",
    "--checkpoint.every_n_steps=2",
]


def run(*arguments):
    assert main.main([str(argument) for argument in arguments]) == 0, arguments


def fit(config, place, name, *options, shards=("train", "val")):
    train, val = (place / one for one in shards)
    run(
        "fit", f"--config={CONFIGS / config}", f"--run_dir={place / name}", *TWO_STEPS, *QUIET,
        "--data.init_args.scenes=null", f"--data.init_args.train_shards={train}",
        f"--data.init_args.val_shards={val}", "--data.init_args.global_batch_size=4",
        "--data.init_args.val_batch_size=4", "--data.init_args.num_workers=0", *options,
    )  # fmt: skip


def pack(place):
    # A common direction wants 512 captions.
    kinds = [("train", 0, 512, []), ("val", 600, NUM, []), ("pairs", 700, NUM, ["--pairs"])]
    for name, start, count, more in kinds:
        numbers = ["--count", count, "--start", start]
        run("shards", "pack", "scenes", place / name, *numbers, *more)


def train_preference_model(place):
    callbacks = "--trainer.callbacks=[]"
    fit("scenes/preference.yaml", place, "preference", callbacks, shards=("pairs", "pairs"))
    run(
        "export", "--checkpoint", place / "preference", "--format", "clip",
        "--out", place / "scorer",
    )  # fmt: skip


def estimate_direction(place):
    run(
        "direction", "estimate", place / "train", "--scorer", place / "scorer",
        "--out", place / "direction.safetensors",
    )  # fmt: skip


def train_generator(place):
    fit("scenes/align.yaml", place, "stage_1", "--trainer.callbacks=[]")


def tune_generator(place):
    reward = {
        "class_path": "segalign.rewards.zoo.HuggingFaceClip",
        "init_args": {
            "model": str(place / "scorer"),
            "text": "segments",
            "omega": 0.3,
            "common_direction": {
                "class_path": "segalign.rewards.direction_settings.CorpusEstimate",
                "init_args": {"file": str(place / "direction.safetensors")},
            },
        },
    }
    fit(
        "scenes/reward.yaml", place, "stage_2",
        f"--model.init_args.base.init_args.generator={place / 'stage_1'}",
        f"--model.init_args.reward={json.dumps(reward)}",
    )  # fmt: skip


def evaluate(place, source, name):
    run(
        "test", f"--config={CONFIGS / 'evaluate.yaml'}",
        f"--config={CONFIGS / 'scenes/metrics.yaml'}", f"--model.init_args.source={source}",
        f"--run_dir={place / name}", "--data.init_args.scenes=null",
        f"--data.init_args.val_shards={place / 'val'}", "--data.init_args.num_workers=0",
        f"--trainer.callbacks={json.dumps(small_metrics(place))}", *QUIET,
    )  # fmt: skip
    return EvaluationResult.load(place / name / "evaluation" / "test" / RESULT_FILE)


def small_metrics(place):
    """The recipe's own metrics, on fewer images than it makes."""
    tiny = {
        "class_path": "segalign.metrics.extractors.tiny.TinyExtractor",
        "init_args": {"num_features": 8},
    }
    reward = {
        "class_path": "segalign.rewards.zoo.HuggingFaceClip",
        "init_args": {"model": str(place / "scorer"), "text": "segments"},
    }
    direction = {"own": str(place / "direction.safetensors")}
    numbers = {"images_per_caption": 2, "batch_size": 8}
    callbacks = {
        "image_evaluation.ImageEvaluation": numbers,
        "alignment.SceneFacts": {},
        "alignment.TextAlignment": {"rewards": {"own": reward}, "common_directions": direction},
        "fid.FID": {"name": "fid_tiny", "extractor": tiny},
        "kid.KID": {"name": "kid_tiny", "extractor": tiny},
        "evaluation_report.EvaluationReport": {"num_pictures": 2},
    }
    return [
        {"class_path": f"callbacks.{name}", "init_args": settings}
        for name, settings in callbacks.items()
    ]


@pytest.fixture(scope="module")
def loop(tmp_path_factory):
    """Run the loop once; every test looks at a part of it."""
    place, before = tmp_path_factory.mktemp("loop"), dict(os.environ)
    pack(place)
    train_preference_model(place)
    estimate_direction(place)
    train_generator(place)
    tune_generator(place)
    results = {"run": evaluate(place, place / "stage_2", "evaluated_run")}
    exported, prompts = place / "exported", place / "prompts.txt"
    run("export", "--checkpoint", place / "stage_2", "--format", "diffusers", "--out", exported)
    results["export"] = evaluate(place, exported, "evaluated_export")
    prompts.write_text("A large red circle sits in the top left. The background is white.\n")
    run("generate", "--checkpoint", exported, "--prompt-file", prompts, "--out", place / "images")
    os.environ.clear()
    os.environ.update(before)
    return place, results


def weights_of(place, name):
    return load_file(newest_checkpoint(place / name) / "model.safetensors")


def test_each_stage_starts_from_the_one_before(loop):
    place, _ = loop
    first, second = weights_of(place, "stage_1"), weights_of(place, "stage_2")
    shared = [name for name in first if name.startswith("unet.") and name in second]
    moved = [name for name in shared if not first[name].equal(second[name])]
    assert len(moved) > 10
    # Two steps at a rate of 1e-5 in the warm-up: it is still the same network.
    distance = max(float((first[name] - second[name]).abs().max()) for name in shared)
    assert 0 < distance < 1e-3
    assert read_best(place / "stage_2").monitor == "val/held_out/scorer"


def test_the_test_measures_the_tuned_model(loop):
    _, results = loop
    found = results["run"]
    assert found.num_counted == 2 * NUM
    expected = [
        "attributes",
        "reward/own",
        "denscore/own",
        "denscore_o/own",
        "fid_tiny",
        "kid_tiny",
    ]
    assert set(expected) <= found.values.keys()
    assert 0.3 < found.values["attributes"] <= 1
    protocol = found.metrics["alignment"].protocol["rewards"]["own"]
    assert "direction" in json.dumps(protocol)


def test_an_exported_folder_has_the_same_numbers(loop):
    _, results = loop
    run_values, folder_values = (results[name].values for name in ("run", "export"))
    assert run_values.keys() == folder_values.keys()
    for name, value in run_values.items():
        assert folder_values[name] == pytest.approx(value, rel=2e-3, abs=2e-3), name
    assert results["run"].digest() == results["export"].digest()


def test_results_make_one_table(loop, capsys):
    place, _ = loop
    folders = [
        place / name / "evaluation" / "test" for name in ("evaluated_run", "evaluated_export")
    ]
    run("results", *folders)
    table = capsys.readouterr().out
    assert "| model |" in table
    assert sum(line.startswith("| ") for line in table.splitlines()) == 3


def test_the_exported_folder_draws(loop):
    place, _ = loop
    (picture,) = (place / "images").glob("**/*.png")
    assert Image.open(picture).size == (36, 36)
