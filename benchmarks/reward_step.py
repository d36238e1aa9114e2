"""Time a step of reward fine-tuning against the official algorithm, in one process.

The official step records a graph over the chain, each trained step under activation checkpointing;
its adapters are never merged and drop a tenth of what they add in every call; it joins the text
contexts at each step, pads the reward's texts to 77 tokens and encodes images that it does not
need. It is written out plainly below. Ours is the step of the training module. Text encoders and
the optimizer are the same for both and are left out; so are random crops and the common direction.

    python benchmarks/reward_step.py
    python benchmarks/reward_step.py --size sd15 --device cuda
    python benchmarks/reward_step.py --quick --results FOLDER

Times on the CPU are CPU seconds of one thread, medians of runs that take turns. Memory is what a
process adds at its peak to the loaded models: a process forked for each variant, or what CUDA says.
"""

import argparse
import contextlib
import json
import math
import os
import platform
import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from benchmarks.full_size import peak_tflops, to_markdown
from benchmarks.reward_step_model import (
    GUIDANCE,
    SETTINGS,
    Models,
    PaddedReward,
    Setting,
    conditioning,
    lora_dropout,
)
from segalign.diffusion.guidance import Guidance
from segalign.diffusion.rollout import Rollout, RolloutSettings
from segalign.diffusion.step_cost import StepCost, achieved
from segalign.reward_tuning.settings import StepMemory
from segalign.reward_tuning.step import RewardStep, RewardStepSettings
from segalign.rewards.bound_reward import bind_reward
from segalign.rewards.latent_loss import LatentRewardLoss, RewardObjective
from segalign.truncation.drtune import DRTune
from segalign.truncation.engine import gradient_of_loss
from segalign.truncation.noise import CounterNoise

RESULTS = Path(__file__).parent / "results"
OBJECTIVE = RewardObjective(scale=0.5)


@dataclass(frozen=True, kw_only=True)
class Variant:
    """What a step does; the defaults are the official step's.

    Attributes:
        dropout: Share that adapters drop.
        merged: Merge adapters for the steps that are not trained.
        replay: Replay trained steps, instead of a graph over the chain.
        checkpointed: Recompute trained steps of the graph.
        prepared_text: Join the contexts once, and keep their keys and values.
        trimmed_text: Encode the reward's texts in passes of like lengths.
        encodes_images: Encode images for nothing.
        replay_size: Pairs that are replayed at a time; None is the number of samples.
        decode_size: Images that are decoded at a time; None is all.
        checkpointed_decode: Decode once more in the backward pass.
    """

    dropout: float = 0.1
    merged: bool = False
    replay: bool = False
    checkpointed: bool = True
    prepared_text: bool = False
    trimmed_text: bool = False
    encodes_images: bool = True
    replay_size: int | None = None
    decode_size: int | None = None
    checkpointed_decode: bool = False


OFFICIAL = Variant()
EXACT = Variant(dropout=0.0)
REMOVALS: dict[str, Callable[[Setting], Variant]] = {
    "adapters merged in the rollout": lambda _: replace(OFFICIAL, merged=True),
    "no dropout": lambda _: EXACT,
    "replay instead of the graph": lambda _: replace(OFFICIAL, replay=True),
    "text contexts prepared once": lambda _: replace(OFFICIAL, prepared_text=True),
    "reward texts trimmed": lambda _: replace(OFFICIAL, trimmed_text=True),
    "no images encoded": lambda _: replace(OFFICIAL, encodes_images=False),
    "decode in micro-batches": lambda s: replace(OFFICIAL, decode_size=s.micro_batches[1]),
    "decode checkpointed": lambda _: replace(OFFICIAL, checkpointed_decode=True),
}


def ours(setting: Setting) -> Variant:
    """Return our step, with everything removed and in micro-batches."""
    return Variant(
        dropout=0.0,
        merged=True,
        replay=True,
        prepared_text=True,
        trimmed_text=True,
        encodes_images=False,
        replay_size=setting.micro_batches[0],
        decode_size=setting.micro_batches[1],
    )


