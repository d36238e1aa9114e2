"""Defects of one sample: its image, caption, JSON, preference or names."""

import json
import struct
import zlib
from typing import Any

import numpy as np
from defects import (
    BAD,
    SIDE,
    Catalogue,
    Members,
    Refused,
    SetAside,
    Usable,
    colour_of,
    encode,
    flat,
    picture,
)
from PIL import Image

CATALOGUE = Catalogue()
member = CATALOGUE.add
CAPTION = b'{"caption": "a caption"}'
UNREADABLE = SetAside("image_unreadable")


def with_image(raw: bytes, suffix: str = "jpg") -> Members:
    return [(suffix, raw), ("json", CAPTION)]


def with_json(raw: bytes) -> Members:
    return [("png", picture(colour_of(BAD))), ("json", raw)]


def with_text(raw: bytes) -> Members:
    return [("png", picture(colour_of(BAD))), ("txt", raw)]


def png_chunk(kind: bytes, content: bytes) -> bytes:
    checksum = zlib.crc32(kind + content)
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)


# Images


@member("member", UNREADABLE)
def cut_jpeg(_: Members) -> Members:
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    raw = encode(Image.fromarray(noise), "JPEG")
    return with_image(raw[: len(raw) // 2])


@member("member", UNREADABLE)
def garbage_jpeg(_: Members) -> Members:
    return with_image(b"\xff\xd8\xff\xe0" + bytes(range(256)) * 4)


@member("member", UNREADABLE)
def image_of_no_bytes(_: Members) -> Members:
    return with_image(b"")


@member("member", UNREADABLE)
def image_of_a_format_that_is_not_taken(_: Members) -> Members:
    return with_image(picture((1, 2, 3), "TIFF"))


@member("member", Usable(flat(*colour_of(BAD))))
def png_named_jpg(_: Members) -> Members:
    return with_image(picture(colour_of(BAD)), "jpg")


@member("member", Usable(flat(*colour_of(BAD)), tolerance=6))
def jpeg_named_png_in_capitals(_: Members) -> Members:
    return with_image(picture(colour_of(BAD), "JPEG", quality=95), "PNG")


@member("member", SetAside("image_missing"))
def image_with_an_unknown_suffix(_: Members) -> Members:
    return with_image(picture(colour_of(BAD)), "bitmap")


@member("member", SetAside("image_too_large"))
def bomb_of_66_megapixels(_: Members) -> Members:
    side = 8104  # black and white: 9 kB
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    rows = zlib.compress(bytes(1 + side // 8) * side, 9)
    chunks = ((b"IHDR", header), (b"IDAT", rows), (b"IEND", b""))
    return with_image(b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(*chunk) for chunk in chunks), "png")


@member("member", Usable(flat(9, 9, 9)))
def strip_that_would_be_huge_when_resized(_: Members) -> Members:
    return with_image(encode(Image.new("L", (1, 60_000), 9)), "png")


@member("member", UNREADABLE)
def bomb_in_a_text_chunk(_: Members) -> Members:
    raw = picture(colour_of(BAD))
    text = png_chunk(b"zTXt", b"comment\0\0" + zlib.compress(bytes(80_000_000)))
    return with_image(raw[:33] + text + raw[33:], "png")


@member("member", Usable(flat(1, 2, 3)))
def image_of_one_pixel(_: Members) -> Members:
    return with_image(encode(Image.new("RGB", (1, 1), (1, 2, 3))), "png")


@member("member", Usable(flat(255, 0, 0), tolerance=25))
def cmyk_jpeg(_: Members) -> Members:
    return with_image(encode(Image.new("CMYK", (SIDE, SIDE), (0, 255, 255, 0)), "JPEG"))


@member("member", Usable(flat(100, 100, 100)))
def grey_of_16_bits(_: Members) -> Members:
    values = np.full((SIDE, SIDE), 257 * 100, dtype=np.uint16)
    return with_image(encode(Image.fromarray(values)), "png")


@member("member", Usable(flat(255, 255, 255)))
def palette_with_alpha(_: Members) -> Members:
    image = Image.new("P", (SIDE, SIDE), 1)
    image.putpalette([255, 0, 0, 0, 255, 0])
    return with_image(encode(image, transparency=1), "png")


@member("member", Usable(flat(255, 0, 0)))
def animated_gif(_: Members) -> Members:
    first, second = Image.new("RGB", (SIDE, SIDE), "red"), Image.new("RGB", (SIDE, SIDE), "blue")
    return with_image(encode(first, "GIF", save_all=True, append_images=[second]))


def turned() -> np.ndarray:
    return np.repeat(np.array([[0, 255]] * SIDE, dtype=np.uint8), SIDE // 2, axis=1)[..., None]


@member("member", Usable(np.broadcast_to(turned(), (SIDE, SIDE, 3))))
def orientation_in_exif(_: Members) -> Members:
    # Stored with white above black; to be turned by 90 degrees clockwise.
    stored = np.zeros((SIDE, SIDE), dtype=np.uint8)
    stored[: SIDE // 2] = 255
    exif = Image.Exif()
    exif[0x0112] = 6
    return with_image(encode(Image.fromarray(stored), exif=exif), "png")


@member("member", SetAside("image_missing"))
def no_image(_: Members) -> Members:
    return [("json", CAPTION)]


# Captions


@member("member", SetAside("caption_missing"))
def no_caption(_: Members) -> Members:
    return [("png", picture(colour_of(BAD)))]


@member("member", SetAside("caption_missing"))
def json_without_a_caption(_: Members) -> Members:
    return with_json(b"{}")


@member("member", SetAside("caption_not_utf8"))
def caption_in_latin_1(_: Members) -> Members:
    return with_text("ein größeres Bild".encode("latin-1"))


@member("member", SetAside("caption_not_utf8"))
def caption_with_a_lone_surrogate(_: Members) -> Members:
    return with_json(rb'{"caption": "a \ud800 b"}')


@member("member", SetAside("caption_empty"))
def caption_of_no_bytes(_: Members) -> Members:
    return with_text(b"")


@member("member", SetAside("caption_empty"))
def caption_of_white_space(_: Members) -> Members:
    return with_text(" \t\r\n\u00a0\u2003".encode())


@member("member", SetAside("caption_nul"))
def caption_with_nul(_: Members) -> Members:
    return with_json(rb'{"caption": "a\u0000b"}')


@member("member", SetAside("caption_too_long"))
def caption_of_10_megabytes(_: Members) -> Members:
    return with_text(b"word " * 2_000_000)


@member("member", SetAside("json_invalid"))
def caption_of_10_megabytes_in_json(_: Members) -> Members:
    return with_json(json.dumps({"caption": "word " * 2_000_000}).encode())


@member("member", Usable())
def caption_with_a_byte_order_mark(_: Members) -> Members:
    return with_text(b"\xef\xbb\xbfa caption")


# JSON and preferences


@member("member", SetAside("json_invalid"))
def json_that_is_a_list(_: Members) -> Members:
    return with_json(b'["a caption"]')


@member("member", SetAside("json_invalid"))
def json_that_is_cut(_: Members) -> Members:
    return with_json(CAPTION[:-4])


@member("member", SetAside("json_invalid"))
def caption_that_is_a_number(_: Members) -> Members:
    return with_json(b'{"caption": 3}')


@member("member", SetAside("json_invalid"))
def json_nested_too_deep(_: Members) -> Members:
    return with_json(b'{"caption": "a", "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}")


@member("member", SetAside("json_invalid"))
def json_with_an_integer_of_5000_digits(_: Members) -> Members:
    return with_json(b'{"caption": "a", "x": ' + b"7" * 5000 + b"}")


@member("member", Usable())
def json_with_nan(_: Members) -> Members:
    return with_json(b'{"caption": "a caption", "score": NaN}')


def with_preference(members: Members, fields: Any) -> Members:
    raw = json.dumps({"caption": "a", **fields}).encode()
    return [*members[:2], ("json", raw)]


@member("member", SetAside("preference_invalid"), content="preference")
def preference_out_of_range(members: Members) -> Members:
    return with_preference(members, {"preference_probs": [1.5, -0.5]})


@member("member", SetAside("preference_invalid"), content="preference")
def preference_that_is_nan(members: Members) -> Members:
    return with_preference(members, {"preference_probs": [float("nan"), 1]})


@member("member", SetAside("preference_invalid"), content="preference")
def preference_of_400_digits(members: Members) -> Members:
    return with_preference(members, {"label": 10**400})


@member("member", SetAside("image_missing"), content="preference")
def pair_of_one_image(members: Members) -> Members:
    return [members[0], members[2]]


# Names


@member("member", Usable())
def member_that_says_it_is_padding(members: Members) -> Members:
    return [*members, ("__padding__", b"1")]


@member("member", Usable())
def members_named_as_fields_of_the_reader(members: Members) -> Members:
    fields = ("__fault__", "__index__", "__epoch__", "__url__", "__key__", "__position__")
    return [*members, *((name, b"1") for name in fields)]


@member("member", Refused("two members"))
def suffix_twice(members: Members) -> Members:
    return [*members, members[0]]


@member("member", Refused("two members"))
def suffix_twice_but_for_capitals(members: Members) -> Members:
    return [*members, ("PNG", members[0][1])]


@member("member", Refused("with a name of"))
def name_of_5000_characters(members: Members) -> Members:
    return [*members, ("x" * 5000, b"")]
