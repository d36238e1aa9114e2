"""Image metrics of one to four ranks are the same to the last bit."""

from pathlib import Path

import pytest
import torch
from torch import distributed, multiprocessing
from toy_evaluation import setting_of
from toy_features import ToyExtractor, ToySource, toy_features, toy_logits

from segalign.errors import DataError
from segalign.evaluation.image_metric import ImageBatch
from segalign.metrics import feature_sums, host_gather
from segalign.metrics.distribution_metrics import FrechetImageMetric, KernelImageMetric
from segalign.metrics.feature_statistics import FeatureStatistics
from segalign.metrics.feature_sums import FeatureSums
from segalign.metrics.first_rank import on_first_rank
from segalign.metrics.frechet_distance import FrechetDistance
from segalign.metrics.inception_score import InceptionScore
from segalign.metrics.kernel_distance import KernelDistance
from segalign.metrics.kernels import GaussianKernel
from segalign.metrics.reference_statistics import ReferenceStatistics

pytestmark = pytest.mark.distributed

WIDTH, CLASSES, COUNT = 24, 30, 90
# Images of each rank and how many come at a time: uneven, in any order, and one rank in four has
# nothing at all.
ROWS = {
    1: [range(COUNT)],
    2: [range(30, COUNT), range(29, -1, -1)],
    3: [range(0, COUNT, 3), range(1, COUNT, 3), range(COUNT - 1, 0, -3)],
    4: [range(41), [], range(COUNT - 1, 45, -1), range(41, 46)],
}
CHUNKS = {1: 90, 2: 7, 3: 11, 4: 16}


def results(rows, chunk, group=None) -> dict[str, torch.Tensor]:
    real, made = toy_features(70, WIDTH), toy_features(COUNT, WIDTH, 1, 0.3)
    logits = toy_logits(COUNT, CLASSES)
    settings = {"process_group": group}
    reference = FeatureStatistics.of(real)
    subsets = {"num_subsets": 3, "subset_size": 40}
    metrics = {
        "given": FrechetDistance(WIDTH, COUNT, real=reference, **settings),
        "collected": FrechetDistance(WIDTH, COUNT, real=COUNT, **settings),
        "sums": FeatureSums(WIDTH, COUNT, **settings),
        "score": InceptionScore(CLASSES, COUNT, **settings),
        "kid": KernelDistance(WIDTH, real_rows=real, **settings),
        "subsets": KernelDistance(WIDTH, real_rows=real, **subsets, **settings),
        "cmmd": KernelDistance(WIDTH, kernel=GaussianKernel(), **settings),
    }
    for part in torch.tensor(list(rows), dtype=torch.int64).split(chunk):
        ids = torch.cat([part, part[:3], torch.tensor([0, 1])])  # twice the same, and padding
        counted = torch.arange(len(ids)) < len(ids) - 2
        for name, metric in metrics.items():
            values = logits if name == "score" else made
            metric.update(values[ids], ids, counted)
        for name in ("collected", "cmmd"):
            metrics[name].update(made[ids].flip(1) + 0.1, ids, counted, real=True)
    found = {name: metric.compute() for name, metric in metrics.items()}
    found["sums"] = found["sums"].tensors()
    flat = {}
    for name, value in found.items():
        parts = value.items() if isinstance(value, dict) else [("value", value)]
        flat |= {f"{name}.{key}": tensor for key, tensor in parts}
    return flat


def refusals(rank: int) -> list[str]:
    """Let two ranks count one image, then have enough again; let the first rank fail alone."""
    messages = []
    ids = torch.arange(20) + (0 if rank == 0 else 19 * rank)
    metric = FrechetDistance(4, 100, real=FeatureStatistics.of(toy_features(9, 4)))
    metric.update(toy_features(20, 4, rank), ids, ids >= 0)
    try:
        metric.compute()
    except DataError as error:
        messages.append(str(error))
    assert int(metric.generated_ids.sum()) == 20  # its own, not the sum of all
    few = FrechetDistance(4, 100, real=FeatureStatistics.of(toy_features(9, 4)))
    ids = torch.arange(1) + rank
    few.update(toy_features(1, 4, rank), ids, ids >= 0)
    try:
        few.compute()
    except DataError as error:
        messages.append(str(error))
    few.update(toy_features(8, 4, rank), torch.arange(8) + 10 + 8 * rank, torch.ones(8) > 0)
    messages.append(str(float(few.compute())))

    def fails() -> torch.Tensor:
        raise DataError("own failure")

    try:
        on_first_rank(fails, 1)
    except DataError as error:
        messages.append(str(error))
    alone = FeatureSums(4, 100, sync_on_compute=False)
    alone.update(toy_features(rank + 1, 4), torch.arange(rank + 1), torch.ones(rank + 1) > 0)
    messages.append(str(alone.compute().num_samples))
    return messages


