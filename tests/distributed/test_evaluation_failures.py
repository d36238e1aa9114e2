"""What fails on one rank ends an evaluation on all of them; none is left waiting."""

import json
import logging
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from torch import distributed, multiprocessing
from toy_evaluation import Recorder, ToyGenerator, setting_of

from segalign.errors import ConfigError, DataError, StorageError
from segalign.evaluation import captions
from segalign.evaluation.evaluator import Evaluator
from segalign.evaluation.start_images import StartImages
from segalign.ranks import together

pytestmark = pytest.mark.distributed

PATIENCE = timedelta(seconds=15)


class Failing(Recorder):
    """Fails on one rank; or meets the others in ``start``."""

    def __init__(self, where: str, error: Exception | None, name: str = "failing") -> None:
        super().__init__()
        self.where, self.error, self.name = where, error, name

    def start(self, setting):
        super().start(setting)
        self._fail("start")
        if self.where == "meeting":
            together(lambda: self._fail("meeting"))

    def update(self, batch):
        self._fail("update")

    def _fail(self, where):
        if self.where == where and self.error is not None:
            raise self.error


class Breaking(ToyGenerator):
    def generate(self, *_):
        raise RuntimeError("CUDA error\nand a long story")


class Full(StartImages):
    def finish(self, setting):
        raise StorageError("expected room on the disk")


def run(*metrics, generator=None, start=None, keep=False):
    evaluator = Evaluator(setting_of(12), metrics, start)
    evaluator.run(generator or ToyGenerator(), keep_as_start=keep)


def fail_in(where: str, rank: int) -> None:
    """One rank has an error of a user's kind at a place, the other has none."""
    run(Recorder(), Failing(where, DataError(f"in {where}") if rank == 1 else None))


def fail_before_meeting(rank: int) -> None:
    """One rank fails where the other goes on, to wait inside the same metric or the next one."""
    error = ConfigError("before the meeting") if rank == 0 else None
    run(
        Failing("start" if rank == 0 else "meeting", error), Failing("meeting", None, name="second")
    )


def read_others(rank: int) -> None:
    """The shards of one rank are others."""
    found = setting_of(2 + rank).rows
    captions.read_caption_rows = lambda *_: found
    captions.read_same_captions(Path("shards"), None)


def read_none(rank: int) -> None:
    def read(*_):
        if rank == 1:
            raise DataError("expected a manifest")
        return setting_of().rows

    captions.read_caption_rows = read
    captions.read_same_captions(Path("shards"), None)


def lose_start(rank: int, folder: Path) -> None:
    start = StartImages(folder / "start")
    run(Recorder(), start=start, keep=True)
    (folder / "start" / "batch-00001.safetensors").unlink(missing_ok=True)
    together(lambda: None)
    run(Recorder(), start=start)


def both_fail(rank: int) -> None:
    def work():
        raise DataError(f"of rank {rank}") from KeyError("why")

    together(work)


CASES = {
    "start": lambda rank, folder: fail_in("start", rank),
    "meeting": lambda rank, folder: fail_in("meeting", rank),
    "update": lambda rank, folder: fail_in("update", rank),
    "before a meeting": lambda rank, folder: fail_before_meeting(rank),
    "library": lambda rank, folder: run(
        Recorder(), generator=Breaking() if rank == 1 else None
    ),
    "range": lambda rank, folder: run(Recorder(), generator=ToyGenerator(offset=9.0 * rank)),
    "lost start": lose_start,
    "full disk": lambda rank, folder: run(
        Recorder(), start=Full(folder / "full"), keep=True
    ),
    "captions differ": lambda rank, folder: read_others(rank),
    "captions missing": lambda rank, folder: read_none(rank),
    "both": lambda rank, folder: both_fail(rank),
}  # fmt: skip

EXPECTED = {
    "start": ("DataError", "in start"),
    "meeting": ("DataError", "in meeting"),
    "update": ("DataError", "in update"),
    "before a meeting": ("ConfigError", "before the meeting"),
    "range": ("DataError", "expected images in [0, 1]"),
    "lost start": ("DataError", "batch-00001"),
    "full disk": ("StorageError", "expected room on the disk"),
    "captions differ": ("DataError", "process 1 has read others than process 0"),
    "captions missing": ("DataError", "expected a manifest"),
    "both": ("DataError", "of rank 0"),
}


def fail_everywhere(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=PATIENCE
    )
    logged: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: logged.append(record.getMessage())
    logging.getLogger("segalign.ranks").addHandler(handler)
    seen = {}
    for name, case in CASES.items():
        try:
            case(rank, Path(folder))
            seen[name] = ("nothing", "", "")
        except Exception as error:  # noqa: BLE001 - which one it is, is what is tested
            seen[name] = (type(error).__name__, str(error), repr(error.__cause__))
    seen["logged"] = logged
    assert len(set(map(len, _gathered(seen)))) == 1, "ranks are out of step"
    Path(f"{folder}/{rank}.json").write_text(json.dumps(seen))
    distributed.destroy_process_group()


def _gathered(seen):
    parts = [None, None]
    distributed.all_gather_object(parts, seen)
    return parts


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    multiprocessing.start_processes(fail_everywhere, (str(folder),), nprocs=2, start_method="fork")
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("name", EXPECTED)
def test_an_error_of_one_rank_is_raised_on_both(seen, name):
    kind, text = EXPECTED[name]
    for rank in range(2):
        assert seen[rank][name][0] == kind
        assert text in seen[rank][name][1]


def test_an_error_of_a_library_stays_what_it_is_and_is_told(seen):
    told, own = (one["library"] for one in seen)
    assert own[:2] == ["RuntimeError", "CUDA error\nand a long story"]
    assert told[0] == "SegalignError"
    assert "process 1 has failed with RuntimeError: CUDA error; look" in told[1]
    assert "\n" not in told[1]


def test_the_rank_that_fails_keeps_the_cause(seen):
    assert seen[0]["both"][2] == "KeyError('why')"


def test_a_rank_that_fails_at_making_images_says_so_before_it_waits(seen):
    assert "process 1 has failed and waits: DataError: in update" in seen[1]["logged"]
    assert seen[0]["logged"] == []
