"""Readers of foreign bytes answer whatever they are given with a user's error, or read it.

The same targets are fuzzed for longer by ``python tests/fuzz/run.py --minutes 10``.
"""

import importlib.util
import re
import subprocess
import sys
from collections.abc import Callable

import broken_fuzz
import fuzz_targets
import pytest
from fuzz_targets import TARGETS
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

EXAMPLES = {"caption": 60, "lora_pickle": 50, "shard": 60, "study": 80}
NIGHTLY_FACTOR = 30
# What a change puts in: structure of every format read, numbers at the limits, odd characters.
PIECES = (
    b"", b"\0", b"\xff", b"-1", b"1e999", b"18446744073709551616", b"NaN", b"null", b"[]", b"{}",
    b'"', b"\\ud800", b"[" * 3000, b"../", b"a: &a [*a]", b"!!int x", b"__fault__", b"\n", b". ",
    "\u2028\u00a0\u3002\u300d".encode(), b"$tensor", b"\x80\x02cos\nsystem\n", b"x" * 600,
)  # fmt: skip


def changed(seeds: list[bytes]) -> st.SearchStrategy[bytes]:
    """Good inputs with a few places overwritten, cut, doubled or filled with something odd."""
    place = st.integers(0, 2**14)
    piece = st.sampled_from(PIECES) | st.binary(max_size=8)
    edit = st.tuples(st.sampled_from("xidc"), place, st.integers(0, 64), piece)

    def apply(seed: bytes, edits: list[tuple]) -> bytes:
        for kind, start, length, new in edits:
            start %= len(seed) + 1
            end = min(start + length, len(seed))
            old = {"x": b"", "i": seed[start:end], "d": seed[start:end] * 2, "c": b""}[kind]
            rest = b"" if kind == "c" else seed[end:]
            seed = seed[:start] + old + new + rest
        return seed

    return st.builds(apply, st.sampled_from(seeds), st.lists(edit, max_size=4))


def check_target(name: str, factor: int = 1, phases: tuple = tuple(Phase)) -> None:
    target = TARGETS[name]

    @settings(
        max_examples=EXAMPLES.get(name, 150) * factor,
        derandomize=True,
        database=None,
        phases=phases,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(changed(target.seeds()) | st.binary(max_size=200))
    def read(data: bytes) -> None:
        target.try_on(data)

    read()


@pytest.mark.parametrize("name", TARGETS)
def test_changed_files_are_read_or_refused(name, is_nightly):
    check_target(name, NIGHTLY_FACTOR if is_nightly else 1)


@pytest.mark.parametrize("name", TARGETS)
def test_good_files_are_read(name):
    """The seeds reach what is behind the first check; else fuzzing would try nothing."""
    read = 0
    for seed in TARGETS[name].seeds():
        try:
            TARGETS[name].read(seed)
        except fuzz_targets.ALLOWED:
            continue
        read += 1
    assert read


# Inputs that fuzzing has found; each ended in a traceback, or worse.
FOUND = {
    "state that is a number": ("checkpoint_state", b"7"),
    "a tag of nothing": ("checkpoint_state", b'{"a": {"$tensor": 5}}'),
    "deep state": ("checkpoint_state", b"[" * 100_000),
    "record without sizes": ("checkpoint_meta", b'{"format_version": 1, "files": {"a": 3}}'),
    "infinite version": ("checkpoint_meta", b'{"format_version": 1e999, "files": {}}'),
    "numbers as names": ("study", b"zip: [{a.b: [{1.5: 2}], c.d: [1]}]"),
    "an alias of itself": ("study", b"grid: {a.b: &x [1, *x]}"),
    "a key without a value": ("study", b"search: {kind: optuna, trials: }"),
    "a tag that lies": ("study", b"name: !!int x"),
    "an offset beyond the file system": (
        "manifest_line",
        (
            b'{"name":"s.tar","suffixes":["json"],"keys":["a","b","c"],'
            b'"members":[[0,99999999999999999999,3,0],[0,1,1,0],[0,1,1,0]]}'
        ),
    ),
    "a deep header": ("manifest_header", b"[" * 100_000),
}


def check_found(name: str) -> None:
    for target, data in FOUND.values():
        if target == name:
            TARGETS[name].try_on(data)


@pytest.mark.parametrize("name", sorted({target for target, _ in FOUND.values()}))
def test_what_was_found_stays_mended(name):
    check_found(name)


@pytest.mark.skipif(importlib.util.find_spec("atheris") is None, reason="atheris is not installed")
def test_guided_fuzzing_finds_nothing(repository, tmp_path):
    """A short run of what ``--minutes 10`` does for longer."""
    done = fuzz(repository, tmp_path, "--minutes=0.05")
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    total = re.search(r"([\d,]+) executions, 0 crashes", done.stdout)
    assert total, done.stdout
    assert int(total[1].replace(",", "")) > len(TARGETS)


def fuzz(repository, folder, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, repository / "tests" / "fuzz" / "run.py", f"--out={folder}"]
    return subprocess.run(
        [*command, *arguments], cwd=repository, capture_output=True, text=True, check=False
    )


# By which target each is caught.
NEEDED: dict[Callable[[pytest.MonkeyPatch], None], str] = {
    broken_fuzz.loses_text: "caption",
    broken_fuzz.forgets_the_budget: "caption",
    broken_fuzz.takes_any_number: "manifest_line",
    broken_fuzz.takes_any_json: "caption_json",
    broken_fuzz.decodes_anything: "checkpoint_state",
    broken_fuzz.follows_all_aliases: "study",
    broken_fuzz.raises_what_pickles_raise: "lora_pickle",
}


@pytest.mark.parametrize("broken", NEEDED)
def test_readers_are_caught_broken(broken, monkeypatch):
    broken(monkeypatch)
    with pytest.raises(Exception) as caught:  # noqa: PT011 - of any kind but a user's
        check_broken(NEEDED[broken])
    assert not isinstance(caught.value, fuzz_targets.ALLOWED)


def check_broken(name: str) -> None:
    """Look for a failure, but not for the smallest input that fails, which takes minutes."""
    if name in {target for target, _ in FOUND.values()}:
        check_found(name)
    check_target(name, phases=(Phase.generate,))


BROKEN = tuple(NEEDED)
