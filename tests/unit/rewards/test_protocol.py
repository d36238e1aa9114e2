"""What all rewards share: checks of their inputs."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from segalign.rewards.protocol import check_batch


class CountReads(TorchDispatchMode):
    """Count what makes a GPU's numbers known to Python: single ones, and copies."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_a_batch_is_checked_without_reading_number_by_number(images):
    with CountReads() as reads:
        assert images[0, 0, 0, 0].item() <= 1  # it counts
        check_batch(images, ["a", "b"])
    assert reads.count == 1