def run_step(models: Models, variant: Variant) -> None:
    """Add a step's gradient to ``.grad``."""
    models.reward.scorer.tower.clear_cache()
    step = replayed_step if variant.replay else recorded_step
    with models.precision(), lora_dropout(models.generator.unet, variant.dropout):
        if variant.encodes_images:
            encode_for_nothing(models)
        step(models, variant)


def encode_for_nothing(models: Models) -> None:
    """Make noisy latents of the images, of which the official step uses the shape."""
    generator = models.generator
    latents = generator.codec.encode(models.images)
    drawn = torch.randint(generator.schedule.num_timesteps, (len(latents),), device=latents.device)
    generator.schedule.add_noise(latents, torch.randn_like(latents), drawn)


def reward_of(models: Models, variant: Variant) -> Any:
    """Choose how the reward reads its texts."""
    return models.reward if variant.trimmed_text else PaddedReward(models.reward)


def replayed_step(models: Models, variant: Variant) -> None:
    """Take the step as the training module does."""
    setting = models.setting
    step = RewardStep(
        models.generator,
        reward_of(models, variant),
        RewardStepSettings(
            strategy=DRTune(num_train_steps=setting.num_train_steps),
            sampler=models.sampler,
            objective=OBJECTIVE,
            memory=StepMemory(
                replay_batch_size=variant.replay_size,
                decode_batch_size=variant.decode_size,
                checkpoint_decode=variant.checkpointed_decode,
            ),
            rollout=rollout_settings(variant),
        ),
        seed=0,
    )
    step.run(models.batch, conditioning(models.text.positive), 0)


def rollout_settings(variant: Variant) -> RolloutSettings:
    """Say how untrained steps are called; base weights in bfloat16 are never merged into."""
    merge = None if variant.merged else False
    return RolloutSettings(merge_lora=merge, cache_text=variant.prepared_text)


def recorded_step(models: Models, variant: Variant) -> None:
    """Take the official step, written out."""
    text, size = models.text, models.setting.batch_size
    trained = DRTune(num_train_steps=models.setting.num_train_steps).plan(
        models.setting.num_steps, seed=0, step=0
    )
    timesteps = models.sampler.timesteps(1000)
    squared = [float(models.generator.schedule.alphas_cumprod[t]) for t in timesteps] + [1.0]
    negative = text.negative.expand(size, -1, -1)
    joined = torch.cat([negative, text.positive]) if variant.prepared_text else None
    latents = start(models)
    with merged_calls(models, variant) as merged:
        for index, timestep in enumerate(timesteps):
            context = torch.cat([negative, text.positive]) if joined is None else joined
            seen = torch.cat([latents, latents]).detach()
            if index in trained.train_steps:
                eps = guided(models, seen, timestep, context, keep=not variant.checkpointed)
            elif merged is not None:
                eps = merged(latents.detach(), timestep)
            else:
                with torch.no_grad():
                    eps = guided(models, seen, timestep, context, keep=True)
            alpha, sigma = squared[index] ** 0.5, (1 - squared[index]) ** 0.5
            clean = (latents - sigma * eps) / alpha
            then = squared[index + 1]
            latents = then**0.5 * clean + (1 - then) ** 0.5 * eps
    score_and_differentiate(models, variant, clean)


def start(models: Models) -> Tensor:
    """Draw the noise that a run starts from, as our step does."""
    side = models.setting.latent_side
    return CounterNoise(
        seed=0,
        step=0,
        sample_ids=range(models.setting.batch_size),
        latent_shape=(4, side, side),
        device=models.setting.device,
        dtype=torch.promote_types(models.generator.unet.dtype, torch.float32),
    ).initial()


