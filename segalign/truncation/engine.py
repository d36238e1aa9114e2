"""What the two engines of truncated back-propagation share.

Dims: B batch, M rows of a call, K trained steps, n re-noised copies, c/h/w latents.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from segalign.errors import ConfigError, NonFiniteError
from segalign.truncation.chain import Chain
from segalign.truncation.denoiser import GuidedDenoiser
from segalign.truncation.noise import RolloutNoise
from segalign.truncation.penalty import OutputPenalty

# (clean latents (M, c, h, w), rows int64 (M,)) -> losses (M,), decode and reward; their sum over
# the batch is what is differentiated. ``rows`` says which caption each row has.
LossOfLatents = Callable[[Tensor, Tensor], Tensor]
# (scalar to back-propagate, whether it is the last of the run): where gradients of several ranks
# are reduced, all but the last can skip it.
Backward = Callable[[Tensor, bool], None]


@dataclass(frozen=True, eq=False)
class GradientReport:
    """What a run found, without gradient.

    Attributes:
        latents: The scored clean latents, ``(B, c, h, w)``.
        losses: Their losses, ``(B,)``.
        renoised_losses: Those of the re-noised copies, ``(n, B)``.
        factors: By trained step, the factor of its output in the gradient, normalisation included.
            Empty for a sampler that clips, which has none.
        inputs: By trained step, what the network saw, ``(B, c, h, w)``.
        penalties: Of each sample, summed over the trained steps, ``(B,)``; 0 without.
    """

    latents: Tensor
    losses: Tensor
    renoised_losses: Tensor
    factors: dict[int, float]
    inputs: dict[int, Tensor]
    penalties: Tensor


class RolloutNetwork(Protocol):
    """The network for steps without gradient, compiled or with merged weights."""

    def __call__(self, latents: Tensor, timestep: int, /) -> Tensor:
        """Call it with latents ``(B, c, h, w)``; return the guided output ``(B, c, h, w)``."""
        ...

    def release(self) -> None:
        """Give back what it holds: there are no further calls. Asked again, it does nothing."""
        ...


class GradientEngine(Protocol):
    """Adds the gradient of a loss of sampled images to ``.grad`` of the network's weights."""

    def run(
        self,
        chain: Chain,
        denoiser: GuidedDenoiser,
        noise: RolloutNoise,
        loss_of_latents: LossOfLatents,
        *,
        rollout: RolloutNetwork | None = None,
        backward: Backward | None = None,
        after_step: Callable[[int], None] | None = None,
        penalty: OutputPenalty | None = None,
    ) -> GradientReport:
        """Sample, score and back-propagate.

        Args:
            chain: The sampler's steps, cut for a plan.
            denoiser: The trained network.
            noise: Noise of the rollout.
            loss_of_latents: Decode and reward.
            rollout: The same network for steps without gradient; None is ``denoiser``. It is
                released after its last call: before the first image is decoded.
            backward: Replaces ``Tensor.backward``.
            after_step: Called with the index of each trained step when its gradient is in
                ``.grad``, to measure it. Where gradients of all steps come at once, not called.
            penalty: Loss of the trained steps' conditional outputs, added to that of the images,
                neither weighted nor normalised by the plan. Inputs are detached, whatever the plan
                says, and re-noised copies have none.

        Returns:
            What was found.

        Raises:
            ConfigError: If the engine cannot serve the plan, or there is no gradient.
            NonFiniteError: If losses, their gradient or penalties are not finite. An engine whose
                ``check_finite`` is off goes on with what there is, so that ranks stay in step and
                the caller can end the run on all of them.
        """
        ...


def row_ranges(num_rows: int, size: int | None) -> Iterator[range]:
    """Cut 0..B-1 into ranges of at most ``size``; None is one range."""
    for start in range(0, num_rows, size or num_rows):
        yield range(start, min(start + (size or num_rows), num_rows))


