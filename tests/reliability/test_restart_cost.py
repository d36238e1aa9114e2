"""What a restart costs does not depend on how far the run has come: counted, not timed."""

import itertools
from collections import Counter

import broken_resume
import pytest

from datamodules.long_caption import LongCaptionDataModule
from segalign.data import manifest, order, reader
from segalign.data.scene_shards import ScenesShards

NUM_SAMPLES, BATCH = 48, 4
# The same place of an epoch, near the start and after a billion samples.
POSITIONS = [12, 12 + NUM_SAMPLES, 12 + NUM_SAMPLES * (10**9 // NUM_SAMPLES)]


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Twelve shards of four scenes."""
    place = tmp_path_factory.mktemp("scenes")
    made = ScenesShards(
        world="2x2", num_train=NUM_SAMPLES, num_val=4, samples_per_shard=4, root=str(place)
    )
    made.prepare()
    return made.folder("train")


@pytest.fixture
def costs(monkeypatch) -> Counter:
    """Count samples read, random words drawn and lines of the manifest parsed."""
    costs: Counter = Counter()
    read, permute, parse = reader.ShardFiles.read, order._permutation, manifest.parse_index

    def counted_read(self, shard, offset, size):
        costs["reads"] += 1
        return read(self, shard, offset, size)

    def counted_permutation(length, purpose, *counters):
        costs["words"] += length
        return permute(length, purpose, *counters)

    def counted_parse(line):
        costs["lines"] += 1
        return parse(line)

    monkeypatch.setattr(reader.ShardFiles, "read", counted_read)
    monkeypatch.setattr(order, "_permutation", counted_permutation)
    monkeypatch.setattr(manifest, "parse_index", counted_parse)
    return costs


def first_batch(shards, position: int, costs: Counter, *, window: int = 1, more: int = 0) -> dict:
    """Resume in the middle of a run; return what the first batch cost, and the ids after it."""
    data = LongCaptionDataModule(
        train_shards=str(shards), content="caption", global_batch_size=BATCH, shuffle_window=window
    )
    data.setup("fit")
    data.load_state_dict({**data.state_dict(), "step": position // BATCH, "position": position})
    costs.clear()
    batches = iter(data.train_dataloader())
    first = next(batches)
    found = dict(costs)
    ids = [first["sample_ids"].tolist()]
    ids += [batch["sample_ids"].tolist() for batch in itertools.islice(batches, more)]
    assert first["epochs"].tolist() == [position // NUM_SAMPLES] * BATCH
    return {"cost": found, "ids": ids}


def check_cost(shards, costs: Counter) -> None:
    near, *far = [first_batch(shards, position, costs)["cost"] for position in POSITIONS]
    # The samples, of two members each, and one more, which ends the batch and may be of the next
    # shard.
    assert near["reads"] <= 2 * (BATCH + 1)
    assert near["lines"] <= 2
    assert far == [near] * len(far)


def test_a_restart_costs_the_same_anywhere(shards, costs):
    check_cost(shards, costs)


def test_a_wide_window_costs_no_more_than_itself(shards, costs):
    near, *far = [first_batch(shards, position, costs, window=8)["cost"] for position in POSITIONS]
    for cost in far:
        assert {name: cost[name] for name in ("reads", "words")} == {
            name: near[name] for name in ("reads", "words")
        }
        assert cost["lines"] <= BATCH + 1


def test_a_restart_goes_on_with_the_same_samples(shards, costs):
    whole = first_batch(shards, POSITIONS[1], costs, more=9)["ids"]
    for number in range(1, 9):
        resumed = first_batch(shards, POSITIONS[1] + number * BATCH, costs)["ids"]
        assert resumed[0] == whole[number]


def test_a_restart_that_reads_up_to_its_place_is_caught(shards, costs, monkeypatch):
    for name, value in broken_resume.reads_up_to_its_place():
        monkeypatch.setattr(reader.IndexedShardReader, name, value)
    # Of the three places only the near ones can be waited for.
    monkeypatch.setattr(f"{__name__}.POSITIONS", POSITIONS[:2])
    with pytest.raises(AssertionError):
        check_cost(shards, costs)
