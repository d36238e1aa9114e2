"""Ways to the same pixels: a crop while resizing, and batches that travel as bytes."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.data_loading_arms import cropped_after
from segalign.data.images import decode_image
from segalign.data.loaders import BatchSettings, train_loader
from segalign.data.order import BatchPlan
from segalign.data.transforms import CollateRows, DecodeRow, to_unit_range


def photograph(width: int, height: int) -> Image.Image:
    """Draw waves of several lengths, which a resize must not fold into others."""
    x, y = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    waves = [np.sin(20 * x + 9 * y), np.sin(31 * x * y), np.cos(60 * y - 40 * x)]
    return Image.fromarray(((np.stack(waves, axis=-1) + 1) * 127.5).astype(np.uint8))


@pytest.mark.parametrize(
    "size",
    [(96, 64), (64, 96), (100, 75), (75, 100), (90, 91), (33, 120), (120, 33), (48, 48), (20, 31)],
)
@pytest.mark.parametrize("side", [16, 48, 64])
def test_a_crop_while_resizing_is_the_crop_after(encode, size, side):
    image = photograph(*size)
    expected = np.asarray(cropped_after(image, side)).astype(int)
    found = decode_image(encode(image), side)
    # Pillow rounds between columns and rows, and a box is in single precision.
    difference = np.abs(found - expected)
    assert difference.max() <= 4
    assert difference.mean() <= 0.3


@pytest.mark.parametrize("size", [(1, 4000), (4000, 1), (3, 3000), (3000, 3)])
def test_a_strip_is_enlarged_within_the_crop_alone(encode, size):
    assert decode_image(encode(Image.new("RGB", size, "red")), 512).shape == (512, 512, 3)


def raw_sample(index: int, **members) -> dict:
    place = {"__key__": "k", "__url__": "shard-000000.tar", "__index__": index, "__epoch__": 0}
    return {**place, "__offset__": 0, **members}


@pytest.mark.parametrize("content", ["image", "preference"])
def test_batches_that_travel_as_bytes_are_those_of_floats(encode, content):
    first, second = (encode(photograph(9, side)) for side in (7, 9))
    members = {"png": first, "0.png": first, "1.png": second}
    fields = json.dumps({"caption": "a", "preference_probs": [1, 0]}).encode()
    raws = [raw_sample(0, json=fields, **members), raw_sample(1), raw_sample(2, json=fields)]
    batches = []
    for as_bytes in (False, True):
        decode = DecodeRow(content, image_size=7, as_bytes=as_bytes)
        collate = CollateRows(content, image_hw=(7, 7))
        batches.append(collate([decode(raw) for raw in raws]))
    name = "images" if content == "image" else "image_pairs"
    assert batches[1][name].dtype == torch.uint8
    found = to_unit_range(batches[1])[name]
    assert found.is_contiguous()
    assert found.dtype == torch.float32
    assert torch.equal(found, batches[0][name])
    assert found[0].max() > 0.9
    assert found[1:].abs().max() == 0


@pytest.mark.parametrize("num_workers", [0, 1])
def test_loaders_deliver_floats(write_shards, tmp_path, num_workers):
    manifest = write_shards(tmp_path / "shards", [4])
    settings = BatchSettings(content="image", num_workers=num_workers)
    loader = train_loader(manifest, BatchPlan(global_batch_size=4), settings, seed=0)
    batch = next(iter(loader))
    assert batch["images"].dtype == torch.float32
    expected = (batch["sample_ids"] % 256).float().div(255)
    assert torch.equal(batch["images"][:, 0, 0, 0], expected)
