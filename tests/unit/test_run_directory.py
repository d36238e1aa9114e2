import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest

from segalign.atomic import temporary_sibling
from segalign.errors import ConfigError, DataError
from segalign.run_directory import (
    BestRecord,
    best_checkpoint,
    checkpoint_path,
    checkpoint_step,
    describe_files,
    list_checkpoints,
    newest_checkpoint,
    read_best,
    resolve_checkpoint,
    stored_step,
    write_best,
)
from segalign.run_start import clear_superseded
from segalign.run_tidying import prune_checkpoints, remove_stale


def make_checkpoint(run_dir: Path, step: int) -> Path:
    path = checkpoint_path(run_dir, step)
    path.mkdir(parents=True)
    (path / "state.json").write_text(json.dumps({"global_step": step}))
    meta = {"format_version": 1, "files": describe_files(path)}
    (path / "meta.json").write_text(json.dumps(meta))
    return path


def test_names_and_steps():
    path = checkpoint_path(Path("run"), 1000)
    assert path == Path("run/checkpoints/step-00001000")
    assert checkpoint_step(path) == 1000
    assert checkpoint_step(checkpoint_path(Path("run"), 10**9)) == 10**9
    assert checkpoint_step(Path("run/checkpoints/.step-00001000.tmp-1")) == -1


def test_newest_is_by_step_and_whole(run_dir, caplog):
    first, second, third = (make_checkpoint(run_dir, step) for step in (9, 100, 1000))
    assert newest_checkpoint(run_dir) == third
    (third / "state.json").write_text("damaged")
    with caplog.at_level(logging.WARNING):
        assert newest_checkpoint(run_dir) == second
    assert "step-00001000" in caplog.text
    assert len(caplog.records) == 1
    (second / "meta.json").unlink()
    (first / "state.json").unlink()
    assert newest_checkpoint(run_dir) is None


def test_no_run_has_no_checkpoint(run_dir):
    assert list_checkpoints(run_dir) == []
    assert newest_checkpoint(run_dir) is None


def test_a_checkpoint_is_found_from_three_places(run_dir):
    make_checkpoint(run_dir, 1)
    newest = make_checkpoint(run_dir, 2)
    for place in (newest, newest.parent, run_dir):
        assert resolve_checkpoint(place) == newest


def test_a_moved_checkpoint_is_accepted_by_its_content(run_dir, tmp_path):
    moved = make_checkpoint(run_dir, 1).rename(tmp_path / "best")
    assert resolve_checkpoint(moved) == moved


@pytest.mark.parametrize(
    ("place", "found"), [("nowhere", "nothing"), ("empty", "no whole checkpoint")]
)
def test_a_wrong_place_is_one_line(tmp_path, place, found):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=f"found {found} at"):
        resolve_checkpoint(tmp_path / place)


def test_pruning_keeps_the_newest(run_dir):
    for step in (1, 2, 10, 20):
        make_checkpoint(run_dir, step)
    prune_checkpoints(run_dir, 2)
    assert [checkpoint_step(path) for path in list_checkpoints(run_dir)] == [10, 20]


def test_stale_temporaries_are_removed_and_logged(run_dir, caplog):
    remove_stale(run_dir)  # nothing there yet
    path = make_checkpoint(run_dir, 1)
    stale = temporary_sibling(checkpoint_path(run_dir, 2))
    stale.mkdir()
    with caplog.at_level(logging.WARNING):
        remove_stale(run_dir)
    assert list(path.parent.iterdir()) == [path]
    assert stale.name in caplog.text


def test_stored_step(run_dir):
    path = make_checkpoint(run_dir, 31)
    assert stored_step(path) == 31
    (path / "state.json").write_text("[]")
    with pytest.raises(DataError, match=r"state\.json"):
        stored_step(path)


def test_looking_at_runs_needs_no_torch(repository):
    code = "import sys, segalign.run_directory; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=repository, check=False).returncode == 0


def write_record(run_dir: Path, step: int) -> None:
    write_best(run_dir, BestRecord(step, "val/reward", 0.5, "max"))


def test_the_best_checkpoint_is_found_by_a_virtual_name(run_dir):
    best, _ = make_checkpoint(run_dir, 1), make_checkpoint(run_dir, 2)
    assert best_checkpoint(run_dir) is None
    with pytest.raises(ConfigError, match=r"found no best checkpoint at `.*/checkpoints/best`"):
        resolve_checkpoint(run_dir / "checkpoints" / "best")
    write_record(run_dir, 1)
    assert read_best(run_dir) == BestRecord(1, "val/reward", 0.5, "max")
    assert best_checkpoint(run_dir) == best
    for place in (run_dir / "checkpoints" / "best", run_dir / "best"):
        assert resolve_checkpoint(place) == best


def test_a_run_that_is_called_best_is_a_run(tmp_path):
    runs = tmp_path / "runs"
    newest = make_checkpoint(runs / "best", 3)
    assert resolve_checkpoint(runs / "best") == newest


def test_a_best_that_is_damaged_or_gone_is_none(run_dir, caplog):
    path = make_checkpoint(run_dir, 1)
    write_record(run_dir, 1)
    (path / "state.json").write_text("damaged")
    with caplog.at_level(logging.WARNING):
        assert best_checkpoint(run_dir) is None
    assert "bytes, not" in caplog.text
    write_record(run_dir, 7)
    assert best_checkpoint(run_dir) is None
    assert "step-00000007" in caplog.text
    (path.parent / "best.json").write_text("{")
    assert read_best(run_dir) is None
    assert "cannot be read" in caplog.text


def test_pruning_spares_the_best(run_dir):
    for step in (1, 2, 10, 20):
        make_checkpoint(run_dir, step)
    write_record(run_dir, 1)
    prune_checkpoints(run_dir, 2)
    assert [checkpoint_step(path) for path in list_checkpoints(run_dir)] == [1, 10, 20]


@pytest.mark.parametrize(("best", "left"), [(2, None), (1, 1)])
@pytest.mark.parametrize("delete", [True, False])
def test_going_back_forgets_a_best_that_goes(run_dir, best, left, delete):
    start = make_checkpoint(run_dir, 1)
    make_checkpoint(run_dir, 2)
    write_record(run_dir, best)
    clear_superseded(run_dir, start, delete=delete)
    found = read_best(run_dir)
    assert (found and found.step) == left
    assert list_checkpoints(run_dir) == [start]


def test_pruning_counts_only_whole_ones(run_dir):
    paths = [make_checkpoint(run_dir, step) for step in (1, 2, 3, 4)]
    for damaged in paths[2:]:
        (damaged / "state.json").write_text("")
    prune_checkpoints(run_dir, 2)
    assert list_checkpoints(run_dir) == paths
    paths.append(make_checkpoint(run_dir, 5))
    prune_checkpoints(run_dir, 2)
    assert list_checkpoints(run_dir) == paths[1:]


def test_every_reader_finds_a_checkpoint_whose_replacement_was_cut_off(run_dir):
    path = make_checkpoint(run_dir, 3)
    write_record(run_dir, 3)
    for read in (newest_checkpoint, best_checkpoint, lambda run: resolve_checkpoint(path)):
        path.rename(temporary_sibling(path, ".replaced-"))
        assert read(run_dir) == path


def test_a_record_without_the_state_is_none(run_dir):
    path = make_checkpoint(run_dir, 3)
    (path / "meta.json").write_text('{"format_version": 1, "files": {}}')
    assert newest_checkpoint(run_dir) is None
