"""New folders that are either whole or not there."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from segalign.atomic import (
    make_directory,
    move_directory_into_place,
    storage_errors,
    sync_file,
    temporary_sibling,
    usual_mode,
)
from segalign.errors import ConfigError


def check_new(folder: Path) -> None:
    """Check that a folder can be made: nothing, or nothing but an empty folder, has its name.

    Raises:
        ConfigError: If there is something.
    """
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise ConfigError(
            f"expected a new or empty folder to write to; `{folder}` has content; "
            "remove it or choose another"
        )


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Make a folder that appears under its name when the block has filled it.

    Args:
        folder: Target; its parents are created.

    Yields:
        The folder to fill, under a temporary name beside the target.

    Raises:
        ConfigError: If the target has content.
        StorageError: If it cannot be written; nothing is left behind.
    """
    check_new(folder)
    make_directory(folder.parent)
    temporary = temporary_sibling(folder)
    with storage_errors(folder):
        try:
            temporary.mkdir()
            yield temporary
            mode = usual_mode(temporary)
            for path in temporary.rglob("*"):
                if path.is_file():
                    path.chmod(mode)
                sync_file(path)
            move_directory_into_place(temporary, folder)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
