"""The page of a result: escaped, self-contained, small, and readable without colours."""

import base64
import io
import math
import re

import torch
from html_page import Page
from PIL import Image

from segalign.evaluation.page_pictures import encode_images
from segalign.evaluation.result import EvaluationResult, FailedImage, MetricResult
from segalign.evaluation.result_page import ResultPage

HOSTILE = (
    "</p><script>alert(1)</script><img src=x onerror='a'> {{ 7 * 7 }} \"q\". It rains & pours."
)


def result_of(**changes):
    settings = {
        "model": {"name": "m"}, "weights": "raw", "num_captions": 2, "images_per_caption": 2,
        "batch_size": 4, "eval_seed": 1, "prompts": "ab" * 32, "num_counted": 4,
        "metrics": {
            "fid": MetricResult(
                values={"fid": 20.5, "other": math.nan}, protocol={"resize": "legacy"},
                notes=("mind the gap",),
            )
        },
    }  # fmt: skip
    return EvaluationResult(**{**settings, **changes})


def page_of(caption="One fox. Two owls.", result=None, images=None, per_image=None, **options):
    cut = caption.index(". ") + 2
    spans = [[0, cut], [cut, len(caption)]]
    rows = [{"sample_id": 7, "caption": caption, "metadata": {}}] * 2
    scores = {
        "segment_scores/dense": [[0.25, 0.125], [0.5, 0.75], None, [0.1, math.nan]],
        "segment_spans/dense": [spans, spans, None, spans],
        "segment_scores/hps": [[1.0, 2.0], [3.0, 4.0], None, [5.0, 6.0]],
        "segment_spans/hps": [spans, spans, None, spans],
        "reward/dense": [0.1875, 0.625, None, 0.1],
    }
    if images is None:
        images = {place: torch.full((3, 8, 8), 40 * place).byte() for place in (0, 1, 3)}
    html = ResultPage(
        result or result_of(), rows, scores if per_image is None else per_image, images, **options
    ).render()
    return html, Page(html)


def words(page):
    return " ".join(page.text.split())


def test_segments_carry_colour_and_number():
    _, page = page_of()
    classes = [one["class"] for one in page.all("span", "segment")]
    assert classes == [
        "segment h1", "segment h0 lowest", "segment h4 lowest", "segment h6", "segment h0",
        "segment none",
    ]  # fmt: skip
    assert "One fox. 0.250Two owls.0.125 ▾" in words(page)
    assert "One fox. 0.100Two owls.-" in words(page)
    strips = page.all("span", "strip")
    assert [one["aria-label"] for one in strips] == [
        "hps: 1.000, 2.000", "hps: 3.000, 4.000", "hps: 5.000, 6.000",
    ]  # fmt: skip
    assert "image 0 · dense 0.188" in words(page)
    assert "below" in words(page)


def test_another_reward_may_colour():
    _, page = page_of(reward="hps")
    assert page.all("span", "strip")[0]["aria-label"] == "dense: 0.250, 0.125"
    assert "One fox. 1.000 ▾Two owls.2.000" in words(page)


def test_nothing_from_outside_becomes_markup():
    metric = MetricResult(values={HOSTILE: 1.0}, protocol={HOSTILE: HOSTILE}, notes=(HOSTILE,))
    result = result_of(
        model={"name": HOSTILE},
        metrics={HOSTILE: metric},
        failures=(FailedImage(place=1, caption=HOSTILE, error=HOSTILE),),
        created=HOSTILE,
    )
    html, page = page_of(HOSTILE, result, plots={HOSTILE: b"png"})
    assert page.all("script") == []
    assert "<script" not in html
    assert "49" not in page.text
    sources = [one["src"] for one in page.all("img")]
    assert len(sources) == 4
    assert all(one.startswith("data:image/png;base64,") for one in sources)
    assert page.text.count("alert(1)") >= 10
    _, plain_page = page_of(HOSTILE, per_image={})
    assert plain_page.text.count(HOSTILE) == 3


def test_the_page_refers_to_nothing_outside():
    html, page = page_of(plots={"a plot": b"png"})
    targets = [
        value
        for _, attrs in page.tags
        for key, value in attrs.items()
        if key in ("href", "src", "srcset", "action", "data")
    ]
    assert len(targets) == 4
    assert all(one.startswith("data:image/png;base64,") for one in targets)
    outside = re.sub(r'"data:[^"]*"', "", html)
    for word in ("url(", "@import", "http", "<script", "<link"):
        assert word not in outside


def test_pictures_are_the_images():
    _, page = page_of()
    pixels = [
        Image.open(io.BytesIO(base64.b64decode(one["src"].partition(",")[2]))).getpixel((3, 3))
        for one in page.all("img")
    ]
    assert pixels == [(0, 0, 0), (40, 40, 40), (120, 120, 120)]
    assert {one["class"] for one in page.all("img")} == {"small"}


def test_numbers_notes_and_failures_are_told():
    result = result_of(
        num_non_finite=1, failures=(FailedImage(place=2, caption="A fox.", error="no memory"),)
    )
    _, page = page_of(result=result)
    assert "1 of 4 images could not be made; no number counts them." in words(page)
    assert "1 of 4 images are not finite; no number counts them." in words(page)
    assert "Image 2: no memoryA fox." in words(page)
    assert "FID20.5" in words(page)
    assert "other-" in words(page)
    assert "mind the gap." in words(page)
    assert '"resize": "legacy"' in words(page)


def test_a_result_without_images_has_a_page():
    html, page = page_of(images={}, per_image={})
    assert page.all("img") == []
    assert "FID20.5" in words(page)
    assert len(html) < 10_000


def test_it_fits_a_phone_print_and_the_dark():
    html, page = page_of(plots={"a plot": b"png"})
    viewport = [meta["content"] for meta in page.all("meta") if meta.get("name")]
    assert "width=device-width, initial-scale=1" in viewport
    for rule in ("prefers-color-scheme: dark", "overflow-wrap: anywhere", "@media print",
                 "print-color-adjust: exact", ":focus-visible"):  # fmt: skip
        assert rule in html
    region = page.all("div", "scroll")[1]
    assert (region["tabindex"], region["role"], region["aria-label"]) == ("0", "region", "a plot")


def test_sixty_four_images_stay_below_five_megabytes():
    side = 256
    generator = torch.Generator().manual_seed(0)
    # Noise is the worst that can be encoded.
    noise = torch.randint(0, 256, (3, side, side), generator=generator, dtype=torch.uint8)
    encoded = encode_images(dict.fromkeys(range(64), noise))
    assert len(encoded) == 64
    assert sum(4 * len(one) / 3 for one in encoded.values()) < 4.5e6
    smooth = encode_images({0: torch.zeros(3, side, side, dtype=torch.uint8)})
    assert Image.open(io.BytesIO(smooth[0])).size == (side, side)


def test_unprintable_captions_can_be_written():
    html, _ = page_of("a\0b\ud800. It rains.")
    assert html.encode()
