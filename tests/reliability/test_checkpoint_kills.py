"""A kill in the middle of a save costs that save, and nothing else."""

import os
import random
import signal
import time

import broken_checkpoints
import pytest
from checkpoint_saver import KEEP, check_job, num_saved, start_job

NUM_VALUES = 50_000  # 0.6 MB for each save
MOMENTS = 260  # before and after the calls of about three saves


def check_kills(server, folder, temporary, kills, replaces=False, broken=()):
    """Kill a process that saves, again and again, and judge after each what is left.

    Args:
        server: The command server.
        folder: Where the run is.
        temporary: What ``TMPDIR`` says.
        kills: For each kill its moment, counted in calls of the system as ``save_on`` does, or the
            number of saves to wait for and the seconds after that.
        replaces: Whether all saves are of the same step.
        broken: Functions that break something.
    """
    record, log = folder / "saved", folder / "log.txt"
    job = {
        "run_dir": str(folder / "run"),
        "record": str(record),
        "temporary": str(temporary),
        "num_values": NUM_VALUES,
        "replaces": replaces,
    }
    name = "checkpoint_saver.save_on"
    for kill in kills:
        log.write_text("")
        saved = num_saved(record)
        is_own = isinstance(kill, int | str)
        how = {"die_at": kill, "num_saves": 6} if is_own else {"die_at": None}
        process = start_job(server, log, name, broken, **job, **how)
        if not is_own:
            kill_later(process, record, saved + kill[0], kill[1], log)
        code = server.wait()
        # What is broken may never come to a moment that is named.
        was_killed = code == -signal.SIGKILL or (broken and is_own and code == 0)
        assert was_killed, f"after {saved} saves, kill {kill}, code {code}: {log.read_text()}"
    check_job(server, log, name, broken, **job, die_at=None, num_saves=1)
    check_job(server, log, name, broken, **job, die_at=None, num_saves=0)


def kill_later(process, record, num_saves, seconds, log):
    deadline = time.monotonic() + 60
    while num_saved(record) < num_saves and "Error" not in log.read_text():
        assert time.monotonic() < deadline, "no save ends"
        time.sleep(0.001)
    time.sleep(seconds)
    os.kill(process, signal.SIGKILL)


def random_kills(seed, count):
    """Draw kills: every other one at a moment of the code, the others at any time."""
    draw = random.Random(seed)
    return [
        draw.randint(1, MOMENTS) if index % 2 else (draw.randint(0, 2), draw.uniform(0, 0.03))
        for index in range(count)
    ]


def test_kills_during_saves_lose_nothing(server, tries, tmp_path, elsewhere, seed):
    check_kills(server, tmp_path, elsewhere, random_kills(seed, tries(36, 400)))


def test_kills_while_a_checkpoint_is_replaced_lose_nothing(
    server, tries, tmp_path, elsewhere, seed
):
    kills = random_kills(seed, tries(14, 100))
    check_kills(server, tmp_path, elsewhere, kills, replaces=True)


@pytest.mark.parametrize("replaces", [False, True])
def test_a_kill_at_every_single_moment_loses_nothing(
    server, is_nightly, tmp_path, elsewhere, replaces
):
    if not is_nightly:
        pytest.skip("takes long: 260 kills")
    check_kills(server, tmp_path, elsewhere, range(1, MOMENTS), replaces)


# What a power cut would show: the order in which names and bytes are forced to disk


def check_order(server, folder, broken=()):
    log = folder / "log.txt"
    check_job(server, log, "save_orders.check_order", broken, folder=str(folder / "order"))


def test_bytes_are_on_disk_before_their_names_and_names_before_old_ones_go(server, tmp_path):
    check_order(server, tmp_path)


# Damage


def check_damage(server, folder, broken=()):
    log = folder / "log.txt"
    check_job(server, log, "save_orders.check_damage", broken, folder=str(folder / "damage"))


def test_damaged_checkpoints_are_passed_over_and_not_counted(server, tmp_path):
    assert KEEP == 2
    check_damage(server, tmp_path)


def name_of(variant):
    return f"{variant.__module__}.{variant.__name__}"


AT_RENAMES = [f"rename:{moment}" for moment in range(3, 10)]
IN_FILES = range(72, 112, 4)  # while the second save writes
BROKEN_KILLS = (
    # function, whether all saves are of one step, moments that it does not survive
    (broken_checkpoints.writes_in_place, False, IN_FILES),
    (broken_checkpoints.writes_in_place, True, IN_FILES),
    (broken_checkpoints.writes_elsewhere_and_copies, True, IN_FILES),
    (broken_checkpoints.prunes_first, False, AT_RENAMES),
    (broken_checkpoints.keeps_one, False, AT_RENAMES),
    (broken_checkpoints.never_brings_back, True, AT_RENAMES),
    (broken_checkpoints.leaves_the_stale, False, AT_RENAMES),
)
BROKEN_ORDER = (
    broken_checkpoints.renames_before_sync,
    broken_checkpoints.never_syncs_names,
    broken_checkpoints.forgets_new_parents,
    broken_checkpoints.prunes_first,
)
BROKEN_DAMAGE = (broken_checkpoints.checks_no_digest, broken_checkpoints.prunes_by_name)


@pytest.mark.parametrize(("variant", "replaces", "kills"), BROKEN_KILLS)
def test_kills_are_caught_broken(server, tmp_path, elsewhere, variant, replaces, kills):
    with pytest.raises(AssertionError):
        check_kills(server, tmp_path, elsewhere, kills, replaces, (name_of(variant),))


@pytest.mark.parametrize("variant", BROKEN_ORDER)
def test_the_order_is_caught_broken(server, tmp_path, variant):
    with pytest.raises(AssertionError):
        check_order(server, tmp_path, (name_of(variant),))


@pytest.mark.parametrize("variant", BROKEN_DAMAGE)
def test_damage_is_caught_broken(server, tmp_path, variant):
    with pytest.raises(AssertionError):
        check_damage(server, tmp_path, (name_of(variant),))


BROKEN = (*(variant for variant, *_ in BROKEN_KILLS), *BROKEN_ORDER, *BROKEN_DAMAGE)
