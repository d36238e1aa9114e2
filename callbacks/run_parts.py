"""What every run has besides its model and data, whatever its config says."""

from typing import Any

from callbacks.checkpoint import RunCheckpoint, SafetensorsCheckpointIO
from callbacks.hang_watch import HangWatch
from callbacks.image_writer import ImageWriter
from callbacks.non_finite import NonFiniteSteps
from callbacks.preemption import Preemption
from callbacks.progress import StepProgressBar
from callbacks.run_config import RunConfigWriter
from callbacks.run_loggers import run_loggers
from callbacks.step_rng import StepRng


def run_parts() -> dict[str, Any]:
    """Name the classes and functions, as ``lightning_modules.cli.RunParts`` wants them."""
    return {
        "keyed": {
            "non_finite": NonFiniteSteps,
            "hang_watch": HangWatch,
            "checkpoint": RunCheckpoint,
            "preemption": Preemption,
        },
        "checkpoint_io": SafetensorsCheckpointIO,
        "run_config": RunConfigWriter,
        "step_rng": StepRng,
        "progress_bar": StepProgressBar,
        "image_writer": ImageWriter,
        "loggers": run_loggers,
    }
