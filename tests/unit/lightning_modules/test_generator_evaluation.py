"""`main.py test` of a finished model: it is opened, asked for images, and left as it is."""

import hashlib
import json
import re

import pytest
import torch
import toy_pipelines
from image_recorder import CAPTIONS
from safetensors.torch import load_file
from tiny_run import model_settings, write_run

import main
from lightning_modules.run_loading import load_module
from segalign.generation.any_generator import GeneratorOptions, open_generator
from segalign.run_format import save_checkpoint


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A run and a plain pipeline; tests leave them as they are."""
    root = tmp_path_factory.mktemp("sources")
    write_run(root / "run", model_settings())
    toy_pipelines.stable_diffusion().save_pretrained(root / "plain")
    return root


@pytest.fixture
def command(repository, tmp_path_factory, run_dir):
    shards = tmp_path_factory.getbasetemp() / "scenes"
    scenes = {"world": "2x2", "num_train": 4, "num_val": 4, "root": str(shards)}

    def run(stage, source, *arguments):
        return main.main([
            stage, "--allow_import=image_recorder",
            f"--config={repository / 'configs' / 'evaluate.yaml'}", f"--run_dir={run_dir}",
            f"--model.init_args.source={source}", "--data.init_args.val_shards=null",
            f"--data.init_args.scenes={json.dumps(scenes)}", "--trainer.accelerator=cpu",
            "--trainer.devices=1", "--trainer.enable_progress_bar=false", *arguments,
        ])  # fmt: skip

    return run


def digests(folder):
    return {
        path: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


RECORD = '--trainer.callbacks=[{"class_path": "image_recorder.ImageRecorder"}]'


@pytest.mark.parametrize("kind", ["run", "plain"])
def test_a_finished_model_is_evaluated(kind, sources, command, run_dir):
    before = digests(sources)
    steps = "--model.init_args.num_inference_steps=3"
    assert command("test", sources / kind, steps, RECORD) == 0
    images = load_file(run_dir / "images-0-of-1.safetensors")["images"]
    options = GeneratorOptions(num_inference_steps=3)
    alone = open_generator(str(sources / kind), load_module, options, device="cpu")
    assert torch.equal(images, alone.generate(CAPTIONS, [5, 6], 3, alone.best_weights))
    assert digests(sources) == before


def test_validation_does_nothing_by_itself(sources, command, run_dir):
    assert command("validate", sources / "run", "--trainer.callbacks=[]") == 0
    assert not any(path.is_file() for path in run_dir.rglob("*"))


def test_captions_become_pictures(sources, command, run_dir):
    assert command("predict", sources / "run", "--data.init_args.global_batch_size=4") == 0
    assert len(list(run_dir.rglob("*.png"))) == 4


@pytest.mark.parametrize(
    ("stage", "arguments", "message"),
    [
        ("fit", ["--trainer.max_steps=1"], "expected `test`, `validate` or `predict`"),
        ("test", ["--trainer.precision=bf16-mixed"], r"expected `trainer\.precision: 32-true`"),
        ("test", ["--model.init_args.height=64"], "expected no `height`"),
        ("test", ["--model.init_args.source=elsewhere"], "found nothing at `elsewhere`"),
    ],
)
def test_what_cannot_be_is_one_line(stage, arguments, message, sources, command, capsys):
    assert command(stage, sources / "run", *arguments) == 78
    captured = capsys.readouterr()
    (line,) = [each for each in captured.err.splitlines() if each.startswith("error: ")]
    assert re.search(message, line)


def test_a_checkpoint_is_named_by_the_source_alone(sources, command, capsys, tmp_path):
    checkpoint = tmp_path / "other" / "checkpoints" / "step-00000001"
    save_checkpoint(
        {"pytorch-lightning_version": "2.6.0", "state_dict": {}, "global_step": 1}, checkpoint
    )
    assert command("test", sources / "run", f"--ckpt_path={checkpoint}") == 78
    assert "is named by `--model.init_args.source`" in capsys.readouterr().err
