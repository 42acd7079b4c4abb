"""A forward hook on a pipeline's denoiser: everything that scoring needs, while an unmodified pipeline samples.

    with MIProbe(pipe) as probe:
        latents = pipe(prompts, guidance_scale=4.5, output_type="latent").images
    trace = probe.trace(latents)
    get_score("self-confidence")(trace)

The hook only keeps tensors; all arithmetic waits for `trace`, so sampling does not wait for the device.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType, TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from mitune.errors import GuidanceError, MituneError, ModelError
from mitune.information import Trace, alpha_sigma, epsilon_and_sample, epsilon_difference, true_noise
from mitune.path import NoisePath, path_of


@dataclass(frozen=True, slots=True)
class Family:
    """What a family of denoisers does unlike SD and SD3: one call a step for [unconditional; conditional] halves."""

    separate_calls: bool = False  # two calls a step instead, the conditional one first
    timestep_factor: float = 1.0  # the denoiser is told factor · t + offset, t the scheduler's timestep
    timestep_offset: float = 0.0
    negated: bool = False  # the pipeline turns the output's sign before the scheduler takes it


_FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "AuraFlowTransformer2DModel": Family(timestep_factor=1e-3),
        "CogView4Transformer2DModel": Family(separate_calls=True),
        "Lumina2Transformer2DModel": Family(
            separate_calls=True, timestep_factor=-1e-3, timestep_offset=1.0, negated=True
        ),
    }
)


def denoiser_of(pipe: Any) -> nn.Module:
    """The network that a diffusers pipeline denoises with: `pipe.unet` or `pipe.transformer`.

    Raises ModelError if there is neither.
    """
    for name in ("unet", "transformer"):
        module = getattr(pipe, name, None)
        if isinstance(module, nn.Module):
            return module
    raise ModelError(
        f"{type(pipe).__name__} has neither a unet nor a transformer; mitune scores diffusers pipelines that denoise "
        "with one of them."
    )


def family_of(denoiser: nn.Module) -> Family:
    """The row of the table for this denoiser; that of SD and SD3 if it has none of its own."""
    return _FAMILIES.get(type(denoiser).__name__, Family())


@dataclass(frozen=True, slots=True)
class _Step:
    """One denoising step of B candidates, in the dtype of the model."""

    timestep: Tensor  # (), as the denoiser was told
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


@dataclass(slots=True)
class _Run:
    """What the hook has seen of one call of the pipeline."""

    batch: int = 0  # rows of the denoiser's input at the first step
    conditioning: tuple[dict[str, Any], ...] = ()  # of the first step: one for both halves, or conditional and null
    candidates: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))  # left of the first step's
    steps: list[_Step] = field(default_factory=list)
    pending: _Call | None = None  # the conditional call of a step whose unconditional one is yet to come
    finished: bool = False

    def begin(self, candidates: int, *calls: _Call) -> None:
        self.batch = len(calls[0].noisy)
        self.conditioning = tuple(call.conditioning for call in calls)
        self.candidates = torch.arange(candidates)


class MIProbe:
    """Watches one call of a pipeline at a time and turns it into a `Trace`.

    Keeps z and both outputs of each step on the device: three tensors of the latents' size and dtype a candidate and
    step (10 MB for 50 steps of SD at 512² in float32). The trace of a call stands until the pipeline is called again.

    guidance_scale is only needed for the score rfmi-release on pipelines that do not tell theirs (PixArt, AuraFlow).
    Raises ModelError or MituneError at the start if the pipeline's denoiser or scheduler is not known, and
    GuidanceError from within the pipeline if it makes no pass without the prompt.
    """

    def __init__(self, pipe: Any, *, guidance_scale: float | None = None) -> None:
        self.pipe = pipe
        self.denoiser = denoiser_of(pipe)
        self._family = family_of(self.denoiser)
        self._signature = inspect.signature(self.denoiser.forward)
        self._guidance_scale = guidance_scale
        self._handle: torch.utils.hooks.RemovableHandle | None = None
        self._run = _Run()

    def __enter__(self) -> Self:
        path_of(self.pipe.scheduler)  # refuses an unknown scheduler before the first image is paid for
        self._handle = self.denoiser.register_forward_hook(self._watch, with_kwargs=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    @property
    def steps(self) -> int:
        """Denoising steps seen since the pipeline was called."""
        return len(self._run.steps)

    @property
    def conditioning(self) -> dict[str, Tensor]:
        """What the denoiser is conditioned on with the prompt: each tensor argument but z and t, (B, ...), by name.

        Nested arguments are flattened with dots (added_cond_kwargs.text_embeds); `unflatten` undoes that. Tensors
        without a batch dimension are repeated. Arguments that are no tensors are left out.
        """
        return self._conditioning_at(0 if self._family.separate_calls else self._run.batch // 2, self._run.conditioning)

    @property
    def null_conditioning(self) -> dict[str, Tensor]:
        """The same without the prompt."""
        return self._conditioning_at(0, self._run.conditioning[::-1])

    def keep(self, candidates: Sequence[int]) -> None:
        """Forgets all other candidates; call it when a callback hands the pipeline fewer latents.

        candidates: their places in the present batch. A `trace` taken before keeps what is known of those dropped.
        """
        index = torch.tensor(candidates, dtype=torch.long)
        self._run.steps = [step.select(index) for step in self._run.steps]
        self._run.candidates = self._run.candidates[index]

    def trace(self, latents: Tensor | None = None) -> Trace:
        """The terms of all steps so far, (B, T).

        latents: the final z₀ (B, C, H, W) as the denoiser sees it, `output_type="latent"`; the denoising errors need
        it and are NaN without. Raises MituneError if there is nothing to trace, or more than one call of the pipeline.
        """
        if self._run.pending is not None:
            raise GuidanceError(self._no_guidance())
        path, steps = path_of(self.pipe.scheduler), self._seen_steps()
        if len(steps) > len(path.steps):
            raise MituneError(
                f"The probe has seen {len(steps)} denoising steps, but the scheduler ran {len(path.steps)}; take "
                "probe.trace(latents) after each call of the pipeline."
            )
        self._run.finished = latents is not None
        return _trace(steps, latents, path, self._family)

    def _watch(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if kwargs.get("skip_layers") is not None:
            return  # skip-layer guidance of SD3.5: a third, crippled output, no part of the integral
        if self._run.finished:
            self._run = _Run()
        call = self._read(args, kwargs, output)
        if self._family.separate_calls:
            self._watch_separate(call)
            return
        half = len(call.noisy) // 2
        if not self._run.steps:
            self._check_halves(call.noisy)
            self._run.begin(half, call)
        self._append(call, conditional=call.output[half:], null=call.output[:half], noisy=call.noisy[:half])

    def _watch_separate(self, call: _Call) -> None:
        pending = self._run.pending
        if pending is None:
            self._run.pending = call
            return
        # Without guidance, this is the next step's conditional call, on new latents.
        if call.noisy.data_ptr() != pending.noisy.data_ptr():
            raise GuidanceError(self._no_guidance())
        if not self._run.steps:
            self._run.begin(len(call.noisy), pending, call)
        self._append(call, conditional=pending.output, null=call.output, noisy=call.noisy)
        self._run.pending = None

    def _read(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> _Call:
        arguments = dict(self._signature.bind(*args, **kwargs).arguments)
        noisy = arguments.pop(next(iter(self._signature.parameters)))
        timestep = torch.as_tensor(arguments.pop("timestep"))
        predicted = output[0] if isinstance(output, tuple) else output.sample
        return _Call(noisy, timestep, -predicted if self._family.negated else predicted, arguments)

    def _check_halves(self, noisy: Tensor) -> None:
        # The only time that the device is waited for, once a call: halves that differ are two sets of candidates.
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
        noisy, conditional, null = (x.detach()[:, :channels].clone() for x in (noisy, conditional, null))
        scale = self._guidance_scale or getattr(self.pipe, "guidance_scale", None) or math.nan
        run.steps.append(_Step(call.timestep.flatten()[0].clone(), noisy, conditional, null, scale))

    def _seen_steps(self) -> list[_Step]:
        if not self._run.steps:
            raise MituneError("The probe has seen no denoising step; call the pipeline within `with MIProbe(pipe):`.")
        return self._run.steps

    def _conditioning_at(self, first: int, calls: tuple[dict[str, Any], ...]) -> dict[str, Tensor]:
        """Rows of the candidates that are left, counted from `first`, in the arguments of the first of `calls`."""
        self._seen_steps()
        candidates, rows = self._run.candidates, {}
        for name, value in _flatten(calls[0]).items():
            if value.ndim and len(value) == self._run.batch:
                rows[name] = value[(candidates + first).to(value.device)]
            else:
                rows[name] = value.expand(len(candidates), *value.shape)
        return rows

    def _no_guidance(self) -> str:
        return (
            f"{type(self.pipe).__name__} ran its denoiser without an unconditional half at step {self.steps}; mutual "
            "information needs both. Set guidance_scale > 1, or pick a model that is not guidance-distilled."
        )


def unflatten(conditioning: Mapping[str, Tensor]) -> dict[str, Any]:
    """Keyword arguments for the denoiser from `MIProbe.conditioning`: names with dots become nested dictionaries."""
    nested: dict[str, Any] = {}
    for name, value in conditioning.items():
        *parents, last = name.split(".")
        inner = nested
        for parent in parents:
            inner = inner.setdefault(parent, {})
        inner[last] = value
    return nested


def _flatten(arguments: Mapping[str, Any], prefix: str = "") -> dict[str, Tensor]:
    flat: dict[str, Tensor] = {}
    for name, value in arguments.items():
        if isinstance(value, Tensor):
            flat[prefix + name] = value.detach()
        elif isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{name}.")
        elif isinstance(value, (list, tuple)) and any(isinstance(item, Tensor) for item in value):
            raise ModelError(
                f"The denoiser takes a list of tensors as {prefix}{name}, which cannot be kept candidate by candidate; "
                "leave out what the pipeline makes it from (ControlNet, adapters), or score on-line alone."
            )
    return flat


def _trace(steps: Sequence[_Step], latents: Tensor | None, path: NoisePath, family: Family) -> Trace:
    told = torch.stack([step.timestep for step in steps]).float().cpu()
    timestep, log_snr = path.at_steps((told - family.timestep_offset) / family.timestep_factor)
    terms = [_terms(step, latents, level, path) for step, level in zip(steps, log_snr, strict=True)]
    rows = torch.stack(terms, dim=-1).cpu()  # (5, B, T)
    return Trace(
        log_snr=log_snr,
        timestep=timestep,
        beta=path.beta(timestep),
        difference=rows[0],
        dot_conditional=rows[1],
        dot_guided=rows[2],
        error_conditional=rows[3],
        error_null=rows[4],
        dimensions=steps[0].noisy[0].numel(),
        is_flow=path.is_flow,
        planned_steps=len(path.steps),
    )


def _terms(step: _Step, latents: Tensor | None, log_snr: Tensor, path: NoisePath) -> Tensor:
    """The five terms of a step, (5, B), float32: ‖Δε‖², two RFMI products, two denoising errors."""
    alpha, sigma = (x.to(step.noisy.device) for x in alpha_sigma(log_snr, is_flow=path.is_flow))
    noisy, conditional, null = step.noisy.float(), step.conditional.float(), step.null.float()
    delta = epsilon_difference(conditional - null, alpha, sigma, path.predicts)

    def both(output: Tensor) -> tuple[Tensor, Tensor]:
        return epsilon_and_sample(output, noisy, alpha, sigma, path.predicts, is_flow=path.is_flow)

    (epsilon, sample), (epsilon_null, sample_null) = both(conditional), both(null)
    # The flow velocity of the same clean and noise estimates; for VP the one at the same λ. RFMI's u is its negative.
    velocity, velocity_null = epsilon - sample, epsilon_null - sample_null
    change = velocity - velocity_null
    guided_change = step.guidance_scale * change
    terms = [delta**2, velocity * change, (velocity_null + guided_change) * guided_change]
    if latents is None:
        terms += [torch.full_like(noisy, math.nan)] * 2
    else:
        noise = true_noise(noisy, latents.float().to(noisy.device), alpha, sigma)
        terms += [(epsilon - noise) ** 2, (epsilon_null - noise) ** 2]
    return torch.stack([term.flatten(1).sum(dim=1) for term in terms])
