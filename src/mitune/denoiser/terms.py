"""From the recorded steps of a sampling run to its trace: λ of each step, and the terms of every candidate there."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mitune.denoiser.network import Family
from mitune.denoiser.path import NoisePath
from mitune.denoiser.recording import Step
from mitune.errors import MituneError
from mitune.information import (
    Trace,
    alpha_sigma,
    epsilon_and_sample,
    epsilon_difference,
    true_noise,
    velocity_difference,
)

ROUNDING = 0.01  # of the training steps, what half precision may make of a timestep
_TERMS = ("difference", "difference_velocity", "dot_conditional", "dot_guided", "error_conditional", "error_null")


def trace_of(steps: Sequence[Step], latents: Tensor | None, path: NoisePath, family: Family) -> Trace:
    """The terms of these steps, (B, T), for the final z₀ (B, ...); without it, the denoising errors are NaN."""
    timestep, log_snr, taken = _levels(steps, path, family)
    levels = zip(steps, log_snr, taken, strict=True)
    terms = [_terms(step, latents, level, reading, path) for step, level, reading in levels]
    rows = torch.stack(terms, dim=-1).cpu()
    return _trace(rows, timestep, log_snr, path, dimensions=steps[0].noisy[0].numel())


def planned_trace(path: NoisePath) -> Trace:
    """All steps of the run that the path's scheduler is set to, with the terms of no candidate."""
    timestep, log_snr = path.at_steps(path.steps)
    return _trace(torch.empty(len(_TERMS), 0, len(path.steps)), timestep, log_snr, path, dimensions=1)


def predicted_latents(steps: Sequence[Step], path: NoisePath, family: Family) -> Tensor:
    """ẑ₀ of the last step's output with the prompt, (B, ...), float32."""
    _, _, taken = _levels(steps, path, family)
    step = steps[-1]
    alpha, sigma = _alpha_sigma(step, taken[-1], path)
    noisy, output = step.noisy.float(), step.conditional.float()
    return epsilon_and_sample(output, noisy, alpha, sigma, path.predicts, is_flow=path.is_flow)[1]


def _levels(steps: Sequence[Step], path: NoisePath, family: Family) -> tuple[Tensor, Tensor, Tensor]:
    """The scheduler's timesteps of these steps, λ of the latents, and λ that they and the outputs are taken for, (T,)
    each."""
    times = torch.stack([step.timestep.flatten()[0] for step in steps]).float().cpu()
    times = (times - family.timestep_offset) / family.timestep_factor
    timestep, log_snr = path.at_steps(times)
    # Half precision rounds t by 0.4 % at the most. Anything else would put the terms at a wrong λ.
    astray = (times - timestep).abs().max() > ROUNDING * path.training_steps
    if astray or (path.places(times).diff() != 1).any():
        raise MituneError(
            f"The denoiser was told the time {times[0]:g} at the first step, which is none of its scheduler's; mitune "
            "does not know this kind of model. Please report it."
        )
    return timestep, log_snr, path.taken_at(times)


def _trace(terms: Tensor, timestep: Tensor, log_snr: Tensor, path: NoisePath, *, dimensions: int) -> Trace:
    """The trace with these `_TERMS`, (6, B, T), at these steps, (T,)."""
    return Trace(
        log_snr=log_snr,
        timestep=timestep,
        beta=path.beta(timestep),
        dimensions=dimensions,
        is_flow=path.is_flow,
        training_steps=path.training_steps,
        planned_steps=len(path.steps),
        **dict(zip(_TERMS, terms, strict=True)),
    )


def _alpha_sigma(step: Step, log_snr: Tensor, path: NoisePath) -> tuple[Tensor, Tensor]:
    alpha, sigma = alpha_sigma(log_snr, is_flow=path.is_flow)
    return alpha.to(step.noisy.device), sigma.to(step.noisy.device)


def _terms(step: Step, latents: Tensor | None, log_snr: Tensor, taken: Tensor, path: NoisePath) -> Tensor:
    """The `_TERMS` of a step, (6, B), float32: ‖Δε‖², ‖Δv‖², two RFMI products, two denoising errors.

    Outputs are read at the λ that the scheduler takes them for; the trajectory's noise, at that of the latents.
    """
    alpha, sigma = _alpha_sigma(step, taken, path)
    noisy, conditional, null = step.noisy.float(), step.conditional.float(), step.null.float()
    differences = [
        of(conditional - null, alpha, sigma, path.predicts) for of in (epsilon_difference, velocity_difference)
    ]

    def both(output: Tensor) -> tuple[Tensor, Tensor]:
        return epsilon_and_sample(output, noisy, alpha, sigma, path.predicts, is_flow=path.is_flow)

    (epsilon, sample), (epsilon_null, sample_null) = both(conditional), both(null)
    # The flow velocity of the same clean and noise estimates; for VP the one at the same λ. RFMI's u is its negative.
    velocity, velocity_null = epsilon - sample, epsilon_null - sample_null
    change = velocity - velocity_null
    guided_change = step.guidance_scale * change
    terms = [*(delta**2 for delta in differences), velocity * change, (velocity_null + guided_change) * guided_change]
    if latents is None:
        terms += [torch.full_like(noisy, math.nan)] * 2
    else:
        noise = true_noise(noisy, latents.float().to(noisy.device), *_alpha_sigma(step, log_snr, path))
        terms += [(epsilon - noise) ** 2, (epsilon_null - noise) ** 2]
    return torch.stack([term.flatten(1).sum(dim=1) for term in terms])
