"""A pipeline's conditioning of prompts: read off one step of a call of it, then given to the denoiser again."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Generator, Tensor

from mitune.denoiser.conditioning import Conditioning, Passes, stack_passes
from mitune.denoiser.network import denoiser_of, free_denoiser
from mitune.denoiser.opening.calls import calling
from mitune.denoiser.opening.models import Model, guidance_name, prompted
from mitune.denoiser.pipeline import Pipeline
from mitune.denoiser.probe import MIProbe
from mitune.denoiser.quiet import quiet_pipelines

TOGETHER = 64  # prompts in one call


@torch.no_grad()
def passes_of(
    pipe: Pipeline,
    prompts: Sequence[str],
    call: Mapping[str, Any],
    *,
    latents: Tensor | None = None,
    batch_size: int = TOGETHER,
) -> Passes:
    """The denoiser's conditioning on these N prompts, and without them, in a call with the arguments `call`.

    latents: (N, ...) as the denoiser sees them, whose size counts then in place of that in `call`.
    Raises ModelError for arguments that the pipeline does not take, or a use of its denoiser that is not known.
    """
    probes = []
    for start in range(0, len(prompts), batch_size):
        chunk = slice(start, start + batch_size)
        arguments = prompted(pipe, prompts[chunk], call) | _one_step(pipe, call)
        if latents is not None:
            arguments |= _sized(pipe, latents[chunk])
        probes.append(first_step(pipe, arguments))
    return stack_passes([probe.passes for probe in probes])


def condition(model: Model, prompts: Sequence[str], batch_size: int = TOGETHER) -> Conditioning:
    """The denoiser's conditioning on each prompt, in a call of the model."""
    return passes_of(model.pipe, prompts, model.call, batch_size=batch_size).conditional


def _one_step(pipe: Pipeline, call: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a call that shows the denoiser's conditioning, with the prompt and without."""
    scale = guidance_name(type(pipe))
    return {
        "num_inference_steps": 2,  # one would do, but makes PixArt take its distilled path
        scale: max(2.0, call.get(scale, 2.0)),
        "generator": Generator().manual_seed(0),  # a sampler that draws must not touch the global state
        "output_type": "latent",
    }


def _sized(pipe: Pipeline, latents: Tensor) -> dict[str, Any]:
    """Arguments of a call for latents of their size."""
    accepted = inspect.signature(type(pipe).__call__).parameters
    arguments: dict[str, Any] = {"latents": latents.to(denoiser_of(pipe).dtype)}
    if latents.ndim == 4 and "height" in accepted:
        factor = getattr(pipe, "vae_scale_factor", 8)
        arguments["height"], arguments["width"] = (factor * side for side in latents.shape[-2:])
    if "use_resolution_binning" in accepted:
        arguments["use_resolution_binning"] = False
    return arguments


class _Checked(Exception):
    """Leaves a call of the pipeline."""


def first_step(pipe: Pipeline, arguments: Mapping[str, Any]) -> MIProbe:
    """The probe of a call of the pipeline with `arguments`, two steps or more, which is left as soon as it is checked:
    for the denoiser's conditioning, mostly after one step.

    Raises ModelError for arguments that the pipeline does not take, or a use of its denoiser that is not known.
    """
    free_denoiser(pipe)
    with calling(pipe, arguments), quiet_pipelines(), suppress(_Checked), MIProbe(pipe) as probe:

        def leave(*_: object) -> None:
            if probe.checked:
                raise _Checked

        handle = probe.denoiser.register_forward_pre_hook(leave)
        try:
            pipe(**arguments)
        finally:
            handle.remove()
            pipe.maybe_free_model_hooks()  # as at the end of a call that is not left
    probe.check_alone()
    return probe