def guided(models: Models, seen: Tensor, timestep: int, context: Tensor, *, keep: bool) -> Tensor:
    """Call the network once for both prompts, keeping activations or the inputs alone."""
    unet = models.generator.unet

    def call(latents: Tensor, text: Tensor) -> Tensor:
        dtype = unet.dtype
        output = unet(latents.to(dtype), timestep, encoder_hidden_states=text.to(dtype)).sample
        return output.to(latents.dtype)

    both = call(seen, context) if keep else checkpoint(call, seen, context, use_reentrant=False)
    without, prompted = both.chunk(2)
    return without + GUIDANCE * (prompted - without)


@contextlib.contextmanager
def merged_calls(models: Models, variant: Variant) -> Any:
    """Merge the adapters for untrained steps, if the variant does."""
    if not variant.merged:
        yield None
        return
    text = models.text
    rollout = Rollout(models.generator, RolloutSettings())
    negative = text.encode_empty(models.setting.batch_size)
    positive = conditioning(text.positive)
    with rollout.denoiser(positive, negative, Guidance(scale=GUIDANCE)) as denoiser:
        yield denoiser


def score_and_differentiate(models: Models, variant: Variant, clean: Tensor) -> None:
    """Decode, score and run backward: at once, or the image first."""
    reward, size = reward_of(models, variant), models.setting.batch_size
    if variant.decode_size is None and not variant.checkpointed_decode:
        images = models.generator.codec.decode(clean).clamp(0, 1)
        ((1 - reward(images, models.captions)) * 0.5).mean().backward()
        return
    loss = LatentRewardLoss(
        decode=models.generator.codec.decode,
        bound=bind_reward(reward, models.captions),
        objective=OBJECTIVE,
        weights=torch.full((size,), 1 / size, device=clean.device),
        checkpoint=variant.checkpointed_decode,
    )
    rows = torch.arange(size, device=clean.device)
    _, gradient = gradient_of_loss(loss, clean, rows, variant.decode_size)
    clean.backward(gradient)


def gradient(models: Models, variant: Variant) -> Tensor:
    """Return the gradient of all trained weights, float64, in one row."""
    models.generator.unet.zero_grad(set_to_none=True)
    run_step(models, variant)
    found = [weight.grad for weight in models.trained()]
    models.generator.unet.zero_grad(set_to_none=True)
    return torch.cat([g.flatten().double().cpu() for g in found if g is not None])


def compare_gradients(models: Models) -> dict[str, float]:
    """Compare both steps' gradients, without dropout."""
    official, own = gradient(models, EXACT), gradient(models, ours(models.setting))
    return {
        "relative_l2": float((own - official).norm() / official.norm()),
        "cosine": float(torch.cosine_similarity(own, official, dim=0)),
        "norm": float(official.norm()),
    }


def timed(models: Models, variant: Variant) -> float:
    """Return CPU seconds of a step, or seconds of the clock on a GPU."""
    on_gpu = models.setting.device == "cuda"
    clock = time.perf_counter if on_gpu else time.process_time
    models.generator.unet.zero_grad(set_to_none=True)
    if on_gpu:
        torch.cuda.synchronize()
    begin = clock()
    run_step(models, variant)
    if on_gpu:
        torch.cuda.synchronize()
    return clock() - begin


def take_turns(
    models: Models, variants: dict[str, Variant], repeats: int
) -> dict[str, list[float]]:
    """Time variants by turns, every other round in the opposite order."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(repeats):
        names = list(variants) if number % 2 == 0 else list(variants)[::-1]
        for name in names:
            times[name].append(timed(models, variants[name]))
            print(f"{name}: {times[name][-1]:.2f} s", flush=True)
    return times


def added_memory(models: Models, variant: Variant, num_train_steps: int, tiny: Models) -> float:
    """Return the MiB that a step adds at its peak; infinity if it does not fit a GPU.

    All its steps are trained: untrained ones leave nothing behind.
    """
    setting = replace(models.setting, num_steps=num_train_steps, num_train_steps=num_train_steps)
    run = replace(models, setting=setting)
    run.generator.unet.zero_grad(set_to_none=True)
    if setting.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        try:
            run_step(run, variant)
        except torch.OutOfMemoryError:
            return math.inf
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    # A forked process counts code anew that it runs: a tiny step brings it in.
    return in_a_fork(lambda: run_step(run, variant), lambda: run_step(tiny, variant))


def in_a_fork(run: Callable[[], None], warm: Callable[[], None]) -> float:
    """Return the MiB by which the peak of a forked process grows after a first, tiny run."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        with contextlib.suppress(BaseException):
            warm()
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            run()
            after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            os.write(writing, str(after - before).encode())
            status = 0
        os._exit(status)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        found = pipe.read()
    _, status = os.waitpid(child, 0)
    if status:
        raise RuntimeError(f"expected the measured process to succeed; got status {status}")
    # At least what can be seen, so that there are ratios.
    return max(int(found), 1) / 1024


