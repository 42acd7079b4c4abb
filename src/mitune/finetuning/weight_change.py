"""What an adapter makes of a layer's weight matrix W, in a form that can be added up: W' = diag(d) W + U A.

    LoRA    d = 1          U = s B            s = α / r;  arXiv 2106.09685, eq. (3)
    DoRA    d = m / ‖V‖    U = s diag(d) B    V = W + s B A, ‖V‖ of each row;  arXiv 2402.09353, eq. (5)

A weighted sum of the changes W'_i − W has the same form,

    Σ w_i (W'_i − W) = diag(d − 1) W + U A        d = 1 + Σ w_i (d_i − 1),  U = [w_1 U_1, …],  A = [A_1; …]      (1)

so it is again a LoRA where all are (B = U), and else a DoRA (B = diag(d)⁻¹ U, m = d ‖W + B A‖), of rank Σ r_i and with
s = 1. Nothing is approximated. All is computed in float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

_LEAST = 1e-6  # of |d|: B would be a million times U


@dataclass(frozen=True, slots=True, eq=False)
class WeightChange:
    """W' = diag(row_scale) W + up down, of a layer."""

    up: Tensor  # U, (out, r)
    down: Tensor  # A, (r, in)
    row_scale: Tensor | None = None  # d, (out,); None: ones, as in every LoRA

    @classmethod
    def of_lora(cls, down: Tensor, up: Tensor, scaling: float) -> WeightChange:
        """down: A, (r, in); up: B, (out, r); scaling: s."""
        return cls(scaling * up.double(), down.double())

    @classmethod
    def of_dora(cls, down: Tensor, up: Tensor, scaling: float, magnitude: Tensor, weight: Tensor) -> WeightChange:
        """The same with magnitude: m, (out,), and the base model's weight: W, (out, in)."""
        lora = cls.of_lora(down, up, scaling)
        row_scale = magnitude.double() / (weight.double() + lora.up @ lora.down).norm(dim=1)
        return cls(row_scale[:, None] * lora.up, lora.down, row_scale)

    @property
    def rank(self) -> int:
        """r."""
        return len(self.down)

    def squared_norm(self, weight: Tensor | None) -> float:
        """‖W' − W‖² (Frobenius). weight: W, where rows are scaled."""
        change = self.up @ self.down
        if self.row_scale is not None and weight is not None:
            change += (self.row_scale - 1)[:, None] * weight.double()
        return float(change.square().sum())

    def truncated(self, rank: int) -> tuple[WeightChange, float]:
        """The change with the nearest matrix of at most this rank in place of U A, and ‖U A − that‖² (Frobenius).

        That is the head of the singular value decomposition (Eckart and Young), and the error is the sum of the
        squares of the other singular values. Rows keep their scale.
        """
        if rank >= self.rank:
            return self, 0.0
        left, upper = torch.linalg.qr(self.up)  # U A = left (upper lowerᵀ) rightᵀ, with a small matrix in the middle
        right, lower = torch.linalg.qr(self.down.T)
        rotation, values, transposed = torch.linalg.svd(upper @ lower.T, full_matrices=False)
        root = values[:rank].sqrt()
        nearest = WeightChange(
            left @ rotation[:, :rank] * root, root[:, None] * (transposed[:rank] @ right.T), self.row_scale
        )
        return nearest, float(values[rank:].square().sum())

    def padded(self, rank: int) -> WeightChange:
        """The same change with factors of this rank, filled up with zeros."""
        more = max(0, rank - self.rank)
        return WeightChange(F.pad(self.up, (0, more)), F.pad(self.down, (0, 0, 0, more)), self.row_scale)

    def dora_factors(self, weight: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
        """A, (r, in), B, (out, r), and m, (out,), of the DoRA with s = 1 that makes this change of `weight`.

        None if there is none: a row of W is left out (d = 0). m is negative where d is.
        """
        row_scale = torch.ones(len(self.up), dtype=self.up.dtype) if self.row_scale is None else self.row_scale
        if row_scale.abs().min() < _LEAST:
            return None
        up = self.up / row_scale[:, None]
        return self.down, up, row_scale * (weight.double() + up @ self.down).norm(dim=1)


def weighted_sum(changes: Sequence[tuple[float, WeightChange]]) -> WeightChange:
    """Equation (1), of (w_i, change i)."""
    scales = [weight * (change.row_scale - 1) for weight, change in changes if change.row_scale is not None]
    return WeightChange(
        up=torch.cat([weight * change.up for weight, change in changes], dim=1),
        down=torch.cat([change.down for _, change in changes]),
        row_scale=1 + torch.stack(scales).sum(dim=0) if scales else None,
    )
