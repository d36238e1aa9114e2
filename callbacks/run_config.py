"""Record what a run was asked to do, and by what."""

import importlib.metadata
import json
import platform
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import yaml
from lightning.pytorch.callbacks import Callback
from typing_extensions import override

from callbacks.rank_zero import on_rank_zero
from segalign.atomic import make_directory, remove_temporaries, write_text_atomic
from segalign.json_text import parse_json

_PACKAGES = (
    "torch", "lightning", "diffusers", "transformers", "segalign", "jsonargparse", "numpy",
    "omegaconf", "open_clip_torch", "peft", "pillow", "safetensors", "tokenizers", "torchmetrics",
    "torchvision",
)  # fmt: skip


class RunConfigWriter(Callback):
    """Write the resolved config and a record of every attempt into the run directory.

    The first attempt writes ``config.yaml``; a later one that differs writes
    ``config.attempt-N.yaml``. ``run.json`` lists all attempts: when, where and by what command, on
    how many devices, with which seeds, versions and commit, from which checkpoint, and which
    settings were allowed to differ from that checkpoint's. Every checkpoint carries the config too.

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
        self._attempts: list[dict[str, Any]] = []

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Write the record of this attempt.

        Raises:
            StorageError: On every rank, if rank 0 cannot write it.
        """
        if stage == "fit" and not getattr(trainer, "fast_dev_run", False):
            on_rank_zero(trainer, partial(self._write, trainer))

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Record the checkpoint that this attempt goes on from, which is known by now.

        Raises:
            StorageError: On every rank, if rank 0 cannot write it.
        """
        if trainer.ckpt_path is not None and not getattr(trainer, "fast_dev_run", False):
            on_rank_zero(trainer, partial(self._write_start, trainer))

    def _write_start(self, trainer: pl.Trainer) -> None:
        if self._attempts:
            self._attempts[-1]["checkpoint"] = str(trainer.ckpt_path)
            _write_attempts(Path(trainer.default_root_dir), self._attempts)

    def _write(self, trainer: pl.Trainer) -> None:
        run_dir = Path(trainer.default_root_dir)
        make_directory(run_dir)
        attempts = self._attempts = _read_attempts(run_dir / "run.json")
        name = self._write_config(run_dir, len(attempts) + 1)
        attempts.append(
            {
                "attempt": len(attempts) + 1,
                "time": datetime.now(UTC).isoformat(timespec="seconds"),
                "command": self._command,
                "config": name,
                "config_sources": self._sources,
                "checkpoint": None,
                "allowed_changes": list(_allowed_changes(self._config)),
                "seed": self._config.get("seed_everything"),
                "seeds": dict(_seeds(self._config)),
                "world_size": trainer.world_size,
                "host": platform.node(),
                "device": _device(trainer),
                "versions": _versions(),
                "git": _git_state(),
            }
        )
        remove_temporaries(run_dir / "run.json")
        _write_attempts(run_dir, attempts)

    def _write_config(self, run_dir: Path, attempt: int) -> str:
        """Write the config if no earlier attempt had the same; return the name of its file."""
        text = yaml.safe_dump(self._config, sort_keys=False, allow_unicode=True)
        earlier = [run_dir / "config.yaml", *sorted(run_dir.glob("config.attempt-*.yaml"))]
        for path in earlier:
            if path.is_file() and path.read_text(encoding="utf-8", errors="replace") == text:
                return path.name
        name = f"config.attempt-{attempt}.yaml" if earlier[0].exists() else "config.yaml"
        remove_temporaries(run_dir / name)
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
        return list(parse_json(path.read_bytes())["attempts"])
    except (ValueError, KeyError, TypeError):
        path.replace(path.with_suffix(".unreadable.json"))
        return []


def _write_attempts(run_dir: Path, attempts: list[dict[str, Any]]) -> None:
    text = json.dumps({"attempts": attempts}, indent=1)
    write_text_atomic(run_dir / "run.json", text + "\n")


def _allowed_changes(config: Mapping[str, Any]) -> Sequence[str]:
    return (config.get("checkpoint") or {}).get("allow_changes") or ()


def _seeds(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Find all seeds that a config names, by their dotted keys."""
    items = config.items() if isinstance(config, Mapping) else enumerate(config)
    for key, value in items:
        name = f"{prefix}{key}"
        is_seed = isinstance(key, str) and (key == "seed_everything" or key.endswith("seed"))
        if is_seed and (value is None or isinstance(value, int)):
            yield name, value
        elif isinstance(value, Mapping | list):
            yield from _seeds(value, f"{name}.")


def _device(trainer: pl.Trainer) -> dict[str, Any]:
    device = trainer.strategy.root_device
    is_cuda = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if is_cuda else platform.processor()
    return {
        "kind": device.type,
        "name": name or platform.machine(),
        "per_node": trainer.num_devices,
        "nodes": trainer.num_nodes,
        "precision": str(trainer.precision),
    }


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version(), "cuda": torch.version.cuda or "none"}
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
