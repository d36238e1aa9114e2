"""Reading networks of diffusers and transformers: whatever is wrong with files becomes one line."""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from segalign.errors import ConfigError


@contextlib.contextmanager
def reading(what: str, folder: Path) -> Iterator[None]:
    """Turn what the libraries raise of missing, damaged or foreign files into one line.

    Args:
        what: What is read, for the line.
        folder: Where from.

    Raises:
        ConfigError: If the block fails to read.
    """
    try:
        yield
    except (
        OSError,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        RuntimeError,
        SafetensorError,
    ) as error:
        reason = " ".join(str(error).split())[:200]
        raise _unreadable(what, folder, f"{type(error).__name__}: {reason}") from error


def check_whole(info: Mapping[str, Any], what: str, folder: Path) -> None:
    """Refuse a network of which weights were missing, and which the libraries have drawn.

    Args:
        info: What ``from_pretrained`` says with ``output_loading_info``.
        what: What was read, for the line.
        folder: Where from.

    Raises:
        ConfigError: If a weight was missing, or of another shape.
    """
    lost = sorted([*info["missing_keys"], *(str(key) for key in info["mismatched_keys"])])
    if lost:
        raise _unreadable(what, folder, f"no weight of the right shape for `{lost[0]:.100}`")


def _unreadable(what: str, folder: Path, found: str) -> ConfigError:
    return ConfigError(
        f"expected {what} as config and safetensors at `{folder}`; got {found}; "
        "download it whole, with its safetensors"
    )
