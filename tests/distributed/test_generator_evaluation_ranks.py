"""`main.py test` on two ranks: no weight is trained, and every rank makes the same images."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import toy_pipelines
from image_recorder import CAPTIONS
from safetensors.torch import load_file

from segalign.generation.pipeline_call import CallSettings
from segalign.generation.pipeline_generator import PipelineGenerator

pytestmark = pytest.mark.distributed

REPOSITORY = Path(__file__).parents[2]


def test_two_ranks_make_the_images_of_one(tmp_path):
    source = tmp_path / "plain"
    toy_pipelines.stable_diffusion().save_pretrained(source)
    scenes = {"world": "2x2", "num_train": 4, "num_val": 4, "root": str(tmp_path / "scenes")}
    command = [
        sys.executable, "main.py", "test", "--allow_import=image_recorder",
        "--config=configs/evaluate.yaml", f"--run_dir={tmp_path / 'results'}",
        f"--model.init_args.source={source}", "--model.init_args.num_inference_steps=2",
        "--data.init_args.val_shards=null", f"--data.init_args.scenes={json.dumps(scenes)}",
        '--trainer.callbacks=[{"class_path": "image_recorder.ImageRecorder"}]',
        "--trainer.accelerator=cpu", "--trainer.devices=2", "--trainer.enable_progress_bar=false",
    ]  # fmt: skip
    path = os.pathsep.join([str(REPOSITORY / "tests" / "toys"), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    done = subprocess.run(
        command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    alone = PipelineGenerator.load(str(source), CallSettings(num_inference_steps=2))
    expected = alone.generate(CAPTIONS, [5, 6], 3)
    for rank in (0, 1):
        stored = load_file(tmp_path / "results" / f"images-{rank}-of-2.safetensors")
        assert torch.equal(stored["images"], expected), rank
