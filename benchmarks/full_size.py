"""Parameters, memory, FLOPs and speed of stage 1 at full size, with random weights.

On the meta device, the default, everything is counted and nothing is computed::

    python benchmarks/full_size.py --save
    python benchmarks/full_size.py --device cuda --batch-size 16 --save
    python benchmarks/full_size.py --device cpu --size tiny --batch-size 2 --steps 2

A GPU also measures seconds of a step, images per second, peak memory and the share of the GPU's
peak that the counted FLOPs make up (MFU; recomputation is not counted).
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from segalign.diffusion.bundle import DiffusionBundle
from segalign.diffusion.generator import TextToImage
from segalign.diffusion.lora import LoraSettings
from segalign.diffusion.pretrained import PretrainedModel
from segalign.text.settings import T5Branch, TextEncoding
from segalign.text.t5_encoder import T5Encoder

RESULTS = Path(__file__).parent / "results"
# Dense bfloat16 TFLOP/s by the makers' data sheets.
PEAKS = {"H100": 989.0, "H200": 989.0, "A100": 312.0, "L40S": 362.0, "L4": 121.0, "4090": 165.0}
NUM_SEGMENTS, SEGMENT_TOKENS = 12, 20
WORDS = ("a", "red", "old", "house", "near", "the", "lake", "with", "tall", "trees", "and", "grey")


@dataclass(frozen=True, kw_only=True)
class StageOne:
    """The networks of stage 1: frozen parts in one precision, LoRA and adapter in float32."""

    bundle: DiffusionBundle
    t5: T5Encoder
    text: TextEncoding

    @classmethod
    def build(cls, size: str, device: torch.device, *, checkpointing: bool = False) -> "StageOne":
        """Build everything with random weights, as ``configs/longsd_align.yaml`` does."""
        source = PretrainedModel(
            init="random",
            size=size,
            dtype="bfloat16",
            gradient_checkpointing=checkpointing,
            channels_last=device.type == "cuda",
        )
        bundle = source.load(device)
        LoraSettings(rank=32 if size == "sd15" else 4).add_to(bundle.unet)
        t5 = T5Branch(model="large" if size == "sd15" else "tiny", init="random", dtype="bfloat16")
        text = TextEncoding(context="clip+t5", t5=t5)
        with torch.device(device):
            models = text.complete(bundle.text_models, bundle.unet.config.cross_attention_dim)
        assert models.t5 is not None
        models.text_model.requires_grad_(requires_grad=False)
        bundle.codec.vae.requires_grad_(requires_grad=False)
        return cls(bundle=replace(bundle, text_models=models), t5=models.t5, text=text)

    def networks(self) -> dict[str, nn.Module]:
        """Name the networks."""
        assert self.t5.adapter is not None
        return {
            "UNet with LoRA": self.bundle.unet,
            "VAE": self.bundle.codec.vae,
            "CLIP text model": self.bundle.text_models.text_model,
            "T5 encoder": self.t5.model,
            "adapter": self.t5.adapter,
        }

    def trained(self) -> list[nn.Parameter]:
        """List the trained parameters."""
        found = [p for part in self.networks().values() for p in part.parameters()]
        return [p for p in found if p.requires_grad]


def count_flops(run: Callable[[], Tensor]) -> tuple[float, Tensor]:
    """Return the FLOPs of a function (2 for a multiplication with addition), and its result."""
    with FlopCounterMode(display=False) as counter:
        result = run()
    return float(counter.get_total_flops()), result


def unet_call(unet: nn.Module, context: Tensor) -> Tensor:
    """Denoise one sample of the network's native size."""
    side = unet.config.sample_size
    latents = context.new_empty(1, unet.config.in_channels, side, side)
    timesteps = torch.zeros(1, dtype=torch.long, device=context.device)
    output: Tensor = unet(latents, timesteps, encoder_hidden_states=context).sample
    return output


