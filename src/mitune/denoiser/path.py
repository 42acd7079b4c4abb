"""The Gaussian path z_t = α_t z₀ + σ_t ε of any diffusers scheduler, as the denoiser sees it.

A scheduler that keeps its latents at another scale (Euler and its kin: z₀ + σε) divides them by √(1 + σ²) before the
denoiser, so there the path is VP again; only that view counts here. t runs from clean (0) to noise.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, replace
from functools import cache
from typing import cast

import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    CogVideoXDPMScheduler,
    DDIMInverseScheduler,
    DDIMParallelScheduler,
    DDIMScheduler,
    DPMSolverMultistepInverseScheduler,
    DPMSolverSDEScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FlowMatchLCMScheduler,
    KDPM2AncestralDiscreteScheduler,
    KDPM2DiscreteScheduler,
    PNDMScheduler,
)
from torch import Tensor

from mitune.denoiser.pipeline import OptionalSchedulerMembers, Scheduler
from mitune.errors import MituneError
from mitune.information import Predicts, alpha_sigma

log = logging.getLogger(__name__)

_FLOW_MATCH = (FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler, FlowMatchLCMScheduler)
_INVERSE = (DDIMInverseScheduler, DPMSolverMultistepInverseScheduler)  # from clean to noise
_MIDPOINTS = (KDPM2DiscreteScheduler, KDPM2AncestralDiscreteScheduler)
# Step from t to t − T // steps, whatever the next timestep of their list is.
_STRIDING = (DDIMScheduler, DDIMParallelScheduler, CogVideoXDDIMScheduler, CogVideoXDPMScheduler, PNDMScheduler)
_UNPLACED = (  # option, the value that is not known, and the one that is
    ("invert_sigmas", True, False),
    ("timestep_type", "continuous", "discrete"),
    ("interpolation_type", "log_linear", "linear"),
    ("use_karras_sigmas", True, False),
)
_ROUNDING = 1e-3  # of a timestep: what sums of float32 may differ by
_PREDICTS: dict[str, Predicts] = {
    "epsilon": "epsilon",
    "v_prediction": "velocity",
    "flow_prediction": "velocity",
    "sample": "sample",
}


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class NoisePath:
    """α, σ, λ = log(α²/σ²) and β as functions of the scheduler's timestep t. Build it with `path_of`.

    Methods are elementwise, take fractional t, and work on the device of their argument in float32.
    """

    predicts: Predicts
    is_flow: bool
    training_steps: int
    training_log_snr: Tensor | None  # (training_steps,) λ at t = 0, 1, …; None for flow, where σ = t / training_steps
    betas: Tensor | None  # (training_steps,); None for flow
    steps: Tensor  # (T,) timesteps of the sampling run that the scheduler is set to
    steps_sigma: Tensor | None  # (T,) the scheduler's own σ there (σ/α unless flow); None if it has none
    strides: Tensor | None = None  # (T,) timesteps that the i-th step of a run goes down; None: to the next of `steps`
    caution: str | None = None  # what to say of a run whose denoiser gets other timesteps than its latents are at

    def log_snr(self, t: Tensor) -> Tensor:
        """λ at t on the path of training; linear in t between whole timesteps, as diffusers does with log σ."""
        t = t.float()
        if self.training_log_snr is None:
            return _flow_log_snr(t / self.training_steps)
        table = self.training_log_snr.to(t.device)
        below = t.floor().long().clamp(0, self.training_steps - 1)
        above = t.ceil().long().clamp(0, self.training_steps - 1)
        between = torch.lerp(table[below], table[above], t - t.floor())
        return torch.where(below == above, table[below], between)  # lerp of −∞ (zero terminal SNR) with itself is NaN

    def alpha(self, t: Tensor) -> Tensor:
        """α at t, of its shape."""
        return alpha_sigma(self.log_snr(t), is_flow=self.is_flow)[0]

    def sigma(self, t: Tensor) -> Tensor:
        """σ at t, of its shape."""
        return alpha_sigma(self.log_snr(t), is_flow=self.is_flow)[1]

    def beta(self, t: Tensor) -> Tensor:
        """β of the nearest whole timestep, of t's shape; NaN for flow, which has none."""
        if self.betas is None:
            return torch.full_like(t, math.nan, dtype=torch.float32)
        return self.betas.to(t.device)[t.round().long().clamp(0, self.training_steps - 1)]

    def timestep(self, log_snr: Tensor) -> Tensor:
        """t at λ on the path of training, the inverse of `log_snr`; λ beyond the ends of the path gives its ends."""
        if self.training_log_snr is None:
            return self.training_steps * torch.sigmoid(-log_snr.float() / 2)
        table = self.training_log_snr.to(log_snr.device)
        wanted = log_snr.float().clamp(table[table.isfinite()].min(), table.max()).contiguous()
        above = torch.searchsorted(-table, -wanted).clamp(1, self.training_steps - 1)
        high, low = table[above - 1], table[above]
        return above - (wanted - low) / (high - low)

    def log_snr_range(self) -> tuple[float, float]:
        """The λ that training has seen, noise end first; cut at σ = 0.99 and 0.01 for flow, whose ends are infinite."""
        if self.training_log_snr is None:
            end = 2 * math.log(0.99 / 0.01)
            return -end, end
        finite = self.training_log_snr[self.training_log_snr.isfinite()]
        return finite.min().item(), finite.max().item()

    def at_steps(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Timestep and λ of the latents, of t's shape on the CPU, where the denoiser gets t: at steps of the
        sampling run in succession, from the one on at which it was entered.

        What a trajectory needs: some schedulers hand the denoiser a rounded t, and some pipelines round it again, but
        the latents lie at the scheduler's own σ, or where its stride has put them. Warns once if that is not at t.
        Raises MituneError for steps that are none of the path.
        """
        if self.steps_sigma is None and (self.steps < 0).any():  # what its table has at −1 is pure noise
            raise MituneError(
                f"The scheduler has a timestep below 0 among its {len(self.steps)}, as diffusers rounds the spacing "
                "'trailing' for this number of steps; take another number."
            )
        index = self.places(t.reshape(-1))
        timesteps = self.steps[index]
        if self.caution is not None:
            _warn_once(self.caution)
        log_snr = (
            self._taken(index) if self.strides is None else self.log_snr(_latent_timesteps(timesteps, self.strides))
        )
        return timesteps.reshape(t.shape), log_snr.reshape(t.shape)

    def taken_at(self, t: Tensor) -> Tensor:
        """The λ, as in `at_steps`, that the scheduler takes latents and output for: that of the latents, too, unless it
        has strides of its own. It says what an output means."""
        return self._taken(self.places(t.reshape(-1))).reshape(t.shape)

    def _taken(self, index: Tensor) -> Tensor:
        if self.steps_sigma is None:
            return self.log_snr(self.steps[index])
        sigma = self.steps_sigma[index]
        return _flow_log_snr(sigma) if self.is_flow else -2 * sigma.log()

    def places(self, t: Tensor) -> Tensor:
        """Which steps of the run these are, (N,) on the CPU: those in succession that fit t (N,) best, as rounded
        timesteps may repeat; but each the nearest where none in succession fit as well."""
        gaps = (t.float().cpu().unsqueeze(-1) - self.steps).abs()  # (N, T)
        each, nearest = gaps.min(dim=-1)
        starts = range(len(self.steps) - len(t) + 1)
        if not starts:
            return nearest
        misfits = torch.stack([gaps.diagonal(start).sum() for start in starts])
        fits = misfits.min() <= each.sum() + _ROUNDING
        return misfits.argmin() + torch.arange(len(t)) if fits else nearest

    def add_noise(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """α_t z₀ + σ_t ε for latents z₀ and noise ε (B, C, H, W) and t, a scalar or (B,); in the dtype of latents."""
        alpha, sigma = alpha_sigma(self.log_snr(t.to(latents.device)), is_flow=self.is_flow)
        shape = (-1, *[1] * (latents.ndim - 1))
        return (alpha.reshape(shape) * latents + sigma.reshape(shape) * noise).to(latents.dtype)


def path_of(scheduler: Scheduler) -> NoisePath:
    """The path of a diffusers scheduler and of the sampling run that it is set to.

    Known: the flow-matching Euler, Heun and LCM schedulers, and every scheduler with a table of ᾱ (DDPM, DDIM, PNDM,
    DPM-Solver++, UniPC, DEIS, Euler, Euler ancestral, Heun, LMS, KDPM2, LCM, …), also with `use_flow_sigmas`.
    Raises MituneError for any other scheduler or prediction type (`docs/support.md` lists both).
    """
    name, config = type(scheduler).__name__, getattr(scheduler, "config", None)
    is_flow_match = isinstance(scheduler, _FLOW_MATCH)
    has_table = hasattr(scheduler, "alphas_cumprod") and "prediction_type" in (config or {})
    if config is None or isinstance(scheduler, _INVERSE) or not (is_flow_match or has_table):
        raise MituneError(
            f"Scheduler {name} has no noise path that mitune knows; set pipe.scheduler to one with alphas_cumprod, "
            "such as DDIMScheduler.from_config(pipe.scheduler.config), or to FlowMatchEulerDiscreteScheduler."
        )
    prediction = "flow_prediction" if is_flow_match else config.prediction_type
    if prediction not in _PREDICTS:
        raise MituneError(
            f"Scheduler {name} has prediction_type={prediction!r}; mitune knows {', '.join(_PREDICTS)}. Load the "
            "scheduler with the type that the model was trained for."
        )
    for option, unknown, instead in _UNPLACED:
        # KDPM2 with Karras' steps goes beyond its table, where the time that the denoiser gets stands still.
        if config.get(option) == unknown and (option != "use_karras_sigmas" or isinstance(scheduler, _MIDPOINTS)):
            raise MituneError(
                f"Scheduler {name} with {option}={unknown!r} hands the denoiser noise levels that mitune cannot place "
                f"on a path; set {option}={instead!r}."
            )
    is_flow = is_flow_match or bool(config.get("use_flow_sigmas")) or prediction == "flow_prediction"
    training_steps = int(config.num_train_timesteps)
    if scheduler.timesteps is None:  # PNDM before its first run
        steps = torch.arange(training_steps - 1, -1, -1).float()
    else:
        steps = scheduler.timesteps.detach().float().cpu()
    tables = cast(OptionalSchedulerMembers, scheduler)
    path = NoisePath(
        predicts=_PREDICTS[prediction],
        is_flow=is_flow,
        training_steps=training_steps,
        training_log_snr=None if is_flow else _vp_log_snr(tables.alphas_cumprod),
        betas=None if is_flow else tables.betas.detach().float().cpu(),
        steps=steps,
        steps_sigma=_steps_sigma(scheduler, len(steps)),
        strides=_strides(scheduler, len(steps)),
    )
    return replace(path, caution=_caution(scheduler, path))


def _steps_sigma(scheduler: Scheduler, steps: int) -> Tensor | None:
    """σ of each step from the scheduler's table, (steps,); None where it has none, or has not been set to a run."""
    sigmas = getattr(scheduler, "sigmas", None)
    # With its final σ, a table has one entry more than there are steps. Before a run some run the other way.
    if sigmas is None or len(sigmas) != steps + 1:
        return None
    sigma: Tensor = sigmas[:-1].detach().float().cpu()
    if isinstance(scheduler, DPMSolverSDEScheduler):  # its midpoints stand in no table
        sigma = sigma.clone()
        sigma[1::2] *= (sigma[:-1:2] / sigma[1::2]).sqrt()
    return sigma


def _strides(scheduler: Scheduler, steps: int) -> Tensor | None:
    """How far each step of a run goes down, (steps,), for schedulers that do not go to the next of their timesteps."""
    count = getattr(scheduler, "num_inference_steps", None)
    if not isinstance(scheduler, _STRIDING) or count is None:
        return None
    strides = torch.full((steps,), scheduler.config.num_train_timesteps // count)
    if isinstance(scheduler, PNDMScheduler):
        # Runge-Kutta steps go half-way, and there again; without them, the second step is the first one again.
        runge_kutta = len(scheduler.prk_timesteps)
        strides[:runge_kutta:2] //= 2
        strides[1 : max(runge_kutta, 2) : 2] = 0
    return strides


def _latent_timesteps(timesteps: Tensor, strides: Tensor) -> Tensor:
    """The timesteps that the latents of a run's first steps were made for, (N,), by the step before."""
    return torch.cat([timesteps[:1], timesteps[:-1] - strides[: len(timesteps) - 1]])


def _caution(scheduler: Scheduler, path: NoisePath) -> str | None:
    """A sentence for a run in which the scheduler takes its latents for those of another timestep than it made them
    for, and hands that to the denoiser."""
    if path.strides is None:
        return None
    latent_timesteps = _latent_timesteps(path.steps, path.strides)
    apart = latent_timesteps != path.steps
    if not apart.any():
        return None
    distance = (path.log_snr(latent_timesteps[apart]) - path.log_snr(path.steps[apart])).abs().max()
    total = int(scheduler.config.num_train_timesteps)
    count = cast(OptionalSchedulerMembers, scheduler).num_inference_steps or total
    spacing = scheduler.config.timestep_spacing
    remedy = "the scheduler's timestep_spacing 'leading'"
    if isinstance(scheduler, PNDMScheduler) and not scheduler.config.skip_prk_steps:
        remedy += " with skip_prk_steps"
    elif spacing == "trailing":
        divisors = (n for n in range(2, total + 1) if total % n == 0)
        remedy = f"{min(divisors, key=lambda n: abs(n - count))} steps, or {remedy},"
    return (
        f"{type(scheduler).__name__} with {count} steps and timestep_spacing={spacing!r} tells the denoiser other "
        f"timesteps than its latents are at; scores allow for that (up to {distance:.2g} in log-SNR), but {remedy} "
        "would avoid it."
    )


@cache
def _warn_once(sentence: str) -> None:
    log.warning(sentence)


def _vp_log_snr(alphas_cumprod: Tensor) -> Tensor:
    alpha_bar = alphas_cumprod.detach().double().cpu()
    return (alpha_bar.log() - torch.log1p(-alpha_bar)).float()


def _flow_log_snr(sigma: Tensor) -> Tensor:
    sigma = sigma.clamp(max=1)  # a shifted σ of 1 may be rounded up
    return 2 * (torch.log1p(-sigma) - sigma.log())
