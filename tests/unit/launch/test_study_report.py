"""The page of a study: escaped, self-contained, small, and images only where noise is equal."""

import base64
import hashlib
import io
import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from html_page import Page
from PIL import Image
from toy_report import (
    METRICS,
    caption_rows,
    observed_of,
    photograph,
    scene_images,
    scores_of,
    study_of,
    table_of,
    write_test,
)

from segalign.errors import StorageError
from segalign.evaluation.page_pictures import to_lossless
from segalign.launch.findings.report_choice import choose_images
from segalign.launch.findings.report_pictures import encode_pictures
from segalign.launch.findings.study_report import breakable, render_report, write_report
from segalign.launch.running.run_state import RunStatus

HOSTILE = (
    "</p></script><script>alert(1)</script><img src=x onerror='a'> {{ 7 * 7 }} \"q\". It rains."
)
PNG = to_lossless(torch.zeros(3, 4, 4, dtype=torch.uint8))
LABELS = ["plain", "drtune, K=3", "refl"]


class Case:
    """A study in a folder; ``test`` leaves the test of a run."""

    def __init__(self, folder, labels=LABELS, seeds=(0, 1), **settings):
        self.study, self.plan = study_of(folder, labels, seeds, **settings)
        self.statuses = {}

    def run(self, label, seed=0):
        return next(one for one in self.plan.of(label) if one.seed == seed)

    def test(self, label, seed=0, *, rows=None, images=None, per_image=None, **settings):
        rows = caption_rows(3) if rows is None else rows
        per_caption = settings.get("per_caption", 1)
        images = scene_images(len(rows), per_caption) if images is None else images
        if per_image is None:
            per_image = scores_of(rows, per_caption)
        return write_test(self.run(label, seed).directory, rows, per_image, images, **settings)

    def test_all(self, seed=0, **settings):
        for label in self.plan.labels:
            self.test(label, seed, **settings)
        return self

    @property
    def observed(self):
        return observed_of(self.plan, self.statuses)

    def choice(self):
        return choose_images(self.plan, self.observed, self.study.report)

    def page(self, plots=None, **changes):
        table = replace(table_of(self.plan, self.observed), **changes)
        html = render_report(self.study, self.plan, self.observed, table, plots or {})
        return html, Page(html)


def words(page):
    return " ".join(page.text.split())


def pictures(page):
    found = [one for one in page.all("img") if one.get("class") != "plot"]
    return [base64.b64decode(one["src"].partition(",")[2]) for one in found]


def test_a_page_says_what_was_run_and_found(tmp_path):
    case = Case(tmp_path).test_all()
    case.statuses = {("refl", 1): RunStatus.FAILED}
    _, page = case.page({"a curve": PNG})
    text = words(page)
    assert "Study toy" in text
    assert "runs done 5 of 6 (1 failed)" in text
    assert "seeds 0, 1 ·" in text
    assert "base variant plain" in text
    assert "refl: seed 1: failed" in text
    assert "Intervals are of 95 %." in text
    assert "training seed 0, the first that all variants have" in text
    cells = [one for one in page.all("td", "number") if "title" in one]
    assert [float(one["data-value"]) for one in cells] == pytest.approx(
        [0.0, 0.0, 1.01, 1.01, 2.0, 2.0], abs=0.011
    )
    assert cells[0]["title"].startswith("seed 0: 0, seed 1: ")
    assert "1/2" in text
    assert [one["class"] for one in page.all("td", "worse")] == ["number worse"]
    assert "higher is better" in text
    assert "lower is better" in text
    assert len(page.all("img")) == 1 + 9
    assert len(page.all("figure")) == 1 + 9


def test_differences_that_chance_hardly_explains_have_a_word(tmp_path):
    case = Case(tmp_path, seeds=(0, 1, 2))
    _, page = case.page()
    # Means differ by 1 and 2 at a spread of 0.01; a lower FID is better.
    assert len(page.all("span", "better")) == 2
    assert len(page.all("span", "worse")) == 2
    assert re.search(r"\+1\.0\d+ ± 0\.\d+ better", words(page))


