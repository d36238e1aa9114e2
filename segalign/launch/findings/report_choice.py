"""Which images a report sets side by side: of one training seed, and of equal noise alone."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from segalign.errors import DataError
from segalign.launch.findings.report_images import RunImages, is_whole, read_test
from segalign.launch.plan import Plan
from segalign.launch.running.observing import ObservedRun
from segalign.launch.running.run_state import RunStatus
from segalign.launch.study import ReportSettings


@dataclass(frozen=True, kw_only=True)
class ShownCaption:
    """A caption whose images are shown.

    Attributes:
        caption: Its number in the test.
        numbers: Of its images, those that all variants have.
    """

    caption: int
    numbers: Sequence[int]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Images that may be compared: of equal captions and equal noise.

    Attributes:
        seed: Training seed of the runs; None if there are no images.
        variants: By label, in the order of the plan.
        captions: What is shown of each of them.
        left_out: Why other variants are not there, by label.
        notes: What readers must know besides.
    """

    seed: int | None
    variants: Mapping[str, RunImages]
    captions: Sequence[ShownCaption]
    left_out: Mapping[str, str]
    notes: Sequence[str] = ()


def choose_images(
    plan: Plan, observed: Sequence[ObservedRun], settings: ReportSettings
) -> Comparison:
    """Choose the images of a report.

    The seed is the first that all variants have images of, else the one that most have. Variants
    whose noise is not that of the base variant, or of the first if that has no images, are left
    out; so are captions that not all of the others have.

    Args:
        plan: The runs.
        observed: How far they are.
        settings: How many are shown.
    """
    statuses = {one.run.run_id: one.status for one in observed}
    best = Comparison(seed=None, variants={}, captions=(), left_out={})
    for seed in dict.fromkeys(run.seed for run in plan.runs):
        found = _of_seed(seed, plan, statuses)
        if best.seed is None or len(found.variants) > len(best.variants):
            best = found
        if not found.left_out:
            break
    return _of_equal_noise(best, plan, settings)


def noise_difference(one: RunImages, other: RunImages) -> str | None:
    """Say what keeps the images of two tests from having the same captions and noise, if anything.

    Noise is a function of the test's seed, of the sample's id, and of the image's number alone; its
    shape follows from the image's.
    """
    conditions = {
        "seed of the noise": (one.result.eval_seed, other.result.eval_seed),
        "captions, by their digest,": (one.result.prompts[:12], other.result.prompts[:12]),
        "number of images of each caption": (
            one.result.images_per_caption, other.result.images_per_caption
        ),
        "size of images": tuple(f"{run.size[0]} x {run.size[1]}" for run in (one, other)),
    }  # fmt: skip
    for name, (expected, got) in conditions.items():
        if expected != got:
            return f"its {name} is {got}, not {expected}"
    for place in one.records.keys() & other.records.keys():
        expected, got = (run.records[place]["sample_id"] for run in (one, other))
        if expected != got:
            return f"its image {place} is of sample {got}, not {expected}"
    return None


def _of_seed(seed: int, plan: Plan, statuses: Mapping[str, RunStatus]) -> Comparison:
    variants: dict[str, RunImages] = {}
    left_out = dict.fromkeys(plan.labels, f"it has no run with seed {seed}")
    for run in (one for one in plan.runs if one.seed == seed):
        status = statuses.get(run.run_id, RunStatus.PENDING)
        if status != RunStatus.DONE:
            left_out[run.label] = f"its run with seed {seed} is {status}"
            continue
        try:
            variants[run.label] = read_test(run.directory)
            del left_out[run.label]
        except DataError as error:
            left_out[run.label] = str(error)
    return Comparison(seed=seed, variants=variants, captions=(), left_out=left_out)


def _of_equal_noise(found: Comparison, plan: Plan, settings: ReportSettings) -> Comparison:
    if not found.variants:
        return Comparison(seed=None, variants={}, captions=(), left_out=found.left_out)
    first = plan.base_label if plan.base_label in found.variants else next(iter(found.variants))
    reference, left_out = found.variants[first], dict(found.left_out)
    kept: dict[str, RunImages] = {}
    notes = []
    for label, images in found.variants.items():
        if (difference := noise_difference(reference, images)) is not None:
            left_out[label] = f"its noise is not that of `{first}`: {difference}"
            continue
        kept[label] = images
        if changed := _other_protocols(reference, images):
            notes.append(
                f"Scores of `{label}` are not measured as those of `{first}` are; its protocol "
                f"differs in: {', '.join(changed)}"
            )
    captions, broken = _shown(kept, settings)
    order = {label: left_out[label] for label in plan.labels if label in left_out}
    return Comparison(
        seed=found.seed, variants=kept, captions=captions, left_out=order, notes=[*notes, *broken]
    )


def _other_protocols(one: RunImages, other: RunImages) -> list[str]:
    first, second = (run.result.conditions["metrics"] for run in (one, other))
    return [name for name in first if name in second and first[name] != second[name]]


def _shown(
    variants: Mapping[str, RunImages], settings: ReportSettings
) -> tuple[list[ShownCaption], list[str]]:
    """Take the first captions that all variants have, and say which images cannot be read."""
    reference = next(iter(variants.values()))
    per_caption = reference.result.images_per_caption
    common = set.intersection(*(set(images.images) for images in variants.values()))
    shown: list[ShownCaption] = []
    broken: list[str] = []
    for caption in sorted({place // per_caption for place in common}):
        if len(shown) == settings.prompts:
            break
        numbers = []
        for number in range(min(settings.images_of_each, per_caption)):
            place = reference.place(caption, number)
            files = [run.images[place] for run in variants.values() if place in common]
            bad = [path for path in files if not is_whole(path)]
            broken += [f"The picture `{path}` cannot be read; test its run again" for path in bad]
            if files and not bad:
                numbers.append(number)
        if numbers:
            shown.append(ShownCaption(caption=caption, numbers=numbers))
    return shown, broken
