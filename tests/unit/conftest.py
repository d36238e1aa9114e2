"""A mesh of one device, on which weights can be sharded."""

import pytest
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh


@pytest.fixture
def mesh():
    distributed.init_process_group(
        "gloo", store=distributed.HashStore(), rank=0, world_size=1
    )  # fmt: skip
    yield init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()