def test_nothing_from_outside_becomes_markup(tmp_path):
    case = Case(tmp_path, [HOSTILE, f"other {HOSTILE}"])
    rows = [{"sample_id": 1, "caption": HOSTILE, "metadata": {}}]
    per_image = {**scores_of(rows), f"reward/{HOSTILE}": [0.5],
                 f"segment_scores/{HOSTILE}": [[0.5]],
                 f"segment_spans/{HOSTILE}": [[[0, len(HOSTILE)]]]}  # fmt: skip
    case.test_all(rows=rows, per_image=per_image)
    case.statuses = {(HOSTILE, 1): RunStatus.FAILED}
    html, page = case.page(
        {HOSTILE: PNG}, title=HOSTILE, notes=[HOSTILE],
        metrics=[replace(METRICS[0], label=HOSTILE), METRICS[1]],
    )  # fmt: skip
    assert len(page.all("script")) == 1
    assert html.count("<script") == 1
    assert html.count("</script") == 1
    assert "49" not in page.text
    assert all(one["src"].startswith("data:image/") for one in page.all("img"))
    assert not any(key.startswith("on") for _, attrs in page.tags for key in attrs)
    assert page.text.count("alert(1)") >= 10
    data = json.loads(page.all("article")[0]["data-values"])
    assert len(data[HOSTILE]) == 2


