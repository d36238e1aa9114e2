"""Whatever makes images, opened by its name alone."""

import json
import shutil

import numpy as np
import pytest
import torch
import toy_pipelines
from PIL import Image
from tiny_run import STABLE_DIFFUSION, model_settings, write_run

from lightning_modules.run_loading import load_module
from segalign.commands import export, generate
from segalign.errors import ConfigError, DataError
from segalign.generation.any_generator import (
    GeneratorOptions,
    kind_of,
    open_generator,
)
from segalign.pictures import to_uint8
from segalign.run_directory import BestRecord, write_best

PROMPTS = ["A red fox. It sits on a wall!", "two owls"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A run, its export and a plain pipeline; tests leave them as they are."""
    root = tmp_path_factory.mktemp("sources")
    write_run(root / "run", model_settings(STABLE_DIFFUSION, lora={"rank": 2}))
    options = ["--checkpoint", str(root / "run"), "--out", str(root / "export")]
    assert export.run([*options, "--format", "diffusers"], load_module) == 0
    toy_pipelines.stable_diffusion().save_pretrained(root / "plain")
    return root


def opened(source, **options):
    return open_generator(str(source), load_module, GeneratorOptions(**options), device="cpu")


@pytest.mark.parametrize("kind", ["run", "export"])
def test_images_are_those_of_the_generate_command(place, kind, tmp_path, capsys):
    options = ["--checkpoint", str(place / kind), "--out", str(tmp_path), "--seeds", "7"]
    prompts = [f"--prompt={prompt}" for prompt in PROMPTS]
    assert generate.run([*options, *prompts, "--device=cpu"], load_module) == 0
    made = [np.asarray(Image.open(tmp_path / f"0000000{i}-s7.png")) for i in (0, 1)]
    generator = opened(place / kind)
    images = generator.generate(PROMPTS, [0, 1], 7, generator.best_weights)
    assert np.array_equal(to_uint8(images), np.stack(made))


def test_weights_of_a_run_are_chosen(place):
    averaged, raw = opened(place / "run"), opened(place / "run", weights="raw")
    assert (averaged.best_weights, raw.best_weights) == ("ema", "raw")
    assert (averaged.description()["weights"], raw.description()["weights"]) == ("ema", "raw")
    images = raw.generate(PROMPTS, [0, 1], 7, "raw")
    assert (images - averaged.generate(PROMPTS, [0, 1], 7, "ema")).abs().max() > 1e-3
    assert torch.equal(images, averaged.generate(PROMPTS, [0, 1], 7, "raw"))


def test_settings_are_the_models_own_unless_given(place):
    own = opened(place / "run").description()["sampler"]
    assert (own["name"], own["num_inference_steps"], own["guidance_scale"]) == ("ddim", 2, 2.0)
    for kind in ("run", "export"):
        changed = opened(place / kind, sampler="unipc", num_inference_steps=3, guidance_scale=4.0)
        found = changed.description()["sampler"]
        assert (found["name"], found["num_inference_steps"], found["guidance_scale"]) == (
            "unipc", 3, 4.0,
        )  # fmt: skip


def test_descriptions_are_plain_and_tell_models_apart(place):
    found = {kind: opened(place / kind).description() for kind in ("run", "export", "plain")}
    assert json.loads(json.dumps(found)) == found
    assert [one["kind"] for one in found.values()] == ["run", "export", "pipeline"]
    assert [one["name"] for one in found.values()] == ["run/step-00000003", "export", "plain"]
    assert len({one["digest"] for one in found.values()}) == 3
    assert all(one["dtype"] == "float32" for one in found.values())
    assert str(place) not in json.dumps(found)


def test_precision_is_that_of_the_generate_command(place):
    low = opened(place / "run", dtype="bfloat16")
    assert low.description()["dtype"] == "bfloat16"
    images = low.generate(PROMPTS, [0, 1], 7)
    full = opened(place / "run").generate(PROMPTS, [0, 1], 7)
    assert 0 < (images - full).abs().max() < 0.2


def test_the_best_checkpoint_is_meant_by_its_name(place, tmp_path):
    run = shutil.copytree(place / "run", tmp_path / "run")
    shutil.copytree(run / "checkpoints" / "step-00000003", run / "checkpoints" / "step-00000005")
    write_best(run, BestRecord(3, "val/x", 1.0, "max"))
    assert opened(run).description()["name"] == "run/step-00000005"
    best = opened(run / "checkpoints" / "best")
    assert best.description()["name"] == "run/step-00000003"


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("export", {"weights": "ema"}, "expected no `weights`"),
        ("plain", {"weights": "raw"}, "expected no `weights`"),
        ("run", {"height": 64}, "expected no `height`"),
        ("export", {"arguments": {"eta": 0.0}}, "expected no `arguments`"),
        ("plain", {"arguments": {"eat": 0.0}}, "got `eat`"),
    ],
)
def test_options_of_other_kinds_are_refused(place, kind, options, message):
    with pytest.raises(ConfigError, match=message) as raised:
        opened(place / kind, **options)
    assert "\n" not in str(raised.value)


def test_averaged_weights_of_an_export_are_refused(place):
    with pytest.raises(ConfigError, match="holds one set of weights; got `ema`"):
        opened(place / "export").generate(PROMPTS, [0, 1], 7, "ema")


def test_a_damaged_export_is_refused(place, tmp_path):
    folder = shutil.copytree(place / "export", tmp_path / "export")
    (folder / "unet" / "config.json").write_text("{}")
    with pytest.raises(DataError, match="as it was written"):
        opened(folder)


def test_names_say_what_is_meant(place, tmp_path, monkeypatch):
    assert kind_of(str(place / "run")) == "run"
    assert kind_of(str(place / "run" / "checkpoints" / "best")) == "run"
    assert kind_of(str(place / "plain")) == "pipeline"
    assert kind_of(str(place / "export")) == "export"
    monkeypatch.chdir(tmp_path)
    assert kind_of("owner/name") == "pipeline"
    (tmp_path / "owner").mkdir()
    with pytest.raises(ConfigError, match=r"found nothing at `name`\. Correct it"):
        kind_of("name")


@pytest.mark.parametrize(
    "missing",
    ["owner/name", "runs/name", "models/longsd", "exported/x", "data/x", "./x", "../x/y", "/x/y"],
)
def test_a_mistyped_path_is_no_hub_id(missing, tmp_path, monkeypatch):
    (tmp_path / "owner").mkdir()
    monkeypatch.chdir(tmp_path)
    message = "found nothing at .* path of a folder, not a hub id.*download the hub's model of this"
    with pytest.raises(ConfigError, match=message) as raised:
        kind_of(missing)
    assert "\n" not in str(raised.value)


def test_a_folder_without_a_checkpoint_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="expected `source` to be a checkpoint"):
        opened(tmp_path)
