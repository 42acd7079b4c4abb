"""Whether a pipeline uses its denoiser as is thought: what it hands its scheduler, held against a recorded step.

Raises ModelError for a model that is used in another way, rather than have it scored wrongly.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mitune.denoiser.epsilon import NetworkDenoiser
from mitune.denoiser.guidance import ROWS, Handed, Sum, sums
from mitune.denoiser.network import Family
from mitune.denoiser.path import path_of
from mitune.denoiser.pipeline import DenoiserModule, Pipeline
from mitune.denoiser.recording import Recording, Step
from mitune.denoiser.terms import ROUNDING
from mitune.errors import ModelError
from mitune.information import alpha_sigma

_SAME = 0.02  # what half precision may make of one and the same, as a share
_SAME_OUTPUT = 0.05  # the same for what has gone through a network
_MISSAID = 0.05  # of the guidance scale


@dataclass(frozen=True, slots=True)
class Checks:
    """The checks of a pipeline with this denoiser, of this family."""

    pipe: Pipeline
    denoiser: DenoiserModule
    family: Family

    def unknown(self, what: str) -> ModelError:
        """What to say of a model that does `what`."""
        return ModelError(
            f"The {type(self.denoiser).__name__} of {type(self.pipe).__name__} {what}; mitune does not know how to "
            "read this kind of model, see docs/support.md."
        )

    def check_step(self, recording: Recording, handed: Handed | None) -> None:
        """Holds the latest step against what the scheduler is handed; until one of them decides.

        The guidance scale is kept where it is another than the pipeline says. Waits for the device.
        """
        step = recording.steps[-1]
        if handed is None:
            raise self.unknown("is not stepped from latents and output in a way that can be checked")
        channels = step.noisy.shape[1]
        sample, output = handed.sample[:, :channels], handed.output[:, :channels]
        if sample.shape != step.noisy.shape or output.shape != step.noisy.shape:
            raise self.unknown(
                f"takes {tuple(step.noisy.shape)} where its scheduler takes latents {tuple(handed.sample.shape)}"
            )
        timestep = torch.as_tensor(handed.timestep).flatten()[:1].tolist()[0]
        self._check_time(step, timestep)
        # A candidate that is NaN says nothing, and costs itself alone.
        tensors = [x[:ROWS] for x in (sample, step.noisy, step.null, step.conditional, output)]
        finite = torch.stack([x.flatten(1).isfinite().all(dim=1) for x in tensors]).all(dim=0)
        if not finite.any():
            return
        sample, noisy, null, conditional, output = (x[finite] for x in tensors)
        self._check_latents(sample, noisy, timestep)
        if recording.crippled == len(recording.steps):
            return
        guided = self._guided(sums(null, conditional, output))
        if guided is None:
            return
        recording.checked = True
        if not abs(step.guidance_scale / guided.weight - 1) < _MISSAID:
            recording.guidance_scale = guided.weight
            recording.steps[-1] = replace(step, guidance_scale=guided.weight)

    def _check_time(self, step: Step, timestep: float) -> None:
        family, total = self.family, float(self.pipe.scheduler.config.num_train_timesteps)
        times = step.timestep.flatten().float()
        ends = torch.stack([times.min(), times.max()]).tolist()
        if any(
            abs((end - family.timestep_offset) / family.timestep_factor - timestep) > ROUNDING * total for end in ends
        ):
            raise self.unknown(f"was told the time {ends[0]:g} to {ends[1]:g} at its scheduler's {timestep:g}")

    def _check_latents(self, sample: Tensor, noisy: Tensor, timestep: float) -> None:
        """z is the scheduler's latents, times α where these are z₀ + σ ε."""
        sample, noisy = sample.float(), noisy.float()
        scale = (sample * noisy).sum() / sample.square().sum()
        fitted, misfit = torch.stack([scale, (noisy - scale * sample).norm() / noisy.norm()]).tolist()
        expected = 1.0
        if float(getattr(self.pipe.scheduler, "init_noise_sigma", 1.0)) > 1.0 + _SAME:
            path = path_of(self.pipe.scheduler)
            expected = alpha_sigma(path.at_steps(torch.tensor(timestep))[1], is_flow=path.is_flow)[0].item()
        if not (misfit < _SAME and abs(fitted / expected - 1) < _SAME):
            raise self.unknown("gets other latents than its scheduler")

    def _guided(self, fits: list[Sum]) -> Sum | None:
        """How the output was put together; None where the two outputs differ by too little to tell."""
        certain = [each for each in fits if each.certain]
        if not certain:
            return None
        fitting = next((each for each in certain if each.fits), None)
        if fitting is None:
            raise self.unknown("gives outputs of which the pipeline makes something else than their guided sum")
        if not fitting.in_order:
            raise self.unknown("gives outputs with and without the prompt in another order, or with another sign")
        return fitting

    @torch.no_grad()
    def check_alone(self, recording: Recording) -> None:
        """That the denoiser, called alone with the conditioning, gives its output in the pipeline: what post-hoc
        scores and training rest on. Costs two calls of it, for one candidate."""
        step, denoiser = recording.steps[0], NetworkDenoiser.of(self.pipe)
        timestep = (step.timestep.flatten()[:1].float() - self.family.timestep_offset) / self.family.timestep_factor
        one = recording.passes.take([0])
        for conditioning, output in ((one.conditional, step.conditional), (one.null, step.null)):
            try:
                alone = denoiser.prediction(step.noisy[:1], timestep, conditioning)
            except torch.OutOfMemoryError:
                raise
            except (RuntimeError, TypeError, ValueError) as error:
                raise self.unknown("cannot be called again with the arguments that it had in the pipeline") from error
            difference = (alone - output[:1].float()).norm() / output[:1].float().norm().clamp(min=1e-30)
            if not difference < _SAME_OUTPUT:
                raise self.unknown(
                    "says something else when it is called again with the arguments that it had in the pipeline"
                )
