"""`main.py test` on two ranks finds what one finds, bit for bit."""

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

import main
from segalign.generation.pipeline_call import CallSettings
from segalign.generation.pipeline_generator import PipelineGenerator

pytestmark = pytest.mark.distributed

RESULT = Path("evaluation") / "test" / "result.json"
REPOSITORY = Path(__file__).parents[2]


METRICS = [
    {"class_path": "image_recorder.ImageRecorder"},
    {
        "class_path": "callbacks.image_evaluation.ImageEvaluation",
        "init_args": {"num_captions": 5, "images_per_caption": 2, "batch_size": 4},
    },
    *(
        {
            "class_path": f"callbacks.{name}",
            "init_args": {
                "extractor": {
                    "class_path": "segalign.metrics.extractors.tiny.TinyExtractor",
                    "init_args": {"num_features": 3},
                }
            },
        }
        for name in ("fid.FID", "kid.KID", "inception_score.InceptionScore")
    ),
    {
        "class_path": "callbacks.lpips.LPIPS",
        "init_args": {"network": {"class_path": "segalign.metrics.perceptual.tiny.TinyPerceptual"}},
    },
    {
        "class_path": "callbacks.alignment.TextAlignment",
        "init_args": {
            "rewards": {
                "preference": {
                    "class_path": "segalign.scenes.rewards.ScenesReward",
                    "init_args": {"weights": "preference"},
                }
            }
        },
    },
    {"class_path": "callbacks.evaluation_report.EvaluationReport"},
]


def arguments(tmp_path, devices):
    scenes = {"world": "2x2", "num_train": 4, "num_val": 6, "root": str(tmp_path / "scenes")}
    return [
        "test", "--allow_import=image_recorder", "--config=configs/evaluate.yaml",
        f"--run_dir={tmp_path / str(devices)}", f"--model.init_args.source={tmp_path / 'plain'}",
        "--model.init_args.num_inference_steps=2", "--data.init_args.image_size=null",
        "--data.init_args.val_shards=null", f"--data.init_args.scenes={json.dumps(scenes)}",
        f"--trainer.callbacks={json.dumps(METRICS)}", "--trainer.accelerator=cpu",
        f"--trainer.devices={devices}", "--trainer.enable_progress_bar=false",
    ]  # fmt: skip


def test_two_ranks_find_what_one_finds(tmp_path, monkeypatch):
    source = tmp_path / "plain"
    toy_pipelines.stable_diffusion().save_pretrained(source)
    path = os.pathsep.join([str(REPOSITORY / "tests" / "toys"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "main.py", *arguments(tmp_path, 2)],
        cwd=REPOSITORY,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    alone = PipelineGenerator.load(str(source), CallSettings(num_inference_steps=2))
    expected = alone.generate(CAPTIONS, [5, 6], 3)
    for rank in (0, 1):
        stored = load_file(tmp_path / "2" / f"images-{rank}-of-2.safetensors")
        assert torch.equal(stored["images"], expected), rank

    monkeypatch.chdir(REPOSITORY)
    assert main.main(arguments(tmp_path, 1)) == 0
    one, two = (json.loads((tmp_path / name / RESULT).read_text()) for name in ("1", "2"))
    assert {"fid", "kid", "inception_score", "lpips_diversity", "alignment"} <= one[
        "metrics"
    ].keys()
    # Every number, and every protocol, to the last digit.
    assert two["metrics"] == one["metrics"]
    assert two["digest"] == one["digest"]
    lines = [
        (tmp_path / name / RESULT).with_name("images.jsonl").read_text() for name in ("1", "2")
    ]
    assert lines[0] == lines[1]
