"""Files of ``torch.save`` from elsewhere: their tensors are read, and no code in them can run."""

import re
import warnings
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from segalign.errors import DataError

_REFUSED_GLOBAL = re.compile(r"GLOBAL (\S+)")


def read_tensor_pickle(path: Path, *, expected: str, remedy: str) -> Any:
    """Read a file of ``torch.save``, made of tensors and plain containers alone.

    Args:
        path: The file.
        expected: What it should hold, for the message of an error.
        remedy: What to do if it does not.

    Returns:
        Its content, whatever that is; tensors are on the CPU.

    Raises:
        DataError: If it is missing or damaged, or needs an object that could run code. One line.
    """
    try:
        with warnings.catch_warnings():
            # torch asks to report pickles of other protocols to its developers.
            warnings.filterwarnings("ignore", message="Detected pickle protocol")
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle can raise almost anything
        refused = _REFUSED_GLOBAL.search(str(error))
        if isinstance(error, FileNotFoundError):
            found = "no such file"
        elif isinstance(error, UnpicklingError) and refused:
            found = f"an object of `{refused[1]}`, which could run code and was not loaded"
        else:
            found = f"a damaged or foreign file ({type(error).__name__})"
        raise DataError(f"expected {expected} in `{path}`; got {found}; {remedy}") from error


def is_plain_tensor(item: object) -> bool:
    """Tell whether an item of such a file is a dense tensor that holds its numbers.

    The restricted reader also makes sparse tensors, and those of shape alone.
    """
    return isinstance(item, Tensor) and item.layout is torch.strided and not item.is_meta
