"""``main.py results``."""

import pytest

from segalign.commands.results import run
from segalign.errors import ConfigError, DataError
from segalign.evaluation.result import EvaluationResult, MetricResult


def write(folder, name, resize="legacy"):
    folder.mkdir()
    fid = MetricResult(values={"fid": 20.5}, protocol={"resize": resize})
    EvaluationResult(
        model={"name": name}, weights="raw", num_captions=4, images_per_caption=1, batch_size=4,
        eval_seed=1, prompts="ab" * 32, metrics={"fid": fid}, num_counted=4,
    ).save(folder / "result.json")  # fmt: skip


def test_files_and_folders_are_set_side_by_side(tmp_path, capsys):
    write(tmp_path / "a", "first")
    write(tmp_path / "b", "second")
    assert run([str(tmp_path / "a"), str(tmp_path / "b" / "result.json")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[2:] == ["| model | FID |", "|---|---|", "| first | 20.5 |", "| second | 20.5 |"]


def test_other_protocols_are_named_by_their_files(tmp_path):
    write(tmp_path / "a", "first")
    write(tmp_path / "b", "second", "clean")
    with pytest.raises(DataError, match=r"legacy in `.*a/result.json` and clean in `.*b/result"):
        run([str(tmp_path / "a"), str(tmp_path / "b")])


def test_no_file_is_refused():
    with pytest.raises(ConfigError, match="files"):
        run([])
