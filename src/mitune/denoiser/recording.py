"""What a probe keeps of one call of a pipeline: the denoiser's input and both outputs, step by step."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mitune.denoiser.batches import prediction
from mitune.denoiser.conditioning import Conditioning, Passes
from mitune.denoiser.network import Family, as_tensor, family_of
from mitune.denoiser.pipeline import DenoiserModule
from mitune.errors import MituneError


@dataclass(frozen=True, slots=True)
class Step:
    """One denoising step of B candidates, in the dtype of the model."""

    timestep: Tensor  # () or (n,), as the denoiser got it
    noisy: Tensor  # (B, C, H, W) z
    conditional: Tensor  # (B, C, H, W) output with the prompt
    null: Tensor  # (B, C, H, W) output without
    guidance_scale: float

    def select(self, index: Tensor) -> Step:
        """The candidates at these places, (n,)."""
        index = index.to(self.noisy.device)
        noisy, conditional, null = self.noisy[index], self.conditional[index], self.null[index]
        return Step(self.timestep, noisy, conditional, null, self.guidance_scale)


@dataclass(frozen=True, slots=True)
class Call:
    """One call of the denoiser, arguments by name."""

    noisy: Tensor
    timestep: Tensor
    output: Tensor
    arguments: dict[str, Any]
    address: int  # of the z that the pipeline handed over


@dataclass(frozen=True, slots=True)
class Reader:
    """How the calls of a denoiser are read."""

    signature: inspect.Signature
    family: Family

    @classmethod
    def of(cls, denoiser: DenoiserModule) -> Reader:
        return cls(inspect.signature(denoiser.forward), family_of(denoiser))

    def bind(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> inspect.BoundArguments:
        """The arguments by name."""
        return self.signature.bind(*args, **kwargs)

    @property
    def noisy_name(self) -> str:
        """Of the first argument, z."""
        return next(iter(self.signature.parameters))

    def read(self, args: Sequence[Any], kwargs: Mapping[str, Any], output: Any, address: int) -> Call:
        """A call and what came of it, with the output's sign as the scheduler takes it."""
        bound = self.bind(args, kwargs).arguments
        # Pipelines change mappings of arguments between their calls.
        arguments: dict[str, Any] = {k: dict(v) if isinstance(v, Mapping) else v for k, v in bound.items()}
        noisy = as_tensor(arguments.pop(self.noisy_name))
        timestep = torch.as_tensor(arguments.pop(self.family.timestep_name))
        predicted = as_tensor(prediction(output))
        return Call(noisy, timestep, -predicted if self.family.negated else predicted, arguments, address)


@dataclass(slots=True)
class Recording:
    """One call of the pipeline, so far."""

    family: Family
    batch: int = 0  # rows of the denoiser's input at the first step,
    total: int = 0  # of so many candidates
    arguments: tuple[dict[str, Any], ...] = ()  # of the first step: one for both halves, or conditional and null
    candidates: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))  # left of the first step's
    dropped: dict[int, int] = field(default_factory=dict)  # the others, and after which step they were
    steps: list[Step] = field(default_factory=list)
    pending: Call | None = None  # the conditional call of a step whose unconditional one is yet to come
    crippled: int = 0  # the last step with a third output, of fewer layers
    more_than_latents: bool = False  # in z: a mask, a picture
    checked: bool = False  # against what the scheduler was handed
    guidance_scale: float | None = None  # as seen there, where the pipeline says something else
    finished: bool = False

    @property
    def narrowed(self) -> bool:
        """Whether candidates were dropped."""
        return len(self.candidates) < self.total

    def begin(self, candidates: int, *calls: Call) -> None:
        """The first step of so many candidates."""
        self.batch, self.total = len(calls[0].noisy), candidates
        self.arguments = tuple(call.arguments for call in calls)
        self.candidates = torch.arange(candidates)

    def append(self, call: Call, *, noisy: Tensor, conditional: Tensor, null: Tensor, guidance_scale: float) -> None:
        """A step of the candidates that are left. Raises MituneError where it is one of others."""
        if len(noisy) != len(self.candidates):
            raise MituneError(
                f"The batch went from {len(self.candidates)} to {len(noisy)} candidates at step {len(self.steps)}; "
                "call probe.keep(candidates) where you drop some, and probe.trace(latents) between calls of the "
                "pipeline."
            )
        # Learned variances and the extra inputs of inpainting are further channels.
        channels = min(noisy.shape[1], conditional.shape[1])
        self.more_than_latents = noisy.shape[1] > channels
        noisy, conditional, null = (x.detach()[:, :channels].clone() for x in (noisy, conditional, null))
        scale = guidance_scale if self.guidance_scale is None else self.guidance_scale
        self.steps.append(Step(call.timestep.detach().clone(), noisy, conditional, null, scale))

    def keep(self, places: Sequence[int]) -> None:
        """Drops all candidates but those at these places of the present batch."""
        index, before = torch.tensor(places, dtype=torch.long), self.candidates.tolist()
        self.steps = [step.select(index) for step in self.steps]
        self.candidates = self.candidates[index]
        self.dropped |= dict.fromkeys(set(before) - set(self.candidates.tolist()), len(self.steps))

    @property
    def passes(self) -> Passes:
        """The denoiser's conditioning for the candidates that are left, at the first step."""
        family, half = self.family, self.batch // 2
        if family.separate_calls:
            calls, starts = self.arguments, (0, 0)
        else:
            calls, starts = self.arguments * 2, (0, half) if family.conditional_first else (half, 0)
        conditional, null = (
            Conditioning.of_call(
                arguments,
                self.batch,
                self.candidates + start,
                shared=family.shared,
                layered=family.layered,
                listed=family.listed,
            )
            for arguments, start in zip(calls, starts, strict=True)
        )
        return Passes(conditional, null)
