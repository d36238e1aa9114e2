"""Where a searcher keeps its trials, and what a run must know of its own. Optuna is optional."""

import importlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from segalign.atomic import make_directory, write_text_atomic
from segalign.errors import ConfigError, DataError, SegalignError, StorageError
from segalign.json_text import parse_json
from segalign.launch.running.run_folder import sweep_folder
from segalign.launch.study import Study

if TYPE_CHECKING:
    from optuna.storages import BaseStorage
    from optuna.study import Study as OptunaStudy
    from optuna.trial import Trial

JOURNAL_FILE: Final = "optuna.journal"
TRIAL_FILE: Final = "trial.json"


@dataclass(frozen=True, kw_only=True)
class TrialRecord:
    """Which trial a run is; kept beside its config, not in it, so that run ids do not tell trials.

    Attributes:
        storage: Where the searcher keeps its trials, as `trial_storage` names it.
        study: The searcher's name of the study.
        number: The trial's number.
    """

    storage: str
    study: str
    number: int


def import_optuna(part: str = "optuna") -> Any:
    """Import Optuna, or the package with its callbacks.

    Raises:
        ConfigError: If it is not installed.
    """
    try:
        return importlib.import_module(part)
    except ImportError as error:
        raise ConfigError(
            f"expected Optuna for `search: optuna`; got `{error}`. Install it with "
            '`pip install "segalign[optuna]"` or `uv sync --extra optuna`.'
        ) from error


def trial_storage(study: Study) -> str:
    """Name the place of a study's trials: a URL of a database, or the path of a journal."""
    given = None if study.search is None else study.search.storage
    if given is not None and _is_url(given):
        return given
    return str(Path(given or study.folder / JOURNAL_FILE).absolute())


def open_storage(storage: str) -> "BaseStorage":
    """Open a place of trials; a journal is made if there is none.

    Raises:
        ConfigError: If Optuna or a database's driver is missing, or the URL is wrong.
        StorageError: If it cannot be reached or written.
        DataError: If it is no place of trials.
    """
    optuna = import_optuna()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    journal = importlib.import_module("optuna.storages.journal")
    with _opening(storage):
        if _is_url(storage):
            opened: BaseStorage = optuna.storages.get_storage(storage)
            return opened
        make_directory(Path(storage).parent)
        # Locks that are files work on network file systems, where those of SQLite do not.
        lock = journal.JournalFileOpenLock(storage)
        backend = journal.JournalFileBackend(storage, lock_obj=lock)
        if _has_torn_line(Path(storage)):
            _cut_torn_line(Path(storage), lock)
        opened = optuna.storages.JournalStorage(backend)
        return opened


def open_trials(storage: str, name: str, mode: str) -> "OptunaStudy":
    """Open the trials of a study; they are begun if there are none.

    Args:
        storage: Where they are, see `trial_storage`.
        name: The study's name.
        mode: ``max`` if larger values are better, else ``min``.

    Raises:
        ConfigError: If Optuna or a database's driver is missing.
        StorageError: If they cannot be reached or written.
        DataError: If something else is there.
    """
    optuna = import_optuna()
    opened = open_storage(storage)
    with _opening(storage):
        study: OptunaStudy = optuna.create_study(
            study_name=name,
            storage=opened,
            direction="maximize" if mode == "max" else "minimize",
            load_if_exists=True,
        )
        return study


def open_trial(record: TrialRecord) -> "Trial":
    """Open the trial of a run, which reports values and learns whether it falls behind.

    Raises:
        ConfigError: If Optuna or a database's driver is missing.
        StorageError: If the trials cannot be reached.
        DataError: If the trial is not there.
    """
    optuna = import_optuna()
    if not _is_url(record.storage) and not Path(record.storage).is_file():
        raise DataError(f"expected trials at `{record.storage}`; got no such file.")
    storage = open_storage(record.storage)
    with _opening(record.storage):
        study = optuna.load_study(
            study_name=record.study, storage=storage, pruner=optuna.pruners.MedianPruner()
        )
        identity = storage.get_trial_id_from_study_id_trial_number(study._study_id, record.number)
        trial: Trial = optuna.trial.Trial(study, identity)
        return trial


def write_trial(run_dir: Path, record: TrialRecord) -> None:
    """Tell a run which trial it is.

    Raises:
        StorageError: If it cannot be written.
    """
    path = sweep_folder(run_dir) / TRIAL_FILE
    make_directory(path.parent)
    write_text_atomic(path, json.dumps(asdict(record), indent=1) + "\n")


def read_trial(run_dir: Path) -> TrialRecord | None:
    """Read which trial a run is; None if it is none, or the file cannot be read."""
    try:
        return TrialRecord(**parse_json((sweep_folder(run_dir) / TRIAL_FILE).read_bytes()))
    except (OSError, ValueError, TypeError):
        return None


@contextmanager
def reachable(storage: str) -> Iterator[None]:
    """Say in one line what keeps a place of trials from being read or written.

    Raises:
        StorageError: If that is so in this block.
    """
    optuna, sql = import_optuna(), importlib.import_module("sqlalchemy.exc")
    try:
        yield
    except SegalignError:
        raise
    except (OSError, optuna.exceptions.StorageInternalError, sql.SQLAlchemyError) as error:
        raise StorageError(
            f"expected a place for trials at `{_without_password(storage)}`; it cannot be used: "
            f"{_one_line(error)}. Mend it, or set `search.storage`."
        ) from error


def _is_url(storage: str) -> bool:
    return "://" in storage


def _has_torn_line(journal: Path) -> bool:
    content = journal.read_bytes()
    # A file that somebody named by mistake is left as it is.
    return content.startswith(b'{"op_code"') and not content.endswith(b"\n")


def _cut_torn_line(journal: Path, lock: Any) -> None:
    """Drop what a process that was killed left of a line; what others add would be lost with it."""
    lock.acquire()
    try:
        if _has_torn_line(journal):
            os.truncate(journal, journal.read_bytes().rfind(b"\n") + 1)
    finally:
        lock.release()


@contextmanager
def _opening(storage: str) -> Iterator[None]:
    try:
        with reachable(storage):
            yield
    except SegalignError:
        raise
    except ImportError as error:
        raise ConfigError(
            f"expected the driver of the database in `search.storage`; got `{error}`. Install it, "
            "or leave `search.storage` out."
        ) from error
    except (ValueError, KeyError, AssertionError) as error:
        raise DataError(
            f"expected trials of Optuna at `{_without_password(storage)}`; they cannot be read: "
            f"{_one_line(error)}. Give `search.storage` another place, or move that away."
        ) from error


def _without_password(storage: str) -> str:
    scheme, mark, rest = storage.rpartition("://")
    return f"{scheme}{mark}{rest.rpartition('@')[2]}"


def _one_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
