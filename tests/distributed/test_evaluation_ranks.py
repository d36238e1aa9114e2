"""Images of an evaluation are the same bits for any number of ranks, each counted once."""

from pathlib import Path

import torch
from tiny_run import model_settings
from torch import distributed, multiprocessing
from toy_evaluation import Recorder, rows_of

from lightning_modules.run_loading import build_module
from segalign.evaluation.captions import captions_digest
from segalign.evaluation.evaluator import Evaluator
from segalign.evaluation.image_metric import EvaluationSetting, SourcePool
from segalign.evaluation.plan import EvaluationPlan
from segalign.evaluation.start_images import StartImages

NUM_CAPTIONS, PER_CAPTION, BATCH_SIZE = 11, 2, 4
SENTENCE = "A large red circle sits in the top left. "


def make_module():
    torch.manual_seed(0)
    module = build_module(model_settings(text={"token_budget": 160}))
    module.configure_model()
    return module.eval()


def evaluate(folder: Path) -> dict[int, torch.Tensor]:
    rows = rows_of(NUM_CAPTIONS)
    for number, row in enumerate(rows):
        row["caption"] = SENTENCE * (1 + number % 5) + row["caption"]
    assert len(captions_digest(rows)) == 64
    setting = EvaluationSetting(
        plan=EvaluationPlan(NUM_CAPTIONS, PER_CAPTION, BATCH_SIZE),
        rows=rows,
        eval_seed=5,
        weights="raw",
        device=torch.device("cpu"),
        pool=SourcePool(),
    )
    recorder = Recorder()
    start = StartImages(folder / "start")
    outcome = Evaluator(setting, [recorder], start).run(make_module(), keep_as_start=True)
    assert outcome.num_counted == NUM_CAPTIONS * PER_CAPTION
    assert start.is_of(setting)
    return {
        place: pixels
        for batch in recorder.batches
        for place, pixels, counted in zip(
            batch.places.tolist(), batch.pixels, batch.counted.tolist(), strict=True
        )
        if counted
    }


def evaluate_rank(rank: int, folder: str, world_size: int) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size
    )
    torch.save(evaluate(Path(folder)), f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


def test_any_number_of_ranks_makes_the_same_images(tmp_path: Path):
    alone = evaluate(tmp_path)
    assert sorted(alone) == list(range(NUM_CAPTIONS * PER_CAPTION))
    assert not torch.equal(alone[0], alone[1])
    for world_size in (2, 3):
        folder = tmp_path / str(world_size)
        folder.mkdir()
        arguments = (str(folder), world_size)
        multiprocessing.start_processes(
            evaluate_rank, arguments, nprocs=world_size, start_method="fork"
        )
        parts = [torch.load(folder / f"{r}.pt", weights_only=True) for r in range(world_size)]
        assert sum(map(len, parts)) == len(alone)
        for place, pixels in (item for part in parts for item in part.items()):
            assert torch.equal(pixels, alone[place])
        for file in sorted((tmp_path / "start").glob("*.safetensors")):
            assert (folder / "start" / file.name).read_bytes() == file.read_bytes()
