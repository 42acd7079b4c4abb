r"""Mutual information between a prompt p and latents z₀, read off a denoiser. In nats.

    z = α z₀ + σ ε        λ = log(α²/σ²)        λ → −∞: pure noise, λ → +∞: clean
    I(z₀; p) = ½ ∫ E‖Δε‖² dλ,        Δε = ε̂(z | p) − ε̂(z | ∅)                          (1)

Two Gaussian paths occur. Variance preserving (VP): α² + σ² = 1. Flow: α + σ = 1, and σ is the flow time s.
MI-TUNE (arXiv 2405.20759) writes (1) as its eq. (2), with κ_t dt for ½ dλ. RFMI (arXiv 2503.14358) writes it in the
velocity u = E[z₀ − ε | z] at t = 1 − s (Prop. 3.2), with t/(1−t) dt. `SCORES` holds both papers' exact variants.

This file has the mathematics and knows no model: `Trace` and `SCORES` for the terms of a sampling trajectory (on-line),
`point_wise_draws` for given latents that are noised again (post-hoc).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from types import MappingProxyType
from typing import Any, Literal, Protocol

import torch
from scipy.stats import t as student
from torch import Generator, Tensor

from mitune.errors import MituneError

Predicts = Literal["epsilon", "velocity", "sample"]
Estimator = Literal["standard", "orthogonal", "self-confidence"]


# --- What a network's output says about noise and signal ---------------------------------------------------------


def alpha_sigma(log_snr: Tensor, *, is_flow: bool) -> tuple[Tensor, Tensor]:
    """α and σ at log-SNR λ, of its shape. VP: α² = sigmoid(λ), σ² = sigmoid(−λ). Flow: α = sigmoid(λ/2), σ = 1 − α."""
    if is_flow:
        return torch.sigmoid(log_snr / 2), torch.sigmoid(-log_snr / 2)
    return torch.sigmoid(log_snr).sqrt(), torch.sigmoid(-log_snr).sqrt()


def epsilon_difference(delta: Tensor, alpha: Tensor, sigma: Tensor, predicts: Predicts) -> Tensor:
    """Δε of (1), (B, C, H, W), from the same difference of what the network predicts; alpha, sigma broadcast."""
    # z cancels. The factor α serves v = αε − σz₀ (VP) and v = ε − z₀ (flow) alike.
    factor = {"epsilon": torch.ones_like(alpha), "velocity": alpha, "sample": -alpha / sigma}
    return factor[predicts] * delta  # path.py has refused any other prediction type


def velocity_difference(delta: Tensor, alpha: Tensor, sigma: Tensor, predicts: Predicts) -> Tensor:
    """Δv = Δε/α likewise, of v = α ε − σ z₀ (VP) or ε − z₀ (flow). At α = 0 an ε-network says nothing of it."""
    factor = {"epsilon": 1 / alpha, "velocity": torch.ones_like(alpha), "sample": -1 / sigma}
    return factor[predicts] * delta


def epsilon_and_sample(
    output: Tensor, noisy: Tensor, alpha: Tensor, sigma: Tensor, predicts: Predicts, *, is_flow: bool
) -> tuple[Tensor, Tensor]:
    """ε̂ and ẑ₀ = (z − σ ε̂)/α from a network's output at z = `noisy`, all (B, C, H, W); alpha, sigma broadcast.

    At α = 0 an ε-network says nothing of z₀, at σ = 0 a z₀-network nothing of ε: those come back infinite or NaN.
    """
    if predicts == "epsilon":
        return output, (noisy - sigma * output) / alpha
    if predicts == "sample":
        return (noisy - alpha * output) / sigma, output
    if is_flow:  # v = ε − z₀
        return noisy + alpha * output, noisy - sigma * output
    return sigma * noisy + alpha * output, alpha * noisy - sigma * output  # v = α ε − σ z₀


def true_noise(noisy: Tensor, latents: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """ε = (z − α z₀)/σ, (B, C, H, W): the noise that a point z of a trajectory holds, once its end z₀ is known."""
    return (noisy - alpha * latents) / sigma


# --- Estimates ---------------------------------------------------------------------------------------------------


ONE_SIGMA = 0.6827  # what a standard error covers to each side where it is known


@dataclass(frozen=True, slots=True)
class Estimate:
    """A value with its standard error, the number of draws it rests on, its unit, and the error's own certainty."""

    value: float
    standard_error: float
    samples: int
    unit: str = "nats"
    degrees_of_freedom: float = math.inf

    @classmethod
    def of_mean(cls, draws: Tensor, unit: str = "nats") -> Estimate:
        """Mean of independent draws (n,) and its standard error; NaN for the error of a single draw."""
        return cls.of_strata(draws.reshape(1, -1), unit)

    @classmethod
    def of_strata(cls, draws: Tensor, unit: str = "nats") -> Estimate:
        """Mean over strata of equal weight, (strata, n), with n independent draws in each; the error is unbiased."""
        value, error, degrees = (x.item() for x in stratified_mean(draws))
        return cls(value, error, draws.numel(), unit, degrees)

    @property
    def error(self) -> float:
        """What to print behind ±: half the interval that covers the truth in 68 of 100 cases."""
        return self._half_width(ONE_SIGMA)

    def interval(self, confidence: float = 0.95) -> tuple[float, float]:
        """The ends of the interval that covers the truth with that probability, by Student's t."""
        half = self._half_width(confidence)
        return self.value - half, self.value + half

    def _half_width(self, confidence: float) -> float:
        return self.standard_error * float(student.ppf((1 + confidence) / 2, self.degrees_of_freedom))

    def __str__(self) -> str:
        return f"{self.value:.3f} ± {self.error:.3f} {self.unit} (n = {self.samples})"