def flops_per_image(stage: StageOne) -> dict[str, float]:
    """Count the FLOPs of a training step for one image, part by part.

    The caption has 12 segments of 20 tokens. The generator reads 240 tokens of CLIP, which carry no
    gradient, and 240 of T5, which do: into the adapter.
    """
    bundle, t5 = stage.bundle, stage.t5
    unet, vae, text_model = bundle.unet, bundle.codec.vae, bundle.text_models.text_model
    device, dtype = unet.device, torch.bfloat16
    image = torch.empty(1, 3, bundle.image_size, bundle.image_size, device=device, dtype=dtype)
    ids = partial(torch.zeros, dtype=torch.long, device=device)
    flops: dict[str, float] = {}
    with torch.no_grad():
        flops["VAE encode"], _ = count_flops(lambda: vae.encode(image).latent_dist.mode())
        segments = ids(NUM_SEGMENTS, SEGMENT_TOKENS)
        clip = partial(text_model, segments)
        flops["CLIP, 12 segments of 20"], _ = count_flops(lambda: clip().last_hidden_state)
        whole = partial(t5.model, input_ids=ids(1, t5.token_budget))
        flops["T5, 240 tokens"], features = count_flops(lambda: whole().last_hidden_state)
    assert t5.adapter is not None
    adapter = partial(t5.adapter, features)
    flops["adapter forward"], adapted = count_flops(adapter)
    width = adapted.shape[-1]
    clip_part = torch.empty(1, stage.text.token_budget, width, device=device, dtype=dtype)
    context = torch.cat([clip_part, adapted.detach().to(dtype)], dim=1).requires_grad_()
    flops["UNet forward with LoRA"], output = count_flops(lambda: unet_call(unet, context))
    flops["UNet backward"], _ = count_flops(lambda: backward(output))
    flops["adapter backward"], _ = count_flops(lambda: backward(adapted))
    return flops


def backward(output: Tensor) -> Tensor:
    """Run backward from the sum of an output."""
    total = output.float().sum()
    total.backward()
    return total


def parameter_table(stage: StageOne) -> list[list[str]]:
    """List parameters and bytes of each network's weights."""
    rows = [["network", "parameters", "of them trained", "weights MB, as here", "in float32"]]
    for name, part in stage.networks().items():
        parameters = list(part.parameters())
        count = sum(p.numel() for p in parameters)
        trained = sum(p.numel() for p in parameters if p.requires_grad)
        held = sum(p.numel() * p.element_size() for p in parameters)
        rows.append(
            [name, f"{count:,}", f"{trained:,}", f"{held / 1e6:,.0f}", f"{count * 4 / 1e6:,.0f}"]
        )
    return rows


def flops_table(flops: dict[str, float], batch_size: int) -> list[list[str]]:
    """List the FLOPs of each part of a step."""
    total = sum(flops.values())
    rows = [["part of a step", "TFLOP per image", f"per step of {batch_size}", "share"]]
    for name, value in {**flops, "in all": total}.items():
        per_step = f"{value * batch_size / 1e12:,.2f}"
        rows.append([name, f"{value / 1e12:.4f}", per_step, f"{100 * value / total:.1f} %"])
    return rows


def make_captions(batch_size: int) -> list[str]:
    """Make long captions, all different, of 12 sentences."""
    draw = torch.Generator().manual_seed(0)

    def sentence() -> str:
        chosen = torch.randint(len(WORDS), (SEGMENT_TOKENS - 3,), generator=draw).tolist()
        return " ".join(WORDS[index] for index in chosen).capitalize() + "."

    return [" ".join(sentence() for _ in range(NUM_SEGMENTS)) for _ in range(batch_size)]


def make_generator(stage: StageOne) -> TextToImage:
    """Put text encoding and network together as the training module does."""
    bundle = stage.bundle
    return TextToImage(
        bundle.unet,
        stage.text.build(bundle.text_models),
        bundle.codec,
        bundle.schedule,
        image_size=bundle.image_size,
        mask_padding=False,
    )


