"""Files of weights are read without running code, and what is wrong with them is one line."""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from segalign.errors import DataError
from segalign.metrics.extractors.weight_files import PublishedFile, digest_tensors, read_weights


class Loud:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __reduce__(self):
        return (os.mkdir, (str(self.folder),))


def refused(path: Path) -> str:
    with pytest.raises(DataError) as error:
        read_weights(path, "weights of a test")
    message = str(error.value)
    assert "\n" not in message
    assert f"expected weights of a test in `{path}`; got " in message
    return message


def test_code_in_a_pickle_does_not_run(tmp_path: Path):
    path, made = tmp_path / "loud.pth", tmp_path / "made"
    torch.save({"weight": Loud(made)}, path)
    assert "could run code" in refused(path)
    assert not made.exists()


@pytest.mark.parametrize("name", ["cut.pth", "cut.safetensors"])
def test_damaged_files_are_refused(tmp_path: Path, name: str):
    path = tmp_path / name
    state = {"weight": torch.ones(1000)}
    torch.save(state, path) if name.endswith("pth") else save_file(state, path)
    path.write_bytes(path.read_bytes()[:700])
    refused(path)


@pytest.mark.parametrize("content", [[torch.ones(1)], {"a": 1}, {1: torch.ones(1)}])
def test_other_things_than_named_tensors_are_refused(tmp_path: Path, content):
    path = tmp_path / "other.pth"
    torch.save(content, path)
    assert "other things than named tensors" in refused(path)


def test_half_precision_becomes_float32_and_every_tensor_must_fit(tmp_path: Path):
    path = tmp_path / "half.pth"
    torch.save({"weight": torch.ones(2, 2).half(), "bias": torch.zeros(2).half()}, path)
    file = read_weights(path, "weights of a test")
    with torch.device("meta"):
        network, wider = nn.Linear(2, 2), nn.Linear(3, 2)
    file.fill(network)
    assert network.weight.dtype == torch.float32
    with pytest.raises(DataError, match="size mismatch"):
        file.fill(wider)
    with pytest.raises(DataError, match="Unexpected key"):
        file.fill(network, {**file.tensors, "more": torch.ones(1)})


def test_weights_read_in_inference_mode_serve_outside_of_it(tmp_path: Path):
    path = tmp_path / "weights.pth"
    torch.save({"weight": torch.ones(2, 2).half(), "bias": torch.zeros(2)}, path)
    with torch.inference_mode():
        network = nn.Linear(2, 2)
        read_weights(path, "weights of a test").fill(network)
    assert not network.weight.is_inference()


def test_a_failed_download_is_one_line(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    source = tmp_path / "source.pth"
    torch.save({"weight": torch.ones(1)}, source)
    published = PublishedFile("weights of a test", source.as_uri(), "0" * 64)
    with pytest.raises(DataError, match=r"got no download \(RuntimeError: invalid hash") as error:
        published.find(None, download=True)
    assert "\n" not in str(error.value)
    with pytest.raises(DataError, match="got no such file"):
        published.find(None, download=False)


def test_a_download_is_kept_where_torch_hub_keeps_it(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    source = tmp_path / "source.pth"
    torch.save({"weight": torch.ones(1)}, source)
    digest = read_weights(source, "weights of a test").sha256
    published = PublishedFile("weights of a test", source.as_uri(), digest)
    found = published.find(None, download=True)
    assert found == tmp_path / "hub" / "checkpoints" / "source.pth"
    assert read_weights(found, "weights of a test").is_published(published)
    source.unlink()
    assert published.find(None, download=False) == found


def test_a_digest_of_tensors_sees_names_shapes_types_and_values():
    base = {"a": torch.zeros(2, 3), "b": torch.ones(1)}
    others = [
        {"a": torch.zeros(3, 2), "b": torch.ones(1)},
        {"a": torch.zeros(2, 3), "c": torch.ones(1)},
        {"a": torch.zeros(2, 3), "b": torch.full((1,), 2.0)},
        {"a": torch.zeros(2, 3, dtype=torch.int32), "b": torch.ones(1)},
    ]
    assert digest_tensors(dict(reversed(base.items()))) == digest_tensors(base)
    assert len({digest_tensors(one) for one in [base, *others]}) == 5
