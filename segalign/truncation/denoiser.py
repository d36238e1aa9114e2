"""The network of a rollout: bound to a batch of captions, guidance included.

Dims: B batch, M rows of a call, c/h/w latents.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from segalign.diffusion.guidance import Guidance
from segalign.errors import ConfigError
from segalign.text.conditioning import TextConditioning

# (latents (M, c, h, w), timesteps int64 (M,), rows int64 (M,)) -> output (M, c, h, w). ``rows``
# says which caption of the batch each row of the latents has; None is all of them, in order.
RowNetwork = Callable[[Tensor, Tensor, Tensor | None], Tensor]


@dataclass(frozen=True)
class Branch:
    """A term of the guided output that is linear in one call of the network.

    Attributes:
        network: The call.
        weight: Factor of its output at a timestep.
    """

    network: RowNetwork
    weight: Callable[[int], float]


@dataclass(frozen=True, kw_only=True)
class GuidedDenoiser:
    """A network under classifier-free guidance.

    Args:
        conditional: The network with the captions.
        unconditional: The network with the negative prompt; needed where guidance is on.
        guidance: Scale, interval and rescaling.
        num_timesteps: Number of training timesteps.

    Raises:
        ConfigError: If guidance is on and there is no negative prompt.
    """

    conditional: RowNetwork
    unconditional: RowNetwork | None = None
    guidance: Guidance = Guidance()  # noqa: RUF009
    num_timesteps: int = 1000

    def __post_init__(self) -> None:
        """Check that guidance has what it needs."""
        if self.guidance.scale != 1 and self.unconditional is None:
            raise ConfigError(
                f"expected a negative prompt for guidance of {self.guidance.scale}; got none. "
                "Give `unconditional`, or set the scale to 1."
            )

    def __call__(self, latents: Tensor, timestep: int, rows: Tensor | None = None) -> Tensor:
        """Call the network at one timestep.

        Args:
            latents: ``(M, c, h, w)``.
            timestep: Noise index of all rows.
            rows: Which caption each row has; None is all of them, in order.

        Returns:
            Guided output ``(M, c, h, w)``, differentiable in weights and latents.
        """
        return self.outputs(latents, timestep, rows)[0]

    def outputs(
        self, latents: Tensor, timestep: int, rows: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Call the network as above; return the guided output and the conditional one in it."""
        timesteps = torch.full((len(latents),), timestep, device=latents.device)
        output = self.conditional(latents, timesteps, rows)
        if self.unconditional is None or not self.guidance.is_active(timestep, self.num_timesteps):
            return output, output
        return self.guidance.combine(output, self.unconditional(latents, timesteps, rows)), output

    def branches(self) -> tuple[Branch, ...]:
        """Split the guided output into its terms, w and 1 - w.

        Raises:
            ConfigError: If guidance is not linear in the outputs.
        """
        self.guidance.require_linear()
        conditional = Branch(self.conditional, lambda timestep: self._weights(timestep)[0])
        if self.unconditional is None:
            return (conditional,)
        return conditional, Branch(self.unconditional, lambda timestep: self._weights(timestep)[1])

    def _weights(self, timestep: int) -> tuple[float, float]:
        return self.guidance.weights(timestep, self.num_timesteps)


@dataclass(frozen=True)
class TextNetwork:
    """A text-conditioned network, bound to a batch of captions.

    Args:
        predict: Network call ``(latents, timesteps, text) -> output``.
        text: Conditioning of the ``B`` captions.
    """

    predict: Callable[[Tensor, Tensor, TextConditioning], Tensor]
    text: TextConditioning

    def __call__(self, latents: Tensor, timesteps: Tensor, rows: Tensor | None = None) -> Tensor:
        """Call the network: see ``RowNetwork``."""
        text = self.text if rows is None else self.text.select(rows)
        return self.predict(latents, timesteps, text)
