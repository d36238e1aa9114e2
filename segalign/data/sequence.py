"""The place of a run in the training sequence, as a checkpoint keeps it."""

from typing import TypedDict

from segalign.data.manifest import Manifest
from segalign.errors import ConfigError


class SequenceState(TypedDict):
    """Integers, and the digest that says of what.

    Attributes:
        step: Optimizer steps served.
        position: Samples served, over all ranks.
        epoch: Epoch of the next sample.
        seed: Seed of the order.
        global_batch_size: Samples of one step.
        manifest: Digest of the manifest.
    """

    step: int
    position: int
    epoch: int
    seed: int
    global_batch_size: int
    manifest: str


def sequence_state(
    manifest: Manifest, step: int, global_batch_size: int, *, seed: int
) -> SequenceState:
    """Return the place after ``step`` optimizer steps."""
    position = step * global_batch_size
    return {
        "step": step,
        "position": position,
        "epoch": position // manifest.num_samples,
        "seed": seed,
        "global_batch_size": global_batch_size,
        "manifest": manifest.digest,
    }


def check_same_sequence(stored: SequenceState, current: SequenceState) -> None:
    """See that a resumed run goes on in the sequence that it left.

    Raises:
        ConfigError: If shards, seed or global batch size have changed.
    """
    for name, before, now in (
        ("data.seed", stored["seed"], current["seed"]),
        ("data.global_batch_size", stored["global_batch_size"], current["global_batch_size"]),
        ("manifest digest", stored["manifest"][:12], current["manifest"][:12]),
    ):
        if before != now:
            raise ConfigError(
                f"a resumed run must keep its {name} ({before}); got {now}; restore it or start "
                f"a new run"
            )
