"""A full disk costs the save that found no room, and is told in one line."""

import csv
import errno
import json
import re

import broken_checkpoints
import pytest
from checkpoint_saver import check_job, hidden
from toy_disks import FILLER, small_disk

from segalign.run_directory import newest_checkpoint
from segalign.run_format import load_checkpoint

PAGE = 4096
FULL = 75


@pytest.fixture
def disk(tmp_path):
    """A file system of 1 MB."""
    try:
        with small_disk(tmp_path / "disk", 256 * PAGE) as folder:
            yield folder
    except OSError as error:
        pytest.skip(str(error))


def check_limits(server, folder, limits, replaces=False, broken=()):
    where = str(folder / "limits")
    options = {"folder": where, "limits": list(limits), "replaces": replaces}
    check_job(server, folder / "log.txt", "toy_disks.check_limits", broken, **options)


@pytest.mark.parametrize("replaces", [False, True])
def test_a_limit_of_file_sizes_at_any_byte_keeps_the_previous(
    server, is_nightly, tmp_path, replaces
):
    step = 101 if is_nightly else 1703
    check_limits(server, tmp_path, [*range(0, 18_000, step), 10**6], replaces)


def check_small_disk(server, folder, disk, spaces, broken=()):
    options = {"folder": str(disk), "spaces": list(spaces)}
    check_job(server, folder / "log.txt", "toy_disks.check_small_disk", broken, **options)


def test_a_disk_that_fills_at_any_page_keeps_the_previous(server, tmp_path, disk):
    check_small_disk(server, tmp_path, disk, range(0, 20 * PAGE, PAGE))


def check_failing_calls(server, folder, lasts, replaces, code=errno.ENOSPC, broken=()):
    options = {"folder": str(folder / "calls"), "lasts": lasts, "replaces": replaces, "code": code}
    check_job(server, folder / "log.txt", "toy_disks.check_failing_calls", broken, **options)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("replaces", [False, True])
@pytest.mark.parametrize("lasts", [False, True])
def test_every_call_may_fail(server, tmp_path, lasts, replaces, code):
    check_failing_calls(server, tmp_path, lasts, replaces, code)


def check_logs(server, folder, disk, broken=()):
    options = {"folder": str(disk), "spaces": [0, PAGE, 3 * PAGE]}
    log = folder / "log.txt"
    check_job(server, log, "toy_disks.check_logs", broken, **options)
    assert "Traceback" not in log.read_text(), log.read_text()


def test_logs_lose_no_row_on_a_full_disk(server, tmp_path, disk):
    check_logs(server, tmp_path, disk)


# Whole runs


@pytest.fixture(scope="module")
def fit(server, toy_config):
    """Run a fit of the toy in one or two processes; returns the codes and outputs."""

    def fit(run_dir, folder, *options, filling=None, num_ranks=1, broken=()):
        fills = [{"class_path": "toy_disks.FillDisk", "init_args": filling}] if filling else []
        callbacks = [{"class_path": "callbacks.ema.EMA"}, *fills]
        arguments = [
            "fit", "--allow_import=toy_house", "--allow_import=toy_disks",
            f"--config={toy_config}", f"--run_dir={run_dir}", "--ckpt_path=auto",
            f"--trainer.callbacks={json.dumps(callbacks)}", "--trainer.max_steps=22",
            "--checkpoint.keep=3",
            *options,
        ]  # fmt: skip
        folder.mkdir(exist_ok=True)
        if num_ranks == 1:
            log = folder / "log.txt"
            log.write_text("")
            server.start(arguments, log, broken=broken)
            return [(server.wait(), log.read_text())]
        ranks = [f"--trainer.devices={num_ranks}", "--trainer.strategy=ddp"]
        processes = server.start_ranks(num_ranks, [*arguments, *ranks], folder, broken=broken)
        codes = [server.wait(process, 60) for process in processes]
        logs = [folder / f"rank-{rank}.txt" for rank in range(num_ranks)]
        return [(code, log.read_text()) for code, log in zip(codes, logs, strict=True)]

    return fit


