"""Record what a run was asked to do, and by what."""

import importlib.metadata
import json
import platform
import subprocess
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import yaml
from lightning.pytorch.callbacks import Callback
from typing_extensions import override

from segalign.atomic import make_directory, write_text_atomic

_PACKAGES = ("torch", "lightning", "diffusers", "transformers", "segalign")


class RunConfigWriter(Callback):
    """Write the resolved config and a record of every attempt into the run directory.

    The first attempt writes ``config.yaml``; a later one that differs writes
    ``config.attempt-N.yaml``. ``run.json`` lists all attempts. Every checkpoint carries the config
    too.

    Args:
        config: The resolved config, plain data.
        command: The command line after ``main.py``.
        sources: Names of the config files, in their order.
    """

    def __init__(
        self, config: Mapping[str, Any], command: Sequence[str], sources: Sequence[str]
    ) -> None:
        super().__init__()
        self._config = dict(config)
        self._command = ["main.py", *command]
        self._sources = list(sources)

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Write the record of this attempt."""
        if stage != "fit" or not trainer.is_global_zero or getattr(trainer, "fast_dev_run", False):
            return
        run_dir = Path(trainer.default_root_dir)
        make_directory(run_dir)
        attempts = _read_attempts(run_dir / "run.json")
        name = self._write_config(run_dir, len(attempts) + 1)
        attempts.append(
            {
                "attempt": len(attempts) + 1,
                "time": datetime.now(UTC).isoformat(timespec="seconds"),
                "command": self._command,
                "config": name,
                "config_sources": self._sources,
                "seed": self._config.get("seed_everything"),
                "world_size": trainer.world_size,
                "versions": _versions(),
                "git": _git_state(),
            }
        )
        write_text_atomic(run_dir / "run.json", json.dumps({"attempts": attempts}, indent=1) + "\n")

    def _write_config(self, run_dir: Path, attempt: int) -> str:
        """Write the config if no earlier attempt had the same; return the name of its file."""
        text = yaml.safe_dump(self._config, sort_keys=False, allow_unicode=True)
        earlier = [run_dir / "config.yaml", *sorted(run_dir.glob("config.attempt-*.yaml"))]
        for path in earlier:
            if path.is_file() and path.read_text(encoding="utf-8", errors="replace") == text:
                return path.name
        name = f"config.attempt-{attempt}.yaml" if earlier[0].exists() else "config.yaml"
        write_text_atomic(run_dir / name, text)
        return name

    @override
    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Let a checkpoint say by itself how its model is built."""
        checkpoint["run_config"] = self._config


def _read_attempts(path: Path) -> list[dict[str, Any]]:
    """Read the earlier attempts; an unreadable record is set aside, never overwritten."""
    if not path.exists():
        return []
    try:
        return list(json.loads(path.read_bytes())["attempts"])
    except (ValueError, KeyError, TypeError):
        path.replace(path.with_suffix(".unreadable.json"))
        return []


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return versions


def _git_state() -> dict[str, Any] | None:
    """Read commit and dirty flag of the checkout that holds this file, if it is one."""
    commit = _git("rev-parse", "HEAD")
    if commit is None:
        return None
    return {"commit": commit, "dirty": bool(_git("status", "--porcelain", "--untracked-files=no"))}


def _git(*arguments: str) -> str | None:
    try:
        completed = subprocess.run(  # noqa: S603
            ["git", *arguments],  # noqa: S607
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return completed.stdout.strip() if completed.returncode == 0 else None
