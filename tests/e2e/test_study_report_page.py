"""The page of a study in a real browser: quiet, whole on a phone, and sorted as it says."""

import json
import re

import numpy as np
import pytest
from browser import CHROMIUM, Browser
from PIL import Image
from toy_report import (
    caption_rows,
    observed_of,
    photograph,
    scene_images,
    scores_of,
    study_of,
    table_of,
    write_test,
)

from segalign.launch.findings.study_report import write_report
from segalign.launch.running.run_state import RunStatus
from segalign.metrics.score_groups import mean

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed"),
]

LABELS = ["plain", "drtune, num_train_steps=3", "drtune, omega=0.3", "refl",
          "k1, encoder=longclip, special_tokens=removed"]  # fmt: skip
MEANS = dict(zip(LABELS, (0.31, 0.36, 0.29, 0.33, 0.35), strict=True))
HOSTILE = "</p></script><script>hit = 1</script><img src=x onerror='hit = 1'> \"q\". It rains."
# What a page shows now, in its order.
ENTRIES = "[...document.querySelectorAll('article')].filter(e => e.offsetHeight).map(e => e.id)"
VARIANTS = (
    "[...document.querySelector('article').querySelectorAll('figure')]"
    ".filter(e => e.offsetHeight).map(e => Number(e.dataset.variant))"
)
ROWS = "[...document.querySelectorAll('tbody tr')].map(e => Number(e.dataset.place))"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with Browser(tmp_path_factory.mktemp("browser")) as one:
        yield one


def make_page(folder, rows, images_of, labels=LABELS):
    study, plan = study_of(folder, labels, seeds=(0, 1), prompts=8)
    observed = observed_of(plan, {(labels[-1], 1): RunStatus.FAILED})
    scores = {}
    for number, label in enumerate(labels):
        scores[label] = scores_of(rows, shift=0.02 * number, seed=number)
        write_test(plan.of(label)[0].directory, rows, scores[label], images_of(number))
    path = folder / "report.html"
    noise = Image.fromarray(np.zeros((400, 700, 3), np.uint8))
    noise.save(folder / "plot.png")
    plots = {"a curve": (folder / "plot.png").read_bytes()}
    write_report(study, plan, observed, table_of(plan, observed, MEANS), plots, path)
    return path, scores


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    drawn = scene_images(8)
    return make_page(tmp_path_factory.mktemp("scenes"), caption_rows(8), lambda _: drawn)


def choose(browser, name, value):
    field = f"document.getElementById('controls').elements[{json.dumps(name)}]"
    browser.run(f"{field}.value = {json.dumps(value)}")
    browser.run(f"{field}.dispatchEvent(new Event('input', {{bubbles: true}}))")


@pytest.mark.parametrize("width", [1200, 390, 320])
def test_the_page_is_quiet_and_fits(browser, scenes, tmp_path, width):
    browser.show(scenes[0], width=width, height=844)
    browser.screenshot(tmp_path / "page.png")
    assert browser.errors == []
    assert {url.partition(":")[0] for url in browser.requests} == {"file", "data"}
    assert len([url for url in browser.requests if url.startswith("file")]) == 1
    assert browser.run("document.documentElement.scrollWidth") <= width
    assert browser.run("[...document.images].every(e => e.complete && e.naturalWidth > 0)")
    assert browser.run(f"{VARIANTS}.length") == 5
    tops = browser.run(
        "[...document.querySelector('article').querySelectorAll('img')]"
        ".map(e => Math.round(e.getBoundingClientRect().y))"
    )
    # Pictures of a row start at one height, however long the names above them are.
    assert len({*tops}) == (1 if width == 1200 else 3)
    # There is more to see than text.
    assert Image.open(tmp_path / "page.png").convert("RGB").getcolors(1000) is None


def test_photographs_are_quiet_too(browser, tmp_path):
    path, _ = make_page(
        tmp_path, caption_rows(2), lambda n: {p: photograph(10 * n + p, 256) for p in range(2)}
    )
    browser.show(path, width=390)
    assert browser.errors == []
    assert browser.run("[...document.images].every(e => e.complete && e.naturalWidth > 0)")
    assert browser.run("document.documentElement.scrollWidth") == 390


def test_headings_sort_by_mouse_and_key(browser, scenes):
    browser.show(scenes[0])
    assert browser.run(ROWS) == [0, 1, 2, 3, 4]
    sort = "[...document.querySelectorAll('thead th')].map(e => e.getAttribute('aria-sort'))"
    dense = "thead th:nth-child(2) button"
    browser.click(dense)
    assert browser.run(ROWS) == [1, 4, 3, 0, 2]
    assert browser.run(sort) == [None, "descending", None, None]
    browser.run(f"document.querySelector('{dense}').focus()")
    browser.press("Enter", "\r")
    assert browser.run(ROWS) == [2, 0, 3, 4, 1]
    assert browser.run(sort) == [None, "ascending", None, None]
    browser.press("Enter", "\r")
    assert browser.run(ROWS) == [0, 1, 2, 3, 4]
    assert browser.run(sort) == [None] * 4
    # Of FID less is better: the first press has the best on top, too.
    browser.press("Tab")
    browser.press("Enter", "\r")
    assert browser.run(sort) == [None, None, "ascending", None]
    assert browser.run(ROWS) == [2, 0, 3, 4, 1]
    browser.click("thead th:nth-child(1) button")
    assert browser.run(ROWS) == [1, 2, 4, 0, 3]
    assert browser.errors == []


