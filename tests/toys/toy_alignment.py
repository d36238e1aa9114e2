"""A tiny CLIP-type reward, captions of many lengths, and images to measure them on."""

import torch
from toy_evaluation import setting_of
from toy_scorer import toy_caption, toy_scorer

from segalign.evaluation.image_metric import ImageBatch
from segalign.rewards.clip_reward import ClipReward
from segalign.rewards.common_direction import CorpusDirection, Provenance
from segalign.rewards.direction_checks import describe_text, text_digest
from segalign.text.segmenter import SentenceSegmenter

WIDTH = 12


def toy_clip_reward(**settings) -> ClipReward:
    return ClipReward(
        toy_scorer()._parts, **{"segmenter": SentenceSegmenter(), "cache_bytes": 0, **settings}
    )


def toy_direction(reward: ClipReward) -> CorpusDirection:
    scorer = reward.scorer
    drawn = torch.randn(WIDTH, generator=torch.Generator().manual_seed(5))
    return CorpusDirection(
        drawn / drawn.norm(),
        Provenance(
            model="toy",
            model_digest=text_digest(scorer),
            text=describe_text(scorer.segmenter),
            captions_digest="0" * 64,
            num_captions=600,
        ),
    )


def alignment_rows(count: int) -> list:
    """Captions of two to five sentences; every third goes on for 4 or 16 sentences more."""
    more = [0, 4, 16]
    return [
        {
            "sample_id": 100 + number,
            "caption": " ".join(
                [toy_caption(number), *(f"Stone {k} lies in the grass." for k in range(extra))]
            ),
            "metadata": {},
        }
        for number, extra in ((n, more[n // 3 % 3] if n % 3 == 0 else 0) for n in range(count))
    ]


def alignment_setting(count: int = 9, images_per_caption: int = 2, batch_size: int = 4, **changes):
    rows = alignment_rows(count)
    return setting_of(count, images_per_caption, batch_size, rows=rows, **changes)


def toy_pixels(place: int, side: int = 20) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 + place)
    return torch.randint(0, 256, (3, side, side), generator=generator, dtype=torch.uint8)


def batches_of(setting, rank: int = 0, world_size: int = 1, lost=(), pixels=toy_pixels):
    """The micro-batches of a rank; images of the places `lost` do not count."""
    per_caption = setting.plan.images_per_caption
    for planned in setting.plan.batches(rank, world_size):
        counted = [
            one and place not in lost
            for one, place in zip(planned.counted, planned.places, strict=True)
        ]
        drawn = torch.stack([pixels(place) for place in planned.places])
        yield ImageBatch(
            places=torch.tensor(planned.places),
            counted=torch.tensor(counted),
            rows=[setting.rows[place // per_caption] for place in planned.places],
            pixels=torch.where(torch.tensor(counted).view(-1, 1, 1, 1), drawn, 0),
        )


def measure(metric, setting, **options):
    metric.start(setting)
    for batch in batches_of(setting, **options):
        metric.update(batch)
    return metric.finish()


def brightness(images, captions):
    return images.mean(dim=(1, 2, 3))
