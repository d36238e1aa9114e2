"""Files of weights: found or downloaded, digested, read; no code in them can run."""

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from filelock import FileLock
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from segalign.errors import DataError
from segalign.tensor_pickle import is_plain_tensor, read_tensor_pickle

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PublishedFile:
    """A file of weights that a library would download.

    Attributes:
        what: What it holds, for messages: "the weights of Inception".
        url: Where it is published.
        sha256: Its digest.
    """

    what: str
    url: str
    sha256: str

    def cached(self) -> Path:
        """Name its place in the cache of torch hub, which ``TORCH_HOME`` moves."""
        return Path(torch.hub.get_dir()) / "checkpoints" / self.url.rpartition("/")[2]

    def find(self, path: str | None, *, download: bool) -> Path:
        """Find the file, here or in the cache of torch hub.

        Args:
            path: A file of the user's; None is the published one.
            download: Take it from the network if it is not there.

        Raises:
            DataError: If it is not there.
        """
        if path is not None:
            file = Path(path).expanduser()
            return file if file.is_file() else self._refuse(file)
        file = self.cached()
        if not file.is_file() and download:
            self._download(file)
        return file if file.is_file() else self._refuse(file)

    def _download(self, file: Path) -> None:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{file}.lock"):
                if not file.is_file():
                    torch.hub.download_url_to_file(
                        self.url, str(file), hash_prefix=self.sha256, progress=False
                    )
        except (OSError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:120]
            self._refuse(file, f"no download ({type(error).__name__}: {reason})")

    def _refuse(self, file: Path, found: str = "no such file") -> NoReturn:
        raise DataError(
            f"expected {self.what} in `{file}`; got {found}; download {self.url} where there is "
            f"network and copy it to `{self.cached()}` (`TORCH_HOME` moves that folder), give a "
            "copy's path as `weights`, or set `download: true`"
        )


@dataclass(frozen=True)
class WeightFile:
    """What a file of weights holds.

    Attributes:
        path: The file.
        what: What it should hold, for messages.
        tensors: By name, on the CPU; floating ones in float32.
        sha256: Digest of the file.
    """

    path: Path
    what: str
    tensors: Mapping[str, Tensor]
    sha256: str

    def fill(self, network: nn.Module, tensors: Mapping[str, Tensor] | None = None) -> None:
        """Give a network, such as one of shape alone, its weights: each of them, no other.

        Args:
            network: The network; its tensors are replaced.
            tensors: Those for it; None is all of the file.

        Raises:
            DataError: If a tensor is missing, of another shape, or too many.
        """
        try:
            network.load_state_dict(self.tensors if tensors is None else tensors, assign=True)
        except RuntimeError as error:
            reason = " ".join(str(error).split()).partition(": ")[2][:150]
            raise unusable(self.path, self.what, reason) from error

    def is_published(self, published: PublishedFile) -> bool:
        """Tell whether this is the published file; if not, say so."""
        if self.sha256 == published.sha256:
            return True
        _logger.warning(
            "`%s` is not the published file of %s (its SHA-256 is %s): its numbers can be "
            "compared with each other only",
            self.path,
            self.what,
            self.sha256,
        )
        return False


def read_weights(path: Path, what: str) -> WeightFile:
    """Read a file of named tensors, safetensors or what ``torch.save`` wrote.

    Args:
        path: The file.
        what: What it should hold, for messages.

    Raises:
        DataError: If it is missing, damaged, or holds anything else.
    """
    with torch.inference_mode(False):
        content = _read(path, what)
        if not isinstance(content, Mapping) or not all(
            isinstance(name, str) and is_plain_tensor(value) for name, value in content.items()
        ):
            raise unusable(path, what, "other things than named tensors")
        tensors = {
            name: tensor.float() if tensor.is_floating_point() else tensor
            for name, tensor in content.items()
        }
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return WeightFile(path, what, tensors, digest)


def digest_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Digest named tensors, SHA-256 in hexadecimal; their order does not matter."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        raw = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
        digest.update(raw.numpy().tobytes())
    return digest.hexdigest()


def unusable(path: Path, what: str, found: str) -> DataError:
    """Make the error of a file that holds something else."""
    return DataError(f"expected {what} in `{path}`; got {found}; download it again")


def _read(path: Path, what: str) -> Any:
    if path.suffix != ".safetensors":
        return read_tensor_pickle(path, expected=what, remedy="download it again")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise unusable(path, what, " ".join(str(error).split())[:150]) from error
