"""From training to images: fit, export, the five lines of the README."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

import main
from lightning_modules.run_loading import load_module
from segalign.commands import export, generate

CONFIGS = Path(__file__).parents[2] / "configs"


def test_from_a_run_to_images(tmp_path):
    run_dir, folder = tmp_path / "run", tmp_path / "folder"
    scenes = {"world": "2x2", "num_train": 16, "num_val": 4, "root": str(tmp_path / "scenes")}
    base = {"world": "2x2", "generator": "random", "text_model": "random"}
    ema = [{"class_path": "callbacks.ema.EMA"}]
    code = main.main([
        "fit", "--config", str(CONFIGS / "quickstart.yaml"), "--run_dir", str(run_dir),
        "--data.init_args.scenes", json.dumps(scenes), "--data.init_args.num_workers", "0",
        "--data.init_args.global_batch_size", "4", "--trainer.enable_progress_bar", "false",
        "--model.init_args.base.init_args", json.dumps(base),
        "--model.init_args.sampler.num_inference_steps", "2",
        "--trainer.callbacks", json.dumps(ema), "--trainer.max_steps", "2",
    ])  # fmt: skip
    assert code == 0
    options = ["--checkpoint", str(run_dir), "--out"]
    assert generate.run([*options, str(tmp_path / "images"), "--prompt=A fox."], load_module) == 0
    assert Image.open(tmp_path / "images" / "00000000-s0.png").size == (24, 24)
    options = [*options, str(folder), "--format", "diffusers"]
    assert export.run(options, load_module) == 0

    lines = README_LINES.replace("FOLDER", str(folder)).replace("image.png", f"{tmp_path}/i.png")
    exec(lines, {})
    made, called = (
        np.asarray(Image.open(path)).astype(int)
        for path in (tmp_path / "images" / "00000000-s0.png", tmp_path / "i.png")
    )
    assert abs(made - called).max() <= 1


README_LINES = """\
from segalign.diffusion.long_text_pipeline import LongTextPipeline

pipe = LongTextPipeline.from_pretrained("FOLDER")
images = pipe(["A fox."], seed=0).images
images[0].save("image.png")
"""