def measure_memory(models: Models, most_trained: tuple[int, ...]) -> dict[str, Any]:
    """Measure both steps and every removal at K, and the growth with K."""
    setting, own = models.setting, ours(models.setting)
    usual, tiny = setting.num_train_steps, Models.build(SETTINGS["quick"])
    variants = {"official": OFFICIAL, "official, no dropout": EXACT, "ours": own}
    variants |= {name: make(setting) for name, make in REMOVALS.items() if name != "no dropout"}
    growing = {
        "replay": own,
        "graph, checkpointed": replace(EXACT, encodes_images=False),
        "graph": replace(EXACT, encodes_images=False, checkpointed=False),
    }

    def added(name: str, variant: Variant, num_train_steps: int) -> float:
        mib = added_memory(models, variant, num_train_steps, tiny)
        print(f"{name}, K = {num_train_steps}: {mib:.0f} MiB", flush=True)
        return mib

    return {
        "added_mib": {name: added(name, v, usual) for name, v in variants.items()},
        "added_mib_by_k": {
            name: {str(k): added(name, v, k) for k in most_trained} for name, v in growing.items()
        },
    }


def measure_cost(models: Models) -> dict[str, float]:
    """Count the FLOPs of a sample of our step, without recomputation, and of the official one."""
    setting, generator = models.setting, models.generator
    shape = (4, setting.latent_side, setting.latent_side)
    scorer = models.reward.scorer
    cost = StepCost.measure(
        generator.unet, shape, *setting.text, decode=generator.codec.decode,
        reward=scorer.image_features,
    )  # fmt: skip
    calls, trained = [2] * setting.num_steps, [2] * setting.num_train_steps
    return {
        "tflop_per_sample": cost.per_sample(calls, trained, merged=True) / 1e12,
        "tflop_per_sample_official": cost.per_sample(calls, trained, merged=False, recompute=True)
        / 1e12,
    }


def measure(models: Models, options: argparse.Namespace) -> dict[str, Any]:
    """Measure everything; memory first, while nothing is left over from other steps."""
    setting = models.setting
    found: dict[str, Any] = {"load_average": os.getloadavg()}
    found |= measure_memory(models, options.trained)
    found["gradients"] = compare_gradients(models)
    both = {"official": OFFICIAL, "official, no dropout": EXACT, "ours": ours(setting)}
    times = take_turns(models, both, options.repeats)
    made = {name: make(setting) for name, make in REMOVALS.items()}
    if models.generator.unet.dtype == torch.bfloat16:
        # Nothing is merged into weights of low precision.
        made = {name: variant for name, variant in made.items() if not variant.merged}
    removals = {"official": OFFICIAL} | made
    found["removals"] = take_turns(models, removals, options.removal_repeats)
    found |= {"seconds": times, "load_average_after": os.getloadavg(), **measure_cost(models)}
    if setting.device == "cpu":
        # Last, since it widens the networks: what is left of a difference is rounding.
        found["gradients_float64"] = compare_gradients(models.in_float64())
    medians = {name: statistics.median(values) for name, values in times.items()}
    memory = found["added_mib"]
    found["speedup"] = medians["official"] / medians["ours"]
    found["speedup_at_no_dropout"] = medians["official, no dropout"] / medians["ours"]
    found["memory_ratio"] = memory["ours"] / memory["official"]
    if peak := (peak_tflops(torch.device("cuda")) if setting.device == "cuda" else None):
        work = found["tflop_per_sample"] * 1e12 * setting.batch_size
        found["mfu"] = achieved(work, medians["ours"], peak * 1e12).mfu
    return found


