"""Penalties on what the network says at the trained steps, to keep it near a reference.

Dims: B batch, M rows of a call, K trained steps, T training timesteps, c/h/w latents.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor, nn

from segalign.diffusion.disabled_lora import disabled_lora
from segalign.errors import ConfigError
from segalign.truncation.chain import Chain
from segalign.truncation.denoiser import GuidedDenoiser, RowNetwork

PenaltyKind = Literal["l2", "kl"]


class OutputPenalty(Protocol):
    """A loss of the network's own outputs, besides that of the images."""

    def __call__(self, outputs: Tensor, latents: Tensor, timesteps: Tensor, rows: Tensor) -> Tensor:
        """Penalise trained outputs; the sum of all is differentiated.

        Args:
            outputs: What the trained network says with the captions, before guidance,
                ``(M, c, h, w)``; carries gradient to the weights, not to earlier steps.
            latents: What it saw, ``(M, c, h, w)``, without gradient.
            timesteps: Noise indices, int64 ``(M,)``.
            rows: Which caption each row has, int64 ``(M,)``.

        Returns:
            Penalties ``(M,)``.
        """
        ...


@dataclass(frozen=True, eq=False, kw_only=True)
class ReferencePenalty:
    """Distance of the outputs from those of a reference network on the same latents.

    Args:
        reference: The reference, with the same captions; called without gradient. Over adapters it
            is `WithoutLora`, else a frozen copy.
        row_weights: Factor of each sample, ``(B,)``: those of its loss; 0 leaves a sample out.
        kind: ``l2`` is the mean of the squared differences over the elements of a sample; ``kl``
            is their sum, as the divergence of Gaussians has it.
        step_scale: Factor at each timestep, ``(T,)``.
    """

    reference: RowNetwork
    row_weights: Tensor
    kind: PenaltyKind
    step_scale: Tensor

    @classmethod
    def of(
        cls,
        chain: Chain,
        denoiser: GuidedDenoiser,
        reference: RowNetwork,
        row_weights: Tensor,
        *,
        weight: float,
        kind: PenaltyKind = "l2",
    ) -> "ReferencePenalty":
        """Tabulate the factors of a run: ``weight / K`` times those of the kind.

        For ``l2`` there is no further factor. For ``kl`` it is ``(w b)^2 / (2 s^2)`` with the
        guidance weight w of the conditional output, the output's factor b and the injected noise's
        standard deviation s: the divergence of the sampler's Gaussian transition from the one that
        the reference would take from the same latents, if only the conditional output differed.
        The last step that runs injects no noise, so it has no divergence and adds 0, also where it
        is the only trained step.

        Args:
            chain: The run.
            denoiser: The trained network, for its guidance.
            reference: The reference.
            row_weights: Factor of each sample, ``(B,)``.
            weight: Factor of the whole, at least 0.
            kind: What is measured.

        Raises:
            ConfigError: If a setting is out of its range; for ``kl``, if the run injects no noise
                (``eta`` of 0), also at one trained step before the last, if guidance is rescaled,
                or if steps are not linear recursions.
        """
        check_penalty_settings(kind, weight)
        trained = chain.plan.train_steps
        factors = (
            _divergence_factors(chain, denoiser)
            if kind == "kl"
            else dict.fromkeys((chain.timesteps[index] for index in trained), 1.0)
        )
        scale = weight / len(trained)
        step_scale = _table(factors, denoiser.num_timesteps).to(row_weights) * scale
        return cls(reference=reference, row_weights=row_weights, kind=kind, step_scale=step_scale)

    def __call__(self, outputs: Tensor, latents: Tensor, timesteps: Tensor, rows: Tensor) -> Tensor:
        """Measure the distances: see `OutputPenalty`."""
        with torch.no_grad():
            expected = self.reference(latents, timesteps, rows)
        wide = torch.promote_types(outputs.dtype, torch.float32)
        squares = (outputs.to(wide) - expected.to(wide)).square().flatten(1)
        distances = squares.mean(1) if self.kind == "l2" else squares.sum(1)
        return self.step_scale[timesteps] * self.row_weights[rows] * distances


@dataclass(frozen=True)
class WithoutLora:
    """A network as it was before its adapters: the reference of LoRA fine-tuning.

    Args:
        network: The trained network, bound to the captions.
        model: The model in it that has the adapters.
    """

    network: RowNetwork
    model: nn.Module

    def __call__(self, latents: Tensor, timesteps: Tensor, rows: Tensor | None = None) -> Tensor:
        """Call the network: see ``RowNetwork``."""
        with disabled_lora(self.model):
            return self.network(latents, timesteps, rows)


def check_penalty_settings(kind: str, weight: float) -> None:
    """Refuse a kind that is not known, or a factor that is none.

    Raises:
        ConfigError: If one is out of its range.
    """
    if kind not in get_args(PenaltyKind):
        known = ", ".join(f"`{option}`" for option in get_args(PenaltyKind))
        raise ConfigError(f"penalty `kind` must be one of {known}; got {kind!r}. Choose one.")
    if not (math.isfinite(weight) and weight >= 0):
        raise ConfigError(f"penalty `weight` must be at least 0; got {weight}. Correct it.")


def check_penalties(penalties: Tensor, num_rows: int) -> None:
    """Refuse penalties that are not one for each row.

    Raises:
        ConfigError: If their shape is another.
    """
    if penalties.shape != (num_rows,):
        raise ConfigError(
            f"expected one penalty for each of {num_rows} rows; got shape "
            f"{tuple(penalties.shape)}. Return a row of penalties."
        )


def _divergence_factors(chain: Chain, denoiser: GuidedDenoiser) -> dict[int, float]:
    """Return the factor of the squared distance by timestep; the last step has none."""
    if denoiser.guidance.rescale:
        raise ConfigError(
            "expected guidance without `rescale` for a penalty of kind `kl`; got "
            f"{denoiser.guidance.rescale}. Set it to 0, or use kind `l2`."
        )
    if chain.steps is None:
        raise ConfigError(
            "expected a sampler of linear steps that inject noise for a penalty of kind `kl`; got "
            "one that is multistep or clips. Use DDIM with `eta` > 0, or kind `l2`."
        )
    last = len(chain.steps) - 1
    silent = [index for index, step in enumerate(chain.steps) if not step.noise]
    trained = [index for index in silent if index < last and index in chain.plan.train_steps]
    if trained or len(silent) == len(chain.steps):
        raise ConfigError(
            "expected steps that inject noise for a penalty of kind `kl`; got none at step "
            f"{(trained or silent)[0]} of {len(chain.steps)}. Raise the sampler's `eta`, or use "
            "kind `l2`."
        )
    factors = {}
    for index in chain.plan.train_steps:
        step = chain.steps[index]
        if step.noise:
            guided, _ = denoiser.guidance.weights(step.timestep, denoiser.num_timesteps)
            factors[step.timestep] = (guided * step.b / step.noise) ** 2 / 2
    return factors


def _table(factors: Mapping[int, float], num_timesteps: int) -> Tensor:
    """Write factors by timestep into a table, float64 ``(T,)``; 0 where there is none."""
    table = torch.zeros(num_timesteps, dtype=torch.float64)
    for timestep, factor in factors.items():
        table[timestep] = factor
    return table
