"""Where to put the draws of a post-hoc integral in λ: densities to draw from and to divide by."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Proposal(Protocol):
    """A density over λ on [low, high], to draw from and to divide by."""

    def at(self, uniform: Tensor) -> Tensor:
        """λ at these values of the distribution function, elementwise: a draw where they are uniform in (0, 1)."""

    def density(self, log_snr: Tensor) -> Tensor:
        """The density at λ, elementwise."""


@dataclass(frozen=True, slots=True)
class LogisticProposal:
    """Logistic in λ, cut to [low, high]. At location 0 and scale 2 this is the uniform distribution of flow times."""

    low: float
    high: float
    location: float = 0.0
    scale: float = 2.0

    def at(self, uniform: Tensor) -> Tensor:
        low, high = self._cumulative(self.low), self._cumulative(self.high)
        return self.location + self.scale * torch.logit(low + uniform.double() * (high - low))

    def density(self, log_snr: Tensor) -> Tensor:
        p = torch.sigmoid((log_snr.double() - self.location) / self.scale)
        return p * (1 - p) / (self.scale * (self._cumulative(self.high) - self._cumulative(self.low)))

    def _cumulative(self, log_snr: float) -> float:
        return 1 / (1 + math.exp((self.location - log_snr) / self.scale))


@dataclass(frozen=True, slots=True)
class RectifiedFlowProposal:
    """RFMI's importance sampling: density ∝ t/(1−t) in t = sigmoid(λ/2), cut to [low, high] in λ (Prop. 3.3)."""

    low: float
    high: float

    def at(self, uniform: Tensor) -> Tensor:
        low, high = self._cumulative(self.low), self._cumulative(self.high)
        y = low + uniform.double() * (high - low)
        return 2 * torch.logit(1 + lambert_w(-torch.exp(-(1 + y))))

    def density(self, log_snr: Tensor) -> Tensor:
        t = torch.sigmoid(log_snr.double() / 2)
        # t/(1−t) · dt/dλ, where dt/dλ = t(1−t)/2
        return t**2 / (2 * (self._cumulative(self.high) - self._cumulative(self.low)))

    @staticmethod
    def _cumulative(log_snr: float) -> float:
        t = 1 / (1 + math.exp(-log_snr / 2))
        return -t - math.log1p(-t)  # F(t), up to its norm


def lambert_w(x: Tensor) -> Tensor:
    """W₀(x), the solution w ≥ −1 of w eʷ = x, elementwise in float64, for −1/e ≤ x < 0 (RFMI, Prop. 3.3)."""
    x = x.double()
    p = (2 * (1 + math.e * x)).clamp(min=0).sqrt()
    w = -1 + p - p**2 / 3 + 11 / 72 * p**3  # series at the branch point −1/e
    for _ in range(6):  # Halley's method; cubic, so six are ample from this start
        residual = w * w.exp() - x
        slope = w.exp() * (w + 1) - (w + 2) * residual / (2 * w + 2)
        w = torch.where(residual == 0, w, w - residual / slope)
    return torch.where(p == 0, -1.0, w)