def to_text(found: dict[str, Any], options: argparse.Namespace) -> str:
    """Write the tables."""
    goals = (1.8, 0.6) if options.device == "cuda" else (1.2, 0.6)
    times = {name: statistics.median(values) for name, values in found["seconds"].items()}
    memory, removals = found["added_mib"], found["removals"]
    main = [["step", "seconds, median", "memory added, MiB"]]
    main += [[name, f"{times[name]:.2f}", f"{memory[name]:.0f}"] for name in times]
    base = statistics.median(removals["official"])
    single = [["one change to the official step", "time", "memory added"]]
    for name in removals:
        if name != "official":
            share = statistics.median(removals[name]) / base - 1
            held = memory.get(name, memory["official, no dropout"]) / memory["official"] - 1
            single.append([name, f"{100 * share:+.1f} %", f"{100 * held:+.1f} %"])
    by_k = found["added_mib_by_k"]
    header = ["memory added, MiB", *(f"K = {k}" for k in by_k["replay"])]
    growth = [header] + [[n, *(f"{v:.0f}" for v in row.values())] for n, row in by_k.items()]
    same = found["gradients"]
    exact = f"relative difference {same['relative_l2']:.1e}, cosine {same['cosine']:.10f}"
    if wide := found.get("gradients_float64"):
        exact += f"; in float64 {wide['relative_l2']:.1e}"
    lines = [
        f"Faster than the official step {found['speedup']:.2f}x (goal {goals[0]}x).",
        f"Faster than it is without dropout {found['speedup_at_no_dropout']:.2f}x.",
        f"Memory added {found['memory_ratio']:.2f}x the official step's (goal {goals[1]}x).",
        f"Gradients without dropout: {exact}.",
    ]
    if "mfu" in found:
        lines.append(f"MFU {100 * found['mfu']:.1f} % (goal 30 %).")
    load = found["load_average"][0], found["load_average_after"][0]
    lines.append(
        f"{found['machine']}, torch {found['torch']}, {found['threads']} thread(s), load "
        f"{load[0]:.1f} before and {load[1]:.1f} after; {len(found['seconds']['ours'])} runs, "
        f"{len(removals['official'])} of each change."
    )
    tables = "\n\n".join(map(to_markdown, (main, single, growth)))
    return f"`benchmarks/reward_step.py`, {found['setting']['name']}.\n\n" + "\n".join(
        [*lines, "", tables, ""]
    )


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", choices=("small", "sd15"), default="small")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quick", action="store_true", help="tiny networks, to see that it runs")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--removal-repeats", type=int, default=3)
    parser.add_argument("--trained", type=int, nargs="+", default=[1, 5, 25], help="K, for memory")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    if options.device == "cpu":
        torch.set_num_threads(1)
    setting = replace(SETTINGS["quick" if options.quick else options.size], device=options.device)
    if options.quick:
        options.repeats, options.removal_repeats, options.trained = 1, 1, [1, 2]
    models = Models.build(setting)
    on_gpu = options.device == "cuda"
    found = {
        "setting": asdict(setting),
        "machine": torch.cuda.get_device_name() if on_gpu else platform.machine(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "unet_parameters": sum(p.numel() for p in models.generator.unet.parameters()),
        "lora_parameters": sum(p.numel() for p in models.trained()),
        **measure(models, options),
    }
    text = to_text(found, options)
    print(text, end="")
    options.results.mkdir(parents=True, exist_ok=True)
    name = "reward_step_cuda" if on_gpu else "reward_step"
    (options.results / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")
    (options.results / f"{name}.md").write_text(text)
    return found


if __name__ == "__main__":
    main()