@pytest.fixture(scope="module")
def straight(fit, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("straight") / "run"
    ((code, output),) = fit(run_dir, run_dir.parent / "log")
    assert code == 0, output
    return run_dir


def assert_ended_alike(run_dir, straight):
    for name in ("model", "ema", "optimizer"):
        one, other = (newest_checkpoint(run) / f"{name}.safetensors" for run in (run_dir, straight))
        assert one.read_bytes() == other.read_bytes(), name
    one, other = ((run / "logs" / "metrics.csv").read_text() for run in (run_dir, straight))
    assert one == other


def error_line(output):
    assert "Traceback" not in output, output
    (line,) = re.findall("^error: .*$", output, re.MULTILINE)
    return line


def check_full_run(fit, disk, folder, straight, left, broken=()):
    run_dir = disk / "run"
    ((code, output),) = fit(run_dir, folder, filling={"at_step": 7, "left": left}, broken=broken)
    assert code == FULL, output
    line = error_line(output)
    assert str(run_dir) in line, line
    assert re.search(r"\([\d,]+ bytes are needed, [\d,]+ bytes are free there\)", line), line
    assert load_checkpoint(newest_checkpoint(run_dir))["global_step"] == 5
    assert hidden(run_dir) == []
    (disk / FILLER).unlink()
    ((code, output),) = fit(run_dir, folder)
    assert code == 0, output
    assert_ended_alike(run_dir, straight)


@pytest.mark.parametrize("left", [0, 3 * PAGE])
def test_a_run_whose_disk_fills_ends_with_one_line_and_goes_on_later(
    fit, disk, tmp_path, straight, left
):
    check_full_run(fit, disk, tmp_path / "logs", straight, left)


def check_failed_saves(fit, disk, folder, straight, broken=()):
    filling = {"at_step": 7, "empty_at": 17}
    tolerant = "--checkpoint.max_failed_saves=2"
    ((code, output),) = fit(disk / "run", folder, tolerant, filling=filling, broken=broken)
    assert code == 0, output
    assert output.count("going on without a checkpoint, failure ") == 2, output
    assert_ended_alike(disk / "run", straight)
    (disk / FILLER).unlink(missing_ok=True)
    strict = "--checkpoint.max_failed_saves=1"
    ((code, output),) = fit(disk / "other", folder, strict, filling=filling, broken=broken)
    assert code == FULL, output
    assert "No space left on device" in error_line(output)
    assert load_checkpoint(newest_checkpoint(disk / "other"))["global_step"] == 5


def test_some_periodic_checkpoints_may_find_no_room(fit, disk, tmp_path, straight):
    check_failed_saves(fit, disk, tmp_path / "logs", straight)


def check_last_save(fit, disk, folder, broken=()):
    options = ["--checkpoint.max_failed_saves=9", "--trainer.max_steps=9"]
    found = fit(disk / "run", folder, *options, filling={"at_step": 7}, broken=broken)
    ((code, output),) = found
    assert code == FULL, output
    assert "step-00000009" in error_line(output)


def test_the_last_checkpoint_never_fails_in_silence(fit, disk, tmp_path):
    check_last_save(fit, disk, tmp_path / "logs")


def check_ranks(fit, disk, folder, broken=()):
    options = {"filling": {"at_step": 7}, "num_ranks": 2, "broken": broken}
    found = fit(disk / "run", folder, **options)
    assert [code for code, _ in found] == [FULL, FULL], found
    lines = [error_line(output) for _, output in found]
    assert lines[0] == lines[1]
    assert "No space left on device" in lines[0]


@pytest.mark.distributed
def test_all_ranks_end_with_the_same_line(fit, disk, tmp_path):
    check_ranks(fit, disk, tmp_path / "logs")


@pytest.mark.distributed
def test_all_ranks_go_on_alike(fit, disk, tmp_path):
    filling = {"at_step": 7, "empty_at": 12}
    options = ["--checkpoint.max_failed_saves=1", "--trainer.max_steps=16"]
    found = fit(disk / "run", tmp_path / "logs", *options, filling=filling, num_ranks=2)
    assert [code for code, _ in found] == [0, 0], found
    assert newest_checkpoint(disk / "run").name == "step-00000016"


LOGGING = ("--trainer.log_every_n_steps=5", "--checkpoint.every_n_steps=5")


def check_full_logs(fit, disk, folder, num_ranks, broken=()):
    filling = {"at_step": 3}
    found = fit(disk / "run", folder, *LOGGING, filling=filling, num_ranks=num_ranks, broken=broken)
    assert [code for code, _ in found] == [FULL] * num_ranks, found
    lines = {error_line(output) for _, output in found}
    assert len(lines) == 1, lines
    assert "/logs/" in lines.pop()


def check_logs_wait(fit, disk, folder, num_ranks, broken=()):
    options = [*LOGGING, "--checkpoint.max_failed_saves=9", "--trainer.max_steps=20"]
    filling = {"at_step": 3, "empty_at": 12}
    found = fit(disk / "run", folder, *options, filling=filling, num_ranks=num_ranks, broken=broken)
    assert [code for code, _ in found] == [0] * num_ranks, found
    outputs = "".join(output for _, output in found)
    assert outputs.count("going on without a checkpoint, failure ") == 2, outputs
    assert logged_steps(disk / "run") == [4, 9, 14, 19]
    assert newest_checkpoint(disk / "run").name == "step-00000020"


def logged_steps(run_dir):
    rows = csv.DictReader((run_dir / "logs" / "metrics.csv").read_text().splitlines())
    return [int(row["step"]) for row in rows if row["train/loss"]]


@pytest.mark.parametrize("num_ranks", [1, pytest.param(2, marks=pytest.mark.distributed)])
def test_logs_of_a_step_with_a_checkpoint_end_a_run_in_one_line(fit, disk, tmp_path, num_ranks):
    check_full_logs(fit, disk, tmp_path / "logs", num_ranks)


@pytest.mark.parametrize("num_ranks", [1, pytest.param(2, marks=pytest.mark.distributed)])
def test_logs_wait_where_saves_may_fail(fit, disk, tmp_path, num_ranks):
    check_logs_wait(fit, disk, tmp_path / "logs", num_ranks)


def check_long_wait(fit, disk, folder, broken=()):
    options = [
        "--checkpoint.max_failed_saves=9", "--checkpoint.every_n_steps=100",
        "--trainer.log_every_n_steps=1", "--trainer.max_steps=260",
    ]  # fmt: skip
    filling = {"at_step": 7, "empty_at": 230}
    ((code, output),) = fit(disk / "run", folder, *options, filling=filling, broken=broken)
    assert code == 0, output
    assert output.count("rows of the log wait") == 2, output  # once for each of the two logs
    assert logged_steps(disk / "run") == list(range(260))


def test_all_rows_are_there_once_there_is_room(fit, disk, tmp_path):
    check_long_wait(fit, disk, tmp_path / "logs")


# Broken


def name_of(variant):
    return f"{variant.__module__}.{variant.__name__}"


LIMITS = (0, 700, 9000, 10**6)
BROKEN_WRITES = (
    broken_checkpoints.swallows_a_full_disk,
    broken_checkpoints.leaves_half_of_a_failed_save,
)


@pytest.mark.parametrize("variant", BROKEN_WRITES)
def test_limits_are_caught_broken(server, tmp_path, variant):
    with pytest.raises(AssertionError):
        check_limits(server, tmp_path, LIMITS, broken=(name_of(variant),))


def test_calls_are_caught_broken(server, tmp_path):
    broken = (name_of(broken_checkpoints.puts_nothing_back),)
    with pytest.raises(AssertionError):
        check_failing_calls(server, tmp_path, True, True, broken=broken)


def test_logs_are_caught_broken(server, tmp_path, disk):
    with pytest.raises(AssertionError):
        check_logs(server, tmp_path, disk, broken=(name_of(broken_checkpoints.loses_rows),))


def test_failed_saves_are_caught_broken(fit, disk, tmp_path, straight):
    broken = (name_of(broken_checkpoints.tolerates_for_ever),)
    with pytest.raises(AssertionError):
        check_failed_saves(fit, disk, tmp_path / "logs", straight, broken)


@pytest.mark.distributed
def test_ranks_are_caught_broken(fit, disk, tmp_path, is_nightly):
    if not is_nightly:
        pytest.skip("waits for ranks that hang")
    with pytest.raises(AssertionError):
        check_ranks(
            fit, disk, tmp_path / "logs", (name_of(broken_checkpoints.raises_on_rank_zero_alone),)
        )


@pytest.mark.parametrize("check", [check_logs_wait, check_full_logs])
@pytest.mark.distributed
def test_logs_of_ranks_are_caught_broken(fit, disk, tmp_path, check):
    broken = (name_of(broken_checkpoints.raises_in_mid_step),)
    with pytest.raises(AssertionError):
        check(fit, disk, tmp_path / "logs", 2, broken)


def test_a_long_wait_is_caught_broken(fit, disk, tmp_path):
    broken = (name_of(broken_checkpoints.raises_in_mid_step),)
    with pytest.raises(AssertionError):
        check_long_wait(fit, disk, tmp_path / "logs", broken)


BROKEN = (
    broken_checkpoints.raises_in_mid_step,
    *BROKEN_WRITES,
    broken_checkpoints.puts_nothing_back,
    broken_checkpoints.loses_rows,
    broken_checkpoints.tolerates_for_ever,
    broken_checkpoints.raises_on_rank_zero_alone,
)
