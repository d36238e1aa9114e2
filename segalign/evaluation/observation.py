"""Look without touching: an evaluation leaves no trace in random states and modes."""

import contextlib
import random
from collections.abc import Iterator

import numpy as np
import torch


@contextlib.contextmanager
def observing() -> Iterator[None]:
    """Run a block without gradient, and put all random generators back afterwards.

    Python's, NumPy's and PyTorch's are meant, the latter on the CPU and this process's GPU. Tensors
    that are made in the block are ordinary ones, also where a trainer evaluates in inference mode,
    which sharded models cannot bear.
    """
    # The global state of NumPy is the one that libraries draw from.
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    # The devices that this process has not touched have no state worth keeping.
    is_on_gpu = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    devices = [torch.cuda.current_device()] if is_on_gpu else []
    try:
        with (
            torch.random.fork_rng(devices),
            torch.inference_mode(mode=False),
            torch.no_grad(),
        ):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