def stratified_mean(draws: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean of draws (..., strata, n), its standard error, and the degrees of freedom of that, each (...), float64.

    With T = Σ v and S = Σ v² over the variances v of the strata's means, Satterthwaite's degrees (1946), (n − 1) T²/S,
    are too few where strata share the variance, as v² is on average more than the square of what v estimates. Welch's
    (1947), (n + 1) T²/S − 2, are right for normal draws, and too many for the skewed ones of a denoiser. The mean of
    the two is taken: n − 1 where one stratum has all of the variance. The last two results are NaN for n = 1.
    """
    strata, each = draws.shape[-2:]
    draws = draws.double()
    mean = draws.mean(dim=(-2, -1))
    if each < 2:
        return mean, torch.full_like(mean, math.nan), torch.full_like(mean, math.nan)
    variances = draws.var(dim=-1) / each
    total, squares = variances.sum(dim=-1), (variances**2).sum(dim=-1)
    degrees = each * torch.where(squares > 0, total**2 / squares, strata) - 1
    return mean, total.sqrt() / strata, degrees


# --- On-line: the terms of sampling trajectories, and the scores made of them ------------------------------------


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Trace:
    """Terms of (1) at each of the T denoiser steps of B trajectories: float32 on the CPU, steps from noise to clean.

    Every preset in `SCORES` can be computed from them again, without the model. Terms that do not exist are NaN.
    """

    log_snr: Tensor  # (T,) λ; −inf at pure noise
    timestep: Tensor  # (T,) the scheduler's
    beta: Tensor  # (T,) β_t of the training schedule; NaN for flow
    difference: Tensor  # (B, T) ‖Δε‖²
    difference_velocity: Tensor  # (B, T) ‖Δv‖² = ‖Δε‖²/α²; a v-network has it at pure noise, too
    dot_conditional: Tensor  # (B, T) u·(u − u_∅), u the flow velocity with the prompt
    dot_guided: Tensor  # (B, T) the same with the guided velocity for u
    error_conditional: Tensor  # (B, T) ‖ε̂(z | p) − ε‖², ε the trajectory's own noise
    error_null: Tensor  # (B, T) ‖ε̂(z | ∅) − ε‖²
    dimensions: int  # of z₀
    is_flow: bool
    training_steps: int = 1000  # T of the training schedule
    planned_steps: int | None = None  # of the whole run, where the trace is of its beginning

    def __len__(self) -> int:
        return self.difference.shape[0]

    def select(self, candidates: Sequence[int]) -> Trace:
        """The same trace with these candidates alone, in this order."""
        index = torch.tensor(candidates, dtype=torch.long)
        return Trace(**{name: value[index] if name in _PER_CANDIDATE else value for name, value in self._items()})

    def spread(self, places: Sequence[int], count: int) -> Trace:
        """The inverse of `select`: among `count` candidates, these at `places`; the terms of the others are NaN."""
        rows = torch.full((count, self.difference.shape[1]), math.nan)
        index = torch.tensor(places, dtype=torch.long)
        spread: dict[str, Any] = dict(self._items())
        spread |= {name: rows.index_copy(0, index, spread[name]) for name in _PER_CANDIDATE}
        return Trace(**spread)

    def to_columns(self) -> dict[str, list[Any]]:
        """One entry per candidate in every column: lists of T numbers, and plain numbers. Parquet takes them as is."""
        columns: dict[str, list[Any]] = {}
        for name, value in self._items():
            row = value.tolist() if isinstance(value, Tensor) else value
            columns[name] = row if name in _PER_CANDIDATE else [row] * len(self)
        return columns

    @classmethod
    def from_columns(cls, columns: Mapping[str, Sequence[Any]]) -> Trace:
        """The inverse of `to_columns`. Raises MituneError where rows differ in schedule, or columns lack."""
        names = [field.name for field in fields(cls)]
        if missing := [name for name in names if name not in columns]:
            raise MituneError(
                f"A table of trajectories lacks {', '.join(missing)}, as those of other versions of mitune may; make "
                "it again with this one."
            )
        arguments: dict[str, Any] = {}
        for name in names:
            rows = list(columns[name])
            if name not in _PER_CANDIDATE:
                if any(not _same(row, rows[0]) for row in rows):
                    raise MituneError(
                        f"Column {name} differs between these trajectories, so they are of different schedules or "
                        "lengths; make one Trace for each group of equal ones."
                    )
                rows = rows[0]
            arguments[name] = torch.tensor(rows, dtype=torch.float32) if name in _TENSORS else rows
        return cls(**arguments)

    def _items(self) -> list[tuple[str, Any]]:
        return [(field.name, getattr(self, field.name)) for field in fields(self)]


_PER_CANDIDATE = (
    "difference",
    "difference_velocity",
    "dot_conditional",
    "dot_guided",
    "error_conditional",
    "error_null",
)
_TENSORS = ("log_snr", "timestep", "beta", *_PER_CANDIDATE)


def _same(row: Any, other: Any) -> bool:
    if isinstance(row, (int, float, type(None))):
        return bool(row == other)
    a, b = torch.tensor(row), torch.tensor(other)
    return a.shape == b.shape and torch.equal(a.nan_to_num(), b.nan_to_num())


# t_ε of RFMI, with the value of its published code: steps at flow times s = σ/(α + σ) up to it, λ > 5.9, are left out.
# There, a network's error counts most and the prompt least, and a sampler's last step makes z₀ out of ε̂ itself.
TRUNCATION = 0.05
EARLY = 0.2  # share of the steps; 10 of 50 in CFG-Rejection


def integral(values: Tensor, grid: Tensor) -> Tensor:
    """∫ values d grid by the trapezoid rule: (B, T) on (T,) gives (B,); NaN with fewer than two nodes."""
    if len(grid) < 2:
        return torch.full(values.shape[:-1], math.nan)
    return torch.trapezoid(values, grid, dim=-1)


def _flow_time(trace: Trace) -> Tensor:
    """s = σ/(α + σ), (T,): the flow time of the same λ, for VP too."""
    return torch.sigmoid(-trace.log_snr / 2)


def _finite(trace: Trace) -> Tensor:
    """(T,), true at the steps that count: not at the infinite end λ = −∞, pure noise, nor beyond the truncation."""
    return trace.log_snr.isfinite() & (_flow_time(trace) > TRUNCATION)


def _log_snr_integral(trace: Trace, values: Tensor) -> Tensor:
    """∫ values dλ on the trajectory's own grid, between the first and the last finite step."""
    kept = _finite(trace)
    return integral(values[:, kept], trace.log_snr[kept])


def _rfmi_integral(trace: Trace, values: Tensor) -> Tensor:
    """∫ t/(1−t) values dt over t = 1 − s < 1 − t_ε. Pure noise counts as the node t = 0, where the weight is 0."""
    s = _flow_time(trace)
    kept = s > TRUNCATION
    weighted = torch.where(s == 1, 0.0, (1 - s) / s * values)
    return integral(weighted[:, kept], 1 - s[kept])


def _mean(values: Tensor, kept: Tensor) -> Tensor:
    return values[:, kept].mean(dim=1)  # NaN where nothing is kept


def _mi_tune(trace: Trace) -> Tensor:
    return _log_snr_integral(trace, 0.5 * trace.difference)


def _kappa(trace: Trace) -> Tensor:
    """κ_t of eq. (2) without its α_t, as in the published code: β_t T / (2 (1 − ᾱ_t)), (T,)."""
    return trace.beta * trace.training_steps / (2 * torch.sigmoid(-trace.log_snr))


def _mi_tune_discrete(trace: Trace) -> Tensor:
    return (_kappa(trace) / (1 - trace.beta) * trace.difference).mean(dim=1)


def _mi_tune_release(trace: Trace) -> Tensor:
    return _mean(_kappa(trace) * trace.difference, trace.timestep > 50)


def _mi_tune_release_v(trace: Trace) -> Tensor:
    return _mean(_kappa(trace) * trace.difference_velocity, trace.timestep > 50)


def _rfmi(trace: Trace) -> Tensor:
    return _rfmi_integral(trace, trace.dot_conditional)


def _rfmi_squared(trace: Trace) -> Tensor:
    return _rfmi_integral(trace, trace.difference / (1 - _flow_time(trace)) ** 2)  # Δε = (1−s) Δu


def _rfmi_release(trace: Trace) -> Tensor:
    s = _flow_time(trace)
    return _mean((1 - s) / s * trace.dot_guided, _finite(trace))


def _score_differences(trace: Trace) -> Tensor:
    """‖s_p − s_∅‖², (B, T), of the scores s = −ε̂/σ."""
    _, sigma = alpha_sigma(trace.log_snr, is_flow=trace.is_flow)
    return trace.difference / sigma**2


def _fifth(trace: Trace) -> int:
    return math.ceil(EARLY * (trace.planned_steps or trace.difference.shape[1]))


def _early(trace: Trace) -> Tensor:
    return _score_differences(trace)[:, : _fifth(trace)].sum(dim=1)


def _late(trace: Trace) -> Tensor:
    kept = _finite(trace) & _last(trace, _fifth(trace))
    return _mean(_score_differences(trace), kept) * kept.sum()


def _last(trace: Trace, steps: int) -> Tensor:
    """(T,), true at the last `steps` steps."""
    return torch.arange(len(trace.log_snr)) >= len(trace.log_snr) - steps


def _self_confidence(trace: Trace) -> Tensor:
    return -_mean(trace.error_conditional, _finite(trace)) / trace.dimensions


def _self_confidence_late(trace: Trace) -> Tensor:
    kept = _finite(trace) & _last(trace, len(trace.log_snr) // 2)
    return -_mean(trace.error_conditional, kept) / trace.dimensions


def _log_likelihood_ratio(trace: Trace) -> Tensor:
    return _log_snr_integral(trace, 0.5 * (trace.error_null - trace.error_conditional))


@dataclass(frozen=True, slots=True)
class Score:
    """A number for each candidate from its trace; higher is better. Called with a Trace, it gives (B,).

    Raises MituneError, as `check` does, where the steps of the trace can give no value.
    """

    name: str
    formula: str
    source: str
    unit: str
    needs: str  # of a run's steps, to have a value at all
    function: Callable[[Trace], Tensor]

    def __call__(self, trace: Trace) -> Tensor:
        """(B,), float32. A candidate with a term that is not finite has the score NaN."""
        self.check(trace)
        return self.values(trace)

    def values(self, trace: Trace) -> Tensor:
        """The same for tables of many scores, and in the midst of a run: NaN for all without `needs`."""
        value = self.function(trace).float()
        return torch.where(value.isfinite(), value, math.nan)

    def check(self, trace: Trace) -> None:
        """Raises MituneError where the steps of this trace can give no value, whatever their terms are."""
        ones: dict[str, Any] = {name: torch.ones(1, len(trace.log_snr)) for name in _PER_CANDIDATE}
        if not self.values(replace(trace, **ones)).isfinite().item():
            kind = "a flow path" if trace.is_flow else "a diffusion path"
            raise MituneError(
                f"The score {self.name!r} needs {self.needs}, which the {len(trace.log_snr)} steps of this run on "
                f"{kind} with {trace.training_steps} training steps have not; take another score, or other steps."
            )


_MI_TUNE, _MI_TUNE_CODE = "MI-TUNE (arXiv 2405.20759)", "MI-TUNE's published code"
_RFMI, _RFMI_CODE = "RFMI (arXiv 2503.14358)", "RFMI's published code"
_OWN_NOISE = "on the trajectory's own noise"
_KEPT = "short of pure noise with σ/(α + σ) > 0.05"
_ALL_SCORES = (
    Score(
        "mi-tune",
        "½ ∫ ‖Δε‖² dλ",
        f"{_MI_TUNE}, eq. (2), with ½ dλ for κ_t dt",
        "nats",
        f"two steps {_KEPT}",
        _mi_tune,
    ),
    Score(
        "mi-tune-discrete",
        "mean of κ_t ‖Δε‖²",
        f"{_MI_TUNE}, eq. (2) to the letter",
        "nats",
        "a β_t < 1 at every step (no flow path, and no zero terminal SNR: κ_t divides by α_t = 1 − β_t)",
        _mi_tune_discrete,
    ),
    Score(
        "mi-tune-release",
        "mean of β_t T/(2(1−ᾱ_t)) ‖Δε‖², t > 50",
        _MI_TUNE_CODE,
        "nats",
        "a β_t (no flow path) and a step at t > 50",
        _mi_tune_release,
    ),
    Score(
        "mi-tune-release-v",
        "mean of β_t T/(2(1−ᾱ_t)) ‖Δv‖², t > 50",
        f"{_MI_TUNE_CODE}, as it scores v-models",
        "nats/ᾱ",
        "a β_t (no flow path) and a step at t > 50",
        _mi_tune_release_v,
    ),
    Score(
        "rfmi",
        "∫ t/(1−t) u·(u − u_∅) dt, t ≤ 0.95",
        f"{_RFMI}, Prop. 3.2",
        "nats",
        "two steps with σ/(α + σ) > 0.05",
        _rfmi,
    ),
    Score(
        "rfmi-squared",
        "∫ t/(1−t) ‖u − u_∅‖² dt, t ≤ 0.95",
        f"same expectation as {_RFMI}",
        "nats",
        "two steps with σ/(α + σ) > 0.05",
        _rfmi_squared,
    ),
    Score(
        "rfmi-release",
        "mean of t/(1−t) u_g·(u_g − u_∅), u_g guided",
        _RFMI_CODE,
        "nats",
        f"a step {_KEPT}",
        _rfmi_release,
    ),
    Score(
        "early",
        "Σ ‖s_p − s_∅‖² over the first 20 % of steps",
        "CFG-Rejection (arXiv 2505.23343)",
        "",
        "a step",
        _early,
    ),
    Score(
        "late",
        "Σ ‖s_p − s_∅‖² over the last 20 % of steps",
        "control for early",
        "",
        f"among the last 20 % a step {_KEPT}",
        _late,
    ),
    Score(
        "self-confidence",
        "−mean of ‖ε̂_p − ε‖²/d",
        f"after SOLACE (arXiv 2603.00918), {_OWN_NOISE}",
        "per dimension",
        f"a step {_KEPT}",
        _self_confidence,
    ),
    Score(
        "self-confidence-late",
        "−mean of ‖ε̂_p − ε‖²/d over the second half of the steps",
        f"after SOLACE (arXiv 2603.00918), {_OWN_NOISE}",
        "per dimension",
        f"in the second half a step {_KEPT}",
        _self_confidence_late,
    ),
    # No nats: the "noise" that a sampler without noise of its own leaves in z is a function of z₀, so these are not the
    # errors of a denoiser on noise that is independent of z₀. Their sum depends on the sampler and its steps.
    Score(
        "log-likelihood-ratio",
        "½ ∫ ‖ε̂_∅ − ε‖² − ‖ε̂_p − ε‖² dλ",
        f"the form of ITD's standard estimator, {_OWN_NOISE}, which is not independent of z₀: a score, not nats",
        "",
        f"two steps {_KEPT}",
        _log_likelihood_ratio,
    ),
)
SCORES: Mapping[str, Score] = MappingProxyType({score.name: score for score in _ALL_SCORES})


def get_score(name: str) -> Score:
    """The on-line score of that name. Raises MituneError, with the names that exist, for any other."""
    if name not in SCORES:
        raise MituneError(f"There is no score {name!r}; the known ones are {', '.join(SCORES)}.")
    return SCORES[name]


# --- Post-hoc: where to put the draws in λ -----------------------------------------------------------------------


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


# --- Post-hoc: the estimators ------------------------------------------------------------------------------------

UNITS: Mapping[str, str] = MappingProxyType(
    {"standard": "nats", "orthogonal": "nats", "self-confidence": "per dimension"}
)


def point_wise_terms(conditional: Tensor, null: Tensor, noise: Tensor, estimator: Estimator) -> Tensor:
    """The integrand of an estimator at one λ, before its sum over dimensions: as (B, C, H, W) as the arguments.

    conditional, null: ε̂(z | p) and ε̂(z | ∅); noise: the ε in z. With ½ ∫ E[·] dλ over its sum,
    standard ("ITD"): ‖ε − ε̂_∅‖² − ‖ε − ε̂_p‖², a log-likelihood ratio; orthogonal: ‖ε̂_p − ε̂_∅‖², as in (1).
    self-confidence is no information: −‖ε − ε̂_p‖², without the prompt's rival. Raises MituneError for other names.
    """
    if estimator == "standard":
        return (noise - null) ** 2 - (noise - conditional) ** 2
    if estimator == "orthogonal":
        return (conditional - null) ** 2
    if estimator == "self-confidence":
        return -((noise - conditional) ** 2)
    raise MituneError(f"There is no estimator {estimator!r}; the known ones are {', '.join(UNITS)}.")


class Predict(Protocol):
    """ε̂(z | p) and ε̂(z | ∅), both (B, ...) like `noisy`, at one log-SNR for the whole batch, a scalar tensor."""

    def __call__(self, noisy: Tensor, log_snr: Tensor) -> tuple[Tensor, Tensor]: ...


def point_wise_draws(
    predict: Predict,
    latents: Tensor,
    *,
    estimator: Estimator,
    proposal: Proposal,
    strata: int,
    generator: Generator,
    is_flow: bool,
    spatial: bool = False,
) -> Tensor:
    """Draws of the point-wise integral for given latents (B, C, H, W), by noising them again: (B, strata, 2), float32.

    Each of `strata` equal parts of the proposal gets two independent draws, so `Estimate.of_strata` of a row is value
    ± unbiased error. A draw is the mean over an antithetic pair, z₀ noised with ε and −ε: four calls of `predict` a
    stratum. All images share λ and ε, so differences between images or prompts have less noise than the values.
    In nats; for self-confidence per dimension, as the plain mean over the proposal. The generator is on the CPU: its
    state gives the same draws on any device. spatial=True sums over channels alone: (B, strata, 2, H, W).
    Source: eq. (1) with 1/density for importance; ITD (Kong et al., 2024) for standard and orthogonal.
    """
    axes = (1,) if spatial else tuple(range(1, latents.ndim))
    dimensions = latents[0].numel()
    z0 = latents.float()
    rows = []
    for stratum in range(strata):
        for _ in range(2):
            uniform = (stratum + torch.rand((), generator=generator, dtype=torch.float64)) / strata
            log_snr = proposal.at(uniform)
            weight = 1 / dimensions if estimator == "self-confidence" else 0.5 / proposal.density(log_snr).item()
            alpha, sigma = (x.float().to(z0.device) for x in alpha_sigma(log_snr, is_flow=is_flow))
            noise = torch.randn(z0.shape[1:], generator=generator).to(z0.device)
            pair = []
            for epsilon in (noise, -noise):
                conditional, null = predict(alpha * z0 + sigma * epsilon, log_snr)
                pair.append(point_wise_terms(conditional.float(), null.float(), epsilon, estimator).sum(dim=axes))
            rows.append(weight * (pair[0] + pair[1]) / 2)
    draws = torch.stack(rows, dim=1)
    return draws.reshape(len(draws), strata, 2, *draws.shape[2:])
