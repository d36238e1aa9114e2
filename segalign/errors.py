"""Errors meant for users: one line, a cause and a cure, and an exit code of their own."""


class SegalignError(Exception):
    """Base of the errors whose message alone is shown to the user.

    Attributes:
        exit_code: What the process returns when this error ends a command.
    """

    exit_code = 1


class ConfigError(SegalignError, ValueError):
    """A setting that cannot work (exit code 78, ``EX_CONFIG``)."""

    exit_code = 78


class DataError(SegalignError, ValueError):
    """Data that cannot be read or trusted (exit code 65, ``EX_DATAERR``)."""

    exit_code = 65


class StorageError(SegalignError, OSError):
    """A place that cannot be written, or is full (exit code 75, ``EX_TEMPFAIL``)."""

    exit_code = 75


class FullDiskError(StorageError):
    """A place that lacks the room for what is written, which may pass (exit code 75)."""


class NonFiniteError(SegalignError, ArithmeticError):
    """Losses, gradients or images were not finite (exit code 70)."""

    exit_code = 70


class StoppedError(SegalignError):
    """Training ended before its time, which is no failure; it is told as ``stopped: ...``."""


class PreemptedError(StoppedError):
    """Training was stopped by a signal, and its checkpoint is saved (exit code 85).

    It is no failure: the same command with ``--ckpt_path auto`` goes on.
    """

    exit_code = 85


class TerminatedError(StoppedError):
    """Training was ended by SIGTERM, without a checkpoint of its own (exit code 143).

    The same command with ``--ckpt_path auto`` goes on from the last checkpoint.
    """

    exit_code = 143


class CancelledError(StoppedError):
    """Training was ended by Ctrl-C, without a checkpoint of its own (exit code 130).

    The same command with ``--ckpt_path auto`` goes on from the last checkpoint.
    """

    exit_code = 130


class PrunedError(StoppedError):
    """Training was stopped by a searcher, because other trials do better (exit code 86).

    It is no failure: the run counts as finished.
    """

    exit_code = 86
