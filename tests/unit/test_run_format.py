import errno
import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from segalign import run_format
from segalign.errors import DataError, FullDiskError, StorageError
from segalign.run_directory import newest_checkpoint, verify_checkpoint
from segalign.run_format import load_checkpoint, read_tensors, save_checkpoint


def make_tree(value: float = 1.0) -> dict:
    return {
        "global_step": 3,
        "state_dict": {"weight": torch.full((2, 3), value), "scalar": torch.tensor(value)},
        "optimizer_states": [
            {
                "state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.arange(6.0)}},
                "param_groups": [{"lr": 1e-3, "betas": (0.9, 0.999), "params": [0]}],
            }
        ],
        "ema": {"weights": {"weight": torch.full((2, 3), value / 2)}, "num_updates": 3},
        "lr_schedulers": [{"base_lrs": [0.1], "last_epoch": 3, "best": float("inf")}],
        "extra": torch.tensor([1, 2], dtype=torch.int64),
    }


def assert_equal_trees(left, right):
    assert type(left) is type(right)
    if isinstance(left, torch.Tensor):
        assert left.dtype == right.dtype
        assert torch.equal(left, right)
    elif isinstance(left, dict):
        assert list(left) == list(right)
        for key in left:
            assert_equal_trees(left[key], right[key])
    elif isinstance(left, list | tuple):
        assert len(left) == len(right)
        for one, other in zip(left, right, strict=True):
            assert_equal_trees(one, other)
    else:
        assert left == right


def test_a_checkpoint_comes_back_equal(tmp_path):
    target = tmp_path / "checkpoints" / "step-00000003"
    save_checkpoint(make_tree(), target)
    assert_equal_trees(load_checkpoint(target), make_tree())
    assert sorted(path.name for path in target.iterdir()) == [
        "ema.safetensors",
        "extra.safetensors",
        "meta.json",
        "model.safetensors",
        "optimizer.safetensors",
        "state.json",
    ]


def test_model_file_is_plain_safetensors_with_parameter_names(tmp_path):
    save_checkpoint(make_tree(), tmp_path / "c")
    assert sorted(load_file(tmp_path / "c" / "model.safetensors")) == ["scalar", "weight"]


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float64, torch.bool, torch.uint8, torch.int32]
)
def test_dtypes_are_kept(tmp_path, dtype):
    tensor = torch.tensor([0, 1, 1]).to(dtype)
    save_checkpoint({"state_dict": {"a": tensor}}, tmp_path / "c")
    back = load_checkpoint(tmp_path / "c")["state_dict"]["a"]
    assert back.dtype == dtype
    assert torch.equal(back, tensor)


def test_shared_and_strided_tensors_are_written(tmp_path):
    layer = nn.Linear(4, 4)
    base = torch.arange(12.0).reshape(3, 4)
    state = {
        "a": layer.weight,
        "b": layer.weight,
        "transposed": base.t(),
        "slice": base[1],
        "empty": torch.empty(0, 3),
        "expanded": torch.ones(1, 3).expand(2, 3),
    }
    save_checkpoint({"state_dict": state}, tmp_path / "c")
    back = load_checkpoint(tmp_path / "c")["state_dict"]
    for name, tensor in state.items():
        assert torch.equal(back[name], tensor), name


def test_loaded_tensors_outlive_the_files(tmp_path):
    save_checkpoint(make_tree(), tmp_path / "c")
    back = load_checkpoint(tmp_path / "c")
    (tmp_path / "c" / "model.safetensors").write_bytes(b"")
    assert back["state_dict"]["weight"].sum() == 6


def test_an_existing_checkpoint_is_replaced(tmp_path):
    target = tmp_path / "step-00000003"
    save_checkpoint(make_tree(1.0), target)
    save_checkpoint(make_tree(2.0), target)
    assert load_checkpoint(target)["state_dict"]["scalar"] == 2
    assert os.listdir(tmp_path) == ["step-00000003"]  # noqa: PTH208


def flip_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda c: (c / "model.safetensors").unlink(), "`model.safetensors` is missing"),
        (lambda c: flip_a_byte(c / "optimizer.safetensors"), "`optimizer.safetensors` does not"),
        (lambda c: (c / "state.json").write_text("{}"), "`state.json` has 2 bytes"),
        (lambda c: (c / "meta.json").unlink(), "`meta.json` is missing"),
        (lambda c: (c / "meta.json").write_text("{"), "`meta.json` cannot be read"),
        (lambda c: (c / "meta.json").write_text("[]"), "`meta.json` cannot be read"),
        (
            lambda c: (c / "meta.json").write_text('{"format_version": 99, "files": {}}'),
            "got version 99",
        ),
    ],
)
def test_damage_is_one_line_naming_the_file(tmp_path, damage, message):
    target = tmp_path / "c"
    save_checkpoint(make_tree(), target)
    damage(target)
    with pytest.raises(DataError, match=message) as caught:
        load_checkpoint(target)
    assert "\n" not in str(caught.value)


def test_an_unwritable_type_leaves_nothing_behind(tmp_path):
    with pytest.raises(TypeError, match=r"at `callbacks\.X\.path`"):
        save_checkpoint({"callbacks": {"X": {"path": tmp_path}}}, tmp_path / "c")
    assert list(tmp_path.iterdir()) == []


class Evil:
    def __reduce__(self):
        return (os.system, ("exit 1",))


def test_a_pickle_is_refused_unread(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(pickle.dumps(Evil()))
    with pytest.raises(DataError, match="expected a safetensors file"):
        read_tensors(path)


CALLS_OF_ONE_SAVE = 7  # four safetensors, state.json, meta.json, the directory


@pytest.mark.parametrize("failing_call", range(CALLS_OF_ONE_SAVE + 1))
def test_full_disk_at_every_sync_keeps_the_previous(tmp_path, monkeypatch, failing_call):
    run_dir = tmp_path
    previous = run_dir / "checkpoints" / "step-00000001"
    save_checkpoint(make_tree(1.0), previous)
    calls = []
    fsync = os.fsync

    def fail_once(descriptor):
        calls.append(descriptor)
        if len(calls) == failing_call + 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fail_once)
    with pytest.raises(StorageError, match=r"step-00000002.*No space left on device"):
        save_checkpoint(make_tree(2.0), run_dir / "checkpoints" / "step-00000002")
    assert len(calls) == failing_call + 1
    newest = newest_checkpoint(run_dir)
    assert newest is not None
    verify_checkpoint(newest)
    assert newest == previous or failing_call == CALLS_OF_ONE_SAVE
    hidden = [p for p in (run_dir / "checkpoints").iterdir() if p.name.startswith(".")]
    assert hidden == []


def test_a_failed_safetensors_write_is_a_storage_error(tmp_path, monkeypatch):
    def fail(tensors, path):
        raise run_format.SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(run_format, "save_file", fail)
    with pytest.raises(FullDiskError, match="/c`; got: No space left on device"):
        save_checkpoint(make_tree(), tmp_path / "c")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600)])
def test_files_are_readable_as_the_umask_says(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        save_checkpoint(make_tree(), tmp_path / "step-00000003")
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "step-00000003").iterdir()} == {
        mode
    }
