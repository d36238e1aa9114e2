"""Files of ``torch.save`` from elsewhere: their tensors are read, and no code in them can run."""

import re
import warnings
import zipfile
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
        _refuse_compressed(path)
        with warnings.catch_warnings():
            # torch asks to report pickles of other protocols to its developers, and tells of
            # programs (TorchScript) before it refuses them.
            warnings.filterwarnings("ignore", message="Detected pickle protocol|.*TorchScript")
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

    The restricted reader also makes sparse tensors, those of shape alone, and those that repeat a
    few numbers so often that a copy would not fit into any memory.
    """
    if not isinstance(item, Tensor) or item.layout is not torch.strided or item.is_meta:
        return False
    return item.numel() * item.element_size() <= item.untyped_storage().nbytes()


def _refuse_compressed(path: Path) -> None:
    """Refuse an archive that ``torch.save`` has not made: a small file could fill all memory."""
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        if any(part.compress_type != zipfile.ZIP_STORED for part in archive.infolist()):
            raise ValueError("compressed parts")
