"""On-line scores, with both papers' exact variants: a number for each candidate from its trajectory, for free."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from mitune.errors import MituneError
from mitune.information.conversion import alpha_sigma
from mitune.information.trace import PER_CANDIDATE, Trace

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
        ones: dict[str, Any] = {name: torch.ones(1, len(trace.log_snr)) for name in PER_CANDIDATE}
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
