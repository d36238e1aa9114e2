"""A bounded memory of encoded training images."""

from collections.abc import Sequence

import torch
from torch import Tensor

from segalign.diffusion.latents import LatentCodec


class LatentCache:
    """Keep the latents of images that were encoded before, by sample id.

    Only right where an id always shows the same pixels, that is without random augmentation.
    When the memory is full, further images are simply encoded each time, as are those whose latents
    are not finite. Images are encoded one by one: the last bits of a latent depend on what else is
    in its batch, which depends on what is remembered, and a resumed run remembers nothing.

    Args:
        max_bytes: Bound on the memory; 0 keeps nothing, and encodes whole batches.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self._latents: dict[int, Tensor] = {}

    def encode(
        self, codec: LatentCodec, images: Tensor, sample_ids: Sequence[int], valid: Sequence[bool]
    ) -> Tensor:
        """Encode images, or recall their latents.

        Args:
            codec: The codec.
            images: Float in [0, 1], ``(B, 3, H, W)``.
            sample_ids: ``B`` ids.
            valid: ``B`` flags; what stands in for an unreadable image is never kept.

        Returns:
            Latents ``(B, c, h, w)``, no gradient.
        """
        missing = [row for row, key in enumerate(sample_ids) if key not in self._latents]
        rows: dict[int, Tensor] = {}
        if missing:
            with torch.no_grad():
                size = 1 if self.max_bytes else len(missing)
                parts = [codec.encode(part) for part in torch.split(images[missing], size)]
                rows = dict(zip(missing, torch.cat(parts), strict=True))
        latents = [
            rows[row] if row in rows else self._latents[key].to(images.device)
            for row, key in enumerate(sample_ids)
        ]
        for row, latent in rows.items():
            if valid[row]:
                self._keep(sample_ids[row], latent)
        return torch.stack(latents)

    def _keep(self, key: int, latent: Tensor) -> None:
        size = latent.numel() * latent.element_size()
        if key not in self._latents and self.num_bytes + size <= self.max_bytes:
            stored = latent.detach().cpu().clone()
            # One that went wrong by chance must not come back in every epoch.
            if stored.isfinite().all():
                self._latents[key] = stored
                self.num_bytes += size