def row_chunks(num_rows: int, size: int | None, device: torch.device) -> Iterator[Tensor]:
    """Cut 0..B-1 as above, into int64 tensors."""
    for rows in row_ranges(num_rows, size):
        yield torch.arange(rows.start, rows.stop, device=device)


def gradient_of_loss(
    loss_of_latents: LossOfLatents,
    latents: Tensor,
    rows: Tensor,
    batch_size: int | None,
    *,
    check_finite: bool = True,
) -> tuple[Tensor, Tensor]:
    """Differentiate decode and reward alone.

    Args:
        loss_of_latents: Decode and reward.
        latents: Clean latents ``(M, c, h, w)``.
        rows: Which caption each has, int64 ``(M,)``.
        batch_size: Rows that are decoded at a time; None is all.
        check_finite: Whether numbers that are not finite are refused.

    Returns:
        Losses ``(M,)`` and the gradient of their sum, ``(M, c, h, w)``, both without gradient.

    Raises:
        ConfigError: If the losses do not depend on the latents, or are not one for each image.
        NonFiniteError: If losses or gradient are not finite and that is checked.
    """
    losses, gradients = [], []
    for chunk in row_chunks(len(latents), batch_size, latents.device):
        with torch.enable_grad():
            leaf = latents.detach()[chunk].requires_grad_()
            loss = loss_of_latents(leaf, rows[chunk])
            _check_losses(loss, len(chunk))
            (gradient,) = torch.autograd.grad(loss.sum(), leaf, allow_unused=True)
        if gradient is None:
            raise _no_gradient("does not depend on the images")
        losses.append(loss.detach())
        gradients.append(gradient)
    found, gradient = torch.cat(losses), torch.cat(gradients)
    if check_finite:
        require_finite("losses of the reward", found)
        require_finite("gradients of the reward", gradient)
    return found, gradient


def require_finite(name: str, values: Tensor) -> None:
    """Refuse values of samples, ``(B, ...)``, that are not finite.

    Raises:
        NonFiniteError: If there are some.
    """
    if not values.isfinite().all():
        per_image = values.reshape(len(values), -1).isfinite().all(1)
        bad = (~per_image).nonzero().flatten().tolist()
        raise NonFiniteError(
            f"expected finite {name}; got NaN or infinity for images {bad} of "
            f"{len(values)}. See the reward and the images."
        )


def require_trainable(output: Tensor) -> None:
    """Refuse a network without trainable weights.

    Raises:
        ConfigError: If its output carries no gradient.
    """
    if not output.requires_grad:
        raise ConfigError(
            "expected a network whose output carries gradient at a trained step; got none. "
            "Train some of its weights."
        )


def renoised(chain: Chain, latents: Tensor, noise: RolloutNoise) -> Iterator[Tensor]:
    """Noise clean latents anew to the last step's level, once for each copy of the plan."""
    alpha, sigma = chain.level
    for copy_index in range(chain.plan.num_renoised):
        yield alpha * latents.detach() + sigma * noise.of_copy(copy_index)


def check_sizes(**sizes: int | None) -> None:
    """Refuse batch sizes below 1.

    Raises:
        ConfigError: If there is one.
    """
    for name, size in sizes.items():
        if size is not None and size < 1:
            raise ConfigError(f"`{name}` must be at least 1; got {size}. Raise it.")


def default_backward(loss: Tensor, _is_last: bool) -> None:
    """Back-propagate."""
    torch.autograd.backward(loss)


def _check_losses(losses: Tensor, num_images: int) -> None:
    if losses.shape != (num_images,):
        raise ConfigError(
            f"expected one loss for each of {num_images} images; got shape "
            f"{tuple(losses.shape)}. Return a row of losses."
        )
    if not losses.requires_grad:
        raise _no_gradient("carries none")


def _no_gradient(found: str) -> ConfigError:
    return ConfigError(
        f"expected a reward with a gradient to the images; got one that {found}. "
        "Use a differentiable reward."
    )
