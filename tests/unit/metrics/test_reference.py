"""Statistics of real images: what they are of, and that they are computed once."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image
from toy_evaluation import setting_of
from toy_extractor import ToyExtractor

from segalign.data.images import decode_image
from segalign.data.loaders import open_shards
from segalign.data.manifest import index_shards
from segalign.data.verify import verify_shards
from segalign.errors import ConfigError, DataError, StorageError
from segalign.metrics.extractors.protocol import Features
from segalign.metrics.reference import ReferenceImages
from segalign.metrics.reference_computing import ReferenceSettings, compute_reference
from segalign.metrics.reference_files import load_reference

COUNT = 11
BAD = {"00003": "image_unreadable", "00007": "caption_empty"}
CPU = torch.device("cpu")


def encoded(number: int, kind: str) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (14 + number, 20, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


@pytest.fixture
def shards(tmp_path) -> Path:
    """Eleven images of different sizes in two shards, three formats, two that cannot be used."""
    folder = tmp_path / "shards"
    folder.mkdir()
    kinds = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}
    pattern = str(folder / "x-%d.tar")
    with webdataset.ShardWriter(pattern, maxcount=6, verbose=0) as writer:
        for number in range(COUNT):
            key, suffix = f"{number:05d}", list(kinds)[number % 3]
            content = encoded(number, kinds[suffix])
            image = b"nonsense" if BAD.get(key) == "image_unreadable" else content
            caption = " " if BAD.get(key) == "caption_empty" else f"caption {number}"
            writer.write({"__key__": key, suffix: image, "json": {"caption": caption}})
    index_shards(folder)
    return folder


def settings(**changes):
    return ReferenceSettings(**{"image_size": 8, "batch_size": 4, **changes})


def expected_rows(count=COUNT):
    kinds = ["JPEG", "PNG", "WEBP"]
    sound = [number for number in range(count) if f"{number:05d}" not in BAD]
    images = [decode_image(encoded(number, kinds[number % 3]), 8) for number in sound]
    pixels = torch.tensor(np.stack(images)).permute(0, 3, 1, 2).contiguous()
    return ToyExtractor()(pixels).features


def test_they_are_of_the_sound_images_cropped_as_for_training(shards):
    found = compute_reference(open_shards(shards), ToyExtractor(), settings(), device=CPU)
    rows = expected_rows()
    assert torch.equal(found.rows, rows)
    assert found.statistics.num_samples == len(rows) == 9
    torch.testing.assert_close(found.statistics.mean(), rows.double().mean(0), rtol=0, atol=2**-12)
    assert found.protocol["extractor"] == ToyExtractor().protocol()
    images = found.protocol["images"]
    assert images["manifest"] == open_shards(shards).digest
    assert (images["first"], images["num_images"], images["image_size"]) == (11, 9, 8)
    assert images["stored"] == {"jpg": 3, "png": 3, "webp": 3}
    assert images["left_out"] == {
        "count": 2,
        "reasons": {"caption_empty": 1, "image_unreadable": 1},
        "samples": [
            "x-0.tar, key 00003: image_unreadable",
            "x-1.tar, key 00007: caption_empty",
        ],
    }
    json.dumps(found.protocol, allow_nan=False)


def test_micro_batches_have_one_shape_and_their_size_does_not_matter(shards):
    extractor = ToyExtractor()
    first = compute_reference(open_shards(shards), extractor, settings(), device=CPU)
    assert extractor.shapes == 3 * [(4, 3, 8, 8)]
    other = compute_reference(
        open_shards(shards), ToyExtractor(), settings(batch_size=3), device=CPU
    )
    assert torch.equal(first.rows, other.rows)
    assert torch.equal(first.statistics.product_sum, other.statistics.product_sum)


def test_sums_alone_are_the_same_and_keep_no_rows(shards, monkeypatch):
    monkeypatch.setattr("segalign.metrics.reference_computing._ROWS_AT_ONCE", 3)
    first, second = (
        compute_reference(open_shards(shards), ToyExtractor(), settings(keep_rows=keep), device=CPU)
        for keep in (True, False)
    )
    assert second.rows is None
    assert torch.equal(first.rows, expected_rows())
    assert first.statistics.num_samples == second.statistics.num_samples == 9
    assert torch.equal(first.statistics.product_sum, second.statistics.product_sum)
    assert torch.equal(first.statistics.feature_sum, second.statistics.feature_sum)


def test_the_first_samples_are_taken(shards):
    found = compute_reference(open_shards(shards), ToyExtractor(), settings(count=5), device=CPU)
    assert torch.equal(found.rows, expected_rows(5))
    with pytest.raises(
        ConfigError, match=r"expected `count` of reference images in \[1, 11\], the"
    ):
        compute_reference(open_shards(shards), ToyExtractor(), settings(count=12), device=CPU)


def test_no_image_and_features_that_are_not_finite_are_refused(shards, tmp_path):
    with pytest.raises(DataError, match="expected finite features; got NaN"):
        compute_reference(open_shards(shards), ToyExtractor("x", 0.5), settings(), device=CPU)
    folder = tmp_path / "bad"
    folder.mkdir()
    with webdataset.ShardWriter(str(folder / "x-%d.tar"), verbose=0) as writer:
        writer.write({"__key__": "a", "png": b"nonsense", "txt": "caption"})
    index_shards(folder)
    with pytest.raises(DataError, match=r"none of 1 can be read, the first is x-0.tar, key a: ima"):
        compute_reference(open_shards(folder), ToyExtractor(), settings(), device=CPU)


def reference(shards, **changes) -> ReferenceImages:
    return ReferenceImages(str(shards), **{"image_size": 8, "batch_size": 4, **changes})


def only_file(folder: Path) -> Path:
    (path,) = folder.iterdir()
    return path


def test_they_are_computed_once_and_kept_beside_the_shards(shards):
    first, second = ToyExtractor(), ToyExtractor()
    computed = reference(shards).statistics(first, setting_of())
    read = reference(shards).statistics(second, setting_of())
    assert (len(first.shapes), len(second.shapes)) == (3, 0)
    assert torch.equal(computed.rows, read.rows)
    assert torch.equal(computed.statistics.product_sum, read.statistics.product_sum)
    assert computed.protocol == read.protocol
    assert only_file(shards / "statistics").name.startswith("toy-")
    assert verify_shards(shards).is_sound
    assert index_shards(shards).num_samples == open_shards(shards).num_samples == COUNT


@pytest.mark.parametrize(
    ("changes", "extractor"),
    [
        ({"image_size": 10}, ToyExtractor()),
        ({"count": 5}, ToyExtractor()),
        ({}, ToyExtractor("others")),
    ],
)
def test_other_settings_are_other_statistics(shards, changes, extractor):
    reference(shards).statistics(ToyExtractor(), setting_of())
    reference(shards, **changes).statistics(extractor, setting_of())
    assert extractor.shapes
    assert len(list((shards / "statistics").iterdir())) == 2


def test_other_shards_are_other_statistics(shards):
    reference(shards).statistics(ToyExtractor(), setting_of())
    path = shards / "x-1.tar"
    path.write_bytes(path.read_bytes().replace(b"caption 10", b"caption XX"))
    index_shards(shards)
    extractor = ToyExtractor()
    reference(shards).statistics(extractor, setting_of())
    assert extractor.shapes


def test_rows_serve_those_who_need_sums_but_not_the_other_way(shards):
    reference(shards, keep_rows=False).statistics(ToyExtractor(), setting_of())
    extractor = ToyExtractor()
    assert reference(shards).statistics(extractor, setting_of()).rows is not None
    assert extractor.shapes
    (shards / "statistics").rename(shards / "old")
    reference(shards).statistics(ToyExtractor(), setting_of())
    extractor = ToyExtractor()
    reference(shards, keep_rows=False).statistics(extractor, setting_of())
    assert not extractor.shapes


def test_all_samples_and_their_number_are_the_same(shards):
    reference(shards).statistics(ToyExtractor(), setting_of())
    extractor = ToyExtractor()
    reference(shards, count=COUNT).statistics(extractor, setting_of())
    assert not extractor.shapes


def test_another_folder_serves_where_the_shards_cannot_be_written(shards, tmp_path):
    (shards / "statistics").touch()
    with pytest.raises(StorageError, match=r"Name one by `cache`, or make a file with") as caught:
        reference(shards).statistics(extractor := ToyExtractor(), setting_of())
    assert "\n" not in str(caught.value)
    assert not extractor.shapes  # told before anything is computed
    cache = tmp_path / "new" / "cache"
    for calls in (3, 0):
        extractor = ToyExtractor()
        reference(shards, cache=str(cache)).statistics(extractor, setting_of())
        assert len(extractor.shapes) == calls
    assert only_file(cache).suffix == ".safetensors"


def test_damaged_and_foreign_files_are_refused(shards):
    reference(shards).statistics(ToyExtractor(), setting_of())
    path = only_file(shards / "statistics")
    sound = path.read_bytes()
    refused = {"cut off": sound[:-40], "other": b"nonsense", "flipped": flip(sound, -5)}
    for content in refused.values():
        path.write_bytes(content)
        with pytest.raises(DataError, match=str(path)) as caught:
            reference(shards).statistics(ToyExtractor(), setting_of())
        assert "\n" not in str(caught.value)
    path.write_bytes(sound)
    reference(shards, image_size=10).statistics(ToyExtractor(), setting_of())
    (other,) = set((shards / "statistics").iterdir()) - {path}
    path.write_bytes(other.read_bytes())
    message = "holds other reference statistics: .*`images.image_size` is 8 in one and 10 in the"
    with pytest.raises(DataError, match=message):
        reference(shards).statistics(ToyExtractor(), setting_of())


def flip(content: bytes, place: int) -> bytes:
    changed = bytearray(content)
    changed[place] ^= 1
    return bytes(changed)


def test_a_file_can_be_named_instead(shards, tmp_path):
    computed = reference(shards).statistics(ToyExtractor(), setting_of())
    path = only_file(shards / "statistics")
    read = ReferenceImages(str(path), image_size=8, count=COUNT)
    assert torch.equal(read.statistics(ToyExtractor(), setting_of()).rows, computed.rows)
    assert load_reference(path).protocol == computed.protocol
    for changes, named in [({"image_size": 9}, "`image_size` 9; "), ({"count": 3}, "`first` 3; ")]:
        with pytest.raises(DataError, match=named):
            ReferenceImages(str(path), **changes).statistics(ToyExtractor(), setting_of())
    with pytest.raises(DataError, match="`weights`"):
        ReferenceImages(str(path)).statistics(ToyExtractor("others"), setting_of())
    with pytest.raises(DataError, match=r"expected reference statistics in .*no such file"):
        ReferenceImages(str(tmp_path / "x.safetensors")).statistics(ToyExtractor(), setting_of())


def test_they_are_read_once_a_run(shards, monkeypatch):
    reference(shards).statistics(ToyExtractor(), setting_of())
    path = only_file(shards / "statistics")
    for again in (reference(shards), ReferenceImages(str(path))):
        setting, read = setting_of(), []
        monkeypatch.setattr(
            "segalign.metrics.reference.load_reference",
            lambda path, read=read: read.append(path) or load_reference(path),
        )
        first = again.statistics(ToyExtractor(), setting)
        assert again.statistics(ToyExtractor(), setting) is first
        twin = ReferenceImages(**vars(again))
        assert twin.statistics(ToyExtractor(), setting) is first
        assert read == [path]
        with pytest.raises(DataError, match="`weights`"):
            ReferenceImages(str(path)).statistics(ToyExtractor("others"), setting)
    fewer = reference(shards, count=5).statistics(ToyExtractor(), setting)
    assert fewer.statistics.num_samples < first.statistics.num_samples


def test_rows_are_held_for_those_alone_who_need_them(shards):
    reference(shards).statistics(ToyExtractor(), setting_of())
    path, setting = only_file(shards / "statistics"), setting_of()
    for place in (shards, path):
        found = [
            reference(place, keep_rows=keep).statistics(ToyExtractor(), setting)
            for keep in (False, True)
        ]
        assert [one.rows is None for one in found] == [True, False]
        assert found[0].protocol == found[1].protocol


def test_a_coarser_grid_has_room_for_larger_features(shards, tmp_path):
    class Large(ToyExtractor):
        def __call__(self, pixels):
            features, logits = super().__call__(pixels)
            return Features(features * 2.0**14, logits)

    with pytest.raises(DataError, match=r"on a grid of 2\^-12; lower `grid_bits` of the ref"):
        reference(shards).statistics(Large(), setting_of())
    found = reference(shards, grid_bits=4).statistics(Large(), setting_of())
    assert found.statistics.grid_bits == 4
    mean = 2.0**14 * expected_rows().double().mean(0)
    torch.testing.assert_close(found.statistics.mean(), mean, rtol=0, atol=2**-4)
    extractor = Large()
    reference(shards, grid_bits=4).statistics(extractor, setting_of())
    assert not extractor.shapes
    reference(shards, grid_bits=5).statistics(extractor, setting_of())
    assert extractor.shapes


@pytest.mark.parametrize("name", ["image_size", "count", "batch_size", "grid_bits"])
def test_numbers_are_checked_when_the_config_is_read(name):
    with pytest.raises(ConfigError, match=rf"expected `{name}` of reference images"):
        ReferenceImages("nowhere", **{name: 0})


def test_two_runs_may_compute_the_same_at_once(shards):
    class Slow(ToyExtractor):
        def __call__(self, pixels):
            if not self.shapes:
                self.other = reference(shards).statistics(ToyExtractor(), setting_of())
            return super().__call__(pixels)

    slow = Slow()
    found = reference(shards).statistics(slow, setting_of())
    assert torch.equal(found.rows, slow.other.rows)
    read = load_reference(only_file(shards / "statistics"))
    assert torch.equal(read.rows, found.rows)
