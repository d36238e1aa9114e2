"""Studies with tests and kept images, for pages that show them."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFilter
from toy_evaluation import setting_of

from segalign.evaluation.image_metric import Findings
from segalign.evaluation.page_pictures import to_lossless
from segalign.evaluation.result_files import image_lines, make_result
from segalign.evaluation.result_folder import image_name
from segalign.launch.findings.ablation import AblationCell, AblationRow, AblationTable
from segalign.launch.findings.intervals import mean_interval, paired_difference
from segalign.launch.plan import Plan, PlannedRun
from segalign.launch.running.observing import ObservedRun
from segalign.launch.running.run_state import RunStatus
from segalign.launch.study import MetricSpec, ReportSettings, Study
from segalign.scenes.samples import make_sample

METRICS = (
    MetricSpec(name="test/reward/dense", label="dense"),
    MetricSpec(name="test/fid_tiny", label="FID", mode="min"),
)


def caption_rows(count, length="long"):
    return [
        {"sample_id": 40 + n, "caption": make_sample("3x3", 1, n, length=length).caption,
         "metadata": {}}
        for n in range(count)
    ]  # fmt: skip


def scene_images(count, per_caption=1):
    """Pictures of scenes of 36 pixels; each image of a caption is another scene."""
    drawn = (make_sample("3x3", 1, n).image for n in range(count * per_caption))
    return {place: torch.from_numpy(image).permute(2, 0, 1) for place, image in enumerate(drawn)}


def photograph(seed, side=512):
    """Something with the edges, gradients and grain of a photograph."""
    draws = np.random.default_rng(seed)
    picture = np.zeros((side, side, 3))
    for scale, weight in ((4, 1.0), (16, 0.6), (64, 0.35), (256, 0.12)):
        noise = Image.fromarray((draws.random((scale, scale, 3)) * 255).astype(np.uint8))
        picture += weight * np.asarray(noise.resize((side, side), Image.Resampling.BICUBIC))
    picture = picture / picture.max() * 255 + draws.normal(0, 4, picture.shape)
    edges = Image.fromarray(picture.clip(0, 255).astype(np.uint8)).filter(ImageFilter.SHARPEN)
    return torch.from_numpy(np.asarray(edges).copy()).permute(2, 0, 1)


def cut(caption):
    """Sentences, with the blanks after them."""
    ends = [n + 2 for n in range(len(caption) - 1) if caption[n : n + 2] == ". "]
    return [list(pair) for pair in zip([0, *ends], [*ends, len(caption)], strict=True)]


def scores_of(rows, per_caption=1, shift=0.0, seed=0):
    """What rewards say of each place; the draws are the same for all shifts."""
    draws = np.random.default_rng(seed)
    spans = [cut(row["caption"]) for row in rows for _ in range(per_caption)]
    scores = {
        name: [[float(x) for x in draws.normal(0.3 + shift, 0.08, len(one))] for one in spans]
        for name in ("dense", "hps")
    }
    found = {}
    for name, own in scores.items():
        found[f"reward/{name}"] = [sum(one) / len(one) for one in own]
        found[f"segment_scores/{name}"] = own
        found[f"segment_spans/{name}"] = spans
    return {**found, "attributes": [round(float(x), 2) for x in draws.uniform(0, 1, len(spans))],
            "num_tokens": [len(one) for one in spans]}  # fmt: skip


def write_test(run_dir: Path, rows, per_image, images, *, per_caption=1, eval_seed=3):
    """Leave what a test leaves that reports read."""
    folder = run_dir / "evaluation" / "test"
    (folder / "images").mkdir(parents=True)
    setting = setting_of(len(rows), per_caption, 4 * per_caption, rows=rows, eval_seed=eval_seed)
    findings = {"alignment": Findings({"reward/dense": 0.5}, {"reward": "dense"}, per_image)}
    result = make_result(setting, findings, {"name": "toy"}, num_counted=setting.plan.num_images)
    result.save(folder / "result.json")
    (folder / "images.jsonl").write_text(image_lines(rows, per_image, per_caption))
    for place, image in images.items():
        (folder / "images" / image_name(place)).write_bytes(to_lossless(image))
    return folder


def study_of(tmp_path, labels, seeds=(0, 1), **settings):
    """Return a study and its plan."""
    runs = [
        PlannedRun(
            run_id=f"{n:06x}{seed:06x}", label=label, arm=label, levels={}, seed=seed,
            directory=tmp_path / "runs" / f"{n:06x}{seed:06x}",
        )
        for n, label in enumerate(labels)
        for seed in seeds
    ]  # fmt: skip
    study = Study(
        name="toy", file=tmp_path / "toy.yaml", base=[], seeds=seeds, metrics=METRICS,
        folder=tmp_path / "toy", runs_folder=tmp_path / "runs",
        report=ReportSettings(**settings),
    )  # fmt: skip
    return study, Plan(study="toy", base_label=labels[0], runs=runs)


def observed_of(plan, statuses=None):
    """All runs are done but for those named by label and seed."""
    return [
        ObservedRun(run=run, status=(statuses or {}).get((run.label, run.seed), RunStatus.DONE))
        for run in plan.runs
    ]


def table_of(plan, observed, values=None):
    """A table whose means are ``values`` by label, else the variant's number, with some spread."""
    rows = []
    seen = {}
    for place, label in enumerate(plan.labels):
        runs = [one for one in observed if one.run.label == label]
        done = [one.run.seed for one in runs if one.status == RunStatus.DONE]
        middle = (values or {}).get(label, float(place))
        seen[label] = {seed: middle + 0.01 * (seed + place * seed % 3) for seed in done}
        cells = {}
        for metric in METRICS:
            own = list(seen[label].values())
            cells[metric.name] = AblationCell(
                by_seed=seen[label],
                interval=mean_interval(own) if own else None,
                difference=paired_difference(seen[label], seen[plan.base_label])
                if label != plan.base_label else None,
            )  # fmt: skip
        missing = [
            f"seed {one.run.seed}: {one.status}" for one in runs if one.status != RunStatus.DONE
        ]
        row = AblationRow(
            label=label, cells=cells, num_runs=len(runs), num_done=len(done), missing=missing
        )
        rows.append(row)
    return AblationTable(
        title="toy: means of two seeds", metrics=METRICS, rows=rows,
        base_label=plan.base_label, notes=["Intervals are of 95 %."],
    )  # fmt: skip
