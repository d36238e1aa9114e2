import json
from itertools import chain, islice
from pathlib import Path

import lightning
import numpy as np
import pytest
import torch

from datamodules.long_caption import LongCaptionDataModule
from segalign.data.manifest import load_manifest, write_manifest
from segalign.data.order import EpochOrder
from segalign.data.scene_shards import ScenesShards
from segalign.data.sources import to_png
from segalign.data.tarfiles import ShardWriter
from segalign.errors import ConfigError, DataError, StorageError


class Recorder(lightning.LightningModule):
    """Learns nothing and remembers which samples it was given."""

    def __init__(self, automatic: bool = True) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.automatic_optimization = automatic
        self.train_ids: list[list[int]] = []
        self.val_ids: list[int] = []

    def training_step(self, batch, batch_idx):
        assert "faults" not in batch
        self.train_ids.append(batch["sample_ids"].tolist())
        if not self.automatic_optimization and batch_idx % 2 == 1:
            self.optimizers().step()
        return (self.weight - 1).square()

    def validation_step(self, batch, batch_idx):
        self.val_ids += batch["sample_ids"][batch["valid"]].tolist()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def write_captions(folder: Path, sizes: list[int], faulty=()) -> str:
    folder.mkdir()
    indices, count = [], 0
    for number, size in enumerate(sizes):
        name = f"s-{number}.tar"
        with (folder / name).open("wb") as file:
            writer = ShardWriter(file, name)
            for _ in range(size):
                caption = b"\xff" if count in faulty else f"caption {count}".encode()
                writer.write(f"{count:05d}", [("txt", caption)])
                count += 1
            indices.append(writer.finish())
    write_manifest(folder, indices)
    return str(folder)


def make_trainer(max_steps: int, **options) -> lightning.Trainer:
    defaults = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "use_distributed_sampler": False,
        "limit_val_batches": 0,
    }
    return lightning.Trainer(max_steps=max_steps, **{**defaults, **options})


def fit(data, max_steps: int, *, ckpt_path=None, automatic=True, **options):
    trainer, module = make_trainer(max_steps, **options), Recorder(automatic)
    trainer.fit(module, data, ckpt_path=ckpt_path, weights_only=False)
    return trainer, module


def captions_module(shards: str, **settings) -> LongCaptionDataModule:
    defaults = {"content": "caption", "global_batch_size": 4, "seed": 1}
    return LongCaptionDataModule(train_shards=shards, **{**defaults, **settings})


def test_it_works_without_a_trainer(tmp_path):
    data = captions_module(write_captions(tmp_path / "s", [5, 3]))
    batches = list(islice(data.train_dataloader(), 4))
    ids = [i for batch in batches for i in batch["sample_ids"].tolist()]
    assert sorted(ids) == sorted(list(range(8)) * 2)
    assert batches[0]["captions"] == [f"caption {number}" for number in ids[:4]]


def test_max_steps_ends_the_endless_sequence(tmp_path):
    shards = write_captions(tmp_path / "s", [5, 3])
    trainer, module = fit(captions_module(shards), 5)
    assert trainer.global_step == 5
    straight = islice(captions_module(shards).train_dataloader(), 5)
    assert module.train_ids == [batch["sample_ids"].tolist() for batch in straight]


def test_accumulated_batches_make_the_same_steps(tmp_path):
    shards = write_captions(tmp_path / "s", [5, 3])
    _, whole = fit(captions_module(shards), 3)
    _, halves = fit(captions_module(shards), 3, accumulate_grad_batches=2)
    assert len(halves.train_ids) == 6
    assert list(chain(*halves.train_ids)) == list(chain(*whole.train_ids))


def test_manual_optimization_takes_the_setting_of_the_data(tmp_path):
    shards = write_captions(tmp_path / "s", [5, 3])
    _, module = fit(captions_module(shards, accumulate=2), 3, automatic=False)
    assert [len(ids) for ids in module.train_ids] == [2] * 6


