"""A forward hook on a pipeline's denoiser: everything that scoring needs, while an unmodified pipeline samples.

    with MIProbe(pipe) as probe:
        latents = pipe(prompts, guidance_scale=4.5, output_type="latent").images
    trace = probe.trace(latents)
    get_score("self-confidence")(trace)

The hook only keeps tensors (`recording.py`); all arithmetic waits for `trace` (`terms.py`), so sampling does not wait
for the device, except at a call's first step. There it is checked that the outputs, z and t are what we take them for,
against what the pipeline hands its scheduler (`checks.py`).
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from mitune.denoiser.batches import Rows, prediction, skips_layers
from mitune.denoiser.checks import Checks
from mitune.denoiser.conditioning import Conditioning, Passes
from mitune.denoiser.guidance import Handed, steps_watched
from mitune.denoiser.network import denoiser_of
from mitune.denoiser.path import NoisePath, path_of
from mitune.denoiser.pipeline import Pipeline
from mitune.denoiser.recording import Call, Reader, Recording, Step
from mitune.denoiser.terms import planned_trace, predicted_latents, trace_of
from mitune.errors import GuidanceError, MituneError
from mitune.information import Trace

_TRUE_SCALE = "true_cfg_scale"  # what pipelines of guidance-distilled models call the scale of true guidance


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
        pipe: Pipeline,
        *,
        guidance_scale: float | None = None,
        on_step: Callable[[MIProbe], None] | None = None,
    ) -> None:
        self.pipe = pipe
        self.denoiser = denoiser_of(pipe)
        self._reader = Reader.of(self.denoiser)
        self._family = self._reader.family
        self._checks = Checks(pipe, self.denoiser, self._family)
        self._call_parameters = inspect.signature(type(pipe).__call__).parameters
        self._guidance_scale = guidance_scale
        self._on_step = on_step
        self._watching = ExitStack()
        self._run = Recording(self._family)
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
    def passes(self) -> Passes:
        """The denoiser's conditioning with the prompt and without: its arguments but z and t.

        Raises ModelError for arguments that cannot be kept candidate by candidate (ControlNet), and if the denoiser
        takes more than latents (inpainting).
        """
        recording = self._recorded()
        if recording.more_than_latents:
            raise self._checks.unknown(
                "takes more than latents, such as a mask or a picture, and can be scored on-line alone"
            )
        return recording.passes

    @property
    def conditioning(self) -> Conditioning:
        """That of the pass with the prompt."""
        return self.passes.conditional

    @property
    def null_conditioning(self) -> Conditioning:
        """That of the pass without."""
        return self.passes.null

    def check_alone(self) -> None:
        """Raises ModelError unless the denoiser, called alone with the conditioning, gives its output in the pipeline:
        what post-hoc scores and training rest on. Costs two calls of it, for one candidate."""
        _ = self.passes
        self._checks.check_alone(self._run)

    def keep(self, candidates: Sequence[int]) -> None:
        """Drops all other candidates: from the next step on, the denoiser is not called for them.

        candidates: their places in the present batch. The pipeline may go on with all latents, of which those dropped
        become meaningless, or a callback may hand it the kept ones alone. A `trace` taken before keeps what is known
        of those dropped.
        """
        self._run.keep(candidates)

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
        return trace_of(steps, latents, path, self._family)

    def trace_so_far(self) -> Trace:
        """The terms of the steps so far, (B, T), with the ẑ₀ that the last of them predicts for the final z₀.

        For scores that are read while the pipeline runs.
        """
        path, steps = self._path_and_steps()
        return trace_of(steps, predicted_latents(steps, path, self._family), path, self._family)

    def planned(self) -> Trace:
        """All steps that the scheduler is set to, with the terms of no candidate: what `Score.check` asks for."""
        return planned_trace(path_of(self.pipe.scheduler))

    @property
    def planned_steps(self) -> int:
        """Denoising steps of the whole run."""
        return len(self.pipe.scheduler.timesteps)

    def _path_and_steps(self) -> tuple[NoisePath, list[Step]]:
        if self._run.pending is not None:
            raise GuidanceError(self._no_guidance())
        path, steps = path_of(self.pipe.scheduler), self._recorded().steps
        if len(steps) > len(path.steps):
            raise MituneError(
                f"The probe has seen {len(steps)} denoising steps, but the scheduler ran {len(path.steps)}; take "
                "probe.trace(latents) after each call of the pipeline."
            )
        return path, steps

    def _narrow(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Takes the rows of dropped candidates out of what the pipeline hands the denoiser."""
        run, bound = self._run, self._reader.bind(args, kwargs)
        handed = bound.arguments[self._reader.noisy_name]
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
            self._run = Recording(self._family)
        call, steps_before = self._reader.read(args, kwargs, output, self._address), self.steps
        if self._family.separate_calls:
            self._watch_separate(call)
        else:
            self._watch_halves(call)
        if self._on_step is not None and self.steps > steps_before:
            self._on_step(self)
        return whole

    def _watch_halves(self, call: Call) -> None:
        half = len(call.noisy) // 2
        if not self._run.steps:
            self._check_halves(call.noisy)
            self._run.begin(half, call)
        null, conditional = call.output[:half], call.output[half:]
        if self._family.conditional_first:
            null, conditional = conditional, null
        self._append(call, conditional=conditional, null=null, noisy=call.noisy[:half])

    def _watch_separate(self, call: Call) -> None:
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

    def _check_halves(self, noisy: Tensor) -> None:
        # Waits for the device, once a call: halves that differ are two sets of candidates.
        half = len(noisy) // 2
        guided = getattr(self.pipe, "do_classifier_free_guidance", True)
        if not guided or len(noisy) % 2 or not torch.equal(noisy[:half], noisy[half:]):
            raise GuidanceError(self._no_guidance())

    def _append(self, call: Call, *, noisy: Tensor, conditional: Tensor, null: Tensor) -> None:
        self._run.append(call, noisy=noisy, conditional=conditional, null=null, guidance_scale=self._scale())

    def _check(self, handed: Handed | None) -> None:
        """Has the latest step checked, until one of them decides."""
        run = self._run
        if run.finished or run.checked or run.narrowed:
            return
        if run.pending is not None:
            raise GuidanceError(self._no_guidance())
        if run.steps:
            self._checks.check_step(run, handed)

    def _recorded(self) -> Recording:
        if not self._run.steps:
            raise MituneError("The probe has seen no denoising step; call the pipeline within `with MIProbe(pipe):`.")
        return self._run

    def _scale(self) -> float:
        pipe_scale = None if _TRUE_SCALE in self._call_parameters else getattr(self.pipe, "guidance_scale", None)
        return (self._guidance_scale or pipe_scale or math.nan) + self._family.added_guidance

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
