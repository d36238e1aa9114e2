"""Runs of tiny random models, written without training them."""

from typing import Any

import torch

from lightning_modules.run_loading import build_module
from segalign.ema import TrainableEMA
from segalign.run_directory import checkpoint_path
from segalign.run_format import save_checkpoint
from segalign.trainable import trainable_parameters, trainable_state_dict

SCENES = {
    "class_path": "segalign.scenes.base.ScenesBase",
    "init_args": {"world": "2x2", "generator": "random", "text_model": "random"},
}
STABLE_DIFFUSION = {
    "class_path": "segalign.diffusion.pretrained.PretrainedModel",
    "init_args": {"init": "random", "size": "tiny"},
}
T5 = {"context": "clip+t5", "t5": {"init": "random", "model": "tiny"}}


def model_settings(base: dict[str, Any] = SCENES, **settings: Any) -> dict[str, Any]:
    """Describe a module as a config does."""
    return {
        "class_path": "lightning_modules.long_text_diffusion.LongTextDiffusionModule",
        "init_args": {
            "base": base,
            "optimizer": {"class_path": "torch.optim.AdamW"},
            "sampler": {"num_inference_steps": 2, "guidance_scale": 2.0},
            "text": {"token_budget": 64},
            **settings,
        },
    }


def write_run(run_dir, settings, *, ema=True, step=3, allow_import=()):
    """Write a checkpoint whose trained weights are nowhere at their initial values."""
    torch.manual_seed(0)
    module = build_module(settings, allow_import)
    module.configure_model()
    with torch.no_grad():
        for parameter in trainable_parameters(module).values():
            parameter += 0.05 * torch.randn_like(parameter)
    tree: dict[str, Any] = {
        "state_dict": trainable_state_dict(module),
        "global_step": step,
        "run_config": {"model": settings},
    }
    if ema:
        average = TrainableEMA(module)
        for tensor in average.weights.values():
            tensor += 0.05 * torch.randn_like(tensor)
        tree["ema"] = average.state_dict()
    checkpoint = checkpoint_path(run_dir, step)
    save_checkpoint(tree, checkpoint)
    return checkpoint
