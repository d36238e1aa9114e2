"""Where the runs of a study are started, remembered between commands."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Final, Literal, Self

from segalign.atomic import make_directory, write_text_atomic
from segalign.errors import ConfigError
from segalign.json_text import parse_json

_FILE: Final = "launch.json"

Backend = Literal["local", "slurm"]


@dataclass(frozen=True, kw_only=True)
class Launcher:
    """How runs are started.

    Attributes:
        backend: On this machine, or as jobs of a SLURM cluster.
        num_parallel: Runs at a time on this machine.
        allow_import: Packages whose classes configs may name too.
    """

    backend: Backend
    num_parallel: int = 1
    allow_import: Sequence[str] = field(default_factory=tuple)

    @classmethod
    def choose(
        cls,
        folder: Path,
        backend: Backend | None,
        num_parallel: int | None,
        allow_import: Sequence[str] | None,
    ) -> Self:
        """Take what a command line says, and what it leaves open from the last one.

        Args:
            folder: Folder of the study.
            backend: None takes that of the last command.
            num_parallel: None likewise.
            allow_import: None likewise.

        Raises:
            ConfigError: If neither says where.
        """
        last = cls._last(folder)
        chosen = backend or (None if last is None else last.backend)
        if chosen is None:
            raise ConfigError(
                "expected `--local N` or `--slurm`, because the study has not been started before; "
                "got neither. `--local 2` makes two runs at a time on this machine."
            )
        return cls(
            backend=chosen,
            num_parallel=num_parallel or (1 if last is None else last.num_parallel),
            allow_import=tuple(allow_import or (() if last is None else last.allow_import)),
        )

    @property
    def options(self) -> list[str]:
        """Arguments that every run gets."""
        return [f"--allow_import={package}" for package in self.allow_import]

    def save(self, folder: Path) -> None:
        """Remember it for later commands.

        Raises:
            StorageError: If it cannot be written.
        """
        make_directory(folder)
        write_text_atomic(folder / _FILE, json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def _last(cls, folder: Path) -> Self | None:
        try:
            return cls(**parse_json((folder / _FILE).read_bytes()))
        except (OSError, ValueError, TypeError):
            return None
