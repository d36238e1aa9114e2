"""The processes of an evaluation; alone, it is the only one."""

from typing import Any

from torch import distributed


def own_rank() -> int:
    """Return this process's number."""
    return distributed.get_rank() if _is_distributed() else 0


def world_size() -> int:
    """Return the number of processes."""
    return distributed.get_world_size() if _is_distributed() else 1


def gather_objects(own: Any) -> list[Any]:
    """Gather plain data of all ranks, in rank order; every rank must call it."""
    if not _is_distributed():
        return [own]
    gathered: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(gathered, own)
    return gathered


def _is_distributed() -> bool:
    return distributed.is_available() and distributed.is_initialized()