def test_accumulation_must_agree(tmp_path):
    data = captions_module(write_captions(tmp_path / "s", [8]), accumulate=4)
    message = r"`data.accumulate` must be 1 or equal `trainer.accumulate_grad_batches` \(2\); got 4"
    with pytest.raises(ConfigError, match=message):
        fit(data, 1, accumulate_grad_batches=2)


def test_global_batch_size_must_divide(tmp_path):
    data = captions_module(write_captions(tmp_path / "s", [8]))
    with pytest.raises(
        ConfigError, match=r"`global_batch_size` must be a multiple of ranks x accu"
    ):
        fit(data, 1, accumulate_grad_batches=3)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_resumed_run_continues_the_straight_run(tmp_path, num_workers):
    shards = write_captions(tmp_path / "s", [7, 4])
    _, straight = fit(captions_module(shards), 9)
    trainer, _ = fit(captions_module(shards), 4)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    data = captions_module(shards, num_workers=num_workers, report_dir=str(tmp_path))
    _, resumed = fit(data, 9, ckpt_path=tmp_path / "a.ckpt")
    assert resumed.train_ids == straight.train_ids[4:]
    report = json.loads((tmp_path / "data_report.json").read_text())["train"]
    assert (report["first_position"], report["delivered"]) == (0, 36)
    assert [epoch["delivered"] for epoch in report["epochs"]] == [11, 11, 11, 3]
    assert not any(epoch["earlier"] for epoch in report["epochs"])


@pytest.mark.parametrize("accounts", [None, {}, {"train": None}])
def test_a_checkpoint_without_counts_counts_as_earlier(tmp_path, accounts):
    shards = write_captions(tmp_path / "s", [7, 4])
    trainer, _ = fit(captions_module(shards), 4)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    stored = torch.load(tmp_path / "a.ckpt", weights_only=True)
    kept = stored["LongCaptionDataModule"]
    if accounts is None:
        del kept["accounts"]
    elif "train" in accounts:  # of another place in the sequence
        kept["accounts"]["train"]["epochs"][0][1] -= 1
    else:
        kept["accounts"] = accounts
    torch.save(stored, tmp_path / "a.ckpt")
    fit(captions_module(shards, report_dir=str(tmp_path)), 9, ckpt_path=tmp_path / "a.ckpt")
    report = json.loads((tmp_path / "data_report.json").read_text())["train"]
    assert (report["first_position"], report["delivered"]) == (16, 20)
    assert report["epochs"][0]["epoch"] == 1
    assert report["epochs"][0]["earlier"] == 5


def test_counts_that_make_no_sense_are_refused_in_one_line(tmp_path):
    shards = write_captions(tmp_path / "s", [8])
    data = captions_module(shards)
    data.setup("fit")
    data.load_state_dict({**data.state_dict(), "accounts": {"train": {"epochs": 3}}})
    with pytest.raises(DataError, match=r"^expected the checkpoint's accounts of the data to be"):
        next(iter(data.train_dataloader()))


def test_short_epochs_of_the_trainer_go_on_in_the_sequence(tmp_path):
    shards = write_captions(tmp_path / "s", [7, 4])
    _, straight = fit(captions_module(shards), 9)
    _, cut = fit(captions_module(shards), 9, limit_train_batches=3, max_epochs=3)
    assert cut.train_ids == straight.train_ids


def test_overfitting_repeats_the_first_batch(tmp_path):
    shards = write_captions(tmp_path / "s", [7, 4])
    _, module = fit(captions_module(shards), 3, overfit_batches=1)
    assert len(module.train_ids) == 3
    assert module.train_ids[0] == module.train_ids[1] == module.train_ids[2]


def sum_of_epoch(shards: str, epoch: int, count: int) -> int:
    order = EpochOrder(load_manifest(Path(shards)).shard_sizes, seed=1)
    start = epoch * order.num_samples
    return sum(order.locate(position)[1] for position in range(start, start + count))


