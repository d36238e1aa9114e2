import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from segalign.data.faults import SampleFault
from segalign.data.images import MAX_PIXELS, decode_image


def test_exif_orientation_is_applied(encode):
    image = Image.new("RGB", (6, 4), "black")
    image.putpixel((0, 0), (255, 255, 255))
    exif = Image.Exif()
    exif[0x0112] = 6  # stored rotated: to be turned by 90 degrees clockwise
    pixels = decode_image(encode(image, "PNG", exif=exif))
    assert pixels.shape == (6, 4, 3)
    assert pixels[0, -1].tolist() == [255, 255, 255]


def test_cmyk_becomes_rgb(encode):
    image = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    pixels = decode_image(encode(image, "JPEG", quality=95))
    assert pixels.shape == (16, 16, 3)
    assert pixels[8, 8, 0] > 240
    assert pixels[8, 8, 1:].max() < 30


def test_16_bit_grey_is_scaled_not_cut(encode):
    values = np.array([[0, 257 * 100], [257 * 200, 65535]], dtype=np.uint16)
    pixels = decode_image(encode(Image.fromarray(values), "PNG"))
    assert pixels[..., 0].tolist() == [[0, 100], [200, 255]]


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_is_laid_over_white(encode, mode):
    image = Image.new(mode, (4, 4), 0)
    assert decode_image(encode(image, "PNG")).min() == 255


def test_palette_with_transparency_is_laid_over_white(encode):
    image = Image.new("P", (4, 4), 1)
    image.putpalette([255, 0, 0, 0, 255, 0])
    pixels = decode_image(encode(image, "PNG", transparency=1))
    assert pixels.min() == 255


def test_palette_becomes_rgb(encode):
    image = Image.new("P", (4, 4), 1)
    image.putpalette([255, 0, 0, 0, 250, 0])
    assert decode_image(encode(image, "PNG"))[0, 0].tolist() == [0, 250, 0]


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_first_frame_of_an_animation(encode, kind):
    first, second = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")
    raw = encode(first, kind, save_all=True, append_images=[second])
    assert decode_image(raw)[4, 4, 0] > 240


def test_short_side_is_resized_and_the_centre_kept(encode):
    image = Image.new("RGB", (30, 10), "black")
    image.paste((255, 255, 255), (10, 0, 20, 10))
    pixels = decode_image(encode(image), 5)
    assert pixels.shape == (5, 5, 3)
    assert pixels[2, 2].min() > 250


def test_small_images_are_enlarged(plain_image):
    assert decode_image(plain_image(size=(1, 1)), 8).shape == (8, 8, 3)


@pytest.mark.parametrize("size", [(1, 60_000), (60_000, 1), (2, 50_001)])
def test_strips_are_not_enlarged_as_a_whole(encode, size):
    image = Image.new("L", size, 10)
    centre = tuple(length // 2 for length in size)
    image.paste(200, (centre[0] - 40, centre[1] - 40, centre[0] + 40, centre[1] + 40))
    pixels = decode_image(encode(image), 512)
    assert pixels.shape == (512, 512, 3)
    assert pixels.min() == 200  # of the middle, not of an end


def test_jpeg_is_decoded_at_a_reduced_scale(encode):
    gradient = np.linspace(0, 255, 512, dtype=np.uint8)
    image = Image.fromarray(np.stack([np.tile(gradient, (512, 1))] * 3, axis=-1))
    pixels = decode_image(encode(image, "JPEG", quality=95), 64)
    expected = np.asarray(image.resize((64, 64), Image.Resampling.BICUBIC))
    assert np.abs(pixels.astype(int) - expected).max() <= 6


def test_image_size_that_fits_changes_no_pixel(encode):
    noise = np.random.default_rng(0).integers(0, 255, (36, 36, 3), dtype=np.uint8)
    np.testing.assert_array_equal(decode_image(encode(Image.fromarray(noise)), 36), noise)


def png_header(width: int, height: int) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + header
    return (
        b"\x89PNG\r\n\x1a\n"
        + struct.pack(">I", len(header))
        + chunk
        + struct.pack(">I", zlib.crc32(chunk))
        + struct.pack(">I", 0)
        + b"IDAT"
        + struct.pack(">I", zlib.crc32(b"IDAT"))
    )


@pytest.mark.parametrize("side", [8001, 10_000, 60_000])
def test_decompression_bombs_are_refused_by_their_header(side):
    assert side * side > MAX_PIXELS
    with pytest.raises(SampleFault) as caught:
        decode_image(png_header(side, side))
    assert caught.value.reason == "image_too_large"


def test_largest_image_passes_the_size_check():
    with pytest.raises(SampleFault) as caught:
        decode_image(png_header(8000, 8000), 8)
    assert caught.value.reason == "image_unreadable"


def test_truncated_and_foreign_bytes_are_unreadable(plain_image):
    bitmap = io.BytesIO()
    Image.new("RGB", (4, 4)).save(bitmap, format="BMP")
    jpeg = plain_image(size=(64, 64), kind="JPEG")
    for raw in (b"", b"hello", jpeg[: len(jpeg) // 2], bitmap.getvalue()):
        with pytest.raises(SampleFault) as caught:
            decode_image(raw)
        assert caught.value.reason == "image_unreadable"
        assert "0x" not in caught.value.detail


def outcome(raw: bytes) -> str:
    try:
        decode_image(raw, 8)
    except SampleFault as fault:
        return fault.reason
    return "decoded"


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF"])
def test_corrupted_bytes_never_raise_anything_else(plain_image, kind):
    rng = np.random.default_rng(0)
    raw = np.frombuffer(plain_image(size=(16, 16), kind=kind), dtype=np.uint8)
    found = set()
    for _ in range(100):
        broken = raw.copy()
        broken[rng.integers(0, len(raw), 4)] = rng.integers(0, 256, 4)
        found.add(outcome(broken.tobytes()))
    assert "image_unreadable" in found
    assert found <= {"image_unreadable", "image_too_large", "decoded"}
