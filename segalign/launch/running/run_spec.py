"""Which configs a run directory belongs to. Pure standard library."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from segalign.errors import ConfigError
from segalign.json_text import parse_json
from segalign.launch.running.run_folder import SPEC_FILE, sweep_folder

# Where a run is and how it is stopped is no part of what it is.
NOT_HASHED: Final = ("run_dir", "preemption", "hang_watch")


@dataclass(frozen=True, kw_only=True)
class RunSpec:
    """What ``spec.json`` says of a run.

    Attributes:
        run_id: Digest of its configs.
        stages: What it does, in this order.
        max_steps: Optimizer steps of its training; None if they are not limited.
        label: Of its variant.
    """

    run_id: str
    stages: tuple[str, ...]
    max_steps: int | None = None
    label: str = ""


def read_spec(run_dir: Path) -> RunSpec | None:
    """Read what a run directory is for; None if it cannot be told."""
    try:
        content: dict[str, Any] = parse_json((sweep_folder(run_dir) / SPEC_FILE).read_bytes())
        steps = content.get("max_steps")
        return RunSpec(
            run_id=str(content["run_id"]),
            stages=tuple(map(str, content["stages"])),
            max_steps=None if steps is None or int(steps) < 0 else int(steps),
            label=str(content.get("label", "")),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def check_spec(run_dir: Path) -> RunSpec:
    """Read what a run directory is for, and refuse one of another config.

    Raises:
        ConfigError: If it is none of a study, or its configs have another digest than its name.
    """
    spec = read_spec(run_dir)
    if spec is None:
        raise ConfigError(
            f"expected the directory of a study's run; `{run_dir}` has no readable "
            f"`sweep/{SPEC_FILE}`. `python main.py sweep run STUDY` writes it."
        )
    if spec.run_id != run_dir.name:
        raise ConfigError(
            f"expected a run directory of config {run_dir.name}; `{run_dir}` is that of config "
            f"{spec.run_id}. Move it away; a copy of a run needs the name of its config."
        )
    return spec
