"""What two runs of the toy must share if one of them was stopped and resumed."""

import json
from pathlib import Path

from segalign.run_directory import newest_checkpoint


def losses(run_dir: Path) -> dict[int, str]:
    """Read the losses of all batches; a batch that was repeated must have repeated its loss."""
    records: dict[int, str] = {}
    for line in (run_dir / "losses.jsonl").read_text().splitlines():
        record = json.loads(line)
        assert records.setdefault(record["batch"], record["loss"]) == record["loss"]
    return records


def assert_same_training(broken: Path, straight: Path) -> None:
    """Compare losses, and the bytes of the last weights, their average and the optimizer."""
    assert losses(broken) == losses(straight)
    for name in ("model", "ema", "optimizer"):
        one, other = (
            (newest_checkpoint(run) / f"{name}.safetensors").read_bytes()
            for run in (broken, straight)
        )
        assert one == other, name
