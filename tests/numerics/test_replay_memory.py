"""Memory of a replayed step, with everything that a rollout merges and keeps."""

import pytest
from live_bytes import LiveBytes
from toy_tuning import CODEC, batch, make_step, run, with_lora

from segalign.diffusion.rollout import RolloutSettings
from segalign.truncation.drtune import DRTune

pytestmark = pytest.mark.numerics

MERGED = RolloutSettings(merge_lora=True, cache_text=True)


def brightness(images, captions):
    return images.square().mean(dim=(1, 2, 3))


def peak_of_replay(num_train_steps, rollout=MERGED):
    """Most bytes alive from the first decoded image on, of those that the step has made."""
    live = LiveBytes()

    def decode(latents):
        if not started:
            started.append(live.now)
            live.peak = live.now
        return CODEC.decode(latents)

    started = []
    step = make_step(
        DRTune(num_train_steps=num_train_steps), num_steps=25, unet=with_lora(), decode=decode,
        rollout=rollout, reward=brightness, scale=1.0,
    )  # fmt: skip
    captions = {name: values[:1] for name, values in batch().items()}
    with live:
        run(step, captions)
    assert started
    return live.peak


def test_memory_of_replay_depends_neither_on_trained_steps_nor_on_merging_and_caching():
    run(make_step(DRTune(num_train_steps=1), num_steps=1))  # what the toys keep
    peaks = [peak_of_replay(k) for k in (1, 5, 25)]
    assert peaks[0] > 0
    assert max(peaks) <= 1.05 * min(peaks)
    plain = peak_of_replay(5, RolloutSettings(merge_lora=False))
    assert max(peaks) <= 1.05 * plain