def test_state_is_plain_numbers(tmp_path):
    shards = write_captions(tmp_path / "s", [7, 4])
    data = captions_module(shards)
    fit(data, 4)
    state = data.state_dict()
    digest = load_manifest(Path(shards)).digest
    assert json.loads(json.dumps(state)) == state
    (train,) = state.pop("accounts").values()
    assert train == {
        "num_samples": 11,
        "first_position": 0,
        "epochs": [[0, 11, 55, {}, {}], [1, 5, sum_of_epoch(shards, 1, 5), {}, {}]],
        "faults": [],
    }
    assert state == {
        "step": 4,
        "position": 16,
        "epoch": 1,
        "seed": 1,
        "global_batch_size": 4,
        "manifest": digest,
    }


def test_state_restores_without_a_trainer(tmp_path):
    shards = write_captions(tmp_path / "s", [7, 4])
    straight = list(islice(captions_module(shards).train_dataloader(), 5))
    data = captions_module(shards)
    data.setup("fit")
    data.load_state_dict({**data.state_dict(), "step": 3})
    (batch,) = list(islice(data.train_dataloader(), 1))
    assert batch["sample_ids"].tolist() == straight[3]["sample_ids"].tolist()


@pytest.mark.parametrize(
    ("settings", "sizes", "message"),
    [
        ({"seed": 2}, [8], r"^a resumed run must keep its data.seed \(1\); got 2; restore it or"),
        ({"global_batch_size": 2}, [8], r"must keep its data.global_batch_size \(4\); got 2;"),
        ({}, [9], r"must keep its manifest digest \([0-9a-f]{12}\); got [0-9a-f]{12}; restore"),
    ],
)
def test_another_sequence_is_not_resumed(tmp_path, settings, sizes, message):
    before = captions_module(write_captions(tmp_path / "before", [8]))
    before.setup("fit")
    now = captions_module(write_captions(tmp_path / "now", sizes), **settings)
    now.setup("fit")
    with pytest.raises(ConfigError, match=message):
        now.load_state_dict(before.state_dict())


def test_caption_dropout_is_for_training_only(tmp_path):
    shards = write_captions(tmp_path / "s", [8])
    data = captions_module(shards, val_shards=shards, caption_dropout=1.0)
    (batch,) = list(islice(data.train_dataloader(), 1))
    assert batch["captions"] == [""] * 4
    assert all(batch["valid"])
    captions = [caption for batch in data.val_dataloader() for caption in batch["captions"]]
    assert captions == [f"caption {number}" for number in range(8)]


def test_validation_sees_each_sample_once(tmp_path):
    shards = write_captions(tmp_path / "s", [8])
    val = write_captions(tmp_path / "v", [3, 4])
    data = captions_module(shards, val_shards=val, val_batch_size=3)
    options = {"limit_val_batches": 1.0, "num_sanity_val_steps": 0, "val_check_interval": 2}
    _, module = fit(data, 4, check_val_every_n_epoch=None, **options)
    assert module.val_ids == [*range(7), *range(7)]
    limited = captions_module(shards, val_shards=val, limit_val_samples=2)
    loader = limited.val_dataloader()
    assert len(loader) == 1
    (batch,) = list(loader)
    assert batch["sample_ids"].tolist() == [0, 1, -1, -1]
    assert batch["valid"].tolist() == [True, True, False, False]


def test_prediction_reads_captions_alone(tmp_path):
    shards = write_captions(tmp_path / "s", [5])
    data = LongCaptionDataModule(predict_shards=shards, global_batch_size=5)
    (batch,) = list(data.predict_dataloader())
    assert batch["captions"] == [f"caption {number}" for number in range(5)]


def test_faulty_samples_are_accounted_for(tmp_path):
    shards = write_captions(tmp_path / "s", [8], faulty=(2, 5))
    settings = {"max_bad_fraction": 0.5, "report_dir": str(tmp_path)}
    fit(captions_module(shards, **settings), 3)
    report = json.loads((tmp_path / "data_report.json").read_text())["train"]
    first, second = report["epochs"]
    assert (first["delivered"], first["quarantined"]) == (6, {"caption_not_utf8": 2})
    for epoch in (first, second):
        accounted = epoch["delivered"] + sum(epoch["quarantined"].values()) + epoch["not_reached"]
        assert accounted == epoch["manifest"] == 8
    assert {fault["key"] for fault in report["faults"]} == {"00002", "00005"}


