"""What a network is that turns images into features for FID and its kin.

Dims: B images, H/W pixels, d features, c classes.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol, Self

import torch
from torch import Tensor, backends


class Features(NamedTuple):
    """What an extractor gives for a batch, on the extractor's device; no gradient.

    Attributes:
        features: float32 ``(B, d)``.
        logits: Class scores before the softmax, float32 ``(B, c)``; None without a classifier.
    """

    features: Tensor
    logits: Tensor | None


class FeatureExtractor(Protocol):
    """A frozen network; a pass draws no random numbers and leaves all flags as they were."""

    @property
    def num_features(self) -> int:
        """Length d of the features."""
        ...

    def protocol(self) -> dict[str, Any]:
        """Say all that features depend on besides the image, as plain data.

        Contains ``name``, ``weights`` (SHA-256 of the file, or of the tensors), ``layer``,
        ``resize``, ``input_size`` (None: that of the image) and ``dtype``.
        """
        ...

    def __call__(self, pixels: Tensor) -> Features:
        """Turn images, uint8 ``(B, 3, H, W)``, into features."""
        ...

    def to(self, device: torch.device) -> Self:
        """Move the network to ``device``."""
        ...


class ExtractorSource(Protocol):
    """Settings of an extractor, such as a config names them; making them reads nothing."""

    # Any: the parser of configs accepts a narrower type for nothing else.
    def load(self) -> Any:
        """Read the weights; returns a ``FeatureExtractor``.

        Raises:
            ConfigError: If a setting cannot work.
            DataError: If the weights are missing, damaged or foreign.
        """
        ...


@contextmanager
def exact_pass(device: torch.device) -> Iterator[None]:
    """Run without gradient, autocast and TF32, whatever training uses; all is put back."""
    with _full_float32(), torch.no_grad(), torch.autocast(device.type, enabled=False):
        yield


@contextmanager
def _full_float32() -> Iterator[None]:
    """Switch off shortened multiplications.

    torch has an old and a new switch for products, and some of its parts stop where the two differ;
    so both are set, the new ones last.
    """
    libraries: Any = backends  # its types lack some of these
    cuda, cudnn, mkldnn = libraries.cuda, libraries.cudnn, libraries.mkldnn
    switches = [cuda.matmul, cudnn.conv, mkldnn.matmul, mkldnn.conv]
    before, old_before = [switch.fp32_precision for switch in switches], _old_precision()
    try:
        torch.set_float32_matmul_precision("highest")
        for switch in switches:
            switch.fp32_precision = "ieee"
        yield
    finally:
        torch.set_float32_matmul_precision(old_before)
        for switch, precision in zip(switches, before, strict=True):
            switch.fp32_precision = precision


def _old_precision() -> str:
    """Read the old switch; it cannot be read where the new one alone allows TF32."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        return "highest"
