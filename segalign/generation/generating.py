"""Make the images of a command: what is missing, and the page of all."""

from collections.abc import Callable, Sequence
from dataclasses import asdict

import torch

from segalign.atomic import write_text_atomic
from segalign.generation.contact_sheet import render_sheet, sheet_entries
from segalign.generation.image_folder import ImageFolder, ImageJob
from segalign.generation.opening import OpenedModel
from segalign.generation.own_files import SHEET_FILE
from segalign.generation.prompts import Prompt
from segalign.generation.segment_marks import mark_prompt


def plan_jobs(prompts: Sequence[Prompt], seeds: Sequence[int]) -> list[ImageJob]:
    """List the images to make: every prompt with every seed, or with the one of its own."""
    return [
        ImageJob(prompt, seed)
        for prompt in prompts
        for seed in ((prompt.seed,) if prompt.seed is not None else dict.fromkeys(seeds))
    ]


def make_images(
    opened: OpenedModel,
    jobs: Sequence[ImageJob],
    folder: ImageFolder,
    *,
    batch_size: int,
    advance: Callable[[int], None],
) -> list[ImageJob]:
    """Make images in batches; an image does not depend on its batch.

    Args:
        opened: The model.
        jobs: The images to make.
        folder: Where they are written.
        batch_size: Images made at a time.
        advance: Told of how many images are done.

    Returns:
        The jobs whose images are not finite. They are not written.
    """
    failed = []
    for start in range(0, len(jobs), batch_size):
        batch = jobs[start : start + batch_size]
        with opened.precision():
            images = opened.model.generate(
                [job.prompt.text for job in batch],
                [job.prompt.sample_id for job in batch],
                [job.seed for job in batch],
                opened.weights,
            )
        for job, image in zip(batch, images, strict=True):
            if torch.isfinite(image).all():
                folder.write(job, image)
            else:
                failed.append(job)
            advance(1)
    return failed


def write_overview(opened: OpenedModel, jobs: Sequence[ImageJob], folder: ImageFolder) -> None:
    """Write the records and the page of all images that are in a folder."""
    records = folder.write_records(jobs)
    conditioner = opened.model.generator.conditioner
    entries = sheet_entries(records, lambda prompt: mark_prompt(conditioner, prompt))
    settings = asdict(folder.settings)
    settings["checkpoint"] = folder.settings.checkpoint[:12]
    page = render_sheet(entries, settings, f"{len(records)} images of {len(entries)} prompts")
    write_text_atomic(folder.path / SHEET_FILE, page)
