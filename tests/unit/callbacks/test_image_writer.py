import json
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from callbacks.image_writer import ImageWriter
from segalign.errors import StorageError


@pytest.fixture
def trainer(run_dir):
    return SimpleNamespace(default_root_dir=str(run_dir), global_rank=0)


BATCH = {
    "sample_ids": torch.tensor([3, 5]),
    "valid": torch.tensor([True, False]),
    "captions": ["ein Würfel", "padding"],
}


def write(trainer):
    ImageWriter().on_predict_batch_end(trainer, None, torch.ones(2, 3, 4, 6), BATCH, 0)


def test_valid_rows_are_written_under_their_position(trainer, run_dir):
    ImageWriter().on_predict_start(trainer, None)
    write(trainer)
    folder = run_dir / "predictions"
    assert sorted(path.name for path in folder.iterdir()) == [
        "00000003.png",
        "captions-rank-0.jsonl",
    ]
    assert Image.open(folder / "00000003.png").size == (6, 4)
    (line,) = (folder / "captions-rank-0.jsonl").read_text().splitlines()
    assert json.loads(line) == {"file": "00000003.png", "caption": "ein Würfel"}


def test_a_folder_that_cannot_be_made_is_named(trainer, run_dir):
    run_dir.write_text("")
    with pytest.raises(StorageError, match="run/predictions`; got: Not a directory"):
        ImageWriter().on_predict_start(trainer, None)


@pytest.mark.parametrize("name", ["00000003.png", "captions-rank-0.jsonl"])
def test_a_file_that_cannot_be_written_is_named(trainer, run_dir, name):
    (run_dir / "predictions" / name).mkdir(parents=True)
    with pytest.raises(StorageError, match=f"{name}`; got: Is a directory"):
        write(trainer)
