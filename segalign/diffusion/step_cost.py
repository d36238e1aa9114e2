"""FLOPs of a step of reward fine-tuning: what its pieces take, and how they add up.

Pieces are counted on the meta device, where nothing is computed, so that a run can say how much of
the device's peak it uses. One multiplication with addition is 2 FLOPs.

Dims: T steps that run, K trained ones, L text tokens, D text width, c/h/w latents, H/W pixels.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from segalign.diffusion.flop_count import (
    META,
    backward_flops,
    count_flops,
    forward_and_backward,
    run_on_meta,
)
from segalign.diffusion.guidance import Guidance
from segalign.truncation.plan import TruncationPlan


class Throughput(NamedTuple):
    """How fast work was done.

    Attributes:
        tflops_per_second: 10^12 FLOPs per second.
        mfu: Share of the device's peak, or None where that is not known.
    """

    tflops_per_second: float
    mfu: float | None


@dataclass(frozen=True, kw_only=True)
class StepCost:
    """The pieces of a step, each for one sample.

    Attributes:
        forward: F, FLOPs of the network without LoRA.
        lora: The network with LoRA, unmerged, in units of F; 1 without LoRA.
        backward: Its backward pass to the trained weights, in units of F.
        decode: D, FLOPs of the decoder forward and back to the latents; absolute.
        reward: R, FLOPs of the rewards' image towers forward and back to the image; absolute.
    """

    forward: float
    lora: float = 1.0
    backward: float = 1.0
    decode: float = 0.0
    reward: float = 0.0

    @classmethod
    def measure(
        cls,
        unet: UNet2DConditionModel,
        latent_shape: tuple[int, int, int],
        text_length: int,
        text_width: int,
        *,
        decode: Callable[[Tensor], Tensor] | None = None,
        reward: Callable[[Tensor], Tensor] | Sequence[Callable[[Tensor], Tensor]] = (),
    ) -> "StepCost":
        """Count the pieces of a model; neither weights nor their gradients are read or changed.

        Recomputation of activations is left out.

        Args:
            unet: The network with its adapters; its config is all that is used, and which of its
                weights are trained.
            latent_shape: (c, h, w).
            text_length: L.
            text_width: D.
            decode: Latents ``(1, c, h, w)`` to images: a module, or a method of one.
            reward: Images to image features: a module, a method of one, or several, which add up.
                They must not look at values, as checks for NaN do.

        Raises:
            ValueError: If there is a reward and no decoder to make its images.
        """
        latents = torch.empty(1, *latent_shape, device=META, requires_grad=True)
        text = torch.empty(1, text_length, text_width, device=META)
        forward, lora, backward = _count_network(unet, latents.detach(), text)
        towers = list(reward) if isinstance(reward, Sequence) else [reward]
        if decode is None:
            if towers:
                raise ValueError("expected a decoder for the images of the rewards; got none")
            return cls(forward=forward, lora=lora / forward, backward=backward / forward)
        images = run_on_meta(decode, (latents,)).output.detach().requires_grad_()
        return cls(
            forward=forward,
            lora=lora / forward,
            backward=backward / forward,
            decode=forward_and_backward(decode, latents),
            reward=sum(forward_and_backward(tower, images) for tower in towers),
        )

    def per_sample(
        self,
        guided_steps: Sequence[int],
        trained: Sequence[int],
        *,
        merged: bool,
        recompute: bool = False,
        num_images: int = 1,
        num_references: int = 0,
    ) -> float:
        """Add up a step: ``F (lambda_s sum_t g_t + sum_k g_k (rho lambda + beta)) + D + R``.

        Backward is counted, not twice forward: with few trained weights it is little more than one.

        Args:
            guided_steps: g_t, network calls of each step that runs: 2 with guidance, 1 without.
            trained: g_k, calls of each trained step.
            merged: Whether LoRA is merged where no gradient is needed: lambda_s is 1.
            recompute: Whether trained steps are called once more, by replay or checkpointing: rho
                is 1. Without it, FLOPs that any implementation has to do, as MFU counts them.
            num_images: Images that are decoded and scored.
            num_references: Calls of the network without LoRA for a penalty, one for each trained
                step.

        Returns:
            FLOPs of one sample.
        """
        rollout = (1.0 if merged else self.lora) * sum(guided_steps) + num_references
        gradient = sum(trained) * (self.lora * recompute + self.backward)
        return self.forward * (rollout + gradient) + num_images * (self.decode + self.reward)

    def for_plan(
        self,
        plan: TruncationPlan,
        guidance: Guidance,
        timesteps: Sequence[int],
        num_timesteps: int,
        *,
        merged: bool,
        recompute: bool = False,
        penalty: bool = False,
    ) -> float:
        """Add up the step of a plan.

        Steps after the scored one do not run; each re-noised copy runs and trains the last step
        once more, and is decoded and scored.

        Args:
            plan: Which steps run and are trained.
            guidance: Decides on calls per step.
            timesteps: Noise indices of the sampler's steps, noisiest first.
            num_timesteps: Number of training timesteps.
            merged: See `per_sample`.
            recompute: See `per_sample`.
            penalty: Whether trained steps are compared with the network without LoRA.

        Returns:
            FLOPs of one sample.
        """
        copies = [plan.last_step] * plan.num_renoised

        def calls(index: int) -> int:
            return 1 + guidance.is_active(timesteps[index], num_timesteps)

        def trained_calls(index: int) -> int:
            # A term with no weight in the output is not replayed, but for its penalty.
            conditional, other = guidance.weights(timesteps[index], num_timesteps)
            return (conditional != 0 or penalty) + (other != 0)

        return self.per_sample(
            [calls(index) for index in [*range(plan.last_step + 1), *copies]],
            [trained_calls(index) for index in [*plan.train_steps, *copies]],
            merged=merged,
            recompute=recompute,
            num_images=1 + plan.num_renoised,
            num_references=len(plan.train_steps) if penalty else 0,
        )


def achieved(flops: float, seconds: float, peak: float | None = None) -> Throughput:
    """Relate work to time.

    Args:
        flops: FLOPs that were done.
        seconds: Time they took.
        peak: FLOPs per second that the devices can do at most.
    """
    rate = flops / seconds
    return Throughput(rate / 1e12, rate / peak if peak else None)


def _count_network(
    unet: UNet2DConditionModel, latents: Tensor, text: Tensor
) -> tuple[float, float, float]:
    """Count forward without and with adapters, and backward.

    A network like it is made from its config: what a run compiles, merges or hooks is not there.
    """
    unet = getattr(unet, "_orig_mod", unet)
    with META:
        plain = UNet2DConditionModel.from_config(unet.config).eval()
        forward = count_flops(_Denoising(plain), latents, text, backward=False)
        for name, adapter in getattr(unet, "peft_config", {}).items():
            plain.add_adapter(copy.deepcopy(adapter), adapter_name=name)
    trained = {name for name, weight in unet.named_parameters() if weight.requires_grad}
    for name, weight in plain.named_parameters():
        weight.requires_grad_(name in trained)
    ran = run_on_meta(_Denoising(plain), (latents, text))
    wanted = [weight for weight in ran.weights if weight.requires_grad]
    backward = backward_flops(ran.output, wanted) if wanted else 0.0
    return forward, ran.flops, backward


class _Denoising(nn.Module):
    """A network with what SDXL wants besides text."""

    def __init__(self, unet: UNet2DConditionModel) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, latents: Tensor, text: Tensor) -> Tensor:
        """Denoise."""
        timesteps = torch.zeros(len(latents), dtype=torch.int64, device=latents.device)
        output: Tensor = self.unet(
            latents,
            timesteps,
            encoder_hidden_states=text,
            added_cond_kwargs=self._added_conditions(latents),
        ).sample
        return output

    def _added_conditions(self, latents: Tensor) -> dict[str, Tensor] | None:
        config: Any = self.unet.config
        if config.addition_embed_type != "text_time":
            return None
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        return {
            "text_embeds": latents.new_empty(len(latents), pooled),
            "time_ids": latents.new_empty(len(latents), 6),
        }
