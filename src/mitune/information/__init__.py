r"""Mutual information between a prompt p and latents z₀, read off a denoiser. In nats.

    z = α z₀ + σ ε        λ = log(α²/σ²)        λ → −∞: pure noise, λ → +∞: clean
    I(z₀; p) = ½ ∫ E‖Δε‖² dλ,        Δε = ε̂(z | p) − ε̂(z | ∅)                          (1)

Two Gaussian paths occur. Variance preserving (VP): α² + σ² = 1. Flow: α + σ = 1, and σ is the flow time s.
MI-TUNE (arXiv 2405.20759) writes (1) as its eq. (2), with κ_t dt for ½ dλ. RFMI (arXiv 2503.14358) writes it in the
velocity u = E[z₀ − ε | z] at t = 1 − s (Prop. 3.2), with t/(1−t) dt. `SCORES` holds both papers' exact variants.

This package has the mathematics and knows no model: `trace` and `online` for the terms of a sampling trajectory,
`proposals` and `post_hoc` for given latents that are noised again, `contrast` for rival prompts.
"""

from mitune.information.conversion import (
    Predicts,
    alpha_sigma,
    epsilon_and_sample,
    epsilon_difference,
    true_noise,
    velocity_difference,
)
from mitune.information.estimate import ONE_SIGMA, Estimate, stratified_mean
from mitune.information.online import EARLY, SCORES, TRUNCATION, Score, get_score, integral
from mitune.information.post_hoc import UNITS, Estimator, Predict, point_wise_draws, point_wise_terms
from mitune.information.proposals import LogisticProposal, Proposal, RectifiedFlowProposal, lambert_w
from mitune.information.trace import Trace

__all__ = [
    "alpha_sigma",
    "EARLY",
    "epsilon_and_sample",
    "epsilon_difference",
    "Estimate",
    "Estimator",
    "get_score",
    "integral",
    "lambert_w",
    "LogisticProposal",
    "ONE_SIGMA",
    "point_wise_draws",
    "point_wise_terms",
    "Predict",
    "Predicts",
    "Proposal",
    "RectifiedFlowProposal",
    "Score",
    "SCORES",
    "stratified_mean",
    "Trace",
    "true_noise",
    "TRUNCATION",
    "UNITS",
    "velocity_difference",
]
