"""Commands that train every module of the project, tiny, with the real datamodule and workers."""

import json
from pathlib import Path
from typing import Any

CONFIGS = Path(__file__).parents[2] / "configs"
PERMISSIONS = ["--allow_import=toy_resume", "--allow_import=toy_house"]
BASE = {"world": "2x2", "generator": "random", "text_model": "random"}
ADAMW = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01}}
EVERY_N_STEPS = 3
EMA = {"class_path": "callbacks.ema.EMA", "init_args": {}}


def callback(name: str, /, **arguments: Any) -> dict[str, Any]:
    """Describe a callback as a config does."""
    return {"class_path": name, "init_args": arguments}


def measured() -> list[dict[str, Any]]:
    """Evaluate images at every validation: FID, facts of scenes, distances to the start."""
    tiny = callback("segalign.metrics.extractors.tiny.TinyExtractor", num_features=2)
    network = callback("segalign.metrics.perceptual.tiny.TinyPerceptual")
    return [
        callback("callbacks.image_evaluation.ImageEvaluation", num_captions=3, curves=[]),
        callback("callbacks.alignment.SceneFacts", world="2x2"),
        callback("callbacks.fid.FID", extractor=tiny),
        callback("callbacks.lpips.LPIPS", network=network),
    ]


def shared(steps: int, micro: int = 1, validate: int = EVERY_N_STEPS) -> list[str]:
    """Options of all of them; by default a validation follows every checkpoint."""
    return [
        f"--trainer.max_steps={steps}", f"--trainer.val_check_interval={validate * micro}",
        "--trainer.check_val_every_n_epoch=null", "--trainer.limit_val_batches=1",
        "--trainer.num_sanity_val_steps=0", "--trainer.accelerator=cpu",
        "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false",
        f"--checkpoint.every_n_steps={EVERY_N_STEPS}", "--data.init_args.num_workers=1",
    ]  # fmt: skip


def scenes(place: Path, **settings: Any) -> str:
    """Describe shards of tiny scenes; 10 samples, so that steps straddle epochs."""
    small = {"world": "2x2", "num_train": 10, "num_val": 4, "samples_per_shard": 4}
    return "--data.init_args.scenes=" + json.dumps(
        {**small, "root": str(place / "scenes"), **settings}
    )


def toy(place: Path, steps: int) -> tuple[list[str], list[dict[str, Any]]]:
    schedule = callback("segalign.lr_schedule.WarmupCosineLR", total_steps=steps, warmup_steps=2)
    return [
        "--model=toy_resume.CaptionToy", f"--model.init_args.optimizer={json.dumps(ADAMW)}",
        f"--model.init_args.lr_scheduler={json.dumps(schedule)}", "--seed_everything=7",
        "--data=datamodules.long_caption.LongCaptionDataModule", "--data.init_args.content=caption",
        "--data.init_args.global_batch_size=4", scenes(place), "--trainer.log_every_n_steps=3",
        *shared(steps, 2), "--trainer.accumulate_grad_batches=2", "--trainer.gradient_clip_val=1",
    ], [EMA]  # fmt: skip


def stage_one(place: Path, steps: int) -> tuple[list[str], list[dict[str, Any]]]:
    # Text totals of an epoch are logged seldom, so that it falls to checkpoints to do so.
    return [
        f"--config={CONFIGS / 'quickstart.yaml'}", *shared(steps, 2), scenes(place),
        f"--model.init_args.base.init_args={json.dumps(BASE)}",
        "--model.init_args.sampler.num_inference_steps=2", "--data.init_args.global_batch_size=8",
        "--trainer.accumulate_grad_batches=2", "--trainer.log_every_n_steps=5",
    ], [EMA, *measured()]  # fmt: skip


def stage_one_lora(place: Path, steps: int) -> tuple[list[str], list[dict[str, Any]]]:
    return [
        f"--config={CONFIGS / 'quickstart.yaml'}", *shared(steps, validate=4), scenes(place),
        f"--model.init_args.base.init_args={json.dumps(BASE)}",
        "--model.init_args.lora={rank: 2}",
        "--model.init_args.sampler.num_inference_steps=2", "--data.init_args.global_batch_size=4",
        "--trainer.log_every_n_steps=1",
    ], [EMA]  # fmt: skip


def preference(place: Path, steps: int) -> tuple[list[str], list[dict[str, Any]]]:
    scorer = callback("segalign.scenes.scorers.ScenesScorer", world="2x2", weights="random")
    report = callback(
        "callbacks.preference_report.PreferenceReport", gallery_size=4, retrieval_on_preferred=True
    )
    return [
        f"--config={CONFIGS / 'scenes' / 'preference.yaml'}", *shared(steps),
        scenes(place, pairs=True), f"--model.init_args.scorer={json.dumps(scorer)}",
        "--data.init_args.global_batch_size=4", "--data.init_args.val_batch_size=4",
        "--trainer.log_every_n_steps=1",
    ], [EMA, report]  # fmt: skip


def scorer(place: Path, steps: int) -> tuple[list[str], list[dict[str, Any]]]:
    return [
        f"--config={CONFIGS / 'scenes' / 'scorer.yaml'}", *shared(steps, validate=4),
        scenes(place, length="short", val_length="short"), "--model.init_args.world=2x2",
        "--model.init_args.contrastive_start=2", "--model.init_args.max_noise=0.1",
        "--data.init_args.global_batch_size=4", "--trainer.log_every_n_steps=1",
    ], []  # fmt: skip


def reward(place: Path, steps: int) -> tuple[list[str], list[dict[str, Any]]]:
    return [
        f"--config={CONFIGS / 'longsd.yaml'}",
        f"--config={CONFIGS / 'debug' / 'longsd_tiny.yaml'}", *shared(steps),
        scenes(place), "--data.init_args.global_batch_size=2", "--checkpoint.overwrite=false",
        "--data.init_args.val_batch_size=2", "--trainer.log_every_n_steps=1",
    ], []  # fmt: skip


MODULES = {
    "toy": toy,
    "stage one": stage_one,
    "stage one, LoRA": stage_one_lora,
    "preference": preference,
    "scorer": scorer,
    "reward": reward,
}


STEPS = {"reward": 6}  # others: 9


def command(
    module: str, place: Path, run_dir: Path, *more: dict[str, Any], steps: int | None = None
) -> list[str]:
    """Compose a fit that records its steps.

    Args:
        module: One of ``MODULES``.
        place: Folder that runs share their shards in.
        run_dir: The run directory.
        *more: More callbacks, before those of the module.
        steps: Optimizer steps; None is as many as suit the module.
    """
    options, callbacks = MODULES[module](place, steps or STEPS.get(module, 9))
    recorder = callback("toy_resume.StepRecorder")
    return [
        "fit", *PERMISSIONS, *options, f"--run_dir={run_dir}", "--ckpt_path=auto",
        f"--trainer.callbacks={json.dumps([*more, recorder, *callbacks])}",
    ]  # fmt: skip
