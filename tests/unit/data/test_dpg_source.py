"""DPG-Bench's layout: prompts in files, questions in a table."""

import re

import pytest
from packed_source import faults, fields

import main
from segalign.data.dpg_source import DpgSource
from segalign.data.faults import SampleFault
from segalign.errors import ConfigError, DataError
from segalign.evaluation.captions import read_caption_rows

HEADER = (
    "item_id,text,keywords,proposition_id,dependency,category_broad,category_detailed,tuple,"
    "question_natural_language\n"
)
ROWS = (
    '1,A red truck on sand.,,2,1,attribute,color,"attribute - color (truck, red)",Is it red?\n'
    "1,A red truck on sand.,,1,0,entity,whole,entity - whole (truck),Is there a truck?\n"
    '1,A red truck on sand.,,3,"1, 2.0",relation,spatial,"relation - spatial (truck, sand, on)",'
    "Is it on sand?\n"
    "b7,A tree.,,1.0,0,entity,whole,entity - whole (tree),Is there a tree?\n"
)


@pytest.fixture
def bench(tmp_path):
    """Write the folder as the official repository has it."""

    def write(rows=ROWS, prompts=(("1", "A red truck on sand.\n"), ("b7", "A tree."))):
        folder = tmp_path / "dpg_bench"
        (folder / "prompts").mkdir(parents=True, exist_ok=True)
        (folder / "dpg_bench.csv").write_text(HEADER + rows, encoding="utf-8")
        for name, text in prompts:
            (folder / "prompts" / f"{name}.txt").write_text(text, encoding="utf-8")
        return folder

    return write


def test_prompts_are_packed_with_their_questions(tmp_path, bench, capsys):
    out = tmp_path / "out"
    assert main.main(["shards", "pack", "dpg", str(bench()), str(out)]) == 0
    assert "num packed  2" in capsys.readouterr().out
    first, second = read_caption_rows(out, None)
    assert (first["caption"], second["caption"]) == ("A red truck on sand.", "A tree.")
    assert {key: first["metadata"][key] for key in ("id", "prompt_set")} == {
        "id": "1",
        "prompt_set": "dpg",
    }
    # The first data row counts too, and questions come in order of their ids.
    assert [q["dependency"] for q in first["metadata"]["questions"]] == [[], [1], [1, 2]]
    assert first["metadata"]["questions"][1] == {
        "id": 2,
        "dependency": [1],
        "category_broad": "attribute",
        "category_detailed": "color",
        "tuple": "attribute - color (truck, red)",
        "question": "Is it red?",
    }
    assert [q["question"] for q in second["metadata"]["questions"]] == ["Is there a tree?"]


@pytest.mark.parametrize("inner", ["", "prompts"])
def test_the_questions_are_found_beside_the_prompts(bench, inner):
    source = DpgSource(bench() / inner)
    assert len(fields(source, 0)["questions"]) == 3


def test_the_table_alone_holds_prompts_too(bench):
    source = DpgSource(bench() / "dpg_bench.csv")
    assert [fields(source, index)["caption"] for index in (0, 1)] == [
        "A red truck on sand.",
        "A tree.",
    ]
    changed = ROWS.replace("sand.,,1", "mud.,,1")
    assert faults_of(DpgSource(bench(rows=changed) / "dpg_bench.csv")) == [
        "questions_invalid",
        None,
    ]


def faults_of(source):
    found = []
    for index in range(len(source)):
        try:
            source.members(index)
            found.append(None)
        except SampleFault as fault:
            found.append(fault.reason)
    return found


def test_prompts_and_questions_without_each_other_are_set_aside(bench):
    source = DpgSource(bench(rows=ROWS + "c,,,1,0,a,b,t,q\n", prompts=[("1", "A."), ("z", "B.")]))
    assert [source.origin(index) for index in range(4)] == ["item 1", "item b7", "item c", "item z"]
    assert faults_of(source) == [None, "caption_missing", "caption_missing", "questions_invalid"]


@pytest.mark.parametrize(
    "row",
    [
        "b7,A tree.,,1,0,e,w,entity - whole (leaf),Is there a leaf?\n",
        "b7,A tree.,,2,9,e,w,entity - whole (leaf),Is there a leaf?\n",
        "b7,A tree.,,two,0,e,w,entity - whole (leaf),Is there a leaf?\n",
        "b7,A tree.,,2,,e,w,entity - whole (leaf),Is there a leaf?\n",
        "b7,A tree.,,2,0,e,w,,Is there a leaf?\n",
        "b7,A tree.,,2\n",
        "b7,A tree.,,2,0,e,w,entity - whole (leaf),Is there a leaf?,surplus\n",
    ],
)
def test_unsound_questions_set_their_prompt_aside(bench, row):
    assert faults_of(DpgSource(bench(rows=ROWS + row))) == [None, "questions_invalid"]


def test_prompts_can_be_packed_without_questions(tmp_path, bench):
    folder = bench()
    (folder / "dpg_bench.csv").unlink()
    with pytest.raises(DataError, match=r"the questions `dpg_bench.csv` were expected in"):
        DpgSource(folder)
    argv = ["shards", "pack", "dpg", str(folder), str(tmp_path / "out"), "--questions", "none"]
    assert main.main(argv) == 0
    assert "questions" not in read_caption_rows(tmp_path / "out", None)[0]["metadata"]


def test_bad_prompts_are_set_aside(bench):
    source = DpgSource(bench(prompts=[("1", " "), ("b7", "\0")]))
    assert faults(source) == ["caption_empty", "caption_nul"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"item_id,text\n1,A.\n", "it lacks proposition_id, dependency, category_broad, category"),
        (b"\xff\xfe", "a CSV file of questions was expected at"),
        (HEADER.encode() + b'1,"A tree', "a CSV file of questions was expected at"),
    ],
)
def test_foreign_tables_are_refused(tmp_path, bench, content, message):
    folder = bench()
    (folder / "dpg_bench.csv").write_bytes(content)
    with pytest.raises(DataError, match=re.escape(message)) as caught:
        DpgSource(folder)
    assert "\n" not in str(caught.value)


def test_other_folders_are_refused(tmp_path, bench):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"a folder of prompts, one in each `.txt`, or"):
        DpgSource(tmp_path / "empty")
    with pytest.raises(ConfigError, match="expected `--questions` with a folder of prompts"):
        DpgSource(bench() / "dpg_bench.csv", questions=tmp_path / "x.csv")
    with pytest.raises(DataError, match="a CSV file of questions was expected at"):
        DpgSource(bench(), questions=tmp_path / "x.csv")


def test_changed_prompts_are_other_shards(bench):
    before = DpgSource(bench()).settings()
    assert DpgSource(bench(prompts=[("b7", "A tall tree.")])).settings() != before