def test_a_variant_without_a_number_stands_last(browser, tmp_path):
    study, plan = study_of(tmp_path, LABELS[:3], seeds=(0,))
    observed = observed_of(plan, {(LABELS[1], 0): RunStatus.FAILED})
    path = tmp_path / "report.html"
    write_report(study, plan, observed, table_of(plan, observed, MEANS), {}, path)
    browser.show(path)
    orders = []
    for _ in range(2):
        browser.click("thead th:nth-child(2) button")
        orders.append(browser.run(ROWS))
    assert orders == [[0, 2, 1], [2, 0, 1]]
    assert browser.errors == []


def test_captions_are_filtered_by_words(browser, scenes):
    browser.show(scenes[0])
    expected = [
        f"c{n}" for n, row in enumerate(caption_rows(8))
        if "blue" in row["caption"].lower() and "cross" in row["caption"].lower()
    ]  # fmt: skip
    assert 0 < len(expected) < 8
    browser.click("#controls input[type=search]")
    browser.write("Blue CROSS")
    assert browser.run(ENTRIES) == expected
    count = browser.run("document.querySelector('output').value")
    assert count == f"{len(expected)} of 8 captions, 5 of 5 variants"
    browser.click("#controls button[type=reset]")
    assert browser.run("new Promise(done => setTimeout(done, 50))") is None
    assert len(browser.run(ENTRIES)) == 8


def test_variants_can_be_hidden_and_ordered(browser, scenes):
    browser.show(scenes[0])
    browser.click("#controls input[value='3']")
    assert browser.run(VARIANTS) == [0, 1, 2, 4]
    choose(browser, "variants", "dense")
    assert browser.run(VARIANTS) == [1, 4, 0, 2]
    choose(browser, "variants", "FID")
    assert browser.run(VARIANTS) == [2, 0, 4, 1]
    choose(browser, "variants", "order of the study")
    browser.click("#controls input[value='3']")
    assert browser.run(VARIANTS) == [0, 1, 2, 3, 4]


def test_captions_are_sorted_by_what_variants_score(browser, scenes):
    path, scores = scenes
    browser.show(path)
    rows = [scores[label]["reward/hps"] for label in LABELS]

    def sorted_by(key):
        return [f"c{n}" for n in sorted(range(8), key=lambda n: -key([row[n] for row in rows]))]

    choose(browser, "order", "spread")
    choose(browser, "score", "hps")
    assert browser.run(ENTRIES) == sorted_by(lambda one: max(one) - min(one))
    # Hidden variants are not in the spread.
    browser.click("#controls input[value='0']")
    browser.click("#controls input[value='2']")
    kept = [1, 3, 4]
    spread = sorted_by(lambda one: max(one[n] for n in kept) - min(one[n] for n in kept))
    assert browser.run(ENTRIES) == spread
    assert browser.run("getComputedStyle(document.querySelector('[data-only]')).display") == "none"
    choose(browser, "order", "difference")
    assert browser.run(ENTRIES) == sorted_by(lambda one: one[1] - one[0])
    choose(browser, "first", "4")
    choose(browser, "second", "3")
    assert browser.run(ENTRIES) == sorted_by(lambda one: one[4] - one[3])
    choose(browser, "order", "place")
    assert browser.run(ENTRIES) == [f"c{n}" for n in range(8)]


def test_a_segment_is_marked_in_caption_and_images(browser, scenes):
    browser.show(scenes[0])
    browser.click("#c1 .chips li:nth-child(3)")
    marked = browser.run("[...document.querySelectorAll('.on')].map(e => e.dataset.segment)")
    assert marked == ["3"] * 6
    assert browser.run("document.querySelectorAll('#c1 .on').length") == 6


def test_without_script_the_page_is_whole(browser, scenes):
    browser.show(scenes[0], script=False, width=390)
    text = browser.run("document.body.innerText")
    assert browser.run("document.getElementById('controls').offsetHeight") == 0
    assert len(browser.run(ENTRIES)) == 8
    assert len(browser.run(VARIANTS)) == 5
    assert "±" in text
    assert "seed 1: failed" in text
    found = re.findall(r"\d\.\d{3}", text)
    score = mean(scenes[1][LABELS[0]]["segment_scores/dense"][0])
    assert f"{score:.3f}" in found
    assert browser.run("document.documentElement.scrollWidth") == 390


def test_nothing_hostile_runs(browser, tmp_path):
    rows = [{"sample_id": 1, "caption": HOSTILE, "metadata": {}}]
    labels = [f"a {HOSTILE}", f"b {HOSTILE}"]
    images = scene_images(1)
    path, _ = make_page(tmp_path, rows, lambda _: images, labels)
    browser.show(path, width=390)
    assert browser.errors == []
    assert browser.run("typeof hit") == "undefined"
    assert browser.run("document.querySelector('.caption').textContent") == HOSTILE
    assert browser.run("document.scripts.length") == 1
    assert browser.run("document.documentElement.scrollWidth") == 390
    browser.click("thead th:nth-child(2) button")
    assert browser.run("document.querySelector('th[aria-sort]') !== null")
    # Were something to slip through, the page's policy would still refuse to run it.
    text = path.read_text()
    slipped = tmp_path / "slipped.html"
    slipped.write_text(
        text.replace("<main>", "<main><script>hit = 1</script><img src=x onerror=hit=1>")
    )
    browser.show(slipped)
    assert browser.run("typeof hit") == "undefined"
    assert browser.errors != []
