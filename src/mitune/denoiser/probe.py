"""A forward hook on a pipeline's denoiser: everything that scoring needs, while an unmodified pipeline samples.

    with MIProbe(pipe) as probe:
        latents = pipe(prompts, guidance_scale=4.5, output_type="latent").images
    trace = probe.trace(latents)
    get_score("self-confidence")(trace)

The hook only keeps tensors; all arithmetic waits for `trace`, so sampling does not wait for the device, except at a
call's first step. There it is checked that the outputs, z and t are what we take them for, against what the pipeline
hands its scheduler.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from mitune.denoiser.batches import Rows, prediction, skips_layers
from mitune.denoiser.conditioning import flatten
from mitune.denoiser.guidance import ROWS, Handed, Sum, steps_watched, sums
from mitune.denoiser.network import Family, as_tensor, denoiser_of, family_of, network_output
from mitune.denoiser.path import NoisePath, path_of
from mitune.errors import GuidanceError, MituneError, ModelError
from mitune.information import (
    Trace,
    alpha_sigma,
    epsilon_and_sample,
    epsilon_difference,
    true_noise,
    velocity_difference,
)

_TRUE_SCALE = "true_cfg_scale"  # what pipelines of guidance-distilled models call the scale of true guidance
_ROUNDING = 0.01  # of the training steps
_SAME = 0.02  # what half precision may make of one and the same, as a share
_SAME_OUTPUT = 0.05  # the same for what has gone through a network
_MISSAID = 0.05  # of the guidance scale


@dataclass(frozen=True, slots=True)
class _Step:
    """One denoising step of B candidates, in the dtype of the model."""

    timestep: Tensor  # () or (n,), as the denoiser was told
    noisy: Tensor  # (B, C, H, W) z
    conditional: Tensor  # (B, C, H, W) output with the prompt
    null: Tensor  # (B, C, H, W) output without
    guidance_scale: float

    def select(self, index: Tensor) -> _Step:
        index = index.to(self.noisy.device)
        noisy, conditional, null = self.noisy[index], self.conditional[index], self.null[index]
        return _Step(self.timestep, noisy, conditional, null, self.guidance_scale)


@dataclass(frozen=True, slots=True)
class _Call:
    """One call of the denoiser, arguments by name."""

    noisy: Tensor
    timestep: Tensor
    output: Tensor
    conditioning: dict[str, Any]
    address: int  # of the z that the pipeline handed over


@dataclass(slots=True)
class _Run:
    """What the hook has seen of one call of the pipeline."""

    batch: int = 0  # rows of the denoiser's input at the first step,
    total: int = 0  # of so many candidates
    conditioning: tuple[dict[str, Any], ...] = ()  # of the first step: one for both halves, or conditional and null
    candidates: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))  # left of the first step's
    dropped: dict[int, int] = field(default_factory=dict)  # the others, and after which step they were
    steps: list[_Step] = field(default_factory=list)
    pending: _Call | None = None  # the conditional call of a step whose unconditional one is yet to come
    crippled: int = 0  # the last step with a third output, of fewer layers
    more_than_latents: bool = False  # in z: a mask, a picture
    checked: bool = False  # against what the scheduler was handed
    guidance_scale: float | None = None  # as seen there, where the pipeline says something else
    finished: bool = False

    @property
    def narrowed(self) -> bool:
        """Whether candidates were dropped."""
        return len(self.candidates) < self.total

    def begin(self, candidates: int, *calls: _Call) -> None:
        self.batch, self.total = len(calls[0].noisy), candidates
        self.conditioning = tuple(call.conditioning for call in calls)
        self.candidates = torch.arange(candidates)


class MIProbe:
    """Watches one call of a pipeline at a time and turns it into a `Trace`.

    Keeps z and both outputs of each step on the device: three tensors of the latents' size and dtype a candidate and
    step (10 MB for 50 steps of SD at 512² in float32). The trace of a call stands until the pipeline is called again.

    guidance_scale is that of pipelines that do not tell theirs (PixArt, AuraFlow, those with true_cfg_scale); without
    it, it is read off what they make. on_step is called after each step with the probe itself, which may `keep` some.
    Raises ModelError or MituneError at the start if the pipeline's denoiser or scheduler is not known, and from within
    the pipeline GuidanceError if it makes no pass without the prompt, and ModelError if it uses its denoiser in a way
    that is not known.
    """

    def __init__(
        self,
        pipe: Any,
        *,
        guidance_scale: float | None = None,
        on_step: Callable[[MIProbe], None] | None = None,
    ) -> None:
        self.pipe = pipe
        self.denoiser = denoiser_of(pipe)
        self._family = family_of(self.denoiser)
        self._signature = inspect.signature(self.denoiser.forward)
        self._call_parameters = inspect.signature(type(pipe).__call__).parameters
        self._guidance_scale = guidance_scale
        self._on_step = on_step
        self._watching = ExitStack()
        self._run = _Run()
        self._taken: Rows | None = None
        self._address = 0

    def __enter__(self) -> Self:
        path_of(self.pipe.scheduler)  # refuses an unknown scheduler before the first image is paid for
        for handle in (
            self.denoiser.register_forward_pre_hook(self._narrow, with_kwargs=True),
            self.denoiser.register_forward_hook(self._watch, with_kwargs=True),
        ):
            self._watching.callback(handle.remove)
        self._watching.enter_context(steps_watched(self.pipe.scheduler, self._check))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._watching.close()

    @property
    def steps(self) -> int:
        """Denoising steps seen since the pipeline was called."""
        return len(self._run.steps)

    @property
    def checked(self) -> bool:
        """Whether a step has shown that the pipeline uses its denoiser as is thought."""
        return self._run.checked

    @property
    def conditioning(self) -> dict[str, Tensor]:
        """The denoiser's arguments with the prompt, but z and t, (B, ...), as in `mitune.denoiser.conditioning`.

        Raises ModelError for arguments that cannot be kept candidate by candidate (ControlNet), and if the denoiser
        takes more than latents (inpainting).
        """
        family = self._family
        first = 0 if family.separate_calls or family.conditional_first else self._run.batch // 2
        return self._conditioning_at(first, self._run.conditioning)

    @property
    def null_conditioning(self) -> dict[str, Tensor]:
        """The same without the prompt."""
        first = self._run.batch // 2 if self._family.conditional_first else 0
        return self._conditioning_at(first, self._run.conditioning[::-1])

    @torch.no_grad()
    def check_alone(self) -> None:
        """Raises ModelError unless the denoiser, called alone with the conditioning, says what it said in the pipeline:
        what post-hoc scores and training rest on. Costs two calls of it, for one candidate."""
        step, family = self._seen_steps()[0], self._family
        timestep = (step.timestep.flatten()[:1].float() - family.timestep_offset) / family.timestep_factor
        for conditioning, output in ((self.conditioning, step.conditional), (self.null_conditioning, step.null)):
            one = {name: value[:1] for name, value in conditioning.items()}
            try:
                alone = network_output(self.denoiser, step.noisy[:1], one, timestep.to(step.noisy.device))
            except torch.OutOfMemoryError:
                raise
            except (RuntimeError, TypeError, ValueError) as error:
                raise self._unknown("cannot be called again with what it was told in the pipeline") from error
            difference = (alone - output[:1].float()).norm() / output[:1].float().norm().clamp(min=1e-30)
            if not difference < _SAME_OUTPUT:
                raise self._unknown("says something else when it is called again with what it was told in the pipeline")

    def keep(self, candidates: Sequence[int]) -> None:
        """Drops all other candidates: from the next step on, the denoiser is not called for them.

        candidates: their places in the present batch. The pipeline may go on with all latents, of which those dropped
        become meaningless, or a callback may hand it the kept ones alone. A `trace` taken before keeps what is known
        of those dropped.
        """
        index, before = torch.tensor(candidates, dtype=torch.long), self.candidates
        self._run.steps = [step.select(index) for step in self._run.steps]
        self._run.candidates = self._run.candidates[index]
        self._run.dropped |= dict.fromkeys(set(before) - set(self.candidates), self.steps)

    @property
    def candidates(self) -> list[int]:
        """The places, in the first step's batch, of the candidates that are left."""
        places: list[int] = self._run.candidates.tolist()
        return places

    @property
    def dropped(self) -> dict[int, int]:
        """The places of the others, with the number of steps that each has got."""
        return self._run.dropped

    def trace(self, latents: Tensor | None = None) -> Trace:
        """The terms of all steps so far, (B, T).

        latents: the final z₀ (B, ...) as the denoiser sees it, `output_type="latent"`, of all candidates or of those
        left; the denoising errors need it and are NaN without. Raises MituneError if there is nothing to trace, or
        more than one call of the pipeline.
        """
        path, steps = self._path_and_steps()
        self._run.finished = latents is not None
        if latents is not None and self._run.narrowed and len(latents) == self._run.total:
            latents = latents[self._run.candidates.to(latents.device)]
        return _trace(steps, latents, path, self._family)

    def trace_so_far(self) -> Trace:
        """The terms of the steps so far, (B, T), with the ẑ₀ that the last of them predicts for the final z₀.

        For scores that are read while the pipeline runs.
        """
        path, steps = self._path_and_steps()
        _, _, taken = _levels(steps, path, self._family)
        return _trace(steps, _predicted_latents(steps[-1], taken[-1], path), path, self._family)

    def planned(self) -> Trace:
        """All steps that the scheduler is set to, with the terms of no candidate: what `Score.check` asks for."""
        path = path_of(self.pipe.scheduler)
        timestep, log_snr = path.at_steps(path.steps)
        return _trace_of(torch.empty(len(_TERMS), 0, len(path.steps)), timestep, log_snr, path, dimensions=1)

    @property
    def planned_steps(self) -> int:
        """Denoising steps of the whole run."""
        return len(self.pipe.scheduler.timesteps)

    def _path_and_steps(self) -> tuple[NoisePath, list[_Step]]:
        if self._run.pending is not None:
            raise GuidanceError(self._no_guidance())
        path, steps = path_of(self.pipe.scheduler), self._seen_steps()
        if len(steps) > len(path.steps):
            raise MituneError(
                f"The probe has seen {len(steps)} denoising steps, but the scheduler ran {len(path.steps)}; take "
                "probe.trace(latents) after each call of the pipeline."
            )
        return path, steps

    def _narrow(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Takes the rows of dropped candidates out of what the pipeline hands the denoiser."""
        run, bound = self._run, self._signature.bind(*args, **kwargs)
        handed = bound.arguments[next(iter(self._signature.parameters))]
        rows, self._address = len(handed), handed[0].data_ptr()
        if run.finished or not run.narrowed:
            return None
        if rows != (run.total if skips_layers(kwargs) else run.batch):
            return None  # a callback has dropped them
        starts = torch.arange(0, rows, run.total).unsqueeze(1)
        self._taken = Rows((starts + run.candidates).flatten(), rows)
        bound.arguments |= self._taken.of_arguments(bound.arguments, self._family)
        return bound.args, bound.kwargs

    def _watch(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        taken, self._taken = self._taken, None
        whole = None if taken is None else (taken.back(prediction(output)),)
        if skips_layers(kwargs):
            self._run.crippled = self.steps
            return whole  # skip-layer guidance of SD3.5: a third, crippled output, no part of the integral
        if self._run.finished:
            self._run = _Run()
        call, seen = self._read(args, kwargs, output), self.steps
        if self._family.separate_calls:
            self._watch_separate(call)
        else:
            self._watch_halves(call)
        if self._on_step is not None and self.steps > seen:
            self._on_step(self)
        return whole

    def _watch_halves(self, call: _Call) -> None:
        half = len(call.noisy) // 2
        if not self._run.steps:
            self._check_halves(call.noisy)
            self._run.begin(half, call)
        null, conditional = call.output[:half], call.output[half:]
        if self._family.conditional_first:
            null, conditional = conditional, null
        self._append(call, conditional=conditional, null=null, noisy=call.noisy[:half])

    def _watch_separate(self, call: _Call) -> None:
        pending = self._run.pending
        if pending is None:
            self._run.pending = call
            return
        # Without guidance, this is the next step's conditional call, on new latents.
        if call.address != pending.address:
            raise GuidanceError(self._no_guidance())
        if not self._run.steps:
            self._run.begin(len(call.noisy), pending, call)
        self._append(call, conditional=pending.output, null=call.output, noisy=call.noisy)
        self._run.pending = None

    def _read(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> _Call:
        given = self._signature.bind(*args, **kwargs).arguments
        # Pipelines change mappings of arguments between their calls.
        arguments: dict[str, Any] = {k: dict(v) if isinstance(v, Mapping) else v for k, v in given.items()}
        noisy = as_tensor(arguments.pop(next(iter(self._signature.parameters))))
        timestep = torch.as_tensor(arguments.pop(self._family.timestep_name))
        predicted = as_tensor(prediction(output))
        return _Call(noisy, timestep, -predicted if self._family.negated else predicted, arguments, self._address)

    def _check_halves(self, noisy: Tensor) -> None:
        # Waits for the device, once a call: halves that differ are two sets of candidates.
        half = len(noisy) // 2
        guided = getattr(self.pipe, "do_classifier_free_guidance", True)
        if not guided or len(noisy) % 2 or not torch.equal(noisy[:half], noisy[half:]):
            raise GuidanceError(self._no_guidance())

    def _append(self, call: _Call, *, noisy: Tensor, conditional: Tensor, null: Tensor) -> None:
        run = self._run
        if len(noisy) != len(run.candidates):
            raise MituneError(
                f"The batch went from {len(run.candidates)} to {len(noisy)} candidates at step {len(run.steps)}; call "
                "probe.keep(candidates) where you drop some, and probe.trace(latents) between calls of the pipeline."
            )
        # Learned variances and the extra inputs of inpainting are further channels.
        channels = min(noisy.shape[1], conditional.shape[1])
        run.more_than_latents = noisy.shape[1] > channels
        noisy, conditional, null = (x.detach()[:, :channels].clone() for x in (noisy, conditional, null))
        scale = self._scale() if run.guidance_scale is None else run.guidance_scale
        run.steps.append(_Step(call.timestep.detach().clone(), noisy, conditional, null, scale))

    def _check(self, handed: Handed | None) -> None:
        """Compares the latest step with what the pipeline hands its scheduler; until one of them decides."""
        run = self._run
        if run.finished or run.checked or run.narrowed:
            return
        if run.pending is not None:
            raise GuidanceError(self._no_guidance())
        if not run.steps:
            return
        step = run.steps[-1]
        if handed is None:
            raise self._unknown("is not stepped from latents and output in a way that can be checked")
        channels = step.noisy.shape[1]
        sample, made = handed.sample[:, :channels], handed.output[:, :channels]
        if sample.shape != step.noisy.shape or made.shape != step.noisy.shape:
            raise self._unknown(
                f"takes {tuple(step.noisy.shape)} where its scheduler takes latents {tuple(handed.sample.shape)}"
            )
        timestep = torch.as_tensor(handed.timestep).flatten()[:1].tolist()[0]
        self._check_time(step, timestep)
        # A candidate that is NaN says nothing, and costs itself alone.
        tensors = [x[:ROWS] for x in (sample, step.noisy, step.null, step.conditional, made)]
        finite = torch.stack([x.flatten(1).isfinite().all(dim=1) for x in tensors]).all(dim=0)
        if not finite.any():
            return
        sample, noisy, null, conditional, made = (x[finite] for x in tensors)
        self._check_latents(sample, noisy, timestep)
        if run.crippled != self.steps:
            run.checked = self._check_sum(step, sums(null, conditional, made))

    def _check_time(self, step: _Step, timestep: float) -> None:
        family, total = self._family, float(self.pipe.scheduler.config.num_train_timesteps)
        told = step.timestep.flatten().float()
        ends = torch.stack([told.min(), told.max()]).tolist()
        if any(
            abs((end - family.timestep_offset) / family.timestep_factor - timestep) > _ROUNDING * total for end in ends
        ):
            raise self._unknown(f"was told the time {ends[0]:g} to {ends[1]:g} at its scheduler's {timestep:g}")

    def _check_latents(self, sample: Tensor, noisy: Tensor, timestep: float) -> None:
        """z is the scheduler's latents, times α where these are z₀ + σ ε."""
        sample, noisy = sample.float(), noisy.float()
        scale = (sample * noisy).sum() / sample.square().sum()
        found, misfit = torch.stack([scale, (noisy - scale * sample).norm() / noisy.norm()]).tolist()
        expected = 1.0
        if float(getattr(self.pipe.scheduler, "init_noise_sigma", 1.0)) > 1.0 + _SAME:
            path = path_of(self.pipe.scheduler)
            expected = alpha_sigma(path.at_steps(torch.tensor(timestep))[1], is_flow=path.is_flow)[0].item()
        if not (misfit < _SAME and abs(found / expected - 1) < _SAME):
            raise self._unknown("gets other latents than its scheduler")

    def _check_sum(self, step: _Step, made: Sequence[Sum]) -> bool:
        """Whether the outputs tell; the guidance scale is kept where it is another than the pipeline says."""
        found = [each for each in made if each.certain]
        if not found:
            return False
        fitting = next((each for each in found if each.fits), None)
        if fitting is None:
            raise self._unknown("gives outputs of which the pipeline makes something else than their guided sum")
        if not fitting.in_order:
            raise self._unknown("gives outputs with and without the prompt in another order, or with another sign")
        if not abs(step.guidance_scale / fitting.weight - 1) < _MISSAID:
            self._run.guidance_scale = fitting.weight
            self._run.steps[-1] = replace(step, guidance_scale=fitting.weight)
        return True

    def _unknown(self, what: str) -> ModelError:
        return ModelError(
            f"The {type(self.denoiser).__name__} of {type(self.pipe).__name__} {what}; mitune does not know how to "
            "read this kind of model, see docs/support.md."
        )

    def _seen_steps(self) -> list[_Step]:
        if not self._run.steps:
            raise MituneError("The probe has seen no denoising step; call the pipeline within `with MIProbe(pipe):`.")
        return self._run.steps

    def _scale(self) -> float:
        told = None if _TRUE_SCALE in self._call_parameters else getattr(self.pipe, "guidance_scale", None)
        return (self._guidance_scale or told or math.nan) + self._family.added_guidance

    def _conditioning_at(self, first: int, calls: tuple[dict[str, Any], ...]) -> dict[str, Tensor]:
        """Rows of the candidates that are left, counted from `first`, in the arguments of the first of `calls`."""
        self._seen_steps()
        family = self._family
        if self._run.more_than_latents:
            raise self._unknown("takes more than latents, such as a mask or a picture, and can be scored on-line alone")
        rows = self._run.candidates + first
        return flatten(
            calls[0], self._run.batch, rows, shared=family.shared, layered=family.layered, listed=family.listed
        )

    def _no_guidance(self) -> str:
        if _TRUE_SCALE in self._call_parameters:
            remedy = f"Set {_TRUE_SCALE} > 1 and a negative_prompt, which may be a blank."
        elif getattr(self.pipe, "do_classifier_free_guidance", False):
            remedy = "As it says that it makes both, mitune does not know this kind of model; see docs/support.md."
        else:
            remedy = "Set guidance_scale > 1, or pick a model that is not guidance-distilled."
        return (
            f"{type(self.pipe).__name__} ran its denoiser without an unconditional half at step {self.steps}; mutual "
            f"information needs both. {remedy}"
        )


def _levels(steps: Sequence[_Step], path: NoisePath, family: Family) -> tuple[Tensor, Tensor, Tensor]:
    """The scheduler's timesteps of these steps, λ of the latents, and λ that they and the outputs are taken for, (T,)
    each."""
    told = torch.stack([step.timestep.flatten()[0] for step in steps]).float().cpu()
    told = (told - family.timestep_offset) / family.timestep_factor
    timestep, log_snr = path.at_steps(told)
    # Half precision rounds t by 0.4 % at the most. Anything else would put the terms at a wrong λ.
    astray = (told - timestep).abs().max() > _ROUNDING * path.training_steps
    if astray or (path.places(told).diff() != 1).any():
        raise MituneError(
            f"The denoiser was told the time {told[0]:g} at the first step, which is none of its scheduler's; mitune "
            "does not know this kind of model. Please report it."
        )
    return timestep, log_snr, path.taken_at(told)


def _predicted_latents(step: _Step, taken: Tensor, path: NoisePath) -> Tensor:
    """ẑ₀ of the output with the prompt, (B, ...), float32."""
    alpha, sigma = _alpha_sigma(step, taken, path)
    noisy, output = step.noisy.float(), step.conditional.float()
    return epsilon_and_sample(output, noisy, alpha, sigma, path.predicts, is_flow=path.is_flow)[1]


def _trace(steps: Sequence[_Step], latents: Tensor | None, path: NoisePath, family: Family) -> Trace:
    timestep, log_snr, taken = _levels(steps, path, family)
    levels = zip(steps, log_snr, taken, strict=True)
    terms = [_terms(step, latents, level, reading, path) for step, level, reading in levels]
    rows = torch.stack(terms, dim=-1).cpu()
    return _trace_of(rows, timestep, log_snr, path, dimensions=steps[0].noisy[0].numel())


_TERMS = ("difference", "difference_velocity", "dot_conditional", "dot_guided", "error_conditional", "error_null")


def _trace_of(terms: Tensor, timestep: Tensor, log_snr: Tensor, path: NoisePath, *, dimensions: int) -> Trace:
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


def _alpha_sigma(step: _Step, log_snr: Tensor, path: NoisePath) -> tuple[Tensor, Tensor]:
    alpha, sigma = alpha_sigma(log_snr, is_flow=path.is_flow)
    return alpha.to(step.noisy.device), sigma.to(step.noisy.device)


def _terms(step: _Step, latents: Tensor | None, log_snr: Tensor, taken: Tensor, path: NoisePath) -> Tensor:
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
