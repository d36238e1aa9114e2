import os
import pickle
import struct
import zipfile

import pytest
import torch

from segalign.errors import DataError
from segalign.tensor_pickle import is_plain_tensor, read_tensor_pickle

# A pickle of protocol 2 up to an instruction whose argument is cut off.
CUT_INSTRUCTIONS = {
    "struct.error": b"\x80\x02J\x01",
    "EOFError": b"",
    "IndexError": b"\x80\x02R.",
    "KeyError": b"\x80\x02h\x07.",
    "UnicodeDecodeError": b"\x80\x02X\x01\x00\x00\x00\xff.",
}


class Bomb:
    """A pickle that would make a folder when executed."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "x.pt"


def refused(path):
    with pytest.raises(DataError) as error:
        read_tensor_pickle(path, expected="a thing", remedy="choose another")
    message = str(error.value)
    assert message.startswith(f"expected a thing in `{path}`; got ")
    assert message.endswith("; choose another")
    assert "\n" not in message
    return message


def test_tensors_come_back_on_the_cpu(path):
    torch.save({"a": [torch.arange(3.0)]}, path)
    content = read_tensor_pickle(path, expected="a thing", remedy="choose another")
    assert torch.equal(content["a"][0], torch.arange(3.0))


@pytest.mark.parametrize("is_legacy", [False, True])
def test_code_is_named_and_never_runs(path, tmp_path, is_legacy):
    bomb = Bomb(tmp_path / "exploded")
    torch.save([bomb], path, _use_new_zipfile_serialization=not is_legacy)
    assert "mkdir`, which could run code and was not loaded" in refused(path)
    assert not bomb.target.exists()
    pickle.loads(pickle.dumps(bomb))  # the file is live for other readers
    assert bomb.target.exists()


@pytest.mark.parametrize("content", CUT_INSTRUCTIONS.values(), ids=CUT_INSTRUCTIONS)
def test_damage_of_any_kind_is_one_line(path, content):
    path.write_bytes(content)
    assert "a damaged or foreign file (" in refused(path)


def test_whatever_the_reader_raises_is_one_line(path, monkeypatch):
    def fail(*_, **__):
        raise struct.error("unpack requires\na buffer")

    monkeypatch.setattr(torch, "load", fail)
    assert "a damaged or foreign file (error)" in refused(path)


def test_a_missing_file_is_told(path):
    assert "got no such file;" in refused(path)


def test_plain_tensors_are_dense_and_hold_numbers():
    dense = torch.eye(2)
    items = [dense, dense.int(), dense.to_sparse(), dense.to("meta"), 3]
    assert [is_plain_tensor(item) for item in items] == [True, True, False, False, False]
    repeated = torch.ones(1).expand(2**40)
    views = [torch.arange(7).expand(1, -1), torch.eye(4)[1:, ::2], torch.eye(4).T, torch.ones(0)]
    assert not is_plain_tensor(repeated)
    assert all(map(is_plain_tensor, views))


def test_a_compressed_archive_is_refused(path):
    torch.save([torch.zeros(2**16)], path)
    read_tensor_pickle(path, expected="a thing", remedy="choose another")
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in parts.items():
            archive.writestr(name, content)
    assert "a damaged or foreign file (ValueError)" in refused(path)
