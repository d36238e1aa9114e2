"""What is forced to disk when, and what becomes of damaged checkpoints."""

import os
from pathlib import Path

from checkpoint_saver import KEEP, check_content, make_tree

from segalign import run_directory, run_format, run_tidying

NUM_VALUES = 100


class DiskOrder:
    """Watches what is forced to disk, and checks each rename and deletion against it.

    After a power cut, only what was forced to disk is sure to be there: a name may be there before
    its bytes, and an old file may be gone before a new one has its name.
    """

    def __init__(self) -> None:
        self.synced: dict[str, tuple[int, int]] = {}
        self.unsynced_names: set[str] = set()
        self.problems: list[str] = []
        self.fsync, self.rename, self.rmdir = os.fsync, os.rename, os.rmdir
        self.mkdir = os.mkdir
        os.fsync, os.rename, os.rmdir = self.on_fsync, self.on_rename, self.on_rmdir
        os.mkdir = self.on_mkdir

    def on_fsync(self, descriptor):
        self.fsync(descriptor)
        path = str(Path(f"/proc/self/fd/{descriptor}").readlink())
        status = os.fstat(descriptor)
        self.synced[path] = (status.st_mtime_ns, status.st_size)
        self.unsynced_names = {name for name in self.unsynced_names if not is_in(name, path)}

    def on_mkdir(self, path, *arguments, **options):
        self.mkdir(path, *arguments, **options)
        if not Path(path).name.startswith("."):
            self.unsynced_names.add(str(path))

    def on_rename(self, source, target, **options):
        self.rename(source, target, **options)
        source, target = str(source), str(target)
        if ".tmp-" in source and ".tmp-" not in target:
            self.check_synced(Path(source), Path(target))
            self.unsynced_names.add(target)

    def check_synced(self, source, target):
        """Check that all of a renamed directory was forced to disk, and not changed since."""
        if not target.is_dir():
            return
        for path in (source, *(source / each.name for each in target.iterdir())):
            status = (target / path.relative_to(source)).stat()
            if self.synced.get(str(path)) != (status.st_mtime_ns, status.st_size):
                self.problems.append(f"{path} was renamed before it was on disk")

    def on_rmdir(self, path, *arguments, **options):
        self.rmdir(path, *arguments, **options)
        if self.unsynced_names:
            self.problems.append(f"{path} went before these were on disk: {self.unsynced_names}")

    def check(self, when):
        assert not self.problems, f"{when}: {self.problems}"
        assert not self.unsynced_names, f"{when}: {self.unsynced_names} may vanish"


def is_in(name: str, folder: str) -> bool:
    return str(Path(name).parent) == folder


def check_order(folder: str) -> None:
    """Save and prune, also over a checkpoint of the same step."""
    Path(folder).mkdir()
    run_dir = Path(folder) / "study" / "run"
    order = DiskOrder()
    for number, step in enumerate((1, 2, 3, 3, 4), 1):
        path = run_directory.checkpoint_path(run_dir, step)
        run_format.save_checkpoint(make_tree(number, NUM_VALUES), path)
        order.check(f"save {number}")
        listed = run_directory.list_checkpoints(run_dir)
        assert len(listed) >= min(step, KEEP), listed
        run_tidying.prune_checkpoints(run_dir, KEEP)
        order.check(f"pruning {number}")


def check_damage(folder: str) -> None:
    """Damage the newest of three checkpoints in each of its files, in one byte or in its length."""
    run_dir = Path(folder)
    paths = [run_directory.checkpoint_path(run_dir, step) for step in (1, 2, 3)]
    for number, path in enumerate(paths, 1):
        run_format.save_checkpoint(make_tree(number, NUM_VALUES), path)
    for file in sorted(paths[-1].iterdir()):
        whole = file.read_bytes()
        for damaged in (flip(whole), whole[:-1], b""):
            if file.name == "meta.json" and damaged and damaged != whole[:-1]:
                continue  # it has no digest of its own, and says nothing that is not checked
            file.write_bytes(damaged)
            found = run_directory.newest_checkpoint(run_dir)
            assert found == paths[1], f"{file.name} of {len(damaged)} bytes: found {found}"
        file.write_bytes(whole)
    assert check_content(run_directory.newest_checkpoint(run_dir), NUM_VALUES) == 3
    # The damaged one does not count among those that are kept.
    (paths[-1] / "model.safetensors").write_bytes(b"")
    run_tidying.prune_checkpoints(run_dir, KEEP)
    assert run_directory.list_checkpoints(run_dir) == paths
    assert check_content(run_directory.newest_checkpoint(run_dir), NUM_VALUES) == 2


def flip(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
