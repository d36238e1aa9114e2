import json

import numpy as np
import pytest
import torch

from segalign.data import transforms
from segalign.data.transforms import CollateRows, DecodeRow
from segalign.errors import DataError
from segalign.rng import counter_uniform


def raw_sample(index=0, epoch=0, **members):
    return {
        "__key__": "k",
        "__url__": "/folder/shard-000000.tar",
        "__index__": index,
        "__epoch__": epoch,
        "__offset__": 512,
        **members,
    }


def test_images_are_float_in_unit_range(plain_image):
    raw = raw_sample(png=plain_image((255, 0, 51), (4, 6)), txt=b"a")
    row = DecodeRow("image")(raw)
    assert row["valid"]
    assert row["image"].shape == (3, 6, 4)
    assert row["image"].dtype == torch.float32
    torch.testing.assert_close(row["image"][:, 0, 0], torch.tensor([1.0, 0.0, 0.2]))


def test_caption_only_needs_no_image():
    batch = CollateRows("caption")([DecodeRow("caption")(raw_sample(txt=b"a"))])
    assert batch["captions"] == ["a"]
    assert "images" not in batch


def test_preference_pairs(plain_image):
    fields = {"caption": "a", "preference_probs": [0.25, 0.75], "origin": "x"}
    raw = raw_sample(
        **{"0.jpg": plain_image((0, 0, 0)), "1.png": plain_image((255, 255, 255))},
        json=json.dumps(fields).encode(),
    )
    rows = [DecodeRow("preference")(raw), DecodeRow("preference")(raw_sample(index=1))]
    batch = CollateRows("preference")(rows)
    assert batch["image_pairs"].shape == (2, 2, 3, 8, 8)
    assert batch["image_pairs"][0, 1].min() == 1
    assert batch["preference_probs"].tolist() == [[0.25, 0.75], [0.5, 0.5]]
    assert batch["valid"].tolist() == [True, False]
    assert batch["metadata"][0]["origin"] == "x"
    assert batch["faults"][0]["reason"] == "caption_missing"
    assert batch["faults"][0]["row"] == 1


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ({"txt": b"a"}, "image_missing"),
        ({"txt": b"a", "jpg": b"no image"}, "image_unreadable"),
        ({"txt": b"\xff", "jpg": b""}, "caption_not_utf8"),
        ({"jpg": b""}, "caption_missing"),
        ({"pkl": b"cos\nsystem\n(S'touch x'\ntR."}, "caption_missing"),
    ],
)
def test_faulty_samples_become_empty_rows(members, reason):
    row = DecodeRow("image")(raw_sample(**members))
    assert (row["valid"], row["caption"]) == (False, "")
    assert row["fault"]["reason"] == reason
    assert row["fault"]["shard"] == "shard-000000.tar"
    assert row["fault"]["offset"] == 512


def test_caption_dropout_is_a_function_of_seed_epoch_and_sample():
    decode = DecodeRow("caption", caption_dropout=0.3, seed=5)
    dropped = {
        (epoch, index): decode(raw_sample(index, epoch, txt=b"a"))["caption"] == ""
        for epoch in range(2)
        for index in range(300)
    }
    expected = {place: counter_uniform("caption_dropout", 5, *place) < 0.3 for place in dropped}
    assert dropped == expected
    assert 130 < sum(dropped.values()) < 230
    assert [dropped[0, i] for i in range(300)] != [dropped[1, i] for i in range(300)]


def test_dropped_captions_stay_valid():
    row = DecodeRow("caption", caption_dropout=1.0)(raw_sample(txt=b"a"))
    assert (row["caption"], row["valid"]) == ("", True)


def test_images_of_another_size_are_set_aside(plain_image):
    decode = DecodeRow("image", expected_size=(8, 8))
    row = decode(raw_sample(txt=b"a", png=plain_image(size=(8, 9))))
    assert row["fault"]["reason"] == "image_size"
    assert row["fault"]["detail"] == "9x8 pixels, the first image has 8x8; set `image_size`"


def test_images_of_different_sizes_make_no_batch(plain_image):
    rows = [
        DecodeRow("image")(raw_sample(txt=b"a", png=plain_image(size=(8, side)))) for side in (8, 9)
    ]
    with pytest.raises(DataError, match=r"must be equal in size; got .*; set `image_size`$"):
        CollateRows("image")(rows)


@pytest.mark.parametrize("as_bytes", [False, True])
def test_slots_without_an_image_are_black(plain_image, monkeypatch, as_bytes):
    monkeypatch.setattr(
        transforms, "allocate", lambda shape, dtype: torch.full(shape, 7, dtype=dtype)
    )
    decode = DecodeRow("image", as_bytes=as_bytes)
    row = decode(raw_sample(txt=b"a", png=plain_image(size=(5, 4))))
    images = CollateRows("image")([row, decode(raw_sample(png=b"")), row])["images"]
    assert images.shape == (3, 3, 4, 5)
    assert not images[1].any()
    for place in (0, 2):
        assert np.array_equal(images[place], row["image"])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_a_worker_writes_where_the_main_process_reads(monkeypatch, dtype):
    assert not transforms.allocate((2, 3), dtype).is_shared()
    monkeypatch.setattr(transforms, "get_worker_info", object)
    memory = transforms.allocate((2, 3, 5), dtype)
    assert (memory.shape, memory.dtype) == ((2, 3, 5), dtype)
    assert memory.is_shared()
    assert memory.is_contiguous()