def training_step(
    stage: StageOne, generator: TextToImage, optimizer: torch.optim.Optimizer, batch_size: int
) -> None:
    """Run one optimizer step on random images and captions that no cache has seen."""
    bundle, device = stage.bundle, stage.bundle.unet.device
    generator.conditioner.clear_cache()
    images = torch.rand(batch_size, 3, bundle.image_size, bundle.image_size, device=device)
    with torch.autocast(device.type, torch.bfloat16):
        text = generator.conditioner(make_captions(batch_size))
        latents = bundle.codec.encode(images)
        noise = torch.randn_like(latents)
        timesteps = torch.randint(bundle.schedule.num_timesteps, (batch_size,), device=device)
        noisy = bundle.schedule.add_noise(latents, noise, timesteps)
        loss = F.mse_loss(generator.predict(noisy, timesteps, text).float(), noise)
    loss.backward()
    nn.utils.clip_grad_norm_(stage.trained(), 0.3)
    optimizer.step()
    optimizer.zero_grad()


def measure(
    stage: StageOne, batch_size: int, steps: int, *, flops: float, peak: float | None
) -> list[list[str]]:
    """Time training steps.

    Args:
        stage: The networks, on a GPU or the CPU.
        batch_size: Images of a step.
        steps: Timed steps, after a fifth as many that are not timed.
        flops: FLOPs per image.
        peak: The device's TFLOP/s, for the MFU.
    """
    device = stage.bundle.unet.device
    optimizer = torch.optim.AdamW(stage.trained(), lr=3e-5)
    generator = make_generator(stage)
    seconds = []
    for number in range(-max(1, steps // 5), steps):
        start = time.perf_counter()
        training_step(stage, generator, optimizer, batch_size)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if number >= 0:
            seconds.append(time.perf_counter() - start)
    median = statistics.median(seconds)
    rows = [
        ["measured", device_name(device)],
        ["batch size", str(batch_size)],
        ["seconds of a step, median", f"{median:.4f}"],
        ["slowest of " + str(steps), f"{max(seconds):.4f}"],
        ["images per second", f"{batch_size / median:.2f}"],
    ]
    if device.type == "cuda":
        rows.append(["peak memory, GB", f"{torch.cuda.max_memory_allocated(device) / 1e9:.2f}"])
    if peak is not None:
        rate = flops * batch_size / median / 1e12
        rows.append(["TFLOP/s", f"{rate:.1f}"])
        rows.append([f"MFU of {peak:.0f} TFLOP/s", f"{100 * rate / peak:.1f} %"])
    return rows


def device_name(device: torch.device) -> str:
    """Name a device as its maker does."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def peak_tflops(device: torch.device) -> float | None:
    """Look the device's peak up; None if it is not known."""
    name = device_name(device)
    return next((peak for key, peak in PEAKS.items() if key in name), None)


def to_markdown(rows: list[list[str]]) -> str:
    """Format a table whose first row is the header."""
    header, *body = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([header, f"|{'---|' * len(rows[0])}", *body])


def main() -> None:
    """Count, measure if the device computes, print, and save if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=["meta", "cpu", "cuda"], default="meta")
    parser.add_argument("--size", choices=["sd15", "tiny"], default="sd15")
    parser.add_argument("--batch-size", type=int, default=16, help="images of a step")
    parser.add_argument("--steps", type=int, default=20, help="timed steps")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--peak-tflops", type=float, help="of a device that is not known here")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results too")
    args = parser.parse_args()

    counted = StageOne.build(args.size, torch.device("meta"))
    flops = flops_per_image(counted)
    tables = [parameter_table(counted), flops_table(flops, args.batch_size)]
    if args.device != "meta":
        device = torch.device(args.device)
        stage = StageOne.build(args.size, device, checkpointing=args.gradient_checkpointing)
        peak = args.peak_tflops or peak_tflops(device)
        total = sum(flops.values())
        tables.append(measure(stage, args.batch_size, args.steps, flops=total, peak=peak))
    text = "\n\n".join(map(to_markdown, tables)) + "\n"
    print(text, end="")
    if args.save:
        name = "full_size" if args.device == "meta" else f"full_size_{args.device}"
        header = f"`python benchmarks/full_size.py`, {args.size}, {args.device} device.\n\n"
        (RESULTS / f"{name}.md").write_text(header + text)


if __name__ == "__main__":
    main()