def test_only_its_own_script_may_run(tmp_path):
    html, page = Case(tmp_path).test_all().page({"a curve": PNG})
    script = re.search(r"<script>(.*?)</script>", html, re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = next(one["content"] for one in page.all("meta") if "http-equiv" in one)
    assert f"script-src 'sha256-{digest}';" in policy
    assert "default-src 'none'" in policy
    assert "unsafe-eval" not in policy
    outside = re.sub(r'"data:[^"]*"', "", html)
    for word in ("url(", "@import", "http://", "https://", "<link", 'src="/', "eval("):
        assert word not in outside


def test_unprintable_text_can_be_written(tmp_path):
    rows = [{"sample_id": 1, "caption": "a\0b\ud800\x1b. It rains.", "metadata": {}}]
    html, page = Case(tmp_path).test_all(rows=rows).page()
    assert html.encode()
    assert "\0" not in html
    assert "a\ufffdb\ufffd" in page.text


def test_small_pictures_are_the_images(tmp_path):
    _, page = Case(tmp_path).test_all().page()
    expected = scene_images(3)
    found = [np.asarray(Image.open(io.BytesIO(one))) for one in pictures(page)]
    assert len(found) == 9
    for place, image in enumerate(found):
        assert np.array_equal(image, expected[place // 3].permute(1, 2, 0).numpy())
    assert {one["class"] for one in page.all("img")} == {"small"}


def test_five_variants_of_eight_photographs_fit(tmp_path):
    case = Case(tmp_path, [f"variant {n}" for n in range(5)], seeds=(0,))
    rows = caption_rows(8)
    for n, label in enumerate(case.plan.labels):
        case.test(label, rows=rows, images={p: photograph(10 * n + p) for p in range(8)})
    table = table_of(case.plan, case.observed)
    path = tmp_path / "new" / "report.html"
    noise = np.random.default_rng(0).integers(0, 256, (3, 400, 500), dtype=np.uint8)
    plots = {"a curve": to_lossless(torch.from_numpy(noise))}
    write_report(case.study, case.plan, case.observed, table, plots, path)
    assert path.stat().st_size < 5_000_000
    shown = [Image.open(io.BytesIO(one)) for one in pictures(Page(path.read_text()))]
    assert len(shown) == 40
    assert {one.format for one in shown} == {"WEBP"}
    assert len({one.size for one in shown}) == 1
    assert shown[0].size[0] >= 320


def test_the_worst_pictures_fit(tmp_path):
    draws = np.random.default_rng(0)
    paths = [tmp_path / f"{n}.png" for n in range(12)]
    for path in paths:
        noise = draws.integers(0, 256, (3, 256, 256), dtype=np.uint8)
        path.write_bytes(to_lossless(torch.from_numpy(noise)))
    found = encode_pictures(paths, max_bytes=200_000)
    assert sum(len(one.src) for one in found.values()) < 200_000 * 4 / 3 + 12 * 100
    assert {(one.width, one.height, one.is_small) for one in found.values()} == {(256, 256, False)}


OTHERS = {
    "seed of the noise is 4, not 3": {"eval_seed": 4},
    "captions, by their digest, is": {"rows": caption_rows(3, "short")},
    "number of images of each caption is 2, not 1": {"per_caption": 2},
    "size of images is 40 x 40, not 36 x 36": {
        "images": dict.fromkeys(range(3), torch.zeros(3, 40, 40, dtype=torch.uint8))
    },
}


@pytest.mark.parametrize("reason", OTHERS)
def test_images_of_other_noise_are_left_out(tmp_path, reason):
    case = Case(tmp_path)
    for label in LABELS:
        case.test(label, **(OTHERS[reason] if label == "refl" else {}))
    found = case.choice()
    assert list(found.variants) == LABELS[:2]
    assert found.left_out["refl"].startswith("its noise is not that of `plain`: its ")
    assert reason in found.left_out["refl"]
    _, page = case.page()
    assert f"Without images of refl: {found.left_out['refl']}." in words(page)
    assert {one["data-variant"] for one in page.all("figure")} == {"0", "1"}
    assert "which 2 of 3 variants have" in words(page)


def test_other_samples_at_a_place_are_seen(tmp_path):
    case = Case(tmp_path).test_all()
    lines = case.run("refl").directory / "evaluation" / "test" / "images.jsonl"
    lines.write_text(lines.read_text().replace('"sample_id": 41', '"sample_id": 42'))
    assert "its image 1 is of sample 42, not 41" in case.choice().left_out["refl"]


def test_scores_of_other_protocols_are_told(tmp_path):
    case = Case(tmp_path).test_all()
    file = case.run("refl").directory / "evaluation" / "test" / "result.json"
    changed = json.loads(file.read_text())
    changed["metrics"]["alignment"]["protocol"] = {"reward": "another"}
    result = replace_result(changed)
    file.write_text(result)
    found = case.choice()
    assert list(found.variants) == LABELS
    assert "its protocol differs in: alignment" in found.notes[0]


def replace_result(content):
    from segalign.evaluation.result import EvaluationResult, MetricResult

    content = {name: one for name, one in content.items() if name not in ("format", "digest")}
    content["metrics"] = {name: MetricResult(**one) for name, one in content["metrics"].items()}
    return EvaluationResult(**content).to_json()


def test_images_are_of_the_first_seed_that_all_have(tmp_path):
    case = Case(tmp_path, seeds=(5, 6, 7))
    case.test_all(6).test_all(7)
    case.test("plain", 5)
    assert case.choice().seed == 6
    case.statuses = {("refl", 6): RunStatus.RUNNING}
    assert case.choice().seed == 7
    case.statuses = {("refl", seed): RunStatus.FAILED for seed in (5, 6, 7)}
    found = case.choice()
    assert (found.seed, list(found.variants)) == (6, LABELS[:2])
    assert found.left_out == {"refl": "its run with seed 6 is failed"}


def test_captions_are_the_first_that_all_have(tmp_path):
    case = Case(tmp_path, prompts=2, images_of_each=2)
    rows, images = caption_rows(5), scene_images(5, 2)
    for label, lost in zip(LABELS, ({0, 1}, {3}, set()), strict=True):
        kept = {place: one for place, one in images.items() if place not in lost}
        case.test(label, rows=rows, images=kept, per_caption=2)
    shown = [(one.caption, list(one.numbers)) for one in case.choice().captions]
    assert shown == [(1, [0]), (2, [0, 1])]
    _, page = case.page()
    assert len(page.all("article")) == 2
    assert len(page.all("figure")) == 3 * 3
    assert [one["data-variant"] for one in page.all("figure")] == ["0", "1", "2"] * 3


def test_a_broken_picture_is_told_and_left_out(tmp_path):
    case = Case(tmp_path).test_all()
    file = case.run("refl").directory / "evaluation" / "test" / "images" / "000001.png"
    file.write_bytes(file.read_bytes()[:200])
    _, page = case.page()
    assert [one["id"] for one in page.all("article")] == ["c0", "c2"]
    assert "000001.png` cannot be read; test its run again" in words(page)


@pytest.mark.parametrize("name", ["result.json", "images.jsonl", "images/000000.png"])
def test_a_broken_test_is_told(tmp_path, name):
    case = Case(tmp_path).test_all()
    (case.run("refl").directory / "evaluation" / "test" / name).write_bytes(b"{\xff")
    found = case.choice()
    assert list(found.variants) == LABELS[:2]
    assert re.match(r"expected .*; .*(again|wrote)$", found.left_out["refl"])


def test_missing_images_say_what_to_do(tmp_path):
    case = Case(tmp_path)
    case.test("plain")
    case.test("refl", images={})
    _, page = case.page()
    text = words(page)
    assert "Without images of drtune, K=3: it has no test; put `test` in the `stages`" in text
    assert "Without images of refl: its test has kept no images; set `num_pictures`" in text
    assert len(page.all("figure")) == 3


def test_a_study_without_a_finished_run_has_a_page(tmp_path):
    case = Case(tmp_path)
    case.statuses = {(label, seed): RunStatus.PENDING for label in LABELS for seed in (0, 1)}
    html, page = case.page()
    text = words(page)
    assert "runs done 0 of 6 (6 pending)" in text
    assert "No images: no finished run has a test that kept some; put `test`" in text
    assert len(page.all("tr")) == 4
    assert page.all("form") == []
    assert len(html) < 30_000


def test_no_common_caption_says_what_to_do(tmp_path):
    case = Case(tmp_path, LABELS[:2])
    images = scene_images(3)
    for place, label in enumerate(LABELS[:2]):
        case.test(label, images={place: images[place]})
    assert "the tests have no caption in common" in words(case.page()[1])


def test_no_images_are_asked_for(tmp_path):
    _, page = Case(tmp_path, prompts=0).test_all().page()
    assert page.all("figure") == []
    assert "equal noise" not in page.text


def test_a_colour_means_the_same_for_all_variants(tmp_path):
    case = Case(tmp_path, LABELS[:2])
    rows = [{"sample_id": 1, "caption": "One fox. Two owls.", "metadata": {}}]
    spans = [[[0, 9], [9, 18]]]
    for label, scores in zip(LABELS, ([0.1, 0.4], [0.1, 0.7]), strict=False):
        case.test(label, rows=rows, per_image={
            "reward/dense": [sum(scores) / 2],
            "segment_scores/dense": [scores], "segment_spans/dense": spans,
        })  # fmt: skip
    _, page = case.page()
    chips = [one for one in page.all("li") if "data-segment" in one]
    assert [one["class"] for one in chips] == ["h0 lowest", "h3", "h0 lowest", "h6"]
    assert [one["data-segment"] for one in chips] == ["1", "2", "1", "2"]
    assert [one["aria-label"] for one in page.all("ol", "chips")] == [
        "dense: 0.100, 0.400", "dense: 0.100, 0.700",
    ]  # fmt: skip
    assert "0.400 +0.150" in words(page)
    assert "One fox. Two owls." in words(page)
    assert len(page.all("span", "segment")) == 2


def test_other_segments_have_no_numbers(tmp_path):
    case = Case(tmp_path, LABELS[:2])
    rows = [{"sample_id": 1, "caption": "One fox. Two owls.", "metadata": {}}]
    for label, spans in zip(LABELS, ([[0, 9], [9, 18]], [[0, 18]]), strict=False):
        case.test(label, rows=rows, per_image={
            "segment_scores/dense": [[0.5] * len(spans)], "segment_spans/dense": [spans],
        })  # fmt: skip
    _, page = case.page()
    assert len([one for one in page.all("li") if "data-segment" in one]) == 2
    assert words(page).count("cut into other segments") == 1


def test_scores_without_segments_are_enough(tmp_path):
    case = Case(tmp_path)
    rows = caption_rows(3)
    case.test_all(rows=rows, per_image={"attributes": [0.25, None, 1.0], "luminance": [1, 2, 3]})
    html, page = case.page()
    assert page.all("ol", "chips") == []
    assert json.loads(page.all("article")[0]["data-values"]) == {"attributes": [0.25] * 3}
    assert json.loads(page.all("article")[1]["data-values"]) == {"attributes": [None] * 3}
    assert rows[0]["caption"] in page.text
    assert "luminance" not in html


def test_a_full_disk_is_told(tmp_path):
    case = Case(tmp_path)
    (tmp_path / "file").write_text("")
    table = table_of(case.plan, case.observed)
    with pytest.raises(StorageError, match=r"^expected to be able to write"):
        write_report(case.study, case.plan, case.observed, table, {}, tmp_path / "file" / "r.html")


def test_labels_break_after_signs():
    assert str(breakable("num_steps=3, a<b, lr=0.001")) == (
        "num_<wbr>steps=<wbr>3, a&lt;b, lr=<wbr>0.001"
    )
