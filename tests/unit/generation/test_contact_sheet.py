"""The page of images: escaped, self-contained, every segment marked."""

from html_page import Page

from segalign.generation.contact_sheet import (
    MarkedSegment,
    SheetEntry,
    render_sheet,
    sheet_entries,
)


def entry(*segments, name="0", images=(("00000000-s0.png", "seed 0"),)):
    return SheetEntry(name, [MarkedSegment(*segment) for segment in segments], images)


def body(page):
    """Leave out the legend's segments."""
    return page.all("span", "segment")[5:]


def test_segments_are_shaded_in_turn_and_counted():
    sheet = entry(
        ("A fox. ", 3, 0, False),
        ("It is red and ", 9, 0, False),
        ("small.", 4, 1, True),
        (" Bye.", 2, 2, False),
    )
    page = Page(render_sheet([sheet], {"steps": 25}, "fox"))
    classes = [span["class"] for span in body(page)]
    assert classes == ["segment", "segment odd", "segment cut lost", "segment odd gone"]
    assert [span["title"] for span in body(page)][2] == "4 tokens, 1 dropped"
    assert "A fox. 3It is red and 9small.4\u22121 Bye.2\u22122" in page.text
    assert "4 segments, 18 tokens, 1 cut, 3 dropped" in " ".join(page.text.split())
    assert "steps 25" in page.text
    assert sheet.num_cut == 1


def test_nothing_of_a_prompt_becomes_markup():
    hostile = "</p><script>alert(1)</script><img src=x onerror='a'> {{ 1 + 1 }} &amp; \"q\""
    html = render_sheet(
        [entry((hostile, 9, 0, False), name=hostile)], {"checkpoint": hostile}, hostile
    )
    page = Page(html)
    assert page.all("script") == []
    assert [image["src"] for image in page.all("img")] == ["00000000-s0.png"]
    assert page.text.count(hostile) == 5  # title, heading, setting, name, the prompt itself


def test_the_page_refers_to_the_images_beside_it_alone():
    html = render_sheet([entry(("A fox.", 3, 0, False))], {}, "fox")
    page = Page(html)
    targets = [
        value
        for _, attrs in page.tags
        for key, value in attrs.items()
        if key in ("href", "src", "srcset", "action", "data")
    ]
    assert targets == ["00000000-s0.png", "00000000-s0.png"]
    assert "url(" not in html
    assert "@import" not in html
    assert "http" not in html


def test_it_fits_a_phone_and_the_dark():
    html = render_sheet([], {}, "none")
    viewport = [meta["content"] for meta in Page(html).all("meta") if meta.get("name")]
    assert "width=device-width, initial-scale=1" in viewport
    assert "prefers-color-scheme: dark" in html
    assert "overflow-wrap: anywhere" in html


def test_huge_and_unprintable_prompts():
    segments = [("x" * 15_000, 5, 0, False)] * 3 + [("a\0b\ud800", 1, 0, False)]
    html = render_sheet([entry(*segments, ("\0\ud800", 1, 1, False))], {}, "t")
    assert html.encode()
    assert len(html) < 40_000
    assert "25006 more characters are not shown" in html
    assert "5 segments, 17 tokens" in html
    assert "a\ufffdb\ufffd" in render_sheet([entry(segments[-1])], {}, "t")


def test_records_are_grouped_by_prompt():
    records = [
        {"sample_id": 3, "seed": 0, "file": "00000003-s0.png", "prompt": "a", "id": None},
        {"sample_id": 3, "seed": 1, "file": "00000003-s1.png", "prompt": "a", "id": None},
        {"sample_id": 4, "seed": 0, "file": "00000004-s0.png", "prompt": "b", "id": "wall"},
    ]
    entries = sheet_entries(records, lambda prompt: [MarkedSegment(prompt, 1, 0, False)])
    assert [each.name for each in entries] == ["3", "wall"]
    assert entries[0].images == [("00000003-s0.png", "seed 0"), ("00000003-s1.png", "seed 1")]
    assert entries[1].segments[0].text == "b"