def test_strict_ends_the_run_and_leaves_the_report(tmp_path):
    shards = write_captions(tmp_path / "s", [8], faulty=range(8))
    data = captions_module(shards, strict=True, report_dir=str(tmp_path))
    with pytest.raises(
        DataError, match=r"at most no sample \(`strict`\) may be unreadable; 4 of 4"
    ):
        fit(data, 3)
    report = json.loads((tmp_path / "data_report.json").read_text())["train"]
    assert report["quarantined"] == {"caption_not_utf8": 4}


def test_a_validation_counts_its_last_pass(tmp_path):
    shards = write_captions(tmp_path / "s", [8])
    val = write_captions(tmp_path / "v", [3, 4], faulty=(2,))
    data = captions_module(shards, val_shards=val, val_batch_size=3, report_dir=str(tmp_path))
    options = {"limit_val_batches": 1.0, "num_sanity_val_steps": 1, "val_check_interval": 2}
    fit(data, 6, check_val_every_n_epoch=None, **options)
    report = json.loads((tmp_path / "data_report.json").read_text())
    (epoch,) = report["validate"]["epochs"]
    counts = (epoch["manifest"], epoch["delivered"], epoch["quarantined"], epoch["not_reached"])
    assert counts == (7, 6, {"caption_not_utf8": 1}, 0)
    assert len(report["validate"]["faults"]) == 1
    (epoch,) = report["sanity_check"]["epochs"]
    assert (epoch["manifest"], epoch["delivered"], epoch["not_reached"]) == (7, 2, 4)


def test_one_bad_shard_ends_the_run(tmp_path):
    shards = write_captions(tmp_path / "s", [100, 60], faulty=range(100, 110))
    settings = {"global_batch_size": 40, "max_bad_fraction": 0.5, "report_dir": str(tmp_path)}
    with pytest.raises(DataError, match=r"of a shard may be unreadable; \d+ of the 60 samples of"):
        fit(captions_module(shards, **settings), 8)
    report = json.loads((tmp_path / "data_report.json").read_text())["train"]
    assert list(report["epochs"][0]["quarantined_by_shard"]) == ["s-1.tar"]
    fit(captions_module(shards, max_bad_shard_fraction=0.2, **settings), 8)


def test_too_many_faulty_samples_end_the_run(tmp_path):
    shards = write_captions(tmp_path / "s", [400], faulty=range(0, 400, 20))
    with pytest.raises(DataError, match=r"at most 1.00% of the samples may be unreadable; "):
        fit(captions_module(shards, global_batch_size=50), 8)


def test_scenes_are_prepared_once(tmp_path):
    scenes = ScenesShards(
        world="2x2", num_train=8, num_val=3, root=str(tmp_path / "scenes"), samples_per_shard=4
    )
    data = LongCaptionDataModule(scenes=scenes, global_batch_size=4)
    data.prepare_data()
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.tar")}
    data.prepare_data()
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.tar")} == stamps
    assert len(stamps) == 3
    (batch,) = list(islice(data.train_dataloader(), 1))
    assert batch["images"].shape == (4, 3, 24, 24)
    assert 0 <= batch["images"].min() < batch["images"].max() <= 1
    assert batch["metadata"][0]["world"] == "2x2"
    val_ids = [i for b in data.val_dataloader() for i in b["sample_ids"][b["valid"]].tolist()]
    assert val_ids == [0, 1, 2]


def test_pairs_of_scenes_are_batches_of_preferences(tmp_path):
    scenes = ScenesShards(
        world="2x2", num_train=8, num_val=4, root=str(tmp_path), pairs=True, edit_position="past_77"
    )
    data = LongCaptionDataModule(scenes=scenes, content="preference", global_batch_size=4)
    data.prepare_data()
    data.setup("fit")
    (batch,) = list(islice(data.train_dataloader(), 1))
    assert batch["image_pairs"].shape == (4, 2, 3, 24, 24)
    assert sorted(map(tuple, batch["preference_probs"].tolist()))[0] == (0.0, 1.0)
    for metadata, images in zip(batch["metadata"], batch["image_pairs"], strict=True):
        row, column = divmod(metadata["edited"]["cell"], 2)
        differs = (images[0] != images[1]).any(dim=0)
        assert differs.any()
        differs[row * 12 : row * 12 + 12, column * 12 : column * 12 + 12] = False
        assert not differs.any()
    (val,) = list(data.val_dataloader())
    assert val["valid"].tolist() == [True] * 4