class Reference:
    """Features of real images."""

    def statistics(self, extractor, setting):
        features = toy_features(9, 4)
        sums = FeatureStatistics.of(features)
        return ReferenceStatistics(sums, features, {"extractor": extractor.protocol()})


def missing(rank: int) -> list[str]:
    """Lose all images but those of the first micro-batch, which one rank has."""
    setting = setting_of(16)
    source = ToySource(ToyExtractor())
    metrics = [
        FrechetImageMetric("fid", source, Reference()),
        KernelImageMetric("kid", source, Reference(), num_subsets=1, subset_size=5),
        KernelImageMetric("few", source, Reference()),
    ]
    for metric in metrics:
        metric.start(setting)
    for planned in setting.plan.batches(rank, 4):
        places = torch.tensor(planned.places)
        pixels = (torch.arange(48).view(3, 4, 4) * places.view(-1, 1, 1, 1) % 251).byte()
        if planned.index == 0:
            rows = [setting.rows[place] for place in planned.places]
            batch = ImageBatch(places, places >= 0, rows, pixels)
            for metric in metrics:
                metric.update(batch)
    found = [metric.finish() for metric in metrics]
    return [f"{[*one.values]} {list(one.notes)}" for one in found]


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    host_gather._CHUNK_BYTES = 1000  # several chunks, the last of them not full
    if rank == 0:
        torch.save(results(ROWS[1][0], CHUNKS[1]), f"{folder}/alone.pt")
    feature_sums._ROWS_AT_ONCE = 20  # some rows are multiplied at once, some later
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=4
    )
    groups = {world: distributed.new_group(list(range(world))) for world in ROWS}
    for world, group in groups.items():
        if rank < world:
            found = results(ROWS[world][rank], CHUNKS[world], group)
            torch.save(found, f"{folder}/{world}-{rank}.pt")
    Path(f"{folder}/missing-{rank}.txt").write_text("\n".join(missing(rank)))
    Path(f"{folder}/refused-{rank}.txt").write_text("\n".join(refusals(rank)))
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    multiprocessing.start_processes(work, (str(folder),), nprocs=4, start_method="fork")
    return folder


def test_any_number_of_ranks_finds_the_same_bits(folder):
    expected = torch.load(folder / "alone.pt", weights_only=True)
    assert expected["given.value"] > 0.1
    assert expected["sums.num_samples"] == COUNT
    assert len(list(folder.glob("*-*.pt"))) == 1 + 2 + 3 + 4
    for path in folder.glob("*-*.pt"):
        found = torch.load(path, weights_only=True)
        assert found.keys() == expected.keys()
        wrong = [name for name in found if not torch.equal(found[name], expected[name])]
        assert not wrong, path.name


def test_ranks_refuse_together_and_can_go_on(folder):
    told = [(folder / f"refused-{rank}.txt").read_text().splitlines() for rank in range(4)]
    assert len({tuple(lines[:3]) for lines in told}) == 1
    assert "counted by one rank; 3 were by several, first 19;" in told[0][0]
    assert "more generated images than features (4)" in told[0][1]
    assert float(told[0][2]) > 0
    assert told[0][3] == "own failure"
    assert all("the first rank to compute" in lines[3] for lines in told[1:])
    assert [lines[4] for lines in told] == ["1", "2", "3", "4"]


def test_ranks_go_on_together_where_images_that_are_lost_leave_too_few(folder):
    told = [(folder / f"missing-{rank}.txt").read_text().splitlines() for rank in range(4)]
    assert told[0] == told[1] == told[2] == told[3]
    fid, kid, few = told[0]
    assert fid.startswith("[] ['fid: expected more generated images than features (4)")
    assert kid.startswith("[] ['kid: no value; expected at least 5 images")
    assert few.startswith("['few'] []")
