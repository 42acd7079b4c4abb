"""The order, scales and shifts that lie between a denoiser's latents and its autoencoder's, found by trying.

    v[i] = scale[i] · z[source[i]] + shift[i]        i over the n values of one picture

holds for whatever packs latents into tokens, folds patches into channels, or normalizes channel by channel. So the v
of a few z that are known give all three, and turn v into z for any other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Generator, Tensor

_BASE, _DIGITS = 16, 6  # of the number of a place; even bfloat16 tells such digits apart
PROBES = 3 + _DIGITS


def probes(like: Tensor) -> Tensor:
    """Latents to be watched, (PROBES, ...), float32, of the shape of `like` (N, ...): 0, 1, noise, digits of places."""
    places = torch.arange(like[0].numel())
    noise = torch.randn(len(places), generator=Generator().manual_seed(0))
    digits = [(places // _BASE**digit % _BASE).float() for digit in range(_DIGITS)]
    rows = torch.stack([torch.zeros_like(noise), torch.ones_like(noise), noise, *digits])
    return rows.reshape(PROBES, *like.shape[1:]).to(like.device)


@dataclass(frozen=True, slots=True, eq=False)
class LatentMap:
    """How v (N, *shape) come of z (N, *latent_shape), both with n values each."""

    shape: torch.Size
    latent_shape: torch.Size
    source: Tensor  # (n,)
    scale: Tensor  # (n,)
    shift: Tensor  # (n,)

    @classmethod
    def between(cls, z: Tensor, v: Tensor) -> Self | None:
        """From z = `probes(...)` and their v, or None if v are not made of z in that way."""
        rounding = 32 * torch.finfo(v.dtype).eps
        shape, latent_shape = v.shape[1:], z.shape[1:]
        if len(v) != PROBES or v[0].numel() != z[0].numel():
            return None
        z, v = z.flatten(1).double(), v.flatten(1).double()
        shift, scale = v[0], v[1] - v[0]
        digits = ((v[3:] - shift) / scale).round().nan_to_num(-1)
        source = sum(digit * _BASE**i for i, digit in enumerate(digits)).long()
        if not torch.equal(source.sort().values, torch.arange(len(source), device=source.device)):
            return None
        expected = scale * z[2][source] + shift
        if not ((v[2] - expected).abs() <= rounding * (1 + shift.abs() + expected.abs() + scale.abs())).all():
            return None
        return cls(shape, latent_shape, source, scale, shift)

    def latents(self, v: Tensor) -> Tensor:
        """z (N, *latent_shape), float32, of v (N, *shape)."""
        values = (v.flatten(1).double() - self.shift) / self.scale
        z = torch.empty_like(values)
        z[:, self.source] = values
        return z.float().reshape(-1, *self.latent_shape)
