import json
import subprocess
import sys

import pytest
import webdataset

import main
from segalign.errors import SegalignError


def run(argv):
    return main.main(["shards", *argv])


def test_scenes_are_packed_verified_and_shown(tmp_path, capsys):
    out = str(tmp_path / "shards")
    size = ["--world", "2x2", "--count", "5", "--samples-per-shard", "2"]
    assert run(["pack", "scenes", out, *size]) == 0
    shown = capsys.readouterr()
    assert "num packed  5" in shown.out
    assert "set aside   none" in shown.out
    assert "packing: 5 of 5" in shown.err
    assert run(["verify", out, "--decode", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["num_decoded"], report["sound"]) == (5, True)


def test_pairs_of_scenes_are_packed(tmp_path, capsys):
    out = str(tmp_path / "shards")
    size = ["--world", "2x2", "--count", "6", "--samples-per-shard", "2"]
    pairs = ["--pairs", "--edit-position", "past_77", "--tie-share", "0.5"]
    assert run(["pack", "scenes", out, *size, *pairs]) == 0
    assert "preferences  pairs: 6\n             ties: 4\n" in capsys.readouterr().out
    assert run(["verify", out, "--decode"]) == 0


def test_foreign_shards_are_indexed_once(tmp_path, capsys):
    with webdataset.ShardWriter(str(tmp_path / "x-%d.tar"), verbose=0) as writer:
        writer.write({"__key__": "a", "txt": "a"})
    assert run(["index", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "samples   1" in said
    assert f"next      `shards verify {tmp_path} --decode` looks" in said
    assert run(["index", str(tmp_path)]) == 65
    assert "error: a folder without a manifest was expected; " in capsys.readouterr().err
    assert run(["index", str(tmp_path), "--force"]) == 0


def test_folder_jsonl_and_preferences(tmp_path, capsys):
    from PIL import Image

    images = tmp_path / "images"
    images.mkdir()
    Image.new("RGB", (4, 4)).save(images / "a.png")
    (images / "a.txt").write_text("a")
    Image.new("RGB", (4, 4)).save(images / "b.png")
    assert run(["pack", "folder", str(images), str(tmp_path / "1"), "--check", "full"]) == 0
    shown = capsys.readouterr().out
    assert "set aside   caption_missing: 1" in shown
    assert "examples    b.png | caption_missing | there is no `txt`" in shown
    lines = tmp_path / "lines.jsonl"
    lines.write_text('{"caption": "a", "path": "a.png"}\n')
    root = ["--image-root", str(images)]
    assert run(["pack", "jsonl", str(lines), str(tmp_path / "2"), *root]) == 0
    lines.write_text('{"caption": "a", "path_0": "a.png", "path_1": "b.png", "label": 1}\n')
    assert run(["pack", "preferences", str(lines), str(tmp_path / "3"), *root]) == 0


def test_defects_end_with_65(tmp_path, capsys):
    out = tmp_path / "shards"
    assert run(["pack", "scenes", str(out), "--world", "2x2", "--count", "2"]) == 0
    (out / "shard-000000.tar").unlink()
    assert run(["verify", str(out)]) == 65
    assert "`shard-000000.tar` is missing" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "code", "message"),
    [
        (["pack", "scenes", "OUT", "--world", "9x9"], 78, "error: expected a world among"),
        (["pack", "scenes", "OUT", "--count", "0"], 78, "error: `count`: Not of type PositiveInt"),
        (["pack", "scenes", "OUT", "--typo", "0"], 78, "error: unrecognized arguments: --typo"),
        (
            ["pack", "scenes", "OUT", "--tie-share", "0.5"],
            78,
            "error: `edit_position` and `tie_share` are for pairs of scenes; got `any` and 0.5",
        ),
        (
            ["pack", "scenes", "OUT", "--pairs", "--length", "short", "--edit-position", "past_77"],
            78,
            "error: edited facts past token 77 need captions of length `long` or `very_long`;",
        ),
        (
            ["pack", "scenes", "OUT", "--pairs", "--tie-share", "2"],
            78,
            "error: `tie_share`: Not of type ClosedUnitInterval",
        ),
        (
            ["pack", "pickapic", "NOWHERE", "OUT"],
            65,
            "error: a Parquet file, a folder of them or a pattern was expected; `NOWHERE` has none",
        ),
        (
            ["pack", "pickapic", "NOWHERE", "OUT", "--captions", "NOWHERE"],
            65,
            "error: a JSONL file of long captions was expected at `NOWHERE`; got: No such file",
        ),
        (
            ["pack", "hpd", "NOWHERE", "OUT", "--image-root", "EMPTY"],
            65,
            "error: a JSON file was expected at `NOWHERE`; got: No such file",
        ),
        (["pack", "folder", "NOWHERE", "OUT"], 65, "error: a folder of images was expected;"),
        (["pack", "scenes", "FILE/x"], 75, "error: expected to be able to write"),
        (["verify", "NOWHERE"], 65, "error: a folder of shards was expected;"),
        (["verify", "EMPTY"], 65, "error: `EMPTY` must hold `manifest.jsonl`; it has none; run"),
        (
            [],
            78,
            "error: expected a sub-command of `main.py shards`, one of pack, split, index, ",
        ),
        (
            ["pack"],
            78,
            'error: expected "pack.kind" to be one of {folder,jsonl,longalign,preferences,pick',
        ),
        (
            ["nonsense"],
            78,
            "error: argument pack | split | index | verify | encode: invalid choice",
        ),
    ],
)
def test_errors_are_one_line_with_a_code(tmp_path, monkeypatch, capsys, argv, code, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "EMPTY").mkdir()
    (tmp_path / "FILE").touch()
    assert run(argv) == code
    error = capsys.readouterr().err
    assert error.startswith(message)
    assert error.count("\n") == 1


def test_debugging_shows_the_traceback(monkeypatch):
    monkeypatch.setenv("SEGALIGN_DEBUG", "1")
    with pytest.raises(SegalignError):
        run(["verify", "NOWHERE"])


@pytest.mark.parametrize("argv", [["--help"], ["pack", "scenes", "--help"], ["verify", "--help"]])
def test_help_imports_neither_torch_nor_lightning(repository, argv):
    code = (
        "import sys\nfrom segalign.commands.shards import run\n"
        f"try: run({argv})\nexcept SystemExit: pass\n"
        "assert not {'torch', 'lightning', 'numpy', 'PIL'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=repository, check=True, capture_output=True)


def test_packing_and_verifying_images_needs_no_torch(repository):
    sources = "sources jsonl_sources parquet_source pickapic_source hpd_source long_captions"
    sources += " prompt_sources dpg_source"
    modules = f"{sources} packing manifest order verify images captions tarfiles"
    imports = "".join(f"import segalign.data.{name}\n" for name in modules.split())
    code = f"import sys\n{imports}assert 'torch' not in sys.modules\n"
    subprocess.run([sys.executable, "-c", code], cwd=repository, check=True)
