"""The device that a command works on."""

import warnings

import torch

from segalign.errors import ConfigError


def choose_device(name: str | None) -> torch.device:
    """Take the device that ``--device`` names, or a GPU if there is one.

    Args:
        name: Such as ``cpu``, ``cuda`` or ``cuda:1``; None takes a GPU, or else the CPU.

    Raises:
        ConfigError: If there is no such device, or it holds no numbers (``meta``).
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of names that were devices once
            device = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:
        raise _absent(name) from error
    if device.type == "meta":
        raise _absent(name)
    return device


def _absent(name: str) -> ConfigError:
    """Say it without the library's own message, which is long and of its inner parts."""
    return ConfigError(
        f"expected a device of this machine, such as `cpu` or `cuda:0`; got `{name:.40}`. "
        "Choose another `--device`."
    )