def test_scenes_and_content_must_go_together():
    for content, pairs in (("preference", False), ("image", True)):
        message = (
            rf"goes with `data.scenes.pairs: true` .*; got `{content}` and `{str(pairs).lower()}`"
        )
        with pytest.raises(ConfigError, match=message):
            LongCaptionDataModule(scenes=ScenesShards(pairs=pairs), content=content)
    LongCaptionDataModule(scenes=ScenesShards(pairs=True), content="caption")


def test_a_pair_with_one_image_keeps_its_slot(tmp_path):
    image = to_png(np.full((4, 4, 3), 255, dtype=np.uint8))
    raw = b'{"caption": "a", "preference_probs": [1, 0]}'
    pair = [("0.png", image), ("1.png", image), ("json", raw)]
    with (tmp_path / "s-0.tar").open("wb") as file:
        writer = ShardWriter(file, "s-0.tar")
        for key, members in (("0", pair), ("1", [pair[0], pair[2]]), ("2", pair)):
            writer.write(key, members)
        write_manifest(tmp_path, [writer.finish()])
    data = LongCaptionDataModule(val_shards=str(tmp_path), content="preference")
    (batch,) = list(data.val_dataloader())
    assert batch["valid"][:3].tolist() == [True, False, True]
    assert batch["captions"][:3] == ["a", "", "a"]
    assert batch["preference_probs"].sum(dim=1).tolist() == [1.0] * len(batch["captions"])
    assert batch["image_pairs"][1].abs().sum() == 0
    (fault,) = batch["faults"]
    assert (fault["reason"], fault["row"]) == ("image_missing", 1)
    assert fault["detail"] == "there is no `1.jpg`, `1.png` or `1.webp`"


def test_a_world_that_does_not_exist(tmp_path):
    scenes = ScenesShards(world="9x9", root=str(tmp_path))
    with pytest.raises(ConfigError, match=r"^expected a world among .*; got `9x9`"):
        LongCaptionDataModule(scenes=scenes).prepare_data()


def test_a_place_for_scenes_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    scenes = ScenesShards(world="2x2", root=str(tmp_path / "file" / "scenes"))
    with pytest.raises(StorageError, match=r"expected to be able to write `.*`; got: Not a dir"):
        LongCaptionDataModule(scenes=scenes).prepare_data()


def test_settings_that_contradict_each_other():
    with pytest.raises(ConfigError, match=r"`data.scenes` brings its own shards, so"):
        LongCaptionDataModule(train_shards="x", scenes=ScenesShards())
    with pytest.raises(ConfigError, match=r"`data.train_shards` must name a folder of shards; got"):
        LongCaptionDataModule().setup("fit")


def test_foreign_shards_without_a_manifest(tmp_path):
    (tmp_path / "x.tar").touch()
    with pytest.raises(DataError, match=r"it has none; run `python main.py shards index"):
        captions_module(str(tmp_path)).setup("fit")


def test_foreign_shards_can_be_streamed(tmp_path):
    shards = write_captions(tmp_path / "s", [20, 20])
    (tmp_path / "s" / "manifest.jsonl").unlink()
    data = captions_module(shards, samples_per_epoch=20, report_dir=str(tmp_path))
    _, module = fit(data, 6)
    assert len(module.train_ids) == 6
    assert json.loads((tmp_path / "data_report.json").read_text())["train"]["delivered"] == 24


@pytest.mark.parametrize("image_size", [None, 8])
def test_samples_of_another_content_are_noticed_at_once(tmp_path, image_size):
    shards = write_captions(tmp_path / "s", [3])
    data = captions_module(shards, content="image", image_size=image_size)
    message = r"must hold samples with `image` content; the first 3 have none \(image_missing: "
    with pytest.raises(DataError, match=message):
        data.train_dataloader()
